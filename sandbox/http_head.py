"""What a client says to an HTTP proxy, and what a server answers: the heads alone. Pure.

Strict, for what is sent on must mean the same to everyone who reads it: one request with one
length, its host the one that was decided about, and nothing that speaks of the connection.
Format: RFC 9112. Called by `egress`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from .allowlist import HostPort, parse

_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_REQUEST_LINE = re.compile(rb"(" + _TOKEN + rb") ([\x21-\x7e]+) HTTP/1\.[01]")
_STATUS_LINE = re.compile(rb"HTTP/1\.[01] ([1-9][0-9]{2})(?: [\t\x20-\x7e\x80-\xff]*)?")
_FIELD = re.compile(rb"(" + _TOKEN + rb"):[ \t]*([\t\x20-\x7e\x80-\xff]*)")
_OF_CONNECTION = frozenset(
    (
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"upgrade",
    )
)
_OF_FRAMING = frozenset((b"host", b"content-length", b"transfer-encoding"))


class BadHead(Exception):
    """`status` is the answer's; the message says what is wrong."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Request:
    wanted: HostPort
    head: bytes | None
    """What goes to the server; None: CONNECT, so bytes both ways."""
    body_bytes: int = 0


def parse_request(raw: bytes) -> Request:
    """`raw` is a whole head, its empty line included. Raises `BadHead`."""
    line, fields = _lines(raw)
    match = _REQUEST_LINE.fullmatch(line)
    if match is None:
        raise BadHead(400, "this is no HTTP/1.1 request line")
    method, target = match[1], match[2].decode("ascii")
    if method == b"CONNECT":
        return Request(_host_port(target, None), None)
    if not target.lower().startswith("http://"):
        raise BadHead(400, "this is a proxy: ask for http://host/path, or CONNECT host:port")
    authority, path = _split_url(target[len("http://") :])
    wanted = _host_port(authority, 80)
    body_bytes = _body_bytes(fields)
    host = str(wanted).encode() if wanted.port != 80 else str(wanted).encode()[: -len(":80")]
    head = b"%s %s HTTP/1.1\r\nHost: %s\r\n" % (method, path.encode(), host)
    head += _kept(fields, _OF_FRAMING)
    if body_bytes is not None:
        head += b"Content-Length: %d\r\n" % body_bytes
    return Request(wanted, head + b"Connection: close\r\n\r\n", body_bytes or 0)


def parse_answer(raw: bytes) -> tuple[int, bytes]:
    """The status, and the head as the client gets it. Raises `BadHead`."""
    line, fields = _lines(raw)
    match = _STATUS_LINE.fullmatch(line)
    if match is None or match[1] == b"101":
        raise BadHead(502, "the server's answer is not HTTP/1.1")
    status = int(match[1])
    head = line + b"\r\n" + _kept(fields, frozenset())
    # An interim answer says nothing of the connection.
    return status, head + (b"" if status < 200 else b"Connection: close\r\n") + b"\r\n"


def _lines(raw: bytes) -> tuple[bytes, list[tuple[bytes, bytes]]]:
    first, *rest = raw[: -len(b"\r\n\r\n")].split(b"\r\n")
    fields = []
    for line in rest:
        match = _FIELD.fullmatch(line)
        if match is None:
            raise BadHead(400, "a line of the head is not 'Name: value'")
        fields.append((match[1], match[2]))
    return first, fields


def _host_port(authority: str, default_port: int | None) -> HostPort:
    try:
        return parse(authority, default_port)
    except ValueError as error:
        raise BadHead(400, str(error)) from None


def _split_url(rest: str) -> tuple[str, str]:
    """Authority and path, with the query."""
    match = re.fullmatch(r"([^/?#@\\]+)([/?][^#]*)?", rest)
    if match is None:
        raise BadHead(400, "write http://host/path, without user and fragment")
    path = match[2] or "/"
    return match[1], path if path.startswith("/") else f"/{path}"


def _body_bytes(fields: list[tuple[bytes, bytes]]) -> int | None:
    if any(name.lower() == b"transfer-encoding" for name, _ in fields):
        raise BadHead(411, "a body needs a Content-Length here: no Transfer-Encoding")
    lengths = [value.strip() for name, value in fields if name.lower() == b"content-length"]
    if not lengths:
        return None
    if len(lengths) > 1 or not re.fullmatch(rb"[0-9]{1,15}", lengths[0]):
        raise BadHead(400, "Content-Length must be one number")
    return int(lengths[0])


def _kept(fields: list[tuple[bytes, bytes]], more: frozenset[bytes]) -> bytes:
    """All fields but those about the connection, those that it names, and `more`."""
    named = b",".join(value for name, value in fields if name.lower() == b"connection")
    dropped = {name.strip().lower() for name in named.split(b",")} | _OF_CONNECTION | more
    # A body is passed on as it comes: what frames it stays, whatever the connection names.
    dropped -= _OF_FRAMING - more
    return b"".join(b"%s: %s\r\n" % field for field in fields if field[0].lower() not in dropped)
