"""Calibration of real tiny models against one token at a time through the stock model, and leaving no trace."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from locum.data.tokens import Tokens
from locum.errors import DataError, OptionError, StatisticsError, UnsupportedModel
from locum.measure.calibration import WATCHERS, CurrentBatch, Observer, calibrate
from locum.models.families import MoeLayer, find_layers
from locum.models.sizes import shape_of
from locum.models.watch import run_experts
from locum.stats.definitions import STATISTICS, statistic
from locum.stats.events import Event
from locum.stats.origin import Origin
from locum.stats.sums import Statistics, Sums
from making.tiny_models import tiny_ids, tiny_model

FAMILIES = ("olmoe", "qwen2_moe", "mixtral", "deepseek_v3", "gpt_oss")
E, K = 8, 2


def make_tokens(
    ids_BS: Tensor, domain_B: tuple[int, ...] | None = None, attention_BS: Tensor | None = None, **changes: object
) -> Tokens:
    blocks, length = ids_BS.shape
    domain_B = domain_B or (0,) * blocks
    return Tokens(
        ids_BS=ids_BS,
        loss_mask_BS=torch.ones_like(ids_BS, dtype=torch.bool),
        attention_BS=torch.ones_like(ids_BS) if attention_BS is None else attention_BS,
        bytes_BS=torch.ones_like(ids_BS),
        domain_B=torch.tensor(domain_B),
        domains=("prose", "code", "empty"),
        weights=(1.0, 1.0, 1.0),
        fingerprint="data",
        sources=(),
        split="all",
        length=length,
        **changes,
    )


def part(tokens: Tokens, blocks: list[int]) -> Tokens:
    names = ("ids_BS", "loss_mask_BS", "attention_BS", "bytes_BS", "domain_B")
    return replace(tokens, **{name: getattr(tokens, name)[blocks] for name in names})


def assert_same(one: Statistics, two: Statistics, tolerance: float = 1e-9) -> None:
    assert one.domains == two.domains and one.layers.keys() == two.layers.keys()
    for layer, named in one.layers.items():
        assert named.keys() == two.layers[layer].keys()
        for name, tensor in named.items():
            torch.testing.assert_close(
                tensor, two.layers[layer][name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
            )


# --- what is counted ---------------------------------------------------------------------------------------------


def watch(model: nn.Module, ids_BS: Tensor) -> dict[str, dict[str, Tensor]]:
    """Every layer's logits, indices, gates and inputs in a plain pass of the stock model, by hooks of our own."""
    seen: dict[str, dict[str, Tensor]] = {}
    handles = []
    for layer in find_layers(model):
        record = seen.setdefault(layer.shape.name, {})

        def on_router(_module: nn.Module, _inputs: tuple, output: tuple, record: dict = record) -> None:
            record["logits_TE"] = output[0].reshape(-1, E)

        def on_experts(_module: nn.Module, inputs: tuple, _output: Tensor, record: dict = record) -> None:
            record["x_TD"], record["index_TK"], record["gate_TK"] = inputs

        handles += [
            layer.router.register_forward_hook(on_router),
            layer.experts.register_forward_hook(on_experts),
        ]
    with torch.no_grad():
        model(ids_BS)
    for handle in handles:
        handle.remove()
    return seen


