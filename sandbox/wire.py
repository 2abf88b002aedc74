"""The two messages that leave a child, and what is made of them. Both are hostile.

The *result* is written by the process that ran the agent's code: one JSON object, either
`{"ok": value}`, `{"error": ..., "traceback": ...}` or `{"invalid": what}`. The *status* is written
by the child's init. Nothing is ever unpickled; sizes are bounded by whoever reads; texts are
cleaned of what a terminal or a log would obey.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import unicodedata
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from .cgroups import MAX_FOLDERS
from .errors import ResultError

MAX_TEXT_CHARS = 16 * 1024
"""Longer errors and tracebacks keep their beginning and their end."""
MAX_LINE_CHARS = 1000
MAX_DEPTH = 16
MAX_STATUS_BYTES = 64 * 1024
MAX_READY_BYTES = 2**20
MAX_ORDER_BYTES = 4096
CHILD_READY = b"ready"
"""Comes before the status, with the descriptors of the child's listeners, in the plan's order."""
MAX_LISTENERS = 2
MAX_REFUSED = 64
"""Hosts and ports that are counted by name of one child; more are counted as `OTHERS`."""
OTHERS = "others"


@dataclass(frozen=True)
class Descriptors:
    """What comes with an order for a child, in this order."""

    control: int
    """Seqpacket socket: its end-of-file ends the child; `CHILD_READY` and the status go out."""
    request: int
    """Seqpacket socket: the request comes through it, see `child`."""
    stdout: int
    stderr: int
    result: int
    group: tuple[int, ...] = ()
    """What leads into the child's group, see `cgroups`; none where it has none."""

    @classmethod
    def of(cls, received: Sequence[int]) -> Descriptors:
        control, request, stdout, stderr, result, *group = received
        return cls(control, request, stdout, stderr, result, tuple(group))


MAX_DESCRIPTORS = 5 + MAX_FOLDERS


@dataclass(frozen=True)
class Result:
    """A valid result message: `error` is None where the agent returned `value`."""

    value: Any = None
    error: str | None = None
    traceback: str = ""


@dataclass(frozen=True)
class Status:
    """How the agent's process ended, and what it and its descendants used."""

    exit_code: int | None = None
    signal: int | None = None
    cpu_s: float = 0.0
    max_rss_bytes: int = 0
    num_killed: int = 0
    written_bytes: int = 0
    limit: str = ""
    """ "memory", "cpu" or "sockets": what all its processes together used too much of."""
    failed_step: str = ""
    """The step of the plan (or "fork", "folder") that failed, so that nothing was run."""
    error: str = ""


@dataclass(frozen=True)
class Exit:
    """How an agent's process ended, as its zygote tells the init of its cell."""

    exit_code: int | None = None
    signal: int | None = None
    cpu_s: float = 0.0
    max_rss_bytes: int = 0
    error: str = ""


def encode_exit(end: Exit) -> bytes:
    return json.dumps(vars(end)).encode()


def decode_exit(raw: bytes) -> Exit:
    """Whatever the zygote sent; an `Exit` with an error where that is not one."""
    values = _checked_fields(raw, Exit.__dataclass_fields__)
    if values is None:
        return Exit(error="the zygote did not tell how the child ended")
    return Exit(**values)


def encode_value(value: Any) -> bytes:
    """In the child: the result message for what the agent returned."""
    try:
        message = {"ok": _plain(value, 0)}
    except (TypeError, ValueError, RecursionError) as error:
        message = {"invalid": shorten(str(error), MAX_LINE_CHARS)}
    return json.dumps(message).encode()


def encode_error(error: BaseException, traceback: str) -> bytes:
    """In the child: the result message for what the agent raised."""
    name = type(error).__name__
    try:
        line = f"{name}: {error}"
    except Exception:  # its __str__ is the agent's code, too
        line = f"{name} (its message cannot be shown)"
    message = {
        "error": shorten(line, MAX_LINE_CHARS),
        "traceback": shorten(traceback, MAX_TEXT_CHARS),
    }
    return json.dumps(message).encode()


def decode_result(raw: bytes) -> Result:
    """A whole, size-checked result message. Raises `ResultError` saying what is wrong with it."""
    try:
        message = json.loads(
            raw.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant
        )
    except RecursionError:
        raise ResultError("the result is nested too deeply") from None
    except ValueError as error:  # bad UTF-8, bad JSON, a number of a million digits
        raise ResultError(
            f"the result is malformed: {clean(str(error))[:MAX_LINE_CHARS]}"
        ) from None
    if not isinstance(message, dict):
        raise ResultError("the result message is not an object")
    if message.keys() == {"ok"}:
        return Result(value=_checked(message["ok"], 0))
    if message.keys() == {"invalid"}:
        raise ResultError(f"the agent returned {one_line(message['invalid'])}")
    if message.keys() == {"error", "traceback"}:
        return Result(error=one_line(message["error"]), traceback=text(message["traceback"]))
    raise ResultError("the result message is neither a value nor an error")


def encode_status(status: Status) -> bytes:
    return json.dumps(vars(status)).encode()


