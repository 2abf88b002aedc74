"""Why each token was trained or not, from a rollout's records alone."""

from __future__ import annotations

import pytest
from inspection_rollouts import began, forked, judged

from areal_sub.inspection.tokens import Span, explain, turn_causes
from areal_sub.records import Fate, Masked

Row = tuple[str, int, int, str, float | None]


def spans(found: list[object]) -> list[list[Row]]:
    return [
        [(s.turn_id, s.start, s.end, s.why, s.advantage) for s in each.spans]  # type: ignore[attr-defined]
        for each in found
    ]


def rows(*values: Row) -> list[Row]:
    return list(values)


def test_each_token_of_a_trained_rollout_has_its_reason() -> None:
    """a → b, and c that forks from a; the engine does not vouch for c."""
    trajectory = forked(vouched=("a", "b"), turn_rewards={"a": 0.5, "b": 1.0, "c": 0.0})
    judgement = judged(
        Fate.TRAINED, trajectory, mean=1.0, scale=2.0, attempt_began=began(discount=0.0)
    )
    found = explain(judgement, trajectory)
    assert spans(found) == [  # type: ignore[arg-type]
        rows(
            ("a", 0, 2, "context", None),
            ("a", 2, 4, "trained", -1.0),
            ("b", 4, 5, "context", None),
            ("b", 5, 8, "zero_advantage", 0.0),
        ),
        rows(
            ("a", 0, 2, "context", None),
            ("a", 2, 4, "shared", None),
            ("c", 4, 6, "context", None),
            ("c", 6, 7, "uncertified", None),
        ),
    ]
    assert {
        turn_id: span.why for turn_id, span in turn_causes(judgement, trajectory, found).items()
    } == {
        "a": "trained",
        "b": "zero_advantage",
        "c": "uncertified",
    }


def test_with_a_kl_penalty_advantage_0_is_trained_too() -> None:
    trajectory = forked(turn_rewards={})
    judgement = judged(Fate.TRAINED, trajectory, mean=1.0, scale=0.0, attempt_began=began(kl=True))
    whys = {s.why for each in explain(judgement, trajectory) for s in each.spans}
    assert whys == {"context", "shared", "trained"}


@pytest.mark.parametrize("style", ["concat", "individual"])
@pytest.mark.parametrize("fate", [Fate.STALE, Fate.UNDONE, Fate.UNUSED, Fate.NO_BASELINE])
def test_what_was_in_no_step_is_masked_by_the_name_of_its_fate(style: str, fate: Fate) -> None:
    trajectory = forked(turn_rewards={})
    judgement = judged(fate, trajectory, attempt_began=began(style=style))
    found = explain(judgement, trajectory)
    causes = turn_causes(judgement, trajectory, found)
    assert {turn_id: span.why for turn_id, span in causes.items()} == dict.fromkeys("abc", fate)
    assert len(found) == (2 if style == "concat" else 3)
    own = sum(span.end - span.start for span in causes.values())
    assert own == 6, "each sampled token is in exactly one span of its own"


def test_the_spans_of_a_sample_are_all_of_it() -> None:
    trajectory = forked(turn_rewards={})
    for each in explain(judged(Fate.TRAINED, trajectory), trajectory):
        ends = [0, *(span.end for span in each.spans)]
        assert [span.start for span in each.spans] == ends[:-1]
        assert ends[-1] == len(each.sample.token_ids)
        assert all(isinstance(span, Span) for span in each.spans)


@pytest.mark.parametrize("style", ["concat", "individual"])
def test_what_was_not_due_says_why_also_where_it_is_in_no_sample(style: str) -> None:
    """b is the main branch; c, which forks from a, is not."""
    trajectory = forked(turn_rewards={"b": 1.0})
    judgement = judged(Fate.TRAINED, trajectory, attempt_began=began(style=style, credit="main"))
    found = explain(judgement, trajectory)
    causes = turn_causes(judgement, trajectory, found)
    assert {turn_id: span.why for turn_id, span in causes.items()} == {
        "a": "trained",
        "b": "trained",
        "c": Masked.SIDE_BRANCH,
    }
    assert all(span.turn_id != "c" for each in found for span in each.spans)
