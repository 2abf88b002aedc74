"""Whole or not at all."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from areal_sub.errors import WriteError
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


def test_a_disk_that_is_full_is_named_and_gets_its_room_back(tmp_path: Path) -> None:
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.write_text("old")
    full = OSError(errno.ENOSPC, "No space left on device")
    told = r"cannot write .*file: .*No space.* MiB are free there"
    with pytest.raises(WriteError, match=told), whole_file(file) as partial:
        partial.write_text("new")
        raise full
    told = r"cannot write .*folder: .*No space"
    with pytest.raises(WriteError, match=told), whole_folder(folder) as partial:
        (partial / "new").touch()
        raise full
    assert list(tmp_path.iterdir()) == [file] and file.read_text() == "old"


def test_torch_that_cannot_write_is_told_apart(tmp_path: Path) -> None:
    """In a process of its own, whose files may not grow beyond 100 kB."""
    code = (
        "import resource, signal, sys, torch\n"
        "from pathlib import Path\n"
        "from areal_sub.learner.durable import whole_file\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "with whole_file(Path(sys.argv[1])) as partial:\n"
        "    torch.save(torch.zeros(1_000_000), partial)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "file")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "WriteError: cannot write" in done.stderr, done.stderr
    assert not list(tmp_path.iterdir())


def test_torch_that_has_no_space_left_says_so(tmp_path: Path) -> None:
    told = r"cannot write .*file: \[Errno 28\] No space left on device; .* MiB are free there"
    with (
        pytest.raises(WriteError, match=told),
        whole_file(tmp_path / "file"),
        open("/dev/full", "wb") as full,
    ):
        torch.save(torch.zeros(100_000), full)
