"""Which of the target's outputs a loss reads: what lies elsewhere changes nothing, what lies there does.

B sequences, S tokens. Batches here have holes in their masks, padding, several documents, supervised
prompts and rows with nothing to learn.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from conftest import tiny_draft
from deepspec.config import load_recipe
from deepspec.drafts import LossSettings
from deepspec.drafts.base import NeuralDraft
from deepspec.maths.blocks import (
    READ_RULES,
    FeatureBatch,
    Reads,
    context_reads,
    label_reads,
    unroll_reads,
)
from deepspec.targets import Target
from deepspec.train.build import read_rules
from reference.blocks import naive_block_reads, naive_unroll_reads

ANCHORS = 64  # more than there are candidates: every possible anchor is drawn
LOSSES = {
    "eagle3": LossSettings(ce=1.0),
    "dflash": LossSettings(ce=1.0),
    "dspark": LossSettings(ce=1.0, l1=0.9, confidence=1.0),
}
RULES = {"eagle3": ["unroll"], "dflash": ["context"], "dspark": ["context", "labels"]}
NO_TEACHER = [
    "loss.ce=1",
    "loss.lk_alpha=0",
    "loss.confidence=0",
    "draft.confidence=false",
    "draft.confidence_with_markov=false",
]
MASKS = {
    "one answer": ["00000111111111", "0001111111    "],
    "holes": ["00110111011101", "01011110100   ", "1101           "],
    "all supervised": ["11111111111111", "111111        "],
    "ends unsupervised": ["00011111110000", "00111100      "],
    "lone tokens": ["00010010100000", "00000000000001", "00000000000011"],
    "two tokens": ["11            ", "01            ", "11111111111111"],
}
DOCUMENTS = {
    "two documents": [("00111100011111", "00000011111111")],
    "an answer up to the next document": [("01111111110111", "00000111112222")],
    "documents without answers": [("00000001111000", "00011111222233"), ("111111111     ", "000000011     ")],
}


def made_batch(masks: list[str], documents: list[str] | None = None, seed: int = 0) -> FeatureBatch:
    """Random tokens, features and hidden states under hand-written masks; spaces are padding."""
    width = max(map(len, masks))
    lengths = torch.tensor([len(m.rstrip()) for m in masks])
    random = torch.Generator().manual_seed(seed)
    bits = torch.tensor([[c == "1" for c in m.ljust(width)] for m in masks])
    segments = positions = None
    if documents is not None:
        segments = torch.tensor([[int(c) if c != " " else 9 for c in d.ljust(width)] for d in documents])
        starts = torch.nn.functional.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)
        steps = torch.arange(width).expand(len(masks), width)
        positions = steps - torch.where(starts, steps, 0).cummax(1).values
    return FeatureBatch(
        input_ids=torch.randint(64, (len(masks), width), generator=random),
        loss_mask=bits,
        features=torch.randn(len(masks), width, 96, generator=random),
        last_hidden=torch.randn(len(masks), width, 32, generator=random),
        lengths=lengths,
        position_ids=positions,
        segment_ids=segments,
    )


BATCHES = {name: made_batch(masks) for name, masks in MASKS.items()} | {
    name: made_batch(*map(list, zip(*rows, strict=True))) for name, rows in DOCUMENTS.items()
}


def reads_of(batch: FeatureBatch, rules: list[str]) -> Reads:
    found = [READ_RULES[r](batch.loss_mask, batch.lengths, batch.segment_ids) for r in rules]
    return found[0] if len(found) == 1 else found[0].union(found[1])


def loss_and_gradients(draft: NeuralDraft, batch: FeatureBatch, loss: LossSettings) -> list[Tensor]:
    """Sum, weight and every parameter's gradient with all possible anchors drawn."""
    draft.zero_grad()
    plan: Any = draft.plan(batch, ANCHORS, torch.Generator().manual_seed(0))
    sums = draft(batch, loss, plan, False)
    if sums.total.requires_grad:
        sums.total.backward()
    return [sums.total.detach(), sums.weight, *(p.grad for p in draft.parameters() if p.grad is not None)]


