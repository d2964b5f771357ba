from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from deepspec.data.conversations import Conversation
from deepspec.data.produced import _ANSWER
from deepspec.data.template import template_hash
from deepspec.data.tokens import (
    Encoded,
    encode_turns,
    prompt_ids,
    require_tokenizer,
    tokenizer_hash,
)
from deepspec.errors import DataError, TargetError

# ChatML with a thinking switch: history is written exactly as it was said.
CHATML = """{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""

# As Qwen3 has it: thoughts of earlier turns are dropped and texts are stripped, so history differs from what
# the target saw; the empty think block stands in the generation prompt only.
STRIPPING = """{%- for message in messages %}
{%- set content = message.content %}
{%- if message.role == 'assistant' %}{%- set content = content.split('</think>')[-1].strip() %}{%- endif %}
{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- if not enable_thinking %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""

THINK = "<think>\n\n</think>\n\n"


@pytest.fixture(scope="module")
def backend() -> Tokenizer:
    """Byte-level BPE with merges, also of line ends: texts joined tokenise otherwise than apart."""
    tokenizer = Tokenizer(BPE())
    split = pre_tokenizers.Split(Regex(r"\s*[\r\n]+|\s?\p{L}+|\p{N}|[^\s\p{L}\p{N}]+|\s+"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=1,
        show_progress=False,
    )
    tokenizer.train_from_iterator(["user\n\nassistant\n\n\nthe answer the answer is is four"] * 3, trainer)
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in ("<think>", "</think>")])
    return tokenizer


def chat(backend: Tokenizer, template: str | None, **options: Any) -> PreTrainedTokenizerFast:
    copy = Tokenizer.from_str(backend.to_str())
    options = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"} | options
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=copy, **options)
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def chatml(backend: Tokenizer) -> PreTrainedTokenizerFast:
    return chat(backend, CHATML)


@pytest.fixture(scope="module")
def stripping(backend: Tokenizer) -> PreTrainedTokenizerFast:
    return chat(backend, STRIPPING)


def talk(*contents: str, meta: dict[str, Any] | None = None) -> Conversation:
    roles = ("user", "assistant") * len(contents)
    messages = tuple({"role": role, "content": text} for role, text in zip(roles, contents, strict=False))
    return Conversation("row-7", None, messages, meta or {}, source="rows.jsonl:7")


def encode(
    tokenizer: PreTrainedTokenizerFast, conversation: Conversation, thinking: bool, max_length: int
) -> Encoded:
    """The one sequence of a conversation that needs no more."""
    (only,) = encode_turns(tokenizer, conversation, thinking, max_length)
    return only


def ids_of(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def pieces(tokenizer: PreTrainedTokenizerFast, encoded: Encoded) -> list[tuple[int, str]]:
    """Decoded runs of equal mask: what was context (0) and what is supervised (1)."""
    assert len(encoded.ids) == len(encoded.loss_mask) and set(encoded.loss_mask) <= {0, 1}
    runs: list[tuple[int, list[int]]] = []
    for token, flag in zip(encoded.ids, encoded.loss_mask, strict=True):
        if not runs or runs[-1][0] != flag:
            runs.append((flag, []))
        runs[-1][1].append(token)
    return [(flag, tokenizer.decode(run)) for flag, run in runs]


def context(text: str) -> str:
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


# -- the prompt --------------------------------------------------------------------------------------------


def test_prompt_carries_the_thinking_switch_both_ways(chatml: PreTrainedTokenizerFast) -> None:
    messages = talk("the answer?").messages
    assert chatml.decode(prompt_ids(chatml, messages, True)) == context("the answer?")
    assert chatml.decode(prompt_ids(chatml, messages, False)) == context("the answer?") + THINK


def test_prompt_gets_no_second_bos_from_the_tokenizer(backend: Tokenizer) -> None:
    tokenizer = chat(backend, CHATML)
    bos = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", bos)]
    )
    assert tokenizer("a")["input_ids"][0] == bos
    encoded = encode(tokenizer, talk("a", "b"), True, 64)
    assert bos not in encoded.ids


