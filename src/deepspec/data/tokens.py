"""From conversations to token ids and loss masks, through the target's own chat template.

A draft must learn what the target *saw and produced*, so the supervised tokens are built, never searched for:

    sequence = generation prompt  +  answer  +  end of turn
    mask     = 0 …                   1 …        1 …

* The generation prompt is the template over everything before the answer with ``add_generation_prompt=True``:
  the very ids a server would feed the target. Rendering the finished conversation instead would be wrong
  where the two differ; Qwen3's, for one, writes the empty think block of non-thinking mode into the
  generation prompt and leaves it out of the history.
* The answer is its text, tokenised alone, or ``meta["answer_ids"]`` verbatim: the ids as the target produced
  them, with its end-of-turn token if it wrote one, and without if it was cut. Tokenising the text again may
  split it otherwise than the target did.
* The end of turn is what the template writes after an assistant's text up to and including the first special
  token (``<|im_end|>``, not the newline after it, which the target never produces).

Several assistant turns: the sequence is built for the last one. An earlier turn is supervised exactly if the
last one's prompt begins, id for id, with the sequence that would be built for that earlier turn alone; where
the template has rewritten it (thoughts or think blocks stripped), it is context only.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from deepspec.data.conversations import Conversation, Message, answer_ids, last_answer
from deepspec.errors import DataError, TargetError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Encoded:
    """One training sequence. ``loss_mask[i]`` is 1 exactly where the target produced ``ids[i]``."""

    ids: list[int]
    loss_mask: list[int]
    id: str


# Rendered in an answer's place to see what the template writes after it: no white space that a template would
# strip, no markup that it would interpret.
_STAND_IN = "DEEPSPEC-ANSWER-ENDS-HERE"


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    thinking: bool,
    *,
    where: str | None = None,
) -> list[int]:
    """The ids that the target is given before it answers ``messages``.

    ``thinking`` goes to the template as ``enable_thinking``, always: templates disagree on what leaving it
    out means. Raises TargetError without a chat template, DataError (naming ``where``) when the template
    refuses the messages.
    """
    return _ids(tokenizer, _render(tokenizer, messages, thinking, where, add_generation_prompt=True))


def encode(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, thinking: bool, max_length: int
) -> Encoded:
    """Ids and loss mask of one conversation (module docstring); the first ``max_length`` tokens are kept.

    Messages after the last assistant turn are left out: nothing answers them. Raises DataError, naming the
    row, when there is no assistant turn, when the last answer is empty, when one contains the end-of-turn
    token, when the template refuses the messages, and when nothing supervised is left after the cut;
    TargetError when the chat template is missing or loses the answers.
    """
    last, where = last_answer(conversation), conversation.where
    prompt = prompt_ids(tokenizer, conversation.messages[:last], thinking, where=where)
    answer = answer_ids(conversation)
    if answer is None:
        answer = _answer(tokenizer, conversation, last, thinking)
    if not answer:
        raise _empty(where)
    mask = [0] * len(prompt)
    for i, message in enumerate(conversation.messages[:last]):
        if message["role"] == "assistant" and message["content"]:
            before = prompt_ids(tokenizer, conversation.messages[:i], thinking, where=where)
            placed = before + _answer(tokenizer, conversation, i, thinking)
            if prompt[: len(placed)] == placed:
                mask[len(before) : len(placed)] = [1] * (len(placed) - len(before))
    mask = (mask + [1] * len(answer))[:max_length]
    if not any(mask):
        raise DataError(
            f"all-zero loss mask: truncated before the answer (the prompt is {len(prompt)} tokens, "
            f"max_length is {max_length})",
            where=where,
            next_step=f"raise max_length above {len(prompt)}, or remove the row",
        )
    return Encoded(ids=(prompt + answer)[:max_length], loss_mask=mask, id=conversation.id)


def template_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 (hex) of the chat template's text. Raises TargetError where there is none."""
    return hashlib.sha256(_template(tokenizer).encode("utf-8")).hexdigest()


