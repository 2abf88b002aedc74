"""What an agent's process finds in its environment: where its model is, and its key; and what its
supervisor does. Pure.

The key also stands in the base URL's path: an agent with a hard-coded API key is served too. The
table in `docs/agents.md` lists what is set; a test compares.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping

MODEL = "default"
"""The name of the model that is trained. The proxy takes any other, too."""

_OF_USER = ("PATH", "TZ", "LANG", "LANGUAGE")
_OF_USER_PREFIX = "LC_"
_OF_SUPERVISOR = ("TMPDIR", "AREAL_SUB_LOG")

SILENCE: Mapping[str, str] = {
    # What would call home, or would like to.
    "AGNO_TELEMETRY": "false",
    "AIDER_ANALYTICS": "false",
    "AIDER_CHECK_UPDATE": "false",
    "ANONYMIZED_TELEMETRY": "False",
    "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    "COPILOT_OFFLINE": "true",
    "CREWAI_DISABLE_TELEMETRY": "true",
    "DISABLE_AUTOUPDATER": "1",
    "DO_NOT_TRACK": "1",
    "HAYSTACK_TELEMETRY_ENABLED": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
    "KIMI_DISABLE_TELEMETRY": "1",
    "LITELLM_LOCAL_ANTHROPIC_BETA_HEADERS": "True",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "NPM_CONFIG_UPDATE_NOTIFIER": "false",
    "OPENAI_AGENTS_DISABLE_TRACING": "1",
    "OPENCODE_DISABLE_MODELS_FETCH": "1",
    "OTEL_SDK_DISABLED": "true",
    "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    # What would stop to ask, or to warn.
    "GEMINI_CLI_TRUST_WORKSPACE": "true",
    "IS_SANDBOX": "1",
    "MSWEA_CONFIGURED": "true",
    "MSWEA_COST_TRACKING": "ignore_errors",
    "MSWEA_SILENT_STARTUP": "1",
    "OPENHANDS_SUPPRESS_BANNER": "1",
    "PYDANTIC_AI_NO_BANNER": "1",
}
"""Keeps SDKs and programs from telemetry, updates and questions: `rollout.openai.silence`."""


def import_environment(extra: Mapping[str, str], *, silence: bool = True) -> dict[str, str]:
    """What is there when an agent is imported, before any rollout: no address of a model, no key.

    `extra` is what its environment needs, and the user's (`rollout.openai.env`)."""
    addresses = redirection(port=1, key="")
    known = {
        name: template
        for name, template in extra.items()
        if name not in addresses and not any(named for _, named in _NAMED.findall(template))
    }
    return {**(SILENCE if silence else {}), **_filled(known, {})}


def agent_environment(
    *, port: int, key: str, extra: Mapping[str, str], silence: bool = True
) -> dict[str, str]:
    """What is there for a rollout; the model's address always wins over `extra`, and stands in it
    where a value names it: `{base_url}`."""
    addresses = redirection(port=port, key=key)
    filled = _filled(extra, _addresses_by_name(addresses))
    return {**(SILENCE if silence else {}), **filled, **addresses}


def _filled(extra: Mapping[str, str], addresses: Mapping[str, str]) -> dict[str, str]:
    def value(match: re.Match[str]) -> str:
        literal, named = match.groups()
        return f"{{{literal}}}" if literal else addresses[named]

    return {name: _NAMED.sub(value, template) for name, template in extra.items()}


def redirection(*, port: int, key: str) -> dict[str, str]:
    """Where each kind of client looks for its model. Bases differ: OpenAI's has `/v1` in it,
    Anthropic's and Gemini's SDKs add theirs."""
    host = f"http://127.0.0.1:{port}/k/{key}"
    openai = f"{host}/v1"
    return {
        "OPENAI_BASE_URL": openai,
        "OPENAI_API_BASE": openai,
        "OPENAI_API_KEY": key,
        "OPENAI_MODEL": MODEL,
        "CODEX_API_KEY": key,
        "ANTHROPIC_BASE_URL": host,
        "ANTHROPIC_API_BASE": host,
        "ANTHROPIC_API_KEY": key,
        "ANTHROPIC_MODEL": MODEL,
        "GOOGLE_GEMINI_BASE_URL": host,
        "GEMINI_API_BASE": host,
        "GEMINI_API_KEY": key,
        "GEMINI_MODEL": MODEL,
        "GOOGLE_GENERATIVE_AI_API_KEY": key,
        # CAMEL's names for the same.
        "OPENAI_API_BASE_URL": openai,
        "OPENAI_COMPATIBILITY_API_BASE_URL": openai,
        "OPENAI_COMPATIBILITY_API_KEY": key,
        # OpenHands; its model names are LiteLLM's.
        "LLM_BASE_URL": openai,
        "LLM_API_KEY": key,
        "LLM_MODEL": f"openai/{MODEL}",
        "MSWEA_MODEL_NAME": f"openai/{MODEL}",
        "COPILOT_PROVIDER_BASE_URL": openai,
        "COPILOT_PROVIDER_API_KEY": key,
        "COPILOT_MODEL": MODEL,
        "KIMI_BASE_URL": openai,
        "KIMI_API_KEY": key,
        "KIMI_MODEL_NAME": MODEL,
        "KIMI_MODEL_BASE_URL": openai,
        "KIMI_MODEL_API_KEY": key,
        "OPENCODE_CONFIG_CONTENT": _opencode(openai, key),
    }


def template_variables(environment: Mapping[str, str], project: str) -> dict[str, str]:
    """What `{name}` stands for in a program's templates, beside the task's fields."""
    return {**_addresses_by_name(environment), "project": project}


def _addresses_by_name(environment: Mapping[str, str]) -> dict[str, str]:
    return {
        "base_url": environment["OPENAI_BASE_URL"],
        "anthropic_base_url": environment["ANTHROPIC_BASE_URL"],
        "gemini_base_url": environment["GOOGLE_GEMINI_BASE_URL"],
        "api_key": environment["OPENAI_API_KEY"],
        "model": MODEL,
    }


_NAMES = "base_url|anthropic_base_url|gemini_base_url|api_key|model"
_NAMED = re.compile(rf"\{{\{{({_NAMES})\}}\}}|\{{({_NAMES})\}}")


def _opencode(base_url: str, key: str) -> str:
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "name": "areal-sub",
        "options": {"baseURL": base_url, "apiKey": key},
        "models": {MODEL: {"name": MODEL}},
    }
    config = {
        "model": f"areal-sub/{MODEL}",
        "small_model": f"areal-sub/{MODEL}",
        "provider": {"areal-sub": provider},
        "share": "disabled",
        "autoupdate": False,
    }
    return json.dumps(config)


def supervisor_environment(
    environ: Mapping[str, str], passthrough: Iterable[str] = ()
) -> dict[str, str]:
    """What the supervisor is started with of `environ`: what its user's programs and language need,
    what it needs itself, and the names in `passthrough`. No secret may be among it: the sandbox
    gives children part of it."""
    names = {*_OF_USER, *_OF_SUPERVISOR, *passthrough}
    return {
        name: value
        for name, value in environ.items()
        if name in names or name.startswith(_OF_USER_PREFIX)
    }
