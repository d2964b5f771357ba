"""The head and the losses of every draft, in chunks of rows: tensors as wide as the vocabulary stay small.

A draft's logits are the widest tensors of training: 448 rows of a 151,936-word vocabulary are 272 MB in
float32, and a loss written out plainly keeps half a dozen of them. Here the gradient is formed together
with the loss, one chunk of rows at a time, and only tensors as narrow as the inputs outlive their chunk.
Products run over a chunk, which has to be large to run at full speed; what is done number by number runs over
blocks of it, which on a CPU are small enough to stay in the cache.

Shapes: N loss rows; M teacher rows; n rows of one chunk; b rows of one block; d draft hidden width; dt target
hidden width; V vocabulary of the draft's head; W vocabulary of the teacher's head (W = V, unless the draft's
is reduced); r Markov rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from deepspec.maths.chunking import cpu_block_rows, default_chunk_rows
from deepspec.maths.figures import Scratch, judge, teach
from deepspec.maths.finite import harmless
from deepspec.maths.formed import needs_gradient, with_gradients
from deepspec.maths.fused import compiles
from deepspec.maths.head import Head
from deepspec.maths.host import sent
from deepspec.maths.pieces import Piece, pieces
from deepspec.maths.positions import RULES, Positions, block_weights
from deepspec.maths.terms import TERMS, figures_of


def head_loss(
    hidden: Tensor,
    head: Head,
    *,
    weights: Mapping[str, Tensor],
    labels: Tensor | None = None,
    teacher_hidden: Tensor | None = None,
    teacher_head: Head | None = None,
    teacher_of: Tensor | None = None,
    markov: tuple[Tensor, Tensor] | None = None,
    positions: Positions | None = None,
    chunk_rows: int | None = None,
    accept: bool = True,
    correct: bool = True,
) -> HeadLoss:
    """Weighted losses of N rows against labels, a teacher's distribution, or both, in nats (l1 has no unit).

    hidden: [N, d], what the draft feeds its head. markov: (z [N, r], w2 [V, r]); z @ w2.T is added to the
    logits after the soft-cap. teacher_hidden: [M, dt], read through teacher_head. teacher_of: [N] int64 on
    the host, the teacher row that each row learns from, so that a teacher which several rows share is
    computed once; None: M = N, its own. labels: [N] target ids.
    weights: term -> [N], no gradient. With p the draft's and t the teacher's distribution, terms of a row are

        ce          -log p[label]                   DFlash, DSpark (arXiv 2607.05147)
        kl          -sum_v t log p                  Eagle-3 (arXiv 2503.01840); KL(t | p) plus t's entropy
        l1          sum_v |p - t|                   DSpark; twice the total variation distance
        reverse_kl  sum_v p log(p / t)              KL(p | t)
        lk_alpha    -log a, a = sum_v min(p, t)     LK losses (arXiv 2602.23881)
        lk_lambda   w kl + (1 - w) (1 - a)          the same, w = exp(-3 a) without gradient, row by row

    The total is differentiable with respect to hidden, z and w2 (once). Heads and the teacher are frozen.
    Matrix products run in the dtype of their rows, the rest in float32 (float64 for float64 rows).

    A row whose weights are all zero adds nothing to any sum or gradient, whatever it and its teacher hold,
    infinities and NaN included. A label may be out of range where the row's ce weight is zero.

    Reduced vocabulary (`head.kept`): labels and the teacher's head stay in target ids. A label that is not
    kept has ce weight zero; the other terms see the teacher's distribution renormalised over kept ids;
    `accept` is measured against its full distribution.

    positions: multiplies each row's terms by a weight that follows from all rows of its block
    (`positions.RULES`), and carries no gradient. Weights multiply rows, so a row's gradients are formed first
    and scaled once its block is known: nothing wide is computed twice. Only the gradient of w2 adds rows up.
    If it is wanted, chunks hold whole blocks, whose rows must follow each other, and a shared teacher is
    computed for each of its rows.

    chunk_rows: rows per chunk; None leaves it to `default_chunk_rows`. accept, correct: whether these metrics
    are wanted. Raises ValueError for a label out of range, on the CPU: an accelerator would have to be waited
    for, and the target has already embedded the same ids.
    """
    z, w2 = markov if markov is not None else (None, None)
    given = _Task(
        hidden, head, dict(weights), labels, teacher_hidden, teacher_head, teacher_of, z, w2, positions
    )
    _check(given)
    if positions is not None and needs_gradient(w2) and teacher_hidden is not None and teacher_of is not None:
        own = teacher_hidden.index_select(0, sent(teacher_of, teacher_hidden.device))
        given = replace(given, teacher_hidden=own, teacher_of=None)
    if chunk_rows is None:
        widest = teacher_head.vocab_size if teacher_head else head.vocab_size
        chunk_rows = default_chunk_rows(widest, hidden.device.type != "cpu")
    assert chunk_rows >= 1, f"chunk_rows must be at least 1, not {chunk_rows}"
    wants = needs_gradient(hidden), needs_gradient(z), needs_gradient(w2)
    rate = None if positions is None else RULES[positions.rule].reads
    accept = (accept or rate == "accept") and teacher_head is not None
    reads = figures_of(weights) | {rate} if rate == "surprise" else figures_of(weights)
    if accept and head.kept is None:
        reads |= {"overlap"}
    with torch.no_grad():
        result = _walk(_prepare(given), _Wants(*wants, accept, correct, frozenset(reads)), chunk_rows)
    sums = {term: values.sum() for term, values in result.terms.items()}
    total = torch.stack(list(sums.values())).sum() if sums else torch.zeros((), device=hidden.device)
    if any(wants):
        total = with_gradients(total, (hidden, z, w2), (result.d_hidden, result.d_z, result.d_w2))
    return HeadLoss(total, sums, result.accept, result.correct, result.terms)


class HeadLoss(NamedTuple):
    """total: scalar, differentiable. terms: each term's weighted sum, detached, before adding them up;
    rows: the same of each row, term -> [N]. Both include the weights by position.

    accept: [N] in [0, 1], the probability that a token drawn from the draft survives verification,
    sum_v min(p, t) = 1 - l1 / 2 (Leviathan 2023, section 3), detached; None without a teacher or if not
    wanted. correct: [N] bool, the draft's best token is the teacher's best (without a teacher: the label);
    None if it was not wanted.
    """

    total: Tensor
    terms: dict[str, Tensor]
    accept: Tensor | None
    correct: Tensor | None
    rows: dict[str, Tensor]


class _Wants(NamedTuple):
    """Which gradients and metrics are formed, and which figures are read."""

    hidden: bool
    z: bool
    w2: bool
    accept: bool
    correct: bool
    figures: frozenset[str]


@dataclass(frozen=True)
class _Task:
    """The inputs of one call: first as given, then checked and in the dtypes that the maths uses."""

    hidden: Tensor  # [N, d]
    head: Head  # prepared: its weight in the dtype of `hidden`
    weights: dict[str, Tensor]  # term -> [N]; prepared: in the dtype of the maths
    labels: Tensor | None  # [N] target ids; prepared: row numbers of the head, all in range
    teacher_hidden: Tensor | None  # [M, dt]
    teacher_head: Head | None
    teacher_of: Tensor | None  # [N] on the host; None: row i's teacher is i
    z: Tensor | None  # [N, r]
    w2: Tensor | None  # [V, r]; prepared: in the dtype of `z`
    positions: Positions | None
    known: Tensor | None = None  # [N] bool: the label is in the draft's vocabulary
    dead: Tensor | None = None  # [N] bool, prepared: all weights are zero
    of_dead: Tensor | None = None  # [M] bool, prepared: only such rows learn from this teacher
    dtype: torch.dtype = torch.float32  # of the maths


@dataclass(frozen=True)
class _Result:
    """What outlives the chunks: nothing here is as large as rows times vocabulary. None: not wanted."""

    terms: dict[str, Tensor]  # term -> [N], weighted after the last chunk
    accept: Tensor | None  # [N]
    correct: Tensor | None  # [N] bool
    rates: Tensor | None  # [N], what weights by position are made of
    d_hidden: Tensor | None  # [N, d]
    d_z: Tensor | None  # [N, r]
    d_w2: Tensor | None  # [V, r]


@dataclass(frozen=True)
class _Space:
    """Wide tensors, allocated once per call and overwritten by every chunk or block."""

    draft: Tensor  # [n, V] logits of the draft (before: of the teacher), then their gradient, if not `narrow`
    narrow: Tensor | None  # [n, V] the gradient in the dtype of the hidden states, where that is narrower
    slope: Tensor | None  # [n, V], where a soft-cap has to be differentiated
    teacher: Tensor | None  # [n, V] probabilities, renormalised over kept ids
    full: Tensor | None  # [n, W] logits of the teacher, for a reduced vocabulary
    block: int  # b
    spare: Tensor | None  # [b, V]; a compiler needs none of these last three
    gathered: Tensor | None  # [b, V], where rows share teachers
    ratio: Tensor | None  # [b, V], for reverse_kl


class _Teacher(NamedTuple):
    """One chunk's teachers. Their probabilities are in the workspace."""

    best: Tensor | None  # [n] target id
    mass: Tensor | None  # [n, 1] share of the full distribution on kept ids; None for a full vocabulary


