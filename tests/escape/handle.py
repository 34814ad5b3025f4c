# The handle of a file, by which it could be opened past all names.
def attempt():
    handle = ctypes.create_string_buffer(struct.pack("=Ii", 128, 0) + bytes(128))
    call(303, -100, b"/tmp", handle, ctypes.create_string_buffer(8), 0)
