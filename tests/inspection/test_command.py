"""`areal-sub inspect` over a run's folder as a run leaves it, or is just writing it."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from inspection_rollouts import began, decided, end, opened, turns, write
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from areal_sub.cli import run
from areal_sub.printable import escaped
from areal_sub.records import ClosedRecord, Fate, Outcome
from areal_sub.trajectory.journal import Journal, segment_files

HOSTILE = "\x1b]0;owned\x07 [red]\u202e\nnext"
WORDS = ["[UNK]", "<user>", "two", "\x1b[2J", "four", "five", "six", "seven", "eight", "nine"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`runs/exp/trial`: a trained rollout, a failed, a stale and an evaluated one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    root = tmp_path / "runs" / "exp" / "trial"
    write(
        root / "journal" / "0001.journal",
        [
            *(opened("g0-0"), *turns(rollout_id="g0-0"), end("g0-0", reward=1.0)),
            *(opened("g0-1", task_id=HOSTILE), *turns(rollout_id="g0-1")),
            end("g0-1", Outcome.EXCEPTION, error=HOSTILE, stdout=HOSTILE),
            *(opened("g1-0"), *turns(rollout_id="g1-0"), end("g1-0", reward=0.25)),
            *(opened("v0-0", "valid"), end("v0-0", Outcome.TIMEOUT, num_turns=0, error="slow")),
        ],
    )
    write(
        root / "journal" / "0001.ledger",
        [
            began(),
            decided(Fate.TRAINED, rollout_id="g0-0"),
            decided(Fate.FAILED, rollout_id="g0-1"),
            decided(Fate.STALE, rollout_id="g1-0"),
            decided(Fate.EVALUATED, rollout_id="v0-0"),
            ClosedRecord(ended="done", error="", closed_at=0.0),
        ],
    )
    return root


def add_tokenizer(folder: Path) -> None:
    checkpoint = folder / "checkpoints" / "final"
    checkpoint.mkdir(parents=True)
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    Tokenizer(WordLevel(vocabulary, unk_token="[UNK]")).save(str(checkpoint / "tokenizer.json"))


def lines(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    assert run(["inspect", "exp/trial", "--json", *arguments]) == 0
    out = capsys.readouterr().out
    assert out.isascii() and out.replace("\n", "").isprintable()
    return [json.loads(line) for line in out.splitlines()]


def test_the_table_names_every_rollout_and_adds_up(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["inspect", "exp/trial"]) == 0
    out = capsys.readouterr().out
    header, *rows, last = out.splitlines()
    assert header.split()[:6] == ["rollout", "task", "split", "outcome", "fate", "reward"]
    trained = "g0-0 t train completed trained 1 1.000 3 6 6 1 0 2.0 s"
    assert " ".join(rows[0].split()) == trained
    assert [row.split()[0] for row in rows] == ["g0-0", "g0-1", "g1-0", "v0-0"]
    assert "\\x1b]0;owned\\x07 [red]\\u202e\\nnext" in rows[1]
    assert last == "rollouts: 4 started = 1 trained + 1 exception + 1 stale + 1 evaluated"
    assert "\x1b" not in out and "\u202e" not in out


@pytest.mark.parametrize(
    ("arguments", "ids"),
    [
        ([], ["g0-0", "g0-1", "g1-0", "v0-0"]),
        (["--failed"], ["g0-1", "v0-0"]),
        (["--not-trained"], ["g0-1", "g1-0"]),
        (["--reward-below", "0.5"], ["g1-0"]),
        (["--split", "valid"], ["v0-0"]),
        (["--failed", "--split", "train"], ["g0-1"]),
        (["--limit", "1"], ["g0-0"]),
        (["--reward-below", "-1"], []),
    ],
)
def test_filters(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], ids: list[str]
) -> None:
    assert [row["rollout_id"] for row in lines(capsys, *arguments)] == ids


def test_a_json_line_holds_what_the_table_shows(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained, failed, *_ = lines(capsys)
    assert trained == {
        "rollout_id": "g0-0", "attempt": 1, "group_id": "g", "task_id": "t", "agent": "",
        "split": "train",
        "outcome": "completed", "fate": "trained", "reason": "", "error": "", "step": 1,
        "reward": 1.0, "num_turns": 3, "num_sampled_tokens": 6,
        "num_unanswered": 0, "num_trained_tokens": 6,
        "num_uncertified_tokens": 0, "forks": {"history_edited": 1}, "staleness": 0,
        "policy_version": 0, "opened_at": 0.0, "wall_s": 2.0,
    }  # fmt: skip
    assert failed["task_id"] == failed["error"] == HOSTILE and failed["reward"] is None


def test_one_rollout_shows_its_tree_and_what_was_said(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add_tokenizer(folder)
    assert run(["inspect", str(folder), "g0-0"]) == 0
    out = capsys.readouterr().out
    assert "fate       trained in step 1: a training step learned from it" in out
    assert "└── 1  root  2 + 2 tokens, stop, version 0  trained, advantage +1.000" in out
    assert "    ├── 2  none  1 + 3 tokens" in out
    assert "    └── 3  history_edited  2 + 1 tokens" in out
    assert "── turn 3 after turn 1, history_edited" in out
    assert "<user> two\n\\x1b[2J four\n" in out
    assert "\x1b" not in out


def test_tokens_are_told_one_by_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add_tokenizer(folder)
    assert run(["inspect", "exp/trial", "g0-0", "--tokens"]) == 0
    out = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["0", "1", "'<user>'", "masked:", "context"] in out
    assert ["2", "3", "'\\x1b[2J'", "trained", "logprob", "-0.500", "version", "0"] in out
    assert ["2", "3", "'\\x1b[2J'", "masked:", "shared"] in out
    (whole,) = lines(capsys, "g1", "--tokens")
    tokens = [(t["turn_id"], t["token_id"], t["why"]) for t in whole["samples"][1]]
    assert tokens == [
        ("a", 1, "context"), ("a", 2, "context"), ("a", 3, "shared"), ("a", 4, "shared"),
        ("c", 5, "context"), ("c", 9, "context"), ("c", 6, "stale"),
    ]  # fmt: skip
    assert [turn["why"] for turn in whole["turns"]] == ["stale"] * 3
    assert whole["turns"][0]["context"] == "<user> two"


def test_without_a_tokenizer_tokens_are_numbers_and_output_is_escaped(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["inspect", "exp/trial", "g0-1"]) == 0
    out = capsys.readouterr().out
    assert "No tokenizer is at hand" in out and "\n6 7 8\n" in out
    assert "── stdout\n\\x1b]0;owned\\x07 [red]\\u202e\nnext\n" in out
    assert "outcome    exception: \\x1b]0;owned" in out
    assert run(["inspect", "exp/trial", "v"]) == 0
    assert "It made no model call." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["exp/trail"], "no run 'exp/trail'.*did you mean exp/trial?"),
        (["runs/exp"], "runs/exp is not the folder of a run"),
        (["exp/trial", "g0"], "'g0' may be g0-0 or g0-1: write more"),
        (["exp/trial", "g1-1"], "no rollout 'g1-1'; did you mean g1-0"),
        (["exp/trial", "1/g7"], "no rollout '1/g7'"),
        (["exp/trial", "--tokens"], "--tokens needs a ROLLOUT"),
        (["exp/trial", "g1", "--failed"], "filters are for a list"),
        (["exp/trial", "--limit", "-1"], "--limit"),
    ],
)
def test_what_cannot_be_meant_is_told(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run(["inspect", *arguments]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error


def test_ids_of_a_resumed_run_are_told_apart_by_attempt(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = [opened("g1-0"), *turns(rollout_id="g1-0"), end("g1-0")]
    write(folder / "journal" / "0002.journal", again)
    write(folder / "journal" / "0002.ledger", [began(), decided(Fate.TRAINED, rollout_id="g1-0")])
    assert run(["inspect", "exp/trial"]) == 0
    out = capsys.readouterr().out
    assert "1/g0-0" in out and "2/g1-0" in out and "undone" in out
    assert run(["inspect", "exp/trial", "g1-0"]) == 2
    assert "1/g1-0 or 2/g1-0" in capsys.readouterr().err
    (one,) = lines(capsys, "2/g1")
    assert (one["attempt"], one["fate"]) == (2, "trained")


def test_a_run_that_goes_on_an_empty_one_and_a_torn_tail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    journals = tmp_path / "runs" / "exp" / "trial" / "journal"
    journals.mkdir(parents=True)
    assert run(["inspect", "exp/trial"]) == 0
    assert capsys.readouterr().out == "rollouts: 0 started = 0 trained\n"
    ledger = Journal(journals / "0001.ledger")
    ledger.append(began())
    write(journals / "0001.journal", [opened("r"), *turns(), opened("s"), end("s", num_turns=0)])
    with segment_files(journals / "0001.journal")[-1].open("ab") as journal:
        journal.write(b"\xa5\x1e\xf7\x0a\x09\0\0\0torn")
    assert [row["fate"] for row in lines(capsys)] == ["running", "waiting"]
    (one,) = lines(capsys, "r")
    assert [turn["why"] for turn in one["turns"]] == ["running"] * 3
    ledger.close()
    assert [row["fate"] for row in lines(capsys)] == ["crashed", "crashed"]


def test_a_damaged_journal_is_shown_up_to_the_damage(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (journal,) = segment_files(folder / "journal" / "0001.journal")
    raw = journal.read_bytes()
    at = raw.rindex(b"g1-0", 0, len(raw) // 2 * 2 - 600)
    journal.write_bytes(raw[:at] + b"?" + raw[at + 1 :])
    assert run(["inspect", "exp/trial"]) == 1
    out = capsys.readouterr().out
    assert "g0-0" in out and "is damaged, with more records behind it" in out


def test_a_reader_that_has_had_enough_and_no_torch(folder: Path) -> None:
    program = (
        "import sys\n"
        "from areal_sub.cli import run\n"
        "code = run(sys.argv[1:])\n"
        "assert not {'torch', 'transformers', 'pydantic'} & sys.modules.keys()\n"
        "sys.exit(code)\n"
    )
    command = [sys.executable, "-c", program, "inspect", str(folder), "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 0


def shell(script: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[bytes]:
    """`script`, for which `$0` is Python and `$1` a run's folder."""
    command = ["sh", "-c", script, sys.executable, str(folder)]
    environ = {**os.environ, **variables}
    return subprocess.run(command, env=environ, capture_output=True, check=False)


