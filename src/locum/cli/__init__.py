"""The command line: every command is generated from the signature of the function that does the work.

An option is declared once, there; here is only which commands there are, in the order of the work, and how a result is
shown. An option whose value brings options of its own, such as --method NAME, is named by a `Choice`.
"""

from __future__ import annotations

import inspect as introspection
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import click
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from .. import ranks
from ..demonstration import demo
from ..exports.export import export
from ..exports.target import TARGETS
from ..methods import METHODS, PredictingMethod, SearchingMethod
from ..registries import catalogue, show
from ..speed.bench import bench
from ..stages.application import apply
from ..stages.calibration import calibrate
from ..stages.cleaning import clean
from ..stages.comparison import compare
from ..stages.compression import PREFIX, compress
from ..stages.evaluation import evaluate
from ..stages.frontier import frontier
from ..stages.inspection import inspect
from ..stages.options import Help
from ..stages.planning import diff as diff_plans
from ..stages.planning import plan, plan_summary, shape_behind
from ..stages.recovery import recover
from ..stages.reporting import report
from ..stages.searching import search
from ..training.options import Recovery
from ..training.ways import WAYS
from ..verification.verify import verify
from . import listing, results
from .command import Command, Commands
from .parameters import Choice
from .shown import say
from .stopping import stop_politely


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="locum")
def cli() -> None:
    """Make Mixture-of-Experts models fit: measure, replace experts by lightweight stand-ins, recover, report."""
    disable_progress_bar()  # transformers' own bars and remarks; ours say more
    set_verbosity_error()


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


def _results_by_json(args: list[str]) -> list[str]:
    """`eval --json FILE` named the results file once; `--json` alone prints, as everywhere."""
    made: list[str] = []
    for word in args:
        named = word.removeprefix("--json=")
        if named.endswith((".json", ".jsonl")) and (named != word or made[-1:] == ["--json"]):
            made = made[:-1] if named == word else made
            made += ["--append", "--out", named]
            say("locum eval: --json FILE is --out FILE --append now, and --json alone prints the rows", err=True)
        else:
            made.append(word)
    return made


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


METHOD = Choice("method", METHODS)
RECOVERING = Choice("recover", WAYS, shared=Recovery, prefix=PREFIX)
PREDICTING = Choice("method", METHODS, offers=lambda cls: isinstance(cls(), PredictingMethod))
SEARCHING = Choice("method", METHODS, offers=lambda cls: isinstance(cls(), SearchingMethod))

cli.add_section(
    "Look",
    Command("inspect", inspect, results.show_inspect, "what a checkpoint holds, what it would save, what to type next"),
    Command("calibrate", calibrate, results.show_statistics, "count what routers and experts do on your text"),
    Command("search", search, results.show_statistics, "calibrate, and let a method try removals", choices=[SEARCHING]),
    Command("list", catalogue, listing.show_catalogue, "every method, criterion, statistic and way of training"),
    Command("show", show, listing.show_descriptions, "formula, needs, cost, paper and options of one of them"),
    Command("demo", demo, results.show_demo, "all of it on a bundled model, with a report"),
)
cli.add_section(
    "Decide",
    Command(
        "plan",
        _like(plan, _plan_or_diff),
        results.show_plan,
        "what becomes of every expert, and the size after, to the byte",
        choices=[METHOD],
    ),
    Command(
        "frontier",
        frontier,
        results.show_frontier,
        "what every size is predicted to cost, from one search",
        choices=[PREDICTING],
    ),
)
cli.add_section(
    "Make",
    Command("apply", apply, results.show_path, "carry out a plan: write the smaller checkpoint"),
    Command("compress", compress, results.show_path, "calibrate, plan and apply in one", choices=[METHOD, RECOVERING]),
)
cli.add_section(
    "Recover",
    Command(
        "recover",
        recover,
        results.show_recovery,
        "train a smaller checkpoint back to strength",
        options=Recovery,
        choices=[Choice("how", WAYS)],
    ),
)
cli.add_section(
    "Judge",
    Command(
        "eval",
        evaluate,
        results.show_rows,
        "what was lost, beside the original, with intervals",
        earlier=_results_by_json,
    ),
    Command(
        "compare",
        compare,
        results.show_comparison,
        "methods side by side, at equal bytes and on the same text",
        choices=[RECOVERING],
    ),
    Command("verify", verify, results.show_checks, "whether a checkpoint keeps its promise, in every engine here"),
    Command("bench", bench, results.show_bench, "speed and memory, beside the original"),
    Command("report", report, results.show_path, "one page from results and statistics, with pictures"),
)
cli.add_section(
    "Hand on",
    Command(
        "export",
        export,
        results.show_export,
        "write it for llama.cpp, vLLM alone, or any stock engine",
        choices=[Choice("to", TARGETS)],
    ),
    Command("clean", clean, results.show_leftovers, "what interrupted runs left beside outputs, and away with it"),
)


def main() -> None:
    """Entry point of the console script."""
    stop_politely()
    try:
        sys.exit(cli(prog_name="locum"))
    finally:
        ranks.leave()
