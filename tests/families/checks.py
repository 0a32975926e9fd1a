"""What is checked of every family, one function per check. Each takes a `Case` and raises where the family fails.

A check raises `NotApplicable` where the family has nothing of the kind, and Locum's own errors pass through: they are
refusals, and what they say is the stated reason.

Letters: T tokens, K top-k, E experts, D model width.
"""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from families.case import (
    PLANS,
    Case,
    NotApplicable,
    copied,
    dropped_of,
    mixed,
    near,
    prune,
    reloaded,
    stored,
    tokens_of,
)
from locum.checkpoints import on_call
from locum.checkpoints.application import apply_plan
from locum.checkpoints.load import load_model
from locum.checkpoints.rewrite import Rewriting
from locum.checkpoints.skeleton import open_source, read_shape, shape_in
from locum.checkpoints.streamed import stream_model
from locum.cli import cli
from locum.containers.container import StandInExperts
from locum.experts.policies.main_with_vectors import MainWithVectors
from locum.measure.calibration import CurrentBatch, Observer, calibrate, observed
from locum.measure.removals import ModelExplorer
from locum.models.families import MoeLayer, find_layers
from locum.models.layer_major import passes
from locum.models.replay import Recording
from locum.models.routers import router_logits
from locum.models.stored import write_model
from locum.plans.plan import KEPT, Base, LayerPlan, make_plan, stand_in
from locum.shapes import ModelShape
from locum.stats.sums import Sums

IMPLEMENTATIONS = ("grouped_mm", "batched_mm")


# --- checks -----------------------------------------------------------------------------------------------------


def check_inspect(case: Case) -> None:
    """`locum inspect` of a saved checkpoint, from config and headers, says what the live model is, to the byte."""
    with tempfile.TemporaryDirectory() as folder:
        case.model().save_pretrained(folder)
        shape = read_shape(folder)
        assert shape.layers == case.shape.layers and shape.model_type == case.shape.model_type
        assert (shape.parameters, shape.bytes) == stored(folder)
        said = CliRunner().invoke(cli, ["inspect", folder], catch_exceptions=False)
        assert said.exit_code == 0 and f"{shape.parameters:,} parameters" in said.output, said.output
        assert f"routed experts {shape.expert_parameters:,}" in said.output
    live = sum(p.numel() for x in find_layers(case._model) for n, p in x.experts.named_parameters() if "norm" not in n)
    assert shape.expert_parameters == live


def check_observed(case: Case) -> None:
    """Looking changes nothing: logits equal those of the eager experts."""
    model = case.model()
    needs = ("count", "gate_sum", "tokens")
    observer, mask_BS = Observer(model, needs), torch.ones_like(case.ids_BS, dtype=torch.bool)
    observer.batch = CurrentBatch.of(Sums("text", needs), case.ids_BS, mask_BS, model.device)
    with observed(observer):
        near(case.logits_of(model), case.logits)


def check_statistics(case: Case) -> None:
    """Counts, sums of gates, of norms and of outputs equal one token and one expert at a time."""
    model, expected = case.model(), {}
    for layer in find_layers(model):
        sums = expected[layer.shape.name] = torch.zeros(4, layer.shape.num_experts, dtype=torch.float64)
        layer.experts.register_forward_pre_hook(slow_counter(layer, sums))
    case.logits_of(model)
    for name, sums in expected.items():
        layer = case.statistics.layer(name)
        assert torch.equal(layer["count"], sums[0])
        near(layer["gate_sum"], sums[1])
        near(layer["output_norm"], sums[2])
        near(layer["output_sum"].sum(dim=1), sums[3], 1e-4)
        assert sums[0].sum() == case.ids_BS.numel() * case.shape.layer(name).top_k


