"""What a feature cache costs on disk, what it does to a draft, and how fast it is written and read.

    python benchmarks/feature_cache.py --answers answers.jsonl --tau        train and measure (resumable)
    python benchmarks/feature_cache.py --answers answers.jsonl --speed      sizes, writing, reading
    python benchmarks/feature_cache.py --write                              the tables of docs/features.md

Figures are kept in benchmarks/feature_cache.json, from which the tables are written.

τ: every draft trains with the shipped pocket recipe, the same answers, seeds and number of steps; only the
source of its features differs. It is measured at T=1 on all 120 held-out prompts after the last step;
differences are paired over prompts, the seeds' counts added up per prompt.

Speed: ratios taken in one process, the median of five rounds. The disk alone is a plain sequential write with
fsync, and a plain sequential read, of the same files; the page cache is told to drop them before every read.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

import deepspec.features.cache_write as writing
from deepspec.config import load_recipe
from deepspec.cost.dimensions import PUBLISHED_TARGETS
from deepspec.cost.inputs import Inputs, published_counts
from deepspec.cost.machines import MACHINES
from deepspec.cost.plan import make_plan
from deepspec.data.tokens import Encoded
from deepspec.drafts import ALGORITHMS
from deepspec.features.batches import Source, batch_order, load_rows, online
from deepspec.features.cache_read import cached, open_cache
from deepspec.features.cache_write import Plan, plan_cache, write_cache
from deepspec.features.formats import TOKEN_BYTES, vector_bytes
from deepspec.features.quantise import FORMATS
from deepspec.maths.acceptance import bootstrap_ratio, paired_bootstrap_difference
from deepspec.maths.blocks import FeatureBatch
from deepspec.planning import describe
from deepspec.targets import StepOutput, Target
from deepspec.train.build import feature_layers, read_rules
from deepspec.train.data import cache_features
from deepspec.train.loop import train_draft
from draft_quality import measure

PAGE = Path(__file__).parents[1] / "docs" / "features.md"
FIGURES = Path(__file__).with_suffix(".json")
SOURCES = ("online", *FORMATS)
ANSWERS = 10_000
SERVED = {"all three": ALGORITHMS, "DSpark": ("dspark",), "DFlash": ("dflash",), "Eagle-3": ("eagle3",)}
TRAINING = [
    "optim.max_minutes=null",
    "eval_every_steps=100000",
    "eval_prompts=2",
    "eval_max_new_tokens=8",
    "trackers=[none]",
]
Results = dict[str, Any]


# ── accepted length ───────────────────────────────────────────────────────────────────────────────────


def caches(target: Target, answers: Path, out: Path) -> dict[str, Path]:
    """One cache per format, each serving all three recipes."""
    recipes = [load_recipe(f"pocket-{a}") for a in ALGORITHMS]
    found = {}
    for form in FORMATS:
        found[form] = out / f"cache-{form}"
        cache_features(recipes, found[form], target=target, answers=answers, dtype=form)
    return found


def train_and_measure(arguments: argparse.Namespace) -> None:
    """One small JSON file per draft, source and seed; those that are there are not made again."""
    out, answers = Path(arguments.out), Path(arguments.answers)
    target = Target.from_pretrained("pocket")
    where = {form: f"cache:{path}" for form, path in caches(target, answers, out).items()} | {
        "online": "online"
    }
    for seed in arguments.seeds:
        for algorithm in arguments.algorithms:
            for source in SOURCES:
                file = out / "tau" / f"{algorithm}-{source}-{seed}.json"
                if file.exists():
                    continue
                changes = [
                    f"optim.max_steps={arguments.steps}",
                    f"seed={seed}",
                    f"data.features={where[source]}",
                    f"name={algorithm}-{source}-{seed}",
                ]
                recipe = load_recipe(f"pocket-{algorithm}", [*TRAINING, *changes])
                outcome = train_draft(recipe, out / "runs", target=target, answers=answers)
                facts = {
                    "counts": measure(target, outcome.best, 1.0, 96),
                    "steps": outcome.steps,
                    "tokens": outcome.tokens,
                    "seconds": outcome.seconds,
                }
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps(facts))
                print(file, flush=True)


def tau_summary(out: Path) -> Results:
    """τ per draft and source, seeds pooled per prompt, and differences to online paired over prompts."""
    shown: Results = {}
    for algorithm in ALGORITHMS:
        totals: dict[str, tuple[list[float], list[float]]] = {}
        for source in SOURCES:
            found = [json.loads(f.read_text()) for f in sorted(out.glob(f"tau/{algorithm}-{source}-*.json"))]
            if not found:
                continue
            ids = list(found[0]["counts"])
            totals[source] = (
                [float(sum(r["counts"][i][0] for r in found)) for i in ids],
                [float(sum(r["counts"][i][1] for r in found)) for i in ids],
            )
            entry = {
                "tau": bootstrap_ratio(*totals[source], 0),
                "seeds": len(found),
                "steps": found[0]["steps"],
                "tokens": sum(r["tokens"] for r in found),
            }
            if source != "online":
                entry["minus_online"] = paired_bootstrap_difference(totals[source], totals["online"], 0)
            shown[f"{algorithm} {source}"] = entry
    return shown


# ── sizes ─────────────────────────────────────────────────────────────────────────────────────────────


def plan_for(
    algorithms: Sequence[str], rows: Sequence[Encoded], target: Target, form: str, **named: Any
) -> Plan:
    """The plan of a cache that serves these pocket recipes."""
    recipes = [load_recipe(f"pocket-{a}") for a in algorithms]
    layers = {layer for r in recipes for layer in feature_layers(r, target.spec.config)}
    reads = {rule for r in recipes for rule in read_rules(r)}
    return plan_cache(rows, target, sorted(layers), sorted(reads), dtype=form, about={}, **named)


def sizes(target: Target, rows: Sequence[Encoded], out: Path) -> Results:
    """Shares of positions stored, and bytes per token of every cache: its files, and the formula."""
    found: Results = {"rows": len(rows), "tokens": sum(len(r.ids) for r in rows)}
    # One shard, and the same layers for all: every cache is made of the same passes of the target.
    replayed = replay(plan_for(ALGORITHMS, rows, target, "bf16", shard_bytes=1 << 40), target)
    for name, algorithms in SERVED.items():
        counts = plan_for(algorithms, rows, target, "bf16").counts
        found[name] = {
            "features": sum(c.features for c in counts) / found["tokens"],
            "hidden": sum(c.hidden for c in counts) / found["tokens"],
        }
        for form in FORMATS:
            folder = out / "sizes"
            plan = plan_for(algorithms, rows, target, form, shard_bytes=1 << 40)
            with patch.object(writing, "online", lambda *_: replayed):
                write_cache(plan, target, folder)
            files = sum(f.stat().st_size for f in folder.iterdir())
            shutil.rmtree(folder)
            found[name][form] = {
                "measured": files / found["tokens"],
                "formula": plan.payload / found["tokens"],
            }
    return found


def bytes_per_token(width: int, layers: int, form: str, features: float = 1.0, hidden: float = 1.0) -> float:
    """Of a cache, from the shares of positions whose features and last hidden states are stored."""
    return TOKEN_BYTES + (features * layers + hidden) * vector_bytes(width, form)


# ── speed ─────────────────────────────────────────────────────────────────────────────────────────────


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def forget(folder: Path) -> None:
    """Ask the system to drop the files from its page cache."""
    for file in folder.glob("*.safetensors"):
        handle = os.open(file, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


class Stand:
    """In a target's place: as wide as Qwen3-4B, its outputs looked up instead of computed."""

    def __init__(self, like: Target, width: int = 2560) -> None:
        facts = {"name": "stand-in", "config_hash": "stand-in", "hidden_size": width}
        self.spec, self.device, self.dtype = SimpleNamespace(**facts), torch.device("cpu"), torch.bfloat16
        generator = torch.Generator().manual_seed(0)
        self.table = torch.randn(like.vocab_size, width, generator=generator).bfloat16()

    def read(self, ids: torch.Tensor, layers: Sequence[int]) -> StepOutput:
        found = self.table[ids]
        return StepOutput(found, found.repeat(1, 1, len(layers)))


