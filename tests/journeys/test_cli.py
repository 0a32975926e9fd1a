"""The command line: its lines work as documented, say the same as Python, and its options are what they are."""

from __future__ import annotations

import inspect
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
import torch
from safetensors import safe_open

import locum
from locum.cli import cli
from locum.cli.parameters import HIDDEN
from locum.exports.target import TARGETS
from locum.methods import METHODS
from locum.options import option_fields
from locum.stages.planning import plan
from locum.training.options import Recovery
from locum.training.ways import WAYS
from making.checkpoints import locum as command
from making.checkpoints import write_checkpoint, write_rows, write_text

# Wide enough for the default rank of 16 at half of the parameters. Three steps stand for the 300 of real use.
WIDE = {"hidden_size": 128, "intermediate_size": 128, "num_experts": 16}
LINES = """
locum inspect PATH --json
locum calibrate PATH --data code=a.txt --data prose=b.jsonl --tokens 65536 --out stats.safetensors
locum plan stats.safetensors --method lightmoe --remove 0.5 --out plan.json
locum apply PATH --plan plan.json --out small
locum compress PATH --method prune --score reap --data a.txt --remove 0.25 --out pruned
locum compress PATH --method replace --no-shared --data a.txt --remove 0.5 --out replaced
locum recover small --original PATH --how annealed --data a.txt --steps 3 --seed 0 --out recovered
locum recover pruned --how lora --data a.txt --steps 3 --seed 0 --out pruned-recovered
locum eval recovered --against PATH --data code=a.txt --out results.jsonl
locum report results.jsonl --out report.html
locum search PATH --data a.txt --tokens 2048 --sample 256 --generations 3 --population 8 --seed 1 --out found
locum list --json
"""
# Every command and option. A change here is a change for users: say it in the changelog.
RANKS = "--exponent --minimum --multiple --start"
RANKED = "--budget --distinct --floor --multiple --protect --score"
SEARCH = f"{RANKS} --block --candidates --counts --decompose --generations --importance --population --pruned"
METHOD_OPTIONS = {
    "auto": "--checks --costs --draw --noise --only --price --prior --protect --protect-domains --seed --serves",
    "block-drop": "--keep",
    "compressed-experts": "--main --renormalise --vectors",
    "con-moe": "--alike --score",
    "d2-moe": "--align --multiple --score --start",
    "decompose": f"{RANKS} --score",
    "expert-slimming": "--mask --pattern --share",
    "layer-drop": "--keep",
    "dek": "--alike --align --linkage --score",
    "diep": "--floor --mass --protect --steps",
    "eep": "--generations --mergings --most --population --seed",
    "groups": "--groups --open",
    "hc-smoe": "--align --linkage --over --score",
    "hope": f"{RANKED} --solver",
    "lightmoe": "--align --alpha --bases --clip --grouping --rank --score --selection --start",
    "lor-experts": "--align --linkage --rank --score --start",
    "m-smoe": "--align --budget --score",
    "merge-moe": "--align --fit --score",
    "moe-i2": f"{SEARCH} --seed",
    "mobe": "--bases --multiple",
    "moe-svd": "--layers --multiple --start --trim",
    "mone": RANKED,
    "narrow": "--budget --columns --minimum --multiple",
    "prune": f"{RANKED} --lower-top-k",
    "naee": "--limit --most --seed",
    "leave-one-out": f"{RANKED} --curve --lower-top-k --seed",
    "ream": "--align --group-size --rows --score",
    "res-moe": "--multiple",
    "skip": "--beside --mean-experts --renormalise --threshold",
    "top-p": "--mean-experts --of --p --renormalise",
    "stun": "--apart --together",
    "sub-moe": "--align --linkage --score",
    "replace": "--alpha --clip --rank --score --selection --shared --start",
}
WAY_OPTIONS = {
    "annealed": "--annealing --end-fraction --keep-size --rank --steepness --train-bases",
    "kd": "--keep-size --rank --share --temperature --top-logits --train-bases",
    "layerwise": "--closed-form --keep-size --rank --routers --train-bases",
    "esft": "--score --threshold",
    "experts": "",
    "full": "",
    "lora": "--keep-size --rank --train-bases",
    "router": "",
    "router-kd": "--share --temperature --top-logits",
    "seer": "--end-fraction --keep-size --rank --train-bases",
    "smola": "--experts --rank --set",
    "vectors": "",
}
TARGET_OPTIONS = {
    "compressed-tensors": "--bits --group --rest --statistics",
    "dense": "",
    "gguf": "--experts --pre-tokenizer --statistics --type",
    "imatrix": "--statistics",
    "remote-code": "",
    "stock": "",
    "vllm": "",
}
COMMANDS = {
    "apply": "MODEL --dry-run --force --json --out --plan --seed --shard-size --statistics",
    "bench": "MODEL --against --batch-sizes --device --engine --force --gguf --json --new-tokens --out --picture --precision --prompt "
    "--rounds --threads",
    "calibrate": "MODEL --also --batch-size --data --device --dry-run --force --gram --json --length --out --precision --seed "
    "--split --stream --tokens",
    "clean": "[OUTPUTS]... --json",
    "compare": "MODEL --batch-size --bits --data --device --force --json --leave-out --length --measured --methods --out --precision "
    "--recover --remove --seed --seeds --stream --tokens",
    "compress": "MODEL --batch-size --bits --data --device --dry-run --fit --force --group --json --length --method --out --preset "
    "--quantiser --recover --remove --rest --rounds --sample --seed --statistics --tokens",
    "demo": "--force --json --out --steps",
    "eval": "MODEL --against --append --batch-size --card --data --device --dry-run --force --json --length --limit --name "
    "--out --precision --resamples --seed --split --stream --task-path --tasks --tokens",
    "export": "MODEL --force --json --out --to",
    "frontier": "STATISTICS --force --json --method --out --picture --points --preset",
    "inspect": "MODEL --json",
    "list": "[KIND] --json",
    "plan": "STATISTICS... --bits --diff --fit --force --group --json --method --model --onto --out --preset --quantiser "
    "--remove",
    "recover": "MODEL --accumulate --adapter-only --alignment --balance --batch-size --checkpoint-every --checkpointing --clip --data "
    "--device --dry-run --entropy --force --how --json --learning-rate --length --original --out --p-penalty --patience "
    "--precision --restart --running-balance --schedule --seed "
    "--statistics --steps --stream --validate-every --validation-tokens --warmup-fraction --weight-decay",
    "report": "RESULTS... --force --json --out --title",
    "search": "MODEL --batch-size --data --device --dry-run --force --json --length --method --out --preset --sample --seed "
    "--split --stream --tokens",
    "show": "NAME --json",
    "verify": "MODEL --device --engine --json --long-tokens --new-tokens --original --precision --prompts --seed --statistics",
}
FUNCTIONS = {
    "apply": locum.apply,
    "bench": locum.bench,
    "calibrate": locum.calibrate,
    "clean": locum.clean,
    "compare": locum.compare,
    "compress": locum.compress,
    "demo": locum.demo,
    "eval": locum.evaluate,
    "export": locum.export,
    "frontier": locum.frontier,
    "inspect": locum.inspect,
    "list": locum.catalogue,
    "plan": locum.plan,
    "recover": locum.recover,
    "report": locum.report,
    "search": locum.search,
    "show": locum.show,
    "verify": locum.verify,
}
CHOOSING = ("compress", "frontier", "plan", "search")  # with --method
CHOICES = {
    **{name: ["method"] for name in CHOOSING},
    "compare": ["recover"],
    "compress": ["method", "recover"],
    "export": ["to"],
    "recover": ["how"],
}


