"""The chunked head and losses against plain float64 autograd, and the promise that nothing wide is kept."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from conftest import DEVICE
from deepspec.drafts.heads import confidence_loss
from deepspec.maths import figures, losses
from deepspec.maths.chunking import cpu_block_rows, default_chunk_rows
from deepspec.maths.head import Head
from deepspec.maths.losses import (
    HeadLoss,
    head_loss,
)
from deepspec.maths.pieces import pieces
from deepspec.maths.positions import position_weights
from deepspec.maths.terms import TERMS
from reference.losses import plain_confidence_loss, plain_logits, plain_terms

EVERY_TERM = list(TERMS)
DSPARK = ["ce", "l1"]


@dataclass
class Case:
    """One set of inputs, as `head_loss` takes them."""

    hidden: Tensor
    head: Head
    weights: dict[str, Tensor]
    labels: Tensor
    teacher_hidden: Tensor
    teacher_head: Head
    z: Tensor | None
    w2: Tensor | None

    def inputs(self) -> list[Tensor]:
        return [tensor for tensor in (self.hidden, self.z, self.w2) if tensor is not None]

    def arguments(self) -> dict[str, Any]:
        return {
            "labels": self.labels,
            "teacher_hidden": self.teacher_hidden,
            "teacher_head": self.teacher_head,
            "markov": None if self.z is None else (self.z, self.w2),
        }

    def ours(self, chunk_rows: int | None = None) -> HeadLoss:
        return head_loss(
            self.hidden, self.head, weights=self.weights, chunk_rows=chunk_rows, **self.arguments()
        )

    def plain_total(self) -> Tensor:
        found = plain_terms(self.hidden, self.head, **self.arguments())
        return sum((weight * found[term]).sum() for term, weight in self.weights.items())


def make_case(
    terms: list[str],
    *,
    seed: int = 0,
    rows: int = 7,
    vocab: int = 13,
    kept: int | None = None,
    bias: bool = True,
    scale: float = 1.0,
    softcap: float | None = None,
    markov: bool = True,
    dtype: torch.dtype = torch.float64,
) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def new(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)

    width, rank = 5, 3
    teacher_head = Head(new(vocab, width + 1), new(vocab) if bias else None, scale, softcap)
    size = kept or vocab
    ids = torch.randperm(vocab, generator=generator)[:size].to(DEVICE) if kept else None
    head = Head(new(size, width), new(size) if bias else None, scale, softcap, ids)
    return Case(
        hidden=new(rows, width).requires_grad_(),
        head=head,
        weights={
            term: (torch.rand(rows, generator=generator, dtype=torch.float64) + 0.1).to(DEVICE)
            for term in terms
        },
        labels=torch.randint(vocab, (rows,), generator=generator).to(DEVICE),
        teacher_hidden=new(rows, width + 1),
        teacher_head=teacher_head,
        z=new(rows, rank).requires_grad_() if markov else None,
        w2=new(size, rank).requires_grad_() if markov else None,
    )


def gradients(total: Tensor, case: Case) -> list[Tensor]:
    return list(torch.autograd.grad(total, case.inputs()))


def assert_close(ours: list[Tensor], theirs: list[Tensor], tolerance: float) -> None:
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)


@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 9),
    vocab=st.integers(2, 17),
    reduced=st.booleans(),
    bias=st.booleans(),
    scale=st.sampled_from([1.0, 0.3, 2.5]),
    softcap=st.sampled_from([None, 1.5, 30.0]),
    markov=st.booleans(),
    terms=st.sets(st.sampled_from(EVERY_TERM), min_size=1),
    chunk_rows=st.sampled_from([1, 2, 4, None]),
    cpu=st.booleans(),
)
@settings(max_examples=90, deadline=None, derandomize=True)
def test_values_and_gradients_match_autograd_over_whole_logits(
    seed: int,
    rows: int,
    vocab: int,
    reduced: bool,
    terms: set[str],
    chunk_rows: int | None,
    cpu: bool,
    **shape: Any,
) -> None:
    kept = max(1, vocab // 2) if reduced else None
    case = make_case(sorted(terms), seed=seed, rows=rows, vocab=vocab, kept=kept, **shape)
    with patch.object(figures, "on_cpu", lambda x: cpu):  # an accelerator's operations run here too
        ours = case.ours(chunk_rows)
    found = plain_terms(case.hidden, case.head, **case.arguments())
    for term, weight in case.weights.items():
        torch.testing.assert_close(ours.terms[term], (weight * found[term]).sum().detach())
    torch.testing.assert_close(ours.accept, found["accept"])
    assert torch.equal(ours.correct, found["correct"])
    assert_close([ours.total], [case.plain_total()], 1e-10)
    # The upstream factor is not one: a trainer divides the sum by its weight.
    assert_close(gradients(ours.total * -0.37, case), gradients(case.plain_total() * -0.37, case), 1e-10)


# `lk_lambda` mixes its parts by a weight without gradient, which finite differences cannot leave out.
@pytest.mark.parametrize("term", [term for term in EVERY_TERM if term != "lk_lambda"])
@pytest.mark.parametrize("kept", [None, 4])
def test_float64_rows_stay_in_float64_maths(term: str, kept: int | None) -> None:
    case = make_case([term], rows=3, vocab=7, kept=kept, softcap=3.0, scale=0.7)

    def total(hidden: Tensor, z: Tensor, w2: Tensor) -> Tensor:
        return replace(case, hidden=hidden, z=z, w2=w2).ours(chunk_rows=2).total

    assert torch.autograd.gradcheck(total, (case.hidden, case.z, case.w2))


@pytest.mark.parametrize("terms", [[term] for term in EVERY_TERM] + [["ce", "kl", "l1"]])
def test_bfloat16_gradients_of_logits_are_rounded_once(
    terms: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are written in bfloat16 at once: an entry at a label that took its share afterwards would be
    rounded twice."""
    case = make_case(terms, rows=16, vocab=40, bias=False, markov=False, dtype=torch.bfloat16)
    seen: dict[bool, Tensor] = {}
    real = losses._products

    def products(task: Any, piece: Any, gradient: Tensor, *rest: Any) -> None:
        seen[gradient.dtype == torch.bfloat16] = gradient.clone()
        real(task, piece, gradient, *rest)

    monkeypatch.setattr(losses, "_products", products)
    case.ours(16)
    wide = replace(case.head, softcap=1e30)  # which keeps the gradient in float32 until it is scaled
    replace(case, head=wide).ours(16)
    assert torch.equal(seen[True], seen[False].bfloat16())


