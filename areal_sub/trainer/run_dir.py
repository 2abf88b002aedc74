"""The folder of one run, and who may use it.

    fileroot/experiment_name/trial_name/
        config.yaml      the resolved configuration of the latest attempt
        lock             held by the running trainer
        journal/         records, one file per attempt (`0001.journal`, ...), and what the trainer
                         did with each rollout (`0001.ledger`)
        logs/            engine, proxy, supervisor
        sockets          while it runs: the folder of its processes' sockets, for `areal-sub status`
        incidents.jsonl  one line per process of ours that ended while it was needed
        recover/         recovery points          checkpoints/   HF folders: step_N, final
        metrics.jsonl    one line per step        tensorboard/   the same for TensorBoard
        reward.png       the reward curve

Nothing is overwritten: a new run under a name that is taken moves the old folder aside.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import IO

from areal_sub.config import Config
from areal_sub.config.load import dump_config
from areal_sub.errors import ConfigError


class RunDir:
    """Paths of a run. Make it with `RunDir.open(config)`; `close` gives the lock back."""

    def __init__(self, root: Path, lock: IO[str], moved_to: Path | None) -> None:
        self.root = root
        self.moved_to = moved_to
        self._lock = lock
        self.journals.mkdir(exist_ok=True)
        self.logs.mkdir(exist_ok=True)
        self.attempt = 1 + max((int(p.stem) for p in self.journals.glob("[0-9]*.*")), default=0)

    @classmethod
    def open(cls, config: Config) -> RunDir:
        """What earlier attempts left in it is as it was, their `config.yaml` too.

        Raises `ConfigError` where another trainer is using this run's folder, or where it cannot be
        written.
        """
        root = Path(config.cluster.fileroot).resolve() / config.experiment_name / config.trial_name
        try:
            return cls._open(root, config)
        except OSError as error:
            raise ConfigError(
                f"cluster.fileroot: the run's folder cannot be made: {error}"
            ) from None

    @classmethod
    def _open(cls, root: Path, config: Config) -> RunDir:
        root.mkdir(parents=True, exist_ok=True)
        lock = _lock(root)
        moved_to = None
        if config.recover.mode == "disabled" and any(p.name != "lock" for p in root.iterdir()):
            moved_to = _free_name(root)
            root.rename(moved_to)
            lock.close()
            root.mkdir()
            lock = _lock(root)
        try:
            return cls(root, lock, moved_to)
        except OSError:
            lock.close()
            raise

    def write_config(self, config: Config) -> None:
        """In place of the earlier attempt's. Raises `ConfigError`."""
        try:
            self.config.write_text(dump_config(config))
        except OSError as error:
            raise ConfigError(f"the run's folder: cannot write {self.config}: {error}") from None

    def close(self) -> None:
        self._lock.close()

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def journals(self) -> Path:
        return self.root / "journal"

    @property
    def journal(self) -> Path:
        """This attempt's."""
        return self.journals / f"{self.attempt:04d}.journal"

    @property
    def ledger(self) -> Path:
        """This attempt's."""
        return self.journals / f"{self.attempt:04d}.ledger"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def sockets(self) -> Path:
        return self.root / "sockets"

    @property
    def incidents(self) -> Path:
        return self.root / "incidents.jsonl"

    @property
    def recover(self) -> Path:
        return self.root / "recover"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.root / "tensorboard"

    @property
    def plot(self) -> Path:
        return self.root / "reward.png"


def _lock(root: Path) -> IO[str]:
    lock = (root / "lock").open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        pid = lock.read().strip()
        lock.close()
        raise ConfigError(
            f"{root} is in use by another trainer (process {pid}); "
            "choose another trial_name=... or wait for it to end"
        ) from None
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    return lock


def _free_name(root: Path) -> Path:
    number = 1
    while (aside := root.with_name(f"{root.name}.{number}")).exists():
        number += 1
    return aside
