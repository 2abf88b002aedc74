"""What of this package agents in an interpreter of their own can import: `AgentWorkflow`, the ready
agents and what these need. Standard library only, for any Python from 3.9 on (the ready agents:
from 3.10 on).

A copy, and not the folder that the package is installed in: beside it may lie all that is installed
for us, which would then be found before what is installed for the agent. Called by `supervisor`.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import areal_sub

CARRIED = ("__init__.py", "errors.py", "workflow")


def carry(folder: Path) -> None:
    """Copy it to `folder`, which is made, readable by all."""
    package = folder / "areal_sub"
    package.mkdir(parents=True)
    origin = Path(areal_sub.__file__).parent
    for name in CARRIED:
        if (origin / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(origin / name, package / name, ignore=ignored)
        else:
            shutil.copyfile(origin / name, package / name)
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
