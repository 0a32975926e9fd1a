"""GGUF: one file for llama.cpp, made by the public converter from a folder that has the stock layout.

The converter writes few types. Others are made of its 16 bits, experts' matrices and all others apart: the simple ones by the public
package (gguf_types.py), those in blocks of 256 (q4_k, ...) by llama.cpp's own quantiser (gguf_quantise.py), whose recipes choose a
type for each tensor. Where statistics are given, it weighs the columns of experts by the importance matrix that `--to imatrix` writes.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from ..checkpoints.inside import read_json
from ..checkpoints.skeleton import check_loadable, layouts_of, open_source, shape_in
from ..checkpoints.weight_files import is_adapter, other_weights
from ..engines.engines import ENGINES, last_words
from ..errors import CheckpointError, EngineError, OptionError
from ..files import step_towards, whole
from ..models.sizes import shape_of
from ..options import option
from .imatrix import ImportanceMatrix
from .stock import merged_first, nearest, stock_faults
from .target import target
from .whole_experts import parts_in

SCRIPT, RETYPE, QUANTISE = (
    Path(__file__).with_name(name) for name in ("gguf_run.py", "gguf_types.py", "gguf_quantise.py")
)
CONVERTED = ("f32", "f16", "bf16", "q8_0")  # by the converter itself
TYPES = (*CONVERTED, "q5_1", "q5_0", "q4_1", "q4_0")
RECIPES = (
    *(
        "q6_k",
        "q5_k_m",
        "q5_k_s",
        "q4_k_m",
        "q4_k_s",
        "iq4_xs",
        "iq4_nl",
        "q3_k_l",
        "q3_k_m",
        "q3_k_s",
        "iq3_s",
        "q2_k",
    ),
)
OF_EXPERTS = ("q6_k", "q5_k", "q4_k", "iq4_xs", "iq4_nl", "q3_k", "iq3_s", "q2_k")  # one type each, no recipe
AUTO = "auto"
LEFT = "left: "  # gguf_types.py says so of each matrix that it leaves as it is
GPT2 = {"type": "ByteLevel", "use_regex": True}  # a pre-tokenizer that is GPT-2's, in tokenizer.json


@target("gguf")
@dataclass(frozen=True)
class Gguf:
    """One file for llama.cpp, of a checkpoint in the stock layout."""

    kind: ClassVar[str] = "file"
    type: str = option(
        "bf16",
        f"of the numbers in a GGUF file: {', '.join(TYPES)}; or a recipe of llama.cpp's own quantiser: {', '.join(RECIPES)}",
        choices=(*TYPES, *RECIPES),
    )
    experts: str = option(
        None,
        f"type of experts' matrices, where another: {', '.join((*TYPES[1:], *OF_EXPERTS))}",
        choices=(*TYPES[1:], *OF_EXPERTS),
        kind=str,
    )
    statistics: str = option(
        None,
        "statistics of this checkpoint: llama.cpp's own quantiser weighs the columns of experts by them; default: it weighs none",
        kind=str,
    )
    pre_tokenizer: str = option(AUTO, "llama.cpp's name of the BPE pre-tokenizer, where the converter does not know it")

    def fault(self, model: Path) -> str:
        layouts = layouts_of(model)
        if is_adapter(model):
            return merged_first(model)
        if faults := stock_faults(model):
            return f"GGUF cannot hold {'; '.join(faults)}; {nearest(model)}"
        if others := other_weights(model):
            return f"the converter would read {others[0]} too, which is not what transformers loads; keep one of them"
        if not layouts:
            return ""
        present = dict.fromkeys(part for layout in layouts.values() for part in parts_in(layout))
        parts = " and ".join(present) or "Locum's containers"
        return (
            f"GGUF cannot hold {parts}; write whole experts first, which are larger but compute the same: "
            f"locum export {model} --to stock --out STOCK"
        )

    def write(self, model: Path, out: Path) -> str:
        """Raises CheckpointError where weights are missing, OptionError where the converter's environment is not there,
        and EngineError with the converter's own words where it fails."""
        _check_complete(model)
        engine = ENGINES["llamacpp"]
        python = engine.python()
        if python is None:
            raise OptionError(f"the converter to GGUF is {engine.absence}")
        named = _known_pre_tokenizer(model) if self.pre_tokenizer == AUTO else self.pre_tokenizer
        if self.statistics is not None or self.type in RECIPES or self.experts in OF_EXPERTS:
            return self._quantised(python, model, named, out)
        with whole(out) as scratch:
            if self.experts in (None, self.type) and self.type in CONVERTED:
                _convert(python, model, named, self.type, scratch)
                return f"GGUF in {self.type}"
            with step_towards(out) as wide:
                _convert(python, model, named, "bf16", wide)
                types = [self.type, self.experts or self.type]
                said = _run([str(python), "-P", str(RETYPE), str(wide), str(scratch.resolve()), *types], model, named)
            if not scratch.is_file():
                raise EngineError(f"{model} could not be converted to GGUF: nothing was written")
        left = [line.removeprefix(LEFT) for line in said.splitlines() if line.startswith(LEFT)]
        words = f", {len(left)} matrices in bf16 whose rows are no whole blocks, such as {left[0]}" if left else ""
        return f"GGUF, experts in {types[1]} and other matrices in {types[0]}{words}"

    def _quantised(self, python: Path, model: Path, named: str, out: Path) -> str:
        """By llama.cpp's own quantiser."""
        with (
            whole(out) as scratch,
            step_towards(out) as wide,
            step_towards(out.with_name(f"{out.name}.imatrix")) as file,
        ):
            command = [str(python), "-P", str(QUANTISE), str(wide), str(scratch.resolve()), self.type.upper()]
            if self.experts is not None:
                command += ["--experts", self.experts.upper()]
            if self.statistics is not None:
                weighing = ImportanceMatrix(self.statistics)
                weighing.write(model, file)
                command += ["--imatrix", str(file)]
            _convert(python, model, named, "bf16", wide)
            said = dict(line.split(": ", 1) for line in _run(command, model, named).splitlines() if ": " in line)
            if not scratch.is_file():
                raise EngineError(f"{model} could not be converted to GGUF: nothing was written")
        by = "by llama.cpp's own quantiser" + (" with an importance matrix" if self.statistics is not None else "")
        return f"GGUF {by}: of experts' matrices {said['experts']}, of others {said['others']}"


