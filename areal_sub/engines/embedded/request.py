"""One sampling request inside the engine: what was asked (checked), and how far it is.

Invariants, between two steps: a request that decodes has keys and values of every token but the
last sampled one (`num_cached == num_tokens - 1`); `token_ids`, `logprobs` and `versions` have the
same length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Self

import numpy as np

from areal_sub.engines.embedded.grammars import Constraint
from areal_sub.errors import ArealSubError
from areal_sub.records import GenerateRequest, Int32Array


class RequestError(ArealSubError):
    """This request cannot be sampled; the engine goes on with the others."""


class PromptTooLong(RequestError):
    """The prompt leaves no room for a single new token within `max_model_len`."""


# Below it the division by the temperature overflows; agents that ask for 1e-8 mean "greedy".
MIN_TEMPERATURE = 1e-5


@dataclass(slots=True, kw_only=True, eq=False)
class Request:
    request_id: int
    prompt: Int32Array  # [num_prompt]
    max_new_tokens: int  # already cut to what `max_model_len` leaves
    temperature: float  # 0 = greedy
    top_p: float
    top_k: int  # 0 = off
    stop_token_ids: frozenset[int]
    stream: bool
    affinity: str
    grammar: str  # empty: any output
    constraint: Constraint | None = None  # what the sampled tokens are held to; closed by the owner

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    num_cached: int = 0  # tokens whose keys and values lie in this request's row of the cache
    joined_version: int = -1  # policy version when it got its row

    @classmethod
    def checked(
        cls, record: GenerateRequest, *, request_id: int, vocab_size: int, max_model_len: int
    ) -> Self:
        """Raises `RequestError` saying which field is wrong."""
        prompt = record.prompt_token_ids
        if prompt.size == 0:
            raise RequestError("prompt_token_ids is empty: there is nothing to continue")
        if prompt.size >= max_model_len:
            raise PromptTooLong(
                f"the prompt has {prompt.size} tokens; max_model_len {max_model_len} leaves no "
                "room for a new one: shorten the prompt or raise engine.max_model_len"
            )
        bad = np.flatnonzero((prompt < 0) | (prompt >= vocab_size))
        if bad.size:
            raise RequestError(
                f"prompt_token_ids[{bad[0]}] is {prompt[bad[0]]}; the model's vocabulary has "
                f"{vocab_size} tokens: is the prompt from another tokenizer?"
            )
        if type(record.max_new_tokens) is not int or record.max_new_tokens < 1:
            raise RequestError(f"max_new_tokens must be at least 1, got {record.max_new_tokens!r}")
        temperature = _number("temperature", record.temperature)
        if temperature < 0:
            raise RequestError(f"temperature must be 0 (greedy) or more, got {temperature}")
        top_p = _number("top_p", record.top_p)
        if not 0 < top_p <= 1:
            raise RequestError(f"top_p must be in (0, 1], got {top_p}")
        if type(record.top_k) is not int or record.top_k < 0:
            raise RequestError(f"top_k must be 0 (off) or more, got {record.top_k!r}")
        if not all(type(token_id) is int for token_id in record.stop_token_ids):
            raise RequestError(f"stop_token_ids must be integers, got {record.stop_token_ids!r}")
        return cls(
            request_id=request_id,
            prompt=prompt,
            max_new_tokens=min(record.max_new_tokens, max_model_len - prompt.size),
            temperature=temperature if temperature >= MIN_TEMPERATURE else 0.0,
            top_p=top_p,
            top_k=record.top_k if record.top_k < vocab_size else 0,
            stop_token_ids=frozenset(record.stop_token_ids),
            stream=bool(record.stream),
            affinity=str(record.affinity),
            grammar=str(record.grammar),
        )

    @property
    def max_tokens(self) -> int:
        """Prompt and new tokens together, at most."""
        return self.prompt.size + self.max_new_tokens

    @property
    def last_token_id(self) -> int:
        return self.token_ids[-1] if self.token_ids else int(self.prompt[-1])

    @property
    def num_prompt_left(self) -> int:
        """Prompt tokens whose keys and values are still to be computed; 0: it decodes."""
        return max(0, self.prompt.size - self.num_cached)

    def append(self, token_id: int, logprob: float, version: int) -> str | None:
        """Take one sampled token; the finish reason if it was the last one."""
        self.token_ids.append(token_id)
        self.logprobs.append(logprob)
        self.versions.append(version)
        if token_id in self.stop_token_ids:
            return "stop"
        if len(self.token_ids) == self.max_new_tokens:
            return "length"
        if self.constraint is not None:
            self.constraint.advance(token_id)
        return None

    def close(self) -> None:
        """It takes no tokens any more. Called once by the decode thread, where it got to it."""
        if self.constraint is not None:
            self.constraint.close()

    def cached_token_ids(self) -> Int32Array:
        """The tokens whose keys and values are cached, int32 [num_cached]."""
        sampled = np.asarray(self.token_ids, dtype=np.int32)
        return np.concatenate([self.prompt, sampled])[: self.num_cached]


def _number(name: str, value: object) -> float:
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise RequestError(f"{name} must be a finite number, got {value!r}")
    return float(value)
