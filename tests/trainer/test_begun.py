"""What a trial that was begun goes on with, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from areal_sub import Trainer
from areal_sub.config import Config, parse_config
from areal_sub.errors import CheckpointError, ConfigError, ModelError
from areal_sub.records import EndRecord, OpenRecord, Outcome
from areal_sub.trainer.begun import check_goes_on
from areal_sub.trainer.run_dir import RunDir
from areal_sub.trajectory.journal import Journal


def config(root: Path, *overrides: str) -> Config:
    base = {
        "experiment_name": "e",
        "trial_name": "t",
        "cluster": {"fileroot": str(root)},
        "actor": {"path": "policy"},
        "recover": {"mode": "auto"},
        "train_dataset": {"path": "tasks.jsonl"},
    }
    return parse_config(None, list(overrides), base=base)


def begin(root: Path, *overrides: str, point: dict[str, Any] | None = None) -> None:
    """An attempt that left its configuration, and a recovery point with `point` in it."""
    began = config(root, *overrides)
    run = RunDir.open(began)
    run.write_config(began)
    run.close()
    if point is not None:
        folder = run.recover / "recovery-000000"
        folder.mkdir(parents=True)
        state = {"format": 1, "extra": point, "rng": {}, "files": {}}
        (folder / "state.json").write_text(json.dumps(state))


def check(
    root: Path, *overrides: str, digest: str = "tasks", from_file: bool = True
) -> tuple[str, ...]:
    wanted = config(root, *overrides)
    run = RunDir.open(wanted)
    try:
        return tuple(check_goes_on(wanted, run, digest, from_file=from_file))
    finally:
        run.close()


POINT = {"version": 1, "tasks_digest": "tasks"}
HOW_TO_GO_ON = "choose another trial_name, or start anew with recover.mode=disabled"


def test_the_same_command_goes_on_without_a_word(tmp_path: Path) -> None:
    assert check(tmp_path) == ()  # a new trial
    begin(tmp_path, point=POINT)
    assert check(tmp_path) == ()


def test_another_model_is_refused(tmp_path: Path) -> None:
    begin(tmp_path, point=POINT)
    with pytest.raises(ConfigError) as caught:
        check(tmp_path, "actor.path=other")
    assert str(caught.value) == (
        f"recover.mode=auto: this trial ({tmp_path}/e/t) was begun with actor.path=policy, not "
        f"other: set that back, {HOW_TO_GO_ON}"
    )


def test_the_same_folder_is_the_same_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "policy").mkdir()
    (tmp_path / "link").symlink_to("policy")
    begin(tmp_path, point=POINT)
    for spelled in ("./policy", str(tmp_path / "policy"), "link"):
        (told,) = check(tmp_path, f"actor.path={spelled}")
        assert told.startswith("changed since the last attempt: actor.path 'policy' → ")


def test_where_nothing_is_to_go_on_from_the_model_may_change(tmp_path: Path) -> None:
    """The first attempt may have ended for its model's sake."""
    begin(tmp_path)
    (told,) = check(tmp_path, "actor.path=other", digest="others")
    assert told == "changed since the last attempt: actor.path 'policy' → 'other'"


def test_rollouts_of_another_model_are_not_gone_on_with(tmp_path: Path) -> None:
    begin(tmp_path)
    journal = Journal(tmp_path / "e/t/journal/0001.journal")
    for number, outcome in enumerate([Outcome.LOST, Outcome.COMPLETED]):
        assert check(tmp_path, "actor.path=other"), "no more than that is told"
        rollout_id = f"g000000-{number}"
        opened = OpenRecord(
            rollout_id=rollout_id, group_id="g000000", task_id="t", split="train",
            policy_version=0, opened_at=0.0,
        )  # fmt: skip
        journal.append(opened)
        journal.append(EndRecord.without_process(rollout_id, outcome, reward=1.0, num_turns=0))
    with pytest.raises(ConfigError, match=r"begun with actor\.path=policy, not other"):
        check(tmp_path, "actor.path=other")
    journal.close()


