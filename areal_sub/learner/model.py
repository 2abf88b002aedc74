"""A Hugging Face causal LM as the learner sees it: something that scores the trained tokens.

Called by `learner`. Invariants:

- Parameters are float32 whatever the compute dtype. AdamW's updates are mostly smaller than the
  spacing of bfloat16 numbers and would be rounded away; so bfloat16 means float32 master weights
  and a forward pass under autocast. With float32 nothing is cast anywhere.
- Dropout is off: the sampler has none, and ratios compare the two.
- Logits exist only for trained tokens, and at most `MAX_LOGITS` of them at a time (recomputed in
  the backward pass): for a vocabulary of 150k they would otherwise be the largest tensor by far.
  This needs the model cut in two, body and output embedding; that the halves give what the whole
  model gives is checked when it is loaded.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging as hf_logging

from areal_sub import linear
from areal_sub.config.schema import LoraConfig
from areal_sub.errors import ModelError
from areal_sub.learner.adapter import Adapter
from areal_sub.learner.batch import MicroBatch, PlainSample, Scored, collate
from areal_sub.learner.ranks import whole

# 256 MB in float32.
MAX_LOGITS = 2**26
NUM_PROBE_TOKENS = 17

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# What of a model folder is the tokenizer's.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.tiktoken",
    "chat_template.*",
    "additional_chat_templates/*",
)


@dataclass(frozen=True, slots=True)
class TokenScores:
    """Of the N trained tokens of a micro-batch, in its order."""

    logprobs: Tensor  # float32 [N], with gradient
    entropies: Tensor  # float32 [N] nats, of the distributions they were drawn from; no gradient


class PolicyModel(nn.Module):
    """The policy, or the reference it is held to. A module, so that it can be sharded as a whole:
    body and output embedding may share weights.

    `adapter`: None where all weights are trained.
    """

    def __init__(
        self, hf: Any, *, device: torch.device, autocast: bool, adapter: Adapter | None = None
    ) -> None:
        super().__init__()
        self.hf = hf
        self.adapter = adapter
        self.device = device
        self._autocast = autocast
        self._transform = _logit_transform(hf.config.get_text_config())
        self._aliases = _aliases(hf)
        # Whether samples that share a row do not see one another; found out by `load`.
        self.packs = False

    @classmethod
    def load(
        cls,
        path: str,
        *,
        dtype: str,
        device: torch.device,
        gradient_checkpointing: bool = False,
        lora: LoraConfig | None = None,
        seed: int = 0,
    ) -> PolicyModel:
        """Load a model folder or hub name for computing in `dtype` ("float32" or "bfloat16"), with
        a fresh adapter, drawn by `seed`, where `lora` says so.

        Raises `ModelError` where it is not there, is damaged or incomplete, or is not a causal LM
        that the learner can drive; `ConfigError` where `lora` does not fit it.
        """
        hf = _load_hf(path)
        adapter = None if lora is None else Adapter.attach(hf, lora, path=path, seed=seed)
        hf.to(device).eval()
        if gradient_checkpointing:
            _enable_gradient_checkpointing(hf, path)
        if hf.base_model is hf or hf.get_output_embeddings() is None:
            raise ModelError(
                f"model {path!r} ({type(hf).__name__}) has no separate output embedding"
            )
        model = cls(hf, device=device, autocast=dtype == "bfloat16", adapter=adapter)
        model._check_halves(path)
        model.packs = model._keeps_apart()
        return model

    def shard(self, mesh: DeviceMesh) -> None:
        """Cut weights, gradients and what the optimizer will hold over the processes of `mesh`
        (FSDP2): each layer by itself, and all that is outside of layers. Computation stays as it
        is, bfloat16 by autocast over float32 included, so that many processes give what one does.
        """
        for module in self.hf.modules():
            if isinstance(module, GradientCheckpointingLayer):
                fully_shard(module, mesh=mesh)
        fully_shard(self, mesh=mesh, reshard_after_forward=True)

    def freeze(self) -> None:
        self.hf.requires_grad_(False)

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.hf.parameters())

    def score(self, batch: MicroBatch, *, temperature: float) -> TokenScores:
        """Logprobs of the trained tokens under softmax(logits / temperature). `batch` is on
        `self.device`. With gradient unless called under `torch.no_grad`."""
        logprobs, entropies = self(batch, temperature)
        return TokenScores(logprobs, entropies)

    def forward(self, batch: MicroBatch, temperature: float) -> tuple[Tensor, Tensor]:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._autocast):
            hidden = (
                self._hidden(batch.input_ids, batch.position_ids)
                .flatten(0, 1)
                .index_select(0, batch.positions)
            )
            rows_at_once = max(1, MAX_LOGITS // self.hf.config.get_text_config().vocab_size)
            logprobs, entropies = [], []
            for rows, targets in zip(
                torch.split(hidden, rows_at_once),
                torch.split(batch.targets, rows_at_once),
                strict=True,
            ):
                if rows.shape[0] < hidden.shape[0] and torch.is_grad_enabled():
                    scores = checkpoint(
                        self._score_rows,
                        rows,
                        targets,
                        temperature,
                        use_reentrant=False,
                        preserve_rng_state=False,
                    )
                else:
                    scores = self._score_rows(rows, targets, temperature)
                logprobs.append(scores[0])
                entropies.append(scores[1])
        return torch.cat(logprobs), torch.cat(entropies)

    def _hidden(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        packed = {} if position_ids is None else {"position_ids": position_ids}
        body = self.hf.base_model(input_ids=input_ids, use_cache=False, **packed)
        hidden: Tensor = body.last_hidden_state
        return hidden

    @torch.no_grad()
    def _keeps_apart(self) -> bool:
        """Whether two sequences in one row come out as they do in rows of their own."""
        vocab_size = self.hf.config.get_text_config().vocab_size
        ids = torch.arange(1, 9, device=self.device).reshape(2, 4) * 5 % vocab_size
        positions = torch.arange(4, device=self.device).repeat(2)[None]
        alone = self._hidden(ids).reshape(1, 8, -1)
        try:
            together = self._hidden(ids.reshape(1, 8), positions)
        except TypeError:  # it takes no position numbers
            return False
        return torch.allclose(together, alone, rtol=1e-3, atol=1e-4)

    def _logits(self, rows: Tensor) -> Tensor:
        return self._transform(self.hf.get_output_embeddings()(rows))

    def _score_rows(
        self, rows: Tensor, targets: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        logits = self._logits(rows).float() / temperature
        log_norm = logits.logsumexp(-1)
        logprobs = logits.gather(-1, targets[:, None])[:, 0] - log_norm
        with torch.no_grad():
            expected = ((logits - log_norm[:, None]).exp() * logits).sum(-1)
        return logprobs, log_norm.detach() - expected

    @torch.no_grad()
    def _check_halves(self, path: str) -> None:
        vocab_size = self.hf.config.get_text_config().vocab_size
        ids = torch.arange(8, device=self.device)[None] * 7 % vocab_size
        whole = self.hf(input_ids=ids, use_cache=False).logits
        try:
            halves = self._logits(self._hidden(ids))
        except (AttributeError, TypeError) as error:
            raise ModelError(
                f"model {path!r} ({type(self.hf).__name__}) cannot be cut into body and output "
                f"embedding: {error}"
            ) from error
        if halves.shape != whole.shape or not torch.allclose(halves, whole, rtol=1e-3, atol=1e-4):
            raise ModelError(
                f"model {path!r} ({type(self.hf).__name__}) makes its logits from the output "
                "embedding in a way that the learner does not know (add it to _logit_transform), "
                "or draws random numbers while it computes"
            )

    @torch.no_grad()
    def probe(self) -> tuple[list[int], list[float]]:
        """A fixed sequence, and the logprobs of all its tokens but the first. Where the model is
        sharded, all ranks must call it."""
        vocab_size = self.hf.config.get_text_config().vocab_size
        ids = ((np.arange(NUM_PROBE_TOKENS) * 7919 + 11) % vocab_size).astype(np.int32)
        zeros = np.zeros(NUM_PROBE_TOKENS, np.float32)
        sample = PlainSample(ids, np.arange(NUM_PROBE_TOKENS) > 0, zeros, zeros.astype(np.int32))
        batch = collate([[Scored(sample, zeros)]]).to(self.device)
        return ids.tolist(), self.score(batch, temperature=1.0).logprobs.tolist()

    def gather(self) -> None:
        """What a rank does while another calls `weights`."""
        for name, value in self.hf.state_dict().items():
            if name not in self._aliases:
                whole(value.detach())

    def weights(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Parameters and buffers in `dtype` under their Hugging Face names, on the CPU, detached;
        tied ones once, under their first name; with the adapter merged into them, where there is
        one. Where the model is sharded, the other ranks must `gather`."""
        out: dict[str, Tensor] = {}
        for name, value in self.hf.state_dict().items():
            if name in self._aliases:
                continue
            value = whole(value.detach())
            if self.adapter is not None:
                if (merged := self.adapter.merged(name, value)) is None:
                    continue
                name, value = merged
            value = value.to("cpu", dtype if value.is_floating_point() else value.dtype)
            out[name] = value.contiguous()
        return out

    def save(self, folder: Path, weights: dict[str, Tensor], *, dtype: str) -> None:
        """Fill `folder` with `weights` (in `dtype`), config and generation config."""
        with _no_progress_bars():
            self.hf.save_pretrained(folder, state_dict=weights)
        config = copy.deepcopy(self.hf.config)  # save_pretrained says float32 in it, as we hold it
        config.dtype = dtype
        config.save_pretrained(folder)


