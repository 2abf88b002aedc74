"""Entries of the allowlist: their spellings, what they name, and which addresses they reach."""

from __future__ import annotations

import ipaddress

import pytest

from sandbox.allowlist import Allowlist, HostPort, is_public, parse, parse_entry


@pytest.mark.parametrize(
    ("text", "entry"),
    [
        ("api.example.com:443", "api.example.com:443"),
        ("API.Example.COM.:0443", "api.example.com:443"),
        ("localhost:1", "localhost:1"),
        ("my_host-2:65535", "my_host-2:65535"),
        ("xn--bcher-kva.example:80", "xn--bcher-kva.example:80"),
        ("*.Example.com:443", "*.example.com:443"),
        ("127.0.0.1:8080", "127.0.0.1:8080"),
        ("[2001:DB8:0::1]:8080", "[2001:db8::1]:8080"),
        ("[::ffff:127.0.0.1]:8080", "127.0.0.1:8080"),
    ],
)
def test_an_entry_has_one_spelling(text: str, entry: str) -> None:
    assert parse_entry(text) == entry
    assert parse_entry(entry) == entry


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "write host:port"),
        ("api.example.com", "write host:port"),
        ("https://api.example.com:443", "write host:port"),
        ("api.example.com:443/v1", "not a TCP port"),
        ("api.example.com:https", "not a TCP port"),
        ("api.example.com:0", "not a TCP port"),
        ("api.example.com:65536", "not a TCP port"),
        ("api.example.com:٤٤٣", "not a TCP port"),
        ("api.example.com:-1", "not a TCP port"),
        (":443", "neither a host name nor an IP address"),
        ("a..example:443", "neither a host name nor"),
        ("a.example..:443", "neither a host name nor"),
        ("-a.example:443", "neither a host name nor"),
        ("a b.example:443", "neither a host name nor"),
        ("u@a.example:443", "neither a host name nor"),
        ("a\n.example:443", "neither a host name nor"),
        (f"{'a' * 64}.example:443", "neither a host name nor"),
        (f"{'a.' * 127}example:443", "neither a host name nor"),
        ("bücher.example:443", "not ASCII: write the name as xn--"),
        ("xn--\x7f.example:443", "neither a host name nor"),
        ("xn--zzzzzzzzz99999999.example:443", "not a valid international name"),
        ("127.1:80", "not an IP address in its usual form"),
        ("0x7f000001:80", "not an IP address in its usual form"),
        ("2130706433:80", "not an IP address in its usual form"),
        ("127.0.0.01:80", "not an IP address in its usual form"),
        ("::1:80", "an IPv6 address in brackets"),
        ("[127.0.0.1]:80", "not an IPv6 address"),
        ("[fe80::1%eth0]:80", "not an IPv6 address"),
        ("*:443", "neither a host name nor"),
        ("*.com:443", "a whole top-level domain"),
        ("*.127.0.0.1:443", "an address has no names below it"),
        ("a.*.example:443", "neither a host name nor"),
        ("*.*.example:443", "neither a host name nor"),
    ],
)
def test_what_is_no_entry_is_refused_with_a_reason(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        parse_entry(text)


def test_names_are_held_against_it_with_their_port() -> None:
    allowlist = Allowlist(["api.example.com:443", "*.cdn.example:443", "10.0.0.7:80"])
    for wanted in ("API.example.com.:443", "a.cdn.example:443", "a.b.cdn.example:443"):
        assert allowlist.names(parse(wanted)), wanted
    for wanted in (
        *("api.example.com:80", "example.com:443", "x.api.example.com:443"),
        *("cdn.example:443", "evilcdn.example:443", "a.cdn.example:80", "cdn.example.evil:443"),
        *("10.0.0.7:443", "10.0.0.8:80", "7.10.0.0.7.example:80"),
    ):
        assert not allowlist.names(parse(wanted)), wanted
    assert allowlist.names(parse("[::ffff:10.0.0.7]:80")), "the same address"
    assert parse("a.example", 80) == HostPort("a.example", 80)
    assert parse("[::1]", 80) == HostPort("::1", 80)


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.8.8.8", "::1", "0.0.0.0", "::", "0.1.2.3"),
        *("169.254.169.254", "fe80::1", "fd00:ec2::254", "100.100.100.200", "168.63.129.16"),
        *("161.26.0.10", "166.9.14.2"),
        *("10.1.2.3", "172.16.0.1", "192.168.1.1", "192.0.0.192", "fc00::1", "fec0::1"),
        *("224.0.0.1", "239.1.2.3", "ff02::1", "ff0e::1", "255.255.255.255", "240.0.0.1"),
        *("::ffff:127.0.0.1", "::ffff:8.8.8.8", "::127.0.0.1", "64:ff9b::a00:1"),
        *("2002:7f00:1::1", "2001:0:7f00:1::", "64:ff9b:1::1", "2001:db8::1", "192.0.2.1"),
    ],
)
def test_no_name_leads_to_what_is_not_public(address: str) -> None:
    parsed = ipaddress.ip_address(address)
    assert not is_public(parsed)
    allowlist = Allowlist(["name.example:80"])
    if address != "::ffff:8.8.8.8":  # is taken for the public address that it stands for
        assert not allowlist.reaches(address, 80)


def test_what_is_public_and_what_is_listed_is_reached() -> None:
    allowlist = Allowlist(["name.example:80", "10.0.0.7:80", "[fd00::1]:80"])
    for address in ("8.8.8.8", "2606:4700::1", "64:ff9b::808:808", "2002:808:808::1"):
        assert allowlist.reaches(address, 80)
        assert not allowlist.lists(address, 80)
    for address in ("10.0.0.7", "fd00::1", "::ffff:10.0.0.7"):
        assert allowlist.reaches(address, 80)
        assert allowlist.lists(address, 80)
        assert not allowlist.reaches(address, 81)
    for nonsense in ("", "name.example", "fe80::1%eth0"):
        assert not allowlist.reaches(nonsense, 80)
