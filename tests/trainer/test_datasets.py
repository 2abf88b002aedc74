"""Task sources, the check that each task passes, and the order of tasks."""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from areal_sub.config.schema import DatasetConfig
from areal_sub.errors import TaskError
from areal_sub.trainer import datasets as module
from areal_sub.trainer.datasets import Task, TaskOrder, digest_of, load_tasks, tasks_from_rows


def written(folder: Path, content: str | bytes) -> str:
    file = folder / "tasks.jsonl"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(file)


def load(path: str, seed: int = 1, **settings: Any) -> list[Task]:
    return load_tasks(DatasetConfig(path=path, **settings), seed=seed)


# -- JSONL


def test_a_file_gives_one_task_per_line(tmp_path: Path) -> None:
    path = written(tmp_path, '\ufeff{"q": "é", "task_id": "mine"}\n\n  \n{"q": 2, "task_id": 7}')
    assert load(path) == [
        Task("mine", {"q": "é", "task_id": "mine"}),
        Task(f"{path}#1", {"q": 2, "task_id": 7}),
    ]


def test_size_takes_the_first_and_reads_no_further(tmp_path: Path) -> None:
    path = written(tmp_path, '{"q": 0}\n{"q": 1}\nnot json\n')
    assert [task.data["q"] for task in load(path, size=2)] == [0, 1]
    with pytest.raises(TaskError, match="jsonl:3: not JSON"):
        load(path, size=3)


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (b'{"a": 1,}', ": not JSON: [^:]* at column [89]; write one"),
        (b'{"a":', ": not JSON: Expecting value at column 6; write one"),
        (b"[1]", "not list"),
        (b"null", "not NoneType"),
        (b'{"a": 1}\x00', "NUL byte"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b'{"a": {"b": [0, NaN]}}', r"field a\.b\[1\]: nan"),
        (b'{"a": 1e999}', "field a: inf"),
        (b'{"a": 1, "a": 2}', "'a' is there twice"),
        (b'{"a": "\\ud800"}', "field a: .*surrogate"),
        (b'{"a": 18446744073709551616}', "field a: .*64 bits"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not JSON"),
        (b'{"a": ' + b"[" * 60 + b"]" * 60 + b"}", "nested more than"),
        (b'{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "nested more than"),
        (b'{"task_id": ""}', "field task_id"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, what: str) -> None:
    path = written(tmp_path, b'{"fine": true}\n' + line + b"\n")
    with pytest.raises(TaskError, match=rf"tasks\.jsonl:2.*{what}"):
        load(path)


def test_a_compressed_file_is_to_be_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "tasks.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"fine": true}\n'))
    with pytest.raises(TaskError, match=r"tasks\.jsonl\.gz is compressed: gunzip it first"):
        load(str(path))


def test_an_endless_line_is_not_read_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_TASK_BYTES", 100)
    with pytest.raises(TaskError, match="jsonl:1: the line is longer than 100 bytes"):
        load(written(tmp_path, b'{"a": "' + b"x" * 1000))


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_file_is_an_error(tmp_path: Path, content: str) -> None:
    with pytest.raises(TaskError, match="the dataset is empty"):
        load(written(tmp_path, content))


def test_a_file_takes_no_arguments(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="takes no dataset_kwargs"):
        load(written(tmp_path, "{}"), dataset_kwargs={"x": 1})


# -- rows


def test_rows_become_plain_json() -> None:
    row = {"a": np.float32(0.5), "b": np.arange(2), "c": (1, np.bool_(True)), "d": None}
    (task,) = tasks_from_rows([row], name="mine")
    assert task == Task("mine#0", {"a": 0.5, "b": [0, 1], "c": [1, True], "d": None})
    assert type(task.data["a"]) is float
    assert row["c"] == (1, True), "the caller's row is left alone"


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ("text", "row 1: .*not str"),
        ({"a": {"b": [1, {2}]}}, r"row 1, field a\.b\[1\]: a set is not JSON"),
        ({"a": b"x"}, "field a: a bytes is not JSON"),
        ({"a": {1: 2}}, "field a: the key 1 is no text"),
        ({"a": np.array([1.0, np.nan])}, r"field a\[1\]: nan"),
        ({"a": [0] * (module.MAX_TASK_VALUES + 1)}, r"more than 100,000 values"),
        ({"a": "x" * (module.MAX_TASK_BYTES + 1)}, r"more than 4,194,304 bytes"),
    ],
)
def test_a_bad_row_is_named(row: Any, what: str) -> None:
    with pytest.raises(TaskError, match=rf"mine, {what}" if what[:3] == "row" else what):
        tasks_from_rows([{}, row], name="mine")


