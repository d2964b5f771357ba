"""transformers' key/value cache over our slots, and which models it can serve."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from deepspec import families
from deepspec.errors import TargetError
from deepspec.maths.slots import Rows, SlotStore


class SlotCache(Cache):
    """What a model with `layers` layers reads and writes when it steps over slots."""

    def __init__(self, layers: int) -> None:
        super().__init__(layers=[_SlotLayer() for _ in range(layers)])

    @property
    def stores(self) -> list[SlotStore]:
        """Each layer's keys and values."""
        return [layer.store for layer in self.layers]

    def step(self, rows: Rows) -> None:
        """Say which slots the next forward pass extends, and from which positions."""
        for layer in self.layers:
            layer.rows = rows

    def wipe(self, slot: int, start: int) -> None:
        """Zero a slot's keys and values from position `start` on."""
        for layer in self.layers:
            layer.store.wipe(slot, start)


class _SlotLayer(CacheLayerMixin):
    """One layer over a `SlotStore`; `rows` is set before each step."""

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.store = SlotStore()
        self.rows = Rows((0,), (0,), 0)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return self.store.write(key_states, value_states, self.rows)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.rows.end, 0

    def get_seq_length(self) -> int:
        return max(self.rows.starts)

    def get_max_length(self) -> int:
        return -1


class PassingCache(Cache):
    """A cache that keeps nothing, for one pass over whole rows. Without any, transformers asks the device
    whether positions start again inside a row, and the host waits for the answer."""

    def __init__(self, layers: int) -> None:
        super().__init__(layers=[_PassingLayer() for _ in range(layers)])


class _PassingLayer(_SlotLayer):
    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0


def can_roll_back(model: Any, config: Any, name: str) -> bool:
    """Whether keys and values by position are all that the model remembers.

    Raises TargetError for a model that keeps none at all, or keeps state outside transformers' cache."""
    try:
        layers = DynamicCache(config=config).layers
    except KeyError:
        layers = []  # kinds of layers that transformers itself has no cache for
    by_position = {"DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer"}
    plain = all(type(layer).__name__ in by_position for layer in layers)
    if not any(isinstance(layer, CacheLayerMixin) for layer in layers) or (
        plain and getattr(model, "_is_stateful", False)
    ):
        raise TargetError(
            f"{name} is a state-space or recurrent model ({config.model_type}): it keeps one running state "
            "and no keys and values by position, so rejected tokens cannot be taken back",
            next_step="use a target with attention layers; plain decoding of this one is already cheap",
        )
    return plain and set(getattr(config, "layer_types", None) or ()) <= families.MASKED_LAYERS
