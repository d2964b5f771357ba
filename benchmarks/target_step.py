"""What a target's step costs next to its matrix products, and what batches gain.

    OMP_NUM_THREADS=1 python benchmarks/target_step.py [--target pocket] [--repeats 40]
    OMP_NUM_THREADS=1 python benchmarks/target_step.py --batches [--prompts 12]

The first compares, in turns in one process, the lean step, the step through transformers' modules and the
bare products of the same shapes (each projection on its own, the head included). The second decodes test
prompts of the pocket greedily one by one, 16 and 32 at once, plainly and with the drafts, by both paths.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from deepspec.checkpoints.draft import load_draft
from deepspec.decode.engine import Decoder, Request
from deepspec.measure.evaluate import load_prompts
from deepspec.pocket import PROMPTS
from deepspec.targets import Target

CONTEXT, NEW = 150, 64
SHAPES = ((1, 1), (1, 8), (16, 1), (16, 8))
DRAFTS = ("pocket-dspark", "pocket-dflash", "pocket-eagle3")


def both(name: str) -> tuple[Target, Target]:
    """(a target whose steps are lean, the same one stepped through transformers' modules)."""
    lean, general = (Target.from_pretrained(name, dtype="float32", device="cpu") for _ in range(2))
    general._lean = None
    for linear in general.decoder.layers.modules():
        if isinstance(linear, nn.Linear):
            linear.weight.data = linear.weight.data.contiguous()
    return lean, general


def products(target: Target, tokens: int) -> Callable[[], None]:
    """The step's bare products, in a function of no arguments."""
    linears = [m for m in target.decoder.layers.modules() if isinstance(m, nn.Linear)]
    shapes = [(m.out_features, m.in_features) for m in linears] + [tuple(target.head.weight.shape)]
    ready = [(torch.randn(tokens, i), torch.randn(o, i).t(), torch.empty(tokens, o)) for o, i in shapes]

    def run() -> None:
        for x, w, out in ready:
            torch.mm(x, w, out=out)

    return run


@torch.inference_mode()
def steps(name: str, repeats: int) -> None:
    lean, general = both(name)
    size, draw = lean.vocab_size, torch.Generator().manual_seed(0)
    for target in (lean, general):
        for slot in range(16):
            target.open(slot)
            target.step([slot], [torch.randint(size, (CONTEXT,), generator=draw).tolist()])
    print("| rows × new tokens | products ms | lean ms | modules ms | lean / products | lean / modules |")
    print("|---|---|---|---|---|---|")
    for rows, width in SHAPES:
        new = [torch.randint(size, (width,), generator=draw).tolist() for _ in range(rows)]

        def run(target: Target, new: list[list[int]] = new) -> None:
            slots = range(len(new))
            target.logits(target.step(slots, new).last_hidden)
            for slot in slots:
                target.rollback(slot, CONTEXT)

        runs = {"products": products(lean, rows * width)}
        runs |= {"lean": lambda: run(lean), "modules": lambda: run(general)}
        spent: dict[str, list[float]] = {kind: [] for kind in runs}
        for _ in range(repeats):
            for kind, each in runs.items():
                began = time.perf_counter()
                each()
                spent[kind].append(time.perf_counter() - began)
        bare, ours, theirs = (1e3 * statistics.median(spent[k]) for k in ("products", "lean", "modules"))
        figures = f"{bare:.2f} | {ours:.2f} | {theirs:.2f} | {ours / bare:.2f} | {ours / theirs:.2f}"
        print(f"| {rows} × {width} | {figures} |", flush=True)


def batches(name: str, count: int) -> None:
    lean, general = both(name)
    prompts = load_prompts(PROMPTS["pocket:test"], lean, limit=32)
    print(
        "| method | one by one: modules s | lean s | 16 at once: s | gain | 32 at once: gain | same tokens |"
    )
    print("|---|---|---|---|---|---|---|")
    for draft in ("plain", *DRAFTS):
        pair = [(t, None if draft == "plain" else load_draft(draft, t)) for t in (general, lean)]

        def run(which: int, rows: int, pair: list[Any] = pair) -> tuple[float, dict[str, list[int]]]:
            target, model = pair[which]
            asked = [
                Request(p.ids, NEW, i, p.id) for i, p in enumerate(prompts[: count if rows == 1 else 32])
            ]
            began = time.process_time()
            found = {g.key: g.token_ids for g in Decoder(target, model, max_rows=rows).run(asked)}
            return (time.process_time() - began) / len(found), found

        runs = [run(0, 1), run(1, 1), run(1, 16), run(1, 32)]
        (before, _), (alone, single), (some, _), (many, _) = runs
        same = sum(len({tuple(found[key]) for _, found in runs}) == 1 for key in single)
        gains = f"{some:.3f} | {alone / some:.2f} | {alone / many:.2f}"
        print(f"| {draft} | {before:.3f} | {alone:.3f} | {gains} | {same} of {len(single)} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--target", default="pocket")
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--batches", action="store_true")
    parser.add_argument("--prompts", type=int, default=12)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.batches:
        batches(options.target, options.prompts)
    else:
        steps(options.target, options.repeats)
