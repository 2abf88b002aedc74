"""Agents for the tests, honest and hostile. Loaded by zygotes, in a bare interpreter."""

from __future__ import annotations

import asyncio
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from typing import Any


def daemonize(pid_file: str) -> None:
    """A setsid double fork that ignores every signal it can, and notes its pid."""
    if os.fork():
        os.wait()
        return
    os.setsid()
    if os.fork():
        os._exit(0)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGCHLD):
        signal.signal(number, signal.SIG_IGN)
    with open(pid_file + ".part", "w") as file:
        file.write(str(os.getpid()))
    os.rename(pid_file + ".part", pid_file)
    while True:
        time.sleep(60)


def wait_for(path: str) -> None:
    while not os.path.exists(path):
        time.sleep(0.001)


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
    with open(data["ready"], "w"):
        pass
    while True:
        time.sleep(60)


def do_exit_hard(data: dict[str, Any]) -> None:
    os._exit(7)


def do_exit(data: dict[str, Any]) -> None:
    print("going")
    sys.exit(3)


def do_kill_self(data: dict[str, Any]) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def do_kill_init(data: dict[str, Any]) -> None:
    daemonize(data["pid_file"])
    wait_for(data["pid_file"])
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(60)


def do_stop_init(data: dict[str, Any]) -> None:
    os.kill(os.getppid(), signal.SIGSTOP)
    time.sleep(60)


def _parent_of(pid: int) -> int:
    with open(f"/proc/{pid}/stat") as file:
        return int(file.read().rsplit(") ", 1)[1].split()[1])


def do_kill_zygote(data: dict[str, Any]) -> None:
    os.kill(_parent_of(os.getppid()), signal.SIGKILL)
    time.sleep(60)


def do_kill_all_above(data: dict[str, Any]) -> None:
    """Guardian, zygote and init at once; the daemon goes on."""
    daemonize(data["pid_file"])
    wait_for(data["pid_file"])
    init = os.getppid()
    zygote = _parent_of(init)
    for pid in (_parent_of(zygote), zygote, init):
        os.kill(pid, signal.SIGSTOP)
    for pid in (_parent_of(zygote), zygote, init):
        os.kill(pid, signal.SIGKILL)
    time.sleep(60)


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
    for pid_file in data["pid_files"]:
        daemonize(pid_file)
    for pid_file in data["pid_files"]:
        wait_for(pid_file)
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
    with open("note", "w") as file:
        file.write("mine")
    with open(f"/proc/{os.getppid()}/environ", "rb") as file:
        init_environ = file.read().decode()
    with open("/proc/self/environ", "rb") as file:
        own_environ = file.read().decode()
    return {
        "environ": dict(os.environ),
        "proc_environ": own_environ,
        "init_environ": init_environ,
        "home": os.path.expanduser("~"),
        "cwd": os.getcwd(),
        "tmp": tempfile.gettempdir(),
        "home_files": os.listdir(os.environ["HOME"]),
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
            for name in dir(resource)
            if name in {"RLIMIT_CPU", "RLIMIT_AS", "RLIMIT_NOFILE", "RLIMIT_FSIZE", "RLIMIT_CORE"}
        },
        "no_new_privs": "NoNewPrivs:\t1" in open("/proc/self/status").read(),
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


def do_replace_folder(data: dict[str, Any]) -> float:
    """Puts a link to something precious where the private folder was."""
    folder = os.path.dirname(os.getcwd())
    os.rename(folder, folder + "-away")
    os.symlink(data["precious"], folder)
    return 1.0


def do_connect(data: dict[str, Any]) -> float:
    with socket.create_connection(("127.0.0.1", data["port"])) as connection:
        connection.recv(1)
    return 1.0
