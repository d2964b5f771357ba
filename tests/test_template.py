"""Chat templates as they come: lost messages, switches for thinking, named templates, errors, dates, and ids
without an embedding. What is asked is refused as training refuses it, and the other rows continue."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase
from typer.testing import CliRunner

from deepspec.answers.file import beside
from deepspec.answers.in_process import regenerate
from deepspec.cli import app
from deepspec.data.conversations import Conversation, conversation_from_row, read_conversations
from deepspec.data.template import template_date, template_hash
from deepspec.data.tokens import encode_turns, prompt_ids
from deepspec.errors import DataError, TargetError
from deepspec.features.batches import load_rows
from deepspec.files import ResumableLog
from deepspec.measure.evaluate import conditions_of, evaluate_drafts, load_prompts
from deepspec.report.compare import REFUSED, condition_differences
from deepspec.targets import Target, TargetSpec
from talking import save_talking_llama

TURN = "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
LIST_ONLY = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% for part in m.content %}{{ part.text }}"
    "{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}" + ASK
)
NO_SYSTEM = "{% for m in messages if m.role != 'system' %}" + TURN + "{% endfor %}" + ASK
LAST_ONLY = "{% for m in messages[-1:] %}" + TURN + "{% endfor %}" + ASK
NO_RESULTS = "{% for m in messages if m.role != 'tool' %}" + TURN + "{% endfor %}" + ASK
SHOUTING = "{% for m in messages %}{{ m.role + m.content | upper + '<|im_end|>' }}{% endfor %}" + ASK
NO_CALLS = "{% for m in messages %}" + TURN + "{% endfor %}" + ASK
# DeepSeek-V3.1's published rules: `thinking`, off by default, decides how the generation prompt ends.
DEEPSEEK = (
    "{% if not thinking is defined %}{% set thinking = false %}{% endif %}{% for m in messages %}"
    + TURN
    + "{% endfor %}"
    + ASK
    + "{% if add_generation_prompt %}{{ '<think>' if thinking else '</think>' }}{% endif %}"
)
# Granite's published rules: `thinking` changes the system message that is written if there is none.
GRANITE = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\nYou are Granite.' }}"
    "{% if thinking %}{{ ' Think first.' }}{% endif %}{{ '<|im_end|>\\n' }}{% endif %}"
    "{% for m in messages %}" + TURN + "{% endfor %}" + ASK
)
DATED = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}" + TURN + "{% endfor %}" + ASK


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Target:
    path = save_talking_llama(tmp_path_factory.mktemp("template") / "target")
    return Target.from_pretrained(path, dtype="float32", device="cpu")


@pytest.fixture
def target(loaded: Target) -> Iterator[Target]:
    """A target whose tokenizer a test may change."""
    kept = loaded.tokenizer
    loaded.tokenizer = loaded.spec.tokenizer()
    yield loaded
    loaded.tokenizer = kept


def with_template(target: Target, template: str | dict[str, str]) -> PreTrainedTokenizerBase:
    assert target.tokenizer is not None
    target.tokenizer.chat_template = template
    return target.tokenizer


def folder(target: Target, tmp_path: Path, template: str) -> Path:
    """The target's files with another template, for commands."""
    out = tmp_path / "target"
    out.mkdir()
    for file in Path(target.spec.name).iterdir():
        (out / file.name).symlink_to(file)
    (out / "chat_template.jinja").unlink()
    (out / "chat_template.jinja").write_text(template, "utf-8")
    return out


def said(**texts: str) -> list[dict[str, Any]]:
    """said(u1="…", a1="…"): messages with the role that the letter names."""
    roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    return [{"role": roles[name[0]], "content": text} for name, text in texts.items()]


def row(name: str = "r", *, answer: str | None = None, **texts: str) -> Conversation:
    messages = said(**texts) + ([] if answer is None else said(a=answer))
    return conversation_from_row({"id": name, "messages": messages}, f"rows.jsonl:{name}")


