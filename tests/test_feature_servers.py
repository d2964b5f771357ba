"""Features from servers: same numbers as `online`, and every way in which a server can be the wrong one."""

from __future__ import annotations

import errno
import fcntl
import functools
import itertools
import json
import os
import shlex
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from typer.testing import CliRunner

import deepspec.features.servers as room
import deepspec.features.wire as wire
import deepspec.train.loop as train_room
from conftest import FAMILIES, llama, prompts_of, save_tiny, tiny_draft
from deepspec.cli import app
from deepspec.config import Recipe
from deepspec.data.tokens import Encoded
from deepspec.errors import ServerError
from deepspec.features.batches import announced, batches_from, online
from deepspec.features.launch import sglang_command, vllm_command
from deepspec.features.servers import ServerSource, sglang_source, vllm_source
from deepspec.features.wire import Access
from deepspec.targets import Target
from deepspec.train.build import loss_settings
from deepspec.train.loop import train_draft, train_step
from deepspec.train.optimizer import Optimizer
from feature_standin import StandIn
from talking import recipe_tree, save_talking_llama, write_data, write_recipe

DFLASH, DSPARK, EAGLE3 = ("context",), ("context", "labels"), ("unroll",)
"""What their losses read: names of `blocks.READ_RULES`. DSpark's and Eagle-3's read the last hidden state."""
FAST = Access(timeout=5.0, retries=3, backoff=0.005)


def rows_of(target: Target, lengths: Sequence[int], seed: int = 0) -> list[Encoded]:
    """Random rows whose first two tokens are not supervised."""
    prompts = prompts_of(target, lengths, seed)
    return [Encoded(ids, [0, 0] + [1] * (len(ids) - 2), f"r{i}") for i, ids in enumerate(prompts)]


Start = Callable[..., StandIn]
PLAIN = functools.partial(httpx.Client, verify=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))


@pytest.fixture(autouse=True)
def no_certificates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading the system's certificates for each client would take a third of the time of these tests."""
    monkeypatch.setattr(room.httpx, "Client", PLAIN)


@pytest.fixture
def start(target_dirs: dict[str, Path], tmp_path: Path) -> Iterator[Start]:
    """Start stand-ins; they stop with the test."""
    running: list[StandIn] = []

    def begin(family: str | Path, streams: Sequence[int], **how: Any) -> StandIn:
        path = target_dirs[family] if isinstance(family, str) else family
        running.append(StandIn(path, tmp_path / f"storage-{len(running)}", streams, **how))
        return running[-1]

    yield begin
    for server in running:
        server.stop()


