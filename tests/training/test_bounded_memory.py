"""Training in less memory gives the same bits: frozen weights that stay narrow, layers that are computed again, old weights on disk."""

from __future__ import annotations

import copy
import json
import os

import pytest
import torch

import locum
from locum.checkpoints.notes import plan_of
from locum.checkpoints.shard_reader import ShardReader
from locum.checkpoints.skeleton import read_shape
from locum.errors import OptionError, OutputError
from locum.models.families import find_layers
from locum.models.sizes import shape_of
from locum.stats.on_disk import is_on_disk
from locum.training import decoder, loop
from locum.training.context import Context, Original
from locum.training.decoder import DecoderLayers
from locum.training.layer import old_bytes, set_beta
from locum.training.options import make_recovery
from locum.training.recovery import recover_model
from locum.training.states import STATE_FILE, laid_aside
from locum.training.ways import WAYS
from making.checkpoints import locum as command
from making.tiny_models import tiny_ids, tiny_model
from making.training import QUICK, Killed, compressed, light, tiny_tokens
from test_vectors import changed, state
from test_ways import Case


def as_before(monkeypatch):
    """Training as it was: every weight in float32 all the time."""
    monkeypatch.setattr(decoder, "_is_narrow", lambda parameter: False)


@pytest.mark.parametrize("how", list(WAYS))
def test_narrow_frozen_weights_give_the_bits_of_wide_ones(how, monkeypatch):
    case, kinds = Case(torch.bfloat16), []

    def watch(step, steps, loss):
        kinds.append({p.dtype for p in models[-1].parameters() if not p.requires_grad})

    models = [copy.deepcopy(case.small), copy.deepcopy(case.small)]
    narrow, said = case.recover(models[0], how=how)
    if how != "full":
        assert said["trainable_parameters"] < sum(p.numel() for p in narrow.parameters())
    with monkeypatch.context() as patched:
        as_before(patched)
        wide, told = case.recover(models[1], how=how, progress=watch)
    assert kinds[0] <= {torch.float32}  # that is how it was
    assert changed(state(wide), narrow) == set() and said["loss"] == told["loss"]


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss"])
def test_so_they_do_in_every_kind_of_family(family, monkeypatch):
    original = tiny_model(family).to(torch.bfloat16)
    plan = light(original)
    small = compressed(original, plan)
    options = make_recovery({"how": "annealed", **QUICK, "steps": 2, "end_fraction": 1.0})
    made = []
    for wide in (False, True):
        with monkeypatch.context() as patched:
            if wide:
                as_before(patched)
            model = recover_model(copy.deepcopy(small), plan, tiny_tokens(), None, options, Original.of(original))[0]
        made.append(state(model))
    assert all(torch.equal(tensor, made[1][name]) for name, tensor in made[0].items())


def in_training(model, plan, original=None, how="lora", **options):
    chosen = make_recovery({"how": how, **QUICK, **options})
    context = Context(model, plan, chosen.steps, 0, None if original is None else Original.of(original))
    chosen.way.prepare(context, 0)
    layers = DecoderLayers(model, "fp32", chosen.checkpointing)
    layers.set_precision(model)
    return context, layers


def test_weights_of_layers_are_wide_only_while_their_layer_runs(olmoe):
    model = compressed(olmoe.to(torch.bfloat16), plan := light(olmoe))
    _, layers = in_training(model, plan)
    seen = []
    first = find_layers(model)[0]
    first.router.register_forward_hook(lambda module, *_: seen.append(module.weight.dtype))
    with layers:
        loss = model(tiny_ids()).logits.float().square().mean()
        assert seen == [torch.float32] and first.router.weight.dtype == torch.bfloat16
        kept = {p.dtype for layer in layers.layers for p in layer.parameters() if not p.requires_grad}
        loss.backward()
    assert kept == {torch.bfloat16} and model.get_output_embeddings().weight.dtype == torch.float32
    assert all("forward" not in layer.__dict__ for layer in layers.layers)
    assert all(p.grad is not None for layer in layers.layers for p in layer.parameters() if p.requires_grad)


