"""A vLLM server of our own: its command, its environment, its end.

It listens on a Unix socket in a folder that is ours alone: its control calls have no password, and
on a port every process of the machine could make them. It ends with us, however we go: its process
group is killed, and as a second factor the kernel ends it with its parent.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import logging
import os
import re
import signal
from pathlib import Path

from areal_sub.engines.vllm.probe import BACKEND, LOGPROBS_MODE
from areal_sub.engines.vllm.settings import LORA_RANKS, ModelFacts, VllmSettings
from areal_sub.engines.vllm.weights_file import linear_names, shapes_of
from areal_sub.engines.vllm.wire import SERVED_NAME
from areal_sub.errors import ConfigError

log = logging.getLogger(__name__)

PLUGIN_FOLDER = Path(__file__).parent / "plugin"
STOP_TIMEOUT_S = 5.0
# Adapters that one batch may have: of requests that go on over that many updates, less one.
MAX_LORAS = 4
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


class VllmProcess:
    """Use `await VllmProcess.start(...)`."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.ended: asyncio.Task[int] = asyncio.ensure_future(process.wait())

    @classmethod
    async def start(cls, settings: VllmSettings, facts: ModelFacts, socket: Path) -> VllmProcess:
        """Its output goes where ours goes. Raises `ConfigError` where it cannot be run."""
        command = command_of(settings, facts, socket)
        log.info("starting %s", " ".join(command))
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                env=environment_of(settings),
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )
        except OSError as error:
            raise ConfigError(f"engine.vllm.python={settings.python}: {error}") from None
        return cls(process)

    @property
    def pid(self) -> int:
        return self._process.pid

    def kill(self) -> None:
        """The server and its workers, at once, and the shared memory that they would leave."""
        group = self._process.pid
        shared = _shared_memory_of(group)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)
        for path in shared:
            path.unlink(missing_ok=True)

    async def stop(self) -> None:
        """Let it end by itself, for a while; then kill what is left."""
        if not self.ended.done():
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()
            await asyncio.wait([self.ended], timeout=STOP_TIMEOUT_S)
        self.kill()
        await self.ended


def command_of(settings: VllmSettings, facts: ModelFacts, socket: Path) -> list[str]:
    assert settings.python is not None
    return [
        *(settings.python, "-m", "vllm.entrypoints.openai.api_server"),
        *("--uds", str(socket)),
        *("--model", str(settings.model_path), "--served-model-name", SERVED_NAME),
        *("--dtype", settings.dtype, "--seed", str(settings.seed)),
        *("--max-model-len", str(facts.max_model_len)),
        *("--max-num-seqs", str(settings.max_running_requests)),
        *("--logprobs-mode", LOGPROBS_MODE),
        *("--generation-config", "vllm"),  # the model folder's own defaults are not ours
        *_weight_flags(settings),
        *_grammar_flags(settings),
        *("--enable-scale-out", "--disable-uvicorn-access-log"),
        *settings.args,
    ]


def _grammar_flags(settings: VllmSettings) -> list[str]:
    if not (settings.model_path / "tokenizer.json").is_file():
        return ["--skip-tokenizer-init"]  # tokens in, tokens out: only grammars need it
    return ["--structured-outputs-config", json.dumps({"backend": "guidance"})]


def _weight_flags(settings: VllmSettings) -> list[str]:
    if settings.lora_rank is None:
        return ["--weight-transfer-config", json.dumps({"backend": BACKEND})]
    rank = min(rank for rank in LORA_RANKS if rank >= settings.lora_rank)
    return [
        *("--enable-lora", "--max-loras", str(MAX_LORAS), "--max-lora-rank", str(rank)),
        # Without the output embedding: see `probe.Lora`.
        *("--lora-target-modules", *linear_names(shapes_of(settings.model_path))),
    ]


def environment_of(settings: VllmSettings) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": str(PLUGIN_FOLDER),  # ours is of another interpreter
        "VLLM_SERVER_DEV_MODE": "1",  # pause, resume and new weights
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",  # which counts with --enable-lora only
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",  # the model is a folder
        **settings.env,
    }


def _shared_memory_of(group: int) -> set[Path]:
    """What processes of the group have mapped of what Python's multiprocessing makes."""
    found: set[Path] = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            _, _, stat = (process / "stat").read_text().rpartition(")")
            if int(stat.split()[2]) != group:
                continue
            maps = (process / "maps").read_text()
        except OSError:  # it has ended
            continue
        found.update(map(Path, re.findall(r"(/dev/shm/(?:psm_|sem\.mp-)\S+)$", maps, re.MULTILINE)))
    return found


def _end_with_parent() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
