"""Every way in which a child can end, each with its name."""

from __future__ import annotations

import asyncio
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sandbox import ChildReport, Ending, Limits
from sandbox.layers.polled_limits import MAX_TCP_SOCKETS
from sandbox.report import conclude
from sandbox.wire import Status


@pytest.mark.parametrize("value", [0.5, 3, True, None, "a lot", {"turn": 1.0}, [1, [2.5]], {}])
@pytest.mark.parametrize("target", ["acts:returns", "acts.sync_returns"])
def test_what_is_returned_arrives(lab: Any, target: str, value: Any) -> None:
    async def go() -> ChildReport:
        zygote = await lab.start(target)
        try:
            return await zygote.run({"value": value})
        finally:
            await zygote.close()

    report = lab.run(go())
    assert (report.ending, report.value, report.error) == (Ending.RETURNED, value, "")
    assert type(report.value) is type(value)
    assert report.exit_code == 0
    assert report.signal is None


def test_a_class_is_constructed_and_an_instance_is_used(lab: Any) -> None:
    async def go(target: str, kwargs: dict[str, Any]) -> ChildReport:
        zygote = await lab.start(target)
        try:
            return await zygote.run({"value": 2}, kwargs=kwargs)
        finally:
            await zygote.close()

    assert lab.run(go("acts.Constructed", {"factor": 2.0})).value == 4.0
    assert lab.run(go("acts:instance", {})).value == 6.0
    wrong = lab.run(go("acts:Constructed", {"power": 2.0}))
    assert wrong.ending is Ending.RAISED
    assert "unexpected keyword argument 'power'" in wrong.error
    refused = lab.run(go("acts:returns", {"power": 2.0}))
    assert "power" in refused.error
    assert "not a class" in refused.error


def test_a_scalar_of_another_library_is_a_number(lab: Any) -> None:
    assert lab.do("number").value == 0.25


def test_an_exception_brings_the_agents_traceback_and_no_terminal_escapes(lab: Any) -> None:
    report = lab.do("raise")
    assert report.ending is Ending.RAISED
    assert report.error == r"ValueError: no \x1b[31mred\x1b[0m tape"
    assert "in do_raise" in report.traceback
    assert "\x1b" not in report.traceback
    assert "_run_target" not in report.traceback, "our own frames are not the agent's concern"
    assert report.exit_code == 1


def test_an_exception_that_cannot_be_shown_is_still_named(lab: Any) -> None:
    report = lab.do("raise_malicious")
    assert report.ending is Ending.RAISED
    assert report.error.startswith("Malicious")


def test_endless_recursion_is_an_exception(lab: Any) -> None:
    report = lab.do("recurse")
    assert report.ending is Ending.RAISED
    assert report.error.startswith("RecursionError")
    assert len(report.traceback) < 20_000


def test_a_hanging_child_is_ended_at_its_deadline(lab: Any) -> None:
    started = time.monotonic()
    report = lab.do("hang", wall_s=0.5)
    assert report.ending is Ending.TIMEOUT
    assert report.error == "did not end within 0.5 s"
    assert report.signal == signal.SIGKILL
    assert report.stdout_tail == "about to hang\n"
    assert 0.5 <= report.wall_s < 10
    assert time.monotonic() - started < 10


def test_exits_without_a_result_are_named_with_their_code(lab: Any) -> None:
    hard = lab.do("exit_hard")
    assert (hard.ending, hard.exit_code) == (Ending.EXITED, 7)
    soft = lab.do("exit")
    assert (soft.ending, soft.exit_code, soft.stdout_tail) == (Ending.EXITED, 3, "going\n")
    assert "code 3" in soft.error


def test_a_signal_that_was_not_ours_is_named(lab: Any) -> None:
    report = lab.do("kill_self")
    assert (report.ending, report.signal) == (Ending.SIGNALED, signal.SIGKILL)
    assert "SIGKILL" in report.error
    assert report.exit_code is None


@pytest.mark.parametrize("fd", [1, 2])
def test_a_gigabyte_of_output_ends_the_child_quickly_and_in_flat_memory(lab: Any, fd: int) -> None:
    lab.do("exit")  # the zygote is up
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.monotonic()
    report = lab.do("flood", fd=fd)
    assert report.ending is Ending.OUTPUT_LIMIT
    assert str(2**20) in report.error
    assert time.monotonic() - started < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 * 1024  # KiB
    tail = report.stdout_tail + report.stderr_tail
    assert 0 < len(tail) <= 8192
    assert set(tail) == {"x"}


def test_output_within_the_limit_is_kept_as_a_clean_tail(lab: Any) -> None:
    text = "a" * 10_000 + "\x1b]0;title\x07 \r\u202eevil\nend"
    report = lab.do("print", text=text)
    assert report.ending is Ending.RETURNED
    assert report.stdout_tail == report.stderr_tail
    assert report.stdout_tail.endswith("\\x1b]0;title\\x07 \\x0d\\u202eevil\nend")


@pytest.mark.parametrize(
    ("act", "complaint"),
    [("nan", "NaN"), ("object", "object"), ("integer_keys", "not a string")],
)
def test_what_is_not_json_is_a_bad_result(lab: Any, act: str, complaint: str) -> None:
    report = lab.do(act)
    assert report.ending is Ending.BAD_RESULT
    assert complaint in report.error