# -- supervised tokens, exactly ----------------------------------------------------------------------------


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("template", [CHATML, STRIPPING])
def test_exactly_the_answer_and_its_end_of_turn_are_supervised(
    backend: Tokenizer, template: str, thinking: bool
) -> None:
    tokenizer = chat(backend, template)
    encoded = encode(tokenizer, talk("the question", "the answer is 4"), thinking, 1000)
    prompt = context("the question") + ("" if thinking else THINK)
    answer = [*ids_of(tokenizer, "the answer is 4"), tokenizer.convert_tokens_to_ids("<|im_end|>")]
    assert pieces(tokenizer, encoded) == [(0, prompt), (1, "the answer is 4<|im_end|>")]
    assert encoded.ids == ids_of(tokenizer, prompt) + answer
    assert encoded.loss_mask == [0] * len(ids_of(tokenizer, prompt)) + [1] * len(answer)
    assert encoded.id == "row-7"


def test_empty_think_block_stays_though_the_rendered_history_drops_it(
    stripping: PreTrainedTokenizerFast,
) -> None:
    conversation = talk("q", "four")
    rendered = stripping.apply_chat_template(
        list(conversation.messages), tokenize=False, enable_thinking=False
    )
    assert "<think>" not in rendered
    assert pieces(stripping, encode(stripping, conversation, False, 99)) == [
        (0, context("q") + THINK),
        (1, "four<|im_end|>"),
    ]


def test_thoughts_and_outer_white_space_of_the_answer_are_supervised_though_the_template_strips_them(
    stripping: PreTrainedTokenizerFast,
) -> None:
    answer = "<think>\n2, 3, 4\n</think>\n\nfour\n"
    encoded = encode(stripping, talk("q", answer), True, 99)
    assert pieces(stripping, encoded) == [(0, context("q")), (1, answer + "<|im_end|>")]


def test_answer_starting_with_a_line_end_does_not_merge_into_the_prompt(
    chatml: PreTrainedTokenizerFast,
) -> None:
    together, apart = (
        ids_of(chatml, "assistant\n\nfour"),
        ids_of(chatml, "assistant\n") + ids_of(chatml, "\nfour"),
    )
    assert together != apart  # the tokenizer does merge across the border
    encoded = encode(chatml, talk("q", "\nfour"), True, 99)
    assert encoded.ids[: len(prompt_ids(chatml, talk("q").messages, True))] == prompt_ids(
        chatml, talk("q").messages, True
    )
    assert pieces(chatml, encoded)[-1] == (1, "\nfour<|im_end|>")


def test_answer_text_that_also_stands_in_the_question_is_supervised_once(
    chatml: PreTrainedTokenizerFast,
) -> None:
    encoded = encode(chatml, talk("is", "is"), True, 99)
    assert pieces(chatml, encoded) == [(0, context("is")), (1, "is<|im_end|>")]


def test_answer_ids_are_used_verbatim_not_tokenised_again(chatml: PreTrainedTokenizerFast) -> None:
    exact = [ids_of(chatml, c)[0] for c in "four"]
    assert exact != ids_of(chatml, "four")
    encoded = encode(chatml, talk("q", "four", meta={"answer_ids": exact}), True, 99)
    prompt = prompt_ids(chatml, talk("q").messages, True)
    # No end of turn is added: these ids were cut at a token budget and the target never produced one.
    assert encoded == Encoded(prompt + exact, [0] * len(prompt) + [1, 1, 1, 1], "row-7")


def test_answer_ids_belong_to_the_last_turn_only(chatml: PreTrainedTokenizerFast) -> None:
    exact = [ids_of(chatml, c)[0] for c in "four"]
    encoded = encode(chatml, talk("q", "is", "r", "four", meta={"answer_ids": exact}), True, 99)
    assert [text for flag, text in pieces(chatml, encoded) if flag] == ["is<|im_end|>", "four"]


def test_two_token_end_of_turn_and_a_template_without_one(backend: Tokenizer) -> None:
    extra = chat(backend, CHATML.replace("<|im_end|>", "!<|im_end|>"))
    assert pieces(extra, encode(extra, talk("q", "four"), True, 99))[-1] == (1, "four!<|im_end|>")
    none = chat(backend, CHATML.replace("<|im_end|>", ""))
    assert pieces(none, encode(none, talk("q", "four"), True, 99))[-1] == (1, "four")


