"""From the tree of what was said in a rollout to its branches, for graders. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def branches(
    tree: Mapping[str, Sequence[Mapping[str, Any]]],
) -> tuple[list[dict[str, Any]], list[list[dict[str, Any]]]]:
    """(the branch that ends with the last turn, all others), each a list of messages.

    `tree` is what `areal_sub.proxy.transcript` keeps. Branches share the messages that they have in
    common.
    """
    prompts, turns = tree["prompts"], tree["turns"]
    by_id = {turn["message"]["turn_id"]: turn for turn in turns}
    parents = {prompts[turn["prompt"]]["parent_turn_id"] for turn in turns}

    def branch(turn: Mapping[str, Any]) -> list[dict[str, Any]]:
        parts: list[list[dict[str, Any]]] = []
        while True:
            prompt = prompts[turn["prompt"]]
            parts.append([*prompt["messages"], turn["message"]])
            if prompt["parent_turn_id"] is None:
                return [message for part in reversed(parts) for message in part]
            turn = by_id[prompt["parent_turn_id"]]

    leaves = [branch(turn) for turn_id, turn in by_id.items() if turn_id not in parents]
    return (leaves[-1], leaves[:-1]) if leaves else ([], [])
