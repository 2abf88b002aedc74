from __future__ import annotations

from areal_sub.engines.embedded.prefixes import MIN_MATCH, Prefix, Prefixes
from areal_sub.records import int32


def entry(affinity: str, tokens: range, num_bytes: int = 1) -> Prefix:
    return Prefix(affinity, int32(tokens), [], num_bytes)


def test_the_longest_match_of_the_same_affinity_is_found() -> None:
    store = Prefixes(max_bytes=100)
    store.add(entry("a", range(20)))
    store.add(entry("b", range(40)))
    hit = store.find("a", int32(range(60)))
    assert hit is not None and hit[1] == 20
    assert store.find("c", int32(range(60))) is None


def test_the_last_prompt_token_is_never_taken_from_the_store() -> None:
    store = Prefixes(max_bytes=100)
    store.add(entry("a", range(40)))
    hit = store.find("a", int32(range(30)))
    assert hit is not None and hit[1] == 29


def test_a_short_match_is_not_worth_it() -> None:
    store = Prefixes(max_bytes=100)
    store.add(entry("a", range(40)))
    other = [*range(MIN_MATCH - 1), 999, *range(50)]
    assert store.find("a", int32(other)) is None


def test_a_continuation_takes_its_beginnings_place() -> None:
    store = Prefixes(max_bytes=100)
    store.add(entry("a", range(20)))
    store.add(entry("a", range(100, 120)))
    store.add(entry("a", range(40)))
    assert len(store) == 2


def test_the_least_recently_used_goes_first() -> None:
    store = Prefixes(max_bytes=30)
    for affinity in "abc":
        store.add(entry(affinity, range(20), num_bytes=10))
    assert store.find("a", int32(range(30))) is not None
    store.add(entry("d", range(20), num_bytes=10))
    assert store.find("b", int32(range(30))) is None
    assert store.find("a", int32(range(30))) is not None
    assert store.num_bytes == 30


def test_what_is_without_affinity_or_too_large_is_not_wanted() -> None:
    store = Prefixes(max_bytes=30)
    assert store.wants("a", MIN_MATCH, 30)
    assert not store.wants("", MIN_MATCH, 30)
    assert not store.wants("a", MIN_MATCH, 31)
    assert not Prefixes(0).wants("a", MIN_MATCH, 1)
