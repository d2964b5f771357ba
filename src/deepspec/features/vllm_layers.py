"""Which layers a vLLM server gives: how it is started so that they are the right ones, and how they are
recognised.

T tokens, L layer outputs that a server gives, n layers of the target, d hidden. Here a feature is the output
of decoder layer k, counted from 0; -1 is the embedding. vLLM counts otherwise: its number j is the hidden
state after j layers, 0 is the embedding, and n the output of the last layer, before the final norm.

Written from the released source of vLLM 0.33.0, and not verified on a real server.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence

import torch
from torch import Tensor

from deepspec.errors import ServerError, TargetError
from deepspec.targets import Target
from deepspec.targets.gguf_file import find_gguf

STORAGE = "/dev/shm/deepspec-features"
"""Where vLLM leaves features for whoever asked: memory of the machine that both run on."""
SPARE = 8
"""Tokens of context beyond the longest row: the server generates one, and reserves a few."""
PROBE_TOKENS = 24
NOTED, REFUSED = 0.05, 0.25
"""Relative distances between a server's hidden states and the target's own: above the first there is a
warning, above the second the server is refused. Chosen, not measured on a server: on the pocket target,
bfloat16 alone is at most 0.013 away, and the next layer at least 0.22."""


def server_layers(layers: Sequence[int], depth: int, last_hidden: bool) -> list[int]:
    """vLLM's numbers of these layers' outputs, in their order, then the last layer's if it is needed."""
    return [layer + 1 for layer in layers] + ([depth] if last_hidden else [])


def vllm_command(
    model: str,
    wanted: Sequence[int],
    max_length: int | None = None,
    storage: str = STORAGE,
    context: int | None = None,
) -> str:
    """The `vllm serve` command that gives the wanted layers (vLLM's numbers) of rows up to `max_length`.
    context: of the model; vLLM refuses to start with more. Raises TargetError for a GGUF file."""
    if find_gguf(model) is not None:
        raise TargetError(
            f"{model} is a GGUF file, and vLLM gives features of Hugging Face directories only",
            next_step=f"run `deepspec target convert {shlex.quote(model)} --out DIR`, and use --target DIR",
        )
    layer_ids = {"eagle_aux_hidden_state_layer_ids": sorted(wanted)}  # the server keeps no order
    extraction = {
        "method": "extract_hidden_states",
        "num_speculative_tokens": 1,
        "draft_model_config": {"hf_config": layer_ids},
    }
    connector = {
        "kv_connector": "ExampleHiddenStatesConnector",
        "kv_role": "kv_producer",
        "kv_connector_extra_config": {"shared_storage_path": storage, "use_synchronization_lock": True},
    }
    lines = [
        ["vllm", "serve", model],
        ["--speculative-config", json.dumps(extraction)],
        ["--kv-transfer-config", json.dumps(connector)],
        # With prefix caching, features of too few tokens are a known fault upstream.
        ["--no-enable-prefix-caching"],
        ["--max-model-len", str(min(max_length + SPARE, context or math.inf))] if max_length else [],
    ]
    return " \\\n  ".join(shlex.join(line) for line in lines if line)


class Probe:
    """A few tokens, and the target's hidden states on them: what a server's are recognised by.

    An answer does not say which layers are in it. The states are computed once, since the target trains while
    servers are checked again.
    """

    def __init__(self, target: Target) -> None:
        depth, third = target.spec.num_layers, target.vocab_size // 3
        # From the middle of the vocabulary: special tokens lie at its ends.
        self.ids = [third + i * third // PROBE_TOKENS for i in range(PROBE_TOKENS)]
        self.target = target
        ours = target.read(torch.tensor([self.ids]), range(-1, depth - 1))
        assert ours.features is not None
        self.inner = ours.features[0].view(len(self.ids), depth, -1)
        self.last = ours.last_hidden[0]

    def columns(self, theirs: Tensor, wanted: Sequence[int]) -> tuple[tuple[int, ...], float]:
        """Which of a server's [T, L, d] are the wanted layers (vLLM's numbers), and how far off the furthest
        is.

        Each is taken for the layer of the target that it is nearest to. The last layer's output is compared
        past the final norm; n + 1 stands for one that is past it already. Raises ServerError, without where
        and next step, if a wanted one is missing or they are not this target's.
        """
        name, size, depth = self.target.spec.name, self.target.spec.hidden_size, self.inner.shape[1]
        if theirs.shape[-1] != size:
            raise ServerError(
                f"the server gives hidden states of width {theirs.shape[-1]}, and {name} has {size}"
            )
        given, furthest = [], 0.0
        for state in theirs.to(self.target.device, self.target.dtype).unbind(1):
            distances = [distance(state, self.inner[:, j]) for j in range(depth)]
            distances += [distance(self.target.finish(state), self.last), distance(state, self.last)]
            given.append(min(range(depth + 2), key=distances.__getitem__))
            furthest = max(furthest, min(distances))
        if furthest > REFUSED:
            raise ServerError(
                f"the server computes other numbers than {name} does here from the same tokens (relative "
                f"distance {furthest:.2f}): another model, other weights, or not the outputs of layers"
            )
        if not set(wanted) <= set(given):
            past = " (the last one past the final norm)" if depth + 1 in given else ""
            raise ServerError(
                f"the server gives the hidden states after {given} layers{past}, and those after "
                f"{sorted(wanted)} are needed"
            )
        return tuple(given.index(layer) for layer in wanted), furthest


def distance(a: Tensor, b: Tensor) -> float:
    """|a − b| / |b| of hidden states [T, d]: the median over tokens, because the first tokens may carry huge
    values that hide all else."""
    a, b = a.float(), b.float()
    return float(((a - b).norm(dim=-1) / b.norm(dim=-1).clamp(min=1e-9)).median())
