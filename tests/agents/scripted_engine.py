"""The embedded engine, where a policy says one of the few things that a script allows.

A policy that is small enough for a test cannot write code. So each answer is held, by a grammar, to
one of the script's texts for that turn of the conversation. Which one is sampled by the policy
itself, with its own logprobs; all else (prefill, decoding, digests, weight updates) is the engine.
`python -m scripted_engine SETTINGS.json`, in place of the engine's own module (`scripted_train`);
$AREAL_SUB_SCRIPT is JSON: for each turn, the texts; the last ones for all that come later.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from areal_sub.component import run_component
from areal_sub.engines.embedded import server
from areal_sub.engines.embedded.server import Engine
from areal_sub.records import GenerateRequest

ANSWERED = "<|im_start|>assistant"


class ScriptedEngine(Engine):
    def __init__(self, settings: Any, *args: Any) -> None:
        super().__init__(settings, *args)
        folder = Path(settings.tokenizer_path or settings.model_path)
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        script = json.loads(os.environ["AREAL_SUB_SCRIPT"])
        self._grammars_of_turns = [self._grammar(texts) for texts in script]

    async def _generate(self, params: dict[str, Any]) -> AsyncIterator[Any]:
        request = GenerateRequest.from_map(params)
        prompt = self._tokenizer.decode(request.prompt_token_ids, skip_special_tokens=False)
        turn = min(prompt.count(ANSWERED) - 1, len(self._grammars_of_turns) - 1)
        scripted = replace(request, grammar=self._grammars_of_turns[turn])
        async for chunk in super()._generate(scripted.to_map()):
            yield chunk

    def _grammar(self, texts: list[str]) -> str:
        return "start: " + " | ".join(self._terms(text) for text in texts)

    def _terms(self, text: str) -> str:
        """Tags that are tokens as tokens, all else as text."""
        parts = re.split(r"(</?tool_call>)", text)
        ids = {part: self._tokenizer.token_to_id(part) for part in parts}
        return " ".join(
            json.dumps(part) if ids[part] is None else f"<[{ids[part]}]>" for part in parts if part
        )


if __name__ == "__main__":
    server.Engine = ScriptedEngine
    run_component("engine", server.serve)
