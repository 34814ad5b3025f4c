# An abstract name has no permissions: the network namespace and Landlock's scope are all that there is.
def attempt():
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as s:
        s.connect("\0" + p["abstract"])
        converse(s)
