"""Where tasks come from, and in which order they are trained on.

Owns the forms of `train_dataset.path` and the one check that every task passes, whatever it came
from: a task is what an agent in another process gets as `data`, so it is JSON, and bounded. Called
by `trainer.py` (`load_tasks`, `tasks_from_rows`, `digest_of`) and `loop.py` (`TaskOrder`). A
dataset that cannot be used is a `TaskError` before any process is started; libraries are imported
where they are used.
"""

from __future__ import annotations

import difflib
import hashlib
import inspect
import json
import math
import random
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np

from areal_sub.config.schema import DatasetConfig
from areal_sub.errors import TaskError, WorkflowError
from areal_sub.workflow.resolve import resolve_target

MAX_TASKS = 1_000_000  # all are held in memory
MAX_TASK_BYTES = 4 * 2**20  # as JSON; also the longest line of a file
MAX_TASK_VALUES = 100_000
MAX_DEPTH = 32
MAX_TASK_ID_CHARS = 256

REASONING_GYM = "reasoning-gym:"
DEFAULT_REASONING_GYM_SIZE = 500


@dataclass(frozen=True, slots=True)
class Task:
    """One row. `data` is what the agent gets: JSON types only."""

    task_id: str
    data: dict[str, Any]


def load_tasks(config: DatasetConfig, *, seed: int) -> list[Task]:
    """The tasks of a configured dataset, at least one, at most `config.size`.

    `seed` is the run's; what is generated depends on it and on `config.split`. Raises `TaskError`
    naming the dataset, the row (or line) and the field.
    """
    path = config.path
    if path.startswith(REASONING_GYM):
        return tasks_from_rows(_reasoning_gym_rows(config, seed=seed), name=path)
    if Path(path).is_file():
        return _tasks(_jsonl_rows(config), name=path)
    if re.fullmatch(r"[\w.]+:[\w.]+", path):
        return tasks_from_rows(_function_rows(config, seed=seed), name=path)
    return tasks_from_rows(_hub_rows(config), name=path)


def tasks_from_rows(rows: Iterable[Any], *, name: str) -> list[Task]:
    """Rows (dicts of JSON types; numpy's are converted) as tasks.

    `task_id` is the row's own where it has one that is a string, else `name#index`. Raises
    `TaskError` naming index and field.
    """
    return _tasks(((f"{name}, row {index}", row) for index, row in enumerate(rows)), name=name)


def _tasks(rows: Iterable[tuple[str, Any]], *, name: str) -> list[Task]:
    """`rows` are (where it came from, for errors; row)."""
    tasks: list[Task] = []
    for index, (where, row) in enumerate(rows):
        if index == MAX_TASKS:
            raise TaskError(f"{name}: more than {MAX_TASKS:,} tasks: set the dataset's `size`")
        tasks.append(_task(row, where=where, default_id=f"{name}#{index}"))
    if not tasks:
        raise TaskError(f"{name}: the dataset is empty")
    return tasks


