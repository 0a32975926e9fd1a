"""Definitions against slow loops, adding and weighing, derived means and variances, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math

import pytest
import torch

from locum.errors import OptionError, StatisticsError
from locum.shapes import LayerShape, ModelShape
from locum.stats.definitions import STATISTICS
from locum.stats.events import (
    DecoderLayerEvent,
    EveryExpertEvent,
    HiddenGradientEvent,
    RoutedEvent,
    RouterEvent,
    Rows,
    SearchEvent,
    WeightGradientEvent,
    WeightsEvent,
)
from locum.stats.merging import SAMPLE_ROWS, merge_into, sample_of
from locum.stats.origin import Origin
from locum.stats.shares import BINS
from locum.stats.stand_ins import CANDIDATES
from locum.stats.sums import Statistics, Sums, check_needs, mean_output, output_variance

E, D, F, K, V = 5, 4, 3, 2, 7
HEADINGS = ("Needs:", "Shapes:", "Units:", "Edges:", "Cost:", "Source:")
ALL = tuple(STATISTICS)
SUMMED = tuple(name for name in ALL if not STATISTICS[name].searched)
OF_TEXT = tuple(name for name in ALL if STATISTICS[name].event in (RouterEvent, RoutedEvent))


def model_shape(experts: int = E, layers: int = 2) -> ModelShape:
    shapes = (LayerShape(f"layer.{i}", experts, K, D, 3, f"router.{i}", "softmax", True) for i in range(layers))
    return ModelShape("toy", tuple(shapes), 1000, 4000, 4, vocab_size=V)


ORIGIN = Origin(model_shape(), "m", "t", ("d",))
WORDS = {"versions": {"torch": "2"}, "command": "test", "seed": 0}


def statistics(layers: dict, **changes: object) -> Statistics:
    return Statistics(**{"domains": ("a",), "layers": layers, "origin": ORIGIN, "tokens": 9} | changes)


def draw(lengths: tuple[int, ...], seed: int = 0, experts: int = E) -> tuple[RouterEvent, RoutedEvent]:
    """Two events of one batch. The last expert is never routed."""
    generator = torch.Generator().manual_seed(seed)
    logits_TE = torch.randn(sum(lengths), experts, generator=generator)
    index_TK = logits_TE[:, :-1].topk(K).indices
    expert_P = index_TK.flatten().sort().values
    gate_P = torch.rand(len(expert_P), generator=generator)
    out_PD = torch.randn(len(expert_P), D, generator=generator) + 1
    counts = tuple(torch.bincount(expert_P, minlength=experts).tolist())
    inside = (torch.randn(len(expert_P), size, generator=generator) for size in (D, F))
    token_P = index_TK.flatten().sort(stable=True).indices // K
    id_P = torch.randint(0, V, (sum(lengths),), generator=generator)[token_P]
    turn_P = torch.rand(sum(lengths), generator=generator)[token_P]
    routed = RoutedEvent(expert_P, gate_P, out_PD, counts, *inside, token_P, id_P, turn_P, V)
    return RouterEvent(logits_TE, lengths), routed


def matrices(generator: torch.Generator) -> tuple[tuple[torch.Tensor, ...], ...]:
    sides = ((F, D), (F, D), (D, F))
    return tuple(tuple(torch.randn(*side, generator=generator) for side in sides) for _ in range(E))


WEIGHTS = WeightsEvent(
    matrices(torch.Generator().manual_seed(9)), torch.randn(E, D, generator=torch.Generator().manual_seed(8))
)


def others(seed: int = 0) -> tuple[object, ...]:
    """Events of calibration beside those of routers and routed experts."""
    generator = torch.Generator().manual_seed(100 + seed)
    out_TED = torch.randn(6, E, D, generator=generator, dtype=torch.float64)
    counts = (2, 0, 3, 1, 0)
    back = HiddenGradientEvent(counts, torch.randn(sum(counts), F, generator=generator))
    around = DecoderLayerEvent(*torch.randn(2, 6, D, generator=generator))
    return WEIGHTS, EveryExpertEvent(out_TED), back, WeightGradientEvent(matrices(generator)), around


FOUND = SearchEvent(
    {
        "dropped": torch.tensor([0.0, 1, 0, 0, 1], dtype=torch.float64),
        "pruned_importance": torch.tensor([0.5, 0, 2, 3, 0], dtype=torch.float64),
        "removal_loss": torch.tensor([0.5, -1, 2, 3, 0], dtype=torch.float64),
        "loss_curve": torch.tensor([-1, 0.5, 2, 2, 2], dtype=torch.float64),
        "best_sets": torch.tensor([[0, 1, 0, 0, 0], *[[0, 1, 0, 0, 1]] * 4], dtype=torch.float64),
        "candidate_error": torch.arange(5 * CANDIDATES, dtype=torch.float64).view(5, CANDIDATES),
        "candidate_loss": torch.arange(CANDIDATES, dtype=torch.float64),
        "error_price": torch.tensor(0.25, dtype=torch.float64),
        "merge_weights": torch.eye(5, dtype=torch.float64).repeat(5, 1, 1),
    }
)


def event_for(name: str, *events: object) -> object:
    return next(event for event in (*events, *others(), FOUND) if type(event) is STATISTICS[name].event)


def collect(*seeds: int, domain: str = "a", lengths: tuple[int, ...] = (6, 3), **changes: object) -> Statistics:
    sums = Sums(domain, SUMMED)
    for seed in seeds:
        for layer in ("layer.0", "layer.1"):
            for event in (*draw(lengths, seed), *others(seed)):
                sums.add(layer, event)
        sums.num_tokens += sum(lengths)
    return sums.statistics(dataclasses.replace(ORIGIN, **changes), WORDS)


def slow_router(event: RouterEvent) -> dict[str, object]:
    rows = event.logits_TE.tolist()
    softmax, entropy = [0.0] * E, 0.0
    for row in rows:
        total = sum(math.exp(v) for v in row)
        for e in range(E):
            softmax[e] += math.exp(row[e]) / total
            entropy -= math.exp(row[e]) / total * math.log(math.exp(row[e]) / total)
    cosine = [[0.0] * E for _ in range(E)]
    first = 0
    for length in event.sample_lengths:
        sample = rows[first : first + length]
        first += length
        for i in range(E):
            for j in range(E):
                dot = sum(row[i] * row[j] for row in sample)
                sides = [math.sqrt(sum(row[k] ** 2 for row in sample)) for k in (i, j)]
                cosine[i][j] += dot / (sides[0] * sides[1])
    norm = sum(math.sqrt(sum(v * v for v in row)) for row in rows)
    return {
        "tokens": len(rows),
        "samples": len(event.sample_lengths),
        "softmax_sum": softmax,
        "router_entropy": entropy,
        "logit_norm": norm,
        "logit_cosine": cosine,
    }


def slow_routed(event: RoutedEvent) -> dict[str, object]:
    sums = {name: [0.0] * E for name in ("count", "gate_sum", "output_norm", "gated_output_norm", "output_peak")}
    rows = {name: [[0.0] * D for _ in range(E)] for name in ("output_sum", "output_square")}
    columns = {
        name: [[0.0] * F for _ in range(E)] for name in ("hidden_square", "gated_hidden_square", "gated_hidden_peak")
    }
    grams = {"input_gram": (event.in_PD, D), "hidden_gram": (event.hidden_PF, F)}
    products = {name: [[[0.0] * size for _ in range(size)] for _ in range(E)] for name, (_, size) in grams.items()}
    for name, (x_PI, size) in grams.items():
        for expert, x in zip(event.expert_P.tolist(), x_PI.tolist(), strict=True):
            for i in range(size):
                for j in range(size):
                    products[name][expert][i][j] += x[i] * x[j]
    for expert, gate, hidden in zip(
        event.expert_P.tolist(), event.gate_P.tolist(), event.hidden_PF.tolist(), strict=True
    ):
        for c, value in enumerate(hidden):
            columns["hidden_square"][expert][c] += value * value
            columns["gated_hidden_square"][expert][c] += (gate * value) ** 2
            columns["gated_hidden_peak"][expert][c] = max(columns["gated_hidden_peak"][expert][c], abs(gate * value))
    together = {
        name: [[0.0] * E for _ in range(E)] for name in ("co_count", "gated_norm_product", "gated_output_product")
    }
    together["renormalised_output_norm"] = [0.0] * E
    pairs = list(
        zip(event.token_P.tolist(), event.expert_P.tolist(), event.gate_P.tolist(), event.out_PD.tolist(), strict=True)
    )
    for token, expert, gate, out in pairs:
        for other_token, other, other_gate, other_out in pairs:
            if other_token == token:
                dot = sum(a * b for a, b in zip(out, other_out, strict=True))
                together["gated_output_product"][expert][other] += gate * other_gate * dot
        of_token = [(e, g, math.sqrt(sum(v * v for v in o))) for t, e, g, o in pairs if t == token]
        norm = math.sqrt(sum(v * v for v in out))
        together["renormalised_output_norm"][expert] += gate / sum(g for _, g, _ in of_token) * norm
        for other, other_gate, other_norm in of_token:
            together["co_count"][expert][other] += 1
            together["gated_norm_product"][expert][other] += gate * norm * other_gate * other_norm
    for expert, gate, out in zip(event.expert_P.tolist(), event.gate_P.tolist(), event.out_PD.tolist(), strict=True):
        norm = math.sqrt(sum(v * v for v in out))
        sums["count"][expert] += 1
        sums["gate_sum"][expert] += gate
        sums["output_norm"][expert] += norm
        sums["gated_output_norm"][expert] += gate * norm
        sums["output_peak"][expert] = max(sums["output_peak"][expert], *map(abs, out))
        for d, value in enumerate(out):
            rows["output_sum"][expert][d] += value
            rows["output_square"][expert][d] += value * value
    tokens = [[0] * V for _ in range(E)]
    turned = [0.0] * E
    for p, expert in enumerate(event.expert_P.tolist()):
        tokens[expert][int(event.id_P[p])] += 1
        length = math.sqrt(sum(v * v for v in event.out_PD[p].tolist()))
        turned[expert] += float(event.gate_P[p]) * length * float(event.turn_P[p])
    token_P = event.token_P.tolist()
    turns = [float(turn) / token_P.count(token) for turn, token in zip(event.turn_P, token_P, strict=True)]
    squares = {name: [[0.0] * D for _ in range(E)] for name in ("input_square", "gated_input_square")}
    for expert, gate, row in zip(event.expert_P.tolist(), event.gate_P.tolist(), event.in_PD.tolist(), strict=True):
        for i, value in enumerate(row):
            squares["input_square"][expert][i] += value * value
            squares["gated_input_square"][expert][i] += (gate * value) ** 2
    together |= squares | {"token_count": tokens, "turned_output_norm": turned, "turn_sum": sum(turns)}
    together["input_sample"] = slow_sample(event)
    together["output_histogram"] = slow_histogram(event)
    return {**sums, **rows, **products, **columns, **together, **slow_shares(pairs)}


def slow_histogram(event: RoutedEvent) -> list[list[float]]:
    """By sign, octave and sixteenth of an octave, from -2^12 to 2^12; what is below 2^-20 lies in the middle."""
    found = [[0.0] * BINS for _ in range(E)]
    for expert, out in zip(event.expert_P.tolist(), event.out_PD.tolist(), strict=True):
        for value in out:
            mantissa, exponent = math.frexp(abs(value))  # mantissa from 0.5 to 1
            at = min(max((exponent + 19) * 16 + math.floor((2 * mantissa - 1) * 16), 0), 511)
            found[expert][511 - at if value < 0 else 512 + at] += 1
    return found


def slow_shares(pairs: list[tuple[int, int, float, list[float]]]) -> dict[str, list[float]]:
    """Histograms of the gates of a token's lesser experts, one token after the other, and a sample of tokens' gates."""
    found = {name: [0.0] * BINS for name in ("gate_ratio", "gate_share", "prefix_share", "prefix_gate")}
    rows = []
    for token in sorted({t for t, *_ in pairs}):
        gates = sorted((g for t, _, g, _ in pairs if t == token), reverse=True)
        rows.append([sum(g for t, e, g, _ in pairs if (t, e) == (token, expert)) for expert in range(E)])
        for r in range(1, len(gates)):
            before, total = sum(gates[:r]), sum(gates)
            found["gate_ratio"][math.floor(gates[r] / gates[0] * BINS)] += 1
            found["gate_share"][math.floor(gates[r] / total * BINS)] += 1
            found["prefix_share"][math.ceil(before / total * BINS) - 1] += 1
            found["prefix_gate"][min(math.ceil(before * BINS), BINS) - 1] += 1
    rows = sorted(rows, key=slow_key, reverse=True)
    return {**found, "gate_sample": [*rows, *[[0.0] * E] * (SAMPLE_ROWS - len(rows))]}


def slow_sample(event: RoutedEvent) -> list[list[float]]:
    """What every token's first expert got, those with the largest keys first, then zeros."""
    first: dict[int, list[float]] = {}
    for token, row in zip(event.token_P.tolist(), event.in_PD.double().tolist(), strict=True):
        first.setdefault(token, row)
    rows = sorted(first.values(), key=slow_key, reverse=True)
    return [*rows, *[[0.0] * D] * (SAMPLE_ROWS - len(rows))]


