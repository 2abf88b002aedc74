"""Output grammars, as the engine sees them: text in, one mask of allowed tokens per step out.

Grammars are matched in processes of their own (`matching`, which says why); this is their other
side. `Grammars` lives on the asyncio thread: it starts the template with the first grammar, has
each one compiled beside the decode thread, under a deadline, and ends processes. A `Constraint` is
one request's: the decode thread asks it for a mask while the model computes, and never waits long.

Invariants: a process lives as long as its `Constraint` is open, and `Grammars.close` ends them all;
at most `max_open` are open at once, others wait; a grammar that could not be compiled is not tried
again. Whatever a process does, die included, is an error of its request alone.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import re
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray
from transformers.utils import cached_file

from areal_sub.engines.embedded.matching import ASKED, FAILED, FRAME, MASK, NUMBER, READY, TOKEN
from areal_sub.errors import GrammarError

log = logging.getLogger(__name__)

START_TIMEOUT_S = 60.0
COMPILE_TIMEOUT_S = 20.0  # on a busy machine; the process itself has `COMPILE_CPU_S`
MAX_COMPILING = 2
# A request whose mask takes longer is given up. The others do not wait for it: see `Decoder`.
STEP_TIMEOUT_S = 10.0
CPU_S = 3.0  # that a request's masks may take beyond a bit for each: see `CPU_S_PER_TOKEN`
MAX_REFUSED = 256
MAX_FAULT_CHARS = 400
READ_BYTES = 2**18
CANNOT = "this model's output cannot be constrained: "
TOO_MUCH = "it takes more CPU time, memory or stack than it may"

BoolArray = NDArray[np.bool_]


class Constraint:
    """One request's grammar. `mask` and `error` change in `advance` and `receive` only, on the
    decode thread; exactly one of the two is set where the process has answered."""

    def __init__(
        self, connection: socket.socket, vocab_size: int, on_close: Callable[[], object]
    ) -> None:
        """`on_close` is called once, on the thread that closes."""
        self.mask: BoolArray | None = None  # [vocab] the tokens that may come next
        self.error = ""  # not "": nothing can come any more
        self.connection = connection
        self._vocab_size = vocab_size
        self._on_close = on_close
        self._is_open = True
        self._received = bytearray()
        self._asked_at = time.monotonic()

    def fileno(self) -> int:
        return self.connection.fileno()

    @property
    def is_waiting(self) -> bool:
        return self.mask is None and not self.error

    def advance(self, token_id: int) -> None:
        """`token_id` was sampled: ask for what may follow it."""
        self.mask = None
        self._asked_at = time.monotonic()
        try:
            self.connection.send(TOKEN.pack(token_id))
        except OSError:
            self._has_ended()

    def receive(self) -> None:
        """Take what has arrived; does not block."""
        try:
            data = self.connection.recv(READ_BYTES)
        except BlockingIOError:
            if time.monotonic() - self._asked_at > STEP_TIMEOUT_S:
                self.error = f"it took over {STEP_TIMEOUT_S} s for one token"
            return
        except OSError:
            data = b""
        if not data:
            self._has_ended()
        else:
            self.take(data)

    def take(self, data: bytes) -> None:
        self._received += data
        if len(self._received) < FRAME.size:
            return
        kind, length = FRAME.unpack_from(self._received)
        if len(self._received) < FRAME.size + length:
            return
        body = bytes(self._received[FRAME.size :])
        self._received.clear()
        if kind == MASK:
            bits = np.frombuffer(body, dtype=np.uint8)
            unpacked = np.unpackbits(bits, count=self._vocab_size, bitorder="little")
            self.mask = unpacked.view(np.bool_)
        else:
            assert kind == FAILED
            self.error = fault(body.decode())

    def close(self) -> None:
        """Ends the process. Nothing else may be called any more."""
        if self._is_open:
            self._is_open = False
            self._on_close()

    def _has_ended(self) -> None:
        self.error = TOO_MUCH


def receive_all(constraints: Collection[Constraint], timeout_s: float) -> None:
    """Wait until all have answered, but at most `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while waiting := [c for c in constraints if c.is_waiting]:
        poll = select.poll()
        for constraint in waiting:
            poll.register(constraint, select.POLLIN)
        left = deadline - time.monotonic()
        poll.poll(max(0.0, left) * 1000)
        for constraint in waiting:
            constraint.receive()
        if left <= 0:
            return


class Grammars:
    def __init__(self, model_path: str, *, vocab_size: int, max_open: int) -> None:
        """`model_path`: where the tokenizer is, a folder or a hub name."""
        self._model_path = model_path
        self._vocab_size = vocab_size
        self._loop = asyncio.get_running_loop()
        self._open = asyncio.Semaphore(max_open)
        self._compiling = asyncio.Semaphore(MAX_COMPILING)
        self._starting = asyncio.Lock()
        self._numbers = itertools.count()
        self._refused: dict[str, str] = {}  # grammar → why it cannot be compiled; oldest first
        self._template: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self.num_open = 0

    async def compile(self, grammar: str, *, stop_token_ids: Iterable[int]) -> Constraint:
        """With the mask of the first token. Raises `GrammarError`."""
        order = order_of(grammar, stop_token_ids=stop_token_ids, cpu_s=CPU_S).encode()
        await self._open.acquire()
        constraint: Constraint | None = None
        try:
            async with self._compiling:
                if (refused := self._refused.get(grammar)) is not None:
                    raise GrammarError(refused)
                constraint = self._fork(await self._ready())
                error = await self._first_mask(constraint, order)
                if error and not self._is_ready():
                    raise GrammarError(CANNOT + "the process that matches grammars ended")
                if error:
                    self._refuse(grammar, error)
                    raise GrammarError(error)
        except BaseException:
            if constraint is None:
                self._open.release()
            else:
                constraint.close()
            raise
        return constraint

    def close(self) -> None:
        """Ends all processes."""
        if self._control is not None:
            self._control.close()
        if self._template is not None:
            self._template.kill()
            self._template.wait()

    def _fork(self, control: socket.socket) -> Constraint:
        here, there = socket.socketpair()
        number = NUMBER.pack(next(self._numbers))
        here.setblocking(False)

        def end() -> None:
            here.close()
            self.num_open -= 1
            self._open.release()
            with suppress(OSError):  # the template is gone, and with it the process
                control.send(b"-" + number)

        with there:
            socket.send_fds(control, [b"+" + number], [there.fileno()])
        self.num_open += 1
        return Constraint(here, self._vocab_size, lambda: self._loop.call_soon_threadsafe(end))

    async def _first_mask(self, constraint: Constraint, order: bytes) -> str:
        """Why there is none, or "". Raises `GrammarError` where asking again may bring one."""
        connection = constraint.connection
        try:
            async with asyncio.timeout(COMPILE_TIMEOUT_S):
                await self._loop.sock_sendall(connection, FRAME.pack(ASKED, len(order)) + order)
                while constraint.is_waiting:
                    data = await self._loop.sock_recv(connection, READ_BYTES)
                    if not data:
                        return TOO_MUCH
                    constraint.take(data)
        except TimeoutError:
            raise GrammarError(f"it did not compile within {COMPILE_TIMEOUT_S:.0f} s") from None
        except ConnectionError:
            return TOO_MUCH
        return constraint.error

    def _refuse(self, grammar: str, reason: str) -> None:
        self._refused[grammar] = reason
        if len(self._refused) > MAX_REFUSED:
            del self._refused[next(iter(self._refused))]

    async def _ready(self) -> socket.socket:
        """The socket of a template that runs. Raises `GrammarError` where there can be none."""
        async with self._starting:
            if not self._is_ready():
                self.close()
                self._control = await self._start()
        assert self._control is not None
        return self._control

    def _is_ready(self) -> bool:
        """Whether the template runs. It closes its socket before its forks end with it."""
        try:
            return self._control is not None and self._control.recv(1, socket.MSG_PEEK) != b""
        except BlockingIOError:
            return True
        except OSError:
            return False

    async def _start(self) -> socket.socket:
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        here.setblocking(False)
        try:
            with there:
                self._template = await asyncio.to_thread(self._spawn, there.fileno())
            async with asyncio.timeout(START_TIMEOUT_S):
                answer = await self._loop.sock_recv(here, READ_BYTES)
            if answer != READY:
                ended = b"the process that matches grammars ended; see the engine's log"
                raise GrammarError(CANNOT + (answer or ended).decode())
        except BaseException as error:
            here.close()
            if isinstance(error, TimeoutError):
                late = f"its tokenizer did not load within {START_TIMEOUT_S:.0f} s"
                raise GrammarError(CANNOT + late) from None
            raise
        return here

    def _spawn(self, fd: int) -> subprocess.Popen[bytes]:
        try:
            path = cached_file(self._model_path, "tokenizer.json")
        except OSError as error:
            raise GrammarError(CANNOT + str(error)) from None
        module = "areal_sub.engines.embedded.matching"
        return subprocess.Popen(
            [sys.executable, "-m", module, str(fd), str(path), str(self._vocab_size)],
            pass_fds=[fd],
            stdin=subprocess.DEVNULL,
        )


def order_of(
    grammar: str, *, stop_token_ids: Iterable[int], cpu_s: float, taken: Sequence[int] = ()
) -> str:
    """What a process that matches is asked for. `taken`: sampled already, held to the grammar."""
    stops = sorted(stop_token_ids)
    return json.dumps({"grammar": grammar, "stops": stops, "taken": [*taken], "cpu_s": cpu_s})


def fault(text: str) -> str:
    """What the library says of a grammar, without where in our text it found it."""
    match = re.match(
        r"(?:at \d+\(\d+\): )?(?:failed to compile JSON schema: )?(.*?)(?:\n +\d+ \| |\Z)",
        text.removesuffix("<non-verbose/>"),
        re.DOTALL,
    )
    assert match is not None
    words = " ".join(match[1].split())
    return words if len(words) <= MAX_FAULT_CHARS else words[:MAX_FAULT_CHARS] + "…"
