"""How a completion is asked of a server, and read from its answer: one wire for each way of saying it.

With the target's tokenizer at hand the prompt goes out as token ids, so that the template is exactly ours: to
`/v1/completions`, or to llama-server's own `/completion`, which gives token ids back. Without it the messages
go to `/v1/chat/completions`, and the server's template is used. All sampling settings are spelt out, those
that are off too: servers have defaults of their own (vLLM takes the model's generation config, llama-server a
min-p of 0.05), and an answer must follow the law that the row says.

Token ids come back from vLLM (`return_token_ids`) and from llama-server; other servers give text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from deepspec.answers.file import Settings
from deepspec.answers.pool import Call, Endpoint, Garbled, Greeter, Pool, Refused
from deepspec.errors import UserError, nearest

LLAMA_SERVER = "llamacpp"
"""What llama-server calls itself in /v1/models; vLLM and SGLang say `vllm` and `sglang`."""
SEEDS = 2**31
"""Servers take seeds of 32 bits, some of them signed."""
SPECIMEN = "Anna's 12 apples cost 3.50 each.\n\ndef total(n):\n    return n * 3.5  # naïve\n"


class Reply(NamedTuple):
    """A server's answer. ids: its token ids, a stop token included, or None where the server gives none;
    finished: ended by itself rather than at the budget; tokens: how many, as the server counts."""

    text: str
    ids: list[int] | None
    finished: bool
    tokens: int


def completion(
    endpoint: Endpoint,
    now: Settings,
    seed: int,
    messages: Sequence[Any],
    prompt: Sequence[int] | None,
    tools: object = None,
) -> Call[Reply]:
    """The request for one answer to this server, from the prompt's ids where given, else the messages.

    Raises Refused for a prompt that leaves no room for an answer, where the server has said how long a
    sequence it takes (vLLM rejects what could become longer, llama-server stops there by itself).
    """
    llama = endpoint.facts["engine"] == LLAMA_SERVER
    s, limit, budget = now.sampling, endpoint.facts.get("max_length"), now.max_new_tokens
    if prompt is not None and limit is not None:
        budget = min(budget, limit - len(prompt))
        if budget < 1:
            raise Refused(f"the prompt is {len(prompt)} tokens, and the server takes {limit} with the answer")
    body: dict[str, Any] = {
        "model": endpoint.facts["model"],
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
    body |= {"messages": list(messages), "chat_template_kwargs": {"enable_thinking": now.thinking}}
    body |= {"reasoning_format": "none"} if llama else {}
    body |= {"tools": tools} if tools else {}
    return Call("/v1/chat/completions", body, read_chat)


def read_llama(found: Any) -> Reply:
    """llama-server's own form."""
    text, ids = _field(found, "content", str), _ids(_field(found, "tokens", list))
    kind = _field(found, "stop_type", str)
    if kind not in ("eos", "word", "limit"):
        raise Garbled(f"stop_type is {kind!r}")
    return Reply(text, ids, kind != "limit", len(ids or ()))


def read_completion(found: Any) -> Reply:
    """The OpenAI form of a plain completion."""
    choice = _choice(found)
    return _reply(found, choice, _field(choice, "text", str))


def read_chat(found: Any) -> Reply:
    """The OpenAI form of a chat completion. Raises UserError where the server has taken the answer apart."""
    choice = _choice(found)
    message = _field(choice, "message", dict)
    whole = choice.get("token_ids") is not None
    for part in ("reasoning_content", "reasoning", "tool_calls"):
        if message.get(part) and not whole:
            raise UserError(
                f"the server takes answers apart ({part} beside the content): what the model wrote is not "
                "to be had exactly",
                next_step="give --target, whose template and token ids are then used, or start the server "
                "without a reasoning parser and a tool-call parser",
            )
    return _reply(found, choice, message.get("content") or "")


