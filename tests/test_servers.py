"""Our drafts in llama-server: the same texts as ours, and the same accepted lengths by its own count.

Run by `make test-servers`; what is compared, and how the two conventions are brought together, is said in
benchmarks/servers.py.
"""

from __future__ import annotations

from typing import Any

import pytest

import servers


@pytest.mark.parametrize(
    ("accepted", "budget", "expected"),
    [
        ([2, 0, 7], 100, [3, 1, 8]),
        ([7, 7], 12, [8, 3]),  # a first token from the prefill, 8, and then 3 fit
        ([7, 2, 5], 12, [8, 3]),  # the budget is full: a round past it keeps nothing
        ([1, 0], 4, [2]),  # with room for one token the server doesn't draft
        ([0, 0, 0], 2, []),
        ([], 5, []),
    ],
)
def test_our_rounds_are_cut_where_the_server_cuts_its_drafts(accepted, budget, expected):
    assert servers.served_rounds(accepted, budget) == expected


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    """All drafts measured once; kept for the page."""
    return servers.measure_and_keep()


@pytest.fixture(params=servers.DRAFTS)
def row(request: pytest.FixtureRequest, results: dict[str, Any]) -> dict[str, Any]:
    return next(row for row in results["rows"] if row["draft"] == request.param)


@pytest.mark.servers
def test_server_says_what_we_say(row):
    assert row["different"] == []
    assert row["identical"] >= 0.9 * row["prompts"]


@pytest.mark.servers
def test_server_accepts_what_we_accept(row):
    """A shifted layer, a wrong alignment, or another head in the draft's place all show here."""
    ours, theirs = row["tau"]["ours"]["value"], row["tau"]["theirs"]["value"]
    assert ours > 1.3
    assert theirs == pytest.approx(ours, rel=0.05)
