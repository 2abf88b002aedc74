"""Output grammars in vLLM: matched beside it, and with the logprobs of the model itself.

`register` changes five functions of vLLM's:

- Its backend "guidance" has each grammar matched by a process of its own (`matching.py`, which
  says why), where vLLM would do it within the engine. A schema is an untrusted agent's.
- Its check of a grammar before that, which would do the same within the API server, is left out:
  whoever asks has compiled it already, in such a process, too.
- Where its scheduler is done with a request, however that ended, the request's process is ended.
- Before grammars' masks are applied, the logits of their rows are kept, and
- after sampling, the logprob of each token of these rows is computed from what was kept, at the
  request's temperature. vLLM's own would be of the masked distribution, the learner's are not.

What a request gives as its grammar is one text for the process: see `matching.serve_request`.
The server is started with `--structured-outputs-config '{"backend": "guidance"}'`. Whether all of
it works there, the probe finds out by asking for a token.

Only for vLLM's first model runner, and without speculative decoding.
"""

from __future__ import annotations

import itertools
import json
import logging
import runpy
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers.utils import cached_file
from vllm.v1.core.sched import scheduler
from vllm.v1.sample import sampler
from vllm.v1.structured_output import backend_guidance, utils
from vllm.v1.structured_output.backend_types import StructuredOutputGrammar

log = logging.getLogger("vllm.areal_sub")

MATCHING = Path(__file__).parents[3] / "embedded" / "matching.py"
matching = SimpleNamespace(**runpy.run_path(str(MATCHING)))  # for its protocol; no module here
START_TIMEOUT_S = 60.0
COMPILE_TIMEOUT_S = 20.0
# All requests of the batch wait for a mask. Its process ends much earlier by its CPU time, so this
# is for a machine that does not let it run.
STEP_TIMEOUT_S = 10.0
MIN_TEMPERATURE = 1e-5  # vLLM's own, below which it is greedy


class Template:
    """The process that is forked per grammar."""

    def __init__(self, tokenizer: str, vocab_size: int) -> None:
        """`tokenizer`: a folder or a hub name. Raises `ValueError`."""
        self._control, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        path = str(cached_file(tokenizer, "tokenizer.json"))
        with there:
            command = [sys.executable, "-P", str(MATCHING), str(there.fileno()), path]
            self._process = subprocess.Popen(
                [*command, str(vocab_size)], pass_fds=[there.fileno()], stdin=subprocess.DEVNULL
            )
        self._numbers = itertools.count()
        try:
            self._control.settimeout(START_TIMEOUT_S)
            if (answer := self._control.recv(4096)) != matching.READY:
                raise ValueError(f"grammars cannot be matched: {answer.decode() or 'it ended'}")
        except BaseException:
            self._process.kill()
            self._control.close()
            raise

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def fork(self) -> tuple[socket.socket, int]:
        """The connection to a new fork, and its number."""
        here, there = socket.socketpair()
        number = next(self._numbers)
        with there:
            socket.send_fds(self._control, [b"+" + matching.NUMBER.pack(number)], [there.fileno()])
        return here, number

    def end(self, connection: socket.socket, number: int) -> None:
        connection.close()
        with suppress(OSError):  # the template is gone, and with it the fork
            self._control.send(b"-" + matching.NUMBER.pack(number))


