"""A checkpoint of a real config with random weights, written a tensor at a time: no model is built, so it may be of any size.

python -m benchmarks.bigger.checkpoint FOLDER --layers 16     OLMoE-1B-7B's shape, 0.8 GB of bfloat16 a layer
python -m benchmarks.bigger.checkpoint FOLDER --model qwen3_moe --size num_experts=128 --size hidden_size=2048 ...
"""

from __future__ import annotations

import argparse
import math
import shutil
from pathlib import Path

import torch
from transformers import AutoConfig

from locum.bundled import MODEL
from locum.checkpoints.rewrite import SHARD
from locum.checkpoints.shard_writer import Entry, ShardWriter
from locum.checkpoints.skeleton import skeleton
from locum.formats.plain import ENTRIES
from locum.models.conversions import as_in_files

OLMOE = {"intermediate_size": 1024, "num_experts": 64, "num_experts_per_tok": 8}  # the rest are the class's defaults
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def random_checkpoint(folder: Path, model_type: str, sizes: dict[str, int], limit: int = SHARD, seed: int = 0) -> int:
    """Write such a checkpoint, with the bundled tokenizer. Returns the bytes of its tensors."""
    model = skeleton(AutoConfig.for_model(model_type, dtype="bfloat16", **sizes))
    tied = model.all_tied_weights_keys
    tensors = as_in_files(model, {name: t for name, t in model.state_dict().items() if name not in tied})
    entries = {name: Entry(ENTRIES[t.dtype], tuple(t.shape), t.nbytes) for name, t in tensors.items()}
    folder.mkdir(parents=True)
    writer, generator = ShardWriter(folder, entries, limit), torch.Generator().manual_seed(seed)
    for name, tensor in tensors.items():
        row = 0
        for rows in torch.empty(tensor.shape, device="meta").split(max(1, 2**24 // math.prod(tensor.shape[1:]))):
            values = torch.randn(rows.shape, generator=generator, dtype=torch.float32).mul_(0.02).to(tensor.dtype)
            data = memoryview(values.reshape(-1).view(torch.uint8).numpy())
            writer.write(name, [data], row)
            row += len(data)
    writer.finish()
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    for name in TOKENIZER:
        if (MODEL / name).is_file():
            shutil.copyfile(MODEL / name, folder / name)
    return sum(entry.nbytes for entry in entries.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="olmoe", help="model type")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--size", action="append", default=[], help="NAME=NUMBER, an entry of the config")
    options = parser.parse_args()
    sizes = OLMOE if options.model == "olmoe" else {}
    given = {name: int(value) for name, _, value in (size.partition("=") for size in options.size)}
    size = random_checkpoint(options.folder, options.model, sizes | {"num_hidden_layers": options.layers} | given)
    print(f"{options.folder}: {size:,} bytes of tensors")


if __name__ == "__main__":
    main()
