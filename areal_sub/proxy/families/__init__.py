"""Model families: which format a model's answers have, and what its chat template wants to be told.

Owns: the registry `FORMATS`, and `choose`, which finds a model's entry. The chat template decides,
not the model's name: it is what the model was trained on and what a fine-tune brings along, and it
shows calls as the model writes them. `traits.py` asks a template what it does to a conversation;
`docs/families.md` has the answers for the families that people train. Called by `render.py`.

Why this is not the `renderers` package (0.1.12) or `openai-harmony` (0.0.8), which were weighed:

- Both parse an answer from its tokens when it is complete; we stream. Of `renderers`, only the
  renderer of an exactly matching model name knows its format; a fine-tune, or a template of one's
  own, falls back to a generic one that cannot continue a turn. Here any template that renders can.
- `renderers` rewrites each template in Python, for text whose look-alikes of control tokens the
  tokenizer then turns into control tokens: a user can end the system prompt. Here they stay text.
- `openai-harmony` downloads its vocabulary from the network when it is first used, so it cannot
  start in a closed network; its parser refuses what an untrained model writes, where ours says
  that it is content.
- They bring the OpenAI SDK, tiktoken and a configuration library into the proxy.

Taken from them: the same checks for every family (render, parse back, extend); `openai-harmony` is
the reference of a test of ours (`tests/proxy/families/test_references.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from areal_sub.errors import ConfigError
from areal_sub.proxy.parsers import AnswerParser, CallSyntax, ThinkParser, TwoPartParser
from areal_sub.proxy.parsers.bare_json import BareJsonParser
from areal_sub.proxy.parsers.gemma4 import Gemma4Parser, Gemma4ThinkParser
from areal_sub.proxy.parsers.harmony import HarmonyParser
from areal_sub.proxy.parsers.hermes import HermesParser
from areal_sub.proxy.parsers.mistral import MistralParser, MistralThinkParser
from areal_sub.proxy.parsers.pythonic import PythonicParser
from areal_sub.proxy.parsers.qwen3_coder import Qwen3CoderParser

AUTO = "auto"

Tools = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerFormat:
    """How a model writes its answers."""

    name: str
    calls: Callable[[Tools], AnswerParser] | None = None  # None: no calls are read
    call_tags: tuple[str, ...] = ()  # texts that must be decoded even where they are tokens
    syntax: CallSyntax | None = None  # None: a grammar cannot force calls
    thinking: type[ThinkParser] | None = None  # None: reasoning stays in the text
    # Whether the text of an earlier answer may show tags as tokens. Templates look for them there
    # where models write them as text; where they are control tokens, calls and reasoning have
    # their own fields.
    shows_tags: bool = False
    # Where a template finds the reasoning of an earlier answer: in `reasoning_content`; in
    # `thinking`, and never beside content that comes with a call; or in blocks of the content.
    reasoning_in: Literal["reasoning_content", "thinking", "blocks"] = "reasoning_content"
    short_call_ids: bool = False  # ids of calls have nine letters and digits
    is_harmony: bool = False

    @property
    def tags(self) -> tuple[str, ...]:
        return self.call_tags + (self.thinking.TAGS if self.thinking else ())

    @property
    def echoed(self) -> tuple[str, ...]:
        return self.tags if self.shows_tags else ()

    @property
    def begins_in_prompt(self) -> bool:
        """Whether a prompt's last text may have begun the answer."""
        return self.is_harmony or self.thinking is not None

    def parser(self, tools: Tools, prompt_end: str) -> AnswerParser:
        """For one answer. `tools`: those that may be called; `prompt_end`: the prompt's last text,
        where that matters (`begins_in_prompt`)."""
        if self.is_harmony:
            return HarmonyParser(prompt_end)
        thinking = self.thinking(prompt_end) if self.thinking else None
        return TwoPartParser(thinking, self.calls(tools) if self.calls and tools else None)


