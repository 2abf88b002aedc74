"""The proxy as the trainer starts it: a process with a settings file and a lifeline."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from pathlib import Path
from typing import Any

import openai
import pytest

from areal_sub.errors import PeerGone
from areal_sub.records import decode_record
from areal_sub.rpc import Client
from areal_sub.trajectory.journal import read_journal

ROOT = Path(__file__).parents[2]


async def start(settings: dict[str, Any], folder: Path) -> asyncio.subprocess.Process:
    path = folder / "settings.json"
    path.write_text(json.dumps(settings))
    return await asyncio.create_subprocess_exec(
        sys.executable,
        *("-W", "error", "-m", "areal_sub.proxy", str(path)),
        stdin=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=ROOT,
    )


def open_params(rollout_id: str, key: str) -> dict[str, Any]:
    gconfig = {
        "max_new_tokens": 64,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "override_agent": True,
    }
    return {
        "rollout_id": rollout_id,
        "key": key,
        "group_id": "g",
        "task_id": "t",
        "split": "train",
        "policy_version": 0,
        "max_turns": 8,
        "gconfig": gconfig,
    }


@pytest.mark.parametrize("ending", ["lifeline", "sigterm"])
def test_a_proxy_process(engine_alone: Any, tmp_path: Path, ending: str) -> None:
    async def work() -> None:
        async with engine_alone() as (engine, settings):
            engine.says("Hi<|im_end|>")
            process = await start(settings, tmp_path)
            assert process.stdin is not None
            assert process.stderr is not None
            control_path = Path(settings["control_path"])
            control = await Client.connect(control_path, peer="proxy", timeout_s=30)
            info = await control.call("info", timeout_s=10)
            assert info["max_model_len"] == engine.max_model_len
            await control.call("open_rollout", open_params("r", "key-of-r"), timeout_s=10)
            url = f"http://127.0.0.1:{info['agent_port']}/v1"
            async with openai.AsyncOpenAI(base_url=url, api_key="key-of-r") as client:
                await client.chat.completions.create(
                    model="m", messages=[{"role": "user", "content": "?"}]
                )
            items = control.stream("subscribe", {"offset": 0})
            kinds: list[str] = []
            async for item in items:
                kinds += [decode_record(raw).KIND for raw in item["records"]]
                if len(kinds) == 3:
                    break
            await items.aclose()
            assert kinds == ["open", "intent", "turn"]
            if ending == "lifeline":
                process.stdin.close()
            else:
                process.send_signal(signal.SIGTERM)
            assert await asyncio.wait_for(process.wait(), 10) == 0
            with pytest.raises(PeerGone):
                await control.call("info", timeout_s=10)
            await control.close()
            errors = (await process.stderr.read()).decode()
            assert "Traceback" not in errors
            assert "Warning" not in errors
            assert len(list(read_journal(Path(settings["journal_path"])))) == 3

    asyncio.run(asyncio.wait_for(work(), 60))


def test_it_ends_under_connections_that_do_not(engine_alone: Any, tmp_path: Path) -> None:
    """One that stopped reading its stream, one in the middle of a head, one in a body, one idle."""

    async def work() -> None:
        async with engine_alone() as (engine, settings):
            engine.says([65] * 3000)
            process = await start(settings, tmp_path)
            assert process.stdin is not None
            control_path = Path(settings["control_path"])
            control = await Client.connect(control_path, peer="proxy", timeout_s=30)
            port = (await control.call("info", timeout_s=10))["agent_port"]
            params = open_params("r", "key-of-r")
            params["gconfig"]["max_new_tokens"] = 3000
            await control.call("open_rollout", params, timeout_s=10)
            body = b'{"messages":[{"role":"user","content":"?"}],"stream":true,"logprobs":true}'
            head = b"POST /v1/chat/completions HTTP/1.1\r\nauthorization: Bearer key-of-r\r\n"
            whole = head + b"content-length: %d\r\n\r\n" % len(body) + body
            writers = []
            for sent in (whole, head, whole[:-1], b""):
                _, writer = await asyncio.open_connection("127.0.0.1", port, limit=1)
                writer.write(sent)
                await writer.drain()
                writers.append(writer)
            await engine.until(lambda: bool(engine.sampled) and engine.num_running == 0)
            process.stdin.close()
            assert await asyncio.wait_for(process.wait(), 15) == 0
            for writer in writers:
                writer.close()
            await control.close()

    asyncio.run(asyncio.wait_for(work(), 60))


def test_it_says_why_it_cannot_start(engine_alone: Any, tmp_path: Path) -> None:
    async def work() -> None:
        async with engine_alone(tool_call_parser="nobodys") as (_, settings):
            process = await start(settings, tmp_path)
            assert process.stderr is not None
            errors = await asyncio.wait_for(process.stderr.read(), 30)  # its lifeline stays open
            assert await asyncio.wait_for(process.wait(), 30) != 0
            assert "no parser 'nobodys'; there are: auto, hermes" in errors.decode()

    asyncio.run(asyncio.wait_for(work(), 60))


def test_the_proxy_loads_no_torch() -> None:
    code = (
        "import sys, areal_sub.proxy.server as s;"
        "sys.exit(' '.join({'torch', 'transformers', 'httpx', 'openai'} & set(sys.modules)) or 0)"
    )

    async def work() -> None:
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, cwd=ROOT)
        assert await asyncio.wait_for(process.wait(), 30) == 0

    asyncio.run(work())
