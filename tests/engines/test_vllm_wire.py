"""What is said to vLLM and understood of it; what a request has of it over several servers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from engine_lab import make_model, request_of

from areal_sub.engines.embedded.request import Request
from areal_sub.engines.vllm.calls import Sampled
from areal_sub.engines.vllm.routing import Routes
from areal_sub.engines.vllm.weights_file import check_update, shapes_of
from areal_sub.engines.vllm.wire import Piece, ReplyError, Way, body_of, piece_of, versions_of
from areal_sub.errors import ModelError
from areal_sub.records import extend_digest, int32


def checked(**fields: Any) -> Request:
    record = request_of([1, 2, 3], **{"stop_token_ids": [9, 7], **fields})
    return Request.checked(record, request_id=0, vocab_size=97, max_model_len=64)


def test_a_request_goes_on_with_what_it_has() -> None:
    body = body_of(Way.GENERATE, checked(), [4, 5], salt="v3", stream=True, model="m")
    assert body["token_ids"] == [1, 2, 3, 4, 5]
    assert body["cache_salt"] == "v3"
    sampling = body["sampling_params"]
    assert (sampling["max_tokens"], sampling["stop_token_ids"]) == (8, [7, 9])
    body = body_of(Way.COMPLETIONS, checked(), [4, 5], salt="v3", stream=True, model="m")
    assert (body["prompt"], body["max_tokens"]) == ([1, 2, 3, 4, 5], 8)


@pytest.mark.parametrize("way", [Way.GENERATE, Way.COMPLETIONS])
def test_both_ways_say_the_same(way: Way) -> None:
    choice: dict[str, Any] = {"token_ids": [5, 6], "finish_reason": "stop"}
    answer: dict[str, Any] = {"choices": [choice]}
    if way is Way.GENERATE:
        answer["prompt_token_ids"] = [1, 2]
        choice["logprobs"] = {"content": [{"logprob": -0.5}, {"logprob": -1.0}]}
    else:
        choice["prompt_token_ids"] = [1, 2]
        choice["logprobs"] = {"token_logprobs": [-0.5, -1.0]}
    assert piece_of(way, answer) == Piece([1, 2], [5, 6], [-0.5, -1.0], "stop", None)
    assert piece_of(way, {"choices": []}) is None


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"error": {"message": "no"}}, "failed the request"),
        ({"choices": [{"token_ids": [1, 2], "logprobs": None}]}, "2 tokens with 0 logprobs"),
        (
            {"choices": [{"token_ids": [1], "logprobs": {"content": [{"logprob": -9999.0}]}}]},
            "not finite",
        ),
        ({"choices": [3]}, "not understood"),
        ([], "not understood"),
    ],
)
def test_what_is_no_answer_is_told(answer: Any, message: str) -> None:
    with pytest.raises(ReplyError, match=message):
        piece_of(Way.GENERATE, answer)


def test_versions_cover_every_token() -> None:
    assert versions_of([("3", 0, 2), ("4", 2, 5)], 5) == [3, 3, 4, 4, 4]
    with pytest.raises(ReplyError, match="do not cover"):
        versions_of([("3", 0, 2)], 3)
    with pytest.raises(ReplyError, match="'default'"):
        versions_of([("default", 0, 2)], 2)


def test_a_request_over_two_servers_is_one_sequence() -> None:
    sampled = Sampled()
    sampled.take(Piece([1, 2, 3], [4], [-0.1], None, None), 0, 0)
    first = sampled.chunk()
    sampled.take(Piece(None, [5], [-0.2], None, None), 0, 0)  # its server dies, the span unsaid
    # The next one reads the prompt and both; version 1 comes into force in it.
    sampled.take(
        Piece([1, 2, 3, 4, 5], [6, 7], [-0.3, -0.4], "stop", [("0", 0, 1), ("1", 1, 2)]), 0, 2
    )
    second = sampled.chunk()
    assert (first.token_ids.tolist(), second.token_ids.tolist()) == ([4], [5, 6, 7])
    assert second.versions.tolist() == [0, 0, 1]
    assert (first.finish_reason, second.finish_reason) == (None, "stop")
    assert second.digests[-1] == extend_digest(0, int32([1, 2, 3, 4, 5, 6, 7]))
    assert first.digests[0] == extend_digest(0, int32([1, 2, 3, 4]))


def test_a_rollout_stays_where_its_prefix_is() -> None:
    routes = Routes()
    assert routes.choose("a", {0: 3, 1: 1}) == 1
    assert routes.choose("a", {0: 0, 1: 9}) == 1
    assert routes.choose("b", {0: 0, 1: 9}) == 0
    assert routes.choose("a", {0: 5}) == 0  # the other has died
    assert routes.choose("a", {0: 5, 1: 0}) == 0


def test_an_update_has_to_fit_the_model(tmp_path: Path) -> None:
    for name in ("llama", "llama-gqa"):
        make_model(name).save_pretrained(tmp_path / name)
    base = shapes_of(tmp_path / "llama")
    check_update(tmp_path / "llama", base, tied=True)
    with pytest.raises(
        ModelError, match=r"unexpected lm_head\.weight.*k_proj.weight is \[24, 48\]"
    ):
        check_update(tmp_path / "llama-gqa", base, tied=False)
    with pytest.raises(ModelError, match=r"missing lm_head\.weight"):
        check_update(tmp_path / "llama", shapes_of(tmp_path / "llama-gqa"), tied=False)
    with pytest.raises(ModelError, match="cannot read weights"):
        check_update(tmp_path / "nothing", base, tied=True)
