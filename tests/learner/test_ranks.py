"""Two processes as one learner, over gloo: the same result as one, and ends that name the rank."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from areal_sub.config.schema import ActorConfig
from areal_sub.errors import LearnerRankError
from areal_sub.learner.checkpoint import Recovery, load_recovery, save_recovery
from areal_sub.learner.learner import Learner
from areal_sub.learner.ranks import RankPlace

JOIN_TIMEOUT_S = 100.0
# Two minibatches of an odd number of micro-batches each, and everything that has a part in them.
OPTIONS: dict[str, Any] = {
    "ppo_n_minibatches": 2,
    "mb_spec": {"max_tokens_per_mb": 36},
    "use_decoupled_loss": True,
    "rejection_sampling": {"upper": 1.3, "lower": 0.5},
    "kl_ctl": 0.1,
    "gradient_checkpointing": True,
    "loss_agg_mode": "sequence_mean",
    "optimizer": {"lr": 1e-2, "weight_decay": 0.1, "gradient_clipping": 0.5},
}


class Pair:
    """Rank 0 in this process, rank 1 in another."""

    def __init__(self, model_folder: Path, recovery: Recovery | None, **options: Any) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ranks-"))
        actor = {
            "path": str(model_folder), "dtype": "float32", "device": "cpu", "num_processes": 2,
        } | options  # fmt: skip
        path = str(recovery.model_path if recovery else model_folder)
        settings = {
            "actor": ActorConfig.model_validate(actor).model_dump(),
            "model_path": path,
            "learner_state": str(recovery.learner_path) if recovery else None,
            "temperature": 1.0,
            "total_steps": 100,
            "seed": 1,
            "rank": 1,
            "folder": str(self.folder),
            "join_timeout_s": JOIN_TIMEOUT_S,
        }
        (self.folder / "settings.json").write_text(json.dumps(settings))
        self.log = self.folder / "log"
        with self.log.open("w") as log:
            self.other = subprocess.Popen(
                [sys.executable, "-m", "areal_sub.learner", str(self.folder / "settings.json")],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
            )
        config = ActorConfig.model_validate(actor)
        self.learner = Learner.load(
            config,
            path=path,
            temperature=1.0,
            total_steps=100,
            seed=1,
            place=RankPlace(0, 2, self.folder, JOIN_TIMEOUT_S, config.rank_timeout_s),
        )
        if recovery is not None:
            self.learner.load_state_dict(recovery.learner_state)

    def end(self) -> None:
        assert self.other.stdin is not None
        self.other.stdin.close()
        assert self.other.wait(60.0) == 0, self.log.read_text()
        self.learner.close()


@pytest.fixture
def start_pair(model_folder: Path) -> Iterator[Callable[..., Pair]]:
    pairs: list[Pair] = []

    def start(recovery: Recovery | None = None, **options: Any) -> Pair:
        pairs.append(Pair(model_folder, recovery, **options))
        return pairs[-1]

    yield start
    for pair in pairs:
        if pair.other.poll() is None:
            pair.other.kill()
        pair.other.wait()
        assert pair.other.stdin is not None
        pair.other.stdin.close()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def assert_same_step(got: Any, expected: Any) -> None:
    for name in ("loss", "grad_norm", "clip_fraction", "masked_share", "ratio_max", "weight",
                 "kl_ref", "entropy", "logprob_delta_max"):  # fmt: skip
        assert getattr(got, name) == pytest.approx(getattr(expected, name), rel=1e-4, abs=1e-6), (
            name
        )
    for name in ("num_trained_tokens", "num_micro_batches", "num_input_tokens", "num_samples"):
        assert getattr(got, name) == getattr(expected, name), name


def exported(learner: Learner, path: Path) -> dict[str, torch.Tensor]:
    learner.export_weights(path, "float32")
    return dict(load_file(path))


def assert_same_weights(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name in got:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-5, msg=name)


def recovered(folder: Path) -> Recovery:
    recovery = load_recovery(folder)
    assert recovery is not None
    return recovery


def test_two_processes_learn_as_one_and_go_on_as_one_and_back(
    start_pair: Callable[..., Pair], load_learner: Any, groups: Any, tmp_path: Path
) -> None:
    one = load_learner(**OPTIONS)
    expected = [one.step(groups) for _ in range(2)]
    save_recovery(tmp_path / "one", one, {})
    assert expected[0].masked_share > 0 and expected[0].num_micro_batches > 4

    pair = start_pair(**OPTIONS)
    for each in expected:
        assert_same_step(pair.learner.step(groups), each)
    assert_same_weights(exported(pair.learner, tmp_path / "a"), exported(one, tmp_path / "b"))
    save_recovery(tmp_path / "two", pair.learner, {})
    pair.learner.save_pretrained(tmp_path / "final", str(pair.learner._actor.path))
    assert json.loads((tmp_path / "final" / "config.json").read_text())["architectures"] == [
        "LlamaForCausalLM"
    ]
    pair.end()
    expected_next = one.step(groups)

    # Two ranks → one.
    recovery = recovered(tmp_path / "two")
    restored = Learner.load(
        one._actor, path=str(recovery.model_path), temperature=1.0, total_steps=100, seed=1
    )
    restored.load_state_dict(recovery.learner_state)
    assert restored.num_steps == 2
    assert_same_step(restored.step(groups), expected_next)
    # One rank → two.
    pair = start_pair(recovered(tmp_path / "one"), **OPTIONS)
    assert_same_step(pair.learner.step(groups), expected_next)
    assert_same_weights(exported(pair.learner, tmp_path / "c"), exported(one, tmp_path / "d"))
    pair.end()


@pytest.mark.parametrize("sign", [signal.SIGSTOP, signal.SIGKILL])
def test_a_rank_that_hangs_or_dies_ends_the_step_by_its_name(
    start_pair: Callable[..., Pair], groups: Any, sign: signal.Signals
) -> None:
    pair = start_pair(rank_timeout_s=3.0)
    os.kill(pair.other.pid, sign)
    with pytest.raises(LearnerRankError, match=r"rank 1 did not get past '"):
        pair.learner.step(groups)


def test_a_rank_that_does_not_come_is_named(model_folder: Path, tmp_path: Path) -> None:
    actor = ActorConfig(path=str(model_folder), dtype="float32", device="cpu", num_processes=2)
    with pytest.raises(LearnerRankError, match="rank 1 did not get past 'starting'"):
        Learner.load(
            actor, path=actor.path, temperature=1.0, total_steps=1, seed=1,
            place=RankPlace(0, 2, tmp_path, 0.1, 0.1),
        )  # fmt: skip