def _check(task: _Task) -> None:
    """Refuse inputs that do not fit together: only a mistake in a draft's own code can make them."""
    head, teacher, terms = task.head, task.teacher_head, task.weights
    of = task.teacher_hidden if task.teacher_of is None else task.teacher_of
    per_row = [task.hidden, *terms.values(), task.labels, of, task.z]
    counts = [len(values) for values in per_row if values is not None]
    assert len(set(counts)) == 1, f"hidden, weights, labels, teacher and z have {counts} rows"
    needy = [term for term in terms if TERMS[term].teacher]
    assert (task.teacher_hidden is None) == (teacher is None), "teacher_hidden and teacher_head go together"
    assert teacher or task.teacher_of is None, "teacher_of names rows of teacher_hidden"
    assert teacher or not needy, f"the terms {needy} need teacher_hidden and teacher_head"
    assert task.labels is not None or (teacher and "ce" not in terms), "labels are needed"
    if task.positions is not None:
        rule, block, place = task.positions
        assert len(block) == len(place) == counts[0], f"{counts[0]} rows, but {len(block)} positions"
        assert teacher or RULES[rule].reads != "accept", f"positions by {rule} need a teacher"
        assert task.labels is not None or RULES[rule].reads != "surprise", f"positions by {rule} need labels"
    if teacher is not None:
        assert teacher.kept is None, "the teacher's head must cover the whole vocabulary"
        assert head.kept is not None or head.vocab_size == teacher.vocab_size, (
            f"vocabularies differ: draft {head.vocab_size}, teacher {teacher.vocab_size}; a reduced draft "
            "vocabulary must name its kept ids"
        )


