"""Which keys of two configurations differ. Pure; called by the trainer where a run goes on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from areal_sub.config.schema import Config, Section
from areal_sub.config.source import shown


@dataclass(frozen=True, slots=True)
class Change:
    """A key with another value than before."""

    path: str  # dotted
    before: Any
    now: Any

    def __str__(self) -> str:
        """Of maps, lists and sections the name alone: they are long, and may hold secrets."""
        if any(isinstance(value, dict | list | Section) for value in (self.before, self.now)):
            return self.path
        return f"{self.path} {shown(self.before)} → {shown(self.now)}"


def changes(before: Config, now: Config) -> list[Change]:
    """In the schema's order."""
    return list(_changes(before, now, ""))


def _changes(before: Section, now: Section, prefix: str) -> Iterator[Change]:
    for name in type(now).model_fields:
        one, other = getattr(before, name), getattr(now, name)
        if isinstance(one, Section) and isinstance(other, Section) and type(one) is type(other):
            yield from _changes(one, other, f"{prefix}{name}.")
        elif one != other:
            yield Change(prefix + name, one, other)