@pytest.fixture(scope="module")
def talking_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny target that has a tokenizer."""
    return save_talking_llama(tmp_path_factory.mktemp("talking"))


def llama_source(
    server: StandIn, target: Target, access: Access = FAST, reads: Sequence[str] = DSPARK, **how: Any
) -> ServerSource:
    """Layers 0 and 2 of the four-layer target, with the last hidden state: streams 1, 3 and 4."""
    return vllm_source(server.url, target, [0, 2], reads, access=access, **how)


# ── the same numbers ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layers", [[-1, 1], [0, 2], [2]])
def test_vllm_gives_what_online_gives_bit_for_bit(targets, start, family, layers):
    target = targets[family]
    server = start(family, [*(k + 1 for k in layers), target.spec.num_layers])
    source, here = vllm_source(server.url, target, layers, DSPARK, access=FAST), online(target, layers)
    for row in rows_of(target, [3, 17]):
        theirs, ours = source([row], len(row.ids)), here([row], len(row.ids))
        assert torch.equal(theirs.features, ours.features)
        assert torch.equal(theirs.last_hidden, ours.last_hidden)
        assert (theirs.features.dtype, theirs.row_ids) == (ours.features.dtype, ours.row_ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_stays_what_it_is_on_the_wire(target_dirs, start, family):
    target = Target.from_pretrained(target_dirs[family], dtype="bfloat16", device="cpu")
    server = start(family, [1, target.spec.num_layers], dtype=torch.bfloat16)
    source, row = vllm_source(server.url, target, [0], DSPARK, access=FAST), rows_of(target, [19])[0]
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
    source = vllm_source(start("llama", [0, 1, 2, 3, 4]).url, target, [2, -1], DSPARK, access=FAST)
    theirs, ours = source([row], 8), online(target, [2, -1])([row], 8)
    assert torch.equal(theirs.features, ours.features)
    assert torch.equal(theirs.last_hidden, ours.last_hidden)


def test_counting_layers_one_off_on_our_side_shows(targets, start, monkeypatch):
    target = targets["llama"]
    row = rows_of(target, [8])[0]
    monkeypatch.setattr(room, "stream_ids", lambda layers, depth, last: [*layers, depth])
    source = vllm_source(start("llama", [0, 1, 2, 3, 4]).url, target, [1, 2], DSPARK, access=FAST)
    assert not torch.allclose(source([row], 8).features, online(target, [1, 2])([row], 8).features, atol=0.1)


def test_without_a_last_hidden_state_none_is_asked_for(targets, start):
    target = targets["llama"]
    source = llama_source(start("llama", [1, 3]), target, reads=DFLASH)
    batch = source(rows_of(target, [6]), 6)
    assert batch.last_hidden is None
    assert batch.features.shape == (1, 6, 2 * target.spec.hidden_size)


@pytest.mark.parametrize("family", FAMILIES)
def test_sglang_gives_what_online_gives_bit_for_bit(targets, start, family):
    target, layers = targets[family], [0, 2]
    source = sglang_source(start(family, [1, 3]).url, target, layers, DFLASH, access=FAST)
    row = rows_of(target, [13])[0]
    batch = source([row], 13)
    assert torch.equal(batch.features, online(target, layers)([row], 13).features)
    assert batch.last_hidden is None


# ── the wrong server ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("shift", [-1, 1])
def test_server_started_with_layers_one_off_is_refused_by_name(targets, start, shift):
    target = targets["llama"]
    server = start("llama", [1 + shift, 2 + shift, 4])
    with pytest.raises(ServerError) as caught:
        vllm_source(server.url, target, [0, 1], DSPARK, access=FAST)
    assert f"after [{1 + shift}, {2 + shift}, 4] layers, and those after [1, 2, 4] are needed" in str(
        caught.value
    )


def test_the_last_stream_past_the_final_norm_is_not_the_last_stream(targets, start):
    target = targets["llama"]
    server = start("llama", [1, 3, 4])
    norm = server.model.model.norm

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
    with pytest.raises(ServerError, match="gave 48 numbers a token, no multiple of the target's 32"):
        url = start("qwen3", [1]).url
        sglang_source(url, targets["llama"], [0], DFLASH, access=FAST)


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


@pytest.mark.parametrize(
    ("layers", "reads", "reason"),
    [
        ([0, 2], DSPARK, "never both"),
        ([1], EAGLE3, "never both"),
        ([-1, 1], DFLASH, "also reads the embedding"),
    ],
)
def test_what_sglang_cannot_give_is_refused_before_anything_is_asked(targets, layers, reads, reason):
    with pytest.raises(ServerError, match=reason) as caught:
        sglang_source("http://127.0.0.1:9", targets["llama"], layers, reads)
    assert "vllm:URL" in str(caught.value)


def test_sglang_answer_without_a_cached_prefix_names_the_remedy(targets, start):
    target, server = targets["llama"], start("llama", [1, 3])
    source = sglang_source(server.url, target, [0, 2], DFLASH, access=FAST)
    server.spoil = lambda streams, ids: (streams[4:], ids)
    with pytest.raises(ServerError, match="features of 6 tokens, not of 10") as caught:
        source(rows_of(target, [10]), 10)
    assert "--disable-radix-cache --chunked-prefill-size -1" in str(caught.value)


def test_sglang_without_features_prints_the_line_that_gives_them(targets, start):
    server = start("llama", [1, 3])
    server.connector = False
    with pytest.raises(ServerError, match="not configured to return hidden states") as caught:
        sglang_source(server.url, targets["llama"], [0, 2], DFLASH, access=FAST)
    assert "--return-aux-hidden-state-layer-ids 0 2" in str(caught.value)


# ── files ─────────────────────────────────────────────────────────────────────────────────────────────


def test_late_file_is_waited_for_and_never_read_half_written(targets, start):
    target, server = targets["llama"], start("llama", [1, 3, 4])
    server.late = 0.3
    began = time.monotonic()
    source = llama_source(server, target)
    assert time.monotonic() - began >= 0.3
    row = rows_of(target, [7])[0]
    assert torch.equal(source([row], 7).features, online(target, [0, 2])([row], 7).features)
    assert len(server.asked) == 2, "a half-written file would have been asked for again"


@pytest.mark.parametrize("keep", [False, True])
def test_files_go_once_read_unless_they_are_to_be_kept(targets, start, keep):
    target, server = targets["llama"], start("llama", [1, 3, 4])
    source = vllm_source(f"{server.url}?keep_files={str(keep).lower()}", target, [0, 2], DSPARK, access=FAST)
    source(rows_of(target, [5, 6]), 6)
    left = sorted(path.suffix for path in server.storage.iterdir())
    assert left == ([".lock"] * 3 + [".safetensors"] * 3 if keep else [])


def test_file_that_is_never_written_ends_in_a_time_out(targets, start):
    target, server = targets["llama"], start("llama", [1, 3, 4])
    source = llama_source(server, target, Access(timeout=5.0, retries=1, backoff=0.005))
    source.opened[0].server.access = Access(timeout=0.2)  # from here on: opening took what it took
    server.late = 5.0
    with pytest.raises(ServerError, match=r"after 2 attempts.*was not written within 0.2 s"):
        source(rows_of(target, [5]), 5)


def test_file_that_the_server_gave_up_is_asked_for_again(targets, start):
    target, server = targets["llama"], start("llama", [1, 3, 4])
    source, row = llama_source(server, target), rows_of(target, [5])[0]
    server.unwritten = 2
    assert torch.equal(source([row], 5).features, online(target, [0, 2])([row], 5).features)


def test_storage_out_of_sight_is_named_and_can_be_said(targets, start, tmp_path):
    target, server = targets["llama"], start("llama", [1, 3, 4])
    server.told_path = lambda path: Path("/nowhere/on/this/machine") / path.name
    with pytest.raises(ServerError, match=r"/nowhere/on/this/machine/cmpl-1.safetensors") as caught:
        llama_source(server, target)
    assert "storage=FOLDER" in str(caught.value)
    source = vllm_source(f"{server.url}?storage={server.storage}", target, [0, 2], DSPARK, access=FAST)
    assert source(rows_of(target, [5]), 5).tokens == 5


def test_file_without_a_lock_is_not_trusted(targets, start, monkeypatch):
    monkeypatch.setattr(wire, "FILE_GRACE", 0.1)
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
    with pytest.raises(ServerError, match="knows no locks"):
        llama_source(server, targets["llama"])


def test_files_that_may_not_be_removed_are_said_at_once(targets, start, monkeypatch):
    server = start("llama", [1, 3, 4])
    monkeypatch.setattr(Path, "unlink", refuse_with(errno.EACCES))
    with pytest.raises(ServerError, match="cannot be removed") as caught:
        llama_source(server, targets["llama"])
    assert "keep_files=true" in str(caught.value)
    llama_source(server, targets["llama"], Access(timeout=5.0, keep_files=True))


# ── servers that fail ─────────────────────────────────────────────────────────────────────────────────

FAULTS = {
    "429": (429, {"Retry-After": "0.02"}, b"slow down"),
    "500": (500, {}, b"boom"),
    "503 until a date": (503, {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}, b""),
    "garbage": (200, {}, b"<html>"),
    "a list": (200, {}, b"[]"),
    "half an answer": (200, {"Content-Length": "400", "Connection": "close"}, b'{"kv_tr'),
    "no word": None,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_passing_failures_are_tried_again(targets, start, fault):
    target, server = targets["llama"], start("llama", [1, 3, 4])
    source, row = llama_source(server, target), rows_of(target, [5])[0]
    server.faults.append(FAULTS[fault])
    assert torch.equal(source([row], 5).features, online(target, [0, 2])([row], 5).features)
    # The probe, the failure, the probe again (is it still the same server?), and the row.
    assert [len(asked["prompt"]) for asked in server.asked] == [24, 5, 24, 5]


def test_server_that_hangs_is_left_after_the_time_out(targets, start, monkeypatch):
    target, server = targets["llama"], start("llama", [1, 3, 4])
    source = llama_source(server, target, Access(timeout=5.0, retries=0))
    source.opened[0].server.client.timeout = httpx.Timeout(0.3)
    held = threading.Event()
    monkeypatch.setattr(server, "_given", lambda ids: held.wait(30))
    with pytest.raises(ServerError, match=r"after 1 attempts.*ReadTimeout"):
        source(rows_of(target, [5]), 5)
    held.set()


def test_retries_end_and_say_what_the_last_one_met(targets, start):
    target, server = targets["llama"], start("llama", [1, 3, 4])
    source = llama_source(server, target)
    server.faults.extend([FAULTS["500"]] * 10)
    with pytest.raises(ServerError, match="r0 after 4 attempts; the last ended with: HTTP 500: boom"):
        source(rows_of(target, [5]), 5)
    assert len(server.faults) == 6


def test_server_that_is_not_there_is_named_with_the_line_that_starts_it(targets):
    with pytest.raises(ServerError, match="ConnectError") as caught:
        vllm_source("http://127.0.0.1:9", targets["llama"], [0, 2], DSPARK, access=FAST)
    assert "where: http://127.0.0.1:9" in str(caught.value)
    assert "vllm serve" in str(caught.value)


def test_server_that_comes_back_with_other_layers_is_caught(targets, start):
    target, server = targets["llama"], start("llama", [1, 3, 4])
    source = llama_source(server, target)
    server.faults.append(None)
    server.streams = [0, 3, 4]
    with pytest.raises(ServerError, match="came back giving other features"):
        source(rows_of(target, [5]), 5)


def test_several_servers_take_turns_and_one_may_die(targets, start):
    target = targets["llama"]
    first, second = start("llama", [1, 3, 4]), start("llama", [0, 1, 2, 3, 4])
    source = vllm_source(f"{first.url}, {second.url}/v1/", target, [0, 2], DSPARK, access=FAST)
    rows = rows_of(target, [4, 5, 6, 7])
    source(rows, 7)
    assert [len(s.asked) for s in (first, second)] == [3, 3]
    first.stop()
    batch = source(rows, 7)
    assert torch.equal(batch.features[3, :7], online(target, [0, 2])([rows[3]], 7).features[0])


@pytest.mark.parametrize("limit", [1, 3])
def test_requests_in_flight_are_bounded(targets, start, limit):
    target, server = targets["llama"], start("llama", [1, 3, 4])
    source = vllm_source(f"{server.url}?in_flight={limit}", target, [0, 2], DSPARK, access=FAST)
    given = server._given
    server._given = lambda ids: (time.sleep(0.03), given(ids))[1]  # type: ignore[method-assign]
    source(rows_of(target, [5] * 9), 5)
    assert server.most_at_once == limit


def test_rows_are_fetched_ahead_in_order_once_each_and_no_further_than_asked(targets, start):
    target, server = targets["llama"], start("llama", [1, 3, 4])
    source = vllm_source(f"{server.url}?ahead=3&in_flight=1", target, [0, 2], DSPARK, access=FAST)
    rows = rows_of(target, [4, 5, 6, 7, 8, 9])
    source.expect(rows)

    def lengths_asked() -> list[int]:
        return [len(asked["prompt"]) for asked in server.asked[1:]]

    end = time.monotonic() + 5
    while len(lengths_asked()) < 3 and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(0.1)
    assert lengths_asked() == [4, 5, 6]
    here = online(target, [0, 2])
    for pair in (rows[:2], rows[2:4], rows[4:]):
        batch = source(pair, 9)
        for i, row in enumerate(pair):
            assert torch.equal(batch.features[i, : len(row.ids)], here([row], len(row.ids)).features[0])
    assert lengths_asked() == [4, 5, 6, 7, 8, 9]


def test_row_that_was_not_announced_is_fetched_all_the_same(targets, start):
    target, server = targets["llama"], start("llama", [1, 3, 4])
    source, rows = llama_source(server, target), rows_of(target, [4, 5, 6])
    source.expect(rows[:2])
    batch = source([rows[2]], 6)
    assert torch.equal(batch.features, online(target, [0, 2])([rows[2]], 6).features)


def test_pauses_double_and_are_bounded(monkeypatch):
    monkeypatch.setattr(room.random, "uniform", lambda low, high: 1.0)
    assert [room.pause_after(i, 0.5) for i in range(4)] == [0.5, 1.0, 2.0, 4.0]
    assert room.pause_after(40, 0.5) == room.LONGEST_PAUSE


def test_key_from_the_environment_is_sent(targets, start, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    server = start("llama", [1, 3, 4])
    llama_source(server, targets["llama"])
    assert server.headers[0]["Authorization"] == "Bearer secret"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("localhost:8000", "not the address of a server: 'localhost:8000'"),
        ("http://a:1?in_fligth=2", "no setting 'in_fligth'; did you mean 'in_flight'"),
        ("http://a:1?in_flight=many", "in_flight=many is no int"),
        ("http://a:1?keep_files=1", "keep_files=1 is no bool"),
        ("http://a:1?ahead=0", "at least 1"),
    ],
)
def test_addresses_and_settings_that_say_nothing_possible(targets, url, message):
    with pytest.raises(ServerError) as caught:
        vllm_source(url, targets["llama"], [0, 2], DSPARK)
    assert message in str(caught.value)


# ── training from it ──────────────────────────────────────────────────────────────────────────────────


def recipe_for(algorithm: str, **optim: Any) -> Recipe:
    return Recipe.model_validate(recipe_tree(Path("unused"), Path("unused"), algorithm, **optim))


@pytest.mark.parametrize(
    ("kind", "algorithm"), [("vllm", "eagle3"), ("vllm", "dflash"), ("vllm", "dspark"), ("sglang", "dflash")]
)
def test_a_step_of_training_is_the_same_from_a_server(targets, start, kind, algorithm):
    target, recipe = targets["llama"], recipe_for(algorithm, micro_batch_size=2)
    rows, layers = rows_of(target, [12, 9, 15, 11]), [0, 1, 2]
    if kind == "vllm":
        source = vllm_source(start("llama", [1, 2, 3, 4]).url, target, layers, DSPARK, access=FAST)
    else:
        url = start("llama", [1, 2, 3]).url
        source = sglang_source(url, target, layers, DFLASH, access=FAST)
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
    source = vllm_source(start("llama", [1, 2, 3]).url, target, [0, 1, 2], DFLASH, access=FAST)
    draft = tiny_draft(target, "dspark")
    batch = source(rows_of(target, [9]), 9)
    with pytest.raises(AssertionError, match="the source has none"):
        draft(batch, loss_settings(recipe), draft.plan(batch, 4, torch.Generator().manual_seed(0)))


def run_losses(run: Path) -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text("utf-8").splitlines())
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_a_run_from_a_server_is_the_run_from_online(talking_dir, start, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(train_room, "LOG_EVERY", 1)
    algorithm = "dspark" if kind == "vllm" else "dflash"
    server = start(talking_dir, [1, 2, 3, 4] if kind == "vllm" else [1, 2, 3])
    write_data(tmp_path)
    tree = recipe_tree(talking_dir, tmp_path, algorithm, micro_batch_size=3)
    target = Target.from_pretrained(talking_dir, dtype="float32", device="cpu")
    for run, features in (("online", "online"), ("server", f"{kind}:{server.url}")):
        recipe = Recipe.model_validate(
            {**tree, "name": run, "data": {**tree["data"], "features": features, "max_length": 200}}
        )
        train_draft(recipe, tmp_path, target=target)
    losses = run_losses(tmp_path / "online")
    assert len(losses) == 4
    assert run_losses(tmp_path / "server") == pytest.approx(losses, rel=1e-4)
    # The probe, four steps of four rows (two in the shorter third batch), and no more than one batch ahead.
    assert 1 + 14 <= len(server.asked) <= 1 + 18


def test_loss_that_sglang_cannot_feed_is_refused_before_the_target_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(Target, "from_pretrained", lambda *a: pytest.fail("the target was loaded first"))
    tree = recipe_tree(Path("unused"), tmp_path, "dspark")
    tree["data"]["features"] = "sglang:http://127.0.0.1:9"
    with pytest.raises(ServerError, match="never both"):
        train_draft(Recipe.model_validate(tree), tmp_path)


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
    command = vllm_command("Qwen/Qwen3-4B", [1, 9, 17, 25, 33], 36, max_length=2048, storage="/dev/shm/hs")
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
    unordered = vllm_command("m", [3, -1], 6, last_hidden=False)
    assert '"eagle_aux_hidden_state_layer_ids": [0, 4]' in unordered
    assert "--max-model-len" not in unordered


def test_sglang_is_started_with_layers_counted_our_way():
    assert sglang_command("Qwen/Qwen3-4B", [1, 9, 17], max_length=4096) == (
        "python -m sglang.launch_server --model-path Qwen/Qwen3-4B \\\n"
        "  --enable-return-aux-hidden-states --speculative-algorithm DFLASH \\\n"
        "  --return-aux-hidden-state-layer-ids 1 9 17 \\\n"
        "  --disable-radix-cache --chunked-prefill-size -1 \\\n"
        "  --context-length 4104"
    )


def run(*words: str) -> Any:
    return CliRunner().invoke(app, ["data", "features-server", *words])


@pytest.mark.parametrize(("algorithm", "streams"), [("dspark", [1, 2, 3, 4]), ("dflash", [1, 2, 3])])
def test_command_prints_the_line_for_a_recipe(target_dirs, tmp_path, algorithm, streams):
    recipe = write_recipe(tmp_path / "r.yaml", recipe_tree(target_dirs["llama"], tmp_path, algorithm))
    result = run(str(recipe), "data.max_length=100", "--server", "vllm", "--storage", "/mnt/hs", "--json")
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


def test_command_refuses_sglang_for_a_loss_it_cannot_feed(target_dirs, tmp_path):
    recipe = write_recipe(tmp_path / "r.yaml", recipe_tree(target_dirs["llama"], tmp_path, "dspark"))
    result = run(str(recipe), "--server", "sglang")
    assert result.exit_code == 2
    assert "never both" in result.output
    dflash = write_recipe(tmp_path / "f.yaml", recipe_tree(target_dirs["llama"], tmp_path, "dflash"))
    assert "--return-aux-hidden-state-layer-ids 0 1 2" in run(str(dflash), "--server", "sglang").stdout
