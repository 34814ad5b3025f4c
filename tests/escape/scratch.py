# More than the scratch directory holds, in files that are small enough.
def attempt():
    names = ["/tmp/%s-%d" % (p["token"], number) for number in range(8)]
    try:
        for name in names:
            with open(name, "wb") as file:
                file.write(bytes(1 << 20))
    finally:
        for name in names:
            if os.path.exists(name):
                os.unlink(name)
