"""Every way through a container gives what weights written out give; and what each costs, counted."""

from __future__ import annotations

import copy
import itertools
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from locum.containers.container import StandInExperts, is_swiglu
from locum.containers.layout import Layout
from locum.experts.policies.main_with_vectors import MainWithVectors
from locum.kernels import choice, grouped, native, products
from locum.models.families import canonical_activation, find_layers
from locum.plans.plan import DROPPED, KEPT, Base, LayerPlan, stand_in
from locum.shapes import LayerShape
from making.containers import KINDS, assert_near, filled, relative_error, routing, shared_base_container, slow, swiglu
from making.oracles import random_layer_plan
from making.slots import base_of, has_constant, rank_of, rows_of, start_of
from making.tiny_models import tiny_model

E, D, F = 8, 16, 24
ROUNDING = 4 * 2**-8  # test_container.test_bfloat16_stays_within_its_rounding


def shape(has_gate=True, has_bias=False):
    return LayerShape("experts", E, 2, D, F, "router", "softmax", True, has_gate=has_gate, has_bias=has_bias)


def container_of(kind, seed, dtype, ranks=(8, 16), policy=None):
    """Ranks whose rows have a multiple of 16 bytes, as torch's grouped product wants it."""
    activate, has_gate, has_bias = KINDS[kind]
    plan = random_layer_plan(shape(has_gate, has_bias), seed)
    fitting = itertools.cycle(ranks)
    slots = tuple(
        stand_in(base_of(s), next(fitting), start_of(s), has_constant(s)) if rank_of(s) else s for s in plan.slots
    )
    plan = LayerPlan(plan.layer, slots, plan.bases, routing=policy)
    return filled(Layout.of(plan, shape(has_gate, has_bias)), activate, dtype, seed)


def forced(monkeypatch, way):
    if way.startswith("native") and not native.available():
        pytest.skip("no compiler or no avx512_bf16")
    monkeypatch.setattr(choice, "choose", lambda *args: way)


def routed_to(container, tokens, seed, dtype, distinct=True):
    _, index, gates = routing(container.num_experts, tokens, 3, seed, dtype, distinct)
    return torch.randn(tokens, D, generator=torch.Generator().manual_seed(seed)).to(dtype), index, gates


ON_CPU = [way for way in choice.PRODUCTS if not way.startswith("triton")]  # those: test_triton.py


@pytest.mark.parametrize("way", [*ON_CPU, choice.LOOP])
@pytest.mark.parametrize("kind", KINDS)
def test_every_way_equals_written_out_weights_in_bfloat16(way, kind, monkeypatch):
    forced(monkeypatch, way)
    for seed in range(5):
        container = container_of(kind, seed, torch.bfloat16)
        x, index, gates = routed_to(container, 1 + 7 * seed, seed, torch.bfloat16, distinct=seed < 3)
        expected = slow(copy.deepcopy(container).double(), x.double(), index, gates.double())
        with torch.no_grad():
            actual = container(x, index, gates)
        assert actual.dtype == torch.bfloat16
        if expected.any():
            assert relative_error(actual, expected) < ROUNDING


@pytest.mark.parametrize("way", ["native", "gathered", choice.LOOP])
@pytest.mark.parametrize("kind", KINDS)
def test_ways_for_other_formats_equal_written_out_weights(way, kind, monkeypatch):
    forced(monkeypatch, way)
    for seed in range(5):
        container = container_of(kind, seed, torch.float32, ranks=(3, 5))
        x, index, gates = routed_to(container, 6, seed, torch.float32)
        with torch.no_grad():
            assert_near(container(x, index, gates), slow(container, x, index, gates), 1e-5)


@pytest.mark.parametrize("way", ["native", "gathered", "grouped", choice.LOOP])
@pytest.mark.parametrize("what", ["projections", "hidden", "static", "none", "norm"])
def test_every_way_knows_routing_policies_and_norms_of_single_experts(way, what, monkeypatch):
    """Cluster by cluster is held against the oracle in test_routing."""
    container = container_of("swiglu", 3, torch.bfloat16, policy=None if what == "norm" else MainWithVectors(2, what))
    if what == "norm":
        container.post_expert_norm = torch.nn.RMSNorm(D, dtype=torch.bfloat16)
    x, index, gates = routed_to(container, 9, 1, torch.bfloat16)
    with torch.no_grad():
        monkeypatch.setattr(choice, "choose", lambda *args: choice.LOOP)
        expected = copy.deepcopy(container).double()(x.double(), index, gates.double())
        forced(monkeypatch, way)
        assert relative_error(container(x, index, gates), expected) < ROUNDING