@pytest.mark.parametrize("kept", [None, 9])
def test_chunk_size_changes_nothing(kept: int | None) -> None:
    case = make_case(EVERY_TERM, rows=8, vocab=31, kept=kept, softcap=5.0, dtype=torch.float32)
    whole = case.ours(chunk_rows=8)
    whole_gradients = gradients(whole.total, case)
    for chunk_rows in (1, 3):
        parts = case.ours(chunk_rows)
        assert_close([parts.total, parts.accept], [whole.total, whole.accept], 1e-6)
        assert_close(list(parts.terms.values()), list(whole.terms.values()), 1e-6)
        assert torch.equal(parts.correct, whole.correct)
        assert_close(gradients(parts.total, case), whole_gradients, 1e-6)


def test_float32_rows_agree_with_float64_oracle_at_a_wide_vocabulary() -> None:
    case = make_case(DSPARK, rows=6, vocab=5000, dtype=torch.float32)
    exact = make_case(DSPARK, rows=6, vocab=5000)
    ours = case.ours(4)
    assert_close([ours.total.double()], [exact.plain_total()], 1e-5)
    assert_close(
        [g.double() for g in gradients(ours.total, case)], gradients(exact.plain_total(), exact), 2e-5
    )


def test_bfloat16_rows_get_bfloat16_gradients_and_float32_losses() -> None:
    """Guards a softmax in bfloat16: its error would be some hundred times what is allowed here."""
    case = make_case(DSPARK, rows=16, vocab=40, markov=False, bias=False, dtype=torch.bfloat16)
    ours = case.ours(chunk_rows=5)
    assert ours.total.dtype == torch.float32
    (gradient,) = gradients(ours.total, case)
    assert gradient.dtype == torch.bfloat16

    # The products round to bfloat16; from there on the oracle goes on exactly.
    logits = (case.hidden @ case.head.weight.T).detach().double().requires_grad_()
    teacher = torch.softmax((case.teacher_hidden @ case.teacher_head.weight.T).double(), 1)
    log_p = torch.log_softmax(logits, 1)
    ce = -log_p.gather(1, case.labels[:, None]).squeeze(1)
    l1 = (log_p.exp() - teacher).abs().sum(1)
    total = (case.weights["ce"] * ce + case.weights["l1"] * l1).sum()
    assert ours.total.item() == pytest.approx(total.item(), rel=1e-6)
    (d_logits,) = torch.autograd.grad(total, logits)
    expected = d_logits @ case.head.weight.double()
    torch.testing.assert_close(gradient.double(), expected, rtol=0.02, atol=0.02)


