# PTRACE_SEIZE, which does not stop it.
def attempt():
    call(101, 0x4206, p["victim"]["pid"], 0, 0)
