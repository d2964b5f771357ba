"""Every number of the golden cases: tiny drafts and targets in the released layouts, and what they must give.

The cases are data that lie beside the repository (DEEPSPEC_GOLDEN_DIR, by default ../shared/golden). A case
is a folder with golden.safetensors; a new one needs no new code here. Each tensor of the file is a test of
its own: its name is looked up in `CHECKS`, and a name that nothing computes is a failure.

B sequences, S tokens, A anchors, γ slots, V vocabulary, d hidden width, m captured layers, K unroll steps.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from deepspec.drafts.base import tau_sums
from deepspec.drafts.dspark import DSparkDraft
from deepspec.drafts.eagle3 import Eagle3Draft
from deepspec.maths.blocks import anchor_candidates
from deepspec.maths.positions import position_weights
from deepspec.targets import StepOutput
from golden_case import EPS, FOLDER, Case, the_case
from reference.attention import block_mask

REQUIRED = os.environ.get("DEEPSPEC_REQUIRE_GOLDEN") == "1"
MISSING = f"no golden cases at {FOLDER}; set DEEPSPEC_GOLDEN_DIR to the folder that holds them"
CASES = sorted(p.parent.name for p in FOLDER.glob("*/golden.safetensors"))


class Tolerance(NamedTuple):
    absolute: float
    relative: float


EXACT = Tolerance(0.0, 0.0)
HIDDEN = Tolerance(1e-4, 0.0)  # hidden states, logits, and what is read off one logit row
SUMS = Tolerance(1e-7, 1e-5)  # loss sums and other sums over rows
GRADIENT_L2 = 1e-3  # relative


@cache
def names_in(case: str, file: str = "golden.safetensors") -> tuple[str, ...]:
    with safe_open(FOLDER / case / file, "pt") as opened:
        return tuple(opened.keys())


# ── name -> what must be equal to it ──────────────────────────────────────────────────────────────────

Found = Tensor | tuple[Tensor, Tensor]
"""A tensor, or one with a mask [...] of the entries that mean something."""


class Check(NamedTuple):
    compute: Callable[..., Found]
    tolerance: Tolerance


CHECKS: dict[str, Check] = {}
"""Pattern of a whole name -> check; its groups are the numbers that `compute` gets after the case."""

NOT_COMPUTED = {
    r"train\.(input_ids|loss_mask|attention_mask)": "the input of the training tensors",
    r"decode\.prompt_ids": "the input of the decode tensors",
    r"decode_thr\.threshold": "the input of the threshold run",
}


def computes(*patterns: str, tolerance: Tolerance) -> Callable[[Callable[..., Found]], Callable[..., Found]]:
    def register(function: Callable[..., Found]) -> Callable[..., Found]:
        for pattern in patterns:
            CHECKS[pattern] = Check(function, tolerance)
        return function

    return register


def check_for(name: str) -> tuple[Check, list[int]] | None:
    for pattern, check in CHECKS.items():
        if found := re.fullmatch(pattern, name):
            return check, [int(g) for g in found.groups()]
    return None


# The target.


@computes(r"train\.target_hidden_states", tolerance=HIDDEN)
def target_features(case: Case) -> Found:
    assert case.read.features is not None
    return case.read.features, case.real


@computes(r"train\.target_last_hidden_states", tolerance=HIDDEN)
def target_last_hidden(case: Case) -> Found:
    return case.read.last_hidden, case.real


@computes(r"train\.target_logits", tolerance=HIDDEN)
def target_logits(case: Case) -> Found:
    return case.draft.teacher_head.logits(case.batch.last_hidden), case.real


# Blocks: layout.


@computes(r"train\.anchor_candidate_mask", tolerance=EXACT)
def candidates(case: Case) -> Found:
    return anchor_candidates(case.batch.loss_mask)


@computes(r"train\.anchor_positions", tolerance=EXACT)
def positions_of_anchors(case: Case) -> Found:
    return case.blocks.anchors


@computes(r"train\.block_keep_mask", tolerance=EXACT)
def kept_blocks(case: Case) -> Found:
    allowed = anchor_candidates(case.batch.loss_mask).gather(1, case.blocks.anchors)
    return case.blocks.kept & allowed


@computes(r"train\.attn_allowed", tolerance=EXACT)
def allowed_attention(case: Case) -> Found:
    """A dummy's rows, which the released code lets see nothing, are left out."""
    blocks = case.blocks
    allowed = block_mask(blocks.anchors, blocks.kept, blocks.input_ids.shape[-1], case.length, None)
    return allowed & blocks.kept.repeat_interleave(blocks.input_ids.shape[-1], dim=1)[..., None]


