"""Agents for the tests, honest and hostile. Loaded by zygotes, in a bare interpreter."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any


def daemonize(name: str) -> None:
    """A setsid double fork that ignores every signal it can, and is called `name`."""
    ready, tell = os.pipe()
    middle = os.fork()
    if middle:
        os.close(tell)
        os.waitpid(middle, 0)
        assert os.read(ready, 1) == b"!", "the daemon did not come up"
        os.close(ready)
        return
    os.setsid()
    if os.fork():
        os._exit(0)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGCHLD):
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(15, name.encode(), 0, 0, 0)  # PR_SET_NAME
    os.write(tell, b"!")
    while True:
        time.sleep(60)


async def returns(data: dict[str, Any]) -> Any:
    await asyncio.sleep(0)
    return data["value"]


def sync_returns(data: dict[str, Any]) -> Any:
    return data["value"]


class Constructed:
    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor

    async def run(self, data: dict[str, Any]) -> float:
        return self.factor * float(data["value"])


instance = Constructed(3.0)


class Number:
    """What numpy and torch scalars look like."""

    def __float__(self) -> float:
        return 0.25


class Malicious(Exception):
    def __str__(self) -> str:
        raise RuntimeError("not even this")


def act(data: dict[str, Any]) -> Any:
    """One agent for many tests: `data["do"]` names what it does."""
    return globals()["do_" + data["do"]](data)


def do_say(data: dict[str, Any]) -> Any:
    return data["value"]


def do_number(data: dict[str, Any]) -> Any:
    return Number()


def do_nan(data: dict[str, Any]) -> float:
    return float("nan")


def do_object(data: dict[str, Any]) -> object:
    return object()


def do_integer_keys(data: dict[str, Any]) -> dict[int, float]:
    return {1: 1.0}


def do_raise(data: dict[str, Any]) -> None:
    raise ValueError("no \x1b[31mred\x1b[0m tape")


def do_raise_malicious(data: dict[str, Any]) -> None:
    raise Malicious


def do_recurse(data: dict[str, Any]) -> None:
    do_recurse(data)


def do_hang(data: dict[str, Any]) -> None:
    print("about to hang")
    while True:
        time.sleep(60)


def do_hang_deaf(data: dict[str, Any]) -> None:
    for number in range(1, signal.NSIG):
        try:
            signal.signal(number, signal.SIG_IGN)
        except (OSError, ValueError):
            continue
    print("deaf")
    while True:
        time.sleep(60)


def do_exit_hard(data: dict[str, Any]) -> None:
    os._exit(7)


def do_exit(data: dict[str, Any]) -> None:
    print("going")
    sys.exit(3)


def do_kill_self(data: dict[str, Any]) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def outcome(call: Callable[[], Any]) -> str:
    """ "done", or the name of the error."""
    try:
        call()
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "done"


def do_signal_others(data: dict[str, Any]) -> dict[str, Any]:
    """Signal 0 (is it allowed?) to the init, to the test's process, and to everyone there is."""
    seen = {int(name) for name in os.listdir("/proc") if name.isdigit()} - {os.getpid()}
    reached = [pid for pid in seen if outcome(lambda pid=pid: os.kill(pid, 0)) == "done"]
    targets = {"init": os.getppid() or 1, "test": data["pid"]}
    found = {name: outcome(lambda pid=pid: os.kill(pid, 0)) for name, pid in targets.items()}
    return {**found, "reached": reached}


def do_look_into(data: dict[str, Any]) -> dict[str, str]:
    """Files of /proc that show what another process was given, and what it holds."""
    return {
        f"{pid} {name}": outcome(lambda path=f"/proc/{pid}/{name}": open(path, "rb").read(1))
        for pid in {*data["pids"], os.getppid() or 1}
        for name in ("environ", "maps", "mem")
    }


def do_read(data: dict[str, Any]) -> dict[str, str]:
    """What comes of reading each of these paths: its text, or the name of the error."""
    found = {}
    for path in data["paths"]:
        try:
            with open(path) as file:
                found[path] = file.read()
        except OSError as error:
            found[path] = errno.errorcode[error.errno or 0]
    return found


def do_write(data: dict[str, Any]) -> dict[str, str]:
    """What comes of creating each of these paths, or of writing to it."""
    return {path: outcome(lambda path=path: open(path, "a").close()) for path in data["paths"]}


def do_read_file(data: dict[str, Any]) -> str:
    with open(data["path"]) as file:
        return file.read()


