"""report: says what the results say and no more, escapes everything, loads nothing."""

from __future__ import annotations

import copy
import html
import math
import re
from html.parser import HTMLParser

import pytest
from rich.console import Console

from deepspec.report.charts import averaged, line_chart, ticks
from deepspec.report.page import results_table, styles_of, write_report

HOSTILE = "</title></style><script>alert('x')</script><img src=x onerror=alert(1)> & \"q\" [red]{{ 7*7 }}"


def summary(tau: float | None, speedup: float | None, tokens_per_s: float = 100.0) -> dict:
    def estimate(value: float | None) -> dict | None:
        return None if value is None else {"value": value, "low": value - 0.1, "high": value + 0.1}

    return {
        "prompts": 6,
        "tokens": 96,
        "rounds": 40,
        "seconds": 1.0,
        "tau": estimate(tau),
        "tau_per_prompt": [],
        "survival": [0.8, 0.5, None],
        "conditional": [0.8, 0.625, math.nan],
        "tokens_per_s": tokens_per_s,
        "speedup": estimate(speedup),
        "distinct_4": 0.93,
        "repeated_8": 0.04,
        "joules_per_token": None,
    }


def draft(name: str, algorithm: str, tau: float, speedup: float, identical: int = 6, ties: int = 0) -> dict:
    pieces = [{"text": "Tom has ", "by": "target"}, {"text": "12 apples", "by": "draft"}]
    return {
        "method": name,
        "kind": "draft",
        "algorithm": algorithm,
        "block": 3,
        "overall": summary(tau, speedup),
        "domains": {"math": summary(tau + 0.25, speedup), "chat": summary(tau - 0.25, speedup)},
        "lossless": {"identical": identical, "prompts": 6, "near_ties": ties},
        "samples": [{"domain": "math", "prompt": "How many?", "pieces": pieces}],
    }


def results(temperature: float = 0.0, rows: list[dict] | None = None) -> dict:
    overall = {"tokens_per_s": 50.0}
    plain = {"method": "plain", "kind": "plain", "baseline": True, "overall": overall, "domains": {}}
    if rows is None:
        rows = [draft("my-eagle3", "eagle3", 2.25, 1.4), draft("my-dspark", "dspark", 3.25, 1.9)]
        rows.insert(1, draft("my-dflash", "dflash", 2.75, 1.6))
    return {
        "format": "deepspec-eval/1",
        "created": "2026-01-02",
        "conventions": {"speed-up": "against the faster plain row"},
        "conditions": {
            "target": "pocket",
            "temperature": temperature,
            "acceptance_rule": "rejection sampling",
        },
        "rows": [plain, *rows],
    }


def metrics() -> list[dict]:
    steps = [{"step": k, "loss": 9.0 - k / 100, "seconds": k / 2} for k in range(600)]
    return [
        *steps,
        {"step": 300, "held_out_tau": 2.0, "seconds": 150.0},
        {"step": 600, "held_out_tau": 2.5, "seconds": 300},
    ]


class Page(HTMLParser):
    """Tags with their attributes, and the visible text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.source = source
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def count(self, tag: str, of_class: str) -> int:
        return sum(
            name == tag and of_class in (attrs.get("class") or "").split() for name, attrs in self.tags
        )


@pytest.fixture
def page_of(tmp_path):
    def build(*args, **kwargs) -> Page:
        return Page(
            write_report(tmp_path / "new" / "report.html", *args, **kwargs).read_text(encoding="utf-8")
        )

    return build


@pytest.fixture
def told(page_of):
    """The page's first sentence, and those that qualify it."""

    def read(files: list[dict]) -> tuple[str, list[str]]:
        (head,) = re.findall(r"<header>(.*)</header>", page_of(files).source, re.S)
        (first,) = re.findall(r"<h1>(.*)</h1>", head, re.S)
        return html.unescape(first), [html.unescape(text) for text in re.findall(r"<p>(.*)</p>", head)]

    return read


def printed(files: list[dict], width: int = 80) -> str:
    console = Console(width=width, record=True, color_system=None, file=None, quiet=False)
    with console.capture() as captured:
        console.print(results_table(files))
    return captured.get()


