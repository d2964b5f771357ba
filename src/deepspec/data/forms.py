"""What OpenAI-compatible clients and servers write, made into the documented row of `data.conversations`.

A request log pairs what was asked with what was answered::

    {"request": {"model": "…", "messages": […], "temperature": 0.7}, "response": {"id": "…", "choices": […]}}

``body`` may stand for ``request``, and either side may be wrapped once more in ``body``, as batch files do.
The first choice becomes the last message. A request that got no answer (no response, an error, a status other
than 200) is a prompt: the target can answer it later. What else was asked and answered goes to ``meta``.

A ``developer`` is a ``system``. Anything else is for the schema (`data.messages`) to accept or refuse.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deepspec.errors import DataError

_PLAIN_FORMS = ("messages", "conversations", "turns", "prompt")
_ID_KEYS = ("id", "custom_id", "request_id")


def openai_row(row: Mapping[str, Any], where: str | None) -> Mapping[str, Any]:
    """`row` with its request log, or its messages, in the documented form; any other row as it is.

    Raises DataError for a log line whose request or response is of another kind than chat.
    """
    key = next((key for key in ("request", "body") if isinstance(row.get(key), Mapping)), None)
    if key and not any(row.get(form) is not None for form in _PLAIN_FORMS):
        return _from_log(row, key, where)
    if isinstance(row.get("messages"), list):
        return {**row, "messages": [_message(m) for m in row["messages"]]}
    return row


def _from_log(row: Mapping[str, Any], key: str, where: str | None) -> dict[str, Any]:
    request = _unwrapped(row[key], "messages")
    if not isinstance(request.get("messages"), list):
        what = f"'{key}' has no list of 'messages'"
        if "prompt" in request:
            what += "; it holds the 'prompt' of a text completion, which a template has already been through"
        raise DataError(what, where=where, next_step="log requests to /v1/chat/completions")
    response = row.get("response")
    if response is not None and not isinstance(response, Mapping):
        raise DataError(
            "'response' must be an object with 'choices'",
            where=where,
            next_step="log a streamed answer as the one whole response that its parts add up to",
        )
    response = _unwrapped(response or {}, "choices")
    messages = [_message(m) for m in request["messages"]]
    answer, reason = _answer(row, response, where)
    meta: dict[str, Any] = {"request": {k: v for k, v in request.items() if k not in ("messages", "tools")}}
    if answer is not None:
        messages.append(answer)
        meta["finished"] = reason != "length"
    if rest := {k: v for k, v in response.items() if k != "choices" and v is not None}:
        meta["response"] = rest
    known = (*_ID_KEYS, key, "response", "domain", "meta")
    meta |= {k: v for k, v in row.items() if k not in known and v is not None}
    given = row.get("meta")
    identity = next((row[k] for k in _ID_KEYS if row.get(k) is not None), response.get("id"))
    return {
        "id": None if identity is None else str(identity),
        "domain": row.get("domain"),
        "messages": messages,
        "meta": meta if given is None else {**meta, **given} if isinstance(given, Mapping) else given,
        **({"tools": request["tools"]} if request.get("tools") else {}),
    }


def _unwrapped(value: Mapping[str, Any], wanted: str) -> Mapping[str, Any]:
    inner = value.get("body")
    return inner if wanted not in value and isinstance(inner, Mapping) else value


def _answer(
    row: Mapping[str, Any], response: Mapping[str, Any], where: str | None
) -> tuple[dict[str, Any] | None, str | None]:
    """The first choice's message, and why it ended; None where the request failed or said nothing."""
    outer = row.get("response") or {}
    failed = any(part.get("error") for part in (row, outer, response)) or outer.get("status_code", 200) != 200
    if not response or failed:
        return None, None
    choices = response.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(first, Mapping) or not isinstance(first.get("message"), Mapping):
        raise DataError(
            "'response' has no 'choices' with a 'message'",
            where=where,
            next_step="log a streamed answer as the one whole response that its parts add up to",
        )
    message = _message({"role": "assistant", **first["message"]})
    if "reasoning" in message:  # newer servers' name of the same thing
        message.setdefault("reasoning_content", message.pop("reasoning"))
    says = message.get("content") or message.get("tool_calls")
    return (message if says else None), first.get("finish_reason")


def _message(message: Any) -> Any:
    """One message with the roles of the schema, which does the rest; what is no object is left to it."""
    if isinstance(message, Mapping) and message.get("role") == "developer":
        return {**message, "role": "system"}
    return message