def slow_key(row: list[float]) -> int:
    """A sum over the bits in bfloat16, each mixed by splitmix64's last steps, mixed once more."""

    def signed(value: int) -> int:
        return (value + 2**63) % 2**64 - 2**63

    def mixed(value: int) -> int:
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            value = signed((value ^ (value >> shift)) * factor)
        return value ^ (value >> 31)

    bits = torch.tensor(row, dtype=torch.float64).bfloat16().view(torch.int16).tolist()
    terms = [mixed(signed(b * signed((2 * d + 1) * 0x9E3779B97F4A7C15))) for d, b in enumerate(bits)]
    return mixed(signed(sum(terms))) & (2**62 - 1)


def slow_hsic(outputs: list[list[list[float]]]) -> list[list[float]]:
    """The unbiased estimate as a mean over all quadruples of different tokens, times their number."""
    n = len(outputs[0])
    kernels = [[[sum(a * b for a, b in zip(x, y, strict=True)) for y in of] for x in of] for of in outputs]
    quadruples = list(itertools.permutations(range(n), 4))

    def of(k: list[list[float]], m: list[list[float]]) -> float:
        return n * sum(k[i][j] * (m[i][j] + m[q][r] - 2 * m[i][q]) for i, j, q, r in quadruples) / len(quadruples)

    return [[of(k, m) for m in kernels] for k in kernels]