@pytest.fixture(scope="module")
def journey(tmp_path_factory):
    """The documented lines in one folder, and the same from Python in another: folders and what each line said."""
    folders = [tmp_path_factory.mktemp(name) for name in ("lines", "python")]
    here = Path.cwd()
    try:
        for folder in folders:
            os.chdir(folder)
            write_checkpoint(Path("PATH"), **WIDE)
            write_text(Path("a.txt"))
            write_rows(Path("b.jsonl"))
        os.chdir(folders[0])
        said = [command(line.removeprefix("locum ")) for line in LINES.strip().splitlines()]
        os.chdir(folders[1])
        returned = python_calls()
    finally:
        os.chdir(here)
    return *folders, said, returned


def python_calls():
    """LINES, from Python."""
    shape = locum.inspect("PATH")
    data = ["code=a.txt", "prose=b.jsonl"]
    statistics = locum.calibrate("PATH", data=data, tokens=65536, out="stats.safetensors")
    plan = locum.plan("stats.safetensors", method="lightmoe", remove=0.5, out="plan.json")
    locum.apply("PATH", plan="plan.json", out="small")
    locum.compress("PATH", method="prune", score="reap", data="a.txt", remove=0.25, out="pruned")
    locum.compress("PATH", method="replace", shared=False, data="a.txt", remove=0.5, out="replaced")
    recovered = locum.recover("small", original="PATH", how="annealed", data="a.txt", steps=3, seed=0, out="recovered")
    locum.recover("pruned", how="lora", data="a.txt", steps=3, seed=0, out="pruned-recovered")
    rows = locum.evaluate("recovered", against="PATH", data="code=a.txt", out="results.jsonl")
    locum.report("results.jsonl", out="report.html")
    quick = {"tokens": 2048, "sample": 256, "generations": 3, "population": 8}
    locum.search("PATH", data="a.txt", seed=1, out="found", **quick)
    return {
        "inspect": shape,
        "statistics": statistics,
        "plan": plan,
        "recover": recovered,
        "rows": rows,
        "list": locum.catalogue(),
    }


