"""Policies of verification: what each admits, and that none of them changes the target's law."""

from __future__ import annotations

import time
from collections.abc import Callable
from copy import deepcopy
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import prompts_of, teach, tiny_draft
from deepspec.decode.engine import Decoder, Request, generate
from deepspec.decode.plain import Deferred
from deepspec.maths.verify import Sampling, verify
from deepspec.schedule.auto import WARM_UP, Auto, Choice
from deepspec.schedule.policies import (
    Budget,
    EarlyStop,
    Fixed,
    Load,
    Policy,
    RoundSeconds,
    Threshold,
    admitted,
    best_share,
    ranked,
)
from deepspec.targets import Target
from reference.enumeration import World, check_lossless, committed_law, dense, prefixes, sparse
from reference.schedule import algorithm_1, best_budget

LOAD = Load(1, 10.0)
STAIRS = {1: 1.0, 2: 0.5, 3: 0.45, 4: 0.44, 5: 0.2}


def staircase(load: Load, count: int) -> RoundSeconds:
    seconds = [1 / STAIRS.get(load.rows + n, 0.1) for n in range(count + 1)]
    return RoundSeconds(seconds[0], np.array(seconds))


def tree(vocabulary: int, block: int, seed: int) -> dict[tuple[int, ...], float]:
    """A confidence for every prefix: c_k is a function of the tokens before k."""
    random = torch.Generator().manual_seed(seed)
    return {p: float(torch.rand(1, generator=random)) for p in prefixes(vocabulary, block - 1)}


def length_by(policy: Callable[[], Policy], confidence: dict[tuple[int, ...], float], rest: np.ndarray):
    """The length that a policy gives the first row; `rest` [R-1, γ] are the confidences of the others."""

    def length(tokens: tuple[int, ...]) -> int:
        row = [confidence[tokens[:k]] for k in range(len(tokens))]
        chosen, load = policy(), Load(1 + len(rest), 10.0)
        return int(chosen.lengths(np.vstack([row, rest]), load)[0]) if chosen.proposes(load) else 0

    return length


def warmed_budget() -> Budget:
    policy = Budget(staircase)
    for row in ([0.9, 0.2], [0.8, 0.7]):
        policy.lengths(np.array([row]), LOAD)
    return policy


@cache
def taught_auto(claim: float) -> Auto:
    """After rounds whose first proposals were accepted as claimed, and whose second ones never were."""
    policy, random = Auto(staircase, 2), np.random.default_rng(0)
    for _ in range(WARM_UP):
        confidences = np.array([[claim, random.random()], [random.random(), 0.5]])
        lengths = policy.lengths(confidences, LOAD) if policy.proposes(LOAD) else np.zeros(2, np.int64)
        policy.learn(lengths, np.minimum(lengths, random.random(2) < confidences[:, 0]))
    return policy


def learned_auto(claim: float) -> Auto:
    return deepcopy(taught_auto(claim))


def priced_auto() -> Auto:
    """A choice that cuts by survival, on rows of any kind."""
    policy = learned_auto(0.9)
    policy._best = lambda load: Choice(2, 13 / 32, 1.0, 1.0)  # type: ignore[method-assign]
    policy.load = None
    return policy


def exploring_auto() -> Auto:
    policy = learned_auto(0.2)
    policy.credit = 1e9
    return policy


POLICIES: dict[str, Callable[[], Policy]] = {
    "none": lambda: Fixed(0),
    "fixed": lambda: Fixed(1),
    "threshold": lambda: Threshold(0.5),
    "early stop": lambda: EarlyStop(staircase),
    "budget": warmed_budget,
    "auto, at first": lambda: Auto(staircase, 2),
    "auto, learned": lambda: learned_auto(0.95),
    "auto, of a poor draft": lambda: learned_auto(0.05),
    "auto, with a price": priced_auto,
    "auto, exploring": exploring_auto,
}


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("seed", range(3))
def test_no_policy_changes_the_law(name: str, seed: int) -> None:
    """The law of the committed tokens, enumerated, next to another row that competes for the budget."""
    for world in (dense(3, 2, seed), sparse(3, 2, seed)):
        rest = np.random.default_rng(seed).random((seed % 2, 2))
        check_lossless(verify, world, length_by(POLICIES[name], tree(3, 2, seed), rest))


# ── policies that look at what they decide on ─────────────────────────────────────────────────────────

A, B = 0, 1
WORLD = World(
    2,
    2,
    {p: [0.7, 0.3] for p in prefixes(2, 2)},
    {p: [0.5, 0.5] for p in prefixes(2, 2)},
)
"""The counterexample of method.md 5."""
CONFIDENCE = {(): 0.8, (A,): 0.9, (B,): 0.0}


