"""What golden numbers cannot catch: each draft against naive float64 loops and against transformers' own
layers, decoding against training, ragged slots against lone ones.

V vocabulary, S tokens, A anchors, γ slots, d hidden width, m captured layers, R rows.
"""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable, Sequence
from dataclasses import replace
from pkgutil import resolve_name
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Gemma4TextConfig, Qwen3Config
from transformers.models.gemma4 import modeling_gemma4
from transformers.models.qwen3 import modeling_qwen3

from conftest import DEVICE
from deepspec.drafts import ALGORITHMS, MARKOV_HEADS, LossSettings
from deepspec.drafts.base import LossSums
from deepspec.drafts.dflash import DFlashDraft
from deepspec.drafts.dspark import DSparkDraft
from deepspec.drafts.eagle3 import Eagle3Draft
from deepspec.drafts.layers import MLP, DraftLayer, inverse_frequencies, rotation
from deepspec.drafts.lookup import PromptLookup
from deepspec.drafts.spec import DraftSpec, LayerShape, RopeFacts, layer_shape
from deepspec.maths.blocks import FeatureBatch
from deepspec.maths.head import Embedding, Head
from deepspec.maths.slots import Rows
from deepspec.maths.verify import Sampling
from reference.drafts import naive_block_rows, naive_markov, naive_unroll
from reference.losses import plain_confidence_loss, plain_terms
from reference.step import plain_block_loss, plain_unroll_loss

VOCAB = 23
HIDDEN = 12
LAYERS = (0, 2)  # m = 2
BLOCK = 4

QWEN = LayerShape(hidden=HIDDEN, intermediate=20, heads=4, kv_heads=2, head_dim=6, attention_bias=True)
GEMMA = LayerShape(
    hidden=HIDDEN,
    intermediate=20,
    heads=4,
    kv_heads=2,
    head_dim=8,
    activation="gelu_pytorch_tanh",
    attention_scale=1.0,
    value_is_key=True,
    value_norm=True,
    sandwich=True,
    rope=RopeFacts(theta=1000.0, kind="proportional", partial=0.5),
)
SHAPES = {
    "qwen3": QWEN,
    "qwen3, no q/k norms": replace(QWEN, qk_norm=False),
    "gemma4": GEMMA,
    "gemma4, own values": replace(GEMMA, value_is_key=False),
}


def close(found: Tensor, want: Tensor) -> None:
    """Equal but for rounding: rotary angles, and Eagle-3's softmax, are float32 whatever the weights are."""
    torch.testing.assert_close(found, want, atol=5e-6, rtol=1e-5)


def make_spec(algorithm: str, family: str = "qwen3", **changes: Any) -> DraftSpec:
    return DraftSpec(
        algorithm=algorithm,
        family=family.split(",")[0],
        shape=SHAPES[family],
        num_layers=1 if algorithm == "eagle3" else 2,
        block=BLOCK,
        target_layer_ids=LAYERS,
        num_target_layers=4,
        vocab_size=VOCAB,
        mask_token_id=None if algorithm == "eagle3" else VOCAB - 1,
        **changes,
    )


def make_draft(
    algorithm: str, family: str = "qwen3", *, seed: int = 0, settled: bool = False, **changes: Any
) -> Any:
    """A float64 draft of which no number is the usual one: norms, biases and layer scalars are off too."""
    spec = make_spec(algorithm, family, **changes)
    torch.manual_seed(seed)
    draft = ALGORITHMS[algorithm].build(spec).double().to(DEVICE)
    randomise(draft)
    gemma = spec.family == "gemma4"
    embedding, head = (torch.randn(VOCAB, HIDDEN).double().to(DEVICE) for _ in range(2))
    draft.bind(
        Embedding(embedding, math.sqrt(HIDDEN) if gemma else 1.0), Head(head, softcap=5.0 if gemma else None)
    )
    if settled:
        draft.settle()
        assert (draft.lean is None) == gemma
    return draft


def randomise(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            # A vector is a norm's weight or a bias: near one, so that a norm that adds one to it shows.
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.3)
        for name, buffer in module.named_buffers():
            if name.endswith("layer_scalar"):
                buffer.fill_(0.7)


def make_dspark(markov: str = "vanilla", **changes: Any) -> Any:
    return make_draft("dspark", markov_rank=5, markov_head=markov, confidence=True, **changes)


def make_batch(lengths: tuple[int, ...] = (11, 8), width: int = 11, seed: int = 1) -> FeatureBatch:
    random = torch.Generator().manual_seed(seed)
    rows = len(lengths)
    real = torch.arange(width) < torch.tensor(lengths)[:, None]
    ids = torch.randint(0, VOCAB - 1, (rows, width), generator=random)
    features = torch.randn(rows, width, HIDDEN * len(LAYERS), generator=random).double()
    last_hidden = torch.randn(rows, width, HIDDEN, generator=random).double()
    return FeatureBatch(
        input_ids=ids * real,
        loss_mask=(torch.arange(width) >= 2) & real,
        features=(features * real[..., None]).to(DEVICE),
        last_hidden=(last_hidden * real[..., None]).to(DEVICE),
        lengths=torch.tensor(lengths),
    )


ANCHORS = torch.tensor([[2, 5, 8], [3, 6, 0]])
KEPT = torch.tensor([[True, True, True], [True, True, False]])
DSPARK_LOSS = LossSettings(ce=0.1, l1=0.9, confidence=1.0, decay_gamma=3.0)


