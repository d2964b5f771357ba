"""Training: exact resume, whole checkpoints, the best one kept, the schedule, float32 masters."""

from __future__ import annotations

import itertools
import json
import math
import os
import platform
import resource
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from typer.testing import CliRunner

import deepspec
import deepspec.checkpoints.draft as checkpoint
import deepspec.train.loop as loop
from deepspec.checkpoints.draft import load_draft
from deepspec.cli import app
from deepspec.config import Recipe, load_recipe
from deepspec.data.rows import frequent_ids
from deepspec.data.tokens import Encoded
from deepspec.decode.engine import generate
from deepspec.errors import CheckpointError, RecipeError
from deepspec.features.batches import batch_order, batches_from, online
from deepspec.log import Tracker
from deepspec.maths.blocks import FeatureBatch
from deepspec.targets import Target
from deepspec.train.build import build_draft, mask_token
from deepspec.train.loop import train
from deepspec.train.memory import kept_memory
from deepspec.train.optimizer import Optimizer, adamw, schedule
from deepspec.train.run import Run, forget_after, open_run
from kills import ended, held_by_another, in_child, needs_fork
from talking import recipe_tree, save_talking_llama, train_in, write_data, write_recipe

TIMING = {"seconds", "tokens_per_s", "memory_gb", "features_share"}


@pytest.fixture(autouse=True)
def log_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "LOG_EVERY", 1)


def recipe_for(algorithm: str, **changes: Any) -> Recipe:
    tree = recipe_tree(Path("unused"), Path("unused"), algorithm, max_steps=6)
    tree |= {"eval_every_steps": 3, "checkpoint_every_steps": 3}
    return Recipe.model_validate(tree | changes)


def rows_for(target: Target, count: int = 10) -> list[Encoded]:
    generator = torch.Generator().manual_seed(1)
    rows = []
    for i in range(count):
        length = 8 + 3 * i
        ids = torch.randint(target.vocab_size, (length,), generator=generator).tolist()
        rows.append(Encoded(ids=ids, loss_mask=[0] * 3 + [1] * (length - 3), id=f"r{i}"))
    return rows