def slow_counter(layer: MoeLayer, sums: Tensor) -> Callable[..., None]:
    def hook(experts: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        x_TD, index_TK, gate_TK = arguments
        forward = type(experts).forward.__wrapped__  # the family's own loop, whatever the experts interface says
        for t, k in ((t, k) for t in range(len(x_TD)) for k in range(index_TK.shape[1])):
            e = int(index_TK[t, k])
            out_D = forward(experts, x_TD[t : t + 1], torch.tensor([[e]]), gate_TK.new_ones(1, 1))[0]
            sums[:, e] += torch.stack([torch.tensor(1.0), gate_TK[t, k], out_D.norm(), out_D.sum()]).double()

    return hook


def check_logits(case: Case) -> None:
    """What statistics read as a router's logits orders experts as the product with the router's weights does."""
    model = case.model()
    layers = find_layers(model)
    read: list[Tensor] = []
    for layer in layers:
        rule = layer.family.router
        layer.router.register_forward_hook(lambda _m, _i, output, rule=rule: read.append(router_logits(output, rule)))
    with RouterProducts(layers) as products:
        case.logits_of(model)
    assert len(read) == len(products.seen) == len(layers)
    for logits, product, layer in zip(read, products.seen, layers, strict=True):
        count = layer.shape.num_experts
        expected_TE = product.reshape(-1, product.shape[-1])[:, :count]
        assert logits.reshape(-1, count).shape == expected_TE.shape
        assert torch.equal(logits.reshape(-1, count).argsort(dim=-1), expected_TE.argsort(dim=-1))


class RouterProducts(TorchFunctionMode):
    """While it is entered, keeps every product with a router's weights."""

    def __init__(self, layers: tuple[MoeLayer, ...]) -> None:
        super().__init__()
        self.weights = {p.tensor.data_ptr() for x in layers for p in x.per_expert if p.tensor.ndim == 2 and p.axis == 0}
        self.seen: list[Tensor] = []

    def __torch_function__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        if function is torch.nn.functional.linear and arguments[1].data_ptr() in self.weights:
            self.seen.append(result)
        return result


def check_keep_all(case: Case) -> None:
    """A plan that keeps everything is the identity; and so is a container in which every expert is a base of its own."""
    model = case.applied(case.plan(lambda shape: ([KEPT] * shape.num_experts, [])))
    assert torch.equal(case.logits_of(model), case.logits)
    own = case.plan(
        lambda shape: (
            [stand_in(base=e) for e in range(shape.num_experts)],
            [Base((e,), (1.0,)) for e in range(shape.num_experts)],
        )
    )
    model = case.applied(own)
    assert all(isinstance(layer.experts, StandInExperts) for layer in find_layers(model))
    near(case.logits_of(model), case.logits, 2e-5)


def check_masking(case: Case) -> None:
    """Dropping equals giving the dropped experts a logit of minus infinity in the family's own router."""
    pruned = case.applied(case.plan(prune))
    pruned.set_experts_implementation("eager")
    model = case.model()
    layers = find_layers(model)
    with MaskedRouters(layers):
        expected = case.logits_of(model)
    assert not torch.equal(expected, case.logits)
    near(case.logits_of(pruned), expected)
    assert all(layer.shape.num_experts == 6 for layer in find_layers(pruned))


class MaskedRouters(TorchFunctionMode):
    """While it is entered, products with router weights have minus infinity in the columns of dropped experts.

    That happens before the family's own score function, selection and normalisation, whatever they are. Selection
    biases become minus infinity too, for routers that would add them to a score of zero.
    """

    def __init__(self, layers: tuple[MoeLayer, ...]) -> None:
        super().__init__()
        self.dropped: dict[int, tuple[int, ...]] = {}
        for layer in layers:
            dropped = list(dropped_of(layer.shape))
            for part in layer.per_expert:
                if part.tensor.ndim == 2 and part.axis == 0:
                    self.dropped[part.tensor.data_ptr()] = dropped_of(layer.shape)
                elif part.leaf == "bias":
                    continue  # a linear layer's, inside the product already
                elif "bias" in part.leaf:
                    part.tensor.data.transpose(0, part.axis)[dropped] = float("-inf")

    def __torch_function__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        if function is torch.nn.functional.linear and (dropped := self.dropped.get(arguments[1].data_ptr())):
            result = result.index_fill(-1, torch.tensor(dropped), float("-inf"))
        return result


def check_stock_reload(case: Case) -> None:
    """A uniformly pruned model is saved without a trace of Locum, loads in stock transformers, equal to the bit."""
    plan = case.plan(prune)
    model = case.applied(plan)
    if not plan.is_stock(case.shape):
        raise NotApplicable(
            "experts of another tower share the config's number of experts, so a pruned text part is saved in containers"
        )
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        assert "quantization_config" not in (Path(folder) / "config.json").read_text()
        again = reloaded(type(model), folder)
        assert stored(folder) == (plan.size(case.shape).parameters, plan.size(case.shape).bytes)
    assert not any(isinstance(module, StandInExperts) for module in again.modules())
    assert torch.equal(case.logits_of(again), case.logits_of(model))


def check_implementations(case: Case) -> None:
    """Eager, grouped and batched kernels agree on the pruned model."""
    model = case.applied(case.plan(prune))
    if not case.plan(prune).is_stock(case.shape):
        raise NotApplicable("its pruned layers are containers, which have one implementation")
    expected = case.logits_of(model)
    for name in IMPLEMENTATIONS:
        model.set_experts_implementation(name)
        assert all(layer.experts.config._experts_implementation == name for layer in find_layers(model))
        near(case.logits_of(model), expected, 2e-5)


def check_plan(case: Case, name: str) -> None:
    """Through the container: forward, backward, save, size to the byte, load with `import locum`, equal to the bit."""
    plan = case.plan(PLANS[name])
    model = case.applied(plan)
    before = case.logits_of(model)
    check_gradients(case, model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        size = plan.size(case.shape)
        assert stored(folder) == (size.parameters, size.bytes)
        again = copied(load_model(folder))
    assert type(again) is type(model)
    assert [type(x.experts) for x in find_layers(again)] == [type(x.experts) for x in find_layers(model)]
    assert torch.equal(case.logits_of(again), before)
    if name == "mixed":
        case.reloaded_mixed = again


def plan_check(name: str) -> Callable[[Case], None]:
    check = functools.partial(check_plan, name=name)
    check.__doc__ = f"The plan `{PLANS[name].__name__}`. {check_plan.__doc__}"
    return check


def check_gradients(case: Case, model: PreTrainedModel) -> None:
    """Finite everywhere; not zero in whatever a selected expert uses, and in the routers."""
    chosen: dict[str, set[int]] = {}
    hooks = []
    for layer in find_layers(model):
        seen = chosen.setdefault(layer.shape.name, set())

        def see(module: nn.Module, arguments: tuple[Tensor, ...], seen: set[int] = seen) -> None:
            seen.update(arguments[1].unique().tolist())

        hooks.append(layer.experts.register_forward_pre_hook(see))
    logits = model(input_ids=case.ids_BS, use_cache=False).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), case.ids_BS.flatten() % logits.shape[-1]).backward()
    for hook in hooks:
        hook.remove()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert all(bool(g.isfinite().all()) for g in gradients.values())
    for layer in find_layers(model):
        used = {id(p): n for n, p in used_parameters(layer.experts, chosen[layer.shape.name])}
        assert used
        for parameter in layer.experts.parameters():
            if id(parameter) in used:
                assert parameter.grad is not None and bool(parameter.grad.any()), used[id(parameter)]
    model.zero_grad()


