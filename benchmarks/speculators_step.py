"""A training step of the `speculators` package (0.9.0) at the sizes of one of `train_step.py`'s cases.

The package is no dependency of ours: install it where the benchmark can import it. Its models are built
without a target's files: embedding and head are the draft's. Its losses are those of its own modules, written
in torch (`eager`); attention is torch's, with a mask, as its flex attention does not train on a CPU. Its
models draw their own anchors, and take one row of packed documents.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from deepspec.drafts.base import NeuralDraft
from deepspec.maths.blocks import FeatureBatch

LOSS_NAMES = {"dspark": '{"ce": 0.1, "tv": 0.9}', "dflash": "ce", "eagle3": "kl_div"}


def peer_loss(case: Any, draft: NeuralDraft) -> tuple[nn.Module, Callable[[FeatureBatch, Any], Tensor]]:
    """A model of its package, and its loss of a batch."""
    from speculators.config import SpeculatorsConfig, VerifierConfig
    from speculators.losses import resolve_loss_config
    from speculators.proposals.greedy import GreedyTokenProposalConfig
    from transformers import Qwen3Config

    layer = Qwen3Config(
        hidden_size=case.hidden,
        intermediate_size=3 * case.hidden,
        num_hidden_layers=case.layers,
        num_attention_heads=case.heads,
        num_key_value_heads=case.heads // 2,
        head_dim=case.head_dim,
        vocab_size=case.vocab,
        max_position_embeddings=2 * case.sequences * case.length,
        attn_implementation="sdpa",
    )
    about = SpeculatorsConfig(
        algorithm=case.algorithm,
        proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=case.block)],
        default_proposal_method="greedy",
        verifier=VerifierConfig(name_or_path=None, architectures=["Qwen3ForCausalLM"]),
    )
    shape = {
        "transformer_layer_config": layer,
        "draft_vocab_size": case.vocab,
        "speculators_config": about,
    }
    model = _model(case, shape, draft)
    for name in ("embed_tokens", "lm_head", "verifier_lm_head"):
        getattr(model, name).weight = nn.Parameter(draft.head.weight, requires_grad=False)
    words: dict[str, Any] = {"loss_config": resolve_loss_config(LOSS_NAMES[case.algorithm], "eager")}
    if case.algorithm == "eagle3":
        words["ttt_steps"] = case.block
    else:
        words["max_anchors"] = case.anchors * case.sequences
    if case.algorithm == "dspark":
        words["tv_loss_fn"] = resolve_loss_config("tv", "eager")["tv"][0]

    def loss_of(batch: FeatureBatch, plan: Any) -> Tensor:
        rows, length = batch.input_ids.shape
        assert batch.last_hidden is not None
        found: Tensor = model(
            hidden_states=batch.features.reshape(1, rows * length, -1),
            input_ids=batch.input_ids.reshape(1, -1),
            loss_mask=batch.loss_mask.reshape(1, -1),
            verifier_last_hidden_states=batch.last_hidden.reshape(1, rows * length, -1),
            document_ids=torch.arange(rows).repeat_interleave(length)[None],
            position_ids=torch.arange(length).repeat(rows)[None],
            **words,
        )[1]
        return found

    return model, loss_of


def _model(case: Any, shape: dict[str, Any], draft: NeuralDraft) -> nn.Module:
    layers = list(draft.feature_layers)
    if case.algorithm == "eagle3":
        from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig

        return Eagle3DraftModel(Eagle3SpeculatorConfig(eagle_aux_hidden_state_layer_ids=layers, **shape))
    shape |= {
        "block_size": case.block,
        "aux_hidden_state_layer_ids": layers,
        "mask_token_id": 3,
        "sample_from_anchor": True,
    }
    if case.algorithm == "dflash":
        from speculators.models.dflash import DFlashDraftModel, DFlashSpeculatorConfig

        return DFlashDraftModel(DFlashSpeculatorConfig(**shape))
    from speculators.models.dspark import DSparkDraftModel, DSparkSpeculatorConfig

    return DSparkDraftModel(DSparkSpeculatorConfig(markov_rank=min(case.rank, case.hidden), **shape))