@computes(r"train\.position_ids", tolerance=EXACT)
def position_ids(case: Case) -> Found:
    context = torch.arange(case.length).expand(len(case.batch.input_ids), -1)
    return torch.cat([context, case.blocks.positions.flatten(1)], dim=1)


@computes(r"train\.target_ids", tolerance=EXACT)
def labels(case: Case) -> Found:
    return case.blocks.labels


@computes(r"train\.eval_mask", tolerance=EXACT)
def supervised(case: Case) -> Found:
    return case.blocks.valid


@computes(r"train\.loss_weight_mask", tolerance=SUMS)
def slot_weights(case: Case) -> Found:
    weights = position_weights(case.draft.max_proposals, case.loss.decay_gamma)
    # A slot 0 that proposes nothing weighs nothing.
    return torch.nn.functional.pad(weights, (case.draft.spec.block - len(weights), 0)) * case.blocks.valid


# Blocks: hidden rows and what the heads make of them.


@computes(r"train\.block_hidden", tolerance=HIDDEN)
def block_hidden(case: Case) -> Found:
    return case.hidden, case.blocks.kept


@computes(r"train\.base_logits", tolerance=HIDDEN)
def base_logits(case: Case) -> Found:
    return case.draft.head.logits(case.hidden), case.blocks.kept


@computes(r"train\.draft_logits", tolerance=HIDDEN)
def draft_logits(case: Case) -> Found:
    logits = case.draft.head.logits(case.hidden)
    if case.z is not None:
        logits = logits + case.draft.markov_head.markov_w2(case.z)
    return logits, case.blocks.kept


@computes(r"train\.confidence_pred", tolerance=HIDDEN)
def confidence(case: Case) -> Found:
    assert isinstance(case.draft, DSparkDraft)
    logits = case.draft.confidence_logits(case.draft.embed_previous(case.blocks.previous), case.hidden)
    assert logits is not None
    return logits, case.blocks.kept


@computes(r"train\.aligned_target_logits", tolerance=HIDDEN)
def aligned_logits(case: Case) -> Found:
    return case.draft.teacher_head.logits(case.aligned_last_hidden), case.blocks.kept


@computes(r"train\.accept_rate", tolerance=HIDDEN)
def accept_rate(case: Case) -> Found:
    assert case.every_slot.accept is not None
    return case.every_slot.accept.view(case.blocks.valid.shape), case.blocks.kept


# Blocks: sums and losses. A term of weight zero is not computed by the reference: both its parts are 0.


def term(case: Case, name: str) -> tuple[Tensor, Tensor]:
    """(numerator, denominator) of a loss term, unweighted by its alpha."""
    sums, zero = case.term_sums, torch.zeros(())
    if f"{name}_sum" not in sums.metrics or (name != "ce" and not getattr(case.loss, name)):
        return zero, zero
    return sums.metrics[f"{name}_sum"], sums.weight


def loss_of(case: Case, name: str) -> Tensor:
    numerator, denominator = term(case, name)
    return numerator / (denominator + EPS)


for _name in ("ce", "l1", "confidence"):
    CHECKS[rf"train\.term\.{_name}_loss_num"] = Check(lambda case, n=_name: term(case, n)[0], SUMS)
    CHECKS[rf"train\.term\.{_name}_loss_den"] = Check(lambda case, n=_name: term(case, n)[1], SUMS)
    CHECKS[rf"train\.{_name}_loss"] = Check(lambda case, n=_name: loss_of(case, n), SUMS)


