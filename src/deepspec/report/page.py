"""Evaluation results and training metrics as one page, or as one table in the terminal.

The page is a single HTML file with its style and its charts (inline SVG) inside: it opens from disk, loads
nothing, and runs no script. `templates/report.html.j2` only places words and geometry, and escapes every
string.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich import box
from rich.table import Table
from rich.text import Text

from deepspec.drafts import ALGORITHMS
from deepspec.files import atomic_file
from deepspec.report.charts import FRAME, Style, averaged, bar_chart, line_chart
from deepspec.report.results import (
    MISSING,
    Result,
    Row,
    condition_labels,
    condition_name,
    estimate,
    is_greedy,
    is_number,
    lossless_finding,
    number,
    rows_of,
    sampling_label,
)

KINDS = {
    "plain": "no draft",
    "generate": "no draft",
    "lookup": "repeats n-grams",
    "draft": "draft",
}
"""How a method guesses, for the second line of its cell."""
PAGE_ONLY = ("conditional acceptance", "survival")
"""Conventions of figures that the terminal's table does not show."""


def styles(algorithm_of: Mapping[str, str]) -> dict[str, Style]:
    """A style for every name, given its algorithm (or kind). Of several with one algorithm all but the first
    are hollow, and none is called by the algorithm's name alone."""
    found: dict[str, Style] = {}
    for name, algorithm in algorithm_of.items():
        row = ALGORITHMS.get(algorithm)
        shown, marker, dashes = (row.title, row.marker, row.dashes) if row else (name, "triangle", "8 3 2 3")
        namesakes = [other for other, theirs in algorithm_of.items() if theirs == algorithm]
        label = shown if len(namesakes) == 1 else name
        key = algorithm if algorithm in {*ALGORITHMS, *KINDS} - {"draft"} else "other"
        found[name] = Style(key, label, marker, dashes, hollow=namesakes.index(name) > 0)
    return found


def styles_of(results: Sequence[Result], training: Iterable[str] = ()) -> dict[str, Style]:
    """Styles of all methods; trained drafts that were not evaluated under their name get one by that name."""
    rows = [row for result in results for row in rows_of(result)]
    methods = {row.get("method", ""): row.get("algorithm") or row.get("kind") or "" for row in rows}
    folded = {name: name.casefold().replace("-", "").replace("_", "") for name in training}
    trained = {name: next((key for key in ALGORITHMS if key in text), "") for name, text in folded.items()}
    return styles({name: methods.get(name, key) for name, key in trained.items()}) | styles(methods)


def detail_of(row: Row) -> str:
    """A second line for the method's cell: algorithm and block, or what kind of baseline it is."""
    known = ALGORITHMS.get(row.get("algorithm") or "")
    shown = known.title if known else KINDS.get(row.get("kind", ""), "")
    if row.get("kind") == "draft" and is_number(row.get("block")):
        shown = f"{shown}, block {row['block']}"
    return "" if shown == row.get("method") else shown


def cells(row: Row, result: Result) -> dict[str, Any]:
    """One row of the table as text, shared by the page and the terminal.

    value, low, high: the speed-up that the page's first sentences quote, and the ends of its interval. If
    there are several domains it is the mean of theirs, so that each counts the same.
    """
    overall, by_domain = row.get("overall") or {}, row.get("domains") or {}
    tau, tau_interval = estimate(overall.get("tau"))
    speedup, speedup_interval = estimate(overall.get("speedup"), "×")
    if row.get("baseline") and speedup == MISSING:
        speedup = "baseline"
    mean = overall.get("speedup_mean_of_domains") if len(by_domain) > 1 else None
    of_domains = estimate(mean)[0] != MISSING
    quoted = (mean if of_domains else overall.get("speedup")) or {}
    speed, speed_interval = estimate(quoted, "×")
    value = 0.0 if speed == MISSING else quoted["value"]
    low, high = (quoted[end] if is_number(quoted.get(end)) else value for end in ("low", "high"))
    state, lossless = lossless_finding(row, result.get("conditions") or {})
    check = row.get("lossless") or {}
    domains = {name: estimate((each or {}).get("tau"))[0] for name, each in by_domain.items()}
    return {
        "method": row.get("method", MISSING),
        "kind": row.get("kind"),
        "detail": detail_of(row),
        "tau": tau,
        "tau_interval": tau_interval,
        "domains": [(name, text) for name, text in domains.items() if text != MISSING],
        "speedup": speedup,
        "speedup_interval": speedup_interval,
        "mean": speed if of_domains else "",
        "speed": speed,
        "speed_interval": speed_interval,
        "value": value,
        "low": low,
        "high": high,
        "speeds": [(name, estimate((each or {}).get("speedup"), "×")[0]) for name, each in by_domain.items()],
        "tokens_per_s": number(overall.get("tokens_per_s"), 1),
        "distinct": number(overall.get("distinct_4")),
        "repeated": number(overall.get("repeated_8")),
        "repeats": overall.get("repeated_8") or 0.0,
        "joules": number(overall.get("joules_per_token")),
        "lossless": lossless,
        "state": state,
        "identical": check.get("identical") or 0,
        "prompts": check.get("prompts") or 0,
    }


