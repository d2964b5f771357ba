"""Answers in process: turn by turn, the same to the byte after any kill, failures listed with reasons."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from deepspec.answers import in_process as module
from deepspec.answers.dialogue import Dialogue, turns_of
from deepspec.answers.file import beside, last_mark
from deepspec.answers.in_process import regenerate
from deepspec.cli import app
from deepspec.data.conversations import Conversation, conversation_from_row, read_conversations
from deepspec.data.identity import row_seed
from deepspec.data.tokens import encode_turns, prompt_ids
from deepspec.decode.engine import generate
from deepspec.errors import DataError, NonFiniteError, UserError
from deepspec.files import JsonlWriter
from deepspec.maths.verify import Sampling
from deepspec.targets import Target
from kills import disk_of, killed_at, needs_fork
from talking import save_talking_llama
from test_non_finite import poisoned


def said(**texts: str) -> list[dict[str, str]]:
    """said(u1="…", a1="…"): messages with the role that the letter names."""
    roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    return [{"role": roles[name[0]], "content": text} for name, text in texts.items()]


def asked(name: str, messages: Sequence[dict[str, str]] | None = None, **more: Any) -> Conversation:
    return conversation_from_row({"id": name, "messages": messages or said(u=f"What is {name}?"), **more})


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    path = save_talking_llama(tmp_path_factory.mktemp("talking"))
    return Target.from_pretrained(path, dtype="float32", device="cpu")


# ── which answers are given ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        (said(u="1"), [["1"]]),
        (said(u="1", a="old"), [["1"]]),
        (said(s="sys", u="1", a="old"), [["sys", "1"]]),
        (said(u1="1", a1="old", u2="2", a2="old"), [["1"], ["2"]]),
        (said(u1="1", a1="old", u2="2"), [["1"], ["2"]]),
        # A tool result belongs to the call before it, which therefore stays.
        (said(u="1", a1="call", t="result", a2="old"), [["1", "call", "result"]]),
        (said(u="1", a1="call", t="result"), [["1", "call", "result"]]),
        (said(u="1", a1="call", t1="r", t2="r", a2="old", u2="2"), [["1", "call", "r", "r"], ["2"]]),
        (
            said(u1="1", a1="call", t1="r", a2="kept", u2="2", a3="call", t2="r", a4="old"),
            [["1", "call", "r", "kept", "2", "call", "r"]],
        ),
    ],
)
def test_every_answer_is_given_anew_but_those_that_tool_results_hang_on(messages, expected):
    turns = turns_of(asked("x", messages))
    assert [[m["content"] for m in turn] for turn in turns] == expected


def test_follow_ups_are_asked_after_the_answers():
    row = conversation_from_row({"turns": ["first", "second", "third"]})
    assert [[m["content"] for m in turn] for turn in turns_of(row)] == [["first"], ["second"], ["third"]]


def test_answered_row_has_one_list_of_ids_or_one_per_assistant_turn():
    one = Dialogue.begin(asked("x", said(u="1", a="old"), answer_ids=[9]))
    one.answer("new", [5, 2], True, 2)
    assert one.row({"seed": 0}) == {
        "id": "x",
        "domain": None,
        "messages": said(u="1", a="new"),
        "answer_ids": [5, 2],
        "finished": True,
        "seed": 0,
    }
    two = Dialogue.begin(asked("x", said(u1="1", a1="old", u2="2")))
    two.answer("A", [5, 2], False, 2)
    two.answer("B", [7], True, 1)
    assert two.row({})["answer_ids"] == [[5, 2], [7]]
    assert two.row({})["finished"] is False
    tool = Dialogue.begin(asked("x", said(u="1", a1="call", t="result", a2="old")))
    tool.answer("new", [5, 2], True, 2)
    assert tool.row({})["answer_ids"] == [None, [5, 2]]
    asked_, call, result, new = said(u="1", a1="call", t="result", a2="new")
    assert tool.row({})["messages"] == [asked_, {**call, "weight": 0}, result, new]


def test_target_never_reads_a_weight_that_a_row_brought_along():
    messages = said(u="1", a1="call", t="result", a2="old")
    messages[1]["weight"] = 0
    dialogue = Dialogue.begin(asked("x", messages))
    assert dialogue.prompt() == said(u="1", a1="call", t="result")
    dialogue.answer("new", None, True, 2)
    assert [m.get("weight") for m in dialogue.row({})["messages"]] == [None, 0, None, None]


def test_turns_that_were_kept_for_their_tool_results_are_not_trained_on(target):
    dialogue = Dialogue.begin(asked("x", said(u="1", a1="call", t="result", a2="old", u2="2")))
    ids = [target.tokenizer.encode(text) for text in ("blue", "red")]
    for tokens in ids:
        dialogue.answer(target.tokenizer.decode(tokens), tokens, True, len(tokens))
    row = conversation_from_row(dialogue.row({}))
    supervised = [
        token
        for sequence in encode_turns(target.tokenizer, row, thinking=False)
        for token, on in zip(sequence.ids, sequence.loss_mask, strict=True)
        if on
    ]
    assert supervised == [*ids[0], *ids[1]]


def test_text_without_ids_claims_none():
    row = Dialogue.begin(asked("x", said(u1="1", a1="old", u2="2")))
    row.answer("A", [5, 2], True, 2)
    row.answer("B", None, True, 2)
    assert "answer_ids" not in row.row({})


def test_what_a_row_brought_along_stays_and_how_it_was_answered_before_does_not():
    old = {"answer_ids": [1], "finished": True, "seed": 7, "source": "web", "follow_ups": ["then?"]}
    old["engine"] = "vllm"
    row = Dialogue.begin(asked("x", said(u="1", a="old"), meta=old))
    row.answer("A", [3], True, 1)
    row.answer("B", [4], True, 1)
    assert row.row({"seed": 0})["meta"] == {"source": "web"}


def test_several_turns_equal_asking_one_after_the_other(target, tmp_path):
    """The plain way: one row at a time, each question rendered after the answers there are."""
    rows = [
        asked("one", said(s="Be short.", u="What is up?")),
        conversation_from_row({"id": "two", "turns": ["say red", "and blue", "and green?"]}),
        asked("three", said(u1="hello", a1="old answer", u2="and now?", a2="older")),
        asked("four", said(u="call", a1="f()", t="42", a2="old")),
    ]
    regenerate(
        target, rows, tmp_path / "a.jsonl", sampling=Sampling(0.8), max_new_tokens=9, max_rows=3, seed=5
    )
    found = {row["id"]: row for row in rows_of(tmp_path / "a.jsonl")}
    for conversation in rows:
        history: list[Any] = []
        ids: list[Any] = []
        for turn, messages in enumerate(turns_of(conversation)):
            history += messages
            prompt = prompt_ids(target.tokenizer, history, False)
            seed = row_seed(5, conversation.id, turn)
            stops = target.stop_token_ids
            answer = generate(target, None, prompt, 9, 0.8, seed=seed, stop_token_ids=stops)
            text = target.tokenizer.decode(answer.token_ids, skip_special_tokens=True)
            history.append({"role": "assistant", "content": text})
            ids.append(answer.token_ids)
        kept = sum(m["role"] == "assistant" for m in history) - len(ids)
        every = [*[None] * kept, *ids]
        for message in [m for m in history if m["role"] == "assistant"][:kept]:
            message["weight"] = 0
        assert found[conversation.id]["messages"] == history
        assert found[conversation.id]["answer_ids"] == (every[0] if len(every) == 1 else every)


def test_training_supervises_the_very_tokens_that_were_generated(target, tmp_path):
    """Each turn after the prompt that the target was given for it, id for id."""
    row = conversation_from_row({"id": "x", "turns": ["say red", "and blue", "and green?"]})
    regenerate(target, [row], tmp_path / "a.jsonl", max_new_tokens=9, seed=3)
    (answered,) = read_conversations(tmp_path / "a.jsonl")
    supervised, expected = [], []
    for sequence in encode_turns(target.tokenizer, answered, False):
        produced = zip(sequence.ids, sequence.loss_mask, strict=True)
        supervised += [token for token, mask in produced if mask]
    for turn, ids in enumerate(answered.meta["answer_ids"]):
        prompt = prompt_ids(target.tokenizer, answered.messages[: 2 * turn + 1], False)
        seed = row_seed(3, "x", turn)
        stops = target.stop_token_ids
        assert ids == generate(target, None, prompt, 9, 1.0, seed=seed, stop_token_ids=stops).token_ids
        expected += ids
    assert supervised == expected


def test_a_seed_belongs_to_row_and_turn():
    seeds = [row_seed(0, "a"), row_seed(0, "a", 1), row_seed(0, "b"), row_seed(1, "a")]
    assert len(set(seeds)) == 4
    assert seeds[0] == int.from_bytes(hashlib.sha256(b"0:a").digest()[:7], "big")


# ── the same to the byte ──────────────────────────────────────────────────────────────────────────────


def batch_sensitive(dialogues: Sequence[Dialogue], *rest: Any) -> Iterator[Dialogue]:
    """In the decoder's place: each answer depends on everything decoded with it, as rounding may."""
    company = hashlib.sha256(",".join(d.conversation.id for d in dialogues).encode()).hexdigest()[:8]
    for dialogue in dialogues:
        while not dialogue.answered and dialogue.trouble is None:
            dialogue.answer(f"{company} answers {dialogue.conversation.id}", [1, 2], True, 2)
        yield dialogue


