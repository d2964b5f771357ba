"""Text tokenised in pieces is not the text tokenised whole: every way to split text, under every template.

The ids that training sees must be those of the rendered text, which a server would feed and the target would
write. `whole` below is the plain way: the template's text, tokenised once.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from deepspec.data.conversations import Conversation, conversation_from_row
from deepspec.data.tokens import encode_turns, prompt_ids
from templates import CHATML, DEEPSEEK, FAMILIES, HARMONY, LLAMA2, MISTRAL, tokenizer_for

TOKENIZER = cache(tokenizer_for)


def talk(*texts: str | dict[str, Any], **facts: Any) -> Conversation:
    """A conversation of user and assistant in turns; a message may be given as a whole."""
    roles = ("user", "assistant") * len(texts)
    messages = [
        text if isinstance(text, dict) else {"role": role, "content": text}
        for role, text in zip(roles, texts, strict=False)
    ]
    return conversation_from_row({"id": "row", "messages": messages, **facts}, "rows.jsonl:3")


def whole(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def rendered(tokenizer: PreTrainedTokenizerFast, messages: Any, thinking: bool, ask: bool = False) -> str:
    return tokenizer.apply_chat_template(
        [*messages], tokenize=False, add_generation_prompt=ask, enable_thinking=thinking
    )


def supervised(tokenizer: PreTrainedTokenizerFast, conversation: Conversation, thinking: bool = True) -> Any:
    """The supervised tokens of each sequence."""
    return [
        tokenizer.convert_ids_to_tokens([i for i, on in zip(row.ids, row.loss_mask, strict=True) if on])
        for row in encode_turns(tokenizer, conversation, thinking)
    ]


# -- every family under every template ---------------------------------------------------------------------

PEAR = talk("A fruit?", "Pear.", "A tree?", "Pear, a pear.")


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_of_two_turns_are_the_rendered_texts_tokens_in_one_sequence(family: str) -> None:
    """Row 2: a prefix space before each answer, and so a sequence for each turn."""
    tokenizer = TOKENIZER(CHATML, family)
    (row,) = encode_turns(tokenizer, PEAR, True)
    text = rendered(tokenizer, PEAR.messages, True)
    assert row.ids == whole(tokenizer, text.removesuffix("\n"))
    if family.startswith(("metaspace", "prepend")):
        assert supervised(tokenizer, PEAR)[0][:3] == ["Pear", ".", "<|im_end|>"]


ENDS = {CHATML: "<|im_end|>", LLAMA2: " </s>", MISTRAL: "</s>", HARMONY: "<|return|>"}
ENDS[DEEPSEEK] = TOKENIZER(DEEPSEEK).eos_token
LEADS = {LLAMA2: " ", MISTRAL: " ", HARMONY: "<|channel|>final<|message|>"}
TEXT = st.text("ab2 \n\t.,é√😀", min_size=1, max_size=8)
TURNS = st.lists(st.tuples(TEXT.filter(str.strip), TEXT), min_size=1, max_size=3)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=30, deadline=None)
@given(template=st.sampled_from([*ENDS]), turns=TURNS, thinking=st.booleans())
def test_any_conversation_is_tokenised_as_its_rendered_text_in_as_few_sequences_as_that_allows(
    family: str, template: str, turns: list[tuple[str, str]], thinking: bool
) -> None:
    tokenizer = TOKENIZER(template, family)
    conversation = talk(*(text for turn in turns for text in turn))
    rows = encode_turns(tokenizer, conversation, thinking)
    placed: list[list[int]] = []
    prompts: list[list[int]] = []
    for i, (_, answer) in enumerate(turns):
        before = conversation.messages[: 2 * i + 1]
        asked = rendered(tokenizer, before, thinking, ask=True)
        prompts.append(whole(tokenizer, asked))
        assert prompt_ids(tokenizer, before, thinking) == prompts[-1]
        # Only Llama-2's template strips answers; what it cuts off at the end, the target wrote.
        said = LEADS.get(template, "") + (answer.lstrip() if template == LLAMA2 else answer)
        text = asked + said + ENDS[template]
        if template not in (LLAMA2, CHATML):
            assert text == rendered(tokenizer, conversation.messages[: 2 * i + 2], thinking)
        found = whole(tokenizer, text)
        size = len(prompts[-1])
        if found[:size] != prompts[-1]:
            # A token would reach over the border from the prompt into the answer: the prompt stays as it is.
            (row,) = (r for r in rows if r.ids[:size] == prompts[-1] and r.loss_mask[size])
            end = [*row.loss_mask, 0].index(0, size)
            assert tokenizer.decode(row.ids[:end]) == tokenizer.decode(found) or family == "wordpiece"
            found = row.ids[:end]
        placed.append(found)
    needed = [ids for k, ids in enumerate(placed) if not any(p[: len(ids)] == ids for p in prompts[k + 1 :])]
    assert [row.ids for row in rows] == needed
    assert sum(sum(row.loss_mask) for row in rows) == sum(map(len, placed)) - sum(map(len, prompts))
