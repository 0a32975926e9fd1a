"""What each command says of its result: text for people, or the whole of it as JSON."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections import Counter
from collections.abc import Callable
from typing import Any

import click
from rich.table import Table

from ..exports.export import larger
from ..files import describe_size
from ..reports import frontier
from ..speed import page
from ..stages.calibration import coverage
from ..stages.estimate import Estimate
from ..verification.folder import FAILED, Check
from .parameters import typed_again
from .shown import add_row, print_table, say, shown


def emit(data: Any, as_json: bool, human: Callable[[Any], None]) -> None:
    """Print data as JSON, or let `human` say it."""
    if as_json:
        click.echo(json.dumps(data, indent=1, default=str))
    else:
        human(data)


def show_inspect(result: dict[str, Any], as_json: bool) -> None:
    emit(result, as_json, _inspect_table)


def _inspect_table(result: dict[str, Any]) -> None:
    share = result["expert_parameters"] / result["parameters"]
    say(
        f"{result['model_type']}{' (compressed by Locum)' if result['compressed'] else ''}: "
        f"{result['parameters']:,} parameters, {describe_size(result['bytes'])}; "
        f"routed experts {result['expert_parameters']:,} ({share:.1%})"
    )
    say(
        f"active for a token{_fewer(result['experts_per_token'])}: {result['active_parameters']:,} parameters, "
        f"{describe_size(result['active_bytes'])}"
    )
    table = Table("layers", "experts", "top-k", "width", "router", "groups", "shared", box=None)
    for alike, first in _alike(result["layers"]):
        kind = first["router_kind"] + (", gates sum to one" if first["renormalised"] else "")
        sizes = f"{first['hidden_size']} x {first['expert_width']}"
        counts = (first[key] for key in ("num_groups", "shared_experts"))
        top_k = str(first["top_k"]) + (f" ({first['routing']})" if first["routing"] else "")
        add_row(table, alike, str(first["num_experts"]), top_k, sizes, kind, *map(str, counts))
    print_table(table, 120)
    for note in result["notes"]:
        say(f"note: {note}")
    if result["would_save"]:
        say(_saving(result["would_save"]))
    say(f"next, with your own text in place of text.txt:\n  {result['next']}")


def _fewer(experts: list[float]) -> str:
    """How many experts of a layer run, where a policy runs fewer than are selected."""
    selected, run = experts
    return f" ({run:.3g} of {selected:.3g} experts a layer run)" if run < selected else ", at most"


def _saving(would: dict[str, Any]) -> str:
    what = f"{would['method']} at --remove {would['remove']:g}"
    if would["refused"]:
        return f"{what}: {would['refused']}"
    (whole, parameters), (before, after) = would["parameters"], would["bytes"]
    return (
        f"{what} would save {'about ' if would['estimate'] else ''}{(before - after) / before:.0%}: "
        f"{describe_size(before)} -> {describe_size(after)}, {whole:,} -> {parameters:,} parameters"
    )


def _alike(layers: list[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """Runs of layers that differ in name alone, as "first" or "first ... last (n)", with the first of each."""
    runs: list[list[dict[str, Any]]] = []
    for layer in layers:
        same = runs and all(layer[k] == runs[-1][0][k] for k in layer if k not in ("name", "router"))
        if same:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    names = [r[0]["name"] if len(r) == 1 else f"{r[0]['name']} ... {r[-1]['name']} ({len(r)})" for r in runs]
    return [(name, run[0]) for name, run in zip(names, runs, strict=True)]


def show_statistics(result: Any, as_json: bool) -> None:
    data = {"tokens": result.tokens, "domains": list(result.domains), "layers": len(result.layers), **coverage(result)}
    emit(data, as_json, lambda d: say(_observed(d)))


def _observed(data: dict[str, Any]) -> str:
    """What calibration looked at, and how many experts saw hardly anything, in words."""
    seen = f"{data['tokens']:,} tokens of {', '.join(data['domains'])} in {data['layers']} layers"
    if "tokens_per_expert" not in data:
        return seen
    counts = sorted(n for layer in data["tokens_per_expert"].values() for n in layer)
    never, few = (sum(map(len, data[name].values())) for name in ("never", "few"))
    said = f"{seen}; of {len(counts):,} experts half saw {counts[len(counts) // 2]:,} tokens or more"
    if not never + few:
        return f"{said}, and all at least {data['few_is_below']:,}"
    worst = max(data["tokens_per_expert"], key=lambda name: sum(len(data[x].get(name, ())) for x in ("never", "few")))
    return (
        f"{said}, {never:,} none and {few:,} fewer than {data['few_is_below']:,} (most of them in {worst}); more text, or other "
        f"domains, would tell of those"
    )


def show_path(result: Any, as_json: bool) -> None:
    emit({"out": str(result)}, as_json, lambda d: click.echo(d["out"]))


def show_estimate(result: Estimate, as_json: bool) -> None:
    def human(_: Any) -> None:
        table = Table("stage", "time", "memory", "read", "written", "measured on", box=None)
        for row in (*result.parts, result):
            sizes = map(describe_size, (row.memory_bytes, row.read_bytes, row.written_bytes))
            add_row(table, row.stage, _duration(row.seconds), *sizes, "" if row.parts else row.measured)
        print_table(table, 120)
        disk = result.free_disk_bytes
        room = "" if disk is None else f", {describe_size(disk)} of disk"
        say(f"free now: {describe_size(result.free_memory_bytes)} of memory{room}; nothing was written")

    emit(dataclasses.asdict(result), as_json, human)


def _duration(seconds: float) -> str:
    """About so long, for people."""
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"


def show_leftovers(rows: list[dict[str, Any]], as_json: bool) -> None:
    def human(_: Any) -> None:
        for row in rows:
            say(f"{'removed' if row['removed'] else 'found'} {row['path']} ({describe_size(row['bytes'])})")
        if outputs := dict.fromkeys(row["output"] for row in rows if not row["removed"]):
            say(f"the same commands go on from what they left; to remove it: locum clean {shlex.join(outputs)}")
        if not rows:
            say("nothing was left by interrupted runs")

    emit(rows, as_json, human)


def show_summary(result: dict[str, Any], as_json: bool) -> None:
    def human(d: dict[str, Any]) -> None:
        for key in ("parameters", "expert_parameters", "active_parameters", "bytes"):
            before, after = d[key]
            say(f"{key.replace('_', ' '):>18}: {before:>16,} -> {after:>16,}  ({after / before - 1:+.1%})")
        selected, run = d["experts_per_token"]
        if d["routing"]:
            say(f"{'experts per token':>18}: {run:.2f} of {selected:.2f} that are selected, mean over layers")
            for words, count in Counter(d["routing"].values()).items():
                say(f"{'routing':>18}: {words} ({count} layers)")
        say(f"{'removed':>18}: {d['removed']:.2%} of the routed experts' parameters; stock layout: {d['stock_layout']}")
        if d["formats"]:
            say(f"{'experts in':>18}: {', '.join(d['formats'])}")
        for fate in ("dropped", "replaced"):
            if any(d[f"{fate}_per_layer"]):
                say(f"{fate + ' per layer':>18}: {d[f'{fate}_per_layer']}")
        if d["super_experts"]:
            total, lost = sum(map(len, d["super_experts"].values())), d["super_experts_lost"]
            say(f"{'super experts':>18}: {total}, {'all of them kept' if not lost else 'lost: ' + ', '.join(lost)}")

    emit(result, as_json, human)


def show_recovery(result: dict[str, Any], as_json: bool) -> None:
    def human(result: dict[str, Any]) -> None:
        experts = {name: len(chosen) for name, chosen in result.get("trained_experts", {}).items()}
        said = result | ({"trained_experts": experts} if experts else {})
        say("\n".join(f"{key}: {value}" for key, value in said.items()))

    emit(result, as_json, human)


def show_rows(rows: list[Any], as_json: bool) -> None:
    def human(_: Any) -> None:
        table = Table("model", "domain", "metric", "value", "95% interval", "n", box=None)
        for row in rows:
            add_row(
                table,
                row.model,
                row.domain,
                row.metric,
                f"{row.value:.4f}",
                "" if row.low is None else f"{row.low:.4f} to {row.high:.4f}",
                f"{row.n:,}",
            )
        print_table(table)

    emit([dataclasses.asdict(row) for row in rows], as_json, human)


def show_checks(checks: list[Check], as_json: bool) -> None:
    def human(_: Any) -> None:
        table = Table("check", "engine", "result", "detail", box=None)
        for check in checks:
            add_row(table, *dataclasses.astuple(check))
        print_table(table, 120)

    emit([dataclasses.asdict(check) for check in checks], as_json, human)
    if any(check.result == FAILED for check in checks):
        raise click.exceptions.Exit(1)


def show_bench(result: dict[str, Any], as_json: bool) -> None:
    def human(d: dict[str, Any]) -> None:
        table = Table(*page.HEADS, box=None)
        for row in d["rows"]:
            add_row(table, *page.cells(row))
        print_table(table, 170)
        for name, model in d["models"].items():
            say(page.memory_line(name, model))
            for line in page.engine_lines(name, model):
                say(line)
        for x in d["not_run"]:
            say(f"not run: {x['model']}, {x['implementation']}, {x['batch']} prompts: {x['why']}")

    emit(result, as_json, human)


def show_frontier(result: dict[str, Any], as_json: bool) -> None:
    def human(d: dict[str, Any]) -> None:
        shown = Table(*frontier.HEADS, box=None)
        for point in d["points"]:
            add_row(shown, *frontier.cells(point, d["bytes"]))
        print_table(shown, 150)
        given = typed_again(click.get_current_context(), without=("method", "points", "out", "picture", "force"))
        say(f"a plan of one of these sizes: {frontier.plan_command(d, [*given, '--method', d['method']])}")

    emit(result, as_json, human)


def show_export(result: dict[str, Any], as_json: bool) -> None:
    emit(result, as_json, lambda d: say(larger(d)))


def show_comparison(result: dict[str, Any], as_json: bool) -> None:
    def human(d: dict[str, Any]) -> None:
        for group in d["groups"]:
            _show_group(group, d)
        say(d["report"])

    emit(result, as_json, human)


def _show_group(group: dict[str, Any], result: dict[str, Any]) -> None:
    left_out = [name for name in result["left_out"].split(",") if name]
    title = (
        f"{group['remove']:.0%} of the expert bytes removed, {group['state']}: loss above the original, nats per token"
    )
    heads = ["method", "size", "loss", "95% interval", *(["of what was seen"] if left_out else [])]
    heads += [f"{name} (not seen)" for name in left_out]
    table = Table(*heads, "worst domain", "KL", "against random", "better than next", box=None, title=title)
    for row in group["rows"]:
        lost, low, high = row["loss_delta"]
        add_row(
            table,
            row["name"],
            describe_size(row["bytes"]),
            f"{lost:+.4f}",
            f"{low:+.4f} to {high:+.4f}",
            *([f"{row['seen'][0]:+.4f}"] if left_out else []),
            *(f"{row['left_out'][name][0]:+.4f}" for name in left_out),
            f"{row['worst_domain'][0]} {row['worst_domain'][1]:+.4f}",
            f"{row['kl']:.4f}",
            "" if row["against_random"] is None else "{:+.4f} ({:+.4f} to {:+.4f})".format(*row["against_random"]),
            "" if row["better_than_next"] is None else f"{row['better_than_next']:.0%}",
        )
    print_table(table, 170)
    for name, why in group["refused"].items():
        say(f"left out: {name}: {why}")
    if group["order_over_seeds"] is not None:
        say(f"order over {len(result['seeds'])} seeds: Kendall's tau {group['order_over_seeds']:.2f} (1: the same)")


def show_demo(result: dict[str, Any], as_json: bool) -> None:
    def human(d: dict[str, Any]) -> None:
        domains = list(d["models"][0]["bits_per_byte"])
        table = Table(
            "model", "size", *map(shown, domains), "seconds", title="bits per byte on held-out text (lower is better)"
        )
        for m in d["models"]:
            spent = "" if m["seconds"] is None else f"{m['seconds']:.0f}"
            values = (f"{m['bits_per_byte'][domain]:.3f}" for domain in domains)
            add_row(table, m["model"], describe_size(m["bytes"]), *values, spent)
        print_table(table, 150)
        say(d["report"])

    emit(result, as_json, human)


def show_plan(result: Any, as_json: bool) -> None:
    if isinstance(result, dict):
        show_summary(result, as_json)
    else:
        emit(result, as_json, lambda lines: say("\n".join(lines or ["the plans do the same"])))
