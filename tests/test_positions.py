"""Weights by position: what they are, and that scaling formed gradients is weighting the loss.

G blocks of up to γ positions; N rows.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import DEVICE
from deepspec.maths.head import Head
from deepspec.maths.losses import HeadLoss, head_loss
from deepspec.maths.pieces import pieces
from deepspec.maths.positions import Positions, block_weights
from reference.losses import plain_block_weights, plain_terms

LENGTHS = st.lists(st.integers(1, 5), min_size=1, max_size=6)
RULES = {"survival": "l1", "dpace": "ce"}


def layout(lengths: list[int]) -> tuple[Tensor, Tensor]:
    """(block, place) of blocks that are filled up to these lengths."""
    counts = torch.tensor(lengths)
    return torch.arange(len(lengths)).repeat_interleave(counts), torch.cat([*map(torch.arange, lengths)])


class Case:
    """Rows of blocks, with everything that can make their gradients differ."""

    def __init__(self, lengths: list[int], seed: int = 0, kept: int | None = None) -> None:
        random = torch.Generator().manual_seed(seed)

        def new(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=random, dtype=torch.float64).to(DEVICE)

        self.block, self.place = layout(lengths)
        count = len(self.block)
        ids = torch.randperm(11, generator=random)[:kept].to(DEVICE) if kept else None
        size = kept or 11
        self.hidden, self.z, self.w2 = (
            each.requires_grad_() for each in (new(count, 4), new(count, 3), new(size, 3))
        )
        self.head, self.teacher_head = Head(new(size, 4), kept=ids, softcap=5.0), Head(new(11, 6))
        self.labels = torch.randint(11, (count,), generator=random).to(DEVICE)
        self.weights = (torch.rand(count, generator=random, dtype=torch.float64) + 0.1).to(DEVICE)
        self.teacher_of = torch.randint(3, (count,), generator=random)
        self.teacher_hidden = new(3, 6)[: int(self.teacher_of.max()) + 1]

    def ours(self, rule: str, term: str, markov: bool = True, chunk_rows: int | None = None) -> HeadLoss:
        return head_loss(
            self.hidden,
            self.head,
            weights={term: self.weights},
            labels=self.labels,
            teacher_hidden=self.teacher_hidden,
            teacher_head=self.teacher_head,
            teacher_of=self.teacher_of,
            markov=(self.z, self.w2) if markov else None,
            positions=Positions(rule, self.block, self.place),
            chunk_rows=chunk_rows,
        )

    def plain(self, rule: str, term: str, markov: bool = True) -> Tensor:
        found = plain_terms(
            self.hidden,
            self.head,
            labels=self.labels,
            teacher_hidden=self.teacher_hidden[self.teacher_of.to(DEVICE)],
            teacher_head=self.teacher_head,
            markov=(self.z, self.w2) if markov else None,
        )
        factors = plain_block_weights(rule, found, self.block, self.place)
        return (factors * self.weights * found[term]).sum()

    def gradients(self, total: Tensor, markov: bool = True) -> list[Tensor]:
        return list(torch.autograd.grad(total, [self.hidden, *([self.z, self.w2] if markov else [])]))


@given(
    lengths=LENGTHS,
    seed=st.integers(0, 1000),
    rule=st.sampled_from(list(RULES)),
    term=st.sampled_from(["ce", "l1", "lk_alpha"]),
    kept=st.sampled_from([None, 6]),
    markov=st.booleans(),
    chunk_rows=st.sampled_from([1, 3, 7, None]),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_scaling_formed_gradients_is_weighting_the_loss(
    lengths: list[int],
    seed: int,
    rule: str,
    term: str,
    kept: int | None,
    markov: bool,
    chunk_rows: int | None,
) -> None:
    """The gradient of w2 adds rows up before all weights are known, if chunks cut blocks apart."""
    case = Case(lengths, seed, kept)
    ours, plain = case.ours(rule, term, markov, chunk_rows), case.plain(rule, term, markov)
    torch.testing.assert_close(ours.total, plain, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ours.rows[term].sum(), plain.detach(), rtol=1e-10, atol=1e-10)
    for found, wanted in zip(case.gradients(ours.total, markov), case.gradients(plain, markov), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10)


@given(LENGTHS, st.randoms(use_true_random=False), st.sampled_from(list(RULES)))
@settings(max_examples=60, deadline=None)
def test_block_weights_are_those_of_the_plain_loops_in_any_order_of_rows(
    lengths: list[int], random: Any, rule: str
) -> None:
    """Eagle-3's rows come step by step, and its unrolls may have gaps, which end them."""
    block, place = layout(lengths)
    order = torch.tensor(random.sample(range(len(block)), len(block)))
    order = order[: max(1, len(order) - 2)]
    rates = torch.rand(len(order), generator=torch.Generator().manual_seed(len(block)), dtype=torch.float64)
    at = Positions(rule, block[order] + 5, place[order])
    found = {"accept": rates, "ce": -rates.log(), "known": torch.ones_like(rates, dtype=torch.bool)}
    wanted = plain_block_weights(rule, found, at.block, at.place)
    torch.testing.assert_close(block_weights(at, rates, slice(0, len(order))), wanted)


