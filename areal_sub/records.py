"""Every record that crosses a process, and its msgpack form (`docs/wire-format.md`).

Owns the shapes of: trajectory records (proxy → journal → trainer), ledger records (what the trainer
did with each rollout), generation requests and chunks (proxy ↔ engine), run requests and reports
(trainer ↔ supervisor).

Invariants: a record is a msgpack map `{"kind", "v", **fields}`; records only grow by appended
fields with defaults, so an old journal stays readable; token arrays are packed little-endian
(int32 ids and versions, float32 logprobs), never msgpack lists. Nothing here is ever unpickled.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import sys
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar, Self, TypeVar

import msgpack
import numpy as np
from numpy.typing import NDArray

from areal_sub.errors import RecordError

WEIGHT_PROBE = "areal_sub.probe"
"""Key in a weight file's metadata: JSON `{"token_ids", "logprobs"}`, a sequence and what the
learner computes for all its tokens but the first, at temperature 1."""
WEIGHT_ADAPTER = "areal_sub.adapter"
"""Key in the metadata of an adapter's weight file: the JSON of peft's `adapter_config.json`."""

Int32Array = NDArray[np.int32]
UInt32Array = NDArray[np.uint32]
Float32Array = NDArray[np.float32]


def int32(values: Any) -> Int32Array:
    """`values` (any integer sequence) as a 1-D int32 array."""
    return np.asarray(values, dtype=np.int32).reshape(-1)


def uint32(values: Any) -> UInt32Array:
    """`values` (any integer sequence) as a 1-D uint32 array."""
    return np.asarray(values, dtype=np.uint32).reshape(-1)


def float32(values: Any) -> Float32Array:
    """`values` (any float sequence) as a 1-D float32 array."""
    return np.asarray(values, dtype=np.float32).reshape(-1)


class Fault(StrEnum):
    """Whose it is that a rollout did not complete."""

    NONE = "none"
    AGENT = "agent"
    POLICY = "policy"  # what the policy sampled led there, and neither the agent nor we
    INFRASTRUCTURE = "infrastructure"  # ours


class Outcome(StrEnum):
    """How a rollout counts. Exactly one per rollout that was started."""

    COMPLETED = "completed"  # the agent returned a valid reward, or its grader did
    EXCEPTION = "exception"  # the agent raised
    EXITED = "exited"  # its process ended without a result (`os._exit`, `sys.exit`)
    KILLED = "killed"  # its process died of a signal that we did not send
    TIMEOUT = "timeout"  # its wall-clock deadline passed
    OUTPUT_LIMIT = "output_limit"  # it wrote more to stdout/stderr than it may
    RESULT_LIMIT = "result_limit"  # its result was larger than it may be
    MEMORY_LIMIT = "memory_limit"  # its processes together used more memory than they may
    CPU_LIMIT = "cpu_limit"  # its processes together used more CPU time than they may
    INVALID_RESULT = "invalid_result"  # malformed, not a reward, NaN, or for an unknown turn
    NO_TURNS = "no_turns"  # a valid reward, but no model call to train
    GRADER_FAILED = "grader_failed"  # the agent came to its end, but the grader did not, twice
    START_FAILED = "start_failed"  # the agent could not be imported, constructed or spawned
    CANCELLED = "cancelled"  # we stopped it (shutdown)
    LOST = "lost"  # infrastructure of ours failed under it
    # The agent failed, and its last call says why:
    CONTEXT_LIMIT = "context_limit"  # refused: the conversation has outgrown the model's context
    TURN_LIMIT = "turn_limit"  # refused: it has made `rollout.openai.max_turns` calls
    LENGTH_LIMIT = "length_limit"  # its answer was cut off at the number of tokens that it may have

    @property
    def fault(self) -> Fault:
        return _FAULTS.get(self, Fault.AGENT)


_FAULTS = {
    Outcome.COMPLETED: Fault.NONE,
    Outcome.CONTEXT_LIMIT: Fault.POLICY,
    Outcome.TURN_LIMIT: Fault.POLICY,
    Outcome.LENGTH_LIMIT: Fault.POLICY,
    Outcome.GRADER_FAILED: Fault.INFRASTRUCTURE,
    Outcome.START_FAILED: Fault.INFRASTRUCTURE,
    Outcome.CANCELLED: Fault.INFRASTRUCTURE,
    Outcome.LOST: Fault.INFRASTRUCTURE,
}


class Fate(StrEnum):
    """What became of a rollout. The trainer decides the first block, and writes it to its ledger;
    a reader concludes the second from journal and ledger."""

    TRAINED = "trained"  # a training step learned from its tokens
    EVALUATED = "evaluated"  # a validation rollout: it counts there, and is never trained
    FAILED = "failed"  # its outcome is not `completed`; told by the outcome's name
    RETRIED = "retried"  # infrastructure of ours failed under it, and another takes its place
    STALE = "stale"  # older than `rollout.max_head_offpolicyness` when its group was ready
    NO_BASELINE = "no_baseline"  # completed, but too few of its group could be trained with it
    NO_SIGNAL = "no_signal"  # in a training step, with advantage 0 for each of its tokens
    UNCERTIFIED = "uncertified"  # the engine vouches for none of its tokens
    SKIPPED = "skipped"  # the gradient of its training step was not finite
    UNUSED = "unused"  # the run ended before a training step or an evaluation took it

    UNDONE = "undone"  # trained after the recovery point that the run later went on from
    CRASHED = "crashed"  # a process of ours went before the rollout's end or its decision
    RUNNING = "running"  # the run goes on, and so does the rollout
    WAITING = "waiting"  # the run goes on; the rollout has ended, and is not yet decided on
    UNACCOUNTED = "unaccounted"  # it should have been decided on, and was not: a defect of ours


class Fork(StrEnum):
    """Why a turn's prompt does not simply continue an earlier turn, or `NONE` where it does.

    The proxy records those of the first block, from the messages. Those of the second are concluded
    from the whole trajectory (`trajectory/causes.py`) and never recorded."""

    NONE = "none"  # continues its parent: parent's tokens verbatim, then only new messages
    ROOT = "root"  # first turn of the rollout
    RESAMPLE = "resample"  # same messages as an earlier turn: a sibling sample (`n`, a retry)
    NEW_CONVERSATION = "new_conversation"  # nothing in common with an earlier turn
    SUB_AGENT = "sub_agent"  # the same, under another system message
    COMPACTED = "compacted"  # a summary stands where answers of ours stood
    SYSTEM_CHANGED = "system_changed"
    TOOLS_CHANGED = "tools_changed"
    HISTORY_EDITED = "history_edited"  # a message that we had not sampled differs or is gone
    ASSISTANT_EDITED = "assistant_edited"  # what the agent says we sampled is not what we sampled
    TEMPLATE_REWROTE = "template_rewrote"  # the chat template renders the same history differently
    REASONING_DROPPED = "reasoning_dropped"  # the agent left out what an answer of ours had thought

    LOST_ANSWER = "lost_answer"  # the agent never saw this answer, and made the call again
    SIDE_REQUEST = "side_request"  # to another model name than the main one: a title, a router
    CHOICE = "choice"  # one more answer of the same call (`n`)
    PARALLEL = "parallel"  # made while another call from the same place was running
    BRANCH = "branch"  # goes on from a turn from which another call has gone on already


class Masked(StrEnum):
    """Why sampled tokens of a rollout in a training step are not trained."""

    LOST_ANSWER = "lost_answer"  # the agent never saw them: see `Fork.LOST_ANSWER`
    SIDE_BRANCH = "side_branch"  # `rollout.openai.credit: main`, and they are not of the main one
    NOT_VERBATIM = "not_verbatim"  # the engine does not vouch for them


def extend_digest(digest: int, token_ids: Int32Array) -> int:
    """CRC-32 of a token sequence (little-endian int32) that goes on with `token_ids`; it begins
    with 0."""
    return zlib.crc32(token_ids.astype("<i4", copy=False).tobytes(), digest)


class _Record:
    """Mixin: map form and bytes of a dataclass of scalars, dicts and packed arrays."""

    KIND: ClassVar[str]
    VERSION: ClassVar[int] = 1

    def to_map(self) -> dict[str, Any]:
        keys, values_of, arrays = _layout(type(self))  # type: ignore[arg-type]
        out: dict[str, Any] = dict(zip(keys, values_of(self), strict=True))
        for name in arrays:
            out[name] = _packed(out[name])
        return out

    @classmethod
    def from_map(cls, data: dict[str, Any]) -> Self:
        """Raises `RecordError` naming the kind and the field."""
        values: dict[str, Any] = {}
        for name, convert, required in _fields(cls):  # type: ignore[arg-type]
            if name not in data:
                if required:
                    raise RecordError(f"{cls.KIND} record lacks the field {name!r}")
                continue
            value = data[name]
            if convert is not None:
                try:
                    value = convert(value)
                except (TypeError, ValueError) as error:
                    raise RecordError(f"{cls.KIND} record, field {name!r}: {error}") from None
            values[name] = value
        return cls(**values)


R = TypeVar("R", bound=_Record)

_ARRAYS = ("Int32Array", "UInt32Array", "Float32Array")
# Field annotation → how its wire form becomes the value. Others are kept as msgpack gave them.
_CONVERT: dict[str, Callable[[Any], Any]] = {
    "Int32Array": lambda raw: np.frombuffer(raw, dtype="<i4"),
    "UInt32Array": lambda raw: np.frombuffer(raw, dtype="<u4"),
    "Float32Array": lambda raw: np.frombuffer(raw, dtype="<f4"),
    "Outcome": Outcome,
    "Fork": Fork,
    "Fate": Fate,
}


@functools.cache
def _fields(cls: Any) -> list[tuple[str, Callable[[Any], Any] | None, bool]]:
    """(name, how its wire form becomes the value, whether it has no default) of each."""
    missing = dataclasses.MISSING
    return [
        (f.name, _CONVERT.get(str(f.type)), f.default is missing and f.default_factory is missing)
        for f in dataclasses.fields(cls)
    ]


@functools.cache
def _layout(cls: Any) -> tuple[list[str], Callable[[Any], tuple[Any, ...]], list[str]]:
    """The keys of its map form, what gives their values, and those that are arrays."""
    fields = dataclasses.fields(cls)
    names = [f.name for f in fields]
    arrays = [f.name for f in fields if str(f.type) in _ARRAYS]
    return ["kind", "v", *names], operator.attrgetter("KIND", "VERSION", *names), arrays


def _packed(array: NDArray[Any]) -> bytes:
    if sys.byteorder != "little" or not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("<"))
    return array.tobytes()


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenRecord(_Record):
    """A rollout was opened."""

    KIND: ClassVar[str] = "open"

    rollout_id: str
    group_id: str
    task_id: str
    split: str  # "train" | "valid"
    policy_version: int  # the trainer's, when it was admitted
    opened_at: float  # Unix time, s
    agent: str = ""  # its name, where the run has several


@dataclass(frozen=True, slots=True, kw_only=True)
class IntentRecord(_Record):
    """A turn is about to be asked of the engine. Its turn record follows, unless not one token of
    it came: then nothing of it can be trained."""

    KIND: ClassVar[str] = "intent"

    rollout_id: str
    turn_id: str
    num_prompt_tokens: int
    asked_at: float  # Unix time, s


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnRecord(_Record):
    """One captured model call.

    The turn's full prompt is its parent's full sequence (prompt + sampled) followed by
    `context_token_ids`; without a parent it is `context_token_ids` alone. So a root-to-leaf branch
    is a plain concatenation, and what is trained is by construction what was sampled.
    """

    KIND: ClassVar[str] = "turn"

    rollout_id: str
    turn_id: str  # the completion id that the agent saw
    parent_turn_id: str | None
    fork: Fork
    context_token_ids: Int32Array  # [num_context] not sampled: never trained
    token_ids: Int32Array  # [num_sampled]
    rollout_logprobs: Float32Array  # [num_sampled] of the distribution sampled from
    versions: Int32Array  # [num_sampled] policy version of each sampled token
    finish_reason: str  # "stop" | "length" | "tool_calls" | "aborted"
    dialect: str  # "chat" | "completions" | "responses" | "messages" | "gemini"
    model: str  # the model name that the agent asked for
    temperature: float
    top_p: float
    started_at: float  # Unix time, s
    ended_at: float  # Unix time, s
    num_prompt_tokens: int  # the full prompt's length
    engine_digest: int = 0  # the engine's, at the last token that was kept: see `GenerateChunk`
    constrained: bool = False
    """Drawn under a grammar: tokens that it forbids had probability 0, but `rollout_logprobs` are
    those of softmax(logits / temperature) over the whole vocabulary, without top_p and top_k. That
    is what the learner computes, so that its ratio is 1 on equal weights; the distribution that was
    sampled from is not recorded."""
    streamed: bool = False  # the agent asked for a stream
    answer_id: str = ""  # of the call's answer: the first choice's `turn_id`; "": the turn is alone
    retry: int = 0  # how often the client says to have made this very call before
    num_tools: int = 0  # that the call offered
    continues_turn_id: str | None = None
    """Where `fork` says that the conversation goes on, but not by its tokens: the turn after which
    it does, if one is known. Never the parent."""

    @property
    def num_bytes(self) -> int:
        """Of its arrays."""
        arrays = (self.context_token_ids, self.token_ids, self.rollout_logprobs, self.versions)
        return sum(array.nbytes for array in arrays)


@dataclass(frozen=True, slots=True, kw_only=True)
class EndRecord(_Record):
    """A rollout ended. Always the last record of its rollout."""

    KIND: ClassVar[str] = "end"

    rollout_id: str
    outcome: Outcome
    reward: float | None  # the final reward, where the agent returned one number
    turn_rewards: dict[str, float]  # turn_id → reward, where it returned a dict
    error: str  # "" or one line: what happened
    traceback: str  # "" or the agent's traceback, bounded
    stdout_tail: str
    stderr_tail: str
    wall_s: float
    cpu_s: float
    max_rss_bytes: int
    num_turns: int
    num_rejected_calls: int  # calls with this rollout's key that were refused
    ended_at: float
    egress_refused: dict[str, int] = field(default_factory=dict)
    """ "host:port" that the sandbox's allowlist refused → how often; bounded."""
    written_bytes: int = 0  # what the child's files took at its end
    claimed_reward: float | dict[str, float] | None = None
    """With a grader: what the agent returned, which is not what `reward` is made from. None where
    it returned no reward."""
    tampering: dict[str, int] = field(default_factory=dict)
    """What looks like cheating → how often; see `proxy/tampering.py`."""
    peak_memory_bytes: int = 0
    """Of all the child's processes together, as its cgroup counted it; 0 where it had none."""

    @classmethod
    def without_process(
        cls,
        rollout_id: str,
        outcome: Outcome,
        *,
        num_turns: int,
        reward: float | None = None,
        turn_rewards: dict[str, float] | None = None,
        error: str = "",
        ended_at: float = 0.0,
    ) -> EndRecord:
        """Where nothing is known of the agent's process: neither what it wrote nor what it used."""
        return cls(
            rollout_id=rollout_id,
            outcome=outcome,
            reward=reward,
            turn_rewards=turn_rewards or {},
            error=error,
            traceback="",
            stdout_tail="",
            stderr_tail="",
            wall_s=0.0,
            cpu_s=0.0,
            max_rss_bytes=0,
            num_turns=num_turns,
            num_rejected_calls=0,
            ended_at=ended_at,
        )


