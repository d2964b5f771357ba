"""Attention in training, without a mask over all keys and without grouped heads repeated.

A query's keys come in parts, most of them for a kernel without a mask. The parts' outputs are merged by the
logarithms of their sums of exponentials (LSE). The backward pass asks each part's kernel for its gradients
with the merged output and LSE, which makes them those of one softmax over all keys (FlashAttention-2, arXiv
2307.08691, section 3.1). `tests/reference/attention.py` has the dense versions.

B sequences, S tokens, A blocks of γ slots, H query heads, G key/value heads, D head dim, Q queries, K keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepspec.maths.fused import fused

# With a mask, its backward pass gives NaN in the queries' gradient for some lengths (pytorch#196678).
torch.backends.cuda.enable_cudnn_sdp(False)

BLOCKS = 32
"""Blocks that share one call over the context before the first of them. What lies between their anchors is
computed with a mask; fewer queries in a call would not keep an accelerator busy."""


class Stair(NamedTuple):
    """Blocks `first` to `last` - 1 of sequence `row`, in the order of their anchors: all of them see the keys
    start … shared-1, and each those up to its own anchor, the last of which is `end`."""

    row: int
    first: int
    last: int
    start: int
    shared: int
    end: int


def staircase(anchors: Tensor, kept: Tensor, segment_ids: Tensor | None, size: int) -> list[Stair]:
    """Sorted anchors [B, A] in groups of at most `size` of one document; dummies see no context. All inputs
    are on the host. segment_ids: [B, S] of packed documents."""
    stairs = []
    for row, (places, real) in enumerate(zip(anchors.tolist(), kept.tolist(), strict=True)):
        segments = None if segment_ids is None else segment_ids[row].tolist()
        first = 0
        while first < len(places) and real[first]:
            begin, last = 0, first + 1
            if segments is not None:
                begin = segments.index(segments[places[first]])
            while last < min(first + size, len(places)) and real[last]:
                if segments is not None and segments[places[last]] != segments[places[first]]:
                    break
                last += 1
            if places[last - 1] > begin:
                stairs.append(Stair(row, first, last, begin, places[first], places[last - 1]))
            first = last
    return stairs


def block_attention(
    queries: Tensor,
    context: tuple[Tensor, Tensor],
    own: tuple[Tensor, Tensor],
    anchors: Tensor,
    stairs: Sequence[Stair],
    scale: float,
) -> Tensor:
    """Every slot sees the context before its block's anchor, and its own block both ways: [B, H, A*γ, D].

    queries: [B, H, A*γ, D]. context: keys and values [B, G, S, D]. own: those of the slots [B, G, A*γ, D].
    anchors: [B, A], on the device of the queries. stairs: their `staircase`. A dummy sees its own block only.
    """
    return _BlockAttention.apply(queries, *context, *own, anchors, stairs, scale)  # type: ignore[no-untyped-call]


def unroll_attention(
    queries: Tensor,
    context: tuple[Tensor, Tensor],
    columns: Sequence[tuple[Tensor, Tensor]],
    spans: Sequence[tuple[int, int, int]] | None,
    scale: float,
) -> Tensor:
    """Row i sees the first step's keys up to i, and of each later step the one at i (Eagle-3): [B, H, S, D].

    queries: [B, H, S, D]. context: the first step's keys and values [B, G, S, D]; columns: the later steps'.
    spans: (sequence, start, end) of packed documents, which cover all sequences; None: each is one document.
    """
    flat = [tensor for column in columns for tensor in column]
    return _UnrollAttention.apply(queries, *context, spans, scale, *flat)  # type: ignore[no-untyped-call]


def spans_of(segment_ids: Tensor | None) -> list[tuple[int, int, int]] | None:
    """(sequence, start, end) of the documents in segment_ids [B, S], on the host."""
    if segment_ids is None:
        return None
    found = []
    for row, ids in enumerate(segment_ids):
        ends = torch.unique_consecutive(ids, return_counts=True)[1].cumsum(0).tolist()
        found += [(row, start, end) for start, end in zip([0, *ends], ends, strict=False)]
    return found


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        own_k: Tensor,
        own_v: Tensor,
        anchors: Tensor,
        stairs: Any,
        scale: float,
    ) -> Tensor:
        count = anchors.shape[1]
        merged, lse, ctx.own_saved = _flash(False, scale, *(_each_block(x, count) for x in (q, own_k, own_v)))
        out, lse = _all_blocks(merged, len(q)).to(lse.dtype), _all_blocks(lse[..., None], len(q))[..., 0]
        block = q.shape[2] // count
        ctx.saved = []
        for stair, rows in _rows(stairs, block):
            ctx.saved.append([])
            asked = q[stair.row, :, rows][None]
            for keys, hidden in _parts(stair, anchors, block):
                key, value = (x[stair.row, :, keys][None] for x in (k, v))
                part, part_lse, saved = _flash(False, scale, asked, key, value, hidden)
                _merge(out[stair.row, :, rows], lse[stair.row, :, rows], part[0], part_lse[0])
                ctx.saved[-1].append(saved)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, own_k, own_v, anchors, out, lse)
        ctx.stairs, ctx.scale = stairs, scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, own_k, own_v, anchors, out, lse = ctx.saved_tensors
        count, scale = anchors.shape[1], ctx.scale
        block = q.shape[2] // count
        parts = [_each_block(x, count) for x in (d_out, q, own_k, own_v, out, lse[..., None])]
        parts[-1] = parts[-1][..., 0]
        own = _flash_backward(ctx.own_saved, False, scale, *parts)
        d_q, d_own_k, d_own_v = (_all_blocks(x, len(q)) for x in own)
        d_q = d_q.to(lse.dtype)
        d_k, d_v = torch.zeros_like(k, dtype=lse.dtype), torch.zeros_like(v, dtype=lse.dtype)
        for (stair, rows), kept in zip(_rows(ctx.stairs, block), ctx.saved, strict=True):
            given, asked, got, one_lse = (x[stair.row, :, rows][None] for x in (d_out, q, out, lse))
            for (keys, hidden), saved in zip(_parts(stair, anchors, block), kept, strict=True):
                key, value = (x[stair.row, :, keys][None] for x in (k, v))
                part = _flash_backward(saved, False, scale, given, asked, key, value, got, one_lse, hidden)
                d_q[stair.row, :, rows] += part[0][0]
                d_k[stair.row, :, keys] += part[1][0]
                d_v[stair.row, :, keys] += part[2][0]
        return d_q.to(q.dtype), d_k.to(k.dtype), d_v.to(v.dtype), d_own_k, d_own_v, None, None, None


class _UnrollAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, spans: Any, scale: float, *columns: Tensor
    ) -> Tensor:
        if spans is None:
            out, lse, saved = _flash(True, scale, q, k, v)
            ctx.saved, out = [saved], out.to(lse.dtype)
        else:
            out = torch.empty_like(q, dtype=_wide(q))
            lse, ctx.saved = out.new_empty(out.shape[:-1]), []
            for row, start, end in spans:
                parts = (x[row : row + 1, :, start:end] for x in (q, k, v))
                out[row : row + 1, :, start:end], lse[row : row + 1, :, start:end], saved = _flash(
                    True, scale, *parts
                )
                ctx.saved.append(saved)
        if columns:
            asked, so_far, one_lse = (_grouped(x, k) for x in (q, out, lse[..., None]))
            for key, value in zip(columns[::2], columns[1::2], strict=True):
                _take_column(so_far, one_lse[..., 0], asked, key, value, scale)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse, *columns)
        ctx.spans, ctx.scale = spans, scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, *columns = ctx.saved_tensors
        scale = ctx.scale
        if ctx.spans is None:
            d_q, d_k, d_v = _flash_backward(ctx.saved[0], True, scale, d_out, q, k, v, out, lse)
        else:
            d_q, d_k, d_v = (torch.zeros_like(x) for x in (q, k, v))
            for (row, start, end), saved in zip(ctx.spans, ctx.saved, strict=True):
                parts = (x[row : row + 1, :, start:end] for x in (d_out, q, k, v, out, lse))
                parted = _flash_backward(saved, True, scale, *parts)
                for whole, part in zip((d_q, d_k, d_v), parted, strict=True):
                    whole[row : row + 1, :, start:end] = part
        d_q = d_q.to(lse.dtype)
        given, asked, of_q = (_grouped(x, k) for x in (d_out, q, d_q))
        delta = (given * _grouped(out, k)).sum(-1)
        one_lse = _grouped(lse[..., None], k)[..., 0]
        found: list[Tensor] = []
        for key, value in zip(columns[::2], columns[1::2], strict=True):
            share, slope = _column_shares(of_q, asked, given, key, value, one_lse, delta, scale)
            found += _column_gradients(asked, given, share, slope, key.dtype)
        return d_q.to(q.dtype), d_k, d_v, None, None, *found


def _rows(stairs: Sequence[Stair], block: int) -> Iterator[tuple[Stair, slice]]:
    """Each stair and its slots."""
    for stair in stairs:
        yield stair, slice(stair.first * block, stair.last * block)


def _parts(stair: Stair, anchors: Tensor, block: int) -> Iterator[tuple[slice, Tensor | None]]:
    """A stair's keys: those that all of its blocks see, and those between its anchors with what is hidden."""
    if stair.shared > stair.start:
        yield slice(stair.start, stair.shared), None
    if stair.end > stair.shared:
        yield slice(stair.shared, stair.end), _hidden(stair, anchors, block)


