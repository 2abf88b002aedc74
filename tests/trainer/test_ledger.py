"""What the ledger says of a training step, and what it leaves in its file."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from areal_sub.config import parse_config
from areal_sub.config.schema import Config
from areal_sub.learner.advantage import EPS
from areal_sub.records import (
    ClosedRecord,
    EndRecord,
    Fate,
    FateRecord,
    Fork,
    LedgerRecord,
    OpenRecord,
    Outcome,
    TurnRecord,
    decode_ledger_record,
    extend_digest,
    float32,
    int32,
)
from areal_sub.trainer.exactness import Exactness, certify
from areal_sub.trainer.ledger import Ledger, learned
from areal_sub.trajectory.journal import read_journal
from areal_sub.trajectory.samples import RolloutSamples, rollout_samples
from areal_sub.trajectory.tree import Trajectory


def config(*overrides: str) -> Config:
    names = {"experiment_name": "e", "trial_name": "t", "actor": {"path": "p"}}
    return parse_config(None, list(overrides), base=names)


def rollout(
    rollout_id: str, reward: float, *, vouched: bool = True
) -> tuple[Trajectory, RolloutSamples, Exactness]:
    opened = OpenRecord(
        rollout_id=rollout_id, group_id="g", task_id="t", split="train", policy_version=3,
        opened_at=0.0,
    )  # fmt: skip
    turn = TurnRecord(
        rollout_id=rollout_id, turn_id="a", parent_turn_id=None, fork=Fork.ROOT,
        context_token_ids=int32([1]), token_ids=int32([2, 3]), rollout_logprobs=float32([0, 0]),
        versions=int32([3, 4]), finish_reason="stop", dialect="chat", model="m", temperature=1.0,
        top_p=1.0, started_at=0.0, ended_at=0.0, num_prompt_tokens=1,
        engine_digest=extend_digest(0, int32([1, 2, 3])) if vouched else 0,
    )  # fmt: skip
    end = EndRecord.without_process(rollout_id, Outcome.COMPLETED, reward=reward, num_turns=1)
    trajectory = Trajectory.build(opened, [turn], end)
    samples = rollout_samples(trajectory, export_style="concat", turn_discount=1.0, credit="all")
    return trajectory, *certify(trajectory, samples)


def record(rollout_id: str, fate: Fate, **values: object) -> FateRecord:
    base = FateRecord(
        rollout_id=rollout_id, fate=fate, reason="", policy_version=4, decided_at=0.0, step=5,
        staleness=1,
    )  # fmt: skip
    return dataclasses.replace(base, **values)  # type: ignore[arg-type]


def timeless(records: list[FateRecord]) -> list[FateRecord]:
    return [dataclasses.replace(each, decided_at=0.0) for each in records]


def test_a_step_tells_who_was_trained_with_what_and_who_had_nothing_to_teach() -> None:
    groups = [
        [rollout("good", 1.0), rollout("bad", 0.0), rollout("odd", 0.5, vouched=False)],
        [rollout("same", 1.0), rollout("too", 1.0)],
        [rollout("low", 0.0), rollout("middle", 1.0), rollout("high", 2.0)],
    ]
    found = learned(groups, config("actor.adv_norm=mean"), step=5, all_skipped=False)
    trained = {"num_trained_tokens": 2, "baseline_scale": 1.0}
    equal = {"reason": "all of its group did equally well", "baseline_mean": 1.0}
    assert timeless(found) == [
        record("good", Fate.TRAINED, **trained, baseline_mean=0.5),
        record("bad", Fate.TRAINED, **trained, baseline_mean=0.5),
        record(
            "odd", Fate.UNCERTIFIED,
            num_uncertified_tokens=2, baseline_mean=0.5, baseline_scale=1.0,
        ),
        record("same", Fate.NO_SIGNAL, **equal),
        record("too", Fate.NO_SIGNAL, **equal),
        record("low", Fate.TRAINED, **trained, baseline_mean=1.0),
        record(
            "middle", Fate.NO_SIGNAL, baseline_mean=1.0, baseline_scale=1.0,
            reason="it did exactly as well as its group on average",
        ),
        record("high", Fate.TRAINED, **trained, baseline_mean=1.0),
    ]  # fmt: skip


def test_a_kl_penalty_trains_every_token_that_is_vouched_for() -> None:
    groups = [[rollout("same", 1.0), rollout("too", 1.0)]]
    found = learned(groups, config("actor.kl_ctl=0.1"), step=5, all_skipped=False)
    trained = {"num_trained_tokens": 2, "baseline_mean": 1.0}
    assert timeless(found) == [
        record("same", Fate.TRAINED, **trained),
        record("too", Fate.TRAINED, **trained),
    ]


def test_a_step_whose_gradient_was_not_finite_trained_nobody() -> None:
    groups = [[rollout("good", 1.0), rollout("bad", 0.0)]]
    found = learned(groups, config(), step=5, all_skipped=True)
    skipped = {"baseline_mean": 0.5, "baseline_scale": 1 / (0.5 + EPS)}
    assert timeless(found) == [
        record("good", Fate.SKIPPED, **skipped),
        record("bad", Fate.SKIPPED, **skipped),
    ]


def read(path: Path) -> list[LedgerRecord]:
    return [decode_ledger_record(raw) for _, raw in read_journal(path)]


def test_the_file_begins_and_closes_and_counts_go_by_step(tmp_path: Path) -> None:
    path = tmp_path / "0001.ledger"
    ledger = Ledger(path, config(), policy_version=4, tokenizer_path="/models/m")
    trajectory, _, _ = rollout("old", 1.0)
    ledger.left_out(trajectory, Fate.STALE, 6)
    ledger.evaluated(["v"], 6)
    assert ledger.take_counts() == {Fate.STALE: 1, Fate.EVALUATED: 1}
    ledger.left([("late", 0)], 6)
    assert ledger.take_counts() == {Fate.UNUSED: 1}
    ledger.close("failed", "ComponentDied: engine")
    began, *fates, closed = read(path)
    assert began.KIND == "began" and began.policy_version == 4  # type: ignore[union-attr]
    plain = {"policy_version": 6, "step": 0}
    assert timeless(fates) == [  # type: ignore[arg-type]
        record("old", Fate.STALE, **plain, staleness=3),
        record("v", Fate.EVALUATED, **plain, staleness=None),
        record("late", Fate.UNUSED, **plain, staleness=None),
    ]
    assert isinstance(closed, ClosedRecord)
    assert (closed.ended, closed.error) == ("failed", "ComponentDied: engine")