def test_bases_that_are_trained_are_in_memory_once(olmoe):
    model = compressed(olmoe.to(torch.bfloat16), plan := light(olmoe))
    context, _ = in_training(model, plan)
    for layer in context.layers:
        assert all(p.untyped_storage().nbytes() == p.nbytes for p in layer.container.parameters())


def test_after_an_error_a_layer_is_as_it_was(olmoe):
    model = compressed(olmoe.to(torch.bfloat16), plan := light(olmoe))
    _, layers = in_training(model, plan)
    find_layers(model)[1].router.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), layers:
        model(tiny_ids())
    assert {p.dtype for layer in layers.layers for p in layer.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert all("forward" not in layer.__dict__ for layer in layers.layers)


# --- checkpointing ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("how", "precision"), [*((how, "fp32") for how in WAYS), ("lora", "bf16")])
def test_checkpointing_changes_no_bit(how, precision):
    case = Case(torch.bfloat16 if precision == "bf16" else torch.float32)
    made = {}
    for checkpointing in ("off", "on"):
        given = {"how": how, "precision": precision, "balance": 0.01, "steps": 3, "checkpointing": checkpointing}
        made[checkpointing], said = case.recover(**given)
        assert said["checkpointed"] == (checkpointing == "on")
    assert changed(state(made["on"]), made["off"]) == set()


def kept_by(model, layers) -> int:
    """Bytes that autograd keeps of a forward pass, parameters aside."""
    weights, found = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(tensor):
        place = tensor.untyped_storage().data_ptr()
        if place not in weights:
            found[place] = tensor.untyped_storage().nbytes()
        return tensor

    with layers, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(tiny_ids()).logits  # noqa: F841  (it holds what was kept)
    return sum(found.values()), layers.kept_bytes


def test_it_begins_where_what_is_kept_would_take_half_of_the_free_memory(olmoe, monkeypatch):
    model = compressed(olmoe, plan := light(olmoe))
    _, layers = in_training(model, plan)
    _, kept = kept_by(model, layers)
    assert kept > 0 and not layers.checkpoints
    for free, expected in ((int(kept * 2 / 0.5) + 8, False), (int(kept * 2 / 0.5) - 8, True)):
        monkeypatch.setattr(decoder, "free_bytes", lambda device, free=free: free)
        again = DecoderLayers(model, "fp32", "auto")
        kept_by(model, again)
        assert again.checkpoints is expected


def test_what_is_kept_is_what_autograd_holds(olmoe, monkeypatch):
    """Counted by the layers, and by hand around a model whose layers count nothing."""
    model = compressed(olmoe, plan := light(olmoe))
    _, layers = in_training(model, plan)
    _, counted = kept_by(model, layers)
    inputs = []
    layer = layers.layers[0]
    layer.register_forward_pre_hook(lambda m, a, k: inputs.append((a, k)), with_kwargs=True)
    model(tiny_ids())
    weights, found = {p.untyped_storage().data_ptr() for p in layer.parameters()}, {}

    def pack(tensor):
        if (place := tensor.untyped_storage().data_ptr()) not in weights:
            found[place] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = layer(*inputs[0][0], **inputs[0][1])  # noqa: F841
    assert 0.5 * sum(found.values()) <= counted <= 2 * sum(found.values())


def test_a_resumed_run_may_checkpoint_or_not():
    assert make_recovery({"how": "lora", "checkpointing": "on"}).checkpointing == "on"
    with pytest.raises(OptionError, match="checkpointing"):
        make_recovery({"how": "lora", "checkpointing": "sometimes"})


# --- old weights --------------------------------------------------------------------------------------------------


def mapped_files() -> int:
    """Files without a name that this process has mapped."""
    with open("/proc/self/maps") as maps:
        return sum("(deleted)" in line for line in maps)


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="Linux says what is mapped")
def test_old_weights_are_mapped_and_dropped(olmoe, tmp_path):
    plan = light(olmoe)
    chosen = make_recovery({"how": "annealed", **QUICK})
    before = mapped_files()
    made = []
    for workdir in (None, tmp_path / "work"):
        context = Context(compressed(olmoe, plan), plan, 6, 0, Original.of(olmoe), workdir)
        chosen.way.prepare(context, 0)
        with torch.no_grad():
            made.append(context.model(tiny_ids()).logits)
    assert torch.equal(*made) and mapped_files() == before + 2 * len(context.layers)  # two tensors a layer
    sizes = (tensor.nbytes for layer in context.layers for tensor in layer.container.old.parameters())
    assert sum(sizes) == old_bytes(plan, shape_of(olmoe))
    for layer in context.layers:
        set_beta(layer, 0.0)
    assert mapped_files() == before and list(tmp_path.iterdir()) == []


