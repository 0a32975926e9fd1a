"""Applying plans: against masking, and through files into fresh processes, with everything a user does afterwards."""

from __future__ import annotations

import copy
import json
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from locum.checkpoints.application import apply_plan
from locum.checkpoints.load import load_model
from locum.checkpoints.read import read_headers
from locum.checkpoints.skeleton import read_shape
from locum.containers.container import StandInExperts
from locum.errors import PlanError, UnsupportedModel
from locum.models.families import find_layers
from locum.models.sizes import shape_of
from locum.plans.plan import DROPPED, KEPT, NOTHING, Base, LayerPlan, make_plan, stand_in
from locum.shapes import ModelShape
from locum.stages.application import apply
from locum.stages.inspection import inspect
from locum.stats.origin import Origin
from locum.stats.sums import Statistics
from making.checkpoints import VOCABULARY, write_tokenizer
from making.oracles import random_layer_plan
from making.slots import base_of, has_constant, rank_of, start_of
from making.tiny_models import CONFIGS, tiny_ids, tiny_model

SRC = Path(__file__).parents[2] / "src"
SIZES = {"vocab_size": VOCABULARY, "max_position_embeddings": 512}
families = pytest.mark.parametrize("model_type", CONFIGS)


@torch.no_grad()
def logits(model):
    return model(tiny_ids()).logits


