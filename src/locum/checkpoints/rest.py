"""A finished checkpoint, the linear layers outside of its experts in few bits: attention, shared experts, dense layers, output head.

Experts, containers, routers, gates, embeddings and norms keep their bytes. What is packed is named by compressed-tensors' own
entry in config.json, which stands beside the containers where there are some (placing.py). Numbers are the nearest: calibration
sees experts alone.
"""

from __future__ import annotations

from pathlib import Path

from ..errors import OptionError
from ..files import check_room, whole
from ..formats.schemes import Scheme
from .application import complete_checkpoint
from .card import with_rest
from .compression import Compression
from .notes import notes_for_another, plan_of
from .read import load_tokenizer
from .rewrite import SHARD
from .side_files import side_files
from .skeleton import Source, open_source

AROUND = 2**20  # bytes of what is written beside the tensors
LOG = "recovery.jsonl"  # of a training


def rest_in(source: Source, scheme: Scheme) -> Compression:
    """What becomes of a checkpoint. No weight is read. Raises OptionError where there is nothing to put into the format."""
    if source.quantization:
        raise OptionError(
            "--rest puts numbers into few bits, and the checkpoint is quantised already; leave it out, or give the checkpoint that "
            "has numbers"
        )
    made = Compression(source, None, scheme)
    if not made.rest:
        why = f"rows are no whole groups of {scheme.columns}" if made.left else "there are none in its files"
        raise OptionError(
            f"--rest finds no linear layer outside of the experts to put into {scheme.words}: {why}; leave it out"
        )
    return made


def saved_bytes(source: Source, scheme: Scheme) -> int:
    """The bytes that it saves, to the byte: of the original and of whatever a plan makes of that, for plans touch experts alone."""
    return sum(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in source.headers.values()) - (
        rest_in(source, scheme).bytes
    )


def pack_rest(model: Path, scheme: Scheme, out: Path) -> None:
    """Write the checkpoint in the folder `model` to `out`, whole or not at all, its rest in few bits."""
    source, tokenizer = open_source(model), load_tokenizer(model)
    made, saved = rest_in(source, scheme), saved_bytes(source, scheme)
    words = f"{len(made.rest)} linear layers outside of the experts in {scheme.words}"
    if made.left:
        words += f"; {len(made.left)} stay numbers, whose rows are no whole groups, such as {made.left[0]}"
    notes = notes_for_another(model) | {"rest": {"format": scheme.words, "saved_bytes": saved, "left": len(made.left)}}
    card = with_rest((model / "README.md").read_text(encoding="utf-8"), made.bytes, words)
    check_room(out, made.bytes + AROUND + sum(file.stat().st_size for file in side_files(model)))
    log = model / LOG
    with whole(out, "folder") as folder:
        made.write(folder, SHARD)
        extra = [log] if log.is_file() else []
        complete_checkpoint(folder, tokenizer, plan_of(model), card, model, notes, extra)