def drafts(target: Target, algorithm: str) -> list[NeuralDraft]:
    """Every alignment, and a long and a short block or unroll length; of DFlash only one."""
    if algorithm == "eagle3":
        return [tiny_draft(target, "eagle3", block=k) for k in (1, 4)]
    made = []
    for block, from_anchor in ((4, True), (1, True), (4, False)) if algorithm == "dspark" else ((4, False),):
        draft = tiny_draft(target, algorithm, block=block)
        draft.spec = replace(draft.spec, sample_from_anchor=from_anchor)
        made.append(draft)
    return made


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("algorithm", LOSSES)
def test_what_is_not_read_changes_no_bit_of_loss_and_gradients(
    targets: dict[str, Target], algorithm: str, name: str
) -> None:
    batch, loss = BATCHES[name], LOSSES[algorithm]
    reads = reads_of(batch, RULES[algorithm])
    assert batch.last_hidden is not None
    # Features pass through dense products before masks hide them, so what is there must be finite.
    garbage = 1e3 * torch.randn(batch.features.shape, generator=torch.Generator().manual_seed(9))
    unread = batch.last_hidden.masked_fill(~reads.hidden[..., None], float("nan"))
    poisoned = replace(
        batch,
        features=torch.where(reads.features[..., None], batch.features, garbage),
        last_hidden=unread if reads.hidden.any() else None if algorithm == "dflash" else unread,
    )
    for draft in drafts(targets["llama"], algorithm):
        whole = loss_and_gradients(draft, batch, loss)
        found = loss_and_gradients(draft, poisoned, loss)
        assert len(found) == len(whole)
        assert all(torch.equal(a, b) for a, b in zip(found, whole, strict=True))


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("algorithm", LOSSES)
def test_every_position_that_is_read_can_change_the_loss(
    targets: dict[str, Target], algorithm: str, name: str
) -> None:
    batch, loss = BATCHES[name], LOSSES[algorithm]
    reads = reads_of(batch, RULES[algorithm])
    assert batch.last_hidden is not None
    draft = drafts(targets["llama"], algorithm)[0]
    draft.requires_grad_(False)
    features = batch.features.clone().requires_grad_()
    hidden = batch.last_hidden.clone()
    inputs = replace(batch, features=features, last_hidden=hidden)
    # All features at once by their gradients; the teacher is a constant to autograd, so one by one.
    plan: Any = draft.plan(inputs, ANCHORS, torch.Generator().manual_seed(0))
    sums = draft(inputs, loss, plan, False)
    moved = torch.zeros_like(reads.features)
    if sums.total.requires_grad:
        (slope,) = torch.autograd.grad(sums.total, features)
        moved = slope.abs().amax(-1) > 0
    assert moved.tolist() == reads.features.tolist()
    for row, position in reads.hidden.nonzero().tolist():
        other = hidden.clone()
        other[row, position] += 1.0
        assert draft(replace(inputs, last_hidden=other), loss, plan, False).total != sums.total


@st.composite
def rows(draw: st.DrawFn) -> tuple[list[int], list[int], int]:
    length = draw(st.integers(1, 14))
    bits = st.lists(st.integers(0, 1), min_size=length, max_size=length)
    starts = draw(bits)
    real = draw(st.integers(1, length))
    mask = [bit if i < real else 0 for i, bit in enumerate(draw(bits))]
    return mask, [sum(starts[: i + 1]) for i in range(length)], real