def realigned(model):
    """Every weight at the start of a memory line. Matrix products round differently elsewhere, where files put them."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


# --- plans ------------------------------------------------------------------------------------------------------


def uniform(shape: ModelShape) -> list[LayerPlan]:
    """Two experts of every layer dropped, one of each half, not the same ones."""
    drop = [(1, 6), (0, 7)]
    return [
        LayerPlan(x.name, tuple(DROPPED if e in drop[i % 2] else KEPT for e in range(8)))
        for i, x in enumerate(shape.layers)
    ]


def uneven(shape: ModelShape) -> list[LayerPlan]:
    """Four experts of the second layer dropped, none of the first."""
    return [LayerPlan(shape.layers[1].name, (KEPT, KEPT, DROPPED, DROPPED) * 2)]


def light(shape: ModelShape) -> list[LayerPlan]:
    """As LightMoE: shared bases with an adapter per member."""
    slots = (KEPT,) * 4 + (stand_in(0, 3),) * 2 + (stand_in(1, 2, "svd"),) * 2
    bases = (Base((4, 5), (0.25, 0.75)), Base((6, 7), (0.5, 0.5), align=True))
    return [LayerPlan(x.name, slots, bases) for x in shape.layers]


def constants(shape: ModelShape) -> list[LayerPlan]:
    return [LayerPlan(x.name, (stand_in(constant=True), KEPT) * 4) for x in shape.layers]


def nothing(shape: ModelShape) -> list[LayerPlan]:
    """The second layer has no expert left at all: its container is empty."""
    return [LayerPlan(shape.layers[0].name, (NOTHING, KEPT) * 4), LayerPlan(shape.layers[1].name, (NOTHING,) * 8)]


def mixed(shape: ModelShape) -> list[LayerPlan]:
    """Everything at once, at random; equally many of each half for routers with groups."""
    plans = []
    for index, layer in enumerate(shape.layers):
        plan = random_layer_plan(layer, 10 + index, with_dropped=False)
        slots = [DROPPED if e in (2, 5) and index == 1 else slot for e, slot in enumerate(plan.slots)]
        used = sorted({base_of(s) for s in slots if base_of(s) is not None})
        slots = [
            stand_in(used.index(base_of(s)), rank_of(s), start_of(s), has_constant(s)) if base_of(s) is not None else s
            for s in slots
        ]
        plans.append(LayerPlan(layer.name, tuple(slots), tuple(plan.bases[b] for b in used)))
    return plans


PLANS = {f.__name__: f for f in (uniform, uneven, light, constants, nothing, mixed)}


def mean_outputs(shape: ModelShape) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {x.name: torch.randn(8, 32, generator=generator, dtype=torch.float64) for x in shape.layers}


def statistics(shape: ModelShape) -> Statistics:
    """Statistics that have nothing but mean outputs."""
    layers = {
        name: {"output_sum": 2 * mean[None], "count": torch.full((1, 8), 2.0, dtype=torch.float64)}
        for name, mean in mean_outputs(shape).items()
    }
    return Statistics(("a",), layers, Origin(shape, "t", "t", ("t",)), 9)


# --- in memory --------------------------------------------------------------------------------------------------


@families
def test_a_plan_that_keeps_everything_changes_nothing(model_type):
    model = tiny_model(model_type)
    before, state = logits(model), {n: t.clone() for n, t in model.state_dict().items()}
    shape = shape_of(model)
    apply_plan(model, make_plan(shape, [LayerPlan(x.name, (KEPT,) * 8) for x in shape.layers]))
    assert torch.equal(logits(model), before)
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())


@families
def test_a_container_of_kept_experts_computes_what_the_stock_layer_does(model_type):
    """All kept but one that is never selected because nothing changes for it: it stands in for itself at full rank."""
    model = tiny_model(model_type)
    before, shape = logits(model), shape_of(model)
    itself = stand_in(base=0)
    plans = [LayerPlan(x.name, (KEPT,) * 7 + (itself,), (Base((7,), (1.0,)),)) for x in shape.layers]
    apply_plan(model, make_plan(shape, plans))
    assert isinstance(find_layers(model)[0].experts, StandInExperts)
    torch.testing.assert_close(logits(model), before, atol=1e-5 * float(before.abs().max()), rtol=0)


class MaskedRouters(TorchFunctionMode):
    """Sets the router logits of dropped experts to -inf, wherever the router computes them."""

    def __init__(self, dropped_of_weight):
        super().__init__()
        self.dropped = dropped_of_weight
        self.calls = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is functional.linear and result.shape[-1] == 8:
            for weight, dropped in self.dropped:  # a router may convert its weight first, so it is known by its values
                if args[1].shape == weight.shape and torch.equal(args[1].float(), weight.float()):
                    self.calls += 1
                    result[..., list(dropped)] = float("-inf")
        return result


@families
@pytest.mark.parametrize("kind", ["uniform", "uneven"])
def test_dropping_equals_masking_in_the_router(model_type, kind):
    masked, model = tiny_model(model_type), tiny_model(model_type)
    shape = shape_of(model)
    plan = make_plan(shape, PLANS[kind](shape))
    assert plan.is_stock(shape) == (kind == "uniform")
    dropped = []
    for layer in find_layers(masked):
        if layer_plan := plan.layer(layer.shape.name):
            rows = [e for e in range(8) if e not in layer_plan.survivors]
            dropped.append((layer.router.weight, rows))
            if hasattr(layer.router, "e_score_correction_bias"):  # sigmoid(-inf) = 0 can still win with its bias
                layer.router.e_score_correction_bias[rows] = float("-inf")
    with MaskedRouters(dropped) as mode:
        expected = logits(masked)
    assert mode.calls == len(dropped)
    apply_plan(model, plan)
    assert [x.router.weight.shape[0] for x in find_layers(model)] == [
        len(p) if p else 8 for p in survivors(plan, shape)
    ]
    torch.testing.assert_close(logits(model), expected, atol=1e-5 * float(expected.abs().max()), rtol=0)
    assert not torch.allclose(logits(model), logits(tiny_model(model_type)), atol=1e-2)


def survivors(plan, shape):
    return [plan.layer(x.name).survivors if plan.layer(x.name) else () for x in shape.layers]


def test_a_plan_that_does_not_fit_changes_nothing(olmoe):
    state = {n: t.clone() for n, t in olmoe.state_dict().items()}
    plan = make_plan(shape_of(tiny_model("mixtral")), uniform(shape_of(tiny_model("mixtral"))))
    with pytest.raises(PlanError, match="made for another model"):
        apply_plan(olmoe, plan)
    assert all(torch.equal(t, state[n]) for n, t in olmoe.state_dict().items())


def test_missing_mean_outputs_are_noticed_before_anything_changes(olmoe):
    shape = shape_of(olmoe)
    plans = [*uneven(shape), LayerPlan(shape.layers[0].name, (stand_in(constant=True), *[KEPT] * 7))]
    before = logits(olmoe)
    with pytest.raises(PlanError, match="statistics"):
        apply_plan(olmoe, make_plan(shape, plans))
    assert torch.equal(logits(olmoe), before)


def test_a_compressed_model_is_not_compressed_again(olmoe):
    shape = shape_of(olmoe)
    plan = make_plan(shape, light(shape))
    apply_plan(olmoe, plan)
    with pytest.raises(UnsupportedModel, match="compressed already"):
        apply_plan(olmoe, plan)


def test_seed_decides_adapters_and_nothing_else():
    def adapters(seed):
        model = tiny_model("olmoe")
        apply_plan(model, make_plan(shape_of(model), light(shape_of(model))), seed=seed)
        return [x.experts.adapters[1].gate_up_A for x in find_layers(model)], logits(model)

    (one, y1), (two, y2), (other, y3) = adapters(0), adapters(0), adapters(1)
    assert torch.equal(one[0], two[0]) and torch.equal(y1, y2)
    assert not torch.equal(one[0], other[0]) and not torch.equal(one[0], one[1])
    assert torch.equal(y1, y3)  # gaussian adapters start at nothing


# --- through files ----------------------------------------------------------------------------------------------

CASES = {
    **{f"{t} mixed": (t, "mixed", torch.float32, {}) for t in CONFIGS},
    **{f"olmoe {kind}": ("olmoe", kind, torch.float32, {}) for kind in PLANS if kind != "mixed"},
    **{f"{t} uniform bfloat16": (t, "uniform", torch.bfloat16, {}) for t in CONFIGS},
    **{f"{t} uneven bfloat16": (t, "uneven", torch.bfloat16, {}) for t in ("deepseek_v3", "gpt_oss")},
    "gpt_oss mixed bfloat16": ("gpt_oss", "mixed", torch.bfloat16, {}),
    **{
        f"{t} light tied": (t, "light", torch.float32, {"tie_word_embeddings": True})
        for t in ("olmoe", "mixtral", "qwen3_moe")
    },
    "granitemoe uniform tied bfloat16": ("granitemoe", "uniform", torch.bfloat16, {"tie_word_embeddings": True}),
    "deepseek_v3 light, a dense layer first": (
        "deepseek_v3",
        "light",
        torch.float32,
        {"first_k_dense_replace": 1, "num_hidden_layers": 3},
    ),
}
CHILD = """
import json, sys
import torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
who, root = sys.argv[1:]
with_locum, ids = who == "locum", torch.load(f"{root}/ids.pt")
if with_locum:
    import locum
