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
import torch.nn.functional as F
from torch import Tensor

from deepspec.maths.chunking import cpu_block_rows, default_chunk_rows
from deepspec.maths.finite import largest_of
from deepspec.maths.formed import needs_gradient, with_gradients
from deepspec.maths.head import Head
from deepspec.maths.host import sent
from deepspec.maths.pieces import Piece, pieces
from deepspec.maths.terms import TERMS

EXTREME = 1e6
"""Numbers above this, in a row that has no weight, are read as zeros: products with them could overflow."""


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

        ce       -log p[label]                      DFlash, DSpark (arXiv 2607.05147)
        soft_ce  -sum_v t log p                     Eagle-3 (arXiv 2503.01840)
        l1       sum_v |p - t|                      DSpark; twice the total variation distance

    The total is differentiable with respect to hidden, z and w2 (once). Heads and the teacher are frozen.
    Matrix products run in the dtype of their rows, the rest in float32 (float64 for float64 rows).

    A row whose weights are all zero adds nothing to any sum or gradient, whatever it and its teacher hold,
    infinities and NaN included. A label may be out of range where the row's ce weight is zero.

    Reduced vocabulary (`head.kept`): labels and the teacher's head stay in target ids. A label that is not
    kept has ce weight zero; soft_ce and l1 see the teacher's distribution renormalised over kept ids;
    `accept` is measured against its full distribution.

    chunk_rows: rows per chunk; None leaves it to `default_chunk_rows`. accept, correct: whether these metrics
    are wanted. Raises ValueError for a label out of range, on the CPU: an accelerator would have to be waited
    for, and the target has already embedded the same ids.
    """
    z, w2 = markov if markov is not None else (None, None)
    given = _Task(hidden, head, dict(weights), labels, teacher_hidden, teacher_head, teacher_of, z, w2)
    _check(given)
    if chunk_rows is None:
        widest = teacher_head.vocab_size if teacher_head else head.vocab_size
        chunk_rows = default_chunk_rows(widest, hidden.device.type != "cpu", torch.get_num_threads())
    assert chunk_rows >= 1, f"chunk_rows must be at least 1, not {chunk_rows}"
    wants = needs_gradient(hidden), needs_gradient(z), needs_gradient(w2)
    with torch.no_grad():
        result = _walk(
            _prepare(given), _Wants(*wants, accept and teacher_head is not None, correct), chunk_rows
        )
    sums = {term: values.sum() for term, values in result.terms.items()}
    total = torch.stack(list(sums.values())).sum() if sums else torch.zeros((), device=hidden.device)
    if any(wants):
        total = with_gradients(total, (hidden, z, w2), (result.d_hidden, result.d_z, result.d_w2))
    return HeadLoss(total, sums, result.accept, result.correct, result.terms)


def confidence_loss(logits: Tensor, accept: Tensor, weights: Tensor) -> Tensor:
    """Summed binary cross-entropy of confidence logits [N] against acceptance [N] in [0, 1], in nats.

    Weighted by weights [N]; rows of weight zero are left out whatever they hold. `accept` is a label: no
    gradient flows into it (DSpark, section 3.2). Returns a float32 scalar.
    """
    counted = weights != 0
    safe_logits = torch.where(counted, logits, torch.zeros_like(logits)).float()
    safe_accept = torch.where(counted, accept.detach(), torch.zeros_like(accept)).float()
    return F.binary_cross_entropy_with_logits(safe_logits, safe_accept, weights.float(), reduction="sum")


def position_weights(block: int, gamma: float) -> Tensor:
    """[block] float32 weights exp(-(k - 1) / gamma) of block positions k = 1 ... block (DFlash, DSpark)."""
    assert block >= 1 and gamma > 0, f"block and gamma must be positive, not {block} and {gamma}"
    return torch.exp(-torch.arange(block, dtype=torch.float32) / gamma)


class HeadLoss(NamedTuple):
    """total: scalar, differentiable. terms: each term's weighted sum, detached, before adding them up;
    rows: the same of each row, term -> [N].

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
    """Which gradients and metrics are formed."""

    hidden: bool
    z: bool
    w2: bool
    accept: bool
    correct: bool


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
    known: Tensor | None = None  # [N] bool: the label is in the draft's vocabulary
    dead: Tensor | None = None  # [N] bool, prepared: all weights are zero
    of_dead: Tensor | None = None  # [M] bool, prepared: only such rows learn from this teacher
    dtype: torch.dtype = torch.float32  # of the maths


@dataclass(frozen=True)
class _Result:
    """What outlives the chunks: nothing here is as large as rows times vocabulary. None: not wanted."""

    terms: dict[str, Tensor]  # term -> [N], weighted
    accept: Tensor | None  # [N]
    correct: Tensor | None  # [N] bool
    d_hidden: Tensor | None  # [N, d]
    d_z: Tensor | None  # [N, r]
    d_w2: Tensor | None  # [V, r]


