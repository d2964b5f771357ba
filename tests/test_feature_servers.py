"""Features from servers: same numbers as `online`, and every way in which a server can be the wrong one."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import deepspec.features.vllm as room
import deepspec.train.loop as train_room
from conftest import llama, prompts_of, save_tiny, tiny_draft
from deepspec.cli import app
from deepspec.config import Recipe, load_recipe, override
from deepspec.data.tokens import Encoded
from deepspec.errors import RecipeError, ServerError
from deepspec.features.batches import announced, batches_from, online
from deepspec.features.vllm import VllmSource
from deepspec.features.vllm_layers import server_layers, vllm_command
from deepspec.http_client import Policy
from deepspec.targets import Target
from deepspec.train.loop import train_draft, train_step
from deepspec.train.optimizer import Optimizer
from feature_standin import FeatureStandIn
from talking import recipe_tree, save_talking_llama, write_data, write_recipe

DFLASH, DSPARK, EAGLE3 = ("context",), ("context", "labels"), ("unroll",)
"""What their losses read: names of `blocks.READ_RULES`. DSpark's and Eagle-3's read the last hidden state."""
FAST = Policy(timeout=5.0, attempts=4, first_rest=0.005, longest_rest=0.05, patience=5.0)


def rows_of(target: Target, lengths: Sequence[int], seed: int = 0) -> list[Encoded]:
    """Random rows whose first two tokens are not supervised."""
    prompts = prompts_of(target, lengths, seed)
    return [Encoded(ids, [0, 0] + [1] * (len(ids) - 2), f"r{i}") for i, ids in enumerate(prompts)]


Start = Callable[..., FeatureStandIn]


@pytest.fixture
def start(target_dirs: dict[str, Path], tmp_path: Path) -> Iterator[Start]:
    """Start stand-ins; they stop with the test."""
    running: list[FeatureStandIn] = []

    def begin(family: str | Path, layers: Sequence[int], **how: Any) -> FeatureStandIn:
        path = target_dirs[family] if isinstance(family, str) else family
        running.append(FeatureStandIn(path, tmp_path / f"storage-{len(running)}", layers, **how))
        return running[-1]

    yield begin
    for server in running:
        server.kill()


@pytest.fixture(scope="module")
def talking_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny target that has a tokenizer."""
    return save_talking_llama(tmp_path_factory.mktemp("talking"))


def llama_source(
    server: FeatureStandIn, target: Target, policy: Policy = FAST, reads: Sequence[str] = DSPARK, **how: Any
) -> VllmSource:
    """Layers 0 and 2 of the four-layer target, with the last hidden state: 1, 3 and 4 as vLLM counts."""
    return VllmSource(server.url, target, [0, 2], reads, policy=policy, **how)


# ── the same numbers ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("family", "layers"), [("llama", [2]), ("qwen3", [0, 2]), ("gemma4", [-1, 1]), ("llama", [-1, 1])]
)
def test_vllm_gives_what_online_gives_bit_for_bit(targets, start, family, layers):
    target = targets[family]
    server = start(family, [*(k + 1 for k in layers), target.spec.num_layers])
    source, here = VllmSource(server.url, target, layers, DSPARK, policy=FAST), online(target, layers)
    for row in rows_of(target, [3, 17]):
        theirs, ours = source([row], len(row.ids)), here([row], len(row.ids))
        assert torch.equal(theirs.features, ours.features)
        assert torch.equal(theirs.last_hidden, ours.last_hidden)
        assert (theirs.features.dtype, theirs.row_ids) == (ours.features.dtype, ours.row_ids)


def test_bfloat16_stays_what_it_is_on_the_wire(target_dirs, start):
    target = Target.from_pretrained(target_dirs["gemma4"], dtype="bfloat16", device="cpu")
    server = start("gemma4", [1, target.spec.num_layers], dtype=torch.bfloat16)
    source, row = VllmSource(server.url, target, [0], DSPARK, policy=FAST), rows_of(target, [19])[0]
    theirs, ours = source([row], 19), online(target, [0])([row], 19)
    assert theirs.features.dtype == torch.bfloat16
    assert torch.equal(theirs.features, ours.features)
    assert torch.equal(theirs.last_hidden, ours.last_hidden)


