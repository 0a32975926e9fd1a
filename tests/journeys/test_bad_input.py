"""Every bad input gives one clear line and exit code 2, before heavy work, and leaves nothing behind.

LINES has the command lines; what stands in braces is made by making/bad_inputs.py. Interrupts and full disks
are in test_interrupts.py.
"""

from __future__ import annotations

import json
import sys

import pytest
import torch

import locum
from making.bad_inputs import Place
from making.checkpoints import locum as command
from making.checkpoints import tree

SHORT = "--tokens 256 --length 64"
TARGET = "--method prune --remove 0.25"


@pytest.fixture
def place(tmp_path, checkpoint, words, statistics_file, plan_file, small, pruned):
    given = {"model": checkpoint, "words": words, "stats": statistics_file, "plan": plan_file}
    return Place(tmp_path, **given, small=small, pruned=pruned, out=tmp_path / "out")


# --- the lines ------------------------------------------------------------------------------------------------------

CALIBRATE = "calibrate {model} --data {words} --out {out}"
APPLY = "apply {model} --out {out} --plan"
COMPRESS = f"compress {{model}} --data {{words}} {SHORT} --out {{out}}"
RECOVER = "recover {small} --data {words} --length 64 --out {out}"
EVAL = "eval {pruned} --data {words}"
# What is typed, and what the answer must contain: what is wrong, where, what is allowed, what to do.
LINES = [
    # not a model
    ("inspect {nowhere}", "no such folder: {nowhere}; give the path of a checkpoint folder"),
    ("inspect {file}", "{file} is not a model: expected a folder with config.json and safetensors files"),
    ("inspect {empty_folder}", "is not a model: expected a folder with config.json"),
    ("inspect {dense}", "'llama' has no mixture-of-experts layers; Locum compresses MoE models only"),
    ("inspect {refused}", "'zaya' is not supported: its router has a skip class"),
    ("inspect {unheard_of}", "does not know the model type 'olmo3_moe_x'|update transformers"),
    ("inspect {mistyped}", "config.json is not a config of 'olmoe'|hidden_size"),
    ("inspect {quantised}", "quantised with 'gptq'|compress first, quantise afterwards"),
    ("inspect {of_the_future}", "format version 99; this Locum reads version 2"),
    ("inspect {not_json}", "config.json cannot be read as JSON|download it again"),
    ("inspect {lacks_shard}", "lacks shard model-00002-of-00002.safetensors|download it again"),
    ("inspect {truncated}", "model.safetensors is damaged: its header asks for|fetch it again"),
    ("inspect {stub}", "model.safetensors is no safetensors file, or truncated|fetch it again"),
    ("inspect {no_weights}", "has no model.safetensors and no model.safetensors.index.json"),
    ("inspect {pickled}", "which can run code when loaded; convert them to safetensors"),
    *(
        (f"{line} --data {{words}} --out {{out}}", "no such folder: {nowhere}")
        for line in ("calibrate {nowhere}", "compress {nowhere} --remove 0.5", "recover {nowhere}")
    ),
    ("apply {nowhere} --plan {plan} --out {out}", "no such folder"),
    ("eval {nowhere} --data {words}", "no such folder"),
    ("eval {pruned} --against {nowhere} --data {words}", "no such folder"),
    ("calibrate {lacks_shard} --data {words} --out {out}", "lacks shard"),
    ("apply {truncated} --plan {plan} --out {out}", "is damaged"),
    ("calibrate {no_tokenizer} --data {words} --out {out}", "has no usable tokenizer|copy its files there"),
    ("calibrate {small} --data {words} --out {out}", "has stand-ins); calibrate the original"),
    ("apply {small} --plan {plan} --out {out}", "has stand-ins); apply the plan to the original"),
    ("compress {small} --data {words} --remove 0.5 --out {out}", "compressed already"),
    (f"{COMPRESS} {TARGET} --rest 5", "unknown number format of compressed-tensors '5'"),
    # plans
    (f"{APPLY} {{nowhere}}", "no plan file at {nowhere}; make one with: locum plan"),
    (f"{APPLY} {{broken_plan}}", "is not valid JSON|line"),
    (f"{APPLY} {{not_a_plan}}", 'not a Locum plan: expected a JSON object with "kind": "locum-plan"'),
    (f"{APPLY} {{binary_plan}}", "cannot be read as text"),
    (f"{APPLY} {{newer_plan}}", "format version 3; this Locum reads versions 1 and 2"),
    (
        "apply {other_model} --out {out} --plan {plan}",
        "made for another model: olmoe|this one is qwen3_moe|make a plan",
    ),
    (f"{APPLY} {{unknown_expert}}", "expert 8 is missing; every expert needs a line"),
    (f"{APPLY} {{too_many_experts}}", "lists 9 experts, the model has 8 (0 to 7)"),
    (f"{APPLY} {{twice}}", "expert 1 is listed twice; keep one of the two lines"),
    (f"{APPLY} {{lacks_expert}}", "expert 3 is missing; every expert needs a line"),
    (f"{APPLY} {{rank_too_large}}", "expert 0 has rank 1000; allowed: 1 to 16"),
    (f"{APPLY} {{too_few}}", "leaves 1 experts|top_k=2|keep at least 2"),
    (f"{APPLY} {{half_gone}}", "drops its decoder layer and has something left|let every expert of it be dropped"),
    (f"{APPLY} {{layer_twice}}", "is in the plan twice; keep one"),
    (f"{APPLY} {{unknown_layer}}", "unknown layer in the plan 'model.layers.77.mlp.experts': did you mean"),
    (f"{APPLY} {{unknown_fate}}", "unknown part 'own_weigths': did you mean 'own_weights'"),
    (f"{APPLY} {{unknown_entry}}", "unknown entry 'part': did you mean 'parts'"),
    (f"{APPLY} {{base_of_unknown}}", "base 0 averages unknown expert 44; allowed: 0 to 7"),
    (f"{APPLY} {{bad_weights}}", "base 0 has weights|must be at least 0 and sum to 1"),
    (f"{APPLY} {{wordy_weights}}", "base 0|weights|'much'"),
    (f"{APPLY} {{numeric_fate}}", "'parts' is 3; it must be a list|line 0 of the experts"),
    (f"{APPLY} {{number_for_layers}}", "'layers' is 7"),
    (f"{APPLY} {{constants}}", "gone.safetensors|--statistics"),
    (f"{APPLY} {{constants}} --statistics {{nowhere}}", "no statistics file at {nowhere}"),
    (f"{APPLY} {{plan}} --seed -1", "--seed is -1; allowed: whole numbers from 0"),
    ("plan --diff {plan}", "--diff takes exactly two plan files"),
    ("plan --diff {plan} {stats}", "cannot be read as text"),
    # statistics
    ("plan {nowhere} --remove 0.5", "no statistics file at {nowhere}; make one with: locum calibrate"),
    ("plan {words} --remove 0.5", "{words} is not a statistics file"),
    ("plan {torn_stats} --remove 0.5", "is damaged|locum calibrate"),
    ("plan {weights_as_stats} --remove 0.5", "is not a Locum statistics file"),
    ("plan {stats} {other_stats} --remove 0.25", "cannot be added: model_fingerprint"),
    (f"{COMPRESS} {TARGET} --statistics {{other_stats}}", "belong to another model|calibrate this model"),
    (
        f"compress {{other_words}} --data {{words}} {SHORT} --out {{out}} {TARGET} --statistics {{stats}}",
        "belong to another tokenizer|calibrate this model",
    ),
    ("frontier {stats}", "has no statistic 'candidate_error'|locum search"),
    ("frontier {stats} --method prune", "method prune does not say what its plans cost; use auto|locum compare"),
    ("frontier {nowhere}", "no statistics file at {nowhere}"),
    ("frontier {stats} --points 1", "--points is 1; allowed: whole numbers from 2 to 512"),
    ("frontier {stats} --out {file}", "exists already|--force"),
    # targets and options
    ("plan {stats}", "exactly one of --remove|--fit"),
    ("plan {stats} --remove 0.5 --fit 1GB", "exactly one of --remove|--fit"),
    *(
        (f"{line} --remove {value}", "--remove is|above 0, below 1")
        for line in ("plan {stats}", COMPRESS)
        for value in ("0", "1", "-0.5", "50", "nan")
    ),
    ("plan {stats} --remove half", "'half' is not a valid float|locum plan --help"),
    (
        f"{COMPRESS} {TARGET} --method prune --steps 3",
        "method diep has it; for what --recover does it is --recover-steps",
    ),
    ("report {plan} --out {out}", "is one piece of JSON and no results|locum eval"),
    ("plan {stats} --method prune --remove 0.9", "out of reach: this method can remove 0.7500"),
    ("plan {stats} --method prune --fit 100KB", "out of reach|best, from 207,872"),
    ("plan {stats} --fit lots", "cannot read size 'lots'; write for example 16GiB"),
    (f"{COMPRESS} --fit 1KB", "--fit 1KB is out of reach|bytes"),
    (f"{COMPRESS} --fit lots", "cannot read size 'lots'"),
    (
        "plan {stats} --method prun --remove 0.5",
        "unknown method 'prun': did you mean 'prune' or 'stun'? allowed: auto, block-drop",
    ),
    (f"{COMPRESS} --method prun --remove 0.5", "unknown method 'prun': did you mean 'prune' or 'stun'?"),
    ("plan {stats} --method prune --score reep --remove 0.5", "unknown criterion 'reep': did you mean 'reap'"),
    (f"{COMPRESS} --method prune --score reep --remove 0.5", "unknown criterion 'reep': did you mean 'reap'"),
    ("plan {stats} --selection adaptiv --remove 0.5", "--selection 'adaptiv': did you mean 'adaptive'?"),
    ("plan {stats} --rank -1 --remove 0.5", "--rank is -1; allowed: at least 0"),
    (
        "plan {stats} --method prune --shared --remove 0.5",
        "method prune has no option '--shared'|allowed: --budget, --distinct, --floor, --lower-top-k",
    ),
    (
        f"{COMPRESS} --method prune --rank 4 --remove 0.5",
        "method prune has no option '--rank'|allowed: --budget, --distinct, --floor, --lower-top-k",
    ),
    ("plan {stats} --removed 0.5", "--removed|--remove|locum plan --help"),
    ("plan", "Missing argument 'STATISTICS...'|locum plan --help"),
    (CALIBRATE + " --tokens 7 --length 64", "tokens is 7, less than one block of length 64"),
    (CALIBRATE + " --tokens -5", "tokens is -5"),
    (CALIBRATE + " --tokens 1" + "0" * 30, "allowed: at most 1,152,921,504,606,846,976"),
    (CALIBRATE + " --length 1", "length is 1"),
    (CALIBRATE + " --tokens many", "'many' is not a valid integer"),
    (CALIBRATE + f" {SHORT} --batch-size 0", "--batch-size is 0; allowed: whole numbers from 1"),
    *(
        (f"{line} --batch-size 1" + "0" * 30, "--batch-size is 1|2147483647")
        for line in (CALIBRATE, f"{COMPRESS} {TARGET}", EVAL, RECOVER)
    ),
    (f"{COMPRESS} {TARGET} --quantiser fast", "unknown quantiser 'fast'"),
    (f"{COMPRESS} {TARGET} --group 5", "--group is 5; allowed: 32, 64, 128"),
    (f"{EVAL} --resamples 2147483647", "--resamples is 2147483647; allowed: whole numbers from 1 to 1000000"),
    *(
        (
            f"search {{model}} --data {{words}} --out {{out}} --method {name} --population 100001",
            "--population is 100001|100000",
        )
        for name in ("moe-i2", "eep")
    ),
    (f"{RECOVER} --steps 2147483648", "--steps is 2147483648; allowed: at least 1 and at most 2147483647"),
    (CALIBRATE + " --split trian", "unknown split 'trian': did you mean 'train'?"),
    (CALIBRATE + f" {SHORT} --device cuda:7", "--device cuda:7 cannot be used|devices here: auto, cpu"),
    (CALIBRATE + f" {SHORT} --device meta", "--device meta cannot be used|devices here: auto, cpu"),
    (CALIBRATE + f" {SHORT} --device privateuseone", "--device privateuseone cannot be used|devices here: auto, cpu"),
    (CALIBRATE + f" {SHORT} --device gpu", "--device gpu cannot be used|devices here: auto, cpu"),
    (f"{COMPRESS} {TARGET} --seed -1", "--seed is -1; allowed: whole numbers from 0"),
    (f"{COMPRESS} {TARGET} --batch-size 0", "--batch-size is 0"),
    (f"{COMPRESS} {TARGET} --recover lora --recover-steps 0", "--recover-steps is 0; allowed: at least 1"),
    (
        f"{COMPRESS} {TARGET} --recover-rank 2",
        "option '--recover-rank' comes with --recover annealed or kd or layerwise or lora or seer or smola",
    ),
    (
        f"{COMPRESS} {TARGET} --recover lora --recover-end-fraction 0.5",
        "way to recover lora has no option '--recover-end-fraction'|way to recover annealed or seer has it",
    ),
    (f"{COMPRESS} {TARGET} --device cuda:7", "--device cuda:7 cannot be used"),
    (f"{RECOVER} --steps -3", "--steps is -3; allowed: at least 1"),
    (f"{RECOVER} --validation-tokens 0", "validation-tokens is 0"),
    (f"{RECOVER} --how anealed", "unknown way to recover 'anealed': did you mean 'annealed'?"),
    (
        f"{RECOVER} --how vectors --rank 2",
        "way to recover vectors has no option '--rank'|annealed or kd or layerwise or lora or seer or smola has it",
    ),
    (f"{RECOVER} --how smola --set a.b", "--how smola trains no set called 'a.b'; allowed: names of up to 64 letters"),
    (f"{COMPRESS} {TARGET} --recover smola --recover-set a.b", "trains no set called 'a.b'"),
    (f"{RECOVER} --schedule cosin", "--schedule 'cosin': did you mean 'cosine'?"),
    (f"{RECOVER} --learning-rate 0", "--learning-rate is 0; allowed: more than 0"),
    (f"{RECOVER} --learning-rate nan", "--learning-rate is nan"),
    (f"{RECOVER} --device cuda:7", "--device cuda:7 cannot be used"),
    (f"{EVAL} --resamples 0", "--resamples is 0; allowed: whole numbers from 1"),
    (f"{EVAL} --batch-size 0", "--batch-size is 0"),
    (f"{EVAL} --device cuda:7", "--device cuda:7 cannot be used"),
    ("demo --steps 0 --out {out}", "--steps is 0; allowed: whole numbers from 1"),
    ("compres {model}", "unknown command 'compres': did you mean 'compress' or 'compare'?"),
    # recovery and evaluation
    (
        "recover {pruned} --data {words} --length 64 --out {out} --how annealed",
        "--how annealed fades out|the plan (prune) leaves none; use --how esft or --how experts or --how full or --how kd or --how "
        "layerwise or --how lora or --how router or --how router-kd",
    ),
    (
        f"{RECOVER} --how lora --adapter-only",
        "--adapter-only keeps the base's weights|use --how esft or --how router or --how router-kd or --how smola or --how vectors",
    ),
    (f"{RECOVER} --original {{changed}}", "is not what {small} was made from, or has changed since|--original"),
    (f"{RECOVER} --original {{other_model}}", "is not what {small} was made from"),
    ("eval {pruned} --against {other_vocabulary} --data {words}", "vocabulary of 320|one of 352"),
    # data
    ("calibrate {model} --data code={nowhere} --out {out}", "data path|of domain 'code' does not exist"),
    ("calibrate {model} --data {empty} --out {out}", "holds no text"),
    ("calibrate {model} --data {short} --out {out} --split all", "too little text"),
    ("calibrate {model} --data {latin} --out {out}", "is not UTF-8: byte 0xfc at offset 2; convert it"),
    ("compress {model} --data {latin} --out {out} --remove 0.5", "is not UTF-8"),
    ("recover {small} --data {latin} --out {out}", "is not UTF-8"),
    ("eval {pruned} --data {empty_folder}", "holds no text"),
    ("calibrate {model} --out {out}", "Missing option '--data'|locum calibrate --help"),
    ("apply {model} --out {out}", "Missing option '--plan'"),
    # outputs
    ("calibrate {model} --data {words}", "Missing option '--out'"),
    ("calibrate {model} --data {words} --out {inside_file}", "cannot write {inside_file}: {file} is a file"),
    ("compress {model} --data {words} --remove 0.5 --out {inside_file}", "is a file, not a folder"),
    ("plan {stats} --method prune --remove 0.25 --out {inside_file}", "is a file, not a folder"),
    ("recover {small} --data {words} --out {inside_file}", "is a file, not a folder"),
    ("eval {pruned} --data {words} --out {inside_file}", "is a file, not a folder"),
    (
        "calibrate {model} --data {words} --out /proc/stats",
        "cannot write /proc/stats: |choose a folder you may write to",
    ),
    ("calibrate {model} --data {words} --out {taken}", "is a folder, and a file is to be written there"),
    ("calibrate {model} --data {words} --out {file}", "{file} exists already; choose another name or pass --force"),
    ("plan {stats} --method prune --remove 0.25 --out {file}", "exists already|--force"),
    ("apply {model} --plan {plan} --out {file} --force", "is a file, and a folder is to be written there"),
    ("apply {model} --plan {plan} --out {taken}", "exists already; choose another name or pass --force"),
    ("compress {model} --data {words} --remove 0.5 --out {taken}", "exists already|--force"),
    ("recover {small} --data {words} --out {taken}", "exists already|--force"),
    ("report {results} --out {file}", "exists already|--force"),
    ("demo --out {foreign}", "exists already"),
    ("apply {model} --plan {plan} --out {foreign} --force", "was not made by Locum|remove it, or"),
    (
        "apply {taken} --plan {plan} --out {taken} --force",
        "would replace {taken}, which is in use; choose another name",
    ),
    ("calibrate {model} --data {file} --out {file} --force", "which is in use; choose another name"),
    ("eval {pruned} --data {words} --append", "--append adds rows to a results file|--out"),
    ("eval {pruned} --data {words} --out {file} --append", "line 1: not JSON"),
    ("eval {pruned} --data {words} --out {file}", "exists already; choose another name or pass --force"),
    ("eval {pruned} --data {words} --out {taken}", "is a folder, and a file is to be written there"),
    # bench
    ("bench {nowhere}", "no such folder"),
    ("bench {pruned} --against {nowhere}", "no such folder"),
    ("bench {no_tokenizer}", "has no usable tokenizer"),
    ("bench {pruned} --against {other_vocabulary}", "vocabulary of 320|one of 352"),
    ("bench {model} --rounds 0", "--rounds is 0; allowed: whole numbers from 1"),
    ("bench {model} --new-tokens 1", "--new-tokens is 1; allowed: whole numbers from 2"),
    ("bench {model} --batch-sizes 0", "--batch-sizes is 0; allowed: whole numbers from 1"),
    ("bench {model} --precision int8", "--precision is 'int8'; allowed: auto, fp32, bf16, fp16"),
    ("bench {model} --prompt 511", "543 tokens together|has 512 positions"),
    ("bench {model} --engine lamacpp", "unknown engine 'lamacpp'|llamacpp"),
    ("bench {model} --gguf {file}", "--gguf is for llama.cpp; give --engine llamacpp too"),
    ("bench {model} --device cuda:7", "--device cuda:7 cannot be used"),
    ("bench {model} --out {file}", "exists already|--force"),
    ("bench {model} --picture {inside_file}", "is a file, not a folder"),
    # reports
    ("report {nowhere} --out {out}", "cannot read results {nowhere}|locum eval"),
    ("report {broken_results} --out {out}", "line 2: not JSON"),
    ("report {no_results} --out {out}", "no results rows|locum eval"),
    ("report {results} --out {inside_file}", "is a file, not a folder"),
]


