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
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from conftest import DEVICE, FAMILIES, NoisyTarget, TableDraft, prompts_of, save_tiny, teach, tiny_draft
from deepspec.checkpoints.draft import new_draft
from deepspec.decode import engine as decode
from deepspec.decode.engine import Decoder, Event, Generation, Request, generate
from deepspec.decode.text import TextStream, pieces_of
from deepspec.drafts.base import Draft
from deepspec.drafts.dspark import DSparkDraft
from deepspec.drafts.lookup import PromptLookup
from deepspec.errors import UserError
from deepspec.maths.slots import SlotStore
from deepspec.maths.verify import Sampling, Verdict, draw, verify
from deepspec.targets import Target

LENGTHS = (13, 7, 17, 10)
NEW = 14
# Every family with a recurrent and with a block draft, and every method and head once.
PAIRS = [
    *(("llama", method) for method in ("eagle3", "dspark", "lookup", "noisy")),
    *(("qwen3", method) for method in ("eagle3", "gated", "rnn")),
    *(("gemma4", method) for method in ("eagle3", "dflash", "dspark")),
]


class Scene:
    """A target, ragged prompts, their plain greedy continuations, and drafts that are right sometimes."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.prompts = prompts_of(target, LENGTHS)
        self.greedy = [g.token_ids for g in generate(target, None, self.prompts, NEW)]
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
    """One whole pass over prompt and output uses no cache, no slots and none of our head. If each token is
    the argmax after those before it, a loop of such passes gives the same tokens."""
    scene = scenes(family)
    for prompt, row, greedy in zip(scene.prompts, scene.rows, scene.greedy, strict=True):
        assert len(greedy) == NEW
        with torch.no_grad():
            logits = scene.target.model(torch.tensor([row], device=DEVICE)).logits[0]
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == greedy
    assert generate(scene.target, None, scene.prompts[2], NEW).token_ids == scene.greedy[2]


@pytest.mark.parametrize("family, method", PAIRS)
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
    for prompt, together in list(zip(scene.prompts, batch, strict=True))[:1]:
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
        length = len(witness.closed[slot])
        assert length >= len(row) - NEW + 7
        assert witness.closed[slot] == row[:length]


def test_confidence_is_conditioned_on_the_token_before_each_slot(llama: Scene) -> None:
    draft = llama.draft("dspark")
    assert isinstance(draft, DSparkDraft)
    prompt, anchor = llama.prompts[0], llama.greedy[0][0]
    features = llama.target.read(torch.tensor([prompt]), draft.feature_layers).features
    draft.open(0)
    with torch.no_grad():
        draft.observe([0], features, [prompt], [[*prompt[1:], anchor]])
        found = draft.propose(
            [0], [anchor], Sampling(1.0), torch.tensor([[0.1, 0.9, 0.5, 0.3]], device=DEVICE)
        )
        previous = torch.tensor([[anchor, *found.tokens[0, :-1].tolist()]], device=DEVICE)
        want = draft.confidence_logits(draft.embed_previous(previous), draft.block_hidden([0], [anchor]))
    assert len(set(previous[0].tolist())) > 1
    assert want is not None and found.confidence is not None
    torch.testing.assert_close(found.confidence, want)


# ── rounds, budget, stop tokens ───────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("budget", [1, 2, 5, 6, 7, 10, 11])
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


@pytest.mark.parametrize("method", ["eagle3", "rnn"])
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
        has_confidence = method == "rnn"
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
    for method in ("eagle3", "dspark"):
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
    [("plain", {}), ("eagle3", {}), ("dspark", {"top_k": 12, "top_p": 0.8})],
)
def test_sampled_tokens_depend_on_the_seed_and_not_on_the_batch(
    scenes: Callable[[str], Scene], method: str, options: dict[str, Any]
) -> None:
    scene = scenes("gemma4")
    draft = None if method == "plain" else scene.draft(method)

    def run(prompts: Any, seed: Any) -> Any:
        return generate(scene.target, draft, prompts, 6, temperature=0.9, seed=seed, **options)

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
    [("plain", 1.0), ("eagle3", 0.0), ("rnn", 1.0), ("lookup", 0.0)],
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
    budgets = [7, 2, 11, 1, 8, 4, 6]
    requests = [
        Request(p, b, 40 + i, str(i), Sampling(temperature))
        for i, (p, b) in enumerate(zip(prompts, budgets, strict=True))
    ]
    decoder = Decoder(target, draft, max_rows=3)
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


# ── the protocol: submit, step, cancel ────────────────────────────────────────────────────────────────

SAMPLINGS = (
    Sampling(),
    Sampling(1.0),
    Sampling(0.7, top_k=12),
    Sampling(1.3, top_k=20, top_p=0.8),
)


def different(scene: Scene) -> list[Request]:
    """One request per prompt, no two with the same sampling, budget, seed and stop tokens."""
    return [
        Request(p, 6 + 2 * i, 30 + i, f"row {i}", s, frozenset(scene.greedy[i][5:6]))
        for i, (p, s) in enumerate(zip(scene.prompts, SAMPLINGS, strict=True))
    ]


def drain(decoder: Decoder) -> list[Event]:
    events = []
    while not decoder.idle:
        events += decoder.step()
    return events


def alone(scene: Scene, draft: Draft | None, request: Request) -> Generation:
    (answer,) = Decoder(scene.target, draft).run([request])
    return answer


def same(found: Generation, want: Generation) -> bool:
    fields = ("token_ids", "proposed", "accepted", "kept", "from_draft", "stopped")
    return all(getattr(found, name) == getattr(want, name) for name in fields)


@pytest.mark.parametrize(
    "family, method",
    [("qwen3", "plain"), ("qwen3", "eagle3"), ("qwen3", "rnn"), ("gemma4", "dspark"), ("llama", "noisy")],
)
def test_rows_with_different_samplings_get_the_tokens_that_each_gets_alone(
    scenes: Callable[[str], Scene], family: str, method: str
) -> None:
    """Greedy, plain, top-k, and top-k with top-p in one batch, with budgets and stop tokens of their own."""
    scene = scenes(family)
    draft = None if method == "plain" else scene.draft(method)
    requests = different(scene)
    found = {g.key: g for g in Decoder(scene.target, draft, max_rows=4).run(requests)}
    for request in requests:
        assert same(found[request.key], alone(scene, draft, request)), request.key
    greedy = scene.greedy[0]
    assert found["row 0"].token_ids == greedy[: greedy.index(greedy[5]) + 1], "the greedy row is greedy"
    texts = {tuple(g.token_ids[:6]) for g in found.values()}
    assert len(texts) == 4
    without = replace(requests[3], sampling=Sampling(1.3))
    assert alone(scene, draft, without).token_ids != found["row 3"].token_ids, "the filters tell"


@pytest.mark.parametrize("method", ["plain", "eagle3"])
def test_tokens_arrive_round_by_round(scenes: Callable[[str], Scene], method: str) -> None:
    """The first with the prefill's step, then what each round kept; the last event says so."""
    scene = scenes("qwen3")
    draft = None if method == "plain" else scene.draft(method)
    decoder = Decoder(scene.target, draft, max_rows=4)
    keys = [decoder.submit(request) for request in different(scene)]
    steps = []
    while not decoder.idle:
        steps.append([(e, len(e.answer.token_ids), len(e.answer.kept)) for e in decoder.step()])
    assert [[e.answer.key for e, _, _ in events] for events in steps[:4]] == [[key] for key in keys]
    for key in keys:
        events = [(step, *e) for step, events in enumerate(steps) for e in events if e[0].answer.key == key]
        answer = events[0][1].answer
        assert [len(e.tokens) for _, e, _, _ in events] == [1, *answer.kept]
        assert [t for _, e, _, _ in events for t in e.tokens] == answer.token_ids
        shown = 0
        for index, (_, event, length, rounds) in enumerate(events):
            shown += len(event.tokens)
            assert (length, rounds) == (shown, index), "a token is handed out in the step that commits it"
        assert [e.finished for _, e, _, _ in events] == [False] * (len(events) - 1) + [True]
        rounds = [step for step, *_ in events][1:]
        assert rounds == list(range(4, 4 + len(rounds))), "each round steps every row that is in flight"


