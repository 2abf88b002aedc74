"""rpc over real Unix sockets: results, streams, errors, cancellation, and a peer that goes away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from areal_sub import rpc
from areal_sub.errors import ConfigError, DeadlineExceeded, PeerGone, RpcError
from areal_sub.rpc import MAX_QUEUED_ITEMS, Client, Handler, Last, Server

TIMEOUT_S = 10.0


def serve(
    folder: Path, handlers: dict[str, Handler], use: Callable[[Client, Server], Awaitable[None]]
) -> None:
    async def main() -> None:
        server = Server(folder / "s.sock", handlers)
        await server.start()
        client = await Client.connect(folder / "s.sock", peer="far side", timeout_s=TIMEOUT_S)
        try:
            async with asyncio.timeout(TIMEOUT_S):
                await use(client, server)
        finally:
            await client.close()
            await server.close()

    asyncio.run(main())


async def double(params: dict[str, Any]) -> int:
    return 2 * int(params["x"])


async def hang(params: dict[str, Any]) -> None:
    await asyncio.Event().wait()


async def count(params: dict[str, Any]) -> AsyncIterator[int]:
    for i in range(params["n"]):
        yield i


def test_many_calls_share_one_connection(tmp_path: Path) -> None:
    async def use(client: Client, server: Server) -> None:
        calls = [client.call("double", {"x": i}, timeout_s=TIMEOUT_S) for i in range(100)]
        assert await asyncio.gather(*calls) == [2 * i for i in range(100)]

    serve(tmp_path, {"double": double}, use)


def test_socket_is_for_its_owner_only(tmp_path: Path) -> None:
    async def use(client: Client, server: Server) -> None:
        assert (tmp_path / "s.sock").stat().st_mode & 0o777 == 0o600

    serve(tmp_path, {}, use)


def test_a_stream_longer_than_the_queue_arrives_whole(tmp_path: Path) -> None:
    async def use(client: Client, server: Server) -> None:
        num = 3 * MAX_QUEUED_ITEMS
        items = [item async for item in client.stream("count", {"n": num})]
        assert items == list(range(num))

    serve(tmp_path, {"count": count}, use)


def test_errors_of_ours_keep_their_message_and_unknown_methods_are_named(tmp_path: Path) -> None:
    async def refuse(params: dict[str, Any]) -> None:
        raise ConfigError("no such thing")

    async def use(client: Client, server: Server) -> None:
        with pytest.raises(RpcError, match="far side: ConfigError: no such thing"):
            await client.call("refuse", timeout_s=TIMEOUT_S)
        with pytest.raises(RpcError, match=r"no method 'nope'; there are: .*refuse"):
            await client.call("nope", timeout_s=TIMEOUT_S)

    serve(tmp_path, {"refuse": refuse}, use)


def test_a_deadline_names_the_peer_and_cancels_the_handler(tmp_path: Path) -> None:
    cancelled = asyncio.Event()

    async def hang_and_tell(params: dict[str, Any]) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    async def use(client: Client, server: Server) -> None:
        with pytest.raises(DeadlineExceeded, match="far side did not answer 'hang'"):
            await client.call("hang", timeout_s=0.01)
        await cancelled.wait()

    serve(tmp_path, {"hang": hang_and_tell}, use)


def test_leaving_a_full_stream_does_not_block_other_calls(tmp_path: Path) -> None:
    async def use(client: Client, server: Server) -> None:
        async with aclosing(client.stream("count", {"n": 10 * MAX_QUEUED_ITEMS})) as items:
            async for _ in items:
                break
        assert await client.call("double", {"x": 4}, timeout_s=TIMEOUT_S) == 8

    serve(tmp_path, {"count": count, "double": double}, use)


def test_a_reader_that_lags_stops_its_writer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rpc, "MAX_QUEUED_ITEMS", 4)
    num_written = 0

    async def write(params: dict[str, Any]) -> AsyncIterator[bytes]:
        nonlocal num_written
        for _ in range(100):
            num_written += 1
            yield bytes(2**20)

    async def use(client: Client, server: Server) -> None:
        num_read = 0
        async with aclosing(client.stream("write")) as items:
            async for _ in items:
                num_read += 1
                if num_read == 1:
                    for _ in range(2000):  # turns of the loop, in which all could come
                        await asyncio.sleep(0)
                    assert num_written < 20
        assert num_read == 100

    serve(tmp_path, {"write": write}, use)


@pytest.mark.parametrize("is_last", [False, True])
def test_who_leaves_behind_the_last_item_cancels_nothing(tmp_path: Path, is_last: bool) -> None:
    go, ended = asyncio.Event(), asyncio.Event()
    cancelled = []

    async def one(params: dict[str, Any]) -> AsyncIterator[Any]:
        try:
            yield Last(1) if is_last else 1
            await go.wait()
        except asyncio.CancelledError:
            cancelled.append(True)
            raise
        finally:
            ended.set()

    async def use(client: Client, server: Server) -> None:
        async with aclosing(client.stream("one")) as items:
            async for item in items:
                assert item == 1
                break
        await client.call("ping", timeout_s=TIMEOUT_S)
        go.set()
        await ended.wait()
        assert bool(cancelled) is not is_last

    serve(tmp_path, {"one": one}, use)


def test_the_last_item_ends_the_call(tmp_path: Path) -> None:
    """It comes, and the stream is at its end, while the handler still has something to do."""
    ended = asyncio.Event()

    async def some(params: dict[str, Any]) -> AsyncIterator[Any]:
        yield 1
        yield Last(2)
        await ended.wait()
        raise ConfigError("too late to be told")

    async def use(client: Client, server: Server) -> None:
        assert [item async for item in client.stream("some")] == [1, 2]
        ended.set()
        assert await client.call("double", {"x": 4}, timeout_s=TIMEOUT_S) == 8

    serve(tmp_path, {"some": some, "double": double}, use)


def test_all_waits_end_when_the_peer_goes(tmp_path: Path) -> None:
    async def use(client: Client, server: Server) -> None:
        waiting = asyncio.ensure_future(client.call("hang", timeout_s=TIMEOUT_S))
        await client.call("double", {"x": 1}, timeout_s=TIMEOUT_S)
        await server.close()
        with pytest.raises((PeerGone, RpcError)):
            await waiting
        with pytest.raises(PeerGone, match="far side"):
            await client.call("double", {"x": 1}, timeout_s=TIMEOUT_S)

    serve(tmp_path, {"hang": hang, "double": double}, use)


def test_connecting_to_nobody_names_who_was_waited_for(tmp_path: Path) -> None:
    with pytest.raises(DeadlineExceeded, match="engine did not listen"):
        asyncio.run(Client.connect(tmp_path / "none.sock", peer="engine", timeout_s=0.05))


def test_a_client_that_redials_outlives_its_peer(tmp_path: Path) -> None:
    """What was under way is lost; later calls wait for the next process at the path."""

    async def main() -> None:
        path = tmp_path / "s.sock"
        first = Server(path, {"hang": hang, "double": double})
        await first.start()
        client = await Client.connect(path, peer="far side", timeout_s=TIMEOUT_S, redials=True)
        lost = asyncio.ensure_future(client.call("hang", timeout_s=TIMEOUT_S))
        assert await client.call("double", {"x": 1}, timeout_s=TIMEOUT_S) == 2
        await first.close()
        with pytest.raises(PeerGone, match="far side"):
            await lost
        async with asyncio.timeout(TIMEOUT_S):
            while client.is_connected:  # noqa: ASYNC110 (its answer came before its end)
                await asyncio.sleep(0)
        waiting = asyncio.ensure_future(client.call("double", {"x": 2}, timeout_s=TIMEOUT_S))
        with pytest.raises(DeadlineExceeded, match="far side did not answer 'double' within"):
            await client.call("double", {"x": 3}, timeout_s=0.05)
        second = Server(tmp_path / "own.sock", {"double": double})
        await second.start()
        assert not waiting.done(), "it listens, but has not taken the path over"
        (tmp_path / "own.sock").rename(path)
        assert await waiting == 4
        await client.close()
        with pytest.raises(PeerGone):
            await client.call("double", {"x": 1}, timeout_s=TIMEOUT_S)
        await second.close()

    asyncio.run(main())


def test_a_handler_whose_own_connection_is_refused_is_an_error_like_others(tmp_path: Path) -> None:
    async def call_nobody(params: dict[str, Any]) -> None:
        raise ConnectionRefusedError("by nobody")

    async def stream_nobody(params: dict[str, Any]) -> AsyncIterator[int]:
        yield 1
        raise ConnectionRefusedError("by another")

    async def use(client: Client, server: Server) -> None:
        with pytest.raises(RpcError, match="ConnectionRefusedError: by nobody"):
            await client.call("call_nobody", timeout_s=TIMEOUT_S)
        with pytest.raises(RpcError, match="ConnectionRefusedError: by another"):
            async with aclosing(client.stream("stream_nobody")) as items:
                async for item in items:
                    assert item == 1

    serve(tmp_path, {"call_nobody": call_nobody, "stream_nobody": stream_nobody}, use)


def test_every_server_answers_a_ping(tmp_path: Path) -> None:
    async def use(client: Client, server: Server) -> None:
        assert await client.call("ping", timeout_s=TIMEOUT_S) is None

    serve(tmp_path, {}, use)