def do_leave_file(data: dict[str, Any]) -> float:
    with open("left", "w") as file:
        file.write("here")
    match data["end"]:
        case "raise":
            raise ValueError("after it")
        case "exit":
            os._exit(3)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "hang":
            time.sleep(60)
    return 1.0


def do_leave_many(data: dict[str, Any]) -> float:
    for n in range(data["count"]):
        if data["size"] < 0:
            os.mkfifo(str(n))
            continue
        with open(str(n), "wb") as file:
            file.write(b"x" * data["size"])
    return 1.0


def do_replace_work(data: dict[str, Any]) -> str:
    work = os.getcwd()
    os.rename(work, work + "-before")
    os.symlink(data["by"], work)
    return "replaced"


def do_sockets(data: dict[str, Any]) -> dict[str, str]:
    """What comes of making a socket of each kind, and of connecting to each of `ports`."""
    kinds: dict[str, tuple[int, ...]] = {
        "tcp": (socket.AF_INET, socket.SOCK_STREAM),
        "tcp6": (socket.AF_INET6, socket.SOCK_STREAM),
        "udp": (socket.AF_INET, socket.SOCK_DGRAM),
        "udp6": (socket.AF_INET6, socket.SOCK_DGRAM),
        "raw": (socket.AF_INET, socket.SOCK_RAW, 6),
        "mptcp": (socket.AF_INET, socket.SOCK_STREAM, 262),
        "netlink": (socket.AF_NETLINK, socket.SOCK_RAW),
        "packet": (socket.AF_PACKET, socket.SOCK_RAW),
        "unix": (socket.AF_UNIX, socket.SOCK_STREAM),
    }
    found = {
        name: outcome(lambda kind=kind: socket.socket(*kind).close())
        for name, kind in kinds.items()
    }
    for name, address in data["addresses"].items():
        found[name] = outcome(lambda address=address: _connect(*address))
    with socket.socket() as connection:
        there = ("127.0.0.1", data["port"])
        found["fast open"] = outcome(lambda: connection.sendto(b"x", socket.MSG_FASTOPEN, there))
        tcp_fastopen_connect = 30
        found["fast open by option"] = outcome(
            lambda: connection.setsockopt(socket.IPPROTO_TCP, tcp_fastopen_connect, 1)
        )
    with socket.socket() as server:
        found["bind"] = outcome(lambda: server.bind(("127.0.0.1", data["free_port"])))
    return found


def _connect(host: str, port: int) -> None:
    with socket.socket() as connection:
        connection.settimeout(5)
        connection.connect((host, port))