def test_end_of_turn_is_found_when_it_is_not_the_tokenizers_eos(backend: Tokenizer) -> None:
    tokenizer = chat(backend, CHATML, eos_token="<|endoftext|>")
    assert pieces(tokenizer, encode(tokenizer, talk("q", "four"), True, 99))[-1] == (1, "four<|im_end|>")


def test_question_that_quotes_the_stand_in_does_not_move_the_end_of_turn(
    chatml: PreTrainedTokenizerFast,
) -> None:
    encoded = encode(chatml, talk(f"{_ANSWER} is", "four"), True, 199)
    assert pieces(chatml, encoded)[-1] == (1, "four<|im_end|>")


# -- several turns -----------------------------------------------------------------------------------------


def test_every_turn_is_supervised_where_history_is_what_was_said(chatml: PreTrainedTokenizerFast) -> None:
    assert pieces(chatml, encode(chatml, talk("q", "is", "r", "four"), True, 99)) == [
        (0, context("q")),
        (1, "is<|im_end|>"),
        (0, "\n" + context("r")),
        (1, "four<|im_end|>"),
    ]


@pytest.mark.parametrize("template", [CHATML, STRIPPING])
def test_earlier_turn_whose_think_block_is_gone_from_history_gets_a_sequence_of_its_own(
    backend: Tokenizer, template: str
) -> None:
    tokenizer = chat(backend, template)
    first, second = encode_turns(tokenizer, talk("q", "is", "r", "four"), False, 99)
    assert pieces(tokenizer, first) == [(0, context("q") + THINK), (1, "is<|im_end|>")]
    assert pieces(tokenizer, second) == [
        (0, context("q") + "is<|im_end|>\n" + context("r") + THINK),
        (1, "four<|im_end|>"),
    ]
    assert (first.id, second.id) == ("row-7#1", "row-7")


def test_turns_whose_thoughts_survive_in_history_share_the_last_ones_sequence(
    stripping: PreTrainedTokenizerFast,
) -> None:
    thought = "<think>\n4\n</think>\n\nfour"
    rewritten, last = encode_turns(stripping, talk("q", "is", "r", thought, "s", thought), True, 99)
    assert pieces(stripping, last) == [
        (0, context("q")),
        (1, "is<|im_end|>"),
        (0, "\n" + context("r") + "four<|im_end|>\n" + context("s")),
        (1, thought + "<|im_end|>"),
    ]
    assert rewritten.id == "row-7#2"
    # The first turn is there too, as context: it is supervised once.
    assert pieces(stripping, rewritten) == [
        (0, context("q") + "is<|im_end|>\n" + context("r")),
        (1, thought + "<|im_end|>"),
    ]


def test_question_after_the_last_answer_is_left_out(chatml: PreTrainedTokenizerFast) -> None:
    assert encode(chatml, talk("q", "is", "r"), True, 99) == encode(chatml, talk("q", "is"), True, 99)


# -- cutting and refusing ----------------------------------------------------------------------------------


def test_cut_keeps_the_first_tokens_and_mask_and_ids_stay_level(chatml: PreTrainedTokenizerFast) -> None:
    whole = encode(chatml, talk("q", "the answer is 4"), True, 99)
    prompt = whole.loss_mask.index(1)
    cut = encode(chatml, talk("q", "the answer is 4"), True, prompt + 2)
    assert cut == Encoded(whole.ids[: prompt + 2], [0] * prompt + [1, 1], "row-7")
    assert encode(chatml, talk("q", "the answer is 4"), True, len(whole.ids)) == whole


def refusal(tokenizer: PreTrainedTokenizerFast, conversation: Conversation, max_length: int = 99) -> str:
    with pytest.raises(DataError) as caught:
        encode(tokenizer, conversation, True, max_length)
    message = str(caught.value)
    assert "where: rows.jsonl:7 (id row-7)" in message
    return message