def used_parameters(container: StandInExperts, chosen: set[int]) -> Iterator[tuple[str, nn.Parameter]]:
    for path, stack in container.paths:
        if any(stack.rows[e] >= 0 for e in chosen):
            leaves = stack.kind.tensors(stack.variant, container.layout)
            yield from ((f"{path} {leaf}", getattr(container.stack(path), leaf)) for leaf in leaves)


def check_generate(case: Case) -> None:
    """Greedy generation of the reloaded mixed model with its cache equals recomputing every step without one."""
    model = case.reloaded_mixed or case.applied(case.plan(mixed))
    if not model.can_generate():
        raise NotApplicable(f"{type(model).__name__} does not generate text")
    prompt = case.ids_BS[:2, :9]
    model.generation_config.eos_token_id = None
    options = {"do_sample": False, "max_new_tokens": 6, "attention_mask": torch.ones_like(prompt)}
    written, slow = (model.generate(prompt, use_cache=use_cache, **options) for use_cache in (True, False))
    assert torch.equal(written, slow), (written.tolist(), slow.tolist())
    assert written.shape[1] == prompt.shape[1] + 6


def check_compressed_experts(case: Case) -> None:
    """Half of the selected experts run: at one, vectors change nothing; drawn, it all trains, saves and loads again."""
    policies = [
        (MainWithVectors(max(1, x.top_k // 2)), MainWithVectors(max(1, x.top_k // 2), "none"))
        for x in case.shape.layers
    ]
    made = []
    for which in (0, 1):
        layers = zip(case.shape.layers, policies, strict=True)
        plan = [LayerPlan(x.name, (KEPT,) * x.num_experts, routing=policy[which]) for x, policy in layers]
        made.append((make_plan(case.shape, plan), case.applied(make_plan(case.shape, plan))))
    (plan, model), (_, without) = made
    near(case.logits_of(model), case.logits_of(without))
    generator = torch.Generator().manual_seed(0)
    for layer in find_layers(model):
        layer.experts.offsets_NV.data.normal_(0, 0.2, generator=generator)
    before = case.logits_of(model)
    check_gradients(case, model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        size = plan.size(case.shape)
        assert stored(folder) == (size.parameters, size.bytes)
        again = copied(load_model(folder))
    assert torch.equal(case.logits_of(again), before)


def check_explore(case: Case) -> None:
    """Removals tried on the live model give the errors that one pruned for good shows: of a layer, of all of them."""
    model = case.model()
    explorer = ModelExplorer(model, tokens_of(case.ids_BS), sample=case.ids_BS.numel())
    ids_BS = explorer.batches[0].ids_BS
    plan = case.plan(prune)
    removed = {x.name: torch.tensor([e in dropped_of(x) for e in range(x.num_experts)]) for x in case.shape.layers}
    for layer in plan.layers:
        one = case.applied(make_plan(case.shape, [layer]))
        outputs = [experts_output(m, layer.layer, ids_BS) for m in (one, model)]
        expected = (outputs[0] - outputs[1]).norm()
        near(explorer.output_error(layer.layer, removed[layer.layer][None])[0].float(), expected, 1e-4)
    with torch.no_grad():
        before, after = (Recording(m, list(removed), explorer.batches) for m in (model, case.applied(plan)))
    last = max(before.position.values())
    expected = (after.recorded(last, 0) - before.recorded(last, 0)).norm()
    near(explorer.block_error([removed])[0].float(), expected, 1e-4)
    assert torch.equal(case.logits_of(model), case.logits)


def experts_output(model: PreTrainedModel, name: str, ids_BS: Tensor) -> Tensor:
    seen: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_hook(lambda _m, _i, output: seen.append(output))
    with torch.no_grad():
        model.base_model(ids_BS, use_cache=False)
    hook.remove()
    return seen[0]


def check_streamed(case: Case) -> None:
    """One decoder layer in memory at a time gives the logits of the whole model, to the bit, on every batch; with all modules
    outside of them taken for large ones, and with hidden states on the disk, too."""
    batches = [case.ids_BS[:1], case.ids_BS[1:, :9], case.ids_BS]
    with tempfile.TemporaryDirectory() as folder, torch.no_grad(), mock.patch.object(on_call, "LARGE", 0):
        case.model().save_pretrained(folder)
        whole, streamed = load_model(folder), stream_model(folder)
        jobs = [lambda ids_BS=ids_BS: streamed(input_ids=ids_BS, use_cache=False).logits for ids_BS in batches]
        expected = [whole(input_ids=ids_BS, use_cache=False).logits for ids_BS in batches]
        for scratch in (None, Path(folder)):
            assert all(map(torch.equal, passes(streamed, jobs, scratch=scratch), expected))
        assert [p.device.type for x in find_layers(streamed) for p in x.experts.parameters()].count("cpu") == 0


def uneven(shape: ModelShape) -> list[LayerPlan]:
    """Experts of the last layer dropped alone."""
    last = shape.layers[-1]
    return [LayerPlan(last.name, tuple(prune(last)[0]))]


def even(shape: ModelShape) -> list[LayerPlan]:
    return [LayerPlan(x.name, tuple(prune(x)[0])) for x in shape.layers]


def everything(shape: ModelShape) -> list[LayerPlan]:
    """Every kind of slot, adapters that start from statistics and at random, and a routing policy."""
    plans = []
    for index, layer in enumerate(shape.layers):
        slots, bases = mixed(layer)
        slots[4] = stand_in(rank=3, start=("whitened", "gaussian")[index % 2])
        policy = MainWithVectors(max(1, layer.top_k // 2)) if index % 2 else None
        plans.append(LayerPlan(layer.name, tuple(slots), tuple(bases), policy))
    return plans


NEEDED = ("output_sum", "count", "input_gram", "hidden_gram")


def check_rewriting(case: Case) -> None:
    """Files rewritten under a plan, and the live model under the same plan, saved: the same config and tensors to the bit.
    Whatever the plan does not touch has the bytes of the original, also where transformers does not load it."""
    with tempfile.TemporaryDirectory() as folder:
        original = Path(folder) / "original"
        case.model().save_pretrained(original)
        beside = {
            f"beside.{n}.position_ids": torch.arange(7, dtype=t) for n, t in enumerate((torch.uint8, torch.int64))
        }
        before = load_file(original / "model.safetensors") | beside
        save_file(before, original / "model.safetensors", {"format": "pt"})
        source = open_source(original)
        shape, live = shape_in(original, source), load_model(original)
        observed = calibrate(case.model(), tokens_of(case.ids_BS), batch_size=2, needs=NEEDED)
        kinds = [everything] if any(layer.refuse_dropping for layer in shape.layers) else [everything, even, uneven]
        for kind in kinds:
            plan = make_plan(shape, kind(shape))
            out, saved = Path(folder) / f"{kind.__name__} rewritten", Path(folder) / f"{kind.__name__} saved"
            out.mkdir()
            Rewriting(source, shape, plan, observed, seed=3).write(out, limit=100_000)
            model = apply_plan(copy.deepcopy(live), plan, observed, seed=3)
            write_model(model, saved)
            after = in_folder(out)
            assert_same(in_folder(saved) | beside, after)
            touched = {name for name in before if ".experts." in name or name not in after}
            touched |= {name for name in before.keys() - touched if before[name].shape != after[name].shape}
            assert_same(
                {n: t for n, t in before.items() if n not in touched}, {n: after[n] for n in before.keys() - touched}
            )
            assert (saved / "config.json").read_text() == (out / "config.json").read_text()
            assert stored(str(out)) == (plan.size(shape).parameters, plan.size(shape).bytes)
            assert torch.equal(case.logits_of(copied(load_model(out))), case.logits_of(copied(model)))


def assert_same(expected: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def in_folder(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


CHECKS: dict[str, Callable[[Case], None]] = {
    "inspect": check_inspect,
    "observed": check_observed,
    "statistics": check_statistics,
    "router logits": check_logits,
    "keep all": check_keep_all,
    "pruned = masked": check_masking,
    "pruned, stock reload": check_stock_reload,
    "kernels": check_implementations,
    **{name: plan_check(name) for name in PLANS},
    "generate": check_generate,
    "compressed experts": check_compressed_experts,
    "explore": check_explore,
    "streamed": check_streamed,
    "rewriting": check_rewriting,
}