def slow_others() -> dict[str, object]:
    weights, every, back, gradient, around = others()
    numbers = [[v for m in expert for row in m.tolist() for v in row] for expert in weights.experts]
    gram = every.gram_TEE.tolist()
    cosine = [[sum(g[i][j] / math.sqrt(g[i][i] * g[j][j]) for g in gram) for j in range(E)] for i in range(E)]
    squares, rows = [[0.0] * F for _ in range(E)], iter(back.hidden_gradient_PF.tolist())
    for e, count in enumerate(back.counts):
        for _ in range(count):
            squares[e] = [total + v * v for total, v in zip(squares[e], next(rows), strict=True)]
    ranks = []
    for expert in weights.experts:
        values = [torch.linalg.svdvals(m.double()).tolist() for m in expert]
        ranks.append(sum(sum(s * s for s in each) / each[0] ** 2 for each in values) / len(values))
    return {
        "weight_mass": [sum(map(abs, n)) for n in numbers],
        "weight_square": [sum(v * v for v in n) for n in numbers],
        "weight_product": [[sum(a * b for a, b in zip(m, n, strict=True)) for n in numbers] for m in numbers],
        "stable_rank": ranks,
        "down_column_square": [[sum(row[c] ** 2 for row in x[2].tolist()) for c in range(F)] for x in weights.experts],
        "router_norm": [math.sqrt(sum(v * v for v in row)) for row in weights.router_EI.tolist()],
        "router_product": [
            [sum(a * b for a, b in zip(x, y, strict=True)) for y in weights.router_EI.double().tolist()]
            for x in weights.router_EI.double().tolist()
        ],
        "output_cosine": cosine,
        "output_hsic": slow_hsic(every.out_TED.transpose(0, 1).tolist()),
        "every_output_sum": [[sum(row[e][d] for row in every.out_TED.tolist()) for d in range(D)] for e in range(E)],
        "hidden_gradient_square": squares,
        "gate_up_gradient": [[*x[0].tolist(), *x[1].tolist()] for x in gradient.experts],
        "down_gradient": [x[2].tolist() for x in gradient.experts],
        "decoder_turn_sum": sum(map(slow_turn, around.before_TD.tolist(), around.after_TD.tolist())),
    }