def _prepare(task: _Task) -> _Task:
    """Dtypes settled, labels mapped to rows of the draft's head, rows without weight found."""
    hidden, head, labels, known = task.hidden, task.head, task.labels, None
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    weights = {term: weight.detach().to(dtype) for term, weight in task.weights.items()}
    if labels is not None:
        labels, known = head.rows_of(labels)
        if "ce" in weights:
            if (
                head.kept is None
                and labels.device.type == "cpu"
                and bool((~known & (weights["ce"] != 0)).any())
            ):
                raise ValueError(f"a label with a ce weight lies outside 0 ... {head.vocab_size - 1}")
            weights["ce"] = weights["ce"].masked_fill(~known, 0.0)
    dead = torch.ones(hidden.shape[0], dtype=torch.bool, device=hidden.device)
    for weight in weights.values():
        dead &= weight == 0
    teacher_head, teacher_hidden, of_dead = task.teacher_head, task.teacher_hidden, dead
    if teacher_head is not None and teacher_hidden is not None:
        teacher_head = teacher_head.to(teacher_hidden.dtype)
        if task.teacher_of is not None:
            live = sent(task.teacher_of, dead.device).masked_fill(dead, len(teacher_hidden))
            of_dead = dead.new_ones(len(teacher_hidden) + 1).index_fill(0, live, False)[:-1]
    return replace(
        task,
        head=head.to(hidden.dtype),
        weights=weights,
        labels=labels,
        teacher_head=teacher_head,
        w2=task.w2 if task.w2 is None or task.z is None else task.w2.to(task.z.dtype),
        known=known,
        dead=dead,
        of_dead=of_dead,
        dtype=dtype,
    )


def _alive(values: Tensor, dead: Tensor | None, rows: slice | Tensor) -> Tensor:
    """Some rows [n, d] of values [N, d]; what a `dead` one [N] holds is made harmless. One chunk's rows at a
    time: a copy of all of them would last as long as the loss."""
    assert dead is not None
    return harmless(values[rows], dead[rows])


