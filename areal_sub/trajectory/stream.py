"""The proxy's record stream, assembled into whole trajectories on the trainer's side.

One reader per run. Memory is bounded by what is in flight: a rollout's records are kept until its
end record arrives, then handed to whoever awaits that rollout. Records of rollouts that nobody
awaits (an earlier reader's) are dropped and counted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from areal_sub.errors import DeadlineExceeded, PeerGone
from areal_sub.records import (
    IntentRecord,
    OpenRecord,
    TrajectoryRecord,
    TurnRecord,
    decode_record,
)
from areal_sub.rpc import Client
from areal_sub.trajectory.tree import Trajectory


class TrajectoryStream:
    """`expect(rollout_id)` before the rollout is opened, `await collect(...)` after it ended."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._awaited: dict[str, asyncio.Future[Trajectory]] = {}
        self._opened: dict[str, OpenRecord] = {}
        self._turns: dict[str, list[TurnRecord]] = {}
        self._began: dict[str, int] = {}  # rollout → an offset that its records begin behind
        self.num_bytes = 0  # of turns whose rollouts have not ended
        self.offset = 0
        self.num_unexpected = 0

    async def run(self) -> None:
        """Read the stream, over all processes of the proxy, where the client redials. Every wait
        raises what ends it."""
        try:
            while True:
                try:
                    await self._read()
                except PeerGone:
                    if not self._client.redials:
                        raise
        except Exception as error:
            for future in self._awaited.values():
                if not future.done():
                    future.set_exception(error)
                    future.exception()  # whoever awaits it still gets it; nobody may be left to
            raise

    async def _read(self) -> None:
        async for item in self._client.stream("subscribe", {"offset": self.offset}):
            for raw in item["records"]:
                self._take(decode_record(raw))
            self.offset = item["offset"]
        raise PeerGone("the proxy ended its record stream")

    def _take(self, record: TrajectoryRecord) -> None:
        if isinstance(record, IntentRecord):
            return  # whether it was answered is for those to ask who read the journal
        if record.rollout_id not in self._awaited:
            self.num_unexpected += 1
        elif isinstance(record, OpenRecord):
            self._began[record.rollout_id] = self.offset
            self._opened[record.rollout_id] = record
            self._turns[record.rollout_id] = []
        elif isinstance(record, TurnRecord):
            self._turns[record.rollout_id].append(record)
            self.num_bytes += record.num_bytes
        else:
            opened = self._opened.pop(record.rollout_id)
            turns = self._take_turns(record.rollout_id)
            future = self._awaited[record.rollout_id]
            if not future.done():
                future.set_result(Trajectory.build(opened, turns, record))

    def expect(self, rollout_id: str) -> None:
        self._awaited[rollout_id] = asyncio.get_running_loop().create_future()

    async def ended(self, rollout_id: str) -> None:
        """Waits for the rollout's end record, however it comes. The deadline is the caller's."""
        await asyncio.shield(self._awaited[rollout_id])

    async def collect(self, rollout_id: str, *, timeout_s: float) -> Trajectory:
        """The whole trajectory. Raises `DeadlineExceeded`, `PeerGone`."""
        try:
            async with asyncio.timeout(timeout_s):
                return await self._awaited[rollout_id]
        except TimeoutError:
            raise DeadlineExceeded(
                f"the end record of rollout {rollout_id} did not arrive within {timeout_s} s"
            ) from None
        finally:
            self.forget(rollout_id)

    def settle(self, rollout_ids: Iterable[str]) -> int:
        """These are done with; the offset before which nothing is needed any more."""
        for rollout_id in rollout_ids:
            self._began.pop(rollout_id, None)
        return min(self._began.values(), default=self.offset)

    def forget(self, rollout_id: str) -> None:
        self._awaited.pop(rollout_id, None)
        self._opened.pop(rollout_id, None)
        self._take_turns(rollout_id)

    def _take_turns(self, rollout_id: str) -> list[TurnRecord]:
        turns = self._turns.pop(rollout_id, [])
        self.num_bytes -= sum(turn.num_bytes for turn in turns)
        return turns
