# By a link in the scratch directory, to a file that is not there.
def attempt():
    link = "/tmp/link-" + p["token"]
    os.symlink(p["secret"], link)
    try:
        with open(link) as file:
            if file.read() != "the secret":
                raise RuntimeError("another file")
    finally:
        os.unlink(link)
