"""Which source a recipe's `data.features` names: this room knows them all, and they not each other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from deepspec.config import feature_source
from deepspec.features.batches import Source, online
from deepspec.features.cache_read import cached, open_cache
from deepspec.features.servers import sglang_source, vllm_source
from deepspec.targets import Target


def open_features(
    features: str,
    target: Target,
    layers: Sequence[int],
    reads: Sequence[str],
    remedy: str = "",
    max_length: int | None = None,
) -> Source:
    """The source that a recipe's `data.features` names (`config.feature_source`).

    reads: names of the `blocks.READ_RULES` whose positions it has to fill. remedy: the command that would
    make a fitting cache, for the error where one does not fit. max_length: tokens of the longest row, which a
    server's context must hold. Raises UserError.
    """
    form, place = feature_source(features)
    if form == "online":
        return online(target, layers)
    if form == "cache":
        return cached(open_cache(Path(place)), target, layers, reads, remedy)
    opens = vllm_source if form == "vllm" else sglang_source
    return opens(place, target, layers, reads, max_length=max_length)