@dataclass(frozen=True)
class _Space:
    """Wide tensors, allocated once per call and overwritten by every chunk or block."""

    draft: Tensor  # [n, V] logits of the draft (before: of the teacher), then the gradient
    slope: Tensor | None  # [n, V], where a soft-cap has to be differentiated
    teacher: Tensor | None  # [n, V] probabilities, renormalised over kept ids
    full: Tensor | None  # [n, W] logits of the teacher, for a reduced vocabulary
    spare: Tensor  # [b, V]
    gathered: Tensor | None  # [b, V], where rows share teachers


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
    needy = [term for term in terms if TERMS[term]]
    assert (task.teacher_hidden is None) == (teacher is None), "teacher_hidden and teacher_head go together"
    assert teacher or not needy, f"the terms {needy} need teacher_hidden and teacher_head"
    assert task.labels is not None or (teacher and "ce" not in terms), "labels are needed"
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


def _harmless(values: Tensor, dead: Tensor | None, rows: slice | Tensor) -> Tensor:
    """Some rows [n, d] of values [N, d], without what a `dead` one [N] may hold: zeros instead of NaN or
    extreme numbers. One chunk's rows at a time: a copy of all of them would last as long as the loss."""
    assert dead is not None
    found = values[rows]
    return found.masked_fill((dead[rows] & ~(largest_of(found) <= EXTREME))[:, None], 0.0)


def _walk(task: _Task, wants: _Wants, chunk_rows: int) -> _Result:
    """All rows, one chunk after the other."""
    device = task.hidden.device
    count, new = task.hidden.shape[0], partial(torch.empty, dtype=task.dtype, device=device)
    result = _Result(
        terms={term: new(count) for term in task.weights},
        accept=new(count) if wants.accept else None,
        correct=torch.empty(count, dtype=torch.bool, device=device) if wants.correct else None,
        d_hidden=torch.empty_like(task.hidden) if wants.hidden else None,
        d_z=torch.empty_like(task.z) if wants.z and task.z is not None else None,
        d_w2=new(task.w2.shape).zero_() if wants.w2 and task.w2 is not None else None,
    )
    head, teacher_head, vocab = task.head, task.teacher_head, task.head.vocab_size
    chunk = min(chunk_rows, count)
    block = chunk if device.type != "cpu" else min(chunk, cpu_block_rows(vocab))
    reduced = teacher_head is not None and head.kept is not None
    space = _Space(
        draft=new(chunk, vocab),
        slope=new(chunk, vocab) if wants.hidden and head.softcap is not None else None,
        teacher=None if teacher_head is None else new(chunk, vocab),
        full=new(chunk, teacher_head.vocab_size) if teacher_head is not None and reduced else None,
        spare=new(block, vocab),
        gathered=None if task.teacher_of is None else new(block, vocab),
    )
    teacher: _Teacher | None = None
    for piece in pieces(count, max(1, chunk), task.teacher_of, device):
        if piece.fresh is not None and teacher_head is not None:
            teacher = _form_teacher(task, piece.fresh, space, wants)
        slope = None if space.slope is None else space.slope[: piece.size]
        draft = space.draft[: piece.size]
        head.logits_into(draft, _harmless(task.hidden, task.dead, piece.rows), slope)
        z = None if task.z is None else _harmless(task.z, task.dead, piece.rows)
        if z is not None and task.w2 is not None:
            _add_product(draft, z, task.w2.t())
        for start in range(0, piece.size, block):
            _block(task, piece, slice(start, min(start + block, piece.size)), space, teacher, wants, result)
        _products(task, piece, draft, slope, z, result)
    return result


