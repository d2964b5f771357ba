"""Which token a row predicts: hand-made cases whose numbers can be checked by eye, then naive loops."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deepspec.maths.blocks import (
    Blocks,
    FeatureBatch,
    anchor_candidates,
    make_blocks,
    sample_anchors,
    unroll_ids,
    unroll_masks,
    unroll_teacher_index,
)
from reference.attention import block_mask
from reference.blocks import (
    naive_attention,
    naive_block,
    naive_candidates,
    naive_dummy,
    naive_unroll_ids,
    naive_unroll_mask,
)

MASK = 99
IDS = torch.tensor([[10, 11, 12, 13, 14, 15, 16, 17]])


def mask(*values: int) -> Tensor:
    return torch.tensor([values])


def one_block(anchor: int, loss_mask: Tensor, *, sample_from_anchor: bool = True, block: int = 3) -> Blocks:
    return make_blocks(
        IDS,
        loss_mask,
        torch.tensor([[anchor]]),
        torch.tensor([[True]]),
        block=block,
        mask_token_id=MASK,
        sample_from_anchor=sample_from_anchor,
    )


# ── anchors ───────────────────────────────────────────────────────────────────────────────────────────


def test_an_anchor_and_its_next_token_are_both_supervised() -> None:
    found = anchor_candidates(mask(0, 1, 1, 0, 1, 0, 1, 1))
    assert found.tolist() == [[False, True, False, False, False, False, True]]


def test_an_anchor_never_stands_at_the_end_of_a_packed_document() -> None:
    found = anchor_candidates(mask(1, 1, 1, 1, 1, 1, 1, 1), mask(0, 0, 0, 1, 1, 2, 2, 2))
    assert found.tolist() == [[True, True, False, True, False, True, True]]


def test_rows_with_fewer_candidates_are_filled_with_dummies_at_the_end() -> None:
    loss_mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]])
    anchors, kept = sample_anchors(loss_mask, 10, torch.Generator().manual_seed(0))
    assert anchors.tolist() == [[0, 1, 2, 3], [2, 0, 0, 0], [0, 0, 0, 0]]
    assert kept.tolist() == [[True] * 4, [True, False, False, False], [False] * 4]


@pytest.mark.parametrize("length", [1, 2, 5])
def test_rows_without_any_candidate_still_get_one_dummy_column(length: int) -> None:
    anchors, kept = sample_anchors(torch.zeros(2, length, dtype=torch.long), 4, None)
    assert anchors.tolist() == [[0], [0]]
    assert kept.tolist() == [[False], [False]]


def test_anchors_are_drawn_evenly_from_all_candidates() -> None:
    loss_mask = mask(0, 1, 1, 1, 1, 0, 1, 1).expand(6000, -1)
    anchors, kept = sample_anchors(loss_mask, 2, torch.Generator().manual_seed(5))
    assert kept.all()
    counts = torch.bincount(anchors.flatten(), minlength=8).tolist()
    assert [t for t, count in enumerate(counts) if count] == [1, 2, 3, 6]
    # Each of four is in a pair with probability 1/2; five standard deviations are 5 * sqrt(6000 / 4).
    assert all(abs(counts[t] - 3000) < 194 for t in (1, 2, 3, 6))


def test_anchors_follow_from_the_generator_alone() -> None:
    loss_mask = torch.ones(3, 40, dtype=torch.long)
    first, second, other = (
        sample_anchors(loss_mask, 5, torch.Generator().manual_seed(seed))[0] for seed in (7, 7, 8)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


@st.composite
def masks_and_documents(draw: st.DrawFn) -> tuple[list[list[int]], list[list[int]] | None]:
    rows, length = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    bits = st.lists(st.integers(0, 1), min_size=length, max_size=length)
    loss_mask = draw(st.lists(bits, min_size=rows, max_size=rows))
    if not draw(st.booleans()):
        return loss_mask, None
    starts = draw(st.lists(bits, min_size=rows, max_size=rows))
    return loss_mask, [[sum(row[: i + 1]) for i in range(length)] for row in starts]


@given(masks_and_documents(), st.integers(1, 6), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_anchors_are_distinct_sorted_candidates_and_as_many_as_there_can_be(
    drawn: tuple[list[list[int]], list[list[int]] | None], wanted: int, seed: int
) -> None:
    loss_mask, documents = drawn
    segment_ids = None if documents is None else torch.tensor(documents)
    anchors, kept = sample_anchors(
        torch.tensor(loss_mask), wanted, torch.Generator().manual_seed(seed), segment_ids
    )
    candidates = [
        naive_candidates(row, None if documents is None else documents[r]) for r, row in enumerate(loss_mask)
    ]
    assert anchors.shape == kept.shape == (len(loss_mask), max(1, min(wanted, max(map(len, candidates)))))
    for row, keep, allowed in zip(anchors.tolist(), kept.tolist(), candidates, strict=True):
        count = min(wanted, len(allowed))
        assert keep == [True] * count + [False] * (len(keep) - count)
        assert row[:count] == sorted(set(row[:count]))
        assert set(row[:count]) <= set(allowed)
        assert row[count:] == [0] * (len(row) - count)


# ── slots and labels ──────────────────────────────────────────────────────────────────────────────────


def test_slot_j_predicts_the_token_after_it_when_the_anchor_proposes() -> None:
    found = one_block(2, mask(0, 0, 1, 1, 1, 1, 1, 1))
    assert found.input_ids.tolist() == [[[12, MASK, MASK]]]
    assert found.positions.tolist() == [[[2, 3, 4]]]
    assert found.labels.tolist() == [[[13, 14, 15]]]
    assert found.previous.tolist() == [[[12, 13, 14]]]
    assert found.teacher_index.tolist() == [[[2, 3, 4]]]
    assert found.valid.tolist() == [[[True, True, True]]]


def test_slot_j_predicts_its_own_token_in_the_older_layout_and_slot_0_nothing() -> None:
    found = one_block(2, mask(0, 0, 1, 1, 1, 1, 1, 1), sample_from_anchor=False)
    assert found.input_ids.tolist() == [[[12, MASK, MASK]]]
    assert found.positions.tolist() == [[[2, 3, 4]]]
    assert found.labels.tolist() == [[[12, 13, 14]]]
    assert found.previous.tolist() == [[[12, 12, 13]]]
    assert found.teacher_index.tolist() == [[[1, 2, 3]]]
    assert found.valid.tolist() == [[[False, True, True]]]


def test_labels_stop_counting_at_the_first_unsupervised_token_for_good() -> None:
    assert one_block(0, mask(1, 1, 0, 1, 1, 1, 1, 1), block=5).valid.tolist() == [
        [[True, False, False, False, False]]
    ]


def test_labels_past_the_end_do_not_count_and_are_the_last_token() -> None:
    found = one_block(5, mask(1, 1, 1, 1, 1, 1, 1, 1), block=4)
    assert found.labels.tolist() == [[[16, 17, 17, 17]]]
    assert found.valid.tolist() == [[[True, True, False, False]]]
    assert found.positions.tolist() == [[[5, 6, 7, 8]]]


def test_labels_of_the_next_packed_document_do_not_count() -> None:
    found = make_blocks(
        IDS,
        torch.ones_like(IDS),
        torch.tensor([[1]]),
        torch.tensor([[True]]),
        block=4,
        mask_token_id=MASK,
        segment_ids=mask(0, 0, 0, 0, 1, 1, 1, 1),
    )
    assert found.valid.tolist() == [[[True, True, False, False]]]


@pytest.mark.parametrize("sample_from_anchor", [True, False])
def test_a_dummy_holds_mask_tokens_only_and_counts_nowhere(sample_from_anchor: bool) -> None:
    found = make_blocks(
        IDS,
        torch.ones_like(IDS),
        torch.tensor([[0, 0]]),
        torch.tensor([[True, False]]),
        block=2,
        mask_token_id=MASK,
        sample_from_anchor=sample_from_anchor,
    )
    assert found.input_ids[0, 1].tolist() == [MASK, MASK]
    assert found.labels[0, 1].tolist() == [10, 10]
    assert found.previous[0, 1].tolist() == [10, 10]
    assert found.teacher_index[0, 1].tolist() == [0, 0]
    assert found.valid[0, 1].tolist() == [False, False]
    assert found.valid[0, 0].tolist() == [sample_from_anchor, True]


@dataclass
class Drawn:
    """Random sequences with random anchors, some of them dummies; anchors need not be candidates."""

    ids: list[list[int]]
    loss_mask: list[list[int]]
    documents: list[list[int]] | None
    anchors: list[list[int]]
    kept: list[list[bool]]
    block: int

    @property
    def segment_ids(self) -> Tensor | None:
        return None if self.documents is None else torch.tensor(self.documents)

    def document(self, row: int) -> list[int] | None:
        return None if self.documents is None else self.documents[row]

    def blocks(self, sample_from_anchor: bool = True) -> Blocks:
        return make_blocks(
            torch.tensor(self.ids),
            torch.tensor(self.loss_mask),
            torch.tensor(self.anchors),
            torch.tensor(self.kept),
            block=self.block,
            mask_token_id=MASK,
            sample_from_anchor=sample_from_anchor,
            segment_ids=self.segment_ids,
        )


@st.composite
def sequences_with_anchors(draw: st.DrawFn) -> Drawn:
    loss_mask, documents = draw(masks_and_documents())
    rows, length, count = len(loss_mask), len(loss_mask[0]), draw(st.integers(1, 3))

    def table(values: st.SearchStrategy[int], width: int) -> list[list[int]]:
        row = st.lists(values, min_size=width, max_size=width)
        return draw(st.lists(row, min_size=rows, max_size=rows))

    # Mostly supervised, or every prefix would be short.
    supervised = [
        [max(a, b) for a, b in zip(x, y, strict=True)]
        for x, y in zip(loss_mask, table(st.integers(0, 1), length), strict=True)
    ]
    kept = [[bool(k) for k in row] for row in table(st.integers(0, 1), count)]
    places = table(st.integers(0, length - 1), count)
    anchors = [
        [p if k else 0 for p, k in zip(ps, ks, strict=True)] for ps, ks in zip(places, kept, strict=True)
    ]
    ids = table(st.integers(0, 90), length)
    return Drawn(ids, supervised, documents, anchors, kept, draw(st.integers(1, 5)))


@given(sequences_with_anchors(), st.booleans())
@settings(max_examples=80, deadline=None)
def test_every_slot_is_what_a_plain_loop_makes_it(drawn: Drawn, sample_from_anchor: bool) -> None:
    found = drawn.blocks(sample_from_anchor)
    for row, (anchors, kept) in enumerate(zip(drawn.anchors, drawn.kept, strict=True)):
        for a, (anchor, keep) in enumerate(zip(anchors, kept, strict=True)):
            if keep:
                slots = naive_block(
                    drawn.ids[row],
                    drawn.loss_mask[row],
                    anchor,
                    block=drawn.block,
                    mask_token_id=MASK,
                    sample_from_anchor=sample_from_anchor,
                    documents=drawn.document(row),
                )
            else:
                slots = naive_dummy(drawn.ids[row], block=drawn.block, mask_token_id=MASK)
            for j, slot in enumerate(slots):
                assert found.input_ids[row, a, j] == slot.input_id
                assert found.positions[row, a, j] == slot.position
                assert found.labels[row, a, j] == slot.label
                assert found.previous[row, a, j] == slot.previous
                assert found.teacher_index[row, a, j] == slot.teacher_index
                assert found.valid[row, a, j] == slot.valid


# ── who sees whom ─────────────────────────────────────────────────────────────────────────────────────


def test_a_slot_sees_context_strictly_before_its_anchor_and_its_own_block_both_ways() -> None:
    blocks = make_blocks(
        IDS[:, :4],
        torch.ones(1, 4),
        torch.tensor([[2, 0]]),
        torch.tensor([[True, False]]),
        block=2,
        mask_token_id=MASK,
    )
    seen = block_mask(blocks.anchors, blocks.kept, 2, 4, None).int().tolist()
    assert seen == [
        [
            [1, 1, 0, 0, 1, 1, 0, 0],
            [1, 1, 0, 0, 1, 1, 0, 0],
            [0, 0, 0, 0, 0, 0, 1, 1],
            [0, 0, 0, 0, 0, 0, 1, 1],
        ]
    ]


@given(sequences_with_anchors())
@settings(max_examples=50, deadline=None)
def test_attention_is_what_a_plain_loop_makes_it(drawn: Drawn) -> None:
    length = len(drawn.ids[0])
    blocks = drawn.blocks()
    found = block_mask(blocks.anchors, blocks.kept, drawn.block, length, drawn.segment_ids).tolist()
    for row, (anchors, kept) in enumerate(zip(drawn.anchors, drawn.kept, strict=True)):
        assert found[row] == naive_attention(
            anchors, kept, block=drawn.block, length=length, documents=drawn.document(row)
        )


# ── the unroll of Eagle-3 ─────────────────────────────────────────────────────────────────────────────


def test_an_unroll_step_reads_tokens_shifted_once_more_and_zero_past_the_end() -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    assert [unroll_ids(ids, step).tolist() for step in (0, 1, 3)] == [
        [[6, 7, 8, 0]],
        [[7, 8, 0, 0]],
        [[0, 0, 0, 0]],
    ]


def test_the_last_real_token_supervises_nothing_and_masks_move_left_with_the_step() -> None:
    loss_mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 0, 0]], dtype=torch.bool)
    found = unroll_masks(loss_mask, torch.tensor([5, 3]), 3).int().tolist()
    assert found == [
        [[0, 1, 1, 1, 0], [1, 1, 0, 0, 0]],
        [[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]],
        [[1, 1, 0, 0, 0], [0, 0, 0, 0, 0]],
    ]
    assert loss_mask[0, 4] and loss_mask[1, 2], "the batch's own mask must stay as it is"


def test_row_i_learns_the_distribution_after_the_token_it_read() -> None:
    assert unroll_teacher_index(5, 0).tolist() == [1, 2, 3, 4, 4]
    assert unroll_teacher_index(5, 2).tolist() == [3, 4, 4, 4, 4]


@given(masks_and_documents(), st.integers(1, 4), st.data())
@settings(max_examples=50, deadline=None)
def test_unroll_ids_and_masks_are_what_plain_loops_make_them(
    drawn: tuple[list[list[int]], list[list[int]] | None], steps: int, data: st.DataObject
) -> None:
    loss_mask, _ = drawn
    width = len(loss_mask[0])
    lengths = [data.draw(st.integers(1, width)) for _ in loss_mask]
    padded = [
        [m if i < n else 0 for i, m in enumerate(row)] for row, n in zip(loss_mask, lengths, strict=True)
    ]
    ids = [data.draw(st.lists(st.integers(1, 9), min_size=width, max_size=width)) for _ in padded]
    found = unroll_masks(torch.tensor(padded), torch.tensor(lengths), steps)
    for step in range(steps):
        assert found[step].tolist() == [
            naive_unroll_mask(row, n, step) for row, n in zip(padded, lengths, strict=True)
        ]
        assert unroll_ids(torch.tensor(ids), step).tolist() == [naive_unroll_ids(row, step) for row in ids]


def test_a_batch_counts_its_real_tokens_only() -> None:
    batch = FeatureBatch(
        torch.zeros(2, 5), torch.zeros(2, 5), torch.zeros(2, 5, 1), torch.zeros(2, 5, 1), torch.tensor([5, 3])
    )
    assert batch.tokens == 8
