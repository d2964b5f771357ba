"""Several processes that train one draft: who they are, what they sum, and how they wait for one another.

Each process (*rank*) has a device and a share of every batch. Gradients, numerators and weights are summed
over the ranks once a step, in float32, so that any number of ranks computes what one would. Only this file
knows torch.distributed.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from deepspec.config import Recipe
from deepspec.drafts.base import NeuralDraft
from deepspec.errors import RankError, RecipeError, UserError, first_line
from deepspec.log import console
from deepspec.targets.anatomy import find_decoder
from deepspec.targets.loading import own_device

T = TypeVar("T")

A_STEP = timedelta(minutes=30)
"""How long a rank waits for another one in a step, which a held-out evaluation or a checkpoint may delay."""
A_PREPARATION = timedelta(days=7)
"""How long the ranks wait for what the first one does alone, such as tokenising. A rank that dies ends the
wait at once."""


def launched() -> tuple[int, int]:
    """(rank, number of processes) from the variables that torchrun sets; (0, 1) without them."""
    rank, world = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    if rank is None or world is None:
        return 0, 1
    if not (rank.isdigit() and world.isdigit() and int(rank) < int(world)):
        raise UserError(
            f"RANK={rank} and WORLD_SIZE={world} are not a rank and the number of processes",
            next_step="unset both, or start with torchrun",
        )
    return int(rank), int(world)


@contextmanager
def _together() -> Iterator[None]:
    """Raise RankError if another process does not answer."""
    try:
        yield
    except RuntimeError as error:
        raise _unanswered(error) from error


def _unanswered(error: RuntimeError) -> RankError:
    return RankError(
        f"another process of this job ended or does not answer ({first_line(error)[:200]})",
        next_step="its own message, above or in its log, says why; the same command continues from the "
        "newest checkpoint",
    )


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together. control: a group for facts on the host, which waits long;
    None for a process that trains alone."""

    rank: int = 0
    world: int = 1
    control: Any = None

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Every world-th item. A batch is sorted by length, so that all ranks get as much to do."""
        return items[self.rank :: self.world]

    def wait(self) -> None:
        """Wait until all ranks are here."""
        if self.world > 1:
            with _together():
                dist.barrier(group=self.control)

    def first(self, make: Callable[[], T]) -> T:
        """What `make` gives on every rank, made on rank 0 first: it may write files that the others read."""
        found = make() if self.rank == 0 else None
        self.wait()
        return make() if found is None else found

    def gather(self, mine: T) -> list[T]:
        """What every rank has, in their order: plain data, or tensors on the host."""
        if self.world == 1:
            return [mine]
        found: list[Any] = [None] * self.world
        with _together():
            dist.all_gather_object(found, mine, group=self.control)
        return found

    def largest(self, *numbers: float) -> list[float]:
        """Each number's largest value over the ranks."""
        if self.world == 1:
            return list(numbers)
        found = torch.tensor(numbers, dtype=torch.float64)
        with _together():
            dist.all_reduce(found, dist.ReduceOp.MAX, group=self.control)
        return list(found.tolist())

    def add(self, *values: Tensor) -> None:
        """Sum float32 tensors over the ranks, in place."""
        if self.world > 1:
            with _together():
                for work in [dist.all_reduce(value, async_op=True) for value in values]:
                    work.wait()

    def add_gradients(self, weights: Sequence[Tensor]) -> None:
        """Sum gradients over the ranks. A weight that no rank has a gradient of keeps none. Those of a weight
        that is split over the ranks were summed by its backward pass."""
        weights = [weight for weight in weights if not isinstance(weight, DTensor)]
        if self.world == 1 or not weights:
            return
        known = self.largest(*(float(w.grad is not None) for w in weights))
        used = [w for w, some in zip(weights, known, strict=True) if some]
        for weight in used:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight, dtype=torch.float32)
        self.add(*(w.grad for w in used if w.grad is not None))

    def check_alike(self, facts: Mapping[str, Any]) -> None:
        """Raise UserError, naming them, if facts differ between the ranks."""
        (host, wanted), *others = self.gather((socket.gethostname(), dict(facts)))
        for rank, (there, found) in enumerate(others, start=1):
            other = [key for key in {**wanted, **found} if wanted.get(key) != found.get(key)]
            if other:
                sides = (f"{k}: {found.get(k)!r} there, {wanted.get(k)!r} on rank 0" for k in other[:8])
                raise UserError(
                    f"rank {rank} on {there} is not like rank 0 on {host}: {'; '.join(sides)}",
                    next_step="give every node the same code, recipe and data, and start the job again",
                )