def test_every_documented_line_works(journey):
    folder, _, said, _ = journey
    for line, result in zip(LINES.strip().splitlines(), said, strict=True):
        assert result.exit_code == 0, f"{line}\n{result.stderr}"
        assert result.stderr == "", line
        assert result.stdout.strip(), line
    written = {path.name for path in folder.iterdir()}
    assert written == {
        *("PATH", "a.txt", "b.jsonl", "stats.safetensors", "plan.json", "small", "pruned", "replaced"),
        *("recovered", "pruned-recovered", "results.jsonl", "report.html", "found"),
    }
    for name in ("small", "pruned", "replaced", "recovered", "pruned-recovered"):
        files = {"config.json", "model.safetensors", "tokenizer.json", "plan.json", "locum.json", "README.md"}
        assert files <= {path.name for path in (folder / name).iterdir()}
    assert (folder / "recovered" / "recovery.jsonl").is_file()


def test_python_does_the_same(journey):
    folder, other, said, returned = journey
    assert json.loads(said[0].stdout) == returned["inspect"]
    assert json.loads(said[-1].stdout) == json.loads(json.dumps(returned["list"]))
    one, two = (locum.load_statistics(f / "stats.safetensors") for f in (folder, other))
    assert one.domains == two.domains == returned["statistics"].domains == ("code", "prose")
    for layer, named in one.layers.items():
        for name, tensor in named.items():
            assert torch.equal(tensor, two.layers[layer][name])
            assert torch.equal(tensor, returned["statistics"].layers[layer][name])
    found = [locum.load_statistics(f / "found").layers for f in (folder, other)]
    for layer, named in found[0].items():
        assert all(torch.equal(tensor, found[1][layer][name]) for name, tensor in named.items())
    assert locum.load_plan(folder / "plan.json").layers == returned["plan"].layers
    for name in ("small", "pruned", "replaced", "recovered", "pruned-recovered"):
        for part in ("model.safetensors", "config.json", "tokenizer.json"):
            assert (folder / name / part).read_bytes() == (other / name / part).read_bytes(), f"{name}/{part}"
    lines = [(f / "results.jsonl").read_text().splitlines() for f in (folder, other)]
    rows = [
        [{k: v for k, v in json.loads(x).items() if k in ("metric", "value", "low", "n")} for x in p] for p in lines
    ]
    assert rows[0] == rows[1]
    assert [row.value for row in returned["rows"]] == [row["value"] for row in rows[0]]


