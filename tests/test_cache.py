"""Feature caches: the online numbers where a loss reads, any number of kills, refusals that name both."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections import namedtuple
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import feature_cache
from conftest import llama as llama_model
from conftest import save_tiny
from deepspec.cli import app
from deepspec.config import load_recipe
from deepspec.data.tokens import Encoded
from deepspec.errors import DataError, TargetError, UserError
from deepspec.features.batches import Source, online, padded
from deepspec.features.cache_read import cached, cached_rows, open_cache
from deepspec.features.cache_write import (
    Plan,
    batch_rows,
    disk_bytes,
    plan_cache,
    shard_ranges,
    stored_positions,
    write_cache,
)
from deepspec.features.quantise import FORMATS
from deepspec.files import LOCK, claimed
from deepspec.maths.blocks import FeatureBatch
from deepspec.targets import Target
from deepspec.train.build import read_rules
from kills import at_operation, contents, count_operations, ended, in_child, killed_at
from reference.blocks import naive_block_reads, naive_unroll_reads
from talking import recipe_tree, save_talking_llama, train_in, write_data, write_recipe
from test_train import interrupting, recipe_for, rows_for, same_state

LAYERS = (0, 1, 2)
ALL = ("context", "labels", "unroll")
ABOUT = {"data_hash": "d", "first_rows": None, "about": {}}
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")


@pytest.fixture(scope="module")
def bfloat(target_dirs: dict[str, Path]) -> Target:
    return Target.from_pretrained(target_dirs["llama"], dtype="bfloat16", device="cpu")


def ragged_rows(target: Target, count: int = 12) -> list[Encoded]:
    """Rows of many lengths, some with holes in their masks and one with nothing to learn."""
    rows = rows_for(target, count)
    holes = [replace(r, loss_mask=[m * (i % 5 != 4) for i, m in enumerate(r.loss_mask)]) for r in rows[::3]]
    return [*rows[1::3], *holes, *rows[2::3], Encoded(ids=[5, 6, 7], loss_mask=[0, 1, 0], id="bare")]


def planned(target: Target, **changes: Any) -> Plan:
    """Five shards, several batches in each."""
    settings: dict[str, Any] = {"shard_bytes": 20_000, "batch_tokens": 64, "dtype": "bf16", "about": ABOUT}
    settings |= {"rows": ragged_rows(target), "layers": LAYERS, "reads": ALL} | changes
    return plan_cache(settings.pop("rows"), target, settings.pop("layers"), settings.pop("reads"), **settings)


USUAL: dict[str, bytes] = {}
"""The files of the cache of `planned` without changes, from when it was first written."""


def written(target: Target, out: Path, **changes: Any) -> Plan:
    plan = planned(target, **changes)
    if changes or not USUAL:
        assert write_cache(plan, target, out).complete
        USUAL.update({} if changes else contents(out))
    else:
        out.mkdir(exist_ok=True)
        for name, content in USUAL.items():
            (out / name).write_bytes(content)
    return plan


def in_cache_batches(plan: Plan, target: Target) -> Source:
    """The target's features in the passes that the cache's writer makes: the same numbers, bit for bit."""
    found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    source = online(target, plan.facts["layers"])
    for shard in plan.shards:
        rows = [plan.rows[r] for r in shard]
        for picked in batch_rows(rows, plan.facts["batch_tokens"]):
            batch = source([rows[i] for i in picked], max(len(rows[i].ids) for i in picked))
            assert batch.last_hidden is not None
            for k, i in enumerate(picked):
                found[rows[i].id] = batch.features[k], batch.last_hidden[k]

    def read(rows: Sequence[Encoded], width: int) -> FeatureBatch:
        ids, mask, lengths = padded(rows, width)
        parts = zip(*(found[r.id] for r in rows), strict=True)
        features, hidden = (
            torch.stack(
                [
                    torch.nn.functional.pad(p[: len(r.ids)], (0, 0, 0, width - len(r.ids)), value=7.0)
                    for p, r in zip(part, rows, strict=True)
                ]
            )
            for part in parts
        )
        return FeatureBatch(ids, mask, features, hidden, lengths, tuple(r.id for r in rows))

    return read


# ── what is stored ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("reads", [("context",), ("context", "labels"), ("unroll",), ALL])
def test_a_bf16_cache_gives_the_online_numbers_bit_for_bit_where_read_and_zeros_elsewhere(
    bfloat: Target, tmp_path: Path, reads: tuple[str, ...]
) -> None:
    plan = written(bfloat, tmp_path, reads=reads)
    rows = [plan.rows[i] for i in (7, 0, 12, 4)]
    width = max(len(r.ids) for r in rows) + 3
    want = in_cache_batches(plan, bfloat)(rows, width)
    found = cached(open_cache(tmp_path), bfloat, LAYERS, reads)(rows, width)
    where = stored_positions(want.loss_mask, want.lengths, reads)
    assert found.features.dtype == torch.bfloat16
    assert torch.equal(found.features, want.features.masked_fill(~where.features[..., None], 0.0))
    if reads == ("context",):
        assert found.last_hidden is None
    else:
        assert found.last_hidden is not None and want.last_hidden is not None
        assert torch.equal(found.last_hidden, want.last_hidden.masked_fill(~where.hidden[..., None], 0.0))
    assert torch.equal(found.input_ids, want.input_ids)
    assert torch.equal(found.loss_mask, want.loss_mask)
    assert torch.equal(found.lengths, want.lengths)
    assert found.row_ids == want.row_ids


@pytest.mark.parametrize("form", ["fp8", "int8"])
def test_quantised_caches_come_near_the_online_numbers(bfloat: Target, tmp_path: Path, form: str) -> None:
    plan = written(bfloat, tmp_path, dtype=form)
    want = in_cache_batches(plan, bfloat)(plan.rows, 64)
    found = cached(open_cache(tmp_path), bfloat, LAYERS, ALL)(plan.rows, 64)
    where = stored_positions(want.loss_mask, want.lengths, ALL).features
    assert not torch.equal(found.features, want.features)
    for a, b in zip(found.features[where].split(32, -1), want.features[where].split(32, -1), strict=True):
        assert (a.float() - b.float()).norm() / b.float().norm() < 0.03


def test_nothing_is_stored_but_what_the_losses_read(bfloat: Target, tmp_path: Path) -> None:
    plan = written(bfloat, tmp_path)
    features = hidden = 0
    for row in plan.rows:
        blocks = naive_block_reads(row.loss_mask, None, 7, True)
        unrolled = naive_unroll_reads(row.loss_mask, None, len(row.ids), 7)
        features += len(blocks[0] | unrolled[0])
        hidden += len(blocks[1] | unrolled[1])
    tensors = [load_file(p) for p in sorted(tmp_path.glob("*.safetensors"))]
    assert len(tensors) == len(plan.shards) > 2
    tensors = [t | {"features": t["features"].transpose(0, 1)} for t in tensors]
    assert {t["features"].shape[1:] for t in tensors} == {(len(LAYERS), 32)}
    assert {name: sum(len(t[name]) for t in tensors) for name in tensors[0]} == {
        "features": features,
        "hidden": hidden,
        "ids": sum(len(r.ids) for r in plan.rows),
        "loss_mask": sum(len(r.ids) for r in plan.rows),
    }


@pytest.mark.parametrize("form", FORMATS)
def test_the_formula_gives_the_bytes_of_the_tensors_and_bounds_the_files(
    bfloat: Target, tmp_path: Path, form: str
) -> None:
    plan = written(bfloat, tmp_path, dtype=form)
    tensors = [load_file(p) for p in sorted(tmp_path.glob("*.safetensors"))]
    assert sum(t.nbytes for found in tensors for t in found.values()) == plan.payload
    on_disk = sum(len(content) for content in contents(tmp_path).values())
    assert plan.payload < on_disk < disk_bytes(plan, range(len(plan.shards)))


def test_one_cache_serves_drafts_of_other_layers_and_positions(bfloat: Target, tmp_path: Path) -> None:
    plan = written(bfloat, tmp_path, layers=(-1, 0, 2))
    row = plan.rows[3]
    some = cached(open_cache(tmp_path), bfloat, (0, 2), ("unroll",))([row], len(row.ids))
    every = cached(open_cache(tmp_path), bfloat, (-1, 0, 2), ALL)([row], len(row.ids))
    assert torch.equal(some.features, every.features[..., 32:])


def test_training_takes_its_rows_from_the_cache(bfloat: Target, tmp_path: Path) -> None:
    plan = written(bfloat, tmp_path)
    assert list(cached_rows(open_cache(tmp_path))) == list(plan.rows)


def test_rows_of_the_same_name_are_told_apart_by_their_tokens(bfloat: Target, tmp_path: Path) -> None:
    rows = [replace(r, id="same") for r in ragged_rows(bfloat)]
    written(bfloat, tmp_path, rows=rows)
    source = cached(open_cache(tmp_path), bfloat, LAYERS, ALL)
    for row in rows:
        alone = online(bfloat, LAYERS)([row], len(row.ids))
        count = int(stored_positions(alone.loss_mask, alone.lengths, ALL).features.sum())
        found = source([row], len(row.ids)).features[:, :count]
        assert torch.allclose(found.float(), alone.features[:, :count].float(), atol=0.1)


def test_shards_hold_rows_in_order_and_at_least_one() -> None:
    assert shard_ranges([5, 5, 5, 20, 1, 1], 10) == [range(0, 2), range(2, 3), range(3, 4), range(4, 6)]
    assert shard_ranges([3], 1) == [range(0, 1)]


def test_batches_are_a_function_of_the_lengths_alone(bfloat: Target) -> None:
    rows = ragged_rows(bfloat)
    batches = list(batch_rows(rows, 64))
    assert sorted(i for b in batches for i in b) == list(range(len(rows)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(len(rows[i].ids) for i in batch) <= 64
    assert list(batch_rows(rows, 64)) == batches


def test_features_that_overflow_are_an_error_not_a_cache(
    bfloat: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Target.read

    def overflowing(self: Target, ids: torch.Tensor, layers: Sequence[int]) -> Any:
        found = read(self, ids, layers)
        assert found.features is not None
        found.features[:, 2, 40] = float("inf")
        return found

    monkeypatch.setattr(Target, "read", overflowing)
    with pytest.raises(TargetError, match=r"infinities or NaN in layer 1, .*\n.*row 'r\d+'"):
        write_cache(planned(bfloat), bfloat, tmp_path)


# ── training from it ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("algorithm", ["eagle3", "dflash", "dspark"])
def test_a_draft_trained_from_a_cache_is_the_one_trained_on_those_numbers_online(
    bfloat: Target, tmp_path: Path, algorithm: str
) -> None:
    optim = {"lr": 1e-2, "batch_size": 4, "max_steps": 2}
    recipe = recipe_for(algorithm, optim=optim, eval_every_steps=1, checkpoint_every_steps=1)
    plan = written(bfloat, tmp_path / "cache", reads=read_rules(recipe))
    want = train_in(tmp_path / "a", recipe, bfloat, plan.rows, None, in_cache_batches(plan, bfloat))
    source = cached(open_cache(tmp_path / "cache"), bfloat, LAYERS, read_rules(recipe))
    assert train_in(tmp_path / "b", recipe, bfloat, plan.rows, interrupting(1), source).interrupted
    found = train_in(tmp_path / "b", recipe, bfloat, plan.rows, lambda draft: 1.0, source)
    assert (found.steps, found.tokens) == (want.steps, want.tokens)
    same_state(tmp_path / "a/checkpoints/step_2", tmp_path / "b/checkpoints/step_2")


# ── kills ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def undisturbed(bfloat: Target, tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, dict[str, bytes]]:
    out = tmp_path_factory.mktemp("undisturbed")
    return written(bfloat, out), contents(out)


@forks
def test_killed_while_any_file_is_written_or_renamed_it_ends_with_the_same_bytes(
    bfloat: Target, tmp_path: Path
) -> None:
    plan = planned(bfloat, rows=ragged_rows(bfloat)[:5])
    operations = count_operations(lambda: write_cache(plan, bfloat, tmp_path / "whole"))
    want = contents(tmp_path / "whole")
    assert len(plan.shards) == 2
    assert operations == 4 * (2 * 2 + 1)  # shards, sidecars, index: write, fsync, rename, fsync of the folder
    for n in range(1, operations + 1, 2):  # in the middle of each write, and before each rename
        out = tmp_path / f"at-{n}"
        assert killed_at(n, lambda out=out: write_cache(plan, bfloat, out))
        assert write_cache(plan, bfloat, out).complete
        assert contents(out) == want, f"killed at operation {n}"
        shutil.rmtree(out)


@forks
def test_killed_again_and_again_it_still_gets_done(
    bfloat: Target, tmp_path: Path, undisturbed: tuple[Plan, dict[str, bytes]]
) -> None:
    plan, want = undisturbed
    kills = 0
    while killed_at(10, lambda: write_cache(plan, bfloat, tmp_path)):  # one shard and its sidecar a life
        kills += 1
    assert kills >= len(plan.shards) - 1
    assert contents(tmp_path) == want


@pytest.mark.parametrize("worlds", [(1, 2), (2, 3), (3, 1)])
def test_resuming_under_another_world_size_changes_no_byte(
    bfloat: Target, tmp_path: Path, undisturbed: tuple[Plan, dict[str, bytes]], worlds: tuple[int, int]
) -> None:
    plan, want = undisturbed
    before, after = worlds
    assert not write_cache(plan, bfloat, tmp_path, rank=before - 1, world=before + 1).complete
    done = [write_cache(plan, bfloat, tmp_path, rank=r, world=after).complete for r in range(after)]
    assert done == [False] * (after - 1) + [True]
    assert contents(tmp_path) == want


@forks
def test_processes_side_by_side_write_each_shard_once_and_one_index(
    bfloat: Target, tmp_path: Path, undisturbed: tuple[Plan, dict[str, bytes]]
) -> None:
    plan, want = undisturbed
    ranks = [(0, 2), (1, 2), (0, 1)]  # the last was started by mistake beside the others
    children = [
        in_child(lambda r=r, w=w: write_cache(plan, bfloat, tmp_path, rank=r, world=w)) for r, w in ranks
    ]
    assert all([ended(child) for child in children])
    assert contents(tmp_path) == want


@forks
def test_a_shard_that_another_process_holds_is_left_to_it(
    bfloat: Target, tmp_path: Path, undisturbed: tuple[Plan, dict[str, bytes]]
) -> None:
    plan, _ = undisturbed
    tmp_path.joinpath("x").mkdir()
    out = tmp_path / "x"
    with claimed(out / LOCK, 1) as ours:
        assert ours

        def beside() -> None:
            assert not write_cache(plan, bfloat, out).complete

        assert ended(in_child(beside))
    assert sorted(p.name for p in out.glob("*.safetensors")) == [
        f"shard-{s:05d}.safetensors" for s in range(1, len(plan.shards))
    ]


@forks
def test_the_index_waits_for_another_process_that_may_be_writing_it(
    bfloat: Target, tmp_path: Path, undisturbed: tuple[Plan, dict[str, bytes]]
) -> None:
    plan, want = undisturbed
    with claimed(tmp_path / LOCK, 0):
        child = in_child(lambda: write_cache(plan, bfloat, tmp_path))
        last = tmp_path / f"shard-{len(plan.shards) - 1:05d}.json"
        while not last.exists():
            time.sleep(0.02)
        time.sleep(0.3)
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
        assert not (tmp_path / "index.json").exists()
    assert ended(child)
    assert contents(tmp_path) == want


def test_a_disk_that_fills_up_is_said_and_the_same_command_goes_on(
    bfloat: Target, tmp_path: Path, undisturbed: tuple[Plan, dict[str, bytes]]
) -> None:
    plan, want = undisturbed

    def full_at(operation: int) -> Callable[[int, Callable[[], None]], None]:
        def act(n: int, half: Callable[[], None]) -> None:
            if n == operation + 1:
                half()
                raise OSError(errno.ENOSPC, "No space left on device")

        return act

    for operation in (0, 8, 12, 8 * len(plan.shards)):  # a shard, the next, its sidecar, the index
        out = tmp_path / str(operation)
        full = pytest.raises(UserError, match="No space left on device")
        with full as caught, at_operation(full_at(operation)):
            write_cache(plan, bfloat, out)
        assert "run the same command again" in str(caught.value)
        assert len(list(out.glob("shard-*.json"))) == operation // 8
        assert not list(out.glob(".*.part"))
        assert write_cache(plan, bfloat, out).complete
        assert contents(out) == want


def test_a_cache_that_cannot_fit_is_refused_before_anything_is_written(
    bfloat: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = planned(bfloat)
    needed = disk_bytes(plan, range(len(plan.shards)))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, needed - 1))
    says = f"needs {needed / 1e3:.1f} kB more, and the disk has {(needed - 1) / 1e3:.1f} kB free"
    with pytest.raises(UserError, match=says) as caught:
        write_cache(plan, bfloat, tmp_path)
    assert "--dtype fp8" in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, needed))
    assert write_cache(plan, bfloat, tmp_path).complete
    assert (
        f"{plan.payload / sum(c.tokens for c in plan.counts):,.0f} bytes per token" in capsys.readouterr().err
    )


# ── damage ────────────────────────────────────────────────────────────────────────────────────────────


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_a_shard_that_is_not_whole_is_named_and_computed_again(
    bfloat: Target, tmp_path: Path, undisturbed: tuple[Plan, dict[str, bytes]], damage: str
) -> None:
    plan, want = undisturbed
    out = tmp_path / "cache"
    written(bfloat, out)
    shard = out / "shard-00001.safetensors"
    if damage == "cut":
        os.truncate(shard, 1000)
    else:
        shard.unlink()
    with pytest.raises(DataError, match="a shard of the feature cache is damaged") as caught:
        open_cache(out)
    assert str(shard) in str(caught.value)
    assert "delete shard-00001.safetensors and run the same" in str(caught.value)
    assert write_cache(plan, bfloat, out) == (True, 1, len(want[shard.name]))
    assert contents(out) == want
    open_cache(out)


def test_verify_finds_one_changed_bit_and_writes_that_shard_again(
    bfloat: Target, tmp_path: Path, undisturbed: tuple[Plan, dict[str, bytes]]
) -> None:
    plan, want = undisturbed
    written(bfloat, tmp_path)
    flip(tmp_path / "shard-00002.safetensors", -5)
    assert write_cache(plan, bfloat, tmp_path).shards == 0
    assert write_cache(plan, bfloat, tmp_path, verify=True).shards == 1
    assert contents(tmp_path) == want


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "is not complete yet: it has 5 shard"),
        ("{", "cannot be read"),
        ('{"facts": {"format": 0}}', "format 0"),
    ],
)
def test_an_index_that_is_not_there_or_torn_is_no_cache(
    bfloat: Target, tmp_path: Path, content: str | None, says: str
) -> None:
    assert len(written(bfloat, tmp_path).shards) == 5
    index = tmp_path / "index.json"
    if content is None:
        index.unlink()
    else:
        index.write_text(content)
    with pytest.raises(DataError, match=says):
        open_cache(tmp_path)


def test_a_folder_without_a_cache_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no feature cache") as caught:
        open_cache(tmp_path / "nothing")
    assert "deepspec data cache RECIPE" in str(caught.value)


# ── what does not fit ─────────────────────────────────────────────────────────────────────────────────


def test_another_cache_in_the_same_place_is_not_mixed_with(bfloat: Target, tmp_path: Path) -> None:
    written(bfloat, tmp_path)
    with pytest.raises(DataError, match=r"holds another cache: dtype is 'bf16' there, not 'fp8'"):
        write_cache(planned(bfloat, dtype="fp8"), bfloat, tmp_path)
    with pytest.raises(DataError, match=r"rows is 13 there, not 12; rows_hash is"):
        write_cache(planned(bfloat, rows=ragged_rows(bfloat)[1:]), bfloat, tmp_path)


def test_other_layers_positions_and_targets_are_refused_by_name(
    bfloat: Target, targets: dict[str, Target], tmp_path: Path
) -> None:
    written(bfloat, tmp_path, reads=("context",), layers=(0, 1))
    cache = open_cache(tmp_path)
    with pytest.raises(DataError, match=r"holds layers \[0, 1\], and the draft reads \[0, 2\]"):
        cached(cache, bfloat, (0, 2), ("context",))
    with pytest.raises(DataError, match="holds the positions of context, and the loss reads unroll"):
        cached(cache, bfloat, (0, 1), ("unroll",))
    with pytest.raises(
        DataError, match=r"holds features of .*llama \(config \w+\), not of .*qwen3"
    ) as caught:
        cached(cache, targets["qwen3"], (0, 1), ("context",), "write another: deepspec data cache …")
    assert "next: write another: deepspec data cache …" in str(caught.value)


@pytest.mark.parametrize("form", FORMATS)
def test_other_weights_under_the_same_config_are_found_by_their_numbers(
    bfloat: Target, targets: dict[str, Target], tmp_path: Path, form: str
) -> None:
    written(bfloat, tmp_path / "cache", dtype=form)
    path = save_tiny(llama_model, tmp_path / "tuned", seed=1)
    other = Target.from_pretrained(path, dtype="bfloat16", device="cpu")
    cache = open_cache(tmp_path / "cache")
    assert other.spec.config_hash == cache.facts["target_config_hash"]
    with pytest.raises(DataError, match=r"layer 0 in row '\w+' are not those that .*tuned gives now"):
        cached(cache, other, LAYERS, ALL)
    cached(cache, targets["llama"], LAYERS, ALL)  # the same weights, widened to float32


def test_a_row_that_is_not_in_the_cache_is_refused(bfloat: Target, tmp_path: Path) -> None:
    plan = written(bfloat, tmp_path)
    source = cached(open_cache(tmp_path), bfloat, LAYERS, ALL)
    row = plan.rows[0]
    for other in (
        replace(row, id="new"),
        replace(row, ids=[*row.ids[:-1], 1 - row.ids[-1]]),
        replace(row, loss_mask=[1, *row.loss_mask[1:]]),
    ):
        with pytest.raises(DataError, match="made from other data"):
            source([other], len(row.ids))


# ── the command ───────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def talking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target that talks, its data, and one recipe for each algorithm."""
    folder = tmp_path_factory.mktemp("talking")
    target = save_talking_llama(folder / "target")
    write_data(folder)
    for algorithm in ("eagle3", "dflash", "dspark"):
        write_recipe(folder / f"{algorithm}.yaml", recipe_tree(target, folder, algorithm))
    return folder


