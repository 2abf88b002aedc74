"""New weights into one server, step by step, and the check that it has them.

Steps, each within what is left of the update's deadline:

    pause (requests are kept) → load → version → [the fleet resumes all servers] → verify

`load` depends on what the probe found. Verifying compares what the server computes with what the
learner computed when it wrote the file; with the backend of ours the tensors themselves have been
compared before that.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from areal_sub.engines.vllm.api import Api, Refused, ServerGone
from areal_sub.engines.vllm.probe import Abilities, WeightPath
from areal_sub.engines.vllm.weights_file import Probe
from areal_sub.engines.vllm.wire import ReplyError, Way, score_body_of, scores_of
from areal_sub.errors import ModelError

if TYPE_CHECKING:
    from areal_sub.engines.vllm.broadcast import Sender

# Mean difference of a probe's logprobs, in nats, that rounding alone can make.
TOLERANCE = {"float32": 2e-3, "bfloat16": 0.25, "float16": 0.1}


async def pause(api: Api, abilities: Abilities, *, timeout_s: float) -> None:
    if abilities.way is Way.SGLANG:
        await api.post("/pause_generation", {"mode": "in_place"}, timeout_s=timeout_s)
    else:
        await api.post("/pause?mode=keep", timeout_s=timeout_s)


async def resume(api: Api, abilities: Abilities, *, timeout_s: float) -> None:
    if abilities.way is Way.SGLANG:
        await api.post("/continue_generation", {}, timeout_s=timeout_s)
    else:
        await api.post("/resume", timeout_s=timeout_s)


async def load(
    api: Api,
    abilities: Abilities,
    path: Path,
    version: int,
    *,
    sender: Sender | None = None,
    timeout_s: float,
) -> None:
    """Into a server that is paused; with a `sender` by broadcast. Raises `Refused`, `ServerGone`,
    `DeadlineExceeded`."""
    if abilities.weight_path in (WeightPath.FILE, WeightPath.BROADCAST):
        await api.post("/start_weight_update", timeout_s=timeout_s)
        if sender is not None:
            await _broadcast(api, sender, path, timeout_s=timeout_s)
        else:
            info = {"update_info": {"path": str(path)}}
            await api.post("/update_weights", info, timeout_s=timeout_s)
        await api.post(
            "/finish_weight_update", {"weight_version": str(version)}, timeout_s=timeout_s
        )
    elif abilities.weight_path is WeightPath.DISK:
        with _folder_of(path) as folder:
            call = {
                "model_path": str(folder),
                "load_format": "auto",
                "weight_version": str(version),
                "flush_cache": False,  # which running requests forbid; `cache_salt` does for it
            }
            await api.post("/update_weights_from_disk", call, timeout_s=timeout_s)
    else:
        with _folder_of(path) as folder:
            call = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
            await api.post("/collective_rpc", call, timeout_s=timeout_s)
        await name_version(api, version, timeout_s=timeout_s)


async def _broadcast(api: Api, sender: Sender, path: Path, *, timeout_s: float) -> None:
    """Its workers receive while the call lasts. Who fails first says what was wrong: the other
    would wait for it."""
    info = {"update_info": sender.update_info(path)}
    receiving = asyncio.ensure_future(api.post("/update_weights", info, timeout_s=timeout_s))
    sending = asyncio.ensure_future(asyncio.to_thread(sender.send, path))
    try:
        await asyncio.wait((receiving, sending), return_when=asyncio.FIRST_EXCEPTION)
        if receiving.done():
            await receiving
        await sending
    except RuntimeError as error:  # torch's
        raise ServerGone(f"{api} did not receive the weights: {error}") from None
    finally:
        for task in (receiving, sending):
            task.cancel()


async def name_version(api: Api, version: int, *, timeout_s: float) -> None:
    """Say which version the weights are that the server has."""
    await api.post("/update_weight_version", {"new_version": str(version)}, timeout_s=timeout_s)


async def served_version(api: Api, abilities: Abilities, *, timeout_s: float) -> str:
    path = "/model_info" if abilities.way is Way.SGLANG else "/weight_info"
    answer = await api.get(path, timeout_s=timeout_s)
    return str(answer["weight_version"])


async def load_adapter(api: Api, name: str, folder: Path, *, timeout_s: float) -> None:
    """Under running requests: who began with another goes on with that."""
    body = {"lora_name": name, "lora_path": str(folder)}
    await api.post("/v1/load_lora_adapter", body, timeout_s=timeout_s)


async def unload_adapter(api: Api, name: str, *, timeout_s: float) -> None:
    """No error where there is none of that name."""
    try:
        await api.post("/v1/unload_lora_adapter", {"lora_name": name}, timeout_s=timeout_s)
    except Refused as error:
        if error.status != 404:
            raise


async def verify(
    api: Api, abilities: Abilities, probe: Probe, version: int, *, model: str, timeout_s: float
) -> float:
    """The mean difference between the logprobs of `model` and the learner's. Raises `ModelError`
    where it is too large."""
    salt = f"verify-{version}"
    body = score_body_of(abilities.way, probe.token_ids, salt=salt, model=model)
    answer = await api.post(abilities.way.value, body, timeout_s=timeout_s)
    try:
        served = scores_of(abilities.way, probe.token_ids, answer)
    except ReplyError as error:
        raise ModelError(f"{api} cannot be checked: {error}") from None
    difference: float = sum(abs(a - b) for a, b in zip(served, probe.logprobs, strict=True)) / len(
        served
    )
    tolerance = TOLERANCE.get(abilities.dtype, max(TOLERANCE.values()))
    if not difference <= tolerance:  # also where it is not a number
        hint = (
            ": its own reload_weights leaves parts as they were; start the server with the "
            "backend of areal-sub (docs/vllm.md)"
            if abilities.weight_path is WeightPath.RELOAD
            else ""
        )
        raise ModelError(
            f"{api} does not compute what the learner computes with the weights of "
            f"version {version}: logprobs differ by {difference:.4g} nats on average, rounding in "
            f"{abilities.dtype} explains {tolerance:g}{hint}"
        )
    return difference


@contextmanager
def _folder_of(path: Path) -> Iterator[Path]:
    """What vLLM reloads has to be a folder."""
    if path.is_dir():
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "model.safetensors").symlink_to(path)
        yield Path(folder)
