"""Several processes that train one draft: the same figures as one process, one writer, and no hang."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.utils import _to_kwargs

import deepspec.train.loop as loop
import deepspec.train.step as steps
from conftest import DEVICE
from deepspec.config import Recipe, load_recipe
from deepspec.data.tokens import prompt_ids
from deepspec.drafts.base import NeuralDraft
from deepspec.errors import RecipeError
from deepspec.maths.head import Embedding, Head
from deepspec.targets import Target
from deepspec.train.dist import joined, shard_draft, shard_target
from deepspec.train.loop import train_draft
from kills import in_child, needs_fork
from talking import recipe_tree, save_talking_llama, write_data, write_recipe, write_rows
from test_drafts import DSPARK_LOSS, make_batch, make_draft

pytestmark = needs_fork


def started(world: int, work: Callable[[int], object], folder: Path) -> list[int]:
    """Process ids of that many ranks of one job, each doing the work; their output goes to rank-N.log."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def rank_work(rank: int) -> None:
        # Not the descriptors alone: pytest has put its own objects there.
        sys.stdout = sys.stderr = (folder / f"rank-{rank}.log").open("a", buffering=1)
        loop.LOG_EVERY = 1
        facts = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
        os.environ |= {key: str(value) for key, value in facts.items()} | {"MASTER_ADDR": "127.0.0.1"}
        try:
            work(rank)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}")
            raise

    return [in_child(lambda rank=rank: rank_work(rank)) for rank in range(world)]


def codes(children: Sequence[int], seconds: float = 120.0) -> list[int]:
    """How the processes ended; a failure if they do not end in time."""
    found, end = [], time.monotonic() + seconds
    for child in children:
        while not (ended := os.waitpid(child, os.WNOHANG))[0]:
            if time.monotonic() > end:
                for other in children:
                    os.kill(other, signal.SIGKILL)
                pytest.fail("a rank did not end")
            time.sleep(0.02)
        found.append(os.waitstatus_to_exitcode(ended[1]))
    return found


def in_ranks(world: int, work: Callable[[int], object], folder: Path) -> None:
    children = started(world, work, folder)
    said = codes(children)
    assert said == [0] * world, [(folder / f"rank-{r}.log").read_text()[-2000:] for r in range(world)]


def losses(run: Path) -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text("utf-8").splitlines())
    return [line["loss"] for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a talking target, uneven data, and recipes of twenty steps."""
    folder = tmp_path_factory.mktemp("ranks")
    target = save_talking_llama(folder / "target")
    write_data(folder)
    lines = (folder / "answers.jsonl").read_text("utf-8").splitlines()
    long = json.loads(lines[0])
    long["id"], long["messages"][1]["content"] = "long", "red and " * 30
    (folder / "answers.jsonl").write_text("\n".join([*lines, json.dumps(long)]) + "\n")
    for algorithm in ("eagle3", "dspark"):
        tree = recipe_tree(target, folder, algorithm, max_steps=20, lr=1e-3)
        tree |= {"eval_every_steps": 10, "checkpoint_every_steps": 5}
        write_recipe(folder / f"{algorithm}.yaml", tree)
    return folder


def recipe_of(scene: Path, algorithm: str, *more: str) -> Recipe:
    return load_recipe(scene / f"{algorithm}.yaml", list(more))


@pytest.fixture(scope="module")
def alone(scene: Path) -> dict[str, Path]:
    """Both recipes by one process."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "LOG_EVERY", 1)
        for algorithm in ("eagle3", "dspark"):
            found[algorithm] = train_draft(recipe_of(scene, algorithm), scene / "alone").run
    return found


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.soak)])
def test_ranks_have_the_losses_of_one(scene, alone, tmp_path, world):
    """Eleven rows in batches of four: a last batch has three, so that one of four ranks has none."""

    def work(rank: int) -> None:
        with joined():  # one job: to join twice at one port is a race
            for algorithm in alone:
                train_draft(recipe_of(scene, algorithm), tmp_path / "runs")

    in_ranks(world, work, tmp_path)
    for algorithm, run in alone.items():
        ours = losses(tmp_path / f"runs/tiny-{algorithm}")
        assert len(ours) == 20
        assert ours == pytest.approx(losses(run), abs=1e-5)
    for rank in range(1, world):
        assert (tmp_path / f"rank-{rank}.log").read_text() == ""


