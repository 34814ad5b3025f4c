# Whether a program with the setuid bit would still get what the bit says.
def attempt():
    with open("/proc/self/status") as status:
        if "NoNewPrivs:\t0" not in status.read():
            raise OSError(errno.EPERM, "no_new_privs")
