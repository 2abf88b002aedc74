"""An engine that samples nothing: it answers with what was sampled for the same rollout before.

Serves the engine contract (`engine_client`), so that proxy, sandbox and agent are the real ones.
Started by `replay/command.py` in the place of an engine; what it found is in its report file.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from areal_sub.component import run_component
from areal_sub.engine_client import item_of
from areal_sub.proxy.vocabulary import Vocabulary
from areal_sub.records import (
    EngineInfo,
    GenerateChunk,
    GenerateRequest,
    TurnRecord,
    extend_digest,
    uint32,
)
from areal_sub.replay.recording import Divergence, Recording
from areal_sub.rpc import Handler, Server
from areal_sub.trajectory.run_log import read_rollout


class ReplayEngine:
    def __init__(self, settings: dict[str, Any]) -> None:
        """`rollouts`: [journal, rollout id] of each; an id is one rollout's only."""
        self._words = Vocabulary(Path(settings["tokenizer_path"]))
        self._max_model_len = settings["max_model_len"]
        self._report = Path(settings["report_path"])
        self._recordings = {
            rollout_id: Recording(read_rollout(Path(journal), rollout_id)[1])
            for journal, rollout_id in settings["rollouts"]
        }
        self._divergences: dict[str, list[str]] = {each: [] for each in self._recordings}
        self._write_report()

    async def info(self, params: dict[str, Any]) -> dict[str, Any]:
        return EngineInfo(
            policy_version=0,
            max_model_len=self._max_model_len,
            vocab_size=self._words.size,
            num_slots=1024,
            num_running=0,
            num_waiting=0,
            num_generated_tokens=0,
            num_decode_steps=0,
        ).to_map()

    async def generate(self, params: dict[str, Any]) -> AsyncIterator[Any]:
        request = GenerateRequest.from_map(params)
        recording = self._recordings[request.affinity]
        try:
            turn = recording.give(request.prompt_token_ids, request.max_new_tokens, self._words)
        except Divergence as error:
            self._divergences[request.affinity].append(str(error))
            self._write_report()
            raise
        self._write_report()
        yield item_of(chunk_of(turn, request))

    def _write_report(self) -> None:
        found = {
            rollout_id: {
                "num_turns": len(recording),
                "num_given": recording.num_given,
                "divergences": self._divergences[rollout_id],
            }
            for rollout_id, recording in self._recordings.items()
        }
        self._report.write_text(json.dumps(found))


def chunk_of(turn: TurnRecord, request: GenerateRequest) -> GenerateChunk:
    """The whole answer. One that was aborted ends as if it were cut off."""
    digest = extend_digest(0, request.prompt_token_ids)
    digests = []
    for i in range(len(turn.token_ids)):
        digest = extend_digest(digest, turn.token_ids[i : i + 1])
        digests.append(digest)
    was_complete = turn.finish_reason in ("stop", "tool_calls")
    return GenerateChunk(
        token_ids=turn.token_ids,
        logprobs=turn.rollout_logprobs,
        versions=turn.versions,
        finish_reason="stop" if was_complete else "length",
        digests=uint32(digests),
    )


async def serve(settings: dict[str, Any]) -> None:
    engine = ReplayEngine(settings)
    handlers: dict[str, Handler] = {"info": engine.info, "generate": engine.generate}
    server = Server(Path(settings["socket_path"]), handlers)
    await server.start()
    try:
        await asyncio.get_running_loop().create_future()
    finally:
        await server.close()


if __name__ == "__main__":
    run_component("engine", serve)
