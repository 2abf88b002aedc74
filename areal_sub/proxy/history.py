"""Which earlier turn of its rollout a call continues, and why not where it continues none.

Owns: `History`, what one rollout has asked and been answered. Matching is on normalised messages:
null fields and ids dropped, text parts joined, call arguments compared as JSON, white space around
an assistant's text ignored; so the dialect that they came in does not matter. What an answer
thought is part of it: where the agent left that out, the fork says so. A list of messages is named
by the chain of its hashes, so "has anyone asked or been answered exactly this" is one lookup, and
finding the parent takes one lookup per message that is new. Ids of tool calls only decide between
answers with the same text.

Pure but for its own tables; `turns.py` calls it, on the event loop only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any

import numpy as np
import orjson

from areal_sub.proxy.neutral import Message
from areal_sub.records import Fork, Int32Array, int32

# A summary is longer than this; shorter answers occur in messages by chance.
MIN_QUOTED_CHARS = 24
# Answers, from the last one back, in which a summary is looked for.
MAX_QUOTED = 32
# More new text is no summary, and would hold up other rollouts' calls while it is searched.
MAX_QUOTING_CHARS = 262_144
# Calls whose messages are kept, to hash only what later ones add: conversations take turns.
NUM_LATELY = 3
MAX_LATELY_CHARS = 2**20  # of one of them

Sort = Callable[[Message], int]


@dataclass(slots=True, eq=False)
class Prompt:
    """One distinct prompt. Sibling samples share it, so they share parent and context."""

    parent: Turn | None
    fork: Fork
    context: Int32Array  # [num_context] what follows the parent's full sequence
    num_tokens: int  # of the full prompt
    tools: bytes  # hash of its tools
    chain: bytes  # names its messages
    exact: bytes  # as `chain`, ids of tool calls included
    bare: bytes  # as `chain`, reasoning left out
    system: bytes = b""  # names its leading system messages
    num_messages: int = 0
    continues: Turn | None = None  # after which turn the conversation goes on, if not `parent`
    num_recorded: int = 0  # turns sampled from it

    def token_ids(self) -> Int32Array:
        """The full prompt: [num_tokens]."""
        parts = [self.context]
        turn = self.parent
        while turn is not None:
            parts += [turn.token_ids, turn.prompt.context]
            turn = turn.prompt.parent
        return int32(np.concatenate(parts[::-1]))

    def starts(self, token_ids: Int32Array) -> bool:
        """Whether `token_ids` begin with the full prompt. Most others differ at its end."""
        position, prompt, turn = self.num_tokens, self, self.parent
        while True:
            start = position - len(prompt.context)
            if not np.array_equal(token_ids[start:position], prompt.context):
                return False
            if turn is None:
                return True
            position = start - len(turn.token_ids)
            if not np.array_equal(token_ids[position:start], turn.token_ids):
                return False
            prompt, turn = turn.prompt, turn.prompt.parent


@dataclass(slots=True, eq=False)
class Turn:
    """One answer that was sampled."""

    turn_id: str
    prompt: Prompt
    token_ids: Int32Array  # [num_sampled]
    exact: bytes  # names its conversation, ids of tool calls included
    said: str  # the text of its answer

    def num_at_start_of(self, token_ids: Int32Array) -> int | None:
        """The length of its full sequence, where `token_ids` begin with that; else None."""
        start = self.prompt.num_tokens
        end = start + len(self.token_ids)
        if np.array_equal(token_ids[start:end], self.token_ids) and self.prompt.starts(token_ids):
            return end
        return None


@dataclass(frozen=True, slots=True)
class Keys:
    """Hashes of a call's messages and tools. `chain[i]` names the first i + 1 messages."""

    tools: bytes
    messages: tuple[bytes, ...]
    chain: tuple[bytes, ...]
    exact: tuple[bytes, ...]  # as `chain`, ids of tool calls included
    bare: tuple[bytes, ...]  # as `chain`, reasoning left out
    system: bytes  # names the leading system messages
    sorts: tuple[int, ...]  # see `recent.py`; empty where nobody sorts

    @classmethod
    def of(
        cls,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]],
        sort: Sort | None = None,
        earlier: Keys | None = None,
        num_same: int = 0,
    ) -> Keys:
        """`earlier`: of messages of which the first `num_same` are these, with the same `sort`."""
        hashes = list(earlier.messages[:num_same]) if earlier else []
        chain = list(earlier.chain[:num_same]) if earlier else []
        exact = list(earlier.exact[:num_same]) if earlier else []
        bare = list(earlier.bare[:num_same]) if earlier else []
        sorts = list(earlier.sorts[:num_same]) if earlier else []
        for message in messages[num_same:]:
            digest, ids = message_hash(message), ids_of(message)
            # Until there is an id, or something was thought, the three are the same.
            is_exact = not ids and exact[-1:] == chain[-1:]
            is_bare = not message.reasoning and bare[-1:] == chain[-1:]
            linked = link(chain[-1] if chain else b"", digest)
            exact.append(linked if is_exact else link(exact[-1] if exact else b"", digest, ids))
            bare_digest = bare_hash(message) if message.reasoning else digest
            bare.append(linked if is_bare else link(bare[-1] if bare else b"", bare_digest))
            hashes.append(digest)
            chain.append(linked)
            if sort is not None:
                sorts.append(sort(message))
        tools_digest = _digest(orjson.dumps(list(tools), option=orjson.OPT_SORT_KEYS))
        num_system = next((i for i, m in enumerate(messages) if m.role != "system"), len(messages))
        return cls(
            tools=tools_digest,
            messages=tuple(hashes),
            chain=tuple(chain),
            exact=tuple(exact),
            bare=tuple(bare),
            system=chain[num_system - 1] if num_system else b"",
            sorts=tuple(sorts),
        )