@pytest.mark.parametrize("sharding", ["true", "false"])
def test_ranks_whose_rows_teach_nothing_have_the_losses_of_one(scene, tmp_path, monkeypatch, sharding):
    """One supervised token at the end of a row gives a block draft no anchor. In some steps one rank has no
    other rows, in some both: a first step of loss 0 once made the next one explode."""
    target = Target.from_pretrained(scene / "target")
    asked = len(prompt_ids(target.tokenizer, [{"role": "user", "content": ""}], False))
    rows = [("x" * (i if i % 4 == 0 else 63 - asked), "red and blue and") for i in range(12)]
    answers = write_rows(tmp_path / "answers.jsonl", rows)
    changes = [f"data.train={answers}", "data.max_length=64", "data.min_supervised=1", "name=bare"]
    changes.append(f"shard_draft={sharding}")
    recipe = recipe_of(scene, "dspark", *changes, "optim.batch_size=2")
    monkeypatch.setattr(loop, "LOG_EVERY", 1)
    alone = train_draft(recipe, tmp_path / "alone").run
    ours = losses(alone)
    assert len(ours) == 20 and 0 < ours.count(0.0) < 20
    in_ranks(2, lambda rank: train_draft(recipe, tmp_path / "runs"), tmp_path)
    assert losses(tmp_path / "runs/bare") == pytest.approx(ours, abs=1e-5)


def test_both_models_split_stop_within_a_step_and_continue_alone(scene, tmp_path, monkeypatch):
    """One rank is told to stop between two micro-batches; a draft of a reduced vocabulary."""
    more = ["optim.micro_batch_tokens=100", "optim.max_steps=8", "draft.vocab_size=24", "eval_every_steps=4"]
    split = recipe_of(scene, "dspark", *more, "shard_draft=true", "shard_target=true")

    def work(rank: int) -> None:
        real, passes = steps.features_of, []

        def features(*words: Any) -> Any:
            passes.append(words)
            if rank == 1 and len(passes) == 11:
                os.kill(os.getpid(), signal.SIGTERM)
            return real(*words)

        steps.features_of = features
        assert train_draft(split, tmp_path / "runs").interrupted

    in_ranks(2, work, tmp_path)
    run = tmp_path / "runs/tiny-dspark"
    before = len(losses(run))
    assert 1 <= before < 8 and (run / f"checkpoints/step_{before}").is_dir()
    monkeypatch.setattr(loop, "LOG_EVERY", 1)
    train_draft(recipe_of(scene, "dspark", *more), tmp_path / "runs")
    whole = train_draft(recipe_of(scene, "dspark", *more), tmp_path / "whole").run
    assert losses(run) == pytest.approx(losses(whole), abs=1e-5)


def test_checkpoint_of_two_ranks_continues_on_one_and_on_three(scene, tmp_path):
    """And three are refused a batch of four, which has to be said before anything is loaded."""
    six = ("optim.batch_size=6", "optim.max_steps=10")
    runs = {world: tmp_path / str(world) for world in (1, 2, 3)}
    stopped = lambda rank: train_draft(interrupted(recipe_of(scene, "dspark", *six)), runs[2])  # noqa: E731

    def interrupted(recipe: Recipe) -> Recipe:
        """The same recipe, in a process that is told to stop in its sixth step."""
        real = loop.train_step

        def step(*words: Any) -> Any:
            if words[4] == 5:
                os.kill(os.getpid(), signal.SIGTERM)
            return real(*words)

        loop.train_step = step  # type: ignore[assignment]
        return recipe

    in_ranks(2, stopped, tmp_path)
    assert (runs[2] / "tiny-dspark/checkpoints/step_6").is_dir()
    for world in (1, 3):
        shutil.copytree(runs[2], runs[world])
        in_ranks(
            world, lambda rank, w=world: train_draft(recipe_of(scene, "dspark", *six), runs[w]), tmp_path
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "LOG_EVERY", 1)
        whole = train_draft(recipe_of(scene, "dspark", *six), tmp_path / "whole")
        patch.setenv("RANK", "0")
        patch.setenv("WORLD_SIZE", "3")
        with pytest.raises(RecipeError, match="4 sequences, which 3 processes cannot share") as caught:
            train_draft(recipe_of(scene, "dspark"), tmp_path / "none")
    assert "optim.batch_size=3 or 6" in str(caught.value)
    assert not (tmp_path / "none").exists()
    for world in (1, 3):
        ours = losses(runs[world] / "tiny-dspark")
        assert len(ours) == 10
        assert ours == pytest.approx(losses(whole.run), abs=1e-5)


