"""Decoding never changes the output: greedy token for token, sampled in law, alone and in ragged batches.

V vocabulary, γ proposals per round, n samples.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from conftest import FAMILIES, NoisyTarget, TableDraft, prompts_of, save_tiny, teach, tiny_draft
from deepspec.checkpoints.draft import new_draft
from deepspec.decode import engine as decode
from deepspec.decode.engine import Decoder, Generation, Request, generate
from deepspec.drafts.base import Draft
from deepspec.drafts.dspark import DSparkDraft
from deepspec.drafts.lookup import PromptLookup
from deepspec.errors import UserError
from deepspec.maths.verify import Sampling, Verdict, draw, verify
from deepspec.targets import Target

LENGTHS = (13, 7, 17, 10)
NEW = 20
METHODS = ("eagle3", "dflash", "dspark", "lookup")
MORE = [("qwen3", "gated"), ("qwen3", "rnn"), ("llama", "noisy")]


def naive_greedy(target: Target, prompt: Sequence[int], count: int) -> list[int]:
    """The model's own argmax over whole passes: no cache, no slots, none of our head."""
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            tokens.append(int(target.model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


class Scene:
    """A target, ragged prompts, their plain greedy continuations, and drafts that are right sometimes."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.prompts = prompts_of(target, LENGTHS)
        self.greedy = [naive_greedy(target, p, NEW) for p in self.prompts]
        self.drafts: dict[str, Draft] = {}

    @property
    def rows(self) -> list[list[int]]:
        return [p + g for p, g in zip(self.prompts, self.greedy, strict=True)]

    def draft(self, method: str) -> Draft:
        if method not in self.drafts:
            self.drafts[method] = self._make(method)
        return self.drafts[method]

    def _make(self, method: str) -> Draft:
        if method == "lookup":
            return PromptLookup(self.target.vocab_size, block=4)
        if method == "noisy":
            return NoisyTarget(self.target, block=2, noise=0.5)
        facts: dict[str, Any] = {"markov_head": method} if method in ("gated", "rnn") else {}
        algorithm = "dspark" if facts else method
        return teach(tiny_draft(self.target, algorithm, **facts), self.target, self.rows, steps=12)


@pytest.fixture(scope="module")
def scenes(targets: dict[str, Target]) -> Callable[[str], Scene]:
    made: dict[str, Scene] = {}

    def scene(family: str) -> Scene:
        if family not in made:
            made[family] = Scene(targets[family])
        return made[family]

    return scene


@pytest.fixture
def llama(scenes: Callable[[str], Scene]) -> Scene:
    return scenes("llama")


@pytest.fixture
def oracle(llama: Scene) -> Draft:
    """Proposes exactly what the target says: every round accepts all four."""
    return NoisyTarget(llama.target, block=4, noise=0.0)


# ── greedy ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_decoding_is_the_models_own_argmax(scenes: Callable[[str], Scene], family: str) -> None:
    scene = scenes(family)
    assert [g.token_ids for g in generate(scene.target, None, scene.prompts, NEW)] == scene.greedy
    assert generate(scene.target, None, scene.prompts[2], NEW).token_ids == scene.greedy[2]


@pytest.mark.parametrize("family, method", [*product(FAMILIES, METHODS), *MORE])
def test_greedy_output_is_plain_decodings_token_for_token(
    scenes: Callable[[str], Scene], family: str, method: str
) -> None:
    """In a ragged batch and alone; the draft is right sometimes and wrong sometimes, so that acceptance,
    replacement, bonus and roll-back all happen."""
    scene = scenes(family)
    draft = scene.draft(method)
    batch = generate(scene.target, draft, scene.prompts, NEW)
    assert [g.token_ids for g in batch] == scene.greedy
    accepted = [a for g in batch for a in g.accepted]
    assert 0 in accepted, "no round was rejected at once"
    assert max(accepted) >= 2, "no round went beyond its first proposal"
    for prompt, together in list(zip(scene.prompts, batch, strict=True))[:2]:
        alone = generate(scene.target, draft, prompt, NEW)
        assert alone.token_ids == together.token_ids
        assert alone.accepted == together.accepted


@pytest.mark.parametrize("family, facts", [("qwen3", {}), ("gemma4", {"markov_head": "rnn"})])
def test_draft_taught_by_heart_is_accepted_in_full(
    scenes: Callable[[str], Scene], family: str, facts: dict[str, Any]
) -> None:
    """Training and decoding must agree on positions, masks and alignment: a slip there costs acceptance and
    nothing else, so that no other test would see it."""
    scene = scenes(family)
    draft = teach(tiny_draft(scene.target, "dspark", **facts), scene.target, scene.rows, steps=45)
    found = generate(scene.target, draft, scene.prompts, NEW - 4)
    assert [g.token_ids for g in found] == [g[: NEW - 4] for g in scene.greedy]
    share = sum(sum(g.accepted) for g in found) / sum(sum(g.proposed) for g in found)
    assert share > 0.9


def test_older_alignment_taught_by_heart_is_accepted_in_full(llama: Scene) -> None:
    spec = replace(tiny_draft(llama.target, "dflash").spec, sample_from_anchor=False)
    draft = teach(new_draft(spec, llama.target), llama.target, llama.rows, steps=45)
    found = generate(llama.target, draft, llama.prompts, NEW - 4)
    assert [g.token_ids for g in found] == [g[: NEW - 4] for g in llama.greedy]
    assert {p for g in found for p in g.proposed} == {3}
    assert sum(sum(g.accepted) for g in found) / sum(sum(g.proposed) for g in found) > 0.9


class Witness(NoisyTarget):
    """Checks what decoding tells a draft: each token once, its real features, and the token after it."""

    feature_layers = (-1, 2)

    def observe(
        self,
        slots: Sequence[int],
        features: Tensor | None,
        tokens: Sequence[Sequence[int]],
        next_tokens: Sequence[Sequence[int]],
    ) -> None:
        assert features is not None
        super().observe(slots, features, tokens, next_tokens)
        for row, (slot, new, after) in enumerate(zip(slots, tokens, next_tokens, strict=True)):
            known = self.history[slot]
            assert [*new[1:], after[-1]] == list(after)
            want = self.target.read(torch.tensor([known]), self.feature_layers).features
            assert want is not None
            torch.testing.assert_close(
                features[row, : len(new)], want[0, len(known) - len(new) :], atol=1e-4, rtol=0
            )


@pytest.mark.parametrize("family", FAMILIES)
def test_draft_observes_each_committed_token_once_with_its_own_features(
    scenes: Callable[[str], Scene], family: str
) -> None:
    """Shifted or repeated tokens cost acceptance and never show in the output."""
    scene = scenes(family)
    witness = Witness(scene.target, block=2, noise=0.5)
    found = generate(scene.target, witness, scene.prompts[:3], 8)
    assert len({len(g.accepted) for g in found} | {a for g in found for a in g.accepted}) > 1
    for slot, row in enumerate(scene.rows[:3]):
        length = len(witness.history[slot])
        assert length >= len(row) - NEW + 7
        assert witness.history[slot] == row[:length]


def test_confidence_is_conditioned_on_the_token_before_each_slot(llama: Scene) -> None:
    draft = llama.draft("dspark")
    assert isinstance(draft, DSparkDraft)
    prompt, anchor = llama.prompts[0], llama.greedy[0][0]
    features = llama.target.read(torch.tensor([prompt]), draft.feature_layers).features
    draft.open(0)
    with torch.no_grad():
        draft.observe([0], features, [prompt], [[*prompt[1:], anchor]])
        found = draft.propose([0], [anchor], Sampling(1.0), torch.tensor([[0.1, 0.9, 0.5, 0.3]]))
        previous = torch.tensor([[anchor, *found.tokens[0, :-1].tolist()]])
        want = draft.confidence_logits(previous, draft.block_hidden([0], [anchor]))
    assert len(set(previous[0].tolist())) > 1
    assert want is not None and found.confidence is not None
    torch.testing.assert_close(found.confidence, want)


# ── rounds, budget, stop tokens ───────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("budget", range(1, 13))
def test_budget_cuts_the_output_and_never_the_last_round(llama: Scene, oracle: Draft, budget: int) -> None:
    """The first token is the prefill's. Each round commits 5; one more runs where the budget is just full."""
    found = generate(llama.target, oracle, llama.prompts[0], budget)
    assert found.token_ids == llama.greedy[0][:budget]
    rounds = math.ceil(budget / 5)
    assert found.committed_per_round == [5] * rounds
    assert found.kept == [min(5, budget - 1 - 5 * r) for r in range(rounds)]
    assert not found.stopped


def test_rejected_rounds_commit_one_token_each(llama: Scene) -> None:
    never = {(n, t) for n, row in enumerate(llama.greedy) for t in row}
    wrong = next(t for t in range(llama.target.vocab_size) if (0, t) not in never)
    logits = torch.zeros(llama.target.vocab_size, llama.target.vocab_size)
    logits[:, wrong] = 9.0
    found = generate(llama.target, TableDraft(logits, 3), llama.prompts[0], 6)
    assert found.token_ids == llama.greedy[0][:6]
    assert found.committed_per_round == [1] * 6
    assert found.kept == [1, 1, 1, 1, 1, 0]
    assert found.from_draft == [False] * 6


def test_plain_decoding_runs_no_round_for_nothing(llama: Scene) -> None:
    found = generate(llama.target, None, llama.prompts[0], 6)
    assert found.committed_per_round == [1] * 5
    assert found.kept == [1] * 5


@pytest.mark.parametrize("method", [*METHODS, "rnn"])
def test_bookkeeping_of_rounds_adds_up(scenes: Callable[[str], Scene], method: str) -> None:
    scene = scenes("qwen3")
    draft = scene.draft(method)
    for found in generate(scene.target, draft, scene.prompts, NEW):
        assert len(found.proposed) == len(found.accepted) == len(found.kept)
        assert all(p == draft.max_proposals for p in found.proposed)
        assert 1 + sum(found.kept) == len(found.token_ids) == len(found.from_draft) == NEW
        assert 1 + sum(found.committed_per_round) > NEW >= 1 + sum(found.committed_per_round[:-1])
        by_draft, at = [], 1
        for accepted, kept in zip(found.accepted, found.kept, strict=True):
            by_draft += [True] * min(accepted, kept) + [False] * (kept - min(accepted, kept))
            at += kept
        assert found.from_draft == [False, *by_draft]
        has_confidence = method in ("dspark", "rnn")
        assert [len(c) for c in found.confidence] == ([4] * len(found.kept) if has_confidence else [])
        assert found.seconds > 0


def test_stop_token_anywhere_in_a_run_cuts_there_and_is_the_last(llama: Scene, oracle: Draft) -> None:
    greedy = llama.greedy[1]
    places = {token: greedy.index(token) for token in greedy if greedy.index(token) < 12}
    assert {(at - 1) % 5 for at in places.values()} == set(range(5)), "every place of a round is met"
    for token, at in places.items():
        found = generate(llama.target, oracle, llama.prompts[1], NEW, stop_token_ids=[token])
        assert found.token_ids == greedy[: at + 1]
        assert found.stopped
        assert found.committed_per_round == [5] * math.ceil(at / 5), "rounds are counted as verified"
        assert sum(found.kept) == at


def test_first_stop_token_of_several_ends_the_row(llama: Scene, oracle: Draft) -> None:
    greedy = llama.greedy[0]
    early, late = greedy[2], next(t for t in greedy[3:] if t not in greedy[:3])
    found = generate(llama.target, oracle, llama.prompts[0], NEW, stop_token_ids={late, early})
    assert found.token_ids == greedy[:3]


def test_stop_token_beyond_the_budget_does_not_count(llama: Scene, oracle: Draft) -> None:
    greedy = llama.greedy[1]
    at = next(i for i in range(2, 6) if greedy[i] not in greedy[:i])
    found = generate(llama.target, oracle, llama.prompts[1], at, stop_token_ids=[greedy[at]])
    assert found.token_ids == greedy[:at]
    assert not found.stopped
    assert generate(llama.target, oracle, llama.prompts[1], at + 1, stop_token_ids=[greedy[at]]).stopped


def test_stopped_row_leaves_the_others_alone(llama: Scene) -> None:
    """A row that stops early leaves the batch: the rest must not shift into its place."""
    stop = llama.greedy[1][3]
    expected = [g[: g.index(stop) + 1] if stop in g else g for g in llama.greedy]
    assert len({len(e) for e in expected}) > 1
    for method in ("eagle3", "dspark", "lookup"):
        found = generate(llama.target, llama.draft(method), llama.prompts, NEW, stop_token_ids=[stop])
        assert [g.token_ids for g in found] == expected
        assert [g.stopped for g in found] == [stop in g for g in llama.greedy]


def test_targets_own_stop_tokens_hold_unless_told_otherwise(
    llama: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    greedy = llama.greedy[1]
    own, other = greedy[4], greedy[1]
    assert greedy.index(own) == 4 and greedy.index(other) == 1
    monkeypatch.setattr(Target, "stop_token_ids", property(lambda self: frozenset([own])))
    run = lambda **options: generate(llama.target, None, llama.prompts[1], 8, **options).token_ids  # noqa: E731
    assert run() == greedy[:5]
    assert run(stop_token_ids=[other]) == greedy[:2]
    assert run(stop_token_ids=[]) == greedy[:8]
    assert run(ignore_eos=True) == greedy[:8]
    assert run(ignore_eos=True, stop_token_ids=[other]) == greedy[:8]


# ── sampling, seeds, batches ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "method, options",
    [*((m, {}) for m in ("plain", *METHODS)), ("dspark", {"top_k": 12, "top_p": 0.8})],
)
def test_sampled_tokens_depend_on_the_seed_and_not_on_the_batch(
    scenes: Callable[[str], Scene], method: str, options: dict[str, Any]
) -> None:
    scene = scenes("gemma4")
    draft = None if method == "plain" else scene.draft(method)

    def run(prompts: Any, seed: Any) -> Any:
        return generate(scene.target, draft, prompts, 10, temperature=0.9, seed=seed, **options)

    batch = [g.token_ids for g in run(scene.prompts, [5, 6, 7, 8])]
    assert [g.token_ids for g in run(scene.prompts[::-1], [8, 7, 6, 5])] == batch[::-1]
    assert [g.token_ids for g in run(scene.prompts, 5)] == batch, "an int means seed + i"
    assert run(scene.prompts[1], 6).token_ids == batch[1]
    assert run(scene.prompts[1], 7).token_ids != batch[1]
    same = run([scene.prompts[1]] * 2, [6, 6])
    assert same[0].token_ids == same[1].token_ids == batch[1]


class Counted(Target):
    """A target that remembers which slots were opened."""

    opened: list[int]

    def open(self, slot: int) -> None:
        self.opened.append(slot)
        super().open(slot)


@pytest.mark.parametrize(
    "method, temperature",
    [("plain", 1.0), ("eagle3", 0.0), ("eagle3", 1.0), ("dspark", 0.0), ("dspark", 1.0), ("lookup", 0.0)],
)
def test_more_requests_than_rows_give_what_each_gives_alone(
    scenes: Callable[[str], Scene], method: str, temperature: float
) -> None:
    """Slots are handed on in mid-flight to requests of other lengths: nothing of the last tenant may stay."""
    scene = scenes("qwen3")
    target = Counted(scene.target.spec, scene.target.model)
    target.opened = []
    draft = None if method == "plain" else scene.draft(method)
    prompts = [*scene.prompts, *prompts_of(target, [3, 22, 5], seed=1)]
    budgets = [9, 2, 14, 1, 11, 6, 10]
    requests = [
        Request(p, b, seed=40 + i, key=str(i)) for i, (p, b) in enumerate(zip(prompts, budgets, strict=True))
    ]
    decoder = Decoder(target, draft, Sampling(temperature), max_rows=3)
    found = {g.key: g for g in decoder.run(iter(requests))}
    assert list(found) != sorted(found), "short requests finish before long ones that began earlier"
    assert set(target.opened) == {0, 1, 2} and len(target.opened) == len(requests)
    assert decoder.rows == []
    for request, budget in zip(requests, budgets, strict=True):
        alone = generate(
            scene.target, draft, list(request.input_ids), budget, temperature=temperature, seed=request.seed
        )
        assert found[request.key].token_ids == alone.token_ids
        assert found[request.key].accepted == alone.accepted
        assert len(alone.token_ids) == budget


def test_results_of_a_batch_come_in_the_order_of_its_prompts(llama: Scene) -> None:
    stop = llama.greedy[1][3]
    found = generate(llama.target, None, llama.prompts, NEW, stop_token_ids=[stop])
    assert [g.key for g in found] == ["0", "1", "2", "3"]
    assert isinstance(generate(llama.target, None, [llama.prompts[0]], 2), list)
    assert isinstance(generate(llama.target, None, llama.prompts[0], 2), Generation)


# ── arguments ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "prompt, options, message",
    [
        ([], {}, "an empty prompt"),
        ([[1, 2], []], {}, "an empty prompt"),
        ([1, 64], {}, "prompt 0 holds token 64, outside the vocabulary of 64"),
        ([[1], [2, -1]], {}, "prompt 1 holds token -1"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens must be at least 1, not 0"),
        ([1], {"temperature": -0.1}, "temperature must be"),
        ([1], {"temperature": math.nan}, "temperature must be"),
        ([1], {"top_p": 0.0}, "top_p must be"),
        ([1], {"top_p": 1.1}, "top_p must be"),
        ([1], {"top_k": -1}, "top_k must be"),
        ([[1], [2]], {"seed": [1]}, "1 seeds for 2 prompts"),
        ([1], {"seed": [1, 2]}, "2 seeds for 1 prompts"),
    ],
)
def test_impossible_arguments_are_user_errors(
    llama: Scene, prompt: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        generate(llama.target, None, prompt, **options)
    assert generate(llama.target, None, [1, 2], 2).token_ids, "the target still serves"


# ── the law of what is sampled ────────────────────────────────────────────────────────────────────────

VOCABULARY = 3
SAMPLES = 800
LEVEL = 1e-3
START = [1, 2, 0]
Law = dict[tuple[int, ...], float]


def three_words() -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=32,
            initializer_range=0.25,
        )
    )


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Target:
    path = save_tiny(three_words, tmp_path_factory.mktemp("law") / "target")
    return Target.from_pretrained(path, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def mismatched() -> TableDraft:
    """Two proposals from a table that has nothing to do with the target: it accepts about a third."""
    return TableDraft(1.5 * torch.randn(3, 3, generator=torch.Generator().manual_seed(2)), block=2)


def sample(target: Target, draft: Draft | None, first_seed: int) -> Counter[tuple[int, ...]]:
    """Three new tokens after one prompt: the prefill's, and two of the first rounds'."""
    decoder = Decoder(target, draft, Sampling(1.0), max_rows=100)
    requests = (Request(START, 3, seed=first_seed + i) for i in range(SAMPLES))
    return Counter(tuple(g.token_ids) for g in decoder.run(requests))


@pytest.fixture(scope="module")
def plain(small: Target) -> Counter[tuple[int, ...]]:
    return sample(small, None, first_seed=0)


def chi_square_tail(statistic: float, freedom: float) -> float:
    half = torch.tensor([freedom / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def two_sample_p_value(a: Counter[tuple[int, ...]], b: Counter[tuple[int, ...]]) -> float:
    """Chi-square of two samples of equal size, cells of fewer than ten together pooled into one."""
    pairs = [(a[k], b[k]) for k in sorted(a | b)]
    common = [p for p in pairs if sum(p) >= 10]
    rare = [p for p in pairs if sum(p) < 10]
    cells = [*common, (sum(x for x, _ in rare), sum(y for _, y in rare))] if rare else common
    statistic = sum((x - y) ** 2 / (x + y) for x, y in cells)
    return chi_square_tail(statistic, len(cells) - 1)


def test_speculative_samples_follow_plain_samplings_law(
    small: Target, plain: Counter[tuple[int, ...]], mismatched: TableDraft
) -> None:
    """n = 800 + 800 sequences of three tokens on V = 3 (27 cells), T = 1, level 0.001; power above 0.99
    against each mutant below, computed in the next test and shown in the one after."""
    speculative = sample(small, mismatched, first_seed=10**6)
    assert sum(speculative.values()) == sum(plain.values()) == SAMPLES
    assert two_sample_p_value(plain, speculative) > LEVEL


def test_plain_samples_follow_the_models_law(small: Target, plain: Counter[tuple[int, ...]]) -> None:
    law = committed_law(small, lambda p, q: p, None)
    cells = [(plain[k], SAMPLES * v) for k, v in law.items() if SAMPLES * v >= 5]
    rest = (SAMPLES - sum(x for x, _ in cells), SAMPLES - sum(e for _, e in cells))
    statistic = sum((x - e) ** 2 / e for x, e in [*cells, rest])
    assert chi_square_tail(statistic, len(cells)) > LEVEL


def verify_all(p: Tensor, q: Tensor, tokens: Tensor, lengths: Tensor, uniforms: Tensor) -> Verdict:
    """Mutant: every proposal is accepted."""
    return Verdict(lengths, draw(p[:, -1], uniforms[:, -1]))


def verify_replacing_from_p(
    p: Tensor, q: Tensor, tokens: Tensor, lengths: Tensor, uniforms: Tensor
) -> Verdict:
    """Mutant: the replacement comes from the target's distribution, not from the residual."""
    accepted = verify(p, q, tokens, lengths, uniforms).accepted
    return Verdict(accepted, draw(p[torch.arange(len(p)), accepted], uniforms[:, -1]))


def committed(p: Tensor, q: Tensor) -> Tensor:
    """One position's law under the published rule: what is accepted, and the residual."""
    return torch.minimum(p, q) + (p - q).clamp(min=0)


def committed_from_p(p: Tensor, q: Tensor) -> Tensor:
    kept = torch.minimum(p, q)
    return kept + (1 - kept.sum()) * p


MUTANTS: dict[str, tuple[Callable[..., Verdict], Callable[[Tensor, Tensor], Tensor]]] = {
    "accepts always": (verify_all, lambda p, q: q),
    "replaces from p": (verify_replacing_from_p, committed_from_p),
}


def committed_law(target: Target, position: Callable[[Tensor, Tensor], Tensor], table: Tensor | None) -> Law:
    """Exact law of the three tokens; `position` gives a position's law from the target's and the draft's."""
    law: Law = {}
    q = torch.full((VOCABULARY, VOCABULARY), 1 / 3) if table is None else table
    for tokens in product(range(VOCABULARY), repeat=3):
        hidden = target.read(torch.tensor([START + list(tokens[:2])]), []).last_hidden[0, -3:]
        p = target.logits(hidden).double().softmax(-1)
        drafted = q.double().softmax(-1) if table is not None else q.double()
        chance = float(p[0, tokens[0]])
        for k in (1, 2):
            chance *= float(position(p[k], drafted[tokens[k - 1]])[tokens[k]])
        law[tokens] = chance
    return law


def power(a: Law, b: Law, samples: int, level: float) -> float:
    """Of the two-sample chi-square test: the tail of a non-central chi-square as a Poisson mixture."""
    freedom = len(a) - 1
    shift = samples * sum((a[k] - b[k]) ** 2 / (a[k] + b[k]) for k in a)
    low, high = 0.0, 1e4
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if chi_square_tail(middle, freedom) > level else (low, middle)
    total, spread = 0.0, int(10 * math.sqrt(shift + 1))
    for k in range(max(0, int(shift / 2) - spread), int(shift / 2) + spread):
        weight = (
            math.exp(-shift / 2 + k * math.log(shift / 2) - math.lgamma(k + 1)) if shift else float(k == 0)
        )
        total += weight * chi_square_tail(low, freedom + 2 * k)
    return total


@pytest.mark.parametrize("name", MUTANTS)
def test_power_of_the_two_sample_test_against_each_mutant(
    small: Target, mismatched: TableDraft, name: str
) -> None:
    right = committed_law(small, committed, mismatched.logits)
    wrong = committed_law(small, MUTANTS[name][1], mismatched.logits)
    assert math.isclose(sum(right.values()), 1, rel_tol=1e-6)
    assert math.isclose(sum(wrong.values()), 1, rel_tol=1e-6)
    assert power(right, wrong, SAMPLES, LEVEL) > 0.99
    assert math.isclose(power(right, right, SAMPLES, LEVEL), LEVEL, rel_tol=1e-3)


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_of_verify_is_caught_by_the_two_sample_test(
    small: Target,
    plain: Counter[tuple[int, ...]],
    mismatched: TableDraft,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(decode, "verify", MUTANTS[name][0])
    assert two_sample_p_value(plain, sample(small, mismatched, first_seed=10**6)) < LEVEL


def test_exact_law_is_the_plain_one_under_the_published_rule(small: Target, mismatched: TableDraft) -> None:
    """The yardstick of the power computation is itself right."""
    right = committed_law(small, committed, mismatched.logits)
    for tokens, chance in committed_law(small, lambda p, q: p, None).items():
        assert math.isclose(right[tokens], chance, rel_tol=1e-9)