def test_bfloat16_markov_head_gets_its_own_dtype_back() -> None:
    case = make_case(DSPARK, dtype=torch.bfloat16)
    assert [g.dtype for g in gradients(case.ours().total, case)] == [torch.bfloat16] * 3


def test_markov_bias_is_added_after_the_soft_cap() -> None:
    """Under a soft-cap of 1 the head's logits stay within 1; a bias of 50 must come through whole."""
    head = Head(torch.randn(4, 3), softcap=1.0)
    z, w2 = torch.ones(1, 1), torch.tensor([[0.0], [50.0], [0.0], [0.0]])
    loss = head_loss(
        torch.randn(1, 3), head, weights={"ce": torch.ones(1)}, labels=torch.tensor([0]), markov=(z, w2)
    )
    assert 48.0 <= loss.total.item() <= 52.0


def test_head_logits_are_what_the_losses_use() -> None:
    for softcap in (None, 2.0):
        head = make_case(["ce"], softcap=softcap, scale=0.5).head
        hidden = torch.randn(2, 3, 5, dtype=torch.float64)
        torch.testing.assert_close(head.logits(hidden), plain_logits(hidden, head))


def test_label_outside_the_kept_ids_adds_nothing() -> None:
    head = Head(torch.randn(2, 3), kept=torch.tensor([7, 4]))
    hidden = torch.randn(3, 3, requires_grad=True)
    loss = head_loss(hidden, head, weights={"ce": torch.ones(3)}, labels=torch.tensor([4, 0, 7]))
    loss.total.backward()
    log_p = torch.log_softmax(hidden @ head.weight.T, 1)
    torch.testing.assert_close(loss.total, -(log_p[0, 1] + log_p[2, 0]))
    assert torch.equal(hidden.grad[1], torch.zeros(3))
    assert hidden.grad[[0, 2]].abs().min() > 0
    assert not loss.correct[1]


def test_acceptance_counts_the_teachers_mass_outside_the_kept_ids() -> None:
    """t = (.1, .2, .3, .4), p = (.5, .5) on ids 3 and 1: the minima sum to .4 + .2; renormalised, to .83."""
    teacher = Head(torch.log(torch.tensor([[0.1], [0.2], [0.3], [0.4]])))
    head = Head(torch.zeros(2, 1), kept=torch.tensor([3, 1]))
    one = torch.ones(1, 1)
    loss = head_loss(one, head, weights={"l1": torch.ones(1)}, teacher_hidden=one, teacher_head=teacher)
    assert loss.accept.item() == pytest.approx(0.6, abs=1e-6)
    assert loss.total.item() == pytest.approx(2 * (2 / 3 - 1 / 2), abs=1e-6)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("garbage", [math.inf, -math.inf, math.nan, 1e38])
def test_rows_without_weight_may_hold_anything(garbage: float, softcap: float | None) -> None:
    case = make_case(EVERY_TERM, rows=6, softcap=softcap, dtype=torch.float32)
    dead = torch.tensor([False, True, False, False, True, False])
    for weight in case.weights.values():
        weight[dead] = 0.0
    clean = case.ours(chunk_rows=4)
    expected = gradients(clean.total, case)
    with torch.no_grad():
        for tensor in (case.hidden, case.z, case.teacher_hidden):
            tensor[dead] = garbage
    case.labels[dead] = -100
    dirty = case.ours(chunk_rows=4)
    assert torch.equal(dirty.total, clean.total)
    assert all(map(torch.equal, gradients(dirty.total, case), expected))
    assert not expected[0][dead].any() and not expected[1][dead].any()
    assert dirty.accept.isfinite().all()


