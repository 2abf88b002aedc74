"""What is allocated after `density.settle` lies on few pages, however full of gaps the heap was."""

import os
from collections.abc import Callable

import pytest

from sandbox import density

PAGE_BYTES = 4096


def _pages_of_new_objects(object_bytes: int, settle: Callable[[], None]) -> int:
    """In a fork: of 500 objects, made where every second one of more has gone."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            old = [bytes(object_bytes) for _ in range(1_500)]
            del old[::2]
            settle()
            new = [bytes(object_bytes) for _ in range(500)]
            os.write(writer, str(len({id(each) // PAGE_BYTES for each in new})).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader) as file:
        said = file.read()
    os.waitpid(pid, 0)
    return int(said)


@pytest.mark.parametrize("object_bytes", [100, 400, 900])
def test_new_objects_lie_side_by_side(object_bytes: int) -> None:
    among_gaps = _pages_of_new_objects(object_bytes, lambda: None)
    settled = _pages_of_new_objects(object_bytes, density.settle)

    assert settled < 0.75 * among_gaps
