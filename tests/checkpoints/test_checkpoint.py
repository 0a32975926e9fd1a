"""Damaged, foreign and tampered checkpoints: refused by name, with the file and what to do."""

from __future__ import annotations

import json
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from locum.checkpoints.load import load_model
from locum.checkpoints.notes import read_notes
from locum.checkpoints.placing import LocumConfig
from locum.checkpoints.read import fingerprint_checkpoint, load_tokenizer, read_config, read_headers
from locum.checkpoints.skeleton import is_compressed, read_shape, skeleton
from locum.containers.container import StandInExperts
from locum.errors import CheckpointError, LocumError, UnsupportedModel
from locum.models.families import find_layers
from locum.models.sizes import shape_of
from locum.plans.plan import DROPPED, KEPT, Base, LayerPlan, make_plan, stand_in
from locum.stages.application import apply
from locum.stages.inspection import inspect
from making.checkpoints import write_checkpoint
from making.tiny_models import CONFIGS, tiny_ids, tiny_model

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    stock = write_checkpoint(root / "stock")
    shape = read_shape(stock)
    slots = (DROPPED, *[KEPT] * 3, *[stand_in(0, 2)] * 4)
    plan = make_plan(shape, [LayerPlan(shape.layers[1].name, slots, (Base((4, 5), (0.5, 0.5)),))])
    apply(stock, plan=plan, out=root / "compressed")
    return root


@pytest.fixture
def stock(originals, tmp_path):
    return shutil.copytree(originals / "stock", tmp_path / "stock")


@pytest.fixture
def compressed(originals, tmp_path):
    return shutil.copytree(originals / "compressed", tmp_path / "compressed")


def change_config(folder, change):
    file = folder / "config.json"
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


def assert_refused(folder, error, *words, calls=(read_shape, load_model)):
    for call in calls:
        with pytest.raises(error) as caught:
            call(folder)
        assert isinstance(caught.value, LocumError)
        for word in words:
            assert word in str(caught.value), str(caught.value)


# --- what is right ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", CONFIGS)
def test_shape_from_headers_equals_that_of_the_live_model(model_type, tmp_path):
    model = tiny_model(model_type)
    model.save_pretrained(tmp_path)
    shape = read_shape(tmp_path)
    assert shape == shape_of(model)
    headers = read_headers(tmp_path)
    assert shape.bytes == sum(e["data_offsets"][1] - e["data_offsets"][0] for e in headers.values())
    assert shape.parameters == sum(t.numel() for t in load_file(tmp_path / WEIGHTS).values())
    experts = sum(p.numel() for x in find_layers(model) for p in x.experts.parameters())
    assert shape.expert_parameters == experts


def test_a_config_without_a_dtype_takes_that_of_the_weights(tmp_path):
    tiny_model("gpt_oss").to(torch.bfloat16).save_pretrained(tmp_path)
    expected = read_shape(tmp_path)
    change_config(tmp_path, lambda c: [c.pop(key, None) for key in ("dtype", "torch_dtype")])
    assert read_shape(tmp_path) == expected
    assert expected.layers[0].router_bytes == 2 * 33


def test_a_skeleton_has_no_weights(compressed):
    model = skeleton(read_config(compressed))
    assert all(t.is_meta for t in model.state_dict().values())
    assert isinstance(find_layers(model)[1].experts, StandInExperts)
    assert is_compressed(read_config(compressed))


def test_fingerprints_tell_checkpoints_apart(stock, originals, compressed):
    assert fingerprint_checkpoint(stock) == fingerprint_checkpoint(originals / "stock")
    assert fingerprint_checkpoint(stock) != fingerprint_checkpoint(compressed)
    tensors = load_file(stock / WEIGHTS)
    name = next(iter(tensors))
    tensors[name] = tensors[name] + 1
    save_file(tensors, stock / WEIGHTS, {"format": "pt"})
    assert fingerprint_checkpoint(stock) != fingerprint_checkpoint(originals / "stock")


def test_locum_config_survives_saving():
    config = LocumConfig({"x": {"a": 1}})
    assert LocumConfig.from_dict(config.to_dict()).layers == {"x": {"a": 1}}


def test_a_tensor_that_is_missing_is_never_left_to_chance(compressed):
    tensors = load_file(compressed / WEIGHTS)
    name = "model.layers.1.mlp.experts.adapters.0.up_B_FR"
    del tensors[name]
    save_file(tensors, compressed / WEIGHTS, {"format": "pt"})
    assert_refused(compressed, CheckpointError, name, calls=[load_model])


def test_a_tensor_that_has_no_place_is_refused(compressed):
    tensors = load_file(compressed / WEIGHTS)
    tensors["model.layers.1.mlp.experts.surplus"] = torch.zeros(2)
    save_file(tensors, compressed / WEIGHTS, {"format": "pt"})
    assert_refused(compressed, CheckpointError, "surplus", calls=[load_model])


