"""`locum bench`: what it counts equals what is counted by hand, and what it writes is whole. No assertion is about speed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from itertools import pairwise

import psutil
import pytest
import torch

import locum
from locum.checkpoints.application import apply_plan
from locum.checkpoints.load import load_model
from locum.containers.costs import container_work, row_sizes
from locum.containers.layout import Layout, StackLayout
from locum.engines.engines import ENGINES, Engine
from locum.errors import EngineError, UnsupportedModel
from locum.kernels import few_rows
from locum.measure.costs import counted
from locum.methods import METHODS
from locum.models.families import find_layers
from locum.models.sizes import shape_of
from locum.plans.plan import KEPT, NOTHING, Base, LayerPlan, make_plan, stand_in
from locum.speed import page, run
from locum.speed.bench import KIND, quartiles, results
from locum.speed.run import OPTIMIZED, STOCK, Subject, bytes_per_second, operations_per_second
from making.checkpoints import locum as command
from making.checkpoints import write_checkpoint
from making.handmade import layers_of
from making.tiny_models import tiny_ids, tiny_model

pytestmark = pytest.mark.journeys  # long: whole commands in processes of their own

D, F, E, K, L, V = 32, 16, 8, 2, 2, 128
EXPERT = 3 * D * F
ATTENTION = 2 * D * D + 2 * 16 * D  # q and o; k and v, which have half as many heads
NORMS = 2 * D + D + 16  # before attention and before the experts; of q and of k
OURS = (OPTIMIZED,) if few_rows.library() else ()
SHORT = {"prompt": 8, "new_tokens": 3, "batch_sizes": (1, 2), "rounds": 2, "threads": 1}


def subject(model, batch=3, prompt=8, new=4):
    return Subject(model, tiny_ids(batch, prompt + new), prompt)


# --- counting -------------------------------------------------------------------------------------------------------


def test_a_stock_model_is_counted_as_by_hand(olmoe):
    calls = subject(olmoe).work(3)
    assert [call.tokens for call in calls] == [3 * 8, 3, 3, 3]
    for call in calls:
        assert len(call.experts) == L
        assert all(1 <= count <= min(E, K * call.tokens) for count in call.experts)
        dense = L * (ATTENTION + NORMS + E * D) + D + V * D
        assert call.bytes == 4 * (call.tokens * D + dense + sum(call.experts) * EXPERT)
        inside = L * call.tokens * (ATTENTION + E * D + K * EXPERT)
        assert call.operations == 2 * (inside + 3 * V * D)  # the head is asked for the last position alone


def test_a_tied_head_is_read_as_any_other():
    model = tiny_model("olmoe", tie_word_embeddings=True)
    with counted(model) as calls:
        model(tiny_ids(1, 4))
    apart = tiny_model("olmoe", tie_word_embeddings=False)
    with counted(apart) as others, torch.no_grad():
        apart.load_state_dict({**model.state_dict(), "lm_head.weight": model.get_input_embeddings().weight.clone()})
        apart(tiny_ids(1, 4))
    assert calls == others


def test_experts_that_ran_are_those_that_were_selected(olmoe):
    chosen = []
    layer = find_layers(olmoe)[0]
    hook = layer.experts.register_forward_pre_hook(lambda _module, args: chosen.append(set(args[1].flatten().tolist())))
    calls = subject(olmoe).work(2)
    hook.remove()
    assert [call.experts[0] for call in calls] == [len(experts) for experts in chosen]


def by_hand(model, slots, bases=(), routing=None):
    """A container of the first layer with these slots, and what two tokens cost: (0, 1) and (2, 3), weights 0.6 and 0.4."""
    shape = shape_of(model)
    layers = [LayerPlan(shape.layers[0].name, slots, bases, routing)]
    layers += [LayerPlan(layer.name, (KEPT,) * E) for layer in shape.layers[1:]]
    apply_plan(model, make_plan(shape, layers))
    container = find_layers(model)[0].experts
    index_TK, weight_TK = torch.tensor([[0, 1], [2, 3]]), torch.tensor([[0.6, 0.4], [0.6, 0.4]])
    return container_work(container, torch.zeros(2, D), index_TK, weight_TK)


def test_a_shared_base_is_read_once_and_multiplied_once_for_a_token(olmoe):
    replaced = stand_in(0, 2, "gaussian")
    base = Base((0, 1, 2), (0.5, 0.25, 0.25))
    found = by_hand(olmoe, (replaced, replaced, replaced, *(KEPT,) * 5), (base,))
    adapter = 3 * 2 * (D + F)
    # Token one selects two members of the base: one unit. Token two one member and one kept expert: two units.
    assert found == (2 * EXPERT + 3 * adapter, 2 * (3 * EXPERT + 3 * adapter), 4)


def test_adapters_alone_and_nothing_at_all_are_counted(olmoe):
    alone = stand_in(None, 3, "svd")
    found = by_hand(olmoe, (alone, NOTHING, NOTHING, KEPT, *(KEPT,) * 4))
    adapter = 3 * 3 * (D + F)
    assert found == (EXPERT + adapter, 2 * (EXPERT + adapter), 4)


@pytest.mark.parametrize(
    ("vectors", "numbers", "products"), [("projections", 2 * D + F, 2 * (2 * D + F)), ("none", 0, 0)]
)
def test_a_routing_policy_runs_its_main_experts_alone(olmoe, vectors, numbers, products):
    shape = shape_of(olmoe)
    apply_plan(olmoe, make_plan(shape, layers_of(METHODS["compressed-experts"](vectors=vectors), None, shape, 1.0)))
    container = find_layers(olmoe)[0].experts
    index_TK, weight_TK = torch.tensor([[0, 1], [2, 1]]), torch.tensor([[0.6, 0.4], [0.6, 0.4]])
    found = container_work(container, torch.zeros(2, D), index_TK, weight_TK)
    # Experts 0 and 2 run; expert 1 leaves its vectors, which are read once and used by both tokens.
    assert found == (2 * EXPERT + numbers, 2 * (2 * EXPERT + products), 2)


def test_rows_are_as_large_as_their_tensors():
    stacks = [("own_weights", (), (0, -1)), ("low_rank", (2,), (-1, 0)), ("own_biases", (), (-1, 0))]
    layout = Layout(D, F, True, True, 2, tuple(StackLayout(*stack) for stack in stacks))
    sizes = row_sizes(layout)
    assert sizes["dense."] == (EXPERT + 2 * F + D, EXPERT)
    assert sizes["adapters.0."] == (3 * 2 * (D + F),) * 2
    assert sizes["biases."] == (2 * F + D, 0)


def test_hooks_are_gone_afterwards(olmoe):
    with counted(olmoe):
        pass
    assert not any(module._forward_pre_hooks for module in olmoe.modules())


# --- timing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", (*STOCK, *OURS))
def test_every_implementation_goes_on_with_the_text(olmoe, implementation):
    one, seen = subject(olmoe), []
    one.choose(implementation, 2)
    hook = olmoe.register_forward_pre_hook(lambda _m, _a, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    prefill, decode = one.generate(2)
    hook.remove()
    assert prefill > 0 and decode > 0
    assert torch.equal(torch.cat(seen, dim=1), one.ids_BS[:2, :-1])  # the last token is asked for and not read


def test_an_end_of_text_stops_nothing(olmoe):
    olmoe.generation_config.eos_token_id = list(range(V))
    assert len(subject(olmoe).work(1)) == 4


def test_batched_mm_may_not_copy_gigabytes(olmoe, monkeypatch):
    monkeypatch.setattr(run, "COPIED", 4 * K * EXPERT * 8)
    one = subject(olmoe)
    one.choose("batched_mm", 1)
    with pytest.raises(UnsupportedModel, match="would copy"):
        one.choose("batched_mm", 2)


def test_a_model_of_containers_has_one_implementation(olmoe, small):
    assert subject(olmoe).implementations == (*STOCK, *OURS)
    assert Subject(load_model(small), tiny_ids(1, 6), 4).implementations == ("container", *OURS)


@pytest.mark.skipif(not OURS, reason="no C++ compiler or no avx512_bf16")
def test_another_implementation_is_no_longer_optimized(olmoe):
    one = subject(olmoe)
    one.choose(OPTIMIZED, 1)
    assert "forward" in vars(olmoe.lm_head) and olmoe.config._experts_implementation == "grouped_mm"
    one.choose("eager", 1)
    assert not any("forward" in vars(module) for module in olmoe.modules())


def test_the_machine_is_measured():
    assert bytes_per_second(torch.device("cpu"), 2**20) > 0
    assert operations_per_second(torch.device("cpu"), torch.float32, side=64) > 0


def test_quartiles():
    assert quartiles([3.0]) == (3.0, 3.0)
    assert quartiles([5.0, 1.0, 2.0, 3.0, 4.0]) == (2.0, 4.0)


def test_floor_and_ratios_follow_from_what_was_measured():
    work = [
        {"tokens": 8, "bytes": 1000, "operations": 10, "experts": [4, 2]},
        {"tokens": 1, "bytes": 100, "operations": 400, "experts": [2, 2]},
        {"tokens": 1, "bytes": 300, "operations": 100, "experts": [1, 1]},
    ]
    runs = {("model", "container", 1): 1.0, ("original", "eager", 1): 4.0, ("original", "grouped_mm", 1): 2.0}
    runs["original", "toy", 1] = 3.0
    said = {
        run: [{"prefill": 10 * s * k, "decode": s * k, "peak_bytes": 7 * k} for k in (1, 2, 3)]
        for run, s in runs.items()
    }
    told = {"bytes_per_second": 50.0, "operations_per_second": 100.0}
    measured = {
        "loaded": {name: {"implementations": []} for name in ("model", "original")},
        "work": {(name, 1): work for name in ("model", "original")},
        "machine": {
            name: [told, {"bytes_per_second": 100.0, "operations_per_second": 20.0}] for name in ("model", "original")
        },
        "said": said,
        "not_run": [],
        "engines": {("original", "toy"): {"version": "1", "bytes": 5, "share": 0.5}},
    }
    found = results({"model": {}, "original": {}}, measured, {})
    rows = {(row["model"], row["implementation"], row["phase"]): row for row in found["rows"]}
    prefill, decode = (rows["model", "container", phase] for phase in ("prefill", "decode"))
    assert prefill["floor_seconds"] == 1000 / 100
    assert decode["floor_seconds"] == 400 / 100 + 300 / 100  # one pass is bound by operations, the other by bytes
    assert (decode["median_seconds"], decode["times_the_floor"]) == (2.0, 2 / 7)
    assert (decode["tokens_per_second"], decode["low"], decode["high"]) == (2 / 2.0, 2 / 2.5, 2 / 1.5)
    assert (decode["bytes_per_token"], decode["operations_per_token"]) == (200, 250)
    assert decode["experts_per_layer"] == 1.5
    assert (prefill["first_token_seconds"], decode["first_token_seconds"]) == (20.0, None)
    assert prefill["peak_bytes"] == 21
    assert decode["times_the_original"] == 2.0  # beside the faster of its implementations
    assert rows["original", "eager", "decode"]["times_the_original"] == 0.5
    elsewhere = rows[
        "original", "toy", "decode"
    ]  # whose file has half of the bytes; one pass is still bound by operations
    assert (elsewhere["engine"], decode["engine"]) == ("toy", "transformers")
    assert (elsewhere["floor_seconds"], elsewhere["bytes_per_token"]) == (400 / 100 + 150 / 100, 100)
    assert found["models"]["original"]["engines"] == {"toy": {"version": "1", "bytes": 5, "share": 0.5}}


# --- the whole command ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compared(small, checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    files = {"out": folder / "bench.json", "picture": folder / "bench.html"}
    said = []
    result = locum.bench(small, against=checkpoint, **SHORT, **files, progress=lambda *step: said.append(step))
    return result, files, said


def test_all_is_measured_in_every_round(compared):
    result, _, said = compared
    expected = {("model", name) for name in ("container", *OURS)} | {("original", name) for name in (*STOCK, *OURS)}
    rows = {(r["model"], r["implementation"], r["batch"], r["phase"]): r for r in result["rows"]}
    assert set(rows) == {(*who, size, phase) for who in expected for size in (1, 2) for phase in ("prefill", "decode")}
    for row in rows.values():
        assert len(row["seconds"]) == SHORT["rounds"]
        assert row["floor_seconds"] > 0 and row["times_the_floor"] > 0
        assert row["low"] <= row["tokens_per_second"] <= row["high"]
        assert row["tokens"] == row["batch"] * (8 if row["phase"] == "prefill" else 2)
    assert result["not_run"] == []
    assert said[-1][1] == said[-1][2]
    assert all(one[1] <= two[1] for one, two in pairwise(step for step in said if "loading" not in step[0]))


def test_models_say_what_they_are_and_take(compared, small, checkpoint):
    models = compared[0]["models"]
    assert models["model"]["plan"] == locum.load_plan(small / "plan.json").id
    assert models["original"]["plan"] is None
    for name, folder in (("model", small), ("original", checkpoint)):
        about = models[name]
        assert about["parameters"] == locum.inspect(folder)["parameters"]
        assert about["weights_bytes"] >= about["bytes"]  # and buffers that are not saved
        assert about["weights_bytes"] - about["bytes"] < 4096
        assert about["threads"] == 1
        assert about["bytes_per_second"] > 0 and about["operations_per_second"] > 0
    assert all(row["peak_bytes"] > models[row["model"]]["weights_bytes"] for row in compared[0]["rows"])


def test_the_file_reads_back_and_says_where_it_is_from(compared):
    result, files, _ = compared
    read = json.loads(files["out"].read_text())
    assert read["kind"] == KIND
    assert read == json.loads(json.dumps(result))
    assert {"versions", "machine", "command", "time"} <= set(read["provenance"])


def test_the_picture_stands_alone(compared):
    page = compared[1]["picture"].read_text()
    assert page.count("<svg") == 2
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    for name in ("model, container", *(f"original, {name}" for name in STOCK)):
        assert name in page
    assert "95% interval" not in page


def test_floors_are_drawn_where_they_leave_room(compared):
    def drawn(times):
        rows = [{**row, "floor_seconds": row["median_seconds"] / times} for row in compared[0]["rows"]]
        return page.make_page({**compared[0], "rows": rows})

    assert "original, floor" in drawn(1.5) and "are not drawn" not in drawn(1.5)
    assert "original, floor" not in drawn(10**6) and "are not drawn" in drawn(10**6)


@pytest.mark.journeys
def test_a_model_alone_and_a_terminal(checkpoint, tmp_path):
    line = f"bench {checkpoint} --prompt 4 --new-tokens 2 --batch-sizes 1 --rounds 1 --threads 1"
    shown = command(line)
    assert shown.exit_code == 0, shown.output
    assert shown.stderr == ""
    for word in (*STOCK, "prefill", "decode", "weights"):
        assert word in shown.stdout
    assert "original (" not in shown.stdout


def test_a_row_has_a_cell_for_every_head(compared):
    assert {len(page.cells(row)) for row in compared[0]["rows"]} == {len(page.HEADS)}


# --- other engines --------------------------------------------------------------------------------------------------

TOY = """
import json, sys
SECONDS = {"answer": {"prefill": 0.5, "decode": 0.25, "peak_bytes": None}}
for line in sys.stdin:
    with open(sys.argv[0] + ".said", "a") as file:
        file.write(line)
    print(json.dumps(%r if json.loads(line)["do"] == "load" else SECONDS), flush=True)
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """An engine that answers at once; what it was asked is in the file beside its script."""

    def made(error=None, **more):
        answer = {"error": error} if error else {"answer": {"version": "7"} | ({"bytes": 4000} if more else {})}
        (tmp_path / "toy.py").write_text(TOY % (answer,))
        engine = Engine("toy", "Toy", **({"package": "json", "timing": tmp_path / "toy.py"} | more))
        monkeypatch.setitem(ENGINES._items, "toy", engine)
        return tmp_path / "toy.py.said"

    return made