calls = st.lists(
    st.one_of(st.just("step"), st.just("step"), st.just("submit"), st.integers(0, 8)),
    min_size=20,
    max_size=30,
)


@pytest.mark.parametrize("method", ["eagle3", "rnn", "lookup"])
def test_cancelling_some_rows_leaves_the_others_tokens_as_they_were(
    scenes: Callable[[str], Scene], method: str
) -> None:
    """Requests of all samplings come, are cancelled at any moment, or finish, in three slots. A cancelled one
    keeps the first tokens of what it would have been; its slot, in target and draft, goes to the next."""
    scene = scenes("qwen3")
    draft = scene.draft(method)
    pool = [
        replace(request, key=f"{copy}{request.key}", max_new_tokens=4 + copy)
        for copy in range(2)
        for request in different(scene)
    ]
    want = {request.key: alone(scene, draft, request) for request in pool}
    cancelled = 0

    @settings(derandomize=True, deadline=None, max_examples=6, database=None)
    @given(calls)
    def check(todo: list[str | int]) -> None:
        nonlocal cancelled
        decoder, coming = Decoder(scene.target, draft, max_rows=3), iter(pool)
        open_: list[str] = []
        streamed: dict[str, list[int]] = {}
        answers: dict[str, Generation] = {}

        def take(events: list[Event]) -> None:
            for event in events:
                streamed.setdefault(event.answer.key, []).extend(event.tokens)
                if event.finished:
                    open_.remove(event.answer.key)
                    answers[event.answer.key] = event.answer

        for call in todo:
            if call == "step":
                take(decoder.step())
            elif call == "submit":
                if (request := next(coming, None)) is not None:
                    open_.append(decoder.submit(request))
            elif open_:
                assert isinstance(call, int)
                key = open_.pop(call % len(open_))
                rows = len(decoder.rows)
                partial = decoder.cancel(key)
                assert partial.token_ids == want[key].token_ids[: len(partial.token_ids)]
                assert partial.token_ids == streamed.get(key, [])
                assert len(decoder.rows) == rows - bool(partial.token_ids)
                cancelled += 1
            slots = [row.slot for row in decoder.rows]
            assert slots == sorted(set(slots)) and set(slots) <= {0, 1, 2}
            assert set(scene.target._tokens) >= set(slots)
            assert not set(scene.target._tokens) & ({0, 1, 2} - set(slots)), "a slot was not freed"
            if isinstance(draft, PromptLookup):
                assert not set(draft.history) & ({0, 1, 2} - set(slots))
            else:
                assert not set(draft.lengths) & ({0, 1, 2} - set(slots))  # type: ignore[attr-defined]
        take(drain(decoder))
        assert not open_
        for key, answer in answers.items():
            assert same(answer, want[key]), key
            assert streamed[key] == answer.token_ids

    check()
    assert cancelled >= 8