def _form_teacher(task: _Task, fresh: slice, space: _Space, wants: _Wants) -> _Teacher:
    """The distributions of some teacher rows, into space.teacher."""
    assert task.teacher_head is not None and task.teacher_hidden is not None and space.teacher is not None
    hidden, kept = _harmless(task.teacher_hidden, task.of_dead, fresh), task.head.kept
    logits = (space.draft if space.full is None else space.full)[: len(hidden)]
    task.teacher_head.logits_into(logits, hidden)
    best = torch.empty(len(hidden), dtype=torch.int64, device=hidden.device) if wants.correct else None
    mass = None if kept is None else logits.new_empty(len(hidden), 1)
    for start in range(0, len(hidden), len(space.spare)):
        rows = slice(start, min(start + len(space.spare), len(hidden)))
        full, out = logits[rows], space.teacher[rows]
        if best is not None:
            best[rows] = full.argmax(1)
        if kept is None or mass is None:
            torch.softmax(full, 1, out=out)
            continue
        some = torch.index_select(full, 1, kept, out=space.spare[: len(full)])
        top = full.amax(1, keepdim=True)
        mass[rows] = some.sub(top).exp_().sum(1, keepdim=True) / full.sub_(top).exp_().sum(1, keepdim=True)
        torch.softmax(some, 1, out=out)
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
    logits, p = space.draft[at], space.spare[: at.stop - at.start]
    rows, within = piece.part(at)
    t, best, mass = _taught(within, space, teacher)
    if result.correct is not None:
        result.correct[rows] = _correct(task, rows, logits.argmax(1), best)
    found: dict[str, Tensor] = {}
    top = logits.amax(1)
    torch.softmax(logits, 1, out=p)
    # The largest probability is one over the sum of exponentials of logits less the largest: this is its log.
    log_total = top - p.amax(1).log_()
    if task.labels is not None:
        found["ce"] = log_total - logits.gather(1, task.labels[rows, None]).squeeze(1)
    if t is not None and "soft_ce" in task.weights:
        found["soft_ce"] = log_total - torch.mul(t, logits, out=logits).sum(1)
    if t is not None and result.accept is not None and mass is not None:
        shared = torch.minimum(torch.mul(t, mass, out=logits), p, out=logits).sum(1)
        result.accept[rows] = shared.clamp(0.0, 1.0)
    if t is not None and ("l1" in task.weights or (result.accept is not None and mass is None)):
        found["l1"] = _sum_of_sizes(torch.sub(p, t, out=logits))
        if result.accept is not None and mass is None:
            result.accept[rows] = (1.0 - 0.5 * found["l1"]).clamp_(0.0, 1.0)
    for term, weight in task.weights.items():
        part = weight[rows]
        result.terms[term][rows] = torch.where(part == 0, torch.zeros_like(part), part * found[term])
    if wants.hidden or wants.z or wants.w2:
        weights = {term: weight[rows, None] for term, weight in task.weights.items()}
        _gradient(logits, p, t, weights, None if task.labels is None else task.labels[rows, None])


def _taught(
    within: slice | Tensor, space: _Space, teacher: _Teacher | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(probabilities [b, V], best id [b], mass [b, 1]) of some of the teachers that are there."""
    if teacher is None or space.teacher is None:
        return None, None, None
    best, mass = (None if each is None else each[within] for each in teacher)
    if isinstance(within, slice):
        return space.teacher[within], best, mass
    assert space.gathered is not None
    t = torch.index_select(space.teacher, 0, within, out=space.gathered[: len(within)])
    return t, best, mass


def _gradient(
    out: Tensor, p: Tensor, t: Tensor | None, weights: dict[str, Tensor], labels: Tensor | None
) -> None:
    """Gradient of weighted terms by the logits [b, V], into `out`, which with l1 holds p - t before.

    ce p - onehot(label); soft_ce p - t; l1 p (s - <p, s>), where s = sign(p - t). p appears in all of them,
    so its factors are gathered into one per row. weights: term -> [b, 1].
    """
    of_teacher = weights.get("soft_ce", torch.zeros_like(p[:, :1]))
    of_draft = of_teacher + weights["ce"] if "ce" in weights else of_teacher
    if "l1" in weights:
        sign = out.sign_()
        inner = _dots(p, sign)[:, None]
        torch.addcmul(of_draft - weights["l1"] * inner, sign, weights["l1"], out=out).mul_(p)
    else:
        torch.mul(p, of_draft, out=out)
    if t is not None and "soft_ce" in weights:
        out.addcmul_(t, of_teacher, value=-1.0)
    if "ce" in weights and labels is not None:
        out.scatter_add_(1, labels, -weights["ce"])


def _products(
    task: _Task, piece: Piece, gradient: Tensor, slope: Tensor | None, z: Tensor | None, result: _Result
) -> None:
    """A chunk's gradient of the logits, back through w2 and the head, into `result`."""
    if result.d_hidden is None and result.d_z is None and result.d_w2 is None:
        return
    narrow = gradient.to(task.hidden.dtype)
    if z is not None and task.w2 is not None:
        of_bias = narrow.to(task.w2.dtype)
        if result.d_z is not None:
            result.d_z[piece.rows] = of_bias @ task.w2
        if result.d_w2 is not None:
            _add_product(result.d_w2, of_bias.t(), z)
    if result.d_hidden is not None:
        if slope is not None:
            narrow = gradient.mul_(slope).to(task.hidden.dtype)
        back = narrow @ task.head.weight
        result.d_hidden[piece.rows] = back if task.head.scale == 1.0 else back * task.head.scale


def _sum_of_sizes(x: Tensor) -> Tensor:
    """[b] of [b, V]: the sums of |x|. On a CPU, the kernel of the norm takes twice the time of two passes."""
    return x.abs().sum(1) if x.device.type == "cpu" else torch.linalg.vector_norm(x, ord=1, dim=1)


def _dots(left: Tensor, right: Tensor) -> Tensor:
    """[b] of [b, V] twice: the sums of left x right. On a CPU, one-row products take twice the time."""
    if left.device.type == "cpu":
        return (left * right).sum(1)
    return torch.bmm(left[:, None], right[..., None]).flatten()


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
