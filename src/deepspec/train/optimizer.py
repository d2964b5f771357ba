"""AdamW with warm-up and cosine decay, float32 masters, moments in float32 or 8 bits; Muon on request.

Each gradient is a float32 sum in its weight's `grad`, however narrow the weight is: in bfloat16 the later
ones of many passes would be lost.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepspec.config import OptimConfig
from deepspec.drafts.base import NeuralDraft
from deepspec.drafts.heads import TABLES
from deepspec.errors import RecipeError
from deepspec.maths.host import sent
from deepspec.train.dist import split_like, sum_of_parts, whole
from deepspec.train.memory import SMALLER_STATE, memory_for

KEPT = {"adamw": ("exp_avg", "exp_avg_sq"), "muon": ("momentum_buffer",)}
"""What torch's optimisers keep of each weight."""


class Stepped(NamedTuple):
    """What a step was: its learning rate, the norm of its gradients before clipping, its loss, and whether
    the weights followed it."""

    lr: float
    norm: float
    loss: float
    taken: bool


class Optimizer:
    """AdamW over a draft's parameters, or over those that are not `is_matrix` if Muon takes these; they step
    float32 masters if the draft itself is narrower.

    offload: masters and moments are in the host's memory, and the processor steps them (ZeRO-Offload, arXiv
    2101.06840): the device keeps 6 bytes a parameter of a bfloat16 draft, not 18.

    Raises RecipeError if `optim.states` needs a package that is not installed.
    """

    @memory_for("the optimiser", SMALLER_STATE)
    def __init__(self, draft: NeuralDraft, optim: OptimConfig, offload: bool = False) -> None:
        self.optim = optim
        named = [(name, p) for name, p in draft.named_parameters() if p.requires_grad]
        self.names, self.parameters = [name for name, _ in named], [p for _, p in named]
        self.masters = [master_of(p, offload) for p in self.parameters]
        for parameter in self.parameters:
            if parameter.dtype != torch.float32:
                parameter.grad_dtype = torch.float32
        matrices = [optim.matrices == "muon" and is_matrix(name, p) for name, p in named]
        self.groups: dict[str, list[Tensor]] = {"adamw": [], "muon": []}
        for master, matrix in zip(self.masters, matrices, strict=True):
            self.groups["muon" if matrix else "adamw"].append(master)
        self.steppers = {"adamw": adamw(self.groups["adamw"], optim)}
        if self.groups["muon"]:
            self.steppers["muon"] = muon(self.groups["muon"], optim)

    def divide(self, weight: Tensor) -> None:
        """Divide the gradients collected so far."""
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad.div_(weight)

    def clear(self) -> None:
        """Forget the gradients collected so far."""
        for holder in (*self.parameters, *self.masters):
            holder.grad = None

    @memory_for("the optimiser", SMALLER_STATE)
    def step(self, done: float, loss: Tensor | None = None, most: float = math.inf) -> Stepped:
        """Clip, step and clear the gradients. done: the finished share of the run, in [0, 1]. loss: of these
        gradients; most: above which it is not to be followed.

        If the gradients or the loss are not finite, or the loss is above `most`, the step is not `taken`: no
        weight and no state has changed, and the gradients are cleared.
        """
        lr = self.optim.lr * schedule(done, self.optim.warmup)
        for stepper in self.steppers.values():
            for group in stepper.param_groups:
                group["lr"] = lr
        norm = sum_of_parts(torch.nn.utils.clip_grad_norm_(self.parameters, self.optim.grad_clip))
        self._hand_over()
        # Read before the step, not after it: a step waits for the device once in either order, and what was
        # queued before, such as gradients on their way to the host, is complete.
        size, value = torch.stack([norm, torch.zeros_like(norm) if loss is None else loss]).tolist()
        if not (math.isfinite(size) and math.isfinite(value) and value <= most):
            self.clear()
            return Stepped(lr, size, value, False)
        for stepper in self.steppers.values():
            stepper.step()
        self.clear()
        with torch.no_grad():
            for parameter, master in zip(self.parameters, self.masters, strict=True):
                if master is not parameter:
                    parameter.copy_(sent(master, parameter.device))
        return Stepped(lr, size, value, True)

    def _hand_over(self) -> None:
        """Give each master its weight's gradient. A copy to the host is only queued."""
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if master is not parameter and parameter.grad is not None:
                master.grad = parameter.grad.to(master.device, non_blocking=True)
                parameter.grad = None

    def state(self) -> dict[str, Any]:
        """What `load` needs to continue; `torch.save` can write it. All ranks must call this; of a draft that
        is split over them, only the first gets all."""
        states = {name: whole(stepper.state_dict()) for name, stepper in self.steppers.items()}
        return {**states, "masters": whole([m.detach() for m in self.masters])}

    def load(self, state: dict[str, Any]) -> None:
        """Continue from what `state` gave. Raises ValueError for moments that are not finite, or of another
        shape than their weights."""
        for name in self.steppers:
            narrow = name == "adamw" and self.optim.states != "float32"
            for number, found in state[name]["state"].items():
                shape = self.groups[name][number].shape
                moments = [] if narrow else [found[key] for key in KEPT[name]]
                if any(moment.shape != shape or not moment.isfinite().all() for moment in moments):
                    raise ValueError(f"the moments of weight {number} are not finite, or of another shape")
        for name, stepper in self.steppers.items():
            stepper.load_state_dict(self._split(name, state[name]))
        with torch.no_grad():
            for master, parameter, saved in zip(self.masters, self.parameters, state["masters"], strict=True):
                mine = split_like(saved, master)
                master.copy_(mine)
                parameter.copy_(mine)

    def _split(self, name: str, state: dict[str, Any]) -> dict[str, Any]:
        """A stepper's state, with this rank's part of the moments of a weight that is split."""
        found = {}
        for number, values in state["state"].items():
            moments = {
                key: split_like(values[key], self.groups[name][number]) for key in KEPT[name] if key in values
            }
            found[number] = values | moments
        return state | {"state": found}


