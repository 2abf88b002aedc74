"""What a child cannot reach: files, ports and kinds of sockets, each refused by the kernel."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sandbox import ChildReport, Limits
from sandbox.layers import landlock


def run_once(lab: Any, data: dict[str, Any], **spec: Any) -> ChildReport:
    async def go() -> ChildReport:
        zygote = await lab.start("acts:act", **spec)
        try:
            report: ChildReport = await zygote.run(data, wall_s=30.0)
            return report
        finally:
            await zygote.close()

    report: ChildReport = lab.run(go())
    assert report.error == ""
    return report


@pytest.fixture
def tree(code: Path) -> Path:
    """A readable folder with a hidden one in it, and a link from the one into the other."""
    (code / "open.txt").write_text("for all")
    (code / "deeper").mkdir()
    (code / "deeper" / "open.txt").write_text("for all, too")
    (code / "deeper" / "hidden" / "keys").mkdir(parents=True)
    (code / "deeper" / "hidden" / "key.txt").write_text("hush")
    (code / "deeper" / "hidden" / "keys" / "key.txt").write_text("hush")
    (code / "link.txt").symlink_to("deeper/hidden/key.txt")
    return code


def test_what_is_readable_can_be_read_and_what_is_hidden_in_it_cannot(lab: Any, tree: Path) -> None:
    hidden = tree / "deeper" / "hidden"
    shown = {tree / "open.txt": "for all", tree / "deeper" / "open.txt": "for all, too"}
    concealed = [hidden / "key.txt", hidden / "keys" / "key.txt", tree / "link.txt"]
    act = {"do": "read", "paths": [str(path) for path in (*shown, *concealed)]}
    refusal = {"process": "EACCES", "namespaces": "ENOENT"}[lab.tier]  # seen, or not even that

    found = run_once(lab, act, readable=[str(tree)], hidden=[str(hidden)]).value
    assert found == {
        **{str(path): text for path, text in shown.items()},
        **{str(path): refusal for path in concealed},
    }
    bare = run_once(lab, act, readable=[str(tree)]).value
    assert [bare[str(path)] for path in concealed] == ["hush"] * 3, "readable where not hidden"
    assert set(run_once(lab, act).value.values()) == {refusal}, "and not where nobody asked for it"


def test_a_link_to_a_hidden_folder_hides_it(lab: Any, tree: Path) -> None:
    """It is the folder that is meant, by whatever name."""
    (tree / "other-name").symlink_to("deeper/hidden")
    path = str(tree / "deeper" / "hidden" / "key.txt")
    act = {"do": "read", "paths": [path]}
    found = run_once(lab, act, readable=[str(tree)], hidden=[str(tree / "other-name")]).value
    assert found[path] in {"EACCES", "ENOENT"}


def test_nothing_else_of_the_machine_can_be_read(lab: Any, tmp_path: Path) -> None:
    outside = tmp_path / "outside.txt"
    outside.write_text("hush")
    outside.chmod(0o644)
    shadow, passwd = "/etc/shadow", "/etc/passwd"
    found = lab.do("read", paths=[str(outside), shadow, passwd, __file__]).value
    refusal = {"process": "EACCES", "namespaces": "ENOENT"}[lab.tier]
    own = found.pop(passwd)
    assert set(found.values()) == {refusal}
    if lab.tier == "process":
        assert own == refusal
    else:
        assert own.startswith("agent:x:")
        assert own.count("\n") == 1, "nobody of this machine's is named"


def test_what_the_system_keeps_of_its_runtimes_is_there(lab: Any) -> None:
    """Else the distribution's own Java, PHP and R do not run, or not with all that they have."""
    kinds = "os-release", "java-*-openjdk/security/java.security", "php/*/cli/php.ini", "R/Renviron"
    wanted = [str(path) for kind in kinds for path in Path("/etc").glob(kind)]
    found = lab.do("read", paths=wanted).value
    refused = {path for path, text in found.items() if text in {"EACCES", "ENOENT"}}
    assert wanted and not refused


def test_only_the_childs_own_folder_can_be_written(lab: Any, code: Path) -> None:
    own = ["mine.txt", "../home/mine.txt", "../tmp/mine.txt", "/dev/null"]
    others = [str(code / "new.txt"), "/usr/new", "/etc/new", "/new", "/proc/sys/kernel/hostname"]
    found = run_once(lab, {"do": "write", "paths": [*own, *others]}, readable=[str(code)]).value
    assert [found[path] for path in own] == ["done"] * 4
    refused = {"EACCES"} if lab.tier == "process" else {"EROFS", "ENOENT"}
    assert {found[path] for path in others} <= refused
    assert list(code.iterdir()) == []
    shared = lab.do("write", paths=["/dev/shm/sandbox-test"]).value["/dev/shm/sandbox-test"]
    assert shared == {"process": "EACCES", "namespaces": "done"}[lab.tier]
    assert not Path("/dev/shm/sandbox-test").exists(), "in there, it is the child's own"