def test_page_loads_nothing_from_anywhere(tmp_path):
    source = write_report(
        tmp_path / "r.html", [results(0.0), results(1.0)], {"my-dspark": metrics()}
    ).read_text()
    page = Page(source)
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "img", "iframe", "object", "embed", "base", "audio", "video", "use"}
    assert not [
        tag for tag, attrs in page.tags if attrs.keys() & {"src", "href", "srcset", "xlink:href", "action"}
    ]
    assert not re.search(r"https?:|url\(|@import|//\w", source)
    (policy,) = [a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")


def test_hostile_text_stays_text_wherever_it_comes_from(page_of):
    bad = draft(HOSTILE, "dspark", 3.0, 2.0)
    bad["domains"] = {HOSTILE: summary(3.0, 2.0)}
    bad["samples"] = [
        {"domain": HOSTILE, "prompt": HOSTILE * 3, "pieces": [{"text": HOSTILE, "by": "draft"}]}
    ]
    twin = draft(HOSTILE + "2", "dspark", 3.0, 2.0)  # two of one algorithm, so that labels are the names
    file = results(rows=[bad, twin])
    file["conventions"] = {HOSTILE: HOSTILE}
    file["conditions"] |= {"target": HOSTILE, "device": HOSTILE, HOSTILE: HOSTILE, "acceptance_rule": HOSTILE}
    file["created"] = HOSTILE
    hostile = page_of(
        [file, file | {"conditions": file["conditions"] | {"temperature": 1.0}}],
        {HOSTILE: metrics()},
        HOSTILE,
        [HOSTILE],
    )
    harmless = page_of([results(), results(1.0)], {"my-dspark": metrics()}, "t", ["n"])
    assert {tag for tag, _ in hostile.tags} == {tag for tag, _ in harmless.tags}
    assert not [name for _, attrs in hostile.tags for name in attrs if name.startswith("on")]
    assert hostile.text.count(HOSTILE) > 15
    assert "49" not in hostile.text.replace("7*7", "")


def test_text_that_utf8_cannot_carry_does_not_stop_the_page(page_of):
    page = page_of([results()], notes=["half a pair: \ud83d."])
    assert "half a pair: ?." in page.text


def test_headline_claims_identity_only_for_the_prompts_compared(told):
    first, _ = told([results(1.0), results(0.0)])
    claim = "DSpark makes this model 1.90× faster at temperature 0 without changing a token"
    assert first == f"{claim} on the 6 prompts checked."


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lossless": {"identical": 5, "prompts": 6, "near_ties": 0}}, "NOT identical"),
        ({"lossless": {"identical": 5, "prompts": 6, "near_ties": 1}}, "not a proof"),
        ({"lossless": {"identical": 0, "prompts": 0, "near_ties": 0}}, "not compared with plain"),
        ({"lossless": None}, "not compared with plain"),
    ],
)
def test_headline_does_not_claim_losslessness_that_the_check_did_not_find(page_of, told, change, words):
    file = results()
    file["rows"][-1] |= change
    first, support = told([file])
    assert "without changing" not in first
    assert any(words in sentence and sentence.startswith("DSpark") for sentence in support)
    assert "without changing" not in page_of([file]).text


def test_headline_speaks_of_the_mean_of_domains_and_says_what_it_is_made_of(told):
    row, other = draft("d", "dspark", 3.0, 1.5), draft("e", "dflash", 3.0, 1.75)
    row["overall"]["speedup_mean_of_domains"] = {"value": 2.0, "low": 1.5, "high": 2.5}
    row["domains"]["math"]["speedup"]["value"] = 2.75
    first, support = told([results(rows=[row, other])])
    assert first.startswith("DSpark makes this model 2.00× faster")
    assert support[:2] == [
        "The 95% interval of that speed-up is [1.50, 2.50].",
        "It is the mean of 2 domains: math 2.75×, chat 1.50×. All tokens pooled: 1.50× [1.40, 1.60].",
    ]
    assert "mean 2.00×" in printed([results(rows=[row])])


def test_another_draft_that_changed_the_output_is_named_beside_the_headline(told):
    file = results()
    file["rows"][1]["lossless"]["identical"] = 4
    first, support = told([file])
    assert "without changing a token" in first
    assert "Eagle-3: NOT identical to plain greedy decoding: 4 of 6 prompts match." in support


def test_headline_at_a_sampling_temperature_claims_no_identity(told):
    first, support = told([results(1.0)])
    assert first == "DSpark makes this model 1.90× faster at temperature 1."
    assert any("outputs at this temperature are random" in sentence for sentence in support)


@pytest.mark.parametrize(
    ("speedup", "start"),
    [
        ({"value": 1.05, "low": 0.98, "high": 1.1}, "No draft is clearly faster"),
        ({"value": 0.97, "low": 0.9, "high": 1.02}, "No draft is clearly faster"),
        ({"value": 0.8, "low": 0.7, "high": 0.9}, "No draft makes this model faster"),
        (None, "DSpark commits 3.25 tokens per round"),
    ],
)
def test_headline_calls_faster_only_what_its_interval_supports(told, speedup, start):
    only = draft("d", "dspark", 3.25, 1.0)
    only["overall"]["speedup"] = speedup
    assert told([results(rows=[only])])[0].startswith(start)


def test_prompt_lookup_that_beats_the_draft_is_not_hidden(told):
    lookup = {"method": "prompt-lookup", "kind": "lookup", "overall": summary(2.0, 2.5)}
    _, support = told([results(rows=[draft("d", "dspark", 3.0, 1.9), lookup])])
    assert "prompt-lookup needs no draft and was faster: 2.50×." in support


def test_page_has_a_row_for_every_method_of_every_condition(page_of):
    page = page_of([results(0.0), results(1.0)])
    assert page.count("table", "results") == 2
    for name in ("plain", "my-eagle3", "my-dflash", "my-dspark"):
        assert page.source.count(f'scope="row">{name}<') == 2
    for text in ("3.25", "[3.15, 3.35]", "math 3.50", "chat 3.00", "1.90×", "[1.80, 2.00]", "6/6 identical"):
        assert text in page.text
    assert "not measurable here" in page.text
    assert "against the faster plain row" in page.text


