"""What every way to recover must do, one of another package included; and the options of ways."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

import locum
from locum.checkpoints.patch import vectors_and_routers
from locum.containers.layout import Layout
from locum.data.tokens import Tokens, batches
from locum.errors import LocumError, OptionError
from locum.models.families import find_layers
from locum.models.sizes import shape_of
from locum.options import option, option_fields
from locum.plans.plan import KEPT, LayerPlan, make_plan
from locum.training.context import Context, Original
from locum.training.loop import Loop
from locum.training.options import DEFAULT_WAY, Recovery, make_recovery
from locum.training.recovery import count_trainable, recover_model
from locum.training.ways import WAYS, way
from making.policies import TOP_4
from making.tiny_models import tiny_model
from making.training import QUICK, Killed, compressed, light, tiny_tokens
from test_vectors import changed, routed, state

SRC = Path(locum.__file__).parent
OURS = list(WAYS)
ALIKE = (
    "experts",
    "router",
    "router-kd",
)  # full, vectors and kd go the same way: their long tests are among the journeys
ways = pytest.mark.parametrize("name", OURS)
long_ways = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.journeys if name in ALIKE else ()) for name in OURS]
)


@dataclasses.dataclass
class Case:
    """A plan that every way can train: experts kept and replaced, and a routing policy."""

    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        self.original = tiny_model("olmoe", **TOP_4).to(self.dtype)
        self.plan = routed(light(self.original))
        self.small = compressed(self.original, self.plan)

    def recover(self, model=None, *, original=True, plan=True, tokens: Tokens | None = None, **options):
        run = {key: options.pop(key) for key in ("workdir", "log", "progress") if key in options}
        known = Original.of(self.original) if original else None
        return recover_model(
            copy.deepcopy(self.small) if model is None else model,
            self.plan if plan else None,
            tokens or tiny_tokens(),
            None,
            make_recovery({**QUICK, **options}),
            known,
            **run,
        )


def modules(model) -> dict[str, tuple]:
    """What a model is built of: the class of every module, the layout of every container, the kind of every tensor."""
    kinds = {name: type(module) for name, module in model.named_modules()}
    layouts = {layer.shape.name: getattr(layer.experts, "layout", None) for layer in find_layers(model)}
    tensors = {name: (tensor.shape, tensor.dtype, tensor.device) for name, tensor in model.state_dict().items()}
    return {"kinds": kinds, "layouts": layouts, "tensors": tensors}


# --- what every way must do -----------------------------------------------------------------------------------------


@long_ways
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_layout_and_dtypes_are_left_as_they_were(name, dtype):
    case = Case(dtype)
    before, weights = modules(case.small), state(case.small)
    model, summary = case.recover(how=name, precision="bf16" if dtype == torch.bfloat16 else "fp32")
    becomes = make_recovery({"how": name}).way.becomes(case.plan, shape_of(case.small).layers)
    now, came = modules(model), modules(case.small)
    if becomes != case.plan:  # tensors that stay are beside those that were there, in their dtype
        layouts = {x.shape.name: Layout.of(becomes.layer(x.shape.name), x.shape) for x in find_layers(case.original)}
        assert now["layouts"] == layouts and {now["tensors"][n][1] for n in now["tensors"]} == {dtype}
        now["layouts"], now["tensors"] = came["layouts"], {n: now["tensors"][n] for n in came["tensors"]}
    assert now == before and changed(weights, model) and summary["steps"] == QUICK["steps"]
    assert not model.training and all(p.requires_grad for p in model.parameters())


@long_ways
def test_an_interrupted_run_ends_in_the_same_bits(name, tmp_path, caplog):
    case = Case()
    given = {"how": name, "checkpoint_every": 2, "schedule": "cosine", "accumulate": 2}
    whole, summary = case.recover(log=tmp_path / "whole", **given)

    def kill(step, steps, loss):
        if step == 5:
            raise Killed

    with pytest.raises(Killed):
        case.recover(progress=kill, workdir=tmp_path / "work", log=tmp_path / "parts", **given)
    resumed, again = case.recover(workdir=tmp_path / "work", log=tmp_path / "parts", **given)
    assert changed(state(whole), resumed) == set() and again["loss"] == summary["loss"]
    lines = [[json.loads(line) for line in (tmp_path / log).read_text().splitlines()] for log in ("whole", "parts")]
    steps = [[line | {"seconds": 0} for line in log if line["event"] == "step"] for log in lines]
    assert steps[0] == steps[1] and [line["event"] for line in lines[1]].count("resume") == 1
    case.recover(Case(torch.bfloat16).small, workdir=tmp_path / "work", **given)
    assert "interrupted run of something else: model was" in caplog.text


@ways
def test_what_is_trained_is_what_requires_a_gradient(name, monkeypatch):
    case, seen, step = Case(), {}, Loop.one_step

    def watch(loop, parts):
        if not seen:
            for key, parameter in loop.model.named_parameters():
                seen[key] = (parameter, parameter.requires_grad, parameter.detach().clone())
        step(loop, parts)

    monkeypatch.setattr(Loop, "one_step", watch)
    before = state(case.small)
    model, summary = case.recover(how=name)
    moved = {key for key, (parameter, _, value) in seen.items() if not torch.equal(parameter.detach(), value)}
    said = {key for key, (_, trained, _) in seen.items() if trained}
    # `finish` merges adapters into copies of frozen weights, so what was frozen in training still has its values here.
    assert moved <= said and len(moved) > len(said) / 2
    size = sum(seen[key][0].numel() for key in said)
    assert summary["trainable_parameters"] == size
    counted = count_trainable(copy.deepcopy(case.small), case.plan, make_recovery({**QUICK, "how": name}))
    assert counted >= size if WAYS[name].reads_use else counted == size  # which experts text uses, no one knows before
    if not WAYS[name].changes_weights:
        assert changed(before, model) <= set(vectors_and_routers(model))


@long_ways
def test_refusals_come_before_anything_is_changed(name):
    case = Case()
    chosen = make_recovery({**QUICK, "how": name}).way
    kept = make_plan(shape_of(case.small), [LayerPlan(x.name, (KEPT,) * 8) for x in shape_of(case.small).layers])
    tries = {
        "no plan": lambda model: case.recover(model, how=name, plan=False),
        "a plan that was not applied": lambda model: case.recover(model, how=name),
        "a plan that keeps all": lambda model: _with_plan(case, kept).recover(model, how=name),
        "no original": lambda model: case.recover(model, how=name, original=False),
    }
    refused = set()
    for what, attempt in tries.items():
        model = copy.deepcopy(case.original if what == "a plan that was not applied" else case.small)
        before, weights = modules(model), state(model)
        trainable = [p.requires_grad for p in model.parameters()]
        try:
            attempt(model)
        except LocumError as error:
            refused.add(what)
            assert modules(model) == before and changed(weights, model) == set(), what
            assert [p.requires_grad for p in model.parameters()] == trainable, what
            assert len(str(error)) > 40 and "\n" not in str(error)
    assert ("no original" in refused) == chosen.needs_original(case.plan)
    assert ("no plan" in refused) >= (chosen.objection(None) is not None)
    assert ("a plan that keeps all" in refused) >= (chosen.objection(kept) is not None)


def _with_plan(case: Case, plan) -> Case:
    other = copy.copy(case)
    other.plan = plan
    return other


@ways
def test_its_options_are_its_own_and_are_checked(name):
    cls, shared = WAYS[name], {"how", *(item.name for item in option_fields(Recovery))}
    assert cls.name == name and cls.source and cls.__doc__ and dataclasses.fields(cls) == tuple(option_fields(cls))
    assert not shared & {item.name for item in option_fields(cls)}
    made = make_recovery({"how": name, "steps": 7})
    assert make_recovery(json.loads(json.dumps(made.to_json()))) == made and made.steps == 7 and made.way == cls()
    assert made.to_json().keys() == shared | {item.name for item in option_fields(cls)}
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.way.extra = 1
    for item in option_fields(cls):
        with pytest.raises(OptionError, match=f"--{item.name.replace('_', '-')} is"):
            make_recovery({"how": name, item.name: object()})
    with pytest.raises(OptionError, match=f"way to recover '{name}' has no option '--stepz': did you mean '--steps'"):
        make_recovery({"how": name, "stepz": 7})


def slow_layers(model, original, batch) -> float:
    """Layer by layer: the error of each position of what the model gives its block, relative to the layer's mean output."""
    total, mask_BS = 0.0, batch.loss_mask_BS[:, 1:]
    for layer, teacher in zip(find_layers(model), find_layers(original), strict=True):
        seen = {}
        hook = layer.block.register_forward_hook(lambda _, given, output, s=seen: s.update(given=given, output=output))
        model(batch.ids_BS)
        hook.remove()
        ours_BSD, theirs_BSD = seen["output"], teacher.block(*seen["given"])
        places = mask_BS.nonzero().tolist()
        squares = [float((theirs_BSD[b, s] ** 2).sum()) for b, s in places]
        errors = [float(((ours_BSD[b, s] - theirs_BSD[b, s]) ** 2).sum()) for b, s in places]
        total += sum(errors) / (sum(squares) / len(squares))
    return total


