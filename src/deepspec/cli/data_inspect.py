"""`deepspec data inspect`: which tokens a draft would be trained on, and the totals of files."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from deepspec.cli.common import (
    BAD_INPUT,
    Json,
    Limit,
    SkipBad,
    TargetName,
    Thinking,
    print_json,
    prompt_file,
    report_skipped,
    skipping,
    stdout,
    table_of,
)
from deepspec.log import note, progress

if TYPE_CHECKING:
    from deepspec.data.conversations import Conversation
    from deepspec.data.inspect import Piece
    from deepspec.data.tokens import Encoded, PreTrainedTokenizerBase

OPEN, CLOSE = "⟦", "⟧"
"""Brackets around supervised text if there is no colour."""
SHORT = 300
"""Characters kept of a long piece, half at either end, in a row that is shown as an example."""
DOMAIN_COLUMNS = {
    "rows": "rows",
    "sequences": "sequences",
    "tokens": "tokens",
    "supervised_tokens": "supervised",
    "prompts": "prompts only",
    "prompt_tokens": "their tokens",
}
BAR = 40
"""Characters of the histogram's longest bar."""


def inspect(
    files: Annotated[
        list[str], typer.Argument(metavar="FILE...", help="JSONL files, or pocket:train, read as one.")
    ],
    target: TargetName = "pocket",
    row: Annotated[
        str | None, typer.Option(metavar="ID|N", help="Show one whole row, by id or number.")
    ] = None,
    thinking: Thinking = False,
    max_length: Annotated[
        int, typer.Option(min=1, help="Tokens kept of a sequence: a recipe's data.max_length.")
    ] = 512,
    limit: Limit = 0,
    skip_bad: SkipBad = False,
    as_json: Json = False,
) -> None:
    """Show which tokens of a file a draft would be trained on.

    The totals of the files come first, then one row with the supervised tokens marked. Only the target's
    tokenizer and chat template are read, not its weights. Exit code 2 means that training would refuse a row.

    \b
    Example:
      deepspec data inspect pocket:test --row 1
    """
    sources = [prompt_file(file, target) for file in files]
    from deepspec.data.conversations import read_conversations
    from deepspec.data.inspect import find_row, inspect_rows, row_sequences
    from deepspec.data.skipping import nothing_left
    from deepspec.data.template import template_date
    from deepspec.data.tokens import require_tokenizer
    from deepspec.files import count_lines
    from deepspec.targets import TargetSpec

    spec = TargetSpec.from_pretrained(target)
    tokenizer = require_tokenizer(spec.tokenizer(), target)
    template_date(tokenizer)
    skipped = skipping(skip_bad)

    def rows() -> Iterator[Conversation]:
        every = (read_conversations(source, skipped=skipped) for source in sources)
        return islice(chain.from_iterable(every), limit or None)

    if row is not None:
        sequences = row_sequences(tokenizer, chosen := find_row(rows(), row), thinking, spec.vocab_size)
        _show(chosen, sequences, tokenizer, max_length, as_json=as_json)
        return
    with progress("inspecting", limit or sum(count_lines(s) or 0 for s in sources) or None) as bar:
        found = inspect_rows(
            rows(), tokenizer, thinking=thinking, max_length=max_length, bar=bar, vocab_size=spec.vocab_size
        )
    report_skipped(skipped)
    if not found["rows"]:
        raise nothing_left(skipped, ", ".join(files))
    if as_json:
        print_json({"file": ", ".join(files), "target": target, **found, "skipped": skipped.as_json()})
    else:
        _print_totals(found)
        if not found["refused"]:
            first = next(rows())
            sequences = row_sequences(tokenizer, first, thinking, spec.vocab_size)
            _show(first, sequences, tokenizer, max_length, short=SHORT)
    if found["refused"]:
        if stops := found["refused"] - found["unembedded"]:
            note(
                f"training would stop at the first of {stops} rows that cannot be used; data.skip_bad=true "
                "leaves them out"
            )
        if left_out := found["unembedded"]:
            note(f"training leaves out {left_out} rows: the target's embedding lacks tokens of theirs")
        raise typer.Exit(BAD_INPUT)


