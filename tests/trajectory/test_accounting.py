"""What became of each rollout, from journals and ledgers as a run leaves them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from areal_sub.records import (
    BeganRecord,
    ClosedRecord,
    EndRecord,
    Fate,
    FateRecord,
    Fork,
    IntentRecord,
    LedgerRecord,
    OpenRecord,
    Outcome,
    TrajectoryRecord,
    TurnRecord,
    float32,
    int32,
)
from areal_sub.trajectory.accounting import Accounting, account, judge_run
from areal_sub.trajectory.journal import Journal, JournalPolicy, segment_files
from areal_sub.trajectory.run_log import RolloutLog, read_rollout, read_run

DONE = ClosedRecord(ended="done", error="", closed_at=0.0)


def opened(rollout_id: str, split: str = "train") -> OpenRecord:
    return OpenRecord(
        rollout_id=rollout_id, group_id="g", task_id="t", split=split, policy_version=0,
        opened_at=0.0,
    )  # fmt: skip


def turn(rollout_id: str) -> TurnRecord:
    return TurnRecord(
        rollout_id=rollout_id, turn_id="a", parent_turn_id=None, fork=Fork.ROOT,
        context_token_ids=int32([1]), token_ids=int32([2, 3]), rollout_logprobs=float32([0, 0]),
        versions=int32([0, 0]), finish_reason="stop", dialect="chat", model="m", temperature=1.0,
        top_p=1.0, started_at=0.0, ended_at=0.0, num_prompt_tokens=1,
    )  # fmt: skip


def ended(rollout_id: str, outcome: Outcome = Outcome.COMPLETED) -> EndRecord:
    return EndRecord(
        rollout_id=rollout_id, outcome=outcome, reward=1.0, turn_rewards={}, error="e",
        traceback="t", stdout_tail="o", stderr_tail="e", wall_s=0.0, cpu_s=0.0, max_rss_bytes=0,
        num_turns=1, num_rejected_calls=0, ended_at=0.0,
    )  # fmt: skip


def began(version: int = 0) -> BeganRecord:
    return BeganRecord(
        policy_version=version, began_at=0.0, export_style="concat", turn_discount=1.0,
        trains_without_advantage=False, tokenizer_path="",
    )  # fmt: skip


def decided(rollout_id: str, fate: Fate, step: int = 0) -> FateRecord:
    return FateRecord(
        rollout_id=rollout_id, fate=fate, reason="", policy_version=0, decided_at=0.0, step=step
    )


def rollout(rollout_id: str, outcome: Outcome = Outcome.COMPLETED) -> list[TrajectoryRecord]:
    return [opened(rollout_id), turn(rollout_id), ended(rollout_id, outcome)]


def write(
    folder: Path,
    records: Sequence[TrajectoryRecord],
    ledger: Sequence[LedgerRecord],
    number: int = 1,
) -> None:
    for kind, content in (("journal", records), ("ledger", ledger)):
        journal = Journal(folder / f"{number:04d}.{kind}")
        for record in content:
            journal.append(record)
        journal.close()


def fates(folder: Path) -> dict[str, str]:
    judgements = judge_run(read_run(folder))
    return {f"{j.attempt.number}/{j.rollout.opened.rollout_id}": j.label for j in judgements}


def sums(folder: Path) -> Accounting:
    attempts = read_run(folder)
    return account(attempts, judge_run(attempts))


def test_every_fate_that_the_trainer_decides_is_counted_by_its_name(tmp_path: Path) -> None:
    records = [
        *rollout("trained"), *rollout("stale"), *rollout("timeout", Outcome.TIMEOUT),
        *rollout("alone"), *rollout("equal"), *rollout("late"),
        *rollout("late-failed", Outcome.KILLED), *rollout("stopped", Outcome.CANCELLED),
        opened("valid", "valid"), ended("valid", Outcome.EXCEPTION),
    ]  # fmt: skip
    ledger = [
        began(), decided("trained", Fate.TRAINED, 1), decided("stale", Fate.STALE),
        decided("timeout", Fate.FAILED), decided("alone", Fate.NO_BASELINE),
        decided("equal", Fate.NO_SIGNAL, 1), decided("valid", Fate.EVALUATED),
        *(decided(name, Fate.UNUSED) for name in ("late", "late-failed", "stopped", "unopened")),
        DONE,
    ]  # fmt: skip
    write(tmp_path, records, ledger)
    assert sums(tmp_path) == Accounting(
        num_started=9,
        fates={
            "trained": 1, "stale": 1, "timeout": 1, "no_baseline": 1, "no_signal": 1, "unused": 1,
            "killed": 1, "cancelled": 1, "evaluated": 1,
        },
        problems=(),
    )  # fmt: skip
    assert str(sums(tmp_path)).startswith("9 started = 1 trained + 1 ")


def test_a_rollout_is_summed_up_without_its_tokens(tmp_path: Path) -> None:
    write(tmp_path, rollout("r"), [began(), decided("r", Fate.STALE)])
    (attempt,) = read_run(tmp_path)
    assert attempt.rollouts == {
        "r": RolloutLog(
            opened=opened("r"),
            end=dataclasses.replace(ended("r"), traceback="", stdout_tail="", stderr_tail=""),
            num_turns=1,
            num_sampled_tokens=2,
            forks={Fork.ROOT: 1},  # type: ignore[arg-type]
            decisions=[decided("r", Fate.STALE)],
        )
    }
    read_opened, turns, end = read_rollout(attempt.journal, "r")
    assert (read_opened, [t.turn_id for t in turns], end) == (opened("r"), ["a"], ended("r"))


def test_after_a_kill_what_was_running_crashed_and_later_steps_are_undone(tmp_path: Path) -> None:
    first = [*rollout("early"), *rollout("later"), *rollout("ready"), opened("running")]
    ledger = [began(), decided("early", Fate.TRAINED, 1), decided("later", Fate.TRAINED, 2)]
    write(tmp_path, first, ledger)
    again = [*rollout("later")]
    write(tmp_path, again, [began(1), decided("later", Fate.TRAINED, 2), DONE], number=2)
    assert fates(tmp_path) == {
        "1/early": "trained",
        "1/later": "undone",
        "1/ready": "crashed",
        "1/running": "crashed",
        "2/later": "trained",
    }
    assert sums(tmp_path).problems == ()


def test_a_run_that_failed_names_what_took_its_rollouts_down(tmp_path: Path) -> None:
    closed = ClosedRecord(ended="failed", error="ComponentDied: proxy", closed_at=0.0)
    write(tmp_path, [opened("r")], [began(), decided("r", Fate.UNUSED), closed])
    (judgement,) = judge_run(read_run(tmp_path))
    assert (judgement.fate, judgement.reason) == (Fate.CRASHED, "ComponentDied: proxy")
    assert sums(tmp_path).problems == ()


def test_while_a_run_goes_on_its_rollouts_run_or_wait(tmp_path: Path) -> None:
    with ExitStack() as stack:
        for kind in ("journal", "ledger"):
            journal = Journal(tmp_path / f"0001.{kind}")
            stack.callback(journal.close)
            for record in (*rollout("ended"), opened("open")) if kind == "journal" else (began(),):
                journal.append(record)
        assert fates(tmp_path) == {"1/ended": "waiting", "1/open": "running"}
        assert sums(tmp_path).problems == ()
    assert fates(tmp_path) == {"1/ended": "crashed", "1/open": "crashed"}


@pytest.mark.parametrize(
    ("records", "ledger", "problem"),
    [
        (rollout("r"), [began(), DONE], r"nobody decided on: 1 rollouts \(r\)"),
        ([opened("r")], [began(), decided("r", Fate.UNUSED), DONE], "nobody decided on"),
        (rollout("r"), [], "nobody decided on"),
        ([], [began(), decided("r", Fate.TRAINED, 1), DONE], "decided on, but never opened"),
        (
            rollout("r"),
            [began(), decided("r", Fate.TRAINED, 1), decided("r", Fate.TRAINED, 2), DONE],
            "more than once",
        ),
        (
            rollout("r", Outcome.TIMEOUT),
            [began(), decided("r", Fate.TRAINED, 1), DONE],
            "in a training step, but failed",
        ),
        (
            [opened("r", "valid"), ended("r")],
            [began(), decided("r", Fate.NO_SIGNAL, 1), DONE],
            "not for training",
        ),
    ],
)
def test_what_does_not_add_up_is_named(
    tmp_path: Path,
    records: list[TrajectoryRecord],
    ledger: list[LedgerRecord],
    problem: str,
) -> None:
    write(tmp_path, records, ledger)
    (found,) = sums(tmp_path).problems
    assert re.search(problem, found)


def test_torn_tails_are_read_up_to_them_and_damage_is_told(tmp_path: Path) -> None:
    write(tmp_path, [*rollout("r"), opened("s")], [began(), decided("r", Fate.TRAINED, 1)])
    (journal,) = segment_files(tmp_path / "0001.journal")
    whole = journal.read_bytes()
    journal.write_bytes(whole[:-3])
    (ledger,) = segment_files(tmp_path / "0001.ledger")
    ledger.write_bytes(ledger.read_bytes() + b"\x05\0")
    assert fates(tmp_path) == {"1/r": "trained"}
    assert sums(tmp_path).problems == ()
    journal.write_bytes(whole[:60] + b"\xff" + whole[61:])
    (damage, stray) = sums(tmp_path).problems
    assert "damaged" in damage and "never opened" in stray


@pytest.mark.parametrize("at", [0, 60], ids=["its header", "its first record"])
def test_a_damaged_ledger_is_not_taken_for_none(tmp_path: Path, at: int) -> None:
    write(tmp_path, rollout("r"), [began(), decided("r", Fate.TRAINED, 1), DONE])
    (ledger,) = segment_files(tmp_path / "0001.ledger")
    whole = ledger.read_bytes()
    ledger.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
    (judgement,) = judge_run(read_run(tmp_path))
    assert judgement.fate is Fate.UNACCOUNTED and "ledger is damaged" in judgement.reason
    assert str(ledger) in sums(tmp_path).problems[0]


def test_a_run_that_has_only_begun_is_empty(tmp_path: Path) -> None:
    assert read_run(tmp_path) == []
    (tmp_path / "0001.journal").mkdir()
    (tmp_path / "0001.journal" / f"{0:020d}.segment").write_bytes(b"ASUB")
    assert str(sums(tmp_path)) == "0 started = 0 trained"


def test_a_call_that_was_never_answered_is_named(tmp_path: Path) -> None:
    asked = [
        IntentRecord(rollout_id="r", turn_id=turn_id, num_prompt_tokens=1, asked_at=0.0)
        for turn_id in ("a", "b")
    ]
    write(tmp_path, [opened("r"), *asked, turn("r")], [began()])
    (attempt,) = read_run(tmp_path)
    assert list(attempt.rollouts["r"].unanswered) == ["b"]
    _, turns, end = read_rollout(attempt.journal, "r")
    assert [t.turn_id for t in turns] == ["a"] and end is None


def test_rollouts_that_were_removed_from_the_journal_are_still_accounted_for(
    tmp_path: Path,
) -> None:
    names = [f"r{i}" for i in range(8)]
    journal = Journal(
        tmp_path / "0001.journal", JournalPolicy(segment_bytes=1000, retain_bytes=4000)
    )
    for name in names:
        for record in rollout(name):
            journal.append(record)
    journal.acknowledge(journal.end)
    journal.close()
    ledger = Journal(tmp_path / "0001.ledger")
    for entry in (began(), *(decided(name, Fate.TRAINED, 1) for name in names), DONE):
        ledger.append(entry)
    ledger.close()
    (attempt,) = read_run(tmp_path)
    assert 0 < len(attempt.rollouts) < 8 and not attempt.damage
    assert sums(tmp_path) == Accounting(num_started=8, fates={"trained": 8}, problems=())


def took_over(rollout_id: str, fate: Fate, step: int, attempt: int = 1) -> FateRecord:
    return dataclasses.replace(decided(rollout_id, fate, step), attempt=attempt)


def test_what_a_later_attempt_took_over_is_decided_by_it(tmp_path: Path) -> None:
    names = ("undone", "ready", "late", "stale")
    ledger = [began(), decided("undone", Fate.TRAINED, 2), decided("stale", Fate.STALE)]
    write(tmp_path, [each for name in names for each in rollout(name)], ledger)
    ledger = [
        began(1), took_over("undone", Fate.TRAINED, 2), took_over("ready", Fate.TRAINED, 2),
        took_over("stale", Fate.NO_SIGNAL, 2), took_over("late", Fate.UNUSED, 0), DONE,
    ]  # fmt: skip
    write(tmp_path, [], ledger, number=2)
    assert fates(tmp_path) == {
        "1/undone": "trained",
        "1/ready": "trained",
        "1/stale": "no_signal",
        "1/late": "unused",
    }
    assert sums(tmp_path).problems == () and sums(tmp_path).num_started == 4


def test_a_rollout_in_two_steps_that_hold_is_named(tmp_path: Path) -> None:
    write(tmp_path, rollout("r"), [began(), decided("r", Fate.TRAINED, 1)])
    write(tmp_path, [], [began(1), took_over("r", Fate.TRAINED, 2), DONE], number=2)
    assert "trained more than once: 1 rollouts (r)" in sums(tmp_path).problems
    write(tmp_path, [], [began(1), took_over("gone", Fate.TRAINED, 2), DONE], number=3)
    assert any("never opened: 1 rollouts (gone)" in each for each in sums(tmp_path).problems)
