"""A real engine: our drafts in llama-server, and answers through it.

Run by `make test-servers`; what is compared, and how, is said in benchmarks/servers.py and
benchmarks/regenerate_share.py.
"""

from __future__ import annotations

from typing import Any

import pytest

import regenerate_share
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


@pytest.mark.servers
def test_answers_through_two_servers_of_which_one_dies_and_comes_back():
    found = regenerate_share.with_a_death()
    print({k: v for k, v in found.items() if "ids" not in k})
    assert found["ids"] == found["expected_ids"]
    assert found["failed"] == 0
    assert found["after_restart"] > 0
    assert found["different"] == 0
    assert found["identical"] >= 0.9 * found["prompts"]
