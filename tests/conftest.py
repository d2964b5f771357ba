"""Tiny random targets on disk, drafts for them, and two drafts that tests can steer.

The targets are real `transformers` models of three families, small enough to load in a blink; their norms,
scales and biases are moved off their initial values, so that leaving one out shows.
"""

from __future__ import annotations

import os

# Tensors here are tiny, so that a second thread only waits; and a forked child would wait for it for ever.
os.environ["OMP_NUM_THREADS"] = "1"
# Before anything imports the Hub client: no test may reach a network.
os.environ["HF_HUB_OFFLINE"] = "1"

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.testing
from torch import Tensor
from transformers import (
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from deepspec.checkpoints.draft import new_draft
from deepspec.drafts import LossSettings
from deepspec.drafts.base import NeuralDraft, Proposal, choose
from deepspec.drafts.spec import new_spec
from deepspec.maths.blocks import FeatureBatch
from deepspec.maths.verify import Samplings
from deepspec.targets import Target

# To make the commands of an app takes a twentieth of a second, and hundreds of tests call them.
typer.testing._get_command = functools.cache(typer.testing._get_command)

DEVICE = os.environ.get("DEEPSPEC_TEST_DEVICE", "cpu")
"""Where targets, drafts and losses run in the tests that name it."""
FAMILIES = ("llama", "qwen3", "gemma4")
ALGORITHMS = ("eagle3", "dflash", "dspark")
MASK_TOKEN = 3
SLIDING_WINDOW = 6
"""Of the Gemma-4 target: shorter than the prompts of the tests."""


def llama(vocab_size: int = 64) -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=False,
            initializer_range=0.2,
        )
    )


def qwen3() -> PreTrainedModel:
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=96,
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=5,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            initializer_range=0.2,
        )
    )


def gemma4() -> PreTrainedModel:
    sliding, full = "sliding_attention", "full_attention"
    return Gemma4ForCausalLM(
        Gemma4TextConfig(
            vocab_size=80,
            vocab_size_per_layer_input=80,
            hidden_size=32,
            hidden_size_per_layer_input=0,
            intermediate_size=48,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_global_key_value_heads=1,
            num_kv_shared_layers=0,
            head_dim=8,
            global_head_dim=16,
            attention_k_eq_v=True,
            layer_types=[sliding, sliding, full, sliding, sliding, full],
            sliding_window=SLIDING_WINDOW,
            final_logit_softcapping=2.5,
            max_position_embeddings=256,
            initializer_range=0.2,
            enable_moe_block=False,
            use_double_wide_mlp=False,
            rope_parameters={
                full: {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.5},
                sliding: {"rope_type": "default", "rope_theta": 1e4},
            },
        )
    )


MODELS: dict[str, Callable[[], PreTrainedModel]] = {"llama": llama, "qwen3": qwen3, "gemma4": gemma4}


def save_tiny(build: Callable[[], PreTrainedModel], path: Path, seed: int = 0) -> Path:
    """Build a model from a seed, move its one-dimensional weights off their initial values, and save it."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = build()
        vectors = [p for p in model.parameters() if p.dim() == 1]
        scalars = [b for name, b in model.named_buffers() if name.endswith("layer_scalar")]
        for values in [*vectors, *scalars]:
            values.add_(0.2 * torch.randn_like(values))
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def target_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One directory per family: config and weights, no tokenizer."""
    root = tmp_path_factory.mktemp("targets")
    return {name: save_tiny(build, root / name) for name, build in MODELS.items()}


@pytest.fixture(scope="session")
def targets(target_dirs: dict[str, Path]) -> dict[str, Target]:
    """The tiny targets in float32. Shared by all tests: open a slot before using it.

    They have no stop tokens: random weights write those of their generation configs by chance."""
    found = {n: Target.from_pretrained(p, dtype="float32", device=DEVICE) for n, p in target_dirs.items()}
    for target in found.values():
        target.model.generation_config.eos_token_id = None
    return found