@pytest.fixture
def stand_in(monkeypatch):
    """Stretches of two, and answers that give away what they were decoded with."""
    monkeypatch.setattr(module, "decoded", batch_sensitive)
    monkeypatch.setattr(module, "FLIGHTS", 2)


PROMPTS = [asked(f"r{i}", said(u="?" * (7 - i))) for i in range(5)]


@needs_fork
@pytest.mark.parametrize("before", [0, 3])
def test_killed_at_any_durable_operation_the_file_comes_out_the_same(target, tmp_path, stand_in, before):
    """What was there before the start is not decoded again, whichever group it would now belong to."""
    more = [*PROMPTS[:4], asked("n", said(u="?"))]

    def work(out: Path, prompts: Sequence[Conversation]) -> None:
        regenerate(target, prompts, out, max_rows=1)

    work(tmp_path / "start.jsonl", PROMPTS[:before])
    shutil.copy(tmp_path / "start.jsonl", tmp_path / "whole.jsonl")
    shutil.copy(tmp_path / "start.timings.jsonl", tmp_path / "whole.timings.jsonl")
    work(tmp_path / "whole.jsonl", more)
    whole = (tmp_path / "whole.jsonl").read_bytes()
    assert whole.startswith((tmp_path / "start.jsonl").read_bytes())
    assert len({row["messages"][1]["content"][:8] for row in rows_of(tmp_path / "whole.jsonl")}) >= 2
    torn = 0
    for operation in count(1):
        out = tmp_path / f"cut-{operation}.jsonl"
        shutil.copy(tmp_path / "start.jsonl", out)
        shutil.copy(tmp_path / "start.timings.jsonl", beside(out, "timings"))
        if not killed_at(operation, lambda out=out: work(out, more)):
            break
        torn += bool(out.stat().st_size) and not out.read_bytes().endswith(b"\n")
        work(out, more)
        assert out.read_bytes() == whole, f"killed at operation {operation}"
    assert torn == len(more) - before  # each line was once cut in half


