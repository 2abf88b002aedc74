"""A model folder and a renderer for each family."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
from model_families import FAMILIES, Family, make_model_folder

from areal_sub.proxy.render import Renderer


@pytest.fixture(scope="session")
def renderer_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Family], Renderer]:
    @functools.cache
    def load(name: str) -> Renderer:
        family = next(family for family in FAMILIES if family.name == name)
        folder: Path = make_model_folder(family, tmp_path_factory.mktemp(name))
        return Renderer.load(folder, None, "auto", family.reasoning_parser)

    return lambda family: load(family.name)


@pytest.fixture(params=FAMILIES, ids=lambda family: family.name)
def family(request: pytest.FixtureRequest) -> Family:
    found: Family = request.param
    return found


@pytest.fixture
def renderer(family: Family, renderer_of: Callable[[Family], Renderer]) -> Renderer:
    return renderer_of(family)
