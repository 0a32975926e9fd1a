"""A model of which one decoder layer has weights at a time gives what the whole model gives, to the bit."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import locum
from locum.checkpoints import on_call
from locum.checkpoints.expert_reader import ExpertReader
from locum.checkpoints.load import load_model
from locum.checkpoints.read import read_config
from locum.checkpoints.skeleton import read_shape
from locum.checkpoints.streamed import stream_model
from locum.errors import CheckpointError, OptionError, UnsupportedModel
from locum.files import describe_size
from locum.models.families import find_layers
from locum.models.layer_major import COPIES, NOTE, passes, together
from locum.plans.plan import DROPPED, KEPT, LayerPlan, make_plan
from locum.runs import beside
from locum.stages import opening
from locum.stages.opening import is_to_stream
from making.checkpoints import locum as run
from making.checkpoints import write_checkpoint, write_text
from making.tiny_models import tiny_ids


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two domains of text."""
    folder = tmp_path_factory.mktemp("text")
    return [f"one={write_text(folder / 'a.txt')}", f"two={write_text(folder / 'b.txt', seed=5)}"]


def there(model):
    """Parameters of the decoder layers that are in memory."""
    return [p for module in getattr(model, NOTE).modules for p in module.parameters() if p.device.type != "meta"]


def states_of(checkpoint, tokens):
    """Bytes that the hidden states of so many tokens are counted with."""
    config = read_config(checkpoint)
    return tokens * config.hidden_size * config.dtype.itemsize * COPIES


def assert_same(one, two):
    assert (one.domains, one.origin, one.tokens) == (two.domains, two.origin, two.tokens)
    assert one.layers.keys() == two.layers.keys()
    for layer, named in one.layers.items():
        assert named.keys() == two.layers[layer].keys()
        assert all(torch.equal(tensor, two.layers[layer][name]) for name, tensor in named.items())


@pytest.mark.parametrize("held", [2**30, 1, 40_000])  # all batches at once, one at a time, some
def test_statistics_are_those_of_the_whole_model(checkpoint, two, tmp_path, held, monkeypatch):
    monkeypatch.setattr("locum.models.layer_major.HELD", held)
    asked = {"data": two, "tokens": 3000, "length": 64}
    whole = locum.calibrate(checkpoint, out=tmp_path / "whole", stream=False, **asked)
    streamed = locum.calibrate(checkpoint, out=tmp_path / "streamed", stream=True, **asked)
    assert_same(whole, streamed)
    assert streamed.domains == whole.domains == ("one", "two") and streamed.tokens == whole.tokens > 2500


@pytest.mark.parametrize("tied", [False, True])
def test_what_is_large_and_no_decoder_layer_is_there_while_it_is_called(tmp_path, monkeypatch, tied):
    """The embedding is gone when the first layer is computed, the head comes at the end, and both again in the next run."""
    monkeypatch.setattr(on_call, "LARGE", 0)
    folder = write_checkpoint(tmp_path / "model", tie_word_embeddings=tied)
    whole, streamed = load_model(folder), stream_model(folder)
    ids_BS = tiny_ids()
    embedding, head = streamed.get_input_embeddings(), streamed.get_output_embeddings()
    norm, there = streamed.model.norm, []
    getattr(streamed, NOTE).modules[0].register_forward_hook(lambda *_: there.append(present(embedding, head, norm)))
    for _ in range(2):
        jobs = [lambda: streamed(input_ids=ids_BS, use_cache=False).logits] * 2
        for logits in passes(streamed, jobs):
            assert torch.equal(logits, whole(input_ids=ids_BS, use_cache=False).logits)
    assert there == [[]] * 4
    assert present(embedding, head, norm) == ([embedding] if tied else []) + [head, norm]
    assert streamed.device.type == "cpu" and streamed.num_parameters() == whole.num_parameters()
    assert (embedding.weight is head.weight) == tied


def present(*modules):
    """Those of them that have weights."""
    return [module for module in modules if not module.weight.isnan().any()]


def test_a_layer_is_read_an_expert_at_a_time(checkpoint, monkeypatch):
    """So that no more than the layer and one expert are in memory."""
    asked, together, stock = [], [], ExpertReader.tensors
    monkeypatch.setattr(ExpertReader, "tensors", lambda reader, e: asked.append(e) or stock(reader, e))
    whole, streamed = load_model(checkpoint), stream_model(checkpoint)
    layers = getattr(streamed, NOTE)
    load = layers._load
    monkeypatch.setattr(layers, "_load", lambda names: load(together.extend(names) or together))
    layers.bring(1)
    assert asked == list(range(find_layers(whole)[1].shape.num_experts))
    assert together and not [name for name in together if ".experts." in name]
    for name, tensor in whole.model.layers[1].named_parameters():
        assert torch.equal(tensor, streamed.model.layers[1].get_parameter(name))