@pytest.mark.parametrize(
    "override, named, from_file",
    [
        ("train_dataset.path=b.jsonl", "train_dataset.path=tasks.jsonl, not b.jsonl", True),
        ("train_dataset.size=2", "train_dataset.size=nothing (null), not 2", True),
        ("seed=2", "seed=1, not 2", False),  # the tasks are generated from it
    ],
)
def test_other_tasks_are_refused_by_the_keys_that_they_come_from(
    tmp_path: Path, override: str, named: str, from_file: bool
) -> None:
    begin(tmp_path, point=POINT)
    with pytest.raises(ConfigError) as caught:
        check(tmp_path, override, digest="others", from_file=from_file)
    assert f"was begun with {named}: set that back, {HOW_TO_GO_ON}" in str(caught.value)


def test_a_file_of_tasks_that_changed_is_refused(tmp_path: Path) -> None:
    begin(tmp_path, point=POINT)
    with pytest.raises(ConfigError) as caught:
        check(tmp_path, "seed=2", digest="others")
    assert "was begun with other tasks than train_dataset.path has now: put them" in str(
        caught.value
    )


def test_a_generator_that_follows_no_seed_goes_on_and_is_told(tmp_path: Path) -> None:
    begin(tmp_path, point=POINT)
    (told,) = check(tmp_path, digest="others", from_file=False)
    assert told == "note: the tasks to train on are others than in the last attempt"


def test_a_recovery_point_of_before_says_nothing_of_tasks(tmp_path: Path) -> None:
    begin(tmp_path, point={"version": 1})
    (told,) = check(tmp_path, "train_dataset.path=b.jsonl", digest="others")
    assert told.startswith("changed since the last attempt: train_dataset.path ")


def test_the_rest_may_change_and_is_told_in_a_line(tmp_path: Path) -> None:
    begin(tmp_path, "recover.mode=disabled", "gconfig.n_samples=8", point=POINT)
    assert check(
        tmp_path,
        *("gconfig.n_samples=4", "seed=2", "workflow=a.b", "workflow_kwargs={key: secret}"),
        "eval_gconfig.n_samples=2",
    ) == (
        "changed since the last attempt: seed 1 → 2, workflow nothing (null) → 'a.b', "
        "workflow_kwargs, gconfig.n_samples 8 → 4, eval_gconfig",
    )


def test_a_configuration_that_cannot_be_read_hides_no_other_tasks(tmp_path: Path) -> None:
    begin(tmp_path, point=POINT)
    (tmp_path / "e" / "t" / "config.yaml").write_text("unknown_key: 1\n")
    (told,) = check(tmp_path)
    assert "what changed since the last attempt cannot be told: " in told
    with pytest.raises(ConfigError, match="begun with other tasks"):
        check(tmp_path, digest="others")


def test_a_damaged_recovery_point_is_told(tmp_path: Path) -> None:
    begin(tmp_path, point=POINT)
    (tmp_path / "e/t/recover/recovery-000000/state.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"state\.json"):
        check(tmp_path)


def test_what_is_refused_leaves_the_trial_as_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begin(tmp_path, point=POINT)
    before = (tmp_path / "e/t/config.yaml").read_bytes()
    trainer = Trainer(config(tmp_path, "actor.path=other"), train_dataset=[{"question": "?"}])
    for _ in range(2):  # it is not in use after the first
        with pytest.raises(ConfigError, match=r"begun with actor\.path=policy, not other"):
            trainer.train("areal_sub.workflow.openai.math_agent.MathAgent")
    assert (tmp_path / "e/t/config.yaml").read_bytes() == before
    assert "policy" not in capsys.readouterr().out


@pytest.mark.parametrize("path", ["nowhere", "."])
def test_a_model_that_is_none_moves_no_earlier_run_aside(tmp_path: Path, path: str) -> None:
    begin(tmp_path, point=POINT)
    other = f"actor.path={tmp_path / path}"
    wanted = config(tmp_path, "recover.mode=disabled", other)
    trainer = Trainer(wanted, train_dataset=[{"question": "?"}])
    with pytest.raises(ModelError, match=r"actor\.path: (there is no folder|.* no config\.json)"):
        trainer.train("areal_sub.workflow.openai.math_agent.MathAgent")
    assert [each.name for each in (tmp_path / "e").iterdir()] == ["t"]
