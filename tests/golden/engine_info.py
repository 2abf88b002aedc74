"""engine_info records."""

from areal_sub.records import EngineInfo

RECORD = EngineInfo(
    policy_version=3,
    max_model_len=4096,
    vocab_size=352,
    num_slots=64,
    num_running=1,
    num_waiting=0,
    num_generated_tokens=10,
    num_decode_steps=9,
)
BYTES = [
    (
        "8aa46b696e64ab656e67696e655f696e666fa17601ae706f6c6963795f76657273696f6e03ad6d61"
        "785f6d6f64656c5f6c656ecd1000aa766f6361625f73697a65cd0160a96e756d5f736c6f747340ab"
        "6e756d5f72756e6e696e6701ab6e756d5f77616974696e6700b46e756d5f67656e6572617465645f"
        "746f6b656e730ab06e756d5f6465636f64655f737465707309"
    ),
]
