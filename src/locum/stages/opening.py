"""Opening a checkpoint to be run: whole, or with one decoder layer in memory at a time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import torch
from transformers import PreTrainedModel

from .. import ranks
from ..checkpoints.load import load_model
from ..checkpoints.read import read_config
from ..checkpoints.skeleton import layouts_of, read_shape
from ..checkpoints.streamed import stream_model
from ..checkpoints.weight_files import is_adapter, shard_files
from ..errors import OptionError, UnsupportedModel
from ..files import describe_size
from ..formats.plain import COMPUTE_DTYPES
from ..measure.memory import free_bytes
from .options import Help

logger = logging.getLogger(__name__)

Stream = Annotated[
    bool | None,
    Help(
        "hold one decoder layer in memory at a time; default: where the checkpoints do not fit into the memory that is free"
    ),
]


Precision = Annotated[str, Help("numbers to compute in: auto (as the checkpoint has them), fp32, bf16 or fp16")]
LARGE = 10**9  # parameters


def dtype_of(precision: str) -> torch.dtype | None:
    """What a name means; None for that of the checkpoint. Raises OptionError for any other name."""
    if precision not in ("auto", *COMPUTE_DTYPES):
        raise OptionError(f"--precision is {precision!r}; allowed: auto, {', '.join(COMPUTE_DTYPES)}")
    return COMPUTE_DTYPES.get(precision)


def is_to_stream(models: Sequence[Path], stream: bool | None, device: str, dtype: torch.dtype | None = None) -> bool:
    """Whether these checkpoints, which are open at the same time, are streamed: as asked, else, with a word, where they do not
    fit, in each of several ranks. This is the rule of every stage that runs a model."""
    if stream is not None:
        return stream
    size, free = (
        sum(_bytes_in_memory(Path(model), dtype) for model in models if not is_adapter(model)),
        free_bytes(device),
    )
    streamed = ranks.told(size > free)
    if streamed and ranks.is_first():
        names = " and ".join(dict.fromkeys(str(model) for model in models))
        logger.warning(
            "%s would take %s of memory, and %s are free: one decoder layer is there at a time (--stream); --no-stream holds all of "
            "it",
            names,
            describe_size(size),
            describe_size(free),
        )
    return streamed


def _bytes_in_memory(model: Path, dtype: torch.dtype | None) -> int:
    """What a live model takes: as much as its files, or, quantised or in another dtype, as its numbers do."""
    if dtype is not None:
        return read_shape(model).model.parameters * dtype.itemsize
    on_disk = sum(file.stat().st_size for file in shard_files(model))
    config = read_config(model)
    if not hasattr(config, "quantization_config") and not hasattr(config.get_text_config(), "quantization_config"):
        return on_disk
    shape = read_shape(model)
    return max(on_disk, shape.model.parameters * shape.expert_itemsize)


def open_to_run(
    model: Path,
    streamed: bool,
    device: str,
    whole: Callable[..., PreTrainedModel] = load_model,
    dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """A live model, in this dtype or that of the checkpoint. `whole` opens it where it is not streamed."""
    live = stream_model(model, device, dtype) if streamed else whole(model, dtype=dtype or "auto", device=device)
    halves = live.dtype in (torch.bfloat16, torch.float16) and live.device.type == "cpu"
    known = torch.backends.mkldnn.is_available()  # where it is not, nobody says what the processor has
    if halves and known and live.num_parameters() > LARGE and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        logger.warning(
            "this processor has no products of 16-bit numbers: --precision fp32 is many times as fast, in twice the memory"
        )
    return live


def check_stock(model: Path) -> None:
    """Refuse to stream a pruned checkpoint into stock experts, which its containers become only in a whole model."""
    if layouts_of(model):
        raise UnsupportedModel(
            f"{model} is pruned to unequal numbers of experts; it is looked at whole: give --no-stream, or the original"
        )