class BasePolicy:
    """A policy with its adapter off, as the reference that it is held to: no second model."""

    def __init__(self, policy: PolicyModel, adapter: Adapter) -> None:
        self._policy = policy
        self._adapter = adapter

    @torch.no_grad()
    def score(self, batch: MicroBatch, *, temperature: float) -> TokenScores:
        with self._adapter.off():
            return self._policy.score(batch, temperature=temperature)


def _aliases(hf: Any) -> set[str]:
    """Names of tied weights but the first of each."""
    names: set[str] = set()
    seen: set[tuple[int, torch.Size]] = set()
    for name, value in hf.state_dict().items():
        identity = (value.data_ptr(), value.shape)
        if identity in seen and value.numel():
            names.add(name)
        seen.add(identity)
    return names


def copy_tokenizer(tokenizer_path: str, folder: Path) -> None:
    """Copy the tokenizer's files, chat template included, verbatim from a folder or the hub."""
    source = Path(tokenizer_path)
    if not source.is_dir():
        from huggingface_hub import snapshot_download

        try:
            source = Path(snapshot_download(tokenizer_path, allow_patterns=list(TOKENIZER_FILES)))
        except Exception as error:  # the hub client's, the network's, the cache's: many kinds
            raise ModelError(f"cannot get the tokenizer {tokenizer_path!r}: {error}") from error
    files = [path for pattern in TOKENIZER_FILES for path in source.glob(pattern)]
    if not files:
        raise ModelError(
            f"no tokenizer files in {source}: set tokenizer_path to a folder with them"
        )
    for path in files:
        target = folder / path.relative_to(source)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """The terminal belongs to the run's own display."""
    enabled = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            hf_logging.enable_progress_bar()