def test_rows_of_a_batch_stay_apart_and_are_padded_like_online(targets, start):
    target = targets["llama"]
    rows = rows_of(target, [9, 4, 14])
    source, here = llama_source(start("llama", [1, 3, 4]), target), online(target, [0, 2])
    batch, whole = source(rows, 16), here(rows, 16)
    for name in ("input_ids", "loss_mask", "lengths"):
        assert torch.equal(getattr(batch, name), getattr(whole, name)), name
    assert batch.row_ids == ("r0", "r1", "r2")
    for i, row in enumerate(rows):
        alone, length = here([row], len(row.ids)), len(row.ids)
        assert torch.equal(batch.features[i, :length], alone.features[0])
        assert torch.equal(batch.last_hidden[i, :length], alone.last_hidden[0])
        assert not batch.features[i, length:].any()


def test_features_come_in_the_drafts_order_whatever_else_the_server_gives(targets, start):
    target = targets["llama"]
    row = rows_of(target, [8])[0]
    source = VllmSource(start("llama", [0, 1, 2, 3, 4]).url, target, [2, -1], DSPARK, policy=FAST)
    theirs, ours = source([row], 8), online(target, [2, -1])([row], 8)
    assert torch.equal(theirs.features, ours.features)
    assert torch.equal(theirs.last_hidden, ours.last_hidden)


def test_counting_layers_one_off_on_our_side_shows(targets, start, monkeypatch):
    target = targets["llama"]
    row = rows_of(target, [8])[0]
    monkeypatch.setattr(room, "server_layers", lambda layers, depth, last: [*layers, depth])
    source = VllmSource(start("llama", [0, 1, 2, 3, 4]).url, target, [1, 2], DSPARK, policy=FAST)
    assert not torch.allclose(source([row], 8).features, online(target, [1, 2])([row], 8).features, atol=0.1)


def test_without_a_last_hidden_state_none_is_asked_for(targets, start):
    target = targets["llama"]
    source = llama_source(start("llama", [1, 3]), target, reads=DFLASH)
    batch = source(rows_of(target, [6]), 6)
    assert batch.last_hidden is None
    assert batch.features.shape == (1, 6, 2 * target.spec.hidden_size)


# ── the wrong server ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("shift", [-1, 1])
def test_server_started_with_layers_one_off_is_refused_by_name(targets, start, shift):
    target = targets["llama"]
    server = start("llama", [1 + shift, 2 + shift, 4])
    with pytest.raises(ServerError) as caught:
        VllmSource(server.url, target, [0, 1], DSPARK, policy=FAST)
    assert f"after [{1 + shift}, {2 + shift}, 4] layers, and those after [1, 2, 4] are needed" in str(
        caught.value
    )


def test_the_last_stream_past_the_final_norm_is_not_the_last_stream(targets, start):
    target = targets["llama"]
    server = start("llama", [1, 3, 4])
    norm = server.weights.model.norm

    def normed(streams: torch.Tensor, ids: list[int]) -> Any:
        return torch.cat([streams[:, :2], norm(streams[:, 2:])], dim=1).detach(), ids

    server.spoil = normed
    with pytest.raises(ServerError, match=r"after \[1, 3, 5\] layers \(the last one past the final norm\)"):
        llama_source(server, target)


def test_another_model_of_the_same_shape_is_refused(targets, start, tmp_path):
    other = save_tiny(llama, tmp_path / "other", seed=5)
    with pytest.raises(ServerError, match="another model, other weights"):
        llama_source(start(other, [1, 3, 4]), targets["llama"])


def test_another_width_is_refused(targets, start):
    with pytest.raises(ServerError, match=r"width 48, and .* has 32"):
        llama_source(start("qwen3", [1, 3, 5]), targets["llama"])


def test_slightly_other_weights_are_said_not_refused(targets, start, capsys):
    server = start("llama", [1, 3, 4])
    generator = torch.Generator().manual_seed(0)

    def noisy(streams: torch.Tensor, ids: list[int]) -> Any:
        noise = torch.randn(streams.shape, generator=generator)
        return streams + 0.1 * streams.norm(dim=-1, keepdim=True) * noise / streams.shape[-1] ** 0.5, ids

    server.spoil = noisy
    llama_source(server, targets["llama"])
    assert "quantised, or another revision" in capsys.readouterr().err


def test_bfloat16_rounding_is_not_worth_a_warning(targets, start, capsys):
    llama_source(start("llama", [1, 3, 4], dtype=torch.bfloat16), targets["llama"])
    said = capsys.readouterr().err
    assert "quantised" not in said
    assert said.count("not verified on a real server") == 1


