"""What an agent's process finds in its environment: where its model is, and its key. Pure.

The key also stands in the base URL's path: an agent with a hard-coded API key is served too.
"""

from __future__ import annotations

from collections.abc import Mapping


def agent_environment(*, port: int, key: str, extra: Mapping[str, str]) -> dict[str, str]:
    """`extra` is the user's (`rollout.openai.env`); the model's address always wins over it."""
    base_url = f"http://127.0.0.1:{port}/k/{key}/v1"
    return {
        "OPENAI_AGENTS_DISABLE_TRACING": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        **extra,
        "OPENAI_BASE_URL": base_url,
        "OPENAI_API_BASE": base_url,
        "OPENAI_API_KEY": key,
        "OPENAI_MODEL": "default",
    }
