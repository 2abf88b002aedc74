"""began records."""

from areal_sub.records import BeganRecord

RECORD = BeganRecord(
    policy_version=2,
    began_at=1.5,
    export_style="concat",
    turn_discount=1.0,
    trains_without_advantage=False,
    tokenizer_path="/models/m",
)
BYTES = [
    (
        "88a46b696e64a5626567616ea17601ae706f6c6963795f76657273696f6e02a8626567616e5f6174"
        "cb3ff8000000000000ac6578706f72745f7374796c65a6636f6e636174ad7475726e5f646973636f"
        "756e74cb3ff0000000000000b8747261696e735f776974686f75745f616476616e74616765c2ae74"
        "6f6b656e697a65725f70617468a92f6d6f64656c732f6d"
    ),
]
