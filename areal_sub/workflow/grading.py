"""Is this text the right answer to a question with one short answer? Pure; used by ready agents.

A small grader on purpose: numbers are compared exactly as fractions, anything else as normalised
text. Symbolic equality (`2x+2` and `2(x+1)`) is beyond it: return your own reward for that.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

# Longer digit strings are no answers, and converting them costs quadratic time.
MAX_NUMBER_CHARS = 64

_NUMBER = re.compile(r"(?<![\w.])-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:\s*/\s*\d+)?")
_ANSWER_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def grade_final_answer(
    task: Mapping[str, Any],
    transcript: Sequence[Mapping[str, Any]],
    outputs: Mapping[str, bytes],
    report: Mapping[str, Any],
) -> float:
    """A grader, for `rollout.openai.reward`: is the policy's last answer `task["answer"]`?

    0 as well where it was cut off at the token limit: that is no answer.
    """
    last = transcript[-1]
    return 0.0 if last["finish_reason"] == "length" else grade_math(last["content"], task["answer"])


def grade_math(text: str, answer: object) -> float:
    """1.0 where `text`'s final answer equals `answer` (a number or a string), else 0.0.

    The final answer is, in this order: `<answer>...</answer>`, `\\boxed{...}`, what follows
    `####` (GSM8K); the last of them counts. Without one it is the last number in the text where
    `answer` is a number, and the whole text where it is not.
    """
    truth_text = str(answer)
    truth = final_answer(truth_text)
    if truth is None:
        truth = truth_text
    given = final_answer(text)
    truth_value = number(truth)
    if truth_value is None:
        return float(_normalised(text if given is None else given) == _normalised(truth))
    if given is None:
        numbers = _NUMBER.findall(text)
        given = numbers[-1] if numbers else ""
    return float(number(given) == truth_value)


def final_answer(text: str) -> str | None:
    """The marked final answer in `text`, or None where nothing is marked."""
    tags = _ANSWER_TAG.findall(text)
    if tags:
        return str(tags[-1]).strip()
    start = text.rfind("\\boxed{")
    if start >= 0:
        begin = start + len("\\boxed{")
        depth = 1
        for end in range(begin, len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                return text[begin:end].strip()
    _, mark, after = text.rpartition("####")
    if mark:
        return after.strip().split("\n", 1)[0].strip()
    return None


def number(text: str) -> Fraction | None:
    """`text` as an exact number (`1,234`, `$5`, `50%` as 50, `3/4`, `-.5`), or None."""
    cleaned = text.strip().strip("$").rstrip("%.").replace(",", "").replace(" ", "")
    if len(cleaned) > MAX_NUMBER_CHARS or not re.fullmatch(
        r"-?(?:\d+(?:\.\d+)?|\.\d+)(?:/\d+)?", cleaned, re.ASCII
    ):
        return None
    above, _, below = cleaned.partition("/")
    if below and int(below) == 0:
        return None
    return Fraction(above) / (int(below) if below else 1)


def _normalised(text: str) -> str:
    return " ".join(text.casefold().split()).strip(" .\"'`*")