class Retrospective(Policy):
    """Takes the best budget of this round's own confidences, wherever it is."""

    def lengths(self, confidences: np.ndarray, load: Load) -> np.ndarray:
        survivals = confidences.cumprod(axis=1)
        seconds = staircase(load, survivals.size).drafted
        count = round(best_share(survivals, seconds) * survivals.size)
        return admitted(survivals, ranked(survivals, seconds)[0], count)


def first_token(length_of: Callable[[tuple[int, ...]], int]) -> float:
    """The probability that the first token is A."""
    return float(committed_law(verify, WORLD, length_of).view(2, -1).sum(1)[A])


def test_counterexample_gives_85_retrospectively_and_70_with_an_early_stop() -> None:
    alone = np.zeros((0, 2))
    assert first_token(length_by(Retrospective, CONFIDENCE, alone)) == pytest.approx(0.85, abs=1e-6)
    stop = length_by(lambda: EarlyStop(staircase), CONFIDENCE, alone)
    assert first_token(stop) == pytest.approx(0.7, abs=1e-6)


def by_drawn_probability(tokens: tuple[int, ...]) -> int:
    """Admits a token if the draft found it likely: a decision on the drawn token itself."""
    world = dense(3, 2, 1)
    likely = [world.draft[tokens[:k]][t] > 0.3 for k, t in enumerate(tokens)]
    return next((k for k, good in enumerate(likely) if not good), len(tokens))


def test_admission_by_the_drawn_tokens_probability_is_caught() -> None:
    with pytest.raises(AssertionError, match="law is off"):
        check_lossless(verify, dense(3, 2, 1), by_drawn_probability)


def test_a_budget_from_this_rounds_draw_is_caught() -> None:
    with pytest.raises(AssertionError, match="law is off"):
        check_lossless(verify, WORLD, length_by(Retrospective, CONFIDENCE, np.zeros((0, 2))))


# ── what is admitted ──────────────────────────────────────────────────────────────────────────────────

matrices = st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**32 - 1))


@settings(max_examples=60, deadline=None)
@given(matrices)
def test_early_stop_and_budget_equal_plain_loops(shape: tuple[int, int, int]) -> None:
    rows, block, seed = shape
    random = np.random.default_rng(seed)
    confidences = random.integers(0, 5, (rows, block)) / 4  # ties, 0 and 1 included
    costs = np.sort(random.random(rows * (block + 1) + 1))[::-1] + 0.1
    seconds = 1 / costs[rows - 1 :]
    found = EarlyStop(lambda load, count: RoundSeconds(1.0, seconds[: count + 1]))
    lengths = found.lengths(confidences, LOAD)
    assert lengths.tolist() == algorithm_1(confidences.tolist(), costs.tolist())
    count = round(best_share(confidences.cumprod(axis=1), seconds[: rows * block + 1]) * confidences.size)
    assert count == best_budget(confidences.tolist(), costs.tolist())


def test_threshold_cuts_at_the_first_confidence_below_it() -> None:
    confidences = np.array([[0.9, 0.4, 0.9], [0.5, 0.5, 0.5], [0.4, 0.9, 0.9]])
    assert Threshold(0.5).lengths(confidences, LOAD).tolist() == [1, 3, 0]


def test_budget_of_two_rounds_ago_is_spent_on_this_rounds_likeliest() -> None:
    # Two rows: two tokens are free.
    policy = Budget(lambda load, n: RoundSeconds(1.0, 1.0 + np.maximum(np.arange(n + 1.0) - 2, 0)))
    first = np.array([[0.9, 0.9], [0.1, 0.1]])
    assert policy.lengths(first, LOAD).tolist() == [2, 2]  # nothing is known yet: everything is verified
    policy.lengths(first, LOAD)
    assert policy.lengths(np.array([[0.1, 0.1], [0.9, 0.9]]), LOAD).tolist() == [0, 2]


# ── in the decoder ────────────────────────────────────────────────────────────────────────────────────


def flat(load: Load, count: int) -> RoundSeconds:
    return RoundSeconds(1.0 + 0.4 * load.rows, 1.5 + 0.4 * (load.rows + np.arange(count + 1.0)))


ENGINE: dict[str, Callable[[], Policy]] = {
    **{name: policy for name, policy in POLICIES.items() if not name.startswith("auto")},
    "early stop": lambda: EarlyStop(flat),
    "budget": lambda: Budget(flat),
    "auto": lambda: Auto(flat, 4),
}


