"""Recorded turns, given out to whoever asks as it was asked then."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from areal_sub.cli import run
from areal_sub.records import Fork, GenerateRequest, TurnRecord, extend_digest, float32, int32
from areal_sub.replay.engine import chunk_of
from areal_sub.replay.recording import Divergence, Recording


class Letters:
    """Token n is the nth letter; 0 begins a message."""

    control_ids: dict[str, int] = {"<": 0}  # noqa: RUF012

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join("<" if i == 0 else chr(96 + i) for i in token_ids)


def ids(text: str) -> list[int]:
    return [0 if letter == "<" else ord(letter) - 96 for letter in text]


def turn(
    turn_id: str, context: str, sampled: str, parent: str | None = None, before: int = 0
) -> TurnRecord:
    return TurnRecord(
        rollout_id="r", turn_id=turn_id, parent_turn_id=parent, fork=Fork.NONE,
        context_token_ids=int32(ids(context)), token_ids=int32(ids(sampled)),
        rollout_logprobs=float32([-0.5] * len(sampled)), versions=int32([3] * len(sampled)),
        finish_reason="stop", dialect="chat", model="m", temperature=1.0, top_p=1.0,
        started_at=0.0, ended_at=0.0, num_prompt_tokens=before + len(context),
    )  # fmt: skip


def recording() -> Recording:
    return Recording([turn("one", "<hello<", "yes"), turn("two", "<more<", "ok", "one", 10)])


WORDS = Letters()


def test_answers_come_as_they_were_asked_for() -> None:
    recorded = recording()
    first = recorded.give(int32(ids("<hello<")), 10, WORDS)
    assert first.turn_id == "one" and recorded.num_given == 1
    second = recorded.give(int32(ids("<hello<yes<more<")), 2, WORDS)
    assert second.turn_id == "two" and recorded.num_given == len(recorded) == 2
    with pytest.raises(Divergence, match="call 3: the recorded rollout made 2 calls; this is one"):
        recorded.give(int32(ids("<hello<")), 10, WORDS)


def test_siblings_are_given_out_one_by_one() -> None:
    recorded = Recording([turn(name, "<a<", sampled) for name, sampled in (("x", "b"), ("y", "c"))])
    asked = int32(ids("<a<"))
    assert [recorded.give(asked, 9, WORDS).turn_id for _ in range(2)] == ["x", "y"]


def test_the_first_token_that_differs_is_named_with_its_message_and_text() -> None:
    recorded = recording()
    recorded.give(int32(ids("<hello<")), 10, WORDS)
    with pytest.raises(Divergence) as error:
        recorded.give(int32(ids("<hello<yes<morning<")), 10, WORDS)
    assert str(error.value) == (
        "call 2: at token 14 of its prompt, in message 3, after '<hello<yes<mor': "
        "recorded is 'e<', asked is 'ning<' (turn two)"
    )
    with pytest.raises(Divergence, match=r"asked is its end \(turn two\)"):
        recorded.give(int32(ids("<hello<yes<mo")), 10, WORDS)
    with pytest.raises(Divergence, match="asks for at most 1 tokens; the recorded answer has 2"):
        recorded.give(int32(ids("<hello<yes<more<")), 1, WORDS)


def test_an_answer_is_certified_as_it_was() -> None:
    asked = GenerateRequest(
        prompt_token_ids=int32(ids("<hello<")), max_new_tokens=9, temperature=1.0
    )
    chunk = chunk_of(turn("one", "<hello<", "yes"), asked)
    assert chunk.finish_reason == "stop" and chunk.token_ids.tolist() == ids("yes")
    assert chunk.digests[-1] == extend_digest(0, int32(ids("<hello<yes")))


def test_a_limit_below_zero_is_no_number_of_rollouts(capsys: pytest.CaptureFixture[str]) -> None:
    """It is refused before the run is looked for; it would count from the end."""
    assert run(["replay", "any", "--limit", "-1"]) == 2
    assert "--limit: a number of rollouts, or 0 for all" in capsys.readouterr().err
