"""Writes to /tmp by that name when it is imported, and when it runs: CAMEL-AI does, and shells."""

from pathlib import Path

FOLDER = Path("/tmp/made-by-an-import")
FOLDER.mkdir(exist_ok=True)


def agent(data):
    Path("/tmp/notes.txt").write_text("mine")
    return float(Path("/tmp/notes.txt").read_text() == "mine")