@needs_fork
def test_real_decoding_killed_in_the_middle_of_a_stretch(target, tmp_path):
    rows = [*PROMPTS, conversation_from_row({"id": "t", "turns": ["one", "two"]})]

    def work(out: Path) -> None:
        regenerate(target, rows, out, max_new_tokens=3, max_rows=3)

    work(tmp_path / "whole.jsonl")
    for operation in (5, 8):
        out = tmp_path / f"cut-{operation}.jsonl"
        assert killed_at(operation, lambda out=out: work(out))
        assert 0 < out.stat().st_size < (tmp_path / "whole.jsonl").stat().st_size
        work(out)
        assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def saving_after(steps: int, out: Path) -> None:
    with JsonlWriter(beside(out, "timings")) as timings:
        timings.write({"steps_of_24": steps})


LONG = [*PROMPTS, conversation_from_row({"id": "t", "turns": ["one", "two"]})]


def test_a_stretch_killed_after_a_save_continues_with_the_very_steps_of_the_run_that_was_not(
    target, tmp_path, monkeypatch
):
    """Rounding depends on a step's rows, their slots and what those hold: on all steps since a save."""
    taken: list[Any] = []
    step, save = target.step, module.AnswerFile.save

    def noted(slots: Any, tokens: Any, layers: Any = ()) -> Any:
        taken.append((tuple(slots), [list(t) for t in tokens]))
        return step(slots, tokens, layers)

    def work(out: Path, kill_after: int = -1) -> list[int]:
        saves: list[int] = []
        taken.clear()

        def saved(self: Any, *rest: Any) -> None:
            save(self, *rest)
            saves.append(len(taken))
            if len(saves) == kill_after:
                raise KeyboardInterrupt

        monkeypatch.setattr(module.AnswerFile, "save", saved)
        regenerate(target, LONG, out, max_new_tokens=6, max_rows=3)
        return saves

    monkeypatch.setattr(target, "step", noted)
    whole = tmp_path / "whole.jsonl"
    saving_after(5, whole)
    saves = work(whole)
    undisturbed = list(taken)
    assert len(saves) >= 4 and len(rows_of(whole)) == 6
    assert not beside(whole, "partial").exists()
    for number, at in enumerate(saves, start=1):
        out = tmp_path / f"cut-{number}.jsonl"
        saving_after(5, out)
        with pytest.raises(KeyboardInterrupt):
            work(out, kill_after=number)
        work(out)
        assert taken == undisturbed[at:]
        assert out.read_bytes() == whole.read_bytes()


