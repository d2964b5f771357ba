"""Attention in parts against dense attention: outputs, every gradient, and what is kept for the backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deepspec.drafts import attention
from deepspec.drafts.attention import Stair, block_attention, spans_of, staircase, unroll_attention
from reference.attention import block_mask, dense_attention, dense_unroll

SCALE = 0.6


def drawn(generator: torch.Generator, *shapes: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for s in shapes]


def same(found: Tensor, want: Tensor, inputs: list[Tensor], tolerance: float) -> None:
    """Equal outputs, and equal gradients of every input for one upstream gradient."""
    torch.testing.assert_close(found, want, rtol=tolerance, atol=tolerance)
    upstream = torch.randn(want.shape, generator=torch.Generator().manual_seed(9), dtype=want.dtype)
    pairs = (torch.autograd.grad(x, inputs, upstream) for x in (found, want))
    for mine, theirs in zip(*pairs, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


@st.composite
def anchored(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor | None, int]:
    """(sorted anchors, kept with dummies at the end, documents or None, sequence length)."""
    rows, length, count = draw(st.integers(1, 3)), draw(st.integers(1, 40)), draw(st.integers(1, 12))
    places = [sorted(draw(st.sets(st.integers(0, length - 1), max_size=count))) for _ in range(rows)]
    anchors = torch.tensor([p + [0] * (count - len(p)) for p in places])
    kept = torch.arange(count) < torch.tensor([[len(p)] for p in places])
    starts = torch.tensor([draw(st.lists(st.integers(0, 5), min_size=length, max_size=length))] * rows)
    return anchors, kept, (starts == 0).cumsum(1) if draw(st.booleans()) else None, length


@given(
    case=anchored(),
    block=st.integers(1, 7),
    groups=st.sampled_from([(4, 2), (2, 2), (3, 1)]),
    size=st.integers(1, 5),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_block_attention_is_dense_attention(
    case: tuple[Tensor, Tensor, Tensor | None, int], block: int, groups: tuple[int, int], size: int, seed: int
) -> None:
    anchors, kept, documents, length = case
    (rows, count), (heads, shared) = anchors.shape, groups
    wide, narrow = (rows, heads, count * block, 8), (rows, shared, count * block, 8)
    context = (rows, shared, length, 8)
    inputs = drawn(
        torch.Generator().manual_seed(seed), wide, context, context, narrow, narrow, dtype=torch.float64
    )
    q, k, v, own_k, own_v = inputs
    stairs = staircase(anchors, kept, documents, size)
    found = block_attention(q, (k, v), (own_k, own_v), anchors, stairs, SCALE)
    seen = block_mask(anchors, kept, block, length, documents)[:, None]
    want = dense_attention(q, torch.cat([k, own_k], 2), torch.cat([v, own_v], 2), seen, SCALE)
    same(found, want, inputs, 1e-9)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("columns", [0, 1, 6])
@pytest.mark.parametrize("groups", [(4, 2), (2, 2)])
def test_unroll_attention_is_dense_attention(groups: tuple[int, int], columns: int, packed: bool) -> None:
    heads, shared = groups
    kv = (2, shared, 37, 8)
    random = torch.Generator().manual_seed(1)
    q, k, v, *rest = inputs = drawn(
        random, (2, heads, 37, 8), kv, kv, *[kv] * (2 * columns), dtype=torch.float64
    )
    pairs = list(zip(rest[::2], rest[1::2], strict=True))
    documents = torch.tensor([[0] * 20 + [1] * 10 + [-1] * 7, [0] * 37]) if packed else None
    found = unroll_attention(q, (k, v), pairs, spans_of(documents), SCALE)
    same(found, dense_unroll(q, (k, v), pairs, documents, SCALE), inputs, 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_anchors_far_apart_leave_whole_tiles_of_the_kernel_hidden(dtype: torch.dtype) -> None:
    """Guards NaN: the CPU's kernel takes keys by the hundred, and the first block sees none of these."""
    anchors, kept = torch.tensor([[3, 1500]]), torch.ones(1, 2, dtype=torch.bool)
    shapes = ((1, 2, 4, 16), (1, 1, 1600, 16), (1, 1, 1600, 16), (1, 1, 4, 16), (1, 1, 4, 16))
    inputs = [
        x.detach().to(dtype).requires_grad_()
        for x in drawn(torch.Generator().manual_seed(0), *shapes, dtype=torch.float64)
    ]
    q, k, v, own_k, own_v = inputs
    stairs = staircase(anchors, kept, None, 2)
    found = block_attention(q, (k, v), (own_k, own_v), anchors, stairs, SCALE)
    seen = block_mask(anchors, kept, 2, 1600, None)[:, None]
    exact = [x.double() for x in inputs]
    keys, values = torch.cat([exact[1], exact[3]], 2), torch.cat([exact[2], exact[4]], 2)
    want = dense_attention(exact[0], keys, values, seen, SCALE)
    same(found.double(), want, inputs, 2e-5 if dtype == torch.float32 else 0.06)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_numbers_are_merged_in_float32(dtype: torch.dtype) -> None:
    """Guards outputs that are rounded once for every part they are merged from."""
    anchors, kept = torch.arange(3, 99, 3)[None], torch.ones(1, 32, dtype=torch.bool)
    shapes = ((1, 4, 64, 16), (1, 2, 99, 16), (1, 2, 99, 16), (1, 2, 64, 16), (1, 2, 64, 16))
    inputs = [
        x.detach().to(dtype).requires_grad_() for x in drawn(torch.Generator(), *shapes, dtype=torch.float64)
    ]
    q, k, v, own_k, own_v = inputs
    exact = [x.double() for x in inputs]
    stairs = staircase(anchors, kept, None, 4)
    found = block_attention(q, (k, v), (own_k, own_v), anchors, stairs, SCALE)
    seen = block_mask(anchors, kept, 2, 99, None)[:, None]
    keys, values = torch.cat([exact[1], exact[3]], 2), torch.cat([exact[2], exact[4]], 2)
    want = dense_attention(exact[0], keys, values, seen, SCALE)
    same(found.double(), want, inputs, 2e-5 if dtype == torch.float32 else 0.06)