@dataclass(frozen=True, slots=True)
class Match:
    """What a call continues."""

    parent: Turn | None
    num_history: int  # messages that the parent's full sequence stands for
    fork: Fork
    twin: Prompt | None  # the same call was made before: use its prompt as it is
    bare: Turn | None = None  # whom the call would continue, had it kept the reasoning
    continues: Turn | None = None  # after which turn its conversation goes on, if not `parent`


@dataclass(slots=True)
class History:
    _prompts: dict[tuple[bytes, bytes, str], Prompt] = field(default_factory=dict)
    _answers: dict[bytes, list[Turn]] = field(default_factory=dict)  # by chain with the answer
    _bare: dict[bytes, Turn] = field(default_factory=dict)  # the same, reasoning left out; the last
    _asked: dict[bytes, Turn | None] = field(default_factory=dict)
    """Chains of whole calls; the last answer to each."""
    _said: dict[bytes, Turn] = field(default_factory=dict)  # by the answer's hash; the last
    _seen: set[bytes] = field(default_factory=set)  # chains of all prefixes, answers included
    _seen_exact: set[bytes] = field(default_factory=set)  # the same, by `exact`
    _messages: set[bytes] = field(default_factory=set)  # hashes of all that was asked
    _first: set[bytes] = field(default_factory=set)  # hashes of first messages after the system's
    _lately: list[tuple[Sequence[Message], Keys]] = field(default_factory=list)  # the last last

    def keys(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]], sort: Sort | None = None
    ) -> Keys:
        """`Keys.of`, computed for what is new since the last calls. Always with the same `sort`."""
        found, num_same = None, 0
        for earlier, keys in self._lately:
            num = _num_same(earlier, messages)
            if num > num_same:
                found, num_same = (earlier, keys), num
        new = Keys.of(messages, tools, sort, found[1] if found else None, num_same)
        if found is not None and num_same == len(found[0]):
            self._lately.remove(found)  # it went on
        if _num_chars(messages) <= MAX_LATELY_CHARS:
            self._lately = [*self._lately[1 - NUM_LATELY :], (messages, new)]
        return new

    def match(self, messages: Sequence[Message], keys: Keys) -> Match:
        parent, num_history = self._find_parent(messages, keys)
        twin = self._prompts.get(_prompt_key(keys, parent))
        if twin is not None:
            return Match(twin.parent, num_history, Fork.RESAMPLE, twin)
        fork = self._cause(messages, keys, num_history)
        bare = self._find_bare(messages, keys, num_history)
        if bare is not None and fork in (Fork.ASSISTANT_EDITED, Fork.HISTORY_EDITED):
            return Match(parent, num_history, Fork.REASONING_DROPPED, None, bare, bare)
        before = None
        if parent is None:
            before = self._summarised(messages, keys)
        if before is not None:
            fork = Fork.COMPACTED
        elif fork not in (Fork.NONE, Fork.ROOT, Fork.NEW_CONVERSATION, Fork.SUB_AGENT):
            before = self._last_turn(messages, keys, num_history)
        return Match(
            parent, num_history, fork, None, continues=before if before is not parent else None
        )

    def add_prompt(
        self, messages: Sequence[Message], keys: Keys, prompt: Prompt, matched: Match
    ) -> Prompt:
        """Remember the call; returns its prompt, which is an earlier one if the same was asked.

        `matched` is what `match` said; its parent is part of the identity of a call even where the
        prompt could not be built on it.
        """
        known = self._prompts.setdefault(_prompt_key(keys, matched.parent), prompt)
        if known is prompt:
            self._asked.setdefault(keys.chain[-1], None)
            # What the parent was asked is there already.
            parent = matched.parent
            start = matched.num_history - 1 if parent is not None else 0
            self._messages.update(keys.messages[start:])
            self._seen.update(keys.chain[start:])
            is_exact = parent is not None and parent.exact == keys.exact[start]
            self._seen_exact.update(keys.exact[start if is_exact else 0 :])
            for message, digest in zip(messages, keys.messages, strict=True):
                if message.role != "system":
                    self._first.add(digest)
                    break
        return known

    def raw_prompt(self, token_ids: Int32Array) -> Prompt:
        """The prompt that is given as tokens, on top of the turn that it begins with."""
        parent, num_before = None, 0
        num_edited = 0  # where the answer to an earlier prompt stood, and something else stands now
        for turn in (turn for turns in self._answers.values() for turn in turns):
            num = turn.num_at_start_of(token_ids)
            if num is not None and num > num_before:
                parent, num_before = turn, num
            elif len(token_ids) > turn.prompt.num_tokens and turn.prompt.starts(token_ids):
                num_edited = max(num_edited, turn.prompt.num_tokens)
        if num_edited > num_before:
            fork = Fork.ASSISTANT_EDITED  # or tokenized otherwise than it was sampled
        elif parent is not None:
            fork = Fork.NONE
        else:
            fork = Fork.NEW_CONVERSATION if self._prompts else Fork.ROOT
        name = _digest(b"raw" + token_ids.tobytes())
        return Prompt(
            parent=parent,
            fork=fork,
            context=token_ids[num_before:],
            num_tokens=len(token_ids),
            tools=b"",
            chain=name,
            exact=name,
            bare=name,
        )

    def add_raw(self, prompt: Prompt) -> Prompt:
        """Remember what `raw_prompt` gave; returns an earlier one if the same was asked."""
        key = (b"", prompt.chain, prompt.parent.turn_id if prompt.parent else "")
        return self._prompts.setdefault(key, prompt)

    def add_turn(
        self,
        turn_id: str,
        prompt: Prompt,
        token_ids: Int32Array,
        answer: Message,
        respelt: Message | None = None,
    ) -> Turn:
        """Remember that `answer`, in tokens `token_ids`, was sampled from `prompt`.

        `respelt`: how else the agent may say it."""
        exact = link(prompt.exact, message_hash(answer), ids_of(answer))
        turn = Turn(turn_id, prompt, token_ids, exact, answer.content.strip())
        for said in (answer,) if respelt is None else (answer, respelt):
            digest = message_hash(said)
            chain = link(prompt.chain, digest)
            self._answers.setdefault(chain, []).append(turn)
            bare_digest = bare_hash(said) if said.reasoning else digest
            self._bare[link(prompt.bare, bare_digest)] = turn
            self._seen.add(chain)
            self._seen_exact.add(link(prompt.exact, digest, ids_of(said)))
            self._said[digest] = turn
        if prompt.chain in self._asked:
            self._asked[prompt.chain] = turn
        prompt.num_recorded += 1
        return turn

    def _find_parent(self, messages: Sequence[Message], keys: Keys) -> tuple[Turn | None, int]:
        """The turn whose conversation is the longest start of this one, with the same tools."""
        for index in range(len(messages) - 1, 0, -1):
            if messages[index].role != "assistant":
                continue
            turns = [
                turn
                for turn in self._answers.get(keys.chain[index], ())
                if turn.prompt.tools == keys.tools
            ]
            if turns:
                # The latest: an SDK that repeats a call whose answer it lost goes on with the last.
                exact = [turn for turn in turns if turn.exact == keys.exact[index]]
                return (exact or turns)[-1], index + 1
        return None, 0

    def _find_bare(self, messages: Sequence[Message], keys: Keys, start: int) -> Turn | None:
        for index in range(len(messages) - 1, start - 1, -1):
            turn = self._bare.get(keys.bare[index])
            if turn is not None:
                return turn
        return None

    def _last_turn(self, messages: Sequence[Message], keys: Keys, num_history: int) -> Turn | None:
        """The last turn that the call still knows of, behind its first `num_history` messages."""
        for index in range(len(messages) - 1, num_history - 1, -1):
            if messages[index].role == "assistant" and keys.messages[index] in self._said:
                return self._said[keys.messages[index]]
        for chain in reversed(keys.chain[num_history:-1]):
            if self._asked.get(chain) is not None:
                return self._asked[chain]
        return None

    def _summarised(self, messages: Sequence[Message], keys: Keys) -> Turn | None:
        """The turn after which a summary of its conversation stands here instead of it.

        What is shorter than a conversation with the same system messages and tools goes on from it
        where a new message quotes an answer of it (or of a call that asked about it), or stands in
        front of answers of it that were kept.
        """
        new = [
            index
            for index, message in enumerate(messages)
            if message.role in ("user", "system") and keys.messages[index] not in self._messages
        ]
        if not new:
            return None
        for index in range(len(messages) - 1, new[0], -1):
            kept = self._said.get(keys.messages[index])
            if messages[index].role == "assistant" and kept is not None:
                return kept if _is_longer(kept, len(messages), keys) else None
        if sum(len(messages[index].content) for index in new) > MAX_QUOTING_CHARS:
            return None
        for turn in list(self._said.values())[: -MAX_QUOTED - 1 : -1]:
            if any(_quotes(messages[index].content, turn.said) for index in new):
                before: Turn | None = turn
                while before is not None and not _is_longer(before, len(messages), keys):
                    before = before.prompt.continues or before.prompt.parent
                if before is not None:
                    return before
        return None

    def _cause(self, messages: Sequence[Message], keys: Keys, num_history: int) -> Fork:
        """Why the messages after the first `num_history` are not simply new ones."""
        if not self._prompts:
            return Fork.ROOT
        num_seen = _num_leading(keys.chain, self._seen, num_history)
        if num_history:
            # Ids included: what went on from a sibling with the same text is no edit of this.
            if _num_leading(keys.exact, self._seen_exact) <= num_history:
                return Fork.NONE
            if keys.chain[-1] in self._asked:
                return Fork.NONE  # the same was asked of a sibling that had no ids, either
        elif (
            any(
                messages[index].role == "assistant" and keys.chain[index] in self._answers
                for index in range(len(messages))
            )
            or keys.chain[-1] in self._asked
        ):
            return Fork.TOOLS_CHANGED  # found, but with other tools
        elif all(message.role == "system" for message in messages[:num_seen]):
            return self._cause_from_start(messages, keys, num_seen)
        if num_seen < len(messages) and num_seen and keys.chain[num_seen - 1] in self._asked:
            return Fork.ASSISTANT_EDITED  # an answer of ours came next, and is not what is here
        return Fork.HISTORY_EDITED

    def _cause_from_start(self, messages: Sequence[Message], keys: Keys, num_seen: int) -> Fork:
        """The cause where at most system messages are as they were in an earlier call."""
        first = next((i for i, m in enumerate(messages) if m.role != "system"), None)
        ours = any(
            message.role == "assistant" and digest in self._said
            for message, digest in zip(messages, keys.messages, strict=True)
        )
        same_first = first is not None and keys.messages[first] in self._first
        if same_first or (ours and first is not None and num_seen < first):
            return Fork.SYSTEM_CHANGED
        if ours:
            return Fork.HISTORY_EDITED
        return Fork.NEW_CONVERSATION if num_seen or not first else Fork.SUB_AGENT