def _convert(python: Path, model: Path, named: str, type: str, out: Path) -> None:
    arguments = [str(model.resolve()), "--outfile", str(out.resolve()), "--outtype", type]
    said = _run([str(python), "-P", str(SCRIPT), named, *arguments], model, named)
    if not out.is_file():
        raise EngineError(f"{model} could not be converted to GGUF: {_reason(said, named)}")


def _run(command: list[str], model: Path, named: str) -> str:
    """What a program of the converter's environment printed. Raises EngineError with its own words where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise EngineError(f"{model} could not be converted to GGUF: {_reason(done.stderr, named)}")
    return done.stdout


def _check_complete(model: Path) -> None:
    """Refuse a folder that lacks weights: the converter does not notice, and llama.cpp names its own tensors."""
    source = open_source(model)
    check_loadable(model, source)
    found, described = shape_in(model, source).model.parameters, shape_of(source.model).parameters
    if found != described:
        raise CheckpointError(
            f"{model} has {found:,} parameters in its files, its config.json describes {described:,}: tensors are missing, "
            f"too many or of another shape; fetch it again"
        )


def _known_pre_tokenizer(model: Path) -> str:
    """ "gpt-2" for the pre-tokenizer of GPT-2, which many were trained anew with and the converter does not recognise."""
    file = model / "tokenizer.json"
    pre = read_json(file).get("pre_tokenizer") if file.is_file() else None
    return "gpt-2" if isinstance(pre, dict) and GPT2.items() <= pre.items() else ""


def _reason(said: str, named: str) -> str:
    if "pre-tokenizer was not recognized" in said and not named:
        return (
            "llama.cpp does not know the tokenizer; name the pre-tokenizer that it was trained with by --pre-tokenizer, such "
            "as gpt-2, qwen2 or llama-bpe (names as in llama.cpp's llama-vocab.cpp)"
        )
    lines = said.strip().splitlines()
    if any(line.startswith("Traceback") for line in lines):
        return lines[-1]  # before it only the places in the converter's files
    return last_words(said)