class Grammar(StructuredOutputGrammar):
    """One request's. A token that no mask has allowed is not accepted, whatever the reason (its
    process has failed, say): vLLM ends the request with the reason "error", and the token is
    thrown away, also where the request would have been at its end with it."""

    def __init__(self, template: Template, order: str) -> None:
        """With the mask of the first token. Raises `ValueError`, `OSError`."""
        self._connection, number = template.fork()
        # As a second factor also where nobody has a use for it any more.
        self._end = weakref.finalize(self, template.end, self._connection, number)
        self._stops = frozenset(json.loads(order)["stops"])
        self._is_asked = True
        try:
            self._connection.settimeout(COMPILE_TIMEOUT_S)
            data = order.encode()
            self._connection.sendall(matching.FRAME.pack(matching.ASKED, len(data)) + data)
            self._mask = self._answer()
            if self._mask is None:
                raise ValueError("the grammar does not compile")
            self._connection.settimeout(STEP_TIMEOUT_S)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends the process. From any thread, and more than once."""
        self._mask = None
        self._is_asked = False
        self._end()

    def accept_tokens(self, request_id: str, tokens: list[int]) -> bool:
        for token in tokens:
            mask, self._mask = self._mask, None  # it is for one token
            if mask is None or not mask[token >> 3] >> (token & 7) & 1:
                return False
            if token not in self._stops:  # else the request has ended
                self._is_asked = True
                with suppress(OSError):  # found out when its answer is read
                    self._connection.send(matching.TOKEN.pack(token))
        return True

    def fill_bitmask(self, bitmask: Tensor, batch_index: int) -> None:
        if self._is_asked:
            self._mask = self._answer()
        row = bitmask[batch_index]
        if self._mask is None:
            row.fill_(-1)  # all: what is sampled is not accepted
        else:
            row.copy_(torch.frombuffer(bytearray(self._mask), dtype=torch.int32))

    def _answer(self) -> bytes | None:
        """The next mask; None: there is none, nor will there be."""
        self._is_asked = False
        try:
            kind, length = matching.FRAME.unpack(self._read(matching.FRAME.size))
            body = self._read(length)
        except (OSError, EOFError) as error:
            log.warning("a grammar takes too much: %r", error)
        else:
            if kind == matching.MASK:
                return body
            log.warning("a grammar failed: %s", body.decode())
        return None

    def _read(self, num_bytes: int) -> bytes:
        data = bytearray()
        while len(data) < num_bytes:
            if not (more := self._connection.recv(num_bytes - len(data))):
                raise EOFError("its process ended")
            data += more
        return bytes(data)

    def is_terminated(self) -> bool:
        return False  # the request's stop tokens end it, and are allowed where the grammar may end

    def validate_tokens(self, tokens: list[int]) -> list[int]:
        raise NotImplementedError("speculative decoding")

    def rollback(self, num_tokens: int) -> None:
        raise NotImplementedError("speculative decoding")

    def reset(self) -> None:
        raise NotImplementedError


class Backend:
    """What vLLM's `GuidanceBackend` does, whose methods these become: other modules have the class
    itself by the time that plugins are loaded."""

    vllm_config: Any
    vocab_size: int

    def __post_init__(self) -> None:
        self._template: Template | None = None
        self._starting = threading.Lock()

    def compile_grammar(
        self, request_type: object, grammar_spec: str, stop_token_ids: object = None
    ) -> Grammar:
        """Called by a thread for it. Whatever it raises fails the request alone."""
        with self._starting:
            if self._template is None or not self._template.is_alive:
                name = self.vllm_config.model_config.tokenizer
                self._template = Template(name, self.vocab_size)
        return Grammar(self._template, grammar_spec)

    def allocate_token_bitmask(self, max_num_seqs: int) -> Tensor:
        return torch.full((max_num_seqs, -(-self.vocab_size // 32)), -1, dtype=torch.int32)


def end_with_request(free_request: Callable[..., Any]) -> Callable[..., Any]:
    """The scheduler's function for a request that has ended, and the end of its grammar's process:
    vLLM itself only forgets the grammar, at some later time."""

    def free(self: Any, request: Any, *args: Any, **more: Any) -> Any:
        if (asked := request.structured_output_request) is not None:
            close(asked._grammar)
        return free_request(self, request, *args, **more)

    def close(grammar: object) -> None:
        if isinstance(grammar, Grammar):
            grammar.close()
        elif isinstance(grammar, Future) and not grammar.cancel():  # it is being compiled
            grammar.add_done_callback(compiled)

    def compiled(grammar: Future[object]) -> None:
        if grammar.exception() is None:
            close(grammar.result())

    return free


@dataclass
class Kept:
    """Of a batch before its masks are applied."""

    rows: Tensor  # [constrained] in the batch
    logits: Tensor  # [constrained, vocab]


class OwnLogprobs:
    """The two functions that masks are applied and tokens sampled by, made ours."""

    def __init__(self) -> None:
        self._apply = utils.apply_grammar_bitmask
        self._forward = sampler.Sampler.forward
        self._kept: Kept | None = None

    def apply_grammar_bitmask(
        self, scheduler_output: Any, grammar_output: Any, input_batch: Any, logits: Tensor
    ) -> None:
        constrained = set(grammar_output.structured_output_request_ids)
        indices = [i for i, id in enumerate(input_batch.req_ids) if id in constrained]
        rows = torch.tensor(indices, device=logits.device)
        self._kept = Kept(rows, logits[rows].float())
        self._apply(scheduler_output, grammar_output, input_batch, logits)

    def forward(
        self, sampler: Any, logits: Tensor, sampling_metadata: Any, *args: Any, **more: Any
    ) -> Any:
        kept, self._kept = self._kept, None
        output = self._forward(sampler, logits, sampling_metadata, *args, **more)
        if kept is not None and output.logprobs_tensors is not None:
            own = kept.logits
            if sampling_metadata.temperature is not None:  # of a batch that is not all greedy
                scale = sampling_metadata.temperature[kept.rows]
                own = own / torch.where(scale < MIN_TEMPERATURE, 1.0, scale)[:, None]
            sampled = output.sampled_token_ids[kept.rows].long()
            values = own.log_softmax(-1).gather(1, sampled)
            output.logprobs_tensors.logprobs[kept.rows, 0] = values[:, 0]
        return output


def register() -> None:
    if backend_guidance.GuidanceBackend.compile_grammar is Backend.compile_grammar:
        return
    for name in ("__post_init__", "compile_grammar", "allocate_token_bitmask"):
        setattr(backend_guidance.GuidanceBackend, name, getattr(Backend, name))
    backend_guidance.validate_guidance_grammar = lambda *args, **more: None
    scheduler.Scheduler._free_request = end_with_request(scheduler.Scheduler._free_request)
    own = OwnLogprobs()
    sampler.Sampler.forward = lambda *args, **more: own.forward(*args, **more)
    utils.apply_grammar_bitmask = own.apply_grammar_bitmask
    if (runner := sys.modules.get("vllm.v1.worker.gpu_model_runner")) is not None:
        runner.apply_grammar_bitmask = own.apply_grammar_bitmask  # type: ignore[attr-defined]