def test_the_clock_decides_once_after_how_many_steps_a_stretch_is_saved(target, tmp_path, monkeypatch):
    regenerate(target, LONG, tmp_path / "whole.jsonl", max_new_tokens=6, max_rows=3)
    assert last_mark(beside(tmp_path / "whole.jsonl", "timings"), "steps_of_24") is None
    monkeypatch.setattr(module, "SAVE_EVERY", 0.0)
    out, kept = tmp_path / "saved.jsonl", []
    save = module.AnswerFile.save

    def saved(self: Any, *rest: Any) -> None:
        kept.append(rest[2])
        save(self, *rest)

    monkeypatch.setattr(module.AnswerFile, "save", saved)
    monkeypatch.setattr(module, "REREADING", 0.9)  # a few steps after the prompts are read
    regenerate(target, LONG, out, max_new_tokens=6, max_rows=3)
    steps = last_mark(beside(out, "timings"), "steps_of_24")
    assert steps is not None and steps > 3 and set(kept) == {steps} and len(kept) > 1
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_what_was_saved_of_other_rows_under_other_conditions_or_in_part_is_not_used(
    target, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "a.jsonl"
    saving_after(4, out)
    save = module.AnswerFile.save

    def killed(self: Any, *rest: Any) -> None:
        save(self, *rest)
        raise KeyboardInterrupt

    monkeypatch.setattr(module.AnswerFile, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        regenerate(target, LONG, out, max_new_tokens=6, max_rows=3)
    monkeypatch.setattr(module.AnswerFile, "save", save)
    assert beside(out, "partial").exists() and not out.read_bytes()
    other = [asked(c.id, said(u="Another text")) for c in LONG]
    kept = beside(out, "partial").read_bytes()
    cases = [(other, 0, kept), (LONG, 1, kept), (LONG, 0, kept[: len(kept) // 2])]
    for i, (rows, seed, saved) in enumerate(cases):
        copy, fresh = tmp_path / f"copy-{i}.jsonl", tmp_path / f"fresh-{i}.jsonl"
        shutil.copy(beside(out, "timings"), beside(copy, "timings"))
        beside(copy, "partial").write_bytes(saved)
        capsys.readouterr()
        regenerate(target, rows, copy, max_new_tokens=6, max_rows=3, seed=seed)
        assert ("is damaged" in capsys.readouterr().err) is (saved != kept)
        regenerate(target, rows, fresh, max_new_tokens=6, max_rows=3, seed=seed)
        assert copy.read_bytes() == fresh.read_bytes()


def test_answers_are_on_disk_before_their_stretch_is_whole(target, tmp_path, monkeypatch):
    out, seen = tmp_path / "a.jsonl", []
    decoded = module.decoded

    def watched(*rest: Any) -> Iterator[Dialogue]:
        for dialogue in decoded(*rest):
            seen.append(len(rows_of(out)))
            yield dialogue

    monkeypatch.setattr(module, "decoded", watched)
    regenerate(target, PROMPTS, out, max_new_tokens=3, max_rows=1)
    assert seen == [0, 1, 2, 3, 4]


def test_without_the_timings_nothing_is_answered_twice(target, tmp_path, stand_in):
    out = tmp_path / "a.jsonl"
    regenerate(target, PROMPTS[:3], out, max_rows=1)
    beside(out, "timings").unlink()
    tally = regenerate(target, PROMPTS, out, max_rows=1)
    assert (tally.new, tally.there) == (2, 3)
    assert sorted(row["id"] for row in rows_of(out)) == [f"r{i}" for i in range(5)]


def test_rows_copied_in_by_hand_are_not_decoded_again(target, tmp_path, stand_in):
    out = tmp_path / "a.jsonl"
    regenerate(target, PROMPTS, tmp_path / "other.jsonl", max_rows=1)
    with JsonlWriter(beside(out, "timings")) as timings:
        timings.write({"bytes": 0})
    out.write_bytes((tmp_path / "other.jsonl").read_bytes())
    more = [*PROMPTS, asked("n")]
    assert regenerate(target, more, out, max_rows=1).new == 1
    company = hashlib.sha256(b"n").hexdigest()[:8]
    assert rows_of(out)[-1]["messages"][1]["content"] == f"{company} answers n"


def test_a_mark_past_the_end_or_inside_a_line_is_not_believed(target, tmp_path, stand_in):
    out = tmp_path / "a.jsonl"
    regenerate(target, PROMPTS, out, max_rows=1)
    before = out.read_bytes()
    for mark in (7, len(before) + 100):
        beside(out, "timings").write_text(json.dumps({"bytes": mark}) + "\n")
        tally = regenerate(target, PROMPTS, out, max_rows=1)
        assert (tally.new, tally.there) == (0, 5)
        assert out.read_bytes() == before


def test_full_disk_in_the_middle_of_a_line_is_said_and_survived(target, tmp_path, monkeypatch, stand_in):
    regenerate(target, PROMPTS, tmp_path / "whole.jsonl", max_rows=1)
    whole = (tmp_path / "whole.jsonl").read_bytes()
    out = tmp_path / "cut.jsonl"
    with disk_of(900, monkeypatch), pytest.raises(UserError, match="No space left on device") as caught:
        regenerate(target, PROMPTS, out, max_rows=1)
    assert "make room" in str(caught.value)
    assert str(out) in str(caught.value)
    assert not out.read_bytes().endswith(b"\n")
    regenerate(target, PROMPTS, out, max_rows=1)
    assert out.read_bytes() == whole


def test_timings_stay_out_of_the_rows(target, tmp_path, stand_in):
    out = tmp_path / "a.jsonl"
    regenerate(target, PROMPTS, out, max_rows=1)
    lines = rows_of(beside(out, "timings"))
    assert [line.get("rows") for line in lines] == [None, 2, 2, 1]
    assert [line.get("tokens") for line in lines] == [None, 4, 4, 2]
    assert lines[-1]["bytes"] == out.stat().st_size
    assert not {"seconds", "time"} & set(rows_of(out)[0])


def test_two_processes_do_not_write_the_same_answers(target, tmp_path, stand_in):
    out = tmp_path / "a.jsonl"
    with JsonlWriter(out, alone=True), pytest.raises(UserError, match="another process is writing"):
        regenerate(target, PROMPTS, out)
    assert regenerate(target, PROMPTS, out).new == 5


# ── the stream ────────────────────────────────────────────────────────────────────────────────────────


def test_prompts_are_read_a_window_at_a_time(target, tmp_path, monkeypatch, stand_in):
    monkeypatch.setattr(module, "WINDOW", 4)
    out, ahead = tmp_path / "a.jsonl", []

    def stream() -> Iterator[Conversation]:
        for i in range(20):
            written = len(out.read_bytes().splitlines()) if out.exists() else 0
            ahead.append(i - written)
            yield asked(f"r{i}")

    assert regenerate(target, stream(), out, max_rows=1).new == 20
    assert max(ahead) <= 4


def test_within_a_window_rows_go_by_length(target, tmp_path, stand_in):
    out = tmp_path / "a.jsonl"
    regenerate(target, PROMPTS, out, max_rows=1)
    assert [row["id"] for row in rows_of(out)] == ["r4", "r3", "r2", "r1", "r0"]


def test_an_id_that_comes_twice_is_answered_once(target, tmp_path, stand_in):
    tally = regenerate(target, [*PROMPTS, PROMPTS[0]], tmp_path / "a.jsonl", max_rows=1)
    assert (tally.new, tally.twice) == (5, 1)


# ── what cannot be answered ───────────────────────────────────────────────────────────────────────────

FUSSY = "{%- if messages[0].role == 'system' %}{{ raise_exception('no system prompts') }}{%- endif %}"


@pytest.fixture
def fussy(target, monkeypatch) -> Target:
    """A template that refuses system prompts, and a target that reads 60 tokens."""
    monkeypatch.setattr(target.tokenizer, "chat_template", FUSSY + target.tokenizer.chat_template)
    monkeypatch.setitem(target.spec.config, "max_position_embeddings", 60)
    return target


def test_failures_are_listed_with_reasons_and_the_others_go_on(fussy, tmp_path):
    out = tmp_path / "a.jsonl"
    rows = [
        asked("good"),
        asked("system", said(s="Be short.", u="What?")),
        asked("long", said(u="?" * 100)),
        conversation_from_row({"id": "later", "turns": ["hi", "?" * 100]}),
        asked("odd", follow_ups=[1]),
    ]
    tally = regenerate(fussy, rows, out, max_new_tokens=4)
    assert (tally.new, tally.failed) == (1, 4)
    assert [row["id"] for row in rows_of(out)] == ["good"]
    reasons = {row["id"]: row["reason"] for row in rows_of(beside(out, "failures"))}
    assert "no system prompts" in reasons["system"]
    assert "reads at most 60" in reasons["long"]
    assert "reads at most 60" in reasons["later"]
    assert "follow_ups" in reasons["odd"]


RAISES = (
    "{%- for m in messages %}{%- if 'no' in m.content %}{{ raise_exception('no') }}"
    "{%- elif 'zero' in m.content %}{{ 1 // 0 }}{%- elif 'index' in m.content %}{{ m.content.index('§') }}"
    "{%- elif m.role == 'assistant' and m.content | length % 3 == 0 %}{{ m.content[99].x }}{%- endif %}"
    "{%- endfor %}"
)
QUESTION = st.sampled_from(["one", "two three", "a red fish", "no", "zero", "index", "~", "long " * 30])


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.lists(QUESTION, min_size=1, max_size=3), min_size=2, max_size=7),
    st.integers(2, 8),
    st.integers(1, 4),
)
def test_rows_that_fail_end_no_run_and_a_resumed_one_has_the_same_bytes(
    target, tmp_path, monkeypatch, texts, steps, kill_after
):
    """Templates that raise for a question or an answer, NaN, and prompts that are too long."""
    rows = [conversation_from_row({"id": f"r{i}", "turns": turns}) for i, turns in enumerate(texts)]
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    nan = target.tokenizer.convert_tokens_to_ids("~")

    def work(out: Path, kill_after: int = -1) -> tuple[bytes, bytes, object]:
        saves, save, error = count(1), module.AnswerFile.save, None

        def saved(self: Any, *rest: Any) -> None:
            save(self, *rest)
            if next(saves) == kill_after:
                raise KeyboardInterrupt

        saving_after(steps, out)
        with monkeypatch.context() as patch, poisoned(target, token=nan):
            patch.setattr(module.AnswerFile, "save", saved)
            patch.setattr(target.tokenizer, "chat_template", RAISES + target.tokenizer.chat_template)
            patch.setitem(target.spec.config, "max_position_embeddings", 150)
            try:
                regenerate(target, rows, out, max_new_tokens=5, max_rows=3)
            except NonFiniteError as found:
                error = str(found).replace(out.name, "OUT")
        failed = beside(out, "failures")
        return out.read_bytes(), failed.read_bytes() if failed.exists() else b"", error

    whole, resumed = folder / "whole.jsonl", folder / "resumed.jsonl"
    undisturbed = work(whole)
    failures = beside(whole, "failures")
    failed = rows_of(failures) if failures.exists() else []
    with suppress(KeyboardInterrupt):
        work(resumed, kill_after)
    assert work(resumed) == undisturbed
    assert sorted(row["id"] for row in rows_of(whole) + failed) == sorted(row.id for row in rows)
    assert all(row["reason"] for row in failed)


def test_failed_rows_are_tried_again_and_their_list_goes_when_they_succeed(fussy, tmp_path, monkeypatch):
    out = tmp_path / "a.jsonl"
    rows = [asked("good"), asked("long", said(u="?" * 100))]
    assert regenerate(fussy, rows, out, max_new_tokens=4).failed == 1
    assert regenerate(fussy, rows, out, max_new_tokens=4).failed == 1
    assert len(rows_of(beside(out, "failures"))) == 1
    monkeypatch.setitem(fussy.spec.config, "max_position_embeddings", 200)
    tally = regenerate(fussy, rows, out, max_new_tokens=4)
    assert (tally.new, tally.there, tally.failed) == (1, 1, 0)
    assert not beside(out, "failures").exists()


def test_answers_end_where_the_target_ends(fussy, tmp_path):
    out = tmp_path / "a.jsonl"
    regenerate(fussy, [asked("x")], out, max_new_tokens=500, sampling=Sampling())
    prompt = prompt_ids(fussy.tokenizer, asked("x").messages, False)
    (row,) = rows_of(out)
    assert len(prompt) + len(row["answer_ids"]) == 60 or row["finished"]


def test_a_line_that_is_no_answer_stops_the_run_before_it_starts(target, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(DataError, match="this line has no 'thinking'") as caught:
        regenerate(target, PROMPTS, tmp_path / "a.jsonl")
    assert "a.jsonl:1" in str(caught.value)


# ── the command ───────────────────────────────────────────────────────────────────────────────────────


def call(*words: object) -> Any:
    return CliRunner().invoke(app, ["data", "regenerate", *map(str, words)])


def test_command_says_what_was_done_and_what_comes_next(target, tmp_path):
    prompts, out = tmp_path / "p.jsonl", tmp_path / "a.jsonl"
    prompts.write_text("".join(json.dumps({"id": i, "prompt": i}) + "\n" for i in "abcab"))
    words = [prompts, "--out", out, "--target", target.spec.name, "--max-new-tokens", 4]
    text = call(*words, "--limit", 2).stdout
    assert "2 new answers" in text
    assert "tokens/s" in text
    assert f"next: deepspec data inspect {out} --target {target.spec.name}" in text
    text = call(*words, "--thinking").output
    assert "made with thinking False" in text
    text = call(*words).stdout
    assert "1 new answers; 2 rows had one before" in text
    assert "2 rows left out: an earlier row has the same id" in text
    assert len(list(read_conversations(out))) == 3


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--server", "http://127.0.0.1:1", "--batch", 4], "--batch has no effect with --server"),
        (["--concurrency", 4], "--concurrency has no effect without --server"),
        (["--model", "m"], "--model has no effect without --server"),
        (["--server", "127.0.0.1:8000"], "not a server's address"),
    ],
)
def test_options_that_would_be_ignored_are_refused(tmp_path, words, expected):
    result = call("pocket:test", "--out", tmp_path / "o.jsonl", *words)
    assert result.exit_code == 2
    assert expected in result.stderr
    assert not os.listdir(tmp_path)


def test_a_file_without_prompts_is_refused_before_anything_is_loaded(tmp_path):
    (tmp_path / "p.jsonl").write_text("\n")
    result = call(tmp_path / "p.jsonl", "--out", tmp_path / "o.jsonl")
    assert result.exit_code == 2
    assert "holds no prompts" in result.stderr


# ── which way is recommended ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("gpu", "engine"), [(True, "vLLM"), (False, "llama-server")])
def test_many_prompts_in_process_are_told_of_the_server_that_suits_the_machine(monkeypatch, gpu, engine):
    from deepspec.cli.data_regenerate import in_process_advice

    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    advice = in_process_advice(2700)
    assert engine in advice and "2,700 prompts" in advice and "--server URL" in advice