def test_missing_connector_prints_the_line_that_switches_it_on(targets, start):
    target, server = targets["llama"], start("llama", [1, 3, 4])
    server.connector = False
    with pytest.raises(ServerError, match="connector is not switched on") as caught:
        llama_source(server, target, max_length=100)
    command = str(caught.value).split("start it with\n")[1]
    words = shlex.split(command)
    assert words[:3] == ["vllm", "serve", target.spec.name]
    hf = json.loads(words[words.index("--speculative-config") + 1])["draft_model_config"]["hf_config"]
    assert hf == {"eagle_aux_hidden_state_layer_ids": [1, 3, 4]}


def test_context_shorter_than_the_rows_is_found_before_training(targets, start):
    server = start("llama", [1, 3, 4])
    with pytest.raises(ServerError, match=r"takes 256 tokens, and rows have up to 256 \(data.max_length\)"):
        llama_source(server, targets["llama"], max_length=256)
    assert server.asked == []
    llama_source(server, targets["llama"], max_length=255)


def test_row_too_long_for_the_server_is_not_asked_for_again(targets, start):
    target, server = targets["llama"], start("llama", [1, 3, 4])
    source = llama_source(server, target)
    before = len(server.asked)
    with pytest.raises(ServerError, match="longer than the context"):
        source(rows_of(target, [256]), 256)
    assert len(server.asked) == before + 1


@pytest.mark.parametrize(
    "told",
    [None, [], "x", 7, {}, *({"hidden_states_path": path} for path in (None, 5, "", "/", ["a"], "/a\0b"))],
)
def test_an_answer_without_a_path_is_an_answer_without_features(targets, start, told):
    server = start("llama", [1, 3, 4])
    reply = server.reply
    server.reply = lambda path, body: reply(path, body) | {"kv_transfer_params": told}
    with pytest.raises(ServerError, match="answers without features"):
        llama_source(server, targets["llama"])


def test_a_path_that_no_file_can_have_is_named_at_once(targets, start):
    server = start("llama", [1, 3, 4])
    server.told_path = lambda path: path.with_name("a" * 5000)
    began = time.monotonic()
    with pytest.raises(ServerError, match=r"cannot be read here \(File name too long\)"):
        llama_source(server, targets["llama"])
    assert time.monotonic() - began < room.FILE_GRACE / 2


@pytest.mark.parametrize(
    "spoil",
    [
        lambda streams, ids: (streams[0, 0, 0], ids),
        lambda streams, ids: (streams[:, 0], ids),
        lambda streams, ids: (streams.int(), ids),
        lambda streams, ids: (streams, 5),
        lambda streams, ids: (streams, [[5.5]]),
    ],
    ids=["one number", "one layer", "integers", "no list of ids", "ids that are none"],
)
def test_tensors_of_another_shape_are_refused(targets, start, spoil):
    server = start("llama", [1, 3, 4])
    server.spoil = spoil
    with pytest.raises(ServerError, match=r"not \[T, L, d\] of numbers|that are not the 24 asked for"):
        llama_source(server, targets["llama"])


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_gateway_that_forbids_its_list_of_models_is_asked_for_the_target(targets, start, status):
    target, server = targets["llama"], start("llama", [1, 3, 4])
    head = f"HTTP/1.1 {status} no\r\nConnection: close\r\nContent-Length: 0\r\n\r\n".encode()
    server.raw = lambda path, body: [head] if path == "/v1/models" else None
    server.reply = lambda path, body, reply=server.reply: reply(path, body | {"model": "served-name"})
    row = rows_of(target, [7])[0]
    theirs = llama_source(server, target)([row], 7)
    assert torch.equal(theirs.features, online(target, [0, 2])([row], 7).features)
    assert {body["model"] for _, body in server.asked} == {target.spec.name}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda streams, ids: (streams, [*ids[:-1], (ids[-1] + 1) % 64]),
        lambda streams, ids: (streams[1:], ids[1:]),
        lambda streams, ids: (streams[1:], ids),
    ],
    ids=["another token", "prefix left out", "fewer positions than tokens"],
)
def test_features_of_other_tokens_are_refused(targets, start, spoil):
    target, server = targets["llama"], start("llama", [1, 3, 4])
    source = llama_source(server, target)
    server.spoil = spoil
    with pytest.raises(ServerError, match="prefix caching"):
        source(rows_of(target, [7]), 7)


