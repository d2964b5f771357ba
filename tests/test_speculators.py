"""A DFlash draft that the speculators package wrote, against what that package computed with it.

The files, and the script that made them with the package, are in `fixtures/speculators_dflash`.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from deepspec.checkpoints.draft import load_draft
from deepspec.drafts.dflash import DFlashDraft
from deepspec.maths.blocks import Blocks, FeatureBatch
from deepspec.maths.verify import Sampling
from deepspec.targets import Target

FOLDER = Path(__file__).parent / "fixtures" / "speculators_dflash"
CLOSE: dict[str, float] = {"atol": 1e-5, "rtol": 0.0}


@pytest.fixture(scope="module")
def target() -> Target:
    return Target.from_pretrained(FOLDER / "target", dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def theirs() -> dict[str, Tensor]:
    return load_file(FOLDER / "oracle.safetensors")


def changed(path: Path, target: Target, **facts: Any) -> DFlashDraft:
    """Their draft, with other facts in its config."""
    shutil.copytree(FOLDER / "draft", path)
    config = json.loads((path / "config.json").read_text("utf-8"))
    assert facts.keys() <= config.keys()
    (path / "config.json").write_text(json.dumps(config | facts), "utf-8")
    draft = load_draft(path, target)
    assert isinstance(draft, DFlashDraft)
    return draft


def batch_of(draft: DFlashDraft, target: Target, theirs: dict[str, Tensor]) -> tuple[FeatureBatch, Blocks]:
    """Their tokens, read by our target at the layers that the draft asks for, and blocks at their anchors."""
    ids, anchors = theirs["input_ids"], theirs["anchors"][None]
    read = target.read(ids, draft.feature_layers)
    assert read.features is not None
    lengths = torch.tensor([ids.shape[1]])
    batch = FeatureBatch(ids, theirs["loss_mask"].bool(), read.features, read.last_hidden, lengths)
    return batch, draft.blocks(batch, anchors, torch.ones_like(anchors, dtype=torch.bool))


@torch.no_grad()
def training_rows(draft: DFlashDraft, target: Target, theirs: dict[str, Tensor]) -> Tensor:
    """[A, γ, d]"""
    return draft.backbone(*batch_of(draft, target, theirs))[0]


def proposed(
    draft: DFlashDraft, target: Target, theirs: dict[str, Tensor], sampling: Sampling
) -> tuple[Tensor, Tensor]:
    """(tokens, q) of decoding, from each of their anchors."""
    features = batch_of(draft, target, theirs)[0].features
    ids = theirs["input_ids"][0].tolist()
    tokens, q = [], []
    for anchor in theirs["anchors"].tolist():
        draft.open(0)
        draft.observe([0], features[:, :anchor], [ids[:anchor]], [ids[1 : anchor + 1]])
        found = draft.propose([0], [ids[anchor]], sampling, torch.full((1, draft.max_proposals), 0.5))
        tokens.append(found.tokens[0])
        q.append(found.q[0])
    return torch.stack(tokens), torch.stack(q)


def test_their_draft_computes_in_training_what_it_does_there(
    target: Target, theirs: dict[str, Tensor], tmp_path: Path
) -> None:
    draft = changed(tmp_path / "d", target)
    batch, _ = batch_of(draft, target, theirs)
    torch.testing.assert_close(batch.features, theirs["features"], **CLOSE)
    hidden = training_rows(draft, target, theirs)
    torch.testing.assert_close(hidden, theirs["hidden"], **CLOSE)
    torch.testing.assert_close(draft.head.logits(hidden), theirs["logits"], **CLOSE)


def test_their_slots_learn_the_same_distributions_here(
    target: Target, theirs: dict[str, Tensor], tmp_path: Path
) -> None:
    draft = changed(tmp_path / "d", target)
    batch, blocks = batch_of(draft, target, theirs)
    assert torch.equal(blocks.valid[0], theirs["counted"])
    assert batch.last_hidden is not None
    teacher = draft.teacher_head.logits(batch.last_hidden[0, blocks.teacher_index[0]])
    torch.testing.assert_close(teacher[:, 1:], theirs["targets"][:, 1:], **CLOSE)


def test_their_draft_proposes_what_its_slots_after_the_anchor_say(
    target: Target, theirs: dict[str, Tensor], tmp_path: Path
) -> None:
    draft = changed(tmp_path / "d", target)
    assert draft.max_proposals == draft.spec.block - 1
    logits = theirs["logits"][:, 1:]
    assert torch.equal(proposed(draft, target, theirs, Sampling())[0], logits.argmax(-1))
    q = proposed(draft, target, theirs, Sampling(1.0))[1]
    torch.testing.assert_close(q, logits.softmax(-1), **CLOSE)


@pytest.mark.parametrize("ids", [[0, 1, 2], [2, 3, 4], [3, 2, 1]])
def test_other_layers_than_theirs_would_show(
    target: Target, theirs: dict[str, Tensor], tmp_path: Path, ids: list[int]
) -> None:
    draft = changed(tmp_path / "d", target)
    batch, blocks = batch_of(draft, target, theirs)
    features = target.read(theirs["input_ids"], [i - 1 for i in ids]).features
    assert features is not None
    with torch.no_grad():
        hidden = draft.backbone(replace(batch, features=features), blocks)[0]
    assert (hidden - theirs["hidden"]).abs().amax((1, 2)).gt(0.1).all()


def test_reading_it_as_one_that_samples_from_its_anchor_would_show(
    target: Target, theirs: dict[str, Tensor], tmp_path: Path
) -> None:
    draft = changed(tmp_path / "d", target, sample_from_anchor=True)
    _, q = proposed(draft, target, theirs, Sampling(1.0))
    assert q.shape[1] == draft.spec.block
    want = theirs["logits"][:, 1:].softmax(-1)
    assert (q[:, :-1] - want).abs().amax((1, 2)).gt(0.05).all()
    batch, blocks = batch_of(draft, target, theirs)
    assert not torch.equal(blocks.valid[0], theirs["counted"])
    assert batch.last_hidden is not None
    teacher = draft.teacher_head.logits(batch.last_hidden[0, blocks.teacher_index[0]])
    assert (teacher - theirs["targets"])[:, 1:].abs().amax((1, 2)).gt(0.1).all()