def test_rows_without_tau_or_speed_and_results_without_rows_make_a_page(page_of):
    bare = {"method": "bare", "kind": "generate", "overall": {"tau": None, "speedup": None}, "domains": None}
    page = page_of([results(rows=[bare]), {"format": "deepspec-eval/1"}])
    assert "No draft has been evaluated yet." in page.text
    assert "bare" in page.text
    assert page_of([]).count("svg", "chart") == 0


def test_curves_leave_out_positions_that_were_never_reached(page_of):
    page = page_of([results()])
    assert page.count("g", "c-dspark") == 5  # speed-up, two domains, both curves
    assert "nan" not in page.text.casefold().replace("nand", "")
    marks = sum(tag == "path" and (a.get("class") or "").startswith("mark") for tag, a in page.tags)
    assert marks == 3 + 2 * 3 * 2  # the legend, then two curves of three drafts with two reached positions


def test_training_curves_appear_only_when_there_is_training(page_of):
    assert "Held-out τ" not in page_of([results()]).text
    page = page_of([results()], {"my-dspark": metrics(), "my-dflash": []})
    assert "Held-out τ" in page.text
    assert "Loss, DSpark" in page.text
    assert "Loss, DFlash" not in page.text
    assert "training time, minutes" in page.text


def test_sample_tokens_carry_who_produced_them(page_of):
    page = page_of([results(rows=[draft("d", "dspark", 3.0, 2.0)])])
    assert page.count("span", "by-draft") == 2  # the piece and the legend
    assert page.count("span", "by-target") == 2
    assert "53% of the characters drafted" in page.text


def test_looping_text_is_called_out(page_of):
    file = results()
    assert "flatter" not in page_of([file]).text
    file["rows"][-1]["overall"]["repeated_8"] = 0.41
    assert "DSpark: 41% of the 8-grams repeat" in page_of([file]).text


def test_sampled_outputs_are_not_reported_as_verified(page_of):
    file = results(1.0)
    page = page_of([file])
    assert page.count("li", "ok") == 0
    assert "did not test the distribution" in page.text
    assert page_of([results(0.0)]).count("li", "ok") == 3


def test_two_drafts_of_one_algorithm_are_told_apart_and_a_trained_one_keeps_its_colour():
    two = [draft("old", "dspark", 3.0, 2.0), draft("new", "dspark", 3.0, 2.0)]
    looks = styles_of([results(rows=two)], ["quick-eagle-3"])
    assert [(looks[n].label, looks[n].key, looks[n].hollow) for n in ("old", "new")] == [
        ("old", "dspark", False),
        ("new", "dspark", True),
    ]
    assert (looks["quick-eagle-3"].label, looks["quick-eagle-3"].key) == ("Eagle-3", "eagle3")


def test_terminal_table_fits_eighty_columns_with_every_figure():
    text = printed([results(0.0), results(1.0)])
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    for part in (
        "temperature 0",
        "temperature 1",
        "my-dspark",
        "3.25",
        "3.15–3.35",
        "math 3.50",
        "1.90×",
        "1.80–2.00",
    ):
        assert part in text
    for part in (
        "baseline",
        "100.0",
        "0.93",
        "0.04",
        "6/6",
        "not measurable here",
        "against the faster plain row",
    ):
        assert part in text


def test_terminal_table_does_not_read_names_as_markup():
    assert "[red]x" in printed([results(rows=[draft("[red]x", "dspark", 3.0, 2.0)])])


def test_energy_footnote_goes_when_energy_was_measured():
    file = copy.deepcopy(results())
    for row in file["rows"]:
        row["overall"]["joules_per_token"] = 0.5
    assert "not measurable here" not in printed([file])
    assert "0.50" in printed([file])


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (2.1, 2.1), (0.0, 0.0), (-3.0, 47.0), (1e-6, 3e-6)])
def test_ticks_cover_the_range(low, high):
    found = ticks(low, high)
    assert found[0] <= low
    assert found[-1] >= high
    assert 2 <= len(found) <= 8


def test_charts_stay_inside_their_frame():
    look = styles_of([], ["dspark"])["dspark"]
    chart = line_chart("t", "x", "y", [(look, [(1, 0.0), (2, None), (3, 1.0)])], (0, 1), whole_x=True)
    assert chart is not None
    ((start, low), (end, high)) = chart["lines"][0]["marks"]
    assert 0 < start < end < 360
    assert 230 > low > high > 0
    assert chart["lines"][0]["path"].count("M") == 2  # the gap breaks the line
    assert line_chart("t", "x", "y", [(look, [(1, None)])]) is None


def test_averaging_keeps_the_mean_and_every_point():
    points = [(float(k), float(k)) for k in range(1000)]
    short = averaged(points, 100)
    assert len(short) == 100
    assert sum(y for _, y in short) / 100 == 499.5
    assert averaged(points[:5], 100) == points[:5]