def slow_loss(name: str, model, original, batch) -> float:
    """The loss of one batch, position by position."""
    if name == "layerwise":
        return slow_layers(model, original, batch)
    total = 0.0
    logits, teacher = (m(batch.ids_BS).logits.double().log_softmax(-1) for m in (model, original))
    for b, s in (batch.loss_mask_BS[:, 1:]).nonzero().tolist():
        own, best = logits[b, s], teacher[b, s]
        distilled = sum(float(q.exp() * (q - p)) for p, q in zip(own, best, strict=True))
        total += distilled if name in ("distilled", "kd", "router-kd") else -float(own[batch.ids_BS[b, s + 1]])
    return total


@ways
def test_the_loss_is_a_sum_over_positions_with_loss(name):
    case = Case()
    chosen = make_recovery({**QUICK, "how": name})
    context = Context(copy.deepcopy(case.small), case.plan, chosen.steps, 0, Original.of(case.original))
    batch = next(batches(tiny_tokens(), 2))
    chosen.way.prepare(context, chosen.steps)  # the end of training: the model as it will be
    summed, positions = chosen.way.loss(context, batch)
    assert positions == int(batch.loss_mask_BS[:, 1:].sum()) and summed.requires_grad
    with torch.no_grad():
        expected = slow_loss(name, context.model, case.original, batch)
    assert float(summed.detach()) == pytest.approx(expected, rel=1e-4)