def loss_of(draft: Any, batch: FeatureBatch, anchors: Tensor = ANCHORS, kept: Tensor = KEPT) -> LossSums:
    blocks = None if isinstance(draft, Eagle3Draft) else draft.blocks(batch, anchors, kept)
    return draft(batch, DSPARK_LOSS, blocks)


def gradients(draft: nn.Module, sums: LossSums) -> dict[str, Tensor]:
    draft.zero_grad()
    sums.total.backward()
    return {name: p.grad.clone() for name, p in draft.named_parameters() if p.grad is not None}


# ── layers against transformers ───────────────────────────────────────────────────────────────────────


def run_layer(layer: DraftLayer, x: Tensor, frequencies: Tensor) -> Tensor:
    """A draft layer as a plain causal decoder layer over [B, S, d]."""
    normed = layer.input_layernorm(x)
    turn = rotation(torch.arange(x.shape[1]), frequencies, x.dtype)
    attention = layer.self_attn
    mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
    mixed = attention.attend(attention.queries(normed, turn), *attention.keys_values(normed, turn), mask)
    return layer.finish(x, mixed)


def causal_bias(length: int) -> Tensor:
    return torch.full((1, 1, length, length), float("-inf")).triu(1)


@pytest.mark.parametrize("bias", [False, True])
def test_a_qwen3_layer_is_transformers_own(bias: bool) -> None:
    """Grouped-query heads repeated one by one (not tiled), per-head norms, biases, rotate-half."""
    raw = {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "attention_bias": bias,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"},
    }
    config = Qwen3Config(**raw, num_hidden_layers=1)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    theirs = modeling_qwen3.Qwen3DecoderLayer(config, 0).eval()
    randomise(theirs)
    shape = layer_shape(raw, "qwen3")
    ours = DraftLayer(shape)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 9, 24)
    positions = torch.arange(9)[None]
    turn = modeling_qwen3.Qwen3RotaryEmbedding(config)(x, positions)
    want = theirs(
        x, attention_mask=causal_bias(9), position_ids=positions, position_embeddings=turn, use_cache=False
    )
    with torch.no_grad():
        close(run_layer(ours, x, inverse_frequencies(shape)), want if isinstance(want, Tensor) else want[0])