def test_waiting_requests_are_admitted_in_order_as_soon_as_a_slot_is_free(llama: Scene) -> None:
    decoder = Decoder(llama.target, None, max_rows=2)
    for i in range(5):
        decoder.submit(Request([5 + i], 3, key=str(i)))
    first, second = decoder.step(), decoder.step()
    assert [e.answer.key for e in first + second] == ["0", "1"]
    decoder.cancel("0")
    decoder.cancel("3")
    assert [row.slot for row in decoder.rows] == [1]
    (event,) = decoder.step()
    assert event.answer.key == "2" and [row.slot for row in decoder.rows] == [0, 1]
    assert [e.answer.key for e in decoder.step()] == ["2", "1"]
    assert [e.answer.key for e in drain(decoder) if e.finished] == ["2", "1", "4"]
    assert decoder.step() == []


def test_requests_without_a_key_get_one_and_keys_may_be_used_again(llama: Scene) -> None:
    decoder = Decoder(llama.target, None)
    keys = [decoder.submit(Request([1], 2)) for _ in range(3)]
    assert len(set(keys)) == 3
    assert [e.answer.key for e in drain(decoder) if e.finished] == keys
    assert decoder.submit(Request([1], 2, key=keys[0])) == keys[0]


@pytest.mark.parametrize(
    "request_, message",
    [
        (Request([], key="new"), "an empty prompt"),
        (Request([1, 64], key="new"), "prompt new holds token 64, outside the vocabulary of 64"),
        (Request([-1], key="new"), "prompt new holds token -1"),
        (Request([1], 0, key="new"), "max_new_tokens must be at least 1, not 0"),
        (Request([1], key="running"), "a request with the key 'running' has not finished"),
        (Request([1], key="waiting"), "a request with the key 'waiting' has not finished"),
    ],
)
def test_impossible_requests_are_refused_and_leave_the_others_alone(
    llama: Scene, request_: Request, message: str
) -> None:
    decoder = Decoder(llama.target, None)
    for key in ("running", "waiting"):
        decoder.submit(Request(llama.prompts[0], 4, key=key))
    decoder.step()
    with pytest.raises(UserError, match=message):
        decoder.submit(request_)
    with pytest.raises(UserError, match="there is no request with the key 'new'"):
        decoder.cancel("new")
    found = [e.answer for e in drain(decoder) if e.finished]
    assert [(g.key, g.token_ids) for g in found] == [
        ("running", llama.greedy[0][:4]),
        ("waiting", llama.greedy[0][:4]),
    ]
    with pytest.raises(UserError, match="there is no request with the key 'running'"):
        decoder.cancel("running")


