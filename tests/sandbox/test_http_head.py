"""What is sent on of a request and of an answer, and what is refused: whole values."""

from __future__ import annotations

import pytest

from sandbox.allowlist import HostPort
from sandbox.http_head import BadHead, Request, parse_answer, parse_request

END = b"\r\n\r\n"


@pytest.mark.parametrize(
    ("raw", "request_"),
    [
        (
            b"CONNECT A.example:443 HTTP/1.1\r\nHost: b.example",
            Request(HostPort("a.example", 443), None),
        ),
        (b"CONNECT [::1]:443 HTTP/1.0", Request(HostPort("::1", 443), None)),
        (
            b"GET HTTP://a.example/x?y HTTP/1.0\r\nHOST: b.example\r\nAccept: */*",
            Request(
                HostPort("a.example", 80),
                b"GET /x?y HTTP/1.1\r\nHost: a.example\r\nAccept: */*\r\nConnection: close" + END,
            ),
        ),
        (
            b"POST http://a.example:8080?q HTTP/1.1\r\nContent-Length: 3\r\n"
            b"Connection: X-Secret, content-length, Host\r\nX-Secret: 1\r\nUpgrade: h2c\r\n"
            b"Proxy-Authorization: Basic x\r\nKeep-Alive: 1\r\nTE: trailers\r\nX-Kept:  a b ",
            Request(
                HostPort("a.example", 8080),
                b"POST /?q HTTP/1.1\r\nHost: a.example:8080\r\nX-Kept: a b \r\n"
                b"Content-Length: 3\r\nConnection: close" + END,
                3,
            ),
        ),
        (
            b"PUT http://[fd00::1]/ HTTP/1.1\r\nContent-Length: 0",
            Request(
                HostPort("fd00::1", 80),
                b"PUT / HTTP/1.1\r\nHost: [fd00::1]\r\nContent-Length: 0\r\nConnection: close"
                + END,
            ),
        ),
    ],
)
def test_a_request_is_sent_on_to_the_host_that_was_decided_about(
    raw: bytes, request_: Request
) -> None:
    assert parse_request(raw + END) == request_


GET = b"GET http://a.example/ HTTP/1.1\r\n"


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"", 400),
        (b"\r\nGET http://a.example/ HTTP/1.1", 400),
        (b"GET / HTTP/1.1\r\nHost: a.example", 400),
        (b"GET a.example:80 HTTP/1.1", 400),
        (b"GET https://a.example/ HTTP/1.1", 400),
        (b"GET http:///x HTTP/1.1", 400),
        (b"GET http://u:p@a.example/ HTTP/1.1", 400),
        (b"GET http://a.example\\@b.example/ HTTP/1.1", 400),
        (b"GET http://a.example/#b HTTP/1.1", 400),
        (b"GET http://a.example:x/ HTTP/1.1", 400),
        (b"GET http://127.1/ HTTP/1.1", 400),
        (b"GET http://a.example/ HTTP/2.0", 400),
        (b"GET http://a.example/ HTTP/1.1 x", 400),
        (b"GET  http://a.example/ HTTP/1.1", 400),
        (b"GET http://a.example/\xc3\xa9 HTTP/1.1", 400),
        (b"G\x00T http://a.example/ HTTP/1.1", 400),
        (b"CONNECT a.example HTTP/1.1", 400),
        (b"CONNECT http://a.example:443 HTTP/1.1", 400),
        (b"CONNECT a.example:443/ HTTP/1.1", 400),
        (GET + b"A : b", 400),
        (GET + b"A", 400),
        (GET + b" folded: x", 400),
        (GET + b"A: b\nHost: c", 400),
        (GET + b"A: b\rHost: c", 400),
        (GET + b"A: b\x00", 400),
        (GET + b"Content-Length: 1\r\nContent-Length: 1", 400),
        (GET + b"Content-Length: +1", 400),
        (GET + b"Content-Length: 1, 1", 400),
        (GET + b"Content-Length: 1\r\ncontent-length: 2", 400),
        (GET + b"Transfer-Encoding: chunked", 411),
        (GET + b"Content-Length: 1\r\nTransfer-Encoding: identity", 411),
    ],
)
def test_what_could_be_read_in_two_ways_is_refused(raw: bytes, status: int) -> None:
    with pytest.raises(BadHead) as refused:
        parse_request(raw + END)
    assert refused.value.status == status


def test_an_answer_keeps_its_framing_and_loses_what_is_of_the_connection() -> None:
    assert parse_answer(
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nConnection: keep-alive, X\r\nX: 1\r\n"
        b"Keep-Alive: timeout=5\r\nSet-Cookie: a\r\nSet-Cookie: b" + END
    ) == (
        200,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nSet-Cookie: a\r\nSet-Cookie: b\r\n"
        b"Connection: close" + END,
    )
    assert parse_answer(b"HTTP/1.1 100 Continue" + END) == (100, b"HTTP/1.1 100 Continue" + END)
    assert parse_answer(b"HTTP/1.0 404" + END)[0] == 404
    for raw in (b"SSH-2.0-x", b"HTTP/1.1 101 Switching Protocols", b"HTTP/1.1 20 OK"):
        with pytest.raises(BadHead):
            parse_answer(raw + END)
