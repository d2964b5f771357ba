"""Gradients that the forward pass has already formed, handed to autograd as they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def needs_gradient(tensor: Tensor | None) -> bool:
    """Whether a backward pass could ask for this tensor's gradient."""
    return tensor is not None and tensor.requires_grad and torch.is_grad_enabled()


def with_gradients(
    total: Tensor, inputs: Sequence[Tensor | None], gradients: Sequence[Tensor | None]
) -> Tensor:
    """The scalar `total` with a backward pass: its gradient for each of `inputs` is the tensor of the same
    place in `gradients` (None: no gradient), times the upstream scalar, in the dtype of the input, or in the
    one that a weight's gradients are to have. It can be differentiated once."""
    return _Formed.apply(total, len(inputs), *inputs, *gradients)  # type: ignore[no-untyped-call, no-any-return]


class _Formed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, total: Tensor, count: int, *tensors: Tensor | None) -> Tensor:
        ctx.save_for_backward(*tensors[count:])
        ctx.dtypes = [None if x is None else x.grad_dtype if x.is_leaf else x.dtype for x in tensors[:count]]
        return total.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        formed, factor = ctx.saved_tensors, upstream
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            # Nobody reads them again: each is scaled where it is, and is its input's gradient without a copy.
            ctx.maybe_clear_saved_tensors()
            scaled = [None if gradient is None else gradient.mul_(factor) for gradient in formed]
        else:
            scaled = [None if gradient is None else gradient * factor for gradient in formed]
        del formed
        given = [None if g is None else g.to(dtype) for g, dtype in zip(scaled, ctx.dtypes, strict=True)]
        return None, None, *given, *[None] * len(given)