@pytest.mark.parametrize("limit", [19, 21, 24])
@pytest.mark.parametrize("method", ["lookup", "dspark", "table"])
def test_context_ends_a_sequence_without_a_token_read_past_it(
    llama: Scene, monkeypatch: pytest.MonkeyPatch, method: str, limit: int
) -> None:
    """Proposals near the end were read past it: an error in mid-run where positions turn with the length, and
    rows of one batch reach the end in different rounds."""
    target = llama.target
    draft = TableDraft(torch.zeros(64, 64), 4) if method == "table" else llama.draft(method)
    monkeypatch.setattr(target, "_steady_length", limit)
    prompts = llama.prompts[:3]
    alone = [generate(target, draft, p, 50, temperature=1.0, seed=7).token_ids for p in prompts]
    batch = generate(target, draft, prompts, 50, temperature=1.0, seed=[7] * 3)
    assert [len(p) + len(g.token_ids) for p, g in zip(prompts, batch, strict=True)] == [limit] * 3
    assert [g.token_ids for g in batch] == alone
    assert all(n <= draft.max_proposals for g in batch for n in g.proposed)
    greedy = generate(target, draft, prompts, 50)
    for found, prompt, row in zip(greedy, prompts, llama.rows, strict=False):
        assert [*prompt, *found.token_ids][: len(row)] == row[:limit]


def test_prompt_that_fills_the_context_is_refused_before_it_is_read(
    llama: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama.target, "_steady_length", 8)
    decoder = Decoder(llama.target, None)
    with pytest.raises(UserError, match=r"prompt long is 8 tokens, and .* reads at most 8") as caught:
        decoder.submit(Request([5] * 8, 4, key="long"))
    assert "a longer context" in str(caught.value)
    decoder.submit(Request([5] * 6, 4, key="short"))
    (found,) = [e.answer for e in drain(decoder) if e.finished]
    assert (len(found.token_ids), found.stopped) == (2, False)