@computes(r"train\.loss", tolerance=SUMS)
def loss(case: Case) -> Found:
    return case.sums.total / (case.sums.weight + EPS)


@computes(r"train\.grad_norm", tolerance=Tolerance(0.0, GRADIENT_L2))
def gradient_norm(case: Case) -> Found:
    return torch.stack([g.norm() for g in case.gradients.values()]).norm()


@computes(r"train\.metric\.tau_prob_num", r"train\.metric\.tau_probabilistic_num", tolerance=SUMS)
def tau_sum(case: Case) -> Found:
    return case.sums.metrics["tau_num"]


@computes(r"train\.metric\.tau_prob_den", r"train\.metric\.tau_probabilistic_den", tolerance=EXACT)
def tau_count(case: Case) -> Found:
    return case.sums.metrics["tau_den"]


# Eagle-3.


def live(case: Case, step: int) -> Tensor:
    """[B, S] bool: rows that read a real token at an unroll step; the others mean nothing."""
    return torch.arange(case.length) < (case.batch.lengths - step)[:, None]


@computes(r"train\.hidden_step(\d+)", tolerance=HIDDEN)
def hidden_step(case: Case, step: int) -> Found:
    return case.states[step], live(case, step)


@computes(r"train\.draft_logits_step(\d+)", tolerance=HIDDEN)
def logits_step(case: Case, step: int) -> Found:
    return case.draft.head.logits(case.draft.norm(case.states[step])), live(case, step)


@computes(r"train\.position_masks", tolerance=EXACT)
def position_masks(case: Case) -> Found:
    return case.masks


@computes(r"train\.ploss", tolerance=SUMS)
def step_losses(case: Case) -> Found:
    decay = case.draft.spec.step_loss_decay
    sums = [case.sums.metrics[f"kl_{step}_sum"] / decay**step for step in range(case.draft.spec.block)]
    return torch.stack(sums) / case.batch.input_ids.numel()


@computes(r"train\.metric\.accept_rate_num_step(\d+)", tolerance=SUMS)
def accept_sum(case: Case, step: int) -> Found:
    return case.sums.metrics["accept_num"][step]


@computes(
    r"train\.metric\.accept_rate_den_step(\d+)", r"train\.metric\.accuracy_den_step(\d+)", tolerance=EXACT
)
def row_count(case: Case, step: int) -> Found:
    return case.sums.metrics["accept_den"][step]


@computes(r"train\.metric\.accuracy_num_step(\d+)", tolerance=EXACT)
def correct_count(case: Case, step: int) -> Found:
    return case.sums.metrics[f"correct_{step}_num"]


@computes(r"train\.metric\.tau_greedy_num", tolerance=EXACT)
def greedy_tau_sum(case: Case) -> Found:
    return tau_sums(case.correct.float(), case.masks.permute(1, 2, 0).float())["tau_num"]


@computes(r"train\.metric\.tau_greedy_den", tolerance=EXACT)
def greedy_tau_count(case: Case) -> Found:
    return tau_sums(case.correct.float(), case.masks.permute(1, 2, 0).float())["tau_den"]


# Decoding: whole runs.


@computes(r"decode\.prompt_target_hidden_states", tolerance=HIDDEN)
def prompt_features(case: Case) -> Found:
    return prompt_pass(case).features


@computes(r"decode\.prompt_target_last_hidden_states", tolerance=HIDDEN)
def prompt_last_hidden(case: Case) -> Found:
    return prompt_pass(case).last_hidden


def prompt_pass(case: Case) -> StepOutput:
    """The prompt in two cached steps; the uncached pass is what the training tensors check."""
    target, prompt, layers = case.target, case.prompt, case.draft.feature_layers
    cut = len(prompt) // 2
    target.open(0)
    parts = [target.step([0], [part], layers) for part in (prompt[:cut], prompt[cut:])]
    target.free(0)
    return StepOutput(*(torch.cat(tensors, dim=1) for tensors in zip(*parts, strict=True)))


@computes(r"decode\.output_ids", tolerance=EXACT)
def output_ids(case: Case) -> Found:
    return torch.tensor([[*case.prompt, *case.decoded.generation.token_ids]])


