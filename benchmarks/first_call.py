"""The agents of the spawn benchmark: one that does nothing, one that makes one model call.

As a program (`python -m benchmarks.first_call`) it makes the call and exits.
"""

from __future__ import annotations

from typing import Any

import openai


def nothing(data: dict[str, Any]) -> float:
    return 1.0


def call(data: dict[str, Any]) -> float:
    with openai.OpenAI(max_retries=0) as client:
        completion = client.chat.completions.create(
            model="default", messages=[{"role": "user", "content": "What is 2 + 2?"}]
        )
    return float(completion.choices[0].message.content == "4")


if __name__ == "__main__":
    call({})
