"""closed records."""

from areal_sub.records import ClosedRecord

RECORD = ClosedRecord(
    ended="failed",
    error="e",
    closed_at=5.5,
)
BYTES = [
    (
        "85a46b696e64a6636c6f736564a17601a5656e646564a66661696c6564a56572726f72a165a9636c"
        "6f7365645f6174cb4016000000000000"
    ),
]
