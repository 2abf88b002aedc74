"""Whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from areal_sub.learner.durable import whole_file, whole_folder


def test_a_file_appears_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b"
    for text in ("one", "two"):
        with whole_file(target) as partial:
            partial.write_text(text)
            assert not target.exists() or target.read_text() == "one"
        assert target.read_text() == text
    assert list(target.parent.iterdir()) == [target]


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.write_text("old")
    folder.mkdir()
    (folder / "old").touch()
    with pytest.raises(RuntimeError), whole_file(file) as partial:
        partial.write_text("new")
        raise RuntimeError
    with pytest.raises(RuntimeError), whole_folder(folder) as partial:
        (partial / "new").touch()
        raise RuntimeError
    assert file.read_text() == "old"
    assert [p.name for p in folder.iterdir()] == ["old"]


def test_a_folder_replaces_the_one_that_is_there(tmp_path: Path) -> None:
    target = tmp_path / "x" / "target"
    for name in ("old", "new"):
        with whole_folder(target) as partial:
            (partial / "sub").mkdir()
            (partial / "sub" / name).write_text(name)
        assert [p.name for p in (target / "sub").iterdir()] == [name]
    assert list(target.parent.iterdir()) == [target]


def test_leftovers_of_a_crash_do_not_get_in(tmp_path: Path) -> None:
    target = tmp_path / "target"
    for name in (".partial-target", ".partial-replaced-target"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "junk").touch()
    with whole_folder(target) as partial:
        (partial / "good").touch()
    assert [p.name for p in target.iterdir()] == ["good"]
    assert list(tmp_path.iterdir()) == [target]