def test_what_was_typed_with_a_line_end_is_told_in_one_line():
    said = command("recover", "a\nb", "a\u2028b")
    assert said.exit_code == 2 and len(said.stderr.splitlines()) == 1, said.stderr


@pytest.mark.parametrize(("line", "answer"), LINES, ids=[line for line, _ in LINES])
def test_one_clear_line_and_nothing_left(line, answer, place, monkeypatch):
    typed = [word.format_map(place) for word in line.split()]
    wanted = [part.format_map(place) for part in answer.split("|")]
    before = tree(place.folder)
    monkeypatch.chdir(place.folder)
    for name, module in list(sys.modules.items()):
        if name.startswith("locum.") and hasattr(module, "load_model"):
            monkeypatch.setattr(module, "load_model", _too_late)
    result = command(*typed)
    name = line.split()[0] if line.split()[0] != "compres" else ""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith(f"{f'locum {name}'.strip()}: error: "), result.stderr
    for part in wanted:
        assert part in result.stderr, f"{part!r} is not in: {result.stderr}"
    assert tree(place.folder) == before


def _too_late(*args, **kwargs):
    raise AssertionError("weights were loaded although the input is bad")


def test_weights_that_lack_a_tensor(place):
    """Known only once the model is there."""
    result = command(*f"calibrate {place['lacks_tensor']} --data {place['words']} {SHORT} --out {place['out']}".split())
    assert result.exit_code == 2
    assert "1 tensors are missing" in result.stderr
    assert "model.norm.weight" in result.stderr
    assert not place["out"].exists()