def _walk(task: _Task, wants: _Wants, chunk_rows: int) -> _Result:
    """All rows, one chunk after the other."""
    device = task.hidden.device
    count, new = task.hidden.shape[0], partial(torch.empty, dtype=task.dtype, device=device)
    result = _Result(
        terms={term: new(count) for term in task.weights},
        accept=new(count) if wants.accept else None,
        correct=torch.empty(count, dtype=torch.bool, device=device) if wants.correct else None,
        rates=None if task.positions is None else new(count),
        d_hidden=torch.empty_like(task.hidden) if wants.hidden else None,
        d_z=torch.empty_like(task.z) if wants.z and task.z is not None else None,
        d_w2=new(task.w2.shape).zero_() if wants.w2 and task.w2 is not None else None,
    )
    head, teacher_head, vocab = task.head, task.teacher_head, task.head.vocab_size
    # A gradient that adds rows up needs their weights by position at once, so it needs their whole blocks.
    blocks = task.positions if result.d_w2 is not None else None
    if blocks is not None and count:
        chunk_rows = max(chunk_rows, int(blocks.place.max()) + 1)
    chunk = min(chunk_rows, count)
    logits = new(chunk, vocab)
    compiled = compiles(logits)
    block = chunk
    if device.type == "cpu" and not compiled:
        block = min(chunk, cpu_block_rows(vocab, torch.get_num_threads()))
    reduced = teacher_head is not None and head.kept is not None
    narrow = (wants.hidden or wants.z or wants.w2) and head.softcap is None
    narrow = narrow and task.hidden.dtype != task.dtype
    space = _Space(
        draft=logits,
        narrow=torch.empty(chunk, vocab, dtype=task.hidden.dtype, device=device) if narrow else None,
        slope=new(chunk, vocab) if wants.hidden and head.softcap is not None else None,
        teacher=None if teacher_head is None else new(chunk, vocab),
        full=new(chunk, teacher_head.vocab_size) if teacher_head is not None and reduced else None,
        block=block,
        spare=None if compiled else new(block, vocab),
        gathered=None if compiled or task.teacher_of is None else new(block, vocab),
        ratio=new(block, vocab) if "reverse" in wants.figures and not compiled else None,
    )
    teacher: _Teacher | None = None
    for piece in pieces(count, max(1, chunk), task.teacher_of, device, blocks and blocks.block):
        if piece.fresh is not None and teacher_head is not None:
            teacher = _form_teacher(task, piece.fresh, space, wants)
        slope = None if space.slope is None else space.slope[: piece.size]
        draft = space.draft[: piece.size]
        head.logits_into(draft, _alive(task.hidden, task.dead, piece.rows), slope)
        z = None if task.z is None else _alive(task.z, task.dead, piece.rows)
        if z is not None and task.w2 is not None:
            _add_product(draft, z, task.w2.t())
        for start in range(0, piece.size, block):
            _block(task, piece, slice(start, min(start + block, piece.size)), space, teacher, wants, result)
        factors = None
        if blocks is not None and result.rates is not None:
            assert isinstance(piece.rows, slice)
            factors = block_weights(blocks, result.rates[piece.rows], piece.rows)
        gradient = draft if space.narrow is None else space.narrow[: piece.size]
        _products(task, piece, gradient, slope, z, result, factors)
    for term, values in result.terms.items():  # the term of a row without weight may be infinite or NaN
        values.mul_(task.weights[term]).masked_fill_(task.weights[term] == 0, 0.0)
    if task.positions is not None and result.rates is not None:
        factors = block_weights(task.positions, result.rates, slice(0, count))
        for values in result.terms.values():
            values.mul_(factors)
        for rows in (result.d_hidden, result.d_z):
            if rows is not None:
                rows.mul_(factors[:, None])
    return result


def _form_teacher(task: _Task, fresh: slice, space: _Space, wants: _Wants) -> _Teacher:
    """The distributions of some teacher rows, into space.teacher."""
    assert task.teacher_head is not None and task.teacher_hidden is not None and space.teacher is not None
    hidden, kept = _alive(task.teacher_hidden, task.of_dead, fresh), task.head.kept
    logits = (space.draft if space.full is None else space.full)[: len(hidden)]
    task.teacher_head.logits_into(logits, hidden)
    best = torch.empty(len(hidden), dtype=torch.int64, device=hidden.device) if wants.correct else None
    mass = None if kept is None else logits.new_empty(len(hidden), 1)
    for start in range(0, len(hidden), space.block):
        rows = slice(start, min(start + space.block, len(hidden)))
        full, out = logits[rows], space.teacher[rows]
        if kept is None or mass is None:
            found = teach(full, out, best is not None)
            if best is not None and found is not None:
                best[rows] = found
            continue
        if best is not None:
            best[rows] = full.argmax(1)
        some = torch.index_select(
            full, 1, kept, out=None if space.spare is None else space.spare[: len(full)]
        )
        top = full.amax(1, keepdim=True)
        mass[rows] = some.sub(top).exp_().sum(1, keepdim=True) / full.sub_(top).exp_().sum(1, keepdim=True)
        teach(some, out, False)
    return _Teacher(best, mass)