def slow_turn(one: list[float], two: list[float]) -> float:
    lengths = math.sqrt(sum(v * v for v in one)) * math.sqrt(sum(v * v for v in two))
    return max(0.0, 1 - sum(a * b for a, b in zip(one, two, strict=True)) / lengths)


def whole(increment: torch.Tensor | Rows) -> torch.Tensor:
    return torch.stack([row.double() for row in increment.rows]) if isinstance(increment, Rows) else increment


@pytest.mark.parametrize("name", ALL)
def test_definition_equals_slow_loop(name: str) -> None:
    router, routed = draw((6, 1, 3))
    expected = {**slow_router(router), **slow_routed(routed), **slow_others(), **FOUND.found}[name]
    definition = STATISTICS[name]
    value = whole(definition.increment(event_for(name, router, routed)))
    sizes = {"E": E, "D": D, "F": F, "G": 2 * F, "X": E, "V": V, "U": SAMPLE_ROWS, "H": BINS, "C": CANDIDATES}
    assert value.dtype == torch.float64
    assert tuple(value.shape) == tuple(sizes[letter] for letter in definition.axes)
    torch.testing.assert_close(value, torch.as_tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_docstring_has_every_heading(name: str) -> None:
    text = STATISTICS[name].increment.__doc__
    assert [heading for heading in HEADINGS if heading not in text] == []


@pytest.mark.parametrize("name", OF_TEXT)
def test_empty_event_adds_zero(name: str) -> None:
    router = RouterEvent(torch.zeros(0, E), ())
    rows = (torch.zeros(0, size) for size in (D, D, F))
    none_P = torch.zeros(0, dtype=torch.int64)
    routed = RoutedEvent(none_P, torch.zeros(0), next(rows), (0,) * E, *rows, none_P, none_P, torch.zeros(0), V)
    definition = STATISTICS[name]
    value = whole(definition.increment(event_for(name, router, routed)))
    assert value.count_nonzero() == 0 and value.ndim == len(definition.axes)


@pytest.mark.parametrize("name", OF_TEXT)
def test_half_precision_events_are_summed_wide(name: str) -> None:
    router, routed = draw((40, 24))
    definition = STATISTICS[name]

    def cast(dtype: torch.dtype) -> object:
        rows = (routed.gate_P, routed.out_PD, routed.in_PD, routed.hidden_PF)
        gate_P, out_PD, *inside = (x.bfloat16().to(dtype) for x in rows)
        return event_for(
            name,
            RouterEvent(router.logits_TE.bfloat16().to(dtype), router.sample_lengths),
            dataclasses.replace(routed, gate_P=gate_P, out_PD=out_PD, in_PD=inside[0], hidden_PF=inside[1]),
        )

    half, wide = cast(torch.bfloat16), cast(torch.float32)
    torch.testing.assert_close(whole(definition.increment(half)), whole(definition.increment(wide)), rtol=0, atol=0)


def test_silent_router_column_has_cosine_zero() -> None:
    logits_TE = torch.randn(4, E)
    logits_TE[:, 2] = 0
    cosine_EE = STATISTICS["logit_cosine"].increment(RouterEvent(logits_TE, (4,)))
    assert cosine_EE[2].tolist() == [0.0] * E and cosine_EE[:, 2].tolist() == [0.0] * E
    assert cosine_EE[0, 0] == pytest.approx(1, abs=1e-6)


def test_halves_add_up_to_the_whole() -> None:
    whole, sum_ = collect(1, 2, 3), collect(1) + collect(2, 3)
    for layer in whole.layers:
        for name in SUMMED:
            torch.testing.assert_close(sum_.layers[layer][name], whole.layers[layer][name], rtol=1e-12, atol=1e-12)
    assert sum_.domains == ("a",) and sum_.provenance == whole.provenance and sum_.tokens == 27


def test_adding_unites_domains_and_leaves_both_sides_alone() -> None:
    a, b = collect(1, domain="a"), collect(2, domain="b")
    before = copy.deepcopy(a.layers)
    both = a + b + a
    assert both.domains == ("a", "b")
    count_CE = both.layers["layer.0"]["count"]
    assert torch.equal(count_CE[0], 2 * a.layers["layer.0"]["count"][0])
    assert torch.equal(count_CE[1], b.layers["layer.0"]["count"][0])
    assert all(torch.equal(before[x][n], a.layers[x][n]) for x in before for n in SUMMED)
    assert torch.equal((b + a).layer("layer.1")["count"], (a + b).layer("layer.1")["count"])


def test_provenance_keeps_what_agrees_and_lists_what_does_not() -> None:
    one, two = (
        dataclasses.replace(
            collect(seed, data_fingerprints=(data,)), provenance={**WORDS, "seed": seed, **more}, next_block=3
        )
        for seed, data, more in ((1, "x", {}), (2, "y", {"note": None}))
    )
    merged = one + two + one
    assert merged.origin == dataclasses.replace(ORIGIN, data_fingerprints=("x", "y"))
    assert merged.provenance == {**WORDS, "seed": [1, 2], "note": [None]}
    assert (merged.tokens, merged.next_block, merged.searched) == (27, None, None)
    assert merged.words()["data_fingerprint"] == ["x", "y"] and one.words()["data_fingerprint"] == "x"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_fingerprint": "other"}, ("model_fingerprint", "'m'", "'other'")),
        ({"tokenizer_fingerprint": "other"}, ("tokenizer_fingerprint", "'t'", "'other'")),
    ],
)
def test_statistics_of_something_else_are_refused(changes: dict, words: tuple[str, ...]) -> None:
    with pytest.raises(StatisticsError) as caught:
        collect(1) + collect(1, **changes)
    assert all(word in str(caught.value) for word in words)