TrajectoryRecord = OpenRecord | IntentRecord | TurnRecord | EndRecord

_KINDS: dict[str, type[TrajectoryRecord]] = {
    cls.KIND: cls for cls in (OpenRecord, IntentRecord, TurnRecord, EndRecord)
}


@dataclass(frozen=True, slots=True, kw_only=True)
class BeganRecord(_Record):
    """A trainer began, or went on with, a run. Always the first record of its ledger."""

    KIND: ClassVar[str] = "began"

    policy_version: int  # that it began with
    began_at: float  # Unix time, s
    export_style: str  # "concat" | "individual": how rollouts become training samples
    turn_discount: float
    trains_without_advantage: bool  # a KL penalty trains every token, also at advantage 0
    tokenizer_path: str  # absolute folder
    credit: str = "all"  # "all" | "main" | "per_branch": which turns are trained, for what return


@dataclass(frozen=True, slots=True, kw_only=True)
class FateRecord(_Record):
    """The trainer decided on a rollout. One per rollout."""

    KIND: ClassVar[str] = "fate"

    rollout_id: str
    fate: Fate
    reason: str  # "" or one line: more than the fate's name says
    policy_version: int  # the trainer's, when it decided
    decided_at: float  # Unix time, s
    step: int = 0  # training step; 0 where there was none
    staleness: int | None = None  # versions, where it was asked
    num_trained_tokens: int = 0
    num_uncertified_tokens: int = 0
    baseline_mean: float = 0.0  # of its group: advantage = (return - mean) * scale
    baseline_scale: float = 0.0
    failure_reward: float | None = None
    """In a training step although it failed: with this reward (`rollout.failures`)."""
    attempt: int = 0  # of the run, whose journal has the rollout; 0: the ledger's own