def test_a_row_that_holds_itself_is_refused() -> None:
    row: dict[str, Any] = {}
    row["a"] = row
    with pytest.raises(TaskError, match="nested more than"):
        tasks_from_rows([row], name="mine")


def test_endless_rows_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_TASKS", 3)
    with pytest.raises(TaskError, match="more than 3 tasks: set the dataset's `size`"):
        tasks_from_rows(iter(dict, None), name="endless")


# -- functions

GENERATORS = """
def rows(*, split, seed, size, bias=0):
    n = 0
    while True:
        yield {"split": split, "seed": seed, "n": n + bias, "size": size}
        n += 1

def breaks(**settings):
    yield {}
    raise KeyError("gone")

def bare(seed, size):
    return [{}]

def ends(**settings):
    yield {}
    raise SystemExit(3)

def bad(**settings):
    return [{}, {"a": {1, 2}}]
"""


@pytest.fixture
def generators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    # A name of its own: modules stay in sys.modules.
    name = f"generators_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(GENERATORS)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def test_a_function_gets_split_seed_size_and_its_arguments(generators: str) -> None:
    path = f"{generators}:rows"
    tasks = load(path, seed=5, split="valid", size=2, dataset_kwargs={"bias": 10})
    assert [task.data["n"] for task in tasks] == [10, 11]
    assert tasks[1].task_id == f"{path}#1"
    assert tasks[0].data["split"] == "valid"
    assert tasks[0].data["seed"] == 5
    assert tasks[0].data["size"] == 2


@pytest.mark.parametrize(
    ("function", "kwargs", "what"),
    [
        ("breaks", {}, "breaks' raised KeyError at row 1: 'gone'"),
        ("ends", {}, "ends' raised SystemExit at row 1: 3"),
        ("bad", {}, "bad, row 1, field a: a set"),
        ("rows", {"nope": 1}, r"called with split=, seed=, size=, nope= \(.*\): .*'nope'"),
        ("bare", {}, r"bare' takes \(seed, size\), but is called with split=.*: .*'split'"),
        ("rows", {"seed": 1}, "dataset_kwargs.seed is given by the trainer"),
        ("row", {}, "did you mean 'rows'"),
        ("__name__", {}, "is a str, not a function"),
    ],
)
def test_a_function_that_fails_is_named(
    generators: str, function: str, kwargs: dict[str, Any], what: str
) -> None:
    with pytest.raises(TaskError, match=what):
        load(f"{generators}:{function}", dataset_kwargs=kwargs)


# -- reasoning-gym


def test_reasoning_gym_tasks_have_all_that_scoring_needs() -> None:
    settings = {"size": 4, "dataset_kwargs": {"max_terms": 2}}
    tasks = load("reasoning-gym:chain_sum", **settings)
    assert len(tasks) == 4
    data = tasks[0].data
    assert data["messages"] == [{"role": "user", "content": data["question"]}]
    assert data["reasoning_gym"] == {"task": "chain_sum", "parameters": {"max_terms": 2}}
    assert data["metadata"]["num_terms"] == 2
    assert str(eval(data["metadata"]["expression"])) == data["answer"]
    assert json.loads(json.dumps(data)) == data
    assert load("reasoning-gym:chain_sum", **settings) == tasks, "the same seed, the same tasks"


def test_reasoning_gym_splits_and_seeds_share_no_run_of_tasks() -> None:
    def questions(**settings: Any) -> set[str]:
        tasks = load("reasoning-gym:spell_backward", size=50, **settings)
        return {task.data["question"] for task in tasks}

    train = questions(seed=1)
    for other in (questions(seed=2), questions(seed=1, split="valid")):
        assert len(train & other) < 10


def test_reasoning_gym_has_a_default_size() -> None:
    assert len(load("reasoning-gym:chain_sum")) == 500


