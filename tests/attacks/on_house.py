"""What came of attacks 59 to 68: by what the proxy did for others meanwhile, and what it kept.

Each is run by a child whose one way out leads to the house's proxy (see `house`).
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from typing import Any

from catalog import Attack
from house import MAX_NEW_TOKENS, MAX_TURNS, MIB, NUM_FILES, House, Witnessed
from stub_engine import TEMPLATE

from areal_sub.records import EndRecord, TurnRecord
from sandbox import ChildReport, Ending

Observe = Callable[[Any, Any, Attack], Awaitable[str]]
OBSERVE: dict[str, Observe] = {}

MAX_GROWTH_BYTES = 192 * MIB
"""Of the proxy, by one rollout: its bodies, and what is made of them."""
MAX_LATENCY_S = 15.0
"""Of an honest call meanwhile, on a busy machine."""
MIN_HONEST_CALLS = 10
"""Within the seconds that an attack lasts; a quiet proxy answers some fifty."""
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u202e]")


class Attacked:
    """One attack on the house, from its rollout's opening to its end."""

    def __init__(self, stage: Any, house: House, attack: Attack) -> None:
        self._stage, self._attack = stage, attack
        self.house = house
        self.rollout_id = self.key = ""
        self.witnessed = Witnessed()
        self.ended: EndRecord | None = None

    async def run(self, **more: Any) -> ChildReport:
        stage, house, attack = self._stage, self.house, self._attack
        is_graded = attack.number == "63g"
        self.rollout_id, self.key = await house.open(f"a{attack.number}", transcript=is_graded)
        zygote = await stage.zygote(port=house.port, **attack.limits)

        async def on_listener(fd: int) -> None:
            house.hand_over(self.rollout_id, fd)

        async with house.witnessing() as self.witnessed:
            report: ChildReport = await stage.attack(
                zygote,
                attack.function,
                env={"OPENAI_API_KEY": self.key},
                wall_s=attack.wall_s or 60.0,
                on_listener=on_listener,
                **{"port": house.port, "house": str(house.folder), **more},
            )
        if self.ended is None:
            self.ended = await house.end(self.rollout_id)
        return report

    def harm(self) -> str:
        """To others: what is said of it, or nothing."""
        witnessed = self.witnessed
        if max(witnessed.latencies_s) > MAX_LATENCY_S:
            return f"SUCCEEDED: an honest call took {max(witnessed.latencies_s):.1f} s"
        if witnessed.grown_bytes > MAX_GROWTH_BYTES:
            return f"SUCCEEDED: the proxy grew by {witnessed.grown_bytes // MIB} MiB"
        if self.ended is not None and self.ended.num_turns > MAX_TURNS:
            return f"SUCCEEDED: {self.ended.num_turns} turns"
        return ""


def observes(*numbers: str) -> Callable[[Callable[[Attacked], Awaitable[str]]], None]:
    def register(observe: Callable[[Attacked], Awaitable[str]]) -> None:
        async def whole(stage: Any, _: Any, attack: Attack) -> str:
            attacked = Attacked(stage, await stage.house(), attack)
            said = await observe(attacked)
            return said if said.startswith("SUCCEEDED") else attacked.harm() or said

        for number in numbers:
            OBSERVE[number] = whole

    return register


def _said(report: ChildReport) -> str:
    if report.ending is not Ending.RETURNED:
        return f"stopped: {report.ending.name}: {report.error}"
    return "stopped: bounded" if report.value == "left" else str(report.value)


@observes("61a", "61c", "61d", "61e", "62a", "63a", "63b", "63c", "63f", "63g", "63h")
async def _(attacked: Attacked) -> str:
    return _said(await attacked.run())


@observes("61g", "63i")
async def _(attacked: Attacked) -> str:
    """For some seconds: honest calls go on meanwhile."""
    said = _said(await attacked.run())
    num = len(attacked.witnessed.latencies_s)
    return f"SUCCEEDED: no more than {num} honest calls" if num < MIN_HONEST_CALLS else said


@observes("61f", "61h")
async def _(attacked: Attacked) -> str:
    log = attacked.house.folder / "proxy.log"
    before = log.stat().st_size
    said = _said(await attacked.run())
    grown = log.stat().st_size - before
    return f"SUCCEEDED: the log grew by {grown} bytes" if grown > 16_384 else said


@observes("62b", "62c")
async def _(attacked: Attacked) -> str:
    """The proxy has descriptors left throughout."""
    most = 0

    async def count() -> None:
        nonlocal most
        while True:
            most = max(most, attacked.house.num_files())
            await asyncio.sleep(0.05)

    counting = asyncio.ensure_future(count())
    report = await attacked.run()
    counting.cancel()
    if most > NUM_FILES - 64:
        return f"SUCCEEDED: {most} of {NUM_FILES} descriptors"
    return _said(report)


@observes("59a")
async def _(attacked: Attacked) -> str:
    house = attacked.house
    other_id, other_key = await house.open("other")
    gone_id, gone_key = await house.open("gone")
    await house.end(gone_id)
    said = _said(await attacked.run(other_id=other_id, other_key=other_key, gone_key=gone_key))
    theirs = await house.end(other_id)
    if said.startswith("stopped: ") and theirs.num_turns:
        return f"SUCCEEDED: {theirs.num_turns} turns of another rollout"
    return said


