# Connects by sending; once the kernel has the target's cookie, the data goes with the first packet.
def attempt():
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as s:
        patience = struct.pack("=qq", int(PATIENCE), int(PATIENCE % 1 * 1e6))
        for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
            s.setsockopt(socket.SOL_SOCKET, option, patience)
        s.sendto(TOKEN, socket.MSG_FASTOPEN, (V4, PORT))
        s.shutdown(socket.SHUT_WR)
        s.recv(100)