def resident(address: int) -> int:
    """Bytes of the mapping that begins there which are in this process's memory now."""
    with open("/proc/self/smaps") as maps:
        lines = iter(maps)
        for line in lines:
            if line.startswith(f"{address:08x}-"):
                return 1024 * next(int(x.split()[1]) for x in lines if x.startswith("Rss:"))
    raise AssertionError(f"nothing is mapped at {address:x}")


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="Linux says what is in memory")
@pytest.mark.parametrize("checkpointing", ["off", "on"])
def test_old_weights_are_in_memory_only_while_their_layer_runs(olmoe, tmp_path, checkpointing):
    plan, original = light(olmoe.to(torch.bfloat16)), Original.of(olmoe)
    chosen = make_recovery({"how": "annealed", **QUICK, "checkpointing": checkpointing})
    context = Context(compressed(olmoe, plan), plan, 6, 0, original, tmp_path / "work")
    chosen.way.prepare(context, 0)
    layers = DecoderLayers(context.model, "fp32", checkpointing)
    layers.set_precision(context.model)
    old = [p for layer in context.layers for p in layer.container.old.parameters()]
    values = [tensor.clone() for tensor in old]
    while_running, norms = [], [layer.post_attention_layernorm for layer in layers.layers]
    norms[1].register_forward_hook(lambda *_: while_running.append(sum(resident(p.data_ptr()) for p in old[:2])))
    with layers:
        loss = context.model(tiny_ids()).logits.float().square().mean()
        assert [resident(p.data_ptr()) for p in old] == [0] * len(old) and while_running == [0]
        loss.backward()
    assert [resident(p.data_ptr()) for p in old[2:]] == [0] * len(
        old[2:]
    )  # all but those of the first, which has no gradient to give
    assert all(map(torch.equal, old, values))


@pytest.mark.journeys
def test_the_experts_of_the_original_are_enough_to_anneal(checkpoint, small, words, tmp_path, monkeypatch):
    """The whole original is not loaded, and the result is the same to the bit."""
    asked = {"data": [str(words)], "how": "annealed", "steps": 2, "batch_size": 2, "length": 32}
    first = locum.recover(small, out=tmp_path / "one", **asked)
    monkeypatch.setattr(WAYS["annealed"], "experts_alone", False)
    second = locum.recover(small, out=tmp_path / "two", **asked)
    assert first["loss"] == second["loss"]
    one, two = (locum.load_model(tmp_path / name).state_dict() for name in ("one", "two"))
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


# --- what it would take -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["annealed", pytest.param("layerwise", marks=pytest.mark.journeys)])
def test_dry_run_of_a_training(small, words, tmp_path, how):
    asked = ("--how", how, "--data", words, "--steps", 20, "--batch-size", 2, "--length", 32, "--out", tmp_path / "out")
    said = command("recover", small, *asked, "--dry-run", "--json")
    assert said.exit_code == 0, said.output
    made = json.loads(said.stdout)
    assert made["stage"] == "recover" and made["seconds"] > 0 and made["memory_bytes"] > 2**20
    assert made["written_bytes"] > shape_of(locum.load_model(small)).bytes and not list(tmp_path.iterdir())