def decode_status(raw: bytes) -> Status | None:
    """None where `raw` is not a status message."""
    values = _checked_fields(raw, Status.__dataclass_fields__)
    return None if values is None else Status(**values)


def decode_refused(raw: bytes) -> dict[str, int] | None:
    """How often a child was refused what, as its egress proxy tells; None where it does not."""
    try:
        message = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    if not isinstance(message, dict) or len(message) > MAX_REFUSED + 1:
        return None
    counts = {one_line(name): count for name, count in message.items()}
    return counts if all(type(count) is int for count in counts.values()) else None


_FIELDS: dict[str, tuple[type, ...]] = {
    "exit_code": (int, type(None)),
    "signal": (int, type(None)),
    "cpu_s": (float, int),
    "max_rss_bytes": (int,),
    "num_killed": (int,),
    "written_bytes": (int,),
    "limit": (str,),
    "failed_step": (str,),
    "error": (str,),
}


def _checked_fields(raw: bytes, names: Collection[str]) -> dict[str, Any] | None:
    """The JSON object in `raw` if it has exactly these fields, each of its kind; texts cleaned."""
    try:
        message = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    if not isinstance(message, dict) or message.keys() != set(names):
        return None
    for key, value in message.items():
        if not isinstance(value, _FIELDS[key]) or isinstance(value, bool):
            return None
        if isinstance(value, (float, int)) and not 0 <= value < 2**63:
            return None
        if isinstance(value, str):
            message[key] = one_line(value) if key == "failed_step" else text(value)
    return message


def write_all(fd: int, content: bytes) -> None:
    """However many writes it takes. Raises `OSError`."""
    view = memoryview(content)
    while view:
        view = view[os.write(fd, view) :]


def clean(string: str) -> str:
    """`string` with everything that a terminal, a log or an encoder would stumble over escaped.

    Keeps newlines and tabs. Escapes other control characters (so ANSI sequences), invisible and
    direction-changing format characters, line and paragraph separators, and lone surrogates.
    """
    if string.isascii() and string.isprintable():
        return string
    return "".join(
        char if char in "\n\t" or unicodedata.category(char) not in _ESCAPED else _escape(char)
        for char in string
    )


_ESCAPED = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})


def _escape(char: str) -> str:
    code = ord(char)
    return (
        f"\\x{code:02x}"
        if code < 0x100
        else f"\\u{code:04x}"
        if code < 0x10000
        else f"\\U{code:08x}"
    )


def text(value: object) -> str:
    """A text of the child's, bounded and cleaned; "" where it is none."""
    return (
        shorten(clean(shorten(value, MAX_TEXT_CHARS)), MAX_TEXT_CHARS)
        if isinstance(value, str)
        else ""
    )


def one_line(value: object) -> str:
    return text(value).replace("\n", "\\n")[:MAX_LINE_CHARS]


def shorten(string: str, max_chars: int) -> str:
    """Beginning and end of `string`, where it is longer than `max_chars` (at least 100)."""
    if len(string) <= max_chars:
        return string
    half = (max_chars - 50) // 2
    return f"{string[:half]}\n[... {len(string) - 2 * half} characters ...]\n{string[-half:]}"


def _plain(value: Any, depth: int) -> Any:
    """`value` in JSON types; numbers of numpy, torch and the like through `__float__`."""
    if depth > MAX_DEPTH:
        raise ValueError(f"a value nested more than {MAX_DEPTH} deep")
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"a dict with the key {_shown(key)}, which is not a string")
        return {str(key): _plain(entry, depth + 1) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry, depth + 1) for entry in value]
    if hasattr(type(value), "__float__"):
        with contextlib.suppress(TypeError, ValueError):  # an array of several numbers
            return float(value)
    raise TypeError(f"an object of type {type(value).__name__}: {_shown(value)}")


def _shown(value: Any) -> str:
    try:
        return shorten(repr(value), 200)
    except Exception:
        return f"<{type(value).__name__}>"


def _checked(value: Any, depth: int) -> Any:
    """`value`, if it is of bounded depth and made of what every encoder can carry."""
    if depth > MAX_DEPTH:
        raise ResultError(f"the result is nested more than {MAX_DEPTH} deep")
    if isinstance(value, float) and not math.isfinite(value):  # "1e999" parses as infinity
        raise ResultError("the result holds a number that is not finite")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ResultError("the result holds an integer of more than 64 bits")
    if isinstance(value, str):
        return _encodable(value)
    if isinstance(value, list):
        return [_checked(entry, depth + 1) for entry in value]
    if isinstance(value, dict):
        return {_encodable(key): _checked(entry, depth + 1) for key, entry in value.items()}
    return value


def _encodable(string: str) -> str:
    if not string.isascii() and any("\ud800" <= char <= "\udfff" for char in string):
        raise ResultError("the result holds a lone surrogate, which is not text")
    return string


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ResultError("the result holds an object with a duplicate key")
    return found


def _no_constant(name: str) -> Any:
    raise ResultError(f"the result holds {name}, which is not a number")
