"""For all tests: property tests try the same examples on every machine, in every run; what needs a
real vLLM runs where `make test-vllm` says which interpreter has one."""

from __future__ import annotations

import os

import pytest
from hypothesis import settings

settings.register_profile("same", derandomize=True, database=None, deadline=None)
settings.load_profile("same")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if "AREAL_SUB_VLLM_PYTHON" in os.environ:
        return
    for item in items:
        if item.get_closest_marker("vllm") is not None:
            item.add_marker(pytest.mark.skip(reason="needs a real vLLM: make test-vllm"))