@pytest.mark.parametrize("way", ["native", "grouped", "gathered"])
@pytest.mark.parametrize(
    ("rows", "items", "outputs", "inputs", "pairs"),
    [
        (5, 4, 64, 32, 9),
        (3, 2, 136, 64, 6),
        (40, 6, 128, 96, 300),
        (1, 8, 8, 8, 8),
        (7, 3, 8, 2048, 50),
        (1, 2, 8, 8, 0),
    ],
)
def test_products_equal_float64(way, rows, items, outputs, inputs, pairs, monkeypatch):
    forced(monkeypatch, way)
    check_products(way, rows, items, outputs, inputs, pairs)


# Rows in plenty, of which matrices are turned round: several panels, inputs that one panel cannot hold, a last part, items
# with plenty beside items with few.
MANY = (
    (300, 2, 130, 100, 700),
    (120, 1, 70, 4200, 260),
    (200, 3, 37, 33, 500),
    (70, 3, 300, 7, 130),
    (40, 20, 300, 8, 130),
)


@pytest.mark.parametrize("dtype", native.FORMATS)
@pytest.mark.parametrize("sizes", [(5, 4, 63, 33, 9), (30, 3, 61, 5, 90), (2, 2, 1, 1, 4), (3, 2, 130, 17, 6), *MANY])
@pytest.mark.parametrize("threads", [1, 3])
def test_native_products_take_any_size(threads, sizes, dtype, monkeypatch):
    forced(monkeypatch, "native")
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    check_products("native", *sizes, dtype, 2**-7 if dtype == torch.bfloat16 else 1e-5)


def check_products(way, rows, items, outputs, inputs, pairs, dtype=torch.bfloat16, relative=2**-7):
    """Views of wider tensors, pairs left out, several pairs of one item and token; nothing beside the rows is touched."""
    generator = torch.Generator().manual_seed(0)

    def random(*sizes):
        return torch.randn(sizes, generator=generator).to(dtype)

    item = torch.randint(-1, items, (pairs,), generator=generator)
    token = torch.randint(rows, (pairs,), generator=generator).sort().values
    x, weight, y = (
        random(rows, inputs + 8)[:, :inputs],
        random(items, 2 * outputs, inputs)[:, outputs:],
        random(pairs, outputs + 9),
    )
    chosen, before = item >= 0, y.clone()
    made = choice.PRODUCTS[way]()
    made.add(y[:, 3 : 3 + outputs], x, weight, item, token)
    exact = torch.einsum("poi,pi->po", weight.double()[item], x.double()[token]) * chosen[:, None]
    assert torch.equal(y[:, :3], before[:, :3]) and torch.equal(y[:, 3 + outputs :], before[:, 3 + outputs :])
    assert_near(y[:, 3 : 3 + outputs].double(), before[:, 3 : 3 + outputs].double() + exact, relative)
    hidden, total = random(pairs, inputs), torch.zeros(rows, outputs)
    made.scatter(total, hidden, weight, item, token)
    exact = torch.einsum("poi,pi->po", weight.double()[item], hidden.double()) * chosen[:, None]
    assert_near(total.double(), torch.zeros(rows, outputs).double().index_add(0, token, exact), relative)


@pytest.mark.parametrize(("dtype", "relative"), [(torch.bfloat16, 2**-8), (torch.float32, 1e-5)])
@pytest.mark.parametrize("sizes", [(5, 4, 63, 33, 9), (1, 1, 1, 1, 1), (2, 2, 8, 8, 0), *MANY])
@pytest.mark.parametrize("threads", [1, 3])
def test_gated_products_equal_float64(threads, sizes, dtype, relative, monkeypatch):
    forced(monkeypatch, "native")
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    rows, items, width, inputs, pairs = sizes
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, inputs + 8, generator=generator).to(dtype)[:, :inputs]
    weight = (torch.randn(items, 2 * width, inputs, generator=generator) * 3 / inputs**0.5).to(dtype)
    item, token = (torch.randint(most, (pairs,), generator=generator) for most in (items, rows))
    token = token.sort().values
    scale = torch.rand(pairs, 3, generator=generator).to(dtype)[:, 1:2]
    gate, up = torch.einsum("poi,pi->po", weight.double()[item], x.double()[token]).chunk(2, dim=1)
    actual = native.gated(x, weight, scale, item, token)
    expected = functional.silu(gate) * up * scale.double()
    assert actual.shape == (pairs, width) and actual.dtype == dtype
    assert_near(actual.double(), expected, relative)