@dataclass(frozen=True, slots=True, kw_only=True)
class ClosedRecord(_Record):
    """A trainer ended by itself. Always the last record of its ledger; a killed one has none."""

    KIND: ClassVar[str] = "closed"

    ended: str  # "done" | "interrupted" | "failed"
    error: str  # "" or one line: why it failed
    closed_at: float  # Unix time, s


LedgerRecord = BeganRecord | FateRecord | ClosedRecord

_LEDGER_KINDS: dict[str, type[BeganRecord] | type[FateRecord] | type[ClosedRecord]] = {
    cls.KIND: cls for cls in (BeganRecord, FateRecord, ClosedRecord)
}


def encode_record(record: TrajectoryRecord | LedgerRecord) -> bytes:
    # By default it takes 256 KB first, which is as much work as all the rest.
    packed: bytes = msgpack.packb(record.to_map(), use_bin_type=True, buf_size=1024)
    return packed


def decode_record(raw: bytes) -> TrajectoryRecord:
    """Raises `RecordError` where `raw` is not one whole record of a known kind and version."""
    return _decode(raw, _KINDS)


def decode_ledger_record(raw: bytes) -> LedgerRecord:
    """Raises `RecordError`, as `decode_record` does."""
    return _decode(raw, _LEDGER_KINDS)


