"""`deepspec data regenerate`: answers by the target itself."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deepspec.cli.common import (
    Limit,
    MaxNew,
    Seed,
    SkipBad,
    Thinking,
    TopK,
    TopP,
    load_target,
    prompt_file,
    report_skipped,
    sampling_of,
    skipping,
)
from deepspec.errors import UserError
from deepspec.files import check_writable
from deepspec.log import note

MANY = 500
"""Prompts from which on it is worth saying how they are answered fastest."""

if TYPE_CHECKING:
    from deepspec.answers.file import Tally
    from deepspec.data.conversations import Conversation


def regenerate(
    prompts: Annotated[
        str, typer.Argument(metavar="PROMPTS", help="JSONL file of prompts, or pocket:train.")
    ],
    out: Annotated[Path, typer.Option(help="JSONL file that answers are appended to.")],
    target: Annotated[
        str | None,
        typer.Option(help="pocket (the default in process), a directory, a GGUF file, a Hub id."),
    ] = None,
    thinking: Thinking = False,
    temperature: Annotated[
        float, typer.Option(min=0, help="1 samples from the target's own distribution.")
    ] = 1.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    max_new_tokens: MaxNew = 256,
    seed: Seed = 0,
    limit: Limit = 0,
    batch: Annotated[
        int | None,
        typer.Option("--batch", "--rows", min=1, help="In process: number of prompts decoded together (16)."),
    ] = None,
    server: Annotated[
        list[str] | None, typer.Option(metavar="URL", help="Ask this server instead; repeat it for several.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="The target's name on the servers; default: the first listed.")
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="Number of prompts with each server at once (32).")
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(min=1, help="Seconds to wait for one answer (600).")
    ] = None,
    api_key_env: Annotated[
        str, typer.Option(metavar="NAME", help="Environment variable that holds the servers' key.")
    ] = "OPENAI_API_KEY",
    skip_bad: SkipBad = False,
) -> None:
    """Have the target answer prompts, for a draft to learn.

    A draft must learn what this target writes. The target runs in this process, or in OpenAI-compatible
    servers (vLLM, SGLang, llama-server). Rows that the output file already answers are not asked again, so
    the same command continues where it stopped.

    With servers, give --target too if its tokenizer is available: prompts are then built by its template here
    and sent as token ids.

    \b
    Example:
      deepspec data regenerate prompts.jsonl --out answers.jsonl --target pocket
      deepspec data regenerate prompts.jsonl --out answers.jsonl --target Qwen/Qwen3-4B \\
          --server http://gpu1:8000 --server http://gpu2:8000 --max-new-tokens 4096
    """
    only_served = {"--model": model, "--concurrency": concurrency, "--timeout": timeout}
    ignored = {"--batch": batch} if server else only_served
    stray = next((option for option, value in ignored.items() if value is not None), None)
    if stray is not None:
        raise UserError(
            f"{stray} has no effect {'with' if server else 'without'} --server",
            next_step="the number of prompts asked at once is --concurrency with servers, --batch in process",
        )
    check_writable(out)
    source, sampling = prompt_file(prompts, target or "pocket"), sampling_of(temperature, top_k, top_p)
    from deepspec.data.conversations import read_conversations

    skipped = skipping(skip_bad)
    # All are read once before the first is answered: a broken row late in the file ends no long run.
    total = sum(1 for _ in islice(read_conversations(source, skipped=skipping(skip_bad)), limit or None))
    if not total:
        raise UserError(
            f"{source} holds no prompts", next_step="give a JSONL file, one conversation per line"
        )
    asked: Iterable[Conversation] = islice(read_conversations(source, skipped=skipped), limit or None)
    settings: dict[str, Any] = {
        "thinking": thinking,
        "sampling": sampling,
        "max_new_tokens": max_new_tokens,
        "seed": seed,
        "total": total,
    }
    if server:
        from deepspec.answers.through_servers import regenerate_served
        from deepspec.http_client import Policy
        from deepspec.targets import TargetSpec

        tally = regenerate_served(
            server,
            asked,
            out,
            target=None if target is None else TargetSpec.from_pretrained(target),
            model=model,
            concurrency=concurrency or 32,
            api_key_env=api_key_env,
            policy=Policy(timeout=timeout or 600.0),
            **settings,
        )
    else:
        from deepspec.answers.in_process import check_settings, regenerate
        from deepspec.targets import TargetSpec

        target = target or "pocket"
        if total >= MANY:
            note(in_process_advice(total))
        options = {key: value for key, value in settings.items() if key != "total"}
        check_settings(TargetSpec.from_pretrained(target), out, **options)
        tally = regenerate(load_target(target), asked, out, max_rows=batch or 16, **settings)
    report_skipped(skipped)
    _report(tally, out, target or "TARGET", thinking)


def in_process_advice(total: int) -> str:
    """Which way to answer so many prompts takes least, on a machine like this one (docs/regenerate.md)."""
    import torch

    start = f"{total:,} prompts are answered in this process. "
    if torch.cuda.is_available():
        return start + (
            "On a GPU, an inference server such as vLLM decodes more of them at a time: start it with this "
            "target and add --server URL --target TARGET"
        )
    return start + (
        "On a CPU, llama-server is about as fast, and reads the 4-bit file as it is, in an eighth of the "
        "memory. For a target that is large for this machine, start it with --parallel 16, and add "
        "--server URL --target TARGET"
    )


def _report(tally: Tally, out: Path, target: str, thinking: bool) -> None:
    """Print what was done, and the commands that may follow."""
    from deepspec.answers.file import beside
    from deepspec.planning import any_target

    before = f"; {tally.there} rows had one before" if tally.there else ""
    typer.echo(f"{out}: {tally.new} new answers{before}")
    if tally.new:
        seconds = max(tally.seconds, 1e-9)
        typer.echo(
            f"{tally.tokens:,} tokens in {seconds:.1f} s: {tally.new / seconds:.2f} rows/s, "
            f"{tally.tokens / seconds:.0f} tokens/s"
        )
    if tally.twice:
        typer.echo(f"{tally.twice} rows left out: an earlier row has the same id")
    if tally.failed:
        typer.echo(
            f"{tally.failed} rows failed, with reasons in {beside(out, 'failures')}; "
            "the same command tries them again"
        )
    inspect = ["deepspec", "data", "inspect", str(out), "--target", target]
    recipe = ["pocket-dspark"] if target == "pocket" else [f"dspark/{any_target()}", f"target={target}"]
    train = ["deepspec", "train", *recipe, f"data.train={out}", *(["thinking=true"] if thinking else [])]
    typer.echo(f"next: {shlex.join(inspect)}")
    typer.echo(f"      {shlex.join(train)}")