def write(path: Path, *rows: Conversation) -> Path:
    lines = ({"id": r.id, "messages": list(r.messages), **r.meta} for r in rows)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return path


def refusals(tokenizer: Any, asked: Conversation, thinking: bool = False) -> tuple[str, str]:
    """(what asking says, what training says once there is an answer)."""
    answered = Conversation(asked.id, None, (*asked.messages, *said(a="four")), asked.meta, asked.source)  # type: ignore[arg-type]
    with pytest.raises(DataError) as asking:
        prompt_ids(tokenizer, asked.messages, thinking, where=asked.where)
    with pytest.raises(DataError) as training:
        encode_turns(tokenizer, answered, thinking)
    return str(asking.value), str(training.value)


def failures(out: Path) -> dict[str, str]:
    return {line["id"]: line["reason"] for line in map(json.loads, beside(out, "failures").open())}


# ── messages that the template leaves out ─────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("template", "asked", "lost"),
    [
        (NO_SYSTEM, row(s="Be brief.", u="2+2?"), "message 1 (system)"),
        (LAST_ONLY, row(u1="1+1?", a="two", u2="2+2?"), "message 1 (user)"),
        (NO_RESULTS, row(u="2+2?", a="calc(2+2)", t="4"), "message 3 (tool)"),
    ],
)
def test_what_training_refuses_is_refused_before_it_is_asked(
    target: Target, template: str, asked: Conversation, lost: str
) -> None:
    asking, training = refusals(with_template(target, template), asked)
    assert asking == training
    assert asking.startswith(f"the target's chat template leaves out {lost}\n  where: rows.jsonl:r (id r)")


@pytest.mark.parametrize("template", [LIST_ONLY, SHOUTING])
def test_a_template_that_loses_every_question_is_refused_at_once(target: Target, template: str) -> None:
    with pytest.raises(DataError, match=r"leaves out message 1 \(user\)"):
        prompt_ids(with_template(target, template), row(u="how much?").messages, False)
    with pytest.raises(TargetError, match="does not write the user's text unchanged"):
        conditions_of(target, [], False)


def test_calls_and_tools_that_the_template_leaves_out_are_refused_before_asking(
    target: Target,
) -> None:
    call = {"type": "function", "function": {"name": "calc", "arguments": {"x": "2+2"}}}
    messages = said(u="2+2?", a="", t="4")
    messages[1] |= {"tool_calls": [call], "weight": 0}
    tokenizer = with_template(target, NO_CALLS)
    with pytest.raises(DataError, match=r"leaves out or changes a tool call of message 2 \(assistant\)"):
        prompt_ids(tokenizer, messages, False)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="leaves out tool 2"):
        template = NO_CALLS + "{{ (tools or [])[:1] | tojson }}"
        tools = [{"type": "function", "function": {"name": name}} for name in ("calc", "look")]
        prompt_ids(with_template(target, template), row(u="2+2?").messages, False, tools=tools)


def test_every_command_that_asks_refuses_and_regenerate_answers_the_others(
    target: Target, tmp_path: Path
) -> None:
    with_template(target, NO_SYSTEM)
    rows = [row("a", u="2+2?"), row("b", s="Be brief.", u="2+2?"), row("c", u="3+3?")]
    out = tmp_path / "answers.jsonl"
    tally = regenerate(target, rows, out, max_new_tokens=2, max_rows=2)
    assert (tally.new, tally.failed) == (2, 1)
    assert [line.id for line in read_conversations(out)] == ["a", "c"]
    assert failures(out) == {"b": "the target's chat template leaves out message 1 (system)"}

    prompts = write(tmp_path / "prompts.jsonl", *rows)
    with pytest.raises(DataError, match=r"leaves out message 1 \(system\)"):
        load_prompts(prompts, target)
    path = folder(target, tmp_path, LIST_ONLY)
    before = sorted(tmp_path.iterdir())
    result = CliRunner().invoke(app, ["generate", "2+2?", "--target", str(path), "--plain"])
    assert result.exit_code == 2 and "leaves out message 1 (user)" in result.stderr
    with pytest.raises(DataError, match=r"leaves out message 1 \(user\)") as caught:
        load_prompts(prompts, TargetSpec.from_pretrained(str(path)))  # as eval does, before it loads weights
    assert caught.value.where == f"{prompts}:1 (id a)"
    words = ["data", "regenerate", prompts, "--target", path, "--out", tmp_path / "none.jsonl"]
    result = CliRunner().invoke(app, [*map(str, words)])
    assert result.exit_code == 2 and "some take lists of parts only" in result.stderr
    assert sorted(tmp_path.iterdir()) == before


