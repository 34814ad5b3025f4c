# TIOCSTI. There is no terminal here; that it is asked for one is what the filter prevents.
def attempt():
    reader, _ = os.pipe()
    try:
        import fcntl

        fcntl.ioctl(reader, 0x5412, b"x")
    except OSError as error:
        if error.errno != errno.ENOTTY:
            raise