def replay(plan: Plan, target: Target) -> Source:
    """The writer's own batches, computed beforehand: writing without the target."""
    held: dict[tuple[str, ...], FeatureBatch] = {}
    source = online(target, plan.facts["layers"])
    for shard in plan.shards:
        rows = [plan.rows[r] for r in shard]
        for picked in writing.batch_rows(rows, plan.facts["batch_tokens"]):
            batch = source([rows[i] for i in picked], len(rows[picked[0]].ids))
            held[batch.row_ids] = batch
    return lambda rows, width: held[tuple(r.id for r in rows)]


def plain_write(contents: Sequence[bytes], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i, data in enumerate(contents):
        with (folder / f"{i}.safetensors").open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())


def plain_read(folder: Path) -> None:
    buffer = bytearray(1 << 22)
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass


def one_round(
    plan: Plan, replayed: Source, target: Any, batches: Sequence[list[Encoded]], out: Path
) -> Results:
    """Seconds of each way to write and read the same bytes once."""
    folder, beside = out / "cache", out / "plain"
    layers, reads = plan.facts["layers"], plan.facts["reads"]

    def epoch(source: Source) -> None:
        for batch in batches:
            source(batch, max(len(r.ids) for r in batch))

    shutil.rmtree(out, ignore_errors=True)
    with patch.object(writing, "online", lambda *_: replayed):
        timed = {"write": seconds(lambda: write_cache(plan, target, folder))}
    contents = [f.read_bytes() for f in sorted(folder.glob("*.safetensors"))]
    timed["disk write"] = seconds(lambda: plain_write(contents, beside))
    timed["bytes"] = float(sum(map(len, contents)))
    forget(beside)
    timed["disk read"] = seconds(lambda: plain_read(beside))
    forget(folder)
    timed["check"] = seconds(lambda: write_cache(plan, target, folder, verify=True))
    source = cached(open_cache(folder), target, layers, reads)
    forget(folder)
    timed["read"] = seconds(lambda: epoch(source))
    timed["read again"] = seconds(lambda: epoch(source))
    if isinstance(target, Target):
        timed["online"] = seconds(lambda: epoch(online(target, layers)))
    return timed


