"""The life of a component: real processes, whose sockets answer or do not."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from areal_sub.errors import ArealSubError, ComponentDied, DeadlineExceeded, ModelError
from areal_sub.rpc import Client
from areal_sub.schedulers.local import Component
from areal_sub.schedulers.service import Incident, Limits, Service, Steps

# A component that serves nothing but `rpc`'s own methods, at the path in its settings.
MODULE = "service_stub"
TIMEOUT_S = 60.0


@pytest.fixture(autouse=True)
def _stub_is_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *sys.path]))


def make_service(
    folder: Path, told: list[Incident], *, heartbeat_s: float = 60.0, max_restarts: int = 3
) -> tuple[Service, Client]:
    def own(number: int) -> Path:
        return folder / f"stub.{number}.sock"

    async def launch(number: int) -> Component:
        settings = {"socket_path": str(own(number))}
        return await Component.start(
            "stub", MODULE, settings, folder=folder, log_path=folder / "stub.log"
        )

    async def introduce(number: int) -> None:
        client = await Client.connect(own(number), peer="stub", timeout_s=TIMEOUT_S)
        await client.close()
        own(number).rename(folder / "stub.sock")

    client = Client(folder / "stub.sock", peer="stub", redials=True)
    limits = Limits(
        start_s=TIMEOUT_S,
        heartbeat_s=heartbeat_s,
        shutdown_s=3.0,
        max_restarts=max_restarts,
        window_s=3600.0,
    )
    steps = Steps(launch=launch, introduce=introduce)
    return Service("stub", steps, client, limits, on_incident=told.append), client


def lived(folder: Path, use: Callable[..., object], **limits: float) -> list[Incident]:
    """`await use(service, client, living)` while the service lives; what was told of it."""
    told: list[Incident] = []

    async def main() -> None:
        service, client = make_service(folder, told, **limits)  # type: ignore[arg-type]
        await service.start()
        await service.introduced()
        living = asyncio.ensure_future(service.live())
        try:
            async with asyncio.timeout(TIMEOUT_S):
                await use(service, client, living)  # type: ignore[misc]
        finally:
            living.cancel()
            await asyncio.gather(living, return_exceptions=True)
            await service.stop()
            await client.close()

    asyncio.run(main())
    return told


def test_a_killed_process_is_replaced_at_the_path_that_callers_know(tmp_path: Path) -> None:
    async def use(service: Service, client: Client, living: asyncio.Future[None]) -> None:
        await client.call("ping", timeout_s=TIMEOUT_S)
        first = service.pid
        os.kill(first, signal.SIGKILL)
        await client.call("ping", timeout_s=TIMEOUT_S, idempotent=True)
        while service.pid == first:  # the old one's answer, at most
            await client.call("ping", timeout_s=TIMEOUT_S, idempotent=True)

    (incident,) = lived(tmp_path, use)
    assert str(incident).endswith("ended with signal SIGKILL; starting another")


@pytest.mark.parametrize("way", ["stopped", "accused"])
def test_one_that_hangs_is_killed(tmp_path: Path, way: str) -> None:
    async def use(service: Service, client: Client, living: asyncio.Future[None]) -> None:
        first = service.pid
        if way == "stopped":
            os.kill(first, signal.SIGSTOP)
        else:
            service.accuse("hangs: it did not do what it should")
        while service.pid == first:  # noqa: ASYNC110 (nothing tells when)
            await asyncio.sleep(0.01)
        with pytest.raises(ProcessLookupError):
            os.kill(first, 0)

    told = lived(tmp_path, use, heartbeat_s=2.0 if way == "stopped" else 60.0, max_restarts=50)
    assert told[0].what.startswith("hangs: ")


def test_where_no_restart_is_left_callers_need_not_wait(tmp_path: Path) -> None:
    async def use(service: Service, client: Client, living: asyncio.Future[None]) -> None:
        os.kill(service.pid, signal.SIGKILL)
        with pytest.raises(ComponentDied, match=r"the stub process ended with signal SIGKILL .*"):
            await living
        assert service.is_given_up
        with pytest.raises(Exception, match="stub"):
            await client.call("ping", timeout_s=TIMEOUT_S)

    (incident,) = lived(tmp_path, use, max_restarts=0)
    assert incident.is_final


def test_one_that_never_comes_up_has_a_name(tmp_path: Path) -> None:
    async def main() -> None:
        service, client = make_service(tmp_path, [])
        (tmp_path / "stub.0.sock").mkdir()  # where it should listen
        await service.start()
        try:
            with pytest.raises((ComponentDied, DeadlineExceeded), match="the stub"):
                await service.introduced()
        finally:
            await service.stop()
            await client.close()

    asyncio.run(main())


def end_of_stub(folder: Path, settings: dict[str, str], *, log_stays: bool = True) -> ArealSubError:
    """The error by which a stub's process with `settings` is known to have ended."""

    async def main() -> None:
        stub = await Component.start(
            "stub", MODULE, settings,
            folder=folder, log_path=folder / "stub.log", log_stays=log_stays,
        )  # fmt: skip
        async with asyncio.timeout(TIMEOUT_S):
            await stub.died

    with pytest.raises(ArealSubError) as caught:
        asyncio.run(main())
    return caught.value


def test_one_that_refuses_its_settings_says_so_itself(tmp_path: Path) -> None:
    refused = end_of_stub(tmp_path, {"refuses": "folder \u00fc has no chat template:\nmake one"})
    assert type(refused) is ModelError
    assert str(refused) == "folder \u00fc has no chat template:\nmake one"
    assert "Traceback" in (tmp_path / "stub.log").read_text(), "who wants to know finds it there"

    # The next process of that name ends by something else, which is not hidden by that.
    died = end_of_stub(tmp_path, {})
    assert type(died) is ComponentDied
    assert f"the end of its log ({tmp_path / 'stub.log'}):\n  | " in str(died)
    assert str(died).endswith("  | KeyError: 'socket_path'")


def test_a_log_that_goes_is_shown_but_not_named(tmp_path: Path) -> None:
    died = end_of_stub(tmp_path, {}, log_stays=False)
    assert "; the end of its log:\n  | " in str(died)
    assert str(tmp_path) not in str(died).replace(str(Path(__file__).parent), "")
