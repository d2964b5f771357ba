"""Losslessness by enumeration (`reference/enumeration.py`), five mutants of `verify` that it must catch,
and the properties of `verify`, `draw` and `warp` against naive float64 loops.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from deepspec.drafts.base import choose
from deepspec.maths.verify import Sampling, Verdict, draw, verify, warp
from reference.enumeration import (
    Verify,
    Warp,
    causal_lengths,
    check_lossless,
    constant,
    dense,
    sparse,
    warped,
)
from reference.verification import Tree, naive_verify, naive_warp, nucleus_mass

exact = settings(derandomize=True, deadline=None, max_examples=60)

WORLDS = {
    "dense V2 γ1": dense(2, 1, seed=0),
    "dense V2 γ3": dense(2, 3, seed=1),
    "dense V3 γ2": dense(3, 2, seed=2),
    "dense V4 γ2": dense(4, 2, seed=3),
    "sparse V2 γ2": sparse(2, 2, seed=4),
    "sparse V3 γ3": sparse(3, 3, seed=5),
    "sparse V4 γ3": sparse(4, 3, seed=6),
    "greedy V2 γ3": warped(2, 3, 7, Sampling()),
    "greedy V4 γ3": warped(4, 3, 8, Sampling()),
    "greedy target V3 γ3": warped(3, 3, 11, Sampling(), draft=Sampling(1.0)),
    "greedy draft V3 γ3": warped(3, 3, 12, Sampling(1.0), draft=Sampling()),
    "top-k V4 γ3": warped(4, 3, 9, Sampling(0.7, top_k=2)),
    "top-p V4 γ2": warped(4, 2, 10, Sampling(1.3, top_p=0.6)),
}


@pytest.mark.parametrize("name", WORLDS)
def test_committed_law_is_the_targets_at_every_constant_length(name: str) -> None:
    world = WORLDS[name]
    for length in range(world.block + 1):
        check_lossless(verify, world, constant(length))


@pytest.mark.parametrize("name", WORLDS)
def test_committed_law_is_the_targets_when_lengths_follow_the_drafted_prefix(name: str) -> None:
    world = WORLDS[name]
    for seed in range(2):
        check_lossless(verify, world, causal_lengths(seed, world.vocabulary, world.block))


def test_the_check_sees_a_length_that_peeks_at_the_token_it_cuts() -> None:
    """The other side of the coin: not `verify` but the caller breaks the law here, and the check says so."""
    with pytest.raises(AssertionError, match="off by"):
        check_lossless(verify, WORLDS["dense V3 γ2"], lambda tokens: 0 if tokens[0] == 1 else 2)


# --- five mutants -----------------------------------------------------------------------------------------


def stopping(survives: Tensor, lengths: Tensor) -> Tensor:
    counted = torch.arange(survives.shape[1]) < lengths[:, None]
    return (survives & counted).long().cumprod(1).sum(1)


def ratio_test(p: Tensor, q: Tensor, tokens: Tensor, uniforms: Tensor) -> Tensor:
    at = tokens[..., None]
    p_token, q_token = p[:, :-1].gather(2, at)[..., 0], q.gather(2, at)[..., 0]
    return uniforms[:, :-1] < p_token.double() / q_token.double()


def at(values: Tensor, positions: Tensor) -> Tensor:
    return values[torch.arange(len(values)), positions.clamp(0, values.shape[1] - 1)]


def unmutated(p: Tensor, q: Tensor, tokens: Tensor, lengths: Tensor, uniforms: Tensor) -> Verdict:
    """What the four mutants below depart from, each in one place."""
    accepted = stopping(ratio_test(p, q, tokens, uniforms), lengths)
    replacement = (at(p, accepted) - at(q, accepted)).clamp(min=0)
    weights = torch.where((accepted == lengths)[:, None], at(p, accepted), replacement)
    return Verdict(accepted, draw(weights, uniforms[:, -1]))


def accepts_on_p_above_u(p: Tensor, q: Tensor, tokens: Tensor, lengths: Tensor, uniforms: Tensor) -> Verdict:
    p_token = p[:, :-1].gather(2, tokens[..., None])[..., 0]
    accepted = stopping(p_token > uniforms[:, :-1], lengths)
    replacement = (at(p, accepted) - at(q, accepted)).clamp(min=0)
    weights = torch.where((accepted == lengths)[:, None], at(p, accepted), replacement)
    return Verdict(accepted, draw(weights, uniforms[:, -1]))


def residual_not_renormalised(
    p: Tensor, q: Tensor, tokens: Tensor, lengths: Tensor, uniforms: Tensor
) -> Verdict:
    """The inverse CDF is looked up at u itself, so the missing mass falls to the last token."""
    accepted = stopping(ratio_test(p, q, tokens, uniforms), lengths)
    replacement = (at(p, accepted) - at(q, accepted)).clamp(min=0)
    weights = torch.where((accepted == lengths)[:, None], at(p, accepted), replacement)
    below = weights.double().cumsum(1) <= uniforms[:, -1:]
    return Verdict(accepted, below.sum(1).clamp(max=p.shape[2] - 1))


def bonus_from_q(p: Tensor, q: Tensor, tokens: Tensor, lengths: Tensor, uniforms: Tensor) -> Verdict:
    accepted = stopping(ratio_test(p, q, tokens, uniforms), lengths)
    replacement = (at(p, accepted) - at(q, accepted)).clamp(min=0)
    weights = torch.where((accepted == lengths)[:, None], at(q, accepted), replacement)
    return Verdict(accepted, draw(weights, uniforms[:, -1]))


def wrong_index_after_rejection(
    p: Tensor, q: Tensor, tokens: Tensor, lengths: Tensor, uniforms: Tensor
) -> Verdict:
    accepted = stopping(ratio_test(p, q, tokens, uniforms), lengths)
    replacement = (at(p, accepted + 1) - at(q, accepted)).clamp(min=0)
    weights = torch.where((accepted == lengths)[:, None], at(p, accepted), replacement)
    return Verdict(accepted, draw(weights, uniforms[:, -1]))


def softmax_at_zero(logits: Tensor, sampling: Sampling) -> Tensor:
    """Takes temperature 0 for "no temperature": greedy becomes stochastic without a word."""
    return (logits / sampling.temperature if sampling.temperature else logits).softmax(-1)


def cold_softmax(logits: Tensor, sampling: Sampling) -> Tensor:
    """A very low temperature instead of greedy: right until two logits tie."""
    return (logits / max(sampling.temperature, 1e-6)).softmax(-1)


ENUMERATED = ["dense V3 γ2", "sparse V3 γ3", "top-k V4 γ3"]


@pytest.mark.parametrize("name", ENUMERATED)
def test_the_mutants_starting_point_passes(name: str) -> None:
    """So that a mutant below is caught for its one change and for nothing else."""
    world = WORLDS[name]
    for length in range(world.block + 1):
        check_lossless(unmutated, world, constant(length))


@pytest.mark.parametrize("name", ENUMERATED)
@pytest.mark.parametrize(
    "mutant", [accepts_on_p_above_u, residual_not_renormalised, bonus_from_q, wrong_index_after_rejection]
)
def test_a_mutant_of_verify_breaks_the_law(mutant: Verify, name: str) -> None:
    world = WORLDS[name]
    with pytest.raises(AssertionError, match="off by"):
        check_lossless(mutant, world, constant(world.block))


def greedy_by_hand(logits: Tensor, _: Sampling) -> Tensor:
    return torch.tensor(naive_warp(logits.tolist(), 0))


GREEDY_SEEDS = range(8, 14)  # on the worlds of 8 and 10 no two maxima tie


@pytest.mark.parametrize("seed", GREEDY_SEEDS)
def test_greedy_commits_exactly_the_first_maximum(seed: int) -> None:
    truth: Tree = warped(3, 2, seed, Sampling(), greedy_by_hand).target
    check_lossless(verify, warped(3, 2, seed, Sampling()), constant(2), truth)


@pytest.mark.parametrize(
    ("mutant", "caught"), [(softmax_at_zero, set(GREEDY_SEEDS)), (cold_softmax, {9, 11, 12, 13})]
)
def test_a_softmax_at_temperature_zero_is_not_greedy(mutant: Warp, caught: set[int]) -> None:
    found = set()
    for seed in GREEDY_SEEDS:
        truth: Tree = warped(3, 2, seed, Sampling(), greedy_by_hand).target
        try:
            check_lossless(verify, warped(3, 2, seed, Sampling(), mutant), constant(2), truth)
        except AssertionError:
            found.add(seed)
    assert found == caught


# --- properties of verify -----------------------------------------------------------------------------------


def random_round(seed: int, rows: int, block: int, vocabulary: int) -> tuple[Tensor, ...]:
    """p, q, tokens drawn from q, lengths, uniforms."""
    generator = torch.Generator().manual_seed(seed)
    p = torch.randn(rows, block + 1, vocabulary, generator=generator).softmax(-1)
    q = torch.randn(rows, block, vocabulary, generator=generator).softmax(-1)
    tokens = draw(q.flatten(0, 1), torch.rand(rows * block, generator=generator)).view(rows, block)
    lengths = torch.randint(0, block + 1, (rows,), generator=generator)
    return p, q, tokens, lengths, torch.rand(rows, block + 1, generator=generator)


sizes = {
    "seed": st.integers(0, 2**32),
    "rows": st.integers(1, 5),
    "block": st.integers(1, 7),
    "vocabulary": st.integers(2, 300),
}


@exact
@given(**sizes)
def test_verify_agrees_with_the_naive_loop(seed: int, rows: int, block: int, vocabulary: int) -> None:
    p, q, tokens, lengths, uniforms = random_round(seed, rows, block, vocabulary)
    expected = [
        naive_verify(*row)
        for row in zip(
            p.tolist(), q.tolist(), tokens.tolist(), lengths.tolist(), uniforms.tolist(), strict=True
        )
    ]
    verdict = verify(p, q, tokens, lengths, uniforms)
    assert list(zip(verdict.accepted.tolist(), verdict.next_token.tolist(), strict=True)) == expected


@exact
@given(**sizes)
def test_a_row_does_not_depend_on_its_batch(seed: int, rows: int, block: int, vocabulary: int) -> None:
    arguments = random_round(seed, rows, block, vocabulary)
    together = verify(*arguments)
    alone = [verify(*(value[row : row + 1] for value in arguments)) for row in range(rows)]
    assert torch.equal(together.accepted, torch.cat([verdict.accepted for verdict in alone]))
    assert torch.equal(together.next_token, torch.cat([verdict.next_token for verdict in alone]))


@exact
@given(**sizes)
def test_accepted_stays_within_the_length(seed: int, rows: int, block: int, vocabulary: int) -> None:
    p, q, tokens, lengths, uniforms = random_round(seed, rows, block, vocabulary)
    generous = torch.maximum(p, q.max(1, keepdim=True).values)  # nothing is ever rejected
    assert torch.equal(verify(generous, q, tokens, lengths, uniforms).accepted, lengths)
    assert (verify(p, q, tokens, lengths, uniforms).accepted <= lengths).all()


@exact
@given(**sizes)
def test_a_perfect_draft_is_accepted_whole(seed: int, rows: int, block: int, vocabulary: int) -> None:
    p, _, _, lengths, uniforms = random_round(seed, rows, block, vocabulary)
    uniforms[:, :block] = 1 - 2**-24  # the largest float32 below one
    q = p[:, :block]
    again = torch.rand(rows * block, generator=torch.Generator().manual_seed(seed))
    tokens = draw(q.flatten(0, 1), again).view(rows, block)
    verdict = verify(p, q, tokens, lengths, uniforms)
    assert torch.equal(verdict.accepted, lengths)
    assert torch.equal(verdict.next_token, draw(p[torch.arange(rows), lengths], uniforms[:, block]))


@exact
@given(**sizes)
def test_greedy_accepts_the_longest_common_prefix(seed: int, rows: int, block: int, vocabulary: int) -> None:
    _, _, _, lengths, uniforms = random_round(seed, rows, block, vocabulary)
    generator = torch.Generator().manual_seed(seed)
    wanted = torch.randint(vocabulary, (rows, block + 1), generator=generator)
    agree = torch.rand(rows, block, generator=generator) < 0.8
    tokens = torch.where(
        agree, wanted[:, :block], torch.randint(vocabulary, (rows, block), generator=generator)
    )
    p = torch.nn.functional.one_hot(wanted, vocabulary).float()
    q = torch.nn.functional.one_hot(tokens, vocabulary).float()
    verdict = verify(p, q, tokens, lengths, uniforms)
    for row in range(rows):
        length = int(lengths[row])
        common = next((k for k in range(length) if tokens[row, k] != wanted[row, k]), length)
        assert verdict.accepted[row] == common
        assert verdict.next_token[row] == wanted[row, common]


def test_a_block_of_none_draws_from_the_target() -> None:
    p = torch.tensor([[[0.25, 0.75]], [[0.25, 0.75]]])
    empty = torch.zeros(2, 0, dtype=torch.long)
    verdict = verify(
        p, torch.zeros(2, 0, 2), empty, torch.zeros(2, dtype=torch.long), torch.tensor([[0.2], [0.3]])
    )
    assert verdict.accepted.tolist() == [0, 0]
    assert verdict.next_token.tolist() == [0, 1]


def test_an_empty_residual_falls_back_to_the_target() -> None:
    """p = q and the token is rejected (a draft drew what it gave no probability): no mass is left over."""
    p = torch.tensor([[[0.0, 0.25, 0.75], [1.0, 0.0, 0.0]]])
    arguments = (p, p[:, :1], torch.tensor([[0]]), torch.tensor([1]))
    assert verify(*arguments, torch.tensor([[0.0, 0.1]])) == (torch.tensor([0]), torch.tensor([1]))
    assert verify(*arguments, torch.tensor([[0.0, 0.9]])) == (torch.tensor([0]), torch.tensor([2]))


@pytest.mark.parametrize("broken", range(1, 5))
def test_shapes_that_do_not_fit_are_refused(broken: int) -> None:
    arguments = list(random_round(0, rows=2, block=3, vocabulary=5))
    arguments[broken] = arguments[broken][:1]
    with pytest.raises(ValueError, match=r"p \(2, 4, 5\) needs"):
        verify(*arguments)


# --- draw -------------------------------------------------------------------------------------------------


@exact
@given(
    st.lists(st.sampled_from([0.0, 0.0, 1e-45, 1e-30, 1e-8, 0.1, 0.3, 1.0]), min_size=1, max_size=40).filter(
        any
    ),
    st.sampled_from([0.0, 2**-24, 1e-30, 0.5, 1 - 2**-24, 1 - 2**-53]) | st.floats(0, 1, exclude_max=True),
)
def test_draw_is_the_inverse_cdf_and_avoids_zeros(weights: list[float], uniform: float) -> None:
    row = torch.tensor([weights])
    token = int(draw(row, torch.tensor([uniform], dtype=torch.float64)))
    rounded = row[0].tolist()
    assert rounded[token] > 0
    below, level = math.fsum(rounded[:token]), uniform * math.fsum(rounded)
    slack = 1e-12 * math.fsum(rounded)  # within rounding of a step, either side is right
    assert below - slack <= level <= below + rounded[token] + slack


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draw_never_returns_a_zero_at_a_real_vocabulary(dtype: torch.dtype) -> None:
    """152k float32 entries, most of them zero, at the edges where a float32 running sum would overshoot."""
    generator = torch.Generator().manual_seed(0)
    row = (4 * torch.randn(1, 151_936, generator=generator)).softmax(-1)
    row[:, torch.rand(151_936, generator=generator) < 0.7] = 0
    row[:, :1000] = 0
    row[:, -1000:] = 0
    steps = row.double().cumsum(-1)[0, ::5000] / row.double().sum()
    top = torch.tensor([1 - torch.finfo(dtype).eps / 2], dtype=dtype)
    uniforms = torch.cat([steps, torch.nextafter(steps, steps * 0), torch.zeros(1), top]).to(dtype)
    uniforms = uniforms[uniforms < 1]
    assert uniforms[-1] == top  # the worst case is among them
    tokens = torch.cat([draw(row, uniform[None]) for uniform in uniforms])
    assert (row[0, tokens] > 0).all()
    positive = row[0].nonzero()
    assert tokens[-2] == positive[0]
    assert tokens[-1] >= positive[-200]


def test_draw_avoids_zeros_even_for_a_uniform_that_was_rounded_up_to_one() -> None:
    assert draw(torch.tensor([[0.0, 0.3, 0.7, 0.0]]), torch.ones(1)).tolist() == [2]


def test_draw_avoids_zeros_under_a_parallel_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a scan adds in another order at every entry, so its sums can rise where the weight is zero."""
    sequential = torch.Tensor.cumsum

    def parallel(values: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        sums = sequential(values, dim, dtype=dtype)
        return sums * (1 + 1e-15 * torch.rand(sums.shape, generator=generator, dtype=dtype))

    weights = torch.tensor([0.0, 0.1, 0.0, 0.0, 0.6, 0.0, 0.3, 0.0, 0.0]).expand(600, 9)
    steps = torch.tensor([0.1, 0.7, 1.0], dtype=torch.float64).repeat(200)
    uniforms = steps - 2e-15 * torch.linspace(0, 1, 600, dtype=torch.float64)
    monkeypatch.setattr(torch.Tensor, "cumsum", parallel)
    tokens = draw(weights.double(), uniforms)
    assert (weights[0, tokens] > 0).all()


def test_draw_reaches_a_long_thin_tail() -> None:
    """A float32 running sum stands still near 1 while 1e-9 is added to it again and again."""
    weights = torch.full((1, 1001), 1e-9)
    weights[0, 0] = 1
    middles = 1 + 1e-9 * (torch.arange(1000, dtype=torch.float64) + 0.5)
    tokens = draw(weights.expand(1000, 1001), middles / (1 + 1e-6))
    assert tokens.tolist() == list(range(1, 1001))


def test_draw_follows_its_weights() -> None:
    weights = torch.tensor([[1.0, 0.0, 2.0, 5.0]])
    uniforms = (torch.arange(800) + 0.5) / 800
    counts = draw(weights.expand(800, 4), uniforms).bincount(minlength=4)
    assert counts.tolist() == [100, 0, 200, 500]


# --- warp -------------------------------------------------------------------------------------------------

grid_logits = st.lists(st.integers(-6, 6).map(lambda value: value / 2), min_size=1, max_size=12)  # many ties


@exact
@given(
    grid_logits,
    st.sampled_from([0.3, 0.7, 1.0, 2.0]),
    st.integers(0, 13),
    st.sampled_from([1.0, 0.95, 0.6, 0.2]),
)
def test_warp_agrees_with_the_naive_loop(
    logits: list[float], temperature: float, top_k: int, top_p: float
) -> None:
    if top_p < 1:
        ordered = naive_warp(logits, temperature, top_k)
        assume(all(abs(nucleus_mass(ordered, value) - top_p) > 1e-5 for value in ordered))
    expected = torch.tensor(naive_warp(logits, temperature, top_k, top_p))
    warped_row = warp(torch.tensor(logits), Sampling(temperature, top_k, top_p))
    assert warped_row.dtype == torch.float32
    assert torch.equal(warped_row > 0, expected > 0)
    torch.testing.assert_close(warped_row, expected, rtol=2e-6, atol=0)


@exact
@given(grid_logits, st.integers(0, 5), st.sampled_from([1.0, 0.5]))
def test_temperature_zero_is_the_one_hot_of_the_first_maximum(
    logits: list[float], top_k: int, top_p: float
) -> None:
    warped_row = warp(torch.tensor(logits), Sampling(0.0, top_k, top_p))
    assert warped_row.tolist() == naive_warp(logits, 0.0)


def test_ties_are_kept_together() -> None:
    logits = torch.tensor([1.0, 3.0, 3.0, 2.0, 1.0]).log()
    assert warp(logits, Sampling(1.0, top_k=1)).tolist() == [0, 0.5, 0.5, 0, 0]
    torch.testing.assert_close(
        warp(logits, Sampling(1.0, top_k=4)), torch.tensor([0.1, 0.3, 0.3, 0.2, 0.1])
    )  # fourth place is shared
    assert warp(logits, Sampling(1.0, top_p=0.1)).tolist() == [0, 0.5, 0.5, 0, 0]
    torch.testing.assert_close(
        warp(logits, Sampling(1.0, top_p=0.65)), torch.tensor([0, 0.375, 0.375, 0.25, 0])
    )


def test_top_p_counts_what_top_k_left() -> None:
    """0.4 of everything is 0.4/0.7 of what top-k 2 leaves: the order of the two filters shows."""
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    assert warp(logits, Sampling(1.0, top_k=2, top_p=0.5)).tolist() == [1, 0, 0, 0]


def test_top_p_stops_once_its_mass_is_reached_exactly() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0])
    reached = logits.softmax(-1)[0].item()
    assert warp(logits, Sampling(1.0, top_p=reached)).tolist() == [1, 0, 0]
    assert (warp(logits, Sampling(1.0, top_p=reached + 1e-6)) > 0).tolist() == [True, True, False]