def test_statistics_of_another_shape_or_selection_are_refused() -> None:
    one = collect(1)
    other = statistics(one.layers, origin=dataclasses.replace(ORIGIN, shape=model_shape(layers=3)))
    with pytest.raises(StatisticsError, match="shape is"):
        one + other
    fewer = statistics({n: {"count": s["count"]} for n, s in one.layers.items()})
    with pytest.raises(StatisticsError, match=r"layer\.0 has .*gate_sum.* and count on the other"):
        one + fewer


def test_a_maximum_is_one_over_batches_domains_and_files() -> None:
    parts = [collect(seed, domain=domain) for seed, domain in ((1, "a"), (2, "a"), (3, "b"))]
    peaks = [part.layer("layer.0")["output_peak"] for part in parts]
    assert len({float(peak_E.max()) for peak_E in peaks}) == 3
    total = parts[0] + parts[1] + parts[2]
    assert torch.equal(total.layer("layer.0")["output_peak"], torch.stack(peaks).amax(dim=0))
    assert torch.equal(total.layers["layer.0"]["output_peak"][0], torch.maximum(peaks[0], peaks[1]))
    assert torch.equal(collect(1, 2).layer("layer.0")["output_peak"], torch.maximum(peaks[0], peaks[1]))


def test_facts_of_the_model_are_kept_once() -> None:
    both = collect(1, domain="a") + collect(2, domain="b")
    for name in ("weight_mass", "weight_product"):
        expected = whole(STATISTICS[name].increment(WEIGHTS))
        assert torch.equal(both.layer("layer.0")[name], expected) and both.layers["layer.0"][name].shape[0] == 1


