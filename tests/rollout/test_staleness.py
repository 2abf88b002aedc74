"""The admission rule, as whole values."""

from __future__ import annotations

import pytest

from areal_sub.rollout.staleness import Admission


def startable(admission: Admission, version: int, consumed: int, pending: int, running: int) -> int:
    return admission.num_startable(
        version=version,
        num_consumed=consumed,
        num_pending=pending,
        num_running_rollouts=running,
    )


def admission(eta: int, *, concurrent: int = 1000) -> Admission:
    return Admission(
        batch_size=8, max_head_offpolicyness=eta, max_concurrent_rollouts=concurrent, num_samples=16
    )


@pytest.mark.parametrize(
    ("eta", "version", "consumed", "pending", "expected"),
    [
        (0, 0, 0, 0, 8),  # synchronous: exactly the next batch
        (0, 0, 0, 8, 0),
        (0, 0, 8, 0, 0),  # the learner steps: nothing starts before the new version
        (0, 1, 8, 0, 8),
        (2, 0, 0, 0, 24),  # eta more batches ahead
        (2, 5, 40, 24, 0),
        (2, 5, 40, 20, 4),
        (0, 0, 8, 3, 0),  # never negative
    ],
)
def test_staleness_bounds_what_may_start(
    eta: int, version: int, consumed: int, pending: int, expected: int
) -> None:
    assert startable(admission(eta), version, consumed, pending, 0) == expected


@pytest.mark.parametrize(
    ("concurrent", "running", "expected"),
    [(64, 0, 4), (64, 64, 0), (64, 63, 1), (8, 0, 1), (8, 8, 0)],
)
def test_concurrency_bounds_what_may_start(concurrent: int, running: int, expected: int) -> None:
    assert startable(admission(4, concurrent=concurrent), 0, 0, 0, running) == expected
