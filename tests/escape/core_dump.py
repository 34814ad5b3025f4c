# Its memory, written down by the kernel when it ends badly.
def attempt():
    import resource

    child = os.fork()
    if child == 0:
        os.chdir("/tmp")
        try:
            resource.setrlimit(resource.RLIMIT_CORE, (1 << 24, 1 << 24))
        except (OSError, ValueError):
            pass
        os.kill(os.getpid(), 11)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    for name in ("/tmp/core", "/tmp/core.%d" % child):
        if os.path.exists(name):
            os.unlink(name)
    if not os.WCOREDUMP(status):
        raise OSError(errno.EFBIG, "no core")
