"""Spec, probe and plan: pure values, printed, refused, and applied closed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from sandbox import Ending, Limits, PlanError, SandboxSpec, SpecError
from sandbox import plan as plans
from sandbox.layers import PROBE
from sandbox.plan import Step, plan
from sandbox.probe import Probe, probe

ALL = Probe(dict.fromkeys(PROBE, ""))


def test_a_spec_goes_to_json_and_back() -> None:
    spec = SandboxSpec(env={"PATH": "/bin"}, limits=Limits(wall_s=1.5, open_files=64))
    assert SandboxSpec.from_json(spec.to_json()) == spec
    assert SandboxSpec.from_json("{}") == SandboxSpec()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[]", "must be a JSON object"),
        ("{", "not JSON"),
        ('{"teir": "process"}', "no field 'teir'"),
        ('{"tier": "gvisor"}', "unknown sandbox tier 'gvisor'"),
        ('{"limits": {"wall": 1}}', "limits has no field 'wall'"),
        ('{"limits": {"cpu_s": 0}}', "limits.cpu_s"),
        ('{"limits": {"cpu_s": 1.5}}', "limits.cpu_s"),
        ('{"limits": {"open_files": true}}', "limits.open_files"),
        ('{"limits": {"wall_s": NaN}}', "limits.wall_s"),
        ('{"env": {"A": 1}}', "'A' must be a string"),
        ('{"env": []}', "must be a mapping"),
        ('{"env": {"LD_PRELOAD": "x"}}', "LD_PRELOAD"),
    ],
)
def test_a_wrong_spec_is_refused_by_field(text: str, complaint: str) -> None:
    with pytest.raises(SpecError, match=complaint.replace("(", r"\(")):
        SandboxSpec.from_json(text)


def test_the_plan_is_the_whole_ordered_list() -> None:
    limits = Limits(cpu_s=10, memory_bytes=1000, open_files=20, file_bytes=30, core_bytes=0)
    assert plan(SandboxSpec(env={"A": "b"}, limits=limits), ALL) == (
        Step("session", {"umask": 0o077}),
        Step("descriptors", {}),
        Step("environ", {"env": {"A": "b"}}),
        Step("randomness", {}),
        Step(
            "rlimits",
            {
                "RLIMIT_CPU": [10, 11],
                "RLIMIT_AS": [1000, 1000],
                "RLIMIT_NOFILE": [20, 20],
                "RLIMIT_FSIZE": [30, 30],
                "RLIMIT_CORE": [0, 0],
            },
        ),
        Step("no_new_privs", {}),
    )


def test_a_plan_prints_names_of_variables_only_and_survives_json() -> None:
    steps = plan(SandboxSpec(env={"TOKEN": "hush", "PATH": "/bin"}), ALL)
    printed = "\n".join(map(str, steps))
    assert "env=[PATH TOKEN]" in printed
    assert "hush" not in printed
    assert plans.from_json(json.loads(json.dumps(plans.to_json(steps)))) == steps


def test_a_layer_that_is_not_to_be_had_is_an_error_that_names_it() -> None:
    refused = Probe({**ALL.layers, "no_new_privs": "the kernel says no"})
    with pytest.raises(PlanError, match="no_new_privs: the kernel says no"):
        plan(SandboxSpec(), refused)
    with pytest.raises(PlanError, match="session: it was not probed"):
        plan(SandboxSpec(), Probe({}))


def test_the_probe_tries_in_a_child_and_survives_what_happens_there() -> None:
    def explode() -> str:
        raise OSError("no such layer")

    checks: dict[str, Any] = {
        "works": lambda: "",
        "raises": explode,
        "dies": lambda: os._exit(3),
        "leaks": lambda: os.chdir("/") or "",  # type: ignore[func-returns-value]
    }
    here = Path.cwd()
    found = probe(checks).layers
    assert found["works"] == found["leaks"] == ""
    assert "no such layer" in found["raises"]
    assert found["dies"] == "the process that tried it died"
    assert Path.cwd() == here
    assert set(probe().layers.values()) == {""}


def test_a_step_that_fails_ends_the_child_before_the_agent_runs(lab: Any, tmp_path: Path) -> None:
    """Fails closed, naming the step: here a limit that no kernel knows."""

    async def go() -> Any:
        honest = plans.plan
        broken = Step("rlimits", {"RLIMIT_UNHEARD_OF": [1, 1]})
        plans.plan = lambda spec, probe: (*honest(spec, probe)[:-1], broken)
        try:
            zygote = await lab.start("acts:act")
        finally:
            plans.plan = honest
        try:
            act = {"do": "hang_deaf", "ready": str(tmp_path / "ran")}
            return await zygote.run(act, wall_s=10.0)
        finally:
            await zygote.close()

    report = lab.run(go())
    assert report.ending is Ending.SETUP_FAILED
    assert report.error.startswith("sandbox step 'rlimits' failed: AttributeError")
    assert not (tmp_path / "ran").exists()
