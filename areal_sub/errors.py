"""Every error that areal-sub raises on purpose, as one small tree.

Rule of the house: the message says *what* is wrong, *where* it came from, and *what to do*.
An error gets its type at one boundary; past it, it travels as data (a record), not as a crash.
"""

from __future__ import annotations


class ArealSubError(Exception):
    """Base of all errors raised by this package on purpose."""


class ConfigError(ArealSubError):
    """The configuration cannot be used: unknown key, wrong type, contradictory values."""


class TaskError(ArealSubError):
    """A dataset or one of its tasks cannot be used."""


class WorkflowError(ArealSubError):
    """The agent cannot be resolved, imported or constructed."""


class ModelError(ArealSubError):
    """A model folder, its tokenizer or its chat template cannot be used."""


class CheckpointError(ArealSubError):
    """A checkpoint is missing, damaged, or belongs to another run."""


class WriteError(ArealSubError):
    """A file of the run cannot be written: no space, no permission."""


class RunNotFound(ArealSubError):
    """There is no such run, or no such rollout in it."""


class RecordError(ArealSubError):
    """Bytes that should be a record are not one."""


class GrammarError(ArealSubError):
    """An output cannot be held to this grammar: it is malformed, not supported, or too costly."""


class OutOfMemory(ArealSubError):
    """The engine needs more memory than there is; the message names the keys to lower."""


INPUT_ERRORS = (CheckpointError, ConfigError, ModelError, RunNotFound, TaskError, WorkflowError)
"""What was given is wrong, and the message says how: nothing else of a failure is worth showing."""


class RpcError(ArealSubError):
    """A call to another process of ours failed there; the message is the far side's.

    `kind` and `text`: the far side's error, where it was one: its class and its own words.
    """

    def __init__(self, message: str, *, kind: str = "", text: str = "") -> None:
        super().__init__(message)
        self.kind = kind
        self.text = text


class PeerGone(RpcError):
    """The process at the other end closed the connection (it ended, or was killed)."""


class RolloutLost(ArealSubError):
    """The proxy's process was another when the rollout began; it has been ended as lost."""


class DeadlineExceeded(ArealSubError):
    """A wait reached its deadline. The message names who was waited for, and how long."""


class LearnerRankError(ArealSubError):
    """A process of the learner failed, hangs, or did not come; the message names its rank."""


class ComponentDied(ArealSubError):
    """The engine, proxy or supervisor process ended while the run still needed it."""