results = {}
for name, path in json.load(sys.stdin).items():
    model, info = AutoModelForCausalLM.from_pretrained(path, dtype="auto", output_loading_info=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        found = model.eval()(ids).logits
    results[name] = {"logits": found, "info": {k: sorted(map(str, v)) for k, v in info.items() if v}, "dtype": model.dtype}
assert with_locum == ("locum" in sys.modules)
torch.save(results, f"{root}/{who}.pt")
"""


def save_original(folder: Path, model_type: str, dtype: torch.dtype, changes: dict) -> Path:
    model = tiny_model(model_type, **SIZES, **changes).to(dtype)
    for module in model.modules():  # as the real checkpoints have it
        if hasattr(module, "e_score_correction_bias"):
            module.e_score_correction_bias = module.e_score_correction_bias.float()
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=7, eos_token_id=1, pad_token_id=0)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    (folder / "LICENSE").write_text("as you like")
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Every case: saved by the real stage, read back by two fresh processes, one of which knows nothing of Locum."""
    root = tmp_path_factory.mktemp("applied")
    cases, originals = {}, {}
    torch.save(tiny_ids(), root / "ids.pt")
    children = {who: start_child(who, root) for who in ("stock", "locum")}  # they import while we compress
    for name, (model_type, kind, dtype, changes) in CASES.items():
        key = (model_type, dtype, *changes)
        if key not in originals:
            folder = save_original(root / f"original-{len(originals)}", model_type, dtype, changes)
            originals[key] = folder, read_shape(folder), load_model(folder)
        original, shape, live = originals[key]
        plan = make_plan(shape, PLANS[kind](shape))
        out = root / f"case-{len(cases)}"
        apply(original, plan=plan, out=out, statistics=statistics(shape) if plan.needs else None)
        model = realigned(apply_plan(copy.deepcopy(live), plan, statistics(shape)))
        cases[name] = SimpleNamespace(
            original=original, out=out, shape=shape, plan=plan, logits=logits(model), dtype=dtype
        )
    for who, child in children.items():
        paths = {n: str(c.out) for n, c in cases.items() if c.plan.is_stock(c.shape) == (who == "stock")}
        child.stdin.write(json.dumps(paths))
        child.stdin.close()
    for who, child in children.items():
        assert child.wait(timeout=300) == 0, (root / f"{who}.err").read_text()[-3000:]
        for name, result in torch.load(root / f"{who}.pt", weights_only=False).items():
            cases[name].loaded = result
    return cases


def start_child(who, root):
    command = [sys.executable, "-c", CHILD, who, str(root)]
    environment = {"PYTHONPATH": str(SRC), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin", "HOME": str(root)}
    with (root / f"{who}.err").open("w") as errors:
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=errors, stderr=errors, text=True, env=environment
        )


cases = pytest.mark.parametrize("case", CASES)


@cases
def test_a_fresh_process_computes_the_same_to_the_bit(made, case):
    result = made[case].loaded
    assert result["info"] == {}
    assert result["dtype"] == made[case].dtype
    assert torch.equal(result["logits"], made[case].logits)


@cases
def test_the_file_is_as_large_as_the_plan_says(made, case):
    item = made[case]
    headers = read_headers(item.out)
    size = item.plan.size(item.shape)
    assert sum(e["data_offsets"][1] - e["data_offsets"][0] for e in headers.values()) == size.bytes
    assert read_shape(item.out).parameters == size.parameters
    assert inspect(item.out)["expert_parameters"] == size.expert_parameters
    assert size.bytes < item.shape.bytes


@cases
def test_the_config_says_what_is_in_the_folder(made, case):
    item = made[case]
    config = json.loads((item.out / "config.json").read_text())
    stock = item.plan.is_stock(item.shape)
    count = {config[name] for name in ("num_experts", "num_local_experts", "n_routed_experts") if name in config}
    assert count == ({6} if stock else {8})
    assert ("quantization_config" in config) != stock
    if not stock:
        changed = [x.layer for x in item.plan.layers if not x.is_identity]
        assert list(config["quantization_config"]["layers"]) == changed
        assert config["quantization_config"] | {"layers": 0} == {
            "quant_method": "locum",
            "format_version": 2,
            "layers": 0,
        }


def test_everything_that_belongs_to_a_checkpoint_is_there(made):
    item = made["olmoe light"]
    names = {p.name for p in item.out.iterdir()}
    assert names == {
        "config.json",
        "model.safetensors",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "LICENSE",
        "plan.json",
        "locum.json",
        "README.md",
    }
    assert GenerationConfig.from_pretrained(item.out).max_new_tokens == 7
    tokenizer = AutoTokenizer.from_pretrained(item.out)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    assert json.loads((item.out / "plan.json").read_text())["kind"] == "locum-plan"
    notes = json.loads((item.out / "locum.json").read_text())
    assert notes["original"] == item.original.name and notes["plan"] == item.plan.id
    card = (item.out / "README.md").read_text()
    assert "import locum" in card and f"{item.plan.size(item.shape).bytes:,}" in card
    assert "import locum" not in (made["olmoe uniform"].out / "README.md").read_text()


def test_the_same_plan_gives_the_same_bytes(made, tmp_path):
    for name in ("olmoe mixed", "olmoe uniform"):
        item = made[name]
        again = tmp_path / name
        given = statistics(item.shape) if item.plan.needs else None
        apply(item.original, plan=item.plan, out=again, statistics=given)
        for file in ("model.safetensors", "config.json", "plan.json", "tokenizer.json"):
            assert (again / file).read_bytes() == (item.out / file).read_bytes()


@pytest.mark.parametrize(
    "case", ["olmoe mixed", "olmoe uniform", "gpt_oss mixed", "deepseek_v3 mixed", "granitemoe mixed"]
)
def test_greedy_generation_with_a_cache_equals_recomputation(made, case):
    model = load_model(made[case].out)
    ids = tiny_ids(batch=2, length=6)
    generated = model.generate(ids, max_new_tokens=10, do_sample=False, eos_token_id=None)
    slow = ids
    for _ in range(10):
        with torch.no_grad():
            slow = torch.cat([slow, model(slow, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generated, slow)


RELOADED = ["olmoe mixed", "gpt_oss mixed", "deepseek_v3 mixed"]


@pytest.mark.parametrize("case", RELOADED)
def test_a_reloaded_model_copies_casts_and_saves_again(made, case, tmp_path):
    item = made[case]
    model = realigned(load_model(item.out))
    assert torch.equal(logits(copy.deepcopy(model)), item.logits)
    for twin, tolerance in ((copy.deepcopy(model).half(), 0.02), (copy.deepcopy(model).to(torch.bfloat16), 0.15)):
        found = logits(twin).float()
        assert found.isfinite().all()
        # Rounding can tip a close choice of experts, so the typical token counts.
        assert float((found - item.logits).norm(dim=-1).median() / item.logits.norm(dim=-1).median()) < tolerance
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == (item.out / "model.safetensors").read_bytes()
    assert torch.equal(logits(realigned(load_model(tmp_path))), item.logits)


@pytest.mark.parametrize("case", RELOADED)
def test_a_reloaded_model_trains(made, case):
    model = load_model(made[case].out).train()
    ids = tiny_ids()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(3):
        loss = model(ids, labels=ids).loss
        loss.backward()
        losses.append(float(loss.detach()))
        containers = [m for m in model.modules() if isinstance(m, StandInExperts)]
        assert containers and any(p.grad is not None and p.grad.abs().max() > 0 for p in containers[0].parameters())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]


def test_lora_on_the_attention_of_a_reloaded_model(made, tmp_path):
    peft = pytest.importorskip("peft")
    item = made["olmoe mixed"]
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = peft.get_peft_model(realigned(load_model(item.out)), config)
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trainable and all("lora_" in n for n in trainable)
    model(tiny_ids(), labels=tiny_ids()).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    changed = logits(model.eval())
    assert not torch.allclose(changed, item.logits, atol=1e-2)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(realigned(load_model(item.out)), tmp_path)
    assert torch.equal(logits(again.eval()), changed)
    torch.testing.assert_close(logits(again.merge_and_unload()), changed, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("case", ["olmoe mixed", "gpt_oss mixed", "olmoe nothing", "olmoe light tied"])
def test_device_map_auto(made, case):
    model = AutoModelForCausalLM.from_pretrained(made[case].out, dtype="auto", device_map="auto").eval()
    assert not any(p.is_meta for p in model.parameters())
    found = logits(model.to("cpu"))
    torch.testing.assert_close(found, made[case].logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("case", RELOADED)
def test_a_sharded_checkpoint_loads(made, case, tmp_path):
    item = made[case]
    load_model(item.out).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    assert read_shape(tmp_path) == read_shape(item.out)
    assert torch.equal(logits(realigned(load_model(tmp_path))), item.logits)


def test_a_model_in_memory_has_the_shape_of_its_file(made):
    for item in random.Random(0).sample(list(made.values()), 8):
        assert shape_of(load_model(item.out)) == read_shape(item.out)
