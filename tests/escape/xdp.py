def attempt():
    socket.socket(44, socket.SOCK_RAW).close()
