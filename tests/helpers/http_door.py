"""Requests to an HTTP door, byte by byte where that matters."""

from __future__ import annotations

import http.client
import json
import socket
import time

ASK = {"model": "fake", "prompt": "hello", "max_tokens": 8, "temperature": 0, "ignore_eos": True}


def ask(address, method, path, body=b"", headers=(), context=None):
    """(status, headers, body)."""
    kind = http.client.HTTPConnection if context is None else http.client.HTTPSConnection
    connection = kind(address, timeout=20, **({} if context is None else {"context": context}))
    try:
        connection.request(method, path, body if isinstance(body, bytes) else json.dumps(body), dict(headers))
        response = connection.getresponse()
        return response.status, response.headers, response.read()
    finally:
        connection.close()


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


def complete(address, **options):
    status, _, body = ask(address, "POST", "/v1/completions", ASK | options)
    return status, json.loads(body)


def raw(address, content, *, more=b"", wait_s=0.0):
    """Send bytes, and perhaps more after a while; what comes back until the connection ends."""
    host, _, port = address.partition(":")
    with socket.create_connection((host, int(port)), timeout=15) as connection:
        found = b""
        try:
            connection.sendall(content)
            time.sleep(wait_s)
            connection.sendall(more)
            while piece := connection.recv(65536):
                found += piece
        except ConnectionError:
            pass
        return found


def start(address, path="/v1/completions", **options):
    host, _, port = address.partition(":")
    body = json.dumps(ASK | options).encode()
    connection = socket.create_connection((host, int(port)), timeout=20)
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body)
    return connection
