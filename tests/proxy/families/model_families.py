"""The families under test: their template, their control tokens, and how their models write.

`writes` is written by hand from what the models put out, not derived from the templates: a parser
that only reads back what a template shows would prove little. The tokenizers are small ones that
are trained here, with the family's control tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from areal_sub.proxy.families.traits import Traits
from areal_sub.proxy.neutral import Message, ToolCall

TEMPLATES = Path(__file__).parent / "templates"

CORPUS = [
    "What is 7 * 8? The answer is 56. Hello there, how are you today?",
    'system user assistant tool model {"name": "calc", "arguments": {"a": 1, "b": 2}}',
    "analysis commentary final functions parameters thought call response function parameter",
]

TOOLS: tuple[dict[str, Any], ...] = (
    {
        "type": "function",
        "function": {
            "name": "calc",
            "description": "Computes.",
            "parameters": {
                "type": "object",
                "properties": {
                    "a": {"type": "integer", "description": "A number."},
                    "op": {"type": "string", "description": "What to do."},
                    "more": {"type": "object", "description": "Anything."},
                },
                "required": ["a"],
            },
        },
    },
)


@dataclass(frozen=True)
class Family:
    name: str  # of its template's file
    title: str  # in docs/families.md
    format: str
    writes: Callable[[Message], str]  # an answer, less the token that ends it
    special: tuple[str, ...]  # control tokens that are special; the first is bos
    plain: tuple[str, ...]  # control tokens that are not
    end: str  # of an answer
    traits: Traits
    end_of_calls: str = ""  # where another token ends an answer with calls
    thinks: bool = True  # whether its models write reasoning
    opened: str = ""  # what the template begins the answer with

    @property
    def reasoning_parser(self) -> str:
        return "think" if self.thinks else "none"

    def sampled(self, message: Message) -> str:
        end = self.end_of_calls if message.tool_calls and self.end_of_calls else self.end
        return self.writes(message).removeprefix(self.opened) + end


def arguments(call: ToolCall) -> str:
    return json.dumps(json.loads(call.arguments), ensure_ascii=False)


def think(message: Message) -> str:
    return f"<think>\n{message.reasoning}\n</think>\n\n" if message.reasoning else ""


def said(message: Message, calls: list[str]) -> str:
    return "\n".join([message.content, *calls] if message.content else calls)


def hermes(message: Message) -> str:
    calls = [
        f'<tool_call>\n{{"name": "{call.name}", "arguments": {arguments(call)}}}\n</tool_call>'
        for call in message.tool_calls
    ]
    return think(message) + said(message, calls)


def smollm2(message: Message) -> str:
    calls = ", ".join(
        f'{{"name": "{call.name}", "arguments": {arguments(call)}}}' for call in message.tool_calls
    )
    return said(message, [f"<tool_call>[{calls}]</tool_call>"] if calls else [])


def xml(message: Message) -> str:
    def parameter(name: str, value: Any) -> str:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        return f"<parameter={name}>\n{text}\n</parameter>\n"

    calls = [
        f"<tool_call>\n<function={call.name}>\n"
        + "".join(parameter(k, v) for k, v in json.loads(call.arguments).items())
        + "</function>\n</tool_call>"
        for call in message.tool_calls
    ]
    thought = f"<think>\n{message.reasoning}\n</think>\n\n"
    return thought + said(message, calls)


def llama3(message: Message) -> str:
    calls = [
        f'{{"name": "{call.name}", "parameters": {arguments(call)}}}' for call in message.tool_calls
    ]
    return "; ".join(calls) or message.content


def mistral_list(message: Message) -> str:
    calls = ", ".join(
        f'{{"name": "{call.name}", "arguments": {arguments(call)}, "id": "{call.id}"}}'
        for call in message.tool_calls
    )
    return message.content + (f"[TOOL_CALLS][{calls}]" if calls else "")


def mistral_named(message: Message) -> str:
    thought = f"[THINK]{message.reasoning}[/THINK]" if message.reasoning else ""
    calls = [f"[TOOL_CALLS]{call.name}[ARGS]{arguments(call)}" for call in message.tool_calls]
    return thought + message.content + "".join(calls)


def mistral_ids(message: Message) -> str:
    calls = [
        f"[TOOL_CALLS]{call.name}[CALL_ID]{call.id}[ARGS]{arguments(call)}"
        for call in message.tool_calls
    ]
    return message.content + "".join(calls)


def gemma4(message: Message) -> str:
    def value(value: Any) -> str:
        if isinstance(value, str):
            return f'<|"|>{value}<|"|>'
        if isinstance(value, dict):
            return "{" + ",".join(f"{k}:{value_(v)}" for k, v in sorted(value.items())) + "}"
        if isinstance(value, list):
            return "[" + ",".join(map(value_, value)) + "]"
        return json.dumps(value)

    value_ = value
    thought = f"<|channel>thought\n{message.reasoning}\n<channel|>" if message.reasoning else ""
    calls = [
        f"<|tool_call>call:{call.name}{value(json.loads(call.arguments))}<tool_call|>"
        for call in message.tool_calls
    ]
    return thought + "".join(calls) + message.content


def harmony(message: Message) -> str:
    messages = []
    if message.reasoning:
        messages.append(f"<|channel|>analysis<|message|>{message.reasoning}")
    if message.content:
        channel = "commentary" if message.tool_calls else "final"
        messages.append(f"<|channel|>{channel}<|message|>{message.content}")
    messages += [
        f"<|channel|>commentary to=functions.{call.name} <|constrain|>json<|message|>"
        + arguments(call)
        for call in message.tool_calls
    ]
    return "<|end|><|start|>assistant".join(messages)


CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
QWEN = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
THINK = ("<think>", "</think>")
MISTRAL = ("<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]")
MISTRAL += ("[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]")
MISTRAL_NEW = ("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[ARGS]")
GEMMA4 = ("<bos>", "<eos>", "<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|think|>")
GEMMA4 += ("<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>", '<|"|>')
GEMMA4 += ("<|tool_response>", "<tool_response|>")
HARMONY = ("<|startoftext|>", "<|endoftext|>", "<|start|>", "<|end|>", "<|message|>")
HARMONY += ("<|channel|>", "<|constrain|>", "<|return|>", "<|call|>")
LLAMA3 = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>")
LLAMA3 += ("<|eot_id|>", "<|eom_id|>", "<|python_tag|>")


def traits(text: str) -> Traits:
    """From "x" and "-" in the order of the fields."""
    values = [mark == "x" for mark in text.replace(" ", "")]
    return Traits(*values)


FAMILIES = [
    Family(
        name="qwen2_5",
        title="Qwen2.5",
        format="hermes",
        writes=hermes,
        special=CHATML,
        plain=QWEN,
        end="<|im_end|>",
        traits=traits("x xxxx --"),
        thinks=False,
    ),
    Family(
        name="qwen3",
        title="Qwen3",
        format="hermes",
        writes=hermes,
        special=CHATML,
        plain=QWEN + THINK,
        end="<|im_end|>",
        traits=traits("x xxxx x-"),
    ),
    Family(
        name="qwen3_6",
        title="Qwen3.6",
        format="qwen3_coder",
        writes=xml,
        special=CHATML,
        plain=QWEN + THINK,
        end="<|im_end|>",
        traits=traits("x xxxx x-"),
        opened="<think>\n",
    ),
    Family(
        name="llama3",
        title="Llama 3.1, 3.2, 3.3",
        format="llama3_json",
        writes=llama3,
        special=LLAMA3,
        plain=(),
        end="<|eot_id|>",
        traits=traits("x xxx- --"),
        thinks=False,
    ),
    Family(
        name="smollm2",
        title="SmolLM2",
        format="hermes",
        writes=smollm2,
        special=CHATML,
        plain=(),
        end="<|im_end|>",
        traits=traits("x ---- --"),
        thinks=False,
    ),
    Family(
        name="smollm3",
        title="SmolLM3",
        format="hermes",
        writes=hermes,
        special=CHATML,
        plain=QWEN + THINK,
        end="<|im_end|>",
        traits=traits("x ---- --"),
    ),
    Family(
        name="gemma3",
        title="Gemma 3",
        format="hermes",
        writes=hermes,
        special=("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        plain=(),
        end="<end_of_turn>",
        traits=traits("x ---- --"),
        thinks=False,
    ),
    Family(
        name="gemma4",
        title="Gemma 4",
        format="gemma4",
        writes=gemma4,
        special=GEMMA4,
        plain=(),
        end="<turn|>",
        end_of_calls="<|tool_response>",
        traits=traits("x xxxx x-"),
    ),
    Family(
        name="mistral_nemo",
        title="Mistral 7B v0.3, Nemo",
        format="mistral",
        writes=mistral_list,
        special=MISTRAL,
        plain=(),
        end="</s>",
        traits=traits("x xxxx --"),
        thinks=False,
    ),
    Family(
        name="mistral_small",
        title="Mistral Small 3.2",
        format="mistral",
        writes=mistral_ids,
        special=(*MISTRAL, *MISTRAL_NEW, "[CALL_ID]", "[TOOL_CONTENT]"),
        plain=(),
        end="</s>",
        traits=traits("x xxxx --"),
        thinks=False,
    ),
    Family(
        name="ministral3",
        title="Ministral 3 (reasoning)",
        format="mistral",
        writes=mistral_named,
        special=(*MISTRAL, *MISTRAL_NEW, "[THINK]", "[/THINK]"),
        plain=(),
        end="</s>",
        traits=traits("x xxxx xx"),
    ),
    Family(
        name="gpt_oss",
        title="GPT-OSS",
        format="harmony",
        writes=harmony,
        special=HARMONY,
        plain=(),
        end="<|return|>",
        end_of_calls="<|call|>",
        traits=traits("x xxx- x-"),
    ),
]


def make_model_folder(family: Family, folder: Path) -> Path:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(family.special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in family.plain])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    # As base models have it: the template knows more ends of turn than the folder names.
    eos = "<|endoftext|>" if "<|endoftext|>" in family.special else family.special[1]
    config = {"bos_token": family.special[0], "eos_token": eos}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    template = (TEMPLATES / f"{family.name}.jinja").read_text("utf-8")
    (folder / "chat_template.jinja").write_text(template, "utf-8")
    return folder
