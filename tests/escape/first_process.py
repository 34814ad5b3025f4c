# The memory of the sandbox's first process, which has the same uid.
def attempt():
    os.close(os.open("/proc/1/mem", os.O_RDWR))