# ── ids without an embedding ──────────────────────────────────────────────────────────────────────────


def test_rows_with_tokens_past_the_embedding_are_left_out_and_counted(
    target: Target, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = target.spec.vocab_size
    assert target.tokenizer is not None and len(target.tokenizer) == size
    target.tokenizer.add_tokens(["<cite>", "</cite>"])
    foreign = row("c", u="q", answer="oak")
    foreign.meta["answer_ids"] = [7, size + 900]
    good = row("b", u="Name a tree.", answer="An oak.")
    path = write(tmp_path / "rows.jsonl", row("a", u="q", answer="Pear<cite>1</cite>."), good, foreign)

    found = load_rows(path, target, thinking=False, max_length=200)
    assert found.names == ["b"]
    said_ = " ".join(capsys.readouterr().err.split())
    assert (
        "2 conversations are left out: they hold tokens that have no row in the target's embedding" in said_
    )
    assert f"the first is {path}:1 (id a)" in said_
    with pytest.raises(DataError, match=rf"token {size} \('<cite>'\) .* embedding, which has {size}"):
        load_rows(write(path, row("a", u="q", answer="Pear<cite>")), target, thinking=False, max_length=200)


def test_inspect_counts_tokens_past_the_embedding_and_regenerate_asks_the_others(
    target: Target, tmp_path: Path
) -> None:
    assert target.tokenizer is not None
    target.tokenizer.add_tokens(["<cite>"])
    out = tmp_path / "answers.jsonl"
    tally = regenerate(target, [row("a", u="<cite>?"), row("b", u="2+2?")], out, max_new_tokens=2)
    assert (tally.new, tally.failed) == (1, 1)
    assert "('<cite>') has no row in the target's embedding" in failures(out)["a"]
    path = folder(target, tmp_path, str(target.tokenizer.chat_template))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (path / file).unlink()
    target.tokenizer.save_pretrained(path)
    rows = write(
        tmp_path / "rows.jsonl", row("a", u="q", answer="Pear<cite>"), row("b", u="q", answer="An oak.")
    )
    result = CliRunner().invoke(app, ["data", "inspect", str(rows), "--target", str(path), "--json"])
    shown = json.loads(result.stdout)
    assert (result.exit_code, shown["rows"], shown["refused"], shown["unembedded"]) == (2, 2, 1, 1)
    assert shown["problems"][0]["where"] == f"{rows}:1 (id a)"
    assert "training leaves out 1 rows" in result.stderr


# ── the switch for thinking ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("template", "on", "off"),
    [
        (DEEPSEEK, "2+2?<|im_end|>\n<|im_start|>assistant\n<think>", "</think>"),
        (
            GRANITE,
            "<|im_start|>system\nYou are Granite. Think first.<|im_end|>\n",
            "You are Granite.<|im_end|>",
        ),
    ],
)
def test_thinking_uses_the_switch_that_the_template_has(
    target: Target, template: str, on: str, off: str
) -> None:
    tokenizer = with_template(target, template)
    messages = row(u="2+2?").messages
    assert on in tokenizer.decode(prompt_ids(tokenizer, messages, True))
    assert on not in tokenizer.decode(prompt_ids(tokenizer, messages, False))
    assert off in tokenizer.decode(prompt_ids(tokenizer, messages, False))


