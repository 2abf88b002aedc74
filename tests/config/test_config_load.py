"""What a good configuration becomes: values, types, merging, interpolation, the round trip."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from areal_sub.config import Config, dump_config, load_config, parse_config
from areal_sub.errors import ConfigError

Write = Callable[..., Path]

BASE: dict[str, Any] = {
    "experiment_name": "tiny",
    "trial_name": "first",
    "actor": {"path": "models/tiny"},
}


def test_file_alone(write: Write) -> None:
    config = load_config(["--config", str(write())])
    assert config == Config.model_validate(BASE)


def test_config_may_stand_anywhere_and_with_an_equals_sign(write: Write) -> None:
    write()
    assert load_config(["seed=3", "--config=config.yaml", "seed=4"]).seed == 4


def test_base_under_file_under_overrides(write: Write) -> None:
    file = write("seed: 2\ngconfig: {n_samples: 4}\n")
    base = {"seed": 1, "gconfig": {"n_samples": 2, "top_p": 0.5}, "total_train_epochs": 7}
    config = parse_config(file, ["gconfig.n_samples=6"], base=base)
    assert (config.seed, config.total_train_epochs) == (2, 7)
    assert (config.gconfig.n_samples, config.gconfig.top_p) == (6, 0.5)


def test_base_is_not_written_into() -> None:
    base = {**BASE, "workflow_kwargs": {"a": {"b": 1}}}
    config = parse_config(None, ["workflow_kwargs.a.b=2"], base=base)
    assert config.workflow_kwargs == {"a": {"b": 2}}
    assert base["workflow_kwargs"] == {"a": {"b": 1}}


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("actor.optimizer.lr=1e-3", "actor.optimizer.lr", 1e-3),
        ("actor.optimizer.lr=1", "actor.optimizer.lr", 1.0),
        ("actor.optimizer.lr=.5", "actor.optimizer.lr", 0.5),
        ("seed=1_000", "seed", 1000),
        ("trial_name=2026", "trial_name", "2026"),
        ("trial_name=1e5", "trial_name", "1e5"),
        ("trial_name='x'", "trial_name", "x"),
        ("actor.path=a=b", "actor.path", "a=b"),
        ("actor.path=C: [x", "actor.path", "C: [x"),
        ("actor.path=#1", "actor.path", "#1"),
        ("actor.path=true", "actor.path", "true"),
        ("tokenizer_path=", "tokenizer_path", None),
        ("tokenizer_path=null", "tokenizer_path", None),
        ("tokenizer_path='null'", "tokenizer_path", "null"),
        ("train_dataset.path=reasoning-gym:sums", "train_dataset.path", "reasoning-gym:sums"),
        ("rollout.openai={mode: inline}", "rollout.openai.mode", "inline"),
        ("rollout.openai.env={A: 1, B: x}", "rollout.openai.env", {"A": "1", "B": "x"}),
        ("rollout.openai.env.A=no", "rollout.openai.env", {"A": "no"}),
        ("rollout.openai.python_path=[a, 7]", "rollout.openai.python_path", ["a", "7"]),
        ("workflow_kwargs={a: [1, .5, yes, 012, 12:30]}", "workflow_kwargs.a",
         [1, 0.5, "yes", "012", "12:30"]),
        ("eval_gconfig={}", "eval_gconfig.n_samples", 8),
        ("train_dataset=null", "train_dataset", None),
        ("train_dataset=", "train_dataset", None),
        ("eval_gconfig=", "eval_gconfig", None),
    ],
)  # fmt: skip
def test_overrides_are_typed_by_yaml_and_the_schema(override: str, path: str, value: Any) -> None:
    found: Any = parse_config(None, [override], base=BASE)
    for name in path.split("."):
        found = found[name] if isinstance(found, dict) else getattr(found, name)
    assert found == value
    assert type(found) is type(value)


def test_sections_merge_and_free_maps_are_replaced(write: Write) -> None:
    file = write(
        "rollout: {timeout_s: 5, openai: {mode: inline}}\nworkflow_kwargs: {a: 1, b: 2}\n"
        "eval_gconfig: {n_samples: 1}\n"
    )
    config = parse_config(file, ["rollout={openai: {max_turns: 3}}", "workflow_kwargs.b=3"])
    assert config.rollout.timeout_s == 5
    assert (config.rollout.openai.mode, config.rollout.openai.max_turns) == ("inline", 3)
    assert config.workflow_kwargs == {"a": 1, "b": 3}
    config = parse_config(file, ["workflow_kwargs={c: 4}", "eval_gconfig=null"])
    assert config.workflow_kwargs == {"c": 4}
    assert config.eval_gconfig is None


def test_a_section_with_everything_commented_out(write: Write) -> None:
    assert parse_config(write("rollout:\n  # timeout_s: 5\n"), []).rollout.timeout_s == 300


def test_anchors_and_merge_keys(write: Write) -> None:
    file = write(
        "gconfig: &g {n_samples: 4, top_p: 0.9}\neval_gconfig:\n  <<: *g\n  n_samples: 1\n"
    )
    config = parse_config(file, [])
    assert config.eval_gconfig is not None
    assert (config.eval_gconfig.n_samples, config.eval_gconfig.top_p) == (1, 0.9)


def test_interpolation(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEED_OF_TEST", "12")
    file = write(
        "seed: ${oc.env:SEED_OF_TEST}\n"
        "total_train_steps: ${oc.env:NOT_SET_IN_TEST,5}\n"
        "tokenizer_path: ${actor.path}/tokenizer\n"
        "train_dataset: {path: a.jsonl, size: '${oc.env:NOT_SET_IN_TEST,7}', split: '${.path}'}\n"
        "valid_dataset: ${train_dataset}\n"
        "eval_gconfig: {n_samples: '${gconfig.n_samples}'}\n"
        "workflow_kwargs:\n  all: ['${seed}', {n: '${rollout.max_concurrent_rollouts}'}]\n"
        "  raw: \\${x}\n  kept: ['010', '5', '~']\n"
    )
    config = parse_config(file, ["actor.path=other", "trial_name=seed-${seed}"])
    assert (config.seed, config.total_train_steps) == (12, 5)
    assert (config.tokenizer_path, config.trial_name) == ("other/tokenizer", "seed-12")
    assert config.valid_dataset == config.train_dataset
    assert config.train_dataset is not None
    assert (config.train_dataset.size, config.train_dataset.split) == (7, "a.jsonl")
    assert config.eval_gconfig is not None
    assert config.eval_gconfig.n_samples == 8, "the schema's default is there to be referred to"
    assert config.workflow_kwargs == {
        "all": [12, {"n": 64}],
        "raw": "${x}",
        "kept": ["010", "5", "~"],
    }


def test_a_number_where_text_is_wanted_may_come_from_another_key(write: Write) -> None:
    assert parse_config(write("seed: 5\n"), ["trial_name=${seed}"]).trial_name == "5"


@pytest.mark.parametrize("argv", [[], ["seed=1"], ["--config"], ["--config="], ["--help"],
                                  ["--config", "a", "--config=b"], ["--conf", "a"]])  # fmt: skip
def test_usage(argv: list[str]) -> None:
    with pytest.raises(ConfigError, match="usage: --config FILE"):
        load_config(argv)


# fmt: off
_TRAPS = [
    "", "1", "1e-3", "null", "~", "yes", "true", "0x1f", "010", "12:30", "1_0", ".inf", "<<",
    "${x}", r"\${x}", r"\\${x}", "a${b", "$", "\\", "a: b", "# c", "'", '"', "- x", "2026-01-02",
    "line\nline", "tab\t", "é", "\u2028", "@x", "%x", "&x", "*x", "!x", "???",
]
# fmt: on
_words = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=8) | st.sampled_from(
    _TRAPS
)
_numbers = st.integers() | st.floats(allow_nan=False)
_plain = st.recursive(
    st.none() | st.booleans() | _numbers | _words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_words, inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=40)
@given(kwargs=st.dictionaries(_words, _plain, max_size=3), env=st.dictionaries(_words, _words))
def test_dump_reads_back_equal(
    kwargs: dict[str, Any], env: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    written = Config.model_validate(
        {**BASE, "workflow_kwargs": kwargs, "rollout": {"openai": {"env": env}}}
    )
    file: Path = tmp_path_factory.getbasetemp() / "dump.yaml"
    file.write_text(dump_config(written))
    read = parse_config(file, [])
    assert read == written
    assert repr(read) == repr(written), "1 is not 1.0 is not true"


def test_dump_of_what_is_not_plain_data() -> None:
    config = Config.model_validate({**BASE, "workflow_kwargs": {"client": object()}})
    with pytest.raises(ConfigError, match="cannot"):
        dump_config(config)