# --- folders and configs ----------------------------------------------------------------------------------------


def test_missing_folder_file_and_config(tmp_path):
    assert_refused(tmp_path / "nowhere", CheckpointError, "nowhere", "no such folder")
    assert_refused(tmp_path, CheckpointError, str(tmp_path), "config.json")
    file = tmp_path / "weights.gguf"
    file.write_bytes(b"GGUF")
    assert_refused(file, CheckpointError, "weights.gguf", "expected a folder")


@pytest.mark.parametrize("text", ["{", "", "[]", "3", '{"hidden_size": 3}', "\udcff"])
def test_config_that_is_no_config(stock, text):
    (stock / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert_refused(stock, CheckpointError, "config.json")


def test_config_with_senseless_entries(stock):
    change_config(stock, lambda c: c.update(num_hidden_layers="two"))
    assert_refused(stock, LocumError, "stock")


def test_unknown_model_type(stock):
    change_config(stock, lambda c: c.update(model_type="olmoo"))
    assert_refused(stock, UnsupportedModel, "'olmoo'", "olmo")


def test_dense_model(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(tmp_path)
    assert_refused(tmp_path, UnsupportedModel, "'llama'", "no mixture-of-experts layers")


def test_not_a_language_model(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    save_file({"x": torch.zeros(1)}, tmp_path / WEIGHTS)
    assert_refused(tmp_path, UnsupportedModel, "'vit'", "language model")


# --- weights ----------------------------------------------------------------------------------------------------


def test_no_weights(stock):
    (stock / WEIGHTS).unlink()
    assert_refused(stock, CheckpointError, "no model.safetensors")


def test_only_bin_weights(stock):
    (stock / WEIGHTS).rename(stock / "pytorch_model.bin")
    assert_refused(stock, CheckpointError, ".bin", "convert them to safetensors")


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_weights(stock, keep):
    file = stock / WEIGHTS
    file.write_bytes(file.read_bytes()[:keep])
    assert_refused(stock, CheckpointError, str(file), "again")


@pytest.mark.parametrize(
    "content",
    [
        b"not safetensors at all, " * 10,
        struct.pack("<Q", 4) + b"{{{{",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 9) + b'{"x": 33}',
    ],
)
def test_garbage_for_weights(stock, content):
    (stock / WEIGHTS).write_bytes(content)
    assert_refused(stock, CheckpointError, str(stock / WEIGHTS), "again")


@pytest.fixture
def sharded(originals, tmp_path):
    folder = tmp_path / "sharded"
    load_model(originals / "compressed").save_pretrained(folder, max_shard_size="30KB")
    return folder


def test_missing_shard(sharded):
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.unlink()
    assert_refused(sharded, CheckpointError, shard.name, "download it again")


def test_truncated_shard(sharded):
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-8])
    assert_refused(sharded, CheckpointError, str(shard), "again")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {}}'])
def test_index_that_is_no_index(sharded, text):
    (sharded / "model.safetensors.index.json").write_text(text)
    assert_refused(sharded, CheckpointError, "model.safetensors.index.json")


def test_missing_tokenizer(stock):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (stock / name).unlink()
    assert_refused(stock, CheckpointError, "tokenizer", calls=[load_tokenizer])


# --- what the config says of containers -------------------------------------------------------------------------


def of_quantization(change):
    return lambda config: change(config["quantization_config"])


def test_another_format_version(compressed):
    change_config(compressed, of_quantization(lambda q: q.update(format_version=3)))
    for call in (read_shape, load_model, AutoModelForCausalLM.from_pretrained):
        assert_refused(compressed, CheckpointError, "format version 3", "reads version 2", "install", calls=[call])


def test_quantised_by_another_method(stock):
    change_config(stock, lambda c: c.update(quantization_config={"quant_method": "gptq", "bits": 4}))
    assert_refused(stock, UnsupportedModel, "'gptq'", "compress first, quantise afterwards")


def test_a_container_for_an_unknown_layer(compressed):
    name = "model.layers.1.mlp.experts"
    change_config(
        compressed, of_quantization(lambda q: q["layers"].update({"model.layers.9.mlp.experts": q["layers"][name]}))
    )
    for call in (read_shape, load_model, AutoModelForCausalLM.from_pretrained):
        assert_refused(compressed, CheckpointError, "config.json", "'model.layers.9.mlp.experts'", calls=[call])


