# By CONNECT, as a program that knows proxies does.
def attempt():
    if not (INSIDE or p.get("stranger")):
        return "ok" if b"reached" in tcp(socket.AF_INET, V4) else "refused"
    with socket.create_connection(proxy(), PATIENCE) as s:
        s.sendall(("CONNECT %s:%d HTTP/1.1\r\nhost: %s\r\n\r\n" % (p["name"], PORT, p["name"])).encode())
        answer = s.recv(4096).split(b" ")[1].decode()
        if answer != "200":
            return answer
        return "ok" if b"reached" in converse(s) else "refused"