@computes(r"decode\.plain_greedy_ids", tolerance=EXACT)
def plain_ids(case: Case) -> Found:
    return torch.tensor([case.plain])


@computes(r"decode\.acceptance_lengths", tolerance=EXACT)
def committed(case: Case) -> Found:
    return torch.tensor(case.decoded.generation.committed_per_round)


@computes(r"decode\.accepted_draft_lengths", tolerance=EXACT)
def accepted(case: Case) -> Found:
    return torch.tensor(case.decoded.generation.accepted)


@computes(r"decode\.proposal_lengths", tolerance=EXACT)
def proposed(case: Case) -> Found:
    return torch.tensor(case.decoded.generation.proposed)


@computes(r"decode\.next_tokens", tolerance=EXACT)
def next_tokens(case: Case) -> Found:
    return torch.tensor([r.following[-1] for r in case.decoded.rounds])


@computes(r"decode\.verify_input_ids", tolerance=EXACT)
def verified_ids(case: Case) -> Found:
    width = case.golden["decode.verify_input_ids"].shape[1]
    return torch.tensor([r.verified + [-1] * (width - len(r.verified)) for r in case.decoded.rounds])


@computes(r"decode\.min_draft_margin", tolerance=HIDDEN)
def draft_margin(case: Case) -> Found:
    return min_gap(torch.cat([torch.cat(r.logits) for r in case.decoded.rounds]))


@computes(r"decode\.min_target_margin", tolerance=HIDDEN)
def target_margin(case: Case) -> Found:
    ids = torch.tensor([case.plain])
    logits = case.target.logits(case.target.read(ids, ()).last_hidden)
    return min_gap(logits[0, len(case.prompt) - 1 : -1])


def min_gap(logits: Tensor) -> Tensor:
    best = logits.topk(2, dim=-1).values
    return (best[..., 0] - best[..., 1]).min()


# Decoding: single rounds.


@computes(r"decode\.round(\d+)\.past_len", tolerance=EXACT)
def past_length(case: Case, index: int) -> Found:
    found = case.decoded.rounds[index]
    if isinstance(case.draft, Eagle3Draft):
        return torch.tensor(found.past)
    # The reference counts a block draft's cache before this round's context joins it.
    return torch.tensor(found.past - len(found.context))


@computes(r"decode\.round(\d+)\.ctx_hidden", tolerance=HIDDEN)
def new_context(case: Case, index: int) -> Found:
    return case.decoded.rounds[index].context[None]


@computes(r"decode\.round(\d+)\.block_hidden", tolerance=HIDDEN)
def decoded_block(case: Case, index: int) -> Found:
    ((_, output),) = case.decoded.rounds[index].normed
    return output


@computes(r"decode\.round(\d+)\.base_logits", tolerance=HIDDEN)
def decoded_base_logits(case: Case, index: int) -> Found:
    ((_, output),) = case.decoded.rounds[index].normed
    return case.draft.head.logits(output)


@computes(r"decode\.round(\d+)\.hidden", tolerance=HIDDEN)
def decoded_states(case: Case, index: int) -> Found:
    return torch.cat([state for state, _ in case.decoded.rounds[index].normed])[None]


@computes(r"decode\.round(\d+)\.logits", tolerance=HIDDEN)
def decoded_logits(case: Case, index: int) -> Found:
    return torch.cat(case.decoded.rounds[index].logits)[None]


@computes(r"decode\.round(\d+)\.tokens", tolerance=EXACT)
def decoded_tokens(case: Case, index: int) -> Found:
    proposal = case.decoded.rounds[index].proposal
    assert proposal is not None
    return proposal.tokens


@computes(r"decode\.round(\d+)\.conf", tolerance=HIDDEN)
def decoded_confidence(case: Case, index: int) -> Found:
    proposal = case.decoded.rounds[index].proposal
    assert proposal is not None and proposal.confidence is not None
    return proposal.confidence


@computes(r"decode\.round(\d+)\.target_logits", tolerance=HIDDEN)
def verified_logits(case: Case, index: int) -> Found:
    return case.decoded.rounds[index].target_logits[None]