def _hidden(stair: Stair, anchors: Tensor, block: int) -> Tensor:
    """[blocks*γ, keys] bool: the keys between the anchors of a stair that a slot must not see."""
    keys = torch.arange(stair.shared, stair.end, device=anchors.device)
    limits = anchors[stair.row, stair.first : stair.last].repeat_interleave(
        block, output_size=(stair.last - stair.first) * block
    )
    return keys >= limits[:, None]


def _each_block(x: Tensor, count: int) -> Tensor:
    """[B, H, A*γ, D] -> [B*A, H, γ, D]."""
    return x.unflatten(2, (count, -1)).transpose(1, 2).flatten(0, 1)


def _all_blocks(x: Tensor, rows: int) -> Tensor:
    """[B*A, H, γ, D] -> [B, H, A*γ, D]."""
    return x.unflatten(0, (rows, -1)).transpose(1, 2).flatten(2, 3)


def _wide(x: Tensor) -> torch.dtype:
    """The dtype of the sums: float32, or float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _grouped(x: Tensor, keys: Tensor) -> Tensor:
    """[B, H, Q, D] -> [B, G, H/G, Q, D] in the dtype of the sums: query heads by the head that they read."""
    return x.to(_wide(x)).unflatten(1, (keys.shape[1], -1))


def _merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Take a part's output [..., Q, D] and LSE [..., Q] into those of other keys, in place."""
    total = torch.logaddexp(lse, part_lse)
    out.mul_((lse - total).exp_()[..., None]).addcmul_(
        (part_lse - total).exp_()[..., None], part.to(out.dtype)
    )
    lse.copy_(total)


