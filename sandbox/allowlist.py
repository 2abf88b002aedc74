"""Which hosts and ports children may reach through the egress proxy. Pure.

An entry is `host:port`: an exact name, an IP address, or `*.example.com` for every name below it.
It is decided twice: by name and port before a name is resolved, then by the address that came of
it. An address that is not a public one is reached only where an entry names it literally, so no
name leads to this machine, its network or a cloud's metadata.

Called by `spec`, which checks entries on construction, and by `egress`.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Union

MAX_NAME_CHARS = 253
_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
_Address = Union[ipaddress.IPv4Address, ipaddress.IPv6Address]

_TRANSLATED = ipaddress.IPv6Network("64:ff9b::/96")  # NAT64: the last four bytes are an IPv4 one
# Public by the registry, and yet services of the cloud that a machine stands in.
_OF_CLOUDS = tuple(
    map(
        ipaddress.IPv4Network,
        ("192.0.0.0/24", "168.63.129.16/32", "161.26.0.0/16", "166.8.0.0/14"),
    )
)


@dataclass(frozen=True)
class HostPort:
    """`host`: a lower-case ASCII name without a final dot, or an address as `ipaddress` writes it;
    an IPv6 address that stands for an IPv4 one is that one."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse(text: str, default_port: int | None = None) -> HostPort:
    """Raises `ValueError` saying what is wrong."""
    host, colon, port = text.rpartition(":")
    if default_port is not None and (not colon or text.endswith("]")):
        host, port = text, str(default_port)
    elif not colon or (":" in host and not host.endswith("]")):
        raise ValueError("write host:port, an IPv6 address in brackets")
    if not (re.fullmatch("[0-9]{1,5}", port) and 0 < int(port) < 2**16):
        raise ValueError(f"{port!r} is not a TCP port")
    if host.startswith("[") and host.endswith("]"):
        address = _address(host[1:-1])
        if address is None or ":" not in host:
            raise ValueError(f"{host} is not an IPv6 address")
        return HostPort(str(address), int(port))
    return HostPort(_host(host), int(port))


def parse_entry(text: str) -> str:
    """The entry in its one spelling. Raises `ValueError` saying what is wrong."""
    if not text.startswith("*."):
        return str(parse(text))
    below = parse(text[2:])
    if _address(below.host) is not None:
        raise ValueError("an address has no names below it")
    if "." not in below.host:
        raise ValueError(f"every name of a whole top-level domain, {below.host!r}, is too much")
    return f"*.{below}"


class Allowlist:
    def __init__(self, entries: Iterable[str]) -> None:
        self._exact: set[HostPort] = set()
        self._below: set[HostPort] = set()
        for entry in entries:
            if entry.startswith("*."):
                self._below.add(parse(entry[2:]))
            else:
                self._exact.add(parse(entry))

    def names(self, wanted: HostPort) -> bool:
        """Is it on the list, whatever address it has?"""
        if wanted in self._exact:
            return True
        parents = wanted.host.split(".")[1:] if _address(wanted.host) is None else []
        return any(
            HostPort(".".join(parents[index:]), wanted.port) in self._below
            for index in range(len(parents))
        )

    def reaches(self, address: str, port: int) -> bool:
        """May a connection go to this address (a numeric one)?"""
        parsed = _address(address)
        if parsed is None:
            return False
        return is_public(parsed) or HostPort(str(parsed), port) in self._exact

    def lists(self, address: str, port: int) -> bool:
        """Is this very address on the list?"""
        parsed = _address(address)
        return parsed is not None and HostPort(str(parsed), port) in self._exact


def is_public(address: _Address) -> bool:
    """Not of this machine, this link, a private network, a group, or a reserved block."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.sixtofour
        if address in _TRANSLATED:
            inner = ipaddress.IPv4Address(address.packed[-4:])
        if inner is not None:
            return is_public(inner)
        if address.is_site_local:
            return False
    elif any(address in network for network in _OF_CLOUDS):
        return False
    return address.is_global and not (address.is_multicast or address.is_reserved)


def _host(text: str) -> str:
    host = text.lower()
    address = _address(host)
    if address is not None:
        return str(address)
    host = host[:-1] if host.endswith(".") else host
    labels = host.split(".")
    if not host.isascii():
        raise ValueError(f"{text!r} is not ASCII: write the name as xn--...")
    if len(host) > MAX_NAME_CHARS or not all(_LABEL.fullmatch(label) for label in labels):
        raise ValueError(f"{text!r} is neither a host name nor an IP address")
    if _NUMBER.fullmatch(labels[-1]):  # resolvers take 127.1 and 0x7f000001 for addresses
        raise ValueError(f"{text!r} is not an IP address in its usual form")
    for label in labels:
        if label.startswith("xn--"):
            try:
                label.encode().decode("idna")
            except UnicodeError as error:
                raise ValueError(f"{text!r} is not a valid international name: {error}") from None
    return host


def _address(text: str) -> _Address | None:
    """None where `text` is none; an address of a named interface is none either."""
    if "%" in text:
        return None
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address
