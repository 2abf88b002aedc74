"""Recovery points: bitwise continuation, damage by name, and interruption at every moment."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from areal_sub.errors import CheckpointError
from areal_sub.learner.checkpoint import load_recovery, newest_extra, save_recovery


def weights(learner: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in learner._policy.hf.named_parameters()}


@pytest.mark.parametrize(
    "options", [{"ppo_n_minibatches": 2}, {"dtype": "bfloat16", "kl_ctl": 0.1}], ids=str
)
def test_a_restored_learner_goes_on_bit_by_bit(
    load_learner: Any, model_folder: Path, groups: Any, tmp_path: Path, options: dict[str, Any]
) -> None:
    options = options | {
        "optimizer": {"lr": 1e-2, "weight_decay": 0.1, "lr_scheduler_type": "cosine"}
    }
    learner = load_learner(**options)
    for _ in range(3):
        learner.step(groups)
    save_recovery(tmp_path, learner, {"version": 3})
    expected = [learner.step(groups) for _ in range(2)]

    recovery = load_recovery(tmp_path)
    assert recovery is not None and recovery.extra == {"version": 3}
    # `path` in the actor's config stays the start: the reference is loaded from there.
    restored = load_learner(**options | {"path": str(model_folder)})
    restored = type(restored).load(
        restored._actor,
        path=str(recovery.model_path),
        temperature=1.0,
        total_steps=100,
        seed=1,
    )
    restored.load_state_dict(recovery.learner_state)
    assert restored.num_steps == 3
    got = [restored.step(groups) for _ in range(2)]

    assert [s.loss for s in got] == [s.loss for s in expected]
    assert [s.kl_ref for s in got] == [s.kl_ref for s in expected]
    first, second = weights(learner), weights(restored)
    assert all(torch.equal(first[n], second[n]) for n in first)


def test_random_generators_are_restored(load_learner: Any, tmp_path: Path) -> None:
    learner = load_learner()
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    random.gauss(0, 1), np.random.standard_normal()  # leaves half of a pair in each
    save_recovery(tmp_path, learner, {})
    expected = (random.gauss(0, 1), np.random.standard_normal(), torch.rand(()).item())
    recovery = load_recovery(tmp_path)
    assert recovery is not None
    recovery.restore_rng()
    learner.load_state_dict(recovery.learner_state)
    assert (random.gauss(0, 1), np.random.standard_normal(), torch.rand(()).item()) == expected


def test_the_newest_counts_and_older_ones_go(load_learner: Any, tmp_path: Path) -> None:
    assert load_recovery(tmp_path / "none") is None
    learner = load_learner()
    for position in range(4):
        save_recovery(tmp_path, learner, {"position": position}, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["recovery-000002", "recovery-000003"]
    recovery = load_recovery(tmp_path)
    assert recovery is not None and recovery.extra == {"position": 3}


@pytest.mark.parametrize(
    "name", ["learner.pt", "state.json", "model/model.safetensors", "model/config.json"]
)
@pytest.mark.parametrize("damage", ["truncated", "flipped", "gone"])
def test_damage_is_an_error_that_names_the_file(
    load_learner: Any, tmp_path: Path, name: str, damage: str
) -> None:
    point = save_recovery(tmp_path, load_learner(), {})
    path = point / name
    raw = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(raw[: len(raw) // 2])
    else:
        raw[len(raw) // 2] ^= 0xFF
        path.write_bytes(raw)
    with pytest.raises(CheckpointError, match="recovery point damaged") as caught:
        load_recovery(tmp_path)
    assert str(path) in str(caught.value)
    assert str(caught.value).endswith(
        ". There is no earlier one: choose another trial_name, or set recover.mode=disabled to "
        "start anew"
    )


def test_damage_says_what_to_remove_where_an_earlier_point_is_left(
    load_learner: Any, tmp_path: Path
) -> None:
    learner = load_learner()
    save_recovery(tmp_path, learner, {"position": 0}, keep=2)
    point = save_recovery(tmp_path, learner, {"position": 1}, keep=2)
    os.truncate(point / "model" / "model.safetensors", 100)
    with pytest.raises(CheckpointError) as caught:
        load_recovery(tmp_path)
    advice = f"Remove the folder {point} to go on from the earlier recovery-000000, or set "
    assert advice in str(caught.value)
    shutil.rmtree(point)
    recovery = load_recovery(tmp_path)
    assert recovery is not None and recovery.extra == newest_extra(tmp_path) == {"position": 0}


def test_another_releases_format_is_refused(load_learner: Any, tmp_path: Path) -> None:
    path = save_recovery(tmp_path, load_learner(), {}) / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    with pytest.raises(CheckpointError, match="format 99"):
        load_recovery(tmp_path)


def test_another_models_state_is_refused(
    load_learner: Any, make_llama: Any, groups: Any, tmp_path: Path
) -> None:
    learner = load_learner()
    learner.step(groups)
    other = load_learner(path=make_llama(tmp_path / "other", num_hidden_layers=1))
    with pytest.raises(CheckpointError, match="does not fit this model"):
        other.load_state_dict(learner.state_dict())
    with pytest.raises(CheckpointError, match="does not fit this model"):
        other.load_state_dict({"optimizer": {}})


_KILLED_WHILE_SAVING = '''
"""Save a second recovery point over and over, each time killed one file operation later."""
import os, signal, sys
from pathlib import Path

import torch

torch.set_num_threads(1)
from areal_sub.config.schema import ActorConfig
from areal_sub.learner.checkpoint import load_recovery, save_recovery
from areal_sub.learner.learner import Learner

model, root = sys.argv[1], Path(sys.argv[2])
actor = ActorConfig(path=model, dtype="float32", device="cpu")
learner = Learner.load(actor, path=model, temperature=1.0, total_steps=1, seed=1)
save_recovery(root, learner, {"position": 0})

CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"}
before, num_kept, num_committed = 0, 0, 0
for moment in range(1000):
    pid = os.fork()
    if pid == 0:
        left = moment

        def hook(event, args):
            global left
            change = event in CHANGES or event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR)
            if change and str(root) in str(args[0]):
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        save_recovery(root, learner, {"position": moment + 1})
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    position = load_recovery(root).extra["position"]
    assert position in (before, moment + 1), (position, before, moment)
    if status == 0:
        assert position == moment + 1
        break
    assert status == -signal.SIGKILL, status
    num_kept += position == before
    num_committed += position == moment + 1
    assert not (num_committed and position == before), "uncommitted after a later moment"
    before = position
print(num_kept, num_committed)
save_recovery(root, learner, {})
print(*sorted(p.name for p in root.iterdir()))
'''


def test_a_save_that_is_killed_at_any_moment_leaves_the_earlier_point(
    model_folder: Path, tmp_path: Path
) -> None:
    """Real kills, at each file operation of the save in turn."""
    done = subprocess.run(
        [sys.executable, "-c", _KILLED_WHILE_SAVING, str(model_folder), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    moments, names = done.stdout.splitlines()
    num_kept, num_committed = map(int, moments.split())
    assert num_kept > 10  # killed before the rename: the earlier point
    assert num_committed > 2  # killed while tidying up after it: the new one
    # Nothing of the killed ones is left.
    assert len(names.split()) == 1 and names.startswith("recovery-")