def test_the_loss_by_survival_is_the_expected_accepted_length() -> None:
    """Half the L1 of a position is 1 - accept, and survival_k accept_k the chance of k accepted tokens."""
    case = Case([5, 5])
    loss = head_loss(
        case.hidden,
        case.head,
        weights={"l1": torch.full_like(case.weights, 0.5)},
        teacher_hidden=case.teacher_hidden,
        teacher_head=case.teacher_head,
        teacher_of=case.teacher_of,
        positions=Positions("survival", case.block, case.place),
    )
    assert loss.accept is not None
    accept = loss.accept.view(2, 5)
    expected = accept.cumprod(1).sum(1)
    looked_at = torch.cat([torch.ones(2, 1, dtype=accept.dtype), accept.cumprod(1)[:, :-1]], 1).sum(1)
    torch.testing.assert_close(loss.rows["l1"].view(2, 5).sum(1), looked_at - expected)


def test_dpace_is_the_gradient_of_the_expected_length_of_smoothed_probabilities() -> None:
    """The weight of -log q_k is how much the expected length grows with log q_k (equations 7 and 8)."""
    block, place = layout([4])
    rates = torch.tensor([0.9, 0.2, 0.7, 0.5], dtype=torch.float64)
    found = block_weights(Positions("dpace", block, place), rates, slice(0, 4))
    logs = (0.5 * rates + 0.5).log().requires_grad_()
    logs.cumsum(0).exp().sum().backward()
    torch.testing.assert_close(found, logs.grad)


def test_a_label_outside_a_reduced_vocabulary_ends_no_block_but_has_no_chance() -> None:
    head = Head(torch.zeros(2, 1), kept=torch.tensor([3, 1]))
    loss = head_loss(
        torch.ones(3, 1),
        head,
        weights={"ce": torch.ones(3)},
        labels=torch.tensor([3, 0, 1]),
        positions=Positions("dpace", *layout([3])),
    )
    # Probabilities 1/2, 0, 1/2, smoothed: 3/4, 1/2, 3/4.
    last = 0.75 * 0.5 * 0.75
    weights = [0.75 + 0.375 + last, last]
    assert loss.rows["ce"].tolist() == pytest.approx(
        [weights[0] * math.log(2), 0.0, weights[1] * math.log(2)]
    )


@pytest.mark.parametrize("rule", RULES)
def test_rows_without_weight_may_hold_anything(rule: str) -> None:
    case = Case([3, 4])
    dead = torch.tensor([False, False, True, False, False, True, True])
    case.weights[dead] = 0.0
    with torch.no_grad():
        case.hidden[dead] = math.nan
        case.z[dead] = math.inf
    loss = case.ours(rule, RULES[rule], chunk_rows=4)
    found = case.gradients(loss.total)
    assert loss.total.isfinite() and all(gradient.isfinite().all() for gradient in found)
    assert not found[0][dead].any() and not found[1][dead].any()


@pytest.mark.parametrize(("markov", "teachers"), [(False, 3), (True, 12)])
def test_weights_by_position_cost_no_second_pass_over_the_vocabulary(markov: bool, teachers: int) -> None:
    """Only shared teachers are lost, and only where a gradient adds rows up."""
    case, rows = Case([4, 4, 4]), {"draft": 0, "teacher": 0}

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func._overloadpacket is torch.ops.aten.mm and args[1].shape in ((4, 11), (6, 11)):
                rows["draft" if args[1].shape[0] == 4 else "teacher"] += len(args[0])
            return func(*args, **(kwargs or {}))

    with Products():
        case.ours("survival", "l1", markov)
    assert rows == {"draft": 12, "teacher": teachers}


@given(LENGTHS, st.integers(5, 12))
@settings(max_examples=60, deadline=None)
def test_chunks_hold_whole_blocks_and_every_row_once(lengths: list[int], chunk: int) -> None:
    block, _ = layout(lengths)
    found = [*pieces(len(block), chunk, None, torch.device("cpu"), block)]
    rows = [range(len(block))[piece.rows] for piece in found]
    assert [i for each in rows for i in each] == [*range(len(block))]
    assert all(0 < len(each) <= chunk for each in rows)
    assert len({(i, b) for i, each in enumerate(rows) for b in block[each].tolist()}) == len(lengths)


def test_no_rows_are_no_chunks() -> None:
    assert [*pieces(0, 4, None, torch.device("cpu"), torch.empty(0, dtype=torch.int64))] == []


@pytest.mark.parametrize("rule", RULES)
def test_a_batch_without_rows_has_no_loss(rule: str) -> None:
    empty = torch.empty(0, dtype=torch.int64)
    loss = head_loss(
        torch.empty(0, 4, requires_grad=True),
        Head(torch.ones(5, 4)),
        weights={RULES[rule]: torch.empty(0)},
        labels=empty,
        teacher_hidden=torch.empty(0, 4),
        teacher_head=Head(torch.ones(5, 4)),
        positions=Positions(rule, empty, empty),
    )
    assert loss.total.item() == 0.0
