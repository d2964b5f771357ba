"""Answers by the target in this process. A draft must learn what its target writes, not what a data set says.

Prompts are read in windows. The rows of a window are ordered by length, so that rows of similar length share
a batch, and cut into stretches. The rows of a stretch are decoded together, and each enters when another
finishes. The prompts alone decide which rows a stretch holds, and the rows that are decoded together decide
how sums are rounded. So the file comes out the same to the byte, however often the run was killed: if a part
of a stretch is on disk, the whole stretch is decoded again, and only what is missing is appended. (This holds
for the same machine, libraries and `max_rows`.)

If a stretch takes long, what its rows have written is saved every so many steps. The number is what takes
about a minute; it is measured once and recorded, so that every run uses the same. After each save all
unfinished rows are read again from their tokens, as a run that continues from there does, so that both round
alike.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice, takewhile
from operator import length_hint
from pathlib import Path
from typing import TYPE_CHECKING

from deepspec.answers.dialogue import Dialogue
from deepspec.answers.file import AnswerFile, Settings, Tally, each_once
from deepspec.data.conversations import Conversation, content_hash, read_conversations
from deepspec.data.identity import row_seed
from deepspec.data.template import template_conditions, template_date
from deepspec.data.tokens import require_tokenizer
from deepspec.decode.engine import Decoder, Request
from deepspec.errors import DataError, NonFiniteError
from deepspec.files import check_conditions
from deepspec.log import Bar, note, progress
from deepspec.maths.verify import Sampling
from deepspec.pocket import prompts_path
from deepspec.targets import Target, TargetSpec

if TYPE_CHECKING:
    from deepspec.data.tokens import PreTrainedTokenizerBase

WINDOW = 4096
"""Prompts in memory at a time, ordered by length among themselves. Of all others, only ids are kept."""
PACKAGED_TOKENS, PACKAGED_ROWS = 224, 64
"""New tokens of an answer to a packaged prompt, and how many the pocket target decodes together."""
FLIGHTS = 8
"""Prompts of a stretch for each row decoded together. More waste less at its end, and lose more to a kill."""
SAVE_EVERY, REREADING = 60.0, 0.1
"""Seconds of decoding after which a stretch is saved, and the share of its time that reading its rows again
may take: if that is slow, saves are rarer."""


def regenerate(
    target: Target,
    conversations: Iterable[Conversation],
    out: Path,
    *,
    thinking: bool = False,
    sampling: Sampling | None = None,
    max_new_tokens: int = 256,
    max_rows: int = 16,
    seed: int = 0,
    total: int | None = None,
) -> Tally:
    """Answer every conversation, turn by turn, and append it to `out`. Returns what was done.

    The default sampling is temperature 1: the draft then sees the target's own distribution. `max_rows`
    prompts are decoded together; `total`, the number of conversations if it is known, is for the progress bar
    only. A row that the template refuses, or that is too long for the target, is listed as failed, and the
    run continues.

    Raises TargetError without a tokenizer or chat template, DataError if `out` holds answers made under
    other conditions, and UserError if `out` cannot be written. Rows for which the target gives infinities or
    NaN are listed as failed too; NonFiniteError names them once the others are answered, or at once if the
    first rows are all like that.
    """
    options = sampling or Sampling(temperature=1.0), max_new_tokens, seed
    now = _settings(target.spec, target.tokenizer, thinking, *options)
    total = total or length_hint(conversations) or None
    tally, size = Tally(), FLIGHTS * max_rows
    fresh = each_once(conversations, tally)
    with AnswerFile(out, now.facts, size) as file, progress("regenerating answers", total) as bar:
        while window := sorted(islice(fresh, WINDOW), key=lambda c: (_letters(c), c.id)):
            for start in range(0, len(window), size):
                _answer(window[start : start + size], file, tally, bar, target, now, max_rows)
    tally.seconds = time.perf_counter() - tally.began
    if tally.broken:
        kept = f"the other rows are answered in {out}; {NonFiniteError.OF_TARGET}"
        raise NonFiniteError(target.spec.name, "its logits", tally.broken, kept)
    return tally


def check_settings(
    spec: TargetSpec, out: Path, *, thinking: bool, sampling: Sampling, max_new_tokens: int, seed: int
) -> None:
    """Raise what `regenerate` would raise that can be known before the target's weights are loaded."""
    now = _settings(spec, spec.tokenizer(), thinking, sampling, max_new_tokens, seed)
    check_conditions(out, now.facts)


def _settings(
    spec: TargetSpec,
    tokenizer: PreTrainedTokenizerBase | None,
    thinking: bool,
    sampling: Sampling,
    max_new_tokens: int,
    seed: int,
) -> Settings:
    tokenizer = require_tokenizer(tokenizer, spec.name)
    template_date(tokenizer)
    template = template_conditions(tokenizer, thinking).template_hash
    return Settings(spec.name, template, thinking, sampling, max_new_tokens, seed)


def _letters(conversation: Conversation) -> int:
    """Length of what comes before the first answer, in letters: known without tokenising."""
    asked = takewhile(lambda message: message["role"] != "assistant", conversation.messages)
    return sum(len(message["content"] or "") for message in asked)


