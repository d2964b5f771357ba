"""Accepted tokens counted: exact small cases by hand, and bootstrap intervals on data of known truth."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepspec.maths.acceptance import (
    bootstrap_ratio,
    conditional,
    distinct_share,
    paired_bootstrap_difference,
    paired_bootstrap_ratio,
    repeated_share,
    survival,
    tau,
    verify_rate,
)

# Two prompts, block 3, one round cut to 1, one to 0 and one to 2.
PROPOSED = [[3, 3, 1], [0, 2, 3]]
ACCEPTED = [[3, 1, 1], [0, 0, 2]]


def test_tau_is_pooled_over_rounds_and_not_a_mean_of_prompts() -> None:
    assert tau([[4, 4, 4], [1]]) == 13 / 4  # the mean of the prompts' own would be 2.5


def test_survival_counts_only_rounds_that_proposed_so_far() -> None:
    assert survival(ACCEPTED, PROPOSED, 3) == [4 / 5, 2 / 4, 1 / 3]


def test_a_cut_round_has_not_reached_the_position_it_was_cut_at() -> None:
    # k=1: five rounds proposed it, four accepted. k=2: reached by the rounds (3,3), (3,1) and (3,2), not by
    # the one cut to 1 with its token accepted, nor by (2,0). k=3: reached by (3,3) and (3,2).
    assert conditional(ACCEPTED, PROPOSED, 3) == [4 / 5, 2 / 3, 1 / 2]


def test_a_position_nobody_proposed_has_no_rate() -> None:
    assert survival([[1]], [[1]], 3) == [1.0, None, None]
    assert conditional([[0]], [[2]], 3) == [0.0, None, None]


@given(st.lists(st.lists(st.integers(0, 4), max_size=6), max_size=5))
@settings(derandomize=True, deadline=None)
def test_at_full_length_survival_is_the_product_of_the_conditional_rates(accepted: list[list[int]]) -> None:
    proposed = [[4] * len(prompt) for prompt in accepted]
    running: float | None = 1.0
    for alive, rate in zip(survival(accepted, proposed, 4), conditional(accepted, proposed, 4), strict=True):
        if rate is None:
            assert alive in (0.0, None)  # nobody came this far, or there was no round at all
            return
        assert running is not None
        running *= rate
        assert alive == pytest.approx(running, abs=1e-12)


def test_verify_rate_counts_the_bonus_on_both_sides() -> None:
    assert verify_rate(ACCEPTED, PROPOSED) == (7 + 6) / (12 + 6)


@pytest.mark.parametrize(
    ("accepted", "proposed"),
    [([[1, 2]], [[3]]), ([[1]], [[1], [1]]), ([[2]], [[1]]), ([[-1]], [[1]]), ([[1]], [[4]])],
)
def test_rounds_that_cannot_have_happened_are_refused(
    accepted: list[list[int]], proposed: list[list[int]]
) -> None:
    for rates in (survival, conditional):
        with pytest.raises(ValueError, match="round"):
            rates(accepted, proposed, 3)


@pytest.mark.parametrize("nothing", [[], [[]], [[], []]])
def test_no_rounds_give_none_and_not_nan(nothing: list[list[int]]) -> None:
    assert tau(nothing) is None
    assert verify_rate(nothing, nothing) is None
    assert survival(nothing, nothing, 2) == [None, None]
    assert conditional(nothing, nothing, 2) == [None, None]
    zeros = [0.0] * len(nothing)
    assert bootstrap_ratio(zeros, zeros, seed=0) is None
    assert paired_bootstrap_difference((zeros, zeros), (zeros, zeros), seed=0) is None
    assert paired_bootstrap_ratio((zeros, zeros), (zeros, zeros), seed=0) is None
    assert distinct_share(nothing) is None
    assert repeated_share(nothing) is None


# --- bootstrap --------------------------------------------------------------------------------------------


def test_the_bootstrap_is_a_function_of_its_seed() -> None:
    numerators, denominators = [3.0, 9, 4, 20, 6, 5.5, 7.25], [1.0, 4, 2, 5, 3, 1.5, 2.5]
    first = bootstrap_ratio(numerators, denominators, seed=1)
    assert first == bootstrap_ratio(numerators, denominators, seed=1)
    assert first is not None
    assert first.value == 54.75 / 19
    assert first.low < first.value < first.high
    assert first != bootstrap_ratio(numerators, denominators, seed=2)


def test_prompts_that_all_agree_leave_no_interval() -> None:
    """The ratio is the same in every resample, however unequal the prompts' weights: sums, then division."""
    assert bootstrap_ratio([2, 4, 32], [1, 2, 16], seed=0) == (2.0, 2.0, 2.0)