def slow_statistics(experts: nn.Module, seen: dict[str, Tensor], num_samples: int) -> dict[str, Tensor]:
    """Sums over tokens and experts, one at a time, through the stock experts module itself with a gate of one."""
    logits_TE = seen["logits_TE"].double()
    x_TD = seen["x_TD"]
    by_expert = ("count", "gate_sum", "output_norm", "gated_output_norm", "output_peak")
    sums = {n: torch.zeros(E, dtype=torch.float64) for n in by_expert}
    sums |= {n: torch.zeros(E, x_TD.shape[1], dtype=torch.float64) for n in ("output_sum", "output_square")}
    for t in range(len(x_TD)):
        for k in range(K):
            expert, gate = int(seen["index_TK"][t, k]), float(seen["gate_TK"][t, k])
            with torch.no_grad():
                one = experts(x_TD[t : t + 1], torch.tensor([[expert]]), torch.ones(1, 1))
            out_D = one[0].double()
            sums["count"][expert] += 1
            sums["gate_sum"][expert] += gate
            sums["output_norm"][expert] += out_D.norm()
            sums["gated_output_norm"][expert] += gate * out_D.norm()
            sums["output_peak"][expert] = max(sums["output_peak"][expert], out_D.abs().max())
            sums["output_sum"][expert] += out_D
            sums["output_square"][expert] += out_D * out_D
    cosine = torch.nn.functional.cosine_similarity
    return sums | {
        "tokens": torch.tensor(float(len(x_TD)), dtype=torch.float64),
        "samples": torch.tensor(float(num_samples), dtype=torch.float64),
        "softmax_sum": logits_TE.softmax(-1).sum(0),
        "logit_norm": sum(row.norm() for row in logits_TE),
        "logit_cosine": sum(cosine(s[:, :, None], s[:, None, :], dim=0) for s in logits_TE.chunk(num_samples)),
    }


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_statistic_equals_a_loop_over_tokens_and_experts(model_type: str) -> None:
    model = tiny_model(model_type)
    model.set_experts_implementation("eager")
    ids_BS = tiny_ids(3, 8)
    expected = watch(model, ids_BS)
    statistics = calibrate(model, make_tokens(ids_BS), batch_size=3)
    assert statistics.domains == ("prose",) and statistics.tokens == 24
    for layer in find_layers(model):
        named = slow_statistics(layer.experts, expected[layer.shape.name], num_samples=3)
        assert named.keys() == {name for name, item in STATISTICS.items() if not item.on_demand}
        for name, value in named.items():
            got = statistics.layer(layer.shape.name)[name]
            torch.testing.assert_close(got, value, rtol=2e-5, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
        assert (named["count"] > 0).sum() >= 4 and named["count"].max() > 2 * named["count"].min()  # decisive routing


@pytest.mark.parametrize("model_type", FAMILIES)
def test_observed_model_computes_what_eager_computes(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(model_type)
    model.set_experts_implementation("eager")
    ids_BS = tiny_ids(2, 16)
    with torch.no_grad():
        expected_BSV = model(ids_BS).logits
    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._local_mapping, "test_run", lambda *a: run_experts(*a)[0])
    model.set_experts_implementation("test_run")
    with torch.no_grad():
        torch.testing.assert_close(model(ids_BS).logits, expected_BSV, rtol=1e-5, atol=1e-5)


def test_post_expert_norm_and_missing_gate_are_honoured() -> None:
    model = tiny_model("olmoe")
    experts = find_layers(model)[0].experts
    x_TD, index_TK, gate_TK = torch.randn(5, 32), torch.tensor([[1, 3]] * 5), torch.rand(5, 2)
    experts.has_post_expert_norm = True
    experts.post_expert_norm = nn.LayerNorm(32)
    model.set_experts_implementation("grouped_mm")
    with torch.no_grad():
        torch.testing.assert_close(run_experts(experts, x_TD, index_TK, gate_TK)[0], experts(x_TD, index_TK, gate_TK))
        experts.has_post_expert_norm, experts.has_gate = False, False
        experts.up_proj = nn.Parameter(experts.gate_up_proj[:, :16].clone())
        torch.testing.assert_close(run_experts(experts, x_TD, index_TK, gate_TK)[0], experts(x_TD, index_TK, gate_TK))


def test_bfloat16_model() -> None:
    model = tiny_model("olmoe").to(torch.bfloat16)
    statistics = calibrate(model, make_tokens(tiny_ids(2, 8)))
    layer = statistics.layer(find_layers(model)[0].shape.name)
    assert float(layer["count"].sum()) == 16 * K and layer["output_sum"].dtype == torch.float64


# --- padding, domains, parts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["olmoe", "gpt_oss"])
def test_padded_batch_equals_its_sequences_one_by_one(model_type: str) -> None:
    model = tiny_model(model_type)
    ids_BS = tiny_ids(4, 10)
    lengths = (10, 4, 7, 0)
    attention_BS = (torch.arange(10) < torch.tensor(lengths)[:, None]).long()
    padded = calibrate(model, make_tokens(ids_BS * attention_BS, attention_BS=attention_BS), batch_size=4)
    alone = [calibrate(model, make_tokens(ids_BS[b : b + 1, :n])) for b, n in enumerate(lengths) if n]
    assert_same(padded, alone[0] + alone[1] + alone[2], tolerance=2e-5)
    assert padded.tokens == 21 and float(padded.layer("model.layers.1.mlp.experts")["samples"]) == 3


def test_padding_inside_left_of_the_text_is_left_out_too() -> None:
    model = tiny_model("olmoe")
    attention_BS = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    layer = calibrate(model, make_tokens(tiny_ids(2, 5), attention_BS=attention_BS)).layer("model.layers.0.mlp.experts")
    assert float(layer["tokens"]) == 8 and float(layer["count"].sum()) == 8 * K


def test_domains_are_counted_apart_and_equal_separate_runs() -> None:
    model = tiny_model("qwen2_moe")
    tokens = make_tokens(tiny_ids(7, 6), domain_B=(1, 0, 1, 0, 0, 1, 1))
    both = calibrate(model, tokens, batch_size=2)
    prose, code = (calibrate(model, part(tokens, blocks)) for blocks in ([1, 3, 4], [0, 2, 5, 6]))
    assert both.domains == ("prose", "code") and prose.domains == ("prose",)
    assert_same(both, prose + code, tolerance=2e-5)
    name = find_layers(model)[0].shape.name
    assert both.layers[name]["tokens"].tolist() == [18, 24] and float(both.layer(name)["tokens"]) == 42


def test_halves_and_batch_sizes_give_the_same_sums() -> None:
    model = tiny_model("mixtral")
    tokens = make_tokens(tiny_ids(6, 6))
    whole = calibrate(model, tokens, batch_size=6)
    assert_same(whole, calibrate(model, tokens, batch_size=1), tolerance=2e-5)
    halves = calibrate(model, part(tokens, [0, 1, 2])) + calibrate(model, part(tokens, [3, 4, 5]))
    assert_same(whole, halves, tolerance=2e-5)
    assert_same(whole, calibrate(model, tokens, batch_size=6), tolerance=0)  # the same bits every time


def test_going_on_from_a_saved_point_gives_the_same_as_one_pass() -> None:
    model = tiny_model("olmoe")
    tokens = make_tokens(tiny_ids(7, 6), domain_B=(1, 0, 1, 0, 0, 1, 1))
    saved: list[Statistics] = []
    seen: list[tuple[int, int]] = []
    whole = calibrate(
        model,
        tokens,
        batch_size=2,
        save_every=1,
        on_batch=saved.append,
        progress=lambda *now: seen.append(now),
    )
    assert (
        [point.next_block for point in saved] == [2, 3, 5, 7]
        and whole.next_block is None
        and seen == [(2, 7), (3, 7), (5, 7), (7, 7)]
    )
    for point in saved:
        again = calibrate(model, tokens, batch_size=2, start=point)
        assert_same(again, whole, tolerance=0)
        assert (again.tokens, again.domains, again.asked) == (42, whole.domains, whole.asked)
        assert again.provenance.keys() == whole.provenance.keys() and isinstance(again.provenance["time"], str)
    assert float(saved[0].layer("model.layers.0.mlp.experts")["tokens"]) == 12  # not moved by later batches
    seen.clear()
    calibrate(model, tokens, batch_size=2, start=saved[2], progress=lambda *now: seen.append(now))
    assert seen == [(7, 7)]


def test_only_needs_are_collected_and_agree_with_a_full_pass() -> None:
    model, tokens = tiny_model("olmoe"), make_tokens(tiny_ids(2, 6))
    full = calibrate(model, tokens)
    for needs in (("count",), ("logit_norm", "tokens"), ("output_sum", "softmax_sum")):
        few = calibrate(model, tokens, needs=needs)
        assert set(few.names) == set(needs)
        for name in needs:
            assert torch.equal(
                few.layers["model.layers.0.mlp.experts"][name], full.layers["model.layers.0.mlp.experts"][name]
            )


def origin_of(model: PreTrainedModel, tokens: Tokens, *fingerprints: str) -> Origin:
    return Origin(shape_of(model), *fingerprints, data_fingerprints=(tokens.fingerprint,))


def test_provenance_says_what_was_calibrated() -> None:
    model = tiny_model("olmoe")
    known, tokens = {"seed": 3, "note": "kept"}, make_tokens(tiny_ids(2, 6))
    made = calibrate(model, tokens, origin=origin_of(model, tokens, "m", "t"), provenance=known)
    assert known.items() <= made.provenance.items() and "torch" in made.provenance["versions"]
    assert made.origin == Origin(shape_of(model), "m", "t", ("data",))
    assert [layer.num_experts for layer in made.shape.layers] == [E, E]


# --- leaving no trace ----------------------------------------------------------------------------------------------


def state(model: nn.Module) -> tuple:
    configs = {id(m.config): m.config._experts_implementation for m in model.modules() if hasattr(m, "config")}
    modes = [module.training for module in model.modules()]
    hooks = [len(module._forward_hooks) for module in model.modules()]
    weights = [parameter.clone() for parameter in model.parameters()]
    return configs, modes, hooks, sorted(ALL_EXPERTS_FUNCTIONS), weights


def assert_untouched(model: nn.Module, before: tuple) -> None:
    after = state(model)
    assert after[:-1] == before[:-1]
    assert all(torch.equal(a, b) for a, b in zip(after[-1], before[-1], strict=True))


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_model_is_as_before_after_success(implementation: str) -> None:
    model = tiny_model("olmoe")
    model.set_experts_implementation(implementation)
    model.train()
    model.model.layers[1].eval()
    before = state(model)
    calibrate(model, make_tokens(tiny_ids(2, 6)))
    assert_untouched(model, before)
    assert set(before[0].values()) == {implementation}
    model(tiny_ids(1, 4)).logits.sum().backward()  # still trains


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("where", ["experts", "router", "progress", "on_batch", "setting"])
def test_model_is_as_before_after_an_error_or_interrupt(
    error: type[BaseException], where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("olmoe")
    model.set_experts_implementation("eager")
    before = state(model)

    def fail(*_: object) -> None:
        raise error("planned")

    routed = find_layers(model)[1].router.forward

    def fail_in_pass(x_TD: Tensor) -> object:
        if len(x_TD) == 16:  # find_layers tries routers on so many tokens before the pass
            return routed(x_TD)
        raise error("planned")

    options = {where: fail} if where in ("progress", "on_batch") else {}
    with monkeypatch.context() as patched:
        if where in ("experts", "router"):
            module = getattr(find_layers(model)[1], where)
            target = (module, fail_in_pass) if where == "router" else (module.act_fn, fail)
            patched.setattr(target[0], "forward", target[1])
        if where == "setting":
            patched.setattr(model, "set_experts_implementation", fail)
        expected = UnsupportedModel if (where, error) == ("setting", ValueError) else error
        with pytest.raises(expected, match="planned"):
            calibrate(model, make_tokens(tiny_ids(2, 6)), save_every=1, **options)
    assert_untouched(model, before)


def test_each_config_gets_its_own_implementation_back() -> None:
    model = tiny_model("olmoe")
    before = model.config._experts_implementation
    model.config._experts_implementation = None  # as after a config of one's own making
    calibrate(model, make_tokens(tiny_ids(1, 4)))
    assert model.config._experts_implementation is None
    model.config._experts_implementation = before


# --- what is refused -----------------------------------------------------------------------------------------------


def test_router_without_logits_is_refused_by_name() -> None:
    model = tiny_model("olmoe")
    router = find_layers(model)[0].router
    router.register_forward_hook(lambda _m, _i, out: (out[0][:, :3], *out[1:]) if len(out[0]) == 6 else out)
    with pytest.raises(UnsupportedModel, match=r"router model\.layers\.0\.mlp\.gate gave \(6, 3\) first.*8 experts"):
        calibrate(model, make_tokens(tiny_ids(1, 6)))
    assert (
        float(
            calibrate(model, make_tokens(tiny_ids(1, 6)), needs=("count",))
            .layer("model.layers.0.mlp.experts")["count"]
            .sum()
        )
        == 12
    )  # nothing asks for logits here


def test_plain_linear_router_gives_its_output() -> None:
    model = tiny_model("olmoe")
    layer = find_layers(model)[0]
    needs = ("tokens", "logit_norm")
    observer, sums = Observer(model, needs), Sums("a", needs)
    observer.batch = CurrentBatch.of(sums, torch.zeros(1, 3), torch.ones(1, 3, dtype=torch.bool), torch.device("cpu"))
    logits_TE = torch.randn(1, 3, E)
    observer.saw_router(layer, logits_TE)
    shape = replace(shape_of(model), layers=(layer.shape,))
    made = sums.statistics(Origin(shape))
    assert float(made.layer(layer.shape.name)["logit_norm"]) == pytest.approx(
        float(logits_TE.norm(dim=-1).sum()), rel=1e-6
    )


def test_bad_tokens_and_options_are_refused_before_anything_runs() -> None:
    model = tiny_model("olmoe")
    with pytest.raises(DataError, match=r"id 900.*0 to 127"):
        calibrate(model, make_tokens(torch.full((1, 4), 900)))
    with pytest.raises(DataError, match="no calibration tokens"):
        calibrate(model, make_tokens(tiny_ids(1, 4), attention_BS=torch.zeros(1, 4)))
    with pytest.raises(OptionError, match="batch_size is 0"):
        calibrate(model, make_tokens(tiny_ids(1, 4)), batch_size=0)
    with pytest.raises(OptionError, match="did you mean 'count'"):
        calibrate(model, make_tokens(tiny_ids(1, 4)), needs=("cuont",))


def test_partial_statistics_of_something_else_are_refused() -> None:
    model, tokens = tiny_model("olmoe"), make_tokens(tiny_ids(2, 4))
    mine, another = (origin_of(model, tokens, name) for name in "mn")
    start = replace(calibrate(model, tokens, needs=("count",), origin=mine), next_block=1)
    again = {"needs": ("count",), "origin": mine, "start": start}
    other = replace(tokens, fingerprint="other")
    with pytest.raises(StatisticsError, match="data_fingerprint was 'data' and is 'other'"):
        calibrate(model, other, **again | {"origin": origin_of(model, other, "m")})
    with pytest.raises(StatisticsError, match="model_fingerprint was 'm' and is 'n'"):
        calibrate(model, tokens, **again | {"origin": another})
    with pytest.raises(StatisticsError, match=r"needs was \['count'\] and is \['gate_sum'\]"):
        calibrate(model, tokens, **again | {"needs": ("gate_sum",)})
    with pytest.raises(StatisticsError, match="batch_size was 8 and is 3"):
        calibrate(model, tokens, **again | {"batch_size": 3})
    with pytest.raises(StatisticsError, match="batch_size was None"):  # sums of two, or of an older version
        calibrate(model, tokens, **again | {"start": replace(start, asked=None)})
    layers = {name: {} for name in start.layers}
    with pytest.raises(StatisticsError, match="lack some of count"):
        calibrate(model, tokens, **again | {"start": replace(start, layers=layers)})
    for block in (9, None):
        with pytest.raises(StatisticsError, match=f"next_block is {block}; allowed: 0 to 2"):
            calibrate(model, tokens, **again | {"start": replace(start, next_block=block)})


def test_every_event_that_calibration_makes_has_a_watcher() -> None:
    made = {item.event: item.event.made_by for _, item in STATISTICS.items()}
    assert set(made.values()) <= {"calibration", "search"} and all(issubclass(event, Event) for event in made)
    assert set(WATCHERS) == {event for event, maker in made.items() if maker == "calibration"}


@dataclass(frozen=True, eq=False)
class BlockEvent(Event):
    """An event of somebody else's: the hidden state before a layer's block."""

    x_TD: Tensor


@contextlib.contextmanager
def watch_blocks(observer: Observer) -> Iterator[None]:
    def hook_of(layer: MoeLayer):
        def hook(_block: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            event = BlockEvent(observer.batch.text(inputs[0].flatten(0, 1)))
            observer.batch.sums.add(layer.shape.name, event)

        return hook

    hooks = [layer.block.register_forward_pre_hook(hook_of(layer)) for layer in observer.layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def test_an_event_of_others_needs_a_class_and_a_watcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sum of what blocks get, against a forward pass with hooks of its own; padding is left out."""
    monkeypatch.setattr(STATISTICS, "_items", dict(STATISTICS._items))
    monkeypatch.setitem(WATCHERS, BlockEvent, watch_blocks)
    statistic("block_sum", axes="D", event=BlockEvent, on_demand=True)(lambda event: event.x_TD.double().sum(dim=0))
    model, ids_BS = tiny_model("olmoe"), tiny_ids(3, 6)
    attention_BS = torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] * 6])
    made = calibrate(model, make_tokens(ids_BS, attention_BS=attention_BS), needs=("block_sum", "count"))
    seen: list[Tensor] = []
    for layer in find_layers(model):
        layer.block.register_forward_pre_hook(lambda _block, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(ids_BS, attention_mask=attention_BS)
    for layer, x_BSD in zip(find_layers(model), seen, strict=True):
        expected_D = x_BSD.double()[attention_BS.bool()].sum(dim=0)
        torch.testing.assert_close(made.layer(layer.shape.name)["block_sum"], expected_D, rtol=1e-4, atol=1e-4)
    assert set(made.names) == {"block_sum", "count"}


def test_planted_dead_expert_is_found() -> None:
    model = tiny_model("olmoe")
    layer = find_layers(model)[1]
    with torch.no_grad():
        layer.router.weight[5] = 0
        layer.router.weight[5] -= 10 * layer.router.weight.mean(0)
        layer.experts.down_proj[2] = 0
    made = calibrate(model, make_tokens(tiny_ids(4, 16))).layer(layer.shape.name)
    assert made["output_norm"][2] == 0 and made["output_square"][2].count_nonzero() == 0
    assert math.isclose(float(made["softmax_sum"].sum()), float(made["tokens"]), rel_tol=1e-6)
