"""The feature source that a recipe's `data.features` names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from deepspec.config import feature_source
from deepspec.features.batches import Source, online
from deepspec.features.cache_read import cached, open_cache
from deepspec.features.vllm import VllmSource
from deepspec.targets import Target


def open_features(
    features: str,
    target: Target,
    layers: Sequence[int],
    reads: Sequence[str],
    remedy: str = "",
    max_length: int | None = None,
) -> Source:
    """Open the source that a recipe's `data.features` names (`config.feature_source`).

    reads: names of the `blocks.READ_RULES` whose positions it has to fill. remedy: the command that would
    make a fitting cache, for the error about one that does not fit. max_length: tokens of the longest row,
    which a server's context must hold. Raises UserError.
    """
    kind, place = feature_source(features)
    if kind == "online":
        return online(target, layers)
    if kind == "cache":
        return cached(open_cache(Path(place)), target, layers, reads, remedy)
    return VllmSource(place, target, layers, reads, max_length=max_length)