@pytest.mark.parametrize(
    ("task", "kwargs", "what"),
    [
        ("chainsum", {}, "no task 'chainsum'; nearest: .*chain_sum"),
        ("chain_sum", {"min_term": 2}, "dataset_kwargs.*min_term"),
        ("chain_sum", {"min_terms": 0}, "min_terms must be positive"),
        ("chain_sum", {"size": 3}, "dataset_kwargs.size is given by the trainer"),
    ],
)
def test_reasoning_gym_errors(task: str, kwargs: dict[str, Any], what: str) -> None:
    with pytest.raises(TaskError, match=what):
        load(f"reasoning-gym:{task}", size=2, dataset_kwargs=kwargs)


def test_a_task_whose_score_needs_more_than_json_is_refused() -> None:
    from reasoning_gym.factory import DATASETS, ProceduralDataset, register_dataset

    @dataclass
    class Settings:
        seed: int
        size: int

        def validate(self) -> None: ...

    class Pairs(ProceduralDataset):
        def __getitem__(self, index: int) -> dict[str, Any]:
            return {"question": "?", "answer": "1", "metadata": {"pair": (1, index)}}

        def score_answer(self, answer: str, entry: dict[str, Any]) -> float:
            return float(isinstance(entry["metadata"]["pair"], tuple))

    register_dataset("pairs_of_this_test", Pairs, Settings)
    try:
        with pytest.raises(TaskError, match=r"row 0: .*do not survive as JSON"):
            load("reasoning-gym:pairs_of_this_test")
    finally:
        del DATASETS["pairs_of_this_test"]


# -- Hugging Face


def test_a_hugging_face_dataset_is_loaded_with_its_arguments(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "valid.csv").write_text("question,answer\n1 + 1,2\n2 + 2,4\n3 + 3,6\n")
    tasks = load(
        "csv",
        split="valid",
        size=2,
        dataset_kwargs={
            "data_files": {"valid": str(tmp_path / "data" / "valid.csv")},
            "cache_dir": str(tmp_path / "cache"),
        },
    )
    assert [task.data for task in tasks] == [
        {"question": "1 + 1", "answer": 2},
        {"question": "2 + 2", "answer": 4},
    ]


def test_an_unreachable_dataset_names_the_other_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets.config
    import huggingface_hub.constants

    # Both are read from HF_HUB_OFFLINE, once, when the libraries are imported.
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(TaskError) as caught:
        load("nobody/nothing-of-this-name")
    for part in (
        "'nobody/nothing-of-this-name'",
        "a file of that name does not exist either",
        "JSONL file",
        "reasoning-gym:TASK",
        "module:function",
    ):
        assert part in str(caught.value)


def test_a_missing_file_is_not_asked_of_the_hub() -> None:
    with pytest.raises(TaskError, match=r"'data/tasks\.jsonl': there is no such file"):
        load("data/tasks.jsonl")


# -- order


def numbers(order: TaskOrder, begin: int, end: int) -> list[int]:
    return [order[number] for number in range(begin, end)]


def test_the_digest_is_of_what_agents_get_in_its_order(tmp_path: Path) -> None:
    tasks = load(written(tmp_path, '{"a": 1, "b": "é"}\n{"a": 2}\n'))
    same = tasks_from_rows([{"b": "é", "a": 1}, {"a": 2}], name="elsewhere")
    assert digest_of(tasks) == digest_of(same)
    others = [tasks[::-1], tasks[:1], tasks_from_rows([{"a": 1, "b": "e"}, {"a": 2}], name="n")]
    assert digest_of(tasks) not in map(digest_of, others)


def test_an_epoch_has_each_task_once_and_an_order_of_its_own() -> None:
    order = numbers(TaskOrder(20, seed=3, shuffle=True), 0, 60)
    epochs = [order[0:20], order[20:40], order[40:60]]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert order[:20] != numbers(TaskOrder(20, seed=4, shuffle=True), 0, 20)


@pytest.mark.parametrize("shuffle", [True, False])
def test_the_task_of_a_number_does_not_depend_on_what_was_asked_for_before(shuffle: bool) -> None:
    whole = numbers(TaskOrder(7, seed=1, shuffle=shuffle), 0, 40)
    order = TaskOrder(7, seed=1, shuffle=shuffle)
    for number in (20, 3, 39, 8, 20, 0):
        assert order[number] == whole[number]


def test_without_shuffling_the_order_is_the_datasets() -> None:
    assert numbers(TaskOrder(3, seed=1, shuffle=False), 2, 7) == [2, 0, 1, 2, 0]


def test_there_is_no_order_of_nothing() -> None:
    with pytest.raises(ValueError, match="0 tasks"):
        TaskOrder(0, seed=1, shuffle=True)