def _answer(
    stretch: Sequence[Conversation],
    file: AnswerFile,
    tally: Tally,
    bar: Bar,
    target: Target,
    now: Settings,
    max_rows: int,
) -> None:
    """Answer the rows of a stretch that have no answer yet, and append them in the stretch's order."""
    # Rows of `tail` were decoded with the others of this stretch, and must be decoded again, since the
    # others' rounding depends on it. Rows of `done` were answered before the stretch was begun, as in the
    # undisturbed run.
    asked = [c for c in stretch if c.id not in file.done]
    missing = [c for c in asked if c.id not in file.tail]
    tally.there += len(stretch) - len(missing)
    bar.update(len(stretch) - len(asked))
    if not missing:
        bar.update(len(asked))
        return
    began = time.perf_counter()
    dialogues = [Dialogue.begin(c) for c in asked]
    group = content_hash(asked)
    for dialogue, state in zip(dialogues, file.saved(group), strict=False):
        dialogue.restore(target.tokenizer, now.thinking, state)
    waiting = deque(dialogues)
    for _ in decoded(dialogues, target, now, max_rows, file.steps, partial(file.save, group, dialogues)):
        while waiting and waiting[0].over:
            first = waiting.popleft()
            if first.trouble is not None or first.conversation.id not in file.tail:
                file.keep(first, now.facts, tally)
        bar.update(1, **tally.fields)
    broken = [d.conversation.id for d in dialogues if d.broken]
    if len(broken) == len(dialogues) and not (tally.new or tally.there):
        raise NonFiniteError(target.spec.name, "its logits", broken)
    tally.broken += broken
    seconds = round(time.perf_counter() - began, 3)
    file.mark(rows=len(dialogues), tokens=sum(d.tokens for d in dialogues), seconds=seconds)


def decoded(
    dialogues: Sequence[Dialogue],
    target: Target,
    now: Settings,
    max_rows: int,
    steps: int | None = None,
    save: Callable[[int], None] = lambda steps: None,
) -> Iterator[Dialogue]:
    """Answer dialogues together, all first turns, then all second turns; each is yielded when it is over.

    What a dialogue becomes is a function of all of them, their order, `max_rows` and `steps`. After so many
    steps `save` is called with their number, and decoding begins again from what was written. With None the
    clock decides when to save for the first time, and every later save comes after as many steps.
    """
    yield from (d for d in dialogues if d.over)
    while open_ := [d for d in dialogues if not d.over]:
        turn = min(len(d.ids) for d in open_)
        asked = {str(i): d for i, d in enumerate(open_) if len(d.ids) == turn}
        requests = [_request(dialogue, key, target, now) for key, dialogue in asked.items()]
        yield from (d for d in asked.values() if d.trouble is not None)
        decoder = Decoder(target, None, max_rows=max(min(max_rows, len(requests)), 1))
        for request in filter(None, requests):
            decoder.submit(request)
        done, read, reading, began = 0, 0, 0.0, time.perf_counter()
        while not decoder.idle:
            before, line = time.perf_counter(), len(decoder.waiting)
            try:
                events = decoder.step()
            except NonFiniteError as error:  # these rows have failed; the decoder continues with the others
                events = []
                for dialogue in map(asked.__getitem__, error.rows):
                    dialogue.trouble, dialogue.broken = error.what, True
                    yield dialogue
            done += 1
            if len(decoder.waiting) < line:  # it read a prompt
                read, reading = read + 1, reading + time.perf_counter() - before
            for _, answer, finished in events:
                if finished:
                    dialogue, ids = asked[answer.key], [*asked[answer.key].begun, *answer.token_ids]
                    dialogue.reply(target.tokenizer, now.thinking, "", ids, answer.stopped, len(ids))
                    if dialogue.over:
                        yield dialogue
            least = max(SAVE_EVERY, len(decoder.rows) * reading / max(read, 1) / REREADING)
            if done == steps or (steps is None and time.perf_counter() - began > least):
                for key in [row.answer.key for row in decoder.rows]:
                    asked[key].begun += decoder.cancel(key).token_ids
                steps = done
                save(done)
                break


def _request(dialogue: Dialogue, key: str, target: Target, now: Settings) -> Request | None:
    """The next turn as a request. If it cannot be asked: None, and the reason is in the dialogue's
    `trouble`."""
    if dialogue.trouble is not None:
        return None
    try:
        ids = dialogue.prompt_ids(target.tokenizer, now.thinking, target.spec.vocab_size)
    except DataError as error:
        dialogue.trouble = error.what
        return None
    room = target.room(len(ids), now.max_new_tokens)
    if room < 1:
        most = target.max_length
        dialogue.trouble = f"the prompt is {len(ids)} tokens, and {target.spec.name} reads at most {most}"
        return None
    seed, begun = row_seed(now.seed, dialogue.conversation.id, len(dialogue.ids)), dialogue.begun
    ids, room = [*ids, *begun], room - len(begun)
    return Request(ids, room, seed, key, now.sampling, target.stop_token_ids, drawn=len(begun))


def answered(name: str, target: Target, thinking: bool, beside: Path) -> Path:
    """The file of training conversations: `name` itself, or the target's answers to packaged prompts, which
    are made now."""
    if not name.startswith("pocket:"):
        return Path(name)
    mode = "thinking" if thinking else "plain"
    out = beside / f"{name.removeprefix('pocket:')}-{mode}.jsonl"
    if not out.exists():
        note(f"{target.spec.name} answers the prompts of {name} first, which takes minutes")
    regenerate(
        target,
        list(read_conversations(prompts_path(name))),
        out,
        thinking=thinking,
        max_new_tokens=PACKAGED_TOKENS,
        max_rows=PACKAGED_ROWS,
    )
    return out
