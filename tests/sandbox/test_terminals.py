"""Pseudo-terminals: a child's own where the spec says so, as many as it says; else none."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from sandbox import ChildReport, Ending, Limits, PlanError, SandboxSpec, SpecError

NUM_TERMINALS = 3


@pytest.fixture
def act(lab: Any) -> Any:
    def act(*acts: str, terminals: int = NUM_TERMINALS) -> list[ChildReport]:
        async def go() -> list[ChildReport]:
            zygote = await lab.start("terminals:act", limits=Limits(terminals=terminals))
            try:
                return [await zygote.run({"do": each}, wall_s=30.0) for each in acts]
            finally:
                await zygote.close()

        if lab.tier == "process":
            with pytest.raises(PlanError, match="terminals take the tier 'namespaces'"):
                lab.run(go())
            pytest.skip("the tier has none")
        return list(lab.run(go()))

    return act


def test_a_program_is_driven_by_a_terminal_of_the_childs_own(act: Any) -> None:
    [report] = act("drive")
    assert report.error == ""
    status, _, said = report.value.partition(" ")
    assert status == "0"
    assert "<typed>" in said


def test_there_are_as_many_as_the_spec_says_in_each_child(act: Any) -> None:
    reports = act("exhaust", "exhaust")
    assert [each.value for each in reports] == [[NUM_TERMINALS, errno.ENOSPC]] * 2


def test_nothing_is_typed_for_others_and_no_discipline_is_loaded(act: Any) -> None:
    [report] = act("misuse")
    assert report.value == [errno.EPERM, errno.EPERM]


def test_who_holds_a_terminal_ends_with_the_child(act: Any) -> None:
    left, after = act("leave", "drive")
    assert (left.ending, left.num_killed) == (Ending.RETURNED, 1)
    assert "<typed>" in after.value


def test_without_the_limit_there_is_not_even_the_device(lab: Any) -> None:
    if lab.tier == "process":
        pytest.skip("/dev is the host's there: see the attacks")

    async def go() -> ChildReport:
        zygote = await lab.start("terminals:act")
        try:
            return await zygote.run({"do": "there"})
        finally:
            await zygote.close()

    assert lab.run(go()).value == [False, False]


def test_the_number_is_checked() -> None:
    with pytest.raises(SpecError, match=r"limits\.terminals"):
        Limits(terminals=-1)
    spec = SandboxSpec(limits=Limits(terminals=2))
    assert SandboxSpec.from_json(spec.to_json()) == spec