def test_a_sample_does_not_depend_on_how_it_came_together() -> None:
    rows = torch.randn(3 * SAMPLE_ROWS, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole_UD = sample_of(rows)
    assert whole_UD.tolist() == sorted(rows.tolist(), key=slow_key, reverse=True)[:SAMPLE_ROWS]
    for sizes in ((700, 700, 136), (1, 1000, 535), (SAMPLE_ROWS,) * 3):
        parts = [sample_of(part) for part in rows[torch.randperm(len(rows))].split(sizes)]
        total = parts[0].clone()
        for part in parts[1:]:
            merge_into(total, part, "sample")
        assert torch.equal(total, whole_UD)
    few = sample_of(rows[:3])
    assert few[3:].abs().max() == 0 and torch.equal(sample_of(torch.cat([few, few.new_zeros(9, D)])), few)
    narrow = torch.randn(20_000, D, generator=torch.Generator().manual_seed(1)).bfloat16().double().unique(dim=0)
    assert (
        len({slow_key(row) for row in narrow[:4000].tolist()}) == 4000
    )  # bits that all rows have as zeros say nothing
    means = [float(whole_UD[:, d].mean()) for d in range(D)]
    assert max(map(abs, means)) < 4 / SAMPLE_ROWS**0.5  # keys say nothing of the numbers


def test_a_layer_is_merged_over_domains() -> None:
    both = collect(1, domain="a") + collect(2, domain="b")
    layer, named = both.layer("layer.0"), both.layers["layer.0"]
    for name in SUMMED:
        summed = STATISTICS[name].merge == "sum"
        expected = named[name].sum(dim=0) if summed else named[name].amax(dim=0)
        if STATISTICS[name].merge == "sample":
            rows = [row for row in named[name].flatten(0, 1).tolist() if any(row)]
            expected = torch.zeros_like(expected)
            expected[: len(rows)] = torch.tensor(sorted(rows, key=slow_key, reverse=True), dtype=torch.float64)
        torch.testing.assert_close(layer[name], expected, rtol=0, atol=0)
        assert len(named[name]) == (2 if STATISTICS[name].by_domain else 1)
    assert layer.shape.num_experts == E and set(layer) == set(SUMMED) and len(layer) == len(SUMMED) and "count" in layer


def test_missing_statistic_says_what_there_is_and_how_to_get_it() -> None:
    one = collect(1)
    few = statistics({n: {"count": s["count"]} for n, s in one.layers.items()})
    with pytest.raises(StatisticsError, match=r"layer layer\.0 has no statistic 'gate_sum'; it has: count\. Calibrate"):
        few.layer("layer.0")["gate_sum"]
    with pytest.raises(StatisticsError, match=r"layer\.7.*did you mean"):
        few.layer("layer.7")


def test_malformed_statistics_are_refused() -> None:
    one = collect(1)
    with pytest.raises(StatisticsError, match="2 domains"):
        statistics(one.layers, domains=("a", "b"))
    with pytest.raises(StatisticsError, match="float32"):
        statistics({"layer.0": {"count": torch.ones(1, E)}})
    for name, named in one.layers["layer.0"].items():
        with pytest.raises(StatisticsError, match=f"{name} of layer layer.0 .* expected float64 of shape"):
            statistics({"layer.0": {name: named[..., None]}})


def test_layer_without_events_is_refused() -> None:
    sums = Sums("a", SUMMED)
    for event in (*draw((4,)), *others()):
        sums.add("layer.0", event)
    with pytest.raises(StatisticsError, match=r"layer layer\.1 never gave what .*count"):
        sums.statistics(ORIGIN)


def test_only_needed_statistics_are_collected() -> None:
    sums = Sums("a", check_needs(("count",)))
    for layer in ("layer.0", "layer.1"):
        for event in draw((4,)):
            sums.add(layer, event)
    assert sums.statistics(ORIGIN).names == ("count",)
    assert check_needs(None) == tuple(n for n in ALL if not STATISTICS[n].on_demand)
    assert check_needs(("count", "count")) == ("count",)
    with pytest.raises(OptionError, match="did you mean 'count'"):
        check_needs(("counts",))
    with pytest.raises(OptionError, match="no statistics"):
        check_needs(())


def test_grams_are_collected_on_demand_only() -> None:
    assert {name for name in ALL if STATISTICS[name].on_demand} >= {"input_gram", "hidden_gram", *FOUND.found}
    assert {name for name in ALL if STATISTICS[name].inside} >= {"input_gram", "hidden_gram"}
    assert check_needs(("input_gram",)) == ("input_gram",)
    with pytest.raises(StatisticsError, match=r"Calibrate again with 'input_gram' .*unless --no-gram is given"):
        statistics({"layer.0": {}}).layer("layer.0")["input_gram"]


def test_what_a_search_finds_is_no_sum() -> None:
    with pytest.raises(OptionError, match=r"calibration does not give dropped: .*run `locum search`"):
        check_needs(("count", "dropped"))
    one = collect(1)
    with pytest.raises(StatisticsError, match=r"no statistic 'dropped'; .* Run `locum search`"):
        one.layer("layer.0")["dropped"]
    found = {n: {**s, "dropped": FOUND.found["dropped"][None]} for n, s in one.layers.items()}
    searched = statistics(found)
    assert torch.equal(searched.layer("layer.1")["dropped"], FOUND.found["dropped"])
    with pytest.raises(StatisticsError, match="cannot be added: dropped are what one search found"):
        searched + searched


def test_nothing_is_summed_over_domains_that_nobody_reads() -> None:
    """A file may hold Grams of gigabytes; planning reads none of them, again and again."""
    one = collect(1, 2)

    class Unreadable(dict):
        def __getitem__(self, name: str) -> torch.Tensor:
            assert name != "input_gram"
            return super().__getitem__(name)

    layers = {name: Unreadable(named) for name, named in one.layers.items()}
    layer = statistics(layers).layer("layer.0")
    assert "input_gram" in layer and torch.equal(layer["count"], one.layer("layer.0")["count"])


def test_running_sums_are_copied_out() -> None:
    sums = Sums("a", ("count",))
    for layer in ("layer.0", "layer.1"):
        sums.add(layer, draw((4,))[1])
    first = sums.statistics(ORIGIN)
    kept = first.layers["layer.0"]["count"].clone()
    sums.add("layer.0", draw((4,))[1])
    assert torch.equal(first.layers["layer.0"]["count"], kept)


def test_mean_and_variance_equal_torch() -> None:
    events = [draw((9, 8), seed)[1] for seed in (1, 2)]
    layer = collect(1, 2, lengths=(9, 8)).layer("layer.0")
    for e in range(E):
        rows_ND = torch.cat([event.out_PD[event.expert_P == e] for event in events]).double()
        if len(rows_ND) > 1:
            torch.testing.assert_close(mean_output(layer)[e], rows_ND.mean(0), rtol=1e-6, atol=1e-7)
            torch.testing.assert_close(output_variance(layer)[e], rows_ND.var(0), rtol=1e-5, atol=1e-6)
    assert not mean_output(layer)[E - 1].any() and not output_variance(layer)[E - 1].any()


def test_variance_edges() -> None:
    out_PD = torch.tensor([[1e3, 0.1, 1.0, 2.0]]).repeat(1000, 1)
    single = torch.ones(1, D)
    counts = (1000, 1, 0, 0, 0)
    event = RoutedEvent(torch.tensor([0] * 1000 + [1]), torch.ones(1001), torch.cat([out_PD, single]), counts)
    sums = Sums("a", ("count", "output_sum", "output_square"))
    for layer in ("layer.0", "layer.1"):
        sums.add(layer, event)
    variance_ED = output_variance(sums.statistics(ORIGIN).layer("layer.0"))
    assert variance_ED[1:].count_nonzero() == 0  # a single token, and none
    # A constant output is constant down to the rounding of its float32 squares.
    assert bool((variance_ED[0] >= 0).all()) and bool((variance_ED[0].sqrt() <= 3e-4 * out_PD[0]).all())