def speed(target: Target, rows: Sequence[Encoded], out: Path, rounds: int = 5) -> Results:
    """Per width and format: median seconds, and median ratios of each round, of a cache for all drafts."""
    found: Results = {}
    for name, of, some, mib in (
        ("192 wide", target, rows[:200], 16),
        ("2,560 wide", Stand(target), rows[:120], 128),
    ):
        order = batch_order([len(r.ids) for r in some], load_recipe("pocket-dspark").optim.batch_size, 0, 0)
        batches = [[some[i] for i in picked] for picked in order]
        for form in FORMATS:
            layers = feature_layers(load_recipe("pocket-dspark"), target.spec.config)
            reads = ("context", "labels", "unroll")
            plan = plan_cache(some, of, layers, reads, dtype=form, about={}, shard_bytes=mib << 20)
            replayed = replay(plan, of)
            timed = [one_round(plan, replayed, of, batches, out / "speed") for _ in range(rounds)]
            entry: Results = {key: statistics.median(t[key] for t in timed) for key in timed[0]}
            entry["ratios"] = {
                key: statistics.median(t[one] / t[two] for t in timed)
                for key, (one, two) in RATIOS.items()
                if two in timed[0]
            }
            found[f"{name}, {form}"] = entry | {"tokens": sum(len(r.ids) for r in some)}
    shutil.rmtree(out / "speed")
    return found


RATIOS = {
    "writing, share of the disk's speed": ("disk write", "write"),
    "checking, share of the disk's speed": ("disk read", "check"),
    "reading cold, share of the disk's speed": ("disk read", "read"),
    "reading cold, share of the time of computing online": ("read", "online"),
    "reading warm, share of the time of computing online": ("read again", "online"),
    "writing, share of the time of computing online": ("write", "online"),
}


# ── the page ──────────────────────────────────────────────────────────────────────────────────────────


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)


def sizes_table(figures: Results) -> str:
    found = figures["sizes"]
    rows = []
    for name in SERVED:
        entry = found[name]
        cells = [name, f"{entry['features']:.1%}", f"{entry['hidden']:.1%}"]
        cells += [f"{entry[f]['measured']:,.0f} ({entry[f]['formula']:,.0f})" for f in FORMATS]
        rows.append(cells)
    return table(("a cache for", "features at", "last hidden states at", *FORMATS), rows)


