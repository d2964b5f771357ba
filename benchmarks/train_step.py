"""A draft's training step next to its floor, a plain version and speculators: seconds, in turns.

    python benchmarks/train_step.py [--cases wide-dspark,long-dflash,…] [--threads 1] [--rounds 5] [--json]
    python benchmarks/train_step.py --growth [--svg docs/growth.svg]      one dimension doubled at a time

The floor is the step's matrix products alone: into memory that is there already, whole where we work in
chunks, a block's context exactly up to its anchor, causal attention as half a square, a teacher once for each
position that some row learns from. The plain version (`tests/reference/step.py`) has dense masks, whole
logits and autograd. `speculators` takes part if the package can be imported (`speculators_step.py`). Each
round runs every version once, in turns, on the same batch; a ratio is taken within its round, and the median
of all rounds is shown. Features are given, and AdamW's step is part of every version but the floor. Freed
memory is kept for the next step, as `deepspec train` does on a CPU, for every version (`--give-back`: for
none, as the peers run by themselves). The loss and the gradients of ours and the plain version are compared
before the clock runs.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path[:0] = [str(Path(__file__).parents[1] / folder) for folder in ("src", "tests", "benchmarks")]

from deepspec.drafts import ALGORITHMS, LossSettings  # noqa: E402
from deepspec.drafts.base import NeuralDraft  # noqa: E402
from deepspec.drafts.spec import new_spec  # noqa: E402
from deepspec.maths.blocks import FeatureBatch, unroll_masks  # noqa: E402
from deepspec.maths.head import Embedding, Head  # noqa: E402
from deepspec.report.charts import write_lines  # noqa: E402
from deepspec.train.memory import kept_memory  # noqa: E402
from reference.step import plain_block_loss, plain_unroll_loss  # noqa: E402

LOSSES = {
    "dspark": LossSettings(ce=0.1, l1=0.9, confidence=1.0),
    "dflash": LossSettings(ce=1.0),
    "eagle3": LossSettings(),
}
Product = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Case:
    """Sizes of one step. Two query heads, of 64 numbers each or 32 in a narrow draft, share a key head."""

    algorithm: str
    hidden: int
    vocab: int
    length: int
    anchors: int = 64
    sequences: int = 1
    layers: int = 2
    rank: int = 256
    block: int = 7

    @property
    def head_dim(self) -> int:
        return 64 if self.hidden >= 256 else 32

    @property
    def heads(self) -> int:
        return self.hidden // self.head_dim


CASES = {
    "wide-dspark": Case("dspark", 512, 151_936, 512),
    "wide-dflash": Case("dflash", 512, 151_936, 512),
    "long-dspark": Case("dspark", 256, 4_096, 4_096, anchors=512),
    "long-dflash": Case("dflash", 256, 4_096, 4_096, anchors=512),
    "eagle3": Case("eagle3", 256, 32_000, 512, layers=1),
    "tiny-dspark": Case("dspark", 128, 2_048, 256, sequences=4),
    "tiny-dflash": Case("dflash", 128, 2_048, 256, sequences=4),
    "tiny-eagle3": Case("eagle3", 128, 2_048, 256, sequences=4, layers=1),
}
GROWTH = {
    "anchors": {a: replace(CASES["long-dspark"], anchors=a) for a in (128, 256, 512)},
    "S": {s: replace(CASES["long-dspark"], length=s) for s in (1024, 2048, 4096)},
    "S, Eagle-3": {s: replace(CASES["tiny-eagle3"], length=s, sequences=1) for s in (512, 1024, 2048)},
    "V": {v: replace(CASES["wide-dspark"], vocab=v) for v in (16_384, 32_768, 65_536)},
}
"""Cases by the size of what grows."""


def make_draft(case: Case) -> NeuralDraft:
    config = {
        "model_type": "qwen3",
        "hidden_size": case.hidden,
        "intermediate_size": 3 * case.hidden,
        "num_attention_heads": case.heads,
        "num_key_value_heads": case.heads // 2,
        "head_dim": case.head_dim,
        "vocab_size": case.vocab,
        "num_hidden_layers": 12,
    }
    heads = (
        {"markov_rank": min(case.rank, case.hidden), "confidence": True} if case.algorithm == "dspark" else {}
    )
    spec = new_spec(
        config,
        algorithm=case.algorithm,
        num_layers=case.layers,
        block=case.block,
        mask_token_id=3,
        target_layer_ids=(1, 3, 5, 7, 9),
        **heads,
    )
    torch.manual_seed(0)
    draft = ALGORITHMS[case.algorithm].build(spec)
    weight = torch.randn(case.vocab, case.hidden) * 3 * case.hidden**-0.5
    draft.bind(Embedding(weight), Head(weight))
    if case.algorithm == "dspark":
        torch.nn.init.normal_(draft.markov_head.markov_w2.weight, std=0.02)  # type: ignore[union-attr]
    return draft


def make_batch(case: Case, seed: int) -> FeatureBatch:
    """The first fifth of every sequence is its prompt."""
    random = torch.Generator().manual_seed(seed)
    shape = (case.sequences, case.length)
    mask = torch.ones(shape, dtype=torch.bool)
    mask[:, : case.length // 5] = False
    return FeatureBatch(
        torch.randint(5, case.vocab, shape, generator=random),
        mask,
        torch.randn(*shape, 5 * case.hidden, generator=random),
        torch.randn(*shape, case.hidden, generator=random),
        torch.full((case.sequences,), case.length),
    )


# ── the floor ─────────────────────────────────────────────────────────────────────────────────────────


class Floor:
    """Matrix products of one step, on numbers that do not matter."""

    def __init__(self) -> None:
        self.memory: dict[str, Tensor] = {}

    def tensor(self, name: str, *shape: int) -> Tensor:
        """Memory that is there, by its role: a floor pays for no pages."""
        size = torch.Size(shape).numel()
        if name not in self.memory or self.memory[name].numel() < size:
            self.memory[name] = torch.randn(size)
        return self.memory[name][:size].view(shape)

    def product(self, rows: int, inner: int, columns: int) -> Product:
        left, right = self.tensor("left", rows, inner), self.tensor("right", inner, columns)
        return left, right, self.tensor("out", rows, columns)

    def linear(self, rows: int, inner: int, columns: int, *, inputs: bool = True) -> Iterator[Product]:
        """Forwards, gradient of the weight and, with `inputs`, of what it reads."""
        yield self.product(rows, inner, columns)
        yield self.product(columns, rows, inner)
        if inputs:
            yield self.product(rows, columns, inner)

    def attention(self, case: Case, queries: int, keys: int) -> Iterator[Product]:
        """Scores and mix, and the four products back, for all heads."""
        rows, dim = queries * 2, case.head_dim
        for _ in range(case.heads // 2):
            yield from (
                self.product(rows, dim, keys),
                self.product(rows, keys, dim),
                self.product(rows, dim, keys),
            )
            yield from (
                self.product(keys, rows, dim),
                self.product(rows, keys, dim),
                self.product(keys, rows, dim),
            )

    def products(self, case: Case, batch: FeatureBatch, plan: Any) -> Iterator[Product]:
        d, inner, kv = case.hidden, case.heads * case.head_dim, case.heads * case.head_dim // 2
        tokens = case.sequences * case.length
        yield from self.linear(tokens, 5 * d, d, inputs=False)
        if plan is None:
            masks = unroll_masks(batch.loss_mask, batch.lengths, case.block)
            rows, passes, read = int(masks.sum()), case.block, 2 * d
            slots, taught = tokens, int(masks[0].sum())
        else:
            rows, passes, read, slots = (
                int(plan.valid.sum()),
                case.layers,
                d,
                int(plan.kept.sum()) * case.block,
            )
            taught = sum(len(t[v].unique()) for t, v in zip(plan.teacher_index, plan.valid, strict=True))
        for _ in range(passes):
            if plan is not None:
                yield from self.linear(tokens, d, 2 * kv)
            for before, after in ((read, inner), (read, 2 * kv), (inner, d), (d, 6 * d), (3 * d, d)):
                yield from self.linear(slots, before, after)
            for row in range(case.sequences):
                keys = case.length // 2
                if plan is not None:
                    keys = int(plan.anchors[row][plan.kept[row]].double().mean()) + case.block
                yield from self.attention(case, slots // case.sequences, keys)
        yield self.product(rows, d, case.vocab)
        yield self.product(rows, case.vocab, d)
        if LOSSES[case.algorithm].l1 or plan is None:
            yield self.product(taught, d, case.vocab)
        if case.algorithm == "dspark":
            yield from self.linear(rows, min(case.rank, d), case.vocab)

    def run(self, case: Case, batch: FeatureBatch, plan: Any) -> None:
        for left, right, out in self.products(case, batch, plan):
            torch.mm(left, right, out=out)


# ── what is measured ──────────────────────────────────────────────────────────────────────────────────


def ours(draft: NeuralDraft, batch: FeatureBatch, loss: LossSettings, plan: Any) -> Tensor:
    return draft(batch, loss, plan, False).total


def plain(draft: NeuralDraft, batch: FeatureBatch, loss: LossSettings, plan: Any) -> Tensor:
    if plan is None:
        return plain_unroll_loss(draft, batch, loss)
    return plain_block_loss(draft, batch, loss, plan)


VERSIONS = {"ours": ours, "plain": plain}
Step = Callable[[FeatureBatch, Any], object]
"""A whole step of one version on a batch and its plan."""


def optimised(module: torch.nn.Module, loss_of: Callable[[FeatureBatch, Any], Tensor]) -> Step:
    """Forwards, backwards, clipping and AdamW."""
    weights = [p for p in module.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(weights, lr=1e-4, fused=True)

    def step(batch: FeatureBatch, plan: Any) -> None:
        loss_of(batch, plan).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        adamw.step()
        adamw.zero_grad()

    return step


def steps_of(case: Case, names: Sequence[str]) -> tuple[NeuralDraft, dict[str, Step]]:
    """A draft, and a step of each version. Ours and the plain version train the same weights."""
    draft, loss = make_draft(case), LOSSES[case.algorithm]
    found: dict[str, Step] = {}
    for name in names:
        if name == "floor":
            floor = Floor()
            found[name] = lambda batch, plan, floor=floor: floor.run(case, batch, plan)
        elif name == "speculators":
            from speculators_step import peer_loss

            found[name] = optimised(*peer_loss(case, draft))
        else:
            forward = VERSIONS[name]
            found[name] = optimised(draft, lambda batch, plan, f=forward: f(draft, batch, loss, plan))
    return draft, found


def agreement(case: Case, draft: NeuralDraft, batch: FeatureBatch, plan: Any) -> float:
    """Largest relative difference of the loss and of any gradient between ours and the plain version."""
    found = []
    for version in VERSIONS.values():
        draft.zero_grad()
        total = version(draft, batch, LOSSES[case.algorithm], plan)
        total.backward()
        found.append([total.detach(), *(p.grad for p in draft.parameters() if p.grad is not None)])
    draft.zero_grad()
    return max(float((a - b).norm() / b.norm().clamp(min=1e-12)) for a, b in zip(*found, strict=True))


def measure(case: Case, rounds: int, names: list[str]) -> dict[str, Any]:
    """Seconds of each version, by round, and their ratios: of the processor with one thread, and of the clock
    with several, since threads that wait for one another spin."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    draft, steps = steps_of(case, names)
    batches = [make_batch(case, seed) for seed in range(2)]
    plans = [draft.plan(b, case.anchors, torch.Generator().manual_seed(s)) for s, b in enumerate(batches)]
    difference = agreement(case, draft, batches[0], plans[0]) if "plain" in names else None
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 1):  # the first round warms up
        for name in names if turn % 2 else reversed(names):
            began = clock()
            steps[name](batches[turn % 2], plans[turn % 2])
            if turn:
                seconds[name].append(clock() - began)
    ratios = {
        f"ours/{name}": [a / b for a, b in zip(seconds["ours"], seconds[name], strict=True)]
        for name in names
        if name != "ours"
    }
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {"seconds": medians, "ratios": ratios, "difference": difference}