def system_hash(messages: Sequence[Message]) -> str | None:
    """SHA-256 (hex) of a conversation's system prompt; None without one."""
    first = messages[0] if messages else None
    if first is None or first["role"] != "system":
        return None
    return hashlib.sha256(first["content"].encode("utf-8")).hexdigest()


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 (hex) of what decides how text becomes ids: vocabulary, merges, splitting, special tokens.

    The chat template is not part of it (see ``template_hash``), nor are the padding and truncation that a
    call may have left switched on.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        state = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    else:
        state = json.loads(backend.to_str())
        state.pop("padding", None)
        state.pop("truncation", None)
    state["special"] = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode("utf-8")).hexdigest()


def _template(tokenizer: PreTrainedTokenizerBase) -> str:
    if not tokenizer.chat_template:
        raise TargetError(
            "the target's tokenizer has no chat template",
            where=str(getattr(tokenizer, "name_or_path", "")) or None,
            next_step="use the chat (instruct) version of the model, or put a chat_template.jinja beside its "
            "tokenizer files: a draft must be trained on prompts built as they will be served",
        )
    text: str = tokenizer.get_chat_template()
    return text


def _render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    thinking: bool,
    where: str | None,
    *,
    add_generation_prompt: bool,
) -> str:
    _template(tokenizer)
    try:
        text: str = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            enable_thinking=thinking,
        )
    except TemplateError as error:
        raise DataError(
            f"the target's chat template refuses the messages: {error}",
            where=where,
            next_step="change the row to what the target accepts (some know no system or tool role), "
            "or remove it",
        ) from error
    return text


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    # The template has written every special token that belongs there: the tokenizer must add none.
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _answer(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, index: int, thinking: bool
) -> list[int]:
    """Ids of the assistant turn at ``index``, its end of turn included."""
    text = conversation.messages[index]["content"]
    if not text:
        raise _empty(conversation.where)
    end = _end_of_turn(tokenizer, conversation.messages[:index], thinking, conversation.where)
    ids = _ids(tokenizer, text)
    if end and end[-1] in ids:
        raise DataError(
            f"the answer contains the end-of-turn token {tokenizer.decode(end[-1:])!r}, where the target "
            "would have stopped",
            where=conversation.where,
            next_step="cut the answer's text before it: the end of turn is added here",
        )
    return ids + end


def _end_of_turn(
    tokenizer: PreTrainedTokenizerBase, before: Sequence[Message], thinking: bool, where: str
) -> list[int]:
    """What the template writes after an answer, up to and including the first special token; [] if none."""
    stand_in = Message(role="assistant", content=_STAND_IN)
    rendered = _render(tokenizer, [*before, stand_in], thinking, where, add_generation_prompt=False)
    _, found, tail = rendered.rpartition(_STAND_IN)
    if not found:
        raise TargetError(
            "the target's chat template does not write the assistant's text as it is given",
            next_step="check the template: no answer can be placed in its prompt",
        )
    special = set(tokenizer.all_special_ids)
    special |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids = _ids(tokenizer, tail)
    first = next((i for i, token in enumerate(ids) if token in special), None)
    return [] if first is None else ids[: first + 1]


def _empty(where: str) -> DataError:
    return DataError(
        "all-zero loss mask: empty answer, there is nothing to supervise",
        where=where,
        next_step="have the target answer the prompt again, or remove the row",
    )


def frequent_ids(rows: Sequence[Encoded], size: int, always: Iterable[int], vocab_size: int) -> list[int]:
    """The `size` ids that the target produced most often in the rows, ascending; `always` are among them.

    A pure function of the rows: ties, and what is left when the rows hold fewer ids, go to the lower id.
    """
    counts = supervised_counts(rows)
    forced = set(always)
    ranked = sorted(range(vocab_size), key=lambda i: (i not in forced, -counts[i], i))
    return sorted(ranked[:size])


def supervised_counts(rows: Sequence[Encoded]) -> Counter[int]:
    """How often the target produced each id."""
    return Counter(i for row in rows for i, produced in zip(row.ids, row.loss_mask, strict=True) if produced)
