"""`deepspec generate`: answer one prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from deepspec.cli.common import (
    MaxNew,
    Seed,
    TargetName,
    Thinking,
    load_target,
    sampling_of,
    stdout,
)
from deepspec.errors import UserError
from deepspec.log import note

if TYPE_CHECKING:
    from deepspec.decode.engine import Generation
    from deepspec.targets import Target


def generate(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The user's message.")],
    target: TargetName = "pocket",
    draft: Annotated[str | None, typer.Option("--draft", help="For pocket: pocket-dspark.")] = None,
    temperature: Annotated[float, typer.Option("--temperature", min=0, help="0 is greedy.")] = 0.0,
    max_new_tokens: MaxNew = 128,
    thinking: Thinking = False,
    seed: Seed = 0,
    plain: Annotated[bool, typer.Option("--plain", help="Decode without a draft.")] = False,
) -> None:
    """Answer one prompt and show which tokens the draft produced.

    \b
    Example:
      deepspec generate "Ada has 12 apples. Ada buys 5 more apples. How many apples does Ada have now?"
    """
    if draft is None and target == "pocket":
        draft = "pocket-dspark"
    if draft is None and not plain:
        raise UserError(
            f"{target} needs a draft", next_step="add --draft NAME, or --plain to decode without a draft"
        )
    sampling_of(temperature)
    from deepspec.checkpoints.draft import load_draft
    from deepspec.data.tokens import prompt_ids
    from deepspec.decode.engine import generate as decode

    model = load_target(target)
    if model.tokenizer is None:
        raise UserError(f"{target} has no tokenizer", next_step="put its tokenizer files beside its weights")
    chosen = None if plain or draft is None else load_draft(draft, model)
    ids = prompt_ids(model.tokenizer, [{"role": "user", "content": prompt}], thinking)
    answer = decode(model, chosen, ids, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    stdout().print(coloured(model, answer), soft_wrap=True)
    rate = f"{len(answer.token_ids)} tokens, {len(answer.token_ids) / answer.seconds:.1f} tokens/s"
    if chosen is not None and answer.kept:
        # The round past a full budget kept nothing and would only pull the figure down.
        kept = [k for k in answer.kept if k]
        note(f"{rate}, τ {sum(kept) / max(len(kept), 1):.2f} tokens per verify round")
        note(f"green: {sum(answer.from_draft)} tokens that {chosen.name} proposed and the target accepted")
    else:
        note(rate)


def coloured(target: Target, answer: Generation) -> Text:
    """The answer, draft-produced tokens in green."""
    from deepspec.decode.engine import pieces_of

    text = Text()
    for piece, drafted in pieces_of(target.tokenizer, answer):
        text.append(piece, style="green" if drafted else "")
    return text
