"""Answers that begin with markup of the target's own (gpt-oss), as text, as ids and as history."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from conftest import llama, save_tiny
from deepspec.answers.file import beside
from deepspec.answers.in_process import regenerate
from deepspec.answers.through_servers import regenerate_served
from deepspec.data.conversations import conversation_from_row, read_conversations
from deepspec.data.tokens import answer_message, encode_turns, prompt_ids
from deepspec.errors import DataError
from deepspec.http_client import Policy
from deepspec.targets import Target
from standin import StandIn
from templates import CHATML, DEEPSEEK, GEMMA4, HARMONY, LLAMA2, MISTRAL, QWEN3, backend_of
from test_pieces import TOKENIZER, rendered, supervised, talk, whole

FINAL, ANALYSIS = "<|channel|>final<|message|>", "<|channel|>analysis<|message|>"
NEXT = "<|end|><|start|>assistant"
SYSTEM = (
    "<|start|>system<|message|>You are a helper.\n\n# Valid channels: analysis, commentary, final.<|end|>"
)
QUICK = Policy(timeout=0.4, attempts=4, first_rest=0.01, longest_rest=0.05, patience=20)


def user(text: str) -> str:
    return f"<|start|>user<|message|>{text}<|end|>"


def runs(conversation: Any, thinking: bool = False, template: str = HARMONY) -> list[list[tuple[int, str]]]:
    """Of each sequence, (mask, text) of the stretches of equal mask."""
    tokenizer = TOKENIZER(template)
    found = []
    for row in encode_turns(tokenizer, conversation, thinking):
        borders = [i for i in range(1, len(row.ids)) if row.loss_mask[i] != row.loss_mask[i - 1]]
        parts = zip([0, *borders], [*borders, None], strict=True)
        found.append([(row.loss_mask[a], tokenizer.decode(row.ids[a:b])) for a, b in parts])
    return found


# -- text to ids -------------------------------------------------------------------------------------------


def test_channel_before_a_plain_answer_is_the_targets() -> None:
    conversation = talk("Name a fruit.", "Pear.", "And a tree?", "An oak.")
    first = SYSTEM + user("Name a fruit.") + "<|start|>assistant"
    # History ends an answer otherwise than the target does, so each turn has a sequence of its own.
    second = f"{first}{FINAL}Pear.<|end|>{user('And a tree?')}<|start|>assistant"
    assert runs(conversation) == [
        [(0, first), (1, f"{FINAL}Pear.<|return|>")],
        [(0, second), (1, f"{FINAL}An oak.<|return|>")],
    ]


def test_cut_plain_answer_has_its_channel_and_no_end() -> None:
    assert runs(talk("q", "Pea", finished=False))[0][1] == (1, f"{FINAL}Pea")


@pytest.mark.parametrize("name", ["thinking", "reasoning_content"])
def test_thoughts_are_the_analysis_channel(name: str) -> None:
    said = {"role": "assistant", "content": "Pear.", name: "A fruit."}
    expected = (1, f"{ANALYSIS}A fruit.{NEXT}{FINAL}Pear.<|return|>")
    assert runs(talk("q", said, "r", "An oak."))[0][1] == expected
    both = said | {"thinking": "A fruit.", "reasoning_content": "A fruit."}
    assert runs(talk("q", both, "r", "An oak."))[0][1] == expected
    with pytest.raises(DataError, match="unknown key 'thinking'"):
        talk("q", both | {"thinking": "Another."})


def test_call_without_thoughts_begins_where_the_target_began() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    said = {"role": "assistant", "content": "", "tool_calls": [call]}
    expected = ' to=functions.add<|channel|>commentary json<|message|>{"a": 1}<|call|>'
    assert runs(talk("q", said))[0][1] == (1, expected)
    thought = said | {"thinking": "Add."}
    assert runs(talk("q", thought))[0][1] == (1, f"{ANALYSIS}Add.{NEXT}{expected}")


def test_mistral_call_begins_with_its_token_and_not_with_an_answers_space() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    said = {"role": "assistant", "content": "", "tool_calls": [call]}
    tokens = supervised(TOKENIZER(MISTRAL, "metaspace first"), talk("q", said))[0]
    assert (tokens[0], tokens[-1]) == ("[TOOL_CALLS]", "</s>")


def test_markup_that_the_template_refuses_in_a_text_is_refused() -> None:
    with pytest.raises(DataError, match="refuses the messages: You have passed a message"):
        runs(talk("q", f"{FINAL}Pear."))


def test_answer_that_brings_its_lead_along_has_it_once() -> None:
    said = "".join(supervised(TOKENIZER(LLAMA2, "metaspace first"), talk("q", " Pear."))[0])
    assert said == "▁Pear.▁</s>"
    closing = {"role": "assistant", "content": "hm</think>Pear."}
    assert runs(talk("q", closing), template=DEEPSEEK)[0][1][1].startswith("hm</think>Pear.")


# A thinking-only model's template: the prompt opens the block, and a last answer without thoughts closes it.
ALWAYS = QWEN3.replace(
    "{%- if enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}", "{{- '<think>\\n' }}"
)
ALWAYS = ALWAYS.removesuffix("{%- endif %}")


@pytest.mark.parametrize("thinking", [True, False])
def test_empty_think_block_is_not_the_targets_wherever_the_prompt_ends(thinking: bool) -> None:
    assert runs(talk("q", "four"), thinking, QWEN3)[0][1] == (1, "four<|im_end|>")
    tokenizer = TOKENIZER(QWEN3)
    before = tokenizer.chat_template
    tokenizer.chat_template = ALWAYS
    try:
        assert rendered(tokenizer, talk("q").messages, thinking, ask=True).endswith("assistant\n<think>\n")
        (((_, prompt), answer),) = runs(talk("q", "hm\n</think>\n\nfour"), False, QWEN3)
    finally:
        tokenizer.chat_template = before
    assert prompt.endswith("<think>\n") and answer == (1, "hm\n</think>\n\nfour<|im_end|>")


# Command A's published rules, shortened: an answer has markup before and after it; two special tokens end it.
COMMAND = (
    "{{- '<BOS_TOKEN>' }}{%- for m in messages %}{{- '<|START_OF_TURN_TOKEN|><|' + m.role + '|>' }}"
    "{{- '<|START_RESPONSE|>' + m.content + '<|END_RESPONSE|>' if m.role == 'assistant' else m.content }}"
    "{{- '<|END_OF_TURN_TOKEN|>' }}{%- endfor %}"
    "{{- '<|START_OF_TURN_TOKEN|><|assistant|>' if add_generation_prompt }}"
)


def test_answer_ends_at_the_token_that_stops_the_target_and_not_at_the_markup_before_it() -> None:
    backend, end = backend_of("byte-level"), "<|END_OF_TURN_TOKEN|>"
    names = [
        end,
        "<|START_OF_TURN_TOKEN|>",
        "<|user|>",
        "<|assistant|>",
        "<|START_RESPONSE|>",
        "<|END_RESPONSE|>",
    ]
    backend.add_special_tokens(names)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=COMMAND, eos_token=end)
    said = ["<|START_RESPONSE|>", "Pear", ".", "<|END_RESPONSE|>", end]
    conversation = talk("q", "Pear.", "r", "Pear.")
    assert supervised(tokenizer, conversation) == [[*said, *said]]
    ids = tokenizer.convert_tokens_to_ids(said)
    asked = conversation.messages[:1]
    assert answer_message(tokenizer, asked, ids, False, finished=True) == conversation.messages[1]
    assert answer_message(tokenizer, asked, ids[:-3], False, finished=False)["content"] == "Pear"


# -- ids to history ----------------------------------------------------------------------------------------


def heard(said: str, template: str = HARMONY, *, family: str = "byte-level", **options: Any) -> Any:
    tokenizer = TOKENIZER(template, family)
    asked = talk("q").messages
    prompt = rendered(tokenizer, asked, True, ask=True)
    ids, both = whole(tokenizer, prompt), whole(tokenizer, prompt + said)
    assert both[: len(ids)] == ids
    answer = both[len(ids) :]
    message = answer_message(tokenizer, asked, answer, True, **{"finished": True} | options)
    return message["content"], message.get("reasoning_content")


@pytest.mark.parametrize(
    ("said", "content", "thoughts"),
    [
        (f"{FINAL}Pear.<|return|>", "Pear.", None),
        (f"{ANALYSIS}hm{NEXT}{FINAL}Pear.<|return|>", "Pear.", "hm"),
        (f"{ANALYSIS}hm{NEXT}{ANALYSIS}so{NEXT}{FINAL}Pear.<|return|>", "Pear.", None),
        (f"<|channel|>commentary<|message|>Look.{NEXT}{FINAL}Pear.<|return|>", "Pear.", None),
        (f"{ANALYSIS}hm hm", "", "hm hm"),  # cut
    ],
)
def test_history_is_what_a_client_sends_back(said: str, content: str, thoughts: str | None) -> None:
    assert heard(said, finished=said.endswith("<|return|>")) == (content, thoughts)


def test_markup_that_a_template_takes_off_itself_stays_in_the_text() -> None:
    said = "<|channel>thought\nhm\n<channel|>four"
    assert heard(f"{said}<turn|>", GEMMA4) == (said, None)
    # Nothing that a prompt would read as markup.
    assert heard("four<|turn>five<turn|>", GEMMA4) == ("fourfive", None)
    assert heard("<think>\nhm\n</think>\n\nfour<|im_end|>", QWEN3) == ("<think>\nhm\n</think>\n\nfour", None)


@pytest.mark.parametrize(
    "family", ["metaspace first", "metaspace always", "prepend", "byte-level", "tiktoken"]
)
def test_spaces_before_an_answer_are_kept_where_the_target_wrote_them(family: str) -> None:
    """Row 2 the other way round: ids decoded alone lose their first space."""
    assert heard("Pear.<|im_end|>", CHATML, family=family) == ("Pear.", None)
    assert heard(" Pear.<|im_end|>", CHATML, family=family) == (" Pear.", None)
    # White space that the template writes itself is not doubled.
    assert heard(" Pear. </s>", LLAMA2, family="metaspace first") == ("Pear.", None)
    assert heard(" Pear.</s>", MISTRAL, family=family)[0] == (" Pear." if family == "prepend" else "Pear.")


# -- regenerating ------------------------------------------------------------------------------------------


class Spec:
    """What `regenerate_served` asks of a target."""

    name, vocab_size = "harmony", None

    def tokenizer(self) -> Any:
        return TOKENIZER(HARMONY)


def served(folder: Path, answers: list[str], **options: Any) -> tuple[list[Any], Path]:
    """Have a stand-in give these answers, one after the other, to a row of two turns: the prompts it got."""
    tokenizer = TOKENIZER(HARMONY)
    row = conversation_from_row({"id": "m", "turns": ["Name a fruit.", "And a tree?"]})
    texts = iter(answers)

    def answer(_: str) -> tuple[str, list[int] | None]:
        text = next(texts)
        ids = whole(tokenizer, text)
        return tokenizer.decode(ids, skip_special_tokens=True), ids if options[
            "engine"
        ] == "llamacpp" else None

    out = folder / "answers.jsonl"
    with StandIn(answer=answer, **options) as server:
        regenerate_served([server.url], [row], out, target=Spec(), policy=QUICK)  # type: ignore[arg-type]
    return [body["prompt"] for _, body in server.asked], out


def test_second_question_follows_the_answer_that_a_server_would_be_sent(tmp_path: Path) -> None:
    said = [f"{ANALYSIS}hm{NEXT}{FINAL}Pear.<|return|>", f"{FINAL}An oak.<|return|>"]
    prompts, out = served(tmp_path, said, engine="llamacpp")
    tokenizer = TOKENIZER(HARMONY)
    asked = SYSTEM + user("Name a fruit.") + "<|start|>assistant"
    after = f"{asked}{FINAL}Pear.<|end|>{user('And a tree?')}<|start|>assistant"
    assert [tokenizer.decode(prompt) for prompt in prompts] == [asked, after]
    (row,) = read_conversations(out)
    assert [m["content"] for m in row.messages] == ["Name a fruit.", "Pear.", "And a tree?", "An oak."]
    assert row.messages[1]["reasoning_content"] == "hm"
    assert runs(row) == [[(0, asked), (1, said[0])], [(0, after), (1, said[1])]]


def test_answer_without_form_is_a_failure_if_a_question_follows_it(tmp_path: Path) -> None:
    prompts, out = served(tmp_path, ["Pear.<|return|>"], engine="llamacpp")
    assert len(prompts) == 1 and not out.read_text("utf-8")
    failure = json.loads(beside(out, "failures").read_text("utf-8"))
    assert "does not have the form that the target's chat template gives to answers" in failure["reason"]
    assert failure["reason"].endswith("'Pear.'")


def test_text_without_its_special_tokens_is_a_failure_and_no_answer(tmp_path: Path) -> None:
    _, out = served(tmp_path, [f"{ANALYSIS}hm{NEXT}{FINAL}Pear.<|return|>"], engine="vllm")
    assert (
        "'analysishmassistantfinalPear.'" in json.loads(beside(out, "failures").read_text("utf-8"))["reason"]
    )


@pytest.fixture(scope="module")
def harmony_target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    """A tiny random target: it writes no channel."""
    tokenizer = TOKENIZER(HARMONY)
    path = save_tiny(lambda: llama(len(tokenizer)), tmp_path_factory.mktemp("harmony"))
    tokenizer.save_pretrained(path)
    return Target.from_pretrained(path, dtype="float32", device="cpu")


def test_in_process_a_target_that_writes_no_channel_fails_the_row_of_two_turns_and_no_other(
    tmp_path: Path, harmony_target: Target
) -> None:
    rows = [conversation_from_row({"id": "m", "turns": ["Name a fruit.", "And a tree?"]}), talk("A fruit?")]
    tally = regenerate(harmony_target, rows, tmp_path / "a.jsonl", max_new_tokens=4)
    assert (tally.new, tally.failed) == (1, 1)
    (row,) = read_conversations(tmp_path / "a.jsonl")
    (sequence,) = encode_turns(harmony_target.tokenizer, row, False)
    prompt = prompt_ids(harmony_target.tokenizer, row.messages[:1], False)
    assert sequence.ids == [*prompt, *row.meta["answer_ids"]]
