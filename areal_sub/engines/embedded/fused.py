"""The forward pass of Llama and Qwen2 in a few large operations.

transformers' own spends more time in Python than a small model does in its arithmetic: some fifty
calls per layer, here a dozen. Query, key and value are one product, gate and up another; where one
token is decoded, the heads that share keys are the rows of one product with them.

Invariants: the model's parameters are views into the fused ones, so whatever writes to the model (a
weight update) writes here. `check_runner` compares this pass with transformers' at every start.
Called by `Runner`, for models that `FusedLlama.fits`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaForCausalLM, Qwen2ForCausalLM

from areal_sub.engines.embedded.cache import SlotCache
from areal_sub.linear import linear

# Rotations that do not depend on how long the sequence is.
_FIXED_ROPES = ("default", "linear", "llama3")


@dataclass(frozen=True, slots=True)
class _Layer:
    input_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    output: Tensor
    output_bias: Tensor | None
    mlp_norm: Tensor
    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None


class FusedLlama:
    def __init__(self, model: Any) -> None:
        """`model`: one that `fits`; its parameters become views of fused ones."""
        config = model.config
        self._model = model.model
        self._head: nn.Linear = model.lm_head
        self._eps: float = config.rms_norm_eps
        attention = model.model.layers[0].self_attn
        self._head_dim: int = attention.head_dim
        self._scale: float = attention.scaling
        self._num_heads: int = config.num_attention_heads
        self._num_kv: int = config.num_key_value_heads
        self._layers = [_fuse(layer) for layer in model.model.layers]
        self._cos = self._sin = torch.empty(0)

    @staticmethod
    def fits(model: Any) -> bool:
        config = model.config
        return (
            type(model) in (LlamaForCausalLM, Qwen2ForCausalLM)
            and config.hidden_act == "silu"
            and config._attn_implementation == "sdpa"
            and (config.rope_parameters or {}).get("rope_type") in _FIXED_ROPES
        )

    def __call__(self, ids: Tensor, positions: Tensor, mask: Tensor, cache: SlotCache) -> Tensor:
        """Logits [rows, vocab] after each row's last token; writes to `cache` as selected.

        Args:
            ids, positions: int64 [rows, new].
            mask: additive [rows, 1, new, view].
        """
        eps, width = self._eps, self._num_heads * self._head_dim
        hidden = F.embedding(ids, self._model.embed_tokens.weight)
        cos, sin = self._rotation(positions)
        num_rotated = self._num_heads + self._num_kv
        for layer, slots in zip(self._layers, cache.layers, strict=True):
            normed = F.rms_norm(hidden, hidden.shape[-1:], layer.input_norm, eps)
            heads = linear(normed, layer.qkv, layer.qkv_bias)
            heads = heads.view(*ids.shape, -1, self._head_dim)
            rotated = _rotate(heads[:, :, :num_rotated], cos, sin)
            keys, values = slots.update(
                rotated[:, :, self._num_heads :].transpose(1, 2),
                heads[:, :, num_rotated:].transpose(1, 2),
            )
            attended = self._attend(rotated[:, :, : self._num_heads], keys, values, mask)
            hidden = hidden + linear(
                attended.reshape(*ids.shape, width), layer.output, layer.output_bias
            )
            normed = F.rms_norm(hidden, hidden.shape[-1:], layer.mlp_norm, eps)
            gate, up = linear(normed, layer.gate_up, layer.gate_up_bias).chunk(2, dim=-1)
            hidden = hidden + linear(F.silu(gate) * up, layer.down, layer.down_bias)
        last = F.rms_norm(hidden[:, -1], hidden.shape[-1:], self._model.norm.weight, eps)
        return linear(last, self._head.weight, self._head.bias)

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """`queries` [rows, new, heads, head_dim] over [rows, kv_heads, view, head_dim]; contiguous
        in the order [rows, new, heads, head_dim]."""
        rows, new = queries.shape[:2]
        if new == 1:
            grouped = queries.reshape(rows, self._num_kv, -1, self._head_dim)
            return F.scaled_dot_product_attention(
                grouped, keys, values, attn_mask=mask, scale=self._scale
            )
        attended = F.scaled_dot_product_attention(
            queries.transpose(1, 2),
            keys,
            values,
            attn_mask=mask,
            scale=self._scale,
            enable_gqa=self._num_kv != self._num_heads,
        )
        return attended.transpose(1, 2)

    def _rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and signed sin, each [rows, new, 1, head_dim]."""
        needed = int(positions.max()) + 1
        if needed > len(self._cos):
            num_positions = -(-needed // 512) * 512
            every = torch.arange(num_positions, device=positions.device).unsqueeze(0)
            like = self._model.embed_tokens.weight
            cos, sin = self._model.rotary_emb(like, every)
            sin = sin.clone()
            sin[..., : sin.shape[-1] // 2].neg_()
            self._cos, self._sin = cos[0], sin[0]
        return self._cos[positions].unsqueeze(2), self._sin[positions].unsqueeze(2)


def _rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, halves against each other; the first half of `sin` is negated."""
    half = heads.shape[-1] // 2
    swapped = torch.cat((heads[..., half:], heads[..., :half]), dim=-1)
    return torch.addcmul(heads * cos, swapped, sin)


def _fuse(layer: Any) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    qkv, qkv_bias = _joined(attention.q_proj, attention.k_proj, attention.v_proj)
    gate_up, gate_up_bias = _joined(mlp.gate_proj, mlp.up_proj)
    return _Layer(
        input_norm=layer.input_layernorm.weight,
        qkv=qkv,
        qkv_bias=qkv_bias,
        output=attention.o_proj.weight,
        output_bias=attention.o_proj.bias,
        mlp_norm=layer.post_attention_layernorm.weight,
        gate_up=gate_up,
        gate_up_bias=gate_up_bias,
        down=mlp.down_proj.weight,
        down_bias=mlp.down_proj.bias,
    )


def _joined(*parts: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """Their weights and biases as one, which theirs are views of from now on."""
    weight = torch.cat([part.weight.data for part in parts])
    biases = [part.bias.data for part in parts if part.bias is not None]
    bias = torch.cat(biases) if biases else None
    row = 0
    for part in parts:
        stop = row + part.out_features
        part.weight.data = weight[row:stop]
        if bias is not None:
            part.bias.data = bias[row:stop]
        row = stop
    return weight, bias
