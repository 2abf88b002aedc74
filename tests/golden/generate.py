"""generate records."""

from areal_sub.records import GenerateRequest, int32

RECORD = GenerateRequest(
    prompt_token_ids=int32([1, 2]),
    max_new_tokens=8,
    temperature=0.5,
    top_p=1.0,
    top_k=0,
    stop_token_ids=[2],
    stream=False,
    affinity="r1",
    grammar="",
)
BYTES = [
    (
        "8ba46b696e64a867656e6572617465a17601b070726f6d70745f746f6b656e5f696473c408010000"
        "0002000000ae6d61785f6e65775f746f6b656e7308ab74656d7065726174757265cb3fe000000000"
        "0000a5746f705f70cb3ff0000000000000a5746f705f6b00ae73746f705f746f6b656e5f69647391"
        "02a673747265616dc2a8616666696e697479a27231a76772616d6d6172a0"
    ),
]
