# A view of the cgroups of its own, and in it to one that no program is attached to.
def attempt():
    place = "/tmp/cgroups-" + p["token"]
    os.mkdir(place)
    try:
        if libc.mount(b"none", place.encode(), b"cgroup2", 0, None):
            raise OSError(ctypes.get_errno(), "mount")
        try:
            with open(place + p["cgroup_path"] + "/cgroup.procs", "w") as file:
                file.write(str(os.getpid()))
            tcp(socket.AF_INET, V4)
        finally:
            libc.umount2(place.encode(), 2)
    finally:
        os.rmdir(place)