@pytest.mark.parametrize(
    "template",
    [
        "{# enable_thinking is for another model #}" + NO_CALLS,
        "{{ messages[0].thinking }}" + NO_CALLS,
        "{% if messages[0].content == 'thinking' %}!{% endif %}" + NO_CALLS,
        NO_CALLS,
    ],
)
def test_a_template_without_a_switch_cannot_claim_thinking(
    target: Target, tmp_path: Path, template: str
) -> None:
    with_template(target, template)
    rows, out = [row("a", u="2+2?")], tmp_path / "answers.jsonl"
    prompts = write(tmp_path / "rows.jsonl", row("a", u="2+2?", answer="four"))
    with pytest.raises(TargetError, match="template has no switch for it"):
        regenerate(target, rows, out, thinking=True)
    assert not out.exists()
    for refused in (
        lambda: load_prompts(prompts, target, thinking=True),
        lambda: conditions_of(target, [], True),
        lambda: load_rows(prompts, target, thinking=True, max_length=200),
    ):
        with pytest.raises(TargetError, match="template has no switch for it"):
            refused()
    assert conditions_of(target, [], False).thinking is False


def test_a_row_for_which_the_switch_does_nothing_is_refused(target: Target, tmp_path: Path) -> None:
    tokenizer = with_template(target, GRANITE)
    asking, training = refusals(tokenizer, row(s="Be brief.", u="2+2?"), thinking=True)
    assert asking == training
    assert asking.startswith(
        "thinking changes nothing in what the target's chat template writes for this row"
    )
    rows, out = [row("a", u="2+2?"), row("b", s="Be brief.", u="2+2?")], tmp_path / "answers.jsonl"
    tally = regenerate(target, rows, out, thinking=True, max_new_tokens=2)
    assert (tally.new, tally.failed) == (1, 1) and list(failures(out)) == ["b"]
    # One answer of several was given with thinking: that is how DeepSeek-V3.1 treats tool results.
    one = DEEPSEEK.replace("'<think>' if thinking", "'<think>' if thinking and messages[-1].role == 'user'")
    messages = said(u="2+2?", a1="calc", t="4", a2="four")
    found = encode_turns(with_template(target, one), Conversation("r", None, tuple(messages)), True)  # type: ignore[arg-type]
    assert len(found) == 2


# ── named templates, errors inside a template ─────────────────────────────────────────────────────────


def test_named_templates_are_chosen_as_servers_do_and_a_missing_default_is_the_rows_failure(
    target: Target, tmp_path: Path
) -> None:
    tool = {"type": "function", "function": {"name": "calc"}}
    use = "{{ tools | tojson }}" + NO_CALLS
    tokenizer = with_template(target, {"tool_use": use, "rag": NO_CALLS})
    rows = [row("a", u="2+2?"), row("b", u="3+3?")]
    rows[1].meta["tools"] = [tool]
    out = tmp_path / "answers.jsonl"
    assert regenerate(target, rows, out, max_new_tokens=2).new == 1
    reason = "the target has no default chat template, only rag, tool_use: none is for messages without tools"
    assert failures(out) == {"a": reason}
    assert len(template_hash(tokenizer)) == 64
    assert '{"name": "calc"}' in tokenizer.decode(
        prompt_ids(tokenizer, rows[1].messages, False, tools=[tool])
    )
    with_template(target, {"tool_use": use, "default": NO_CALLS})
    assert prompt_ids(tokenizer, rows[0].messages, False)
    assert template_hash(tokenizer) == template_hash(with_template(target, NO_CALLS))
    with_template(target, {"rag": NO_CALLS})
    with pytest.raises(TargetError, match="no default chat template, only rag"):
        regenerate(target, rows, out, max_new_tokens=2)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("{{ m.content.index('+') }}", "fails on the messages: ValueError: substring not found"),
        ("{{ 1 // (m.content | length - 4) }}", "fails on the messages: ZeroDivisionError"),
        ("{{ m.content.split('+')[1].x }}", "refuses the messages: list object has no element 1"),
        ("{{ m.content[0].encode('ascii') }}", "fails on the messages: UnicodeEncodeError"),
    ],
)
def test_any_error_inside_a_template_is_the_failure_of_that_row(
    target: Target, tmp_path: Path, body: str, reason: str
) -> None:
    with_template(target, NO_CALLS.replace("{{", body + "{{", 1))
    rows, out = [row("a", u="2+2+2?"), row("b", u="ätz?")], tmp_path / "answers.jsonl"
    tally = regenerate(target, rows, out, max_new_tokens=2)
    assert (tally.new, tally.failed) == (1, 1)
    assert [line.id for line in read_conversations(out)] == ["a"]
    assert reason in failures(out)["b"]


