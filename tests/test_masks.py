"""Exactly which tokens are supervised, on the pocket template and on ones by Qwen3's and Gemma-4's rules.

Every expectation is spelt out: the decoded runs of each sequence, and for each family the ids as well.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from deepspec.data.conversations import Conversation, conversation_from_row
from deepspec.data.tokens import Encoded, OverlongError, encode_turns, prompt_ids
from deepspec.errors import DataError
from deepspec.targets import TargetSpec
from templates import GEMMA4, QWEN3, tokenizer_for

EMPTY = "<think>\n\n</think>\n\n"
CHANNEL = "<|channel>thought\n<channel|>"
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module")
def tiny() -> PreTrainedTokenizerFast:
    tokenizer = TargetSpec.from_pretrained("pocket").tokenizer()
    assert tokenizer is not None
    return tokenizer


@pytest.fixture(scope="module")
def qwen() -> PreTrainedTokenizerFast:
    return tokenizer_for(QWEN3)


@pytest.fixture(scope="module")
def gemma() -> PreTrainedTokenizerFast:
    return tokenizer_for(GEMMA4)


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def says(text: str | None, thought: str | None = None, **call: Any) -> dict[str, Any]:
    """An assistant message; `call`: arguments of a call of `add`."""
    calls = (
        [{"id": "c1", "type": "function", "function": {"name": "add", "arguments": call}}] if call else None
    )
    return {"role": "assistant", "content": text, "reasoning_content": thought, "tool_calls": calls}


def result(text: str) -> dict[str, Any]:
    return {"role": "tool", "content": text, "tool_call_id": "c1", "name": "add"}


def talk(*messages: dict[str, Any], **facts: Any) -> Conversation:
    return conversation_from_row({"id": "row", "messages": list(messages), **facts}, "rows.jsonl:3")


def runs(tokenizer: PreTrainedTokenizerFast, row: Encoded) -> list[tuple[int, str]]:
    """(supervised?, decoded text) of the stretches of equal mask."""
    found: list[tuple[int, list[int]]] = []
    for token, flag in zip(row.ids, row.loss_mask, strict=True):
        if not found or found[-1][0] != flag:
            found.append((flag, []))
        found[-1][1].append(token)
    return [(flag, tokenizer.decode(ids)) for flag, ids in found]


def shown(
    tokenizer: PreTrainedTokenizerFast, conversation: Conversation, thinking: bool
) -> dict[str, list[tuple[int, str]]]:
    rows = encode_turns(tokenizer, conversation, thinking)
    assert len({row.id for row in rows}) == len(rows)
    return {row.id: runs(tokenizer, row) for row in rows}


def ids_of(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def supervised_ids(row: Encoded) -> list[int]:
    return [token for token, flag in zip(row.ids, row.loss_mask, strict=True) if flag]


def chatml(*turns: str) -> str:
    """Finished ChatML turns, "role|text" each."""
    return "".join(
        f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in (t.split("|", 1) for t in turns)
    )


ASK = "<|im_start|>assistant\n"

# -- the pocket template -----------------------------------------------------------------------------------


def test_pocket_single_turn_without_thinking(tiny: PreTrainedTokenizerFast) -> None:
    (row,) = encode_turns(tiny, talk(user("2+2?"), says("The answer is 4.")), False)
    prompt, answer = chatml("user|2+2?") + ASK + EMPTY, "The answer is 4."
    assert runs(tiny, row) == [(0, prompt), (1, answer + "<|im_end|>")]
    assert row.ids == ids_of(tiny, prompt) + ids_of(tiny, answer) + ids_of(tiny, "<|im_end|>")
    assert row.loss_mask == [0] * len(ids_of(tiny, prompt)) + [1] * (len(ids_of(tiny, answer)) + 1)


def test_pocket_thinking_goes_on_inside_the_block_that_the_prompt_opened(
    tiny: PreTrainedTokenizerFast,
) -> None:
    answer = "2 + 2 = 4\n</think>\n\n4"
    (row,) = encode_turns(tiny, talk(user("2+2?"), says(answer)), True)
    assert runs(tiny, row) == [(0, chatml("user|2+2?") + ASK + "<think>\n"), (1, answer + "<|im_end|>")]
    assert supervised_ids(row) == ids_of(tiny, answer) + ids_of(tiny, "<|im_end|>")


@pytest.mark.parametrize(("thinking", "opened"), [(False, EMPTY), (True, "<think>\n")])
def test_pocket_turns_each_need_a_sequence_since_history_drops_the_think_block(
    tiny: PreTrainedTokenizerFast, thinking: bool, opened: str
) -> None:
    asked = talk(system("be brief"), user("2+2?"), says("4"), user("3+3?"), says("6"), user("and?"))
    before = chatml("system|be brief", "user|2+2?")
    assert shown(tiny, asked, thinking) == {
        "row#1": [(0, before + ASK + opened), (1, "4<|im_end|>")],
        "row": [
            (0, before + chatml("assistant|4", "user|3+3?") + ASK + opened),
            (1, "6<|im_end|>"),
        ],
    }


def test_pocket_tool_results_are_context(tiny: PreTrainedTokenizerFast) -> None:
    asked = talk(user("2+2?"), says("add(2, 2)"), {"role": "tool", "content": "4"}, says("It is 4."))
    found = shown(tiny, asked, False)
    assert found["row"] == [
        (0, chatml("user|2+2?", "assistant|add(2, 2)", "tool|4") + ASK + EMPTY),
        (1, "It is 4.<|im_end|>"),
    ]
    assert found["row#1"][1] == (1, "add(2, 2)<|im_end|>")


@pytest.mark.parametrize(
    ("turn", "lost"),
    [(says("4", "2 and 2"), "'reasoning_content'"), (says(None, a=2, b=2), "a tool call")],
)
def test_pocket_template_knows_no_thoughts_or_calls_so_they_are_refused(
    tiny: PreTrainedTokenizerFast, turn: dict[str, Any], lost: str
) -> None:
    with pytest.raises(DataError) as caught:
        encode_turns(tiny, talk(user("2+2?"), turn), False)
    message = str(caught.value)
    assert f"message 2 (assistant): the target's chat template leaves out or changes {lost}" in message
    assert "where: rows.jsonl:3 (id row)" in message and "'answer_ids'" in message


# -- Qwen3's rules -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("thinking", "opened"), [(False, EMPTY), (True, "")])
def test_qwen_single_turn(qwen: PreTrainedTokenizerFast, thinking: bool, opened: str) -> None:
    (row,) = encode_turns(
        qwen, talk(system("be brief"), user("the question"), says("the answer\n")), thinking
    )
    prompt = chatml("system|be brief", "user|the question") + ASK + opened
    assert runs(qwen, row) == [(0, prompt), (1, "the answer\n<|im_end|>")]
    assert row.ids[-1] == qwen.convert_tokens_to_ids("<|im_end|>")
    assert supervised_ids(row) == [*ids_of(qwen, "the answer\n"), row.ids[-1]]


def test_qwen_thoughts_are_supervised_where_given_apart_and_where_written_in_the_text(
    qwen: PreTrainedTokenizerFast,
) -> None:
    said = "<think>\n2 and 2\n</think>\n\nfour"
    expected = {"row": [(0, chatml("user|q") + ASK), (1, said + "<|im_end|>")]}
    assert shown(qwen, talk(user("q"), says(said)), True) == expected
    assert shown(qwen, talk(user("q"), says("four", "2 and 2")), True) == expected
    # As servers hand it over that leave the block's line ends on: the template takes them off again.
    assert shown(qwen, talk(user("q"), says("\n\nfour", "\n2 and 2\n")), True) == expected
    (row,) = encode_turns(qwen, talk(user("q"), says("four", "2 and 2")), True)
    assert supervised_ids(row) == ids_of(qwen, said + "<|im_end|>")


def test_qwen_thoughts_that_history_strips_get_a_sequence_of_their_own(qwen: PreTrainedTokenizerFast) -> None:
    asked = talk(user("q"), says("four", "2 and 2"), user("r"), says("six", "3 and 3"))
    assert shown(qwen, asked, True) == {
        "row#1": [(0, chatml("user|q") + ASK), (1, "<think>\n2 and 2\n</think>\n\nfour<|im_end|>")],
        "row": [
            (0, chatml("user|q", "assistant|four", "user|r") + ASK),
            (1, "<think>\n3 and 3\n</think>\n\nsix<|im_end|>"),
        ],
    }


def test_qwen_thinking_turns_without_thoughts_share_a_sequence(qwen: PreTrainedTokenizerFast) -> None:
    assert shown(qwen, talk(user("q"), says("four"), user("r"), says("six")), True) == {
        "row": [
            (0, chatml("user|q") + ASK),
            (1, "four<|im_end|>"),
            (0, "\n" + chatml("user|r") + ASK),
            (1, "six<|im_end|>"),
        ]
    }


def test_qwen_non_thinking_turns_keep_their_own_prompts(qwen: PreTrainedTokenizerFast) -> None:
    assert shown(qwen, talk(user("q"), says("four"), user("r"), says("six")), False) == {
        "row#1": [(0, chatml("user|q") + ASK + EMPTY), (1, "four<|im_end|>")],
        "row": [
            (0, chatml("user|q", "assistant|four", "user|r") + ASK + EMPTY),
            (1, "six<|im_end|>"),
        ],
    }


QWEN_TOOLS = f"# Tools\n<tools>\n{json.dumps(TOOLS[0])}\n</tools>"
QWEN_CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": "two"}}\n</tool_call>'


def test_qwen_tool_loop_with_thoughts_is_one_sequence(qwen: PreTrainedTokenizerFast) -> None:
    asked = talk(
        system("be brief"),
        user("q"),
        says(None, "I should add.", a=2, b="two"),
        result("4"),
        says("It is 4.", "Done."),
        tools=TOOLS,
    )
    (row,) = encode_turns(qwen, asked, True)
    call = f"<think>\nI should add.\n</think>\n\n{QWEN_CALL}<|im_end|>"
    final = "<think>\nDone.\n</think>\n\nIt is 4.<|im_end|>"
    assert runs(qwen, row) == [
        (0, chatml(f"system|be brief\n\n{QWEN_TOOLS}", "user|q") + ASK),
        (1, call),
        (0, "\n" + chatml("user|<tool_response>\n4\n</tool_response>") + ASK),
        (1, final),
    ]
    assert supervised_ids(row) == ids_of(qwen, call) + ids_of(qwen, final)


def test_qwen_tool_loop_without_thinking(qwen: PreTrainedTokenizerFast) -> None:
    asked = talk(user("q"), says("Let me add.", a=2, b="two"), result("4"), says("It is 4."), tools=TOOLS)
    before = chatml(f"system|{QWEN_TOOLS}", "user|q")
    call = f"Let me add.\n{QWEN_CALL}<|im_end|>"
    assert shown(qwen, asked, False) == {
        "row#1": [(0, before + ASK + EMPTY), (1, call)],
        "row": [
            (
                0,
                before
                + ASK
                + call
                + "\n"
                + chatml("user|<tool_response>\n4\n</tool_response>")
                + ASK
                + EMPTY,
            ),
            (1, "It is 4.<|im_end|>"),
        ],
    }


def test_qwen_call_without_thoughts_begins_like_a_plain_answer(qwen: PreTrainedTokenizerFast) -> None:
    # The template writes an empty block into a last turn without thoughts: none was given, none is trained.
    asked = talk(user("q"), says(None, a=2, b="two"), result("4"), says("It is 4."), tools=TOOLS)
    assert [text for flag, text in shown(qwen, asked, True)["row"] if flag] == [
        f"{QWEN_CALL}<|im_end|>",
        "It is 4.<|im_end|>",
    ]


def test_arguments_given_as_json_text_are_what_the_object_is(qwen: PreTrainedTokenizerFast) -> None:
    asked = talk(user("q"), says(None, a=2, b="two"), tools=TOOLS)
    text = talk(user("q"), says(None, a=2, b="two"), tools=TOOLS)
    text.messages[1]["tool_calls"][0]["function"]["arguments"] = '{"a":2,"b":"two"}'
    assert encode_turns(qwen, text, False) == encode_turns(qwen, asked, False)


def test_thoughts_without_thinking_mode_are_refused(qwen: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match=r"message 2 \(assistant\) has thoughts, but thinking is off"):
        encode_turns(qwen, talk(user("q"), says("four", "2 and 2")), False)


# -- Gemma-4's rules ---------------------------------------------------------------------------------------


def gemma_turns(*turns: str) -> str:
    return "".join(f"<|turn>{role}\n{text}<turn|>\n" for role, text in (t.split("|", 1) for t in turns))


MODEL = "<|turn>model\n"


def test_gemma_non_thinking_prefix_is_not_supervised(gemma: PreTrainedTokenizerFast) -> None:
    (row,) = encode_turns(gemma, talk(system("be brief"), user("q"), says("the answer")), False)
    prompt = "<bos>" + gemma_turns("system|be brief", "user|q") + MODEL + CHANNEL
    assert runs(gemma, row) == [(0, prompt), (1, "the answer<turn|>")]
    assert row.ids == ids_of(gemma, prompt) + ids_of(gemma, "the answer<turn|>")
    assert supervised_ids(row) == [*ids_of(gemma, "the answer"), gemma.convert_tokens_to_ids("<turn|>")]


def test_gemma_thinking_is_supervised_as_written_though_history_drops_it(
    gemma: PreTrainedTokenizerFast,
) -> None:
    said = "<|channel>thought\n2 and 2\n<channel|>four"
    before = "<bos>" + gemma_turns("system|<|think|>\n", "user|q")
    assert shown(gemma, talk(user("q"), says(said), user("r"), says("six")), True) == {
        "row#1": [(0, before + MODEL), (1, said + "<turn|>")],
        "row": [(0, before + gemma_turns("model|four", "user|r") + MODEL), (1, "six<turn|>")],
    }


def test_gemma_turns_keep_their_own_prompts_without_thinking_and_share_one_with_it(
    gemma: PreTrainedTokenizerFast,
) -> None:
    asked = talk(user("q"), says("four"), user("r"), says("six"))
    assert shown(gemma, asked, False) == {
        "row#1": [(0, "<bos>" + gemma_turns("user|q") + MODEL + CHANNEL), (1, "four<turn|>")],
        "row": [
            (0, "<bos>" + gemma_turns("user|q", "model|four", "user|r") + MODEL + CHANNEL),
            (1, "six<turn|>"),
        ],
    }
    assert shown(gemma, asked, True) == {
        "row": [
            (0, "<bos>" + gemma_turns("system|<|think|>\n", "user|q") + MODEL),
            (1, "four<turn|>"),
            (0, "\n" + gemma_turns("user|r") + MODEL),
            (1, "six<turn|>"),
        ]
    }


GEMMA_CALL = '<|tool_call>call:add{a:2,b:<|"|>two<|"|>}<tool_call|><|tool_response>'
GEMMA_RESULT = 'response:add{value:<|"|>4<|"|>}<tool_response|>'


def test_gemma_call_ends_where_the_target_stops_and_the_turn_goes_on_after_the_result(
    gemma: PreTrainedTokenizerFast,
) -> None:
    asked = talk(
        user("q"), says(None, "I should add.", a=2, b="two"), result("4"), says("It is 4."), tools=TOOLS
    )
    (row,) = encode_turns(gemma, asked, True)
    call = "<|channel>thought\nI should add.\n<channel|>" + GEMMA_CALL
    assert runs(gemma, row) == [
        (0, "<bos>" + gemma_turns("system|<|think|>\n<|tool>declaration:add<tool|>", "user|q") + MODEL),
        (1, call),
        (0, GEMMA_RESULT),
        (1, "It is 4.<turn|>"),
    ]
    assert supervised_ids(row) == ids_of(gemma, call) + ids_of(gemma, "It is 4.<turn|>")


def test_gemma_call_follows_the_empty_channel_without_thinking(gemma: PreTrainedTokenizerFast) -> None:
    asked = talk(user("q"), says(None, a=2, b="two"), result("4"), says("It is 4."), tools=TOOLS)
    before = "<bos>" + gemma_turns("system|<|tool>declaration:add<tool|>", "user|q") + MODEL
    assert shown(gemma, asked, False) == {
        "row#1": [(0, before + CHANNEL), (1, GEMMA_CALL)],
        "row": [(0, before + GEMMA_CALL + GEMMA_RESULT), (1, "It is 4.<turn|>")],
    }


@pytest.mark.parametrize(
    ("turn", "why"),
    [
        (says("four", "2 and 2"), "leaves out or changes 'reasoning_content'"),
        (says("Let me add.", a=2), "does not write thoughts, text and tool calls in that order"),
    ],
)
def test_gemma_refuses_what_its_template_would_lose_or_turn_round(
    gemma: PreTrainedTokenizerFast, turn: dict[str, Any], why: str
) -> None:
    with pytest.raises(DataError, match=why):
        encode_turns(gemma, talk(user("q"), turn, tools=TOOLS), True)


# -- ids as the target produced them -----------------------------------------------------------------------


def test_answer_ids_of_every_turn_stand_verbatim_and_null_is_tokenised(qwen: PreTrainedTokenizerFast) -> None:
    end = qwen.convert_tokens_to_ids("<|im_end|>")
    odd = [ids_of(qwen, letter)[0] for letter in "four"]
    assert odd != ids_of(qwen, "four")
    asked = talk(
        *(user("q"), says("four"), user("r"), says("five"), user("s"), says("four")),
        answer_ids=[[*odd, end], None, odd],
    )
    own, last = encode_turns(qwen, asked, True)
    # Not the tokens that history has in that place: context there, supervised on its own.
    assert (own.id, supervised_ids(own)) == ("row#1", [*odd, end])
    # The last was cut at a budget: its end of turn was never produced.
    assert supervised_ids(last) == [*ids_of(qwen, "five"), end, *odd]


def test_turn_of_weight_0_is_context_whatever_ids_it_brings(qwen: PreTrainedTokenizerFast) -> None:
    foreign: dict[str, Any] = {**says("five"), "weight": 0}
    end = qwen.convert_tokens_to_ids("<|im_end|>")
    asked = talk(user("q"), foreign, user("r"), says("four"), user("s"), foreign)
    (row,) = encode_turns(qwen, asked, True)
    assert supervised_ids(row) == [*ids_of(qwen, "four"), end]
    assert qwen.decode(row.ids).count("five") == 1, "the first is read, the last is after all that is learnt"
    assert row == encode_turns(qwen, replace(asked, meta={"answer_ids": [[1], None, [2]]}), True)[0]
    with pytest.raises(DataError, match="every assistant turn has weight 0"):
        encode_turns(qwen, talk(user("q"), foreign), True)


def test_template_that_loses_a_context_turns_call_is_refused_too(qwen: PreTrainedTokenizerFast) -> None:
    """Its result would answer a call that the target never sees."""
    foreign = {**says("", a=1), "weight": 0}
    asked = talk(user("q"), foreign, result("2"), says("four"), tools=TOOLS)
    assert len(encode_turns(qwen, asked, True)) == 1
    deaf = changed("m.tool_calls or []", "m.no_calls or []")
    with pytest.raises(DataError, match=r"leaves out or changes a tool call of message 2 \(assistant\)"):
        encode_turns(deaf, asked, True)


def test_turn_that_needs_a_sequence_of_its_own_keeps_its_number_after_one_of_weight_0(
    qwen: PreTrainedTokenizerFast,
) -> None:
    foreign: dict[str, Any] = {**says("five"), "weight": 0}
    asked = talk(user("q"), foreign, user("r"), says("four", "2 and 2"), user("s"), says("five"))
    assert [row.id for row in encode_turns(qwen, asked, True)] == ["row#2", "row"]


def test_answer_ids_free_a_turn_from_what_the_template_can_write(tiny: PreTrainedTokenizerFast) -> None:
    ids = ids_of(tiny, "2 and 2\n</think>\n\n4<|im_end|>")
    asked = talk(user("2+2?"), says("4", "2 and 2"), answer_ids=ids)
    (row,) = encode_turns(tiny, asked, True)
    assert supervised_ids(row) == ids


# -- templates that lose or change what they are given -----------------------------------------------------


def changed(old: str, new: str) -> PreTrainedTokenizerFast:
    tokenizer = tokenizer_for(QWEN3)
    assert old in QWEN3
    tokenizer.chat_template = QWEN3.replace(old, new)
    return tokenizer


LOOP = talk(
    system("be brief"),
    user("q"),
    says("so", "hm", a=2, b="two"),
    result("4"),
    says("4"),
    user("r"),
    says("6"),
)


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("messages[0].content }}", "'' }}", "leaves out message 1 (system)"),
        (
            "{{- '<|im_start|>user\\n' + m.content",
            "{{- '<|im_start|>user\\n' + 'q'",
            "leaves out message 2 (user)",
        ),
        ("+ m.content + '\\n</tool_response>'", "+ '</tool_response>'", "leaves out message 4 (tool)"),
        ("{{- text }}", "{{- text if loop.last }}", "leaves out message 5 (assistant)"),
        (
            "set text, thought = m.content,",
            "set text, thought = m.content.upper(),",
            "leaves out or changes the text",
        ),
        ("thought.strip('\\n')", "(thought | upper)", "leaves out or changes 'reasoning_content'"),
        ("thought.strip('\\n')", "thought[:1] + thought[20:]", "leaves out or changes 'reasoning_content'"),
        ("+ call.function.name +", "+ 'add' +", "leaves out or changes a tool call"),
        ("(call.function.arguments | tojson)", "'{}'", "leaves out or changes an argument of a tool call"),
        ("thought.strip('\\n')", "thought.replace('m', '')", "alters 'hm'"),
        (
            "<|im_start|>assistant\\n' }}\n        {",
            "<|im_start|>model\\n' }}\n        {",
            "begins the turn differently",
        ),
    ],
)
def test_template_that_drops_turns_or_changes_text_is_refused(old: str, new: str, why: str) -> None:
    with pytest.raises(DataError) as caught:
        encode_turns(changed(old, new), LOOP, True)
    assert why in str(caught.value)
    assert "where: rows.jsonl:3 (id row)" in str(caught.value)


def test_template_that_leaves_out_the_tools_is_refused() -> None:
    conversation = talk(user("q"), says("a"), tools=TOOLS)
    with pytest.raises(DataError, match="leaves out tool 1"):
        encode_turns(changed("{%- for tool in tools %}", "{%- for tool in [] %}"), conversation, True)


def test_call_that_nothing_ends_is_refused() -> None:
    endless = changed(
        "{{- '<|im_end|>\\n' }}\n    {%- endif %}\n{%- endfor %}",
        "{{- '' if m.tool_calls else '<|im_end|>\\n' }}\n    {%- endif %}\n{%- endfor %}",
    )
    with pytest.raises(DataError, match="does not end the turn as it ends a plain answer"):
        encode_turns(endless, talk(user("q"), says(None, a=1)), True)


def test_end_of_turn_inside_an_argument_is_refused(qwen: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match=r"contains the end-of-turn token '<\|im_end\|>'"):
        encode_turns(qwen, talk(user("q"), says(None, a="x<|im_end|>y")), True)


def test_empty_answer_in_the_middle_is_refused_with_its_message(qwen: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match="empty answer in message 2"):
        encode_turns(qwen, talk(user("q"), says(""), user("r"), says("six")), True)


# -- cutting -----------------------------------------------------------------------------------------------


def test_cut_drops_the_sequences_that_keep_no_answer_and_only_those(qwen: PreTrainedTokenizerFast) -> None:
    asked = talk(user("q"), says("four"), user("r"), says("six"))
    own, last = encode_turns(qwen, asked, False)
    limit = len(own.ids)
    assert limit < last.loss_mask.index(1)
    assert encode_turns(qwen, asked, False, limit) == [own]
    first = own.loss_mask.index(1)
    with pytest.raises(OverlongError, match=f"the prompt is {first} tokens, max_length is {first}"):
        encode_turns(qwen, asked, False, first)


# -- any conversation, any template ------------------------------------------------------------------------

CHATML = (
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{{- '' if enable_thinking else '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
)
TEXT = st.text("ab2 \n\t.,é√😀", min_size=1, max_size=8)


@st.composite
def conversations(draw: Any, calls: bool) -> list[dict[str, Any]]:
    messages = draw(st.lists(st.builds(system, TEXT), max_size=1))
    for _ in range(draw(st.integers(1, 3))):
        messages.append(user(draw(TEXT)))
        for number in range(draw(st.integers(0, 2)) if calls else 0):
            messages += [says(None, a=number, b=draw(TEXT)), result(draw(TEXT))]
        messages.append(says(draw(TEXT)))
    return messages


def said(message: dict[str, Any], family: str) -> str:
    """What the target wrote for a turn, its end included; spelt out by hand for each family."""
    calls = message["tool_calls"] or []
    if family == "gemma":
        ((a, b),) = [c["function"]["arguments"].values() for c in calls] or [(None, None)]
        call = f'<|tool_call>call:add{{a:{a},b:<|"|>{b}<|"|>}}<tool_call|><|tool_response>'
        return call if calls else f"{message['content']}<turn|>"
    texts = [json.dumps(c["function"]["arguments"], ensure_ascii=False) for c in calls]
    wrapped = [f'<tool_call>\n{{"name": "add", "arguments": {text}}}\n</tool_call>' for text in texts]
    return "".join([message["content"] or "", *wrapped, "<|im_end|>"])


@pytest.mark.parametrize("family", ["pocket", "chatml", "qwen", "gemma"])
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), thinking=st.booleans())
def test_supervised_runs_are_the_answers_each_once_after_the_prompt_that_the_target_saw(
    request: pytest.FixtureRequest, family: str, data: st.DataObject, thinking: bool
) -> None:
    name = {"pocket": "tiny", "chatml": "qwen"}.get(family, family)
    tokenizer = request.getfixturevalue(name)
    before = tokenizer.chat_template
    if family == "chatml":
        tokenizer.chat_template = CHATML
    try:
        messages = data.draw(conversations(calls=family in ("qwen", "gemma")))
        conversation = talk(*messages, **({"tools": TOOLS} if family in ("qwen", "gemma") else {}))
        rows = encode_turns(tokenizer, conversation, thinking)
        turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        prompts = [
            prompt_ids(tokenizer, conversation.messages[:i], thinking, tools=conversation.meta.get("tools"))
            for i in turns
        ]
    finally:
        tokenizer.chat_template = before
    # Every turn once: one row has it supervised, right after the very ids that asked for it.
    placed = []
    for prompt, index in zip(prompts, turns, strict=True):
        text = said(messages[index], family)
        homes = [
            row
            for row in rows
            if row.ids[: len(prompt)] == prompt and row.loss_mask[len(prompt) :][:1] == [1]
        ]
        assert len(homes) == 1
        mask = homes[0].loss_mask[len(prompt) :]
        answer = homes[0].ids[len(prompt) :][: mask.index(0) if 0 in mask else len(mask)]
        assert tokenizer.decode(answer) == text
        placed.append(prompt + answer)
    assert sum(sum(row.loss_mask) for row in rows) == sum(map(len, placed)) - sum(map(len, prompts))
    # As few rows as there can be: a turn that any later prompt begins with has none of its own.
    needed = [p for k, p in enumerate(placed) if not any(q[: len(p)] == p for q in prompts[k + 1 :])]
    assert [row.ids for row in rows] == needed
