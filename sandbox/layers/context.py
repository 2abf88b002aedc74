"""What the layers need beside the plan: what differs from process to process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Context:
    folder: str = ""
    """The child's own: holds `home`, `work` (the working directory), `tmp`. For `root`: an empty
    one, where the root is put together."""
    stdout: int = -1
    stderr: int = -1
    result: int = -1
    request: int = -1
    group: list[int] = field(default_factory=list)
    """What leads into the group of this process, see `cgroups`; closed once it is in."""
    keep: list[int] = field(default_factory=list)
    """More descriptors that must stay open."""
    ports: list[int] = field(default_factory=list)
    """More ports that may be connected to."""
    readable: Sequence[str] = ()
    """More paths that can be read: the interpreter's own."""
    polled: dict[str, float] = field(default_factory=dict)
    """Out: the limits of all processes together, see `polled_limits`."""
    listeners: list[int] = field(default_factory=list)
    """Out: what `loopback` bound."""


RESULT_FD = 3
"""Where a child finds its result pipe once `descriptors` was applied."""