def test_another_precision_is_the_same_streamed_or_not(checkpoint, two, tmp_path):
    """And is part of the question: nothing of a pass in another one is gone on from."""
    asked = {"data": two, "tokens": 1000, "length": 64, "precision": "bf16"}
    whole, streamed = (locum.calibrate(checkpoint, out=tmp_path / f"{s}", stream=s, **asked) for s in (False, True))
    assert_same(whole, streamed)
    assert whole.asked["dtype"] == "bfloat16"
    narrow = locum.calibrate(checkpoint, out=tmp_path / "auto", **asked | {"precision": "auto"})
    assert "dtype" not in narrow.asked and narrow.unlike(whole.origin, whole.asked)
    name = next(iter(whole.layers))
    assert not torch.equal(whole.layers[name]["gate_sum"], narrow.layers[name]["gate_sum"])
    rows = [locum.evaluate(checkpoint, stream=s, **asked | {"split": "all"}) for s in (False, True)]
    assert [row.value for row in rows[0]] == [row.value for row in rows[1]]
    assert rows[0][0].provenance["precision"] == "bf16"
    with pytest.raises(OptionError, match="--precision is 'fp31'; allowed: auto, fp32"):
        locum.calibrate(checkpoint, out=tmp_path / "x", **asked | {"precision": "fp31"})


def test_an_interrupted_pass_goes_on_streamed_or_not(checkpoint, two, tmp_path, monkeypatch):
    monkeypatch.setattr("locum.models.layer_major.HELD", 3 * states_of(checkpoint, 2 * 64))
    asked = {"data": two, "tokens": 3000, "length": 64, "batch_size": 2, "out": tmp_path / "out"}
    seen = []

    def stop(stage, done, total):
        seen.append(done)
        if done > 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        locum.calibrate(checkpoint, stream=True, progress=stop, **asked)
    partial, left = beside(asked["out"], "partial"), []
    assert partial.exists()
    streamed = locum.calibrate(checkpoint, stream=True, progress=lambda _, done, total: left.append(done), **asked)
    assert left[0] > seen[0] and not partial.exists()
    assert_same(locum.calibrate(checkpoint, stream=False, **(asked | {"out": tmp_path / "whole"})), streamed)


@pytest.mark.parametrize("which", ["small", "pruned", "checkpoint"])
def test_evaluation_is_that_of_the_whole_models(which, checkpoint, two, request):
    model = request.getfixturevalue(which)
    asked = {"data": two, "tokens": 2000, "length": 64, "split": "all", "against": checkpoint, "resamples": 20}
    whole, streamed = (locum.evaluate(model, stream=stream, **asked) for stream in (False, True))
    told = [[(r.model, r.metric, r.domain, r.value, r.low, r.high, r.n) for r in rows] for rows in (whole, streamed)]
    assert told[0] == told[1] and {"kl", "loss"} <= {metric for _, metric, *_ in told[0]}


def test_one_layer_is_there_at_a_time_and_none_afterwards(checkpoint):
    model, counted = stream_model(checkpoint), []
    layers = getattr(model, NOTE).modules
    for layer in layers:
        layer.register_forward_hook(lambda *_: counted.append(len(there(model))))
    with torch.no_grad():
        list(passes(model, [lambda: model(tiny_ids()), lambda: model(tiny_ids())]))
    assert counted == [len(list(layers[0].parameters()))] * 2 + [len(list(layers[1].parameters()))] * 2
    assert there(model) == []


def test_turns_and_progress_are_told(checkpoint):
    model, turns, done = stream_model(checkpoint), [], []
    with torch.no_grad():
        jobs = [lambda: model(tiny_ids()), lambda: model(tiny_ids())]
        list(passes(model, jobs, turns.append, lambda *told: done.append(told)))
    assert turns == [0, 1, 0, 1, 0, 1] and done == [(1, 2), (2, 2)]  # around the layers, then each layer


def running():
    """Threads of jobs: each runs a method of the run."""
    return [thread for thread in threading.enumerate() if "_work" in thread.name]


@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["layer", "around"])
def test_an_error_ends_the_run_and_leaves_no_thread_and_no_trace(checkpoint, error, where):
    model, before = stream_model(checkpoint), running()
    layers = getattr(model, NOTE).modules

    def fail(*_):
        raise error

    hook = (layers[1].mlp if where == "layer" else model.model.norm).register_forward_pre_hook(fail)
    with torch.no_grad(), pytest.raises(type(error)):
        list(passes(model, [lambda: model(tiny_ids()) for _ in range(3)]))
    hook.remove()
    assert running() == before
    assert all("forward" not in layer.__dict__ for layer in layers)
    with torch.no_grad():
        (again,) = passes(model, [lambda: model(tiny_ids()).logits])
        assert torch.equal(again, load_model(checkpoint)(tiny_ids()).logits)


