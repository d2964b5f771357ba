"""The head and the losses of every draft, in chunks of rows: tensors as wide as the vocabulary stay small.

A draft's logits are the widest tensors of training: 448 rows of a 151,936-word vocabulary are 272 MB in
float32, and a loss written out plainly keeps half a dozen of them. Here the gradient is formed together
with the loss, one chunk of rows at a time, and only tensors as narrow as the inputs outlive their chunk.

Shapes: N loss rows; n rows of one chunk; d draft hidden width; dt target hidden width; V vocabulary of the
draft's head; W vocabulary of the teacher's head (W = V, unless the draft's is reduced); r Markov rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from deepspec.maths.chunking import default_chunk_rows
from deepspec.maths.formed import needs_gradient, with_gradients
from deepspec.maths.head import Head
from deepspec.maths.terms import TERMS


def head_loss(
    hidden: Tensor,
    head: Head,
    *,
    weights: Mapping[str, Tensor],
    labels: Tensor | None = None,
    teacher_hidden: Tensor | None = None,
    teacher_head: Head | None = None,
    markov: tuple[Tensor, Tensor] | None = None,
    chunk_rows: int | None = None,
) -> HeadLoss:
    """Weighted losses of N rows against labels, a teacher's distribution, or both, in nats (l1 has no unit).

    hidden: [N, d], what the draft feeds its head. markov: (z [N, r], w2 [V, r]); z @ w2.T is added to the
    logits after the soft-cap. teacher_hidden: [N, dt], read through teacher_head. labels: [N] target ids.
    weights: term -> [N], no gradient. With p the draft's and t the teacher's distribution, terms of a row are

        ce       -log p[label]                      DFlash, DSpark (arXiv 2607.05147)
        soft_ce  -sum_v t log p                     Eagle-3 (arXiv 2503.01840)
        l1       sum_v |p - t|                      DSpark; twice the total variation distance

    The total is differentiable with respect to hidden, z and w2 (once). Heads and the teacher are frozen.
    Matrix products run in the dtype of their rows, the rest in float32 (float64 for float64 rows).

    A row whose weights are all zero adds nothing to any sum or gradient, whatever it holds, infinities and
    NaN included. A label may be out of range where the row's ce weight is zero.

    Reduced vocabulary (`head.kept`): labels and the teacher's head stay in target ids. A label that is not
    kept has ce weight zero; soft_ce and l1 see the teacher's distribution renormalised over kept ids;
    `accept` is measured against its full distribution.

    chunk_rows: rows per chunk; None chooses about 24 MiB per chunk-wide tensor.
    Raises ValueError for a label out of range.
    """
    z, w2 = markov if markov is not None else (None, None)
    given = _Task(hidden, head, dict(weights), labels, teacher_hidden, teacher_head, z, w2)
    _check(given)
    if chunk_rows is None:
        chunk_rows = default_chunk_rows(teacher_head.vocab_size if teacher_head else head.vocab_size)
    assert chunk_rows >= 1, f"chunk_rows must be at least 1, not {chunk_rows}"
    wants = needs_gradient(hidden), needs_gradient(z), needs_gradient(w2)
    with torch.no_grad():
        result = _walk(_prepare(given), *wants, chunk_rows)
    sums = {term: values.sum() for term, values in result.terms.items()}
    total = torch.stack(list(sums.values())).sum() if sums else torch.zeros((), device=hidden.device)
    if any(wants):
        total = with_gradients(total, (hidden, z, w2), (result.d_hidden, result.d_z, result.d_w2))
    return HeadLoss(total, sums, result.accept, result.correct)


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
    """total: scalar, differentiable. terms: each term's weighted sum, detached, before adding them up.

    accept: [N] in [0, 1], the probability that a token drawn from the draft survives verification,
    sum_v min(p, t) = 1 - l1 / 2 (Leviathan 2023, section 3), detached; None without a teacher.
    correct: [N] bool, the draft's best token is the teacher's best (without a teacher: the label).
    """

    total: Tensor
    terms: dict[str, Tensor]
    accept: Tensor | None
    correct: Tensor


@dataclass(frozen=True)
class _Task:
    """The inputs of one call: first as given, then checked and in the dtypes that the maths uses."""

    hidden: Tensor  # [N, d]
    head: Head  # prepared: its weight in the dtype of `hidden`
    weights: dict[str, Tensor]  # term -> [N]; prepared: in the dtype of the maths
    labels: Tensor | None  # [N] target ids; prepared: row numbers of the head, all in range
    teacher_hidden: Tensor | None  # [N, dt]
    teacher_head: Head | None
    z: Tensor | None  # [N, r]
    w2: Tensor | None  # [V, r]; prepared: in the dtype of `z`
    known: Tensor | None = None  # [N] bool: the label is in the draft's vocabulary
    dead: Tensor | None = None  # [N] bool: no weight at all; None where every row counts
    dtype: torch.dtype = torch.float32  # of the maths


@dataclass(frozen=True)
class _Result:
    """What outlives the chunks: nothing here is as large as rows times vocabulary. A gradient that no
    backward pass can ask for is None."""

    terms: dict[str, Tensor]  # term -> [N], weighted
    accept: Tensor | None  # [N]
    correct: Tensor  # [N] bool
    d_hidden: Tensor | None  # [N, d]
    d_z: Tensor | None  # [N, r]
    d_w2: Tensor | None  # [V, r]


@dataclass(frozen=True)
class _Workspace:
    """Chunk-wide tensors, allocated once per call and overwritten by every chunk."""

    draft: Tensor  # [n, V]
    spare: Tensor  # [n, V]
    slope: Tensor | None  # [n, V], where a soft-cap has to be differentiated
    teacher: Tensor | None  # [n, V]
    teacher_full: Tensor | None  # [n, W], for a reduced vocabulary

    def rows(self, count: int) -> _Workspace:
        """The first `count` rows of everything: the last chunk is shorter."""
        return _Workspace(*(None if t is None else t[:count] for t in vars(self).values()))  # type: ignore[arg-type]


class _Teacher(NamedTuple):
    """One chunk's teacher: what is left after its logits were turned into probabilities in place."""

    probabilities: Tensor  # [n, V], renormalised over kept ids
    best: Tensor  # [n] target id
    mass: Tensor | None  # [n, 1] share of the full distribution on kept ids; None for a full vocabulary


