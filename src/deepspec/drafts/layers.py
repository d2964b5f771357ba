"""The decoder layers that all drafts are made of. Family facts shape them, not subclasses.

B rows, Q query tokens, K keys, H query heads, G key/value heads, D head dim, d hidden width.
In grouped-query attention, consecutive query heads read the same key/value head. Rotary positions use the
rotate-half form, always in float32. The epsilon of a norm is inside the root (method.md; 4b for Gemma-4).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepspec.drafts.spec import LayerShape
from deepspec.maths.fused import gated, turned
from deepspec.maths.lean import LeanLayers, Norm, lean_layer
from deepspec.maths.slots import SlotStore

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}
Rotation = tuple[Tensor, Tensor]


def inverse_frequencies(shape: LayerShape) -> Tensor:
    """The rotary frequencies [D/2] in float32. The kind "proportional" rotates only the first
    int(partial * D/2) pairs."""
    dim, rope = shape.head_dim, shape.rope
    exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    frequencies = rope.theta**-exponents
    if rope.kind == "proportional":
        frequencies[int(rope.partial * (dim // 2)) :] = 0.0
    return frequencies.bfloat16().float() if rope.rounded else frequencies


def rotation(positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> Rotation:
    """cos and sin [..., Q, D] of integer positions [..., Q]; angles are computed in float32, then cast. The
    first half of the sine is negative, so that turning is x cos + (x with its halves swapped) sin."""
    angles = positions[..., None].float() * frequencies
    sin = angles.sin()
    return torch.cat([angles, angles], -1).cos().to(dtype), torch.cat([-sin, sin], -1).to(dtype)


def rotate(x: Tensor, turn: Rotation) -> Tensor:
    """x [B, H, Q, D] with rotate-half positions applied; `turn` is [B, Q, D] or [Q, D] twice."""
    cos, sin = turn
    if cos.dim() == 3:
        cos, sin = cos[:, None], sin[:, None]
    return turned(x, cos, sin)


class Attention(nn.Module):
    """Projections, per-head norms and rotary positions; the caller's mask decides which keys a query sees."""

    def __init__(self, shape: LayerShape, input_width: int) -> None:
        super().__init__()
        self.shape = shape
        bias, inner = shape.attention_bias, shape.heads * shape.head_dim
        kv = shape.kv_heads * shape.head_dim
        self.q_proj = nn.Linear(input_width, inner, bias=bias)
        self.k_proj = nn.Linear(input_width, kv, bias=bias)
        self.v_proj = None if shape.value_is_key else nn.Linear(input_width, kv, bias=bias)
        self.o_proj = nn.Linear(inner, shape.hidden, bias=bias)
        self.q_norm = nn.RMSNorm(shape.head_dim, shape.eps) if shape.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(shape.head_dim, shape.eps) if shape.qk_norm else nn.Identity()
        self.scale = shape.attention_scale or shape.head_dim**-0.5

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.shape.head_dim))

    def queries(self, x: Tensor, turn: Rotation) -> Tensor:
        """Inputs [B, Q, input] to queries [B, H, Q, D]."""
        return rotate(self.q_norm(self._heads(self.q_proj(x))).transpose(1, 2), turn)

    def keys_values(self, x: Tensor, turn: Rotation) -> tuple[Tensor, Tensor]:
        """Inputs [B, K, input] to keys and values [B, G, K, D]. In families whose values are the keys, the
        values are the projection before its norm and rotation."""
        raw = self._heads(self.k_proj(x))
        values = raw if self.v_proj is None else self._heads(self.v_proj(x))
        if self.shape.value_norm:
            values = F.rms_norm(values, (values.shape[-1],), None, self.shape.eps)
        return rotate(self.k_norm(raw).transpose(1, 2), turn), values.transpose(1, 2)

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """Queries [B, H, Q, D] over keys [B, G, K, D] to outputs [B, Q, d]. mask: bool, broadcast to
        [B, 1, Q, K]."""
        grouped = self.shape.heads != self.shape.kv_heads
        mixed = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, scale=self.scale, enable_gqa=grouped
        )
        return self.project(mixed)

    def project(self, mixed: Tensor) -> Tensor:
        """Mixed values [B, H, Q, D] to outputs [B, Q, d]."""
        return self.o_proj(mixed.transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    def __init__(self, shape: LayerShape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.down_proj = nn.Linear(shape.intermediate, shape.hidden, bias=False)
        self.activation = ACTIVATIONS[shape.activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(gated(self.gate_proj(x), self.up_proj(x), self.activation))


class DraftLayer(nn.Module):
    """One decoder layer. If it is `paired` (Eagle-3), the attention reads [norm(embedding) ; norm(hidden)],
    which is twice as wide, and the residual comes from `hidden`."""

    layer_scalar: Tensor

    def __init__(self, shape: LayerShape, *, paired: bool = False) -> None:
        super().__init__()
        self.shape = shape
        self.input_layernorm = nn.RMSNorm(shape.hidden, shape.eps)
        if paired:
            self.hidden_norm = nn.RMSNorm(shape.hidden, shape.eps)
        self.self_attn = Attention(shape, shape.hidden * (2 if paired else 1))
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden, shape.eps)
        self.mlp = MLP(shape)
        if shape.sandwich:
            self.pre_feedforward_layernorm = nn.RMSNorm(shape.hidden, shape.eps)
            self.post_feedforward_layernorm = nn.RMSNorm(shape.hidden, shape.eps)
            self.register_buffer("layer_scalar", torch.ones(1))

    def finish(self, residual: Tensor, attended: Tensor) -> Tensor:
        """The layer's output: residual sums and MLP, with sandwich norms and a layer scalar in families that
        have them."""
        if not self.shape.sandwich:
            hidden = residual + attended
            return hidden + self.mlp(self.post_attention_layernorm(hidden))
        hidden = residual + self.post_attention_layernorm(attended)
        inner = self.mlp(self.pre_feedforward_layernorm(hidden))
        return (hidden + self.post_feedforward_layernorm(inner)) * self.layer_scalar


@torch.inference_mode(False)
@torch.no_grad()
def lean_layers(
    layers: Sequence[Any],
    norm: nn.RMSNorm,
    stores: Sequence[SlotStore],
    shape: LayerShape,
    frequencies: Tensor,
) -> LeanLayers | None:
    """A draft's layers and last norm for decoding in few operations; None if the family, a part of another
    class, or a hook may compute something else. Weights are laid out here, and may not change afterwards."""
    parts = [norm, *(part for layer in layers for part in layer.modules())]
    ours = {DraftLayer, Attention, MLP, nn.Linear, nn.RMSNorm, nn.Identity}
    hooked = any(part._forward_hooks or part._forward_pre_hooks for part in parts)
    if shape.sandwich or shape.value_is_key or shape.value_norm or hooked or {*map(type, parts)} - ours:
        return None
    found = []
    for layer, store in zip(layers, stores, strict=True):
        norms = getattr(layer, "hidden_norm", layer.input_layernorm), layer.post_attention_layernorm
        found.append(lean_layer(layer.self_attn, layer.mlp, norms, shape.eps, store))
    dtype = found[0].qkv.dtype
    return LeanLayers(
        found,
        Norm(norm.weight, shape.eps),
        shape.heads,
        shape.kv_heads,
        shape.head_dim,
        layers[0].self_attn.scale,
        ACTIVATIONS[shape.activation],
        turns=partial(rotation, frequencies=frequencies, dtype=dtype),
    )


def initialise(module: nn.Module) -> None:
    """Draw matrices from normal(0, 1/sqrt(fan-in)) and set biases to zero; norms keep their ones.

    At the widths of the released drafts this is their 0.02. On a narrow target, a fixed 0.02 would make the
    outputs of the layers almost zero for the first thousand steps.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=part.in_features**-0.5)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
