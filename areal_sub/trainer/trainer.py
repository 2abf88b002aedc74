"""`Trainer`: the public face of a run, from configuration to result.

Owns the order of things: check everything that can be checked without starting a process, take the
run's folder, find or make the starting policy, start the processes while the learner loads, run the
loop, and end every process whatever happened. Called by the CLI and by users' own scripts and
notebooks.
"""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar

from areal_sub.config import Config
from areal_sub.errors import ConfigError, RecordError, WriteError
from areal_sub.learner.checkpoint import Recovery, load_recovery
from areal_sub.learner.learner import Learner
from areal_sub.learner.ranks import RankPlace
from areal_sub.schedulers.service import Incident
from areal_sub.trainer.agents import agents_of, check_tasks
from areal_sub.trainer.begun import check_goes_on
from areal_sub.trainer.checkpoints import FINAL
from areal_sub.trainer.datasets import Task, digest_of, load_tasks, tasks_from_rows
from areal_sub.trainer.ledger import Ledger
from areal_sub.trainer.loop import TrainLoop, Workload
from areal_sub.trainer.metrics import MetricsLog
from areal_sub.trainer.models import check_model, model_folder
from areal_sub.trainer.offline import RecordedGroups
from areal_sub.trainer.progress import Progress
from areal_sub.trainer.run_dir import RunDir
from areal_sub.trainer.scratch import scratch_folder
from areal_sub.trainer.status import Status
from areal_sub.trainer.terminal import Terminal
from areal_sub.trainer.wiring import Stack
from areal_sub.trajectory.accounting import Accounting, account, judge_run
from areal_sub.trajectory.resume import RunPosition, finished_rollouts
from areal_sub.trajectory.run_log import read_run

Rows = Iterable[dict[str, Any]]

log = logging.getLogger(__name__)


class Interrupted(Exception):
    """SIGINT or SIGTERM ended the run."""

    def __init__(self, sign: signal.Signals) -> None:
        super().__init__(f"ended by {sign.name}")
        self.sign = sign


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """Where things lie, and how it went."""

    run_folder: Path
    checkpoint: Path | None  # the final one; None where the run ended early
    progress: Progress


class Trainer:
    """Trains the model behind an agent.

    `train_dataset` / `valid_dataset`: rows (JSON-able dicts) to use instead of the configured ones.
    """

    def __init__(
        self,
        config: Config,
        train_dataset: Rows | None = None,
        valid_dataset: Rows | None = None,
    ) -> None:
        self._config = config
        self._train_rows = train_dataset
        self._valid_rows = valid_dataset

    def train(
        self,
        workflow: Any = None,
        eval_workflow: Any = None,
        workflow_kwargs: dict[str, Any] | None = None,
    ) -> TrainResult:
        """Run to the end. `workflow`: an import path, or the agent itself (function or class).

        Raises `ConfigError`, `TaskError`, `WorkflowError`, `ModelError`, `CheckpointError` before
        anything is started; `ComponentDied`, `DeadlineExceeded`, `Interrupted` in mid-run.
        """
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            pass  # and not the training: each of its errors would be told with this one
        else:  # a notebook's event loop is running in this thread: take another one
            return _in_new_thread(lambda: self._train(workflow, eval_workflow, workflow_kwargs))
        return self._train(workflow, eval_workflow, workflow_kwargs)

    def _train(
        self, workflow: Any, eval_workflow: Any, workflow_kwargs: dict[str, Any] | None
    ) -> TrainResult:
        config = self._config
        if (here := str(Path.cwd())) not in sys.path:
            sys.path.append(here)  # import paths are looked up from where the user stands, too
        tasks, valid_tasks = self._tasks()
        num_steps = _num_steps(config, len(tasks))
        disable_progress_bar()  # of loading and saving: the run shows its own progress
        terminal = Terminal()
        agents, eval_agents = agents_of(
            config, workflow, eval_workflow, workflow_kwargs, say=terminal.say
        )
        check_tasks(agents, tasks, Path.cwd())
        check_tasks(eval_agents, valid_tasks, Path.cwd())
        check_model(config.actor)  # before an earlier run of this name is moved aside
        run = RunDir.open(config)
        tasks_digest = digest_of(tasks)
        try:
            notes = check_goes_on(config, run, tasks_digest, from_file=self._trains_on_a_file())
            run.write_config(config)
        except BaseException:
            run.close()
            raise
        progress = Progress(num_steps=num_steps)
        try:
            terminal.header(config, run, num_tasks=len(tasks), num_valid=len(valid_tasks))
            for note in notes:
                terminal.say(note)
            base = model_folder(config.actor, seed=config.seed, say=terminal.say)
            recovery = load_recovery(run.recover) if config.recover.mode == "auto" else None
            workload = Workload(
                agents=agents,
                eval_agents=eval_agents,
                tasks=tasks,
                valid_tasks=valid_tasks,
                tokenizer_path=config.tokenizer_path or str(base),
                num_steps=num_steps,
                tasks_digest=tasks_digest,
            )
            with terminal.live(progress):
                _run_interruptible(_run(config, workload, run, base, recovery, progress, terminal))
        finally:
            run.close()
            progress.accounting = _accounting(run)
            _summarize(terminal, run, progress)
        final = run.checkpoints / FINAL
        return TrainResult(
            run_folder=run.root, checkpoint=final if final.exists() else None, progress=progress
        )

    def _trains_on_a_file(self) -> bool:
        dataset = self._config.train_dataset
        return self._train_rows is None and dataset is not None and Path(dataset.path).is_file()

    def _tasks(self) -> tuple[list[Task], list[Task]]:
        config = self._config
        if self._train_rows is not None:
            tasks = tasks_from_rows(self._train_rows, name="train_dataset")
        elif config.train_dataset is not None:
            tasks = load_tasks(config.train_dataset, seed=config.seed)
        else:
            raise ConfigError("no tasks: set train_dataset.path, or pass train_dataset=...")
        valid: list[Task] = []
        if self._valid_rows is not None:
            valid = tasks_from_rows(self._valid_rows, name="valid_dataset")
        elif config.valid_dataset is not None:
            valid = load_tasks(config.valid_dataset, seed=config.seed)
        return list(tasks), list(valid)


