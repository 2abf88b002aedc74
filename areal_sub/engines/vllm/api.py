"""HTTP to one vLLM server, over TCP or a Unix socket, with typed errors and a deadline per call."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import aiohttp
import orjson

from areal_sub.errors import ArealSubError, DeadlineExceeded

MAX_ERROR_CHARS = 500
CONNECT_TIMEOUT_S = 10.0
LOCAL = "127.0.0.1"


class ServerGone(ArealSubError):
    """The server cannot be reached, or went away in mid-answer, or its engine has died."""


class Refused(ArealSubError):
    """The server answered, and it was not the answer: `status`, and what it said."""

    def __init__(self, where: str, status: int, said: str) -> None:
        super().__init__(f"{where} answered {status}: {said}")
        self.status = status
        self.said = said


class Api:
    """One server. `name` is how errors call it; `kind` what it is, as far as is known."""

    def __init__(self, name: str, session: aiohttp.ClientSession, base: str) -> None:
        self.name = name
        self.kind = "vLLM"
        self._session = session
        self._base = base.rstrip("/")

    @classmethod
    def at_url(cls, url: str) -> Self:
        # No limit: how many requests run at once is the engine's to decide.
        return cls(url, _session(aiohttp.TCPConnector(limit=0)), url)

    @classmethod
    def at_socket(cls, name: str, path: Path) -> Self:
        return cls(name, _session(aiohttp.UnixConnector(str(path), limit=0)), f"http://{LOCAL}")

    @property
    def host(self) -> str:
        """Where it runs: a name or an address."""
        return urlsplit(self._base).hostname or LOCAL

    def __str__(self) -> str:
        return f"{self.kind} at {self.name}"

    async def close(self) -> None:
        await self._session.close()

    async def get(self, path: str, *, timeout_s: float) -> Any:
        return await self._call("GET", path, None, timeout_s)

    async def post(self, path: str, body: Any = None, *, timeout_s: float) -> Any:
        """The answer's JSON. Raises `Refused`, `ServerGone`, `DeadlineExceeded`."""
        return await self._call("POST", path, body, timeout_s)

    async def _call(self, method: str, path: str, body: Any, timeout_s: float) -> Any:
        try:
            async with asyncio.timeout(timeout_s), self._request(method, path, body) as answer:
                raw = await answer.read()
        except TimeoutError:
            raise DeadlineExceeded(
                f"{self} did not answer {path} within {timeout_s:.0f} s"
            ) from None
        except (aiohttp.ClientError, OSError) as error:
            raise self._gone(path, error) from None
        return _json(raw)

    async def ask(self, path: str, body: Any) -> Any:
        """Like `post`, for as long as it takes: the deadline is the caller's."""
        try:
            async with self._request("POST", path, body) as answer:
                return _json(await answer.read())
        except (aiohttp.ClientError, OSError) as error:
            raise self._gone(path, error) from None

    async def stream(self, path: str, body: Any) -> AsyncIterator[Any]:
        """The JSON of each server-sent event; the deadline is the caller's.

        Raises `ServerGone` also where the stream ends without having said that it is at its end.
        """
        rest = b""
        try:
            async with self._request("POST", path, body) as answer:
                async for block in answer.content.iter_any():
                    *events, rest = (rest + block).split(b"\n\n")
                    for event in events:
                        data = event.removeprefix(b"data:").strip()
                        if data == b"[DONE]":
                            return
                        yield orjson.loads(data)
        except (aiohttp.ClientError, OSError) as error:
            raise self._gone(path, error) from None
        except orjson.JSONDecodeError as error:
            raise ServerGone(f"{self}: {path} streams no JSON: {error}") from None
        raise ServerGone(f"{self} ended the stream of {path} in the middle")

    @asynccontextmanager
    async def _request(
        self, method: str, path: str, body: Any
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        data = None if body is None else orjson.dumps(body)
        headers = {} if body is None else {"Content-Type": "application/json"}
        async with self._session.request(
            method, self._base + path, data=data, headers=headers
        ) as answer:
            if answer.status != 200:
                said = _said(await answer.read())
                raise Refused(f"{self}: {path}", answer.status, said)
            yield answer

    def _gone(self, path: str, error: Exception) -> ServerGone:
        return ServerGone(f"{self} is gone ({path}: {error or type(error).__name__})")


def _session(connector: aiohttp.BaseConnector) -> aiohttp.ClientSession:
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S)
    # trust_env stays off: a proxy for the outside world has no business here.
    return aiohttp.ClientSession(connector=connector, timeout=timeout)


def _json(raw: bytes) -> Any:
    try:
        return orjson.loads(raw) if raw else None
    except orjson.JSONDecodeError:
        return None


def _said(raw: bytes) -> str:
    data = _json(raw)
    if isinstance(data, dict):
        error = data.get("error", data.get("detail", data))
        data = error.get("message", error) if isinstance(error, dict) else error
    text = str(data) if data is not None else raw.decode(errors="replace")
    return text[:MAX_ERROR_CHARS]