@fused
def _take_column(out: Tensor, lse: Tensor, asked: Tensor, key: Tensor, value: Tensor, scale: float) -> None:
    """Take one more key and value for each row [B, G, S, D] into `out` and `lse`, in place. These and the
    queries, `asked`, are `_grouped`."""
    score = (asked * key[:, :, None]).sum(-1).mul_(scale)
    _merge(out, lse, value[:, :, None], score)


@fused
def _column_shares(
    of_q: Tensor,
    asked: Tensor,
    given: Tensor,
    key: Tensor,
    value: Tensor,
    lse: Tensor,
    delta: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Each row's share of attention [B, G, H/G, S] for its own key, and the gradient of its score, whose part
    of the queries' gradient is added to `of_q`. The output's gradient, `given`, and the others are as in
    `_take_column`."""
    share = (asked * key[:, :, None]).sum(-1).mul_(scale).sub_(lse).exp_()
    slope = (given * value[:, :, None]).sum(-1).sub_(delta).mul_(share).mul_(scale)
    of_q.addcmul_(slope[..., None], key[:, :, None].to(lse.dtype))
    return share, slope


@fused
def _column_gradients(
    asked: Tensor, given: Tensor, share: Tensor, slope: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Gradients [B, G, S, D] of a column's keys and values, from `_column_shares`."""
    return (slope[..., None] * asked).sum(2).to(dtype), (share[..., None] * given).sum(2).to(dtype)


def _dense(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Attention written out: output [B, H, Q, D] and LSE [B, H, Q], -inf for a query that sees nothing."""
    scores = _scores(q, k, hidden, scale)
    # A finite floor: a row of nothing but -inf would turn into NaN.
    top = scores.amax(-1, keepdim=True).clamp_(min=-1e30)
    total = scores.sub_(top).exp_().sum(-1, keepdim=True)
    out = torch.matmul(scores.to(v.dtype).flatten(2, 3), v).unflatten(2, scores.shape[2:4])
    lse = (total.log() + top)[..., 0].flatten(1, 2)
    return (out / total.clamp_(min=1e-30)).flatten(1, 2), lse


def _dense_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    hidden: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values from merged LSE and delta = <d_out, out>, each [B, H, Q]."""
    heads = (k.shape[1], -1)
    share = _scores(q, k, hidden, scale).sub_(lse.unflatten(1, heads)[..., None]).exp_()
    given, asked = (x.unflatten(1, heads).flatten(2, 3) for x in (d_out, q))
    d_v = torch.matmul(share.to(v.dtype).flatten(2, 3).transpose(-1, -2), given)
    slope = torch.matmul(given, v.transpose(-1, -2)).to(share.dtype).view_as(share)
    slope = slope.sub_(delta.unflatten(1, heads)[..., None]).mul_(share).mul_(scale).to(q.dtype).flatten(2, 3)
    d_q = torch.matmul(slope, k).view_as(asked).unflatten(2, share.shape[2:4]).flatten(1, 2)
    return d_q, torch.matmul(slope.transpose(-1, -2), asked), d_v


def _scores(q: Tensor, k: Tensor, hidden: Tensor | None, scale: float) -> Tensor:
    """[B, G, H/G, Q, K] scaled products in the dtype of the sums, -inf where `hidden` [Q, K] is true."""
    grouped = q.unflatten(1, (k.shape[1], -1))
    scores = torch.matmul(grouped.flatten(2, 3), k.transpose(-1, -2)).to(_wide(q)).mul_(scale)
    scores = scores.unflatten(2, grouped.shape[2:4])
    return scores if hidden is None else scores.masked_fill_(hidden, float("-inf"))


def _has_flash(q: Tensor, hidden: Tensor | None) -> bool:
    """Whether torch's flash kernels take these queries. Only the CPU's takes a mask."""
    if q.device.type != "cuda" or hidden is not None:
        return q.device.type == "cpu"
    narrow = q.dtype in (torch.bfloat16, torch.float16)
    return narrow and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256


def _dense_mask(q: Tensor, causal: bool, hidden: Tensor | None) -> Tensor | None:
    """[Q, K] bool: the keys that a query must not see, written out."""
    if not causal:
        return hidden
    assert hidden is None, "causal attention hides what it hides by itself"
    return torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu_(1)


def _cpu_mask(q: Tensor, hidden: Tensor | None) -> Tensor | None:
    """What the CPU's kernel adds to scores. It is finite, not -inf: a query whose keys are all hidden then
    has an LSE so low that its output counts for nothing when it is merged into that of other keys."""
    if hidden is None:
        return None
    return torch.zeros_like(hidden, dtype=q.dtype).masked_fill_(hidden, torch.finfo(q.dtype).min / 2)


def _flash(
    causal: bool, scale: float, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None = None
) -> tuple[Tensor, Tensor, Any]:
    """Output [B, H, Q, D], LSE [B, H, Q] in the dtype of the sums, and what the backward needs besides.
    hidden: [Q, K] bool, keys that a query must not see."""
    if not _has_flash(q, hidden):
        return *_dense(q, k, v, _dense_mask(q, causal, hidden), scale), None
    if q.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=_cpu_mask(q, hidden), scale=scale
        )
        return out, lse, None
    found = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
    return found[0], found[1], found[2:8]


def _flash_backward(
    saved: Any,
    causal: bool,
    scale: float,
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    hidden: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values, from the merged output and LSE."""
    given = (d_out, q, k, v, out, lse)
    if not _has_flash(q, hidden):
        delta = (d_out.to(lse.dtype) * out).sum(-1)
        return _dense_backward(d_out, q, k, v, lse, delta, _dense_mask(q, causal, hidden), scale)
    if q.device.type == "cpu":
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        return backward(*given, 0.0, causal, attn_mask=_cpu_mask(q, hidden), scale=scale)
    backward = torch.ops.aten._scaled_dot_product_flash_attention_backward
    lengths, seeds = saved[:4], saved[4:]
    return backward(*given, *lengths, 0.0, causal, *seeds, scale=scale)
