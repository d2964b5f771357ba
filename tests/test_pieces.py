"""Text tokenised in pieces is not the text tokenised whole: every way to split text, under every template.

The ids that training sees must be those of the rendered text, which a server would feed and the target would
write. `whole` below is the plain way: the template's text, tokenised once.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from deepspec.conditions import SWITCHES
from deepspec.data.conversations import Conversation, conversation_from_row
from deepspec.data.inspect import pieces
from deepspec.data.tokens import encode_turns, prompt_ids
from deepspec.errors import DataError
from templates import (
    CHATML,
    DEEPSEEK,
    FAMILIES,
    GEMMA4,
    HARMONY,
    LLAMA2,
    MISTRAL,
    QWEN3,
    backend_of,
    tokenizer_for,
)

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
        [*messages], tokenize=False, add_generation_prompt=ask, **dict.fromkeys(SWITCHES, thinking)
    )


def can_think(template: str) -> bool:
    """Whether a template has a switch for thinking; without one, thinking on is refused."""
    return re.search(r"(?<!\.)\b(enable_)?thinking\b", template) is not None


def supervised(
    tokenizer: PreTrainedTokenizerFast, conversation: Conversation, thinking: bool | None = None
) -> Any:
    """The supervised tokens of each sequence; thinking is on if the template can switch it."""
    thinking = can_think(tokenizer.chat_template) if thinking is None else thinking
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
ENDS |= {DEEPSEEK: TOKENIZER(DEEPSEEK).eos_token, QWEN3: "<|im_end|>", GEMMA4: "<turn|>"}
VERBATIM = (MISTRAL, HARMONY, DEEPSEEK)
"""Templates that write every answer as it is, and the same before it in the prompt and in history."""
LEADS = {LLAMA2: " ", MISTRAL: " ", HARMONY: "<|channel|>final<|message|>"}
TEXT = st.text("ab2 \n\t.,é√😀", min_size=1, max_size=8)
TURNS = st.lists(st.tuples(TEXT.filter(str.strip), TEXT), min_size=1, max_size=3)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=30, deadline=None)
@given(template=st.sampled_from([*ENDS]), turns=TURNS, thinking=st.booleans())
def test_any_conversation_is_tokenised_as_its_rendered_text_in_as_few_sequences_as_that_allows(
    family: str, template: str, turns: list[tuple[str, str]], thinking: bool
) -> None:
    tokenizer, thinking = TOKENIZER(template, family), thinking and can_think(template)
    conversation = talk(*(text for turn in turns for text in turn))
    rows = encode_turns(tokenizer, conversation, thinking)
    placed: list[list[int]] = []
    prompts: list[list[int]] = []
    for i, (_, answer) in enumerate(turns):
        before = conversation.messages[: 2 * i + 1]
        asked = rendered(tokenizer, before, thinking, ask=True)
        prompts.append(whole(tokenizer, asked))
        assert prompt_ids(tokenizer, before, thinking) == prompts[-1]
        # What a template strips off an answer the target wrote, but for the space that Llama-2's adds.
        said = LEADS.get(template, "") + (answer.lstrip() if template == LLAMA2 else answer)
        text = asked + said + ENDS[template]
        if template in VERBATIM and (template != DEEPSEEK or asked.endswith("</think>")):
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


# Vicuna's published rules: no special tokens but the last, and the space before an answer is the target's.
VICUNA = (
    "{%- for m in messages %}{{ 'USER: ' + m.content + ' ' if m.role == 'user' else "
    "'ASSISTANT: ' + m.content + '</s>' }}{%- endfor %}{{ 'ASSISTANT:' if add_generation_prompt }}"
)
# Phi-3's published rules: special tokens swallow the white space after them.
PHI3 = (
    "{%- for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{%- endfor %}"
    "{{ '<|assistant|>\\n' if add_generation_prompt }}"
)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "wordpiece"])
@pytest.mark.parametrize(("template", "end"), [(VICUNA, "</s>"), (PHI3, "<|end|>")])
def test_templates_of_other_families_give_one_sequence_of_the_rendered_text(
    template: str, end: str, family: str
) -> None:
    backend = backend_of(family)
    names = ("</s>", "<|user|>", "<|assistant|>", "<|end|>")
    backend.add_special_tokens([AddedToken(name, rstrip=name != "</s>", special=True) for name in names])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, eos_token="</s>")
    (row,) = encode_turns(tokenizer, PEAR, False)
    text = rendered(tokenizer, PEAR.messages, False)
    assert row.ids == whole(tokenizer, text)
    (tokens,) = supervised(tokenizer, PEAR)
    assert (tokens.count(end), tokens[-1]) == (2, end)
    spaces = {"Ġ": " ", "▁": " "}
    assert "".join(tokens).translate(str.maketrans(spaces)).replace(" ", "") == f"Pear.{end}Pear,apear.{end}"


# -- one by one --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "tokens"),
    [("Pear", ["Pear"]), (" Pear", ["▁Pear"]), ("  Pear", ["▁", "▁Pear"]), ("\nPear", ["\n", "Pear"])],
)
@pytest.mark.parametrize("family", ["metaspace first", "metaspace always", "metaspace never"])
def test_white_space_before_an_answer_is_its_own_and_never_the_tokenizers(
    family: str, answer: str, tokens: list[str]
) -> None:
    # With thinking off the prompt ends in two line ends, which may merge with the answer's: they must not.
    for thinking in (True, False):
        found = supervised(TOKENIZER(CHATML, family), talk("q", answer), thinking)
        assert found == [[*tokens, "<|im_end|>"]]


def test_answer_that_would_merge_with_the_prompt_keeps_the_prompts_tokens() -> None:
    tokenizer = TOKENIZER(CHATML)
    asked = talk("q", "\nfour")
    prompt = prompt_ids(tokenizer, asked.messages[:1], True)
    text = rendered(tokenizer, asked.messages, True)
    assert whole(tokenizer, text)[: len(prompt)] != prompt
    (row,) = encode_turns(tokenizer, asked, True)
    assert row.ids[: len(prompt)] == prompt and tokenizer.decode(row.ids) == text.removesuffix("\n")


@pytest.mark.parametrize("template", [LLAMA2, MISTRAL, DEEPSEEK, GEMMA4])
def test_bos_of_the_template_is_the_only_one(template: str) -> None:
    tokenizer = tokenizer_for(template)
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{tokenizer.bos_token} $A", special_tokens=[(tokenizer.bos_token, bos)]
    )
    assert tokenizer("q")["input_ids"][0] == bos
    (row, *_) = encode_turns(tokenizer, talk("q", "four"), can_think(template))
    assert row.ids[0] == bos and bos not in row.ids[1:]


def test_stripped_answer_keeps_the_targets_last_line_end_and_the_templates_first_space() -> None:
    tokenizer = TOKENIZER(LLAMA2, "metaspace first")
    assert supervised(tokenizer, talk("q", "\n Pear\n"))[0] == ["▁Pear", "\n", "▁", "</s>"]
    with pytest.raises(DataError, match="empty answer in message 2"):
        supervised(tokenizer, talk("q", "", "r", "Pear"))


@pytest.mark.parametrize("template", [CHATML, LLAMA2, HARMONY])
def test_ids_next_to_text_stand_as_they_are(template: str) -> None:
    tokenizer = TOKENIZER(template, "metaspace first")
    ids = [tokenizer.convert_tokens_to_ids(token) for token in ("P", "e", "▁")]
    assert supervised(tokenizer, talk("q", "Pear", answer_ids=ids)) == [["P", "e", "▁"]]


def test_pieces_shown_by_inspect_keep_their_first_space() -> None:
    tokenizer = TOKENIZER(LLAMA2, "metaspace first")
    (row,) = encode_turns(tokenizer, PEAR, False)
    shown = [piece.text for piece in pieces(tokenizer, row, 99) if piece.supervised and not piece.added]
    assert shown == [" Pear. ", " Pear, a pear. "]