def _check(task: _Task) -> None:
    """Refuse inputs that do not fit together: only a mistake in a draft's own code can make them."""
    head, teacher, terms = task.head, task.teacher_head, task.weights
    per_row = [task.hidden, *terms.values(), task.labels, task.teacher_hidden, task.z]
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
    """Dtypes settled, labels mapped to rows of the draft's head, rows without weight marked."""
    hidden, head, labels, known = task.hidden, task.head, task.labels, None
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    weights = {term: weight.detach().to(dtype) for term, weight in task.weights.items()}
    if labels is not None:
        labels, known = head.rows_of(labels)
        if "ce" in weights:
            if head.kept is None and bool((~known & (weights["ce"] != 0)).any()):
                raise ValueError(f"a label with a ce weight lies outside 0 ... {head.vocab_size - 1}")
            weights["ce"] = weights["ce"].masked_fill(~known, 0.0)
    dead = torch.ones(hidden.shape[0], dtype=torch.bool, device=hidden.device)
    for weight in weights.values():
        dead &= weight == 0
    teacher_head = task.teacher_head
    if teacher_head is not None and task.teacher_hidden is not None:
        teacher_head = teacher_head.to(task.teacher_hidden.dtype)
    return replace(
        task,
        head=head.to(hidden.dtype),
        weights=weights,
        labels=labels,
        teacher_head=teacher_head,
        w2=task.w2 if task.w2 is None or task.z is None else task.w2.to(task.z.dtype),
        known=known,
        dead=dead if bool(dead.any()) else None,
        dtype=dtype,
    )