def test_a_resample_without_rounds_is_left_out() -> None:
    assert bootstrap_ratio([3, 0], [1, 0], seed=0) == (3.0, 3.0, 3.0)


def test_the_percentiles_are_those_of_the_resampled_ratios() -> None:
    """Two prompts with values 0 and 1: resampled means are 0, 1/2, 1 with chances 1/4, 1/2, 1/4."""
    assert bootstrap_ratio([0, 1], [1, 1], seed=0) == (0.5, 0.0, 1.0)


def test_the_interval_is_the_95_percent_one() -> None:
    """A mean of 100 fair coins: 0.5 ± 1.96 x 0.05, known here to about 0.005 from 4000 resamples."""
    interval = bootstrap_ratio([0.0, 1.0] * 50, [1.0] * 100, seed=0, samples=4000)
    assert interval == pytest.approx((0.5, 0.402, 0.598), abs=0.011)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    """60 prompts of unequal weight, 300 data sets: 95% nominal; 89% and 99% are beyond 4 standard errors."""
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for seed in range(300):
        rounds = torch.randint(3, 20, (60,), generator=generator).double()
        rate = 2 + 0.5 * torch.randn(60, generator=generator, dtype=torch.float64)
        interval = bootstrap_ratio((rounds * rate).tolist(), rounds.tolist(), seed, samples=500)
        assert interval is not None
        covered += interval.low <= 2 <= interval.high
    assert 0.89 <= covered / 300 <= 0.99


def test_pairing_cancels_what_the_prompts_share() -> None:
    """The second method is 0.1 better on every prompt, while prompts differ by 10: only pairing sees it."""
    seconds = [1.0] * 40
    slow = [1.0 + 10 * (i % 2) for i in range(40)]
    fast = [value + 0.1 for value in slow]
    difference = paired_bootstrap_difference((fast, seconds), (slow, seconds), seed=0)
    assert difference is not None
    assert difference == pytest.approx((0.1, 0.1, 0.1), abs=1e-12)
    alone = bootstrap_ratio(fast, seconds, seed=0)
    assert alone is not None
    assert alone.high - alone.low > 2


def test_a_constant_speed_up_has_no_spread() -> None:
    tokens, seconds = [10.0, 200, 30], [1.0, 9, 4]
    assert paired_bootstrap_ratio((tokens, [s / 2 for s in seconds]), (tokens, seconds), seed=0) == (2, 2, 2)


def test_a_speed_up_over_nothing_is_none() -> None:
    assert paired_bootstrap_ratio(([1.0], [1.0]), ([0.0], [1.0]), seed=0) is None


def test_prompts_must_match() -> None:
    with pytest.raises(ValueError, match="one value per prompt"):
        paired_bootstrap_difference(([1.0, 2.0], [1.0, 1.0]), ([1.0], [1.0]), seed=0)


# --- repetition -------------------------------------------------------------------------------------------


def test_a_loop_shows_in_both_shares() -> None:
    loop = [1, 2, 3] * 6  # 18 tokens: 15 4-grams and 11 8-grams, three distinct of each
    assert distinct_share([loop]) == 3 / 15
    assert repeated_share([loop]) == 1 - 3 / 11


def test_a_phrase_shared_by_two_answers_is_not_a_repetition() -> None:
    assert distinct_share([[1, 2, 3, 4, 5], [1, 2, 3, 4, 5]]) == 1.0
    assert repeated_share([list(range(9)), list(range(9))]) == 0.0


def test_lists_are_pooled_by_their_ngrams_and_short_ones_count_nothing() -> None:
    assert distinct_share([[7] * 6, [1, 2, 3, 4], [1, 2]]) == (1 + 1) / (3 + 1)
