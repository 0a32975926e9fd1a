"""Which files of a checkpoint's folder are its weights: those that transformers loads, and so the ones that are counted.

    vectors.safetensors            in a folder of Locum's that needs a base (patch.py); else
    what config.json names         under `transformers_weights`: a safetensors file or an index; else
    model.safetensors              also where there is an index; else
    model.safetensors.index.json   whose shards they are

A folder from which transformers would load anything else is refused.
"""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import CheckpointError, UnsupportedModel
from .inside import check_links, named_file, read_json

ADAPTER = "vectors.safetensors"  # instead of weights, in a folder that needs a base
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
NAMED_BY = "transformers_weights"  # the entry of config.json
PEFT = "adapter_config.json"  # transformers puts such an adapter into the model beside it
DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")  # which it loads in place of all others


def is_adapter(path: str | Path) -> bool:
    """Whether a folder holds vectors and routers alone, over the weights of a base."""
    return (Path(path) / ADAPTER).is_file()


def shard_files(path: Path) -> list[Path]:
    """The safetensors files that a checkpoint's weights are loaded from, in their order; raises where one is missing."""
    check_links(path)
    if is_adapter(path):
        return [path / ADAPTER]
    _check_alone(path)
    config = path / "config.json"
    if (named := read_json(config).get(NAMED_BY) if config.is_file() else None) is not None:
        file = named_file(path, named, f"{config}, {NAMED_BY},")
        if not file.name.endswith((".safetensors", ".safetensors.index.json")) or not file.is_file():
            raise CheckpointError(
                f"{config}: {NAMED_BY} is {named!r}; expected a safetensors file or an index of some, in the same folder"
            )
        return _shards_of(file) if file.name.endswith(".json") else [file]
    if (path / WEIGHTS).is_file():
        if (path / INDEX).is_file():
            read_json(path / INDEX)  # transformers does not look at it, but other engines go by it
        return [path / WEIGHTS]
    if (path / INDEX).is_file():
        return _shards_of(path / INDEX)
    if any(path.glob("*.bin")):
        raise CheckpointError(f"{path} holds .bin weights, which can run code when loaded; convert them to safetensors")
    raise CheckpointError(f"{path} has no {WEIGHTS} and no {INDEX}; fetch its weights")


def _check_alone(path: Path) -> None:
    """Refuse what transformers would load instead of the weights, or on top of them."""
    if (path / PEFT).is_file():
        raise UnsupportedModel(
            f"{path} holds an adapter of PEFT ({PEFT}) beside the model, which transformers would put into it; merge it "
            f"first (merge_and_unload) and save the whole, or move its files away"
        )
    if found := next(
        (file.name for file in sorted(path.glob("shard-*.safetensors")) if DISTRIBUTED.match(file.name)), ""
    ):
        raise UnsupportedModel(
            f"{path} holds a distributed checkpoint ({found}), which transformers would load instead of other files; save "
            f"it whole, by save_pretrained, or move its files away"
        )


def _shards_of(index: Path) -> list[Path]:
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
    except (KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index} names no files in a 'weight_map'; download it again") from error
    if not names:
        raise CheckpointError(f"{index} names no files in its 'weight_map'; download it again")
    files = [named_file(index.parent, name, str(index)) for name in names]
    if missing := next((file.name for file in files if not file.is_file()), ""):
        raise CheckpointError(f"{index.parent} lacks shard {missing} that its index names; download it again")
    return files


def other_weights(path: Path) -> list[str]:
    """Names of weights in the folder, of a whole model, that are not loaded: other engines may read them instead."""
    used = {file.name for file in shard_files(path)}
    return sorted(file.name for file in path.glob("model*.safetensors") if file.name not in used)
