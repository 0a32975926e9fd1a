"""The command line: every command is generated from the signature of the function that does the work.

An option is declared once, there; here is only how it is shown. Errors that Locum raises become one line and exit
code 2, and so does Ctrl-C; nothing half-written stays behind.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import inspect as introspection
import json
import sys
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from .checkpoints.card import describe_size
from .demonstration import demo
from .errors import LocumError, unknown
from .exports.export import export, larger
from .exports.target import TARGETS
from .methods import METHODS
from .options import option_fields
from .speed import page
from .speed.bench import bench
from .stages.application import apply
from .stages.calibration import calibrate
from .stages.compression import PREFIX, compress
from .stages.evaluation import evaluate
from .stages.inspection import catalogue, inspect
from .stages.options import Help
from .stages.planning import diff as diff_plans
from .stages.planning import plan, plan_summary, shape_behind
from .stages.recovery import recover
from .stages.reporting import report
from .stages.searching import search
from .training.options import Recovery
from .training.ways import WAYS
from .verification.folder import FAILED, Check
from .verification.verify import verify

console = Console(stderr=True)
HIDDEN = ("progress", "options")  # parameters that are not for the command line
RESUMABLE = ("calibrate", "search", "compress", "recover")


@contextlib.contextmanager
def _one_line(command: str) -> Iterator[None]:
    """Known failures, wrong usage and Ctrl-C become one line on stderr and exit code 2."""
    try:
        yield
        return
    except LocumError as error:
        message = " ".join(str(error).split())
    except click.UsageError as error:
        message = f"{error.format_message().rstrip('.')}; see: locum {command} --help".replace("  ", " ")
    except KeyboardInterrupt:
        message = "interrupted; nothing half-written was kept"
        if command in RESUMABLE:
            message += "; the same command again goes on from the last saved state, if there is one"
    except torch.OutOfMemoryError as error:
        message = f"the device has too little memory ({str(error).splitlines()[0]}); lower --batch-size or --length"
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        message = f"no space left on the disk of {error.filename or 'the output'}; free some and run it again"
    click.echo(f"{f'locum {command}'.strip()}: error: {message}", err=True)
    raise click.exceptions.Exit(2)


class Command(click.Command):
    """A command whose known failures are one clear line and exit code 2."""

    def make_context(self, info_name: str | None, args: list[str], *rest: Any, **extra: Any) -> click.Context:
        with _one_line(info_name or ""):
            return super().make_context(info_name, args, *rest, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        with _one_line(ctx.info_name or ""):
            return super().invoke(ctx)


class Commands(click.Group):
    """The same for `locum` itself."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        with _one_line(""):
            if args[0] not in self.commands:
                raise click.UsageError(unknown("command", args[0], self.commands))
            return super().resolve_command(ctx, args)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="locum")
def cli() -> None:
    """Make Mixture-of-Experts models fit: measure, replace experts by lightweight stand-ins, recover, report."""
    disable_progress_bar()  # transformers' own bars and remarks; ours say more
    set_verbosity_error()


