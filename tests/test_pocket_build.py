"""The script that builds the pocket target, in seconds: what it writes, and going on after a kill."""

from __future__ import annotations

import itertools
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data import topics

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from deepspec.errors import UserError
from deepspec.targets import Target
from kills import held_by_another, needs_fork
from tools.pocket import build as module
from tools.pocket import corpus
from tools.pocket.build import BuildSettings, build

SOME = ("random.py", "shutil.py", "textwrap.py")
SUMS = 400

TINY = BuildSettings(
    vocab_size=320,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    micro_tokens=512,
    micro_batches=2,
    total_tokens=4 * 1024,
)


@pytest.fixture(scope="module", autouse=True)
def small_library() -> Iterator[None]:
    """A few files and topics of the standard library instead of all, and a few sums: reading them is most of
    what a tiny build takes."""
    some, sums = Path(sysconfig.get_path("stdlib")), corpus.math_examples
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "library_files", lambda: tuple(some / name for name in SOME))
        patch.setattr(corpus, "math_examples", lambda seed: itertools.islice(sums(seed), SUMS))
        patch.setattr(topics, "topics", {name: topics.topics[name] for name in ("assert", "with")})
        corpus.library.cache_clear()
        yield
    corpus.library.cache_clear()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pocket")
    build(out, TINY, checkpoint_every=2)
    return out


def test_build_that_stops_between_checkpoints_goes_on_to_the_same_weights(built, tmp_path, monkeypatch):
    shutil.copytree(built / "tokenizer", tmp_path / "tokenizer")
    taken, loss_sum = 0, module.loss_sum

    def dying(*args: object) -> torch.Tensor:
        nonlocal taken
        taken += 1
        if taken == 7:  # the first half of step 4, a step after a checkpoint
            raise KeyboardInterrupt
        return loss_sum(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "loss_sum", dying)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, TINY, checkpoint_every=2)
    assert not (tmp_path / "target").exists()
    build(tmp_path, TINY, checkpoint_every=2)
    assert taken == 7 + 2 * (TINY.steps - 2)
    weights = "target/model.safetensors"
    for name, tensor in load_file(built / weights).items():
        assert torch.equal(tensor, load_file(tmp_path / weights)[name]), name


@needs_fork
def test_second_build_in_a_folder_is_refused(tmp_path):
    with held_by_another(tmp_path, "building"), pytest.raises(UserError, match="another process is building"):
        build(tmp_path, TINY)


def test_what_was_built_is_a_target_like_any_other(built):
    target = Target.from_pretrained(built / "target", device="cpu")
    assert (target.spec.num_layers, target.spec.hidden_size, target.vocab_size) == (2, 32, 320)
    assert target.stop_token_ids


def test_tokenizer_cuts_text_as_qwen2_does_and_the_template_opens_a_thinking_block(built):
    tokenizer = AutoTokenizer.from_pretrained(built / "tokenizer")
    pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("It's 123 x\n\n  y")
    assert [piece.replace("Ġ", " ").replace("Ċ", "\n") for piece, _ in pieces] == [
        "It", "'s", " ", "1", "2", "3", " x", "\n\n", " ", " y",
    ]  # fmt: skip
    user = [{"role": "user", "content": "hi"}]
    shown = {
        thinking: tokenizer.apply_chat_template(
            user, add_generation_prompt=True, tokenize=False, enable_thinking=thinking
        )
        for thinking in (True, False)
    }
    assert shown[True].endswith("<|im_start|>assistant\n<think>\n")
    assert shown[False].endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
