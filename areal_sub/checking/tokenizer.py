"""A tokenizer without a vocabulary to learn: one token per byte, and ChatML's control tokens.

Written into a folder in the form of Hugging Face's tokenizers, so that the proxy loads it as it
loads any model's.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

BEGIN, END = "<|im_start|>", "<|im_end|>"
_TEMPLATE = "chat_template.jinja"


def write_tokenizer(folder: Path) -> None:
    """tokenizer.json, tokenizer_config.json and chat_template.jinja in `folder`, which is there."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text in (BEGIN, END)]
    )
    # Tokens of their own, and part of the text that a parser reads.
    tokenizer.add_tokens(
        [AddedToken(text, normalized=False) for text in ("<tool_call>", "</tool_call>")]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}))
    shutil.copyfile(Path(__file__).with_name(_TEMPLATE), folder / _TEMPLATE)
