"""LoRA adapters in the servers: one per policy version, each with a name and a folder of its own.

An adapter is loaded beside those that are there, while requests run. Requests name the newest, and
those in flight end with the one that they began with; what none of them uses any more is unloaded
with the next update. Its folder stays that long, as vLLM may read it again.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from areal_sub.engines.vllm import update
from areal_sub.engines.vllm.member import Member
from areal_sub.engines.vllm.weights_file import adapter_settings, check_adapter
from areal_sub.errors import ArealSubError

log = logging.getLogger(__name__)

ADAPTER_FILE = "adapter_model.safetensors"


class Adapters:
    """Those of one run, over a base with tensors of `shapes`."""

    def __init__(
        self, shapes: dict[str, list[int]], *, rank: int, owner: str, timeout_s: float
    ) -> None:
        self._shapes = shapes
        self._rank = rank
        self._owner = owner  # in the names of our folders
        self._timeout_s = timeout_s
        # Other runs' adapters may be in a server, and what is cached of them.
        self._prefix = f"policy-{secrets.token_hex(4)}"
        self._folders: dict[int, Path] = {}

    def keep(self, path: Path, version: int) -> None:
        """Make a folder of the adapter in `path`, beside it. Raises `ModelError`."""
        check_adapter(path, self._shapes, rank=self._rank)
        folder = path.with_name(f".{self._owner}-adapter-{version}")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / "adapter_config.json").write_text(adapter_settings(path))
        try:
            os.link(path, folder / ADAPTER_FILE)
        except OSError:
            shutil.copyfile(path, folder / ADAPTER_FILE)
        self._folders[version] = folder

    def file_of(self, version: int) -> Path | None:
        """None: that version is the base."""
        folder = self._folders.get(version)
        return None if folder is None else folder / ADAPTER_FILE

    async def load(self, member: Member, version: int) -> None:
        """Raises `Refused`, `ServerGone`, `DeadlineExceeded`."""
        if version not in self._folders:
            member.adapters[version] = member.can.model
            return
        name = f"{self._prefix}-{version}"
        # A server that was only out of reach has it still.
        await update.unload_adapter(member.api, name, timeout_s=self._timeout_s)
        folder = self._folders[version]
        await update.load_adapter(member.api, name, folder, timeout_s=self._timeout_s)
        member.adapters[version] = name

    async def unload(self, member: Member, versions: Iterable[int]) -> None:
        for version in versions:
            name = member.adapters.get(version)
            if name is not None and name != member.can.model:
                await update.unload_adapter(member.api, name, timeout_s=self._timeout_s)
            member.adapters.pop(version, None)

    async def leave(self, member: Member) -> None:
        """Someone else's server: take ours out of it."""
        try:
            await self.unload(member, list(member.adapters))
        except ArealSubError as error:
            log.warning("our adapters stay in %s: %s", member.api, error)

    def drop_unused(self, members: Sequence[Member], current: int) -> None:
        """Folders of adapters that no server has any more."""
        used = {current}.union(*(member.adapters for member in members))
        for version in set(self._folders) - used:
            shutil.rmtree(self._folders.pop(version), ignore_errors=True)

    def close(self) -> None:
        for folder in self._folders.values():
            shutil.rmtree(folder, ignore_errors=True)
