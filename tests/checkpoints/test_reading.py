"""One reading of a folder: what is inspected, sized and fingerprinted is what is loaded, and what cannot be is refused first."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import locum
from locum.checkpoints.load import load_model
from locum.checkpoints.read import fingerprint_checkpoint, load_tokenizer, read_config, read_header
from locum.checkpoints.skeleton import open_source, read_shape
from locum.checkpoints.weight_files import INDEX, WEIGHTS, shard_files
from locum.errors import CheckpointError, LocumError, UnsupportedModel
from locum.models.sizes import shape_of
from making.broken import change_weights
from making.checkpoints import locum as command
from making.checkpoints import write_checkpoint


@pytest.fixture
def folder(checkpoint, tmp_path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "model"))


def change_config(folder: Path, **entries) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


@pytest.fixture
def nothing_loaded(monkeypatch):
    """transformers must not be asked for weights."""

    def fail(*_, **__):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(PreTrainedModel, "_load_pretrained_model", staticmethod(fail))


def refusal(folder: Path, *words: str) -> str:
    """What `inspect` and loading both say, in one line, without loading weights."""
    result = command("inspect", folder)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1), result.stderr
    with pytest.raises(LocumError) as caught:
        load_model(folder)
    assert str(caught.value) in result.stderr
    assert all(word in result.stderr for word in words), result.stderr
    return result.stderr


# --- which files ----------------------------------------------------------------------------------------------------


def shards(folder: Path, change=lambda tensor: tensor, index: str = INDEX) -> None:
    """The weights in two further files, with an index."""
    tensors = load_file(folder / WEIGHTS)
    names = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(names.values()):
        save_file({n: change(t) for n, t in tensors.items() if names[n] == file}, folder / file, {"format": "pt"})
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": names}))


def only_shards(folder):
    shards(folder)
    (folder / WEIGHTS).unlink()


def both(folder):
    shards(folder, torch.zeros_like)


def named_file(folder):
    shutil.copyfile(folder / WEIGHTS, folder / "other.safetensors")
    change_weights(folder, lambda tensors: [tensor.zero_() for tensor in tensors.values()])
    change_config(folder, transformers_weights="other.safetensors")


def named_index(folder):
    shards(folder, index="other.safetensors.index.json")
    change_weights(folder, lambda tensors: [tensor.zero_() for tensor in tensors.values()])
    change_config(folder, transformers_weights="other.safetensors.index.json")


@pytest.mark.parametrize("arrange", [lambda folder: None, only_shards, both, named_file, named_index])
def test_files_that_are_read_are_those_that_are_loaded(arrange, folder, checkpoint, monkeypatch):
    arrange(folder)
    opened, load = [], PreTrainedModel._load_pretrained_model

    def spy(model, state_dict, files, *more, **options):
        opened.append([Path(file).name for file in files])
        return load(model, state_dict, files, *more, **options)

    monkeypatch.setattr(PreTrainedModel, "_load_pretrained_model", staticmethod(spy))
    ours, theirs = load_model(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert opened == [[file.name for file in shard_files(folder)]] * 2
    expected = load_file(checkpoint / WEIGHTS)["model.norm.weight"]
    assert torch.equal(ours.model.norm.weight, expected) and torch.equal(theirs.model.norm.weight, expected)


@pytest.mark.parametrize("arrange", [both, named_file])
def test_the_fingerprint_is_of_what_is_loaded(arrange, folder, tmp_path):
    arrange(folder)
    before = fingerprint_checkpoint(folder)
    used = shard_files(folder)[0]
    for file in folder.glob("*.safetensors"):
        tensors = {name: tensor + 1 for name, tensor in load_file(file).items()}
        kept = file.read_bytes()
        save_file(tensors, file, {"format": "pt"})
        assert (fingerprint_checkpoint(folder) != before) == (file == used)
        file.write_bytes(kept)
    assert fingerprint_checkpoint(folder) == before


def test_weights_that_other_engines_may_read_instead_are_said(folder):
    shutil.copyfile(folder / WEIGHTS, folder / "model-00001-of-00001.safetensors")
    (note,) = locum.inspect(folder)["notes"]
    assert "model-00001-of-00001.safetensors" in note
    with pytest.raises(UnsupportedModel, match="keep one of them"):
        locum.export(folder, to="gguf", out=folder.parent / "out.gguf")


def test_what_was_compressed_from_a_named_file_loads(folder):
    named_file(folder)
    out = locum.compress(folder, method="compressed-experts", out=folder.parent / "out")
    assert torch.equal(load_model(out).model.norm.weight, load_model(folder).model.norm.weight)


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000 + "]" * 100_000])
def test_an_index_that_cannot_be_read_is_refused_also_where_it_is_not_needed(text, folder, nothing_loaded):
    """Other engines go by it."""
    (folder / INDEX).write_text(text)
    refusal(folder, str(folder / INDEX), "download it again")


@pytest.mark.parametrize(
    "name", ["../model/model.safetensors", "/etc/passwd", "", None, 3, "sub/../../x.safetensors", "x\0y"]
)
def test_an_index_that_leads_out_is_refused(name, folder, nothing_loaded):
    (folder / WEIGHTS).unlink()
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {"model.norm.weight": name}}))
    refusal(folder, str(folder / INDEX), repr(name), "same folder")


@pytest.mark.parametrize("name", ["../other.safetensors", "weights.bin", "nowhere.safetensors", 3])
def test_a_named_file_that_is_none_is_refused(name, folder, nothing_loaded):
    change_config(folder, transformers_weights=name)
    refusal(folder, "transformers_weights", repr(name))


def test_an_adapter_of_peft_beside_the_model_is_refused(folder):
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(target_modules=["q_proj"]))
    adapted.save_pretrained(folder)
    refusal(folder, "adapter_config.json", "merge it")
    (folder / "config.json").unlink()
    refusal(folder, "adapter of PEFT", "no model")


def test_a_distributed_checkpoint_beside_the_model_is_refused(folder, nothing_loaded):
    shutil.copyfile(folder / WEIGHTS, folder / "shard-00000-model-00001-of-00001.safetensors")
    refusal(folder, "distributed checkpoint", "shard-00000")


# --- links ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["LICENSE", WEIGHTS, "config.json", "tokenizer.json", "additional_chat_templates/a.jinja"]
)
def test_links_out_of_the_folder_are_not_followed(name, folder, tmp_path, nothing_loaded):
    target = tmp_path / "secret"
    shutil.copyfile(folder / name, target) if (folder / name).is_file() else target.write_text("TOP SECRET")
    (folder / name).unlink(missing_ok=True)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).symlink_to(target)
    said = refusal(folder, str(folder / name), str(target))
    assert "SECRET" not in said
    with pytest.raises(CheckpointError, match="out of the checkpoint's folder"):
        load_tokenizer(folder)


def test_a_link_to_itself_is_a_file_that_is_not_there(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors"):
        read_shape(folder)


def test_links_inside_a_folder_and_to_a_hubs_blobs_are(folder, tmp_path):
    repo = tmp_path / "hub" / "models--some--model"
    snapshot = repo / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for place in (repo / "blobs", tmp_path / "hub" / "blobs" / "ab"):
        place.mkdir(parents=True)
    for i, file in enumerate(sorted(folder.iterdir())):
        shutil.move(file, repo / "blobs" / str(i))
        (snapshot / file.name).symlink_to(f"../../blobs/{i}")
    shared = tmp_path / "hub" / "blobs" / "ab" / "abc"
    shutil.move((snapshot / WEIGHTS).resolve(), shared)
    (snapshot / WEIGHTS).unlink()
    (snapshot / WEIGHTS).symlink_to("../../../blobs/ab/abc")
    (tmp_path / "link").symlink_to(snapshot)
    assert locum.inspect(tmp_path / "link")["parameters"] == read_shape(snapshot).parameters
    load_tokenizer(snapshot)
    shutil.move(shared, tmp_path / "elsewhere")
    shared.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="elsewhere"):
        locum.inspect(snapshot)


# --- which tensors --------------------------------------------------------------------------------------------------


def test_a_head_that_differs_from_what_it_is_tied_to_is_counted(folder):
    change_config(folder, tie_word_embeddings=True)
    stored = sum(tensor.nbytes for tensor in load_file(folder / WEIGHTS).values())
    shape = read_shape(folder)
    assert shape.bytes == stored and shape == shape_of(load_model(folder))
    out = locum.compress(folder, method="compressed-experts", out=folder.parent / "out")
    assert read_shape(out) == shape_of(load_model(out))
    assert torch.equal(load_model(out).lm_head.weight, load_model(folder).lm_head.weight)
    assert read_config(out).tie_word_embeddings is False  # as other engines go by it


def test_a_head_that_equals_it_is_no_parameters_of_its_own(folder):
    change_config(folder, tie_word_embeddings=True)

    def tie(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    change_weights(folder, tie)
    shape = read_shape(folder)
    stored = sum(tensor.nbytes for tensor in load_file(folder / WEIGHTS).values())
    assert shape.bytes == stored and shape.aside.bytes == load_file(folder / WEIGHTS)["lm_head.weight"].nbytes
    assert shape.model == shape_of(load_model(folder)) and shape.parameters == shape.model.parameters
    assert open_source(folder).config.tie_word_embeddings


def with_scales(tensors):
    for name in [n for n in tensors if ".experts." in n]:
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        tensors[name + "_scale_inv"] = torch.ones(1)


def with_a_layer_more(tensors):
    tensors["model.layers.2.eh_proj.weight"] = torch.ones(32, 64)


def with_lora(tensors):
    tensors["model.layers.0.self_attn.q_proj.lora_A.weight"] = torch.ones(2, 32)


def with_a_stranger(tensors):
    tensors["model.moon"] = torch.ones(2)


STRANGE = {
    with_scales: "scales of quantised",
    with_a_layer_more: "past the 2",
    with_lora: "merge",
    with_a_stranger: "no olmoe",
}


@pytest.mark.parametrize("change", STRANGE)
def test_tensors_without_a_place_are_named_with_what_they_are(change, folder, nothing_loaded):
    change_weights(folder, change)
    said = refusal(folder, "have no place in the model that config.json describes", STRANGE[change])
    assert "fetch" not in said


ONE, ALL = "experts.3.up_proj.weight", ".experts."
SHAPES = {
    "one expert with a dimension more": (ONE, lambda t: t[None]),
    "all experts with a dimension more": (ALL, lambda t: t[None]),
    "one expert with a dimension less": (ONE, lambda t: t.flatten()),
    "one expert with a row less": (ONE, lambda t: t[:-1].clone()),
    "one expert transposed": (ONE, lambda t: t.T.contiguous()),
    "a matrix with a dimension more": ("q_proj.weight", lambda t: t[None]),
    "a norm with a dimension more": ("model.norm.weight", lambda t: t[None]),
}


@pytest.mark.parametrize("what", SHAPES)
@pytest.mark.parametrize("sharded", [False, True])
def test_tensors_of_another_shape_are_refused_by_name(what, sharded, folder, nothing_loaded):
    part, change = SHAPES[what]
    names = sorted(name for name in load_file(folder / WEIGHTS) if part in name)
    change_weights(folder, lambda tensors: tensors.update({name: change(tensors[name]) for name in names}))
    if sharded:
        only_shards(folder)
    said = refusal(folder, "has shape", "fetch it again")
    assert any(name in said for name in names)


@pytest.mark.parametrize("part", [ONE, "q_proj.weight", "mlp.gate.weight"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int8, torch.uint8, torch.bool])
def test_whole_numbers_where_the_model_computes_are_refused(part, dtype, folder, nothing_loaded):
    name = min(name for name in load_file(folder / WEIGHTS) if part in name)
    change_weights(folder, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    refusal(folder, name, "dtype", "float32", "fetch it again")


def test_tensors_that_are_missing_are_found_by_inspect(folder, nothing_loaded):
    change_weights(folder, lambda tensors: tensors.pop("model.layers.1.self_attn.q_proj.weight"))
    refusal(folder, "model.layers.1.self_attn.q_proj.weight", "missing", "fetch it again")


def test_a_prediction_layer_that_config_announces_is_left_out(folder):
    change_weights(folder, with_a_layer_more)
    change_config(folder, num_nextn_predict_layers=1)
    (note,) = locum.inspect(folder)["notes"]
    assert "model.layers.2.eh_proj.weight" in note
    assert read_shape(folder).model.parameters == sum(t.numel() for t in load_model(folder).state_dict().values())


# --- which dtype ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("name", ["float8_e4m3fn", "auto", "fp16", "int8", "nn", 16, ["float32"]])
def test_what_is_no_dtype_to_compute_in_is_refused(key, name, folder, nothing_loaded):
    change_config(folder, **{key: name})
    refusal(folder, f"{key}={name!r}", "bfloat16", "config.json")


def test_a_config_without_a_dtype_takes_that_of_the_first_tensor(folder):
    def mix(tensors):
        for i, name in enumerate(sorted(tensors)):
            tensors[name] = tensors[name].to(torch.bfloat16 if i == 0 else torch.float32)

    change_weights(folder, mix)
    change_config(folder, dtype=None)
    expected = AutoModelForCausalLM.from_pretrained(folder).dtype
    assert expected == open_source(folder).config.dtype == load_model(folder).dtype == torch.bfloat16
    assert read_shape(folder) == shape_of(load_model(folder))


# --- sizes, before anything is built --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "entries, words",
    [
        ({"num_experts": 10**8}, "num_experts=100,000,000"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1,000,000,000"),
        ({"num_hidden_layers": 3}, "model.layers.2."),
        ({"num_experts": 10**6}, "has shape [8, 32] in the file"),
        ({"vocab_size": 5 * 10**7}, "vocab_size=50,000,000"),
        ({"vocab_size": 10**6}, "has shape [320, 32] in the file"),
        ({"hidden_size": 2**40}, "hidden_size"),
        ({"hidden_size": -32}, "config.json"),
        ({"intermediate_size": 10**6}, "tensors are missing"),
        ({"num_experts_per_tok": 9}, "selects 9 of 8 experts"),
        ({"num_experts_per_tok": -3}, "selects -3 of 8 experts"),
    ],
)
def test_sizes_are_checked_before_anything_is_built_from_them(entries, words, folder, nothing_loaded):
    change_config(folder, **entries)
    refusal(folder, words)


def test_an_expert_that_is_missing_is_told_before_anything_is_loaded(folder, nothing_loaded):
    """Its neighbours are stacked as they are loaded, so that the model has a tensor for them all."""
    gone = "model.layers.1.mlp.experts.4.up_proj.weight"
    change_weights(folder, lambda tensors: tensors.pop(gone))
    refusal(folder, f"1 tensors are missing (first: {gone})")


@pytest.mark.parametrize("entries", [{"n_group": 3}, {"n_group": 4, "topk_group": 5}, {"n_group": 4, "topk_group": 1}])
def test_groups_that_cannot_be_selected_from_are_refused(entries, tmp_path, nothing_loaded):
    folder = write_checkpoint(tmp_path / "grouped", "deepseek_v3")
    change_config(folder, num_experts_per_tok=4, **entries)
    refusal(folder, "equal groups")


def test_a_containers_tensor_that_is_missing_is_not_made_first(small, tmp_path, nothing_loaded):
    """transformers' own loading too: the layout says how large it would be."""
    folder = Path(shutil.copytree(small, tmp_path / "small"))
    change_weights(folder, lambda tensors: [tensors.pop(n) for n in list(tensors) if n.endswith("up_B_FR")])
    with pytest.raises(CheckpointError, match="missing"):
        AutoModelForCausalLM.from_pretrained(folder)


# --- no code --------------------------------------------------------------------------------------------------------


def test_code_of_a_tokenizer_is_never_run(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    file = folder / "tokenizer_config.json"
    entries = {"auto_map": {"AutoTokenizer": [None, "evil.Tok"]}, "tokenizer_class": "Tok"}
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))
    (folder / "evil.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\nfrom transformers import PreTrainedTokenizerFast as Tok\n"
    )
    try:
        load_tokenizer(folder)
    except CheckpointError as error:
        assert "no usable tokenizer" in str(error)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("key", ["dtype", "shape", "data_offsets"])
@pytest.mark.parametrize("value", [[], [0], [0, 1, 2], [[], []], None, "x", 3, {}, [None, None], [-1, 1]])
def test_whatever_a_header_says_of_a_tensor_is_an_error_of_one_kind(tmp_path, key, value):
    if (key, value) in (("shape", []), ("dtype", "x")):
        pytest.skip("a single number, and a dtype that may come, are possible")
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], key: value}
    text = json.dumps({"x": entry}).encode()
    (tmp_path / "file").write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    with pytest.raises(CheckpointError, match="fetch it again"):
        read_header(tmp_path / "file")