# --- registration and options ---------------------------------------------------------------------------------------


def test_a_way_must_not_take_the_name_of_an_option_of_every_run(monkeypatch):
    monkeypatch.setattr(WAYS, "_items", dict(WAYS._items))

    @way("greedy", source="this test")
    @dataclasses.dataclass(frozen=True)
    class Greedy:
        steps: int = option(3, "steps")

    with pytest.raises(OptionError, match="'greedy' has an option 'steps', as every run has"):
        make_recovery({"how": "greedy"})


# --- options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WAYS)
def test_a_run_without_a_rate_has_that_of_its_way(name):
    assert make_recovery({"how": name}).learning_rate == WAYS[name].learning_rate > 0
    assert make_recovery({"how": name, "learning_rate": 0.5}).learning_rate == 0.5
    again = make_recovery({"how": name}).to_json()
    assert make_recovery(again).to_json() == again


@pytest.mark.parametrize("value", ["1e-3", True, 0, -1.0, float("nan")])
def test_a_rate_is_a_number_above_0(value):
    with pytest.raises(OptionError, match="--learning-rate is"):
        make_recovery({"how": "lora", "learning_rate": value})


def test_an_option_of_another_way_says_whose_it_is():
    with pytest.raises(
        OptionError, match="'full' has no option --rank; ways that have it: annealed, kd, layerwise, lora"
    ):
        make_recovery({"how": "full", "rank": 4})
    with pytest.raises(OptionError, match="'lora' has no option --recover-end-fraction; ways that have it: annealed"):
        make_recovery({"how": "lora", "end_fraction": 0.5}, "recover_")
    with pytest.raises(OptionError, match="unknown way to recover 'anealed': did you mean 'annealed'"):
        make_recovery({"how": "anealed"})
    with pytest.raises(OptionError, match=r"unknown way to recover .*'lora'"):
        make_recovery({"how": ["lora"]})


def test_names_of_ways_stand_in_their_own_files_and_as_the_default():
    found, words = {}, {"experts", "router"}  # which mean other things too
    names = [name for name in OURS if name not in words]
    for path in SRC.rglob("*.py"):
        text, place = path.read_text(encoding="utf-8"), path.relative_to(SRC).as_posix()
        found[place] = re.findall(rf'"({"|".join(names)})"(?!:)|(\bhow\b\s*(?:==|!=|in\s*[(\[{{]))', text)
    found = {place: len(hits) for place, hits in found.items() if hits}
    own = {f"training/ways/{name.replace('-', '_')}.py": 1 for name in names}
    assert all(f'@way("{name}"' in (SRC / "training" / "ways" / f"{name}.py").read_text() for name in words)
    assert DEFAULT_WAY in OURS and found == {**own, "training/options.py": 1, "demonstration.py": 1}


def test_compress_takes_the_options_of_recover(checkpoint, words, tmp_path):
    asked = {"data": str(words), "length": 64, "tokens": 512, "remove": 0.4, "rank": 2}
    training = {"steps": 2, "learning_rate": 1e-3, "rank": 3, "batch_size": 1, "length": 32, "train_bases": False}
    prefixed = {f"recover_{name}": value for name, value in training.items()}
    locum.compress(checkpoint, out=tmp_path / "one", recover="lora", seed=5, **prefixed, **asked)
    locum.compress(checkpoint, out=tmp_path / "small", seed=5, **asked)
    locum.recover(tmp_path / "small", out=tmp_path / "two", how="lora", data=str(words), seed=5, **training)
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two != (tmp_path / "small" / "model.safetensors").read_bytes()
    with pytest.raises(OptionError, match="--recover-rank is about training the result back; say how with --recover"):
        locum.compress(checkpoint, out=tmp_path / "no", recover_rank=3, **asked)
