"""A tiny random model with a real tokenizer: what a grammar needs."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
NOT_SPECIAL = ["<tool_call>", "</tool_call>"]
NUM_UNUSED = 23  # ids that the model has and the tokenizer has not
CORPUS = ['{"name": "calc", "arguments": {"a": 1, "b": [true, false, null]}} héllo 漢字 text']


def make_tokenizer(kind: str = "byte-level") -> Tokenizer:
    if kind == "byte-level":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(CORPUS, trainer)
    else:  # SentencePiece's, as Llama 2, Mistral and Gemma have it
        words = ["▁", "▁a", "a", "b", "true", '":', "▁1", "1", "2", "{", "}", '"']
        raw = [f"<0x{byte:02X}>" for byte in range(256)]
        vocab = {text: i for i, text in enumerate([*SPECIAL, *raw, *words])}
        tokenizer = Tokenizer(models.BPE(vocab, [], byte_fallback=True, unk_token=SPECIAL[0]))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
        tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in NOT_SPECIAL])
    return tokenizer


def make_folder(folder: Path, kind: str = "byte-level") -> Tokenizer:
    """A model folder: weights, tokenizer, end of turn `<|im_end|>`."""
    tokenizer = make_tokenizer(kind)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.get_vocab_size() + NUM_UNUSED,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,  # of 32: vLLM's CPU kernels have none smaller
        num_key_value_heads=1,
        intermediate_size=64,
        max_position_embeddings=2048,
        initializer_range=0.4,
        bos_token_id=None,
        eos_token_id=tokenizer.token_to_id("<|im_end|>"),
        pad_token_id=None,
    )
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(
        folder
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    return tokenizer
