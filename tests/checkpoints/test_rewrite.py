"""Plans carried out on files: what is touched equals the live model's, everything else is the original's bytes."""

from __future__ import annotations

import contextlib
import json
import shutil
import weakref
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import locum
from locum.checkpoints.application import apply_plan
from locum.checkpoints.expert_reader import ExpertReader
from locum.checkpoints.load import load_model, open_model
from locum.checkpoints.read import read_headers
from locum.checkpoints.rewrite import AROUND, PER_TENSOR, Rewriting
from locum.checkpoints.skeleton import open_source, read_shape
from locum.containers.container import StandInExperts
from locum.errors import CheckpointError, OutputError
from locum.models.families import find_layers
from locum.models.stored import write_model
from locum.plans.plan import DROPPED, KEPT, Base, LayerPlan, Plan, make_plan, stand_in
from locum.runs import Work, bytes_begun
from locum.shapes import ModelShape
from making.broken import WEIGHTS, change_weights
from making.checkpoints import locum as command
from making.checkpoints import tree, write_checkpoint
from making.tiny_models import tiny_ids

FEWER = (DROPPED, *[KEPT] * 3, DROPPED, *[KEPT] * 3)  # one of each group, where routers have two
STAND_INS = (*[KEPT] * 4, *[stand_in(0, 2, "svd")] * 4)
BASES = (Base((4, 5, 6, 7), (0.25,) * 4),)


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def change_config(folder: Path, **entries: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | entries))


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def same(one: torch.Tensor, two: torch.Tensor) -> bool:
    return one.dtype == two.dtype and torch.equal(one, two)


def even(shape: ModelShape) -> Plan:
    return make_plan(shape, [LayerPlan(x.name, FEWER) for x in shape.layers])


def light(shape: ModelShape) -> Plan:
    return make_plan(shape, [LayerPlan(x.name, STAND_INS, BASES) for x in shape.layers])


# --- what transformers does not load --------------------------------------------------------------------------------


def with_prediction(folder: Path, prefix: str, **renamed: str) -> Path:
    """A layer that predicts further tokens: the last MoE layer's tensors under another name, other numbers, and a few more."""
    generator = torch.Generator().manual_seed(5)

    def add(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if n.startswith("model.layers.1.")]:
            path = name.removeprefix("model.layers.1.")
            for old, new in renamed.items():
                path = path.replace(old, new)
            tensors[prefix + path] = torch.randn(tensors[name].shape, generator=generator).to(tensors[name].dtype)
        tensors[prefix + "eh_proj.weight"] = torch.randn(32, 64, generator=generator).bfloat16()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.arange(4.0)
        tensors["model.embeddings.position_ids"] = torch.arange(9)[None]

    change_weights(folder, add)
    change_config(folder, num_nextn_predict_layers=1)
    return folder


@pytest.fixture
def predicting(tmp_path):
    return with_prediction(write_checkpoint(tmp_path / "original", "deepseek_v3"), "model.layers.2.")


def beside(folder: Path) -> dict[str, torch.Tensor]:
    source = open_source(folder)
    return {name: tensor for name, tensor in tensors_in(folder).items() if name in source.unread}


def test_containers_keep_every_byte_beside_the_model(predicting, tmp_path):
    shape = read_shape(predicting)
    plan = light(shape)
    out = locum.apply(predicting, plan=plan, out=tmp_path / "out")
    before, after = tensors_in(predicting), tensors_in(out)
    aside = beside(predicting)
    assert len(aside) > 30 and all(same(after[name], aside[name]) for name in aside)
    assert sum(t.nbytes for t in after.values()) == plan.size(shape).bytes == read_shape(out).bytes
    assert sum(t.numel() for t in after.values()) == plan.size(shape).parameters
    kept = [name for name in before if name in after]
    assert len(kept) > len(aside) + 10 and all(same(after[name], before[name]) for name in kept)
    assert config_of(out)["num_nextn_predict_layers"] == 1 and config_of(out)["n_routed_experts"] == 8
    load_model(out)


