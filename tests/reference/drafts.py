"""The drafts by naive loops, one row, one head and one key at a time: the oracle of `deepspec.drafts`.

Weights are read from the draft's own modules, and nothing else of them is used. All in float64.
S tokens, γ slots, D head dim, d hidden width, m layers. A *seen* key is a pair (attention input, position).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Seen = list[tuple[Tensor, int]]


def naive_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """The last axis over the root of its mean square plus eps; times the weight, not one plus it."""
    scaled = x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)
    return scaled if weight is None else scaled * weight


def naive_frequencies(shape: Any) -> list[float]:
    """One for each pair of dimensions; the proportional kind lets the later pairs stand still."""
    half = shape.head_dim // 2
    turning = int(shape.rope.partial * half) if shape.rope.kind == "proportional" else half
    return [
        shape.rope.theta ** (-2.0 * pair / shape.head_dim) if pair < turning else 0.0 for pair in range(half)
    ]


def naive_turn(vector: Tensor, position: int, shape: Any) -> Tensor:
    """Rotate dimension i with dimension i + D/2."""
    angles = [position * frequency for frequency in naive_frequencies(shape)]
    cos, sin = (vector.new_tensor([part(angle) for angle in angles]) for part in (math.cos, math.sin))
    first, second = vector.chunk(2)
    return torch.cat([first * cos - second * sin, second * cos + first * sin])


def naive_linear(x: Tensor, module: Any) -> Tensor:
    out = module.weight @ x
    return out if module.bias is None else out + module.bias


def naive_attention(attention: Any, query: Tensor, position: int, seen: Seen) -> Tensor:
    """One query over the keys it sees -> [d]. Query head h reads key/value head h // (heads per key head)."""
    shape, dim = attention.shape, attention.shape.head_dim
    scale = shape.attention_scale if shape.attention_scale is not None else 1 / math.sqrt(dim)

    def head(x: Tensor, module: Any, index: int) -> Tensor:
        return naive_linear(x, module)[index * dim : (index + 1) * dim]

    def normed(x: Tensor, norm: Any) -> Tensor:
        return naive_norm(x, norm.weight, shape.eps) if shape.qk_norm else x

    mixed = []
    for h in range(shape.heads):
        g = h // (shape.heads // shape.kv_heads)
        q = naive_turn(normed(head(query, attention.q_proj, h), attention.q_norm), position, shape)
        scores, values = [], []
        for x, at in seen:
            raw = head(x, attention.k_proj, g)
            key = naive_turn(normed(raw, attention.k_norm), at, shape)
            scores.append(scale * torch.dot(q, key))
            value = raw if shape.value_is_key else head(x, attention.v_proj, g)
            values.append(naive_norm(value, None, shape.eps) if shape.value_norm else value)
        shares = torch.softmax(torch.stack(scores), dim=0)
        mixed.append(sum(share * value for share, value in zip(shares, values, strict=True)))
    return naive_linear(torch.cat(mixed), attention.o_proj)


def naive_activation(x: Tensor, name: str) -> Tensor:
    if name == "silu":
        return x / (1 + torch.exp(-x))
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    return 0.5 * x * (1 + torch.tanh(inner))


def naive_mlp(layer: Any, x: Tensor) -> Tensor:
    gate = naive_activation(naive_linear(x, layer.mlp.gate_proj), layer.shape.activation)
    return naive_linear(gate * naive_linear(x, layer.mlp.up_proj), layer.mlp.down_proj)


def naive_finish(layer: Any, residual: Tensor, attended: Tensor) -> Tensor:
    eps = layer.shape.eps
    if not layer.shape.sandwich:
        hidden = residual + attended
        return hidden + naive_mlp(layer, naive_norm(hidden, layer.post_attention_layernorm.weight, eps))
    hidden = residual + naive_norm(attended, layer.post_attention_layernorm.weight, eps)
    inner = naive_mlp(layer, naive_norm(hidden, layer.pre_feedforward_layernorm.weight, eps))
    return (hidden + naive_norm(inner, layer.post_feedforward_layernorm.weight, eps)) * layer.layer_scalar