def test_a_child_cannot_reach_into_the_folder_of_another(
    lab: Any, daemons: Any, eventually: Callable[..., None]
) -> None:
    if lab.tier == "namespaces":
        pytest.skip("the folders of this tier are all at one path, each in its own namespace")

    async def go() -> tuple[Path, ChildReport]:
        zygote = await lab.start("acts:act")
        act = {"do": "daemon_and_hang", "name": daemons.name}
        standing = asyncio.ensure_future(zygote.run(act, wall_s=60.0))
        await asyncio.to_thread(eventually, daemons.pids, "the other child is up")
        # The first of its zygote; where the folders of the others lie can be seen in one's own.
        own = (await zygote.run({"do": "surroundings"})).value["home"]
        neighbour = Path(own).parent.parent / "1"
        await asyncio.to_thread(eventually, (neighbour / "home").is_dir, "it is that child's")
        files = [str(neighbour / "home" / "planted"), str(neighbour / "planted")]
        report = await zygote.run({"do": "write", "paths": files})
        assert not standing.done()
        await zygote.close()
        await standing
        return neighbour, report

    neighbour, report = lab.run(go())
    assert report.value == dict.fromkeys(
        (str(neighbour / "home" / "planted"), str(neighbour / "planted")), "EACCES"
    )


def test_the_scratch_space_is_bounded(lab: Any) -> None:
    if lab.tier == "process":
        pytest.skip("this tier's folders are on disk")
    limits = Limits(scratch_bytes=2**20, scratch_files=32)
    assert run_once(lab, {"do": "fill", "size": 2**19}, limits=limits).value["size"] == "done"
    found = run_once(lab, {"do": "fill", "size": 2**21}, limits=limits).value
    assert found["size"] == "ENOSPC"
    assert found["files"] == "ENOSPC"
    assert found["num_files"] < 32


def test_sockets_and_ports(lab: Any, door: Any) -> None:
    if lab.tier == "process" and lab.probed.landlock_abi < landlock.NETWORK_ABI:
        pytest.skip("the network is confined from Landlock ABI 4 (Linux 6.7) on")

    async def swallow(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    with (
        socket.create_server(("127.0.0.1", 0)) as other,
        socket.create_server(("::1", 0), family=socket.AF_INET6) as other6,
        socket.socket() as spare,
    ):
        spare.bind(("127.0.0.1", 0))
        free_port = spare.getsockname()[1]
        spare.close()

        async def go() -> ChildReport:
            async with door(lab.tier, swallow) as opened:
                zygote = await lab.start("acts:act", port=opened.port)
                addresses = {
                    "the port": ["127.0.0.1", opened.port],
                    "another port": ["127.0.0.1", other.getsockname()[1]],
                    "another machine": ["192.0.2.1", 443],  # RFC 5737: no machine has it
                }
                act = {
                    "do": "sockets",
                    "addresses": addresses,
                    "port": opened.port,
                    "free_port": free_port,
                }
                try:
                    report: ChildReport = await zygote.run(act, on_listener=opened.on_listener)
                    return report
                finally:
                    await zygote.close()

        report = lab.run(go())
        other6.setblocking(False)
        other.setblocking(False)
        with pytest.raises(BlockingIOError):
            other.accept()
    assert report.error == ""
    found = report.value
    expected = dict.fromkeys(("tcp", "tcp6", "unix", "the port"), "done")
    expected |= dict.fromkeys(("raw", "mptcp", "netlink", "packet"), "EPERM")
    expected |= dict.fromkeys(("fast open", "fast open by option"), "EPERM")
    if lab.tier == "process":
        expected |= {"udp": "EPERM", "udp6": "EPERM", "unix": "EPERM"}
        expected |= {"another port": "EACCES", "another machine": "EACCES", "bind": "EACCES"}
    else:  # a network of its own, where it may do as it likes
        expected |= {"udp": "done", "udp6": "done", "bind": "done"}
        expected |= {"another port": "ECONNREFUSED", "another machine": "ENETUNREACH"}
    assert found == expected


def test_without_a_port_nothing_can_be_connected_to(lab: Any) -> None:
    if lab.tier == "process" and lab.probed.landlock_abi < landlock.NETWORK_ABI:
        pytest.skip("the network is confined from Landlock ABI 4 (Linux 6.7) on")
    with socket.create_server(("127.0.0.1", 0)) as host:
        port = host.getsockname()[1]
        act = {"do": "sockets", "port": port, "free_port": port}
        found = lab.do(**act, addresses={"host": ["127.0.0.1", port]}).value
        host.setblocking(False)
        with pytest.raises(BlockingIOError):
            host.accept()
    assert found["host"] == {"process": "EACCES", "namespaces": "ECONNREFUSED"}[lab.tier]


def test_an_abstract_socket_of_this_machine_is_not_reached(lab: Any) -> None:
    name = f"sandbox-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as host:
        host.bind(f"\0{name}")
        host.listen()
        found = lab.do("connect_abstract", name=name).value
    assert found == {"process": "EPERM", "namespaces": "ECONNREFUSED"}[lab.tier]


@pytest.mark.parametrize(("abi", "flags"), [(6, 0), (7, 1 | 4)])
def test_refusals_are_no_records_of_the_hosts_audit(
    abi: int, flags: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A child could make as many as it likes, and the host loses its own. (They are made only where
    a host audits, so what shows is what the kernel is asked for.)"""
    asked: list[Any] = []

    def note(what: str, _: int, *args: Any) -> int:
        asked.append((what, args[-1]))
        return os.open(os.devnull, os.O_RDONLY)

    monkeypatch.setattr(landlock.kernel, "syscall", note)
    landlock._restrict(abi, readable=[], hidden=[], writable=[], ports=None)
    assert asked[-1] == ("landlock_restrict_self", flags)