def conventions_of(results: Sequence[Result]) -> list[tuple[str, str]]:
    """(name, sentence) pairs of all results files, each pair once, in order."""
    pairs = [(str(k), str(v)) for result in results for k, v in (result.get("conventions") or {}).items()]
    return list(dict.fromkeys(pairs))


def results_table(results: Sequence[Result]) -> Table:
    """The results as a terminal table: a section per results file, and below it what the columns mean.

    Fits 80 columns. Cells are `Text`, never markup, so a method called "[red]" stays what it is.
    """
    table = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, padding=0, caption_justify="left", caption_style="none"
    )
    table.add_column(Text("method"), overflow="fold", min_width=13)
    ranges = ("τ\nlow–high", "τ per\ndomain", "speed-up\nlow–high")
    for head in (*ranges, "tok/s", "distinct-4\nrepeated-8", "J/token"):
        table.add_column(Text(head), justify="right", no_wrap=True)
    table.add_column(Text("lossless"), overflow="fold", min_width=8)
    energy_missing = False
    for label, result in zip(condition_labels(results), results, strict=True):
        table.add_row(Text(label, style="bold"))
        rows = [cells(row, result) for row in rows_of(result)]
        energy_missing |= any(cell["joules"] == MISSING for cell in rows)
        for cell in rows:
            texts = (
                f"{cell['method']}\n{cell['detail']}",
                f"{cell['tau']}\n{cell['tau_interval'].strip('[]').replace(', ', '–')}",
                "\n".join(f"{name} {tau}" for name, tau in cell["domains"]) or MISSING,
                f"{cell['speedup']}\n{cell['speedup_interval'].strip('[]').replace(', ', '–')}\n"
                + (cell["mean"] and f"mean {cell['mean']}"),
                cell["tokens_per_s"],
                f"{cell['distinct']}\n{cell['repeated']}",
                cell["joules"],
                cell["lossless"].replace(" identical", "").replace(", ", "\n"),
            )
            table.add_row(*(Text(text.strip()) for text in texts), end_section=cell is rows[-1])
    pairs = conventions_of(results)
    notes = [f"{name}: {sentence}" for name, sentence in pairs if not name.startswith(PAGE_ONLY)]
    notes += ["lossless: prompts answered exactly as by plain greedy decoding / prompts compared"]
    notes += [f"J/token {MISSING}: not measurable here"] if energy_missing else []
    table.caption = Text("\n".join(notes))
    return table


def training_charts(
    training: Mapping[str, Sequence[Mapping[str, Any]]], looks: Mapping[str, Style]
) -> list[dict[str, Any]]:
    """Held-out τ of all drafts over wall-clock, then one loss chart per draft.

    Each loss has its own chart: losses of different algorithms are different sums and cannot be compared.
    """

    def line(rows: Sequence[Mapping[str, Any]], name: str, seconds: float = 1.0) -> list[tuple[float, float]]:
        pairs = [(row.get("seconds"), row.get(name)) for row in rows]
        return [(x / seconds, y) for x, y in pairs if is_number(x) and is_number(y)]

    longest = max((x for rows in training.values() for x, _ in line(rows, "loss")), default=0.0)
    unit, seconds = ("hours", 3600.0) if longest > 3 * 3600 else ("minutes", 60.0)
    if longest <= 180:
        unit, seconds = "seconds", 1.0
    label = f"training time, {unit}"
    held_out = [(looks[name], line(rows, "held_out_tau", seconds)) for name, rows in training.items()]
    charts = [line_chart("Held-out τ", label, "tokens per round", held_out)]
    for name, rows in training.items():
        points = averaged(line(rows, "loss", seconds))
        title = f"Loss, {looks[name].label}"
        charts.append(line_chart(title, label, "loss", [(looks[name], points)], markers=False))
    return [chart for chart in charts if chart]


