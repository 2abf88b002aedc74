"""fate records."""

from areal_sub.records import Fate, FateRecord

RECORD = FateRecord(
    rollout_id="r1",
    fate=Fate.TRAINED,
    reason="",
    policy_version=3,
    decided_at=4.5,
    step=4,
    staleness=1,
    num_trained_tokens=2,
    num_uncertified_tokens=0,
    baseline_mean=0.5,
    baseline_scale=2.0,
)
BYTES = [
    (
        "8da46b696e64a466617465a17601aa726f6c6c6f75745f6964a27231a466617465a7747261696e65"
        "64a6726561736f6ea0ae706f6c6963795f76657273696f6e03aa646563696465645f6174cb401200"
        "0000000000a47374657004a97374616c656e65737301b26e756d5f747261696e65645f746f6b656e"
        "7302b66e756d5f756e6365727469666965645f746f6b656e7300ad626173656c696e655f6d65616e"
        "cb3fe0000000000000ae626173656c696e655f7363616c65cb4000000000000000"
    ),
]
