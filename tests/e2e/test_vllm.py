"""The default agent trains through a real vLLM that is killed in between: `make test-vllm`."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import psutil
import pytest
from e2e_run import REPO, Run

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(2000)]

WAIT_S = 900.0  # vLLM starts twice, on a busy machine


@pytest.mark.parametrize("trained", [[], ["actor.lora.rank=8"]], ids=["weights", "adapter"])
def test_the_default_agent_trains_and_a_killed_server_does_not_end_the_run(
    policy: Path, short_tmp: Path, trained: list[str]
) -> None:
    python = os.environ["AREAL_SUB_VLLM_PYTHON"]
    run = Run(
        short_tmp,
        policy,
        *("experiment_name=e2e", "trial_name=run", "total_train_steps=3"),
        *("gconfig.n_samples=4", "train_dataset.batch_size=4", "valid_dataset=null"),
        *("rollout.timeout_s=900.0", "rollout.request_timeout_s=800.0"),
        *("engine.type=vllm", "engine.num_threads=null", f"engine.vllm.python={python}"),
        *trained,
        *("engine.vllm.args=[--enforce-eager]", "engine.vllm.env={VLLM_CPU_KVCACHE_SPACE: '1'}"),
        config=REPO / "examples/proxy/config.yaml",
        cwd=REPO,
    )
    try:
        metrics = run.root / "metrics.jsonl"
        run.wait_until(
            lambda: (
                run.process.poll() is not None
                or (metrics.exists() and metrics.read_text().count("\n") >= 1)
            ),
            "first step",
            WAIT_S,
        )
        assert run.process.poll() is None, run.output.read_text()
        run.note_family()
        (engine,) = (
            process
            for process in psutil.Process(run.process.pid).children()
            if "areal_sub.engines.vllm" in process.cmdline()
        )
        (server,) = engine.children()
        server.send_signal(signal.SIGKILL)
        output = run.finish(WAIT_S)
    finally:
        if run.process.poll() is None:
            run.process.kill()
            run.process.wait()
    log = (run.root / "logs" / "engine.log").read_text()
    assert run.process.returncode == 0, output + log[-4000:]
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert "tokens sampled verbatim, 0 masked" in output
    differences = [row["learner/logprob_delta_mean"] for row in rows]
    print(f"sampler/learner mean |Δ logprob| per step: {differences}")
    # Step 1 trains on the policy that sampled; later ones may be a version behind.
    assert differences[0] < 1e-4
    assert "bringing it back" in log
    assert not run.survivors()