def sample_groups(result: Result, looks: Mapping[str, Style]) -> list[dict[str, Any]]:
    """Sample outputs by prompt, each method's answer with its share of characters from the draft."""
    groups: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows_of(result):
        for sample in row.get("samples") or []:
            domain, prompt = str(sample.get("domain", "")), str(sample.get("prompt", ""))
            pieces = [(str(p.get("text", "")), p.get("by") == "draft") for p in sample.get("pieces") or []]
            total = sum(len(text) for text, _ in pieces)
            share = sum(len(text) for text, drafted in pieces if drafted) / total if total else 0.0
            group = groups.setdefault((domain, prompt), {"domain": domain, "prompt": prompt, "answers": []})
            style = looks[row.get("method", "")]
            group["answers"].append({"style": style, "share": f"{share:.0%}", "pieces": pieces})
    return list(groups.values())


def condition_section(result: Result, label: str, looks: Mapping[str, Style]) -> dict[str, Any]:
    """Everything the page shows for one results file."""
    conditions = result.get("conditions") or {}
    rows = rows_of(result)
    drafts = [row for row in rows if row.get("kind") == "draft"]

    def look(row: Row) -> Style:
        return looks[row.get("method", "")]

    domains = list(dict.fromkeys(name for row in rows for name in row.get("domains") or {}))
    by_domain = [
        (name, [(look(row), ((row.get("domains") or {}).get(name) or {}).get("tau")) for row in rows])
        for name in domains
    ]

    def by_position(name: str) -> list[tuple[Style, list[tuple[Any, Any]]]]:
        found = [(look(row), (row.get("overall") or {}).get(name) or []) for row in drafts]
        return [(style, list(enumerate(values, start=1))) for style, values in found]

    position = "position in the block"
    speeds = [(look(row), (row.get("overall") or {}).get("speedup")) for row in rows]
    charts = [
        bar_chart(f"Speed-up at {label}", [("", speeds)], "×"),
        bar_chart(f"Accepted length τ by domain at {label}", by_domain, ""),
        line_chart("Conditional acceptance", position, "share", by_position("conditional"), (0, 1), True),
        line_chart("Survival", position, "share", by_position("survival"), (0, 1), True),
    ]
    return {
        "label": label,
        "sampling": sampling_label(conditions),
        "greedy": is_greedy(conditions),
        "rule": conditions.get("acceptance_rule") or "not recorded",
        "rows": [{**cells(row, result), "style": look(row)} for row in rows],
        "bars": [chart for chart in charts[:2] if chart],
        "curves": [chart for chart in charts[2:] if chart],
        "positions": [
            (style, measure, [number(y) for _, y in line])
            for measure in ("conditional", "survival")
            for style, line in by_position(measure)
        ],
        "samples": sample_groups(result, looks),
    }


def write_report(
    path: str | Path,
    results: Sequence[Result],
    training: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    title: str = "Speculative decoding report",
    notes: Sequence[str] = (),
) -> Path:
    """Write the page to `path` (its folder is made) and return the path.

    `results` are results files, one per sampling condition; `training` maps a draft's name to the rows of
    its metrics.jsonl; `notes` appear under the headline. Text that UTF-8 cannot carry is replaced.
    """
    training = {name: list(rows) for name, rows in (training or {}).items()}
    looks = styles_of(results, training)
    labels = condition_labels(results)
    sections = [condition_section(*pair, looks) for pair in zip(results, labels, strict=True)]
    # The first sentences are about the fastest draft at temperature 0, or in the first file if there is none.
    first = next((each for each in sections if each["greedy"]), sections[0] if sections else {"rows": []})
    drafts = [row for row in first["rows"] if row["kind"] == "draft"]
    recorded = [each.get("conditions") or {} for each in results]
    loader = FileSystemLoader(Path(__file__).parent / "templates")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template("report.html.j2").render(
        title=title,
        first=first,
        best=max(drafts, key=lambda row: row["value"], default=None),
        notes=list(notes),
        targets=list(dict.fromkeys(str(each.get("target", "")) for each in recorded)),
        created=list(dict.fromkeys(str(each["created"]) for each in results if each.get("created"))),
        sections=sections,
        energy_missing=any(row["joules"] == MISSING for section in sections for row in section["rows"]),
        training=training_charts(training, looks),
        trained=[looks[name] for name in training],
        conventions=conventions_of(results),
        labels=labels,
        conditions={key: condition_name(key) for each in recorded for key in each},
        recorded=recorded,
        **FRAME,
    )
    path = Path(path)
    with atomic_file(path) as stream:
        stream.write(page.encode("utf-8", errors="replace"))
    return path