def test_numbers_that_are_none_are_refused(targets, start):
    target, server = targets["llama"], start("llama", [1, 3, 4])
    source = llama_source(server, target)
    server.spoil = lambda streams, ids: (streams * float("inf"), ids)
    with pytest.raises(ServerError, match="not \\[T, L, d\\] of numbers"):
        source(rows_of(target, [7]), 7)


# ── files ─────────────────────────────────────────────────────────────────────────────────────────────


def test_late_file_is_waited_for_and_never_read_half_written(targets, start):
    target, server = targets["llama"], start("llama", [1, 3, 4])
    server.late = 0.1
    began = time.monotonic()
    source = llama_source(server, target)
    assert time.monotonic() - began >= 0.1
    row = rows_of(target, [7])[0]
    assert torch.equal(source([row], 7).features, online(target, [0, 2])([row], 7).features)
    assert len(server.asked) == 2, "a half-written file would have been asked for again"


def test_files_go_once_they_are_read(targets, start):
    target, server = targets["llama"], start("llama", [1, 3, 4])
    llama_source(server, target)(rows_of(target, [5, 6]), 6)
    assert list(server.storage.iterdir()) == []


def test_file_that_is_never_written_ends_in_a_time_out(targets, start):
    target, server = targets["llama"], start("llama", [1, 3, 4])
    source = llama_source(server, target, Policy(timeout=0.2, attempts=1))
    server.late = 5.0
    with pytest.raises(ServerError, match=r"after 1 attempts.*was not written within 0.2 s"):
        source(rows_of(target, [5]), 5)


def test_file_that_the_server_gave_up_is_asked_for_again(targets, start):
    target, server = targets["llama"], start("llama", [1, 3, 4])
    source, row = llama_source(server, target), rows_of(target, [5])[0]
    server.unwritten = 2
    assert torch.equal(source([row], 5).features, online(target, [0, 2])([row], 5).features)


def test_storage_out_of_sight_is_named(targets, start):
    server = start("llama", [1, 3, 4])
    server.told_path = lambda path: Path("/nowhere/on/this/machine") / path.name
    with pytest.raises(ServerError, match=r"/nowhere/on/this/machine/cmpl-1.safetensors") as caught:
        llama_source(server, targets["llama"])
    assert "--storage FOLDER" in str(caught.value)


def test_file_without_a_lock_is_not_trusted(targets, start, monkeypatch):
    monkeypatch.setattr(room, "FILE_GRACE", 0.1)
    server = start("llama", [1, 3, 4])
    server.lock = False
    with pytest.raises(ServerError, match="without a lock"):
        llama_source(server, targets["llama"])


def refuse_with(number: int) -> Callable[..., Any]:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return refuse


def test_file_system_without_locks_is_named(targets, start, monkeypatch):
    server, flock = start("llama", [1, 3, 4]), fcntl.flock

    def readers_cannot(handle: Any, how: int) -> None:
        (refuse_with(errno.ENOLCK) if how & fcntl.LOCK_SH else flock)(handle, how)

    monkeypatch.setattr(fcntl, "flock", readers_cannot)
    with pytest.raises(ServerError, match="has no locks"):
        llama_source(server, targets["llama"])


def test_files_that_may_not_be_removed_are_said_at_once(targets, start, monkeypatch):
    server = start("llama", [1, 3, 4])
    monkeypatch.setattr(Path, "unlink", refuse_with(errno.EACCES))
    with pytest.raises(ServerError, match="cannot be removed"):
        llama_source(server, targets["llama"])


# ── servers that fail ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("fault", ["500", "garbage", "close"])
def test_failures_that_pass_are_tried_again_after_another_probe(targets, start, fault):
    target, server = targets["llama"], start("llama", [1, 3, 4])
    source, row = llama_source(server, target), rows_of(target, [5])[0]
    server.faults.append(fault)
    assert torch.equal(source([row], 5).features, online(target, [0, 2])([row], 5).features)
    # The probe, the failure, the probe again (is it still the same server?), and the row.
    assert server.lengths == [24, 5, 24, 5]


def test_a_server_that_fails_for_good_ends_the_training_with_what_it_said_last(targets, start):
    target, server = targets["llama"], start("llama", [1, 3, 4])
    source = llama_source(server, target, Policy(5.0, first_rest=0.005, longest_rest=0.05, patience=0.3))
    server.faults.extend(["500"] * 1000)
    with pytest.raises(ServerError, match=r"no server could be asked.*the last failure: HTTP 500: fault 500"):
        source(rows_of(target, [5]), 5)


