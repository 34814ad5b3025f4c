# modify_ldt: reads none, but asks the kernel for it.
def attempt():
    call(154, 0, ctypes.create_string_buffer(16), 16)