def test_what_python_raises_is_a_locum_error(place):
    with pytest.raises(locum.CheckpointError):
        locum.inspect(place["nowhere"])
    with pytest.raises(locum.OptionError):
        locum.plan(place["stats"], remove=2)
    with pytest.raises(TypeError):
        locum.plan(place["stats"], 0.5)  # options are keyword-only


def test_force_replaces_and_only_force(place):
    old = place["taken"]
    again = f"apply {place['model']} --plan {place['plan']} --out {old}".split()
    before = tree(old)
    assert command(*again).exit_code == 2
    assert tree(old) == before
    assert command(*again, "--force").exit_code == 0
    assert locum.load_plan(old / "plan.json").id == locum.load_plan(place["plan"]).id
    assert sorted(path.name for path in place.folder.iterdir()) == ["taken"]


def test_an_empty_folder_and_missing_parents_are_fine(place):
    for out in (place["empty_folder"], place.folder / "one" / "two" / "three"):
        assert locum.apply(place["model"], plan=place["plan"], out=out) == out
        assert (out / "config.json").is_file()


def test_a_failure_while_writing_keeps_the_old_output(place, monkeypatch):
    before = tree(place["taken"])

    def fail(*args, **kwargs):
        raise RuntimeError("planted")

    with monkeypatch.context() as patched:
        patched.setattr(sys.modules["locum.checkpoints.application"], "save_plan", fail)
        with pytest.raises(RuntimeError, match="planted"):
            locum.apply(place["model"], plan=place["plan"], out=place["taken"], force=True)
    assert tree(place["taken"]) == before
    assert sorted(path.name for path in place.folder.iterdir()) == [".taken.part-kept", "taken"]
    locum.apply(place["model"], plan=place["plan"], out=place["taken"], force=True)
    assert sorted(path.name for path in place.folder.iterdir()) == ["taken"]