def _print_totals(found: dict[str, Any]) -> None:
    cut, limit = found["cut"], found["max_length"]
    facts = {
        "rows": f"{found['rows']:,}  ({found['answered']:,} answered, {found['prompts']:,} prompts only)"
    }
    if found["sequences"]:
        facts |= {
            "sequences": f"{found['sequences']:,}",
            "tokens": f"{found['tokens']:,}",
            "supervised tokens": f"{found['supervised_tokens']:,}  ({found['supervised_share']:.1%})",
            f"longer than {limit} tokens": f"{cut['sequences']:,}  ({cut['tokens']:,} tokens cut, "
            f"{cut['supervised_tokens']:,} of them supervised)",
        }
    counts = {
        "tokens of prompts only": found["prompt_tokens"] or None,
        f"no answer within {limit} tokens": cut["without_answer"],
        "repeated prompts": found["repeated_prompts"],
        "repeated ids": found["repeated_ids"],
        "empty questions or answers": found["empty"],
        "with follow-ups not yet asked": found["follow_ups"],
        "answered in another mode": found["other_mode"],
        "cannot be used": found["refused"],
    }
    facts |= {name: f"{count:,}" for name, count in counts.items() if count is not None}
    console = stdout()
    for name, value in facts.items():
        console.print(Text(f"{name:<30}{value}"), soft_wrap=True)
    for name, key in (("sequences", "lengths"), ("unanswered prompts", "prompt_lengths")):
        if found[key] is not None:
            _print_lengths(console, name, found[key])
    if len(found["domains"]) > 1:
        heads = [key for key in DOMAIN_COLUMNS if found[key]]
        table = table_of("domain", *(DOMAIN_COLUMNS[key] for key in heads))
        for name, counts in found["domains"].items():
            table.add_row(Text(name), *(f"{counts[key]:,}" for key in heads))
        console.print(table)
    for problem in found["problems"]:
        console.print(Text(f"{problem['where']}: {problem['what']}", style="red"), soft_wrap=True)
    if found["refused"] > len(found["problems"]):
        console.print(Text(f"… and {found['refused'] - len(found['problems']):,} more"))


def _print_lengths(console: Console, name: str, lengths: dict[str, Any]) -> None:
    figures = [f"{key} {lengths[key]:,.0f}" for key in ("min", "mean", "p50", "p90", "p99", "max")]
    console.print(Text(f"\nlength of {name} in tokens: {', '.join(figures)}"), soft_wrap=True)
    most = max(part["count"] for part in lengths["histogram"])
    for part in lengths["histogram"]:
        span = f"{part['from']:>7,} – {part['to']:<7,}"
        bar = "█" * -(-BAR * part["count"] // most)
        console.print(Text(f"{span} {bar} {part['count']:,}"), soft_wrap=True)


def _show(
    row: Conversation,
    sequences: list[Encoded],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    short: int | None = None,
    as_json: bool = False,
) -> None:
    """Print a row's sequences: in colour, with brackets if there is no colour, or as JSON."""
    from deepspec.data.inspect import pieces

    if as_json:
        parts = [
            vars(sequence) | {"pieces": [vars(piece) for piece in pieces(tokenizer, sequence, max_length)]}
            for sequence in sequences
        ]
        print_json({"id": row.id, "where": row.source, "max_length": max_length, "sequences": parts})
        return
    console = stdout()
    colour = console.color_system is not None and not console.no_color
    for sequence in sequences:
        length, supervised = len(sequence.ids), sum(sequence.loss_mask)
        title = f"\n{sequence.id}  {length:,} tokens, {supervised:,} supervised  ({row.source})"
        console.print(Text(title, style="bold"), soft_wrap=True)
        found = pieces(tokenizer, sequence, max_length)
        console.print(coloured_row(found, max_length, colour, short), soft_wrap=True)


def coloured_row(found: list[Piece], max_length: int, colour: bool, short: int | None = None) -> Text:
    """Supervised text in green, or in ⟦brackets⟧; the template's tokens bold; cut text struck through."""
    text, inside, kept = Text(), False, False
    for piece in found:
        if kept and not piece.kept:
            text.append(f"✂{max_length}✂", style="red")
        if piece.supervised is not inside and not colour:
            text.append(OPEN if piece.supervised else CLOSE)
        inside, kept = piece.supervised, piece.kept
        style = "green" if piece.supervised else "dim"
        style += " bold" * piece.added + " strike" * (not piece.kept)
        text.append(_shortened(piece.text, short), style=style)
    if inside and not colour:
        text.append(CLOSE)
    return text


def _shortened(text: str, short: int | None) -> str:
    if short is None or len(text) <= 2 * short:
        return text
    return f"{text[: short // 2]} [… {len(text) - short:,} characters …] {text[-(short // 2) :]}"
