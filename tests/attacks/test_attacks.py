"""Every attack of the catalogue, attempted in every tier, and what came of it held against its row.

A row that says "not stopped" is held to that, too: the attack has to succeed.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import re
import resource
import secrets
import socket
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import on_house
import pytest
from catalog import ATTACKS, TIERS, Attack
from write_table import BEGIN, END, LAST, table, with_table

from areal_sub.config import load_config
from areal_sub.errors import ConfigError, TaskError
from areal_sub.rollout.workspace import workspace_of
from sandbox import ChildReport, Ending, PlanError, SandboxSpec, SpecError, ZygoteFailed

pytestmark = pytest.mark.attacks

# Codes of errors, signals and endings, within what an attack says of its end.
_REASONS = re.compile(
    rf"\b(?:E[A-Z]{{2,}}|SIG[A-Z]+|{'|'.join(ending.name for ending in Ending)})\b"
)
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u202e]")

Observe = Callable[[Any, Any, Attack], Awaitable[str]]
OBSERVE: dict[str, Observe] = dict(on_house.OBSERVE)


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: f"a{attack.number}")
def test_it_ends_as_the_catalogue_says(stage: Any, attack: Attack) -> None:
    observe = OBSERVE.get(attack.number, _run)

    async def go() -> str:
        zygote = await stage.zygote(**attack.limits)
        async with stage.beside_a_sibling(zygote):
            return await observe(stage, zygote, attack)

    observed = stage.run(go())
    expected = attack.end(stage.tier, cgroups=stage.has_groups)
    assert observed.startswith("stopped: " if expected.stopped else "SUCCEEDED: "), observed
    if expected.stopped:
        unexpected = set(_REASONS.findall(observed)) - expected.reasons
        assert not unexpected, f"it failed for another reason than the sandbox: {observed}"
    assert stage.world.is_intact()
    assert stage.children_folders() == [], "what children leave is removed"


def test_every_line_is_in_the_catalogue() -> None:
    assert {attack.line for attack in ATTACKS} == set(range(1, LAST + 1))
    assert len({attack.number for attack in ATTACKS}) == len(ATTACKS)
    assert all(attack.ends.keys() == set(TIERS) for attack in ATTACKS)
    ends = [end for attack in ATTACKS for end in (*attack.ends.values(), *attack.grouped.values())]
    assert all(end.says.strip() for end in ends)


def test_the_page_shows_the_present_table() -> None:
    page = Path(__file__).parents[2] / "docs" / "security.md"
    if not page.exists():
        pytest.skip(f"{page} is not there")
    text = page.read_text()
    assert text == with_table(text), "run: python tests/attacks/write_table.py docs/security.md"


def test_the_table_goes_between_its_markers() -> None:
    page = with_table(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    assert page == f"before\n{BEGIN}\n{table()}\n{END}\nafter\n"
    assert with_table(page) == page
    with pytest.raises(ValueError, match="put both"):
        with_table("no markers")


# How attacks are judged: by what their function says, or how the child ended; else by an observer.


async def _run(stage: Any, zygote: Any, attack: Attack, **more: Any) -> str:
    report = await stage.attack(zygote, attack.function, wall_s=attack.wall_s, **more)
    return _said(report)


def _said(report: ChildReport) -> str:
    if report.ending is Ending.RETURNED:
        return str(report.value)
    return f"stopped: {report.ending.name}: {report.error}"


def observes(number: str) -> Callable[[Observe], Observe]:
    def register(observe: Observe) -> Observe:
        OBSERVE[number] = observe
        return observe

    return register


@observes("13a")
@observes("13b")
@observes("13c")
@observes("14")
@observes("15a")
@observes("15b")
@observes("15c")
@observes("15d")
@observes("15e")
async def _leftovers(stage: Any, zygote: Any, attack: Attack) -> str:
    siblings = stage.children_folders()
    used_s = time.process_time()  # a busy disk may take long to remove a tree; that is no attack
    outputs = ["good", ".", "out", "out/credentials", "folder/.aws/credentials", "*"]
    report = await stage.attack(zygote, attack.function, outputs=outputs)
    assert str(report.value).startswith("left"), report
    if len(report.outputs_refused) > 101 or time.process_time() - used_s > 15:
        return f"SUCCEEDED: not bounded: {len(report.outputs_refused)}"
    if any(_CONTROL.search(name) or "\n" in name for name, _ in report.outputs_refused):
        return f"SUCCEEDED: {report.outputs_refused}"
    if any("CANARY" in str(content) for content in report.outputs.values()):
        return f"SUCCEEDED: {report.outputs}"
    names = {name for name in report.outputs if len(name) < 200 and not name.isdigit()}
    refused = {name for name, _ in report.outputs_refused}
    most, must = _EXPECTED[attack.number]
    assert names <= {"good", *most}, names
    assert must <= refused, report.outputs_refused
    assert ("good" in names) == (attack.number not in ("13b", "13c")), report
    left = set(stage.children_folders()).difference(siblings)
    if left or not stage.world.is_intact():
        return f"SUCCEEDED: {left}"
    return "stopped: and what they lead to is untouched"


# What else may come out of it, and what has to be refused by its name.
_EXPECTED: dict[str, tuple[set[str], set[str]]] = {
    "13a": (set(), {"out", "result.json", "folder", "inner/folder", "inner/file", "root", "magic"}),
    "13b": (set(), {".", "good", "out"}),
    "13c": (set(), {"good", "again", "linked"}),
    "14": ({"out/credentials", "kept/credentials"}, set()),
    "15a": ({"sealed/file"}, {"fifo", "whiteout"}),
    "15b": ({"sparse", *(f"sparse-{n}" for n in range(8))}, {"sparse-7"}),
    "15c": (set(), {"/".join(["deep"] * 65)}),
    "15d": (
        {" ", "-rf", "$(id)", "..."},
        {r"new\nline", r"\udcff\udcfe", r"\x1b[31mred", r"\u202etxt", r"\t", r"\x0d"},
    ),
    "15e": (set(), {"."}),
}


@observes("20")
@observes("20b")
async def _daemon(stage: Any, zygote: Any, attack: Attack) -> str:
    name = f"d-{secrets.token_hex(6)}"
    report = await stage.attack(zygote, attack.function, daemon=name)
    assert report.value == "left", report
    assert report.num_killed == 1 or attack.number == "20b", report
    alive = [pid for pid in _pids() if _name(pid) == name]
    return f"SUCCEEDED: {alive}" if alive else "stopped: gone"


def _pids() -> list[str]:
    return [entry.name for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _name(pid: str) -> str:
    try:
        return (Path("/proc") / pid / "comm").read_text().strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


@observes("29")
async def _memory(stage: Any, zygote: Any, attack: Attack) -> str:
    """The child before it, and one beside it, have keys and tasks of their own."""
    other = {"OTHER_KEY": stage.canary("other")}
    task = {"task": stage.canary("task")}
    await stage.attack(zygote, "a28", env=other, **task)
    beside = asyncio.ensure_future(stage.attack(zygote, "a54a", env=other, wall_s=5.0, **task))
    report = await stage.attack(zygote, attack.function, env={"KEY": stage.canary("own")})
    beside.cancel()
    with pytest.raises(asyncio.CancelledError):
        await beside
    return _said(report)


async def _of_siblings(stage: Any, zygote: Any, names: list[str]) -> str:
    reports = [await stage.attack(zygote, "a32") for _ in range(2)]
    one, other = (report.value for report in reports)
    same = [name for name in names if one[name] == other[name]]
    return f"SUCCEEDED: same {same}" if same else "stopped: all different"


@observes("32a")
async def _random(stage: Any, zygote: Any, attack: Attack) -> str:
    return await _of_siblings(stage, zygote, ["random", "tls", "uuid"])


@observes("32b")
async def _hash_seed(stage: Any, zygote: Any, attack: Attack) -> str:
    return await _of_siblings(stage, zygote, ["hash seed", "addresses"])


@pytest.mark.parametrize(
    "attack",
    [attack for attack in ATTACKS if 44 <= attack.line <= 47 and attack.number < "47d"],
    ids=lambda attack: f"a{attack.number}",
)
def test_an_allowlist_opens_nothing_else(stage: Any, attack: Attack) -> None:
    """What is listed can be reached through the proxy, and in no other way."""
    if stage.tier == "process":
        pytest.skip("there is no allowlist in this tier")
    allow = (f"127.0.0.1:{stage.world.aims['tcp']}", "localhost:80", "169.254.169.254:80")

    async def go() -> str:
        return await _run(stage, await stage.zygote(allow=allow), attack)

    observed = stage.run(go())
    expected = attack.ends[stage.tier]
    assert observed.startswith("stopped: " if expected.stopped else "SUCCEEDED: "), observed
    if expected.stopped:
        assert not set(_REASONS.findall(observed)) - expected.reasons, observed


class Outside:
    """What stands behind the egress proxy: a server that is listed, and one inside that is not."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str]] = []
        self.num_inside = 0
        self.up, self.release = asyncio.Event(), asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                host = re.findall(r"(?im)^host:(.*)$", head)
                self.seen.append((head.split(" ")[1], ",".join(host).strip()))
                if "/up" in head:
                    self.up.set()
                    await self.release.wait()
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def inside(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_inside += 1
        writer.close()


@observes("47d")
@observes("47e")
@observes("47f")
async def _through_egress(stage: Any, _: Any, attack: Attack) -> str:
    if stage.tier == "process":
        with pytest.raises(PlanError, match="takes the tier 'namespaces'"):
            await stage.start(allow=("a.example:443",))
        return "stopped: refused"
    outside = Outside()
    async with (
        await asyncio.start_server(outside.serve, "127.0.0.1", 0) as server,
        await asyncio.start_server(outside.inside, "127.0.0.1", 0) as hidden,
    ):
        listed, inside = (each.sockets[0].getsockname()[1] for each in (server, hidden))
        zygote = await stage.start(allow=(f"127.0.0.1:{listed}", f"localhost:{inside}"))
        aims = {"listed": listed, "inside": inside}
        try:
            attacking = asyncio.ensure_future(stage.attack(zygote, attack.function, **aims))
            if attack.number == "47f":
                await _first(attacking, outside.up.wait())
                for _ in range(3):
                    honest = await stage.attack(zygote, "ask_listed", **aims)
                    assert honest.ending is Ending.RETURNED, honest
                    assert honest.value < 5, "siblings get through"
                (proxy,) = zygote.pids - {zygote.guardian_pid}
                assert _peak_bytes(proxy) < 128 * 2**20
                outside.release.set()
            report = await attacking
            again = await stage.attack(zygote, "ask_listed", **aims)
            assert again.ending is Ending.RETURNED, again
        finally:
            outside.release.set()
            await zygote.close()
    if outside.num_inside:
        return "SUCCEEDED: reached what is inside"
    honest_host = f"127.0.0.1:{listed}"
    requests = [seen for seen in outside.seen if seen[0] != "/up"]
    if wrong := [seen for seen in requests if seen[0] == "/hidden" or seen[1] != honest_host]:
        return f"SUCCEEDED: {wrong}"
    assert {path for path, _ in requests} <= {"/plain", "/honest"}
    assert attack.number != "47e" or ("/plain", honest_host) in requests
    assert len(report.egress_refused) <= 65
    return f"stopped: {_said(report)}" if report.value == "left" else _said(report)


def _peak_bytes(pid: int) -> int:
    status = (Path("/proc") / str(pid) / "status").read_text()
    return int(re.findall(r"(?m)^VmHWM:\s+(\d+) kB$", status)[0]) * 1024


async def _first(running: asyncio.Future[Any], event: Any) -> None:
    waiting = asyncio.ensure_future(event)
    try:
        await asyncio.wait({running, waiting}, timeout=20, return_when=asyncio.FIRST_COMPLETED)
        assert waiting.done(), running
    finally:
        waiting.cancel()


@observes("48c")
async def _from_outside(stage: Any, zygote: Any, attack: Attack) -> str:
    """While it waits, every new port of this machine that is one of all its addresses is connected
    to: as the one would be, and those of other tests are not."""
    before = _listening()
    attacking = asyncio.ensure_future(stage.attack(zygote, attack.function))
    while not attacking.done():
        for port in _listening() - before:
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.close()
        await asyncio.wait({attacking}, timeout=0.05)
    return _said(await attacking).replace("timed out", "nobody came")


def _listening() -> set[int]:
    listening, all_addresses = "0A", "00000000"
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    fields = [line.split() for line in lines]
    addresses = [each[1].split(":") for each in fields if each[3] == listening]
    return {int(port, 16) for address, port in addresses if address == all_addresses}


@observes("58b")
async def _in_flight(stage: Any, _: Any, attack: Attack) -> str:
    """By a caller who may have as many as the child: while those are in flight, others start."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, limits[1]))
    try:
        zygote = await stage.start(**attack.limits)
        try:
            attacking = asyncio.ensure_future(stage.attack(zygote, attack.function))
            while not attacking.done():
                beside = await stage.attack(zygote, "undisturbed_alone")
                if beside.value != "well":
                    return f"SUCCEEDED: {beside}"
            return _said(await attacking)
        finally:
            await zygote.close()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@observes("49")
async def _descriptor(stage: Any, zygote: Any, attack: Attack) -> str:
    name = f"s-{secrets.token_hex(6)}"
    runs = [
        stage.attack(zygote, attack.function, part=part, name=name)
        for part in ("receiver", "sender")
    ]
    received, sent = [_said(report) for report in await asyncio.gather(*runs)]
    return received if received.startswith("SUCCEEDED") else sent


@observes("55a")
async def _flood(stage: Any, zygote: Any, attack: Attack) -> str:
    reports = [await stage.attack(zygote, attack.function, fd=fd) for fd in (1, 2)]
    assert all(len(report.stdout_tail + report.stderr_tail) <= 2**14 for report in reports)
    return "stopped: " + ", ".join(_said(report) for report in reports)


@observes("55b")
async def _escapes(stage: Any, zygote: Any, attack: Attack) -> str:
    report = await stage.attack(zygote, attack.function)
    texts = [report.error, report.traceback, report.stdout_tail, report.stderr_tail]
    assert report.ending is Ending.RAISED
    assert all(texts), "each says something"
    found = [text for text in texts if _CONTROL.search(text)]
    return f"SUCCEEDED: {found}" if found else "stopped: escaped"


@observes("56")
async def _forged(stage: Any, zygote: Any, attack: Attack) -> str:
    kinds = ("huge", "deep", "duplicate", "nan", "infinite", "digits", "pickle", "bytes")
    said = []
    for kind in (*kinds, "surrogate"):
        report = await stage.attack(zygote, attack.function, result=kind)
        if report.ending is Ending.RETURNED:
            return f"SUCCEEDED: {kind}"
        said.append(f"{kind} {report.ending.name}")
    return "stopped: " + ", ".join(said)


@observes("57")
async def _pipe_held(stage: Any, zygote: Any, attack: Attack) -> str:
    started = time.monotonic()
    report = await stage.attack(zygote, attack.function)
    assert report.value == "left", report
    if report.num_killed != 1 or time.monotonic() - started > 10:
        return f"SUCCEEDED: {report}"
    return "stopped: killed"


@observes("69a")
async def _import(stage: Any, _: Any, attack: Attack) -> str:
    zygote = await _imported(stage, tear_out=False)
    report = await stage.attack(zygote, attack.function)
    assert report.ending is Ending.RETURNED, report
    got = {name: said for name, said in report.value.items() if said.startswith("SUCCEEDED")}
    assert len(report.value) > 10
    return f"SUCCEEDED: {got}" if got else "stopped: all of it"


@observes("69c")
async def _taken(stage: Any, _: Any, attack: Attack) -> str:
    return await _run(stage, await _imported(stage, tear_out=False), attack)


@observes("69b")
@observes("69e")
@observes("69g")
async def _torn_out(stage: Any, _: Any, attack: Attack) -> str:
    return await _run(stage, await _imported(stage, tear_out=True), attack)


@observes("69d")
async def _fresh(stage: Any, _: Any, attack: Attack) -> str:
    zygote = await _imported(stage, tear_out=True, start="exec")
    limits = _said(await stage.attack(zygote, "a69b"))
    if not limits.startswith("stopped: "):
        return limits
    wrote = await stage.attack(zygote, "a71b", part="writer")
    assert wrote.value == "left", wrote
    memory = _said(await stage.attack(zygote, "a71b", part="reader"))
    return f"{limits}; {memory}" if memory.startswith("stopped: ") else memory


@observes("71b")
async def _shared(stage: Any, _: Any, attack: Attack) -> str:
    zygote = await _imported(stage, tear_out=False)
    wrote = await stage.attack(zygote, attack.function, part="writer")
    assert wrote.value == "left", wrote
    return _said(await stage.attack(zygote, attack.function, part="reader"))


@observes("71d")
async def _door(stage: Any, _: Any, attack: Attack) -> str:
    zygote = await _imported(stage, tear_out=False, helper=True)
    wrote = await stage.attack(zygote, attack.function, part="writer")
    assert wrote.value == "left", wrote
    return _said(await stage.attack(zygote, attack.function, part="reader"))


@observes("71e")
async def _descriptor(stage: Any, _: Any, attack: Attack) -> str:
    zygote = await _imported(stage, tear_out=True)
    wrote = await stage.attack(zygote, attack.function, part="writer")
    assert wrote.value == "left", wrote
    try:
        async with asyncio.timeout(3):
            await zygote.gone()
    except TimeoutError:
        return _said(await stage.attack(zygote, attack.function, part="reader"))
    return "stopped: its zygote is ended"


@observes("69f")
async def _speaks(stage: Any, _: Any, attack: Attack) -> str:
    zygote = await _imported(stage, tear_out=False, lies="ready")
    assert len(zygote.notes) == 1, zygote.notes  # on threads
    report = await stage.attack(zygote, "undisturbed_alone")
    return "stopped: it serves" if report.value == "well" else f"SUCCEEDED: {report}"


@observes("71f")
async def _links(stage: Any, _: Any, attack: Attack) -> str:
    zygote = await _imported(stage, tear_out=False, lies="links")
    report = await stage.attack(zygote, attack.function, outputs=["good"])
    assert report.value == "left", report
    await zygote.close()  # removes what could not be
    return "stopped: untouched" if stage.world.is_intact() else "SUCCEEDED: removed"


@observes("71g")
async def _listener(stage: Any, _: Any, attack: Attack) -> str:
    zygote = await _imported(stage, tear_out=False, lies="listener")
    served: list[tuple[str, int]] = []

    async def serve(fd: int) -> None:
        with socket.socket(fileno=os.dup(fd)) as listener:
            served.append(listener.getsockname())

    report = await stage.attack(zygote, "undisturbed_alone", on_listener=serve)
    false = [address for address in served if address[1] == 0]
    return f"SUCCEEDED: {false}" if false else f"stopped: {report.ending.name}"


async def _imported(
    stage: Any, *, tear_out: bool, helper: bool = False, start: str = "fork", lies: str = ""
) -> Any:
    aims = {**stage.world.aims, "guardian": os.getpid(), "tear_out": tear_out, "helper": helper}
    (stage.code / "aims.json").write_text(json.dumps({**aims, "lies": lies}))
    # Keyed by a limit that changes nothing, so that all kinds can stand side by side.
    kind = tear_out + 2 * helper + 4 * ["", "ready", "links", "listener"].index(lies)
    limits = {"core_bytes": 0, "scratch_files": 2000 + kind}
    return await stage.zygote("import_attacks:act", start=start, **limits)


@observes("70a")
async def _loader_variables(stage: Any, zygote: Any, attack: Attack) -> str:
    for name in ("LD_PRELOAD", "LD_LIBRARY_PATH", "LD_AUDIT", "PYTHONPATH", "PYTHONSTARTUP"):
        try:
            SandboxSpec(env={name: "x"})
        except SpecError as error:
            assert name in str(error)
        else:
            return f"SUCCEEDED: {name}"
    return "stopped: each is named"


@observes("70b")
async def _poison(stage: Any, zygote: Any, attack: Attack) -> str:
    left = await stage.attack(zygote, "a70", part="poison")
    assert left.value == "left", left
    return _said(await stage.attack(zygote, "a70", part="next"))


@observes("72b")
async def _deep_data(stage: Any, zygote: Any, attack: Attack) -> str:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    try:
        report = await stage.attack(zygote, "undisturbed_alone", shape=deep)
    except (TypeError, ValueError) as error:
        return f"stopped: {error}"
    except RecursionError as error:
        return f"SUCCEEDED: {error}"
    return _said(report)


@observes("72a")
async def _data(stage: Any, zygote: Any, attack: Attack) -> str:
    shapes = {
        "huge": "x" * (8 * 2**20),
        "many": list(range(100_000)),
        "nul": "\0" * 1000,
        "surrogate": "\ud800",
        "nan": float("nan"),
        "rather deep": json.loads("[" * 900 + "]" * 900),
        "a set": {1},
    }
    said = []
    for name, shape in shapes.items():
        try:
            report = await stage.attack(zygote, "undisturbed_alone", shape=shape)
        except (TypeError, ValueError) as error:
            said.append(f"{name} {type(error).__name__}")
        else:
            assert report.value == "well" or report.ending is Ending.EXITED, report
            said.append(f"{name} {report.value}")
    return "stopped: " + ", ".join(said)


_ON_GRADERS = ("01", "02", "17", "18", "28", "44a", "44b", "45", "46a")
"""What a grader that was taken over attempts: one of each kind, and all of the network."""


@observes("73a")
async def _taken_over(stage: Any, _: Any, attack: Attack) -> str:
    said = []
    for number in _ON_GRADERS:
        aims = {**stage.world.aims, "guardian": os.getpid(), "attack": f"a{number}"}
        code = f"__import__('attacks').act({aims!r})"
        payload = b"cbuiltins\neval\n(V" + code.encode("raw_unicode_escape") + b"\ntR."
        for name in ("evals", "unpickles"):
            grader = await stage.zygote(grader=f"graders:{name}")
            outputs = {"result.pkl": base64.b64encode(payload).decode()}
            data = _graded(_turn("t", code), outputs=outputs)
            report = await grader.run(data, wall_s=60.0)
            ended = _said(report)
            if not ended.startswith("stopped: "):
                return f"SUCCEEDED: {number}: {ended}"
            said.append(f"{number} {ended}")
    return "stopped: " + ", ".join(said)


@observes("73b")
async def _never_ends(stage: Any, _: Any, attack: Attack) -> str:
    grader = await stage.zygote(grader="graders:never_ends")
    report = await grader.run(_graded(_turn("t", "a" * 4096 + "b"), outputs={}), wall_s=1.0)
    return _said(report)


@observes("73c")
async def _unwieldy(stage: Any, _: Any, attack: Attack) -> str:
    grader = await stage.zygote(grader="graders:measures")
    shapes = {"huge": "x" * 2**24, "deep": "[" * 2**20, "unprintable": "\0\x1b[2J\u202e\n" * 1000}
    said = []
    for name, content in shapes.items():
        turns = [_turn(f"t{index}", content if index == 0 else "") for index in range(1000)]
        data = _graded(*turns, outputs={"large": base64.b64encode(bytes(2**23)).decode()})
        report = await grader.run(data, wall_s=60.0)
        measured = f"0 999 1998 {2**23}"  # a branch is the question and an answer
        if report.value != measured:
            return f"SUCCEEDED: {name}: {report}"
        said.append(name)
    return "stopped: " + ", ".join(said)


def _graded(*turns: Any, outputs: dict[str, str]) -> dict[str, Any]:
    """What a grader's child gets: see `areal_sub.rollout.grader`."""
    prompts = [{"parent_turn_id": None, "messages": [{"role": "user", "content": ""}]}]
    transcript = {"prompts": prompts, "turns": list(turns)}
    return {"task": {}, "transcript": transcript, "outputs": outputs, "report": {}}


def _turn(turn_id: str, content: str) -> dict[str, Any]:
    message = {"role": "assistant", "content": content, "turn_id": turn_id}
    return {"prompt": 0, "message": {**message, "finish_reason": "stop"}}


@observes("74")
async def _names(stage: Any, zygote: Any, attack: Attack) -> str:
    said = []
    for name in ("../../etc/passwd:x", "/etc/passwd:x", "..:x", "a\nb:c", "é\u202e:x"):
        try:
            await (await stage.start(name)).close()
        except ZygoteFailed as error:
            said.append(str(error))
        else:
            return f"SUCCEEDED: {name!r}"
    assert not any(_CONTROL.search(text) for text in said), said
    return "stopped: " + ", ".join(said)


CONFIG = """
experiment_name: tiny
trial_name: one
workflow: agents.Agent
actor: {path: model}
"""


@observes("74b")
async def _names_of_folders(stage: Any, zygote: Any, attack: Attack) -> str:
    """Whatever becomes a part of a path: names of runs and agents, and what tasks say."""
    file = stage.folder / "config.yaml"
    base = stage.world.project
    said = []
    for name in ("../../etc", "/etc", "..", "a/b", ".hidden", "a\nb", "a\0b", "x" * 300):
        quoted = json.dumps(name)
        texts = {
            "experiment_name": f"{CONFIG}".replace("tiny", quoted),
            "trial_name": CONFIG.replace("one", quoted),
            "agents": CONFIG + f"rollout: {{openai: {{agents: {{{quoted}: {{workflow: a.B}}}}}}}}",
        }
        for key, text in texts.items():
            file.write_text(text)
            try:
                load_config(["--config", str(file)])
            except ConfigError as error:
                assert key in str(error), error
                said.append(key)
            else:
                return f"SUCCEEDED: {key}: {name!r}"
        try:
            folder = workspace_of("tasks/{id}/repo", {"id": name}, base)
        except TaskError:
            continue
        if Path(folder).parents[1] != base / "tasks":
            return f"SUCCEEDED: a workspace at {folder!r}"
    file.write_text(CONFIG)
    load_config(["--config", str(file)])  # with plain names it is one
    return f"stopped: {len(said)} of them named"