def metrics_of(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text("utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMING} for line in lines]


def same_state(a: Path, b: Path) -> None:
    """Weights and optimiser state of two checkpoints, bit for bit."""
    left, right = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []
    states = [torch.load(p / "optimizer.pt", weights_only=True) for p in (a, b)]
    for one, other in zip(*(s["masters"] for s in states), strict=True):
        assert torch.equal(one, other)
    moments = [s["adamw"]["state"] for s in states]
    assert moments[0].keys() == moments[1].keys()
    for key, found in moments[0].items():
        assert all(torch.equal(value, moments[1][key][name]) for name, value in found.items())


def interrupting(at_call: int, value: float = 1.5) -> Callable[[Any], float]:
    """A held-out measurement during whose n-th call somebody presses Ctrl-C."""
    calls = itertools.count(1)

    def held_out(draft: Any) -> float:
        if next(calls) == at_call:
            os.kill(os.getpid(), signal.SIGINT)
        return value

    return held_out


@pytest.mark.parametrize(
    ("algorithm", "precision"), [("eagle3", "bfloat16"), ("dflash", "float32"), ("dspark", "bfloat16")]
)
def test_resumed_run_equals_the_undisturbed_one_bit_for_bit(targets, tmp_path, algorithm, precision):
    optim = {"lr": 1e-2, "batch_size": 4, "max_steps": 4}
    each = {"eval_every_steps": 2, "checkpoint_every_steps": 2}
    target, recipe = targets["llama"], recipe_for(algorithm, precision=precision, optim=optim, **each)
    rows = rows_for(target)
    whole = train_in(tmp_path / "whole", recipe, target, rows, lambda draft: 1.5)
    cut = train_in(tmp_path / "cut", recipe, target, rows, interrupting(1))
    assert (cut.interrupted, cut.steps) == (signal.SIGINT, 2)
    assert not (tmp_path / "cut" / "checkpoints" / "step_4").exists()
    on = train_in(tmp_path / "cut", recipe, target, rows, lambda draft: 1.5)
    assert (on.interrupted, on.steps, on.tokens) == (0, 4, whole.tokens)
    same_state(tmp_path / "whole/checkpoints/step_4", tmp_path / "cut/checkpoints/step_4")
    assert metrics_of(tmp_path / "cut") == metrics_of(tmp_path / "whole")
    stored = load_file(tmp_path / "cut/checkpoints/step_4/model.safetensors").values()
    assert {t.dtype for t in stored} == {getattr(torch, precision)}


@pytest.mark.parametrize("algorithm", ["eagle3", "dspark"])
def test_reduced_vocabulary_is_the_datas_own_and_comes_back_from_the_checkpoint(targets, tmp_path, algorithm):
    target, rows = targets["llama"], rows_for(targets["llama"])
    recipe = recipe_for(algorithm)
    recipe = recipe.model_copy(update={"draft": recipe.draft.model_copy(update={"vocab_size": 20})})
    counts = Counter(i for r in rows for i, m in zip(r.ids, r.loss_mask, strict=True) if m)
    best = sorted(range(target.vocab_size), key=lambda i: (-counts[i], i))[:20]
    outcome = train_in(tmp_path, recipe, target, rows)
    draft = load_draft(outcome.best, target)
    assert draft.head.kept is not None
    assert draft.head.kept.tolist() == sorted(best)
    assert torch.equal(draft.head.weight, target.head.weight[sorted(best)])
    facts = json.loads((outcome.best / "deepspec.json").read_text())["vocabulary"]
    assert facts["coverage"] == pytest.approx(sum(counts[i] for i in best) / counts.total())
    assert sorted(
        load_file(outcome.best / "model.safetensors").keys() & {"d2t", "t2d", "embed_tokens.weight"}
    ) == [
        "d2t",
        "t2d",
    ]
    prompt = rows[-1].ids[:9]
    drafted = generate(target, draft, prompt, max_new_tokens=12, ignore_eos=True)
    assert drafted.token_ids == generate(target, None, prompt, max_new_tokens=12, ignore_eos=True).token_ids
    # Counted anew in other data it would be another vocabulary under the same weights.
    longer = recipe.model_copy(update={"optim": recipe.optim.model_copy(update={"max_steps": 8})})
    with pytest.raises(CheckpointError, match="counted in other data"):
        train_in(tmp_path, longer, target, rows[:2])


def test_ids_that_must_be_kept_are_and_ties_go_to_the_lower_id():
    row = Encoded(ids=[5, 5, 7, 9, 9, 2], loss_mask=[0, 1, 1, 1, 1, 0], id="r")
    assert frequent_ids([row], 3, [], 12) == [5, 7, 9]
    assert frequent_ids([row], 3, [11], 12) == [5, 9, 11]
    assert frequent_ids([row], 5, [], 12) == [0, 1, 5, 7, 9]


def test_trackers_are_closed_when_a_step_fails(targets, tmp_path, monkeypatch):
    closed = []
    tracker = Tracker(lambda values, step: None, lambda: closed.append(True))
    monkeypatch.setattr("deepspec.train.run.open_trackers", lambda *words: tracker)
    monkeypatch.setattr(loop, "train_step", lambda *words, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train_in(tmp_path, recipe_for("dflash"), targets["llama"], rows_for(targets["llama"]))
    assert closed == [True]


def test_finished_run_started_again_changes_nothing(targets, tmp_path):
    target, recipe = targets["llama"], recipe_for("dflash", eval_every_steps=4)
    taus = iter([2.0, 1.5])
    first = train_in(tmp_path, recipe, target, rows_for(target), lambda draft: next(taus))
    before = (tmp_path / "metrics.jsonl").read_bytes()
    again = train_in(tmp_path, recipe, target, rows_for(target), lambda draft: next(taus))
    assert (again.steps, again.held_out_tau, again.tokens) == (6, first.held_out_tau, first.tokens)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_best_checkpoint_is_the_one_with_the_highest_held_out_tau(targets, tmp_path):
    target, recipe = targets["llama"], recipe_for("dflash", eval_every_steps=2)
    taus, seen = [1.2, 1.9, 1.5], []

    def held_out(draft: Any) -> float:
        assert not draft.training
        seen.append({k: v.clone() for k, v in draft.state_dict().items()})
        return taus[len(seen) - 1]

    outcome = train_in(tmp_path, recipe, target, rows_for(target), held_out, origin="llama")
    assert outcome.held_out_tau == 1.9
    facts = json.loads((outcome.best / "deepspec.json").read_text())
    assert (facts["step"], facts["held_out_tau"], facts["origin"]) == (4, 1.9, "llama")
    stored = load_file(outcome.best / "model.safetensors")
    assert all(torch.equal(stored[name], seen[1][name]) for name in stored)
    judged = [(m["step"], m["held_out_tau"]) for m in metrics_of(tmp_path) if "held_out_tau" in m]
    assert judged == [(2, 1.2), (4, 1.9), (6, 1.5)]
    assert load_draft(tmp_path, target).spec.algorithm == "dflash"  # a run's folder means its best


def test_without_a_measurement_best_is_the_last_even_after_an_interruption(targets, tmp_path, monkeypatch):
    target, recipe = targets["llama"], recipe_for("dflash")
    real = loop.train_step

    def interrupted(*args: Any, **options: Any) -> Any:
        if args[4] == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args, **options)

    monkeypatch.setattr(loop, "train_step", interrupted)
    assert train_in(tmp_path, recipe, target, rows_for(target)).interrupted
    monkeypatch.setattr(loop, "train_step", real)
    outcome = train_in(tmp_path, recipe, target, rows_for(target))
    best, last = (load_file(p / "model.safetensors") for p in (outcome.best, Run(tmp_path, recipe).latest()))
    assert outcome.steps == 6
    assert all(torch.equal(best[name], last[name]) for name in last)


def test_only_the_last_checkpoints_stay(targets, tmp_path):
    target, recipe = targets["llama"], recipe_for("eagle3", checkpoint_every_steps=1)
    train_in(tmp_path, recipe, target, rows_for(target))
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["best", "step_5", "step_6"]


def test_metric_lines_of_lost_steps_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": 1, "loss": 3.0}, {"step": 3, "held_out_tau": 1.1}, {"step": 4, "loss": 2.0}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 2, "lo')
    forget_after(path, 3)
    assert [json.loads(line) for line in path.read_text().splitlines()] == lines[:2]


def test_another_draft_in_the_same_run_is_refused(targets, tmp_path):
    target, recipe = targets["llama"], recipe_for("dflash")
    train_in(tmp_path, recipe, target, rows_for(target))
    wider = recipe_for("dflash", draft=recipe.draft.model_copy(update={"num_layers": 1}).model_dump())
    with pytest.raises(CheckpointError, match="another shape"):
        train_in(tmp_path, wider, target, rows_for(target))


def test_draft_that_cannot_be_built_names_the_recipe(targets):
    tree = recipe_for("dflash").model_dump()
    tree["draft"]["target_layer_ids"] = [0, 3]  # the last layer's output is never a feature
    with pytest.raises(RecipeError, match="the last of 4 layers is never read") as caught:
        build_draft(Recipe.model_validate(tree), targets["llama"])
    assert caught.value.where == "tiny-dflash"


# ── micro-batches ─────────────────────────────────────────────────────────────────────────────────────


def gradients(
    target: Target, recipe: Recipe, rows: list[Encoded], size: int | None
) -> tuple[float, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(loss, gradients, metric sums) of step 0 with micro-batches of `size` rows."""
    recipe = recipe.model_copy(update={"optim": recipe.optim.model_copy(update={"micro_batch_size": size})})
    draft = build_draft(recipe, target)
    optimizer = Optimizer(draft, recipe.optim)
    loss, sums = loop.train_step(
        draft, online(target, draft.feature_layers), rows, recipe, 0, measure=True, optimizer=optimizer
    )
    names = [name for name, p in draft.named_parameters() if p.requires_grad]
    found = {n: p.grad for n, p in zip(names, optimizer.parameters, strict=True) if p.grad is not None}
    return float(loss), found, sums


@pytest.mark.parametrize("algorithm", ["eagle3", "dflash", "dspark"])
def test_split_batch_has_the_gradients_of_the_whole(targets, algorithm):
    """A mean of the parts' means would weigh a short row like a long one, and Eagle-3 divides by padding."""
    target, recipe, rows = targets["llama"], recipe_for(algorithm), rows_for(targets["llama"], 5)
    loss, whole, sums = gradients(target, recipe, rows, None)
    for size in (1, 3):
        split_loss, split, split_sums = gradients(target, recipe, rows, size)
        assert split_loss == pytest.approx(loss, rel=1e-5)
        assert split.keys() == whole.keys()
        for name, found in whole.items():
            torch.testing.assert_close(split[name], found, rtol=1e-3, atol=1e-5 * float(found.abs().max()))
        assert split_sums.keys() == sums.keys()
        for name, value in sums.items():
            torch.testing.assert_close(split_sums[name], value, rtol=1e-4, atol=1e-5)


def test_anchors_of_a_split_batch_are_those_of_the_whole(targets, monkeypatch):
    target, recipe, rows = (
        targets["llama"],
        recipe_for("dflash", num_anchors=3),
        rows_for(targets["llama"], 5),
    )
    drawn: list[list[list[int]]] = [[]]
    real = build_draft(recipe, target).__class__.blocks

    def watched(self: Any, batch: FeatureBatch, anchors: torch.Tensor, kept: torch.Tensor) -> Any:
        drawn[-1] += [a[k].tolist() for a, k in zip(anchors, kept, strict=True)]
        return real(self, batch, anchors, kept)

    monkeypatch.setattr("deepspec.drafts.dflash.DFlashDraft.blocks", watched)
    for size in (None, 1, 2):
        gradients(target, recipe, rows, size)
        drawn.append([])
    assert drawn[0] == drawn[1] == drawn[2]
    assert [len(anchors) for anchors in drawn[0]] == [3] * 5


@pytest.mark.parametrize("algorithm", ["eagle3", "dflash", "dspark"])
def test_row_without_a_valid_block_adds_nothing_and_stops_nothing(targets, algorithm):
    target, recipe, rows = targets["llama"], recipe_for(algorithm), rows_for(targets["llama"], 3)
    rows[1] = Encoded(ids=rows[1].ids, loss_mask=[0, 1] * 5 + [0], id="holes")  # no two neighbours
    loss, whole, _ = gradients(target, recipe, rows, None)
    split_loss, split, _ = gradients(target, recipe, rows, 1)
    assert split_loss == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(split["fc.weight"], whole["fc.weight"], rtol=1e-3, atol=1e-6)


def test_gradients_of_many_parts_are_summed_in_float32():
    """In bfloat16, 256 + 1 is 256: the later parts would be lost."""
    draft = OneNumber(torch.bfloat16)
    recipe = recipe_for("dflash", optim={"lr": 1e-4, "max_steps": 1})
    optimizer = Optimizer(draft, recipe.optim)  # type: ignore[arg-type]
    for value in (256.0, 1.0, 1.0):
        (draft.x * value).sum().backward()
    optimizer.divide(torch.tensor(2.0))
    assert draft.x.grad is not None and draft.x.grad.item() == 129.0


# ── the mask token ────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def talking(tmp_path_factory: pytest.TempPathFactory) -> Target:
    path = save_talking_llama(tmp_path_factory.mktemp("mask") / "target")
    return Target.from_pretrained(path, dtype="float32", device="cpu")


def renamed(target: Target, path: Path, name: str, *, rows: int = 0) -> Target:
    """The talking target with its mask token called otherwise, and `rows` more rows than tokens."""
    import shutil

    shutil.copytree(target.spec.name, path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        text = (path / file).read_text("utf-8").replace("<|mask|>", name)
        (path / file).write_text(text, "utf-8")
    found = Target.from_pretrained(path, dtype="float32", device="cpu")
    if rows:
        found.model.resize_token_embeddings(found.vocab_size + rows, mean_resizing=False)
    return found


def test_mask_token_is_its_own_then_the_familys_then_a_free_row_then_a_reserved_or_control_token(
    talking, targets, tmp_path
):
    ids = talking.tokenizer.get_vocab()
    assert mask_token(talking) == ids["<|mask|>"]
    assert mask_token(targets["gemma4"]) == 4
    assert mask_token(targets["llama"]) == targets["llama"].vocab_size - 1  # nothing says which are free
    assert mask_token(targets["qwen3"]) == 95  # the family's 151669 is outside this tiny embedding
    free = renamed(talking, tmp_path / "free", "<|word|>", rows=3)
    assert mask_token(free) == len(ids)
    reserved = renamed(talking, tmp_path / "reserved", "<unused0>")
    assert mask_token(reserved) == ids["<|mask|>"]
    control = renamed(talking, tmp_path / "control", "<reponame>")  # as SmolLM2, which reserves nothing
    assert mask_token(control) == ids["<|mask|>"]


def test_target_without_a_token_to_spare_is_told_of_eagle3(talking, tmp_path):
    full = renamed(talking, tmp_path / "full", "<|word|>")
    full.tokenizer.chat_template += "<|word|>"
    with pytest.raises(RecipeError, match="no token to spare") as caught:
        mask_token(full)
    assert "Eagle-3" in str(caught.value)


@pytest.mark.parametrize(
    ("token", "why"),
    [
        ("a", "is 'a', which is ordinary text"),
        ("<|im_end|>", "ends the target's answers"),
        ("<|endoftext|>", "is the padding"),
        ("<|im_start|>", "which the chat template writes"),
        (-1, "is outside the target's embedding of"),
        (100_000, "is outside the target's embedding of"),
    ],
)
def test_mask_token_that_the_target_uses_is_refused(talking, token, why):
    chosen = talking.tokenizer.get_vocab()[token] if isinstance(token, str) else token
    with pytest.raises(RecipeError, match=f"draft.mask_token_id {chosen} ") as caught:
        mask_token(talking, chosen)
    assert why in str(caught.value)


def test_mask_token_can_be_chosen(targets, talking):
    assert mask_token(targets["llama"], 9) == 9
    tree = recipe_for("dflash").model_dump()
    tree["draft"]["mask_token_id"] = talking.tokenizer.get_vocab()["<|mask|>"]
    assert (
        build_draft(Recipe.model_validate(tree), talking).spec.mask_token_id
        == (tree["draft"]["mask_token_id"])
    )


# ── optimiser states in 8 bits ────────────────────────────────────────────────────────────────────────


def eight_bit_recipe(**optim: Any) -> Recipe:
    """Its draft has matrices of 5,120 values: below 4,096, states stay in float32."""
    tree = recipe_for("dspark").model_dump()
    tree["draft"]["intermediate_size"] = 160
    tree["optim"] |= {"states": "8bit", **optim}
    return Recipe.model_validate(tree)


def muon_recipe() -> Recipe:
    tree = recipe_for("dspark").model_dump()
    tree["optim"] |= {"matrices": "muon"}
    return Recipe.model_validate(tree)


def test_muon_steps_the_matrices_between_layers_and_adamw_the_rest(targets):
    draft = build_draft(muon_recipe(), targets["llama"], rows_for(targets["llama"]))
    optimizer = Optimizer(draft, muon_recipe().optim)
    names = {id(p): name for name, p in draft.named_parameters()}
    rest = {names[id(p)] for p in optimizer.groups["adamw"]}
    assert {names[id(p)] for p in optimizer.groups["muon"]} == {
        name for name in names.values() if "proj.weight" in name and "confidence" not in name
    } | {"fc.weight"}
    assert {"markov_head.markov_w1.weight", "markov_head.markov_w2.weight", "norm.weight"} <= rest
    matrix = draft.layers[0].mlp.up_proj.weight
    before = matrix.detach().clone()
    for parameter in draft.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step(0.5)
    # An orthogonal step: all its singular values are nearly one size, where a gradient's are not.
    sizes = torch.linalg.svdvals(before - matrix.detach())
    assert sizes.min() > 0.5 * sizes.max() > 0


def whole_and_cut(targets: Any, folder: Path, recipe: Recipe) -> Path:
    """The last checkpoint of a run, after it was found equal, bit for bit, to that of a run that was
    interrupted and resumed."""
    target, rows = targets["llama"], rows_for(targets["llama"])
    train_in(folder / "whole", recipe, target, rows, lambda draft: 1.5)
    assert train_in(folder / "cut", recipe, target, rows, interrupting(1)).steps == 3
    train_in(folder / "cut", recipe, target, rows, lambda draft: 1.5)
    assert metrics_of(folder / "whole") == metrics_of(folder / "cut")
    ends = [folder / run / "checkpoints" / "step_6" for run in ("whole", "cut")]
    saved = [tree_leaves([load_file(end / "model.safetensors"), state_of(end)]) for end in ends]
    tensors = [[x for x in leaves if isinstance(x, Tensor)] for leaves in saved]
    assert all(torch.equal(one, other) for one, other in zip(*tensors, strict=True))
    return ends[0]


def state_of(checkpoint: Path) -> dict[str, Any]:
    return torch.load(checkpoint / "optimizer.pt", weights_only=True)


def test_muon_run_resumes_bit_for_bit(targets, tmp_path):
    recipe = muon_recipe()
    state = state_of(whole_and_cut(targets, tmp_path, recipe))
    assert len(state["muon"]["state"]) > 8
    state["muon"]["state"][0]["momentum_buffer"].fill_(math.nan)
    draft = build_draft(recipe, targets["llama"], rows_for(targets["llama"]))
    with pytest.raises(ValueError, match="not finite"):
        Optimizer(draft, recipe.optim).load(state)


NEEDS_BITSANDBYTES = "optim.states=8bit needs bitsandbytes, an optional extra"


def test_8bit_run_resumes_bit_for_bit(targets, tmp_path):
    pytest.importorskip("bitsandbytes", reason=NEEDS_BITSANDBYTES)
    end = whole_and_cut(targets, tmp_path, eight_bit_recipe())
    assert any(isinstance(x, Tensor) and x.dtype == torch.uint8 for x in tree_leaves(state_of(end)["adamw"]))


def test_8bit_states_take_what_the_recipes_page_counts(targets):
    pytest.importorskip("bitsandbytes", reason=NEEDS_BITSANDBYTES)
    large, small = nn.Parameter(torch.randn(64, 128)), nn.Parameter(torch.randn(64))
    made = adamw([large, small], eight_bit_recipe().optim)
    (large.sum() + small.sum()).backward()
    made.step()
    shared = {"qmap1", "qmap2"}  # one table for all parameters
    sizes = [
        sum(v.nbytes for k, v in made.state[p].items() if isinstance(v, torch.Tensor) and k not in shared)
        for p in (large, small)
    ]
    assert sizes == [2 * 8192 + 2 * 4 * 8192 // 256, 2 * 4 * 64]


def test_8bit_training_learns_about_as_well(targets, tmp_path):
    pytest.importorskip("bitsandbytes", reason=NEEDS_BITSANDBYTES)
    target, last = targets["llama"], {}
    for states in ("float32", "8bit"):
        recipe = eight_bit_recipe(states=states, max_steps=40)
        train_in(tmp_path / states, recipe, target, rows_for(target))
        last[states] = [m["loss"] for m in metrics_of(tmp_path / states)]
    assert last["8bit"] != last["float32"]
    mean = {states: sum(losses[-8:]) / 8 for states, losses in last.items()}
    assert mean["float32"] < 0.9 * last["float32"][0]
    assert mean["8bit"] == pytest.approx(mean["float32"], rel=0.05)


def test_missing_bitsandbytes_is_said_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    monkeypatch.setattr(Target, "from_pretrained", lambda *a: pytest.fail("the target was loaded first"))
    with pytest.raises(RecipeError, match="pip install 'bitsandbytes") as caught:
        deepspec.train_draft(eight_bit_recipe(), tmp_path)
    assert "optim.states=float32" in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("override", "named"),
    [("optim.states=8bit", "its optim.states is float32, the recipe's is 8bit"), ("seed=3", None)],
)
def test_run_continues_under_another_recipe_only_if_it_can(targets, tmp_path, capsys, override, named):
    path = write_recipe(tmp_path / "r.yaml", recipe_tree(Path("unused"), tmp_path, "dflash", max_steps=6))
    with open_run(tmp_path, load_recipe(path)) as run:
        train_in(run.folder, run.recipe, targets["llama"], rows_for(targets["llama"]))
    kept = (run.folder / "recipe.yaml").read_bytes()
    changed = load_recipe(path, [override, "optim.micro_batch_size=2"])
    for force in (False, True) if named else (False,):
        match = named if force else "its optim.states is" if named else "another recipe: seed was 0 and is 3 "
        with pytest.raises(RecipeError, match=match.strip()), open_run(tmp_path, changed, force=force):
            pass
    if named is None:
        with open_run(tmp_path, changed, force=True) as run:
            assert load_recipe(run.folder / "recipe.yaml").seed == 3
        assert "seed was 0 and is 3; it continues with this one" in capsys.readouterr().err
        return
    assert (run.folder / "recipe.yaml").read_bytes() == kept


def test_checkpoints_from_before_optimiser_states_could_be_chosen_still_resume(targets, tmp_path):
    """And those that name them, as between then and now."""
    target, recipe = targets["llama"], recipe_for("dflash")
    train_in(tmp_path, recipe, target, rows_for(target))
    path = tmp_path / "checkpoints/step_6/optimizer.pt"
    state = torch.load(path, weights_only=True)
    assert state.keys() == {"adamw", "masters"}
    torch.save({**state, "states": "float32"}, path)
    assert train_in(tmp_path, recipe, target, rows_for(target)).steps == 6


def test_every_rank_but_the_first_writes_and_prints_nothing(targets, tmp_path, capsys):
    """With several processes in one folder each file would be written by all of them."""
    target, recipe, rows = targets["llama"], recipe_for("dflash"), rows_for(targets["llama"])
    draft = build_draft(recipe, target, rows)
    with open_run(tmp_path / "runs", recipe, rank=1) as run:
        outcome = train(run, draft, target, rows, online(target, draft.feature_layers), {}, lambda draft: 1.5)
    assert outcome.steps == 6
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")
    # It reads, though: every rank resumes from the checkpoint that the first one wrote.
    train_in(tmp_path / "runs" / recipe.name, recipe, target, rows)
    with open_run(tmp_path / "runs", recipe, rank=1) as run:
        assert run.resume(draft, Optimizer(draft, recipe.optim), {}).step == 6


# ── schedule and order ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("done", "warmup", "expected"),
    [
        (0.0, 0.25, 1e-3),  # the first step must not be lost to a learning rate of zero
        (0.125, 0.25, 0.5),
        (0.25, 0.25, 1.0),
        (0.5, 0.25, 0.5 * (1 + math.cos(math.pi / 3))),
        (1.0, 0.25, 0.0),
        (0.0, 0.0, 1.0),
    ],
)
def test_warm_up_is_linear_and_decay_half_a_cosine(done, warmup, expected):
    assert schedule(done, warmup) == expected


def test_each_step_gets_the_rate_of_its_share(targets, tmp_path):
    target = targets["llama"]
    recipe = recipe_for("dflash")
    train_in(tmp_path, recipe, target, rows_for(target))
    rates = [m["lr"] for m in metrics_of(tmp_path)]
    assert rates == [1e-2 * schedule(step / 6, recipe.optim.warmup) for step in range(6)]


def test_batch_order_depends_on_seed_and_epoch_alone():
    lengths = [7, 3, 9, 4, 4, 12, 5, 8, 6, 2, 11]
    torch.manual_seed(1)
    first = batch_order(lengths, 3, seed=5, epoch=2)
    torch.manual_seed(2)
    assert batch_order(lengths, 3, seed=5, epoch=2) == first
    assert sorted(itertools.chain(*first)) == list(range(len(lengths)))
    assert batch_order(lengths, 3, seed=5, epoch=3) != first
    assert batch_order(lengths, 3, seed=6, epoch=2) != first


def test_batches_from_the_middle_are_those_of_the_whole(targets):
    rows = rows_for(targets["llama"])
    whole = list(itertools.islice(batches_from(rows, 4, 0, 0), 9))
    assert [epoch for epoch, _ in whole] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    for first in (1, 3, 5):
        assert list(itertools.islice(batches_from(rows, 4, 0, first), 9 - first)) == whole[first:]


# ── masters ───────────────────────────────────────────────────────────────────────────────────────────


class OneNumber(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.ones(1, dtype=dtype))


def test_float32_masters_keep_what_bfloat16_would_lose():
    recipe = recipe_for("dflash", optim={"lr": 1e-4, "warmup": 0.5, "max_steps": 1})
    draft = OneNumber(torch.bfloat16)
    optimizer = Optimizer(draft, recipe.optim)  # type: ignore[arg-type]
    for step in range(40):
        draft.x.sum().backward()
        assert optimizer.step(0.5)[0] == 1e-4
        if step == 4:
            assert draft.x.item() == 1.0  # below bfloat16's resolution, and not forgotten
    assert optimizer.masters[0].dtype == torch.float32
    assert optimizer.masters[0].item() == pytest.approx(1 - 40e-4, abs=1e-6)
    assert draft.x.item() == optimizer.masters[0].bfloat16().item() < 1.0

    without = OneNumber(torch.bfloat16)
    adamw = torch.optim.AdamW(without.parameters(), lr=1e-4, weight_decay=0.0)
    for _ in range(40):
        without.x.grad = torch.ones_like(without.x)
        adamw.step()
    assert without.x.item() == 1.0


def test_clipping_is_by_the_norm_over_all_parameters():
    draft = nn.ParameterList([torch.ones(1), torch.ones(1)])
    recipe = recipe_for("dflash", optim={"lr": 1e-4, "max_steps": 1, "grad_clip": 1.0})
    optimizer = Optimizer(draft, recipe.optim)  # type: ignore[arg-type]
    draft[0].grad, draft[1].grad = torch.tensor([3.0]), torch.tensor([4.0])
    assert optimizer.step(0.5).norm == 5.0
    moments = [optimizer.steppers["adamw"].state[p]["exp_avg"].item() for p in draft]
    assert moments == pytest.approx([0.1 * 3 / 5, 0.1 * 4 / 5])  # (1 - β₁) × the clipped gradient


# ── killed, interrupted, started again ────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a talking target, its data, a recipe of six steps, and that run undisturbed."""
    folder = tmp_path_factory.mktemp("scene")
    target = save_talking_llama(folder / "target")
    write_data(folder)
    tree = recipe_tree(target, folder, "dspark", max_steps=6) | {"eval_every_steps": 3, "eval_prompts": 1}
    write_recipe(folder / "r.yaml", tree)
    result = CliRunner().invoke(app, ["train", str(folder / "r.yaml"), "--runs", str(folder / "whole")])
    assert result.exit_code == 0, result.output
    return folder


@needs_fork
@pytest.mark.parametrize(("moment", "whole_step"), [("step", 4), ("save", 2)])
def test_killed_training_goes_on_from_the_last_whole_checkpoint(scene, tmp_path, moment, whole_step):
    """Killed inside a step, and while a checkpoint is half on disk."""
    command = ["train", str(scene / "r.yaml"), "--runs", str(tmp_path)]
    step, save = loop.train_step, checkpoint.save_file

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def dying_step(*args: Any, **options: Any) -> Any:
        return die() if args[4] == 5 else step(*args, **options)

    def dying_save(tensors: Any, path: Path, **options: Any) -> Any:
        if "step_4" not in str(path):
            return save(tensors, path, **options)
        path.write_bytes(b"half a file")
        die()

    def killed() -> None:
        if moment == "step":
            loop.train_step = dying_step
        else:
            checkpoint.save_file = dying_save
        CliRunner().invoke(app, command)

    assert os.waitstatus_to_exitcode(os.waitpid(in_child(killed), 0)[1]) == -signal.SIGKILL
    run = tmp_path / "tiny-dspark"
    found = max((run / "checkpoints").glob("step_*"))
    assert found.name == f"step_{whole_step}"
    load_file(found / "model.safetensors")
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert f"resuming {run} from step {whole_step}" in result.stderr
    same_state(run / "checkpoints/step_6", scene / "whole/tiny-dspark/checkpoints/step_6")
    logged = [m["step"] for m in metrics_of(run) if "loss" in m]
    assert logged == sorted(set(logged))
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["best", "step_4", "step_6"]


@needs_fork
@pytest.mark.parametrize("more", [[], ["--fresh"]])
def test_two_trainings_in_one_run_folder_do_not_mix(scene, tmp_path, more):
    """The second would go on from the first's checkpoint, and each would drop the other's."""
    command = ["train", str(scene / "r.yaml"), "optim.max_steps=1", "--runs", str(tmp_path), *more]
    run = tmp_path / "tiny-dspark"
    with held_by_another(run, "training"):
        refused = CliRunner().invoke(app, command)
    assert refused.exit_code == 2, refused.output
    assert "another process is training in this folder" in refused.stderr
    assert str(run) in refused.stderr.replace("\n", "")
    assert [file.name for file in tmp_path.iterdir()] == ["tiny-dspark"]
    assert [file.name for file in run.iterdir()] == [".lock"]
    if not more:
        assert CliRunner().invoke(app, command).exit_code == 0


def test_mistyped_target_leaves_no_run_behind(scene, tmp_path):
    command = [
        "train",
        str(scene / "r.yaml"),
        f"target={tmp_path / 'no-such'}",
        "--runs",
        str(tmp_path / "runs"),
    ]
    assert CliRunner().invoke(app, command).exit_code == 2
    assert not (tmp_path / "runs").exists()


def test_run_whose_folder_is_a_file_says_so(scene, tmp_path):
    (tmp_path / "tiny-dspark").write_text("mine")
    refused = CliRunner().invoke(app, ["train", str(scene / "r.yaml"), "--runs", str(tmp_path)])
    assert refused.exit_code == 2, refused.output
    assert "tiny-dspark is not a folder" in refused.stderr
    assert (tmp_path / "tiny-dspark").read_text() == "mine"


def test_interrupted_command_saves_and_says_how_to_go_on(scene, tmp_path, monkeypatch):
    command = ["train", str(scene / "r.yaml"), "seed=0", "--runs", str(tmp_path)]
    real = loop.train_step

    def interrupted(*args: Any, **options: Any) -> Any:
        if args[4] == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args, **options)

    monkeypatch.setattr(loop, "train_step", interrupted)
    stopped = CliRunner().invoke(app, command)
    assert stopped.exit_code == 130, stopped.output
    assert "interrupted and saved after step 5" in stopped.stderr
    assert f"deepspec train {scene / 'r.yaml'} seed=0 --runs {tmp_path}" in stopped.stderr
    assert (tmp_path / "tiny-dspark/checkpoints/step_5/optimizer.pt").is_file()
    monkeypatch.setattr(loop, "train_step", real)
    on = CliRunner().invoke(app, command)
    assert on.exit_code == 0, on.output
    assert "from step 5" in on.stderr
    same_state(tmp_path / "tiny-dspark/checkpoints/step_6", scene / "whole/tiny-dspark/checkpoints/step_6")


def test_metrics_with_broken_lines_do_not_keep_a_run_from_resuming(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\nbroken\n\n\x00\x00\n[]\n{"loss": 2}\n{"step": 2}\n{"step": 3}\n{"step"')
    forget_after(path, 2)
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
@needs_fork
def test_memory_of_a_step_is_kept_for_the_next_and_given_back_at_the_end(tmp_path):
    """Page faults of ten tensors of 64 MB, one after the other, and what the process holds after them."""

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(10):
            torch.ones(2**24)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    def pages() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1])

    def child() -> None:
        given_back = faults()
        with kept_memory(torch.device("cpu")):
            kept, during = faults(), pages()
        (tmp_path / "found").write_text(f"{given_back} {kept} {during - pages()}")

    assert ended(in_child(child))
    given_back, kept, returned = map(int, (tmp_path / "found").read_text().split())
    assert kept < given_back / 4 and returned > 2**26 / 4096 / 2