async def _run(
    config: Config,
    workload: Workload,
    run: RunDir,
    base: Path,
    recovery: Recovery | None,
    progress: Progress,
    terminal: Terminal,
) -> None:
    position = RunPosition()
    if recovery is not None:
        assert config.train_dataset is not None
        batch_size = config.train_dataset.batch_size
        position = RunPosition.from_map(recovery.extra, batch_size=batch_size)
    version = position.version
    recorded: RecordedGroups | None = None
    if (source := config.rollout.replay_from) is not None:
        recorded = RecordedGroups(Path(source), config.gconfig.n_samples)
        terminal.say(f"training from the {len(recorded)} groups of {source}")
        if recorded.num_left_out:
            terminal.say(f"note: {recorded.num_left_out} more lack rollouts, and are left out")
    finished, damage = finished_rollouts(read_run(run.journals), position)
    for problem in damage:
        terminal.say(f"note: {problem}")
    if num := sum(map(len, finished.values())):
        terminal.say(f"{num} rollouts of earlier attempts have ended and are yet to be trained")
    # A recovery point of an adapter has none: its base is where the run began.
    model_path = str((recovery and recovery.model_path) or base)
    if recovery is not None:
        terminal.say(f"going on from step {version} ({recovery.folder})")
    learner_thread = ThreadPoolExecutor(1, thread_name_prefix="learner")
    meeting = ExitStack()
    meeting_folder = meeting.enter_context(scratch_folder(Path(tempfile.gettempdir())))
    metrics = MetricsLog(run, config.stats_logger, first_step=version + 1)
    ledger = Ledger(
        run.ledger, config, policy_version=version, tokenizer_path=workload.tokenizer_path
    )
    ended, why = "failed", ""
    progress.rows, progress.step, progress.went_on_from = metrics.rows, version, version
    progress.now("starting engine, proxy and pool")

    def load_learner() -> Learner:
        learner = Learner.load(
            config.actor,
            path=model_path,
            temperature=config.gconfig.temperature,
            total_steps=workload.num_steps,
            seed=config.seed,
            place=_place(config, meeting_folder),
        )
        if recovery is not None:
            learner.load_state_dict(recovery.learner_state)
            recovery.restore_rng()
        return learner

    def on_incident(incident: Incident) -> None:
        progress.incidents.append(incident)
        terminal.say(str(incident))
        try:
            with run.incidents.open("a") as lines:
                lines.write(json.dumps(asdict(incident)) + "\n")
        except OSError as error:
            raise WriteError(f"cannot write {run.incidents}: {error}") from error

    try:
        loading = asyncio.get_running_loop().run_in_executor(learner_thread, load_learner)
        async with Stack.start(
            config,
            model_path=model_path,
            lasting_model_path=str(base),
            tokenizer_path=workload.tokenizer_path,
            # With an adapter, the engine begins with its base, and is given the policy then.
            policy_version=version - 1 if config.actor.lora else version,
            journal=run.journal,
            logs=run.logs,
            on_incident=on_incident,
            status=Status(describe=progress.to_status, noted=run.sockets),
            followers=_followers(config, meeting_folder, model_path, recovery, workload.num_steps),
        ) as stack:
            learner = await stack.guard(_awaited(loading))
            if stack.sandbox:
                terminal.say(f"  sandbox    {stack.sandbox}")
            agents = (*workload.agents.agents, *workload.eval_agents.agents)
            for note in await stack.guard(stack.warm(agents)):
                terminal.say(f"note: {note}")
            if stack.rollouts.grader is not None:
                for note in await stack.guard(stack.rollouts.grader.warm()):
                    terminal.say(f"note: the grader: {note}")
            loop = TrainLoop(
                config,
                workload,
                run,
                stack,
                learner,
                learner_thread,
                metrics,
                progress,
                ledger,
                position=position,
                finished=finished,
                recorded=recorded,
            )
            await stack.guard(loop.train())
        learner.close()  # when its other processes have ended
        ended = "done"
    except asyncio.CancelledError:
        ended = "interrupted"
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise
    finally:
        metrics.close()
        learner_thread.shutdown(wait=False, cancel_futures=True)
        meeting.close()
        _close_ledger(ledger, ended, why)