def do_syscalls(data: dict[str, Any]) -> dict[str, str]:
    """What comes of each call, `data["calls"][name] = [number, *arguments]`."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    found = {}
    for name, call in data["calls"].items():
        made = libc.syscall(*map(ctypes.c_long, call))
        found[name] = errno.errorcode[ctypes.get_errno()] if made < 0 else "done"
    return found


def do_flood(data: dict[str, Any]) -> float:
    block = b"x" * 2**20
    for _ in range(1024):
        os.write(data["fd"], block)
    return 1.0


def do_print(data: dict[str, Any]) -> float:
    print(data["text"], end="")
    print(data["text"], end="", file=sys.stderr)
    return 1.0


def do_big_result(data: dict[str, Any]) -> str:
    return "x" * data["size"]


def do_forge(data: dict[str, Any]) -> None:
    """Writes its own result message."""
    os.write(3, data["raw"].encode("utf-8", "surrogateescape"))
    os._exit(data.get("code", 0))


def do_daemon(data: dict[str, Any]) -> float:
    for _ in range(data.get("count", 1)):
        daemonize(data["name"])
    return 1.0


def do_daemon_and_hang(data: dict[str, Any]) -> None:
    do_daemon(data)
    do_hang(data)


def do_leave_pipes_open(data: dict[str, Any]) -> float:
    """A grandchild keeps stdout and the result pipe, and goes on writing."""
    if os.fork() == 0:
        while True:
            os.write(1, b"still here\n")
            time.sleep(0.01)
    os.set_inheritable(3, True)
    subprocess.Popen(["sleep", "60"], close_fds=False)
    return 1.0


def do_fork_children(data: dict[str, Any]) -> float:
    for _ in range(data["count"]):
        subprocess.Popen(["sleep", "60"])
    return 1.0


def do_allocate(data: dict[str, Any]) -> int:
    return len(bytearray(data["size"]))


def do_burn(data: dict[str, Any]) -> None:
    signal.signal(signal.SIGXCPU, signal.SIG_IGN)
    while True:
        pass


def do_spend(data: dict[str, Any]) -> float:
    started = time.process_time()
    block = bytearray(64 * 2**20)
    while time.process_time() - started < 0.2:
        block[-1] += 1
        block[-1] = 0
    return 1.0


def do_surroundings(data: dict[str, Any]) -> dict[str, Any]:
    work_files = os.listdir()
    with open("note", "w") as file:
        file.write("mine")
    with open("/proc/self/environ", "rb") as file:
        own_environ = file.read().decode()
    return {
        "environ": dict(os.environ),
        "proc_environ": own_environ,
        "home": os.path.expanduser("~"),
        "cwd": os.getcwd(),
        "tmp": tempfile.gettempdir(),
        "home_files": os.listdir(os.environ["HOME"]),
        "work_files": work_files,
        "stdin": os.read(0, 100).decode(),
        "descriptors": sorted(
            f"{name} {os.readlink('/proc/self/fd/' + name).partition(':')[0]}"
            for name in os.listdir("/proc/self/fd")
            if os.path.exists("/proc/self/fd/" + name)
        ),
        "session_is_own": os.getsid(0) == os.getpid() and os.getpgrp() == os.getpid(),
        "umask": os.umask(0o022),
        "random": random.random(),
        "limits": {
            name: list(resource.getrlimit(getattr(resource, name)))
            for name in data.get("limits", [])
        },
        "status": dict(
            line.split(":\t", 1) for line in open("/proc/self/status").read().splitlines()
        ),
        "user": [os.getresuid(), os.getresgid(), os.getgroups()],
        "host_name": socket.gethostname(),
        "processes": [int(name) for name in os.listdir("/proc") if name.isdigit()],
        "torch": "torch" in sys.modules,
        "path_of_sandbox": [name for name in sys.modules if name.partition(".")[0] == "sandbox"],
    }


def do_own_memory(data: dict[str, Any]) -> bool:
    """Whether `data["needle"]` (given reversed, so that the request is no hit) is in our memory."""
    needle = data["needle"][::-1].encode()
    half = len(needle) // 2
    with open("/proc/self/maps") as maps, open("/proc/self/mem", "rb", 0) as memory:
        for line in maps:
            bounds, rights = line.split()[:2]
            if "r" not in rights or "[v" in line:
                continue
            start, end = (int(bound, 16) for bound in bounds.split("-"))
            try:
                memory.seek(start)
                content = memory.read(end - start)
            except (OSError, ValueError):
                continue
            at = content.find(needle[:half])
            while at >= 0:
                # the needle itself lies in this frame once, as one object
                if content[at : at + len(needle)] == needle and start + at != _address(needle):
                    return True
                at = content.find(needle[:half], at + 1)
    return False


def _address(value: bytes) -> int:
    return id(value) + bytes.__basicsize__ - 1


def do_litter(data: dict[str, Any]) -> float:
    """Leaves what is hard to remove: deep, locked, linked."""
    os.symlink(data["precious"], "link")
    os.mkdir("locked")
    with open("locked/file", "w"):
        pass
    os.chmod("locked", 0)
    for _ in range(1100):
        os.mkdir("deeper")
        os.chdir("deeper")
    return 1.0


def do_replace_folder(data: dict[str, Any]) -> str:
    """Tries to put a link to something precious where the private folder was."""
    folder = os.path.dirname(os.getcwd())
    return outcome(
        lambda: os.rename(folder, folder + "-away") or os.symlink(data["precious"], folder)
    )


def do_connect(data: dict[str, Any]) -> str:
    """Returns once the other side has closed, with what it had to say."""
    with socket.create_connection(("127.0.0.1", data["port"])) as connection:
        connection.sendall(data.get("say", "").encode() + b"\n")
        with connection.makefile() as lines:
            return lines.read()


def do_connect_abstract(data: dict[str, Any]) -> str:
    def connect() -> None:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect("\0" + data["name"])

    return outcome(connect)


def do_fill(data: dict[str, Any]) -> dict[str, Any]:
    """One file of `size` bytes, then empty ones until there can be no more, or fifty."""
    with open("large", "wb", 0) as file:
        found: dict[str, Any] = {
            "size": outcome(
                lambda: [file.write(bytes(2**12)) for _ in range(data["size"] // 2**12)]
            )
        }
    for number in range(50):
        found["num_files"] = number
        found["files"] = outcome(lambda number=number: open(f"{number}", "w").close())
        if found["files"] != "done":
            break
    return found