def _block(
    task: _Task,
    piece: Piece,
    at: slice,
    space: _Space,
    teacher: _Teacher | None,
    wants: _Wants,
    result: _Result,
) -> None:
    """The terms and metrics of rows `at` of a chunk, into `result`; their logits become the gradient."""
    logits, size = space.draft[at], at.stop - at.start
    rows, within = piece.part(at)
    teachers, best, mass = None, None, None
    if teacher is not None and space.teacher is not None:
        best, mass = (None if each is None else each[within] for each in teacher)
        teachers = space.teacher if isinstance(within, Tensor) else space.teacher[within]
    labels = None if task.labels is None else task.labels[rows, None]
    weights = {term: weight[rows] for term, weight in task.weights.items()}
    out = None
    if wants.hidden or wants.z or wants.w2:
        out = logits if space.narrow is None else space.narrow[at]
    scratch = None
    if space.spare is not None:
        gathered, ratio = (None if x is None else x[:size] for x in (space.gathered, space.ratio))
        scratch = Scratch(space.spare[:size], logits, gathered, ratio)
    index = within if isinstance(within, Tensor) else None
    found, values, chosen, accept = judge(
        logits, out, teachers, index, mass, labels, weights, wants.figures, wants.correct, scratch
    )
    if result.correct is not None and chosen is not None:
        result.correct[rows] = _correct(task, rows, chosen, best)
    if result.accept is not None and accept is not None:
        result.accept[rows] = accept
    if result.rates is not None and task.positions is not None:
        if RULES[task.positions.rule].reads == "accept":
            assert result.accept is not None
            result.rates[rows] = result.accept[rows]
        else:
            assert task.known is not None
            result.rates[rows] = (-found["surprise"]).exp() * task.known[rows]
    for term, value in values.items():
        result.terms[term][rows] = value


def _products(
    task: _Task,
    piece: Piece,
    gradient: Tensor,
    slope: Tensor | None,
    z: Tensor | None,
    result: _Result,
    factors: Tensor | None,
) -> None:
    """A chunk's gradient of the logits, back through w2 and the head, into `result`. z: [n, r] of its rows.
    factors: [n] weights by position, for the sum over rows; the other gradients get theirs at the end."""
    if result.d_hidden is None and result.d_z is None and result.d_w2 is None:
        return
    narrow = gradient.to(task.hidden.dtype)
    if z is not None and task.w2 is not None:
        of_bias = narrow.to(task.w2.dtype)
        if result.d_z is not None:
            result.d_z[piece.rows] = of_bias @ task.w2
        if result.d_w2 is not None:
            weighted = z if factors is None else (z * factors[:, None]).to(z.dtype)
            _add_product(result.d_w2, of_bias.t(), weighted)
    if result.d_hidden is not None:
        if slope is not None:
            narrow = gradient.mul_(slope).to(task.hidden.dtype)
        back = narrow @ task.head.weight
        result.d_hidden[piece.rows] = back if task.head.scale == 1.0 else back * task.head.scale


def _add_product(out: Tensor, left: Tensor, right: Tensor) -> None:
    """out += left @ right, in place and added up in the dtype of `out`, whatever theirs is."""
    if left.dtype == out.dtype:
        out.addmm_(left, right)
    elif out.device.type == "cuda":
        torch.addmm(out, left, right, out_dtype=out.dtype, out=out)
    else:
        out.add_(left @ right)


def _correct(task: _Task, rows: slice | Tensor, best: Tensor, teacher_best: Tensor | None) -> Tensor:
    """[b] bool: the draft's best row of the head against the teacher's best, or against the label."""
    if teacher_best is not None:
        return (best if task.head.kept is None else task.head.kept[best]) == teacher_best
    assert task.labels is not None and task.known is not None
    return (best == task.labels[rows]) & task.known[rows]
