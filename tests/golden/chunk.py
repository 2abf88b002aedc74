"""chunk records."""

from areal_sub.records import GenerateChunk, float32, int32, uint32

RECORD = GenerateChunk(
    token_ids=int32([7]),
    logprobs=float32([-0.5]),
    versions=int32([3]),
    finish_reason=None,
    digests=uint32([]),
)
BYTES = [
    (
        "87a46b696e64a56368756e6ba17601a9746f6b656e5f696473c40407000000a86c6f6770726f6273"
        "c404000000bfa876657273696f6e73c40403000000ad66696e6973685f726561736f6ec0a7646967"
        "65737473c400"
    ),
]