def master_of(parameter: Tensor, offload: bool) -> Tensor:
    """The float32 weight that is stepped for a parameter: itself if it is one, and is to stay where it is.

    offload: in the host's memory, in pinned pages, where it is stepped, too.
    """
    if offload and parameter.device.type != "cpu":
        return parameter.detach().cpu().float().pin_memory().requires_grad_()
    return parameter if parameter.dtype == torch.float32 else parameter.detach().float().requires_grad_()


def adamw(parameters: list[Tensor], optim: OptimConfig) -> torch.optim.Optimizer:
    """AdamW with its two moments in float32, or in 8 bits for a parameter of 4,096 values or more.

    8 bits: block-wise dynamic quantisation (Dettmers 2022), 256 values per scale. Raises RecipeError.
    """
    settings: dict[str, Any] = {"lr": optim.lr, "betas": optim.betas, "weight_decay": optim.weight_decay}
    if optim.states == "float32":
        return torch.optim.AdamW(parameters, **settings, fused=True)
    return eight_bit_adamw()(parameters, **settings)


def is_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon may step it: a matrix between layers. The rows of a table over the vocabulary have nothing
    in common that could be made orthogonal, nor has a vector."""
    return parameter.dim() == 2 and min(parameter.shape) > 1 and not name.endswith(TABLES)


def muon(parameters: list[Tensor], optim: OptimConfig) -> torch.optim.Optimizer:
    """Muon (Jordan 2024), its updates as large as AdamW's (arXiv 2502.16982, section 2.2), so that one
    learning rate is for both."""
    return torch.optim.Muon(
        parameters, lr=optim.lr, weight_decay=optim.weight_decay, adjust_lr_fn="match_rms_adamw"
    )


def eight_bit_adamw() -> Any:
    """The class behind `optim.states: 8bit`. Raises RecipeError if its package is not installed."""
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise RecipeError(
            f"optim.states=8bit needs the bitsandbytes package ({error})",
            next_step="pip install 'bitsandbytes>=0.50', or train with optim.states=float32; with "
            "offload_optimizer=true, too, it takes less of a GPU's memory than with 8bit",
        ) from error
    return AdamW8bit


def schedule(done: float, warmup: float) -> float:
    """Factor of the learning rate at a finished share of the run: linear warm-up, then half a cosine to 0."""
    if done < warmup:
        return max(done / warmup, 1e-3)
    return 0.5 * (1 + math.cos(math.pi * min((done - warmup) / (1 - warmup), 1.0)))