# Decoding with a confidence threshold.


@computes(r"decode_thr\.output_ids", tolerance=EXACT)
def threshold_ids(case: Case) -> Found:
    return torch.tensor([case.thresholded.tokens])


@computes(r"decode_thr\.proposal_lengths", tolerance=EXACT)
def threshold_proposed(case: Case) -> Found:
    return torch.tensor(case.thresholded.proposed)


@computes(r"decode_thr\.accepted_draft_lengths", tolerance=EXACT)
def threshold_accepted(case: Case) -> Found:
    return torch.tensor(case.thresholded.accepted)


@computes(r"decode_thr\.acceptance_lengths", tolerance=EXACT)
def threshold_committed(case: Case) -> Found:
    return torch.tensor(case.thresholded.accepted) + 1


@computes(r"decode_thr\.min_conf_margin", tolerance=HIDDEN)
def threshold_margin(case: Case) -> Found:
    return torch.tensor(case.thresholded.margin)


# ── the tests ─────────────────────────────────────────────────────────────────────────────────────────


def each(pairs: list[tuple[str, str]]) -> list[Any]:
    if pairs:
        return [pytest.param(*pair, id="-".join(pair)) for pair in pairs]
    return [pytest.param("", "", marks=pytest.mark.skip(reason=MISSING))]


KNOWN = [(c, n) for c in CASES for n in names_in(c) if check_for(n) is not None]
TRAINED = [c for c in CASES if (FOLDER / c / "grads.safetensors").is_file()]
GRADIENTS = [(c, n) for c in TRAINED for n in names_in(c, "grads.safetensors")]


def test_golden_cases_are_there_when_they_are_required() -> None:
    if not CASES and not REQUIRED:
        pytest.skip(MISSING)
    assert CASES, MISSING


def test_no_golden_tensor_is_passed_over_in_silence() -> None:
    known = [*CHECKS, *NOT_COMPUTED]
    unknown = [(c, n) for c in CASES for n in names_in(c) if not any(re.fullmatch(p, n) for p in known)]
    assert not unknown, f"nothing here computes {unknown}: add a check, or a reason to NOT_COMPUTED"


@pytest.mark.parametrize(("case_name", "name"), each(KNOWN))
def test_golden_tensor(case_name: str, name: str) -> None:
    found = check_for(name)
    assert found is not None
    check, groups = found
    case = the_case(case_name)
    with torch.no_grad():
        result = check.compute(case, *groups)
    ours, where = result if isinstance(result, tuple) else (result, None)
    compare(ours.detach(), case.golden[name], check.tolerance, where)


def compare(ours: Tensor, golden: Tensor, tolerance: Tolerance, where: Tensor | None) -> None:
    assert ours.shape == golden.shape
    if where is not None:
        assert where.any()
        ours, golden = ours[where], golden[where]
    if tolerance == EXACT:
        assert torch.equal(ours.double(), golden.double())
        return
    torch.testing.assert_close(
        ours.double(), golden.double(), atol=tolerance.absolute, rtol=tolerance.relative
    )


@pytest.mark.parametrize(("case_name", "name"), each(GRADIENTS))
def test_golden_gradient(case_name: str, name: str) -> None:
    case = the_case(case_name)
    golden = load_gradients(case_name)
    assert name in case.gradients, f"{name} got no gradient"
    # The second part lets a gradient be zero but for rounding.
    allowed = GRADIENT_L2 * golden[name].norm() + 1e-7 * case.golden["train.grad_norm"]
    assert case.gradients[name].shape == golden[name].shape
    assert (case.gradients[name] - golden[name]).norm() <= allowed


@cache
def load_gradients(case_name: str) -> dict[str, Tensor]:
    return load_file(FOLDER / case_name / "grads.safetensors")


@pytest.mark.parametrize(("case_name", "_"), each([(c, "trained") for c in TRAINED]))
def test_exactly_the_golden_parameters_are_trained(case_name: str, _: str) -> None:
    assert set(the_case(case_name).gradients) == set(load_gradients(case_name))
