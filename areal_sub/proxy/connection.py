"""uvicorn's HTTP parser with bounds on what a connection may send before it is a request.

uvicorn reads heads of any size at any speed. Here a head may have `MAX_HEAD_BYTES` and must be
complete `HEAD_TIMEOUT_S` after its connection was opened or its first byte came.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 64 * 2**10
HEAD_TIMEOUT_S = 30.0


class BoundedHttpProtocol(HttpToolsProtocol):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._num_head_bytes = 0
        self._is_in_head = False
        self._head_timeout: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_arrived()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        was_in_head = self._is_in_head
        super().data_received(data)
        if not self._is_in_head:
            self._num_head_bytes = 0
            return
        # One read (256 KB at most) may hold more than a head, so a head within one read passes.
        self._num_head_bytes = self._num_head_bytes + len(data) if was_in_head else len(data)
        if self._num_head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response("Request head too large.")

    def on_message_begin(self) -> None:
        self._is_in_head = True
        if self._head_timeout is None:
            self._expect_head()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._head_arrived()
        super().on_headers_complete()

    def _unsupported_upgrade_warning(self) -> None:
        """Not worth a line: agents try, are answered 426, and go on without."""

    def _expect_head(self) -> None:
        self._head_timeout = self.loop.call_later(HEAD_TIMEOUT_S, self._give_up)

    def _head_arrived(self) -> None:
        self._is_in_head = False
        if self._head_timeout is not None:
            self._head_timeout.cancel()
            self._head_timeout = None

    def _give_up(self) -> None:
        self._head_timeout = None
        self.transport.close()