@pytest.mark.journeys
def test_plans_with_any_entry_spoiled_are_refused_or_harmless(place):
    """Whatever one entry of a plan is turned into: a PlanError, or a plan that is still valid."""
    whole = json.loads(place["plan"].read_text())
    shape = locum.read_shape(place["model"])
    spoiled = [None, -1, 3.5, "x", [], {}, True, float("nan"), 10**30]
    tried = 0
    for path in _paths(whole):
        if path[0] in ("options", "provenance", "method"):
            continue
        for value in spoiled:
            data = json.loads(json.dumps(whole))
            holder = data
            for key in path[:-1]:
                holder = holder[key]
            holder[path[-1]] = value
            tried += 1
            try:
                locum.Plan.loads(json.dumps(data)).validate(shape)
            except locum.PlanError as error:
                assert str(error)
    assert tried > 500


def _paths(value, path=()):
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from _paths(inner, (*path, key))


def test_headers_of_nonsense_are_refused(place):
    folder = place.copy("model", "nonsense")
    noise = (
        torch.randint(0, 256, (4096,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8).numpy().tobytes()
    )
    for head in (b"", b"[]", b'{"a": 1}', b'{"a": {"dtype": "F32"}}', noise):
        length = len(head).to_bytes(8, "little")
        (folder / "model.safetensors").write_bytes(length + head)
        result = command("inspect", folder)
        assert result.exit_code == 2, head
        assert "model.safetensors" in result.stderr
        assert result.stderr.count("\n") == 1