def test_inspect_says_what_it_must(journey):
    result = json.loads(journey[2][0].stdout)
    assert {"model_type", "layers", "parameters", "bytes", "expert_parameters"} <= set(result)
    layer = {"name", "num_experts", "top_k", "hidden_size", "expert_width", "router", "shared_experts"}
    for entry in result["layers"]:
        assert layer <= set(entry)
    assert (result["model_type"], len(result["layers"])) == ("olmoe", 2)
    assert result["expert_parameters"] == 2 * 16 * 3 * 128 * 128
    assert result["bytes"] == 4 * result["parameters"]
    with safe_open(journey[0] / "PATH" / "model.safetensors", "pt") as file:
        assert result["parameters"] == sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118


def test_results_rows_say_what_they_must(journey):
    rows = [json.loads(line) for line in (journey[0] / "results.jsonl").read_text().splitlines()]
    fields = {"model", "plan", "metric", "domain", "value", "low", "high", "n", "seed", "seconds", "peak_bytes"}
    for row in rows:
        assert fields | {"provenance"} <= set(row)
    assert {"loss", "bits_per_byte", "kl", "top1_agreement"} <= {row["metric"] for row in rows}
    assert {row["model"] for row in rows} == {"original", "recovered"}
    stages_ = {row["model"]: row["provenance"]["stage"] for row in rows}
    assert stages_ == {"original": "original", "recovered": "recovered"}
    sizes = {row["model"]: row["provenance"]["expert_parameters"] for row in rows}
    assert (
        sizes["recovered"]
        == locum.load_plan(journey[0] / "plan.json").size(locum.read_shape(journey[0] / "PATH")).expert_parameters
    )
    assert sizes["original"] == 2 * 16 * 3 * 128 * 128


def test_what_was_promised_is_on_disk(journey):
    folder = journey[0]
    shape = locum.read_shape(folder / "PATH")
    for name in ("small", "pruned", "replaced"):
        promised = locum.load_plan(folder / name / "plan.json").size(shape)
        found = locum.inspect(folder / name)
        assert (found["parameters"], found["bytes"]) == (promised.parameters, promised.bytes)
        assert found["expert_parameters"] == promised.expert_parameters
        assert found["compressed"] == (name != "pruned")


@pytest.mark.parametrize(
    "line",
    [
        "inspect {checkpoint}",
        "calibrate {checkpoint} --data {words} --tokens 256 --length 64 --out {out}",
        "plan {statistics} --remove 0.4 --rank 2",
        "plan {statistics} --method prune --remove 0.25 --out {out}",
        "plan --diff {plan} {plan}",
        "apply {checkpoint} --plan {plan} --out {out}",
        "compress {checkpoint} --data {words} --tokens 256 --length 64 --method prune --remove 0.2 --out {out}",
        "recover {small} --data {words} --steps 1 --batch-size 1 --length 64 --out {out}",
        "eval {small} --data {words} --tokens 128 --length 64 --resamples 2 --out {out}",
        "list",
        "list methods",
        "show mone",
    ],
)
def test_json_on_stdout_is_nothing_but_json(line, checkpoint, words, statistics_file, plan_file, small, tmp_path):
    places = {"checkpoint": checkpoint, "words": words, "statistics": statistics_file, "plan": plan_file}
    result = command(line.format(**places, small=small, out=tmp_path / "out") + " --json")
    assert result.exit_code == 0, result.stderr
    json.loads(result.stdout)
    assert result.stderr == ""


def test_diff_of_plans(statistics_file, plan_file, tmp_path):
    other = tmp_path / "other.json"
    assert command("plan", statistics_file, "--method", "prune", "--remove", "0.25", "--out", other).exit_code == 0
    same = command("plan", "--diff", plan_file, plan_file)
    assert same.stdout == "the plans do the same\n"
    lines = command("plan", "--diff", plan_file, other).stdout.splitlines()
    assert any(" expert " in line and "-> dropped" in line for line in lines)
    assert lines == locum.diff(plan_file, other)
    wrong = command("plan", "--diff", plan_file)
    assert (wrong.exit_code, wrong.stderr.count("\n")) == (2, 1)
    assert "two plan files" in wrong.stderr


