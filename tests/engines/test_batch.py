from __future__ import annotations

import itertools

from areal_sub.engines.embedded.batch import (
    capacity,
    compaction,
    num_admitted,
    prefill_chunks,
    turns,
)


def test_prefill_takes_whole_prompts_while_the_padded_pass_fits() -> None:
    assert prefill_chunks([10, 10, 10], budget=30) == [10, 10, 10]
    assert prefill_chunks([10, 10, 10], budget=29) == [10, 10]
    assert prefill_chunks([5, 20, 5], budget=30) == [5]  # 2 rows of 20 would be 40
    assert prefill_chunks([], budget=30) == []


def test_a_prompt_over_the_budget_is_computed_in_pieces_and_alone() -> None:
    assert prefill_chunks([100, 1], budget=30) == [30]


def test_who_asks_for_much_at_once_waits_for_himself() -> None:
    assert turns("", "aaabac") == [0, 3, 5, 1, 2, 4]
    assert turns("aab", "abca") == [2, 1, 0, 3]
    assert turns("ab", "") == []
    assert turns("", "aaaa") == [0, 1, 2, 3]


def test_admission_is_in_order_of_arrival() -> None:
    assert num_admitted([], [5, 5, 5], max_rows=2, max_kv_tokens=1000) == 2
    assert num_admitted([5, 5], [5], max_rows=2, max_kv_tokens=1000) == 0
    # The long one would make all rows long, and what came after it does not overtake it.
    assert num_admitted([10], [100, 10], max_rows=8, max_kv_tokens=199) == 0
    assert num_admitted([10], [100, 10], max_rows=8, max_kv_tokens=200) == 1
    assert num_admitted([], [100], max_rows=8, max_kv_tokens=10) == 1


def test_compaction_leaves_no_hole_and_loses_no_row() -> None:
    for num_decoding, partial in itertools.product(range(5), (0, 1)):
        num_rows = num_decoding + partial
        for size in range(num_rows + 1):
            for ended in itertools.combinations(range(num_rows), size):
                rows: list[int | None] = [None if r in ended else r for r in range(num_rows)]
                for source, target in compaction(num_decoding, num_rows, set(ended)):
                    assert rows[target] is None, "a live row was overwritten"
                    rows[target], rows[source] = rows[source], None
                left = num_rows - size
                assert sorted(r for r in rows[:left] if r is not None) == [
                    r for r in range(num_rows) if r not in ended
                ]
                if partial and num_decoding not in ended:
                    assert rows[left - 1] == num_decoding, "the partial row is the last"


def test_capacity_grows_by_a_quarter_and_shrinks_late() -> None:
    assert capacity(0, 1, step=64) == 64
    assert capacity(64, 64, step=64) == 64
    assert capacity(1024, 1025, step=64) == 1280
    assert capacity(1024, 256, step=64) == 1024
    assert capacity(1024, 255, step=64) == 512