def test_a_tiny_temperature_does_not_overflow() -> None:
    logits = torch.tensor([[50.0, 49.0, -300.0], [-40.0, 30.0, 30.0]])
    assert warp(logits, Sampling(1e-38)).tolist() == [[1, 0, 0], [0, 0.5, 0.5]]


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(0.8), Sampling(0.8, 20, 0.9), Sampling(1.0, 0, 0.9)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_warped_rows_do_not_depend_on_their_batch(sampling: Sampling, dtype: torch.dtype) -> None:
    """Another row's presence must not move a bit: a request's tokens depend on its seed, not on its batch."""
    logits = (3 * torch.randn(3, 5, 4097, generator=torch.Generator().manual_seed(1))).to(dtype)
    together = warp(logits, sampling)
    alone = torch.stack([torch.stack([warp(row, sampling) for row in block]) for block in logits])
    assert together.dtype == torch.float32
    assert torch.equal(together, alone)


POOL = (
    Sampling(),
    Sampling(1.0),
    Sampling(0.6),
    Sampling(1.7, top_k=3),
    Sampling(1.0, top_p=0.7),
    Sampling(0.9, top_k=7, top_p=0.8),
)


@exact
@given(
    st.lists(st.sampled_from(POOL), min_size=1, max_size=6),
    st.integers(0, 2**32),
    st.integers(2, 300),
    st.sampled_from([(), (3,)]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.booleans(),
)
def test_rows_of_different_samplings_are_each_as_alone(
    samplings: list[Sampling],
    seed: int,
    vocabulary: int,
    middle: tuple[int, ...],
    dtype: torch.dtype,
    ties: bool,
) -> None:
    """To the bit, and so are the tokens drawn from them: [R, V] and [R, γ, V], with and without ties."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(len(samplings), *middle, vocabulary, generator=generator)
    logits = ((2 * logits).round() / 2 if ties else logits).to(dtype)
    uniforms = torch.rand(len(samplings), *middle, generator=generator)
    together = warp(logits, samplings)
    assert together.dtype == torch.float32
    tokens, q = choose(logits, samplings, uniforms)
    assert torch.equal(q, together)
    for row, sampling in enumerate(samplings):
        alone = warp(logits[row : row + 1], sampling)
        assert torch.equal(together[row], alone[0])
        assert torch.equal(
            tokens[row], choose(logits[row : row + 1], sampling, uniforms[row : row + 1])[0][0]
        )
        if sampling.greedy:
            assert torch.equal(tokens[row], logits[row].argmax(-1))
            assert together[row].unique().tolist() == [0, 1]


def test_another_rows_temperature_makes_no_ties() -> None:
    """Subtracting the maximum makes neighbours far below it equal: a row without temperature is spared."""
    near = torch.tensor([100.0, 1.0, torch.nextafter(torch.tensor(1.0), torch.tensor(2.0)).item()])
    samplings = [Sampling(1.0, top_k=2), Sampling(0.5)]
    assert (warp(torch.stack([near, near]), samplings)[0] > 0).tolist() == [True, False, True]
    assert torch.equal(warp(torch.stack([near, near]), samplings)[0], warp(near, samplings[0]))


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_sampling_is_needed_for_each_row(count: int) -> None:
    with pytest.raises(ValueError, match=f"{count} samplings for 2 rows of logits"):
        warp(torch.zeros(2, 5), [Sampling(1.0)] * count)


@pytest.mark.parametrize(
    "bad", [{"temperature": -0.1}, {"temperature": math.nan}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}]
)
def test_sampling_outside_its_range_is_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        Sampling(**bad)  # type: ignore[arg-type]


def test_a_temperature_too_small_for_float32_is_greedy():
    """1e-50 became 0 in float32, all probabilities NaN, and every token id 0."""
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    for temperature in (1e-50, 1e-39, 1e-38):
        assert warp(logits, Sampling(temperature)).tolist() == [[0.0, 1.0, 0.0]]
