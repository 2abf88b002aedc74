"""The agent plane as an OpenAPI document: for whoever makes clients for it, or calls to try it.

    python -m areal_sub.proxy.openapi > docs/openapi.json

The routes are the ones that are served. The bodies' schemas say what is read, loosely: more fields
are tolerated, explicit null is the same as nothing, and `docs/dialects.md` says what is refused.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any, cast

from areal_sub.proxy.routes import ELSEWHERE_BASES, Route, make_routes
from areal_sub.proxy.turns import Turns

Schema = dict[str, Any]

# Of the bases under which each route is served, those that SDKs use.
_SHOWN = ("/v1/", "/v1beta/")

STRING: Schema = {"type": "string"}
NUMBER: Schema = {"type": "number"}
BOOLEAN: Schema = {"type": "boolean"}
ANY: Schema = {"type": "object"}
COUNT: Schema = {"type": "integer", "minimum": 1}
SHARE: Schema = {"type": "number", "minimum": 0, "maximum": 1}
STOP: Schema = {"anyOf": [STRING, {"type": "array", "items": STRING, "maxItems": 4}]}


def _object(*required: str, **properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "required": list(required)}


def _array(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _some(items: Schema) -> Schema:
    return {**_array(items), "minItems": 1}


def _one(*values: str) -> Schema:
    return {"type": "string", "enum": list(values)}


def _tagged(kind: str, *required: str, **properties: Schema) -> Schema:
    return _object("type", *required, type=_one(kind), **properties)


def _texts(*kinds: str) -> Schema:
    parts = [_tagged(kind, "text", text=STRING) for kind in kinds]
    return {"anyOf": [STRING, _array({"anyOf": parts})]}


_FUNCTION = _object("name", name=STRING, description=STRING, parameters=ANY, strict=BOOLEAN)
_CALL = _object(
    "function",
    id=STRING,
    type=_one("function"),
    function=_object("name", name=STRING, arguments=STRING),
)
_JSON_SCHEMA = _object("name", name=STRING, schema=ANY, strict=BOOLEAN)
_SAMPLING = {"temperature": SHARE, "top_p": SHARE}

CHAT = _object(
    "messages",
    model=STRING,
    messages=_some(
        _object(
            "role",
            role=_one("system", "developer", "user", "assistant", "tool"),
            content=_texts("text"),
            name=STRING,
            tool_calls=_array(_CALL),
            tool_call_id=STRING,
            reasoning_content=STRING,
        )
    ),
    tools=_array(_tagged("function", "function", function=_FUNCTION)),
    tool_choice={
        "anyOf": [
            _one("none", "auto", "required"),
            _tagged("function", "function", function=_object("name", name=STRING)),
        ]
    },
    parallel_tool_calls=BOOLEAN,
    response_format={
        "anyOf": [
            _tagged("text"),
            _tagged("json_object"),
            _tagged("json_schema", "json_schema", json_schema=_JSON_SCHEMA),
        ]
    },
    max_tokens=COUNT,
    max_completion_tokens=COUNT,
    n={"type": "integer", "minimum": 1, "maximum": 4},
    stop=STOP,
    stream=BOOLEAN,
    stream_options=_object(include_usage=BOOLEAN),
    logprobs=BOOLEAN,
    **_SAMPLING,
)
COMPLETIONS = _object(
    "prompt",
    model=STRING,
    prompt={"anyOf": [STRING, _some(COUNT)]},
    max_tokens=COUNT,
    n={"type": "integer", "minimum": 1, "maximum": 4},
    stop=STOP,
    stream=BOOLEAN,
    echo=BOOLEAN,
    **_SAMPLING,
)
_ITEM: Schema = {
    "anyOf": [
        _object(
            "role",
            "content",
            type=_one("message"),
            role=_one("system", "developer", "user", "assistant"),
            content=_texts("input_text", "output_text"),
        ),
        _tagged("reasoning", summary=_array(ANY), encrypted_content=STRING),
        _tagged("function_call", "name", "call_id", name=STRING, call_id=STRING, arguments=STRING),
        _tagged("function_call_output", "call_id", "output", call_id=STRING, output=STRING),
        _tagged("custom_tool_call", "name", "call_id", name=STRING, call_id=STRING, input=STRING),
        _tagged("item_reference", "id", id=STRING),
    ]
}
RESPONSES = _object(
    "input",
    model=STRING,
    input={"anyOf": [STRING, _some(_ITEM)]},
    instructions=STRING,
    previous_response_id=STRING,
    store=BOOLEAN,
    stream=BOOLEAN,
    include=_array(_one("reasoning.encrypted_content", "message.output_text.logprobs")),
    tools=_array(
        {
            "anyOf": [
                _tagged("function", "name", name=STRING, parameters=ANY, strict=BOOLEAN),
                _tagged("custom", "name", name=STRING, format=ANY),
                _tagged("local_shell"),
            ]
        }
    ),
    tool_choice=_one("none", "auto", "required"),
    parallel_tool_calls=BOOLEAN,
    text=_object(
        format={"anyOf": [_tagged("text"), _tagged("json_schema", "name", name=STRING, schema=ANY)]}
    ),
    reasoning=_object(effort=STRING),
    max_output_tokens=COUNT,
    metadata=ANY,
    **_SAMPLING,
)
_BLOCK: Schema = {
    "anyOf": [
        _tagged("text", "text", text=STRING, cache_control=ANY),
        _tagged("thinking", "thinking", thinking=STRING, signature=STRING),
        _tagged("redacted_thinking", "data", data=STRING),
        _tagged("tool_use", "id", "name", "input", id=STRING, name=STRING, input=ANY),
        _tagged(
            "tool_result",
            "tool_use_id",
            tool_use_id=STRING,
            content=_texts("text"),
            is_error=BOOLEAN,
        ),
    ]
}
_MESSAGES = {
    "model": STRING,
    "system": _texts("text"),
    "messages": _some(
        _object(
            "role",
            "content",
            role=_one("user", "assistant", "system"),
            content={"anyOf": [STRING, _array(_BLOCK)]},
        )
    ),
    "tools": _array(_object("name", name=STRING, description=STRING, input_schema=ANY)),
    "tool_choice": {
        "anyOf": [
            _tagged("auto"),
            _tagged("any"),
            _tagged("none"),
            _tagged("tool", "name", name=STRING),
        ]
    },
    "thinking": _object(type=STRING, budget_tokens=COUNT),
}
MESSAGES = _object(
    "messages",
    "max_tokens",
    max_tokens=COUNT,
    stop_sequences=_array(STRING),
    stream=BOOLEAN,
    top_k=COUNT,
    metadata=ANY,
    **_MESSAGES,
    **_SAMPLING,
)
COUNT_TOKENS = _object("messages", **_MESSAGES)
_PART: Schema = {
    "anyOf": [
        _object("text", text=STRING, thought=BOOLEAN),
        _object("functionCall", functionCall=_object("name", name=STRING, id=STRING, args=ANY)),
        _object(
            "functionResponse",
            functionResponse=_object("name", name=STRING, id=STRING, response=ANY),
        ),
    ]
}
GEMINI = _object(
    "contents",
    contents=_some(_object("parts", role=_one("user", "model"), parts=_some(_PART))),
    systemInstruction=_object("parts", parts=_array(_object("text", text=STRING))),
    tools=_array(
        _object(
            functionDeclarations=_array(
                _object("name", name=STRING, description=STRING, parametersJsonSchema=ANY)
            )
        )
    ),
    toolConfig=_object(functionCallingConfig=_object(mode=_one("AUTO", "ANY", "NONE"))),
    generationConfig=_object(
        maxOutputTokens=COUNT,
        temperature=NUMBER,
        topP=SHARE,
        topK=COUNT,
        candidateCount={"type": "integer", "minimum": 1, "maximum": 4},
        stopSequences=_array(STRING),
        responseMimeType=_one("text/plain", "application/json"),
        responseJsonSchema=ANY,
    ),
)
EMBEDDINGS = _object("input", model=STRING, input=STRING)

# By the end of a route's path.
BODIES: dict[str, Schema] = {
    "/chat/completions": CHAT,
    "/completions": COMPLETIONS,
    "/responses": RESPONSES,
    "/responses/input_tokens": RESPONSES,
    "/messages": MESSAGES,
    "/messages/count_tokens": COUNT_TOKENS,
    "/models/{target}": GEMINI,
    "/embeddings": EMBEDDINGS,
}
_KEYS = ("Authorization", "x-api-key", "x-goog-api-key")


def document() -> dict[str, Any]:
    paths: dict[str, Any] = {}
    for route in make_routes(cast(Turns, None)):
        if route.path.startswith(_SHOWN) and not route.path.startswith(ELSEWHERE_BASES):
            path = re.sub(r"\{(\w+):path\}", r"{\1}", route.path)
            paths.setdefault(path, {})[route.method.lower()] = _operation(route, path)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "areal-sub, agent plane",
            "version": "1",
            "description": "OpenAI's, Anthropic's and Google's APIs as agents find them.",
        },
        "paths": paths,
        "components": {
            "securitySchemes": {
                name: {"type": "apiKey", "in": "header", "name": name} for name in _KEYS
            }
        },
        "security": [{name: []} for name in _KEYS],
    }


def _operation(route: Route, path: str) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "summary": f"{route.dialect.NAME}: {route.method} {path}",
        "parameters": [
            {"name": name, "in": "path", "required": True, "schema": _parameter(name)}
            for name in re.findall(r"\{(\w+)\}", path)
        ],
        "responses": {"200": {"description": "the answer"}, "4XX": {"description": "refused"}},
    }
    body = next((body for end, body in BODIES.items() if path.endswith(end)), None)
    if route.method == "POST" and body is not None:
        content = {"application/json": {"schema": body}}
        operation["requestBody"] = {"required": True, "content": content}
    return operation


def _parameter(name: str) -> Schema:
    if name == "target":
        methods = "generateContent|streamGenerateContent|countTokens"
        return {"type": "string", "pattern": f"^[a-z0-9.-]{{1,20}}:({methods})$"}
    return {"type": "string", "minLength": 1}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(document(), indent=1) + "\n")