def _load_hf(path: str) -> Any:
    try:
        with _no_progress_bars():
            hf, info = AutoModelForCausalLM.from_pretrained(
                path, dtype=torch.float32, output_loading_info=True
            )
        hf.generation_config.validate(strict=True)  # else a checkpoint could not be saved
    except Exception as error:  # missing, unreadable, unknown or invalid: transformers has no base
        kind = "" if Path(path).exists() else " (there is no such folder here, so it was looked up)"
        raise ModelError(f"cannot load the model {path!r}{kind}: {error}") from error
    # transformers fills what is missing with random numbers and only logs it.
    for problem in ("missing_keys", "mismatched_keys"):
        if info[problem]:
            names = ", ".join(sorted(map(str, info[problem]))[:5])
            raise ModelError(f"model {path!r} is incomplete: {problem.replace('_', ' ')}: {names}")
    linear.use_in(hf)
    return hf


def _enable_gradient_checkpointing(hf: Any, path: str) -> None:
    if not hf.supports_gradient_checkpointing:
        raise ModelError(
            f"model {path!r} ({type(hf).__name__}) does not support gradient checkpointing: "
            "set actor.gradient_checkpointing=false"
        )
    # Renamed within transformers 5; the old name warns.
    enable = getattr(hf, "activation_checkpointing_enable", hf.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    for module in hf.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True  # what it asks for; its children stay in eval mode, no dropout
            for name, value in vars(module).items():  # that of the layer itself (OPT)
                if "dropout" in name and isinstance(value, float):
                    setattr(module, name, 0.0)


def _logit_transform(config: Any) -> Callable[[Tensor], Tensor]:
    """What the model does to the output embedding's result."""
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2 and later
    factor = getattr(config, "logit_scale", None) or 1.0  # Cohere
    divisor = getattr(config, "logits_scaling", None) or 1.0  # Granite

    def transform(logits: Tensor) -> Tensor:
        if cap is not None:
            logits = torch.tanh(logits / cap) * cap
        if factor != 1.0 or divisor != 1.0:
            logits = logits * factor / divisor
        return logits

    return transform