@pytest.mark.parametrize("algorithm", ["eagle3", "dspark"])
def test_greedy_tokens_are_the_same_under_every_policy(targets: dict[str, Target], algorithm: str) -> None:
    target = targets["llama"]
    prompts = prompts_of(target, (9, 5, 12))
    plain = [g.token_ids for g in generate(target, None, prompts, 12)]
    rows = [p + g for p, g in zip(prompts, plain, strict=True)]
    draft = teach(tiny_draft(target, algorithm), target, rows, steps=12)
    lengths = {}
    for name, policy in ENGINE.items():
        decoder = Decoder(
            target, draft, max_rows=3, policy=policy(), temperatures=[2.0] * draft.max_proposals
        )
        found = {g.key: g for g in decoder.run(Request(p, 12, 0, str(i)) for i, p in enumerate(prompts))}
        assert [found[str(i)].token_ids for i in range(3)] == plain, name
        lengths[name] = [n for g in found.values() for n in g.proposed]
        assert all(a <= n for g in found.values() for a, n in zip(g.accepted, g.proposed, strict=True))
    assert set(lengths["none"]) == {0} and set(lengths["fixed"]) == {1}
    assert len(set(lengths["threshold"])) > 1, "a policy that never cuts, or always, shows nothing"


class Alternating(Policy):
    """Proposes only in every third round, and verifies everything then."""

    def __init__(self) -> None:
        self.rounds = 0

    def proposes(self, load: Load) -> bool:
        return self.rounds % 3 == 2

    def lengths(self, confidences: np.ndarray, load: Load) -> np.ndarray:
        return np.full(len(confidences), confidences.shape[1])

    def learn(self, proposed: np.ndarray, accepted: np.ndarray) -> None:
        assert self.proposes(LOAD) or not proposed.any()
        self.rounds += 1


@pytest.mark.parametrize("most", [0, 4, 256])
@pytest.mark.parametrize("algorithm", ["eagle3", "dflash", "dspark"])
def test_a_draft_that_missed_rounds_proposes_as_if_it_had_seen_them(
    targets: dict[str, Target], algorithm: str, most: int
) -> None:
    """Two slots for three prompts, so that a slot is used again while tokens wait for others. With `most` 0
    nothing waits."""
    target = targets["llama"]
    draft = tiny_draft(target, algorithm)
    requests = [
        Request(p, 14, i, str(i), Sampling(1.0)) for i, p in enumerate(prompts_of(target, (9, 5, 12)))
    ]
    found = []
    for bound in (0, most):
        decoder = Decoder(target, draft, max_rows=2, policy=Alternating())
        assert isinstance(decoder.draft, Deferred)
        decoder.draft.most = bound
        found.append({g.key: g for g in decoder.run(requests)})
        assert not decoder.draft.pieces and not decoder.draft.waiting
    for each, late in zip(*(map(f.get, "012") for f in found), strict=True):
        assert each.token_ids == late.token_ids and each.accepted == late.accepted
        for one, other in zip(each.confidence, late.confidence, strict=True):
            assert one == pytest.approx(other, abs=1e-4)


def test_a_policy_that_proposes_nothing_costs_nothing_of_the_draft(targets: dict[str, Target]) -> None:
    target = targets["llama"]
    draft = tiny_draft(target, "dspark")
    for name in ("observe", "propose"):
        setattr(draft, name, lambda *_, name=name: pytest.fail(f"the draft is asked to {name}"))
    prompts = prompts_of(target, (9, 5))
    plain = [g.token_ids for g in generate(target, None, prompts, 12)]
    decoder = Decoder(target, draft, max_rows=2, policy=Fixed(0))
    found = {g.key: g for g in decoder.run(Request(p, 12, 0, str(i)) for i, p in enumerate(prompts))}
    assert [found[str(i)].token_ids for i in range(2)] == plain
    assert all(len(g.proposed) == 11 for g in found.values()), "no round after a full budget"


class Listening(Policy):
    """Verifies everything, and notes what it is told."""

    def __init__(self) -> None:
        self.fresh, self.gained = 0, 0

    def lengths(self, confidences: np.ndarray, load: Load) -> np.ndarray:
        self.fresh += load.fresh
        return np.full(len(confidences), confidences.shape[1])

    def learn(self, proposed: np.ndarray, gained: np.ndarray) -> None:
        self.gained += len(gained) + int(gained.sum())


def test_policies_are_told_of_each_answer_and_of_each_token_that_is_kept(targets: dict[str, Target]) -> None:
    """Not of tokens that are accepted beyond an answer's end, for which nobody waits."""
    target, policy = targets["llama"], Listening()
    prompts = prompts_of(target, (9, 5, 12))
    plain = [g.token_ids for g in generate(target, None, prompts, 12)]
    draft = teach(
        tiny_draft(target, "dspark"), target, [p + g for p, g in zip(prompts, plain, strict=True)], steps=12
    )
    answers = list(
        Decoder(target, draft, max_rows=2, policy=policy).run(
            Request(p, 12, 0, str(i)) for i, p in enumerate(prompts)
        )
    )
    assert policy.fresh == 3 and policy.gained == 3 * 11
    assert any(a[-1] >= k[-1] for a, k in ((g.accepted, g.kept) for g in answers)), "no answer was cut"