def renamed(record: TrajectoryRecord, *, rollout_id: str, group_id: str) -> TrajectoryRecord:
    """The same record of another rollout."""
    if isinstance(record, OpenRecord):
        return dataclasses.replace(record, rollout_id=rollout_id, group_id=group_id)
    return dataclasses.replace(record, rollout_id=rollout_id)


def _decode(raw: bytes, kinds: Mapping[str, type[R]]) -> R:
    try:
        data = msgpack.unpackb(raw, raw=False)
    except (ValueError, msgpack.exceptions.UnpackException) as error:
        raise RecordError(f"not msgpack: {error}") from None
    kind = data.get("kind") if isinstance(data, dict) else type(data).__name__
    if not isinstance(data, dict) or not isinstance(kind, str) or kind not in kinds:
        raise RecordError(f"unknown record kind {kind!r}; there are: {', '.join(kinds)}")
    cls = kinds[kind]
    if not isinstance(data.get("v"), int) or data["v"] > cls.VERSION:
        raise RecordError(
            f"{cls.KIND} record of version {data.get('v')!r}; "
            f"this release reads up to {cls.VERSION}"
        )
    return cls.from_map(data)


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest(_Record):
    """Tokens in: one sampling request to an engine."""

    KIND: ClassVar[str] = "generate"

    prompt_token_ids: Int32Array  # [num_prompt]
    max_new_tokens: int
    temperature: float  # 0 = greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 = off
    stop_token_ids: list[int] = field(default_factory=list)
    stream: bool = False  # False: one chunk, at the end
    affinity: str = ""  # requests with the same value share a prefix (the rollout id)
    grammar: str = ""
    """What the sampled tokens may be, or "": anything. In llguidance's variant of Lark, with
    `%json {schema}` and `<[token id]>` as terms; where it is complete, `stop_token_ids` may come.
    `logprobs` stay those of the model's own distribution: see `TurnRecord.constrained`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateChunk(_Record):
    """Tokens out. `finish_reason` is None on all chunks but the last."""

    KIND: ClassVar[str] = "chunk"

    token_ids: Int32Array  # [num_new]; a stop token that ended the sequence is included
    logprobs: Float32Array  # [num_new]
    versions: Int32Array  # [num_new]
    finish_reason: str | None  # "stop" | "length"
    digests: UInt32Array = field(default_factory=lambda: uint32([]))
    """[num_new] CRC-32 (of little-endian int32) over the prompt that the engine read and all that
    it sampled up to and including each token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo(_Record):
    """What an engine says of itself."""

    KIND: ClassVar[str] = "engine_info"

    policy_version: int
    max_model_len: int  # prompt + new tokens, at most
    vocab_size: int
    num_slots: int  # sequences decoded at once
    num_running: int
    num_waiting: int
    num_generated_tokens: int  # since the start
    num_decode_steps: int  # since the start


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRequest(_Record):
    """Trainer → supervisor: run an agent once in a fresh child."""

    KIND: ClassVar[str] = "run"

    rollout_id: str
    target: str  # import path of the agent, or "" where `pickled` is given
    pickled: bytes  # dill of the agent (from a notebook or `__main__`), or b""; towards the child
    workflow_kwargs: dict[str, Any]
    data: dict[str, Any]  # the task
    env: dict[str, str]  # added to the child's scrubbed environment
    timeout_s: float
    workspace: str = ""  # absolute folder whose content the child starts in, or "" for none
    outputs: list[str] = field(default_factory=list)  # paths in there to bring back
    python: str = ""  # the agent's interpreter; "": the supervisor's own
    readable: list[str] = field(default_factory=list)  # more paths that the child can read
    argv: list[str] = field(default_factory=list)  # a program instead of `target` and `pickled`
    stdin: str = ""  # the program's
    files: dict[str, str] = field(default_factory=dict)  # for it: path (or ~/path) → content
    reward: str = ""  # where the program's is: "last_line" | "exit_code" | "file:PATH"
    grader: bool = False  # `target` grades: no model and no network for it
    import_env: dict[str, str] = field(default_factory=dict)  # what of `env` its import finds


@dataclass(frozen=True, slots=True, kw_only=True)
class RunReport(_Record):
    """Supervisor → trainer: how an agent's process ended. All of it is hostile but bounded."""

    KIND: ClassVar[str] = "report"

    rollout_id: str
    outcome: Outcome  # COMPLETED means: `result` holds the returned value, not yet judged
    result: Any  # what the agent returned: JSON types only
    error: str
    traceback: str
    stdout_tail: str
    stderr_tail: str
    exit_code: int | None
    signal: int | None
    wall_s: float
    cpu_s: float
    max_rss_bytes: int
    num_killed: int = 0  # processes that the agent left behind
    egress_refused: dict[str, int] = field(default_factory=dict)
    """ "host:port" that the sandbox's allowlist refused → how often; bounded."""
    written_bytes: int = 0  # what its files took at its end
    outputs: dict[str, bytes] = field(default_factory=dict)  # path → content
    outputs_refused: list[list[str]] = field(default_factory=list)  # [path, why] of what was not
    outputs_missing: list[str] = field(default_factory=list)  # declared, and not there
    peak_memory_bytes: int = 0  # of all its processes together, by its cgroup; 0 where it had none