def digest_of(tasks: Iterable[Task]) -> str:
    """The same for the same tasks in the same order, wherever they come from."""
    digest = hashlib.sha256()
    for task in tasks:
        digest.update(json.dumps(task.data, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


class TaskOrder:
    """Indices of `num_tasks` tasks for ever, epoch by epoch; each epoch has each index once.

    With `shuffle` every epoch has an order of its own, drawn from `seed` and the epoch's number:
    the task of a number is the same, whatever was asked for before.
    """

    def __init__(self, num_tasks: int, *, seed: int, shuffle: bool) -> None:
        if num_tasks < 1:
            raise ValueError(f"no order of {num_tasks} tasks")
        self._num_tasks = num_tasks
        self._seed = seed
        self._shuffle = shuffle
        self._epochs: dict[int, list[int]] = {}  # the latest two: groups that were left lag behind

    def __getitem__(self, number: int) -> int:
        epoch, place = divmod(number, self._num_tasks)
        if not self._shuffle:
            return place
        if epoch not in self._epochs:
            order = list(range(self._num_tasks))
            random.Random(f"{self._seed}-{epoch}").shuffle(order)
            self._epochs = {**dict(list(self._epochs.items())[-1:]), epoch: order}
        return self._epochs[epoch][place]


# -- sources


def _jsonl_rows(config: DatasetConfig) -> Iterator[tuple[str, Any]]:
    """One JSON object per line; blank lines are passed over. A file is one split."""
    name = config.path
    if config.dataset_kwargs:
        raise TaskError(f"{name}: a file takes no dataset_kwargs: {sorted(config.dataset_kwargs)}")
    num_rows = 0
    try:
        with Path(name).open("rb") as file:
            for number in count(1):
                line = b"" if num_rows == config.size else file.readline(MAX_TASK_BYTES + 1)
                if not line:
                    return
                if number == 1 and line.startswith(_GZIP):
                    raise TaskError(f"{name} is compressed: gunzip it first")
                row = _parsed(line, f"{name}:{number}")
                if row is not _BLANK:
                    yield f"{name}:{number}", row
                    num_rows += 1
    except OSError as error:
        raise TaskError(f"{name} cannot be read: {error.strerror}") from error


_BLANK = object()
_GZIP = b"\x1f\x8b"  # what every such file begins with


def _parsed(line: bytes, where: str) -> Any:
    """The line's value, or `_BLANK`. Raises `TaskError`."""
    if len(line) > MAX_TASK_BYTES:
        raise TaskError(f"{where}: the line is longer than {MAX_TASK_BYTES:,} bytes")
    if b"\0" in line:
        raise TaskError(f"{where}: the line has a NUL byte in it: is this a text file?")
    try:
        text = line.decode("utf-8-sig")
        if not text.strip():
            return _BLANK
        return json.loads(text.rstrip(), object_pairs_hook=_without_duplicates)
    except UnicodeDecodeError as error:
        raise TaskError(f"{where}: not UTF-8: {error.reason} at byte {error.start}") from None
    except RecursionError:
        raise TaskError(f"{where}: nested more than {MAX_DEPTH} deep") from None
    except ValueError as error:
        reason = str(error)
        if isinstance(error, json.JSONDecodeError):  # which would count lines, too, from this one
            reason = f"{error.msg} at column {error.colno}"
        raise TaskError(
            f"{where}: not JSON: {reason}; write one JSON object per line (JSONL)"
        ) from None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice[:80]!r} is there twice")
    return found


def _function_rows(config: DatasetConfig, *, seed: int) -> Iterator[Any]:
    """What `module:function` yields; it is called with split, seed, size and dataset_kwargs."""
    path = config.path
    given = {"split": config.split, "seed": seed, "size": config.size}
    _refuse_reserved(config, given)
    try:
        function = resolve_target(path)
    except WorkflowError as error:
        raise TaskError(f"the dataset {path!r}: {error}") from error
    if not callable(function):
        raise TaskError(f"the dataset {path!r} is a {type(function).__name__}, not a function")
    _check_signature(function, path, {**given, **config.dataset_kwargs})
    num_rows = 0
    try:
        for row in islice(function(**given, **config.dataset_kwargs), config.size):
            yield row
            num_rows += 1
    except (Exception, SystemExit) as error:  # who calls sys.exit() must be named, too
        raise TaskError(
            f"the dataset function {path!r} raised {type(error).__name__} at row {num_rows}: "
            f"{error}"
        ) from error


def _check_signature(function: Callable[..., Any], path: str, words: dict[str, Any]) -> None:
    """Raises `TaskError` where `function` does not take `words`."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some that are written in C have none
        return
    try:
        signature.bind(**words)
    except TypeError as error:
        called = ", ".join(f"{name}=" for name in words)
        raise TaskError(
            f"the dataset function {path!r} takes {signature}, but is called with {called} "
            f"(split, seed, size, and what is in dataset_kwargs): {error}"
        ) from None


def _reasoning_gym_rows(config: DatasetConfig, *, seed: int) -> Iterator[dict[str, Any]]:
    """Tasks of reasoning-gym with all that its scorer needs (`workflow.openai.
    reasoning_gym_agent`): `question`, `answer`, `metadata`, and how the task was made."""
    name = config.path
    task = name.removeprefix(REASONING_GYM)
    _refuse_reserved(config, {"seed": None, "size": None})
    try:
        from reasoning_gym.factory import DATASETS, create_dataset
    except ImportError as error:
        raise TaskError(
            f"the dataset {name!r} needs the package reasoning-gym ({error}): "
            "install areal-sub[data]"
        ) from error
    if task not in DATASETS:
        near = difflib.get_close_matches(task, DATASETS, n=3, cutoff=0.4)
        hint = f"; nearest: {', '.join(near)}" if near else ""
        raise TaskError(f"reasoning-gym has no task {task!r}{hint}")
    parameters = config.dataset_kwargs
    try:
        source = create_dataset(
            task,
            seed=_far_seed(config.split, seed),
            size=config.size or DEFAULT_REASONING_GYM_SIZE,
            **parameters,
        )
    except Exception as error:
        raise TaskError(
            f"the dataset {name!r} cannot be made with dataset_kwargs={parameters}: "
            f"{type(error).__name__}: {error}"
        ) from error
    for index in range(config.size or DEFAULT_REASONING_GYM_SIZE):
        try:
            entry = source[index]
            data = json.loads(json.dumps(entry, allow_nan=False))
            # Scorers read the metadata; a few want the Python types that JSON does not have.
            survives = entry["answer"] is None or (
                source.score_answer(entry["answer"], data)
                == source.score_answer(entry["answer"], entry)
            )
        except Exception as error:
            raise TaskError(f"{name}, row {index}: {type(error).__name__}: {error}") from error
        if not survives:
            raise TaskError(
                f"{name}, row {index}: this task is scored by Python objects that do not survive "
                "as JSON: write a module:function and an agent with a score of their own"
            )
        yield {
            "messages": [{"role": "user", "content": data["question"]}],
            **{key: data[key] for key in ("question", "answer", "metadata")},
            "reasoning_gym": {"task": task, "parameters": parameters},
        }


def _far_seed(split: str, seed: int) -> int:
    """31 bits. reasoning-gym seeds each task by seed + index: neighbouring seeds would share
    nearly all tasks, so that training and validation need seeds that are far apart."""
    return int.from_bytes(hashlib.sha256(f"{split}-{seed}".encode()).digest()[:4], "big") // 2


def _hub_rows(config: DatasetConfig) -> Iterator[Any]:
    """A Hugging Face dataset, by hub name or folder; `dataset_kwargs` go to `load_dataset`."""
    path = config.path
    _refuse_reserved(config, {"path": None, "split": None})
    if path.endswith((".jsonl", ".json")):
        raise TaskError(f"the dataset {path!r}: there is no such file in {Path.cwd()}")
    try:
        import datasets

        rows = datasets.load_dataset(path, split=config.split, **config.dataset_kwargs)
        yield from islice(rows, config.size)
    except Exception as error:
        reason = " ".join(str(error).split())[:500]
        raise TaskError(
            f"the dataset {path!r} (split {config.split!r}) is not to be had from the Hugging Face "
            f"hub ({type(error).__name__}: {reason}), and a file of that name does not exist "
            "either. The other forms of a dataset's path: a JSONL file, 'reasoning-gym:TASK', "
            "'module:function'"
        ) from error


def _refuse_reserved(config: DatasetConfig, names: Iterable[str]) -> None:
    for key in names:
        if key in config.dataset_kwargs:
            raise TaskError(
                f"the dataset {config.path!r}: dataset_kwargs.{key} is given by the trainer; "
                "set `split` and `size` beside `path`, and the run's `seed`"
            )


# -- the check that each task passes


def _task(row: Any, *, where: str, default_id: str) -> Task:
    if not isinstance(row, dict):
        raise TaskError(f"{where}: a task is a dict (a JSON object), not {type(row).__name__}")
    budget = [MAX_TASK_VALUES]
    data = _plain(row, where=where, field="", depth=0, budget=budget)
    if len(json.dumps(data, ensure_ascii=False).encode()) > MAX_TASK_BYTES:
        raise TaskError(f"{where}: the task has more than {MAX_TASK_BYTES:,} bytes as JSON")
    own_id = data.get("task_id")
    if not isinstance(own_id, str):
        return Task(default_id, data)
    if not 0 < len(own_id) <= MAX_TASK_ID_CHARS:
        raise TaskError(f"{where}, field task_id: must have 1 to {MAX_TASK_ID_CHARS} characters")
    return Task(own_id, data)


def _plain(value: Any, *, where: str, field: str, depth: int, budget: list[int]) -> Any:
    """A copy of `value` in plain JSON types that msgpack can carry too. Raises `TaskError`."""

    def refuse(what: str) -> TaskError:
        return TaskError(f"{where}{', field ' + field if field else ''}: {what}")

    budget[0] -= 1
    if budget[0] < 0:
        raise refuse(f"the task has more than {MAX_TASK_VALUES:,} values")
    if depth > MAX_DEPTH:
        raise refuse(f"nested more than {MAX_DEPTH} deep")
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    match value:
        case None | bool():
            return value
        case str():
            if not _encodes(value):
                raise refuse("the text has half a surrogate pair, which UTF-8 cannot carry")
            return str(value)
        case int():
            if not -(2**63) <= value < 2**64:
                raise refuse("an integer of more than 64 bits: write it as a string")
            return int(value)
        case float():
            if not math.isfinite(value):
                raise refuse(f"{value} is no JSON number")
            return float(value)
        case list() | tuple():
            return [
                _plain(item, where=where, field=f"{field}[{i}]", depth=depth + 1, budget=budget)
                for i, item in enumerate(value)
            ]
        case dict():
            copied: dict[str, Any] = {}
            for key, item in value.items():
                if not isinstance(key, str) or not _encodes(key):
                    raise refuse(f"the key {key!r} is no text: keys are strings")
                inner = f"{field}.{key[:80]}" if field else key[:80]
                copied[str(key)] = _plain(
                    item, where=where, field=inner, depth=depth + 1, budget=budget
                )
            return copied
    raise refuse(f"a {type(value).__name__} is not JSON (dict, list, str, int, float, bool, None)")


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