def test_a_training_reads_and_writes_what_was_said(small, checkpoint, words, tmp_path, monkeypatch):
    """The last state, the one that takes its place, and old weights; or a state and the result."""
    sizes, save, read, fill = [], loop.save_state, [], ShardReader._fill

    def count(reader, stream, buffer, file):
        read.append(len(buffer))
        fill(reader, stream, buffer, file)

    def watch(workdir, identity, state):
        save(workdir, identity, state)
        sizes.append((workdir / STATE_FILE).stat().st_size)

    monkeypatch.setattr(loop, "save_state", watch)
    asked = {"data": [str(words)], "how": "annealed", "steps": 2, "batch_size": 2, "length": 32, "end_fraction": 1.0}
    asked |= {"checkpoint_every": 1, "out": tmp_path / "out"}
    estimate = locum.recover(small, dry_run=True, **asked)
    said = estimate.written_bytes
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(ShardReader, "_fill", count)
    locum.recover(small, **asked)
    shape = read_shape(checkpoint)
    known = len(shape.layers) * shape.bytes_of_expert(shape.layers[0])  # an expert of each, to know the original by
    assert read_shape(small).bytes + sum(read) == estimate.read_bytes + known
    result = sum(file.stat().st_size for file in (tmp_path / "out").iterdir())
    states, old = 2 * sizes[-1], old_bytes(plan_of(small), read_shape(checkpoint))
    assert old and max(states + old, sizes[-1] + result) == pytest.approx(said, abs=1.5 * 2**20)
    assert states + old <= said + 2**17 and sizes[-1] + result <= said + 2**17  # headers of a tiny model
    for free in (said, said - 1):
        monkeypatch.setattr("locum.files.free_space", lambda path, free=free: free)
        if free == said:
            locum.recover(small, dry_run=True, force=True, **asked)
        else:
            with pytest.raises(OutputError, match="no space left"):
                locum.recover(small, dry_run=True, force=True, **asked)
            (tmp_path / ".out.recover").mkdir()
            (tmp_path / ".out.recover" / STATE_FILE).write_bytes(b"1")  # what is there already is not to come
            locum.recover(small, dry_run=True, force=True, **asked)


def test_what_is_free_goes_back_before_training_and_before_moments_come(monkeypatch):
    given = []
    monkeypatch.setattr(loop, "give_back", lambda: given.append(1))
    assert Case().recover(how="lora")[1]["steps"] > 1 and given == [1, 1]


def test_a_resumed_run_holds_its_state_once(tmp_path):
    case, seen = Case(), []

    def kill(step, steps, loss):
        if step == 3:
            raise Killed

    given = {"how": "lora", "checkpoint_every": 2, "workdir": tmp_path / "work"}
    with pytest.raises(Killed):
        case.recover(progress=kill, **given)
    resume = loop.Loop.resume

    def watch(self, state):
        resume(self, state)
        seen.append((state.step, dict(state.tensors)))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(loop.Loop, "resume", watch)
        case.recover(**given)
    assert seen == [(2, {})]


def test_a_disk_too_small_for_a_training_is_refused_early(small, words, tmp_path, monkeypatch):
    monkeypatch.setattr("locum.files.free_space", lambda path: 1000)
    said = command("recover", small, "--how", "lora", "--data", words, "--out", tmp_path / "out")
    assert said.exit_code == 2 and said.stderr.count("\n") == 1 and "no space left for" in said.stderr


def test_what_was_best_lies_on_the_disk_of_the_run_or_in_memory_where_there_is_no_room(tmp_path, monkeypatch):
    tensor = torch.randn(300, 7, dtype=torch.float64).T  # not contiguous
    for workdir, lies in ((tmp_path / "work", True), (None, False)):
        copy = laid_aside(tensor, workdir)
        assert is_on_disk(copy) is lies and torch.equal(copy, tensor) and copy.is_contiguous()
    assert laid_aside(tensor[:0], tmp_path / "work").shape == (0, 300)

    def full(*given):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("locum.training.states.on_disk", full)
    copy = laid_aside(tensor, tmp_path / "work")
    assert not is_on_disk(copy) and torch.equal(copy, tensor)
    assert not any(tmp_path.rglob("*"))
