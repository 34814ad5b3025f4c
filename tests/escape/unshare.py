# A user namespace of its own, in which it would have every capability.
def attempt():
    if child := os.fork():
        _, status = os.waitpid(child, 0)
        if code := os.waitstatus_to_exitcode(status):
            raise OSError(code, "unshare")
        return
    try:
        call(272, 0x10000000)
    except OSError as error:
        os._exit(error.errno)
    os._exit(0)