def _place(config: Config, folder: Path) -> RankPlace | None:
    """The trainer's own place in a learner of several processes."""
    actor = config.actor
    if actor.num_processes == 1:
        return None
    return RankPlace(
        rank=0,
        num_ranks=actor.num_processes,
        folder=folder,
        join_timeout_s=config.rollout.setup_timeout_s,
        timeout_s=actor.rank_timeout_s,
    )


def _followers(
    config: Config, folder: Path, model_path: str, recovery: Recovery | None, num_steps: int
) -> list[dict[str, Any]]:
    """Settings of `areal_sub.learner` for each process but the trainer's."""
    return [
        {
            "actor": config.actor.model_dump(),
            "model_path": model_path,
            "learner_state": str(recovery.learner_path) if recovery else None,
            "temperature": config.gconfig.temperature,
            "total_steps": num_steps,
            "seed": config.seed,
            "rank": rank,
            "folder": str(folder),
            "join_timeout_s": config.rollout.setup_timeout_s,
        }
        for rank in range(1, config.actor.num_processes)
    ]


def _accounting(run: RunDir) -> Accounting:
    """Of all attempts of the run. Nothing that is wrong with its files may hide how it ended."""
    try:
        attempts = read_run(run.journals)
        return account(attempts, judge_run(attempts))
    except Exception as error:
        return Accounting(num_started=0, fates={}, problems=(f"it cannot be checked: {error}",))


def _summarize(terminal: Terminal, run: RunDir, progress: Progress) -> None:
    """Nothing that is wrong with it may hide how the run ended, either."""
    try:
        terminal.summary(run, progress)
    except Exception:
        log.exception("the summary of the run failed")


def _close_ledger(ledger: Ledger, ended: str, why: str) -> None:
    try:
        ledger.close(ended, why)
    except RecordError as error:
        if ended == "done":
            raise
        log.warning("%s", error)  # what ended the run is on its way


async def _awaited(future: asyncio.Future[Learner]) -> Learner:
    return await future


def _num_steps(config: Config, num_tasks: int) -> int:
    batch_size = config.train_dataset.batch_size if config.train_dataset else 8
    if config.total_train_steps is not None:
        return config.total_train_steps
    return max(1, config.total_train_epochs * num_tasks // batch_size)


def _run_interruptible(work: Any) -> None:
    """`asyncio.run`, where the first SIGINT or SIGTERM cancels the work, which then ends every
    process it had started. Raises `Interrupted` for it."""
    received: list[signal.Signals] = []

    async def main() -> None:
        task = asyncio.ensure_future(work)
        loop = asyncio.get_running_loop()
        if threading.current_thread() is threading.main_thread():
            for sign in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(sign, _on_signal, sign, task, received)
        await task

    try:
        asyncio.run(main())
    except asyncio.CancelledError:
        if received:
            raise Interrupted(received[0]) from None
        raise


def _on_signal(
    sign: signal.Signals, task: asyncio.Task[None], received: list[signal.Signals]
) -> None:
    if not received:  # a second one must not cut the ending of the processes short
        received.append(sign)
        task.cancel()


def _in_new_thread(work: Callable[[], TrainResult]) -> TrainResult:
    with ThreadPoolExecutor(1, thread_name_prefix="trainer") as thread:
        return thread.submit(work).result()
