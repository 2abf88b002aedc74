"""The engine of a check: tokens in, tokens out, said by a script instead of a model.

    python -m areal_sub.checking.scripted_engine SETTINGS.json
    settings: socket_path, tokenizer_path, script (texts, or none)

Where an agent asks for structured output, what the script says is said as far as the grammar takes
it, and then what ends it soonest; llguidance, which the learner's extra brings, reads the grammar.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from areal_sub.checking.script import next_answer
from areal_sub.checking.tokenizer import END
from areal_sub.component import run_component
from areal_sub.engine_client import item_of
from areal_sub.errors import GrammarError
from areal_sub.records import (
    EngineInfo,
    GenerateChunk,
    GenerateRequest,
    extend_digest,
    float32,
    int32,
    uint32,
)
from areal_sub.rpc import Server

MAX_MODEL_LEN = 2**20
LOGPROB = -0.5
MAX_CONSTRAINED_TOKENS = 4096
# Of the bytes that may come next in structured output: what closes, then what is short.
_PREFERRED = b'"}],:{[01tfn-Aa \n'


class ScriptedEngine:
    def __init__(self, tokenizer_path: Path, script: Sequence[str]) -> None:
        self._path = tokenizer_path / "tokenizer.json"
        self._tokenizer = tokenizer = Tokenizer.from_file(str(self._path))
        self._script = script
        (self._end_id,) = tokenizer.encode(END).ids
        self._num_tokens = 0
        self._grammar_tokenizer: Any = None

    async def info(self, params: dict[str, Any]) -> dict[str, Any]:
        return EngineInfo(
            policy_version=0,
            max_model_len=MAX_MODEL_LEN,
            vocab_size=self._tokenizer.get_vocab_size(),
            num_slots=0,
            num_running=0,
            num_waiting=0,
            num_generated_tokens=self._num_tokens,
            num_decode_steps=self._num_tokens,
        ).to_map()

    async def generate(self, params: dict[str, Any]) -> AsyncIterator[Any]:
        request = GenerateRequest.from_map(params)
        prompt = self._tokenizer.decode(
            request.prompt_token_ids.tolist(), skip_special_tokens=False
        )
        answer = self._tokenizer.encode(next_answer(prompt, self._script)).ids
        if request.grammar:
            answer = self._constrained(request.grammar, answer)
        token_ids = [*answer, self._end_id][: request.max_new_tokens]
        self._num_tokens += len(token_ids)
        digest = extend_digest(0, request.prompt_token_ids)
        size = 1 if request.stream else len(token_ids)
        for start in range(0, len(token_ids), size):
            piece = token_ids[start : start + size]
            digests = []
            for token_id in piece:
                digest = extend_digest(digest, int32([token_id]))
                digests.append(digest)
            reason = None
            if start + size >= len(token_ids):
                reason = "stop" if token_ids[-1] == self._end_id else "length"
            chunk = GenerateChunk(
                token_ids=int32(piece),
                logprobs=float32([LOGPROB] * len(piece)),
                versions=int32([0] * len(piece)),
                finish_reason=reason,
                digests=uint32(digests),
            )
            yield item_of(chunk)
            await asyncio.sleep(0)

    def _constrained(self, grammar: str, answer: Sequence[int]) -> list[int]:
        """Raises `GrammarError`."""
        try:
            from areal_sub.engines.embedded.matching import Matcher, load_tokenizer
        except ImportError as error:
            raise GrammarError(
                f"the check cannot answer a request for structured output: {error}; "
                "install areal-sub[train]"
            ) from None
        num_ids = self._tokenizer.get_vocab_size()
        if self._grammar_tokenizer is None:
            self._grammar_tokenizer = load_tokenizer(self._path)
        preferred = [self._tokenizer.encode(chr(byte)).ids[0] for byte in _PREFERRED]
        taken: list[int] = []
        try:
            matcher = Matcher(self._grammar_tokenizer, num_ids, grammar, [self._end_id])
            while len(taken) < MAX_CONSTRAINED_TOKENS:
                mask = matcher.mask()
                said = taken == answer[: len(taken)]  # still what the script says
                wanted = answer[len(taken) : len(taken) + 1] if said else []
                choices = (*wanted, self._end_id, *preferred, *range(num_ids))
                token_id = next(i for i in choices if mask[i >> 3] >> (i & 7) & 1)
                if token_id == self._end_id:
                    return taken
                matcher.consume(token_id)
                taken.append(token_id)
        except ValueError as error:
            raise GrammarError(str(error)) from None
        raise GrammarError(f"the check found no answer of {MAX_CONSTRAINED_TOKENS} tokens for it")


async def serve(settings: dict[str, Any]) -> None:
    """Serve until cancelled."""
    engine = ScriptedEngine(Path(settings["tokenizer_path"]), settings["script"])
    server = Server(
        Path(settings["socket_path"]), {"info": engine.info, "generate": engine.generate}
    )
    await server.start()
    try:
        await asyncio.get_running_loop().create_future()
    finally:
        await server.close()


if __name__ == "__main__":
    run_component("engine", serve)