@observes("59b")
async def _(attacked: Attacked) -> str:
    house = attacked.house
    other_id, other_key = await house.open("other")
    assert await house.ask(other_key) == 200
    [turn] = [each for each in house.records(other_id) if isinstance(each, TurnRecord)]
    num_before = len(house.engine.requests)
    said = _said(await attacked.run(other_id=other_id, other_answer=turn.answer_id))
    theirs = await house.end(other_id)
    asked = {request.affinity for request in house.engine.requests[num_before:]}
    if (theirs.num_turns, theirs.num_rejected_calls) != (1, 0) or other_id in asked:
        return f"SUCCEEDED: {theirs}"
    assert attacked.ended is not None and attacked.ended.num_turns == 1
    return said


@observes("60")
async def _(attacked: Attacked) -> str:
    said = _said(await attacked.run())
    assert attacked.ended is not None
    if attacked.ended.num_turns:
        return f"SUCCEEDED: {attacked.ended.num_turns} turns"
    assert attacked.ended.tampering["control_route"] > 10, attacked.ended.tampering
    return said


@observes("61b")
async def _(attacked: Attacked) -> str:
    said = _said(await attacked.run())
    log = (attacked.house.folder / "proxy.log").read_text()
    stats = await attacked.house.stats()
    shown = [*log.splitlines(), *(each for all in stats["tampering"]["examples"].values()
                                  for each in all)]  # fmt: skip
    injected = [line for line in shown if line.startswith("INJECTED") or _CONTROL.search(line)]
    if injected or "Traceback" in log:
        return f"SUCCEEDED: {injected}"
    attacked.house.records(attacked.rollout_id)  # they can be read
    return said


@observes("63d")
async def _(attacked: Attacked) -> str:
    """Calls that are refused count against no limit, so each must leave nothing behind."""
    said = _said(await attacked.run())
    if attacked.witnessed.grown_bytes > 16 * MIB:
        return f"SUCCEEDED: 400 refused calls left {attacked.witnessed.grown_bytes // MIB} MiB"
    return said


@observes("64")
async def _(attacked: Attacked) -> str:
    num_before = len(attacked.house.engine.requests)
    said = _said(await attacked.run())
    requests = attacked.house.engine.requests[num_before:]
    num = sum(request.affinity == attacked.rollout_id for request in requests)
    return said if num <= MAX_TURNS else f"SUCCEEDED: {num} requests"


@observes("65")
async def _(attacked: Attacked) -> str:
    """The prompt has the template's own control tokens, and no other."""
    house = attacked.house
    num_before = len(house.engine.requests)
    said = _said(await attacked.run())
    requests = house.engine.requests[num_before:]
    [request] = [each for each in requests if each.affinity == attacked.rollout_id]
    vocabulary = house.engine.vocabulary
    ids = request.prompt_token_ids.tolist()
    counts = {
        text: ids.count(token_id)
        for text, token_id in vocabulary.control_ids.items()
        if text in vocabulary.special_texts
    }
    expected = {"<|endoftext|>": 0, "<|im_start|>": 5, "<|im_end|>": 4}
    text = vocabulary.decode(ids)
    if counts != expected or "49" in text or "{{ 7 * 7 }}" not in text:
        return f"SUCCEEDED: {counts} {text!r}"
    return said.replace("bounded", "it stays text")


@observes("66")
async def _(attacked: Attacked) -> str:
    house = attacked.house
    running = asyncio.ensure_future(attacked.run())
    async with asyncio.timeout(30):
        while not (attacked.rollout_id and house.num_turns(attacked.rollout_id)):
            assert not running.done(), running
            await asyncio.wait({running}, timeout=0.05)
    num_before = len(house.engine.requests)
    attacked.ended = await house.end(attacked.rollout_id)
    said = _said(await running)
    after = [each for each in house.engine.requests[num_before:]
             if each.affinity == attacked.rollout_id]  # fmt: skip
    is_last = isinstance(house.records(attacked.rollout_id)[-1], EndRecord)
    return said if is_last and not after else f"SUCCEEDED: {len(after)} calls"


@observes("67")
async def _(attacked: Attacked) -> str:
    house = attacked.house
    before = house.engine.reply
    house.engine.reply = lambda request: (
        [65] * MAX_NEW_TOKENS if request.affinity == attacked.rollout_id else "ok<|im_end|>"
    )
    try:
        report = await attacked.run()
    finally:
        house.engine.reply = before
    assert report.value == "left 30", report
    return "stopped: bounded"


@observes("68")
async def _(attacked: Attacked) -> str:
    num_before = len(attacked.house.engine.requests)
    said = _said(await attacked.run())
    requests = attacked.house.engine.requests[num_before:]
    asked = [each for each in requests if each.affinity == attacked.rollout_id]
    assert attacked.ended is not None
    if len(asked) != MAX_TURNS or max(each.max_new_tokens for each in asked) > MAX_NEW_TOKENS:
        return f"SUCCEEDED: {len(asked)} requests"
    return said


async def _schemas(stage: Any, _: Any, attack: Attack) -> str:
    """Before a real engine, which compiles them."""
    from engine_lab import engine_process
    from grammar_lab import make_folder

    folder = stage.folder / "schemas"
    model, house_folder = folder / "model", folder / "house"
    for each in (model, house_folder):
        each.mkdir(parents=True, exist_ok=True)
    make_folder(model)
    (model / "chat_template.jinja").write_text(TEMPLATE)
    with engine_process(folder, model_path=str(model), max_running_requests=8) as engine:
        async with House.serving(house_folder, model, engine.socket_path) as house:
            attacked = Attacked(stage, house, attack)
            said = _said(await attacked.run())
    return said if said.startswith("SUCCEEDED") else attacked.harm() or said


OBSERVE["63e"] = _schemas