@pytest.mark.parametrize("broken", ["{% if x %}", "{{ x | nothing }}", "{% nothing %}", "{{ 'x }}"])
def test_a_template_that_is_none_is_no_rows_fault(target: Target, tmp_path: Path, broken: str) -> None:
    with_template(target, NO_CALLS + broken)
    with pytest.raises(TargetError, match="chat template cannot be read"):
        regenerate(target, [row("a", u="2+2?")], tmp_path / "answers.jsonl")


# ── templates that write the date ─────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("format_", "text"),
    [
        ("%d %b %Y", "01 Jan 2025"),  # Llama
        ("%B %d, %Y", "January 01, 2025"),  # Granite
        ("%Y-%m-%d", "2025-01-01"),  # gpt-oss, Mistral
        ("%-d %A %H:%M:%S", "1 Wednesday 00:00:00"),
    ],
)
def test_the_date_is_the_same_on_every_day(target: Target, format_: str, text: str) -> None:
    guarded = (
        "{% if strftime_now is defined %}{% set day = strftime_now('" + format_ + "') %}{% else %}"
        "{% set day = 'unknown' %}{% endif %}{{ day }}" + NO_CALLS
    )
    messages = row(u="2+2?").messages
    prompt = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
    indented = "  {% if true %}\n" + guarded + "{% endif %}"  # the indent is taken off, as without the date
    for template in (guarded, DATED.replace("%d %b %Y", format_), indented):
        tokenizer = with_template(target, template)
        assert tokenizer.decode(prompt_ids(tokenizer, messages, False)) == text + prompt
    assert template_date(tokenizer) == "2025-01-01"
    assert template_date(with_template(target, NO_CALLS)) is None


def test_results_record_the_date_and_compare_and_a_resumed_evaluation_name_it(
    target: Target, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with_template(target, DATED)
    prompts = load_prompts(write(tmp_path / "prompts.jsonl", row("a", u="2+2?")), target)
    now = evaluate_drafts(target, {}, prompts, max_new_tokens=2, baselines=False)["conditions"]
    assert now["date"] == "2025-01-01"
    before = {k: v for k, v in now.items() if k != "date"} | {"prompts_hash": "of another day"}
    assert condition_differences("one", before, "two", now, REFUSED) == [
        "one was measured with date in the prompts not recorded, but two with date in the prompts 2025-01-01",
        f"one was measured with prompts hash of another day, but two with prompts hash {now['prompts_hash']}",
    ]
    log = tmp_path / "eval.partial.jsonl"
    ResumableLog(log, before, header=True).close()
    ResumableLog(log, now, header=True).close()
    said_ = " ".join(capsys.readouterr().err.split())
    assert "was begun with another 'prompts_hash', 'date'; eval.partial.jsonl starts again" in said_