@given(rows(), st.booleans(), st.integers(1, 6), st.booleans())
@settings(max_examples=100, deadline=None)
def test_reads_of_block_drafts_are_those_of_every_anchor_in_turn(
    row: tuple[list[int], list[int], int], packed: bool, block: int, from_anchor: bool
) -> None:
    mask, documents, real = row
    block = block if from_anchor else block + 1
    inputs = (torch.tensor([mask]), torch.tensor([real]), torch.tensor([documents]) if packed else None)
    features, hidden = naive_block_reads(mask, documents if packed else None, block, from_anchor)
    found = context_reads(*inputs).union(label_reads(*inputs))
    assert [i for i, read in enumerate(found.features[0].tolist()) if read] == sorted(features)
    assert [i for i, read in enumerate(found.hidden[0].tolist()) if read] == sorted(hidden)


@given(rows(), st.booleans(), st.integers(1, 7))
@settings(max_examples=100, deadline=None)
def test_reads_of_eagle3_are_those_of_every_row_and_step_in_turn(
    row: tuple[list[int], list[int], int], packed: bool, steps: int
) -> None:
    mask, documents, real = row
    found = unroll_reads(
        torch.tensor([mask]), torch.tensor([real]), torch.tensor([documents]) if packed else None
    )
    features, hidden = naive_unroll_reads(mask, documents if packed else None, real, steps)
    assert [i for i, read in enumerate(found.features[0].tolist()) if read] == sorted(features)
    assert [i for i, read in enumerate(found.hidden[0].tolist()) if read] == sorted(hidden)


def test_dspark_stops_one_before_the_last_label_and_eagle3_reads_it() -> None:
    mask, lengths = torch.tensor([[0, 0, 0, 1, 1, 1, 1]]), torch.tensor([7])
    assert context_reads(mask, lengths).features.tolist() == [[True] * 5 + [False] * 2]
    assert label_reads(mask, lengths).hidden.tolist() == [[False] * 3 + [True] * 3 + [False]]
    assert unroll_reads(mask, lengths).features.tolist() == [[True] * 6 + [False]]
    assert unroll_reads(mask, lengths).hidden.tolist() == [[False] * 4 + [True] * 3]


@pytest.mark.parametrize(
    ("recipe", "changes", "rules"),
    [
        ("pocket-eagle3", [], ("unroll",)),
        ("pocket-dflash", [], ("context",)),
        ("pocket-dflash", ["loss.l1=0.5"], ("context", "labels")),
        ("pocket-dflash", ["loss.lk_alpha=0.5"], ("context", "labels")),
        ("pocket-dflash", ["loss.positions=survival"], ("context", "labels")),
        ("pocket-dflash", ["loss.positions=dpace"], ("context",)),
        ("pocket-eagle3", ["loss.ce=0", "loss.reverse_kl=1"], ("unroll",)),
        ("pocket-dspark", [], ("context", "labels")),
        (
            "pocket-dspark",
            NO_TEACHER,
            ("context",),
        ),
    ],
)
def test_a_recipe_reads_last_hidden_states_only_where_its_loss_has_a_teacher(
    recipe: str, changes: list[str], rules: tuple[str, ...]
) -> None:
    assert read_rules(load_recipe(recipe, changes)) == rules


@pytest.mark.parametrize("algorithm", ["eagle3", "dspark"])
def test_a_loss_with_a_teacher_refuses_a_batch_without_last_hidden_states(
    targets: dict[str, Target], algorithm: str
) -> None:
    batch = replace(BATCHES["one answer"], last_hidden=None)
    with pytest.raises(AssertionError, match="the source has none"):
        loss_and_gradients(tiny_draft(targets["llama"], algorithm), batch, LOSSES[algorithm])


def test_dflash_measures_by_the_data_where_there_is_no_teacher(targets: dict[str, Target]) -> None:
    batch = replace(BATCHES["one answer"], last_hidden=None)
    draft = tiny_draft(targets["llama"], "dflash")
    plan: Any = draft.plan(batch, ANCHORS, torch.Generator().manual_seed(0))
    sums = draft(batch, LOSSES["dflash"], plan, True)
    assert set((sums.metrics["accept_num"] % 1).tolist()) == {0.0}  # counts of right tokens
    assert sums.metrics["accept_den"].tolist()[0] == plan.valid[..., 0].sum()
