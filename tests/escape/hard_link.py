# The same file by another name, which is left when the first is removed.
def attempt():
    link = "/tmp/link-" + p["token"]
    os.link(p["secret"], link)
    try:
        with open(link) as file:
            if file.read() != "the secret":
                raise RuntimeError("another file")
    finally:
        os.unlink(link)
