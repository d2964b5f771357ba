from __future__ import annotations

import errno
import json
import os
import signal
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest

from deepspec.errors import DataError, UserError
from deepspec.files import (
    LOCK,
    TAIL,
    JsonlWriter,
    ResumableLog,
    alone_in,
    atomic_directory,
    atomic_file,
    check_writable,
    claimed,
    repair_last_line,
    writing,
)
from kills import contents, held_by_another, in_child, killed_at, needs_fork


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


# ---- a log that is resumed under the conditions it was begun under


def resumed(path: Path, conditions: dict[str, object], header: bool = True) -> list[dict[str, object]]:
    """The records so far; then one more is added."""
    with ResumableLog(path, conditions, header=header) as log:
        found = [record for _, record in log.records()]
        log.write({"n": len(found), **({} if header else conditions)})
    return found


@pytest.mark.parametrize("header", [True, False])
def test_a_log_is_continued_under_the_same_conditions(tmp_path, header):
    path = tmp_path / "log.jsonl"
    conditions = {"seed": 1, "shape": (2, 3), "none": None}  # tuples and lists are the same conditions
    for n in range(3):
        assert [record["n"] for record in resumed(path, conditions, header)] == list(range(n))


def test_a_log_begun_under_another_header_steps_aside_each_time_under_a_new_name(tmp_path, capsys):
    path = tmp_path / "eval.partial.jsonl"
    resumed(path, {"seed": 1, "old": True})
    before = path.read_bytes()
    assert resumed(path, {"seed": 1}) == []
    assert (tmp_path / "eval.partial.old-1.jsonl").read_bytes() == before
    assert "was begun with another 'old'" in " ".join(capsys.readouterr().err.split())
    assert resumed(path, {"seed": 2}) == []
    assert (tmp_path / "eval.partial.old-2.jsonl").exists()
    assert len(resumed(path, {"seed": 2})) == 1


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ({"seed": 2}, "this line was made with seed 2, but now it is 1"),
        ({}, "this line has no 'seed', but now it is 1"),
        ([1], "this line is not a JSON object"),
    ],
)
def test_a_line_made_under_other_conditions_is_refused_by_its_number(tmp_path, line, reason):
    path = tmp_path / "log.jsonl"
    path.write_text('{"seed": 1, "n": 0}\n' + json.dumps(line) + "\n")
    with pytest.raises(DataError, match=reason) as caught:
        resumed(path, {"seed": 1}, header=False)
    assert f"{path}:2" in str(caught.value)


def test_records_say_where_their_lines_begin(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"a": "τ"}\n{"b": 1}\n', "utf-8")
    with ResumableLog(path, {}) as log:
        assert [at for at, _ in log.records()] == [0, 12]


def test_a_log_has_one_writer(tmp_path):
    path = tmp_path / "log.jsonl"
    with ResumableLog(path, {}), pytest.raises(UserError, match="another process is writing to this file"):
        ResumableLog(path, {})
    ResumableLog(path, {}).close()


# ---- kills


def _whole_file(folder: Path) -> None:
    with atomic_file(folder / "a.bin") as stream:
        stream.write(b"new")


def _directory(folder: Path) -> None:
    with atomic_directory(folder / "d") as part, (part / "a.bin").open("wb") as stream:
        stream.write(b"new")


def _log(folder: Path) -> None:
    with ResumableLog(folder / "log.jsonl", {"seed": 1}, header=True) as log:
        for n in range(len(list(log.records())), 3):
            log.write({"n": n})
            log.sync()


@needs_fork
@pytest.mark.parametrize(
    ("work", "again"),
    [(_whole_file, False), (_whole_file, True), (_directory, False), (_directory, True), (_log, False)],
)
def test_killed_at_any_durable_operation_the_next_try_gives_the_undisturbed_result(
    tmp_path: Path, work: Callable[[Path], None], again: bool
) -> None:
    (tmp_path / "whole").mkdir()
    work(tmp_path / "whole")
    for operation in count(1):
        folder = tmp_path / str(operation)
        folder.mkdir()
        if again:
            work(folder)
        old = contents(folder)
        if not killed_at(operation, lambda folder=folder: work(folder)):
            break
        now = {name: data for name, data in contents(folder).items() if not name.startswith(".")}
        if again:
            assert now == old, f"killed at operation {operation}"  # whole, old or new
        work(folder)
        assert contents(folder) == contents(tmp_path / "whole"), f"killed at operation {operation}"
    assert operation > 2


