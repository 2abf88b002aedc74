"""The command `areal-sub inspect`: from its arguments to what it prints.

Called by `cli.py`. Raises `RunNotFound` where the run or the rollout cannot be told.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

from areal_sub.inspection.find import find_rollout, find_run
from areal_sub.inspection.listing import (
    Filter,
    as_json,
    json_line,
    say_accounting,
    table,
)
from areal_sub.inspection.text import Decoder
from areal_sub.inspection.transcript import Inspected, inspected_json, say_rollout
from areal_sub.printable import one_line
from areal_sub.trajectory.accounting import Judgement, account, judge_run
from areal_sub.trajectory.run_log import AttemptLog, read_run

DEFAULT_LIMIT = 100
_PIPE_WIDTH = 220  # columns where nobody's screen says otherwise


def inspect_run(run: str, which: Filter, *, limit: int | None, as_lines: bool) -> int:
    """List rollouts. `limit`: at most so many; 0: all; None: all as JSON, else `DEFAULT_LIMIT`.

    Returns 1 where a file of the run is damaged: what could be read of it is shown.
    """
    attempts = read_run(find_run(run) / "journal")
    judgements = judge_run(attempts)
    found = [judgement for judgement in judgements if which.takes(judgement)]
    if limit is None:
        limit = 0 if as_lines else DEFAULT_LIMIT
    shown = found[:limit] if limit else found
    damaged = any(attempt.damage for attempt in attempts)
    if as_lines:
        for judgement in shown:
            sys.stdout.write(json_line(as_json(judgement)) + "\n")
        _say_damage(attempts)
        return int(damaged)
    console = _console()
    if shown:
        console.print(table(shown, resumed=_is_resumed(judgements)))
    if len(shown) < len(found):
        more = f"... and {len(found) - len(shown)} more: --limit 0 shows all"
        console.print(Text(more, style="dim"))
    if judgements and not found:
        console.print(Text(f"none of the {len(judgements)} rollouts is asked for"))
    say_accounting(console, account(attempts, judgements))
    return int(damaged)


def inspect_rollout(run: str, rollout: str, *, tokens: bool, as_lines: bool) -> int:
    """Show one rollout. Raises `RecordError` where its records do not fit together."""
    folder = find_run(run)
    attempts = read_run(folder / "journal")
    found = Inspected.read(find_rollout(judge_run(attempts), rollout))
    decoder = Decoder(_tokenizers(folder, found.judgement))
    if as_lines:
        sys.stdout.write(json_line(inspected_json(found, decoder, tokens=tokens)) + "\n")
    else:
        say_rollout(_console(), found, decoder, tokens=tokens)
    _say_damage(attempts)
    return 0


def _is_resumed(judgements: list[Judgement]) -> bool:
    return len({judgement.attempt.number for judgement in judgements}) > 1


def _tokenizers(run: Path, judgement: Judgement) -> list[Path]:
    """Where the run's tokenizer may lie: where it came from, then beside its checkpoints."""
    began = judgement.attempt.began
    known = [Path(began.tokenizer_path)] if began is not None else []
    return [*known, *sorted((run / "checkpoints").glob("*"))]


def _say_damage(attempts: list[AttemptLog]) -> None:
    for attempt in attempts:
        for damage in attempt.damage:
            sys.stderr.write(f"areal-sub: {one_line(damage)}\n")


def _console() -> Console:
    piped = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return Console(highlight=False, width=_PIPE_WIDTH if piped else None)
