"""A whole run that trains an adapter, from a recovery point on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from e2e_run import Run
from safetensors.torch import load_file

from areal_sub.config.schema import ActorConfig
from areal_sub.learner.checkpoint import save_recovery
from areal_sub.learner.learner import Learner
from areal_sub.trajectory.resume import RunPosition

pytestmark = pytest.mark.runs

BATCH_SIZE = 2


def test_an_adapter_goes_on_from_its_recovery_point(
    start_run: Callable[..., Run], policy: Path, short_tmp: Path
) -> None:
    """The point is made here, so that one run shows both: going on, and two steps."""
    actor = {"path": str(policy), "dtype": "float32", "device": "cpu", "lora": {"rank": 4}}
    learner = Learner.load(
        ActorConfig.model_validate(actor), path=str(policy), temperature=1.0, total_steps=3, seed=1
    )
    torch.manual_seed(7)
    for group in learner.optimizer.param_groups:
        for weights in group["params"]:
            torch.nn.init.normal_(weights, std=0.05)
    position = RunPosition(version=1, num_started=BATCH_SIZE)
    save_recovery(short_tmp / "runs/e2e/run/recover", learner, position.to_map())

    run = start_run(
        *("actor.lora.rank=4", "recover.mode=auto", "recover.freq_steps=1", "valid_dataset=null"),
        *("rollout.max_head_offpolicyness=0", f"train_dataset.batch_size={BATCH_SIZE}"),
        "total_train_steps=3",
    )
    output = run.finish()
    assert run.process.returncode == 0, output
    assert "LoRA of rank 4" in output and "going on from step 1" in output
    rows = [json.loads(line) for line in (run.root / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 3]
    for row in rows:
        # The sampler has the policy of this very step, first that of the recovery point.
        assert row["learner/logprob_delta_mean"] < 1e-5, row["step"]
        print(f"sampler/learner |Δ logprob|: {row['learner/logprob_delta_mean']:.2g}")
    (point,) = (run.root / "recover").iterdir()
    assert sorted(path.name for path in point.iterdir()) == ["learner.pt", "state.json"]
    final = run.root / "checkpoints" / "final"
    merged, base = load_file(final / "model.safetensors"), load_file(policy / "model.safetensors")
    assert merged.keys() == base.keys()
    changed = {name for name in base if not merged[name].equal(base[name])}
    assert changed == {name for name in base if name.endswith("_proj.weight")}
    assert (final / "adapter" / "adapter_config.json").exists()
