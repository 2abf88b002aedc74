"""Micro-batches: nothing lost, nothing twice, within the budget."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from areal_sub.learner.batch import Scored, collate, micro_batches, plan_micro_batches
from areal_sub.records import float32
from areal_sub.trajectory.samples import TrainingSample

MakeScored = Callable[..., Scored]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 40), max_size=30), st.integers(1, 100), st.booleans())
def test_plan_covers_everything_within_the_budget(
    lengths: list[int], max_tokens: int, pack: bool
) -> None:
    plan = plan_micro_batches(lengths, max_tokens, pack=pack)
    assert sorted(i for rows in plan for row in rows for i in row) == list(range(len(lengths)))
    for rows in plan:
        widths = [sum(lengths[i] for i in row) for row in rows]
        longest = max(lengths[i] for row in rows for i in row)
        assert max(widths) == longest  # a shared row is no longer than the longest sample
        assert len(rows) * longest <= max_tokens or len(rows) == len(rows[0]) == 1
        assert pack or all(len(row) == 1 for row in rows)


def test_plan_fills_rows_or_pairs_like_lengths_and_leaves_the_overlong_alone() -> None:
    lengths = [2, 9, 3, 50, 8]
    assert plan_micro_batches(lengths, 20, pack=False) == [[[3]], [[1], [4]], [[2], [0]]]
    lengths = [9, 2, 50, 5, 3]
    assert plan_micro_batches(lengths, 20, pack=True) == [[[2]], [[0], [3, 4]], [[1]]]


@pytest.fixture(scope="session")
def scored(make_sample: Callable[..., TrainingSample]) -> MakeScored:
    def make(tokens: list[int], trained: list[int], advantage: float = 1.0) -> Scored:
        sample = make_sample(tokens, trained, logprobs=[-0.5 * t for t in trained], value=1.0)
        return Scored(sample, float32(np.full(len(tokens), advantage)))

    return make


def test_collate_points_at_where_each_trained_token_is_predicted(scored: MakeScored) -> None:
    batch = collate([[scored([5, 6, 7, 8, 9], [2, 3], 2.0)], [scored([3, 4, 1, 1], [1], -1.0)]])
    # Nothing after the last trained token is read, nor that token itself.
    assert batch.input_ids.tolist() == [[5, 6, 7], [3, 0, 0]]
    assert batch.positions.tolist() == [1, 2, 3]
    assert batch.targets.tolist() == [7, 8, 4]
    assert batch.rollout_logprobs.tolist() == [-1.0, -1.5, -0.5]
    assert batch.advantages.tolist() == [2.0, 2.0, -1.0]
    assert batch.sequences.tolist() == [0, 0, 1] and batch.num_sequences == 2
    assert batch.position_ids is None
    assert (batch.num_inputs, batch.num_trained_tokens) == (4, 3)


def test_samples_share_a_row_with_positions_of_their_own(scored: MakeScored) -> None:
    rows = [[scored([5, 6, 7, 8], [2, 3])], [scored([3, 4, 1], [1]), scored([9, 2], [1])]]
    batch = collate(rows)
    assert batch.input_ids.tolist() == [[5, 6, 7], [3, 9, 0]]
    assert batch.position_ids is not None
    assert batch.position_ids.tolist() == [[0, 1, 2], [0, 0, 1]]
    assert batch.positions.tolist() == [1, 2, 3, 4]
    assert batch.targets.tolist() == [7, 8, 4, 2]
    assert batch.sequences.tolist() == [0, 0, 1, 2]


def test_the_first_token_cannot_be_trained(scored: MakeScored) -> None:
    with pytest.raises(ValueError, match="first token"):
        collate([[scored([5, 6], [0, 1])]])


@settings(max_examples=50, deadline=None)
@given(
    rows=st.lists(
        st.integers(2, 12).flatmap(
            lambda n: st.tuples(
                st.lists(st.integers(0, 99), min_size=n, max_size=n),
                st.sets(st.integers(1, n - 1), min_size=1),
            )
        ),
        min_size=1,
        max_size=10,
    ),
    max_tokens=st.integers(1, 60),
    pack=st.booleans(),
)
def test_every_trained_token_is_predicted_once_after_its_own_prefix(
    scored: MakeScored, rows: list[tuple[list[int], set[int]]], max_tokens: int, pack: bool
) -> None:
    items = [scored(tokens, sorted(trained)) for tokens, trained in rows]
    expected = sorted((tuple(tokens[:i]), tokens[i]) for tokens, trained in rows for i in trained)
    got = []
    for batch in micro_batches(items, max_tokens, pack=pack):
        width = batch.input_ids.shape[1]
        for position, target in zip(batch.positions.tolist(), batch.targets.tolist(), strict=True):
            row, column = divmod(position, width)
            start = 0
            if batch.position_ids is not None:
                start = column - int(batch.position_ids[row, column])
            got.append((tuple(batch.input_ids[row, start : column + 1].tolist()), target))
    assert sorted(got) == expected
