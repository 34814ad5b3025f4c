# Listens, and answers whoever calls: the answer is what gets out.
def attempt():
    with socket.create_server((p["here"], 5000)) as listener:
        listener.settimeout(PATIENCE)
        stream, _ = listener.accept()
        stream.settimeout(PATIENCE)
        stream.recv(10)
        stream.sendall(TOKEN)