def _walk(task: _Task, wants_hidden: bool, wants_z: bool, wants_w2: bool, chunk_rows: int) -> _Result:
    """All rows, one chunk after the other."""
    count, new = task.hidden.shape[0], partial(torch.empty, dtype=task.dtype, device=task.hidden.device)
    result = _Result(
        terms={term: new(count) for term in task.weights},
        accept=None if task.teacher_head is None else new(count),
        correct=torch.empty(count, dtype=torch.bool, device=task.hidden.device),
        d_hidden=new(task.hidden.shape) if wants_hidden else None,
        d_z=new(task.z.shape) if wants_z and task.z is not None else None,
        d_w2=new(task.w2.shape).zero_() if wants_w2 and task.w2 is not None else None,
    )
    head, teacher_head = task.head, task.teacher_head
    narrow = (min(chunk_rows, count), head.vocab_size)
    wide = None if teacher_head is None or head.kept is None else (narrow[0], teacher_head.vocab_size)
    space = _Workspace(
        draft=new(narrow),
        spare=new(narrow),
        slope=new(narrow) if wants_hidden and head.softcap is not None else None,
        teacher=None if teacher_head is None else new(narrow),
        teacher_full=None if wide is None else new(wide),
    )
    for start in range(0, count, chunk_rows):
        rows = slice(start, min(start + chunk_rows, count))
        part = space.rows(rows.stop - rows.start)
        _chunk_terms(task, rows, part, result)
        if wants_hidden or wants_z or wants_w2:
            _chunk_gradients(task, rows, part, result)
    return result


def _chunk_terms(task: _Task, rows: slice, space: _Workspace, result: _Result) -> None:
    """The loss terms of one chunk, into `result`. Leaves p in space.draft and t in space.teacher."""
    draft, spare = space.draft, space.spare
    task.head.logits_into(draft, task.hidden[rows], space.slope)
    if task.z is not None and task.w2 is not None:
        _add_product(draft, task.z[rows], task.w2)
    best = _shift(draft)
    found: dict[str, Tensor] = {}
    if task.labels is not None:
        found["ce"] = -draft.gather(1, task.labels[rows, None]).squeeze(1)
    teacher = _teacher(task, rows, space)
    if teacher is not None and "soft_ce" in task.weights:
        found["soft_ce"] = -torch.mul(teacher.probabilities, draft, out=spare).sum(1)
    log_total = _normalise(draft).squeeze(1)
    # Up to here the log-probabilities lacked their common constant; t sums to one, so it is simply added.
    for term in found:
        found[term] += log_total
    if teacher is not None and result.accept is not None:
        found["l1"], accept = _overlap(draft, teacher, spare)
        if task.dead is not None:
            # A row without weight may hold NaN, which must not reach a sum later. Any other NaN must be seen.
            accept = torch.where(task.dead[rows], accept.nan_to_num(nan=0.0), accept)
        result.accept[rows] = accept.clamp(0.0, 1.0)
    for term, weight in task.weights.items():
        part = weight[rows]
        result.terms[term][rows] = torch.where(part == 0, torch.zeros_like(part), part * found[term])
    result.correct[rows] = _correct(task, rows, best, teacher)


