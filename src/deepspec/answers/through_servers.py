"""Answers by the target through inference servers, as many as there are, in order of arrival.

Which row is asked when depends on how fast the servers are, so the file's order does; each id is there once.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepspec.answers.dialogue import Dialogue
from deepspec.answers.file import AnswerFile, Settings, Tally, beside
from deepspec.answers.in_process import row_seed
from deepspec.answers.pool import Exhausted, Policy, Pool, Refused
from deepspec.answers.requests import completion, greeter
from deepspec.data.conversations import Conversation, tools_of
from deepspec.data.tokens import prompt_ids, template_hash
from deepspec.errors import DataError, TargetError, UserError
from deepspec.log import Bar, progress
from deepspec.maths.verify import Sampling

if TYPE_CHECKING:
    from deepspec.targets import TargetSpec

SYNC_EVERY = 1.0
"""Seconds: a power cut loses the answers of at most that long, a killed process none."""
MARK_EVERY = 30.0
"""Seconds between lines of the timings file."""
HOPELESS = 32
"""Rows that fail before any is answered: then it is the settings that are wrong, not the rows."""


def regenerate_served(
    servers: Sequence[str],
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
    api_key: str | None = None,
    policy: Policy | None = None,
    total: int | None = None,
) -> Tally:
    """Have OpenAI-compatible servers answer every conversation, turn by turn; what was new, there, or failed.

    With a `target` its tokenizer and template make the prompts, which go out as token ids, and `answer_ids`
    are kept where the server gives them. Without one the server's template is used, `model` (default: the
    first that the server lists) stands as the target in the rows. At most `concurrency` prompts are with each
    server.

    Raises UserError when no server is well for `policy.patience` seconds, or can never do; what is answered
    by then is kept. DataError where `out` holds answers made under other conditions.
    """
    tokenizer = None if target is None else target.tokenizer()
    if target is not None and tokenizer is None:
        raise TargetError(f"{target.name} has no tokenizer", next_step="leave --target out")
    if total is None and isinstance(conversations, Sequence):
        total = len(conversations)

    async def main() -> Tally:
        pool = Pool(
            servers,
            greeter(model, tokenizer),
            concurrency=concurrency,
            api_key=api_key,
            policy=policy,
            seed=seed,
        )
        async with pool:
            first = await pool.first()
            now = Settings(
                target.name if target is not None else str(first.facts["model"]),
                template_hash(tokenizer) if tokenizer is not None else None,
                thinking,
                sampling or Sampling(temperature=1.0),
                max_new_tokens,
                seed,
            )
            with AnswerFile(out, now.facts) as file, progress("regenerating answers", total) as bar:
                run = _Run(pool, file, now, tokenizer, Tally(), bar)
                await run.all(conversations)
                return run.tally

    return asyncio.run(main())


@dataclass(eq=False)
class _Run:
    """What the workers share."""

    pool: Pool
    file: AnswerFile
    now: Settings
    tokenizer: Any
    """The target's, or None."""
    tally: Tally
    bar: Bar
    synced: float = 0.0
    marked: float = 0.0

    async def all(self, conversations: Iterable[Conversation]) -> None:
        """Answer everything: as many workers as the servers have room for, all drawing from one iterator."""
        waiting = self._wanted(conversations)
        self.synced = self.marked = time.perf_counter()
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(self.pool.room):
                    group.create_task(self._work(waiting))
        except BaseExceptionGroup as many:
            raise _first(many) from None  # the others are the same trouble, met by other workers
        finally:
            self.tally.seconds = time.perf_counter() - self.tally.began
        self._mark()

    def _wanted(self, conversations: Iterable[Conversation]) -> Iterator[Conversation]:
        """Those that have no answer yet, each id once."""
        seen: set[str] = set()
        for conversation in conversations:
            if conversation.id in seen:
                self.tally.twice += 1
            elif conversation.id in self.file.done:
                self.tally.there += 1
                self.bar.update(1)
            else:
                yield conversation
            seen.add(conversation.id)

    async def _work(self, waiting: Iterator[Conversation]) -> None:
        for conversation in waiting:
            dialogue = Dialogue(conversation, [])
            try:
                dialogue = Dialogue.begin(conversation)
                engine = await self._converse(dialogue)
            except DataError as error:
                dialogue.trouble = error.what
            except (Refused, Exhausted) as error:
                dialogue.trouble = str(error)
            if dialogue.trouble is None:
                self.tally.new += 1
                self.tally.tokens += dialogue.tokens
                self.file.write(dialogue.row(self.now.facts | {"engine": engine}))
            else:
                self._failed(dialogue)
            self.bar.update(1, **self.tally.fields)
            self._keep()

    async def _converse(self, dialogue: Dialogue) -> str:
        """Answer a dialogue turn by turn, or set its trouble. Returns the name of the engine that did."""
        conversation, engine = dialogue.conversation, ""
        while not dialogue.answered:
            said, prompt = dialogue.prompt(), None
            if self.tokenizer is not None:
                prompt = prompt_ids(
                    self.tokenizer,
                    said,
                    self.now.thinking,
                    tools=tools_of(conversation),
                    where=conversation.where,
                )
            question = partial(
                completion,
                now=self.now,
                seed=row_seed(self.now.seed, conversation.id, len(dialogue.ids)),
                messages=said,
                prompt=prompt,
                tools=tools_of(conversation),
            )
            reply, endpoint = await self.pool.ask(question)
            engine, text = endpoint.facts["engine"], reply.text
            if self.tokenizer is not None and reply.ids is not None:
                text = self.tokenizer.decode(reply.ids, skip_special_tokens=True)
            if not reply.ids and not text.strip():
                dialogue.trouble = "the server gave an empty answer"
                break
            dialogue.answer(text, reply.ids, reply.finished, reply.tokens)
        return engine

    def _failed(self, dialogue: Dialogue) -> None:
        self.tally.failed += 1
        self.file.fail(dialogue)
        if self.tally.failed >= HOPELESS and self.tally.new == 0:
            raise UserError(
                f"the first {HOPELESS} rows failed, the last one so: {dialogue.trouble}",
                where=str(beside(self.file.out, "failures")),
                next_step="mend what the reasons say, and run the same command again",
            )

    def _keep(self) -> None:
        now = time.perf_counter()
        if now - self.marked > MARK_EVERY:
            self._mark()
        elif now - self.synced > SYNC_EVERY:
            self.synced = now
            self.file.sync()

    def _mark(self) -> None:
        self.marked = self.synced = now = time.perf_counter()
        seconds = round(now - self.tally.began, 3)
        self.file.mark(rows=self.tally.new, tokens=self.tally.tokens, seconds=seconds)


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first plain exception of a group."""
    found = group.exceptions[0]
    return _first(found) if isinstance(found, BaseExceptionGroup) else found