def run(*words: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(w) for w in words])
    assert result.exit_code == code, result.output
    return result.output


def test_one_command_caches_for_three_drafts_and_each_trains_from_it(talking: Path, tmp_path: Path) -> None:
    recipes = [talking / f"{a}.yaml" for a in ("eagle3", "dflash", "dspark")]
    out = tmp_path / "cache"
    facts = json.loads(
        CliRunner().invoke(app, [*map(str, ["data", "cache", *recipes, "--out", out, "--json"])]).stdout
    )
    assert (facts["complete"], facts["rows"], facts["written_shards"]) == (True, 10, 1)
    assert facts["reads"] == ["context", "labels", "unroll"]
    for recipe in recipes[::2]:  # DFlash's draft reads less than DSpark's
        run("train", recipe, "optim.max_steps=1", f"data.features=cache:{out}", "--runs", tmp_path / "runs")
    again = run("data", "cache", *recipes, "--out", out)
    assert "0 of 1 shards written now" in again
    assert f"data.features=cache:{out}" in again


def test_ranks_of_torchrun_share_the_work(
    talking: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    words = ["data", "cache", talking / "dspark.yaml", "--out", tmp_path]
    monkeypatch.setenv("RANK", "1")
    assert "other processes are still writing" in run(*words)
    monkeypatch.setenv("RANK", "0")
    assert "complete, 1 of 1 shards" in run(*words)
    monkeypatch.setenv("RANK", "2")
    assert "RANK=2 and WORLD_SIZE=2 are not a rank" in run(*words, code=2)


@pytest.fixture(scope="module")
def dspark_cache(talking: Path) -> Path:
    run("data", "cache", talking / "dspark.yaml", "--out", talking / "cache")
    return talking / "cache"


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("data.max_length=30", "max_length is 512 there, not 30"),
        ("thinking=true", "thinking is False there, not True"),
        ("data.min_supervised=3", "min_supervised is 2 there, not 3"),
    ],
)
def test_a_recipe_of_other_rows_is_refused_with_both_sides_and_the_command(
    talking: Path, dspark_cache: Path, tmp_path: Path, override: str, says: str
) -> None:
    words = ["train", talking / "dspark.yaml", f"data.features=cache:{dspark_cache}"]
    output = run(*words, override, "--runs", tmp_path, code=2)
    assert says in output
    assert f"deepspec data cache {tmp_path / 'tiny-dspark/recipe.yaml'} --answers" in output