@pytest.mark.journeys
def test_python_dash_m(checkpoint):
    run = subprocess.run([sys.executable, "-m", "locum", "inspect", checkpoint], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "olmoe: 51,968 parameters" in run.stdout
    assert run.stderr == ""


def test_version_and_help():
    assert command("--version").stdout.startswith("locum, version ")
    for name in ("--help", *(f"{name} --help" for name in COMMANDS)):
        result = command(name)
        assert result.exit_code == 0
        assert result.stdout.startswith("Usage: locum")


# --- options --------------------------------------------------------------------------------------------------------


def test_commands_and_options_are_frozen():
    found = {}
    for name, item in cli.commands.items():
        options = [max(p.opts, key=len) for p in item.params if isinstance(p, click.Option)]
        arguments = [p.make_metavar(click.Context(item)) for p in item.params if isinstance(p, click.Argument)]
        found[name] = sorted([*options, *arguments])
    assert found == {name: sorted(options.split()) for name, options in COMMANDS.items()}
    assert {
        n: [choice.option for choice in item.choices] for n, item in cli.commands.items() if item.choices
    } == CHOICES
    for registry, frozen in ((METHODS, METHOD_OPTIONS), (WAYS, WAY_OPTIONS), (TARGETS, TARGET_OPTIONS)):
        options = {
            name: sorted("--" + field.name.replace("_", "-") for field in option_fields(registry[name]))
            for name in registry
        }
        assert options == {name: sorted(flags.split()) for name, flags in frozen.items()}


READ = {"against", "gguf", "model", "onto", "original", "plan", "task_path"}  # options that name what is read
WRITTEN = {"bench": ["picture"], "compress": ["statistics"], "frontier": ["picture"]}  # beside --out, if it is named
WRITTEN = {
    "bench": ["picture"],
    "compress": ["statistics"],
    "frontier": ["picture"],
}  # what a command writes beside its --out, if it is named


def test_outputs_and_json_are_the_same_everywhere():
    """What is written is named by --out, replaced with --force alone; --json prints."""
    for name, item in cli.commands.items():
        options = {o.name: o for o in item.params if isinstance(o, click.Option)}
        assert (options["as_json"].is_flag, options["as_json"].help) == (True, "print machine-readable JSON"), name
        assert ("out" in options) == ("force" in options), name
        if "out" in options:
            force = options["force"]
            assert (force.is_flag, force.help) == (True, "replace an output that exists"), name
        paths = {o.name for o in options.values() if isinstance(o.type, click.Path)} - READ - {"out"}
        if name in ("apply", "recover", "verify"):
            paths -= {"statistics"}  # which they read
        assert sorted(paths) == WRITTEN.get(name, []), name


OUTPUTS = """
calibrate {checkpoint} --data {words} --out {file}
search {checkpoint} --data {words} --out {file}
plan {statistics} --remove 0.4 --rank 2 --out {file}
frontier {statistics} --out {file}
frontier {statistics} --picture {file}
apply {checkpoint} --plan {plan} --out {folder}
compress {checkpoint} --data {words} --remove 0.4 --out {folder}
recover {small} --data {words} --out {folder}
eval {small} --data {words} --out {file}
compare {checkpoint} --data {words} --out {folder}
bench {small} --out {file}
bench {small} --picture {file}
report {statistics} --out {file}
export {small} --to remote-code --out {folder}
demo --out {folder}
""".strip().splitlines()


@pytest.mark.parametrize("line", OUTPUTS)
def test_an_output_that_exists_is_refused_without_force(
    line, checkpoint, words, statistics_file, plan_file, small, tmp_path
):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "locum.json").write_text("{}")
    places = {"checkpoint": checkpoint, "words": words, "statistics": statistics_file, "plan": plan_file}
    result = command(line.format(**places, small=small, file=tmp_path / "file", folder=tmp_path / "folder"))
    assert result.exit_code == 2
    assert "exists already; choose another name or pass --force to replace it" in result.stderr
    assert (tmp_path / "file").read_text() == "mine" and len(list((tmp_path / "folder").iterdir())) == 1


