"""Spec, probe and plan: pure values, printed, refused, and applied closed."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sandbox import Ending, Limits, PlanError, SandboxSpec, SpecError, ZygoteFailed
from sandbox import plan as plans
from sandbox.layers import PROBE
from sandbox.layers.root import ETC_PATHS, SYSTEM_PATHS
from sandbox.plan import Plan, Step, plan
from sandbox.probe import Probe, probe

ALL = Probe(dict.fromkeys(PROBE, ""), landlock_abi=7)


def test_a_spec_goes_to_json_and_back() -> None:
    spec = SandboxSpec(
        tier="process",
        env={"PATH": "/bin"},
        limits=Limits(wall_s=1.5, open_files=64, processes=3),
        readable=("/opt/model", "/srv"),
        hidden=("/srv/keys",),
        mounts={"/data": "/srv/data"},
        port=8080,
        allow=("api.example.com:443", "*.example.com:80", "[::1]:8080"),
        cgroups="off",
    )
    assert SandboxSpec.from_json(spec.to_json()) == spec
    assert SandboxSpec.from_json("{}") == SandboxSpec()
    default = SandboxSpec()
    assert (default.tier, default.readable, default.hidden, default.port) == ("auto", (), (), None)
    assert default.cgroups == "auto"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[]", "must be a JSON object"),
        ("{", "not JSON"),
        ('{"teir": "process"}', "no field 'teir'"),
        ('{"tier": "docker"}', "unknown sandbox tier 'docker'"),
        ('{"limits": {"wall": 1}}', "limits has no field 'wall'"),
        ('{"limits": {"cpu_s": 0}}', "limits.cpu_s"),
        ('{"limits": {"cpu_s": 1.5}}', "limits.cpu_s"),
        ('{"limits": {"open_files": true}}', "limits.open_files"),
        ('{"limits": {"wall_s": NaN}}', "limits.wall_s"),
        ('{"env": {"A": 1}}', "'A' must be a string"),
        ('{"env": []}', "must be a mapping"),
        ('{"env": {"LD_PRELOAD": "x"}}', "LD_PRELOAD"),
        ('{"readable": ["data"]}', "readable: 'data' is not an absolute path"),
        ('{"readable": [1]}', "readable: 1 is not an absolute path"),
        ('{"hidden": ["/a\\u0000b"]}', "hidden: .* is not an absolute path"),
        ('{"mounts": []}', "mounts must map"),
        ('{"mounts": {"data": "/srv"}}', "mounts: 'data' is not an absolute path"),
        ('{"mounts": {"/data": "srv"}}', "mounts: 'srv' is not an absolute path"),
        ('{"mounts": {"/": "/srv"}}', "mounts: '/' must be a plain path"),
        ('{"mounts": {"/a/../b": "/srv"}}', "must be a plain path"),
        ('{"mounts": {"/etc/x": "/srv"}}', "lies in /etc"),
        ('{"mounts": {"/box/own": "/srv"}}', "lies in /box"),
        ('{"mounts": {"/a": "/srv", "/a/b": "/srv"}}', "lies in another mount"),
        ('{"port": 0}', "port: 0 is not a TCP port"),
        ('{"cgroups": "on"}', "cgroups: 'on' is none of: auto, off, require"),
        ('{"port": 65536}', "port: 65536 is not a TCP port"),
        ('{"port": true}', "port: True is not a TCP port"),
        ('{"limits": {"scratch_bytes": -1}}', "limits.scratch_bytes"),
        ('{"allow": "a.example:1"}', "allow must be a list"),
        ('{"allow": [1]}', "allow: 1 is not host:port"),
        ('{"allow": ["a.example"]}', "allow: 'a.example': write host:port"),
        ('{"allow": ["a.example:99999"]}', "allow: 'a.example:99999': '99999' is not a TCP port"),
    ],
)
def test_a_wrong_spec_is_refused_by_field(text: str, complaint: str) -> None:
    with pytest.raises(SpecError, match=complaint.replace("(", r"\(")):
        SandboxSpec.from_json(text)


LIMITS = Limits(
    cpu_s=10,
    memory_bytes=1000,
    open_files=20,
    file_bytes=30,
    total_memory_bytes=5000,
    total_cpu_s=50,
    processes=7,
    scratch_bytes=4096,
    scratch_files=16,
)
RLIMITS = {
    "RLIMIT_CPU": [10, 11],
    "RLIMIT_AS": [1000, 1000],
    "RLIMIT_NOFILE": [20, 20],
    "RLIMIT_FSIZE": [30, 30],
    "RLIMIT_CORE": [1, 1],
}
IMPORT_RLIMITS = {name: RLIMITS[name] for name in ("RLIMIT_AS", "RLIMIT_FSIZE", "RLIMIT_CORE")}
ZYGOTE_GROUP = Step("cgroups", {"memory_bytes": 6000, "processes": 7 + 4096})
CHILD_GROUP = Step("cgroups", {"memory_bytes": 5000, "processes": 7, "cpu_s": 50})
DEVICES = ["/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom"]


def spec_of(tier: str) -> SandboxSpec:
    return SandboxSpec(
        tier=tier,
        env={"A": "b"},
        limits=LIMITS,
        readable=("/srv",),
        hidden=("/srv/keys",),
        mounts={"/data": "/srv/d"} if tier == "namespaces" else {},
        port=8080,
    )


def test_the_plan_of_namespaces_is_the_whole_ordered_list() -> None:
    scratch = {"size_bytes": 4096, "files": 16}
    assert plan(spec_of("namespaces"), ALL) == Plan(
        tier="namespaces",
        root=(
            Step("namespaces", {}),
            Step(
                "root",
                {"readable": ["/srv"], "hidden": ["/srv/keys"], "mounts": {"/data": "/srv/d"}},
            ),
            Step("scratch", {**scratch, "terminals": 0, "proc": False}),
            Step("loopback", {"ports": []}),
        ),
        zygote=(
            ZYGOTE_GROUP,
            Step("capabilities", {"keep": [21]}),  # CAP_SYS_ADMIN
            Step("no_new_privs", {}),
            Step(
                "landlock",
                {
                    "readable": ["/"],
                    "hidden": [],
                    "writable": ["/box", *DEVICES],
                    "own_folder": False,
                    "ports": None,
                },
            ),
            Step("rlimits", IMPORT_RLIMITS),
            Step("seccomp", {"permit": ["setns"], "only_tcp": False}),
        ),
        cell=(
            Step("namespaces", {}),
            Step("scratch", {**scratch, "terminals": 0, "proc": True}),
            Step("loopback", {"ports": [8080]}),
            Step("polled_limits", {"memory_bytes": 5000, "cpu_s": 50, "sockets_only": True}),
        ),
        child=(
            CHILD_GROUP,
            Step("session", {"umask": 0o077}),
            Step("descriptors", {}),
            Step("environ", {"env": {"A": "b"}}),
            Step("randomness", {}),
            Step(
                "rlimits",
                {**RLIMITS, "RLIMIT_NPROC": [7, 7], "RLIMIT_SIGPENDING": [1024, 1024]},
            ),
            Step("capabilities", {"keep": []}),
            Step("no_new_privs", {}),
            Step("seccomp", {"deny": ["setns"]}),
        ),
        weaknesses=(),
    )


def test_the_plan_of_process_is_the_whole_ordered_list() -> None:
    landlocked = Step(
        "landlock",
        {
            "readable": [*SYSTEM_PATHS, *ETC_PATHS, "/etc/hosts", "/proc", "/srv"],
            "hidden": ["/srv/keys"],
            "ports": [8080],
            "writable": DEVICES,
            "own_folder": True,
        },
    )
    assert plan(spec_of("process"), ALL) == Plan(
        tier="process",
        root=(),
        zygote=(
            ZYGOTE_GROUP,
            Step("capabilities", {"keep": []}),
            Step("no_new_privs", {}),
            landlocked,
            Step("rlimits", IMPORT_RLIMITS),
            Step("seccomp", {"permit": [], "only_tcp": True}),
        ),
        cell=(),
        child=(
            CHILD_GROUP,
            Step("session", {"umask": 0o077}),
            Step("descriptors", {}),
            Step("environ", {"env": {"A": "b"}}),
            Step("randomness", {}),
            Step("rlimits", RLIMITS),
            Step("no_new_privs", {}),
            landlocked,
        ),
        weaknesses=(
            "other processes and the paths of files can be listed, though not read",
            "the proxy's port number can be connected to on any host",
            "the metadata (mode, times) of this user's own files can be changed",
        ),
    )


def test_an_allowlist_adds_a_listener_a_sealed_proxy_and_where_it_is() -> None:
    allow = ("api.example.com:443", "*.example.org:8443", "10.0.0.1:80")
    spec = dataclasses.replace(spec_of("namespaces"), allow=allow)
    made, bare = plan(spec, ALL), plan(spec_of("namespaces"), ALL)
    assert (made.root, made.zygote, made.allow) == (bare.root, bare.zygote, allow)
    assert Step("loopback", {"ports": [8080, 3128]}) in made.cell
    env = next(step.args["env"] for step in made.child if step.layer == "environ")
    assert env.keys() - {"A"} == {
        *("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "NODE_USE_ENV_PROXY"),
        *("http_proxy", "https_proxy", "all_proxy", "no_proxy"),
    }
    assert env["HTTPS_PROXY"] == env["all_proxy"] == "http://127.0.0.1:3128"
    layers = ["capabilities", "no_new_privs", "landlock", "rlimits", "seccomp"]
    assert [step.layer for step in made.egress] == layers
    landlock = made.egress[2].args
    assert landlock["ports"] == [53, 80, 443, 8443]
    assert landlock["writable"] == DEVICES
    assert "allow   api.example.com:443\nallow   *.example.org:8443" in str(made)
    assert plans.from_json(json.loads(json.dumps(plans.to_json(made)))) == made

    taken = plan(dataclasses.replace(spec, port=3128), ALL)
    assert Step("loopback", {"ports": [3128, 3129]}) in taken.cell
    assert "http://127.0.0.1:3129" in str(taken.child)
    no_namespaces = Probe({**ALL.layers, "namespaces": "no"})
    for tier, probed in (("process", ALL), ("auto", no_namespaces), ("gvisor", ALL)):
        with pytest.raises(PlanError, match=r"api\.example\.com:443.* takes the tier 'namespaces'"):
            plan(dataclasses.replace(spec, tier=tier, mounts={}), probed)


def test_mounts_need_a_root_of_their_own() -> None:
    spec = SandboxSpec(mounts={"/data": "/srv"})
    assert plan(spec, ALL).tier == "namespaces"
    no_namespaces = Probe({**ALL.layers, "namespaces": "refused"}, landlock_abi=7)
    for tier, probed in (("process", ALL), ("auto", no_namespaces), ("gvisor", ALL)):
        with pytest.raises(PlanError, match="mounts need a root"):
            plan(dataclasses.replace(spec, tier=tier), probed)


@pytest.mark.parametrize(
    ("abi", "more"),
    [
        (1, ["the network is not confined", "signals to other processes"]),
        (4, ["signals to other processes"]),
        (5, ["signals to other processes"]),
        (6, []),
    ],
)
def test_what_an_older_landlock_does_not_do_is_said(abi: int, more: list[str]) -> None:
    made = plan(SandboxSpec(tier="process"), Probe(ALL.layers, landlock_abi=abi))
    assert [note for note in made.weaknesses if note.startswith(tuple(more))] == list(
        made.weaknesses[3:]
    )
    assert len(made.weaknesses) == 3 + len(more)
    assert (
        plan(SandboxSpec(tier="namespaces"), Probe(ALL.layers, landlock_abi=abi)).weaknesses == ()
    )


NO_GROUPS = Probe({**ALL.layers, "cgroups": "not in this container"}, ALL.landlock_abi)


@pytest.mark.parametrize(
    ("wanted", "probed", "reason"),
    [("off", ALL, "cgroups are off"), ("auto", NO_GROUPS, "no cgroups: the doctor says why")],
)
def test_without_groups_limits_are_polled_and_the_plan_says_so(
    wanted: str, probed: Probe, reason: str
) -> None:
    with_groups, without = (
        plan(dataclasses.replace(spec_of("namespaces"), cgroups=name), ALL)
        for name in ("require", "off")
    )
    made = plan(dataclasses.replace(spec_of("namespaces"), cgroups=wanted), probed)
    assert made.zygote == tuple(step for step in with_groups.zygote if step != ZYGOTE_GROUP)
    assert made.child == tuple(step for step in with_groups.child if step != CHILD_GROUP)
    limits = {"memory_bytes": 5000, "cpu_s": 50}
    polled = Step("polled_limits", {**limits, "sockets_only": False})
    assert made.cell == without.cell == (*with_groups.cell[:-1], polled)
    assert with_groups.cell[-1] == Step("polled_limits", {**limits, "sockets_only": True})
    assert made.weaknesses == (
        "memory and CPU of all processes of a child together are looked at twice a second "
        f"({reason})",
    )
    weaker = plan(dataclasses.replace(spec_of("process"), cgroups=wanted), probed)
    assert (
        "the number of processes of a child is not limited, nor what they use together "
        f"({reason})" in weaker.weaknesses
    )


def test_groups_that_are_required_and_not_to_be_had_are_an_error() -> None:
    for tier in ("namespaces", "process", "auto"):
        with pytest.raises(PlanError, match="cgroups: not in this container"):
            plan(SandboxSpec(tier=tier, cgroups="require"), NO_GROUPS)


def test_auto_is_the_strongest_tier_there_is() -> None:
    assert plan(SandboxSpec(), ALL) == plan(SandboxSpec(tier="namespaces"), ALL)
    none = Probe({**ALL.layers, "namespaces": "not in this container"}, ALL.landlock_abi)
    assert plan(SandboxSpec(), none) == plan(SandboxSpec(tier="process"), none)
    neither = Probe({**none.layers, "landlock": "an old kernel"})
    with pytest.raises(PlanError) as refused:
        plan(SandboxSpec(), neither)
    for reason in (
        "namespaces: namespaces: not in this container",
        "namespaces: landlock: an old kernel",
        "process: landlock: an old kernel",
    ):
        assert reason in str(refused.value)


@pytest.mark.parametrize("tier", ["process", "namespaces"])
def test_a_plan_prints_names_of_variables_only_and_survives_json(tier: str) -> None:
    made = plan(SandboxSpec(tier=tier, env={"TOKEN": "hush", "PATH": "/bin"}), ALL)
    printed = str(made)
    assert printed.startswith(f"tier {tier}\n")
    assert "env=[PATH TOKEN]" in printed
    assert "hush" not in printed
    for weakness in made.weaknesses:
        assert f"note    {weakness}" in printed
    assert plans.from_json(json.loads(json.dumps(plans.to_json(made)))) == made


def test_a_layer_that_is_not_to_be_had_is_an_error_that_names_it() -> None:
    refused = Probe({**ALL.layers, "no_new_privs": "the kernel says no"})
    for tier in ("process", "namespaces"):
        with pytest.raises(PlanError, match=f"'{tier}' .*no_new_privs: the kernel says no"):
            plan(SandboxSpec(tier=tier), refused)
        with pytest.raises(PlanError, match="session: it was not probed"):
            plan(SandboxSpec(tier=tier), Probe({}))
    one = Probe({**ALL.layers, "loopback": "no network"})
    with pytest.raises(PlanError, match=r"'namespaces' .*loopback: no network"):
        plan(SandboxSpec(tier="namespaces"), one)


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
    layers = dict(probe().layers)
    layers.pop("cgroups")  # few machines give them to everybody
    assert set(layers.values()) == {""}


BROKEN = Step("rlimits", {"RLIMIT_UNHEARD_OF": [1, 1]})  # a limit that no kernel knows


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Plans from here on end one stage with a step that fails."""
    honest = plans.plan

    def break_stage(stage: str) -> None:
        def made(spec: SandboxSpec, probe: Probe) -> Plan:
            right = honest(spec, probe)
            steps: Any = {stage: (*getattr(right, stage), BROKEN)}
            return dataclasses.replace(right, **steps)

        monkeypatch.setattr(plans, "plan", made)

    return break_stage


