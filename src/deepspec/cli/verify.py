"""`deepspec verify`: whether decoding with a draft leaves the target's output law alone."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.text import Text

from deepspec.cli.common import (
    FAILED,
    Calibration,
    Costs,
    DraftName,
    Dtype,
    Json,
    MaxNew,
    PolicyName,
    Seed,
    TargetName,
    Thinking,
    TopK,
    TopP,
    check_policy,
    load_target,
    print_json,
    prompt_file,
    sampling_of,
    scheduled,
    stdout,
)
from deepspec.errors import UserError


def verify(
    draft: DraftName,
    target: TargetName = "pocket",
    prompts: Annotated[str | None, typer.Option(help="A JSONL file, pocket:test or pocket:select.")] = None,
    limit: Annotated[int, typer.Option(min=0, help="Number of prompts, domains in turns. 0: all.")] = 12,
    temperature: Annotated[float, typer.Option(min=0, help="Of the sampled answers.")] = 1.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    repeats: Annotated[
        int, typer.Option(min=1, help="Sampled answers per prompt; more of them notice smaller errors.")
    ] = 4,
    max_new_tokens: MaxNew = 64,
    policy: PolicyName = "all",
    costs: Costs = None,
    calibration: Calibration = None,
    thinking: Thinking = False,
    seed: Seed = 0,
    batch: Annotated[int, typer.Option(min=1, help="Prompts decoded together.")] = 8,
    dtype: Annotated[Dtype, typer.Option()] = Dtype.auto,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")] = "auto",
    as_json: Json = False,
) -> None:
    """Test that a draft changes no token and no probability.

    Greedy answers are compared with plain decoding's, sampled ones with the target's own distributions, and
    the smallest error that the test would notice is printed. Exit code 1 means that the output is not the
    target's.

    \b
    Example:
      deepspec verify pocket-dspark --policy threshold:0.5
    """
    check_policy(policy, costs)
    source = prompt_file(prompts, target)
    sampling = sampling_of(temperature, top_k, top_p)
    if sampling.greedy:
        raise UserError(
            "temperature 0 has one answer to a prompt, which is compared anyway",
            next_step="give --temperature above 0 for the sampled answers",
        )
    from deepspec.checkpoints.draft import check_draft, load_draft
    from deepspec.checkpoints.read import find_checkpoint
    from deepspec.measure.evaluate import load_prompts
    from deepspec.measure.lossless import check_greedy, check_law, sentences, verdict_of
    from deepspec.targets import TargetSpec

    folder = find_checkpoint(draft)
    spec = TargetSpec.from_pretrained(target)
    check_draft(draft, spec)
    tasks = load_prompts(source, spec, thinking=thinking, limit=limit)
    model = load_target(target, dtype.value, device)
    loaded = load_draft(draft, model)
    chosen, temperatures = scheduled(policy, costs, calibration, folder, model, loaded)
    how = {"temperatures": temperatures}
    greedy = check_greedy(model, loaded, tasks, max_new_tokens, chosen, batch, **how)
    law = check_law(
        model, loaded, tasks, sampling, max_new_tokens, chosen, batch, repeats=repeats, seed=seed, **how
    )
    found = verdict_of(greedy, law)
    if as_json:
        facts = {"target": target, "draft": draft, "policy": policy, "temperatures": temperatures}
        print_json({**facts, **found})
    else:
        console = stdout()
        for line in sentences(found):
            console.print(Text(line), soft_wrap=True)
        verdict = ("lossless", "green") if found["lossless"] else ("NOT lossless", "bold red")
        console.print(Text(*verdict))
    if not found["lossless"]:
        raise typer.Exit(FAILED)