@pytest.mark.parametrize(
    ("raw", "complaint"),
    [
        ("not json", "malformed"),
        ("\udcff\udcfe", "malformed"),
        ('{"ok": 1', "malformed"),
        ('{"ok": 1}{"ok": 2}', "malformed"),
        ("[1]", "not an object"),
        ("{}", "neither"),
        ('{"ok": 1, "more": 2}', "neither"),
        ('{"ok": 1, "ok": 2}', "duplicate"),
        ('{"ok": {"a": 1, "a": 2}}', "duplicate"),
        ('{"ok": 1e999}', "not finite"),
        ('{"ok": -Infinity}', "-Infinity"),
        ('{"ok": 36893488147419103232}', "64 bits"),
        ('{"ok": ' + "9" * 5000 + "}", "malformed"),
        ('{"ok": "\\ud800"}', "surrogate"),
        ('{"ok": ' + "[" * 20 + "]" * 20 + "}", "nested"),
        ('{"ok": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested"),
        ('{"error": 1, "traceback": []}', None),
        ('{"error": "' + "e" * 100_000 + '", "traceback": "\\u001b"}', None),
    ],
)
def test_a_forged_result_is_named_and_bounded(lab: Any, raw: str, complaint: str | None) -> None:
    report = lab.do("forge", raw=raw)
    if complaint is None:
        assert report.ending is Ending.RAISED
    else:
        assert report.ending is Ending.BAD_RESULT
        assert complaint in report.error
    assert len(report.error) <= 1000
    assert "\x1b" not in report.error + report.traceback


def test_a_result_before_a_bad_end_does_not_count(lab: Any) -> None:
    report = lab.do("forge", raw='{"ok": 1.0}', code=9)
    assert (report.ending, report.exit_code) == (Ending.EXITED, 9)


def test_a_result_over_the_limit_ends_the_child(lab: Any) -> None:
    assert lab.do("big_result", size=2**20 - 100).ending is Ending.RETURNED
    for size in (2**20, 2**26):
        report = lab.do("big_result", size=size)
        assert report.ending is Ending.RESULT_LIMIT
        assert report.value is None


def test_memory_and_cpu_limits_hold(lab: Any) -> None:
    async def go() -> tuple[ChildReport, ChildReport]:
        zygote = await lab.start("acts:act", limits=Limits(memory_bytes=2**29, cpu_s=1))
        try:
            return await asyncio.gather(
                zygote.run({"do": "allocate", "size": 2**30}), zygote.run({"do": "burn"})
            )
        finally:
            await zygote.close()

    memory, cpu = lab.run(go())
    assert (memory.ending, memory.error) == (Ending.RAISED, "MemoryError: ")
    # it ignores SIGXCPU, so the hard limit's SIGKILL comes a second later
    assert (cpu.ending, cpu.signal) == (Ending.SIGNALED, signal.SIGKILL)
    assert 1 < cpu.cpu_s < 4  # the kernel's clock for the limit ticks more coarsely


def test_too_many_connections_are_named() -> None:
    status = Status(signal=signal.SIGKILL, limit="sockets")
    ending, _, error, _ = conclude(
        stopped=None, status=status, result=b"", limits=Limits(), wall_s=1.0
    )
    assert ending is Ending.MEMORY_LIMIT
    assert error == f"its processes had more than {MAX_TCP_SOCKETS} TCP sockets together"


def test_usage_is_accounted(lab: Any) -> None:
    report = lab.do("spend")
    assert 0.2 <= report.cpu_s < 5
    assert report.max_rss_bytes > 64 * 2**20
    assert report.wall_s >= 0.2


def test_cancelling_a_run_kills_the_child_first(
    lab: Any, daemons: Any, eventually: Callable[..., None]
) -> None:
    async def go() -> list[int]:
        zygote = await lab.zygote()
        task = asyncio.ensure_future(
            zygote.run({"do": "daemon_and_hang", "name": daemons.name}, wall_s=60.0)
        )
        await asyncio.to_thread(eventually, daemons.pids, "the daemon is up")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        left: list[int] = daemons.pids()
        return left

    assert lab.run(go()) == [], "gone when the cancelled call returns"


def test_fifty_children_at_once(lab: Any, door: Any) -> None:
    async def go() -> list[ChildReport]:
        arrived: asyncio.Queue[asyncio.StreamWriter] = asyncio.Queue()

        async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readline()  # closing with something unread would be a reset
            arrived.put_nowait(writer)

        async with door(lab.tier, greet) as opened:
            zygote = await lab.start("acts:act", port=opened.port)
            act = {"do": "connect", "port": opened.port}
            runs = [
                asyncio.ensure_future(zygote.run(act, on_listener=opened.on_listener))
                for _ in range(50)
            ]
            # none ends before all are there
            connections = [await asyncio.wait_for(arrived.get(), 30) for _ in runs]
            assert not any(run.done() for run in runs)
            for connection in connections:
                connection.close()
            reports = list(await asyncio.gather(*runs))
            await zygote.close()
            return reports

    lab.do("number")  # what is opened once is open
    before = len(list(Path("/proc/self/fd").iterdir()))
    reports = lab.run(go())
    assert {report.ending for report in reports} == {Ending.RETURNED}
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 8, "no descriptor is left behind"
