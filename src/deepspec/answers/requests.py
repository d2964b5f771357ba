"""How a server is asked for one answer, and how the answer is read.

With the target's tokenizer, the prompt is sent as token ids, so that the template is exactly the target's: to
`/v1/completions`, or to llama-server's own `/completion`, which gives token ids back. Without the tokenizer
the messages are sent to `/v1/chat/completions`, and the server's template is used. Every sampling setting is
sent, also those that are off: servers have defaults of their own (vLLM takes the model's generation config,
llama-server a min-p of 0.05), and an answer must follow the distribution that its row states.

vLLM (`return_token_ids`) and llama-server give token ids back; other servers give text.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from deepspec.answers.file import Settings
from deepspec.conditions import SWITCHES
from deepspec.errors import ServerError, nearest
from deepspec.http_client import CHECK_TIMEOUT, Listed, NoList, Passing, Refused, Server, Servers, Unanswered
from deepspec.log import warn

LLAMA_SERVER = "llamacpp"
"""What llama-server calls itself in /v1/models; vLLM and SGLang say `vllm` and `sglang`."""
SEEDS = 2**31
"""Servers take seeds of 32 bits, some of them signed."""
IDS = 2**31
"""Token ids are below this; a tokenizer fails at larger numbers."""
TOKENIZING = threading.Lock()
"""Held by the thread that uses a tokenizer: one of transformers may fail if two threads use it at once."""
SPECIMEN = "Anna's 12 apples cost 3.50 each.\n\ndef total(n):\n    return n * 3.5  # naïve\n"


class Reply(NamedTuple):
    """A server's answer. ids: its token ids, a stop token included, or None if the server gives none;
    finished: it ended by itself, not at the budget; tokens: how many there are, as the server counts."""

    text: str
    ids: list[int] | None
    finished: bool
    tokens: int


class Call(NamedTuple):
    """A request: POST `body` to `path`; `read` makes a Reply of the answer. It raises Passing if it
    cannot."""

    path: str
    body: dict[str, Any]
    read: Callable[[dict[str, Any]], Reply]


class Served(NamedTuple):
    """What a check finds out about a server. max_length: of a sequence in tokens, if the server says so."""

    model: str
    engine: str
    max_length: int | None = None


def check_model(
    servers: Servers, server: Server, model: str | None, tokenizer: Any, *, asked_for: bool
) -> Served:
    """Find out which engine a server is, and that it serves the model (None: the first that it lists).

    asked_for: the user named the model, so that a llama-server with a single model may call it otherwise.
    With a tokenizer (the target's), the server must split a text as it does: ids mean nothing to another
    model. A server that shows no list, or cannot be compared, gives a warning: a gateway may forbid these
    routes and let questions through. Raises Passing, and ServerError for a server that is the wrong one.
    """
    first = server.facts is None
    try:
        listed = servers.models(server)
    except (Refused, NoList) as error:
        if model is None:
            step = f"{error.next_step}; if only /v1/models is closed, give --model NAME"
            raise type(error)(error.what, where=error.where, next_step=step) from error
        if first:
            warn(f"{server.name} does not list its models ({error.what}); it is asked for {model!r}")
        listed = {model: Listed("unknown", None)}
    names = list(listed)
    name = model or names[0]
    if asked_for and len(names) == 1 and listed[names[0]].engine == LLAMA_SERVER:
        name = names[0]
    if name not in listed:
        raise ServerError(
            f"{name!r} is not served here; this server has {', '.join(map(repr, names[:8]))}",
            where=server.name,
            next_step=f"give --model {nearest(name, names) or names[0]}"
            if asked_for
            else "give --model NAME",
        )
    trouble = _check_tokens(servers, server, name, tokenizer) if tokenizer is not None else None
    if trouble and first:
        warn(f"{server.name}: its tokenizer could not be compared with the target's ({trouble})")
    return Served(name, *listed[name])


def _check_tokens(servers: Servers, server: Server, model: str, tokenizer: Any) -> str | None:
    """Raise ServerError if the server splits a text into other tokens than the target does.

    Returns why that could not be found out, if so: many servers, and gateways, have no such route.
    """
    body = {"model": model, "content": SPECIMEN, "prompt": SPECIMEN, "add_special": False}
    body["add_special_tokens"] = False
    try:
        theirs = _ids(servers.send(server, "/tokenize", body, CHECK_TIMEOUT).get("tokens"))
    except (Unanswered, Refused) as error:
        return str(error.args[0])
    except Passing as trouble:
        if not trouble.costs:
            raise  # no connection, or busy
        return str(trouble)
    if theirs is None:
        return "/tokenize answers without tokens"
    with TOKENIZING:
        ours = list(tokenizer(SPECIMEN, add_special_tokens=False)["input_ids"])
    if theirs != ours:
        raise ServerError(
            f"{model} splits text into other tokens than the target, so it is another model",
            where=server.name,
            next_step="give the --target that runs there, or leave --target out to use the server's template",
        )
    return None


def completion(
    served: Served,
    now: Settings,
    seed: int,
    messages: Sequence[Any],
    prompt: Sequence[int] | None,
    tools: object = None,
) -> Call:
    """The request for one answer, from the prompt's token ids if they are given, else from the messages.

    Raises Unanswered for a prompt that leaves no room for an answer, if the server told its longest sequence
    (vLLM refuses what could become longer; llama-server stops there by itself).
    """
    llama = served.engine == LLAMA_SERVER
    s, limit, budget = now.sampling, served.max_length, now.max_new_tokens
    if prompt is not None and limit is not None:
        budget = min(budget, limit - len(prompt))
        if budget < 1:
            raise Unanswered(
                f"the prompt is {len(prompt)} tokens, and the server takes {limit} with the answer"
            )
    body: dict[str, Any] = {
        "model": served.model,
        "temperature": s.temperature,
        "top_p": s.top_p,
        "top_k": s.top_k or (0 if llama else -1),
        "min_p": 0.0,
        "seed": seed % SEEDS,
    }
    if llama:
        body |= {"samplers": ["temperature", "top_k", "top_p"], "n_predict": budget}
    else:
        body |= {"repetition_penalty": 1.0, "return_token_ids": True, "max_tokens": budget}
    if prompt is not None and llama:
        return Call("/completion", body | {"prompt": list(prompt), "return_tokens": True}, read_llama)
    if prompt is not None:
        body |= {"prompt": list(prompt), "add_special_tokens": False}
        return Call("/v1/completions", body, read_completion)
    body |= {"messages": list(messages), "chat_template_kwargs": dict.fromkeys(SWITCHES, now.thinking)}
    body |= {"reasoning_format": "none"} if llama else {}
    body |= {"tools": tools} if tools else {}
    return Call("/v1/chat/completions", body, read_chat)


def read_llama(found: dict[str, Any]) -> Reply:
    """Read llama-server's own format."""
    text, ids = _text(found.get("content")), _ids(found.get("tokens"))
    kind = _field(found, "stop_type", str)
    if kind not in ("eos", "word", "limit"):
        raise Passing(f"garbled answer: stop_type is {kind!r}")
    return Reply(text, ids, kind != "limit", _count(ids, found.get("tokens_predicted")))


def read_completion(found: dict[str, Any]) -> Reply:
    """Read an OpenAI completion."""
    choice = _choice(found)
    return _reply(found, choice, _text(choice.get("text")))


def read_chat(found: dict[str, Any]) -> Reply:
    """Read an OpenAI chat completion. Raises Unanswered if the server has taken the answer apart."""
    choice = _choice(found)
    message = _field(choice, "message", dict)
    whole = bool(choice.get("token_ids"))
    content = message.get("content") or ""
    parts = [name for name in ("reasoning_content", "reasoning", "tool_calls") if message.get(name)]
    if isinstance(content, list):
        kinds = [part.get("type", "text") for part in content if isinstance(part, dict)]
        parts += [f"a part of type {kind!r}" for kind in kinds if kind not in ("text", "output_text")]
        content = [part for part in content if not isinstance(part, dict) or "text" in part]
    if parts and not whole:
        raise Unanswered(
            f"the server takes answers apart ({parts[0]} next to the content), so what the model wrote is "
            "unknown: give --target, whose template and token ids are then used, or start the server without "
            "a reasoning parser and a tool-call parser"
        )
    return _reply(found, choice, _text(content))


def _text(value: Any) -> str:
    """A text, or the parts of one, in which the halves of each surrogate pair are joined."""
    parts = value if isinstance(value, list) else [value]
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    found = [text for text in texts if isinstance(text, str)]
    if len(found) < len(texts):
        raise Passing("garbled answer: no text")
    return "".join(found).encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")


def no_answer(text: str, ids: list[int] | None) -> str | None:
    """Why an answer of a server cannot be trained on; None if it can."""
    if not ids and not text.strip():
        return "the server gave an empty answer"
    if any("\ud800" <= c <= "\udfff" for c in text):
        return "the server's answer holds half of a surrogate pair, which is not text"
    return None


def _field(found: Any, name: str, kind: type) -> Any:
    value = found.get(name) if isinstance(found, dict) else None
    if not isinstance(value, kind):
        raise Passing(f"garbled answer: no {name!r}")
    return value


def _choice(found: Any) -> dict[str, Any]:
    choices = _field(found, "choices", list)
    if not choices or not isinstance(choices[0], dict):
        raise Passing("garbled answer: 'choices' is empty")
    return choices[0]


def _reply(found: dict[str, Any], choice: dict[str, Any], text: str) -> Reply:
    reason, ids = choice.get("finish_reason"), _ids(choice.get("token_ids"))
    if reason not in ("stop", "length", "tool_calls"):
        raise Passing(f"garbled answer: finish_reason is {reason!r}")
    usage = found.get("usage")
    told = usage.get("completion_tokens") if isinstance(usage, dict) else None
    return Reply(text, ids, reason != "length", _count(ids, told))


def _count(ids: list[int] | None, told: Any) -> int:
    """The tokens of an answer; 0 if neither ids nor a number are given."""
    if ids is not None:
        return len(ids)
    return told if type(told) is int and told > 0 else 0


def _ids(value: Any) -> list[int] | None:
    """Token ids, or None if the server gives none: some give an empty list then."""
    if value is None or value == []:
        return None
    if not isinstance(value, list) or any(type(token) is not int or not 0 <= token < IDS for token in value):
        raise Passing("garbled answer: token ids are not a list of numbers")
    return value