def test_another_engine_is_timed_beside_transformers(checkpoint, toy):
    said = toy()
    result = locum.bench(checkpoint, engine="transformers,toy", **SHORT)
    rows = {(r["implementation"], r["batch"], r["phase"]): r for r in result["rows"] if r["engine"] == "toy"}
    assert set(rows) == {("toy", size, phase) for size in (1, 2) for phase in ("prefill", "decode")}
    assert rows["toy", 2, "decode"]["tokens_per_second"] == 2 * 2 / 0.25
    assert {r["implementation"] for r in result["rows"]} == {*STOCK, *OURS, "toy"}
    told = [json.loads(line) for line in said.read_text().splitlines()]
    assert told[0]["folder"] == str(checkpoint.resolve()) and told[0]["threads"] == 1 and told[0]["dtype"] == "float32"
    assert [len(row) for row in told[0]["ids"]] == [SHORT["prompt"] + SHORT["new_tokens"]] * 2
    assert [(one["do"], one["batch"]) for one in told[1:]].count(("generate", 2)) == 1 + SHORT["rounds"]
    assert result["models"]["model"]["engines"]["toy"]["share"] == 1.0


def test_another_engine_alone(checkpoint, toy):
    toy()
    result = locum.bench(checkpoint, engine="toy", **SHORT)
    assert {r["implementation"] for r in result["rows"]} == {"toy"}
    assert all(r["floor_seconds"] > 0 for r in result["rows"])


