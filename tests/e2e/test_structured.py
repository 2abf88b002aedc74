"""An agent that asks for JSON and for a tool call: its answers are such, and are trained."""

from __future__ import annotations

import json
import os
from collections.abc import Callable

import pytest
from e2e_run import Run

from areal_sub.records import TurnRecord, decode_record
from areal_sub.trajectory.journal import read_journal

VLLM = pytest.param("vllm", marks=[pytest.mark.vllm, pytest.mark.timeout(1000)])


@pytest.mark.parametrize("engine", ["embedded", VLLM])
def test_structured_answers_hold_and_are_trained(
    start_run: Callable[..., Run], engine: str
) -> None:
    settings = ["workflow=agents_under_test.structured", "gconfig.max_new_tokens=300"]
    if engine == "vllm":
        settings += [
            *("engine.type=vllm", "engine.num_threads=null", "engine.vllm.args=[--enforce-eager]"),
            f"engine.vllm.python={os.environ['AREAL_SUB_VLLM_PYTHON']}",
            "engine.vllm.env={VLLM_CPU_KVCACHE_SPACE: '1'}",
            *("rollout.timeout_s=600.0", "rollout.request_timeout_s=500.0"),
        ]
    run = start_run(*settings, "valid_dataset=null", "rollout.max_head_offpolicyness=0")
    output = run.finish(900.0 if engine == "vllm" else 300.0)
    assert run.process.returncode == 0, output
    assert "tokens sampled verbatim, 0 masked" in output
    rows = [json.loads(line) for line in (run.root / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    # Of the whole distribution on both sides, though what was sampled from was masked.
    assert rows[0]["learner/logprob_delta_mean"] < 1e-4
    (journal,) = (run.root / "journal").glob("*.journal")
    records = [decode_record(raw) for _, raw in read_journal(journal)]
    turns = [record for record in records if isinstance(record, TurnRecord)]
    assert turns and all(turn.constrained for turn in turns)
    (counts,) = [line for line in output.splitlines() if line.lstrip().startswith("rollouts ")]
    assert counts.split()[2] == "completed" and "failed" not in counts