class Backwards(nn.Module):
    """A model that calls its last layer first."""

    def __init__(self):
        super().__init__()
        self.modules_in_order = [nn.Linear(2, 2), nn.Linear(2, 2)]
        setattr(self, NOTE, SimpleNamespace(modules=self.modules_in_order, bring=lambda i: None, drop=lambda i: None))

    def forward(self, x):
        for layer in reversed(self.modules_in_order):
            x = layer(x)
        return x


def test_layers_called_out_of_order_are_refused():
    model, before = Backwards(), running()
    with torch.no_grad(), pytest.raises(UnsupportedModel, match="in their order, so it cannot be streamed"):
        list(passes(model, [lambda: model(torch.ones(1, 2))]))
    assert running() == before


def test_jobs_keep_their_own_modes(checkpoint):
    model, modes = stream_model(checkpoint), []
    getattr(model, NOTE).modules[0].register_forward_hook(
        lambda *_: modes.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
    )

    def inference():
        with torch.inference_mode():
            model(tiny_ids())

    def plain():
        with torch.no_grad():
            model(tiny_ids())

    list(passes(model, [inference, plain]))
    # A hook runs in the thread of its job, the layer in the run's: both have the job's modes.
    assert modes == [(False, True), (False, False)]
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_a_tensor_that_is_missing_is_told_before_anything_runs(checkpoint, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = write_checkpoint(tmp_path / "damaged")
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.layers.1.mlp.gate.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="1 tensors are missing"):
        stream_model(folder)


# --- when ---------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_streamed_unless_told_otherwise(checkpoint, small, monkeypatch, caplog):
    size = (checkpoint / "model.safetensors").stat().st_size
    for free, expected in ((size, False), (size - 1, True)):
        monkeypatch.setattr(opening, "free_bytes", lambda device, free=free: free)
        assert is_to_stream([checkpoint], None, "cpu") is expected
        assert is_to_stream([checkpoint], True, "cpu") and not is_to_stream([checkpoint], False, "cpu")
    monkeypatch.setattr(opening, "free_bytes", lambda device: size)
    assert is_to_stream([checkpoint, small], None, "cpu")  # both are open at the same time
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2  # what was not asked for is told
    assert f"{checkpoint} and {small} would take" in caplog.records[1].message
    assert f"and {describe_size(size)} are free: one decoder layer is there" in caplog.records[1].message


def uneven_plan(checkpoint):
    shape = read_shape(checkpoint)
    counts = range(1, len(shape.layers) + 1)
    slots = [tuple(DROPPED if e < n else KEPT for e in range(8)) for n in counts]
    return make_plan(shape, [LayerPlan(x.name, y) for x, y in zip(shape.layers, slots, strict=True)])


def test_what_cannot_be_streamed_is_refused_with_what_to_do(checkpoint, small, words, tmp_path):
    with pytest.raises(OptionError, match="tasks are scored on whole models: give --no-stream"):
        locum.evaluate(checkpoint, tasks="locum_piqa", task_path="benchmarks/tasks/lm_eval", stream=True)
    uneven = locum.apply(checkpoint, plan=uneven_plan(checkpoint), out=tmp_path / "uneven")
    with pytest.raises(UnsupportedModel, match="pruned to unequal numbers of experts; it is looked at whole"):
        locum.calibrate(uneven, data=[str(words)], tokens=2000, out=tmp_path / "x", stream=True)
    said = run("calibrate", small, "--data", words, "--out", tmp_path / "x", "--stream")
    assert said.exit_code == 2 and "is compressed already" in said.output


def test_the_command_line_has_the_option(checkpoint, words, tmp_path):
    said = run("calibrate", checkpoint, "--data", words, "--tokens", 2000, "--out", tmp_path / "s", "--stream")
    assert said.exit_code == 0, said.output
    said = run("eval", checkpoint, "--data", words, "--tokens", 1000, "--length", 64, "--stream")
    assert said.exit_code == 0 and "loss" in said.output, said.output


def test_batches_go_together_as_far_as_their_hidden_states_have_room(checkpoint, monkeypatch):
    model, batches = stream_model(checkpoint), list(range(7))
    monkeypatch.setattr("locum.models.layer_major.HELD", 3 * states_of(checkpoint, 64))
    assert list(together(model, batches, 64)) == [[0, 1, 2], [3, 4, 5], [6]]
    assert list(together(load_model(checkpoint), batches, 64)) == [[b] for b in batches]
