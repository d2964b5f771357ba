from __future__ import annotations

import json
import os

import pytest

from deepspec.files import TAIL, JsonlWriter, atomic_file, repair_last_line


def lines(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


# ---- whole files


def test_what_was_there_stays_until_all_of_the_new_is_on_the_disk(tmp_path):
    path = tmp_path / "new" / "a.bin"
    with atomic_file(path) as stream:
        stream.write(b"old")
    with pytest.raises(RuntimeError), atomic_file(path) as stream:
        stream.write(b"new")
        raise RuntimeError
    assert path.read_bytes() == b"old"
    assert os.listdir(path.parent) == ["a.bin"]


def test_a_file_is_synced_before_it_gets_its_name_and_its_folder_after(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (events.append("fsync"), fsync(handle))[1])
    monkeypatch.setattr(os, "replace", lambda *names: (events.append("rename"), replace(*names))[1])
    with atomic_file(tmp_path / "a") as stream:
        stream.write(b"x")
    assert events == ["fsync", "rename", "fsync"]


# ---- files that grow by whole lines


def test_each_line_is_on_disk_before_the_next_is_written(tmp_path):
    path = tmp_path / "new" / "metrics.jsonl"
    writer = JsonlWriter(path)
    writer.write({"step": 1, "name": "τ"})
    assert lines(path) == [{"step": 1, "name": "τ"}]
    writer.write({"step": 2})
    assert lines(path) == [{"step": 1, "name": "τ"}, {"step": 2}]
    writer.close()


def test_opening_again_appends(tmp_path):
    path = tmp_path / "m.jsonl"
    for step in (1, 2):
        with JsonlWriter(path) as writer:
            writer.write({"step": step})
        assert writer.dropped_bytes == 0
    assert lines(path) == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize("torn", [b'{"st', b'{"step": 2', b"2", b"\x00\x00\x00", b'{"a": "\xff'])
def test_torn_last_line_is_dropped_and_whole_ones_are_kept(tmp_path, torn, capsys):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 1}\n' + torn)
    with JsonlWriter(path) as writer:
        writer.write({"step": 2})
    assert lines(path) == [{"step": 1}, {"step": 2}]
    assert writer.dropped_bytes == len(torn)
    assert f"dropped a torn last line of {len(torn)} bytes" in capsys.readouterr().err


def test_whole_last_line_that_lost_only_its_newline_is_kept(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}')
    with JsonlWriter(path) as writer:
        writer.write({"step": 3})
    assert lines(path) == [{"step": 1}, {"step": 2}, {"step": 3}]
    assert writer.dropped_bytes == 0


def test_a_torn_only_line_leaves_an_empty_file(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step"')
    JsonlWriter(path).close()
    assert path.read_bytes() == b""


def test_a_diverged_loss_still_makes_valid_json(tmp_path):
    path = tmp_path / "m.jsonl"
    with JsonlWriter(path) as writer:
        writer.write({"loss": float("nan"), "terms": {"ce": [float("inf"), 1.5]}})
    assert path.read_text() == '{"loss": null, "terms": {"ce": [null, 1.5]}}\n'


def test_a_value_that_is_not_data_writes_no_half_line(tmp_path):
    path = tmp_path / "m.jsonl"
    with JsonlWriter(path) as writer:
        with pytest.raises(TypeError):
            writer.write({"step": 1, "bad": object()})
        writer.write({"step": 2})
    assert lines(path) == [{"step": 2}]


def test_a_torn_line_longer_than_one_look_back_is_dropped_whole(tmp_path):
    path = tmp_path / "m.jsonl"
    torn = b'{"text": "' + b"x" * (3 * TAIL)
    path.write_bytes(b'{"step": 1}\n' + torn)
    assert repair_last_line(path) == len(torn)
    assert path.read_bytes() == b'{"step": 1}\n'


def test_a_disk_that_takes_half_a_line_gets_the_other_half_next(tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: write(handle, data[: max(1, len(data) // 2)]))
    with JsonlWriter(tmp_path / "m.jsonl") as writer:
        writer.write({"name": "τ" * 50})
    assert lines(tmp_path / "m.jsonl") == [{"name": "τ" * 50}]
