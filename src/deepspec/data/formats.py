"""The formats in which conversations are published and logged, brought into one: messages and meta.

The formats are those of `data.schema.ROWS`, and the request log of an OpenAI-compatible server. A request
without an answer (no response, an error, a status other than 200) is a prompt, which the target can answer
later. Everything else that was logged goes to `meta`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deepspec.data.catalogue import DATASETS
from deepspec.data.messages import Message, check_order
from deepspec.data.prompt_columns import ALPACA, ASKED, SYSTEM, UNREAD, is_empty, read_columns, refuse_unsaid
from deepspec.data.readers import EXAMPLE, one_object_a_line
from deepspec.data.schema import ROWS, checked, kind_of, names_of
from deepspec.errors import DataError, nearest

_ID_KEYS = ("id", "custom_id", "request_id")
WITH_INPUT = DATASETS["alpaca"].variant[1]
"""How Alpaca's two columns become one prompt."""
REASONS = ("finish_reason", "done_reason", "stop_type", "stop_reason", "matched_stop")
"""Where servers tell why an answer ended."""
_ENDS = ("stop", "eos", "eos_token", "end_turn", "tool_calls", "tool_use", "function_call")
_WHOLE = "log a streamed answer as the one whole response that its parts add up to"


def parsed_row(row: object, where: str | None) -> tuple[dict[str, Any], tuple[Message, ...]]:
    """A row's fields (id, domain, meta and all that belongs into meta) and its messages, both checked.

    Raises DataError, naming `where`, if the row has no known format or does not keep to it.
    """
    if not isinstance(row, dict):
        raise DataError(
            f"expected a JSON object, found {kind_of(row)}",
            where=where,
            next_step=one_object_a_line(isinstance(row, list)),
        )
    name, log = next((name for name in ROWS if row.get(name) is not None), None), None
    if name in (None, "instruction"):
        key = next((k for k in ("request", "body") if isinstance(row.get(k), dict)), None)
        if key is not None:
            log, row, name = row, _from_log(row, key, where), "messages"
    if name is None:
        raise _no_messages(row, where)
    fields = checked(ROWS[name], row, where)
    value = fields.pop(name)
    if name in ("prompt", "instruction"):
        answer = fields.pop("output", None) if name == "instruction" else None
        if name == "instruction" and not is_empty(fields.get("input")):
            value = WITH_INPUT.format(instruction=value, input=fields.pop("input"))
        messages = [Message(role="user", content=value)]
        answer = fields.pop("response", None) if answer is None else answer
        if answer is not None:
            messages.append(Message(role="assistant", content=answer))
    elif name == "turns":
        # The later questions make sense only after answers that do not exist yet.
        messages = [Message(role="user", content=value[0])]
        if value[1:]:
            fields["follow_ups"] = value[1:]
    else:
        messages = value
    check_order(messages, where)
    whole = read_columns(fields, tuple(messages), where)
    if name == "instruction":
        refuse_unsaid(fields, ALPACA, whole, where)
    if log is not None:  # columns next to the request
        refuse_unsaid(log, (*SYSTEM, "functions", *UNREAD), whole, where)
    return fields, whole


def _no_messages(row: Mapping[str, Any], where: str | None) -> DataError:
    names = (*ROWS, "request")
    if null := next((name for name in names if name in row and row[name] is None), None):
        return DataError(f"'{null}' is null", where=where, next_step=f"expected: {EXAMPLE}")
    close = next((f"'{key}': did you mean '{near}'?" for key in row if (near := nearest(key, names))), None)
    return DataError(
        f"no 'messages' (nor {names_of(names[1:])}); found {close or names_of(row) or 'an empty object'}",
        where=where,
        next_step=f"expected: {EXAMPLE}",
    )


def _from_log(row: Mapping[str, Any], key: str, where: str | None) -> dict[str, Any]:
    """The logged request and its answer as a row with 'messages'."""
    request = _unwrapped(row[key], "messages")
    if not isinstance(request.get("messages"), list):
        what = f"'{key}' has no list of 'messages'"
        if "prompt" in request:
            what += "; its 'prompt' is a text completion's, to which a chat template was already applied"
        raise DataError(what, where=where, next_step="log requests to /v1/chat/completions")
    response = row.get("response")
    if response is not None and not isinstance(response, Mapping):
        raise DataError("'response' must be an object with 'choices'", where=where, next_step=_WHOLE)
    response = _unwrapped(response or {}, "choices")
    answer, whole = _answer(row, response, where)
    asked = {k: request[k] for k in ASKED if not is_empty(request.get(k))}
    kept = {k: v for k, v in request.items() if k not in ("messages", "tools", *asked)}
    meta: dict[str, Any] = {"request": kept}
    if answer is not None:
        meta["finished"] = whole
        earlier = sum(isinstance(m, Mapping) and m.get("role") == "assistant" for m in request["messages"])
        if earlier and not whole:
            meta["cut_turns"] = [earlier + 1]
    if rest := {k: v for k, v in response.items() if k != "choices" and v is not None}:
        meta["response"] = rest
    known = (*_ID_KEYS, key, "response", "domain", "meta")
    meta |= {k: v for k, v in row.items() if k not in known and v is not None}
    given = row.get("meta")
    identity = next((row[k] for k in _ID_KEYS if row.get(k) is not None), response.get("id"))
    return {
        "id": None if identity is None else str(identity),
        "domain": row.get("domain"),
        "messages": request["messages"] if answer is None else [*request["messages"], answer],
        "meta": meta if given is None else {**meta, **given} if isinstance(given, Mapping) else given,
        **asked,
    }


def _unwrapped(value: Mapping[str, Any], wanted: str) -> Mapping[str, Any]:
    inner = value.get("body")
    return inner if wanted not in value and isinstance(inner, Mapping) else value


def _answer(
    row: Mapping[str, Any], response: Mapping[str, Any], where: str | None
) -> tuple[dict[str, Any] | None, bool]:
    """The first choice's message, and whether it ended by itself; no message if the request failed or the
    answer is empty."""
    outer = row.get("response") or {}
    failed = any(part.get("error") for part in (row, outer, response))
    if failed or not response or str(outer.get("status_code", 200)) != "200":
        return None, False
    choices = response.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(first, Mapping) or not isinstance(first.get("message"), Mapping):
        raise DataError("'response' has no 'choices' with a 'message'", where=where, next_step=_WHOLE)
    message = {"role": "assistant", **first["message"]}
    if "reasoning" in message:  # the name that newer servers give to reasoning_content
        message.setdefault("reasoning_content", message.pop("reasoning"))
    empty = not (message.get("content") or message.get("tool_calls"))
    return (None if empty else message), ended(first)


def ended(facts: Mapping[str, Any]) -> bool:
    """Whether an answer about which a server told these facts ended by itself.

    It did not if a budget, a filter or a stop string cut it, or if no reason is given where one belongs: the
    target may not have written an end of turn there.
    """
    if str(facts.get("finish_reason", "stop")).lower() not in _ENDS:
        return False
    # Some servers name the stop string here, or the id of the stop token.
    reasons = (facts.get(name) for name in REASONS)
    return all(reason.lower() in _ENDS for reason in reasons if isinstance(reason, str))
