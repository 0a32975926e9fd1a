"""Tiny checkpoint folders with a real tokenizer, text to go with them, and the command line in process."""

from __future__ import annotations

import json
import random
import shlex
from pathlib import Path

from click.testing import CliRunner, Result
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from locum.cli import cli
from making.tiny_models import tiny_model

VOCABULARY = 320
WORDS = ["the", "red", "fox", "ran", "over", "blue", "hills", "and", "then", "slept", "under", "seven", "old", "trees"]


def text(seed: int, characters: int) -> str:
    """Paragraphs of plain words, the same for the same seed."""
    draw, paragraphs, length = random.Random(seed), [], 0
    while length < characters:
        sentences = [" ".join(draw.choices(WORDS, k=draw.randint(4, 9))).capitalize() + "." for _ in range(8)]
        paragraphs.append(" ".join(sentences))
        length += len(paragraphs[-1]) + 2
    return "\n\n".join(paragraphs)


def write_text(path: Path, characters: int = 60_000, seed: int = 0) -> Path:
    path.write_text(text(seed, characters), encoding="utf-8")
    return path


def write_rows(path: Path, rows: int = 60, seed: int = 1) -> Path:
    path.write_text("".join(json.dumps({"text": text(seed + i, 900)}) + "\n" for i in range(rows)), encoding="utf-8")
    return path


def write_tokenizer(folder: Path, seed: int = 0) -> None:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|pad|>", "<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([text(seed, 4000)], trainer)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", pad_token="<|pad|>").save_pretrained(folder)


def write_checkpoint(folder: Path, model_type: str = "olmoe", seed: int = 0, **changes: object) -> Path:
    """A tiny model as `save_pretrained` writes it, with a tokenizer that has as many tokens."""
    changes = {"vocab_size": VOCABULARY, "max_position_embeddings": 512} | changes
    tiny_model(model_type, seed=seed, **changes).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def locum(*arguments: object) -> Result:
    """Run the command line in process. An error that Locum does not know is raised, as a traceback would be shown."""
    words = shlex.split(arguments[0]) if len(arguments) == 1 else [str(argument) for argument in arguments]
    return CliRunner().invoke(cli, words, prog_name="locum", catch_exceptions=False)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file and folder below a folder, hidden ones too, with its content."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in sorted(folder.rglob("*"))}
