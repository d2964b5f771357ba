"""Where a Hugging Face decoder keeps its layers, embedding and head; families differ in data only.

V vocabulary, d hidden width. Modules are found by the names and accessors that transformers' models share.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepspec import families
from deepspec.errors import TargetError
from deepspec.families import TargetFamily
from deepspec.maths.head import Embedding, Head


def find_decoder(model: Any, name: str) -> Any:
    """The module that holds the decoder layers and the final norm. Raises TargetError."""
    found = model.get_decoder() if hasattr(model, "get_decoder") else None
    for candidate in (found, getattr(found, "language_model", None), getattr(model, "model", None)):
        has_layers = isinstance(getattr(candidate, "layers", None), nn.ModuleList)
        if has_layers and any(hasattr(candidate, n) for n in families.FINAL_NORMS):
            return candidate
    raise TargetError(
        f"{name}: could not find the decoder's layers and final norm in {type(model).__name__}",
        next_step="targets must be Hugging Face decoders whose text model has `layers` and a final `norm`",
    )


def final_norm(decoder: Any) -> Any:
    """The module between the last layer and the head, of a decoder that `find_decoder` found."""
    return next(getattr(decoder, name) for name in families.FINAL_NORMS if hasattr(decoder, name))


def fuse_norms(decoder: Any) -> None:
    """Let the RMS norms of Llama's kind, which most families copy, be two kernels in place of seven: their
    passes are most of what a forward pass moves apart from its products. The numbers are rounded at the same
    places. A norm that computes anything else, as Gemma's, stays as it is."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    for module in decoder.modules():
        if "forward" not in vars(module) and _code(type(module)) == _code(LlamaRMSNorm):
            module.forward = _fused_norm(module)


def _fused_norm(norm: Any) -> Callable[[Tensor], Tensor]:
    # The weight is looked up in each pass: sharding puts another in its place.
    return lambda x: F.rms_norm(x, x.shape[-1:], None, norm.variance_epsilon) * norm.weight


def _code(kind: Any) -> tuple[Any, ...] | None:
    """What a module's forward pass does, in a form that is equal for equal code."""
    code = getattr(kind.forward, "__code__", None)
    return code and (code.co_code, code.co_names, code.co_consts)


def find_embedding(model: Any, config: Any, family: TargetFamily, name: str) -> Embedding:
    """The token embedding and the factor on its output. Raises TargetError."""
    module = model.get_input_embeddings()
    weight = _plain(getattr(module, "weight", None), "embedding", name)
    key = family.embedding_factor
    factor = getattr(module, "scalar_embed_scale", 1.0) if key is None else getattr(config, key)
    return Embedding(weight, float(factor))


def find_head(model: Any, config: Any, family: TargetFamily, name: str, device: torch.device) -> Head:
    """The vocabulary head with its factor and soft-cap. Raises TargetError."""
    module = model.get_output_embeddings()
    weight = _plain(getattr(module, "weight", None), "head", name).to(device)
    bias = getattr(module, "bias", None)
    scale = 1.0
    if family.logit_factor is not None:
        key, power = family.logit_factor
        scale = float(getattr(config, key)) ** power
    softcap = getattr(config, families.SOFTCAP, None)
    return Head(weight, None if bias is None else bias.to(device), scale, softcap)


def _plain(weight: Tensor | None, what: str, name: str) -> Tensor:
    """Weights that drafts can borrow. Raises TargetError where there are none, or not as numbers."""
    if weight is None:
        raise TargetError(f"{name} has no {what}", next_step="targets are causal language models")
    if not weight.is_floating_point() or weight.dtype.itemsize < 2 or weight.is_meta:
        state = "offloaded" if weight.is_meta else f"quantised ({str(weight.dtype).removeprefix('torch.')})"
        raise TargetError(
            f"the {what} of {name} is {state}, and a draft shares it",
            next_step="load it with embedding and head left as they are (`modules_to_not_convert` of the "
            "quantisation, a device in `device_map`)",
        )
    return weight


def steady_length(config: Any) -> int | None:
    """The longest sequence whose rotary frequencies do not depend on its length; None: any."""
    rope = getattr(config, "rope_parameters", None) or {}
    for entry in (rope, *(e for e in rope.values() if isinstance(e, dict))):
        if entry.get("rope_type") in families.LENGTH_DEPENDENT_ROPE:
            return int(entry.get("original_max_position_embeddings") or config.max_position_embeddings)
    return None
