"""What a model call costs in the proxy: CPU and added latency, beside other proxies.

    python -m benchmarks.proxy [--num 2000] [--rounds 3] [--litellm PYTHON] [--json FILE]
    python -m benchmarks.proxy --memory 100000      does its memory grow?
    python -m benchmarks.proxy --turns 100          what a turn costs late in a long rollout,
                                                    in each dialect, or --dialect NAME

Every proxy answers the same requests, of ~1 KB, with 64 tokens, whole or streamed token by token,
from a model that answers at once. Ours also renders, tokenises, detokenises and records them. CPU
is the proxy's own (user and system, of all its processes); latency is the client's, less that of
asking the model directly. Each proxy runs on one core, the model and the load on the others; each
figure is the median of `--rounds`, in which the proxies take turns. `--litellm`: an interpreter
that has `litellm[proxy]`; nginx is taken from the search path.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import secrets
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import psutil
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from areal_sub.rpc import Client
from benchmarks.load import QUESTION, SYSTEM
from benchmarks.rollouts import ROOT, read_line, start
from benchmarks.tree import tree_cpu_s
from benchmarks.upstream import TEXT
from benchmarks.wires import WIRES

OURS = "this proxy"
TURNS_PER_ROLLOUT = 50
START_TIMEOUT_S = 120.0
LITELLM_KEY = "sk-benchmark"
CONCURRENCIES = (1, 64, 256)
TEMPLATE = ROOT / "examples" / "proxy" / "chat_template.jinja"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@dataclass(frozen=True, slots=True)
class Cost:
    proxy: str
    at_once: int
    stream: bool
    cpu_s_per_1000: float
    added_ms: float  # median, over asking the model directly
    first_ms: float  # median time to the first byte
    per_s: float


@dataclass(frozen=True)
class Proxy:
    name: str
    port: int
    process: psutil.Process


def make_tokenizer(folder: Path) -> Tokenizer:
    """A model folder as far as the proxy needs one: a small byte-level BPE, and a template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([SYSTEM, QUESTION], trainer)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    shutil.copy(TEMPLATE, folder / "chat_template.jinja")
    return tokenizer


@contextmanager
def ours(folder: Path) -> Iterator[Proxy]:
    """The proxy as a run starts it, with an engine stub of our contract behind it."""
    tokenizer = make_tokenizer(folder / "model")
    token_id, stop_id = tokenizer.token_to_id(TEXT), tokenizer.token_to_id("<|im_end|>")
    engine_path = folder / "engine.sock"
    settings = {
        "agent_host": "127.0.0.1",
        "agent_port": 0,
        "control_path": str(folder / "control.sock"),
        "listeners_path": str(folder / "listeners.sock"),
        "engine_path": str(engine_path),
        "journal_path": str(folder / "journal"),
        "tokenizer_path": str(folder / "model"),
        "chat_template": None,
        "tool_call_parser": "auto",
        "reasoning_parser": "none",
        "request_timeout_s": 60.0,
    }
    (folder / "settings.json").write_text(json.dumps(settings))
    engine = ["benchmarks.upstream", "engine", str(engine_path), str(token_id), str(stop_id)]
    with (
        start(*engine) as stub,
        start("areal_sub.proxy", str(folder / "settings.json")) as process,
    ):
        read_line(stub)
        port = asyncio.run(_control(folder, "info"))["agent_port"]
        yield Proxy(OURS, port, psutil.Process(process.pid))
        for started in (process, stub):
            assert started.stdin is not None
            started.stdin.close()


async def _control(folder: Path, method: str, *calls: dict[str, Any]) -> Any:
    client = await Client.connect(folder / "control.sock", peer="proxy", timeout_s=20.0)
    try:
        answers = [await client.call(method, call, timeout_s=60.0) for call in calls or ({},)]
        return answers[-1]
    finally:
        await client.close()


