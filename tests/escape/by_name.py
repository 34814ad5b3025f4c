# By a name, as an action has them; where there is none to ask, by the address that it stands for.
def attempt():
    name = p["name"] if INSIDE else p[p["stands_for"]]
    try:
        found = socket.getaddrinfo(name, p["at"], socket.AF_INET, socket.SOCK_STREAM)[0][4]
    except socket.gaierror:
        return "no name"
    try:
        said = tcp(socket.AF_INET, found[0], found[1], payload())
    except OSError as error:
        # The last one: it was reset before this end has closed its half.
        if error.errno not in (errno.ECONNRESET, errno.EPIPE, errno.ENOTCONN):
            raise
        return "refused"
    return "ok" if b"reached" in said else "refused"


def payload():
    if p["speaks"] == "http":
        return b"GET /%s HTTP/1.1\r\nhost: other.escape.test\r\nconnection: close\r\n\r\n" % TOKEN
    if p["speaks"] == "tls":
        return hello()
    return TOKEN


def hello():
    # A ClientHello for another name than the one that was asked for.
    import ssl

    out = ssl.MemoryBIO()
    tls = ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), out, server_hostname=p["token"] + ".test")
    try:
        tls.do_handshake()
    except ssl.SSLWantReadError:
        pass
    return out.read()