TAMPERED = {
    "a row that is a thousand million": {
        "stacks": [{"part": "own_weights", "variant": [], "rows": [10**9, 0, 1, 2, 3, 4, 5]}]
    },
    "rows left out": {"stacks": [{"part": "own_weights", "variant": [], "rows": [0, 1, 2, 4, 4, 4, 4]}]},
    "unknown entry": {"heads": 3},
    "not a number": {"hidden_size": "32"},
    "another width of the model": {"hidden_size": 33},
    "more experts than the model has": {
        "num_experts": 9,
        "stacks": [{"part": "own_weights", "variant": [], "rows": [0] * 9}],
    },
    "fewer experts than a token selects": {
        "num_experts": 1,
        "stacks": [{"part": "own_weights", "variant": [], "rows": [0]}],
    },
    "a part that is not installed": {"stacks": [{"part": "moon", "variant": [], "rows": [0] * 7}]},
    "biases that the family does not have": {"has_bias": True},
    "no gate where the family has one": {"has_gate": False},
}


@pytest.mark.parametrize("what", TAMPERED)
def test_a_tampered_layout_is_refused_before_weights_are_read(compressed, what):
    name = "model.layers.1.mlp.experts"
    change_config(compressed, of_quantization(lambda q: q["layers"][name].update(TAMPERED[what])))
    for call in (read_shape, load_model, AutoModelForCausalLM.from_pretrained):
        assert_refused(compressed, CheckpointError, "config.json", name, calls=[call])


@pytest.mark.parametrize("value", [[], {}, None, 0, "all", 3, {"model.layers.1.mlp.experts": None}])
def test_layers_that_are_no_table(compressed, value):
    change_config(compressed, of_quantization(lambda q: q.update(layers=value)))
    for call in (read_shape, load_model, AutoModelForCausalLM.from_pretrained):
        assert_refused(compressed, CheckpointError, "config.json", calls=[call])


RENAMED = {
    "layers renamed": (lambda q: q.update({" layers": q.pop("layers")}), ("lacks layers", "' layers'")),
    "layers gone": (lambda q: q.pop("layers"), ("lacks layers",)),
    "version gone": (lambda q: q.pop("format_version"), ("lacks format_version",)),
    "an entry more": (lambda q: q.update(bits=4), ("has 'bits'",)),
    "a version that is no number": (lambda q: q.update(format_version=True), ("format version True",)),
    "a version that is no whole number": (lambda q: q.update(format_version=2.0), ("format version 2.0",)),
    "a stack's entry renamed": (lambda q: first_stack(q).update(row=first_stack(q).pop("rows")), ("rows",)),
    "a stack's entry more": (lambda q: first_stack(q).update(columns=[]), ("columns",)),
}


def first_stack(quantization):
    return quantization["layers"]["model.layers.1.mlp.experts"]["stacks"][0]


@pytest.mark.parametrize("what", RENAMED)
def test_entries_that_are_missing_or_unknown_are_refused_by_name(compressed, what):
    """Without its layers, a compressed model would pass for a stock one."""
    change, words = RENAMED[what]
    change_config(compressed, of_quantization(change))
    for call in (inspect, load_model, AutoModelForCausalLM.from_pretrained):
        assert_refused(compressed, CheckpointError, *words, calls=[call])


def test_rows_that_do_not_fit_the_weights_are_refused(compressed):
    """The layout is sound in itself, but the file holds another number of rows."""
    name = "model.layers.1.mlp.experts"
    change_config(
        compressed, of_quantization(lambda q: q["layers"][name]["stacks"][0].update(rows=[0, 1, 2, 3, 3, 3, 4]))
    )
    assert_refused(compressed, CheckpointError, name, "dense", calls=[load_model])


def test_the_hook_leaves_an_ordinary_model(compressed):
    model = AutoModelForCausalLM.from_pretrained(compressed)
    assert not getattr(model, "is_quantized", False) and not hasattr(model, "hf_quantizer")
    assert model.config.quantization_config.quant_method == "locum"
    model.float(), model.half()
    model.float()
    with torch.no_grad():
        assert model(tiny_ids()).logits.isfinite().all()


@pytest.mark.parametrize(
    ("entry", "value", "words"),
    [
        ("original", 7, "'original' is 7, not text"),
        ("original", None, "'original' is None, not text"),
        ("plan", ["a"], "'plan' is .*, not text"),
        ("recovery", "lora", "'recovery' is 'lora', not an object"),
        ("seed", 0.5, "'seed' is 0.5, not a whole number"),
        ("original_shape", {}, "'original_shape' is no shape"),
        ("original_shape", {"model_type": 1, "layers": [{}]}, "'original_shape' is no shape"),
    ],
)
def test_notes_of_the_wrong_kind_are_refused(entry, value, words, compressed):
    notes = json.loads((compressed / "locum.json").read_text())
    (compressed / "locum.json").write_text(json.dumps({**notes, entry: value}))
    with pytest.raises(CheckpointError, match=f"locum.json: {words}"):
        read_notes(compressed)
