"""What the plugin accepts of what vLLM sampled: its `Grammar`, in vLLM's own interpreter."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from grammar_lab import make_folder

from areal_sub.engines.embedded.grammars import order_of
from areal_sub.engines.vllm.process import PLUGIN_FOLDER

CHECKS = """
import json, os, psutil, sys, torch
from areal_sub_vllm.grammars import Grammar, Template

given = json.loads(sys.argv[1])
a, b, stop = given["tokens"]
template = Template(given["folder"], given["vocab_size"])
matchers = psutil.Process(template._process.pid).children
bitmask = torch.zeros(1, -(-given["vocab_size"] // 32), dtype=torch.int32)

def new(): return Grammar(template, given["order"])

def accepts(grammar, *tokens):
    "Each after its mask."
    for token in tokens:
        grammar.fill_bitmask(bitmask, 0)
        if not grammar.accept_tokens("", [token]):
            return False
    return True

assert accepts(new(), a, b, stop)
assert not accepts(new(), b), "against its mask"
assert not accepts(new(), a, stop), "against its mask"
assert not new().accept_tokens("", [a, b]), "two for one mask"
grammar = new()
assert accepts(grammar, a) and not grammar.accept_tokens("", [b]), "before its mask"
grammar = new()
grammar.close()
assert not accepts(grammar, a), "after its end"
while matchers():  # until those of all grammars above have ended, or this takes too long
    pass
killed = new()
assert accepts(killed, a)
killed.fill_bitmask(bitmask, 0)
os.kill(matchers()[0].pid, 9)
assert killed.accept_tokens("", [b]), "its mask had come before"
assert not accepts(killed, stop), "no mask can come any more"
killed.close()
try:
    Grammar(template, given["bad_order"])
except ValueError as error:
    kept = error
while matchers():  # also where the error of what did not compile is kept
    pass
"""


@pytest.mark.vllm
def test_a_token_is_accepted_where_its_mask_allowed_it(tmp_path: Path) -> None:
    tokenizer = make_folder(tmp_path)
    tokens = [tokenizer.token_to_id(text) for text in ("a", "b", "<|im_end|>")]
    given = {
        "folder": str(tmp_path),
        "vocab_size": tokenizer.get_vocab_size(),
        "tokens": tokens,
        "order": order_of('start: "ab"', stop_token_ids=tokens[2:], cpu_s=1.0),
        "bad_order": order_of("start: unknown", stop_token_ids=tokens[2:], cpu_s=1.0),
    }
    subprocess.run(
        [os.environ["AREAL_SUB_VLLM_PYTHON"], "-c", CHECKS, json.dumps(given)],
        env={**os.environ, "PYTHONPATH": str(PLUGIN_FOLDER)},
        timeout=300,
        check=True,
    )
