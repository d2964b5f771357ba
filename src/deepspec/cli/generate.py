"""`deepspec generate`: answer one prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from deepspec.cli.common import (
    Calibration,
    Costs,
    Device,
    Dtype,
    MaxNew,
    PolicyName,
    Seed,
    TargetDtype,
    TargetName,
    Thinking,
    TopK,
    TopP,
    check_policy,
    load_target,
    sampling_of,
    scheduled,
    stdout,
)
from deepspec.errors import UserError
from deepspec.log import note

if TYPE_CHECKING:
    from deepspec.decode.text import Piece


def generate(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The user's message.")],
    target: TargetName = "pocket",
    draft: Annotated[
        str | None,
        typer.Option(help="A name, folder or Hub id, as for eval; the default for pocket is pocket-dspark."),
    ] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    max_new_tokens: MaxNew = 128,
    thinking: Thinking = False,
    seed: Seed = 0,
    dtype: TargetDtype = Dtype.auto,
    device: Device = "auto",
    policy: PolicyName = "all",
    costs: Costs = None,
    calibration: Calibration = None,
    plain: Annotated[bool, typer.Option("--plain", help="Decode without a draft.")] = False,
) -> None:
    """Answer one prompt, and show which tokens the draft produced.

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
    check_policy(policy, costs)
    sampling = sampling_of(temperature, top_k, top_p)
    from deepspec.checkpoints.draft import check_draft, load_draft
    from deepspec.checkpoints.read import find_checkpoint
    from deepspec.data.messages import Message
    from deepspec.data.tokens import prompt_ids, require_tokenizer
    from deepspec.decode.engine import Decoder, Request
    from deepspec.decode.text import TextStream
    from deepspec.schedule.policies import Scheduled
    from deepspec.targets import TargetSpec

    # What can be refused is refused before the weights are loaded.
    draft = None if plain else draft
    folder = None if draft is None else find_checkpoint(draft)
    spec = TargetSpec.from_pretrained(target)
    if draft is not None:
        check_draft(draft, spec)
    tokenizer = require_tokenizer(spec.tokenizer(), target)
    asked = [Message(role="user", content=prompt)]
    ids = prompt_ids(tokenizer, asked, thinking, vocab_size=spec.vocab_size)
    model = load_target(target, dtype.value, device)
    chosen, how = None, Scheduled()
    if draft is not None and folder is not None:
        chosen = load_draft(draft, model)
        how = scheduled(policy, costs, calibration, folder, model, chosen)
    decoder = Decoder(model, chosen, policy=how.policy, temperatures=how.temperatures)
    console, text = stdout(), TextStream(tokenizer)
    decoder.submit(Request(ids, max_new_tokens, seed, "PROMPT", sampling, model.stop_token_ids))
    while not decoder.idle:
        for event in decoder.step():
            answer = event.answer
            console.print(coloured(text.new(answer, finished=event.finished)), end="", soft_wrap=True)
    console.print()
    rate = f"{len(answer.token_ids)} tokens, {len(answer.token_ids) / answer.seconds:.1f} tokens/s"
    if chosen is not None and answer.kept:
        # The round past a full budget kept nothing and would only pull the figure down.
        kept = [k for k in answer.kept if k]
        note(f"{rate}, τ {sum(kept) / max(len(kept), 1):.2f} tokens per verify round")
        note(f"green: {sum(answer.from_draft)} tokens that {chosen.name} proposed and the target accepted")
    else:
        note(rate)


def coloured(pieces: Sequence[Piece]) -> Text:
    """Some of an answer; the draft's tokens are green."""
    return Text.assemble(*((piece, "green" if drafted else "") for piece, drafted in pieces))