# ---- locks


@needs_fork
def test_a_folder_is_kept_to_one_process_and_a_killed_one_holds_nothing(tmp_path):
    with (
        held_by_another(tmp_path, "training"),
        pytest.raises(UserError, match="another process is training in this folder"),
        alone_in(tmp_path, "training"),
    ):
        pass
    with alone_in(tmp_path, "training"):
        pass

    def killed() -> None:
        with alone_in(tmp_path, "training"):
            os.kill(os.getpid(), signal.SIGKILL)

    assert os.WIFSIGNALED(os.waitpid(in_child(killed), 0)[1])
    with alone_in(tmp_path, "training"):
        pass


@needs_fork
def test_pieces_of_one_lock_file_are_claimed_one_by_one(tmp_path):
    def others() -> None:
        with claimed(tmp_path / LOCK, 3) as three, claimed(tmp_path / LOCK, 4) as four:
            assert (three, four) == (False, True)

    with claimed(tmp_path / LOCK, 3) as ours:
        assert ours
        assert os.waitpid(in_child(others), 0)[1] == 0
    assert (tmp_path / LOCK).stat().st_size == 0


# ---- paths that cannot be written


@pytest.mark.parametrize(
    ("number", "todo"),
    [
        (errno.ENOSPC, "make room on that disk"),
        (errno.EDQUOT, "make room on that disk"),
        (errno.EACCES, "name a place that you may write to"),
        (errno.EROFS, "name a place that you may write to"),
        (errno.EISDIR, "name a file, not a folder"),
        (errno.ENOTDIR, "name a place that you may write to"),
        (errno.EEXIST, "name a place that you may write to"),
    ],
)
def test_a_path_that_cannot_be_written_is_an_error_with_a_way_out(tmp_path, number, todo):
    with pytest.raises(UserError) as caught, writing(tmp_path):
        raise OSError(number, os.strerror(number))
    not_a_folder = number in (errno.ENOTDIR, errno.EEXIST)
    why = "a folder on that path is a file" if not_a_folder else os.strerror(number)
    assert f"cannot write {tmp_path}: {why}" in str(caught.value)
    assert todo in str(caught.value)


def test_any_other_failure_of_the_system_stays_what_it_is(tmp_path):
    with pytest.raises(OSError, match="Input/output error"), writing(tmp_path):
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_a_place_is_checked_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    check_writable(None)
    check_writable(tmp_path / "new" / "r.json")
    for place, why in ((tmp_path, "it is a folder"), (tmp_path / "file" / "r.json", "is not a folder")):
        with pytest.raises(UserError, match=why):
            check_writable(place)


@pytest.mark.parametrize("first", [b"garbage", b"", b"[1]", b"\xff\xfe", b"{}", b"null"])
def test_a_log_whose_header_is_broken_steps_aside(tmp_path, first):
    """`{}` was taken for equal conditions, and the other headers ended in a traceback."""
    path = tmp_path / "eval.partial.jsonl"
    path.write_bytes(first + b"\n" + b'{"group": 0}\n')
    with ResumableLog(path, {"a": 1}, header=True) as log:
        assert [record for _, record in log.records()] == []
    assert (tmp_path / "eval.partial.old-1.jsonl").read_bytes().startswith(first)


def test_half_a_surrogate_pair_is_written_as_its_escape(tmp_path):
    """UTF-8 has none, and a server or a row may hold one anywhere: the whole run would end at that line."""
    with JsonlWriter(tmp_path / "a.jsonl") as writer:
        writer.write({"a": "\ud83d", "b": "😀"})
    line = (tmp_path / "a.jsonl").read_bytes()
    assert line == b'{"a": "\\ud83d", "b": "' + "😀".encode() + b'"}\n'
    assert json.loads(line) == {"a": "\ud83d", "b": "😀"}
