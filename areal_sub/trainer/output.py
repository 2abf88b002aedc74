"""The stream that a run's view is written to, which may go away while the run goes on.

A terminal is only a view: where it cannot be written to (the reader of a pipe is gone, a disk is
full, a connection has hung up), that is said once on stderr, and from then on there is no view.
Called by `terminal`, also from the thread in which rich refreshes what is live.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import IO


class Output:
    """Passes on to `stream` all that is written (None: to nobody), and never raises.

    `elsewhere`: the file by which the run can be followed, too; "": none is known yet.
    """

    def __init__(self, stream: IO[str] | None) -> None:
        self._stream = stream
        self._stderr = sys.stderr  # while rich shows something live, another stands there
        self.elsewhere = ""

    @property
    def encoding(self) -> str:
        return getattr(self._stream, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        return self._stream is not None and self._stream.isatty()

    def write(self, text: str) -> int:
        if self._stream is not None:
            try:
                self._stream.write(text)
            except UnicodeEncodeError:
                encoding = self.encoding
                self.write(text.encode(encoding, "replace").decode(encoding))
            except (OSError, ValueError) as error:  # ValueError: somebody has closed it
                self._give_up(self._stream, error)
        return len(text)

    def flush(self) -> None:
        if self._stream is not None:
            try:
                self._stream.flush()
            except (OSError, ValueError) as error:
                self._give_up(self._stream, error)

    def _give_up(self, stream: IO[str], error: OSError | ValueError) -> None:
        self._stream = None
        _silence(stream)
        reason = (isinstance(error, OSError) and error.strerror) or error
        metrics = f"; metrics are in {self.elsewhere}" if self.elsewhere else ""
        if self._stderr is not None:
            try:
                print(
                    f"areal-sub: the terminal cannot be written to ({reason}): "
                    f"the run goes on{metrics}",
                    file=self._stderr,
                    flush=True,
                )
            except (OSError, ValueError):
                _silence(self._stderr)


def _silence(stream: IO[str]) -> None:
    """Its file becomes /dev/null, so that nobody else fails who prints: an agent in this process,
    or the interpreter, which writes out at its end what is left in the stream."""
    with suppress(OSError, ValueError):
        number = stream.fileno()
        nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        os.dup2(nowhere, number)
        os.close(nowhere)
