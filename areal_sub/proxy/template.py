"""A model folder's chat template: Jinja source, environment, and what it is shown.

The environment is the one that transformers gives templates (sandboxed; `raise_exception`,
`strftime_now`, `tojson` without HTML escapes, loop controls, `{% generation %}`), without
importing it: the proxy has no torch. One difference: the clock stands still at the time of loading,
since the same history must always render the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from areal_sub.errors import ArealSubError, ModelError


class RenderError(ArealSubError):
    """The chat template refused these messages, or failed on them."""


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}` marks what the assistant says; here it is its body."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's declaration)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    def getattr(self, obj: Any, attribute: str) -> Any:
        """The same, sooner: it would ask messages, calls and tools for an attribute first."""
        if type(obj) is not dict or attribute in _OF_DICTS:
            return super().getattr(obj, attribute)
        return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)


_OF_DICTS = frozenset(dir(dict))


def _environment() -> ImmutableSandboxedEnvironment:
    loaded_at = datetime.now().astimezone()

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    env = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = loaded_at.strftime
    return env


def _compiled(env: jinja2.Environment, source: str) -> jinja2.Template:
    template = env.from_string(source)
    # jinja2's own is a `ChainMap`, which takes longer to copy than many a template to render.
    template.globals = dict(template.globals)
    return template


class ChatTemplate:
    """Compiled templates of one model, by name ("default", sometimes "tool_use")."""

    def __init__(
        self,
        sources: Mapping[str, str],
        special_tokens: Mapping[str, str],
        *,
        where: str = "the chat template",
    ) -> None:
        """`special_tokens`: what templates see as `bos_token` and the like. `where` they are
        from, for errors. Raises `ModelError`."""
        env = _environment()
        try:
            self._templates = {name: _compiled(env, text) for name, text in sources.items()}
        except jinja2.TemplateSyntaxError as error:
            raise ModelError(f"{where}, line {error.lineno}: {error.message}") from None
        self._special_tokens = dict(special_tokens)
        self.source = "\n".join(sources.values())
        texts = {
            node.value.strip()
            for text in sources.values()
            for node in env.parse(text).find_all(nodes.Const)
            if isinstance(node.value, str)
        }
        # Those that are words are roles and names of fields.
        self.literals = tuple(sorted(t for t in texts if t and not t.isidentifier()))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        *,
        add_generation_prompt: bool,
    ) -> str:
        """Raises `RenderError`: a template may refuse, and hostile messages may break it."""
        name = "tool_use" if tools and "tool_use" in self._templates else "default"
        try:
            return self._templates[name].render(
                **self._special_tokens,
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
            )
        except jinja2.TemplateError as error:
            raise RenderError(
                f"the model's chat template refuses these messages: {error}"
            ) from None
        except (
            ArithmeticError,
            AttributeError,
            LookupError,
            RecursionError,
            TypeError,
            ValueError,
        ) as error:
            raise RenderError(
                f"the model's chat template fails on these messages: "
                f"{type(error).__name__}: {error}"
            ) from None


def load_chat_template(folder: Path, override: Path | None = None) -> ChatTemplate:
    """From `override`, `chat_template.jinja` or `tokenizer_config.json`. Raises `ModelError`."""
    config = read_json(folder / "tokenizer_config.json")
    special_tokens = {
        key: text for key in config if key.endswith("_token") and (text := token_text(config[key]))
    }
    sources, where = _sources(folder, override, config)
    return ChatTemplate(sources, special_tokens, where=where)


def _sources(
    folder: Path, override: Path | None, config: Mapping[str, Any]
) -> tuple[dict[str, str], str]:
    """The templates by name, and where they are from, in words."""
    path = override or folder / "chat_template.jinja"
    if path.exists():
        return {"default": _text(path)}, f"the chat template {path}"
    if override is not None:
        raise ModelError(f"rollout.openai.chat_template: there is no file {override}")
    where = f"chat_template in {folder / 'tokenizer_config.json'}"
    source = config.get("chat_template")
    if isinstance(source, str):
        return {"default": source}, where
    if isinstance(source, list):  # several, by name
        sources = {entry["name"]: entry["template"] for entry in source}
        if "default" in sources:
            return sources, where
    raise ModelError(
        f"{folder} has no chat template (chat_template.jinja, or chat_template in "
        "tokenizer_config.json); name a Jinja file in rollout.openai.chat_template"
    )


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"the chat template {path} cannot be read: {error}") from None


def read_json(path: Path) -> dict[str, Any]:
    """The object in `path`, or an empty one where there is no such file. Raises `ModelError`."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ModelError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} is not a JSON object")
    return value


def token_text(value: Any) -> str | None:
    """A token of `tokenizer_config.json`, which writes it as text or as an object."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None