@pytest.mark.parametrize("causal", [False, True])
def test_without_a_flash_kernel_the_parts_are_written_out(
    causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An accelerator has flash kernels for narrow numbers only."""
    written, real = [], attention._dense

    def dense(*parts: Any) -> Any:
        written.append(parts)
        return real(*parts)

    monkeypatch.setattr(attention, "_dense", dense)
    monkeypatch.setattr(attention, "_has_flash", lambda q, hidden: False)
    if causal:
        test_unroll_attention_is_dense_attention((4, 2), 2, packed=True)
    else:
        test_narrow_numbers_are_merged_in_float32(torch.float32)
    assert written


def test_stairs_stop_at_documents_and_leave_out_dummies_and_blocks_without_context() -> None:
    anchors = torch.tensor([[0, 2, 5, 7, 9], [4, 6, 8, 0, 0]])
    kept = torch.tensor([[True] * 5, [True, True, True, False, False]])
    assert staircase(anchors, kept, None, 2) == [
        Stair(0, 0, 2, 0, 0, 2),
        Stair(0, 2, 4, 0, 5, 7),
        Stair(0, 4, 5, 0, 9, 9),
        Stair(1, 0, 2, 0, 4, 6),
        Stair(1, 2, 3, 0, 8, 8),
    ]
    documents = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1, 1]] * 2)
    assert staircase(anchors, kept, documents, 3) == [
        Stair(0, 0, 2, 0, 0, 2),
        Stair(0, 2, 5, 4, 5, 9),
        Stair(1, 0, 3, 4, 4, 8),
    ]
    assert staircase(torch.tensor([[0]]), torch.tensor([[False]]), None, 2) == []


def kept_for_backward(run: Callable[[], Tensor]) -> int:
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        run()
    return sum(sizes)


def test_what_is_kept_grows_with_the_tokens_and_not_with_their_square() -> None:
    """Guards scores or masks of queries times keys that wait for the backward."""

    def unrolled(length: int) -> int:
        q, *rest = drawn(torch.Generator(), *[(1, 2, length, 8)] * 7, dtype=torch.float32)
        pairs = list(zip(rest[::2], rest[1::2], strict=True))
        return kept_for_backward(lambda: unroll_attention(q, pairs[0], pairs[1:], None, SCALE))

    def blocks(length: int) -> int:
        anchors = torch.arange(1, length, 4)[None]
        shapes = [(1, 2, anchors.shape[1] * 3, 8), *[(1, 2, length, 8)] * 2]
        q, k, v = drawn(torch.Generator(), *shapes, dtype=torch.float32)
        stairs = staircase(anchors, torch.ones_like(anchors, dtype=torch.bool), None, 8)
        return kept_for_backward(lambda: block_attention(q, (k, v), (q, q), anchors, stairs, SCALE))

    for kept in (unrolled, blocks):
        assert kept(256) <= 2 * kept(128)
