# Makes a map, as whoever would change those of the gate must be able to.
def attempt():
    attributes = ctypes.create_string_buffer(struct.pack("=4I", 2, 4, 4, 1) + bytes(112))
    os.close(call(321, 0, attributes, 128))
