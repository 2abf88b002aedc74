"""Who joins the batch, who moves in it, how large its buffers are. Pure functions of sizes.

The batch is the rows `[0, num_rows)` of the cache, without holes, so that a forward pass works on
a view and never gathers keys and values: first the rows that decode, then at most one whose prompt
is only partly computed. The decode thread carries out what is decided here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence


def prefill_chunks(lengths: Sequence[int], *, budget: int) -> list[int]:
    """How many prompt tokens of each of the first requests to compute in this step.

    `lengths` are the tokens still to compute, in order of arrival. The answer covers a prefix of
    them; all but its last entry are whole. The pass is padded to its longest chunk, so what is held
    under `budget` is `len(chunks) * max(chunks)`; the first request always gets something.
    """
    chunks: list[int] = []
    for length in lengths:
        widest = max([length, *chunks])
        if widest * (len(chunks) + 1) > budget:
            break
        chunks.append(length)
    if not chunks and lengths:
        return [min(lengths[0], budget)]
    return chunks


def turns(running: Iterable[str], waiting: Iterable[str]) -> list[int]:
    """The order in which those that wait may join, as their indices: one of each rollout, then a
    second one of each, and so on, with those that are running counted; else in order of arrival.

    Both are whose each request is. So who asks for much at once waits for himself.
    """
    nums = Counter(running)
    turn_of = []
    for whose in waiting:
        turn_of.append(nums[whose])
        nums[whose] += 1
    return sorted(range(len(turn_of)), key=turn_of.__getitem__)


def num_admitted(
    running: Iterable[int], waiting: Iterable[int], *, max_rows: int, max_kv_tokens: int
) -> int:
    """How many of `waiting` may get a row now, in their order.

    Both are `max_tokens` of requests. Rows are as long as the longest one, so a batch holds at most
    `rows * longest` tokens: what keeps that under `max_kv_tokens` never has to be evicted. An empty
    batch takes one in any case.
    """
    lengths = list(running)
    num_rows, longest = len(lengths), max(lengths, default=0)
    count = 0
    for length in waiting:
        longest = max(longest, length)
        num_rows += 1
        if num_rows > max_rows or (num_rows > 1 and num_rows * longest > max_kv_tokens):
            break
        count += 1
    return count


def compaction(num_decoding: int, num_rows: int, ended: set[int]) -> list[tuple[int, int]]:
    """Moves `(from, to)`, in order, after which the rows that have not ended have no holes.

    Holes are filled from the end, so one ended row costs at most two moves; a partly computed row
    (`num_rows > num_decoding`) stays the last one. Every target has ended or was moved before.
    """
    moves: list[tuple[int, int]] = []
    holes = sorted(row for row in ended if row < num_decoding)
    last = num_decoding - 1
    for hole in holes:
        while last in ended:
            last -= 1
        if last <= hole:
            break
        moves.append((last, hole))
        last -= 1
    num_left = num_decoding - len(holes)
    moves += [
        (row, num_left + i)
        for i, row in enumerate(r for r in range(num_decoding, num_rows) if r not in ended)
        if row != num_left + i
    ]
    return moves


def capacity(current: int, needed: int, *, step: int) -> int:
    """The size that a buffer of `current` should have to hold `needed`, in multiples of `step`.

    Grows by at least a quarter, so that growing is rare; shrinks when less than a quarter is
    needed, so that one long request does not cost memory for ever.
    """
    if needed > current:
        wanted = max(needed, current + current // 4)
    elif needed * 4 < current:
        wanted = needed * 2
    else:
        return current
    return -(-wanted // step) * step
