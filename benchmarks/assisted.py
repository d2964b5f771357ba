"""Our drafts next to what transformers itself offers at batch 1: prompt lookup and assisted generation.

    OMP_NUM_THREADS=1 python benchmarks/assisted.py [--prompts 24] [--temperature 0] [--json FILE]

All methods answer the same test prompts of the pocket target in turns, in one process. A method's figure is
its tokens per processor second over those of transformers' plain `generate`, with a paired bootstrap over
prompts. Assisted generation needs a smaller model with the same tokenizer, which the pocket target does not
have: its own first layers assist it (`assistant_early_exit`), every third number of them. Greedy answers are
compared token for token.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from deepspec.checkpoints.draft import load_draft
from deepspec.decode.engine import Decoder, Request
from deepspec.drafts.base import Draft
from deepspec.drafts.lookup import PromptLookup
from deepspec.files import write_json
from deepspec.maths.acceptance import paired_bootstrap_ratio
from deepspec.maths.verify import Sampling
from deepspec.measure.evaluate import load_prompts
from deepspec.pocket import prompts_path
from deepspec.targets import Target

NEW = 64
DRAFTS = ("pocket-dspark", "pocket-dflash", "pocket-eagle3")
Answer = Callable[[Sequence[int]], list[int]]


def ours(target: Target, draft: Draft | None, temperature: float) -> Answer:
    """Answers by our decoder."""
    decoder, stops = Decoder(target, draft), frozenset(target.stop_token_ids)

    def answer(ids: Sequence[int]) -> list[int]:
        request = Request(ids, NEW, sampling=Sampling(temperature), stop_token_ids=stops)
        return next(decoder.run([request])).token_ids

    return answer


def theirs(target: Target, temperature: float, **assistance: int) -> Answer:
    """Answers by transformers' `generate`."""
    return partial(
        target.transformers_generate,
        max_new_tokens=NEW,
        temperature=temperature,
        stops=sorted(target.stop_token_ids),
        **assistance,
    )


def methods(target: Target, temperature: float) -> dict[str, Answer]:
    """Every method, by its name. The first is what the others are measured by."""
    found = {
        "transformers": theirs(target, temperature),
        "transformers, prompt lookup": theirs(target, temperature, prompt_lookup_num_tokens=7),
    }
    for layers in range(1, target.spec.num_layers, 3):
        name = f"transformers, assisted by {layers} of {target.spec.num_layers} layers"
        found[name] = theirs(target, temperature, assistant_early_exit=layers)
    found["plain"] = ours(target, None, temperature)
    found["prompt lookup"] = ours(target, PromptLookup(target.vocab_size), temperature)
    return found | {name: ours(target, load_draft(name, target), temperature) for name in DRAFTS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    target = Target.from_pretrained("pocket")
    prompts = load_prompts(prompts_path("pocket:test"), target, limit=given.prompts)
    answers = methods(target, given.temperature)
    seconds: dict[str, list[float]] = {name: [] for name in answers}
    texts: dict[str, list[list[int]]] = {name: [] for name in answers}
    for answer in answers.values():
        answer(prompts[0].ids)
    for prompt in prompts:
        for name, answer in answers.items():
            began = time.thread_time()
            texts[name].append(answer(prompt.ids))
            seconds[name].append(time.thread_time() - began)
    record = {}
    base = next(iter(answers))
    speeds = {name: ([float(len(t)) for t in texts[name]], seconds[name]) for name in answers}
    for name in answers:
        ratio = paired_bootstrap_ratio(speeds[name], speeds[base], seed=0)
        assert ratio is not None
        same = sum(a == b for a, b in zip(texts[name], texts[base], strict=True))
        record[name] = {**ratio._asdict(), "same": same, "of": len(prompts)}
        interval = f"{ratio.value:5.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"
        print(f"{name:44} {interval}  the same answer: {same}/{len(prompts)}")
    if given.json:
        write_json(given.json, record)


if __name__ == "__main__":
    main()