@pytest.mark.parametrize("way", ["gathered", "grouped"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_all_pairs_at_once_are_those_of_the_clusters(way, kind, monkeypatch):
    """Those of the clusters are held against weights written out in test_container; native products have none."""
    for seed in range(3):
        container = container_of(kind, seed, torch.float32)
        x, index, gates = routed_to(container, 7, seed, torch.float32, distinct=False)
        wanted = [x.requires_grad_(True), gates.requires_grad_(True), *container.parameters()]
        found = []
        for one in (choice.LOOP, way):
            monkeypatch.setattr(choice, "choose", lambda *args, one=one: one)
            loss = container(x, index, gates).square().sum()
            found.append(torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True))
        for expected, actual in zip(*found, strict=True):
            assert_near(actual, expected, 1e-4)


@pytest.mark.skipif(not native.available(), reason="no compiler or no avx512_bf16")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (5, 17), (300, 600), (0, 8)])
def test_rows_are_spread_over_their_tokens(rows, width, dtype, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    x = torch.randn(rows, 2 * width, generator=torch.Generator().manual_seed(0)).to(dtype)[:, :width]
    token = torch.randint(4, (rows,), generator=torch.Generator().manual_seed(1))
    total = torch.ones(4, width)
    expected = total.clone().index_add_(0, token, x.float())
    native.spread_(total, x, token)
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.skipif(not native.available(), reason="no compiler or no avx512_bf16")
@pytest.mark.parametrize(("dtype", "relative"), [(torch.bfloat16, 2**-8), (torch.float32, 1e-6)])
@pytest.mark.parametrize("width", [1, 16, 77])
def test_swiglu_is_rounded_once(width, dtype, relative):
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(50, 2 * width + 3, generator=generator) * torch.logspace(-3, 4, 50)[:, None]).to(dtype)[:, 3:]
    scale = torch.rand(50, 3, generator=generator).to(dtype)[:, 1:2]  # one of several gates of each token
    gate, up = x.double().chunk(2, dim=1)
    exact = functional.silu(gate) * up * scale.double()
    assert ((native.swiglu(x, scale).double() - exact).abs() <= relative * exact.abs() + 1e-28).all()


@pytest.mark.parametrize(
    ("name", "known"),
    [("olmoe", True), ("qwen3_moe", True), ("mixtral", True), ("deepseek_v3", True), ("gpt_oss", False)],
)
def test_a_familys_swiglu_is_known_by_its_numbers(name, known):
    assert is_swiglu(canonical_activation(find_layers(tiny_model(name))[0].experts)) is known


def test_what_is_nearly_swiglu_is_not_taken_for_it():
    assert is_swiglu(swiglu)
    with torch.device("meta"):  # as users set a default device
        assert is_swiglu(swiglu)
    for other in (
        lambda pre: swiglu(pre.clamp(max=7)),
        lambda pre: functional.gelu(pre.chunk(2, dim=-1)[0]) * pre.chunk(2, dim=-1)[1],
        lambda pre: functional.silu(pre.chunk(2, dim=-1)[0]) * (pre.chunk(2, dim=-1)[1] + 1),
        lambda pre: functional.silu(pre.chunk(2, dim=-1)[1]) * pre.chunk(2, dim=-1)[0],
    ):
        assert not is_swiglu(other)


def mixed_plan():
    """Kept experts, a shared base with ranks, ranks alone: what a padded product would pay most for."""
    slots = (
        KEPT,
        KEPT,
        *(stand_in(0, r) for r in (3, 8, 8)),
        *(stand_in(None, r) for r in (2, 15)),
        DROPPED,
    )
    return LayerPlan("experts", slots, (Base((2, 3), (0.5, 0.5)),))


def test_operations_are_those_of_the_ranks_and_of_distinct_bases(monkeypatch):
    """Cluster by cluster nothing is padded, and a base is multiplied once per token however many members it has."""
    forced(monkeypatch, choice.LOOP)
    container = filled(Layout.of(mixed_plan(), shape()), swiglu)
    x, index, gates = routed_to(container, 20, 0, torch.float32)
    units = {(container.layout.dense_of[e], t) for t, row in enumerate(index.tolist()) for e in row}
    dense = sum(row >= 0 for row, _ in units)
    ranks = sum(
        rows_of(container.layout).ranks[rows_of(container.layout).rank_of[e]]
        for e in index.flatten()
        if rows_of(container.layout).rank_of[e] >= 0
    )
    with FlopCounterMode(display=False) as counter:  # with gradients: without them, some are made where none can count
        container(x, index, gates)
    assert dense < index.numel() - 20
    assert counter.get_total_flops() == 2 * (dense * 3 * D * F + ranks * 3 * (D + F))


