# A process outside that an attacker would like to use: it has a connection to the target, hands on what its sockets are
# told, and gives connections away.
import json
import os
import socket
import sys
import threading

target = (sys.argv[1], int(sys.argv[2]))
directory, abstract = sys.argv[3], sys.argv[4]
os.umask(0)


def hand_on(listener):
    while True:
        stream, _ = listener.accept()
        with stream, socket.create_connection(target, 5) as out:
            out.sendall(stream.recv(4096))
            stream.sendall(b"reached")


def give_away(listener):
    while True:
        stream, _ = listener.accept()
        with stream, socket.create_connection(target, 5) as out:
            socket.send_fds(stream, [b"x"], [out.fileno()])


def listen(address):
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(address)
    listener.listen(50)
    return listener


for work, address in ((hand_on, directory + "/socket"), (hand_on, "\0" + abstract), (give_away, directory + "/rights")):
    threading.Thread(target=work, args=(listen(address),), daemon=True).start()
held = [socket.create_connection(target, 5) for _ in range(16)]
print(json.dumps({"pid": os.getpid(), "descriptors": [s.fileno() for s in held]}), flush=True)
sys.stdin.read()