def test_a_model_that_an_engine_refuses_is_said_not_to_run(checkpoint, toy):
    toy(error=["ValueError", "no such architecture"])
    result = locum.bench(checkpoint, engine="transformers,toy", **SHORT)
    refused = {(x["implementation"], x["batch"], x["why"]) for x in result["not_run"]}
    assert refused == {("toy", size, "no such architecture") for size in SHORT["batch_sizes"]}
    with pytest.raises(EngineError, match="the model could not be timed at all: no such architecture"):
        locum.bench(checkpoint, engine="toy", **SHORT)


def test_a_form_that_cannot_hold_the_model_is_said_not_to_run(small, toy):
    """Containers are no GGUF; the engine is not asked."""
    said = toy(form="gguf")
    result = locum.bench(small, engine="transformers,toy", **SHORT)
    assert all("GGUF cannot hold" in x["why"] for x in result["not_run"]) and len(result["not_run"]) == 2
    assert not said.exists()


def test_a_given_file_is_what_the_engine_runs(checkpoint, toy, tmp_path):
    said, file = toy(form="gguf"), tmp_path / "q4_0.gguf"
    file.touch()
    result = locum.bench(checkpoint, engine="toy", gguf=file, **SHORT)
    assert json.loads(said.read_text().splitlines()[0])["folder"] == str(file)
    model = result["models"]["model"]
    assert model["engines"]["toy"]["share"] == 4000 / model["weights_bytes"]


