"""open records."""

from areal_sub.records import OpenRecord

RECORD = OpenRecord(
    rollout_id="r1",
    group_id="g1",
    task_id="t1",
    split="train",
    policy_version=3,
    opened_at=1.5,
    agent="calc",
)
BYTES = [
    (
        "88a46b696e64a46f70656ea17601aa726f6c6c6f75745f6964a27231a867726f75705f6964a26731"
        "a77461736b5f6964a27431a573706c6974a5747261696eae706f6c6963795f76657273696f6e03a9"
        "6f70656e65645f6174cb3ff8000000000000"
    ),
    (
        "89a46b696e64a46f70656ea17601aa726f6c6c6f75745f6964a27231a867726f75705f6964a26731"
        "a77461736b5f6964a27431a573706c6974a5747261696eae706f6c6963795f76657273696f6e03a9"
        "6f70656e65645f6174cb3ff8000000000000a56167656e74a463616c63"
    ),
]
