"""What the scripted model says. Pure: from the prompt's text to the answer's.

It goes by how the conversation stands, not by what it says. Where tools are offered it calls the
first of them, with arguments that fit its schema; after that result it calls up to two at once;
after those it answers in words. Without tools it answers at once. Lines of the user's own script,
where there is one, are said instead, one per answer of a conversation, the last one from then on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from areal_sub.checking.tokenizer import BEGIN, END

ANSWER = "The answer is 1."
MAX_DEPTH = 8
_NUM_AT_ONCE = 2
_TOOL, _TOOL_END = "<tool>", "</tool>"


@dataclass(frozen=True, slots=True)
class Conversation:
    """A prompt as the template of this package wrote it."""

    tools: tuple[Mapping[str, Any], ...]
    roles: tuple[str, ...]

    @classmethod
    def parse(cls, prompt: str) -> Conversation:
        head, *rest = prompt.removeprefix(f"{BEGIN}system\n").split(f"{END}\n{BEGIN}")
        tools = []
        for line in head.split("\n"):
            if line.startswith(_TOOL) and line.endswith(_TOOL_END):
                tools.append(json.loads(line[len(_TOOL) : -len(_TOOL_END)]))
        return cls(tuple(tools), tuple(part.partition("\n")[0] for part in rest))

    @property
    def num_answers(self) -> int:
        """Of the model in it, up to now. (The last `assistant` is the one to be sampled.)"""
        return self.roles.count("assistant") - 1

    @property
    def num_results(self) -> int:
        """Tool results since the user last spoke."""
        last = max((i for i, role in enumerate(self.roles) if role == "user"), default=-1)
        return self.roles[last + 1 :].count("tool")


def next_answer(prompt: str, script: Sequence[str] = ()) -> str:
    conversation = Conversation.parse(prompt)
    if script:
        return script[min(conversation.num_answers, len(script) - 1)]
    tools, num_results = conversation.tools, conversation.num_results
    if not tools or num_results > 1:
        return ANSWER
    at_once = (
        tools[:1] if num_results == 0 else [tools[i % len(tools)] for i in range(_NUM_AT_ONCE)]
    )
    return "\n".join(_call(tool) for tool in at_once)


def _call(tool: Mapping[str, Any]) -> str:
    function = tool.get("function", tool)
    arguments = example(function.get("parameters") or {})
    call = {"name": function["name"], "arguments": arguments if isinstance(arguments, dict) else {}}
    return f"<tool_call>\n{json.dumps(call)}\n</tool_call>"


def example(schema: Any, depth: int = 0) -> Any:
    """A value that a JSON schema takes, as far as its types, `enum` and `const` go."""
    if not isinstance(schema, dict) or depth > MAX_DEPTH:
        return "1"
    for key in ("const", "default"):
        if schema.get(key) is not None:
            return schema[key]
    for key in ("examples", "enum"):
        if isinstance(values := schema.get(key), list) and values:
            return values[0]
    for key in ("anyOf", "oneOf", "allOf"):
        if isinstance(options := schema.get(key), list) and options:
            return example(options[0], depth + 1)
    kind = schema.get("type")
    kind = kind[0] if isinstance(kind, list) and kind else kind
    if kind == "object" or "properties" in schema:
        properties = schema.get("properties")
        properties = properties if isinstance(properties, dict) else {}
        wanted = schema.get("required") or list(properties)
        return {name: example(properties.get(name), depth + 1) for name in wanted}
    if kind == "array":
        num = max(int(schema.get("minItems") or 0), 1)
        return [example(schema.get("items"), depth + 1)] * min(num, MAX_DEPTH)
    simple: dict[Any, Any] = {"integer": 1, "number": 1, "boolean": True, "null": None}
    return simple.get(kind, "1")
