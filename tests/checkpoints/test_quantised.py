"""Quantised checkpoints: they are measured as the numbers that they stand for, and pruned in the format that they came in."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.utils import is_compressed_tensors_available

import locum
from locum.checkpoints.experts_of import expert_readers
from locum.checkpoints.load import load_model
from locum.checkpoints.skeleton import read_shape
from locum.checkpoints.streamed import stream_model
from locum.models.layer_major import passes
from locum.plans.plan import DROPPED, KEPT, LayerPlan, Plan, make_plan
from locum.shapes import ModelShape
from locum.stages.opening import is_to_stream
from making.broken import change_weights
from making.checkpoints import locum as command
from making.checkpoints import write_checkpoint, write_text
from making.quantised import ALL_PARTS, KINDS, part_name, quantise, write_quantised
from making.tiny_models import tiny_ids

KEEP = (1, 2, 3, 5, 6, 7)
FEWER = (DROPPED, *[KEPT] * 3, DROPPED, *[KEPT] * 3)
STOCK = ("fp8-block", "mxfp4", "int-packed", "fp8-scaled")  # what transformers 5.24 reads without fault on a CPU


@pytest.fixture(scope="module", params=KINDS)
def both(request, tmp_path_factory):
    """A quantised checkpoint and its numbers. Tests only read them."""
    return write_quantised(tmp_path_factory.mktemp(request.param), request.param)


def kind_of(folder: Path) -> str:
    return folder.parent.name.rstrip("0123456789")


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(one: torch.Tensor, two: torch.Tensor) -> bool:
    return one.dtype == two.dtype and one.shape == two.shape and bytes(raw(one)) == bytes(raw(two))


def raw(tensor: torch.Tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


def even(shape: ModelShape) -> Plan:
    return make_plan(shape, [LayerPlan(x.name, FEWER) for x in shape.layers])


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(tiny_ids()).logits


def test_a_checkpoint_has_the_shape_of_its_numbers_and_the_bytes_of_its_parts(both):
    quantised, plain = map(read_shape, both)
    for layer, other in zip(quantised.layers, plain.layers, strict=True):
        parts = [t for n, t in tensors_in(both[0]).items() if n.startswith(layer.name)]
        assert layer.expert_bytes * layer.num_experts == sum(t.nbytes for t in parts)
        assert layer.router_bytes == other.router_bytes
    assert quantised.parameters == plain.parameters
    assert quantised.bytes == sum(t.nbytes for t in tensors_in(both[0]).values()) < plain.bytes
    said = locum.inspect(both[0])
    assert said["bytes"] == quantised.bytes and said["active_bytes"] < said["bytes"]
    assert any(kind_of(both[0]) in note for note in said["notes"])


def test_a_live_model_computes_with_its_numbers_whole_and_streamed(both):
    expected = logits(load_model(both[1]))
    assert torch.equal(logits(load_model(both[0])), expected)
    model = stream_model(both[0])
    with torch.no_grad():
        (streamed,) = passes(model, [lambda: model(tiny_ids()).logits])
    assert torch.equal(streamed, expected)


def test_experts_are_read_as_their_numbers(both):
    readers = [expert_readers(folder) for folder in both]
    name = read_shape(both[0]).layers[1].name
    for e in (0, 5):
        one, two = (read(name)(e) for read in readers)
        assert all(
            torch.equal(a, b) for a, b in zip(vars(one).values(), vars(two).values(), strict=True) if a is not None
        )


def test_pruned_it_keeps_its_format_and_every_byte_that_is_left(both, tmp_path):
    quantised, plain = both
    shape = read_shape(quantised)
    plan = even(shape)
    out = locum.apply(quantised, plan=plan, out=tmp_path / "out")
    before, after = tensors_in(quantised), tensors_in(out)
    assert sum(t.nbytes for t in after.values()) == plan.size(shape).bytes == read_shape(out).bytes
    assert sum(t.nbytes for t in after.values()) < sum(t.nbytes for t in before.values())
    for layer in shape.layers:
        block = layer.name.removesuffix("experts")
        for name in (n for n in before if n.startswith(block)):
            if f"{layer.name}.0." in name:
                for new, old in enumerate(KEEP):
                    numbered = [name.replace(".experts.0.", f".experts.{e}.") for e in (new, old)]
                    assert same(after[numbered[0]], before[numbered[1]])
            elif ".experts." not in name and ".shared_experts." not in name:
                assert same(after[name], before[name][list(KEEP)])  # the router's
            elif before[name].shape[:1] == (8,):
                assert same(after[name], before[name][list(KEEP)])  # stacked
    untouched = [n for n in before if ".mlp." not in n]
    assert len(untouched) > 10 and all(same(after[name], before[name]) for name in untouched)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (quantised, out)]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    expected = logits(load_model(locum.apply(plain, plan=plan, out=tmp_path / "plain")))
    assert torch.equal(logits(load_model(out)), expected)
    again = read_shape(out)
    assert locum.inspect(out)["bytes"] == again.bytes and again.layers[0].expert_bytes == shape.layers[0].expert_bytes


@pytest.mark.parametrize("kind", STOCK)
def test_pruned_it_loads_in_stock_transformers(kind, tmp_path):
    if KINDS[kind][2]["quant_method"] == "compressed-tensors" and not is_compressed_tensors_available():
        pytest.skip("transformers reads this format by compressed-tensors, which is not installed")
    # transformers takes blocks of FP8 for equally large: no weight may end within one.
    model, plain = write_quantised(tmp_path, kind, **({"qk_rope_head_dim": 16} if kind == "fp8-block" else {}))
    plan = even(read_shape(model))
    out, expected = (locum.apply(x, plan=plan, out=tmp_path / f"{x.name} out") for x in (model, plain))
    stock = AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(logits(stock), logits(AutoModelForCausalLM.from_pretrained(expected)))
    assert stock.generate(tiny_ids(1, 4), max_new_tokens=3, do_sample=False).shape == (1, 7)


def test_statistics_and_losses_are_those_of_the_numbers(both, tmp_path):
    text = write_text(tmp_path / "a.txt", characters=60_000)
    how = {"data": [str(text)], "tokens": 512, "length": 32}
    one = locum.calibrate(both[0], **how, out=tmp_path / "one.safetensors", stream=True)
    two = locum.calibrate(both[1], **how, out=tmp_path / "two.safetensors")
    assert one.layers.keys() == two.layers.keys()
    for name, sums in one.layers.items():
        assert sums.keys() == two.layers[name].keys()
        assert all(torch.equal(sums[what], two.layers[name][what]) for what in sums)
    how = {"data": [str(text)], "tokens": 256, "length": 32}
    rows = [locum.evaluate(both[i], against=both[1 - i], **how) for i in (0, 1)]
    measured = [sorted((row.metric, row.value) for row in of) for of in rows]
    assert len(measured[0]) > 2 and measured[0] == measured[1]
    assert {value for metric, value in measured[0] if metric == "kl"} <= {0.0}


def test_a_target_in_bytes_is_met_by_the_bytes_of_the_parts(both, tmp_path):
    shape = read_shape(both[0])
    most = shape.bytes - 2 * sum(layer.expert_bytes for layer in shape.layers)
    text = write_text(tmp_path / "a.txt", characters=20_000)
    locum.calibrate(both[0], data=[str(text)], tokens=256, length=32, out=tmp_path / "stats.safetensors")
    plan = locum.plan([tmp_path / "stats.safetensors"], method="prune", fit=most)
    out = locum.apply(both[0], plan=plan, out=tmp_path / "out")
    size = sum(t.nbytes for t in tensors_in(out).values())
    assert most - 2 * sum(layer.expert_bytes for layer in shape.layers) < size <= most


def test_prediction_layers_in_the_same_format_follow(tmp_path):
    model = write_checkpoint(tmp_path / "original", "deepseek_v3", moe_intermediate_size=32, intermediate_size=32)

    def predict(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if n.startswith("model.layers.1.")]:
            tensors[name.replace("layers.1.", "layers.2.")] = tensors[name] * 2

    change_weights(model, predict)
    config = json.loads((model / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    (model / "config.json").write_text(json.dumps(config))
    quantise(model, "fp8-block")
    shape = read_shape(model)
    out = locum.apply(model, plan=even(shape), out=tmp_path / "out")
    before, after = tensors_in(model), tensors_in(out)
    for part in ("", "_scale_inv"):
        name = f"model.layers.2.mlp.experts.{{}}.up_proj.weight{part}"
        assert all(same(after[name.format(new)], before[name.format(old)]) for new, old in enumerate(KEEP))
        assert name.format(6) not in after
    assert sum(t.nbytes for t in after.values()) == even(shape).size(shape).bytes


def test_names_that_number_experts_are_numbered_anew_in_the_config(tmp_path):
    model = write_checkpoint(tmp_path / "original", "qwen3_moe", moe_intermediate_size=32)
    quantise(model, "int-packed")
    config = json.loads((model / "config.json").read_text())
    path = "model.layers.1.mlp.experts."
    config["quantization_config"]["ignore"] += [f"{path}{e}.gate_proj" for e in (0, 2, 5)] + [r"re:.*experts\.3\..*"]
    (model / "config.json").write_text(json.dumps(config))
    out = locum.apply(model, plan=even(read_shape(model)), out=tmp_path / "out")
    ignored = json.loads((out / "config.json").read_text())["quantization_config"]["ignore"]
    kept = [f"{path}{e}.gate_proj" for e in (1, 3)]
    assert ignored == ["lm_head", "model.layers.0.mlp.gate", *kept, r"re:.*experts\.3\..*"]


@pytest.mark.parametrize(
    ("quantization", "words"),
    [
        ({"quant_method": "awq"}, "quantised with 'awq'"),
        ({"quant_method": "modelopt", "quant_algo": "W4A8"}, "'modelopt', 'W4A8'"),
        ({"quant_method": "compressed-tensors", "format": "marlin-24", "config_groups": {"a": {}}}, "'marlin-24'"),
        ({"quant_method": "mxfp4"}, "nothing beside it are scales"),  # its tensors are not
    ],
)
def test_formats_that_are_not_known_are_refused_in_one_line(quantization, words, tmp_path):
    model = write_checkpoint(tmp_path / "original", "qwen3_moe", moe_intermediate_size=32)
    quantise(model, "nvfp4")
    config = json.loads((model / "config.json").read_text()) | {"quantization_config": quantization}
    (model / "config.json").write_text(json.dumps(config))
    said = command("inspect", model)
    assert said.exit_code == 2 and said.stderr.count("\n") == 1 and words in said.stderr


def test_a_weight_that_lacks_a_part_is_refused(both, tmp_path):
    name = next(
        n for n in sorted(tensors_in(both[0])) if ".experts." in n and n.endswith(("_scale", "_scales", "_scale_inv"))
    )
    model = shutil.copytree(both[0], tmp_path / "model")
    change_weights(model, lambda tensors: tensors.pop(name))
    said = command("inspect", model)
    assert said.exit_code == 2 and said.stderr.count("\n") == 1


def test_experts_in_several_formats_are_refused(tmp_path):
    model = write_checkpoint(tmp_path / "original", "deepseek_v3", moe_intermediate_size=32)
    numbers = quantise(model, "fp8-block")
    name = next(n for n in numbers if ".experts.3." in n)

    def widen(tensors: dict[str, torch.Tensor]) -> None:
        for part in ALL_PARTS:
            tensors.pop(part_name(name, part), None)
        tensors[name] = numbers[name].bfloat16()

    change_weights(model, widen)
    said = command("inspect", model)
    assert said.exit_code == 2 and "in several number formats" in said.stderr and said.stderr.count("\n") == 1


def test_it_is_streamed_where_its_numbers_do_not_fit(both, monkeypatch):
    files = (both[0] / "model.safetensors").stat().st_size
    for free, streamed in ((files + 1000, True), (4 * files, False)):
        monkeypatch.setattr("locum.stages.opening.free_bytes", lambda device, free=free: free)
        assert is_to_stream([both[0]], None, "cpu") == streamed


def test_training_makes_numbers_of_what_was_packed_and_says_so(tmp_path):
    """No plan promises their bytes: a limit is refused before any work, the card and `verify` say why there is no size."""
    model, _ = write_quantised(tmp_path, "fp8-block")
    text = ("--data", write_text(tmp_path / "words.txt"), "--tokens", 256, "--length", 32)
    training = ("--recover", "router", "--recover-steps", 1, "--recover-length", 32)
    asked = ("compress", model, "--method", "prune", *text, *training, "--out", tmp_path / "small")
    said = command(*asked, "--fit", "1MiB")
    assert said.exit_code == 2 and "makes numbers in bfloat16 of all that" in said.stderr
    assert not (tmp_path / "small").exists()
    said = command(*asked, "--remove", 0.25)
    assert said.exit_code == 0, said.output
    assert "numbers in bfloat16 since training" in (tmp_path / "small" / "README.md").read_text()
    said = command("verify", tmp_path / "small", "--engine", "transformers", "--json")
    assert "no plan promises their bytes" in said.stdout and said.exit_code == 0, said.output
    for name, of, more, told in (
        ("again", tmp_path / "small", (), True),
        ("adapter", model, ("--adapter-only",), False),
    ):
        asked = ("--data", tmp_path / "words.txt", "--steps", 1, "--length", 32, "--how", "router")
        said = command("recover", of, *asked, *more, "--out", tmp_path / name)
        assert said.exit_code == 0, said.output
        assert ("since training" in (tmp_path / name / "README.md").read_text()) is told
