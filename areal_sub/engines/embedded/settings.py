"""The engine's settings file, checked: the one place that knows its keys and their defaults."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from areal_sub.errors import ConfigError

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    socket_path: Path
    model_path: str
    """A Hugging Face model folder, or a hub name."""
    tokenizer_path: str | None = None
    """Where tokenizer.json is, which grammars need; default: `model_path`."""
    dtype: str = "float32"
    """Of weights, keys and values; one of `DTYPES`. Sampling is always in float32."""
    device: str = "auto"
    """"auto": CUDA where there is one, else the CPU."""
    num_threads: int | None = None
    """torch threads; default: 1 for a model under 5M parameters (more are slower), else torch's."""
    max_running_requests: int = 64
    """Sequences decoded at once; the others wait in order of arrival."""
    max_model_len: int | None = None
    """Prompt and new tokens together; default: the model's own limit, at most 4096."""
    seed: int = 1
    policy_version: int = 0
    """Of the weights at `model_path`; -1: the base of version 0, and no policy yet."""
    max_prefill_tokens: int | None = None
    """Prompt tokens (padding included) per step, so that a long prompt does not hold up those who
    decode; default: 1024 on a CPU, 8192 elsewhere."""
    max_kv_bytes: int | None = None
    """Keys and values of running requests; a request that might not fit waits. Default: half of the
    memory that is free once the model is loaded."""
    max_prefix_bytes: int = 256 * 2**20
    """Keys and values kept of finished requests for the next turn of their rollout; 0: none."""

    @classmethod
    def from_map(cls, data: dict[str, Any]) -> Self:
        """Raises `ConfigError` naming the key."""
        names = [f.name for f in dataclasses.fields(cls)]
        if unknown := sorted(set(data) - set(names)):
            raise ConfigError(f"engine settings: unknown {unknown}; there are: {', '.join(names)}")
        for name in ("socket_path", "model_path"):
            if not isinstance(data.get(name), str) or not data[name]:
                raise ConfigError(f"engine settings: {name} must be a path, got {data.get(name)!r}")
        settings = cls(**{**data, "socket_path": Path(data["socket_path"])})
        if settings.dtype not in DTYPES:
            raise ConfigError(f"engine settings: dtype {settings.dtype!r} is not in {DTYPES}")
        for name, least, optional in (
            ("num_threads", 1, True),
            ("max_running_requests", 1, False),
            ("max_model_len", 2, True),
            ("policy_version", -1, False),
            ("max_prefill_tokens", 1, True),
            ("max_kv_bytes", 1, True),
            ("max_prefix_bytes", 0, False),
        ):
            value = getattr(settings, name)
            if (value is None and optional) or (type(value) is int and value >= least):
                continue
            raise ConfigError(
                f"engine settings: {name} must be an integer of at least {least}, got {value!r}"
            )
        return settings