def test_extreme_logits_stay_finite() -> None:
    """Logits of a few thousand: exponentials overflow unless the maximum is taken off first."""
    case = make_case(EVERY_TERM, dtype=torch.float32, markov=False)
    with torch.no_grad():
        case.hidden *= 1000.0
        case.teacher_hidden *= 1000.0
    loss = case.ours()
    assert loss.total.isfinite() and gradients(loss.total, case)[0].isfinite().all()


def test_backward_twice_gives_the_same_gradient_twice() -> None:
    """Guards scaling the saved gradients in place, and handing them out to be clipped in place."""
    case = make_case(DSPARK)
    for factor in (1.0, 0.25):
        total = case.ours().total * factor
        first = torch.autograd.grad(total, case.inputs(), retain_graph=True)
        expected = [gradient.clone() for gradient in first]
        for gradient in first:
            gradient.mul_(3.0)
        assert all(map(torch.equal, expected, torch.autograd.grad(total, case.inputs())))


def test_frozen_inputs_get_no_gradient_and_no_graph() -> None:
    case = make_case(DSPARK)
    with torch.no_grad():
        assert not case.ours().total.requires_grad
    case.w2.requires_grad_(False)
    case.ours().total.backward()
    assert case.w2.grad is None and case.hidden.grad is not None and case.z.grad is not None
    frozen = replace(case, hidden=case.hidden.detach(), z=case.z.detach())
    assert not frozen.ours().total.requires_grad


def test_without_a_teacher_the_label_decides_what_is_correct() -> None:
    head = Head(torch.eye(3))
    loss = head_loss(
        torch.eye(3), head, weights={"ce": torch.ones(3)}, labels=torch.tensor([0, 2, 2]), chunk_rows=2
    )
    assert loss.accept is None
    assert loss.correct.tolist() == [True, False, True]


def test_acceptance_comes_without_any_weighted_term() -> None:
    case = make_case([])
    loss = case.ours()
    assert loss.terms == {} and loss.total.item() == 0.0
    torch.testing.assert_close(
        loss.accept, plain_terms(case.hidden, case.head, **case.arguments())["accept"].detach()
    )


def test_no_rows_is_a_loss_of_zero() -> None:
    case = make_case(DSPARK, rows=0)
    loss = case.ours()
    assert loss.total.item() == 0.0 and loss.correct.shape == (0,)
    assert all(not gradient.any() for gradient in gradients(loss.total, case))


def test_default_chunk_is_bounded_in_bytes_and_never_empty() -> None:
    assert default_chunk_rows(4096) >= 1024
    assert default_chunk_rows(32_000) * 32_000 * 4 <= 128 * 2**20
    assert default_chunk_rows(151_936) * 151_936 * 4 <= 260 * 2**20
    assert default_chunk_rows(10**9) >= 1


def test_a_chunk_has_rows_enough_for_products_at_full_speed() -> None:
    """41 rows at V = 151,936 took 1.8 times as long as one piece, and two threads shared them badly."""
    assert default_chunk_rows(151_936) == 448
    assert default_chunk_rows(151_936, accelerated=True) == 512
    assert default_chunk_rows(4096, accelerated=True) == 16_384


def test_a_block_of_a_chunk_gives_each_thread_rows_and_stays_in_its_cache() -> None:
    """One row of V = 151,936 at a time left the second of two threads without work."""
    assert [cpu_block_rows(151_936, threads) for threads in (1, 2, 8)] == [1, 2, 8]
    assert cpu_block_rows(4096) * 4096 * 4 * 4 <= 2 * 2**20