def test_a_base_is_multiplied_once_per_token_however_many_members_are_selected():
    container = shared_base_container(rank=0)
    # Token 0: three members, one base. Token 1: two members and a kept expert. Token 2: three kept experts.
    index = torch.tensor([[4, 5, 7], [6, 4, 0], [1, 2, 3]])
    x, _, gates = routing(E, 3, 3)
    with FlopCounterMode(display=False) as counter:
        output = container(x, index, gates)
    d, f = container.layout.hidden_size, container.layout.expert_width
    assert counter.get_total_flops() == 2 * (1 + 2 + 3) * 3 * d * f
    assert_near(output, slow(container, x, index, gates), 1e-5)


def test_units_are_distinct_items_and_tokens():
    item = torch.tensor([2, 0, 2, -1, 0, 2])
    token = torch.tensor([0, 0, 0, 1, 1, 2])
    units = grouped.Units.of(item, token, 3, 4)
    assert units.ends_N.tolist() == [2, 2, 4]
    assert units.item_U.tolist() == [0, 0, 2, 2, 3, 3]
    assert units.token_U.tolist()[:4] == [0, 1, 0, 2]
    assert units.unit_P.tolist() == [0, 1, 2, 2, 3, 4]
    assert units.order_P.tolist() == [1, 4, 0, 2, 5, 3]


@pytest.mark.parametrize(
    "kind", ["swiglu", *(pytest.param(x, marks=pytest.mark.journeys) for x in KINDS if x != "swiglu")]
)
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.journeys)])
def test_decoding_compiles_without_a_graph_break(kind, dtype):
    for seed, policy in enumerate((None, None, None, MainWithVectors(2, "projections"), MainWithVectors(2, "static"))):
        torch.compiler.reset()
        container = container_of(kind, seed, dtype, policy=policy)
        compiled = torch.compile(container, fullgraph=True, backend="eager")
        x, index, gates = routed_to(container, 4, seed, dtype)
        with torch.no_grad():
            expected, actual = container(x, index, gates), compiled(x, index, gates)
        assert actual.dtype == dtype
        if expected.any():
            assert relative_error(actual, expected.double()) < (1e-5 if dtype == torch.float32 else ROUNDING)


def test_what_serves_is_chosen_by_device_format_and_size():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    bf16, fp32 = torch.bfloat16, torch.float32
    with torch.no_grad():
        few = "native" if native.available() else choice.LOOP
        assert choice.choose(cpu, bf16, 8, 64, True) == few
        assert choice.choose(cpu, bf16, 8 * 2048, 64, True) == choice.LOOP
        assert choice.choose(cpu, bf16, 8 * 2048, 64, True, low_rank=True) == few
        assert choice.choose(cpu, bf16, 8 * 6144, 64, True, low_rank=True) == choice.LOOP
        assert choice.choose(cpu, fp32, 8, 64, True) == few
        assert choice.choose(cpu, torch.float64, 8, 64, True) == choice.LOOP
        assert choice.choose(cuda, bf16, 8 * 2048, 64, True) == "grouped"
        assert choice.choose(cuda, bf16, 8, 64, False) == "gathered"
        assert choice.choose(cuda, fp32, 8 * 2048, 64, True) == choice.LOOP
    assert choice.choose(cpu, bf16, 8, 64, True) == choice.LOOP  # gradients may be asked for


def test_a_container_on_the_meta_device_has_its_table_on_the_cpu():
    with torch.device("meta"):
        container = StandInExperts(Layout.of(mixed_plan(), shape()), swiglu, torch.float32, "meta")
    assert container.table(torch.device("cpu"))[0].tolist() == [
        0,
        1,
        2,
        3,
        4,
        5,
        6,
        7,
    ]  # the last is no expert: an index of -1