FORMATS: dict[str, AnswerFormat] = {
    answer_format.name: answer_format
    for answer_format in (
        AnswerFormat(
            name="hermes",
            calls=lambda tools: HermesParser(),
            call_tags=HermesParser.TAGS,
            syntax=HermesParser.SYNTAX,
            shows_tags=True,
        ),
        AnswerFormat(
            name="qwen3_coder",
            calls=Qwen3CoderParser,
            call_tags=Qwen3CoderParser.TAGS,
            shows_tags=True,
        ),
        AnswerFormat(
            name="llama3_json",
            calls=lambda tools: BareJsonParser(),
            call_tags=BareJsonParser.TAGS,
            syntax=BareJsonParser.SYNTAX,
        ),
        AnswerFormat(
            name="pythonic",
            calls=lambda tools: PythonicParser(),
            call_tags=PythonicParser.TAGS,
        ),
        AnswerFormat(
            name="mistral",
            calls=lambda tools: MistralParser(),
            call_tags=MistralParser.TAGS,
            thinking=MistralThinkParser,
            short_call_ids=True,
        ),
        AnswerFormat(
            name="gemma4",
            calls=lambda tools: Gemma4Parser(),
            call_tags=Gemma4Parser.TAGS,
            thinking=Gemma4ThinkParser,
        ),
        AnswerFormat(
            name="harmony",
            call_tags=HarmonyParser.TAGS,
            reasoning_in="thinking",
            is_harmony=True,
        ),
        AnswerFormat(name="none", shows_tags=True),
    )
}

# AReaL's, SGLang's and vLLM's names for the same formats are accepted.
_ALIASES = {
    "qwen": "hermes",
    "qwen25": "hermes",
    "qwen2_5": "hermes",
    "qwen3": "hermes",
    "qwen3_xml": "qwen3_coder",
    "llama3": "llama3_json",
    "llama4_pythonic": "pythonic",
    "gpt-oss": "harmony",
    "gpt_oss": "harmony",
    "openai": "harmony",
}

_REASONING: dict[str, type[ThinkParser] | None] = {
    "none": None,
    **dict.fromkeys(("think", "qwen3", "qwen3-thinking", "deepseek-r1"), ThinkParser),
}

# What only a template of this format has in it; the first that fits. Qwen3-Coder's has the tags of
# Hermes too, so it comes before it.
_MARKS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("harmony", ("<|start|>", "<|channel|>")),
    ("gemma4", ("<|tool_call>",)),
    ("mistral", ("[TOOL_CALLS]",)),
    ("qwen3_coder", ("<tool_call>", "<function=")),
    ("hermes", ("<tool_call>",)),
    ("pythonic", ("<|python_start|>",)),
    ("pythonic", ("<|tool_call_start|>",)),
    ("llama3_json", ("<|start_header_id|>", '"parameters": ')),
)

# Ends of turn, where a template writes them and the vocabulary has them: model folders, above all
# of base models, do not always name them all.
END_OF_TURN = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|eot|>",
    "<|eom|>",
    "<end_of_turn>",
    "<turn|>",
    "<|tool_response>",  # Gemma 4: behind its calls
    "<|call|>",
    "<|return|>",
)


def choose(name: str, reasoning: str, template: str) -> AnswerFormat:
    """The format called `name`, or `auto`: that of a chat template's source.

    `reasoning`: `think` has `<think>` told apart from the text, `none` leaves it there. Formats
    that write reasoning with control tokens always tell it apart. Raises `ConfigError` naming the
    choices.
    """
    if reasoning not in _REASONING:
        raise ConfigError(
            f"rollout.openai.reasoning_parser: no parser {reasoning!r}; "
            f"there are: {', '.join(_REASONING)}"
        )
    found = format_of(template) if name == AUTO else FORMATS.get(_ALIASES.get(name, name))
    if found is None:
        raise ConfigError(
            f"rollout.openai.tool_call_parser: no parser {name!r}; "
            f"there are: {', '.join([AUTO, *FORMATS, *_ALIASES])}"
        )
    if found.short_call_ids and "[THINK]" in template:
        found = replace(found, reasoning_in="blocks")
    return replace(found, thinking=found.thinking or _REASONING[reasoning])


def format_of(template: str) -> AnswerFormat:
    """Hermes where the template says nothing: its tags are what agents that describe their tools
    themselves mostly ask for, and cost nothing where nobody writes them."""
    for name, marks in _MARKS:
        if all(mark in template for mark in marks):
            return FORMATS[name]
    return FORMATS["hermes"]
