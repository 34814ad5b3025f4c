# The memory of the sandbox's first process, which has the same uid.
def attempt():
    os.close(os.open("/proc/1/mem" if INSIDE else "/proc/self/mem", os.O_RDONLY))