def test_every_command_that_writes_is_among_them():
    assert {line.split()[0] for line in OUTPUTS} == {name for name, flags in COMMANDS.items() if "--out" in flags}


def test_results_are_written_replaced_or_added_to(pruned, words, tmp_path):
    file = tmp_path / "rows of a run.jsonl"
    line = ["eval", pruned, "--data", words, "--tokens", 128, "--length", 64, "--resamples", 2]

    def written(*more):
        result = command(*line, *more)
        assert result.exit_code == 0, result.stderr
        return result, len(file.read_text().splitlines())

    _, once = written("--out", file)
    said, twice = written("--out", file, "--append", "--json")
    assert twice == 2 * once == 2 * len(json.loads(said.stdout))
    assert written("--out", file, "--force")[1] == once
    for number, earlier in enumerate((("--json", file), (f"--json={file}",))):
        said, lines = written(*earlier)
        assert lines == (2 + number) * once and "--json FILE is --out FILE --append now" in said.stderr
    assert len(locum.evaluate(pruned, data=str(words), tokens=128, length=64, resamples=2, json=file)) == once
    assert len(file.read_text().splitlines()) == 4 * once


def test_every_option_and_command_has_help():
    for name, item in cli.commands.items():
        assert item.help, name
        for option in item.params:
            assert isinstance(option, click.Argument) or option.help, f"{name} {option.name}"


def test_defaults_are_those_of_python():
    for name, item in cli.commands.items():
        parameters = inspect.signature(FUNCTIONS[name]).parameters
        for option in item.params:
            if not isinstance(option, click.Option) or option.name not in parameters:
                continue
            default = parameters[option.name].default
            assert option.required == (default is inspect.Parameter.empty), f"{name} --{option.name}"
            if not option.required:
                assert option.get_default(click.Context(item)) == default, f"{name} --{option.name}"
        missing = set(parameters) - {o.name for o in item.params} - {*HIDDEN}
        assert not missing, f"{name} lacks {missing}"


@pytest.mark.parametrize(
    ("name", "cls"), [("recover", Recovery), *((c, METHODS[m]) for c in CHOOSING for m in METHODS)]
)
def test_options_of_methods_and_recovery_have_the_defaults_of_their_dataclass(name, cls):
    item, parameters = cli.commands[name], inspect.signature(FUNCTIONS[name]).parameters
    ctx = click.Context(item, obj={} if cls is Recovery else {"method": cls.name})
    options = {option.name: option for option in item.get_params(ctx)}
    for field in option_fields(cls):
        if field.name not in parameters:  # the command's own are checked above
            assert options[field.name].get_default(ctx) == field.default
            assert options[field.name].help == field.metadata["help"]


def test_only_what_was_typed_reaches_a_method(statistics_file, monkeypatch):
    """Its defaults are for its dataclass to fill in: a searched file's options would else contradict them."""
    given = {}
    monkeypatch.setattr(cli.commands["plan"], "function", lambda **options: given.update(options) or [])
    assert command("plan", statistics_file, "--method", "replace", "--rank", 2).exit_code == 0
    assert {name for name in given if name not in inspect.signature(plan).parameters} == {"rank", "diff"}


def test_options_reach_the_method(statistics_file):
    made = command(
        "plan", statistics_file, "--method", "replace", "--no-shared", "--rank", 2, "--remove", "0.3", "--json"
    )
    assert made.exit_code == 0, made.stderr
    ours = plan(statistics_file, method="replace", shared=False, rank=2, remove=0.3)
    assert json.loads(made.stdout)["plan"] == ours.id
    assert not any(layer.bases for layer in ours.layers)


def test_progress_on_a_terminal_goes_to_stderr(checkpoint, words, tmp_path, monkeypatch):
    from locum.cli.progress import console

    monkeypatch.setattr(console, "_force_terminal", True)
    result = command("calibrate", checkpoint, "--data", words, "--tokens", 256, "--length", 64, "--out", tmp_path / "s")
    assert result.exit_code == 0
    assert "calibrate" in result.stderr
    assert "calibrate" not in result.stdout