@pytest.mark.parametrize("prefix", ["model.layers.2.", "mtp.layers.0.", "mtp.0."])
def test_experts_of_prediction_layers_leave_with_those_of_the_last_layer(prefix, tmp_path, monkeypatch):
    original = write_checkpoint(tmp_path / "original", "deepseek_v3")
    monkeypatch.setattr(  # as the families have it whose files have such names
        "transformers.DeepseekV3ForCausalLM._keys_to_ignore_on_load_unexpected", [r"^mtp\."]
    )
    with_prediction(original, prefix)
    shape = read_shape(original)
    other = (*[KEPT] * 3, DROPPED, *[KEPT] * 3, DROPPED)
    plan = make_plan(shape, [LayerPlan(shape.layers[0].name, FEWER), LayerPlan(shape.layers[1].name, other)])
    out = locum.apply(original, plan=plan, out=tmp_path / "out")
    before, after = tensors_in(original), tensors_in(out)
    keep = (0, 1, 2, 4, 5, 6)
    for new, old in enumerate(keep):
        for leaf in ("gate_proj", "up_proj", "down_proj"):
            path = f"{prefix}mlp.experts.{{}}.{leaf}.weight"
            assert same(after[path.format(new)], before[path.format(old)])
    assert f"{prefix}mlp.experts.6.up_proj.weight" not in after
    for leaf in ("weight", "e_score_correction_bias"):
        assert same(after[f"{prefix}mlp.gate.{leaf}"], before[f"{prefix}mlp.gate.{leaf}"][list(keep)])
    rest = [n for n in beside(original) if ".experts." not in n and ".gate." not in n]
    assert len(rest) > 5 and all(same(after[name], before[name]) for name in rest)
    size = plan.size(shape)
    assert (sum(t.numel() for t in after.values()), sum(t.nbytes for t in after.values())) == (
        size.parameters,
        size.bytes,
    )
    assert config_of(out)["num_nextn_predict_layers"] == 1 and config_of(out)["n_routed_experts"] == 6
    assert read_shape(out).bytes == size.bytes
    assert read_shape(out).model.parameters == sum(p.numel() for p in load_model(out).state_dict().values())
    again = read_shape(out)  # and once more
    assert again.aside.expert_numel == shape.aside.expert_numel > 0


@pytest.mark.parametrize("renamed", [{"mlp.experts.": "mlp.experts.more."}, {"mlp.gate.": "mlp.router."}])
def test_prediction_layers_with_other_names_are_left_out_where_experts_leave(renamed, tmp_path):
    original = with_prediction(write_checkpoint(tmp_path / "original", "deepseek_v3"), "model.layers.2.", **renamed)
    shape = read_shape(original)
    out = locum.apply(original, plan=even(shape), out=tmp_path / "out")
    after = tensors_in(out)
    assert not any(name.startswith("model.layers.2.") for name in after)
    assert "model.embeddings.position_ids" in after and "model.layers.0.self_attn.rotary_emb.inv_freq" in after
    assert sum(t.nbytes for t in after.values()) == even(shape).size(shape).bytes
    assert config_of(out)["num_nextn_predict_layers"] == 0
    load_model(out)
    kept = locum.apply(original, plan=light(shape), out=tmp_path / "kept")
    assert all(same(tensors_in(kept)[name], tensor) for name, tensor in beside(original).items())
    assert config_of(kept)["num_nextn_predict_layers"] == 1


def test_what_is_beside_the_model_is_counted_and_not_active(predicting, tmp_path):
    plain = read_shape(write_checkpoint(tmp_path / "plain", "deepseek_v3"))
    shape = read_shape(predicting)
    aside = beside(predicting).values()
    assert shape.aside.parameters == sum(t.numel() for t in aside)
    assert shape.bytes - plain.bytes == shape.aside.bytes == sum(t.nbytes for t in aside)
    assert (shape.model.parameters, shape.model.bytes) == (plain.parameters, plain.bytes)
    assert ModelShape.from_json(json.loads(json.dumps(shape.to_json()))) == shape
    said = [locum.inspect(folder) for folder in (tmp_path / "plain", predicting)]
    assert said[0]["active_parameters"] == said[1]["active_parameters"]
    assert said[0]["active_bytes"] == said[1]["active_bytes"]
    old = {name: value for name, value in plain.to_json().items() if name != "aside"}  # of an earlier Locum
    assert ModelShape.from_json(old) == plain


