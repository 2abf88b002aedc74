"""The decode thread: it alone touches the model, the cache and the requests that run.

Others hand it commands through an inbox, carried out between two steps; it hands back what a step
produced in one call. One step computes prompts that join (bounded by `max_prefill_tokens`), decodes
one token for every running row, and samples for all of them at once.

Waits: for the inbox, without a deadline, when paused or idle; for masks, at most `GRACE_S`, or
`ALONE_S` where nobody else could go on. Whoever waits for this thread brings
a future and a deadline.

Requests with a grammar get their masks from processes of their own (`grammars`), which compute them
while the model computes. Who has no mask when the logits are there gives the others `GRACE_S`, sits
this step out and has its last token computed again in the next one: a slow grammar slows itself.

An error inside a step is not one request's fault (those are checked before): it ends the thread,
`ended` carries it, and the engine's process ends with it.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from areal_sub.engines.embedded.batch import compaction, num_admitted, prefill_chunks, turns
from areal_sub.engines.embedded.grammars import receive_all
from areal_sub.engines.embedded.prefixes import Prefix, Prefixes
from areal_sub.engines.embedded.request import Request
from areal_sub.engines.embedded.runner import Runner
from areal_sub.engines.embedded.sampling import Allowed, SamplingRows, sample
from areal_sub.engines.embedded.weights import WeightUpdate
from areal_sub.errors import OutOfMemory

log = logging.getLogger(__name__)

GRACE_S = 0.005
ALONE_S = 0.05


@dataclass(frozen=True, slots=True)
class Progress:
    """What a step brought one request. The three lists have the same length."""

    request_id: int
    token_ids: Sequence[int]
    logprobs: Sequence[float]
    versions: Sequence[int]
    finish_reason: str | None  # "stop" | "length" | None: it goes on
    error: str = ""  # not "": it ended with this error


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    max_model_len: int
    max_running_requests: int
    max_prefill_tokens: int
    max_kv_tokens: int
    max_prefix_bytes: int


# What torch and Python say where they get none, beside errors of that class.
WITHOUT_MEMORY = ("can't allocate memory", "can't start new thread")


class Decoder:
    """Public methods may be called from any thread; counters may be read from any thread."""

    def __init__(
        self,
        runner: Runner,
        limits: Limits,
        *,
        seed: int,
        policy_version: int,
        deliver: Callable[[list[Progress]], object],
    ) -> None:
        """`deliver` is called on the decode thread, at most once per step."""
        self.ended: Future[None] = Future()
        self.policy_version = policy_version
        self.num_generated_tokens = 0
        self.num_decode_steps = 0
        self.num_reused_tokens = 0  # prompt tokens taken from an earlier turn's keys and values
        self._runner = runner
        self._limits = limits
        self._deliver = deliver
        self._generator = torch.Generator(runner.device).manual_seed(seed)
        self._bytes_per_token = runner.cache.bytes_per_token()
        self._prefixes = Prefixes(limits.max_prefix_bytes)
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._paused = False
        self._stopped = False
        self._waiting: deque[Request] = deque()
        self._rows: list[Request] = []  # the request of each row, see `batch`
        self._num_decoding = 0
        self._sampling: SamplingRows | None = None  # of the decoding rows; None: rows changed
        self._thread = threading.Thread(target=self._run, name="decode", daemon=True)

    @property
    def num_running(self) -> int:
        return len(self._rows)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """End the thread after its current step; requests are dropped."""
        self._inbox.put(self._do_stop)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            log.warning("the decode thread did not end its step within %s s", timeout_s)

    def submit(self, request: Request) -> None:
        self._inbox.put(lambda: self._waiting.append(request))

    def abort(self, request_id: int) -> None:
        """Free a request's row before the next step. Unknown or ended ones: no effect."""
        self._inbox.put(lambda: self._do_abort(request_id))

    def pause(self) -> Future[None]:
        """Done when no step is in progress any more."""
        return self._command(lambda: setattr(self, "_paused", True))

    def resume(self) -> Future[None]:
        return self._command(lambda: setattr(self, "_paused", False))

    def update(self, weights: WeightUpdate, version: int) -> Future[None]:
        """Done when the next token would come from the new weights."""
        return self._command(lambda: self._do_update(weights, version))

    def _command(self, act: Callable[[], None]) -> Future[None]:
        done: Future[None] = Future()

        def run() -> None:
            if not done.set_running_or_notify_cancel():
                return
            try:
                act()
            except Exception as error:
                done.set_exception(error)
            else:
                done.set_result(None)

        self._inbox.put(run)
        return done

    # What follows runs on the decode thread.

    @torch.inference_mode()
    def _run(self) -> None:
        self.ended.set_running_or_notify_cancel()
        try:
            while True:
                self._carry_out_commands()
                if self._stopped:
                    break
                if progress := self._step():
                    self._deliver(progress)
        except BaseException as error:
            self.ended.set_exception(self._out_of_memory(error) or error)
        else:
            self.ended.set_result(None)

    def _out_of_memory(self, error: BaseException) -> OutOfMemory | None:
        """What to do about `error`, if it is that. On a CPU torch has no class for it."""
        known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not known and not any(words in str(error) for words in WITHOUT_MEMORY):
            return None
        limits, text = self._limits, str(error).partition("\n")[0]
        out = OutOfMemory(
            f"the engine ran out of memory in a step of {len(self._rows)} requests ({text}): lower "
            f"engine.max_running_requests ({limits.max_running_requests}) or engine.max_model_len "
            f"({limits.max_model_len})"
        )
        out.__cause__ = error
        return out

    def _carry_out_commands(self) -> None:
        """All that have come; where there is nothing to decode, wait for one that changes that."""
        while True:
            idle = self._paused or not (self._rows or self._waiting)
            try:
                command = self._inbox.get(block=idle and not self._stopped)
            except queue.Empty:
                return
            command()

    def _do_stop(self) -> None:
        self._stopped = True

    def _do_abort(self, request_id: int) -> None:
        for request in self._waiting:
            if request.request_id == request_id:
                self._waiting.remove(request)
                request.close()
                return
        ended = {i for i, r in enumerate(self._rows) if r.request_id == request_id}
        for row in ended:
            # Nothing was sampled from a prompt in pieces yet, so nothing says that it is finite.
            self._runner.cache.clear(row)
        self._free(ended)

    def _do_update(self, weights: WeightUpdate, version: int) -> None:
        weights.apply(self._runner.model)
        self.policy_version = version
        self._prefixes.clear()

    def _step(self) -> list[Progress]:
        chunks = self._admit()
        num_decoding = self._num_decoding
        joining = self._rows[num_decoding:]
        # One token of room more than is written, for the padding (see `Runner.forward`).
        longest = max(
            [r.num_cached + 1 for r in self._rows[:num_decoding]]
            + [r.num_cached + chunk for r, chunk in zip(joining, chunks, strict=True)]
        )
        used_length = max(r.num_cached for r in self._rows)
        self._runner.cache.fit(
            len(self._rows), longest + 1, used_rows=len(self._rows), used_length=used_length
        )
        logits: list[Tensor] = []
        if num_decoding:
            logits.append(self._decode(self._rows[:num_decoding]))
        if joining:
            logits.append(self._prefill(num_decoding, joining, chunks))
        self.num_decode_steps += 1
        if not self._num_decoding:
            return []
        return self._sample(logits[0] if len(logits) == 1 else torch.cat(logits))

    def _admit(self) -> list[int]:
        """Give rows to waiting requests; how many tokens to compute of each row that is not
        decoding yet: at most one that was begun before, then the new ones."""
        limits = self._limits
        partial = self._rows[self._num_decoding :]
        if not self._waiting:
            lengths = [r.num_prompt_left for r in partial]
            return prefill_chunks(lengths, budget=limits.max_prefill_tokens)
        if len(self._rows) < limits.max_running_requests:
            order = turns((r.affinity for r in self._rows), (r.affinity for r in self._waiting))
            waiting = list(self._waiting)
            self._waiting = deque(waiting[index] for index in order)
        count = num_admitted(
            (r.max_tokens for r in self._rows),
            (r.max_tokens for r in self._waiting),
            max_rows=limits.max_running_requests,
            max_kv_tokens=limits.max_kv_tokens,
        )
        candidates = list(islice(self._waiting, count))
        found = [self._prefixes.find(r.affinity, r.prompt) for r in candidates]
        lengths = [r.num_prompt_left for r in partial]
        lengths += [
            r.prompt.size - (hit[1] if hit else 0) for r, hit in zip(candidates, found, strict=True)
        ]
        chunks = prefill_chunks(lengths, budget=limits.max_prefill_tokens)
        for request, hit in zip(candidates, found[: len(chunks) - len(partial)], strict=False):
            self._waiting.popleft()
            self._join(request, hit)
        return chunks

    def _join(self, request: Request, hit: tuple[Prefix, int] | None) -> None:
        row = len(self._rows)
        self._rows.append(request)
        request.joined_version = self.policy_version
        if hit is None:
            return
        prefix, length = hit
        used_length = max(r.num_cached for r in self._rows)
        cache = self._runner.cache
        cache.fit(row + 1, max(length, used_length), used_rows=row, used_length=used_length)
        cache.write(row, prefix.key_values, length)
        request.num_cached = length
        self.num_reused_tokens += length

    def _decode(self, rows: list[Request]) -> Tensor:
        logits = self._runner.forward(
            0, [[r.last_token_id] for r in rows], [r.num_cached for r in rows]
        )
        for request in rows:
            request.num_cached += 1
        return logits

    def _prefill(self, first_row: int, rows: list[Request], chunks: list[int]) -> Tensor:
        """Logits of the rows whose prompt is now complete, which from now on decode."""
        starts = [r.num_cached for r in rows]
        tokens = [
            r.prompt[start : start + chunk].tolist()
            for r, start, chunk in zip(rows, starts, chunks, strict=True)
        ]
        logits = self._runner.forward(first_row, tokens, starts)
        for request, chunk in zip(rows, chunks, strict=True):
            request.num_cached += chunk
        complete = sum(r.num_prompt_left == 0 for r in rows)
        self._num_decoding += complete
        self._sampling = None
        return logits[:complete]

    def _sample(self, logits: Tensor) -> list[Progress]:
        rows = self._rows[: self._num_decoding]
        if self._sampling is None:
            self._sampling = SamplingRows.of(
                [(r.temperature, r.top_p, r.top_k) for r in rows], self._runner.device
            )
        failed, held = self._await_masks(rows)
        masks = {
            row: r.constraint.mask
            for row, r in enumerate(rows)
            if r.constraint is not None and r.constraint.mask is not None
        }
        allowed = Allowed.of(masks, self._runner.device) if masks else None
        token_ids, logprobs = sample(logits, self._sampling, self._generator, allowed)
        # Both in one transfer: float64 holds every token id and every float32.
        drawn = torch.stack([token_ids.double(), logprobs.double()]).tolist()
        version = self.policy_version
        self.num_generated_tokens += len(rows) - len(held) - len(failed)
        progress: list[Progress] = []
        ended: set[int] = set()
        for row, (request, token_id, logprob) in enumerate(zip(rows, *drawn, strict=True)):
            if not math.isfinite(logprob):
                ended.add(row)
                self._runner.cache.clear(row)
                error = f"the model's logits are not finite at policy version {version}"
                progress.append(Progress(request.request_id, (), (), (), None, error))
                continue
            if row in failed:
                ended.add(row)
                progress.append(Progress(request.request_id, (), (), (), None, failed[row]))
                continue
            if row in held:
                request.num_cached -= 1
                continue
            reason = request.append(int(token_id), logprob, version)
            if reason is not None:
                ended.add(row)
                self._retain(row, request)
            if request.stream:
                sampled = ([int(token_id)], [logprob], [version])
                progress.append(Progress(request.request_id, *sampled, reason))
            elif reason is not None:
                whole = (request.token_ids, request.logprobs, request.versions)
                progress.append(Progress(request.request_id, *whole, reason))
        self._free(ended)
        return progress

    def _await_masks(self, rows: list[Request]) -> tuple[dict[int, str], set[int]]:
        """The rows whose grammar failed, with why, and those that sit this step out."""
        constraints = {row: r.constraint for row, r in enumerate(rows) if r.constraint is not None}
        if not constraints:
            return {}, set()
        others = len(constraints) < len(rows)
        others = others or not all(c.is_waiting for c in constraints.values())
        receive_all(constraints.values(), GRACE_S if others else ALONE_S)
        failed = {
            row: f"the output's grammar failed: {c.error}"
            for row, c in constraints.items()
            if c.error
        }
        return failed, {row for row, c in constraints.items() if c.is_waiting}

    def _retain(self, row: int, request: Request) -> None:
        """Keep an ended request's keys and values for the next turn, unless they are stale: begun
        under an earlier version than the one that a new request would continue them with."""
        if request.joined_version != self.policy_version:
            return
        num_bytes = request.num_cached * self._bytes_per_token
        if self._prefixes.wants(request.affinity, request.num_cached, num_bytes):
            key_values = self._runner.cache.read(row, request.num_cached)
            self._prefixes.add(
                Prefix(request.affinity, request.cached_token_ids(), key_values, num_bytes)
            )

    def _free(self, ended: set[int]) -> None:
        """Take rows out of the batch and close the holes."""
        if not ended:
            return
        for row in ended:
            self._rows[row].close()
        for source, target in compaction(self._num_decoding, len(self._rows), ended):
            self._runner.cache.move(source, target, self._rows[source].num_cached)
            self._rows[target] = self._rows[source]
        num_gone = sum(row < self._num_decoding for row in ended)
        del self._rows[len(self._rows) - len(ended) :]
        self._num_decoding -= num_gone
        self._sampling = None
