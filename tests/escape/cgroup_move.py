# Into a cgroup that no program is attached to.
def attempt():
    with open(p["cgroup"] + "/cgroup.procs", "w") as file:
        file.write(str(os.getpid()))
    tcp(socket.AF_INET, V4)