def _type_of(annotation: Any) -> tuple[Any, bool]:
    """The click type of an annotation, and whether the option may be given several times."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        annotation = next(a for a in typing.get_args(annotation) if a is not type(None))
    if typing.get_origin(annotation) is Sequence:
        return _type_of(typing.get_args(annotation)[0])[0], True
    if annotation is Path:
        return click.Path(path_type=Path), False
    return annotation, False


def _parameters(function: Callable[..., Any]) -> list[click.Parameter]:
    """Arguments and options of a function, from its signature and the Help in its annotations."""
    hints = typing.get_type_hints(function, include_extras=True)
    parameters: list[click.Parameter] = []
    for name, parameter in introspection.signature(function).parameters.items():
        if name in HIDDEN:
            continue
        annotation, help_text = hints[name], ""
        if typing.get_origin(annotation) is Annotated:
            annotation, marker = typing.get_args(annotation)[:2]
            help_text = marker.line
        kind, several = _type_of(annotation)
        if parameter.kind is not parameter.KEYWORD_ONLY:
            parameters.append(click.Argument([name], type=kind, nargs=-1 if several else 1, required=True))
            continue
        missing = parameter.default is parameter.empty
        parameters.append(_option(name, kind, None if missing else parameter.default, help_text, missing, several))
    return parameters


def _option(
    name: str, kind: Any, default: Any, help_text: str, required: bool = False, several: bool = False
) -> click.Option:
    flag = "--" + name.replace("_", "-")
    if kind is bool:
        both = f"{flag}/--no-{name.replace('_', '-')}" if default is not False else flag
        return click.Option([both], is_flag=True, default=default, help=help_text)
    given = {"required": True} if required else {"default": default, "show_default": default not in (None, "", ())}
    return click.Option([flag, name], type=kind, help=help_text, multiple=several, **given)


def _field_options(classes: dict[str, type], prefix: str = "") -> list[click.Parameter]:
    """Options for the fields of option dataclasses. One field name shared by several of them is one option."""
    found: dict[str, tuple[Any, str, list[str]]] = {}
    for label, cls in classes.items():
        hints = typing.get_type_hints(cls)
        for item in option_fields(cls):
            _, _, defaults = found.setdefault(item.name, (hints[item.name], item.metadata["help"], []))
            defaults.append(f"{label}: {item.default}" if label else str(item.default))
    return [
        _option(prefix + name, kind, None, f"{help_text}  [{', '.join(defaults)}]")
        for name, (kind, help_text, defaults) in found.items()
    ]


def _command(
    name: str, function: Callable[..., Any], show: Callable[..., None], field_options: Sequence[click.Parameter] = ()
) -> None:
    """Register a command that calls `function` and hands the result to `show`, with --json for machines."""
    accepts_progress = "progress" in introspection.signature(function).parameters
    field_names = {option.name for option in field_options}

    def run(**given: Any) -> None:
        as_json = given.pop("as_json", False)
        given = {key: value for key, value in given.items() if key not in field_names or value is not None}
        if accepts_progress:
            with _progress() as report:
                result = function(**given, progress=report)
        else:
            result = function(**given)
        show(result, as_json)

    params = _parameters(function)
    if not any(p.name == "json" for p in params):
        params.append(click.Option(["--json", "as_json"], is_flag=True, help="print machine-readable JSON"))
    own = {p.name for p in params}
    params += [p for p in field_options if p.name not in own]
    summary = introspection.getdoc(function)
    cli.add_command(Command(name, callback=run, params=params, help=summary))


class _progress:
    """A live progress line per stage on a terminal; silent elsewhere."""

    def __enter__(self) -> Callable[[str, int, int], None]:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self.bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self.tasks: dict[str, Any] = {}
        self.bar.start()
        return self.report

    def report(self, stage: str, done: int, total: int) -> None:
        head = stage.split(":")[0]
        if head not in self.tasks:
            self.tasks[head] = self.bar.add_task(stage, total=total)
        self.bar.update(self.tasks[head], completed=done, total=total, description=stage)

    def __exit__(self, *exception: Any) -> None:
        self.bar.stop()


def _print(data: Any, as_json: bool, human: Callable[[Any], None]) -> None:
    if as_json:
        click.echo(json.dumps(data, indent=1, default=str))
    else:
        human(data)


def _show_inspect(result: dict[str, Any], as_json: bool) -> None:
    _print(result, as_json, _inspect_table)


def _inspect_table(result: dict[str, Any]) -> None:
    share = result["expert_parameters"] / result["parameters"]
    click.echo(
        f"{result['model_type']}{' (compressed by Locum)' if result['compressed'] else ''}: "
        f"{result['parameters']:,} parameters, {describe_size(result['bytes'])}; "
        f"routed experts {result['expert_parameters']:,} ({share:.1%})"
    )
    click.echo(
        f"active for a token, at most: {result['active_parameters']:,} parameters, {describe_size(result['active_bytes'])}"
    )
    table = Table("layers", "experts", "top-k", "width", "router", "groups", "shared", box=None)
    for alike, first in _alike(result["layers"]):
        kind = first["router_kind"] + (", gates sum to one" if first["renormalised"] else "")
        sizes = f"{first['hidden_size']} x {first['expert_width']}"
        counts = (first[key] for key in ("num_groups", "shared_experts"))
        top_k = str(first["top_k"]) + (f" ({first['routing']})" if first["routing"] else "")
        table.add_row(alike, str(first["num_experts"]), top_k, sizes, kind, *map(str, counts))
    Console(width=120).print(table)
    for note in result["notes"]:
        click.echo(f"note: {note}")


def _alike(layers: list[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """Runs of layers that differ in name alone, as "first" or "first ... last (n)", with the first of each."""
    runs: list[list[dict[str, Any]]] = []
    for layer in layers:
        same = runs and all(layer[k] == runs[-1][0][k] for k in layer if k not in ("name", "router"))
        runs[-1].append(layer) if same else runs.append([layer])
    names = [r[0]["name"] if len(r) == 1 else f"{r[0]['name']} ... {r[-1]['name']} ({len(r)})" for r in runs]
    return [(name, run[0]) for name, run in zip(names, runs, strict=True)]


def _show_statistics(result: Any, as_json: bool) -> None:
    data = {"tokens": result.tokens, "domains": list(result.domains), "layers": len(result.layers)}
    _print(
        data,
        as_json,
        lambda d: click.echo(f"{d['tokens']:,} tokens of {', '.join(d['domains'])} in {d['layers']} layers"),
    )


def _show_path(result: Any, as_json: bool) -> None:
    _print({"out": str(result)}, as_json, lambda d: click.echo(d["out"]))


def _show_summary(result: dict[str, Any], as_json: bool) -> None:
    def human(d: dict[str, Any]) -> None:
        for key in ("parameters", "expert_parameters", "active_parameters", "bytes"):
            before, after = d[key]
            click.echo(f"{key.replace('_', ' '):>18}: {before:>16,} -> {after:>16,}  ({after / before - 1:+.1%})")
        click.echo(
            f"{'removed':>18}: {d['removed']:.2%} of the routed experts' parameters; stock layout: {d['stock_layout']}"
        )
        click.echo(f"{'replaced per layer':>18}: {d['replaced_per_layer']}")

    _print(result, as_json, human)


def _show_catalogue(result: dict[str, Any], as_json: bool) -> None:
    def human(d: dict[str, Any]) -> None:
        for name, item in d["methods"].items():
            click.echo(f"method {name}: {item['summary']} ({item['paper']})")
            for option, about in item["options"].items():
                click.echo(f"    --{option.replace('_', '-')} [{about['default']}]  {about['help']}")
        for name, item in d["ways"].items():
            click.echo(f"way to recover {name}: {item['summary']} ({item['source']})")
            for option, about in item["options"].items():
                click.echo(f"    --{option.replace('_', '-')} [{about['default']}]  {about['help']}")
        for name, item in d["criteria"].items():
            click.echo(f"criterion {name} ({item['paper']})")
        click.echo(f"statistics: {', '.join(d['statistics'])}")

    _print(result, as_json, human)


def _show_recovery(result: dict[str, Any], as_json: bool) -> None:
    _print(result, as_json, lambda d: [click.echo(f"{key}: {value}") for key, value in d.items()])


def _show_rows(rows: list[Any], as_json: bool) -> None:
    def human(_: Any) -> None:
        table = Table("model", "domain", "metric", "value", "95% interval", "n", box=None)
        for row in rows:
            table.add_row(
                row.model,
                row.domain,
                row.metric,
                f"{row.value:.4f}",
                "" if row.low is None else f"{row.low:.4f} to {row.high:.4f}",
                f"{row.n:,}",
            )
        Console().print(table)

    _print([dataclasses.asdict(row) for row in rows], as_json, human)


def _show_checks(checks: list[Check], as_json: bool) -> None:
    def human(_: Any) -> None:
        table = Table("check", "engine", "result", "detail", box=None)
        for check in checks:
            table.add_row(*dataclasses.astuple(check))
        Console(width=max(120, Console().width)).print(table, markup=False)

    _print([dataclasses.asdict(check) for check in checks], as_json, human)
    if any(check.result == FAILED for check in checks):
        raise click.exceptions.Exit(1)


def _show_bench(result: dict[str, Any], as_json: bool) -> None:
    def human(d: dict[str, Any]) -> None:
        table = Table(*page.HEADS, box=None)
        for row in d["rows"]:
            table.add_row(*page.cells(row))
        Console(width=max(170, Console().width)).print(table)
        for name, model in d["models"].items():
            click.echo(page.memory_line(name, model))
        for x in d["not_run"]:
            click.echo(f"not run: {x['model']}, {x['implementation']}, {x['batch']} prompts: {x['why']}")

    _print(result, as_json, human)


def _show_export(result: dict[str, Any], as_json: bool) -> None:
    _print(result, as_json, lambda d: click.echo(larger(d)))


def _show_demo(result: dict[str, Any], as_json: bool) -> None:
    def human(d: dict[str, Any]) -> None:
        domains = list(d["models"][0]["bits_per_byte"])
        table = Table("model", "size", *domains, "seconds", title="bits per byte on held-out text (lower is better)")
        for m in d["models"]:
            spent = "" if m["seconds"] is None else f"{m['seconds']:.0f}"
            values = (f"{m['bits_per_byte'][domain]:.3f}" for domain in domains)
            table.add_row(m["model"], describe_size(m["bytes"]), *values, spent)
        Console(width=150).print(table)
        click.echo(d["report"])

    _print(result, as_json, human)


def _plan_or_diff(
    statistics: Sequence[Path],
    *,
    diff: Annotated[bool, Help("compare two plan files instead: locum plan --diff A B")] = False,
    **given: Any,
) -> Any:
    if diff:
        if len(statistics) != 2:
            raise click.UsageError("--diff takes exactly two plan files")
        return diff_plans(*statistics)
    decided = plan(statistics, **given)
    return plan_summary(decided, shape_behind(statistics[0]))


def _register() -> None:
    methods = _field_options(dict(METHODS.items()))
    ways = {"": Recovery, **dict(WAYS.items())}
    _command("inspect", inspect, _show_inspect)
    _command("calibrate", calibrate, _show_statistics)
    _command("plan", _like(plan, _plan_or_diff), _show_plan, methods)
    _command("apply", apply, _show_path)
    searching = {name: cls for name, cls in METHODS.items() if hasattr(cls, "explore")}
    _command("search", search, _show_statistics, _field_options(searching))
    _command("compress", compress, _show_path, [*methods, *_field_options(ways, PREFIX)])
    _command("recover", recover, _show_recovery, _field_options(ways))
    _command("eval", evaluate, _show_rows)
    _command("report", report, _show_path)
    _command("bench", bench, _show_bench)
    _command("verify", verify, _show_checks)
    _command("export", export, _show_export, _field_options(dict(TARGETS.items())))
    _command("list", catalogue, _show_catalogue)
    _command("demo", demo, _show_demo)


def _like(function: Callable[..., Any], wrapper: Callable[..., Any]) -> Callable[..., Any]:
    """`wrapper` with the signature of `function` plus its own keyword options, so that commands are generated alike."""
    own = introspection.signature(wrapper).parameters
    theirs = introspection.signature(function).parameters
    merged = [p for p in theirs.values() if p.kind is not p.VAR_KEYWORD]
    merged += [p for p in own.values() if p.name not in theirs and p.kind is p.KEYWORD_ONLY]

    def call(**given: Any) -> Any:
        return wrapper(**given)

    call.__signature__ = introspection.Signature(merged)  # type: ignore[attr-defined]
    call.__annotations__ = {
        **typing.get_type_hints(function, include_extras=True),
        **typing.get_type_hints(wrapper, include_extras=True),
    }
    call.__doc__ = function.__doc__
    return call


def _show_plan(result: Any, as_json: bool) -> None:
    if isinstance(result, dict):
        _show_summary(result, as_json)
    else:
        _print(result, as_json, lambda lines: [click.echo(line) for line in lines or ["the plans do the same"]])


_register()


def main() -> None:
    """Entry point of the console script."""
    sys.exit(cli(prog_name="locum"))
