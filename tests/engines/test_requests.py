from __future__ import annotations

from typing import Any

import pytest

from areal_sub.engines.embedded.request import PromptTooLong, Request, RequestError
from areal_sub.engines.embedded.settings import EngineSettings
from areal_sub.errors import ConfigError
from areal_sub.records import GenerateRequest, int32


def checked(**fields: Any) -> Request:
    values = {"prompt_token_ids": int32([1, 2, 3]), "max_new_tokens": 5, "temperature": 1.0}
    record = GenerateRequest(**{**values, **fields})
    return Request.checked(record, request_id=0, vocab_size=10, max_model_len=8)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt_token_ids": int32([])}, "empty"),
        ({"prompt_token_ids": int32([1, 10])}, r"prompt_token_ids\[1\] is 10"),
        ({"prompt_token_ids": int32([-1])}, r"prompt_token_ids\[0\] is -1"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids"),
    ],
)
def test_a_bad_field_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        checked(**fields)


def test_a_prompt_must_leave_room_for_one_token() -> None:
    assert checked(prompt_token_ids=int32([1] * 7)).max_new_tokens == 1
    with pytest.raises(PromptTooLong, match="8 tokens; max_model_len 8"):
        checked(prompt_token_ids=int32([1] * 8))


def test_a_temperature_too_small_to_divide_by_is_greedy() -> None:
    assert checked(temperature=1e-8).temperature == 0
    assert checked(temperature=0.01).temperature == 0.01


def test_appending_ends_at_a_stop_token_or_at_the_limit() -> None:
    request = checked(stop_token_ids=[4], max_new_tokens=2)
    assert request.append(3, -0.5, 0) is None
    assert request.append(5, -0.5, 0) == "length"
    request = checked(stop_token_ids=[4], max_new_tokens=2)
    assert request.append(4, -0.5, 7) == "stop"
    assert (request.token_ids, request.logprobs, request.versions) == ([4], [-0.5], [7])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_runing_requests": 1}, "unknown .*max_runing_requests"),
        ({"socket_path": None}, "socket_path"),
        ({"dtype": "int8"}, "dtype"),
        ({"num_threads": 0}, "num_threads"),
        ({"max_running_requests": None}, "max_running_requests"),
    ],
)
def test_a_bad_setting_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineSettings.from_map({"socket_path": "s", "model_path": "m", **change})