def test_server_that_is_not_there_is_named_with_the_line_that_starts_it(targets):
    with pytest.raises(ServerError, match="the server gives no features: no connection") as caught:
        VllmSource("http://127.0.0.1:9", targets["llama"], [0, 2], DSPARK, policy=FAST)
    assert "where: http://127.0.0.1:9" in str(caught.value)
    assert "vllm serve" in str(caught.value)


def test_server_that_comes_back_with_other_layers_is_caught(targets, start):
    target, server = targets["llama"], start("llama", [1, 3, 4])
    source = llama_source(server, target)
    server.faults.append("close")
    server.layers = [0, 3, 4]
    with pytest.raises(ServerError, match=r"after \[0, 3, 4\] layers, .* \[1, 3, 4\] are needed"):
        source(rows_of(target, [5]), 5)


def test_several_servers_take_turns_and_one_may_die(targets, start):
    target = targets["llama"]
    first, second = start("llama", [1, 3, 4]), start("llama", [0, 1, 2, 3, 4])
    source = VllmSource(f"{first.url}, {second.url}/v1/", target, [0, 2], DSPARK, policy=FAST)
    rows = rows_of(target, [4, 5, 6, 7])
    source(rows, 7)
    assert [len(s.asked) for s in (first, second)] == [3, 3]
    first.kill()
    batch = source(rows, 7)
    assert torch.equal(batch.features[3, :7], online(target, [0, 2])([rows[3]], 7).features[0])


def test_requests_in_flight_are_bounded(targets, start, monkeypatch):
    monkeypatch.setattr(room, "IN_FLIGHT", 3)
    target, server = targets["llama"], start("llama", [1, 3, 4])
    source, given = llama_source(server, target), server.given
    server.given = lambda ids: (time.sleep(0.03), given(ids))[1]  # type: ignore[method-assign]
    source(rows_of(target, [5] * 9), 5)
    assert server.most_at_once == 3


def test_rows_are_fetched_ahead_in_order_once_each_and_no_further_than_asked(targets, start, monkeypatch):
    monkeypatch.setattr(room, "IN_FLIGHT", 1)
    monkeypatch.setattr(room, "AHEAD", 3)
    target, server = targets["llama"], start("llama", [1, 3, 4])
    source = llama_source(server, target)
    rows = rows_of(target, [4, 5, 6, 7, 8, 9])
    source.expect(rows)

    end = time.monotonic() + 5
    while len(server.asked) < 4 and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(0.1)
    assert server.lengths == [24, 4, 5, 6]
    here = online(target, [0, 2])
    for pair in (rows[:2], rows[2:4], rows[4:]):
        batch = source(pair, 9)
        for i, row in enumerate(pair):
            assert torch.equal(batch.features[i, : len(row.ids)], here([row], len(row.ids)).features[0])
    assert server.lengths == [24, 4, 5, 6, 7, 8, 9]


def test_row_that_was_not_announced_is_fetched_all_the_same(targets, start):
    target, server = targets["llama"], start("llama", [1, 3, 4])
    source, rows = llama_source(server, target), rows_of(target, [4, 5, 6])
    source.expect(rows[:2])
    batch = source([rows[2]], 6)
    assert torch.equal(batch.features, online(target, [0, 2])([rows[2]], 6).features)