def tiny_draft(target: Target, algorithm: str, *, seed: int = 0, **facts: Any) -> NeuralDraft:
    """A random draft for a target; `facts` replace those of a small default."""
    deep = algorithm != "eagle3"
    settings: dict[str, Any] = {
        "num_layers": 2 if deep else 1,
        "block": 4,
        "target_layer_ids": [0, 1, 2],
        "mask_token_id": MASK_TOKEN if deep else None,
    }
    if algorithm == "dspark":
        settings |= {"markov_rank": 8, "confidence": True}
    spec = new_spec(target.spec.config, algorithm=algorithm, **{**settings, **facts})
    draft = new_draft(spec, target, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        # Norms and zero-initialised heads off their initial values, so that each of them counts.
        for values in draft.state_dict().values():
            values.add_(0.1 * torch.randn(values.shape, generator=generator).to(values.device))
    return draft


class NoisyTarget:
    """A draft that proposes from the target's own distribution, its logits moved by fixed noise.

    The noise depends on the previous token only, so proposals are a function of the prefix (and of the
    uniforms); `noise` sets how often they are accepted. It reads the whole prefix again for each proposal.
    """

    name = "noisy-target"
    feature_layers: tuple[int, ...] = ()

    def __init__(self, target: Target, block: int = 4, noise: float = 1.0) -> None:
        self.target, self.max_proposals = target, block
        generator = torch.Generator().manual_seed(7)
        random = torch.randn(target.vocab_size, target.vocab_size, generator=generator)
        self.noise = noise * random.to(target.device)
        self.history: dict[int, list[int]] = {}
        self.closed: dict[int, list[int]] = {}
        """What each freed slot had seen."""

    def open(self, slot: int) -> None:
        self.history[slot] = []

    def free(self, slot: int) -> None:
        self.closed[slot] = self.history.pop(slot)

    def observe(
        self,
        slots: Sequence[int],
        features: Tensor | None,
        tokens: Sequence[Sequence[int]],
        next_tokens: Sequence[Sequence[int]],
    ) -> None:
        for slot, new in zip(slots, tokens, strict=True):
            self.history[slot].extend(new)

    def propose(
        self, slots: Sequence[int], anchors: Sequence[int], samplings: Samplings, uniforms: Tensor
    ) -> Proposal:
        prefixes = [[*self.history[s], a] for s, a in zip(slots, anchors, strict=True)]
        columns: list[tuple[Tensor, Tensor]] = []
        for step in range(self.max_proposals):
            width = max(map(len, prefixes))
            padded = torch.tensor([p + [0] * (width - len(p)) for p in prefixes])
            hidden = self.target.read(padded, ()).last_hidden
            ends = torch.tensor([len(p) - 1 for p in prefixes])
            logits = self.target.logits(hidden[torch.arange(len(prefixes)), ends])
            logits = logits + self.noise[torch.tensor([p[-1] for p in prefixes])]
            columns.append(choose(logits, samplings, uniforms[:, step]))
            for prefix, token in zip(prefixes, columns[-1][0].tolist(), strict=True):
                prefix.append(token)
        tokens, q = zip(*columns, strict=True)
        return Proposal(torch.stack(tokens, dim=1), torch.stack(q, dim=1), None)


class TableDraft:
    """A draft that knows nothing but a table of logits [V, V], one row per previous token."""

    name = "table"
    feature_layers: tuple[int, ...] = ()

    def __init__(self, logits: Tensor, block: int) -> None:
        self.logits, self.max_proposals = logits.to(DEVICE), block

    def open(self, slot: int) -> None:
        pass

    def free(self, slot: int) -> None:
        pass

    def observe(
        self,
        slots: Sequence[int],
        features: Tensor | None,
        tokens: Sequence[Sequence[int]],
        next_tokens: Sequence[Sequence[int]],
    ) -> None:
        pass

    def propose(
        self, slots: Sequence[int], anchors: Sequence[int], samplings: Samplings, uniforms: Tensor
    ) -> Proposal:
        previous, columns = torch.tensor(list(anchors), device=DEVICE), []
        for step in range(self.max_proposals):
            previous, q = choose(self.logits[previous], samplings, uniforms[:, step])
            columns.append((previous, q))
        tokens, q_all = zip(*columns, strict=True)
        return Proposal(torch.stack(tokens, dim=1), torch.stack(q_all, dim=1), None)


def prompts_of(target: Target, lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    """Random prompts of the given lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(target.vocab_size, (n,), generator=generator).tolist() for n in lengths]


def teach(draft: NeuralDraft, target: Target, rows: Sequence[Sequence[int]], steps: int) -> NeuralDraft:
    """Fit a draft to a few token sequences: some steps make it right sometimes, many nearly always."""
    width = max(map(len, rows))
    ids = torch.tensor([[*r, *[0] * (width - len(r))] for r in rows])
    lengths = torch.tensor([len(r) for r in rows])
    found = target.read(ids, draft.feature_layers)
    assert found.features is not None
    real = torch.arange(width) < lengths[:, None]
    batch = FeatureBatch(ids, real, found.features, found.last_hidden, lengths)
    optimiser = torch.optim.AdamW(draft.parameters(), lr=2e-2, weight_decay=0, fused=True)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        sums = draft(batch, LossSettings(ce=1.0), draft.plan(batch, 32, generator), measure=False)
        (sums.total / sums.weight).backward()
        optimiser.step()
        optimiser.zero_grad()
    return draft.requires_grad_(False)