@pytest.mark.parametrize("stage", ["cell", "child"])
def test_a_step_that_fails_ends_the_child_before_the_agent_runs(
    lab: Any, broken: Callable[[str], None], stage: str
) -> None:
    """Fails closed, naming the step."""
    if lab.tier == "process" and stage == "cell":
        pytest.skip("this tier has no cells")
    broken(stage)

    async def go() -> list[Any]:
        zygote = await lab.start("acts:act")
        try:
            act = {"do": "hang_deaf"}
            return [await zygote.run(act, wall_s=10.0) for _ in range(2)]
        finally:
            await zygote.close()

    for report in lab.run(go()):
        assert report.ending is Ending.SETUP_FAILED
        assert report.error.startswith("sandbox step 'rlimits' failed: AttributeError")
        assert report.stdout_tail == "", "the agent was not run"


@pytest.mark.parametrize("stage", ["root", "zygote"])
def test_a_step_that_fails_ends_the_zygote_before_the_agent_is_imported(
    lab: Any, broken: Callable[[str], None], code: Path, stage: str
) -> None:
    (code / "loud.py").write_text("print('imported', flush=True)\ndef agent(data): return 1\n")
    broken(stage)
    with pytest.raises(ZygoteFailed) as caught:
        lab.run(lab.start("loud:agent", python_path=[str(code)]))
    assert "sandbox step 'rlimits' failed: AttributeError" in caught.value.traceback
    assert "sandbox step 'rlimits' failed: AttributeError" in str(caught.value)
    assert "imported" not in caught.value.traceback


def test_a_guardian_that_dies_at_start_is_heard(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "to_json", lambda made: {})
    with pytest.raises(ZygoteFailed, match="KeyError") as caught:
        lab.run(lab.start("acts:act"))
    assert "in from_json" in caught.value.traceback
