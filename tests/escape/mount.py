def attempt():
    place = b"/tmp/mounted-" + TOKEN
    os.mkdir(place)
    if libc.mount(b"none", place, b"tmpfs", 0, None):
        raise OSError(ctypes.get_errno(), "mount")
    libc.umount2(place, 2)
    os.rmdir(place)