def test_prompt_that_the_target_refuses_gives_its_slot_back(
    llama: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Past a length that the target's positions allow, say: the request is gone, the others continue."""
    decoder = Decoder(llama.target, None, max_rows=2)
    for i, prompt in enumerate((llama.prompts[0], [1] * 40, llama.prompts[1])):
        decoder.submit(Request(prompt, 4, key=str(i)))
    decoder.step()
    monkeypatch.setattr(llama.target, "_steady_length", 39)
    with pytest.raises(UserError, match="too long"):
        decoder.step()
    found = {e.answer.key: e.answer.token_ids for e in drain(decoder) if e.finished}
    assert found == {"0": llama.greedy[0][:4], "2": llama.greedy[1][:4]}
    with pytest.raises(UserError, match="no request with the key '1'"):
        decoder.cancel("1")


# ── slots in use again ────────────────────────────────────────────────────────────────────────────────


class Watched:
    """Counts what every `SlotStore` copies: keys that a read gathered, and slots that were moved."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reads = self.gathers = self.moves = 0
        view, move = SlotStore._view, SlotStore._move_to_front

        def look(store: SlotStore, found: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            assert store.keys is not None
            self.reads += 1
            self.gathers += found[0].untyped_storage().data_ptr() != store.keys.untyped_storage().data_ptr()
            return found

        def moved(store: SlotStore, slots: tuple[int, ...]) -> None:
            self.moves += 1
            move(store, slots)

        monkeypatch.setattr(SlotStore, "_view", lambda store, *what: look(store, view(store, *what)))
        monkeypatch.setattr(SlotStore, "_move_to_front", moved)


@pytest.mark.parametrize("method", ["eagle3", "dspark"])
def test_slots_in_use_again_are_read_without_a_copy(
    scenes: Callable[[str], Scene], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slot handed on once made every later round gather all keys and values of every layer."""
    scene = scenes("qwen3")
    target = Target(scene.target.spec, scene.target.model)
    draft = tiny_draft(target, method)
    watched = Watched(monkeypatch)
    decoder = Decoder(target, draft, max_rows=3)
    for i, prompt in enumerate(scene.prompts * 2):
        decoder.submit(Request(prompt, (4, 9, 6)[i % 3], i))
    while decoder.waiting or len(decoder.rows) == 3:
        decoder.step()
    assert watched.reads > 100
    assert watched.gathers == watched.moves == 0
    # The queue is empty: what finishes now leaves a gap, which is closed once and not copied round by round.
    drain(decoder)
    assert watched.gathers == 0
    stores = {"eagle3": 1, "dspark": 2}[method] + target.spec.num_layers
    assert watched.moves <= 3 * stores


def test_gap_between_slots_is_closed_once(llama: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    target = Target(llama.target.spec, llama.target.model)
    watched = Watched(monkeypatch)
    decoder = Decoder(target, None, max_rows=4)
    for i, prompt in enumerate(llama.prompts):
        decoder.submit(Request(prompt, NEW, key=str(i)))
    for _ in range(6):
        decoder.step()
    decoder.cancel("1")
    for _ in range(4):
        decoder.step()
    assert watched.moves == target.spec.num_layers
    decoder.submit(Request(llama.prompts[1], 9, key="late"))
    found = {e.answer.key: e.answer.token_ids for e in drain(decoder) if e.finished}
    assert watched.gathers == 0
    assert found == {str(i): llama.greedy[i] for i in (0, 2, 3)} | {"late": llama.greedy[1][:9]}


# ── text while it comes ───────────────────────────────────────────────────────────────────────────────


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


@settings(derandomize=True, deadline=None)
@given(
    st.text(st.sampled_from("aé€😀"), max_size=6),
    st.lists(st.tuples(st.integers(1, 4), st.integers(0, 4)), min_size=1, max_size=30),
    st.booleans(),
    st.integers(0, 3),
)
def test_streamed_text_is_the_whole_text_and_no_half_character_is_shown(
    text: str, rounds: list[tuple[int, int]], stopped: bool, cut: int
) -> None:
    ids = list(text.encode())
    ids = ids[: len(ids) - cut] if cut < len(ids) else ids  # a budget may cut a character
    whole = Generation(token_ids=[*ids, 0] if stopped else ids, stopped=stopped)
    for size, drafted in rounds * len(ids):
        whole.from_draft += [i < drafted for i in range(size)]
    whole.from_draft = whole.from_draft[: len(whole.token_ids)]
    stream, at, shown = TextStream(Bytes()), 0, []
    while at < len(whole.token_ids):
        at += rounds[at % len(rounds)][0]
        ended = at >= len(whole.token_ids)
        part = Generation(
            token_ids=whole.token_ids[:at], from_draft=whole.from_draft[:at], stopped=stopped and ended
        )
        shown += stream.new(part, finished=False)
        if not ended:
            assert "\ufffd" not in "".join(piece for piece, _ in shown)
    shown += stream.new(whole, finished=True)
    assert "".join(piece for piece, _ in shown) == Bytes().decode(ids, True)
    assert "".join(piece for piece, _ in pieces_of(Bytes(), whole)) == Bytes().decode(ids, True)
    assert stream.new(whole, finished=True) == []


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
SAMPLES = 250
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
    return Target.from_pretrained(path, dtype="float32", device=DEVICE)


@pytest.fixture(scope="module")
def mismatched() -> TableDraft:
    """Two proposals from a table that has nothing to do with the target: it accepts about a third."""
    return TableDraft(3 * torch.randn(3, 3, generator=torch.Generator().manual_seed(2)), block=2)


def sample(target: Target, draft: Draft | None, first_seed: int) -> Counter[tuple[int, ...]]:
    """Three new tokens after one prompt: the prefill's, and two of the first rounds'."""
    decoder = Decoder(target, draft, max_rows=100)
    requests = (Request(START, 3, first_seed + i, sampling=Sampling(1.0)) for i in range(SAMPLES))
    return Counter(tuple(g.token_ids) for g in decoder.run(requests))


def chi_square_tail(statistic: float, freedom: float) -> float:
    half = torch.tensor([freedom / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def p_value(found: Counter[tuple[int, ...]], law: Law) -> float:
    """Chi-square of a sample against an exact law, cells of less than five expected pooled into one."""
    cells = [(found[k], SAMPLES * v) for k, v in law.items() if SAMPLES * v >= 5]
    rest = (SAMPLES - sum(x for x, _ in cells), SAMPLES - sum(e for _, e in cells))
    statistic = sum((x - e) ** 2 / e for x, e in [*cells, rest])
    return chi_square_tail(statistic, len(cells))


@pytest.mark.parametrize("speculative", [False, True])
def test_samples_follow_the_models_law(small: Target, mismatched: TableDraft, speculative: bool) -> None:
    """Plain and speculative sampling: n sequences of three tokens on V = 3 (27 cells), T = 1, level 0.001,
    power above 0.99 against each mutant below, computed in the next test and shown in the one after."""
    found = sample(small, mismatched if speculative else None, first_seed=10**6)
    assert sum(found.values()) == SAMPLES
    assert p_value(found, plain_law(small)) > LEVEL


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
        p = target.logits(hidden).double().softmax(-1).cpu()
        drafted = q.double().softmax(-1) if table is not None else q.double()
        chance = float(p[0, tokens[0]])
        for k in (1, 2):
            chance *= float(position(p[k], drafted[tokens[k - 1]])[tokens[k]])
        law[tokens] = chance
    return law


def plain_law(target: Target) -> Law:
    return committed_law(target, lambda p, q: p, None)


def power(a: Law, b: Law, samples: int, level: float) -> float:
    """Of the chi-square test of law a if b holds: a non-central chi-square tail, as a Poisson mixture."""
    freedom = len(a) - 1
    shift = samples * sum((a[k] - b[k]) ** 2 / a[k] for k in a)
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
def test_power_of_the_test_against_each_mutant(small: Target, mismatched: TableDraft, name: str) -> None:
    right = committed_law(small, committed, mismatched.logits.cpu())
    wrong = committed_law(small, MUTANTS[name][1], mismatched.logits.cpu())
    assert math.isclose(sum(right.values()), 1, rel_tol=1e-6)
    assert math.isclose(sum(wrong.values()), 1, rel_tol=1e-6)
    assert power(right, wrong, SAMPLES, LEVEL) > 0.99
    assert math.isclose(power(right, right, SAMPLES, LEVEL), LEVEL, rel_tol=1e-3)


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_of_verify_is_caught_by_the_test_of_the_law(
    small: Target,
    mismatched: TableDraft,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(decode, "verify", MUTANTS[name][0])
    assert p_value(sample(small, mismatched, first_seed=10**6), plain_law(small)) < LEVEL


def test_exact_law_is_the_plain_one_under_the_published_rule(small: Target, mismatched: TableDraft) -> None:
    """The yardstick of the power computation is itself right."""
    right = committed_law(small, committed, mismatched.logits.cpu())
    for tokens, chance in plain_law(small).items():
        assert math.isclose(right[tokens], chance, rel_tol=1e-9)


def test_a_run_that_is_refused_leaves_nothing_in_the_decoder(targets: dict[str, Target]) -> None:
    """A key that came twice left the first request waiting, and its slot taken."""
    target = targets["llama"]
    decoder = Decoder(target, None, max_rows=2)
    twice = [Request([1, 2], 4, key="a"), Request([1, 2, 3], 4, key="a")]
    with pytest.raises(UserError, match="a request with the key 'a' has not finished yet"):
        list(decoder.run(twice))
    assert decoder.idle
    # One that somebody else submitted stays, and a run that is left early gives its slots back.
    other = decoder.submit(Request([4, 5], 3, key="other"))
    next(iter(run := decoder.run([Request([1, 2], 1, key="b"), Request([1, 2], 9, key="c")])))
    run.close()
    assert [row.answer.key for row in decoder.rows] + list(decoder.waiting) == [other]
    assert [len(answer.token_ids) for answer in decoder.run([])] == [3]
