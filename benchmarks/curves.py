"""Does it matter for learning who samples? The same run on the embedded engine and on vLLM.

    python -m benchmarks.curves --vllm-python PYTHON [--seeds 1 2 3] [--plot FILE] [--folder FOLDER]
    python -m benchmarks.curves --vllm-python PYTHON --config FILE --steps 20 [KEY=VALUE ...]

The default run, or another. Per seed one whole run with each engine: the same policy, tasks, agent
and seed, children and proxy and all. The engines draw other random numbers, and an asynchronous run
is another each time, so curves of one seed are not equal; they should differ by no more than those
of two seeds of one engine. Runs that `--folder` has already are not made again. Prints both means
per step, the difference between the engines beside the spread between seeds, and the sampler's
distance to the learner at step 1. Exits with 1 where the engines' means of the last five steps
differ by more than `--within`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from statistics import mean, pstdev

from benchmarks.training_run import DEFAULT, rows_of_run

NAME = "curves"
LAST = 5
Curves = dict[str, list[list[float]]]


def plot(curves: Curves, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for color, (engine, runs) in zip(("C0", "C1"), curves.items(), strict=True):
        steps = range(1, len(runs[0]) + 1)
        for rewards in runs:
            axes.plot(steps, rewards, color=color, alpha=0.3, linewidth=1)
        means = [mean(at) for at in zip(*runs, strict=True)]
        of_seeds = f", mean of {len(runs)} seeds" if len(runs) > 1 else ""
        axes.plot(steps, means, color=color, label=f"{engine}{of_seeds}")
    axes.set(xlabel="step", ylabel="mean training reward", ylim=(0, 1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vllm-python", required=True, help="the interpreter that has vLLM")
    parser.add_argument("--config", type=Path, default=DEFAULT)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--within", type=float, default=0.1)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--folder", type=Path, help="where the runs are, and stay")
    parser.add_argument("settings", nargs="*", help="for all runs: actor.optimizer.lr=1e-5 ...")
    arguments = parser.parse_args()
    engines = {
        "embedded": [],
        "vllm": [
            *("engine.type=vllm", f"engine.vllm.python={arguments.vllm_python}"),
            *("engine.num_threads=null", "engine.vllm.args=[--enforce-eager]"),
            "engine.vllm.env={VLLM_CPU_KVCACHE_SPACE: '1'}",
            *("rollout.timeout_s=600.0", "rollout.request_timeout_s=500.0"),
        ],
    }
    curves: Curves = {engine: [] for engine in engines}
    with tempfile.TemporaryDirectory(prefix="as-curves-") as name:
        folder = (arguments.folder or Path(name)).resolve()
        for seed in arguments.seeds:
            for engine, settings in engines.items():
                steps = f"total_train_steps={arguments.steps}"
                settings = [*settings, steps, *arguments.settings]
                trial = f"{engine}-{seed}"
                settings = [f"seed={seed}", *settings]
                rows = rows_of_run(arguments.config.resolve(), folder, NAME, trial, settings)
                rewards = [row["reward/train"] for row in rows]
                held_out = [row["reward/valid"] for row in rows if row.get("reward/valid")]
                shown = f"held out {held_out[-1]:.2f}, " if held_out else ""
                curves[engine].append(rewards)
                distance = rows[0]["learner/logprob_delta_mean"]
                print(
                    f"seed {seed}, {engine}: last {LAST} steps {mean(rewards[-LAST:]):.3f}, "
                    f"{shown}mean |Δ logprob| at step 1 {distance:.1e}, "
                    f"{sum(row['time/step_s'] for row in rows):.0f} s",
                    flush=True,
                )
    print("step  " + "  ".join(f"{engine:>8}" for engine in engines))
    for step in range(arguments.steps):
        means = [mean(run[step] for run in runs) for runs in curves.values()]
        print(f"{step + 1:4d}  " + "  ".join(f"{each:8.3f}" for each in means))
    ends = {e: [mean(run[-LAST:]) for run in runs] for e, runs in curves.items()}
    difference = abs(mean(ends["embedded"]) - mean(ends["vllm"]))
    spread = max(pstdev(each) for each in ends.values())
    print(
        f"last {LAST} steps: the engines differ by {difference:.3f}, seeds of one by {spread:.3f}"
    )
    if arguments.plot:
        plot(curves, arguments.plot)
    return int(difference > arguments.within)


if __name__ == "__main__":
    sys.exit(main())
