"""Whole files and folders: a reader finds the old content or the new, and nothing else is lost."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from inkstream.disk import whole_file, whole_folder


@pytest.fixture(params=[False, True], ids=["", "flushed"])
def flush(request) -> bool:
    return request.param


def test_a_file_is_replaced_at_the_end_and_not_before(tmp_path, flush):
    path = tmp_path / ("a" * 250)  # nearly the longest name
    path.write_text("old")
    with whole_file(path, flush) as part:
        part.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def fail_in(whole: AbstractContextManager[Path]) -> None:
    with whole as part:
        (part / "half" if part.is_dir() else part).write_text("half")
        raise ZeroDivisionError


def test_an_error_leaves_the_old_file_or_folder_and_no_other(tmp_path):
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.write_text("old")
    folder.mkdir()
    (folder / "mine").write_text("old")
    for whole in (whole_file(file), whole_folder(folder, replace=True)):
        with pytest.raises(ZeroDivisionError):
            fail_in(whole)
    assert file.read_text() == (folder / "mine").read_text() == "old"
    assert sorted(tmp_path.iterdir()) == [file, folder]


def write(folder: Path, flush: bool = False, replace: bool = False) -> None:
    with whole_folder(folder, flush, replace) as part:
        (part / "theirs").write_text("new")


def test_a_folder_comes_to_a_free_name_or_to_that_of_an_empty_one(tmp_path, flush):
    (tmp_path / "empty").mkdir()
    for name in ("new", "empty"):
        write(tmp_path / name, flush)
        assert [file.name for file in (tmp_path / name).iterdir()] == ["theirs"]


def test_what_somebody_put_into_the_folder_meanwhile_is_not_lost(tmp_path, flush):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "mine").write_text("old")
    with pytest.raises(OSError, match="not empty"):
        write(folder, flush)
    assert [file.name for file in folder.iterdir()] == ["mine"]
    assert list(tmp_path.iterdir()) == [folder]


def test_a_folder_is_replaced_where_that_is_asked_for(tmp_path, flush):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "mine").write_text("old")
    write(folder, flush, replace=True)
    assert [file.name for file in folder.iterdir()] == ["theirs"]
    assert list(tmp_path.iterdir()) == [folder]