def test_target_split_over_two_ranks_gives_the_same_features_and_training(scene, alone, tmp_path):
    """Ranks have micro-batches of different number, and the target's layers must be gathered as often."""
    more = ("shard_target=true", "optim.micro_batch_tokens=200", "eval_every_steps=20", "optim.max_steps=6")
    ids = torch.randint(60, (3, 17), generator=torch.Generator().manual_seed(0))

    def work(rank: int) -> None:
        with joined():
            target = Target.from_pretrained(str(scene / "target"), dtype="float32", place=shard_target)
            sizes = [p.to_local().numel() for p in target.decoder.layers.parameters()]  # type: ignore[operator]
            whole = sum(p.numel() for p in target.decoder.layers.parameters())
            found = target.read(ids, (-1, 1, 2))
            torch.save([sum(sizes) / whole, found.features, found.last_hidden], tmp_path / f"features-{rank}")
            train_draft(recipe_of(scene, "dspark", *more), tmp_path / "split")

    in_ranks(2, work, tmp_path)
    plain = Target.from_pretrained(str(scene / "target"), dtype="float32").read(ids, (-1, 1, 2))
    for rank in range(2):
        share, features, last = torch.load(tmp_path / f"features-{rank}")
        assert share <= 0.6
        assert torch.equal(features, plain.features) and torch.equal(last, plain.last_hidden)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "LOG_EVERY", 1)
        whole = train_draft(recipe_of(scene, "dspark", *more), tmp_path / "whole")
    assert losses(tmp_path / "split/tiny-dspark") == pytest.approx(losses(whole.run), abs=1e-5)
    assert whole.held_out_tau is not None
    taus = [
        json.loads((r / "checkpoints/best/deepspec.json").read_text())["held_out_tau"]
        for r in (tmp_path / "split/tiny-dspark", whole.run)
    ]
    assert taus[0] == taus[1]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("algorithm", ["dspark", "eagle3"])
def test_draft_split_over_two_ranks_trains_as_one_and_continues_on_any(scene, tmp_path, algorithm, precision):
    """Three of a batch's four rows in one micro-batch leave the other rank with fewer: it must pass as often.
    A checkpoint is the same file, split or not."""
    more = [f"precision={precision}", "optim.micro_batch_tokens=200", "optim.max_steps=12"]
    more += ["eval_every_steps=6", "checkpoint_every_steps=6"]
    split, whole = (recipe_of(scene, algorithm, *more, f"shard_draft={word}") for word in ("true", "false"))
    begun = shutil.ignore_patterns("step_12", "best")

    def work(rank: int) -> None:
        real = loop.shard_draft

        def shard(draft: NeuralDraft) -> None:
            real(draft)
            parts = [(p.to_local().numel(), p.numel()) for p in draft.parameters()]
            assert sum(mine for mine, _ in parts) <= 0.6 * sum(every for _, every in parts)

        loop.shard_draft = shard
        with joined():
            for folder in ("split", "joined"):
                train_draft(split, tmp_path / folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "LOG_EVERY", 1)
        alone = train_draft(whole, tmp_path / "alone")
        shutil.copytree(tmp_path / "alone", tmp_path / "joined", ignore=begun)
        in_ranks(2, work, tmp_path)
        shutil.copytree(tmp_path / "split", tmp_path / "left", ignore=begun)
        left = train_draft(whole, tmp_path / "left")
    near = 1e-5 if precision == "float32" else 1e-2
    assert "from step 6" in (tmp_path / "rank-0.log").read_text()
    for folder in ("split", "joined", "left"):
        run = tmp_path / folder / alone.run.name
        assert losses(run) == pytest.approx(losses(alone.run), abs=near)
        saved, wanted = (torch.load(r / "checkpoints/step_12/optimizer.pt") for r in (run, alone.run))
        torch.testing.assert_close(saved, wanted, rtol=0, atol=near)
    if precision == "float32":
        assert left.held_out_tau == alone.held_out_tau


