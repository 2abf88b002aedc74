"""What the sandbox costs a run: the loop whole, with its agents sealed and without.

    python -m benchmarks.loop [--pairs 3] [--steps 8] [--config FILE] [KEY=VALUE ...]

The default run, or another: engine, proxy, learner and all, by turns with each rollout in a fresh
sealed child and with its agents in the trainer's own process, where they share one HTTP client.
Prints seconds per step (the first of a run left out) and rollouts per second, and their ratio. See
`rollouts.py` for a rollout by itself, against an engine that takes no time.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import median

from benchmarks.rollouts import goal
from benchmarks.training_run import DEFAULT, rows_of_run

SEALED, INLINE = "sealed children", "inline, shared client"
MODES = {SEALED: "subproc", INLINE: "inline"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--pairs", type=int, default=3, help="runs of each kind, by turns")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--config", type=Path, default=DEFAULT)
    parser.add_argument("settings", nargs="*", help="for all runs: gconfig.n_samples=16 ...")
    args = parser.parse_args()
    settings = [f"total_train_steps={args.steps}", "evaluator.freq_steps=null", *args.settings]
    step_s: dict[str, list[float]] = {name: [] for name in MODES}
    per_s: dict[str, list[float]] = {name: [] for name in MODES}
    with tempfile.TemporaryDirectory(prefix="as-loop-") as name:
        for pair in range(args.pairs):
            for way, mode in MODES.items():
                rows = rows_of_run(
                    args.config.resolve(),
                    Path(name),
                    "loop",
                    f"{mode}-{pair}",
                    [f"rollout.openai.mode={mode}", *settings],
                )[1:]
                total_s = sum(row["time/step_s"] for row in rows)
                step_s[way].append(total_s / len(rows))
                per_s[way].append(sum(row["batch/num_rollouts"] for row in rows) / total_s)
                print(f"{way}: {step_s[way][-1]:.2f} s per step", flush=True)
    print(f"{'way':<26}{'s per step':>12}{'rollouts trained/s':>20}{'to inline':>12}")
    ratios: dict[str, float] = {}
    for way in MODES:
        ratios[way] = median(step_s[way]) / median(step_s[INLINE])
        cells = f"{median(step_s[way]):>12.2f}{median(per_s[way]):>20.1f}{ratios[way]:>12.2f}"
        print(f"{way:<26}{cells}")
    print(goal(SEALED, "x the wall time of a step inline", ratios[SEALED], at_most=1.5))


if __name__ == "__main__":
    main()
