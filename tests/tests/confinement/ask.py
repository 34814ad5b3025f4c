# The gate's proxy, asked by hand. Ends with whatever follows in the test.
import http.client
import json
import os
import socket

PROXY = int(os.environ.get("http_proxy", ":0").rsplit(":", 1)[1])


def raw(request, family=socket.AF_INET, address="127.0.0.1", port=None):
    """Sends these bytes to the proxy and gives status, header and JSON (or text) of what came back."""
    with socket.socket(family, socket.SOCK_STREAM) as s:
        s.settimeout(20)
        s.connect((address, port or PROXY))
        s.sendall(request.encode())
        answer = http.client.HTTPResponse(s)
        answer.begin()
        connected = request.startswith("CONNECT") and answer.status == 200
        body = "" if connected else answer.read().decode()
        try:
            parsed = json.loads(body)
        except ValueError:
            parsed = body
        return {"status": answer.status, "decision": answer.getheader("latchgate-decision-id"), "body": parsed}


def get(authority, path, more=""):
    return raw(f"GET http://{authority}{path} HTTP/1.1\r\nHost: {authority}\r\n{more}\r\n")


def connect(authority):
    return raw(f"CONNECT {authority} HTTP/1.1\r\nHost: {authority}\r\n\r\n")
