"""The processes that match grammars: one template, and a fork of it per constrained request.

`python -m areal_sub.engines.embedded.matching FD TOKENIZER_JSON VOCAB_SIZE`, started by `grammars`,
which is the other side of both protocols; by its path within vLLM, where our other modules are not
to be had (`engines/vllm/plugin`). No torch here: a fork is small and takes milliseconds.

Why llguidance: it needs nothing but itself (xgrammar needs torch, transformers, triton and an FFI
package), speaks context-free grammars with JSON schemas and token ids in them (outlines-core knows
regular expressions only: no recursion), builds its automaton lazily (a mask over 50k tokens takes
about 50 µs), refuses what it does not implement by name, and counts fuel for most of what it does.

Why processes: a schema is an untrusted agent's, and the counting has gaps. Measured: 2,000 `$ref`s
in a row overflow the native stack and kill the process; 20 intersected regular expressions compile
for minutes; one long constant takes seconds per mask. None of it can be interrupted from Python. So
each request's matcher has a process with limits on CPU time, memory and stack, and whatever its
grammar does ends that request alone.

    engine → template   b"+" number, with a socket      fork one for it
                        b"-" number                     kill it, and forget it
    template → engine   READY | why not, once
    engine → fork       a JSON map {grammar, stops, taken, cpu_s}, as a frame; then u32 per token
    fork → engine       per grammar and per token one frame: "M" and a bit per token of the
                        vocabulary (little-endian): what may come next; or "E" and a text
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import socket
import struct
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import llguidance

FRAME = struct.Struct("<cI")  # kind, length of what follows
TOKEN = struct.Struct("<I")
NUMBER = struct.Struct("<Q")
ASKED, MASK, FAILED = b"G", b"M", b"E"
READY = b"ready"

COMPILE_CPU_S = 3.0
# What masks take beyond this each, on the average, comes out of the `cpu_s` that was asked for.
CPU_S_PER_TOKEN = 0.005
# On top of what the template has mapped. Large honest schemas take up to 40 MiB.
MATCHER_BYTES = 256 * 2**20
_PR_SET_PDEATHSIG = 1

# Fuel per mask: some 10 ms, where honest grammars take well under 1 ms.
_LIMITS = llguidance.LLParserLimits(
    step_lexer_fuel=100_000,
    step_max_items=50_000,
    max_items_in_row=20_000,  # an optional property takes four
    max_lexer_states=100_000,
    verbose_errors=False,
)

# Else, where only one text can follow, the library wants the tokens that its tokenizer makes of it:
# those of "</tool_call>" within a string would be the control token.
_OPTIONS = '%llguidance {"no_forcing": true}\n'


def load_tokenizer(path: Path) -> llguidance.LLTokenizer:
    """Control tokens (as in the proxy's `Vocabulary`: special, or at least not white space) are
    special here: only their ids in a grammar match them, no text does. Ids without a token match
    nothing. Raises `ValueError` where the library cannot tell the bytes of tokens."""
    data = json.loads(path.read_text("utf-8"))
    for token in data.get("added_tokens") or []:
        token["special"] = token["special"] or bool(token["content"].strip())
    return llguidance.LLTokenizer(json.dumps(data))


class Matcher:
    """One grammar and what it has consumed. Everything raises `ValueError` saying what is wrong."""

    def __init__(
        self, tokenizer: llguidance.LLTokenizer, vocab_size: int, grammar: str, stops: list[int]
    ) -> None:
        self._matcher = llguidance.LLMatcher(
            tokenizer, _OPTIONS + grammar, log_level=0, limits=_LIMITS
        )
        self._check()
        self._num_bytes = -(-vocab_size // 32) * 4
        self._stops = [token_id for token_id in stops if 0 <= token_id < vocab_size]
        # The library has ends of its own (by their names); the request's are those that count.
        self._not_stops = [i for i in tokenizer.eos_tokens if i not in stops and i < vocab_size]

    def consume(self, token_id: int) -> None:
        self._matcher.consume_token(token_id)
        self._check()

    def mask(self) -> bytes:
        """Of the next token: a bit per id, in whole 32-bit words. Never without any bit."""
        is_accepting = self._matcher.is_accepting()
        if self._matcher.is_stopped():
            mask = bytearray(self._num_bytes)
        else:
            given = self._matcher.compute_bitmask()
            mask = bytearray(given[: self._num_bytes].ljust(self._num_bytes, b"\0"))
        self._check()
        for token_id in self._not_stops:
            mask[token_id >> 3] &= ~(1 << (token_id & 7))
        if is_accepting:
            for token_id in self._stops:
                mask[token_id >> 3] |= 1 << (token_id & 7)
        if not any(mask):
            raise ValueError("no token of the model's can follow")
        return bytes(mask)

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ValueError(self._matcher.get_error())


def serve_request(
    connection: socket.socket, tokenizer: llguidance.LLTokenizer, vocab_size: int
) -> None:
    """In the fork: until the engine closes `connection`, or a limit ends the process."""
    reader = connection.makefile("rb")
    _, length = FRAME.unpack(reader.read(FRAME.size))
    asked: dict[str, Any] = json.loads(reader.read(length))
    limit_memory()
    try:
        limit_cpu(COMPILE_CPU_S)
        matcher = Matcher(tokenizer, vocab_size, asked["grammar"], asked["stops"])
        for token_id in asked["taken"]:
            matcher.consume(token_id)
        _send(connection, MASK, matcher.mask())
        left_s, used_s = asked["cpu_s"], time.process_time()
        limit_cpu(left_s)
        while token := reader.read(TOKEN.size):
            matcher.consume(*TOKEN.unpack(token))
            _send(connection, MASK, matcher.mask())
            before_s, used_s = used_s, time.process_time()
            left_s = min(asked["cpu_s"], left_s - (used_s - before_s) + CPU_S_PER_TOKEN)
            limit_cpu(left_s)
    except ValueError as error:
        _send(connection, FAILED, str(error).encode())


def limit_memory() -> None:
    num_pages = int(Path("/proc/self/statm").read_text().split()[0])
    num_bytes = num_pages * resource.getpagesize() + MATCHER_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (num_bytes, num_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def limit_cpu(seconds: float) -> None:
    """From now on; beyond it the kernel ends the process."""
    signal.setitimer(signal.ITIMER_PROF, max(seconds, 1e-6))  # 0 would be no limit


def _send(connection: socket.socket, kind: bytes, body: bytes) -> None:
    connection.sendall(FRAME.pack(kind, len(body)) + body)


def serve_template(
    control: socket.socket, tokenizer: llguidance.LLTokenizer, vocab_size: int
) -> None:
    """Until the engine closes `control`; then nothing is left of any fork."""
    forks: dict[int, int] = {}  # number → pid, until it is waited for: so no pid is another's
    while True:
        message, fds, _, _ = socket.recv_fds(control, 1 + NUMBER.size, 1)
        if not message:
            break
        (number,) = NUMBER.unpack(message[1:])
        if message[:1] == b"+":
            (fd,) = fds
            try:
                pid = os.fork()
            except OSError:  # no process to be had: the engine sees its socket close
                pid = -1
            if pid == 0:
                control.close()
                _run_fork(socket.socket(fileno=fd), tokenizer, vocab_size)
            os.close(fd)
            if pid > 0:
                forks[number] = pid
        elif number in forks:
            _end(forks.pop(number))
    for pid in forks.values():
        _end(pid)


def _end(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def _run_fork(
    connection: socket.socket, tokenizer: llguidance.LLTokenizer, vocab_size: int
) -> NoReturn:
    try:
        die_with_parent()
        signal.signal(signal.SIGPROF, signal.SIG_DFL)  # `limit_cpu`'s: ignoring it is inherited
        serve_request(connection, tokenizer, vocab_size)
    except MemoryError:
        _send(connection, FAILED, b"it takes more memory than it may")
    except OSError:  # the engine has gone on without it
        pass
    finally:
        os._exit(0)


def die_with_parent() -> None:
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main(fd: str, tokenizer_path: str, vocab_size: str) -> None:
    control = socket.socket(fileno=int(fd))
    try:
        tokenizer = load_tokenizer(Path(tokenizer_path))
    except BaseException as error:  # the library's panics are no Exceptions
        control.send(f"{type(error).__name__}: {error}".encode()[:4096])
        return
    control.send(READY)
    serve_template(control, tokenizer, int(vocab_size))


if __name__ == "__main__":
    main(*sys.argv[1:])