def test_engines_that_are_not_there_or_cannot_be_timed_are_refused(checkpoint, toy, monkeypatch):
    toy(variable="LOCUM_TOY_PYTHON", folder=".venv-toy", package="no_such_package")
    with pytest.raises(locum.OptionError, match=r"--engine toy is not there; `make engines` .* LOCUM_TOY_PYTHON"):
        locum.bench(checkpoint, engine="toy", **SHORT)
    monkeypatch.setenv("LOCUM_TOY_PYTHON", "/no/such/python")
    with pytest.raises(locum.OptionError, match="LOCUM_TOY_PYTHON=/no/such/python is not there"):
        locum.bench(checkpoint, engine="toy", **SHORT)
    monkeypatch.setitem(ENGINES._items, "toy", Engine("toy", "Toy", "json"))
    with pytest.raises(locum.OptionError, match="--engine toy cannot be timed; locum verify can ask it"):
        locum.bench(checkpoint, engine="toy", **SHORT)
    toy(form="gguf")
    with pytest.raises(locum.OptionError, match="no such file: nowhere; --gguf is a model as"):
        locum.bench(checkpoint, engine="toy", gguf="nowhere", **SHORT)


# --- what goes wrong ------------------------------------------------------------------------------------------------


def test_a_process_that_dies_is_said_to(checkpoint, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(EngineError, match="the process that times the model ended with code 1"):
        locum.bench(checkpoint, **SHORT)


@pytest.mark.journeys
def test_weights_that_cannot_be_loaded_are_said_to_be_so(checkpoint, tmp_path):
    folder = write_checkpoint(tmp_path / "broken")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(EngineError, match=r"the model could not be timed: CheckpointError: .* tensors are missing"):
        locum.bench(folder, **SHORT)


def test_too_much_text_is_refused(checkpoint):
    with pytest.raises(locum.OptionError, match=r"513 tokens together; .* has 512 positions"):
        locum.bench(checkpoint, prompt=510, new_tokens=3)


@pytest.mark.journeys
def test_ctrl_c_ends_every_process_and_leaves_nothing(checkpoint, tmp_path):
    line = [sys.executable, "-m", "locum", "bench", checkpoint, "--rounds", 10**6, "--out", tmp_path / "out.json"]
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    # A suite that was started in the background inherits an ignored SIGINT, and its children would too.
    wake = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
    run = subprocess.Popen([str(word) for word in line], preexec_fn=wake, **settings)
    workers = []
    while not workers and run.poll() is None:
        time.sleep(0.1)
        workers = psutil.Process(run.pid).children()
    os.killpg(run.pid, signal.SIGINT)
    said = run.communicate(timeout=120)
    assert run.returncode == 2, said
    assert said[1] == "locum bench: error: interrupted; nothing half-written was kept\n"
    psutil.wait_procs(workers, timeout=30)
    assert not any(worker.is_running() for worker in workers)
    assert list(tmp_path.iterdir()) == []
