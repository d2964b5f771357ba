"""What a target's chat template is: which of several is taken, its switch for thinking, what it writes for
messages, what it may raise, and what it leaves out (docs/masks.md).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, TemplateError, TemplateSyntaxError

from deepspec.conditions import SWITCHES, Conditions
from deepspec.data.messages import Message, call_arguments
from deepspec.errors import DataError, TargetError
from deepspec.log import note

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TODAY = datetime(2025, 1, 1)
"""The day on which every template is rendered. Prompts, and with them training data, results and the answers
of a resumed run, must not depend on the day on which they are made."""
_DATE = "strftime_now"
_CODES = [(f"%{c}", TODAY.strftime(f"%{c}")) for c in "aAbBcdefhjmpuwxyzCDFGHIMRSTUVWXYZ"]
_CODES += [(f"%-{c}", TODAY.strftime(f"%{c}").lstrip(" 0") or "0") for c in "demyHIMSj"]
# `strftime_now` is a function that transformers gives to templates: a macro of that name takes its place.
_FIXED_DATE = (
    "{%- macro strftime_now(format) %}{% set said = namespace(text=format) %}"
    "{% for code, text in date_codes %}{% set said.text = said.text | replace(code, text) %}{% endfor %}"
    "{{ said.text }}{% endmacro %}\n"  # the template still begins a line, of which it may strip the indent
)


def template_text(tokenizer: PreTrainedTokenizerBase, tools: bool = False, where: str | None = None) -> str:
    """The chat template for messages without tools, or with them. Of several named templates, `tool_use` is
    for tools if it is there, and `default` for everything else.

    Raises TargetError if there is no template to use, DataError (naming `where`) if there is none for these
    messages.
    """
    found = tokenizer.chat_template
    if not found:
        raise TargetError(
            "the target's tokenizer has no chat template",
            where=_place(tokenizer),
            next_step="use the chat (instruct) version of the model, or put a chat_template.jinja next to "
            "its tokenizer files or its GGUF file: a draft must be trained on prompts built as they will be "
            "served",
        )
    if not isinstance(found, dict):
        return found
    name = "tool_use" if tools and "tool_use" in found else "default"
    if name in found:
        return found[name]
    what = f"the target has no default chat template, only {', '.join(sorted(found))}"
    step = (
        "name one of its templates 'default', or put it into chat_template.jinja next to its tokenizer files"
    )
    if "tool_use" in found:
        raise DataError(f"{what}: none is for messages without tools", where=where, next_step=step)
    raise TargetError(what, where=_place(tokenizer), next_step=step)


def _place(tokenizer: PreTrainedTokenizerBase) -> str | None:
    return str(getattr(tokenizer, "name_or_path", "")) or None


def template_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 (hex) of the chat template's text, or of all named ones if none is the default. Raises
    TargetError if there is none to use."""
    try:
        text = template_text(tokenizer)
    except DataError:
        text = json.dumps(tokenizer.chat_template, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def template_conditions(tokenizer: PreTrainedTokenizerBase, thinking: bool) -> Conditions:
    """The conditions that the template decides. Raises TargetError if there is no template to use, if it does
    not write what a user says, or if thinking is asked for and it has no switch for it."""
    with suppress(DataError):  # some templates want more than one message
        probe = Message(role="user", content=stand_in(0))
        if stand_in(0) not in Template(tokenizer, False, None, None).write([probe], ask=True):
            raise TargetError(
                "the target's chat template does not write the user's text unchanged",
                where=_place(tokenizer),
                next_step="use a template that takes messages as text: some take lists of parts only, as "
                "for images",
            )
    if thinking and not _names_of(tokenizer).intersection(SWITCHES):
        raise TargetError(
            "thinking cannot be switched on: the target's chat template has no switch for it "
            f"({', '.join(SWITCHES)})",
            where=_place(tokenizer),
            next_step="leave thinking off (no --thinking, thinking=false): the target then answers as it "
            "always does",
        )
    return Conditions(thinking, template_hash(tokenizer))


def template_date(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The date that the template writes into prompts; None if it writes none. The first call says so."""
    if _DATE not in _names_of(tokenizer):
        return None
    _say_date()
    return f"{TODAY:%Y-%m-%d}"


@cache
def _say_date() -> None:
    note(
        f"the target's chat template writes the date: it is always {TODAY:%Y-%m-%d} here, so that nothing "
        "depends on the day"
    )


def _names_of(tokenizer: PreTrainedTokenizerBase) -> frozenset[str]:
    found = tokenizer.chat_template or ""
    return frozenset[str]().union(*map(_names, found.values() if isinstance(found, dict) else [found]))


@lru_cache(maxsize=64)
def _names(text: str) -> frozenset[str]:
    """The names in a template that are not attributes, variables among them. Raises TargetError for text that
    is not a template."""
    try:
        tokens = [(kind, word) for _, kind, word in Environment().lex(text) if kind != "whitespace"]
    except TemplateSyntaxError as error:
        raise _broken(error) from error
    pairs = zip([("", ""), *tokens], tokens, strict=False)
    return frozenset(word for before, (kind, word) in pairs if kind == "name" and before[1] != ".")


def _broken(error: TemplateSyntaxError) -> TargetError:
    return TargetError(
        f"the target's chat template cannot be read: {error.message} (line {error.lineno})",
        next_step="copy or download the tokenizer's files again, or update transformers",
    )


@dataclass(frozen=True)
class Template:
    """A chat template, its tokenizer, and everything but the messages that a row's rendering depends on."""

    tokenizer: PreTrainedTokenizerBase
    thinking: bool
    tools: list[dict[str, Any]] | None
    where: str | None

    def ids(self, text: str) -> list[int]:
        """The ids of rendered text: the template has written all special tokens already."""
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def special(self) -> set[int]:
        """Tokens that the target writes as markup; the one for unknown text does not count."""
        added, tokenizer = self.tokenizer.added_tokens_decoder, self.tokenizer
        known = {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
        return known - ({tokenizer.unk_token_id} - {tokenizer.eos_token_id})

    def write(self, messages: Sequence[Message], *, ask: bool) -> str:
        """The template's text for the messages, with the generation prompt at its end if ``ask``.

        Raises DataError if it refuses the messages or fails on them, TargetError if it cannot be used at all.
        """
        text = template_text(self.tokenizer, bool(self.tools), self.where)
        variables: dict[str, Any] = dict.fromkeys(SWITCHES, self.thinking)
        if _DATE in _names(text):
            text = _FIXED_DATE + text
            variables["date_codes"] = _CODES
        try:
            return self.tokenizer.apply_chat_template(
                [as_served(message) for message in messages],
                tools=self.tools,
                chat_template=text,
                tokenize=False,
                add_generation_prompt=ask,
                **variables,
            )
        except TemplateSyntaxError as error:
            raise _broken(error) from error
        except Exception as error:  # a template is a program of its own, and may raise anything
            refused = isinstance(error, TemplateError)
            how = "refuses the messages" if refused else f"fails on the messages: {type(error).__name__}"
            raise DataError(
                f"the target's chat template {how}: {error}",
                where=self.where,
                next_step="change the row to what the target accepts (some know no system or tool role), "
                "or remove it",
            ) from error

    def check_seen(self, messages: Sequence[Message], turns: Iterable[int] | None = None) -> None:
        """Raise DataError if the target, asked with these messages, would not see one of them or a tool, or
        if thinking is on and changes nothing.

        turns: how many of the messages each answer follows, if there are several answers.
        """
        # A turn with tool calls may lose its text to them: its calls are checked instead.
        texts = [i for i, m in enumerate(messages) if m["content"].strip() and "tool_calls" not in m]
        marks = {i: stand_in(i) for i in texts}
        names = [stand_in(len(messages) + k) for k in range(len(self.tools or []))]
        twins = [Message(**{**m, "content": marks.get(i, m["content"])}) for i, m in enumerate(messages)]
        offered = [_renamed(tool, name) for tool, name in zip(self.tools or [], names, strict=True)]
        try:
            written = replace(self, tools=offered or self.tools).write(twins, ask=True)
        except DataError:
            # A template may look for something in the texts, and may cut that out of an answer.
            written = self.write(messages, ask=True)
            texts = [i for i in texts if messages[i]["role"] != "assistant"]
            marks = {i: messages[i]["content"].strip() for i in texts}
            names = [str(tool.get("function", tool).get("name")) for tool in self.tools or []]
        for i, mark in marks.items():
            if mark not in written:
                raise self.left_out(f"message {i + 1} ({messages[i]['role']})", "the message or the row")
        for k, name in enumerate(names, start=1):
            if name not in written:
                raise self.left_out(f"tool {k}", "'tools' or the row")
        ends = [len(messages)] if turns is None else turns
        if self.thinking and not any(self._switched(messages[:end]) for end in ends):
            template_conditions(self.tokenizer, thinking=True)
            raise DataError(
                "thinking changes nothing in what the target's chat template writes for this row",
                where=self.where,
                next_step="leave thinking off, or change the row: some templates switch thinking on only "
                "without a system message, or not after a tool result",
            )

    def _switched(self, messages: Sequence[Message]) -> bool:
        """Whether thinking makes a difference to the prompt."""
        off = replace(self, thinking=False)
        return self.write(messages, ask=True) != off.write(messages, ask=True)

    def left_out(self, what: str, remove: str) -> DataError:
        return DataError(
            f"the target's chat template leaves out {what}",
            where=self.where,
            next_step=f"remove {remove}: the target would never see this part",
        )


def stand_in(number: int) -> str:
    """A stand-in for text number n. No stand-in is part of another, and any change of case can be seen."""
    return f"DeepSpec-text-{number}-here"


def _renamed(tool: dict[str, Any], name: str) -> dict[str, Any]:
    if "function" in tool:
        return {**tool, "function": {**tool["function"], "name": name}}
    return {**tool, "name": name}


def as_served(message: Message) -> dict[str, Any]:
    """A message as servers give it to the template: arguments as an object, thoughts under both names."""
    served: dict[str, Any] = {key: value for key, value in message.items() if key != "weight"}
    if "reasoning_content" in message:
        served["thinking"] = message["reasoning_content"]  # gpt-oss's name for it
    if "tool_calls" in message:
        served["tool_calls"] = []
        for call in message["tool_calls"]:
            arguments = call_arguments(call["function"]["arguments"])
            served["tool_calls"].append({**call, "function": {**call["function"], "arguments": arguments}})
    return served


def continued(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], skip_special: bool = False) -> str:
    """The text of ids that follow others. Decoded alone, many tokenizers' ids lose their first space."""
    before = tokenizer(":", add_special_tokens=False)["input_ids"]
    start = decoded(tokenizer, before, skip_special)
    whole = decoded(tokenizer, [*before, *ids], skip_special)
    return whole.removeprefix(start) if whole.startswith(start) else decoded(tokenizer, ids, skip_special)


def decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], skip_special: bool = False) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=skip_special, clean_up_tokenization_spaces=False)
