"""Output files: complete or not written, never replaced silently, and never written by two runs at once."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from pathlib import Path
from typing import Any

import click
import pytest

from kvq_calib import files
from kvq_calib.cli.outputs import check_fields, check_output
from kvq_calib.files import WriteError, exclusive, write_atomically


def listing(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def without_unnamed_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "O_TMPFILE", raising=False)


def without_links(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "link", fail)


@pytest.mark.parametrize("lacks", [None, without_unnamed_files, without_links])
def test_a_file_is_whole_whatever_the_system_can_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lacks: Any
) -> None:
    if lacks is not None:
        lacks(monkeypatch)
    target = tmp_path / "file"
    for data in (b"old", b"new" * 100_000, b""):
        write_atomically(target, data)
        assert target.read_bytes() == data
    umask = os.umask(0)
    os.umask(umask)
    assert target.stat().st_mode & 0o777 == 0o666 & ~umask
    assert listing(tmp_path) == ["file"]


@pytest.mark.skipif(not hasattr(os, "O_TMPFILE"), reason="the system has no files without a name")
def test_a_process_that_is_killed_while_it_writes_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "file"
    target.write_bytes(b"old")
    seen = []
    monkeypatch.setattr(
        os, "fsync", lambda handle: seen.append((os.fstat(handle).st_size, listing(tmp_path)))
    )
    write_atomically(target, b"x" * 1000)
    assert seen == [(1000, ["file"])]  # all is written, and there is no name that could be left


def hold(path: Path, connection: Any) -> None:
    with exclusive(path):
        connection.send("held")
        connection.recv()


def test_two_processes_cannot_write_one_output(tmp_path: Path) -> None:
    output = tmp_path / "a.kvq.safetensors"
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=hold, args=(output, theirs))
    process.start()
    assert ours.recv() == "held"
    with pytest.raises(WriteError, match="another run is writing"), exclusive(output):
        pass
    with exclusive(tmp_path / "b.kvq.safetensors"):
        pass
    process.kill()  # what it held goes with it, though the file is left
    process.join()
    assert listing(tmp_path) == ["a.kvq.safetensors.lock"]
    with exclusive(output):
        assert listing(tmp_path) == ["a.kvq.safetensors.lock"]
    with contextlib.suppress(KeyError), exclusive(output):
        raise KeyError
    assert not listing(tmp_path)


def test_a_lock_that_was_removed_meanwhile_is_taken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([False, True])
    monkeypatch.setattr(files, "_is_at", lambda handle, path: next(answers))
    with exclusive(tmp_path / "a"):
        assert next(answers, None) is None
        assert listing(tmp_path) == ["a.lock"]


def test_streams_are_not_locked() -> None:
    with exclusive("/dev/null"):
        assert not Path("/dev/null.lock").exists()


def test_what_is_replaced_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "result.json"
    for nothing in (None, file, "/dev/null"):
        check_output(nothing)
    assert not caplog.records
    file.write_text("{}")
    check_output(file)
    assert [record.getMessage() for record in caplog.records] == [
        f"{file} is there already, and will be replaced"
    ]
    with pytest.raises(WriteError):
        check_output(tmp_path / "missing" / "result.json")


def test_a_field_with_another_name_is_a_slip() -> None:
    check_fields("model-{recipe}.kvq.safetensors", "recipe")
    check_fields("plain {a b} {", "recipe")
    for name in ("{recpie}", "{}", "{Recipe}", "{recipe}-{rank}"):
        with pytest.raises(click.UsageError, match=r"means nothing; write \{recipe\}"):
            check_fields(f"model-{name}.kvq.safetensors", "recipe")
