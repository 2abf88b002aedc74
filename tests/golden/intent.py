"""intent records."""

from areal_sub.records import IntentRecord

RECORD = IntentRecord(
    rollout_id="r1",
    turn_id="chatcmpl-1",
    num_prompt_tokens=2,
    asked_at=1.5,
)
BYTES = [
    (
        "86a46b696e64a6696e74656e74a17601aa726f6c6c6f75745f6964a27231a77475726e5f6964aa63"
        "686174636d706c2d31b16e756d5f70726f6d70745f746f6b656e7302a861736b65645f6174cb3ff8"
        "000000000000"
    ),
]