@pytest.mark.parametrize("way", ["grouped", "gathered"])
@pytest.mark.parametrize("kind", KINDS)
def test_ways_for_devices_never_ask_what_was_routed(way, kind):
    """Nothing has values on the meta device, so whatever reads one raises, as does what needs them for a shape."""
    for seed, policy in enumerate((None, MainWithVectors(2, "projections"), MainWithVectors(2, "static"))):
        container = container_of(kind, seed, torch.bfloat16, policy=policy)
        given = [tensor.to("meta") for tensor in routed_to(container, 9, 0, torch.bfloat16)]
        container = container.to("meta")
        container.way = way
        with torch.no_grad():
            assert container(*given).shape == given[0].shape
            container.way = choice.LOOP
            with pytest.raises((RuntimeError, NotImplementedError), match=r"(?i)meta"):
                container(*given)


@pytest.mark.parametrize("way", ["grouped", "gathered"])
def test_ways_for_devices_compile_without_a_graph_break(way):
    container = container_of("swiglu", 1, torch.bfloat16)
    container.way = way
    given = routed_to(container, 4, 1, torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(torch.compile(container, fullgraph=True, backend="eager")(*given), container(*given))


def test_pairs_are_grouped_once_for_products_that_share_them():
    made = []
    remembered = products.Remembered(lambda *given: made.append(given) or len(made))
    item, token = torch.tensor([0, 1]), torch.tensor([0, 0])
    assert [remembered(item, token, 2, 1), remembered(item, token, 2, 1)] == [1, 1]
    assert [remembered(item.clone(), token, 2, 1), remembered(item, token.clone(), 2, 1)] == [2, 3]


def test_the_library_is_compiled_once_and_a_failure_is_said(monkeypatch, tmp_path, caplog):
    """Where processor and compiler are there it compiles: no test below or above is left out for an error in the source."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if torch.cpu._is_avx512_bf16_supported() and shutil.which("c++"):
        file = native.compile_source(shutil.which("c++"))
        written = file.stat().st_mtime_ns
        assert native.compile_source(shutil.which("c++")).stat().st_mtime_ns == written
        assert [f.name for f in file.parent.iterdir()] == [file.name]
        monkeypatch.setattr(native, "FLAGS", ("--no-such-flag",))
        assert native.library.__wrapped__() is None
        assert "torch's own are used" in caplog.text
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert native.library.__wrapped__() is None


@pytest.mark.parametrize("named", ["", "cache", "./cache"])
def test_a_cache_that_is_no_absolute_path_is_none(named, monkeypatch, tmp_path):
    """The current folder may be a checkpoint's, which anybody may have made."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", named)
    monkeypatch.setattr(native, "FLAGS", ("--no-such-flag",))
    with pytest.raises(subprocess.CalledProcessError):
        native.compile_source(a_compiler(tmp_path))
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["home"]


def a_compiler(folder: Path) -> str:
    """Says its version, makes a file of what it is given with -o, and fails for flags that are none."""
    script = folder / "c++"
    script.write_text(
        '#!/bin/sh\ncase "$*" in --version) echo 1;; *--no-such-flag*) exit 1;; '
        '*) for last; do :; done; echo made > "$last"; chmod 777 "$last";; esac\n'
    )
    script.chmod(0o755)
    return str(script)


def test_only_a_library_that_nobody_else_can_change_is_loaded(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    compiler = a_compiler(tmp_path)
    file = native.compile_source(compiler)
    assert not (file.stat().st_mode | file.parent.stat().st_mode) & 0o022
    file.write_text("mine")
    assert native.compile_source(compiler).read_text() == "mine"
    file.chmod(0o777)
    assert native.compile_source(compiler).read_text() == "made\n"
    file.unlink()
    file.symlink_to(tmp_path / "c++")
    assert not native.compile_source(compiler).is_symlink()
    file.parent.chmod(0o777)
    with pytest.raises(PermissionError, match="remove it, or set XDG_CACHE_HOME"):
        native.compile_source(compiler)
    file.parent.chmod(0o700)
    monkeypatch.setattr("os.geteuid", lambda: file.stat().st_uid + 1)
    with pytest.raises(PermissionError, match=str(file.parent)):
        native.compile_source(compiler)


def test_a_library_without_the_functions_and_a_compiler_of_the_current_folder_are_none(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(native.ctypes, "CDLL", lambda _: object())
    monkeypatch.setenv("CXX", a_compiler(tmp_path))
    assert native.library.__wrapped__() is None
    assert "torch's own are used" in caplog.text
    monkeypatch.setattr(native, "compile_source", lambda compiler: pytest.fail(f"{compiler} was run"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CXX", "./c++")
    assert native.library.__wrapped__() is None
