"""The agent plane under generated calls: whatever they hold, it is never our failure."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode

from areal_sub.proxy.openapi import BODIES, document
from areal_sub.proxy.routes import ELSEWHERE_BASES, make_routes

PUBLISHED = Path(__file__).parents[2] / "docs" / "openapi.json"
DOCUMENT = document()
SCHEMA = schemathesis.openapi.from_dict(DOCUMENT)
OPERATIONS = [
    (path, method) for path, methods in sorted(DOCUMENT["paths"].items()) for method in methods
]


def test_the_published_document_is_this_one() -> None:
    assert json.loads(PUBLISHED.read_text()) == DOCUMENT, (
        "run: python -m areal_sub.proxy.openapi > docs/openapi.json"
    )


def calls(path: str, method: str, mode: GenerationMode) -> list[Any]:
    """The same each time."""
    cases: list[Any] = []

    @settings(
        max_examples=6,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=SCHEMA[path][method].as_strategy(generation_mode=mode))
    def collect(case: Any) -> None:
        cases.append(case)

    collect()
    return cases


def test_every_route_that_is_posted_to_has_a_body() -> None:
    posted = {path for path, method in OPERATIONS if method == "post"}
    assert posted == {p for p in posted if any(p.endswith(end) for end in BODIES)}
    routes = make_routes(None)  # type: ignore[arg-type]
    served = {route.path for route in routes if route.path.startswith("/v1")}
    also = {path for path in served if path.startswith(ELSEWHERE_BASES)}
    assert len(served - also) == len(DOCUMENT["paths"])


@pytest.mark.parametrize(
    ("path", "method", "mode"),
    [
        (path, method, mode)
        for path, method in OPERATIONS
        for mode in GenerationMode
        if method == "post" or mode is GenerationMode.POSITIVE
    ],
)
def test_no_call_is_a_failure_of_ours(
    proxied: Any, path: str, method: str, mode: GenerationMode
) -> None:
    cases = calls(path, method, mode)
    statuses: list[int] = []

    async def work(proxy: Any) -> None:
        proxy.engine.says("Hi<|im_end|>", '<tool_call>\n{"name": "f"}\n</tool_call><|im_end|>')
        rollout = await proxy.open(max_turns=10**6)

        for case in cases:
            case.headers = {**(case.headers or {}), "authorization": f"Bearer {rollout.key}"}
            response = await asyncio.to_thread(case.call, base_url=proxy.url, timeout=20)
            assert response.status_code < 500, (case.body, response.content)
            statuses.append(response.status_code)
        rejected = (await proxy.stats())["num_rejected"]
        assert "internal" not in rejected

    proxied(work)
    if path == "/v1/chat/completions" and mode is GenerationMode.POSITIVE:
        assert 200 in statuses, "the document describes calls that are answered"