def test_a_layer_that_the_model_has_is_never_taken_for_one_that_predicts(tmp_path, monkeypatch):
    """Families list names that are too many only in their smaller models: GLM-4.5 has a layer that GLM-4.5-Air has not."""
    folder = write_checkpoint(tmp_path / "original")
    shape = read_shape(folder)
    monkeypatch.setattr("transformers.OlmoeForCausalLM._keys_to_ignore_on_load_unexpected", [r"model\.layers\.1\."])
    assert read_shape(folder) == shape
    out = locum.apply(folder, plan=even(shape), out=tmp_path / "out")
    assert sum(t.nbytes for t in tensors_in(out).values()) == even(shape).size(shape).bytes


def test_a_tied_matrix_that_files_hold_twice_stays_so(tmp_path):
    folder = write_checkpoint(tmp_path / "original", tie_word_embeddings=True)
    change_weights(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    shape = read_shape(folder)
    out = locum.apply(folder, plan=light(shape), out=tmp_path / "out")
    after = tensors_in(out)
    assert same(after["lm_head.weight"], after["model.embed_tokens.weight"])
    assert sum(t.nbytes for t in after.values()) == light(shape).size(shape).bytes
    assert (
        light(shape).size(shape).parameters == sum(t.numel() for t in after.values()) - after["lm_head.weight"].numel()
    )


# --- dtypes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("said", ["bfloat16", "float32"])
def test_experts_are_what_the_files_hold_whatever_the_config_calls_them(said, tmp_path):
    folder = write_checkpoint(tmp_path / "original")

    def mix(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if said == "float32" or "norm" in name:
                tensors[name] = tensors[name].bfloat16()
            if ".experts.1." in name:
                tensors[name] = tensors[name].half()

    change_weights(folder, mix)
    change_config(folder, dtype=said)
    before, shape = tensors_in(folder), read_shape(folder)
    out = tensors_in(locum.apply(folder, plan=even(shape), out=tmp_path / "even"))
    for new, old in enumerate((1, 2, 3, 5, 6, 7)):
        for leaf in ("gate_proj", "up_proj", "down_proj"):
            path = f"model.layers.1.mlp.experts.{{}}.{leaf}.weight"
            assert same(out[path.format(new)], before[path.format(old)])


# --- shards ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", [even, light])
def test_weights_are_shared_out_to_files_of_a_size(plan, checkpoint, tmp_path):
    decided = plan(read_shape(checkpoint))
    one = locum.apply(checkpoint, plan=decided, out=tmp_path / "one")
    several = locum.apply(checkpoint, plan=decided, out=tmp_path / "several", shard_size="30KB")
    assert [file.name for file in one.glob("*.safetensors*")] == [WEIGHTS]
    files = sorted(several.glob("*.safetensors"))
    assert len(files) > 3
    assert [file.name for file in files] == [
        f"model-{n + 1:05}-of-{len(files):05}.safetensors" for n in range(len(files))
    ]
    index = json.loads((several / "model.safetensors.index.json").read_text())
    tensors = {file.name: load_file(file) for file in files}
    assert index["weight_map"] == {name: file for file, held in tensors.items() for name in held}
    sizes = [sum(t.nbytes for t in held.values()) for held in tensors.values()]
    assert all(size <= 30_000 or len(held) == 1 for size, held in zip(sizes, tensors.values(), strict=True))
    assert index["metadata"]["total_size"] == sum(sizes)
    whole = tensors_in(one)
    assert whole.keys() == tensors_in(several).keys()
    assert all(same(whole[name], tensor) for name, tensor in tensors_in(several).items())
    save_file(whole, tmp_path / "again.safetensors", {"format": "pt"})  # as the library itself lays it out
    assert (tmp_path / "again.safetensors").read_bytes() == (one / WEIGHTS).read_bytes()
    with torch.no_grad():
        logits = [AutoModelForCausalLM.from_pretrained(folder)(tiny_ids()).logits for folder in (one, several)]
    assert torch.equal(*logits)


def test_a_sharded_original_is_read_where_its_tensors_lie(checkpoint, tmp_path):
    sharded = tmp_path / "sharded"
    load_model(checkpoint).save_pretrained(sharded, max_shard_size="20KB")
    for file in checkpoint.glob("tokenizer*"):
        shutil.copy(file, sharded)
    plan = light(read_shape(checkpoint))
    one, two = (locum.apply(folder, plan=plan, out=tmp_path / f"of {folder.name}") for folder in (checkpoint, sharded))
    assert (one / WEIGHTS).read_bytes() == (two / WEIGHTS).read_bytes()


@pytest.mark.parametrize("size", ["0", "-1", "much"])
def test_senseless_shard_sizes_are_refused(size, checkpoint, plan_file, tmp_path):
    said = command("apply", checkpoint, "--plan", plan_file, "--out", tmp_path / "out", "--shard-size", size)
    assert said.exit_code == 2 and said.stderr.count("\n") == 1 and not (tmp_path / "out").exists()


# --- opened containers ----------------------------------------------------------------------------------------------


def uneven(shape: ModelShape) -> Plan:
    return make_plan(shape, [LayerPlan(shape.layers[1].name, FEWER)])


def again_uneven(shape: ModelShape) -> Plan:
    """Two fewer in the first layer, and in the second, which has six, four."""
    slots = (DROPPED, *[KEPT] * 2, DROPPED, *[KEPT] * 2)
    more = (*[DROPPED] * 3, *[KEPT] * 5)
    return make_plan(shape, [LayerPlan(shape.layers[0].name, more), LayerPlan(shape.layers[1].name, slots)])


def now_even(shape: ModelShape) -> Plan:
    return make_plan(shape, [LayerPlan(shape.layers[0].name, FEWER), LayerPlan(shape.layers[1].name, (KEPT,) * 6)])


def even_by_the_other(shape: ModelShape) -> Plan:
    """The layer that was pruned before is not in the plan, and its container is not needed any more."""
    return make_plan(shape, [LayerPlan(shape.layers[0].name, FEWER)])


def lightened(shape: ModelShape) -> Plan:
    slots = (KEPT, KEPT, *[stand_in(0, 2)] * 4)
    return make_plan(shape, [LayerPlan(shape.layers[1].name, slots, (Base((2, 3, 4, 5), (0.25,) * 4),))])


def one_layer(shape: ModelShape) -> Plan:
    """The layer that was pruned before is not in the plan."""
    slots = (*[KEPT] * 7, stand_in(rank=2, start="svd"))
    return make_plan(shape, [LayerPlan(shape.layers[0].name, slots)])


@pytest.mark.parametrize("model_type", ["olmoe", "gpt_oss", "mixtral", "granitemoe"])
@pytest.mark.parametrize("then", [again_uneven, now_even, even_by_the_other, lightened, one_layer])
def test_what_was_pruned_unevenly_is_compressed_further(model_type, then, tmp_path):
    original = write_checkpoint(tmp_path / "original", model_type)
    pruned = locum.apply(original, plan=uneven(read_shape(original)), out=tmp_path / "pruned")
    shape = read_shape(pruned)
    plan = then(shape)
    out = locum.apply(pruned, plan=plan, out=tmp_path / "out", seed=2)
    model = apply_plan(open_model(pruned), plan, seed=2)
    write_model(model, tmp_path / "saved")
    expected, found = tensors_in(tmp_path / "saved"), tensors_in(out)
    assert found.keys() == expected.keys() and all(same(found[name], expected[name]) for name in expected)
    assert config_of(out) == config_of(tmp_path / "saved")
    stock = then in (now_even, even_by_the_other)
    assert ("quantization_config" in config_of(out)) != stock
    assert sum(t.nbytes for t in found.values()) == plan.size(shape).bytes
    again = load_model(out)
    assert any(isinstance(x.experts, StandInExperts) for x in find_layers(again)) != stock


# --- refusals -------------------------------------------------------------------------------------------------------


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(checkpoint, plan_file, tmp_path, monkeypatch):
    size = locum.load_plan(plan_file).size(read_shape(checkpoint)).bytes
    usage = namedtuple("usage", "total used free")
    free = size + (checkpoint / "tokenizer.json").stat().st_size + AROUND
    with monkeypatch.context() as patch:
        patch.setattr("locum.files.shutil.disk_usage", lambda path: usage(0, 0, free))
        patch.setattr("locum.checkpoints.rewrite.ShardWriter", None)
        with pytest.raises(OutputError, match=r"no space left for .*out: it takes 1\.\d+ MiB, and 1\.\d+ MiB are free"):
            locum.apply(checkpoint, plan=plan_file, out=tmp_path / "out")
        assert tree(tmp_path) == {}
    monkeypatch.setattr("locum.files.shutil.disk_usage", lambda path: usage(0, 0, free + 100_000))
    out = locum.apply(checkpoint, plan=plan_file, out=tmp_path / "out")
    assert sum(file.stat().st_size for file in out.iterdir()) < free + 100_000


@pytest.mark.parametrize("place", ["pieces", "row", "tensor"])
def test_an_interrupt_leaves_layers_that_are_done_or_nothing(place, tmp_path, monkeypatch):
    family = {"row": "gpt_oss"}.get(place, "olmoe")
    original, plan = write_checkpoint(tmp_path / "original", family), light
    plan = plan(read_shape(original))
    reads = 0

    def press(*_: object) -> None:
        nonlocal reads
        reads += 1
        if reads == 4:
            raise KeyboardInterrupt
        return real(*_)

    real = getattr(locum.checkpoints.shard_reader.ShardReader, place)
    monkeypatch.setattr(f"locum.checkpoints.shard_reader.ShardReader.{place}", press)
    with pytest.raises(KeyboardInterrupt):
        locum.apply(original, plan=plan, out=tmp_path / "out")
    assert reads == 4
    done = [".out.part-kept"] if place == "pieces" else []  # the fourth is read after the first layer's experts
    assert sorted(path.name for path in tmp_path.iterdir()) == [*done, "original"]


# --- runs that go on ------------------------------------------------------------------------------------------------


def interrupted(original: Path, out: Path, **asked: object) -> int:
    """Apply a plan until the first layer is saved; how many experts were read for it."""
    with pytest.MonkeyPatch.context() as patch:
        reads, save = counted_reads(patch), Work.save

        def press(work: Work, done: int) -> None:
            save(work, done)
            raise KeyboardInterrupt

        patch.setattr(Work, "save", press)
        with pytest.raises(KeyboardInterrupt):
            locum.apply(original, out=out, **asked)
    assert not out.exists() and out.with_name(f".{out.name}.part-kept").is_dir()
    return len(reads)


def counted_reads(patch: pytest.MonkeyPatch) -> list[int]:
    reads, real = [], ExpertReader.__call__
    patch.setattr(ExpertReader, "__call__", lambda reader, e: reads.append(e) or real(reader, e))
    return reads


@pytest.fixture
def original(tmp_path):
    return write_checkpoint(tmp_path / "original", num_hidden_layers=3)


@pytest.mark.parametrize("shard_size", ["5GiB", "30KB"])
@pytest.mark.parametrize("plan", [even, light])
def test_an_interrupted_run_goes_on_after_the_last_layer_that_was_done(
    plan, shard_size, original, tmp_path, monkeypatch
):
    asked = {"plan": plan(read_shape(original)), "shard_size": shard_size}
    with monkeypatch.context() as patch:
        all_reads = counted_reads(patch)
        whole = tree(locum.apply(original, out=tmp_path / "whole" / "out", **asked))
    before = interrupted(original, tmp_path / "out", **asked)
    reads, told = counted_reads(monkeypatch), []
    locum.apply(original, out=tmp_path / "out", progress=lambda stage, done, total: told.append((done, total)), **asked)
    assert len(reads) == len(all_reads) - before and told == [(1, 3), (2, 3), (3, 3)]
    assert before > 0 or plan is even  # nothing but bytes is moved for it
    ours = tree(tmp_path / "out")
    assert {name for name in whole if ours.get(name) != whole[name]} <= {"README.md", "locum.json"}  # which say when
    assert ours.keys() == whole.keys() and {p.name for p in tmp_path.iterdir()} == {"original", "out", "whole"}


CHANGES = {
    "seed was 0 and is 1": lambda original, asked: asked.update(seed=1),
    "shard_size was": lambda original, asked: asked.update(shard_size="30KB"),
    "plan was": lambda original, asked: asked.update(plan=even(read_shape(original))),
    "files was": lambda original, asked: change_weights(original, lambda tensors: tensors["lm_head.weight"].add_(1)),
}


@pytest.mark.parametrize("said", CHANGES)
def test_a_run_that_asks_something_else_begins_afresh_and_says_why(said, original, tmp_path, caplog):
    asked = {"plan": light(read_shape(original))}
    interrupted(original, tmp_path / "out", **asked)
    CHANGES[said](original, asked)
    out = locum.apply(original, out=tmp_path / "out", **asked)
    assert said in caplog.text and "begins afresh" in caplog.text
    whole = locum.apply(original, out=tmp_path / "whole" / "out", **asked)
    for file in whole.glob("*.safetensors*"):
        assert (out / file.name).read_bytes() == file.read_bytes()
    assert {p.name for p in tmp_path.iterdir()} == {"original", "out", "whole"}


@pytest.mark.parametrize("damage", ["removed", "shorter", "other"])
def test_what_was_begun_and_changed_since_is_refused_once(damage, original, tmp_path):
    asked = {"plan": light(read_shape(original)), "out": tmp_path / "out"}
    interrupted(original, **asked)
    file = tmp_path / ".out.part-kept" / WEIGHTS
    data = file.read_bytes()
    file.write_bytes(data[:-1] if damage == "shorter" else data[:9] + b"x" + data[10:])
    if damage == "removed":
        file.unlink()
    with pytest.raises(
        CheckpointError, match=r"model.safetensors, which an interrupted run had begun, was changed since"
    ):
        locum.apply(original, **asked)
    load_model(locum.apply(original, **asked))


def test_a_disk_that_has_room_for_what_is_left_is_not_refused(original, tmp_path, monkeypatch):
    asked = {"plan": light(read_shape(original)), "out": tmp_path / "out"}
    interrupted(original, **asked)
    begun = bytes_begun(tmp_path / "out")
    rewriting = Rewriting(open_source(original), read_shape(original), asked["plan"])
    needed = rewriting.bytes + PER_TENSOR * sum(len(step.entries) for step in rewriting.steps) + AROUND
    usage = namedtuple("usage", "total used free")
    for free, refused in ((needed - begun - 1, True), (needed - begun, False)):
        monkeypatch.setattr("locum.files.shutil.disk_usage", lambda path, free=free: usage(0, 0, free))
        with pytest.raises(OutputError, match="no space left") if refused else contextlib.nullcontext():
            rewriting.check_space(tmp_path / "out")
    assert begun > 0


def without_an_expert(tensors: dict[str, torch.Tensor]) -> str:
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    del tensors[name]
    return name


def with_one_more(tensors: dict[str, torch.Tensor]) -> str:
    name = "model.layers.1.mlp.experts.8.up_proj.weight"
    tensors[name] = tensors[name.replace(".8.", ".7.")].clone()
    return name


def with_another_shape(tensors: dict[str, torch.Tensor]) -> str:
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    tensors[name] = torch.zeros(3, 5)
    return name


def with_wide_experts(tensors: dict[str, torch.Tensor]) -> str:
    for name in tensors:
        if ".experts." in name and "up_proj" in name:
            tensors[name] = torch.zeros(3, 5)
    return "model.layers.0.mlp.experts"


@pytest.mark.parametrize("damage", [without_an_expert, with_one_more, with_another_shape, with_wide_experts])
@pytest.mark.parametrize("plan", [even, light])
def test_experts_that_cannot_be_read_are_refused_at_once(damage, plan, checkpoint, tmp_path):
    folder = Path(shutil.copytree(checkpoint, tmp_path / "original"))
    decided, said = plan(read_shape(checkpoint)), []
    change_weights(folder, lambda tensors: said.append(damage(tensors)))
    with pytest.raises(CheckpointError, match="fetch") as refused:
        locum.apply(folder, plan=decided, out=tmp_path / "out")
    assert said[0] in str(refused.value) and not (tmp_path / "out").exists()


def test_no_model_is_built(checkpoint, plan_file, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.OlmoeForCausalLM.from_pretrained", None)
    out = locum.apply(checkpoint, plan=plan_file, out=tmp_path / "out")
    assert read_headers(out)


@pytest.mark.parametrize("plan", [even, light])
def test_few_experts_are_in_memory_at_a_time(plan, checkpoint, tmp_path, monkeypatch):
    """However many there are: the mean of four, their adapters and four that are kept; an expert is held until the next one is built."""
    alive, most, read = 0, 0, ExpertReader.__call__

    def gone() -> None:
        nonlocal alive
        alive -= 1

    def count(reader: ExpertReader, e: int):
        nonlocal alive, most
        weights = read(reader, e)
        weakref.finalize(weights, gone)
        alive += 1
        most = max(most, alive)
        return weights

    monkeypatch.setattr(ExpertReader, "__call__", count)
    locum.apply(checkpoint, plan=plan(read_shape(checkpoint)), out=tmp_path / "out")
    assert (alive, most) == (0, 0) if plan is even else most <= 5
