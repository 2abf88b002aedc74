"""What a wrong configuration says: where, what, what is allowed, and the nearest right name."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from areal_sub.config import load_config, parse_config
from areal_sub.config.keys import all_keys, unknown
from areal_sub.errors import ConfigError

ROOT = Path(__file__).parents[2]
Write = Callable[..., Path]


def complaint(file: Path | None, overrides: Sequence[str] = ()) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(file, overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("rollout.openai.mod=subproc", "there is no key 'mod' in rollout.openai; "
         "did you mean mode? (rollout.openai.mode)"),
        ("rolout.openai.mode=subproc", "there is no key 'rolout'; "
         "did you mean rollout? (rollout.openai.mode)"),
        ("lr=1e-3", "there is no key 'lr'; did you mean actor.optimizer.lr?"),
        ("rollout.mode=inline", "there is no key 'mode' in rollout; "
         "did you mean rollout.openai.mode?"),
        ("actor.weight_decay=0", "did you mean actor.optimizer.weight_decay?"),
        ("rollout.agent.mode=inline", "AReaL's rollout.agent is rollout.openai here: "
         "did you mean rollout.openai.mode?"),
        ("allocation_mode=d4", "not needed here: the engine is chosen by engine.type"),
        ("cluster.n_nodes=1", "not needed here: a run has one machine"),
        ("n_nodes=1", "not needed here: a run has one machine"),
        ("saver.experiment_name=x", "set it once, at the top level"),
        ("zzzzzz=1", "there is no key 'zzzzzz'; its keys are: experiment_name, trial_name"),
        ("actor.path.x=1", "actor.path is not a section but text"),
        ("rollout.openai.mode=inlin", "expected one of inline, subproc; got 'inlin'; "
         "did you mean inline?"),
        ("gconfig.n_samples=eight", "expected a whole number > 0; got 'eight'"),
        ("gconfig.n_samples=8.0", "expected a whole number > 0; got 8.0"),
        ("gconfig.n_samples=0", "expected a whole number > 0; got 0"),
        ("total_train_steps=-1", "expected a whole number > 0, or null; got -1"),
        ("gconfig.top_p=2", "expected a number > 0 and <= 1; got 2"),
        ("rollout.timeout_s=.inf", "expected a number > 0; got inf"),
        ("rollout.timeout_s=.nan", "expected a number > 0; got nan"),
        ("actor.gradient_checkpointing=1", "expected true or false; got 1"),
        ("actor.gradient_checkpointing=yes", "expected true or false; got 'yes'"),
        ("actor.behave_imp_weight_cap=5", "write actor.rejection_sampling.upper"),
        ("engine.vllm.urls=[host:8000]", "'host:8000' is not http://host:port"),
        ("seed=", "expected a whole number >= 0 and <= 2147483647; got nothing (null)"),
        ("seed=true", "expected a whole number >= 0 and <= 2147483647; got true"),
        ("seed=-1", "expected a whole number >= 0 and <= 2147483647; got -1"),
        ("seed=2147483648", "expected a whole number >= 0 and <= 2147483647; got 2147483648"),
        ("actor.path=null", "expected text; got nothing (null)"),
        ("rollout.openai.python_path=x", "expected a list (text each); got 'x'"),
        ("rollout.openai.sandbox.network.allow=[a.example]",
         "'a.example' is not host:port, as in api.example.com:443"),
        ("rollout.openai.env={A: [1]}", "expected text; got a list of 1"),
        ("rollout=5", "expected a section with the keys max_concurrent_rollouts"),
        ("saver=null", "got nothing (null)"),
        ("saver=", "got nothing (null)"),
        ("seed=[1", "the value is not YAML"),
        ("seed=!!python/name:os.system ''", "tag"),
        ("foo", "write it as key=value"),
        ("=1", "write it as key=value"),
        ("+a.b=1", "write a.b=1"),
        ("rollout..mode=1", "there is no key '' in rollout"),
        ("seed=${sed}", "${sed}: there is no value at sed; did you mean seed?"),
        ("seed=${nothing.like.it}", "there is no value at nothing.like.it"),
        ("seed=${oc.env:NOT_SET_IN_TEST}", "the environment variable NOT_SET_IN_TEST is not set"),
        ("seed=${env:HOME}", "there is no resolver 'env'"),
        ("seed=${seed}", "${seed}: it refers to itself"),
        ("seed=${oc.env:HOME", "${oc.env:HOME: "),
        ("actor.path=${actor}", "it refers to itself"),
        ("trial_name=../x", "names a folder"),
        ("trial_name=", "expected text; got nothing (null)"),
    ],
)  # fmt: skip
def test_override(write: Write, override: str, text: str) -> None:
    said = complaint(write(), [override])
    assert said.startswith(f"override {override!r}: "), said
    assert text in said
    assert "\n" not in said, "one problem is one line"


@pytest.mark.parametrize(
    ("more", "where", "text"),
    [
        ("\nrollout:\n  openai:\n    mod: inline\n", 8, "rollout.openai.mod: there is no key"),
        ("actr: 5\n", 5, "actr: there is no key 'actr'; did you mean actor?"),
        ("seed: 1\nseed: 2\n", 6, "seed: set twice; the first time at config.yaml:5"),
        ("actor: {path: x}\n", 5, "actor: set twice; the first time at config.yaml:3"),
        ("workflow_kwargs: {a: 1,\n  a: 2}\n", 5, "workflow_kwargs: line 5: the key 'a' is set"),
        ("seed: two\n", 5, "seed: expected a whole number >= 0 and <= 2147483647; got 'two'"),
        ("saver: null\n", 5, "saver: expected a section with the keys"),
        ("rollout: [1]\n", 5, "rollout: expected a section"),
        ("rollout: {openai: {env: {A: {}}}}\n", 5, "rollout.openai.env.A: expected text; got an"),
        ("workflow_kwargs: {a: !secret x}\n", 5, "workflow_kwargs: line 5: the YAML tag"),
        ("workflow_kwargs: {[1]: x}\n", 5, "workflow_kwargs: line 5: a key must be a single word"),
        ("train_dataset:\n  size: 3\n", 5, "train_dataset.path: must be set: text"),
        ("seed: [1\n", 6, "this is not YAML: while parsing a flow sequence"),
        ("\tseed: 1\n", 5, "this is not YAML"),
        ("---\nseed: 1\n", 5, "this is not YAML: expected a single document"),
        ("seed: ${sed}\n", 5, "seed: ${sed}: there is no value at sed; did you mean seed?"),
        ("workflow_kwargs: {a: ['${b}']}\n", 5, "workflow_kwargs: an interpolation in it: there"),
        ("valid_dataset: ${actor}\n", 5, "valid_dataset.dtype: there is no key 'dtype'"),
    ],
)  # fmt: skip
def test_file(write: Write, more: str, where: int, text: str) -> None:
    said = complaint(write(more)).replace(" problems in the configuration:\n  ", ": ")
    assert f"config.yaml:{where}: {text}" in said


def test_interpolations_that_go_round(write: Write) -> None:
    said = complaint(write("seed: ${total_train_epochs}\ntotal_train_epochs: ${seed}\n"))
    assert "config.yaml:5: seed: ${total_train_epochs}: it refers to itself" in said
    assert "config.yaml:6: total_train_epochs: ${seed}: it refers to itself" in said


def test_an_anchor_in_itself(write: Write) -> None:
    assert "holds an alias (*) to itself" in complaint(write("workflow_kwargs: &a {b: *a}\n"))
    assert "holds an alias (*) to itself" in complaint(write("gconfig: &a {<<: *a}\n"))


def test_a_part_of_an_interpolated_section_cannot_be_set(write: Write) -> None:
    file = write("train_dataset: {path: a}\nvalid_dataset: ${train_dataset}\n")
    said = complaint(file, ["valid_dataset.path=b"])
    assert "valid_dataset is ${train_dataset} (config.yaml:6), so no part of it can be set" in said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "config.yaml: is empty"),
        ("# nothing\n", "config.yaml: is empty"),
        ("- a\n", "at the top level; this is a list"),
        ("a\n", "at the top level; this is a single value"),
        ("seed: [1\n", "config.yaml:2: this is not YAML"),
    ],
)
def test_a_file_that_is_not_a_map_is_the_one_problem(write: Write, text: str, said: str) -> None:
    """Nobody knows what it would have set, so nothing is missing."""
    complaints = complaint(write(text=text), ["seed=two"]).splitlines()
    assert complaints[0] == "2 problems in the configuration:"
    assert said in complaints[1]
    assert "override 'seed=two'" in complaints[2]
    assert len(complaints) == 3


def test_two_files() -> None:
    for words in (["--config", "a", "--config", "b"], ["--config=a", "--config=b"]):
        with pytest.raises(ConfigError, match="--config is given twice: a and b\n"):
            load_config(words)


def test_required_keys(write: Write) -> None:
    said = complaint(write(text="actor: {}\n"))
    assert "config.yaml: experiment_name: must be set: text" in said
    assert "config.yaml:1: actor.path: must be set: text" in said
    assert "the configuration: actor: must be set: a section" in complaint(None)


def test_all_problems_at_once_each_once(write: Write) -> None:
    file = write("seed: two\nrollout: {openai: {mod: inline}}\nsaver: {keep: 0}\n")
    said = complaint(file, ["gconfig.n_samples=${x}", "lr=1"])
    head, *lines = said.splitlines()
    assert head == "5 problems in the configuration:"
    assert sorted(line.split(": ")[0].strip() for line in lines) == [
        "config.yaml:5",
        "config.yaml:6",
        "config.yaml:7",
        "override 'gconfig.n_samples=${x}'",
        "override 'lr=1'",
    ]


def test_the_last_source_of_a_value_is_named(write: Write) -> None:
    file = write("seed: two\n")
    assert complaint(file, ["seed=three"]).startswith("override 'seed=three'")
    assert parse_config(file, ["seed=4"]).seed == 4


def test_missing_file(write: Write, tmp_path: Path) -> None:
    write()
    assert complaint(Path("confg.yaml")) == "there is no file confg.yaml; did you mean config.yaml?"
    there = tmp_path / "config.yaml"
    wrong = Path(str(tmp_path) + "x") / "config.yml"
    assert complaint(wrong) == f"there is no file {wrong}; did you mean {there}?"
    assert complaint(Path("a/b/c")) == "there is no file a/b/c"


def test_unreadable_files(tmp_path: Path) -> None:
    assert "Is a directory" in complaint(tmp_path)
    (tmp_path / "latin").write_bytes(b"seed: 1\n# \xe9\n")
    assert "is not UTF-8 text (byte 10)" in complaint(tmp_path / "latin")
    (tmp_path / "nul").write_bytes(b"seed: \0\n")
    assert "this is not YAML" in complaint(tmp_path / "nul")


def test_problems_of_a_base_map() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(None, [], base={"actor": {"path": 1, "pth": 2}, "seed": "x"})
    said = str(caught.value)
    assert "the given values: actor.path: expected text; got 1" in said
    assert "the given values: actor.pth: there is no key 'pth' in actor; did you mean path?" in said
    assert "the given values: seed: expected a whole number >= 0 and <= 2147483647; got 'x'" in said


def test_every_key_with_a_letter_missing_finds_itself() -> None:
    for key in all_keys():
        parent, _, name = key.path.rpartition(".")
        if len(name) < 6:
            continue
        wrong = f"{parent}.{name[:3]}{name[4:]}" if parent else name[:3] + name[4:]
        assert f"did you mean {name}?" in unknown(wrong)


def test_a_typing_error_costs_no_heavy_import(write: Write) -> None:
    file = write("tokenizer_path: ${actor.path}\n")
    program = (
        "import sys\n"
        "from areal_sub.config import load_config\n"
        "from areal_sub.errors import ConfigError\n"
        "try: load_config(sys.argv[1:])\n"
        "except ConfigError as error: print(error)\n"
        "print(sorted({'torch', 'fastapi', 'numpy', 'openai', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            program,
            "--config",
            str(file.resolve()),
            "rollout.openai.mod=subproc",
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        cwd=ROOT,
    )
    said, loaded = done.stdout.splitlines()
    assert "did you mean mode?" in said
    assert loaded == "[]"


def test_errors_of_load_config_are_those_of_parse_config(write: Write) -> None:
    write()
    with pytest.raises(ConfigError, match="did you mean seed"):
        load_config(["--config", "config.yaml", "sed=1"])


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["actor.rejection_sampling.upper=2"], "bounds the weight of use_decoupled_loss"),
        (["rollout.over_stale=reweight"], "needs the weights of actor.use_decoupled_loss=true"),
        (["actor.loss_agg_mode=constant"], "loss_agg_constant go together"),
        (["actor.c_clip=3", "actor.objective=cispo"], "c_clip is of objective=ppo"),
        (["actor.rejection_sampling={lower: 5, upper: 2}"], "lower=5.0 is not below upper=2.0"),
        (["actor.rejection_sampling={action: clamp, metric: kl_k3}"], "set metric=ratio"),
        (["actor.rejection_sampling={action: clamp, level: sequence, agg: max}"], "only decides"),
    ],
)
def test_objectives_that_make_no_sense_together(
    write: Write, overrides: list[str], text: str
) -> None:
    assert text in complaint(write(), overrides)


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["engine.type=vllm"], "needs either vllm.python"),
        (["engine.vllm.python=/x/python"], "engine.vllm is set, but engine.type is embedded"),
        (
            ["engine.type=vllm", "engine.vllm.urls=[http://h:1]", "engine.vllm.args=[--x]"],
            "are for a server that is started",
        ),
        (
            ["engine.type=vllm", "engine.vllm.python=/x/python", "engine.num_threads=1"],
            "VLLM_CPU_OMP_THREADS_BIND",
        ),
    ],
)
def test_settings_of_the_other_engine(write: Write, overrides: list[str], text: str) -> None:
    assert text in complaint(write(), overrides)