def qwen_table(figures: Results) -> str:
    """Qwen3-4B, by the formula: every position, and the shares of the pocket's answers."""
    width = PUBLISHED_TARGETS["Qwen/Qwen3-4B"]["hidden_size"]
    rows = [
        ["every position, as published", "100.0%", "100.0%"]
        + [f"{bytes_per_token(width, 5, f) - TOKEN_BYTES:,.0f}" for f in FORMATS]
    ]
    for name in SERVED:
        entry = figures["sizes"][name]
        shares = entry["features"], entry["hidden"]
        cells = [name, *(f"{s:.1%}" for s in shares)]
        rows.append([*cells, *(f"{bytes_per_token(width, 5, f, *shares):,.0f}" for f in FORMATS)])
    return table(("a cache for", "features at", "last hidden states at", *FORMATS), rows)


def one_gpu_table(figures: Results) -> str:
    """Ten epochs of Qwen3-4B drafts on one card, as `deepspec plan` counts them: operations with and without
    a cache, and its disk."""
    rows = []
    for algorithm in ("dspark", "dflash", "eagle3"):
        recipe, counts = load_recipe(f"{algorithm}/one-gpu"), published_counts()
        config = PUBLISHED_TARGETS[recipe.target]
        found = make_plan(Inputs(recipe, config, counts, MACHINES["rtx4090"], describe)).sections
        work = {key: entry.value for key, entry in found["operations"].items()}
        features, training = work["features, an epoch"], work["training, an epoch"]
        left = features / (recipe.optim.epochs or 1) + training
        share = ANSWERS / found["data"]["rows"].value
        disk = (share * found["disk"][f"cache in {f}"].value for f in ("bf16", "fp8"))
        cells = [f"{part / (features + training):.0%}" for part in (features, left)]
        rows.append([f"`{algorithm}/one-gpu`", *cells, *(f"{b / 1e9:,.0f} GB" for b in disk)])
    heads = "recipe", "operations spent on features online", "operations left with a cache"
    return table((*heads, f"disk of {ANSWERS:,} answers, bf16", "fp8"), rows)


def tau_table(figures: Results) -> str:
    names = {"dspark": "DSpark", "dflash": "DFlash", "eagle3": "Eagle-3"}
    rows = []
    for key, entry in figures["tau"].items():
        algorithm, source = key.split()
        shown = "{:.3f} [{:.3f}, {:.3f}]".format(*entry["tau"])
        difference = entry.get("minus_online")
        beside = "" if difference is None else "{:+.3f} [{:+.3f}, {:+.3f}]".format(*difference)
        cells = [names[algorithm], source, shown, beside, str(entry["seeds"]), str(entry["steps"])]
        rows.append(cells)
    return table(("draft", "features", "τ, T=1", "minus online", "seeds", "steps"), rows)


def speed_table(figures: Results) -> str:
    rows = []
    for name, entry in figures["speed"].items():
        disk = "{:,.0f} / {:,.0f}".format(
            *(entry["bytes"] / entry[f"disk {k}"] / 1e6 for k in ("write", "read"))
        )
        ratios = (f"{entry['ratios'][k]:.2f}" if k in entry["ratios"] else "" for k in RATIOS)
        rows.append([name, disk, *ratios])
    return table(("cache", "disk alone, MB/s, write / read", *RATIOS), rows)


TABLES = {
    "sizes": sizes_table,
    "qwen": qwen_table,
    "one-gpu": one_gpu_table,
    "tau": tau_table,
    "speed": speed_table,
}


def marks(name: str) -> tuple[str, str]:
    return f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"


def page_with(text: str, figures: Results) -> str:
    """The page with every table made from the figures."""
    for name, made in TABLES.items():
        begin, end = marks(name)
        before, rest = text.split(begin)
        text = before + begin + made(figures) + end + rest.split(end)[1]
    return text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--answers", help="answered training conversations of the pocket target")
    parser.add_argument("--out", default="runs/feature-cache")
    parser.add_argument("--tau", action="store_true")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--steps", type=int, default=350)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--algorithms", nargs="+", default=list(ALGORITHMS))
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    figures: Results = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    out = Path(arguments.out)
    if arguments.tau:
        train_and_measure(arguments)
        figures["tau"] = tau_summary(out)
    if arguments.speed:
        target = Target.from_pretrained("pocket")
        rows = load_rows(arguments.answers, target, thinking=False, max_length=512)
        figures["sizes"] = sizes(target, rows, out)
        figures["speed"] = speed(target, rows, out)
    if arguments.tau or arguments.speed:
        FIGURES.write_text(json.dumps(figures, indent=1) + "\n")
    if arguments.write:
        PAGE.write_text(page_with(PAGE.read_text("utf-8"), figures), "utf-8")


if __name__ == "__main__":
    main()
