def attempt():
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as s:
        s.settimeout(PATIENCE)
        s.sendto(TOKEN, socket.MSG_FASTOPEN, (V4, PORT))
        s.shutdown(socket.SHUT_WR)
        s.recv(100)
