"""What asynchronous training gains where rollouts take long now and then.

    python -m benchmarks.asynchrony [--only stub|real] [--num-updates 100] [--json FILE]

Wall time to N updates and the reward reached: synchronous, and with `max_head_offpolicyness` 1, 2
and 4, one after the other in one run. `stub`: the real controller over waits (`async_stub.py`).
`real`: whole runs of the default configuration, with the embedded engine, children and learner,
whose agent waits before its turns as for a slow tool (`slow_tools.py`).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from benchmarks import async_stub
from benchmarks.async_stub import REACHED, Outcomes

ROOT = Path(__file__).parents[1]
OFFPOLICYNESS = (0, 1, 2, 4)
RUN_TIMEOUT_S = 1800.0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", choices=("stub", "real"))
    parser.add_argument("--num-updates", type=int, default=100, help="of the stub")
    parser.add_argument("--num-real-updates", type=int, default=10)
    parser.add_argument("--policy", type=Path, help="a model folder to start the real case from")
    parser.add_argument("--median-s", type=float, default=3.0, help="wait of the real case's agent")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    tables: dict[str, dict[str, Outcomes]] = {}
    if args.only != "real":
        # What a synchronous batch takes to sample, with a learner that takes no time.
        sampling_s = stub_run(args, eta=0, learning_s=0.0).wall_s / args.num_updates
        tables["stub"] = {
            name: stub_run(args, eta=eta, learning_s=sampling_s / 3, keeps_stale=keeps_stale)
            for name, eta, keeps_stale in (
                *((_name(eta), eta, False) for eta in OFFPOLICYNESS),
                ("4, over-stale kept", 4, True),
            )
        }
        show("stub (seconds of a virtual clock)", tables["stub"])
    if args.only != "stub":
        with tempfile.TemporaryDirectory(prefix="asy-") as folder:
            tables["real"] = {
                _name(eta): real_run(Path(folder), eta, args) for eta in OFFPOLICYNESS
            }
        show("real", tables["real"])
    if args.json:
        rows = {case: {k: asdict(v) for k, v in table.items()} for case, table in tables.items()}
        args.json.write_text(json.dumps(rows, indent=2) + "\n")


def stub_run(
    args: argparse.Namespace, *, eta: int, learning_s: float, keeps_stale: bool = False
) -> Outcomes:
    return async_stub.run_virtually(
        async_stub.run(
            offpolicyness=eta,
            num_updates=args.num_updates,
            learning_s=learning_s,
            seed=args.seed,
            keeps_stale=keeps_stale,
        )
    )


def _name(eta: int) -> str:
    return str(eta) if eta else "synchronous"


def real_run(folder: Path, eta: int, args: argparse.Namespace) -> Outcomes:
    """One `areal-sub train`; the time is from its first step's begin to its last one's end."""
    command = [sys.executable, "-m", "areal_sub", "train"]
    command += ["--config", "examples/proxy/config.yaml", f"cluster.fileroot={folder}/runs"]
    command += [f"trial_name=eta-{eta}", f"rollout.max_head_offpolicyness={eta}"]
    command += ["workflow=benchmarks.slow_tools.SlowToolAgent", f"seed={args.seed}"]
    command += [f"workflow_kwargs={{max_turns: 3, median_s: {args.median_s}}}"]
    command += ["eval_workflow=areal_sub.workflow.openai.math_agent.MathToolAgent"]
    command += [f"rollout.max_concurrent_rollouts={64 * (eta + 1)}", "train_dataset.batch_size=8"]
    command += ["rollout.timeout_s=120", f"total_train_steps={args.num_real_updates}"]
    command += ["valid_dataset=null", "saver.freq_steps=null"]
    if args.policy:
        command += [f"actor.path={args.policy.resolve()}"]
    started_at = time.monotonic()
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=RUN_TIMEOUT_S
    )
    if done.returncode:
        raise SystemExit(f"the run with offpolicyness {eta} failed:\n{done.stdout}{done.stderr}")
    path = folder / "runs" / "calculator" / f"eta-{eta}" / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    last = rows[-3:]
    outcomes = Outcomes(
        wall_s=sum(row["time/step_s"] for row in rows),
        reward=sum(row["reward/train"] for row in last) / len(last),
        reached_s=None,
        num_dropped=round(sum(row["batch/num_stale_dropped"] for row in rows)),
        mean_age=sum(row["staleness/mean"] for row in rows) / len(rows),
    )
    # These take long: what is known is said.
    print(f"{eta}: {outcomes}, {time.monotonic() - started_at:.0f} s whole", file=sys.stderr)
    return outcomes


def show(case: str, table: dict[str, Outcomes]) -> None:
    reference = table["synchronous"]
    head = ("offpolicyness", "wall s", "speed", "reward", f"s to {REACHED}", "mean age", "dropped")
    print(f"\n{case}\n" + ("{:<20}" + "{:>10}" * 6).format(*head))
    for name, row in table.items():
        cells = (
            f"{row.wall_s:.1f}",
            f"{reference.wall_s / row.wall_s:.2f}x",
            f"{row.reward:.3f}",
            "-" if row.reached_s is None else f"{row.reached_s:.1f}",
            f"{row.mean_age:.2f}",
            str(row.num_dropped),
        )
        print(("{:<20}" + "{:>10}" * 6).format(name, *cells))


if __name__ == "__main__":
    main()