def test_verifying_everything_by_policy_is_verifying_everything(targets: dict[str, Target]) -> None:
    target = targets["llama"]
    prompts = prompts_of(target, (9, 5))
    draft = tiny_draft(target, "dspark")
    requests = [Request(p, 12, i, str(i), Sampling(1.0)) for i, p in enumerate(prompts)]
    found = []
    for policy in (None, Fixed(99)):
        answers = Decoder(target, draft, max_rows=2, policy=policy).run(requests)
        # Without a policy, a round may follow that keeps nothing (method.md 1).
        found.append(
            [(g.key, g.token_ids, [a for a, k in zip(g.accepted, g.kept, strict=True) if k]) for g in answers]
        )
    assert found[0] == found[1]


# ── the policy that compares ──────────────────────────────────────────────────────────────────────────


def played(policy: Auto, survival: Callable[[int], float], loads: list[Load]) -> list[tuple[bool, list[int]]]:
    """What a policy did in rounds of rows whose first proposals are accepted with `survival(round)` and whose
    other proposals are never accepted; all confidences are alike."""
    random, found = np.random.default_rng(0), []
    for number, load in enumerate(loads):
        proposed = policy.proposes(load)
        confidences = np.full((load.rows, policy.block), 0.5)
        lengths = policy.lengths(confidences, load) if proposed else np.zeros(load.rows, np.int64)
        policy.learn(lengths, np.minimum(lengths, random.random(load.rows) < survival(number)))
        found.append((proposed, lengths.tolist()))
    return found


def test_auto_takes_the_one_proposal_that_pays_and_none_where_none_does() -> None:
    rounds = played(Auto(flat, 4), lambda _: 0.9, [Load(4, 50.0)] * 300)
    assert sum(lengths == [1] * 4 for _, lengths in rounds[100:]) > 180
    rounds = played(Auto(flat, 4), lambda _: 0.05, [Load(4, 50.0)] * 300)
    assert sum(not proposed for proposed, _ in rounds[100:]) > 180


def test_auto_notices_that_a_draft_has_become_good_and_looks_seldom_before() -> None:
    policy = Auto(flat, 4)
    rounds = played(policy, lambda number: 0.95 if number > 2000 else 0.02, [Load(4, 50.0)] * 30000)
    looked = sum(proposed for proposed, _ in rounds[100:2000])
    most = flat(Load(4, 50.0), 16).drafted[-1] - flat(Load(4, 50.0), 0).plain
    spent = looked * most / (1900 * flat(Load(4, 50.0), 0).plain)
    assert 0 < spent < 0.006
    assert sum(lengths == [1] * 4 for _, lengths in rounds[-500:]) > 400


def test_auto_spends_nothing_saved_at_once_when_the_load_changes() -> None:
    loads = [Load(4, 50.0)] * 2000 + [Load(1, 50.0)] * 100
    rounds = played(Auto(flat, 4), lambda _: 0.02, loads)
    assert sum(proposed for proposed, _ in rounds[2000:]) <= 2


def test_auto_survives_confidences_that_are_not_numbers() -> None:
    policy = Auto(flat, 4)
    for _ in range(20):
        assert policy.proposes(Load(2, 50.0))
        lengths = policy.lengths(np.array([[np.nan] * 4, [0.5] * 4]), Load(2, 50.0))
        policy.learn(lengths * [0, 1], np.array([0, 2]))
    assert policy._best(Load(2, 50.0)).most > 0


MICROSECONDS = 50
SLACK = 3
"""A machine that runs other things, too, is slower."""


def test_no_policy_takes_longer_than_50_microseconds_for_256_rows() -> None:
    confidences, load = np.random.default_rng(0).random((256, 7)), Load(256, 100.0)
    line = RoundSeconds(0.4, 0.1 + 0.001 * np.arange(256 * 7 + 1.0))
    for policy in (
        Fixed(3),
        Threshold(0.5),
        EarlyStop(lambda load, count: line),
        Budget(lambda load, count: line),
        Auto(lambda load, count: line, 7),
    ):
        taken = []
        for _ in range(5):
            began = time.process_time()
            for _ in range(100):
                policy.lengths(confidences, load)
            taken.append((time.process_time() - began) * 1e4)
        assert min(taken) < SLACK * MICROSECONDS, type(policy).__name__