def message_hash(message: Message) -> bytes:
    """Names what a message says: the same for messages that differ only in ids or spelling."""
    is_assistant = message.role == "assistant"
    content = message.content.strip() if is_assistant else message.content
    calls = [[call.name, call.parsed_arguments()] for call in message.tool_calls]
    # Only some dialects repeat the tool's name in its result; agents put their own on answers,
    # which had none (Semantic Kernel).
    name = "" if message.role in ("tool", "assistant") else message.name
    said = [message.role, content, name, calls, message.reasoning.strip()]
    return _digest(orjson.dumps(said, option=orjson.OPT_SORT_KEYS))


def bare_hash(message: Message) -> bytes:
    return message_hash(replace(message, reasoning=""))


def ids_of(message: Message) -> bytes:
    return "\0".join([message.tool_call_id, *(call.id for call in message.tool_calls)]).encode()


def link(previous: bytes, *parts: bytes) -> bytes:
    """The name of a list of messages: that of the list without the last one, and the last one."""
    return _digest(b"".join([previous, *parts]))


def _is_longer(turn: Turn, num_messages: int, keys: Keys) -> bool:
    """Whether its conversation began as this call, and had more messages, its answer included."""
    prompt = turn.prompt
    same = (prompt.system, prompt.tools) == (keys.system, keys.tools)
    return same and prompt.num_messages + 1 > num_messages


def _quotes(content: str, said: str) -> bool:
    """Whether a message holds an answer, or the summary that the answer marks as such."""
    summary = said.rpartition("<summary>")[2].partition("</summary>")[0].strip()
    return any(len(text) >= MIN_QUOTED_CHARS and text in content for text in (said, summary))


def _digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=16).digest()


def _num_chars(messages: Sequence[Message]) -> int:
    return sum(
        len(message.content)
        + len(message.reasoning)
        + sum(len(call.arguments) for call in message.tool_calls)
        for message in messages
    )


def _num_same(some: Sequence[Message], others: Sequence[Message]) -> int:
    """How many leading messages are the same, to the letter."""
    num = 0
    for one, other in zip(some, others, strict=False):
        if one is not other and one != other:
            break
        num += 1
    return num


def _prompt_key(keys: Keys, parent: Turn | None) -> tuple[bytes, bytes, str]:
    return keys.tools, keys.chain[-1], parent.turn_id if parent else ""


def _num_leading(chain: Sequence[bytes], seen: set[bytes], num: int = 0) -> int:
    """How many leading messages an earlier conversation began with too; at least `num`."""
    while num < len(chain) and chain[num] in seen:
        num += 1
    return num
