"""Step costs: the table's values between its points, its envelope, and the tables that are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepspec.errors import DataError, MismatchError
from deepspec.schedule.costs import CONTEXT, Identity, StepCosts, monotone, read_costs, write_costs
from deepspec.schedule.policies import Load
from reference.costs import looked_up

IDENTITY = Identity("a machine", target="pocket", target_hash="t1", draft="dspark", draft_hash="d1", block=7)


def table(seed: int = 0, points: int = 3) -> StepCosts:
    random = np.random.default_rng(seed)

    def rising(*shape: int) -> np.ndarray:
        return monotone(random.random(shape) + 0.01)

    def axis(first: int) -> np.ndarray:
        return first + np.concatenate([[0], random.integers(1, 9, points - 1).cumsum()])

    shape = (points,) * 3
    return StepCosts(
        axis(1), axis(1), axis(16), rising(*shape), rising(points, points), axis(8), rising(points),
        rising(points), IDENTITY, 12.5, ("a note",), rising(points),
    )  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.floats(1, 60), st.floats(0.5, 30), st.floats(0, 99))
def test_every_lookup_equals_the_plain_one(seed: int, points: int, rows: float, width: float, context: float):
    costs = table(seed, points)
    axes = [axis.tolist() for axis in (costs.rows, costs.widths, costs.contexts)]
    found = costs.pass_seconds(rows, rows * width, context)
    assert found == pytest.approx(looked_up(axes, costs.target.tolist(), (rows, width, context)), rel=1e-9)
    proposals = looked_up([axes[0], axes[2]], costs.propose.tolist(), (rows, context))
    assert costs.propose_seconds(rows, context) == pytest.approx(proposals, rel=1e-9)
    rest = looked_up([axes[0]], costs.rest.tolist(), (rows,))
    assert costs.rest_seconds(rows) == pytest.approx(rest, rel=1e-9)
    lengths = [costs.prefill_lengths.tolist()]
    prefill = looked_up(lengths, costs.prefill.tolist(), (context,))
    assert costs.prefill_seconds(context, drafted=False) == pytest.approx(prefill, rel=1e-9)
    observed = prefill + looked_up(lengths, costs.observe.tolist(), (context,))
    assert costs.prefill_seconds(context) == pytest.approx(observed, rel=1e-9)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.floats(0, 99))
def test_policies_are_told_the_seconds_of_whole_rounds(seed: int, rows: int, context: float):
    costs, middle = table(seed), (context // CONTEXT + 0.5) * CONTEXT
    found = costs.rounds()(Load(rows, context), 3 * rows)
    whole = costs.round_seconds(rows, rows + np.arange(3 * rows + 1), middle)
    np.testing.assert_allclose(found.drafted, whole, rtol=1e-9)
    assert found.plain == pytest.approx(costs.round_seconds(rows, rows, middle, drafted=False))
    seen = costs.prefill_seconds(middle) - costs.prefill_seconds(middle, drafted=False)
    assert found.observe == pytest.approx(rows * seen)


def test_points_of_the_grid_are_the_measured_ones():
    costs = table(3)
    rows, widths, contexts = np.meshgrid(costs.rows, costs.widths, costs.contexts, indexing="ij")
    np.testing.assert_allclose(costs.pass_seconds(rows, rows * widths, contexts), costs.target, rtol=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_envelope_rises_along_every_axis_and_leaves_a_rising_table_alone(seed: int):
    noisy = np.random.default_rng(seed).random((4, 3, 2))
    risen = monotone(noisy)
    assert all((np.diff(risen, axis=axis) >= 0).all() for axis in range(3))
    assert noisy.min() <= risen.min() and risen.max() <= noisy.max()
    np.testing.assert_array_equal(monotone(risen), risen)


def test_more_work_never_takes_less_time_beyond_the_table_either():
    costs = table(5)
    inside = int(costs.contexts[-1])
    for values in (
        costs.pass_seconds(np.arange(1, 80), np.arange(1, 80) * int(costs.widths[1]), inside),
        costs.pass_seconds(4, np.arange(4, 200), inside),
        costs.pass_seconds(int(costs.rows[1]), 8, np.arange(0, 400)),
    ):
        assert (np.diff(values) >= -1e-12).all()


def test_a_table_without_a_draft_charges_nothing_for_proposals(tmp_path: Path):
    costs = replace(table(), propose=None)
    assert costs.propose_seconds([1, 2], 30).tolist() == [0.0, 0.0]
    write_costs(tmp_path / "costs.json", costs)
    assert read_costs(tmp_path / "costs.json").propose is None


def test_a_written_table_is_read_back_whole(tmp_path: Path):
    costs, path = table(), tmp_path / "costs.json"
    write_costs(path, costs)
    again = read_costs(path, target="t1", draft="d1", machine="a machine")
    assert (again.identity, again.watts, again.notes) == (costs.identity, costs.watts, costs.notes)
    for name in (
        "rows",
        "widths",
        "contexts",
        "target",
        "propose",
        "prefill_lengths",
        "prefill",
        "rest",
        "observe",
    ):
        np.testing.assert_array_equal(getattr(again, name), getattr(costs, name))


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        ({"machine": "another"}, r"another machine \(a machine\); this one is another"),
        ({"target": "t2"}, r"another target \(pocket\)"),
        ({"draft": "d2"}, r"another draft \(dspark\)"),
    ],
)
def test_a_table_of_something_else_is_refused(tmp_path: Path, expected: dict[str, str], message: str):
    path = tmp_path / "costs.json"
    write_costs(path, table())
    with pytest.raises(MismatchError, match=message):
        read_costs(path, **expected)


def test_a_table_without_a_draft_is_refused_for_a_draft(tmp_path: Path):
    path = tmp_path / "costs.json"
    write_costs(path, replace(table(), propose=None, identity=Identity("a machine", target_hash="t1")))
    with pytest.raises(MismatchError, match="another draft"):
        read_costs(path, draft="d1")


@pytest.mark.parametrize(
    "change",
    [
        {"rows": [1, 1, 2]}, {"rows": []}, {"rows": [0, 1, 2]}, {"widths": [2, 3, 4]}, {"target": [[1.0]]},
        {"prefill": ["a", "b", "c"]}, {"rest": [-1.0, 1.0, 1.0]}, {"rest": [None, 1.0, 1.0]}, {"format": 9},
        {"identity": {}}, {"identity": {"machine": "m", "colour": "red"}}, {"rest": [1.0]},
    ],
)  # fmt: skip
def test_a_broken_table_is_refused_with_its_reason(tmp_path: Path, change: dict):
    path = tmp_path / "costs.json"
    write_costs(path, table())
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match="not a table of `deepspec profile`"):
        read_costs(path)


def test_other_files_are_not_tables(tmp_path: Path):
    path = tmp_path / "costs.json"
    with pytest.raises(DataError, match="no such table"):
        read_costs(path)
    for text in ("", "[]", "{}", "3", '{"format": 1}'):
        path.write_text(text)
        with pytest.raises(DataError, match="not a table"):
            read_costs(path)
