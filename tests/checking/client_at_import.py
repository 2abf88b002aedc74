"""An agent whose client is made with its module, as in many tutorials."""

from __future__ import annotations

from typing import Any

from openai import OpenAI

client = OpenAI(max_retries=0)


def agent(data: dict[str, Any]) -> float:
    client.chat.completions.create(model="m", messages=[{"role": "user", "content": "?"}])
    return 1.0
