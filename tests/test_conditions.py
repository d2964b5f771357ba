"""Conditions: the keys of files already on disk, and sentences that name both sides."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from deepspec.checkpoints.read import find_checkpoint, load_provenance
from deepspec.conditions import SEVERAL, UNRECORDED, Conditions, contrast, differences

SAMPLING = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}


@pytest.mark.parametrize("name", ["pocket-eagle3", "pocket-dflash", "pocket-dspark"])
def test_checkpoints_of_before_are_read_and_would_be_written_alike(name):
    """These are from before system prompts were recorded."""
    there = load_provenance(find_checkpoint(name))
    found = Conditions.read(there)
    assert (found.thinking, found.system_prompt, found.sampling) == (False, UNRECORDED, SAMPLING)
    assert len(str(found.template_hash)) == len(str(found.tokenizer_hash)) == 64
    keys = ("thinking", "template_hash", "tokenizer_hash", "sampling")
    assert found.record() == {key: there[key] for key in keys}


def test_an_answered_row_keeps_its_keys_in_their_order():
    """Rows are compared and appended as bytes."""
    record = Conditions(False, None, sampling=SAMPLING).record()
    assert list(record.items()) == [("thinking", False), ("template_hash", None), ("sampling", SAMPLING)]
    assert Conditions.read(record | {"id": "r1", "seed": 0}) == Conditions(False, None, sampling=SAMPLING)


def test_what_rows_do_not_share_is_several():
    one, two = Conditions(True, "a", None), Conditions(False, "a", "s")
    assert one.shared(two) == Conditions(SEVERAL, "a", SEVERAL)
    assert one.shared(one) == one


def test_a_difference_names_both_sides():
    have, want = Conditions(True, "a" * 64, None), Conditions(False, "b" * 64, "c" * 64)
    assert differences("rows.jsonl was answered", have, "the recipe trains", want) == [
        "rows.jsonl was answered with thinking, but the recipe trains without thinking",
        f"rows.jsonl was answered with chat template {'a' * 12}, but the recipe trains with chat template "
        + "b" * 12,
        f"rows.jsonl was answered without system prompt, but the recipe trains with system prompt {'c' * 12}",
    ]


@pytest.mark.parametrize(
    "other",
    [
        Conditions(),  # an older file, or another writer's
        Conditions(None, None),  # a server's own template
        Conditions(True, "a", None, tokenizer_hash="t", sampling={"temperature": 0.5}),  # may differ
    ],
)
def test_what_one_side_does_not_record_is_no_difference(other):
    have = Conditions(True, "a", None, tokenizer_hash="u", sampling=SAMPLING)
    assert differences("a", have, "b", other) == differences("b", other, "a", have) == []


def test_a_system_prompt_differs_from_none():
    assert differences("a is", Conditions(system_prompt=None), "b is", Conditions(system_prompt="s")) == [
        "a is without system prompt, but b is with system prompt s"
    ]


def test_contrast_says_what_is_not_recorded():
    assert contrast("thinking", "one is", UNRECORDED, "two is", False) == (
        "one is with thinking not recorded, but two is without thinking"
    )


def test_conditions_do_not_wait_for_torch():
    code = "import sys, deepspec.conditions; print('torch' in sys.modules)"
    source = Path(__file__).parents[1] / "src"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=source)
    assert result.stdout.strip() == "False", result.stderr
