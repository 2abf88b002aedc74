"""How the ready agents here get their OpenAI client: one per rollout, closed with it.

`inline` mode passes `base_url`, `api_key` and a shared `http_client`; in `subproc` mode nothing is
passed and the SDK reads `OPENAI_BASE_URL` and `OPENAI_API_KEY` by itself.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openai import AsyncOpenAI


@asynccontextmanager
async def openai_client(extra_kwargs: Mapping[str, Any]) -> AsyncIterator[AsyncOpenAI]:
    """An `AsyncOpenAI` from what the trainer passed to `run(data, **extra_kwargs)`."""
    # The SDK costs half a second to import: paid by the process that runs agents, not by
    # whoever merely looks at this module.
    from openai import AsyncOpenAI

    given = {
        key: extra_kwargs[key]
        for key in ("base_url", "api_key", "http_client")
        if extra_kwargs.get(key) is not None
    }
    # No retries: a retried call would leave a sibling turn that nothing continues. A call that
    # fails ends the rollout, which is recorded as such.
    client = AsyncOpenAI(max_retries=0, **given)
    try:
        yield client
    finally:
        if "http_client" not in given:  # a shared one is its owner's to close
            await client.close()
