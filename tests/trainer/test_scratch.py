from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from areal_sub.trainer.scratch import scratch_folder

DIES = """
import os, sys
from pathlib import Path
from areal_sub.trainer.scratch import scratch_folder
with scratch_folder(Path(sys.argv[1])) as folder:
    (folder / "weights").write_bytes(b"x")
    print(folder, flush=True)
    os.kill(os.getpid(), 9)
"""


def test_a_folder_is_private_and_gone_at_the_end(tmp_path: Path) -> None:
    with scratch_folder(tmp_path) as folder:
        assert folder.stat().st_mode & 0o777 == 0o700
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_removed_and_a_living_one_is_not(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", DIES, str(tmp_path)], capture_output=True, text=True, check=False
    )
    abandoned = Path(done.stdout.strip())
    assert abandoned.exists()
    with scratch_folder(tmp_path) as first, scratch_folder(tmp_path) as second:
        assert not abandoned.exists()
        assert first.exists() and second.exists()