def _chunk_gradients(task: _Task, rows: slice, space: _Workspace, result: _Result) -> None:
    """Gradients of one chunk's weighted terms, from p and t, into `result`.

    With respect to the logits: ce p - onehot(label); soft_ce p - t; l1 p (s - <p, s>), where
    s = sign(p - t). p appears in all of them, so its factors are gathered into one per row.
    """
    draft, teacher, gradient = space.draft, space.teacher, space.spare
    weights = {term: weight[rows, None] for term, weight in task.weights.items()}
    of_teacher = weights.get("soft_ce", torch.zeros_like(draft[:, :1]))
    of_draft = of_teacher + weights["ce"] if "ce" in weights else of_teacher
    if "l1" in weights and teacher is not None:
        torch.sub(draft, teacher, out=gradient).sign_().mul_(draft)
        inner = gradient.sum(1, keepdim=True)
        gradient.mul_(weights["l1"]).addcmul_(draft, of_draft - weights["l1"] * inner)
    else:
        torch.mul(draft, of_draft, out=gradient)
    if teacher is not None and "soft_ce" in weights:
        gradient.addcmul_(teacher, of_teacher, value=-1.0)
    if "ce" in weights and task.labels is not None:
        gradient.scatter_add_(1, task.labels[rows, None], -weights["ce"])
    dead = None if task.dead is None else task.dead[rows, None]
    if dead is not None:
        gradient.masked_fill_(dead, 0.0)
    if task.z is not None and task.w2 is not None:
        if result.d_z is not None:
            result.d_z[rows] = gradient.to(task.w2.dtype) @ task.w2
        if result.d_w2 is not None:
            z = task.z[rows] if dead is None else task.z[rows].masked_fill(dead, 0.0)
            result.d_w2.addmm_(gradient.t(), z.to(gradient.dtype))
    if result.d_hidden is not None:
        if space.slope is not None:
            gradient.mul_(space.slope)
            if dead is not None:
                gradient.masked_fill_(dead, 0.0)
        result.d_hidden[rows] = gradient.to(task.head.weight.dtype) @ task.head.weight
        if task.head.scale != 1.0:
            result.d_hidden[rows] *= task.head.scale


def _add_product(logits: Tensor, z: Tensor, w2: Tensor) -> None:
    """logits [n, V] += z [n, r] @ w2.T, in place."""
    if z.dtype == logits.dtype:
        logits.addmm_(z, w2.t())
    else:
        logits.add_(z @ w2.t())


def _shift(logits: Tensor) -> Tensor:
    """Subtract each row's maximum in place, so that exponentials cannot overflow; its place [n]."""
    best = logits.argmax(1, keepdim=True)
    logits.sub_(logits.gather(1, best))
    return best.squeeze(1)


def _normalise(shifted: Tensor) -> Tensor:
    """Shifted logits -> probabilities, in place; log of the sum of exponentials [n, 1]."""
    total = shifted.exp_().sum(1, keepdim=True)
    shifted.div_(total)
    return total.log_()


def _teacher(task: _Task, rows: slice, space: _Workspace) -> _Teacher | None:
    """The teacher's distribution of one chunk, in space.teacher."""
    if task.teacher_hidden is None or task.teacher_head is None or space.teacher is None:
        return None
    kept, mass, probabilities = task.head.kept, None, space.teacher
    full = probabilities if space.teacher_full is None else space.teacher_full
    task.teacher_head.logits_into(full, task.teacher_hidden[rows])
    best = _shift(full)
    highest: Tensor | None = None
    if kept is not None:
        torch.index_select(full, 1, kept, out=probabilities)
        highest = probabilities.gather(1, probabilities.argmax(1, keepdim=True))
        probabilities.sub_(highest)
    log_total = _normalise(probabilities)
    if highest is not None:
        mass = torch.exp(highest + log_total - _normalise(full))
    return _Teacher(probabilities, best, mass)


def _overlap(draft: Tensor, teacher: _Teacher, spare: Tensor) -> tuple[Tensor, Tensor]:
    """(l1 [n] against the renormalised teacher, acceptance [n] against the full one)."""
    torch.sub(draft, teacher.probabilities, out=spare)
    l1 = torch.linalg.vector_norm(spare, ord=1, dim=1)
    if teacher.mass is None:
        return l1, 1.0 - 0.5 * l1
    torch.mul(teacher.probabilities, teacher.mass, out=spare)
    return l1, torch.minimum(spare, draft, out=spare).sum(1)


def _correct(task: _Task, rows: slice, best: Tensor, teacher: _Teacher | None) -> Tensor:
    """[n] bool: the draft's best row of the head against the teacher's best, or against the label."""
    if teacher is not None:
        return (best if task.head.kept is None else task.head.kept[best]) == teacher.best
    assert task.labels is not None and task.known is not None
    return (best == task.labels[rows]) & task.known[rows]