def open_rollouts(folder: Path, num_calls: int, *, turns: int = TURNS_PER_ROLLOUT) -> list[str]:
    """Keys of as many rollouts as `num_calls` take."""
    keys = [secrets.token_hex(16) for _ in range(-(-num_calls // turns))]
    gconfig = {
        "max_new_tokens": 4096,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "override_agent": True,
    }
    common = {
        "group_id": "g",
        "task_id": "t",
        "split": "train",
        "policy_version": 0,
        "max_turns": turns,
        "gconfig": gconfig,
    }
    opened = [{**common, "rollout_id": key, "key": key} for key in keys]
    asyncio.run(_control(folder, "open_rollout", *opened))
    return keys


def end_rollouts(folder: Path, keys: list[str]) -> None:
    ended = [
        {
            "rollout_id": key,
            "outcome": "completed",
            "error": "",
            "reward": 0.0,
            "turn_rewards": {},
            "egress_refused": {},
            **dict.fromkeys(("traceback", "stdout_tail", "stderr_tail"), ""),
            **dict.fromkeys(("wall_s", "cpu_s", "max_rss_bytes", "peak_memory_bytes"), 0),
            "written_bytes": 0,
        }
        for key in keys
    ]
    asyncio.run(_control(folder, "end_rollout", *ended))


@contextmanager
def upstream() -> Iterator[Proxy]:
    with start("benchmarks.upstream", "http") as process:
        yield Proxy("the model itself", int(read_line(process)), psutil.Process(process.pid))
        assert process.stdin is not None
        process.stdin.close()


@contextmanager
def naive(model: Proxy) -> Iterator[Proxy]:
    with start("benchmarks.naive_proxy", f"http://127.0.0.1:{model.port}") as process:
        try:
            port = int(read_line(process))
            yield Proxy("FastAPI+pydantic+httpx", port, psutil.Process(process.pid))
        finally:
            process.terminate()


@contextmanager
def nginx(model: Proxy, folder: Path, program: str) -> Iterator[Proxy]:
    port = _free_port()
    (folder / "nginx.conf").write_text(
        f"""daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log {folder}/error.log;
events {{ worker_connections 4096; }}
http {{
    access_log off; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
    keepalive_requests 1000000;
    upstream model {{ server 127.0.0.1:{model.port}; keepalive 512; keepalive_requests 1000000; }}
    server {{
        listen 127.0.0.1:{port} backlog=2048;
        location / {{
            proxy_pass http://model; proxy_http_version 1.1;
            proxy_set_header Connection ""; proxy_buffering off;
        }}
    }}
}}
"""
    )
    with subprocess.Popen([program, "-c", str(folder / "nginx.conf")]) as process:
        try:
            _until_listening(port, process)
            yield Proxy("nginx, passing through", port, psutil.Process(process.pid))
        finally:
            process.terminate()


@contextmanager
def litellm(model: Proxy, folder: Path, python: str) -> Iterator[Proxy]:
    port = _free_port()
    config = {
        "model_list": [
            {
                "model_name": "policy",
                "litellm_params": {
                    "model": "openai/policy",
                    "api_base": f"http://127.0.0.1:{model.port}/v1",
                    "api_key": "key",
                },
            }
        ]
    }
    (folder / "litellm.json").write_text(json.dumps(config))
    program = Path(python).parent / "litellm"
    argv = [str(program), "--config", str(folder / "litellm.json"), "--host", "127.0.0.1"]
    env = {
        "PATH": f"{Path(python).parent}:/usr/bin:/bin",
        "HOME": str(folder),
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "LITELLM_LOG": "ERROR",
        "LITELLM_MASTER_KEY": LITELLM_KEY,
        "NO_PROXY": "127.0.0.1",
    }
    with (
        (folder / "litellm.log").open("w") as log,
        subprocess.Popen([*argv, "--port", str(port)], env=env, stdout=log, stderr=log) as process,
    ):
        try:
            _until_listening(port, process)
            yield Proxy("LiteLLM", port, psutil.Process(process.pid))
        except SystemExit:
            print((folder / "litellm.log").read_text()[-2000:], file=sys.stderr)
            raise
        finally:
            process.terminate()


def _free_port() -> int:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def _until_listening(port: int, process: subprocess.Popen[Any]) -> None:
    import socket

    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise SystemExit(f"{process.args!r} ended with {process.returncode}")
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise SystemExit(f"{process.args!r} does not listen on port {port}")


def send(port: int, *, num: int, at_once: int, stream: bool, keys: list[str]) -> dict[str, float]:
    load = {
        "port": port,
        "num": num,
        "at_once": min(at_once, num),
        "stream": stream,
        "keys": keys,
        "per_key": -(-num // len(keys)),
    }
    argv = [sys.executable, "-m", "benchmarks.load", json.dumps(load)]
    done = subprocess.run(argv, cwd=ROOT, stdout=subprocess.PIPE, check=True, text=True)
    result: dict[str, float] = json.loads(done.stdout)
    return result


def measure(proxy: Proxy, folder: Path, *, num: int, at_once: int, stream: bool) -> Cost:
    keys = open_rollouts(folder, num) if proxy.name == OURS else [LITELLM_KEY]
    before_s = tree_cpu_s(proxy.process)
    sent = send(proxy.port, num=num, at_once=at_once, stream=stream, keys=keys)
    cpu_s = tree_cpu_s(proxy.process) - before_s
    if proxy.name == OURS:
        end_rollouts(folder, keys)
    return Cost(
        proxy.name,
        at_once,
        stream,
        1000 * cpu_s / num,
        sent["p50_ms"],
        sent["first_ms"],
        num / sent["wall_s"],
    )


def compare(args: argparse.Namespace) -> list[Cost]:
    costs = []
    with ExitStack() as running, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = running.enter_context(upstream())
        proxies = [running.enter_context(ours(folder)), running.enter_context(naive(model))]
        program = shutil.which("nginx")
        if program:
            proxies.append(running.enter_context(nginx(model, folder, program)))
        if args.litellm:
            proxies.append(running.enter_context(litellm(model, folder, args.litellm)))
        for proxy in (model, *proxies):
            measure(proxy, folder, num=50, at_once=8, stream=False)  # warm
            measure(proxy, folder, num=50, at_once=8, stream=True)
        give_a_core([proxy.process for proxy in proxies])
        for stream in (False, True):
            for at_once in CONCURRENCIES:
                rounds = [
                    compare_once(model, proxies, folder, args.num, at_once, stream)
                    for _ in range(args.rounds)
                ]
                show(rounds)
                costs += [cost for each in rounds for cost in each]
    return costs


def compare_once(
    model: Proxy, proxies: list[Proxy], folder: Path, num: int, at_once: int, stream: bool
) -> list[Cost]:
    direct = measure(model, folder, num=num, at_once=at_once, stream=stream)
    costs = []
    for proxy in proxies:
        num_asked = num if proxy.name != "LiteLLM" else max(300, num // 5)
        cost = measure(proxy, folder, num=num_asked, at_once=at_once, stream=stream)
        costs.append(replace(cost, added_ms=cost.added_ms - direct.added_ms))
    return costs


def give_a_core(processes: list[psutil.Process]) -> None:
    """One core for what is measured, which one proxy at a time uses; the others for all else that
    this process has started and will start: else who waits for an answer is moved to and fro, and
    what caches hold with it."""
    one, *others = sorted(os.sched_getaffinity(0))
    if not others:
        return
    measured = {part.pid for each in processes for part in (each, *each.children(recursive=True))}
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        for thread in process.threads():
            os.sched_setaffinity(thread.id, {one} if process.pid in measured else others)


def show(rounds: list[list[Cost]]) -> None:
    """Medians of the rounds, each proxy's CPU as a ratio to ours of the same round."""
    first = rounds[0][0]
    kind = "streamed" if first.stream else "whole"
    print(f"\n{kind}, {first.at_once} at once")
    print(f"{'':<24}{'CPU s/1000':>12}{'added ms':>12}{'first ms':>12}{'per s':>9}{'CPU x':>9}")
    for costs in zip(*rounds, strict=True):  # of one proxy
        ratios = [
            cost.cpu_s_per_1000 / our_cost.cpu_s_per_1000
            for cost, (our_cost, *_) in zip(costs, rounds, strict=True)
        ]
        print(
            f"{costs[0].proxy:<24}"
            f"{statistics.median(cost.cpu_s_per_1000 for cost in costs):>12.2f}"
            f"{statistics.median(cost.added_ms for cost in costs):>12.1f}"
            f"{statistics.median(cost.first_ms for cost in costs):>12.1f}"
            f"{statistics.median(cost.per_s for cost in costs):>9.0f}"
            f"{statistics.median(ratios):>9.2f}",
            flush=True,
        )


def memory(num: int) -> None:
    """Resident memory after each tenth of `num` requests, in rollouts that end."""
    with tempfile.TemporaryDirectory() as name, ours(Path(name)) as proxy:
        folder = Path(name)
        print(f"{'requests':>10}{'RSS MB':>10}{'descriptors':>13}")
        for tenth in range(1, 11):
            measure(proxy, folder, num=num // 10, at_once=64, stream=tenth % 2 == 0)
            rss_mb = proxy.process.memory_info().rss / 2**20
            print(
                f"{tenth * num // 10:>10}{rss_mb:>10.1f}{proxy.process.num_fds():>13}", flush=True
            )


def _threads_cpu_s(process: psutil.Process) -> float:
    """CPU time of its threads, to the nanosecond: a turn takes less than a tick."""
    stats = Path(f"/proc/{process.pid}/task").glob("*/schedstat")
    return sum(int(each.read_text().split()[0]) for each in stats) / 1e9


class Rollout:
    """One whose agent speaks `dialect`, and whose history grows by a question and its answer."""

    def __init__(self, dialect: str, key: str, client: httpx.Client) -> None:
        self._wire = WIRES[dialect]
        self._headers = {"authorization": f"Bearer {key}"}
        self._client = client
        self._items: list[Any] = []
        self.num_turns = 0
        self.num_bytes = 0  # of its last request

    def turn(self) -> None:
        self.num_turns += 1
        self._items.append(self._wire.asked(f"{QUESTION} ({self.num_turns})"))
        body = json.dumps(self._wire.body(self._items)).encode()
        self.num_bytes = len(body)
        answer = self._client.post(self._wire.path, content=body, headers=self._headers)
        self._items += self._wire.answered(answer.raise_for_status().json())


def turns(num: int, dialects: list[str]) -> None:
    """The proxy's CPU per turn of rollouts whose histories grow; they take turns, so that a busy
    machine is as busy for each. Each figure is the median of `num` / 10 turns."""
    with tempfile.TemporaryDirectory() as name, ours(Path(name)) as proxy:
        keys = open_rollouts(Path(name), num * len(dialects), turns=num)
        with httpx.Client(base_url=f"http://127.0.0.1:{proxy.port}", timeout=60.0) as client:
            rollouts = [
                Rollout(dialect, key, client) for dialect, key in zip(dialects, keys, strict=True)
            ]
            print("CPU ms" + "".join(f"{dialect:>12}" for dialect in dialects) + f"{'KB':>8}")
            for tenth in range(1, 11):
                costs_ms: list[list[float]] = [[] for _ in rollouts]
                for _ in range(num // 10):
                    for rollout, cost_ms in zip(rollouts, costs_ms, strict=True):
                        before_s = _threads_cpu_s(proxy.process)
                        rollout.turn()
                        cost_ms.append(1000 * (_threads_cpu_s(proxy.process) - before_s))
                row = "".join(f"{statistics.median(cost_ms):>12.2f}" for cost_ms in costs_ms)
                size_kb = rollouts[0].num_bytes / 1000
                print(f"{tenth * (num // 10):>6}{row}{size_kb:>8.0f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--num", type=int, default=2000, help="requests per figure")
    parser.add_argument("--rounds", type=int, default=3, help="per figure, which is their median")
    parser.add_argument("--litellm", metavar="PYTHON", help="an interpreter with litellm[proxy]")
    parser.add_argument("--memory", type=int, metavar="NUM", help="watch memory over NUM requests")
    parser.add_argument("--turns", type=int, metavar="NUM", help="rollouts of NUM turns")
    parser.add_argument("--dialect", choices=[*WIRES], help="of --turns; else all of them")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    if args.memory:
        memory(args.memory)
    elif args.turns:
        turns(args.turns, [args.dialect] if args.dialect else [*WIRES])
    else:
        costs = compare(args)
        if args.json:
            args.json.write_text(json.dumps([asdict(cost) for cost in costs], indent=2) + "\n")


if __name__ == "__main__":
    main()
