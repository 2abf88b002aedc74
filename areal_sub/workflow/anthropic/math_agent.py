"""Ready agent for questions with one short answer, on the Anthropic SDK alone.

A task is `{"messages": [...], "answer": "..."}`; a `system` message is passed as `system`.
Constructor arguments are passed to `messages.create` as they are. The SDK takes long to import: so
it is imported at once, by the zygote, and not by each child.
"""

from __future__ import annotations

from typing import Any

from anthropic import AsyncAnthropic

from areal_sub.workflow.grading import grade_math


class MathAgent:
    """One model call; its answer is graded. Returns the reward, 0 or 1; a cut-off answer is 0."""

    def __init__(self, *, model: str = "default", max_tokens: int = 1024, **kwargs: Any) -> None:
        self._sampling = {"model": model, "max_tokens": max_tokens, **kwargs}

    async def run(self, data: dict[str, Any], **extra_kwargs: Any) -> float:
        system = [each["content"] for each in data["messages"] if each["role"] == "system"]
        asked: dict[str, Any] = {
            "messages": [each for each in data["messages"] if each["role"] != "system"],
            **({"system": "\n\n".join(system)} if system else {}),
            **self._sampling,
        }
        client = _client(extra_kwargs)
        try:
            message = await client.messages.create(**asked)
        finally:
            if extra_kwargs.get("http_client") is None:  # a shared one is its owner's to close
                await client.close()
        if message.stop_reason == "max_tokens":
            return 0.0
        text = "".join(block.text for block in message.content if block.type == "text")
        return grade_math(text, data["answer"])


def _client(extra_kwargs: dict[str, Any]) -> AsyncAnthropic:
    """From what the trainer passes inline; in `subproc` mode it passes nothing, and the SDK reads
    `ANTHROPIC_BASE_URL` and `ANTHROPIC_API_KEY` by itself."""
    given = {
        key: extra_kwargs[key]
        for key in ("api_key", "http_client")
        if extra_kwargs.get(key) is not None
    }
    if extra_kwargs.get("base_url") is not None:  # OpenAI's; this SDK adds /v1 by itself
        given["base_url"] = str(extra_kwargs["base_url"]).rstrip("/").removesuffix("/v1")
    # No retries: a retried call would leave a sibling turn that nothing continues.
    return AsyncAnthropic(max_retries=0, **given)