ALONE = Ranks()


@contextmanager
def joined() -> Iterator[Ranks]:
    """This process among those that torchrun started, inside the block; alone without torchrun.

    Every rank but 0 prints nothing there but its own errors. Raises RankError if the others do not come.
    """
    rank, world = launched()
    if world == 1:
        yield ALONE
        return
    device, ours = torch.device(own_device()), not dist.is_initialized()
    with _together():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if ours:
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, rank=rank, world_size=world, timeout=A_STEP)
        control = dist.new_group(backend="gloo", timeout=A_PREPARATION)
    quiet, console.quiet = console.quiet, rank > 0
    try:
        yield Ranks(rank, world, control)
    except UserError as error:
        error.what = f"rank {rank}: {error.what}" if rank else error.what
        raise
    except RuntimeError as error:
        # A model that is split over the ranks waits for them in its own passes.
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise _unanswered(error) from error
        raise
    finally:
        console.quiet = quiet
        if ours:
            dist.destroy_process_group()


def check_world(recipe: Recipe) -> None:
    """Raise RecipeError if the ranks cannot share the recipe's batches evenly."""
    size, (_, world) = recipe.optim.batch_size, launched()
    if size % world:
        near = sorted({max(size // world, 1) * world, (size // world + 1) * world})
        raise RecipeError(
            f"optim.batch_size is {size} sequences, which {world} processes cannot share evenly",
            where=recipe.name,
            next_step=f"set optim.batch_size={' or '.join(map(str, near))}, or start a number of processes "
            f"that divides {size}",
        )


def shard_target(model: Any, name: str) -> Any:
    """Split the weights of a frozen model's layers over the ranks (FSDP2), and move the rest to this rank's
    device. A layer is gathered when it is called, and given back after it.

    The embedding and the head stay whole, since drafts use them. Every rank must call the model equally
    often. The model comes from the host, so that no device ever holds all of it.
    """
    device = torch.device(own_device())
    decoder = find_decoder(model, name)
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in decoder.layers:
        fully_shard(layer, mesh=mesh)
    split = {id(p) for layer in decoder.layers for p in layer.parameters()}
    whole = {p for p in model.parameters() if id(p) not in split}
    # The root has no weights of its own; it lets a layer be gathered while the one before it computes.
    fully_shard(decoder, mesh=mesh, ignored_params=whole)
    for tensor in (*whole, *model.buffers()):
        tensor.data = tensor.data.to(device)
    return model


def shard_draft(draft: NeuralDraft) -> None:
    """Split a draft's weights over the ranks (FSDP2), and with them their gradients and moments.

    What is split are float32 weights; a pass reads all of them, gathered in the draft's own number format,
    and ends with a float32 sum of gradients over the ranks. So every rank must make equally many passes. The
    draft is gathered as one piece, since its forward pass calls parts of its layers.
    """
    own, device = draft.dtype, draft.device
    formats = MixedPrecisionPolicy(
        param_dtype=None if own == torch.float32 else own,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    for weight in draft.parameters():  # and no buffer: a pass does not narrow these
        weight.data = weight.data.float()
    split = fully_shard(draft, mesh=mesh, mp_policy=formats)
    split.set_gradient_divide_factor(1.0)
    split.set_force_sum_reduction_for_comms(True)


@contextmanager
def gathered(draft: NeuralDraft) -> Iterator[None]:
    """All of a draft's weights on every rank, inside the block: decoding then waits for nobody."""
    if not isinstance(draft, FSDPModule):
        yield
        return
    draft.unshard()
    try:
        yield
    finally:
        draft.reshard()


def whole(state: Any) -> Any:
    """A state, such as an optimiser's, whose tensors that are split over the ranks are put together in the
    first one's host memory, one after the other; the others have None for them. Every rank must call this."""
    if isinstance(state, DTensor):
        found = state.full_tensor().detach()
        return found.cpu() if dist.get_rank() == 0 else None
    if isinstance(state, Mapping):
        return {key: whole(value) for key, value in state.items()}
    return [whole(value) for value in state] if isinstance(state, list) else state


def split_like(values: Tensor, weight: Tensor) -> Tensor:
    """This rank's part of values, which all ranks have, if the weight they belong to is split."""
    if not isinstance(weight, DTensor):
        return values
    there = values.to(weight.device)
    return distribute_tensor(there, weight.device_mesh, weight.placements, src_data_rank=None)


def sum_of_parts(value: Tensor) -> Tensor:
    """A figure of all weights, such as the norm of their gradients, as a plain tensor on every rank."""
    return value.full_tensor() if isinstance(value, DTensor) else value