def test_split_draft_reads_what_an_unsplit_one_reads(tmp_path):
    """FSDP moves tensors in tuples to the device, and a plan lies on the host; it narrows weights and not
    buffers, such as Gemma's layer scalars."""
    backend = "nccl" if torch.device(DEVICE).type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        for algorithm, family in (("dflash", "gemma4"), ("dspark", "qwen3"), ("eagle3", "gemma4")):
            heads = {"markov_rank": 5, "confidence": True} if algorithm == "dspark" else {}
            draft = make_draft(algorithm, family, **heads).bfloat16()
            draft.bind(Embedding(draft.embedding.weight.bfloat16()), Head(draft.head.weight.bfloat16()))
            batch = make_batch()
            batch = replace(
                batch, features=batch.features.bfloat16(), last_hidden=batch.last_hidden.bfloat16()
            )
            plan = draft.plan(batch, 3, [torch.Generator().manual_seed(i) for i in range(2)])
            moved, _ = _to_kwargs((batch, plan), {}, torch.device("meta"), False)
            assert all(x is y for x, y in zip(moved[0], (batch, plan), strict=True))
            want = draft(batch, DSPARK_LOSS, plan).total
            shard_draft(draft)
            found = draft(batch, DSPARK_LOSS, plan).total
            assert torch.equal(found, want)
            found.backward()
            assert all(p.grad.dtype == torch.float32 for p in draft.parameters())
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("sharding", ["true", "false"])
def test_step_that_explodes_on_ranks_names_its_rows(scene, tmp_path, sharding):
    recipe = recipe_of(scene, "dspark", "optim.lr=1e4", "optim.grad_clip=1e9", f"shard_draft={sharding}")
    said = codes(started(2, lambda rank: train_draft(recipe, tmp_path / "runs"), tmp_path))
    assert said == [1, 1]
    for rank in range(2):
        assert re.search(r"the loss .*of step \d+", (tmp_path / f"rank-{rank}.log").read_text())


def test_split_target_is_not_asked_for_answers_by_one_rank_alone(scene, tmp_path, monkeypatch):
    """Its layers wait for all ranks, and these wait for the answers, for days."""
    monkeypatch.setattr("deepspec.train.data.launched", lambda: (0, 2))
    recipe = recipe_of(scene, "dspark", "shard_target=true", "data.train=pocket:train")
    with pytest.raises(RecipeError, match="which one process does alone") as caught:
        train_draft(recipe, tmp_path / "runs")
    assert "deepspec data regenerate pocket:train" in str(caught.value)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("split", ["", "shard_draft", "shard_target"])
def test_rank_that_dies_ends_the_others_with_a_message(scene, tmp_path, split):
    """Where a model is split, they wait for it in a pass."""

    def work(rank: int) -> None:
        real = loop.train_step

        def step(*words: Any) -> Any:
            if rank == 1 and words[4] == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*words)

        loop.train_step = step  # type: ignore[assignment]
        train_draft(recipe_of(scene, "dspark", *([f"{split}=true"] if split else [])), tmp_path / "runs")

    assert codes(started(2, work, tmp_path)) == [1, -signal.SIGKILL]
    said = (tmp_path / "rank-0.log").read_text()
    assert "RankError: another process of this job ended or does not answer" in said
    assert "the same command continues from the newest checkpoint" in said


def test_full_disk_ends_all_ranks_and_keeps_the_checkpoint_before(scene, tmp_path):
    def work(rank: int) -> None:
        real, saved = torch.save, []

        def save(state: Any, file: Any, **how: Any) -> None:
            saved.extend([file] if isinstance(file, Path) else [])  # ranks send each other what they save
            if len(saved) > 1 and file is saved[-1]:
                file.write_bytes(b"a part")
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
            real(state, file, **how)

        torch.save = save
        train_draft(recipe_of(scene, "dspark"), tmp_path / "runs")

    assert codes(started(2, work, tmp_path)) == [1, 1]
    assert "No space left on device" in (tmp_path / "rank-0.log").read_text()
    assert "another process of this job ended" in (tmp_path / "rank-1.log").read_text()
    checkpoints = tmp_path / "runs/tiny-dspark/checkpoints"
    assert [path.name for path in checkpoints.iterdir() if path.name.startswith("step_")] == ["step_5"]
    train_draft(recipe_of(scene, "dspark"), tmp_path / "runs")
    assert (checkpoints / "step_20").exists()


def test_ranks_with_other_code_recipe_or_data_are_refused_and_named(scene, tmp_path, monkeypatch):
    def work(rank: int) -> None:
        if rank:
            import deepspec.train.facts as facts

            monkeypatch.setattr(facts, "code_hash", lambda room="": "another")
        more = ["seed=1"] if rank else []
        answers = scene / "answers.jsonl"
        if rank:
            answers = tmp_path / "other.jsonl"
            shutil.copy(scene / "answers.jsonl", answers)
            answers.write_bytes(answers.read_bytes().replace(b"red and", b"rot und", 1))
        train_draft(recipe_of(scene, "dspark", *more), tmp_path / "runs", answers=answers)

    assert codes(started(2, work, tmp_path)) == [1, 1]
    for rank in range(2):
        said = (tmp_path / f"rank-{rank}.log").read_text()
        assert "is not like rank 0" in said
        for what in (
            "the code of deepspec: 'another' there",
            "the recipe's seed: 1 there, 0 on rank 0",
            "data.train: ",
        ):
            assert what in said
    assert not (tmp_path / "runs").exists()