def test_answers_that_changed_since_are_refused(talking: Path, tmp_path: Path) -> None:
    answers = tmp_path / "answers.jsonl"
    lines = (talking / "answers.jsonl").read_text().splitlines(keepends=True)
    answers.write_text("".join(lines[:8]))
    recipe = talking / "dspark.yaml"
    run("data", "cache", recipe, "--answers", answers, "--out", tmp_path / "c", "--max-rows", 5)
    words = ["train", recipe, "optim.max_steps=1", f"data.features=cache:{tmp_path / 'c'}"]
    words += ["--runs", tmp_path / "r"]
    answers.write_text("".join(lines))  # only rows that the cache did not take
    run(*words, "--answers", answers)
    answers.write_text("".join(lines[1:]))
    output = run(*words, "--answers", answers, code=2)
    assert "data_hash is '" in output


def test_recipes_of_different_rows_do_not_share_a_cache(talking: Path, tmp_path: Path) -> None:
    tree = recipe_tree(talking / "target", talking, "dflash") | {"thinking": True}
    other = write_recipe(tmp_path / "thinking.yaml", tree)
    output = run("data", "cache", talking / "dspark.yaml", other, "--out", tmp_path / "c", code=2)
    assert "tiny-dspark and tiny-dflash cannot share a cache: thinking is False and True" in output
    assert "no recipe" in run("data", "cache", "seed=1", "--out", tmp_path / "c", code=2)


def test_the_page_of_features_is_what_its_figures_and_formulas_give() -> None:
    page = feature_cache.PAGE.read_text("utf-8")
    assert page == feature_cache.page_with(page, json.loads(feature_cache.FIGURES.read_text("utf-8")))
    # As published: five layers and the last hidden state, 2,560 wide, two bytes each.
    assert "| every position, as published | 100.0% | 100.0% | 30,720 | 15,384 | 15,384 |" in page


@pytest.mark.parametrize("word", ["", "offline", "cache:", "online:", "vllm:localhost:8000", "http://x"])
def test_a_feature_source_that_is_none_is_refused(word: str) -> None:
    with pytest.raises(UserError, match=r"`data\.features`: '.*' is not a feature source"):
        load_recipe("pocket-dspark", [f"data.features={json.dumps(word)}"])


@pytest.mark.parametrize("word", ["online", "cache:runs/features", "vllm:http://a:8000"])
def test_feature_sources_of_a_recipe(word: str) -> None:
    assert load_recipe("pocket-dspark", [f"data.features={word}"]).data.features == word
