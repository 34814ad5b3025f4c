# A file of the gate's user.
def attempt():
    with open(p["secret"]) as file:
        if file.read() != "the secret":
            raise RuntimeError("another file")
