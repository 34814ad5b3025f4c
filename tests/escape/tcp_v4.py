def attempt():
    tcp(socket.AF_INET, V4)
