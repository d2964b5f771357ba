"""Answers by the target through inference servers.

Rows are written as their answers arrive, so their order depends on the servers; each id is answered once.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from operator import length_hint
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from deepspec.answers.dialogue import Dialogue
from deepspec.answers.file import AnswerFile, Settings, Tally, beside, each_once
from deepspec.answers.requests import TOKENIZING, Reply, Served, check_model, completion, no_answer
from deepspec.connections import API_KEY
from deepspec.data.conversations import Conversation, tools_of
from deepspec.data.identity import row_seed
from deepspec.data.template import template_conditions, template_date
from deepspec.data.tokens import check_embedded, require_tokenizer
from deepspec.errors import DataError, UserError
from deepspec.files import check_conditions
from deepspec.http_client import Exhausted, Policy, Server, Servers, Unanswered
from deepspec.log import Bar, progress, warn
from deepspec.maths.verify import Sampling

if TYPE_CHECKING:
    from deepspec.targets import TargetSpec

SYNC_EVERY = 1.0
"""Seconds: a power cut loses the answers of at most that long, a killed process none."""
MARK_EVERY = 30.0
"""Seconds between lines of the timings file."""
HOPELESS = 32
"""The run ends if so many rows fail before any is answered, or in a row at servers that fail every attempt:
the settings or the servers are wrong then, not the rows."""


def regenerate_served(
    urls: Sequence[str],
    conversations: Iterable[Conversation],
    out: Path,
    *,
    target: TargetSpec | None = None,
    model: str | None = None,
    thinking: bool = False,
    sampling: Sampling | None = None,
    max_new_tokens: int = 256,
    concurrency: int = 32,
    seed: int = 0,
    api_key_env: str = API_KEY,
    policy: Policy | None = None,
    total: int | None = None,
) -> Tally:
    """Have OpenAI-compatible servers answer every conversation, turn by turn, and append the answers to
    `out`.

    With a `target` its tokenizer and template make the prompts, which are sent as token ids, and `answer_ids`
    are kept if the server gives them. Without one the server's template is used, and `model` (default: the
    first that the server lists) stands as the target in the rows. At most `concurrency` prompts are with each
    server.

    Raises UserError if no server can be asked for `policy.patience` seconds, or if one is the wrong server;
    what was answered by then is kept. DataError if `out` holds answers made under other conditions.
    """
    tokenizer = template = vocab_size = None
    if target is not None:
        tokenizer = require_tokenizer(target.tokenizer(), target.name, "leave --target out")
        template = template_conditions(tokenizer, thinking).template_hash
        template_date(tokenizer)
        vocab_size = target.vocab_size
    elif thinking:
        warn(
            "the servers' own template is used: whether it has a switch for thinking is not known here; with "
            "--target it is checked"
        )
    now = Settings(
        "" if target is None else target.name,
        template,
        thinking,
        sampling or Sampling(temperature=1.0),
        max_new_tokens,
        seed,
    )
    # Without a target, only the servers know the model's name.
    check_conditions(out, {key: value for key, value in now.facts.items() if key != "target" or value})
    total = total or length_hint(conversations) or None
    chosen = model

    def check(server: Server) -> Served:
        return check_model(servers, server, chosen, tokenizer, asked_for=model is not None)

    servers = Servers(urls, check, concurrency=concurrency, policy=policy, api_key_env=api_key_env)
    with closing(servers):
        chosen = servers.ask(lambda server: server).facts.model
        now = replace(now, target=now.target or str(chosen))
        with AnswerFile(out, now.facts) as file, progress("regenerating answers", total) as bar:
            keeper = _Keeper(file, now, bar)
            wanted = keeper.wanted(conversations)
            for dialogue, engine in _answered(wanted, servers, now, tokenizer, vocab_size):
                keeper.keep(dialogue, engine)
            keeper.mark()
    return keeper.tally


def _answered(
    wanted: Iterable[Conversation], servers: Servers, now: Settings, tokenizer: Any, vocab_size: int | None
) -> Iterator[tuple[Dialogue, str]]:
    """Every conversation, answered or not, with its server's name for itself, in order of arrival.

    Threads ask; this one feeds and collects."""
    room = servers.concurrency * len(servers.servers)
    asked: SimpleQueue[Conversation | None] = SimpleQueue()
    found: SimpleQueue[tuple[Dialogue, str] | BaseException] = SimpleQueue()

    def work() -> None:
        while (conversation := asked.get()) is not None:
            try:
                found.put(_converse(conversation, servers, now, tokenizer, vocab_size))
            except BaseException as error:  # the thread that collects raises it again
                found.put(error)

    def collect() -> tuple[Dialogue, str]:
        outcome = found.get()
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    for _ in range(room):
        threading.Thread(target=work, daemon=True).start()  # Ctrl-C does not wait for requests under way
    under_way = 0
    try:
        for conversation in wanted:
            asked.put(conversation)
            under_way += 1
            if under_way == 2 * room:  # as many wait as are asked, so that no thread runs dry
                yield collect()
                under_way -= 1
        for _ in range(under_way):
            yield collect()
    finally:
        for _ in range(room):
            asked.put(None)


def _converse(
    conversation: Conversation, servers: Servers, now: Settings, tokenizer: Any, vocab_size: int | None
) -> tuple[Dialogue, str]:
    """Answer a conversation turn by turn, or say in its dialogue why it cannot be answered."""
    dialogue, engine = Dialogue.begin(conversation), ""
    try:
        while not dialogue.answered and dialogue.trouble is None:
            said, prompt, tools = dialogue.prompt(), None, tools_of(conversation)
            if tokenizer is not None:
                with TOKENIZING:
                    prompt = dialogue.prompt_ids(tokenizer, now.thinking, vocab_size)
            seed = row_seed(now.seed, conversation.id, len(dialogue.ids))

            def question(
                server: Server, said: Any = said, prompt: Any = prompt, tools: Any = tools, seed: int = seed
            ) -> tuple[Reply, str]:
                call = completion(server.facts, now, seed, said, prompt, tools)
                return call.read(servers.send(server, call.path, call.body)), server.facts.engine

            reply, engine = servers.ask(question)
            decoded = tokenizer is not None and reply.ids is not None  # then the text does not matter
            if trouble := no_answer("" if decoded else reply.text, reply.ids):
                raise Unanswered(trouble)
            if tokenizer is None:
                dialogue.answer(*reply)
                continue
            with TOKENIZING:
                check_embedded(tokenizer, reply.ids or (), vocab_size, conversation.where)
                dialogue.reply(tokenizer, now.thinking, *reply)
    except DataError as error:
        dialogue.trouble = error.what
    except Unanswered as error:
        dialogue.trouble, dialogue.exhausted = str(error), isinstance(error, Exhausted)
    return dialogue, engine


class _Keeper:
    """Writes outcomes to the file and counts them, all in one thread."""

    def __init__(self, file: AnswerFile, now: Settings, bar: Bar) -> None:
        self.file, self.now, self.bar, self.tally = file, now, bar, Tally()
        self.exhausted = 0
        """The number of rows, one after another, for which every attempt failed."""
        self.synced = self.marked = time.perf_counter()

    def wanted(self, conversations: Iterable[Conversation]) -> Iterator[Conversation]:
        """The conversations that have no answer yet, each id once."""
        for conversation in each_once(conversations, self.tally):
            if conversation.id in self.file.done:
                self.tally.there += 1
                self.bar.update(1)
            else:
                yield conversation

    def keep(self, dialogue: Dialogue, engine: str) -> None:
        """Write an answer or a failure. Raises UserError once failures look hopeless."""
        self.file.keep(dialogue, self.now.facts | {"engine": engine}, self.tally)
        answered = dialogue.trouble is None
        self.exhausted = 0 if answered else self.exhausted + dialogue.exhausted
        if not answered and (
            self.exhausted >= HOPELESS or (self.tally.failed >= HOPELESS and not self.tally.new)
        ):
            raise UserError(
                f"{HOPELESS} rows failed and none was answered in between; the last reason: "
                f"{dialogue.trouble}",
                where=str(beside(self.file.path, "failures")),
                next_step="correct what the reasons name, and run the same command again",
            )
        self.bar.update(1, **self.tally.fields)
        now = time.perf_counter()
        if now - self.marked > MARK_EVERY:
            self.mark()
        elif now - self.synced > SYNC_EVERY:
            self.synced = now
            self.file.sync()

    def mark(self) -> None:
        """Write a line of timings."""
        self.marked = self.synced = now = time.perf_counter()
        self.tally.seconds = now - self.tally.began
        seconds = round(self.tally.seconds, 3)
        self.file.mark(rows=self.tally.new, tokens=self.tally.tokens, seconds=seconds)
