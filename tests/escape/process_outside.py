# What a process outside was started with.
def attempt():
    with open("/proc/%d/environ" % p["victim"]["pid"], "rb") as file:
        if not file.read():
            raise OSError(errno.EACCES, "environ")