def greeter(model: str | None, tokenizer: Any) -> Greeter:
    """Finds out which engine a server is, and that it serves the model: the one named, or the first seen.

    With a tokenizer (the target's), also that the server splits text as the target does: ids mean nothing to
    another model.
    """
    chosen = model

    async def greet(pool: Pool, endpoint: Endpoint) -> None:
        nonlocal chosen
        limit = pool.policy.greeting
        try:
            served = await pool.send(endpoint, Call("/v1/models", {}, _served), method="GET", timeout=limit)
        except Refused as error:
            raise UserError(
                f"this is no OpenAI-compatible server: /v1/models says {error}",
                where=endpoint.url,
                next_step="give the address that comes before /v1, such as http://127.0.0.1:8000",
            ) from error
        names = list(served)
        chosen = chosen or names[0]
        alone = served[names[0]]["engine"] == LLAMA_SERVER and len(names) == 1 and model is not None
        if chosen not in served and not alone:  # llama-server answers with what it has, whatever it is called
            near = nearest(chosen, names)
            raise UserError(
                f"{chosen!r} is not served here, but {', '.join(map(repr, names[:8]))}",
                where=endpoint.url,
                next_step=f"give --model {near or names[0]}" if model else "give --model NAME",
            )
        name = chosen if chosen in served else names[0]
        endpoint.facts = {"model": name, **served[name]}
        if tokenizer is not None:
            await _same_tokens(pool, endpoint, tokenizer)

    return greet


async def _same_tokens(pool: Pool, endpoint: Endpoint, tokenizer: Any) -> None:
    """Raise UserError where the server says how it splits a text, and it is not how the target does."""
    body = {"model": endpoint.facts["model"], "content": SPECIMEN, "prompt": SPECIMEN}
    body |= {"add_special": False, "add_special_tokens": False}
    read: Callable[[Any], list[int] | None] = lambda found: _ids(found.get("tokens"))  # noqa: E731
    try:
        theirs = await pool.send(endpoint, Call("/tokenize", body, read), timeout=pool.policy.greeting)
    except Refused:
        return  # a server without that route
    ours = list(tokenizer(SPECIMEN, add_special_tokens=False)["input_ids"])
    if theirs is not None and theirs != ours:
        raise UserError(
            f"{endpoint.facts['model']} splits text into other tokens than the target: it is another model",
            where=endpoint.url,
            next_step="give the --target that runs there, or leave --target out to use the server's template",
        )


# ── reading with care: what a server sends may be anything ────────────────────────────────────────────


def _field(found: Any, name: str, kind: type) -> Any:
    value = found.get(name) if isinstance(found, dict) else None
    if not isinstance(value, kind):
        raise Garbled(f"no {name!r}")
    return value


def _choice(found: Any) -> dict[str, Any]:
    choices = _field(found, "choices", list)
    if not choices or not isinstance(choices[0], dict):
        raise Garbled("'choices' is empty")
    return choices[0]


def _reply(found: dict[str, Any], choice: dict[str, Any], text: str) -> Reply:
    reason, ids = choice.get("finish_reason"), _ids(choice.get("token_ids"))
    if reason not in ("stop", "length", "tool_calls"):
        raise Garbled(f"finish_reason is {reason!r}")
    usage = found.get("usage")
    count = usage.get("completion_tokens") if isinstance(usage, dict) else None
    tokens = len(ids) if ids is not None else count if isinstance(count, int) else 0
    return Reply(text, ids, reason != "length", tokens)


def _ids(value: Any) -> list[int] | None:
    if value is None:
        return None
    if not isinstance(value, list) or any(type(token) is not int or token < 0 for token in value):
        raise Garbled("token ids are not a list of numbers")
    return value


def _served(found: Any) -> dict[str, dict[str, Any]]:
    """{model: its engine and the longest sequence, where told} of /v1/models."""
    served = {
        m["id"]: {"engine": str(m.get("owned_by")), "max_length": m.get("max_model_len")}
        for m in _field(found, "data", list)
        if isinstance(m, dict) and "id" in m
    }
    if not served:
        raise Garbled("no model is listed")
    return served
