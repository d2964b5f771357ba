"""`deepspec profile`: what is timed, what the table holds, what is refused, and what a kill leaves."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from conftest import tiny_draft
from deepspec.cli import app
from deepspec.errors import DataError, ServerError
from deepspec.measure import profile as measure
from deepspec.measure import serving
from deepspec.measure.profile import Grid
from deepspec.schedule.costs import Identity, StepCosts, read_costs
from deepspec.schedule.policies import Load
from deepspec.schedule.sglang import sps_tables
from deepspec.targets import Target
from standin import StandIn

SMALL = Grid((1, 2), (1, 2), (10, 20))


def ticking(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that ticks once at every look."""
    ticks = iter(range(10**9))
    monkeypatch.setattr(measure, "clock", lambda device: float(next(ticks)))


@pytest.mark.parametrize("algorithm", ["eagle3", "dspark", None])
def test_every_point_of_the_grid_is_measured_and_the_table_is_of_this_pair(
    targets: dict[str, Target], algorithm: str | None, tmp_path: Path
) -> None:
    target = targets["llama"]
    draft = None if algorithm is None else tiny_draft(target, algorithm, block=3)
    out = tmp_path / "costs.json"
    costs = measure.profile(target, draft, SMALL, sweeps=3, out=out)
    widths = [1, 2, 4] if draft else [1, 2]
    assert (costs.rows.tolist(), costs.widths.tolist(), costs.contexts.tolist()) == ([1, 2], widths, [10, 20])
    assert (costs.target > 0).all() and (costs.rest > 0).all() and (costs.prefill > 0).all()
    assert (costs.propose is None) == (draft is None)
    assert costs.propose is None or (costs.propose > 0).all()
    assert list(tmp_path.iterdir()) == [out], "the partial file is gone"
    of = costs.identity
    again = read_costs(out, target=of.target_hash, draft=of.draft_hash, machine=of.machine)
    np.testing.assert_array_equal(again.target, costs.target)
    assert of.block == (3 if draft else None)


def test_uneven_rows_are_placed_between_even_and_widest_ones() -> None:
    widths, line = (1, 2, 5), np.array([1.0, 2.0, 5.0])
    assert [measure._ragged(seconds, widths, line) for seconds in (3.0, 4.0, 5.0)] == [0.0, 0.5, 1.0]
    rows = measure._Uneven().lengths(np.zeros((4, 6)), Load(4, 10.0))
    assert rows.tolist() == [0, 6, 0, 6], "their mean share is that of the even pass"