@pytest.mark.parametrize("value_is_key", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_a_gemma4_layer_is_transformers_own(value_is_key: bool, bias: bool) -> None:
    """Sandwich norms, a layer scalar that is not 1, values from keys or not, scale 1, proportional rotation,
    and dimensions from the keys that belong to full attention."""
    raw = {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "num_global_key_value_heads": 2,
        "head_dim": 8,
        "global_head_dim": 16,
        "attention_bias": bias,
        "attention_k_eq_v": value_is_key,
        "rms_norm_eps": 1e-5,
        "hidden_activation": "gelu_pytorch_tanh",
        "rope_parameters": {
            "full_attention": {
                "rope_type": "proportional",
                "partial_rotary_factor": 0.25,
                "rope_theta": 300.0,
            },
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    }
    config = Gemma4TextConfig(
        **copy.deepcopy(raw),
        num_hidden_layers=1,
        layer_types=["full_attention"],
        hidden_size_per_layer_input=0,
        vocab_size=8,
    )
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    theirs = modeling_gemma4.Gemma4TextDecoderLayer(config, 0).eval()
    randomise(theirs)
    # What the published checkpoints carry beside it, nulls included (see the golden notes on families).
    polluted = {**raw["rope_parameters"], "rope_type": "default", "rope_theta": None}
    shape = layer_shape({**raw, "rope_parameters": polluted}, "gemma4")
    assert (shape.head_dim, shape.kv_heads) == (16, 2 if value_is_key else 3)
    ours = DraftLayer(shape)
    ours.load_state_dict(theirs.state_dict())
    assert ours.layer_scalar.item() == pytest.approx(0.7)
    x = torch.randn(2, 9, 24)
    positions = torch.arange(9)[None]
    rotary = modeling_gemma4.Gemma4TextRotaryEmbedding(config)
    want = theirs(
        x.clone(),
        attention_mask=causal_bias(9),
        position_ids=positions,
        position_embeddings=rotary(x, positions, "full_attention"),
        shared_kv_states={},
    )
    with torch.no_grad():
        close(run_layer(ours, x, inverse_frequencies(shape)), want if isinstance(want, Tensor) else want[0])


def test_the_embedding_factor_is_rounded_as_the_target_rounds_it() -> None:
    torch.manual_seed(0)
    scale = 48**0.5  # 6.9282, in bfloat16 6.9375
    theirs = modeling_gemma4.Gemma4TextScaledWordEmbedding(9, 48, 0, embed_scale=scale).bfloat16()
    ids = torch.arange(9)
    ours = Embedding(theirs.weight, scale)(ids)
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, theirs(ids))
    assert not torch.equal(ours, (theirs.weight.float() * scale).bfloat16()), "the case tells nothing"


def test_rotary_frequencies_stay_float32_when_a_draft_is_cast() -> None:
    draft = DFlashDraft(make_spec("dflash"))
    exact = draft.frequencies.clone()
    assert not torch.equal(exact, exact.bfloat16().float()), "the case tells nothing"
    for dtype in (torch.bfloat16, torch.float64, torch.float32):
        draft = draft.to(dtype)
        assert draft.fc.weight.dtype == dtype
        assert draft.frequencies.dtype == torch.float32
        assert torch.equal(draft.frequencies, exact)
    rounded = replace(QWEN, rope=RopeFacts(rounded=True))
    assert torch.equal(inverse_frequencies(rounded), inverse_frequencies(QWEN).bfloat16().float())


# ── heads ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn"])
def test_a_markov_head_is_a_plain_loop_over_the_slots(kind: str) -> None:
    torch.manual_seed(0)
    head = resolve_name(MARKOV_HEADS[kind])(VOCAB, 5, HIDDEN).double()
    randomise(head)
    previous = torch.randint(0, VOCAB, (2, 3, BLOCK))
    hidden = torch.randn(2, 3, BLOCK, HIDDEN).double()
    with torch.no_grad():
        found = head(head.markov_w1(previous), hidden)
        for row in range(2):
            for block in range(3):
                want = naive_markov(head, kind, previous[row, block].tolist(), hidden[row, block])
                torch.testing.assert_close(found[row, block], want)


@pytest.mark.parametrize("with_markov", [True, False])
def test_the_confidence_head_sees_the_previous_token_only_when_it_is_told_to(with_markov: bool) -> None:
    draft = make_dspark(confidence_with_markov=with_markov)
    hidden = torch.randn(BLOCK, HIDDEN).double().to(DEVICE)
    embedded = (draft.embed_previous(torch.full((BLOCK,), t, device=DEVICE)) for t in (3, 4))
    first, second = (draft.confidence_logits(each, hidden) for each in embedded)
    proj = draft.confidence_head.proj
    inputs = [hidden, draft.markov_head.markov_w1.weight[3].expand(BLOCK, -1)][: 1 + with_markov]
    torch.testing.assert_close(first, torch.cat(inputs, -1) @ proj.weight[0] + proj.bias)
    assert torch.equal(first, second) is not with_markov


# ── block drafts: the naive oracle, training, decoding ────────────────────────────────────────────────


def observe(draft: Any, slot: int, batch: FeatureBatch, row: int, start: int, end: int) -> None:
    """Commit tokens start … end-1 of a row; the token at `end` is known, and is the next anchor."""
    ids = batch.input_ids[row].tolist()
    draft.observe([slot], batch.features[row, None, start:end], [ids[start:end]], [ids[start + 1 : end + 1]])


@pytest.mark.parametrize("settled", [False, True])
@pytest.mark.parametrize("family", SHAPES)
def test_a_block_is_what_naive_loops_make_it_in_training_and_in_decoding(family: str, settled: bool) -> None:
    draft, batch = make_draft("dflash", family, settled=settled), make_batch()
    with torch.no_grad():
        trained = draft.backbone(batch, draft.blocks(batch, ANCHORS, KEPT))
        for row, column in ((0, 0), (0, 2), (1, 1)):
            anchor = int(ANCHORS[row, column])
            token = int(batch.input_ids[row, anchor])
            want = naive_block_rows(draft, batch.features[row, :anchor], token)
            close(trained[row, column], want)
            draft.open(0)
            observe(draft, 0, batch, row, 0, anchor)
            close(draft.block_hidden([0], [token])[0], want)


@pytest.mark.parametrize("sample_from_anchor", [True, False])
@pytest.mark.parametrize("markov", ["vanilla", "gated", "rnn"])
@pytest.mark.parametrize("settled", [False, True])
def test_proposals_come_from_the_distributions_that_training_makes(
    markov: str, sample_from_anchor: bool, settled: bool
) -> None:
    """A recurrent head must pass through the slots of a block as it did in training."""
    draft = make_dspark(markov, sample_from_anchor=sample_from_anchor, settled=settled)
    batch = make_batch()
    skip = 0 if sample_from_anchor else 1
    anchor = 5
    draft.open(0)
    observe(draft, 0, batch, 0, 0, anchor)
    token = int(batch.input_ids[0, anchor])
    uniforms = torch.rand(1, BLOCK - skip, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    proposal = draft.propose([0], [token], Sampling(temperature=1.0), uniforms)
    assert proposal.tokens.shape == (1, BLOCK - skip)

    # The same block in training, with the proposals as its data.
    ids = batch.input_ids.clone()
    ids[0, anchor + 1 : anchor + 1 + BLOCK - skip] = proposal.tokens[0]
    told = replace(batch, input_ids=ids, loss_mask=torch.ones_like(ids, dtype=torch.bool))
    anchors = torch.tensor([[anchor], [0]])
    blocks = draft.blocks(told, anchors, torch.tensor([[True], [False]]))
    assert blocks.labels[0, 0, skip:].tolist() == proposal.tokens[0].tolist()
    with torch.no_grad():
        hidden = draft.backbone(told, blocks)
        z = draft.markov_head(draft.embed_previous(blocks.previous), hidden)
        logits = draft.head.logits(hidden) + draft.markov_head.markov_w2(z)
        confidence = draft.confidence_logits(draft.embed_previous(blocks.previous), hidden)
    close(proposal.q[0].double(), logits[0, 0, skip:].softmax(-1))
    close(proposal.confidence[0], confidence[0, 0, skip:])


def test_both_heads_share_one_lookup_of_the_previous_tokens() -> None:
    """Each lookup has a gradient as long as the vocabulary."""
    draft, batch = make_dspark(), make_batch()
    seen, ahead = [], [draft(batch, DSPARK_LOSS, draft.blocks(batch, ANCHORS, KEPT)).total.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is not None and node not in seen:
            seen.append(node)
            ahead += [child for child, _ in node.next_functions]
    assert [node.name() for node in seen].count("EmbeddingBackward0") == 1


@pytest.mark.parametrize("sample_from_anchor", [True, False])
@pytest.mark.parametrize("markov", ["vanilla", "rnn"])
def test_the_block_loss_and_its_gradients_are_those_of_plain_autograd(
    markov: str, sample_from_anchor: bool
) -> None:
    draft, batch = make_dspark(markov, sample_from_anchor=sample_from_anchor), make_batch()
    blocks = draft.blocks(batch, ANCHORS, KEPT)
    sums = draft(batch, DSPARK_LOSS, blocks)
    found = gradients(draft, sums)

    hidden = draft.backbone(batch, blocks)
    z = draft.markov_head(draft.embed_previous(blocks.previous), hidden)
    first = 0 if sample_from_anchor else 1
    total, weight, tau, counted = torch.zeros((), device=DEVICE).double(), 0.0, 0.0, 0
    for row, column in KEPT.nonzero().tolist():
        alive, length, any_valid = 1.0, 1.0, False
        for k in range(1, BLOCK - first + 1):
            slot = (row, column, first + k - 1)
            if not blocks.valid[slot]:
                continue
            terms = plain_terms(
                hidden[slot][None],
                draft.head,
                labels=blocks.labels[slot][None],
                # The hidden state before the label, whose position is the anchor's plus k.
                teacher_hidden=batch.last_hidden[row, ANCHORS[row, column] + k - 1][None],
                teacher_head=draft.teacher_head,
                markov=(z[slot][None], draft.markov_head.markov_w2.weight),
            )
            logit = draft.confidence_logits(draft.embed_previous(blocks.previous[slot]), hidden[slot])
            accept = terms["accept"].detach()
            w = math.exp(-(k - 1) / DSPARK_LOSS.decay_gamma)
            sure = plain_confidence_loss(logit[None], accept, torch.ones(1, device=DEVICE).double())
            total = total + w * (0.1 * terms["ce"] + 0.9 * terms["l1"] + 1.0 * sure).sum()
            weight, any_valid = weight + w, True
            alive *= float(accept)
            length += alive
        tau, counted = tau + (length if any_valid else 0.0), counted + any_valid
    assert counted == 5
    close(sums.total, total)
    close(sums.weight.double().cpu(), torch.tensor(weight).double())
    close(sums.metrics["tau_num"].double().cpu(), torch.tensor(tau).double())
    assert int(sums.metrics["tau_den"]) == counted
    want = gradients(draft, LossSums(total, sums.weight, {}))
    assert found.keys() == want.keys() == dict(draft.named_parameters()).keys()
    for name, gradient in want.items():
        close(found[name], gradient)


def test_a_dflash_loss_without_measuring_stands_on_its_labels_alone() -> None:
    draft, batch = make_draft("dflash"), make_batch()
    blocks = draft.blocks(batch, ANCHORS, KEPT)
    lean, full = (draft(batch, LossSettings(ce=1.0), blocks, measure) for measure in (False, True))
    torch.testing.assert_close(lean.total, full.total)
    no_teacher = replace(batch, last_hidden=torch.full_like(batch.last_hidden, float("nan")))
    torch.testing.assert_close(draft(no_teacher, LossSettings(ce=1.0), blocks, False).total, full.total)


# ── Eagle-3: the naive oracle, training, decoding ─────────────────────────────────────────────────────


@pytest.mark.parametrize("family", SHAPES)
def test_the_unroll_is_what_naive_loops_make_it(family: str) -> None:
    draft, batch = make_draft("eagle3", family), make_batch((7, 5), 7)
    with torch.no_grad():
        states = draft.unroll(batch)
        for row, length in enumerate(batch.lengths.tolist()):
            ids = batch.input_ids[row, :length].tolist()
            for step, want in enumerate(naive_unroll(draft, batch.features[row, :length], ids)):
                # Rows that read past the end count nowhere.
                close(states[step][row, : length - step - 1], want[: length - step - 1])


@pytest.mark.parametrize("settled", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("family", SHAPES)
def test_every_decoding_step_is_an_unroll_step(family: str, residual: bool, settled: bool) -> None:
    draft = make_draft("eagle3", family, settled=settled, norm_before_residual=residual)
    batch = make_batch()
    ids = batch.input_ids[0].tolist()
    with torch.no_grad():
        states = draft.unroll(batch)
        for count in (1, 6):
            draft.open(0)
            observe(draft, 0, batch, 0, 0, count)
            hidden = draft.last_hidden[0][None, None]
            close(hidden[0, 0], states[0][0, count - 1])
            for step in range(1, BLOCK):
                # What `propose` feeds, had it drawn the tokens of the data.
                rows = Rows((0,), (count + step - 1,), 1)
                hidden = draft.advance(rows, hidden, torch.tensor([[ids[count + step]]], device=DEVICE))
                close(hidden[0, 0], states[step][0, count - 1])


@pytest.mark.parametrize("settled", [False, True])
def test_eagle_proposals_are_drawn_from_the_unrolled_states(settled: bool) -> None:
    draft, batch = make_draft("eagle3", settled=settled), make_batch()
    draft.open(0)
    observe(draft, 0, batch, 0, 0, 4)
    uniforms = torch.rand(1, BLOCK, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    proposal = draft.propose([0], [int(batch.input_ids[0, 4])], Sampling(temperature=1.0), uniforms)
    ids = batch.input_ids.clone()
    ids[0, 5 : 5 + BLOCK] = proposal.tokens[0]
    with torch.no_grad():
        states = draft.unroll(replace(batch, input_ids=ids))
        for step, state in enumerate(states):
            logits = draft.head.logits(draft.norm(state[0, 3]))
            close(proposal.q[0, step].double(), logits.softmax(-1))


# ── slots ─────────────────────────────────────────────────────────────────────────────────────────────

DRAFTS: dict[str, Callable[[], Any]] = {
    "eagle3": lambda: make_draft("eagle3"),
    "dflash": lambda: make_draft("dflash", "gemma4"),
    "dspark": lambda: make_dspark("rnn"),
}
every_draft = pytest.mark.parametrize("make", DRAFTS.values(), ids=DRAFTS.keys())
SETTLED: dict[str, Callable[[], Any]] = {
    "settled eagle3": lambda: make_draft("eagle3", settled=True),
    "settled dflash": lambda: make_draft("dflash", settled=True),
    "settled dspark": lambda: make_dspark("rnn", settled=True),
}
in_decoding = pytest.mark.parametrize("make", (DRAFTS | SETTLED).values(), ids=(DRAFTS | SETTLED).keys())


ALIKE = (Sampling(1.0),) * 3
MIXED = (Sampling(0.7, top_k=9, top_p=0.9), Sampling(), Sampling(1.0))
"""Samplings of rows 0, 1 and 2."""


def propose(
    draft: Any,
    slots: list[int],
    batch: FeatureBatch,
    rows: list[int],
    ends: list[int],
    samplings: Sequence[Sampling] = ALIKE,
) -> Any:
    uniforms = torch.stack([torch.rand(BLOCK, generator=torch.Generator().manual_seed(r)) for r in rows])
    uniforms = uniforms.to(DEVICE)
    anchors = [int(batch.input_ids[r, e]) for r, e in zip(rows, ends, strict=True)]
    chosen = [samplings[r] for r in rows]
    return draft.propose(slots, anchors, chosen, uniforms[:, : draft.max_proposals])


@in_decoding
@pytest.mark.parametrize("slots", [[0, 1, 2], [4, 0, 2]], ids=["neighbours", "scattered"])
@pytest.mark.parametrize("samplings", [ALIKE, MIXED], ids=["one sampling", "three samplings"])
def test_a_ragged_batch_of_slots_is_each_slot_alone(
    make: Callable[[], Any], slots: list[int], samplings: Sequence[Sampling]
) -> None:
    together, batch = make(), make_batch((11, 11, 11), seed=2)
    alone = [copy.deepcopy(together) for _ in slots]
    for slot, lone in zip(slots, alone, strict=True):
        together.open(slot)
        lone.open(0)
    starts = [0, 0, 0]
    for ends in ([6, 1, 3], [7, 4, 5], [8, 5, 6]):
        width = max(e - s for s, e in zip(starts, ends, strict=True))
        features = torch.full((3, width, HIDDEN * len(LAYERS)), 7.0, device=DEVICE).double()
        tokens, following = [], []
        for row, (start, end) in enumerate(zip(starts, ends, strict=True)):
            features[row, : end - start] = batch.features[row, start:end]
            tokens.append(batch.input_ids[row, start:end].tolist())
            following.append(batch.input_ids[row, start + 1 : end + 1].tolist())
            observe(alone[row], 0, batch, row, start, end)
        together.observe(slots, features, tokens, following)
        found = propose(together, slots, batch, [0, 1, 2], ends, samplings)
        for row, end in enumerate(ends):
            want = propose(alone[row], [0], batch, [row], [end], samplings)
            assert torch.equal(found.tokens[row], want.tokens[0])
            close(found.q[row], want.q[0])
            if want.confidence is not None:
                close(found.confidence[row], want.confidence[0])
        starts = ends


@in_decoding
def test_observing_in_pieces_is_observing_at_once(make: Callable[[], Any]) -> None:
    """Also with proposals in between, whose own keys must be gone, and in a slot used before."""
    whole, batch = make(), make_batch()
    pieces = copy.deepcopy(whole)
    pieces.open(0)
    observe(pieces, 0, batch, 1, 0, 7)
    whole.open(0)
    observe(whole, 0, batch, 0, 0, 9)
    pieces.open(0)
    for start, end in ((0, 1), (1, 5), (5, 6), (6, 9)):
        observe(pieces, 0, batch, 0, start, end)
        found = propose(pieces, [0], batch, [0], [end])
    want = propose(whole, [0], batch, [0], [9])
    assert torch.equal(found.tokens, want.tokens)
    close(found.q, want.q)


@in_decoding
def test_a_freed_slot_is_forgotten_and_leaves_its_neighbours(make: Callable[[], Any]) -> None:
    draft, batch = make(), make_batch((11, 11, 11), seed=2)
    for slot in range(3):
        draft.open(slot)
        observe(draft, slot, batch, slot, 0, 4 + slot)
    want = propose(draft, [0, 2], batch, [0, 2], [4, 6])
    draft.free(1)
    found = propose(draft, [0, 2], batch, [0, 2], [4, 6])
    assert torch.equal(found.q, want.q)
    assert set(draft.lengths) == {0, 2}
    assert 1 not in getattr(draft, "last_hidden", {})


class OwnMLP(MLP):
    pass


class OwnNorm(nn.RMSNorm):
    pass


class OwnLinear(nn.Linear):
    pass


class OwnEagle(Eagle3Draft):
    def _finish(self, hidden: Tensor, attended: Tensor) -> Tensor:
        return 2 * super()._finish(hidden, attended)


@pytest.mark.parametrize(
    ("algorithm", "place", "kind"),
    [
        ("dflash", "layers.1.mlp", OwnMLP),
        ("dflash", "norm", OwnNorm),
        ("dspark", "layers.0.self_attn.k_norm", OwnNorm),
        ("eagle3", "layers.0.self_attn.v_proj", OwnLinear),
        ("eagle3", "", OwnEagle),
    ],
)
def test_parts_of_a_researchers_own_class_decode_as_they_are_written(
    algorithm: str, place: str, kind: type
) -> None:
    """Lean layers know what ours compute, and would leave the rest out in silence."""
    draft = make_dspark() if algorithm == "dspark" else make_draft(algorithm)
    draft.get_submodule(place).__class__ = kind
    draft.settle()
    assert draft.lean is None


@in_decoding
def test_hooks_on_a_layer_are_called(make: Callable[[], Any]) -> None:
    draft = make()
    draft.layers[0].mlp.register_forward_hook(lambda *what: None)
    draft.settle()
    assert draft.lean is None


@pytest.mark.parametrize("make", SETTLED.values(), ids=SETTLED.keys())
@pytest.mark.parametrize(
    "change",
    [
        lambda draft: draft.load_state_dict({k: v + 1 for k, v in draft.state_dict().items()}),
        lambda draft: draft.train(),
        lambda draft: draft.requires_grad_(True),
        lambda draft: draft.to(torch.float32),
    ],
    ids=["loaded", "in training", "with gradients", "cast"],
)
def test_weights_that_may_have_changed_are_read_again(
    make: Callable[[], Any], change: Callable[[Any], Any]
) -> None:
    """Lean layers copy norms and biases, and would keep the old ones."""
    draft = make()
    change(draft)
    assert draft.lean is None


@pytest.mark.parametrize("make", SETTLED.values(), ids=SETTLED.keys())
def test_settled_draft_can_be_pickled_and_copied(make: Callable[[], Any]) -> None:
    draft, batch = make(), make_batch()
    for other in (pickle.loads(pickle.dumps(draft)), copy.deepcopy(draft)):
        for each in (draft, other):
            each.open(0)
            observe(each, 0, batch, 0, 0, 5)
        found, want = (propose(each, [0], batch, [0], [5]).q for each in (other, draft))
        assert torch.equal(found, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("algorithm", ["dflash", "eagle3"])
def test_settled_layers_are_the_modules_past_the_first_table_of_positions(
    algorithm: str, dtype: torch.dtype
) -> None:
    """Two rows, one of them past 1,024 tokens, in float32, where norms take another way, and in bfloat16."""
    draws = torch.Generator().manual_seed(4)
    ids = torch.randint(VOCAB - 1, (2, 1100), generator=draws).tolist()
    features = torch.randn(2, 1100, HIDDEN * len(LAYERS), generator=draws).to(DEVICE, dtype)
    laws = []
    for settled in (False, True):
        draft = make_draft(algorithm).to(dtype)
        draft.bind(*(type(part)(part.weight.to(dtype)) for part in (draft.embedding, draft.head)))
        if settled:
            draft.settle()
            assert draft.lean is not None
        for slot in range(2):
            draft.open(slot)
        for start, ends in ((0, (1000, 30)), (1000, (1090, 40))):
            starts = (start, min(start, 30))
            spans = list(zip(starts, ends, strict=True))
            part = torch.zeros(2, max(e - s for s, e in spans), features.shape[-1]).to(features)
            for row, (s, e) in enumerate(spans):
                part[row, : e - s] = features[row, s:e]
            tokens = [ids[row][s:e] for row, (s, e) in enumerate(spans)]
            following = [ids[row][s + 1 : e + 1] for row, (s, e) in enumerate(spans)]
            draft.observe([0, 1], part, tokens, following)
        uniforms = torch.full((2, BLOCK), 0.5, device=DEVICE)
        laws.append(draft.propose([0, 1], [ids[0][1090], ids[1][40]], Sampling(1.0), uniforms).q[:, 0])
    near = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(laws[1], laws[0], rtol=0, atol=near)


@in_decoding
def test_slot_of_a_sequence_with_nan_is_clean_for_the_next(make: Callable[[], Any]) -> None:
    """A mask hides a key that is not finite, but 0 x NaN is NaN: a longer neighbour makes a row read on."""
    draft, batch = make(), make_batch((11, 11, 11), seed=2)
    draft.open(0)
    draft.observe([0], batch.features[:1] * math.nan, [[1] * 11], [[2] * 11])
    draft.free(0)
    draft.open(0)
    draft.open(1)
    observe(draft, 0, batch, 0, 0, 2)
    observe(draft, 1, batch, 1, 0, 9)
    found = propose(draft, [0, 1], batch, [0, 1], [2, 9])
    assert bool(found.q.isfinite().all())


@in_decoding
def test_a_draft_that_moves_or_is_cast_is_not_settled_any_more(make: Callable[[], Any]) -> None:
    """What was laid out would stay where, and as narrow as, it was."""
    draft, batch = make(), make_batch()
    draft = draft.float().double()
    assert draft.lean is None
    draft.open(0)
    observe(draft, 0, batch, 0, 0, 5)
    assert bool(propose(draft, [0], batch, [0], [5]).q.isfinite().all())


@every_draft
def test_decoding_a_draft_that_is_being_trained_keeps_no_graph(make: Callable[[], Any]) -> None:
    """A held-out evaluation during training would otherwise hold every round's activations."""
    draft, batch = make().train(), make_batch()
    draft.open(0)
    observe(draft, 0, batch, 0, 0, 5)
    assert not any(s.keys.requires_grad or s.values.requires_grad for s in draft.stores)
    assert not propose(draft, [0], batch, [0], [5]).q.requires_grad


@pytest.mark.parametrize(
    "loss",
    [
        DSPARK_LOSS,
        LossSettings(ce=0.0, l1=0.5, lk_alpha=0.5, confidence=1.0, positions="survival", decay_gamma=3.0),
        LossSettings(ce=1.0, reverse_kl=0.5, lk_lambda=0.5, confidence=1.0, positions="dpace"),
    ],
    ids=["decay", "survival", "dpace"],
)
@every_draft
def test_the_loss_and_every_gradient_are_those_of_the_plain_step(
    make: Callable[[], Any], loss: LossSettings
) -> None:
    """Rows of different lengths, dummies, a teacher that several rows share: dense masks, whole logits."""
    draft, batch = make(), make_batch((30, 17), 30, seed=4)
    if loss.positions == "dpace" and not draft.algorithm.labels:
        pytest.skip("needs labels")
    plan = draft.plan(batch, 9, torch.Generator().manual_seed(0))
    found = draft(batch, loss, plan, False)
    gradients_found = gradients(draft, found)
    if plan is None:
        total = plain_unroll_loss(draft, batch, loss)
    else:
        total = plain_block_loss(draft, batch, loss, plan)
    close(found.total, total)
    for name, gradient in gradients(draft, LossSums(total, found.weight, {})).items():
        close(gradients_found[name], gradient)


# ── what may not matter ───────────────────────────────────────────────────────────────────────────────


@every_draft
def test_the_frozen_embedding_and_head_are_neither_parameters_nor_saved(make: Callable[[], Any]) -> None:
    draft = make()
    lent = {id(draft.embedding.weight), id(draft.head.weight), id(draft.teacher_head.weight)}
    assert not lent & {id(t) for t in [*draft.parameters(), *draft.buffers()]}
    saved = draft.state_dict()
    assert not [
        name for name in saved if "embed_tokens" in name or "lm_head" in name or "frequencies" in name
    ]
    assert not lent & {id(t) for t in saved.values()}
    # Saved are what is trained, and the layer scalars, which are not.
    extra = set(saved) - {name for name, _ in draft.named_parameters()}
    assert all(name.endswith("layer_scalar") for name in extra)


@pytest.mark.parametrize("make", [DRAFTS["dflash"], DRAFTS["dspark"]], ids=["dflash", "dspark"])
def test_dummy_blocks_add_nothing_to_the_loss_or_its_gradients(make: Callable[[], Any]) -> None:
    draft, batch = make(), make_batch()
    sums = loss_of(draft, batch)
    padded = loss_of(
        draft,
        batch,
        torch.cat([ANCHORS, torch.zeros_like(ANCHORS[:, :2])], dim=1),
        torch.cat([KEPT, torch.zeros_like(KEPT[:, :2])], dim=1),
    )
    torch.testing.assert_close(padded.total, sums.total)
    assert padded.metrics["tau_den"] == sums.metrics["tau_den"]
    found, want = gradients(draft, padded), gradients(draft, sums)
    for name, gradient in want.items():
        torch.testing.assert_close(found[name], gradient)
        assert gradient.isfinite().all()


@every_draft
def test_a_batch_with_nothing_supervised_has_zero_loss_and_zero_gradients(make: Callable[[], Any]) -> None:
    draft, batch = make(), make_batch()
    batch = replace(batch, loss_mask=torch.zeros_like(batch.loss_mask))
    plan = draft.plan(batch, 4, torch.Generator().manual_seed(0))
    sums = draft(batch, DSPARK_LOSS, plan)
    assert sums.total.item() == 0
    found = gradients(draft, sums)
    assert found
    assert all((g == 0).all() for g in found.values())


@every_draft
def test_padding_changes_neither_loss_nor_gradients(make: Callable[[], Any]) -> None:
    draft, batch = make(), make_batch()
    sums = loss_of(draft, batch)
    want = gradients(draft, sums)

    def wider(values: Tensor, fill: float) -> Tensor:
        return torch.cat([values, torch.full_like(values[:, :3], fill)], dim=1)

    padded = replace(
        batch,
        input_ids=wider(batch.input_ids, 5),
        loss_mask=wider(batch.loss_mask, 0),
        features=wider(batch.features, 1e3),
        last_hidden=wider(batch.last_hidden, 1e3),
    )
    found_sums = loss_of(draft, padded)
    close(found_sums.total, sums.total)
    for name, gradient in gradients(draft, found_sums).items():
        close(gradient, want[name])


@every_draft
def test_packed_documents_are_each_document_alone(make: Callable[[], Any]) -> None:
    draft, batch = make(), make_batch()
    lengths = batch.lengths.tolist()

    def packed(values: Tensor) -> Tensor:
        parts = [row[:n] for row, n in zip(values, lengths, strict=True)]
        return torch.cat([*parts, torch.zeros_like(values[0, :2])])[None]

    documents = torch.tensor([[0] * 11 + [1] * 8 + [-1] * 2])
    together = FeatureBatch(
        packed(batch.input_ids),
        # The first document supervised to its last token, which the second one follows at once.
        packed(batch.loss_mask),
        packed(batch.features),
        packed(batch.last_hidden),
        torch.tensor([19]),
        position_ids=torch.tensor([[*range(11), *range(8), 0, 0]]),
        segment_ids=documents,
    )
    anchors = torch.cat([ANCHORS[0], ANCHORS[1, :2] + 11])[None]
    every = torch.ones_like(anchors, dtype=torch.bool)
    sums, want = loss_of(draft, together, anchors, every), loss_of(draft, batch)
    close(sums.total, want.total)
    close(sums.metrics["accept_num"], want.metrics["accept_num"])
    close(sums.metrics["accept_den"], want.metrics["accept_den"])
    found = gradients(draft, sums)
    for name, gradient in gradients(draft, want).items():
        close(found[name], gradient)


def test_dspark_without_heads_is_dflash() -> None:
    dflash, batch = make_draft("dflash"), make_batch()
    dspark = DSparkDraft(make_spec("dspark")).double().to(DEVICE)
    dspark.load_state_dict(dflash.state_dict())
    dspark.bind(dflash.embedding, dflash.head)
    torch.testing.assert_close(loss_of(dspark, batch).total, loss_of(dflash, batch).total)
    found, want = [], []
    for draft, kept in ((dspark, found), (dflash, want)):
        draft.open(0)
        observe(draft, 0, batch, 0, 0, 5)
        kept.append(propose(draft, [0], batch, [0], [5]))
    assert torch.equal(found[0].tokens, want[0].tokens)
    torch.testing.assert_close(found[0].q, want[0].q)


# ── prompt lookup ─────────────────────────────────────────────────────────────────────────────────────


def looked_up(history: list[int], anchor: int, *, block: int = 4, cut: int | None = None) -> list[int]:
    lookup = PromptLookup(VOCAB, block=block, longest=3)
    lookup.open(0)
    for part in (history[:cut], history[cut:] if cut is not None else []):
        lookup.observe([0], None, [part], [[*part[1:], -1]])
    proposal = lookup.propose([0], [anchor], Sampling(), torch.zeros(1, block))
    assert proposal.q.shape == (1, block, VOCAB)
    assert torch.equal(proposal.q.argmax(-1), proposal.tokens)
    assert torch.equal(proposal.q.sum(-1), torch.ones(1, block))
    assert proposal.confidence is None
    return proposal.tokens[0].tolist()


@pytest.mark.parametrize(
    ("history", "anchor", "proposed"),
    [
        pytest.param([1, 2, 3, 9, 8, 7, 6, 1, 2], 3, [9, 8, 7, 6], id="plain copy"),
        pytest.param([1, 2, 3, 9, 1, 2], 3, [9, 1, 2, 3], id="copies up to the anchor itself"),
        pytest.param([4, 8, 4, 8], 4, [8, 4, 8, 4], id="copies what it has just proposed"),
        pytest.param([6, 5, 5, 5], 5, [5, 5, 5, 5], id="one token over and over"),
        pytest.param([1, 2, 5, 9, 2, 6, 1], 2, [5, 9, 2, 6], id="a longer match before a later one"),
        pytest.param([7, 2, 7, 3, 9, 4, 5, 6, 0], 7, [3, 9, 4, 5], id="the latest of equal matches"),
        pytest.param([1, 2, 3], 9, [9, 9, 9, 9], id="no match repeats the anchor"),
        pytest.param([5], 5, [5, 5, 5, 5], id="a match without a known continuation is none"),
        pytest.param([3, 5], 5, [5, 5, 5, 5], id="its continuation is the anchor, not yet observed"),
    ],
)
def test_prompt_lookup_copies_what_followed(history: list[int], anchor: int, proposed: list[int]) -> None:
    assert looked_up(history, anchor) == proposed
    for cut in range(1, len(history)):
        assert looked_up(history, anchor, cut=cut) == proposed, "observed in two pieces"


def test_prompt_lookup_keeps_slots_apart_and_forgets_on_open() -> None:
    lookup = PromptLookup(VOCAB, block=2)
    for slot, history in ((0, [1, 2, 3]), (1, [1, 7, 8])):
        lookup.open(slot)
        lookup.observe([slot], None, [history], [[*history[1:], 1]])
    both = lookup.propose([1, 0], [1, 1], Sampling(), torch.zeros(2, 2))
    assert both.tokens.tolist() == [[7, 8], [2, 3]]
    lookup.open(0)
    assert lookup.propose([0], [1], Sampling(), torch.zeros(1, 2)).tokens.tolist() == [[1, 1]]
    lookup.free(0)
    assert set(lookup.history) == set(lookup.seen) == {1}
