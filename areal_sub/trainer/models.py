"""Finds the model folder that a run starts from: made, local, or from the hub."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from areal_sub.config.schema import ActorConfig
from areal_sub.errors import ModelError, WorkflowError
from areal_sub.workflow.resolve import resolve_target


def check_model(actor: ActorConfig) -> None:
    """Raises `ModelError` where `actor.path` names a folder without a model; makes nothing."""
    path = Path(actor.path)
    if actor.warm_start is not None or (path / "config.json").is_file():
        return
    if path.exists():
        raise ModelError(f"actor.path: {path} holds no config.json, so it is no model folder")
    if actor.path.startswith(("/", "./", "../")):
        raise ModelError(f"actor.path: there is no folder {path}")


def model_folder(actor: ActorConfig, *, seed: int, say: Callable[[str], None]) -> Path:
    """A folder with `config.json`. Raises `ModelError` naming the path and what to do."""
    path = Path(actor.path)
    if (path / "config.json").is_file():
        return path
    if actor.warm_start is not None:
        say(f"making the starting policy {path} (once, by {actor.warm_start})")
        try:
            make = cast(Callable[[Path, int], Any], resolve_target(actor.warm_start))
        except WorkflowError as error:
            raise ModelError(f"actor.warm_start: {error}") from error
        path.parent.mkdir(parents=True, exist_ok=True)
        make(path, seed)
        return path
    check_model(actor)
    return _from_hub(actor.path)


def _from_hub(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download

        return Path(
            snapshot_download(
                name, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
            )
        )
    except Exception as error:
        raise ModelError(
            f"actor.path: {name!r} is neither a folder here nor to be had from the hub "
            f"({type(error).__name__}: {error}); give a Hugging Face model folder"
        ) from error
