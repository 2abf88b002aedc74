"""turn records."""

from areal_sub.records import Fork, TurnRecord, float32, int32

RECORD = TurnRecord(
    rollout_id="r1",
    turn_id="chatcmpl-1",
    parent_turn_id=None,
    fork=Fork.ROOT,
    context_token_ids=int32([1, 2]),
    token_ids=int32([3, 65536]),
    rollout_logprobs=float32([-0.5, -1.0]),
    versions=int32([3, 4]),
    finish_reason="stop",
    dialect="chat",
    model="m",
    temperature=1.0,
    top_p=1.0,
    started_at=1.5,
    ended_at=2.5,
    num_prompt_tokens=2,
    engine_digest=0,
    constrained=False,
    streamed=False,
)
BYTES = [
    (
        "de0015a46b696e64a47475726ea17601aa726f6c6c6f75745f6964a27231a77475726e5f6964aa63"
        "686174636d706c2d31ae706172656e745f7475726e5f6964c0a4666f726ba4726f6f74b1636f6e74"
        "6578745f746f6b656e5f696473c4080100000002000000a9746f6b656e5f696473c4080300000000"
        "000100b0726f6c6c6f75745f6c6f6770726f6273c408000000bf000080bfa876657273696f6e73c4"
        "080300000004000000ad66696e6973685f726561736f6ea473746f70a76469616c656374a4636861"
        "74a56d6f64656ca16dab74656d7065726174757265cb3ff0000000000000a5746f705f70cb3ff000"
        "0000000000aa737461727465645f6174cb3ff8000000000000a8656e6465645f6174cb4004000000"
        "000000b16e756d5f70726f6d70745f746f6b656e7302ad656e67696e655f64696765737400ab636f"
        "6e73747261696e6564c2a873747265616d6564c2"
    ),
]
