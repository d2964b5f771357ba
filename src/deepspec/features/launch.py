"""How vLLM and SGLang are started so that they hand out target features: command lines, and layer numbers.

Here a feature is the output of decoder layer k, counted from 0; -1 is the embedding. vLLM numbers the stream
between layers: j is the stream after j layers, 0 the embedding, and the target's depth n the stream after the
last layer, before the final norm. SGLang's DFLASH convention counts as we do, and knows no embedding.

Written from the released vLLM 0.33.0 and SGLang 0.5.23, and not verified on a real server.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence

from deepspec.errors import ServerError

STORAGE = "/dev/shm/deepspec-features"
"""Where vLLM leaves features for whoever asked: memory of the machine that both run on."""
SPARE = 8
"""Tokens of context beyond the longest row: the servers generate one, and reserve a few."""


def stream_ids(layers: Sequence[int], depth: int, last_hidden: bool) -> list[int]:
    """vLLM's numbers of these layers' outputs, in their order, and then the last layer's if asked for."""
    return [layer + 1 for layer in layers] + ([depth] if last_hidden else [])


def vllm_command(
    model: str,
    layers: Sequence[int],
    depth: int,
    *,
    last_hidden: bool = True,
    max_length: int | None = None,
    storage: str = STORAGE,
) -> str:
    """The `vllm serve` line that gives these layers of a target of `depth` layers.

    last_hidden: whether the recipe's loss reads the target's distribution. max_length: longest row in tokens.
    """
    # Sorted: the server keeps no order.
    layer_ids = {"eagle_aux_hidden_state_layer_ids": sorted(stream_ids(layers, depth, last_hidden))}
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
    return _lines(
        ["vllm", "serve", model],
        ["--speculative-config", json.dumps(extraction)],
        ["--kv-transfer-config", json.dumps(connector)],
        # With prefix caching, features of too few tokens are a known fault upstream.
        ["--no-enable-prefix-caching"],
        ["--max-model-len", str(max_length + SPARE)] if max_length else [],
    )


def sglang_command(
    model: str, layers: Sequence[int], *, last_hidden: bool = False, max_length: int | None = None
) -> str:
    """The `sglang.launch_server` line that gives these layers. Raises ServerError for what it cannot give."""
    refuse_sglang(layers, last_hidden)
    return _lines(
        ["python", "-m", "sglang.launch_server", "--model-path", model],
        ["--enable-return-aux-hidden-states", "--speculative-algorithm", "DFLASH"],
        ["--return-aux-hidden-state-layer-ids", *map(str, sorted(layers))],
        # What comes back is what a request computes itself, in the last chunk of its prompt.
        ["--disable-radix-cache", "--chunked-prefill-size", "-1"],
        ["--context-length", str(max_length + SPARE)] if max_length else [],
    )


def refuse_sglang(layers: Sequence[int], last_hidden: bool) -> None:
    """Raise ServerError where SGLang's routes cannot give what a recipe reads."""
    instead = "take features from vLLM (data.features=vllm:URL), from a cache, or `online`"
    if last_hidden:
        raise ServerError(
            "SGLang returns either inner layers or the last hidden state, never both, and this recipe's loss "
            "reads the target's distribution, which comes from the last",
            next_step=f"{instead}; DFlash with cross-entropy alone (loss.l1=0) needs no last hidden state",
        )
    if -1 in layers:
        raise ServerError(
            "SGLang returns outputs of layers only, and this draft also reads the embedding (layer -1)",
            next_step=f"{instead}, or leave -1 out of draft.target_layer_ids",
        )


def _lines(*parts: Sequence[str]) -> str:
    """One shell command over several lines."""
    return " \\\n  ".join(shlex.join(part) for part in parts if part)
