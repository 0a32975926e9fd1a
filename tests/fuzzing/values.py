"""Senseless values for the command line: every option and argument of every command, from the commands' own parameters."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from random import Random

import click

from locum.cli import cli
from locum.cli.parameters import Choice
from locum.methods import TARGETED, SearchingMethod

from .world import CALIBRATE, RECOVER, SEARCH, SHORT

# A line of every command that works. `demo` would take a minute, so it is one that is refused after all else was looked at.
LINES = {
    "inspect": "inspect model --json",
    "calibrate": f"{CALIBRATE} --out out.safetensors --json",
    "search": f"{SEARCH} --out out.safetensors --json",
    "list": "list --json",
    "show": "show lightmoe --json",
    "demo": "demo --steps 0 --out out --json",
    "plan": "plan stats.safetensors --remove 0.4 --rank 2 --out out.json --json",
    "frontier": "frontier auto.safetensors --points 2 --out out.json --json",
    "apply": "apply model --plan plan.json --out out --json",
    "compress": f"compress model --data words.txt {SHORT} --remove 0.4 --rank 2 --out out --json",
    "recover": f"{RECOVER} --out out --json",
    "eval": "eval small --data words.txt --length 64 --tokens 512 --resamples 20 --out out.jsonl --json",
    "verify": "verify small --engine transformers --prompts 1 --new-tokens 1 --long-tokens 1 --json",
    "compare": f"compare model --data words.txt {SHORT} --measured 128 --methods mone --remove 0.5 --seeds 1 --out out --json",
    "bench": "bench pruned --prompt 4 --new-tokens 2 --batch-sizes 1 --rounds 1 --out out.json --json",
    "report": "report results.jsonl --out out.html --json",
    "export": "export small --to stock --out out --json",
    "clean": "clean out --json",
}
WORKING = {line for name, line in LINES.items() if name != "demo"}
SLOW = ("verify", "bench")  # each starts processes of its own that import everything: drawn an eighth as often
NOT_TRIED = (("demo", "steps"),)  # what it accepts takes a minute


def _words(text: str) -> list[str]:
    return text.split()


NUMBERS = (
    *_words("0 -1 1 2 7 0.5 -0.0 1e3 1e308 1e-320 1e999 nan inf -inf +3 0x10 1_000 ٣ 1,5 5% one 2147483647 2147483648"),
    *("", " 5", "9223372036854775808", "1" + "0" * 30, "9" * 5000),
)
TEXTS = (
    *_words(
        "x None null 🦊 \u202eabc [red]x[/red] %s {} - -- --out \udcff a=b=c ../x 0 -1 nan é e\u0301 a,b , ; $(x) *"
    ),
    *("auto", "all", "cpu", "test", "", " ", "a" * 5000, "a\nb", "\x1b[31m"),
)
PATHS = (
    *_words("nowhere model small adapter plan.json stats.safetensors words.txt results.jsonl dataset . odd pipe loop"),
    *_words(
        "dangling model/config.json/x \udcff 🦊 - [b] /proc/nowhere/out model/out out/deep/down words.txt/ ./model/"
    ),
    *("model/../model", "empty", "file:///x", "http://x", "", "a" * 300, "a/" * 3000, "a\nb"),
)
SPECIAL = {
    "device": _words("cuda cuda:0 cuda:99 cpu:7 meta mps xla cpu: :0 CPU vulkan privateuseone"),
    "fit": ["1 TiB", "300 kB", *_words("1GiB -1GiB nanGiB infGiB 1e400GiB 0 1 GiB 1GB 1e-9GiB 100% 200KiB")],
    "data": _words("words.txt@nan words.txt@-1 words.txt@0 words.txt@1e400 @ = a= =words.txt a=words.txt@2"),
    "engine": _words("transformers,transformers vllm llamacpp ,transformers Transformers"),
    "tasks": _words("locum_piqa arc_easy a,b , none"),
    "precision": _words("fp32 bf16 fp16 fp8 int8 FP32"),
    "also": _words("input_gram hidden_gram gate dropped"),
}


@dataclass(frozen=True)
class Typed:
    """A command line with one senseless value, the line that it was made from, and what is senseless."""

    arguments: tuple[str, ...]
    line: str
    words: str


def oddities(folder: Path) -> None:
    """What PATHS names and no copy of the world can hold."""
    (folder / "empty").mkdir(exist_ok=True)
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to("loop")
    (folder / "dangling").symlink_to("nothing-there")


def typed(draw: Random) -> Typed:
    """A command line with a value that was drawn for one of its parameters."""
    tried = {name: [p for p in cli.commands[name].params if _is_tried(name, p)] for name in cli.commands}
    shares = [(1 + len(parameters)) / (8 if name in SLOW else 1) for name, parameters in tried.items()]
    name = draw.choices(list(tried), shares)[0]
    command, line, parameters = cli.commands[name], LINES[name], tried[name]
    words = shlex.split(line)
    if command.choices and draw.random() < 0.6:
        choice = draw.choice(command.choices)
        thing = draw.choice([n for n, cls in choice.registry.items() if choice.offers(cls)])
        line = _with(line, choice, thing)
        words, parameters = shlex.split(line), choice.options(thing) or parameters
    parameter = draw.choice(parameters)
    if isinstance(parameter, click.Argument):
        value = draw.choice(TEXTS if name in ("show", "list") else PATHS)
        count = draw.choice((1, 1, 2))
        words[1:2] = [value] * count
        return Typed(tuple(words), line, f"{parameter.name} is {value[:60]!r}{', twice' if count == 2 else ''}")
    return Typed((*words, *(given := _given(parameter, draw))), line, " ".join(g[:60] for g in given))


def _is_tried(command: str, parameter: click.Parameter) -> bool:
    return parameter.name != "as_json" and (command, parameter.name) not in NOT_TRIED


def _with(line: str, choice: Choice, thing: str) -> str:
    """A line with one name of a choice, and with what a method of that name needs."""
    cls = choice.registry[thing]
    if choice.option == "recover":
        return f"{line} --recover {thing} --recover-steps 2 --recover-length 64"
    if choice.option == "method":
        if cls.saves not in TARGETED:
            line = line.replace(" --remove 0.4", "")
        if line.startswith("plan"):
            searches = isinstance(cls(), SearchingMethod)
            line = line.replace("stats.safetensors", "searched.safetensors") if searches else line
            line += " --model model" if cls().reads_weights else ""
    return f"{line} --{choice.option} {thing}"


def _given(option: click.Parameter, draw: Random) -> list[str]:
    """An option with a value, or with what should not stand there."""
    flags = [*option.opts, *option.secondary_opts]
    flag = draw.choice(flags)
    way = draw.choices(("value", "no value", "misspelt", "twice"), (80, 4, 6, 10))[0]
    if getattr(option, "is_flag", False):
        return {
            "value": [flag],
            "no value": [f"{flag}=x"],
            "misspelt": [flag + "s"],
            "twice": draw.choices(flags, k=2),
        }[way]
    first, second = _value(option, draw), _value(option, draw)
    return {
        "value": [flag, first],
        "no value": [flag],
        "misspelt": [flag[:-1], first],
        "twice": [flag, first, flag, second],
    }[way]


def _value(option: click.Parameter, draw: Random) -> str:
    if option.name in SPECIAL and draw.random() < 0.5:
        return draw.choice(SPECIAL[option.name])
    usual = TEXTS
    if isinstance(option.type, click.Path) or option.name == "data":
        usual = PATHS
    elif option.type in (click.INT, click.FLOAT):
        usual = NUMBERS
    return draw.choice(usual if draw.random() < 0.9 else NUMBERS + TEXTS + PATHS)