@given(
    teacher_of=st.lists(st.integers(0, 5), max_size=20),
    chunk=st.integers(1, 8),
    block=st.integers(1, 8),
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_parts_of_chunks_are_all_rows_with_their_teachers(
    teacher_of: list[int], chunk: int, block: int
) -> None:
    of, rows, fresh = (
        torch.tensor(teacher_of, dtype=torch.int64),
        torch.arange(len(teacher_of)),
        torch.arange(0),
    )
    found: list[tuple[int, int]] = []
    for piece in pieces(len(of), chunk, of, torch.device("cpu")):
        fresh = fresh if piece.fresh is None else torch.arange(6)[piece.fresh]
        assert 0 < piece.size <= chunk and len(fresh) <= chunk
        for start in range(0, piece.size, block):
            mine, theirs = piece.part(slice(start, min(start + block, piece.size)))
            found += zip(rows[mine].tolist(), fresh[theirs].tolist(), strict=True)
    assert sorted(found) == list(enumerate(teacher_of))


def test_rows_that_follow_each_other_are_read_where_they_are() -> None:
    (piece,) = pieces(7, 8, torch.tensor([2, 3, 4, 5, 3, 4, 5]), torch.device("cpu"))
    assert piece.part(slice(0, 4)) == (slice(0, 4), slice(2, 6))
    assert piece.part(slice(4, 7)) == (slice(4, 7), slice(3, 6))
    rows, within = piece.part(slice(2, 6))
    assert rows == slice(2, 6) and within.tolist() == [4, 5, 3, 4]


@given(
    teacher_of=st.lists(st.integers(0, 5), min_size=1, max_size=20),
    terms=st.sets(st.sampled_from(EVERY_TERM), min_size=1),
    kept=st.sampled_from([None, 6]),
    chunk_rows=st.sampled_from([1, 2, 3, 7, None]),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_a_shared_teacher_is_a_teacher_of_each_rows_own(
    teacher_of: list[int], terms: set[str], kept: int | None, chunk_rows: int | None
) -> None:
    """Guards rows that meet the wrong teacher once they are put in the order of their teachers' chunks."""
    case = make_case(sorted(terms), rows=len(teacher_of), kept=kept, softcap=3.0)
    of, distinct = torch.tensor(teacher_of), make_case([], rows=6).teacher_hidden
    case.teacher_hidden = distinct[of]
    shared = head_loss(
        case.hidden,
        case.head,
        weights=case.weights,
        chunk_rows=chunk_rows,
        teacher_of=of,
        **{**case.arguments(), "teacher_hidden": distinct},
    )
    own = case.ours()
    assert_close([shared.total, shared.accept], [own.total, own.accept], 1e-12)
    assert torch.equal(shared.correct, own.correct)
    assert_close(list(shared.rows.values()), list(own.rows.values()), 1e-12)
    assert_close(gradients(shared.total, case), gradients(own.total, case), 1e-12)


def test_each_shared_teacher_is_computed_once() -> None:
    """Eagle-3 learns from each position at each of its steps: seven times the same product."""
    case = make_case(["kl"], rows=21, markov=False, dtype=torch.float32)
    of = torch.arange(7).repeat(3)
    rows: list[int] = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func._overloadpacket is torch.ops.aten.mm and args[1].shape == (6, 13):
                rows.append(len(args[0]))
            return func(*args, **(kwargs or {}))

    arguments = {**case.arguments(), "teacher_hidden": case.teacher_hidden[:7]}
    with Products():
        head_loss(case.hidden, case.head, weights=case.weights, teacher_of=of, chunk_rows=4, **arguments)
    assert rows == [4, 3]


@pytest.mark.parametrize("terms", [["ce"], ["kl"], DSPARK])
def test_metrics_that_are_not_wanted_change_no_gradient(terms: list[str]) -> None:
    case = make_case(terms)
    full = case.ours()
    lean = head_loss(
        case.hidden, case.head, weights=case.weights, accept=False, correct=False, **case.arguments()
    )
    assert lean.accept is None and lean.correct is None
    assert torch.equal(lean.total, full.total)
    assert all(map(torch.equal, gradients(lean.total, case), gradients(full.total, case)))


def test_a_gradient_is_handed_over_without_a_copy_unless_it_is_asked_for_twice() -> None:
    """The gradient of W2 is 156 MB at V = 151,936, and was multiplied into a copy of that size."""
    case = make_case(DSPARK, dtype=torch.float32)
    storages: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        storages.append(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        total = case.ours().total
    (total * 0.5).backward()
    assert {t.grad.untyped_storage().data_ptr() for t in case.inputs()} <= set(storages)


def test_the_chunk_size_is_known_without_torch() -> None:
    """The planner asks for it, and must start at once."""
    code = "import sys, deepspec.maths.chunking; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": {"ce": torch.ones(6)}}, "rows"),
        ({"labels": None}, "labels are needed"),
        ({"labels": torch.zeros(6, dtype=torch.int64)}, "rows"),
        ({"labels": torch.full((7,), 13, device=DEVICE)}, "outside 0"),
        ({"labels": torch.full((7,), -100, device=DEVICE)}, "outside 0"),
        ({"teacher_head": None}, "go together"),
        ({"teacher_head": None, "teacher_hidden": None}, "need teacher_hidden"),
        ({"teacher_hidden": torch.zeros(6, 6)}, "rows"),
        ({"teacher_head": Head(torch.zeros(14, 6))}, "vocabularies differ"),
        ({"teacher_head": Head(torch.zeros(13, 6), kept=torch.arange(13))}, "whole vocabulary"),
        ({"markov": (torch.zeros(6, 3), torch.zeros(13, 3))}, "rows"),
        ({"chunk_rows": 0}, "chunk_rows"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    case = make_case(DSPARK)
    refused = ValueError if message == "outside 0" else AssertionError
    with pytest.raises(refused, match=message):
        head_loss(case.hidden, case.head, **{"weights": case.weights, **case.arguments(), **change})


class Widest(TorchDispatchMode):
    """Remembers the largest number of elements among all tensors that any operation reads or writes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, out)):
            if isinstance(leaf, Tensor):
                # The storage, not the view: a slice of a wide tensor is a wide tensor.
                stored = leaf.untyped_storage().nbytes() // leaf.element_size()
                self.elements = max(self.elements, stored, leaf.numel())
        return out


@pytest.mark.parametrize("terms", [["ce"], ["kl"], DSPARK, EVERY_TERM])
@pytest.mark.parametrize("kept", [None, 301])
def test_no_tensor_of_rows_times_vocabulary_ever_exists(terms: list[str], kept: int | None) -> None:
    """Guards a change that forms whole logits anywhere; the plain losses show that the guard can trip."""
    rows, chunk_rows, vocab = 64, 8, 499
    case = make_case(terms, rows=rows, vocab=vocab, kept=kept, softcap=4.0, scale=0.5, dtype=torch.float32)
    with Widest() as ours:
        case.ours(chunk_rows).total.backward()
    assert ours.elements == chunk_rows * vocab
    with Widest() as plain:
        case.plain_total().backward()
    assert plain.elements >= rows * (kept or vocab)


def test_nothing_but_the_gradients_waits_for_the_backward() -> None:
    """Guards keeping a chunk's logits until the backward: each is small, all together are not."""
    case = make_case(EVERY_TERM, rows=64, vocab=499, softcap=4.0)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        case.ours(chunk_rows=8)
    assert sum(kept) == sum(tensor.numel() for tensor in case.inputs())


def test_confidence_loss_is_cross_entropy_against_detached_acceptance() -> None:
    logits = torch.randn(9, dtype=torch.float64, requires_grad=True)
    accept = torch.rand(9, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(9, dtype=torch.float64)
    expected = plain_confidence_loss(logits, accept.detach(), weights)
    loss = confidence_loss(logits, accept, weights)
    assert_close([loss.double()], [expected], 1e-6)
    loss.backward()
    assert accept.grad is None
    assert_close([logits.grad], list(torch.autograd.grad(expected, logits)), 1e-6)


def test_confidence_rows_without_weight_may_hold_anything() -> None:
    logits = torch.tensor([0.5, math.nan, math.inf], requires_grad=True)
    accept = torch.tensor([0.25, math.nan, 0.5])
    loss = confidence_loss(logits, accept, torch.tensor([2.0, 0.0, 0.0]))
    loss.backward()
    assert loss.item() == pytest.approx(2 * (math.log1p(math.exp(0.5)) - 0.25 * 0.5), rel=1e-6)
    assert logits.grad.tolist() == pytest.approx([2 * (torch.sigmoid(torch.tensor(0.5)).item() - 0.25), 0, 0])


def test_confidence_loss_of_a_certain_logit_is_finite() -> None:
    loss = confidence_loss(torch.tensor([200.0]), torch.tensor([0.0]), torch.ones(1))
    assert loss.item() == pytest.approx(200.0)


def test_position_weights_start_at_one_and_fall_by_the_published_factor() -> None:
    assert position_weights(7, 4.0).tolist() == pytest.approx([math.exp(-k / 4) for k in range(7)])
    with pytest.raises(AssertionError, match="positive"):
        position_weights(0, 4.0)
    with pytest.raises(AssertionError, match="positive"):
        position_weights(7, 0.0)