def naive_embedding(draft: Any, token: int) -> Tensor:
    return draft.embedding.weight[token] * draft.embedding.scale


def naive_block_rows(draft: Any, features: Tensor, token: int) -> Tensor:
    """[γ, d] of a block whose anchor `token` follows the [S, m*d] features: position S."""
    spec, eps = draft.spec, draft.spec.shape.eps
    start = len(features)
    context = [naive_norm(naive_linear(f, draft.fc), draft.hidden_norm.weight, eps) for f in features]
    tokens = [token] + [spec.mask_token_id] * (spec.block - 1)
    rows = [naive_embedding(draft, t) for t in tokens]
    for layer in draft.layers:
        normed = [naive_norm(row, layer.input_layernorm.weight, eps) for row in rows]
        seen = [(x, i) for i, x in enumerate(context)] + [(x, start + j) for j, x in enumerate(normed)]
        attended = [naive_attention(layer.self_attn, x, start + j, seen) for j, x in enumerate(normed)]
        rows = [naive_finish(layer, row, a) for row, a in zip(rows, attended, strict=True)]
    return torch.stack([naive_norm(row, draft.norm.weight, eps) for row in rows])


def naive_unroll(draft: Any, features: Tensor, ids: Sequence[int]) -> list[Tensor]:
    """[S, d] after each unroll step of Eagle-3, of one sequence without padding."""
    layer, eps = draft.layers[0], draft.spec.shape.eps
    spec = draft.spec
    if spec.norm_before_fc:
        features = naive_norm(features, draft.input_norm.weight, eps)
    hidden = [naive_linear(f, draft.fc) for f in features]
    inputs: list[list[Tensor]] = []
    states = []
    for step in range(draft.spec.block):
        read = [ids[i + 1 + step] if i + 1 + step < len(ids) else 0 for i in range(len(ids))]
        inputs.append(
            [
                torch.cat(
                    [
                        naive_norm(naive_embedding(draft, token), layer.input_layernorm.weight, eps),
                        naive_norm(h, layer.hidden_norm.weight, eps),
                    ]
                )
                for token, h in zip(read, hidden, strict=True)
            ]
        )
        new = []
        for i, h in enumerate(hidden):
            seen = [(inputs[0][j], j) for j in range(i + 1)]
            seen += [(inputs[s][i], i + s) for s in range(1, step + 1)]
            residual = naive_norm(h, layer.hidden_norm.weight, eps) if spec.norm_before_residual else h
            attended = naive_attention(layer.self_attn, inputs[step][i], i + step, seen)
            new.append(naive_finish(layer, residual, attended))
        states.append(torch.stack(new))
        hidden = [naive_norm(h, draft.norm.weight, eps) for h in new] if spec.norm_output else new
    return states


def naive_markov(head: Any, kind: str, previous: Sequence[int], hidden: Tensor) -> Tensor:
    """[γ, r] of one block, slot after slot: previous tokens and hidden rows [γ, d]."""
    state = hidden.new_zeros(head.rank)
    out = []
    for token, h in zip(previous, hidden, strict=True):
        embedded = head.markov_w1.weight[token]
        if kind == "vanilla":
            out.append(embedded)
        elif kind == "gated":
            out.append(naive_sigmoid(naive_linear(torch.cat([h, embedded]), head.gate_proj)) * embedded)
        else:
            joint = naive_linear(torch.cat([state, embedded, h]), head.joint_proj)
            gate, candidate, output = (joint[i * head.rank : (i + 1) * head.rank] for i in range(3))
            keep = naive_sigmoid(gate)
            state = keep * state + (1 - keep) * torch.tanh(candidate)
            out.append(torch.tanh(output))
    return torch.stack(out)


def naive_sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))