def draw(seconds: dict[str, dict[str, float]], path: Path) -> None:
    """Processor seconds by size, as a share of those of the smallest."""
    lines = {}
    for what, row in GROWTH.items():
        for version in ("ours", "floor"):
            values = [seconds[f"{what} {size:,}"][version] for size in row]
            lines[f"{what}: {version}"] = [value / values[0] for value in values]
    write_lines(path, "A training step", "size", "seconds, relative", ["1", "2", "4"], lines)


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} [{min(values):.2f}, {max(values):.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--growth", action="store_true", help="ours and the floor, one dimension doubled at a time"
    )
    parser.add_argument("--svg", type=Path, help="with --growth: where to draw it")
    parser.add_argument("--without-peers", action="store_true", help="ours and the floor only")
    parser.add_argument(
        "--give-back", action="store_true", help="leave freed memory to the C library's own rules"
    )
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    names = ["ours", "floor"]
    if not (chosen.growth or chosen.without_peers):
        names += ["plain"] + ["speculators"] * (importlib.util.find_spec("speculators") is not None)
        if "speculators" not in names:
            print("speculators is left out: it cannot be imported from this environment", file=sys.stderr)
    cases = {f"{what} {size:,}": case for what, row in GROWTH.items() for size, case in row.items()}
    if not chosen.growth:
        cases = {name: CASES[name] for name in chosen.cases.split(",")}
    report = {}
    for name, case in cases.items():
        with nullcontext() if chosen.give_back else kept_memory(torch.device("cpu")):
            report[name] = found = measure(case, chosen.rounds, names)
        if not chosen.json:
            parts = [f"{what} {spread(values)}" for what, values in found["ratios"].items()]
            parts += [f"{what} {value:.3f} s" for what, value in found["seconds"].items()]
            if found["difference"] is not None:
                parts.append(f"difference {found['difference']:.1e}")
            print(f"{name:14s} " + "   ".join(parts), flush=True)
    if chosen.growth and chosen.svg:
        draw({name: found["seconds"] for name, found in report.items()}, chosen.svg)
    if chosen.json:
        print(json.dumps({"threads": chosen.threads, "rounds": chosen.rounds, "cases": report}, indent=2))


if __name__ == "__main__":
    main()
