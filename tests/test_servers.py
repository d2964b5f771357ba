"""Real engines: our drafts in llama-server and in vLLM, and answers through the first.

`make test-servers` runs them; benchmarks/servers.py, benchmarks/vllm_server.py and
benchmarks/regenerate_share.py describe what is compared, and how. vLLM is run if $DEEPSPEC_VLLM, or the PATH,
names one.
"""

from __future__ import annotations

from typing import Any

import pytest

import regenerate_share
import servers
import vllm_server


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


# ── vLLM ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("accepted", "budget", "expected"),
    [
        ([2, 0, 7], 100, (3, 9)),
        ([7, 7], 12, (2, 14)),  # a round past the budget counts whole
        ([7, 2, 5], 12, (2, 9)),  # the budget is full: the request has ended
        ([3], 1, (0, 0)),  # the token of the prefill was all
        ([], 5, (0, 0)),
    ],
)
def test_our_rounds_are_counted_as_vllm_counts_them(accepted, budget, expected):
    assert vllm_server.counted(accepted, budget) == expected


@pytest.mark.servers
@pytest.mark.skipif(vllm_server.program() is None, reason="no vllm on the PATH, nor named by $DEEPSPEC_VLLM")
@pytest.mark.parametrize("name", vllm_server.DRAFTS)
def test_vllm_runs_the_command_that_export_prints_and_accepts_what_we_accept(name, tmp_path):
    """It refused our DSpark drafts, and started a server of embeddings for the pocket target."""
    found = vllm_server.compare(name, *vllm_server.size(name), tmp_path)
    assert found["texts"].get("different", 0) == 0
    assert found["theirs"] == found["ours"]