def test_key_from_the_environment_is_sent(targets, start, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    server = start("llama", [1, 3, 4])
    llama_source(server, targets["llama"])
    assert server.headers[0]["Authorization"] == "Bearer secret"


@pytest.mark.parametrize("url", ["localhost:8000", "http://a:1?in_flight=2", "http://a:1,"])
def test_addresses_that_are_none_are_refused(targets, url):
    with pytest.raises(ServerError, match="address"):
        VllmSource(url, targets["llama"], [0, 2], DSPARK)


# ── training from it ──────────────────────────────────────────────────────────────────────────────────


def recipe_for(algorithm: str, **optim: Any) -> Recipe:
    return Recipe.model_validate(recipe_tree(Path("unused"), Path("unused"), algorithm, **optim))


@pytest.mark.parametrize("algorithm", ["eagle3", "dspark"])
def test_a_step_of_training_is_the_same_from_a_server(targets, start, algorithm):
    target, recipe = targets["llama"], recipe_for(algorithm, micro_batch_size=2)
    rows, layers = rows_of(target, [12, 9, 15, 11]), [0, 1, 2]
    source = VllmSource(start("llama", [1, 2, 3, 4]).url, target, layers, DSPARK, policy=FAST)
    losses, gradients = [], []
    for each in (source, online(target, layers)):
        draft = tiny_draft(target, algorithm)
        optimizer = Optimizer(draft, recipe.optim)
        loss, sums = train_step(draft, each, rows, recipe, 3, measure=True, optimizer=optimizer)
        losses.append(loss)
        gradients.append([p.grad.clone() for p in draft.parameters() if p.grad is not None])
        assert sums["tau_den"] > 0
    assert float(losses[0]) == pytest.approx(float(losses[1]), rel=1e-6)
    for theirs, ours in zip(*gradients, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-6)


def test_a_loss_that_reads_the_targets_distribution_does_not_run_without_it(targets, start):
    target, recipe = targets["llama"], recipe_for("dspark")
    source = VllmSource(start("llama", [1, 2, 3]).url, target, [0, 1, 2], DFLASH, policy=FAST)
    draft = tiny_draft(target, "dspark")
    batch = source(rows_of(target, [9]), 9)
    with pytest.raises(AssertionError, match="the source has none"):
        draft(batch, recipe.loss, draft.plan(batch, 4, torch.Generator().manual_seed(0)))


def run_losses(run: Path) -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text("utf-8").splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def test_a_run_from_a_server_is_the_run_from_online(talking_dir, start, tmp_path, monkeypatch):
    monkeypatch.setattr(train_room, "LOG_EVERY", 1)
    server = start(talking_dir, [1, 2, 3, 4])
    write_data(tmp_path)
    tree = recipe_tree(talking_dir, tmp_path, "dspark", micro_batch_size=3)
    target = Target.from_pretrained(talking_dir, dtype="float32", device="cpu")
    for run, features in (("online", "online"), ("server", f"vllm:{server.url}")):
        recipe = Recipe.model_validate(
            {**tree, "name": run, "data": {**tree["data"], "features": features, "max_length": 200}}
        )
        train_draft(recipe, tmp_path, target=target)
    losses = run_losses(tmp_path / "online")
    assert len(losses) == 4
    assert run_losses(tmp_path / "server") == pytest.approx(losses, rel=1e-4)
    # The probe, four steps of four rows (two in the shorter third batch), and no more than one batch ahead.
    assert 1 + 14 <= len(server.asked) <= 1 + 18


def test_a_password_in_an_address_is_sent_and_not_written(talking_dir, start, tmp_path, capsys):
    server = start(talking_dir, [1, 2, 3, 4])
    write_data(tmp_path)
    tree = recipe_tree(talking_dir, tmp_path, "dspark", max_steps=2) | {"trackers": ["tensorboard"]}
    addresses = (
        f"{server.url.replace('//', '//me:hush,hush@')}, {server.url.replace('//', '//localhush@')}/v1"
    )
    tree["data"] |= {"features": f"vllm:{addresses}", "max_length": 200}
    recipe = Recipe.model_validate(tree)
    train_draft(recipe, tmp_path / "runs")
    assert {h["Authorization"] for h in server.headers} == {"Basic bWU6aHVzaCxodXNo"}  # me:hush,hush
    written = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert {"recipe.yaml", "metrics.jsonl", "deepspec.json"} <= {path.name for path in written}
    for path in written:
        assert b"hush" not in path.read_bytes(), path
    said = capsys.readouterr()
    assert "hush" not in said.out + said.err
    kept = load_recipe(tmp_path / "runs" / recipe.name / "recipe.yaml")
    assert kept.data.features == f"vllm:{server.url}, {server.url}/v1"
    assert override(recipe, ["seed=3"]).data.features == recipe.data.features
    with pytest.raises(RecipeError) as caught:
        override(recipe, ["data.features=vlm:http://me:hush@x", "seed=hush"])
    assert "me:hush" not in str(caught.value)


def test_sglang_is_refused_with_what_to_use_instead(tmp_path):
    tree = recipe_tree(Path("unused"), tmp_path, "dflash")
    tree["data"]["features"] = "sglang:http://127.0.0.1:9"
    with pytest.raises(ValueError, match=r"no longer a feature source.*vllm:http://HOST:PORT.*cache"):
        Recipe.model_validate(tree)


def test_wrong_server_is_found_before_rows_are_made(talking_dir, start, tmp_path, monkeypatch):
    write_data(tmp_path)
    monkeypatch.setattr("deepspec.train.data.load_rows", lambda *a, **k: pytest.fail("made rows"))
    tree = recipe_tree(talking_dir, tmp_path, "dspark")
    tree["data"] |= {"features": f"vllm:{start(talking_dir, [1, 2, 4]).url}", "max_length": 200}
    with pytest.raises(ServerError, match=r"after \[1, 2, 4\] layers"):
        train_draft(Recipe.model_validate(tree), tmp_path)
    tree["data"] |= {"features": f"vllm:{start(talking_dir, [1, 2, 3, 4]).url}", "max_length": 256}
    with pytest.raises(ServerError, match=r"takes 256 tokens, and rows have up to 256 \(data.max_length\)"):
        train_draft(Recipe.model_validate(tree), tmp_path)


def test_announcing_changes_no_batch_and_looks_one_ahead(targets):
    rows = rows_of(targets["llama"], [4, 5, 6, 7, 8])
    plain = list(itertools.islice(batches_from(rows, 2, 0, 1), 7))
    told: list[list[Encoded]] = []

    class Ahead:
        closed = False

        def expect(self, rows: list[Encoded]) -> None:
            told.append(rows)

        def close(self) -> None:
            self.closed = True

        def __call__(self, rows: Any, width: int) -> Any:
            raise AssertionError

    source = Ahead()
    batches = announced(batches_from(rows, 2, 0, 1), source)
    assert list(itertools.islice(batches, 7)) == plain
    assert told[:7] == [rows for _, rows in plain]
    assert len(told) == 8
    batches.close()
    assert source.closed
    bare = announced(batches_from(rows, 2, 0, 1), online(targets["llama"], [0]))
    assert list(itertools.islice(bare, 7)) == plain


# ── the lines that start servers ──────────────────────────────────────────────────────────────────────


def test_vllm_is_started_with_streams_counted_its_way():
    wanted = server_layers([1, 9, 17, 25, 33], 36, last_hidden=True)
    command = vllm_command("Qwen/Qwen3-4B", wanted, max_length=2048, storage="/dev/shm/hs")
    assert command == (
        "vllm serve Qwen/Qwen3-4B \\\n"
        '  --speculative-config \'{"method": "extract_hidden_states", "num_speculative_tokens": 1, '
        '"draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": '
        "[2, 10, 18, 26, 34, 36]}}}' \\\n"
        '  --kv-transfer-config \'{"kv_connector": "ExampleHiddenStatesConnector", "kv_role": "kv_producer", '
        '"kv_connector_extra_config": {"shared_storage_path": "/dev/shm/hs", '
        '"use_synchronization_lock": true}}\' \\\n'
        "  --no-enable-prefix-caching \\\n"
        "  --max-model-len 2056"
    )
    unordered = vllm_command("m", server_layers([3, -1], 6, last_hidden=False))
    assert '"eagle_aux_hidden_state_layer_ids": [0, 4]' in unordered
    assert "--max-model-len" not in unordered


def run(*words: str) -> Any:
    return CliRunner().invoke(app, ["data", "features-server", *words])


@pytest.mark.parametrize(("algorithm", "streams"), [("dspark", [1, 2, 3, 4]), ("dflash", [1, 2, 3])])
def test_command_prints_the_line_for_a_recipe(target_dirs, tmp_path, algorithm, streams):
    recipe = write_recipe(tmp_path / "r.yaml", recipe_tree(target_dirs["llama"], tmp_path, algorithm))
    result = run(str(recipe), "data.max_length=100", "--storage", "/mnt/hs", "--json")
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert printed["streams"] == streams
    words = shlex.split(printed["command"])
    assert words[2] == str(target_dirs["llama"])
    assert words[-1] == "108"
    assert "/mnt/hs" in printed["command"]
    text = run(str(recipe), "data.max_length=100", "--storage", "/mnt/hs").stdout
    assert printed["command"] in text
    assert f"deepspec train {recipe} data.max_length=100 data.features=vllm:http://localhost:8000" in text
    longest = json.loads(run(str(recipe), "data.max_length=4096", "--json").stdout)["command"]
    assert shlex.split(longest)[-1] == "512"  # the target's context, beyond which vLLM does not start