def test_an_encoding_that_lacks_a_character_is_no_error(folder: Path) -> None:
    write(folder / "journal" / "0002.journal", [opened("g9-0", task_id="task Δ")])
    done = shell('exec "$0" -m areal_sub inspect "$1"', folder, PYTHONIOENCODING="latin-1")
    assert (done.returncode, done.stderr) == (0, b"") and b"task ?" in done.stdout


@pytest.mark.parametrize("closed", [">&-", "<&- >&-", "<&- >&- 2>&-"])
def test_a_closed_stream_is_as_good_as_dev_null(folder: Path, closed: str) -> None:
    done = shell(f'exec "$0" -m areal_sub inspect "$1" {closed}', folder)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_an_output_that_does_not_fit_is_told(folder: Path) -> None:
    script = 'exec "$0" -m areal_sub status "$1" --json > /dev/full'
    done = shell(script, folder, PYTHONUNBUFFERED="")
    told = b"areal-sub: the output cannot be written: No space left on device\n"
    assert (done.returncode, done.stderr) == (1, told)


def test_what_a_terminal_would_obey_is_escaped() -> None:
    assert escaped("plain") == "plain"
    assert escaped("\x1b[31mü\t\n\x9b\u2028\U000e0001\ud800") == (
        "\\x1b[31mü\t\n\\x9b\\u2028\\U000e0001\\ud800"
    )


def test_where_a_run_has_several_agents_each_rollout_names_its_own(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "journal" / "0002.journal"
    write(path, [dataclasses.replace(opened("m"), agent="math"), end("m", num_turns=0)])
    assert run(["inspect", "exp/trial"]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split()[-1] == "agent" and rows[4].split()[-1] == "math"
    assert lines(capsys, "m")[0]["agent"] == "math"
    assert run(["inspect", "exp/trial", "m"]) == 0
    assert "agent      math" in capsys.readouterr().out