def test_cut_before_the_answer_is_refused_with_both_lengths(chatml: PreTrainedTokenizerFast) -> None:
    prompt = len(prompt_ids(chatml, talk("q").messages, True))
    message = refusal(chatml, talk("q", "four"), prompt)
    assert f"truncated before the answer (the prompt is {prompt} tokens, max_length is {prompt})" in message
    assert f"next: raise max_length above {prompt}" in message
    encode(chatml, talk("q", "four"), True, prompt + 1)


@pytest.mark.parametrize("conversation", [talk("q", ""), talk("q", "four", meta={"answer_ids": []})])
def test_empty_answer_is_refused_rather_than_supervising_an_end_of_turn_alone(
    chatml: PreTrainedTokenizerFast, conversation: Conversation
) -> None:
    assert "all-zero loss mask: empty answer" in refusal(chatml, conversation)


def test_prompt_without_answer_is_refused(chatml: PreTrainedTokenizerFast) -> None:
    assert "conversation without an assistant turn" in refusal(chatml, talk("q"))


def test_answer_that_carries_its_own_end_of_turn_is_refused(chatml: PreTrainedTokenizerFast) -> None:
    assert "contains the end-of-turn token '<|im_end|>'" in refusal(chatml, talk("q", "four<|im_end|>"))


def test_messages_that_the_template_refuses_name_the_row(backend: Tokenizer) -> None:
    tokenizer = chat(backend, "{{ raise_exception('no such role here') }}")
    message = refusal(tokenizer, talk("q", "a"))
    assert "the target's chat template refuses the messages: no such role here" in message


def test_template_that_loses_the_answer_is_a_target_error(backend: Tokenizer) -> None:
    tokenizer = chat(backend, "{% for m in messages %}{{ m.role }}{% endfor %}")
    with pytest.raises(TargetError, match="does not write the assistant's text") as caught:
        encode(tokenizer, talk("q", "a"), True, 99)
    assert "where: rows.jsonl:7" in str(caught.value)


def test_target_without_a_tokenizer_is_refused_with_a_way_out(chatml: PreTrainedTokenizerFast) -> None:
    assert require_tokenizer(chatml, "some/model") is chatml
    with pytest.raises(TargetError, match="some/model has no tokenizer") as caught:
        require_tokenizer(None, "some/model", "leave --target out")
    assert caught.value.next_step == (
        "put the target's tokenizer files next to its config.json or GGUF file, or leave --target out"
    )


def test_tokenizer_without_chat_template_says_what_to_do(backend: Tokenizer) -> None:
    tokenizer = chat(backend, None)
    for call in (
        lambda: encode(tokenizer, talk("q", "a"), True, 99),
        lambda: prompt_ids(tokenizer, talk("q").messages, True),
        lambda: template_hash(tokenizer),
    ):
        with pytest.raises(TargetError, match="has no chat template") as caught:
            call()
        assert "next: use the chat (instruct) version" in str(caught.value)


# -- hashes ------------------------------------------------------------------------------------------------


def test_template_hash_follows_the_template_alone(
    backend: Tokenizer, chatml: PreTrainedTokenizerFast
) -> None:
    assert template_hash(chatml) == hashlib.sha256(CHATML.encode()).hexdigest()
    assert template_hash(chat(backend, STRIPPING)) != template_hash(chatml)
    assert tokenizer_hash(chat(backend, STRIPPING)) == tokenizer_hash(chatml)


def test_tokenizer_hash_survives_saving_and_a_padded_call(tmp_path: Path, backend: Tokenizer) -> None:
    tokenizer = chat(backend, CHATML)
    before = tokenizer_hash(tokenizer)
    tokenizer(["a", "the answer"], padding=True, truncation=True, max_length=3)
    assert tokenizer.backend_tokenizer.padding is not None
    assert tokenizer_hash(tokenizer) == before
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert (tokenizer_hash(loaded), template_hash(loaded)) == (before, template_hash(tokenizer))


def test_tokenizer_hash_sees_a_new_token_and_another_end_token(backend: Tokenizer) -> None:
    tokenizer = chat(backend, CHATML)
    before = tokenizer_hash(tokenizer)
    assert tokenizer_hash(chat(backend, CHATML, eos_token="<|endoftext|>")) != before
    tokenizer.add_tokens(["brand-new"])
    assert tokenizer_hash(tokenizer) != before
