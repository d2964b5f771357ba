"""Answers by the target itself: a draft must learn what this target writes, not what a data set says.

Prompts are read in windows. The rows of a window are ordered by length, so that those of like length share a
batch, and cut into stretches; the rows of a stretch are decoded together, each entering as another finishes.
What a stretch holds is decided by the prompts alone, and rounding by what is decoded together, so the file
comes out the same to the byte however often the run was killed: a stretch that is on disk in part is decoded
again as a whole, and only what is missing is appended. (This holds for the same machine, libraries and
`max_rows`.)
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, takewhile
from operator import length_hint
from pathlib import Path

from deepspec.answers.dialogue import Dialogue
from deepspec.answers.file import AnswerFile, Settings, Tally, each_once
from deepspec.data.conversations import Conversation, read_conversations
from deepspec.data.identity import row_seed
from deepspec.data.template import template_conditions, template_date
from deepspec.data.tokens import require_tokenizer
from deepspec.decode.engine import Decoder, Request
from deepspec.errors import DataError
from deepspec.log import Bar, note, progress
from deepspec.maths.verify import Sampling
from deepspec.pocket import prompts_path
from deepspec.targets import Target

WINDOW = 4096
"""Prompts in memory at a time, ordered by length among themselves. Of all others, only ids are kept."""
PACKAGED_TOKENS, PACKAGED_ROWS = 224, 64
"""New tokens of an answer to a packaged prompt, and how many the pocket target decodes together."""
FLIGHTS = 8
"""Prompts of a stretch for each row in flight: more waste less at its end, and lose more to a kill."""


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
    """Answer every conversation, turn by turn, and append it to `out`; what was new, there, or failed.

    The default sampling is temperature 1: the draft then sees the target's own distribution. `max_rows`
    prompts are decoded together; `total`, the number of conversations if it is known, is for the progress bar
    only. A row that the template refuses, or that is too long for the target, is listed as failed, and the
    run continues.

    Raises TargetError without a tokenizer or chat template, DataError if `out` holds answers made under
    other conditions, and UserError if `out` cannot be written.
    """
    sampling = sampling or Sampling(temperature=1.0)
    tokenizer = require_tokenizer(target.tokenizer, target.spec.name)
    template = template_conditions(tokenizer, thinking).template_hash
    template_date(tokenizer)
    now = Settings(target.spec.name, template, thinking, sampling, max_new_tokens, seed)
    total = total or length_hint(conversations) or None
    tally, size = Tally(), FLIGHTS * max_rows
    fresh = each_once(conversations, tally)
    with AnswerFile(out, now.facts, size) as file, progress("regenerating answers", total) as bar:
        while window := sorted(islice(fresh, WINDOW), key=lambda c: (_letters(c), c.id)):
            for start in range(0, len(window), size):
                _answer(window[start : start + size], file, tally, bar, target, now, max_rows)
    tally.seconds = time.perf_counter() - tally.began
    return tally


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
    """Answer what a stretch still lacks, and append it in the stretch's order."""
    # Rows of `tail` were decoded with the others of this stretch, and must be again: the others' rounding
    # hangs on it. What `done` holds was there before the stretch was begun, in the undisturbed run too.
    asked = [c for c in stretch if c.id not in file.done]
    missing = [c for c in asked if c.id not in file.tail]
    tally.there += len(stretch) - len(missing)
    bar.update(len(stretch) - len(asked))
    if not missing:
        bar.update(len(asked))
        return
    began = time.perf_counter()
    dialogues = [Dialogue.begin(c) for c in asked]
    for _ in decoded(dialogues, target, now, max_rows):
        bar.update(1, **tally.fields)
    for dialogue in dialogues:
        if dialogue.trouble is not None or dialogue.conversation.id not in file.tail:
            file.keep(dialogue, now.facts, tally)
    seconds = round(time.perf_counter() - began, 3)
    file.mark(rows=len(dialogues), tokens=sum(d.tokens for d in dialogues), seconds=seconds)


def decoded(
    dialogues: Sequence[Dialogue], target: Target, now: Settings, max_rows: int
) -> Iterator[Dialogue]:
    """Answer dialogues together, all first turns, then all second turns; each is yielded when it is over.

    What a dialogue becomes is a function of all of them, their order, and `max_rows`.
    """
    open_ = list(dialogues)
    while open_:
        requests: list[Request] = []
        for i, dialogue in enumerate(open_):
            request = _request(dialogue, str(i), target, now)
            if request is None:
                yield dialogue
            else:
                requests.append(request)
        decoder = Decoder(target, None, max_rows=max(min(max_rows, len(requests)), 1))
        assert target.tokenizer is not None
        for answer in decoder.run(requests):
            dialogue = open_[int(answer.key)]
            text = target.tokenizer.decode(answer.token_ids, skip_special_tokens=True)
            dialogue.answer(text, answer.token_ids, answer.stopped, len(answer.token_ids))
            if dialogue.answered:
                yield dialogue
        open_ = [d for d in open_ if d.trouble is None and not d.answered]


def _request(dialogue: Dialogue, key: str, target: Target, now: Settings) -> Request | None:
    """The next turn as a request; None, with the dialogue's trouble set, where it cannot be asked."""
    if dialogue.trouble is not None:
        return None
    try:
        ids = dialogue.prompt_ids(target.tokenizer, now.thinking, target.spec.vocab_size)
    except DataError as error:
        dialogue.trouble = error.what
        return None
    limit = target.max_length
    room = now.max_new_tokens if limit is None else min(now.max_new_tokens, limit - len(ids))
    if room < 1:
        dialogue.trouble = f"the prompt is {len(ids)} tokens, and {target.spec.name} reads at most {limit}"
        return None
    seed = row_seed(now.seed, dialogue.conversation.id, len(dialogue.ids))
    return Request(ids, room, seed, key, now.sampling, target.stop_token_ids)


def answered(name: str, target: Target, thinking: bool, beside: Path) -> Path:
    """The file of training conversations: as given, or, for packaged prompts, answered by the target now."""
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