def test_parts_of_a_round_add_up_to_it(targets: dict[str, Target], monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain round is one pass in two watched calls (step, logits) of one tick each, a drafted one has two
    more; each look at the clock that begins or ends one of them takes a tick of the rest."""
    ticking(monkeypatch)
    target = targets["llama"]
    grid = Grid((1, 2), (1, 2), (10,)).fitted(target, 3)
    found = measure.sweep(target, tiny_draft(target, "dspark", block=3), grid, measure.Sampling(1.0), 0)
    assert np.unique(found["target"]).tolist() == [2.0]
    assert np.unique(found["propose"]).tolist() == [2.0]
    assert np.unique(found["rest"]).tolist() == [3.0]
    assert np.unique(found["drafted"]).tolist() == [5.0]


def test_slots_are_free_again_after_a_sweep(targets: dict[str, Target]) -> None:
    target, draft = targets["qwen3"], tiny_draft(targets["qwen3"], "dflash", block=3)
    measure.sweep(target, draft, SMALL.fitted(target, 3), measure.Sampling(0.0), 1)
    assert draft.lengths == {}


def test_a_killed_profile_continues_to_the_same_table(
    targets: dict[str, Target], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, out, done = targets["llama"], tmp_path / "costs.json", []

    def counted(*given: Any) -> dict[str, Any]:
        if len(done) == 3:  # one of them is the warm-up
            raise KeyboardInterrupt
        done.append(given)
        return whole(*given)

    whole = measure.sweep
    monkeypatch.setattr(measure, "sweep", counted)
    with pytest.raises(KeyboardInterrupt):
        measure.profile(target, None, SMALL, sweeps=4, out=out)
    assert not out.exists()
    lines = measure.partial_path(out).read_text().splitlines()
    assert len(lines) == 3  # conditions and two sweeps
    done.clear()
    measure.profile(target, None, SMALL, sweeps=4, out=out)
    assert len(done) == 3 and out.exists()  # a warm-up and the two that were missing


def test_sweeps_stop_when_the_time_is_over_but_not_before_three(
    targets: dict[str, Target], monkeypatch: pytest.MonkeyPatch
) -> None:
    done = []
    whole = measure.sweep
    monkeypatch.setattr(measure, "sweep", lambda *given: done.append(given) or whole(*given))
    measure.profile(targets["llama"], None, Grid((1,), (1,), (10,)), sweeps=9, seconds=0)
    assert len(done) == 4  # the warm-up among them


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (Grid((1, 1)), "have to rise"),
        (Grid(rows=()), "have to rise"),
        (Grid(widths=(2, 4)), "one new token per row"),
        (Grid(contexts=(64, 500)), "the rounds after them may fill"),
    ],
)
def test_grids_that_cannot_be_measured_are_refused(
    targets: dict[str, Target], grid: Grid, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        measure.profile(targets["llama"], None, grid)


def test_command_prints_the_table_and_writes_sglangs_forms(
    target_dirs: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "costs.json"
    words = ["profile", "--target", str(target_dirs["llama"]), "--rows", "1,2"]
    words += ["--contexts", "10", "--widths", "1,2"]
    result = CliRunner().invoke(app, [*words, "--sweeps", "3", "--out", str(out), "--to", "sglang"])
    assert result.exit_code == 0, result.output
    assert "one more" in result.stdout and "ms to the first token" in result.stdout
    assert {path.name for path in tmp_path.iterdir()} == {
        "costs.json", "costs.sglang-flat.json", "costs.sglang-additive.json",
    }  # fmt: skip
    result = CliRunner().invoke(app, ["profile", "--rows", "2,1"])
    assert result.exit_code == 2 and "rising list" in result.output


# ── SGLang ────────────────────────────────────────────────────────────────────────────────────────────


def known_costs() -> StepCosts:
    """Seconds that are a sum of a part of the rows and one of the tokens, as in SGLang's additive form."""
    rows, widths, contexts = np.array([1, 2, 4, 8]), np.array([1, 2, 4, 8]), np.array([32, 64])
    tokens = rows[:, None, None] * widths[None, :, None]
    target = 0.01 + 0.0001 * tokens + 0.0005 * rows[:, None, None] + 1e-5 * contexts
    propose = 0.002 + 1e-4 * np.repeat(rows[:, None], 2, 1)
    return StepCosts(
        rows,
        widths,
        contexts,
        target,
        propose,
        np.array([8]),
        np.array([0.02]),
        np.full(4, 0.001),
        Identity("m"),
    )


def test_additive_form_gives_back_costs_that_are_a_sum() -> None:
    costs = known_costs()
    table = sps_tables(costs, 64)["additive"]
    for rows in (1, 2, 4, 8):
        for width in (1, 2, 4, 8):
            seconds = (
                table["bias_seconds"]
                + np.interp(rows, table["bs_probes"], table["alpha_seconds"])
                + np.interp(rows * width, table["m_probes"], table["theta_seconds"])
            )
            assert seconds == pytest.approx(float(costs.round_seconds(rows, rows * width, 64)), rel=1e-3)


def test_flat_form_has_one_rate_for_each_number_of_tokens_and_never_rises() -> None:
    costs, table = known_costs(), sps_tables(known_costs(), 32)["flat"]
    assert table["sample_batch_tokens"] == [1, 2, 4, 8, 16, 32, 64] and table["max_batch_tokens"] == 64
    assert (np.diff(table["sample_steps_per_sec"]) <= 0).all()
    assert table["sample_steps_per_sec"][0] == pytest.approx(1 / float(costs.round_seconds(1, 1, 32)))


@pytest.mark.skipif("DEEPSPEC_SGLANG" not in os.environ, reason="DEEPSPEC_SGLANG names no unpacked wheel")
def test_both_forms_load_in_sglangs_own_reader(tmp_path: Path) -> None:
    parts = ("sglang", "srt", "speculative", "dspark_components", "dspark_sps.py")
    path = Path(os.environ["DEEPSPEC_SGLANG"]).joinpath(*parts)
    spec = importlib.util.spec_from_file_location("dspark_sps", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules["dspark_sps"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    costs = known_costs()
    for form, table in sps_tables(costs, 64).items():
        path = tmp_path / f"{form}.json"
        path.write_text(json.dumps(table))
        read = module.load_sps_table_from_path(str(path))
        assert not module.is_uninitialized_sps_table(read)
        if form == "flat":
            assert read.lookup(8) == table["sample_steps_per_sec"][3]
        else:
            expected = float(costs.round_seconds(4, 16, 64))
            assert read.step_time(num_reqs=4, budget=12) == pytest.approx(expected, rel=1e-3)


# ── a server from outside ─────────────────────────────────────────────────────────────────────────────


def streaming(step: float, first: float, server: StandIn) -> Any:
    """Pieces of an answer, one every `step` seconds after the first; of anything else, no pieces."""

    def pieces(count: int) -> Iterator[bytes]:
        yield b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
        time.sleep(first)
        for _ in range(count):
            yield b'data: {"choices": [{"text": " a"}]}\n\n'
            time.sleep(step)
        yield b"data: [DONE]\n\n"

    return lambda path, body: pieces(body["max_tokens"]) if body.get("stream") else None


def test_a_servers_steps_are_the_time_between_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "SWEEPS", 1)
    with StandIn() as server:
        server.raw = streaming(0.02, 0.06, server)
        costs = serving.profile_server(server.url, rows=(1, 2), prompt=4, answer=6)
    assert costs.target[:, 0, 0] == pytest.approx([0.02, 0.02], rel=0.5)
    assert costs.prefill == pytest.approx([0.06] * len(costs.prefill), rel=0.6)
    assert costs.propose is None and costs.identity.source == "server" and costs.identity.target == "m"
    assert any("not measured" in sentence for sentence in costs.notes)


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ([b"HTTP/1.1 400 No\r\nContent-Length: 4\r\n\r\nnope"], "HTTP 400: nope"),
        ([b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"], "no pieces"),
        ([b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\ndata: {}\n\n"], "broke off"),
    ],
)
def test_servers_that_stream_nothing_are_refused(reply: list[bytes], message: str) -> None:
    with StandIn() as server:
        server.raw = lambda path, body: reply if body.get("stream") else None
        with pytest.raises(ServerError, match=message):
            serving.profile_server(server.url, rows=(1,))


def test_answers_that_are_not_streamed_together_are_no_measure() -> None:
    streams = [[0.0, 1.0, 2.0], [0.0, 3.0, 4.0]]
    with StandIn() as server:
        (way,) = serving.connections([server.url])
        with pytest.raises(ServerError, match="never streamed at the same time"):
            serving._between(way, streams)
        assert serving._between(way, [[0.0, 1.0, 2.0, 3.0], [0.0, 1.0, 1.5, 3.0]]) == 1.0


def test_a_server_is_not_asked_for_what_its_api_does_not_show(tmp_path: Path) -> None:
    words = ["profile", "pocket-dspark", "--server", "http://127.0.0.1:9", "--out", str(tmp_path / "c.json")]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2 and "shows neither the draft" in result.output


def test_a_pause_of_the_machine_counts_as_three_usual_rounds():
    """Rounds that take longer are part of what a server does, a second's pause in one of three is not."""
    assert measure._mean([(1.0, 2.0), (1.0, 2.5), (700.0, 3.0)]).tolist() == [pytest.approx(5 / 3), 2.5]
