"""Which mounts and links make up the root of the tier `namespaces`: a pure function of a tree."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sandbox.layers.root import Layout, layout


@pytest.fixture
def at(tmp_path: Path) -> Path:
    """Where the tree is; itself without a link on the way."""
    return Path(os.path.realpath(tmp_path))


def make(folder: Path, *files: str) -> None:
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")


def test_what_lies_below_another_mount_comes_with_it(at: Path) -> None:
    make(at, "a/b/c", "ab/d")
    found = layout(map(str, [at / "a" / "b", at / "ab", at / "a", at / "a" / "b" / "c"]))
    assert found == Layout((str(at / "a"), str(at / "ab")), {})


def test_a_file_is_mounted_by_itself(at: Path) -> None:
    make(at, "a/one", "a/two")
    assert layout([str(at / "a" / "one")]) == Layout((str(at / "a" / "one"),), {})


def test_what_is_not_there_is_left_out(at: Path) -> None:
    (at / "dangling").symlink_to("nowhere")
    found = layout(map(str, [at / "absent", at / "dangling"]))
    assert found.mounts == ()


def test_links_are_followed_one_by_one_and_kept(at: Path) -> None:
    make(at, "store/v2/lib/file")
    (at / "store" / "current").symlink_to("v2")
    (at / "usr").mkdir()
    (at / "usr" / "env").symlink_to("../store/current/lib")
    (at / "env").symlink_to(at / "usr" / "env")
    found = layout([str(at / "env")])
    assert found.mounts == (str(at / "store" / "v2" / "lib"),)
    assert found.links == {
        str(at / "env"): str(at / "usr" / "env"),
        str(at / "usr" / "env"): "../store/current/lib",
        str(at / "store" / "current"): "v2",
    }


def test_a_link_within_a_mount_is_already_there(at: Path) -> None:
    make(at, "a/real/file")
    (at / "a" / "link").symlink_to("real")
    found = layout(map(str, [at / "a", at / "a" / "link"]))
    assert found == Layout((str(at / "a"),), {})


def test_a_path_through_a_linked_folder_keeps_the_link(at: Path) -> None:
    make(at, "real/sub/file")
    (at / "link").symlink_to("real")
    found = layout([str(at / "link" / "sub")])
    assert found == Layout((str(at / "real" / "sub"),), {str(at / "link"): "real"})


def test_dots_and_doubled_slashes_are_of_no_account(at: Path) -> None:
    make(at, "a/file", "b/file")
    assert layout([f"{at}//b/../a/./"]) == Layout((str(at / "a"),), {})


def test_links_in_a_circle_lead_nowhere(at: Path) -> None:
    (at / "self").symlink_to("self")
    (at / "one").symlink_to("two")
    (at / "two").symlink_to("one")
    assert layout(map(str, [at / "self", at / "one" / "below"])).mounts == ()


def test_the_same_paths_in_another_order_are_the_same_root(at: Path) -> None:
    make(at, "a/b", "c/d")
    (at / "e").symlink_to("c")
    paths = [str(at / name) for name in ("a", "c/d", "e", "a/b")]
    assert layout(paths) == layout(reversed(paths))
