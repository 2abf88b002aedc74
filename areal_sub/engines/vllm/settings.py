"""The engine's settings file, checked: the one place that knows its keys and their defaults."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from areal_sub.errors import ConfigError, ModelError

DEFAULT_MAX_MODEL_LEN = 4096
# What vLLM's --max-lora-rank may be.
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmSettings:
    socket_path: Path
    model_path: Path
    """A Hugging Face model folder; its weights have the version `policy_version`."""
    dtype: str = "float32"
    python: str | None = None
    """The interpreter that has vLLM; a server of ours is started with it."""
    urls: list[str] = field(default_factory=list)
    """Servers that run already, instead."""
    args: list[str] = field(default_factory=list)
    """Flags for the server, after ours."""
    env: dict[str, str] = field(default_factory=dict)
    max_running_requests: int = 64
    max_model_len: int | None = None
    """Default: the model's own limit, at most 4096."""
    seed: int = 1
    policy_version: int = 0
    lora_rank: int | None = None
    """Updates are adapters of this rank over the weights at `model_path`; None: whole weights."""
    start_timeout_s: float = 600.0
    update_timeout_s: float = 100.0
    """Of a whole weight update, whatever step it is in."""
    max_restarts: int = 3
    """Of a server that we started."""
    max_retries: int = 3
    """Of one request, each on a server that is alive."""

    @classmethod
    def from_map(cls, data: dict[str, Any]) -> Self:
        """Raises `ConfigError` naming the key."""
        names = [f.name for f in dataclasses.fields(cls)]
        if unknown := sorted(set(data) - set(names)):
            raise ConfigError(f"vllm settings: unknown {unknown}; there are: {', '.join(names)}")
        for name in ("socket_path", "model_path"):
            if not isinstance(data.get(name), str) or not data[name]:
                raise ConfigError(f"vllm settings: {name} must be a path, got {data.get(name)!r}")
        paths = {name: Path(data[name]) for name in ("socket_path", "model_path")}
        settings = cls(**{**data, **paths})
        if (settings.python is None) == (not settings.urls):
            raise ConfigError(
                "engine.type=vllm needs either engine.vllm.python (the interpreter that has vLLM; "
                "a server is started with it) or engine.vllm.urls (servers that run already)"
            )
        if settings.lora_rank is not None and settings.lora_rank > max(LORA_RANKS):
            raise ConfigError(
                f"actor.lora.rank={settings.lora_rank}: vLLM has adapters of up to rank "
                f"{max(LORA_RANKS)}; lower it, or use engine.type=embedded"
            )
        return settings


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What the model's config.json says."""

    vocab_size: int
    max_model_len: int
    tied: bool  # input and output embedding are one tensor

    @classmethod
    def of(cls, settings: VllmSettings) -> Self:
        """Raises `ModelError`."""
        path = settings.model_path / "config.json"
        try:
            whole = json.loads(path.read_text())
            config = {**whole, **whole.get("text_config", {})}
            vocab_size = int(config["vocab_size"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelError(f"cannot read the model's config {path}: {error!r}") from None
        limit = config.get("max_position_embeddings")
        wanted = settings.max_model_len
        if wanted is not None and limit is not None and wanted > limit:
            raise ModelError(
                f"engine.max_model_len {wanted} exceeds the model's max_position_embeddings {limit}"
            )
        return cls(
            vocab_size=vocab_size,
            max_model_len=wanted or min(limit or DEFAULT_MAX_MODEL_LEN, DEFAULT_MAX_MODEL_LEN),
            tied=bool(config.get("tie_word_embeddings", False)),
        )
