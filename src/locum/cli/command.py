"""A command that is generated from the function that does the work; `locum` itself, which groups commands.

Errors that Locum raises become one line and exit code 2, and so do Ctrl-C and whatever the system refuses; nothing
half-written stays behind.
"""

from __future__ import annotations

import contextlib
import inspect
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import click
import torch
from click.core import ParameterSource

from .. import ranks
from ..errors import LocumError, OutputError, did_you_mean, unknown
from ..stages.estimate import Estimate
from .parameters import Choice, flags_of, options_of, parameters_of
from .progress import progress_lines
from .results import show_estimate
from .shown import say
from .system_errors import in_words

SPLIT = ("calibrate", "search", "apply", "compress", "recover", "eval")  # what several ranks do together
RESUMABLE = ("calibrate", "search", "apply", "compress", "recover", "compare")
Show = Callable[[Any, bool], None]  # what a function returned, and whether to print JSON


@contextlib.contextmanager
def one_line(command: str) -> Iterator[None]:
    """Known failures, wrong usage, errors of the system and Ctrl-C become one line on stderr and exit code 2."""
    try:
        yield
        return
    except LocumError as error:
        message = " ".join(str(error).split())
        if isinstance(error, OutputError) and error.unwritten:
            click.echo(error.unwritten)
    except click.UsageError as error:
        path = f"locum {command}".strip() if error.ctx is None else _typed(error.ctx)
        message = f"{' '.join(error.format_message().split()).strip(' .:')}; see: {path} --help"
    except KeyboardInterrupt as interrupt:
        message = f"{_why(interrupt)}; nothing half-written was kept"
        if command in RESUMABLE:
            message += "; the same command again goes on from the last saved state, if there is one"
    except torch.OutOfMemoryError as error:
        message = f"the device has too little memory ({str(error).splitlines()[0]}); lower --batch-size or --length"
    except MemoryError:
        message = "there is too little memory; close other programs, or lower --batch-size or --length"
    except BrokenPipeError:  # who reads the output has seen enough: click ends without a word
        raise
    except OSError as error:
        message = " ".join(in_words(error).split())
    say(f"{f'locum {command}'.strip()}: error: {message}", err=True)
    raise click.exceptions.Exit(2)


def _why(interrupt: KeyboardInterrupt) -> str:
    """torchrun ends ranks by a signal when one of them has died, so a signal to one of several says little."""
    if isinstance(interrupt, ranks.OtherRankEnded) or ranks.count() == 1:
        return str(interrupt) or "interrupted"
    return f"rank {ranks.number()} was interrupted, as another of the {ranks.count()} ranks or the whole run was ended"


def _check_utf8(word: str) -> None:
    """Names may be any bytes on Linux, but not in the JSON and safetensors files that name them."""
    try:
        word.encode("utf-8")
    except UnicodeEncodeError as error:
        shown = word.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        raise click.UsageError(f"{shown} is not text in UTF-8; rename the file or folder") from error


def _typed(ctx: click.Context) -> str:
    """The command as typed, with the choices that bring options: "locum plan --method prune"."""
    return " ".join([ctx.command_path, *(f"--{option} {name}" for option, name in (ctx.obj or {}).items())])


class Command(click.Command):
    """A command that calls `function` and hands the result to `show`, with --json for machines.

    Its options are those of the function's signature, those of the dataclass `options`, and those that come with the
    value of an option that one of `choices` names. That value is looked for before the parameters are built, so options
    of one name may differ between the things to choose from. `line` stands in the list of commands. `earlier` makes of
    arguments as earlier versions had them those of today.
    """

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        show: Show,
        line: str,
        *,
        options: type | None = None,
        choices: Sequence[Choice] = (),
        earlier: Callable[[list[str]], list[str]] = list,
    ) -> None:
        self.splits = name in SPLIT
        params = parameters_of(function)
        params.append(click.Option(["--json", "as_json"], is_flag=True, help="print machine-readable JSON"))
        self.own = {p.name for p in params}
        self.function, self.show, self.choices, self.earlier = function, show, choices, earlier
        params += self._unless_there(options_of(options))
        super().__init__(name, params=params, callback=self.run, help=inspect.getdoc(function), short_help=line)

    def _unless_there(self, options: list[click.Option]) -> list[click.Option]:
        return [option for option in options if option.name not in self.own]

    # --- from a command line to a result ---------------------------------------------------------------------------

    def make_context(self, info_name: str | None, args: list[str], *rest: Any, **extra: Any) -> click.Context:
        with one_line(info_name or ""):
            return super().make_context(info_name, args, *rest, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        with one_line(ctx.info_name or ""):
            return super().invoke(ctx)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        for word in args:
            _check_utf8(word)
        args = self.earlier(args)
        ctx.obj = self._typed_choices(args)
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            raise click.UsageError(self._missing(ctx, error.option_name), ctx) from error

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        chosen = (option for choice in self.choices for option in self.chosen_options(ctx, choice))
        return [*super().get_params(ctx), *chosen]

    def chosen_options(self, ctx: click.Context, choice: Choice) -> list[click.Option]:
        """The options that come with the name given on this command line, or else with the default one."""
        there = {option.name for option in self.params}
        return [option for option in choice.options(self._chosen(ctx, choice)) if option.name not in there]

    def run(self, **given: Any) -> None:
        """Call the function. Defaults of option dataclasses are theirs to fill in, so only what was typed is passed on."""
        ctx = click.get_current_context()
        if ranks.is_spare() and not self.splits:
            return  # the first rank does it
        as_json = given.pop("as_json", False)
        typed = {name for name in given if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE}
        given = {name: value for name, value in given.items() if name in self.own | typed}
        if self.splits:
            ranks.join()
        if "progress" in inspect.signature(self.function).parameters:
            with progress_lines() as report:
                result = self.function(**given, progress=report)
        else:
            result = self.function(**given)
        if ranks.is_first():
            show = show_estimate if isinstance(result, Estimate) else self.show
            show(result, as_json)

    # --- choices ----------------------------------------------------------------------------------------------------

    def _typed_choices(self, args: list[str]) -> dict[str, str]:
        """The options of choices that are among the arguments, with their values, whatever else is there."""
        lenient = {"ignore_unknown_options": True, "allow_extra_args": True}
        probe = click.Command(self.name, params=self.params, context_settings=lenient, add_help_option=False)
        seen = probe.make_context(self.name, list(args), resilient_parsing=True)
        names = (choice.option for choice in self.choices)
        return {n: seen.params[n] for n in names if seen.get_parameter_source(n) is ParameterSource.COMMANDLINE}

    def _chosen(self, ctx: click.Context, choice: Choice) -> str | None:
        option = next(p for p in self.params if p.name == choice.option)
        default = None if option.required else option.get_default(ctx)
        return (ctx.obj or {}).get(choice.option, default)

    def _missing(self, ctx: click.Context, flag: str) -> str:
        for choice in self.choices:
            if choice.names_with(flag):
                return (
                    f"{choice.misplaced(self._chosen(ctx, choice), flag, flags_of(self.params))}{self._prefixed(flag)}"
                )
        return f"unknown option {flag!r}: {did_you_mean(flag, flags_of(self.get_params(ctx)))}"

    def _prefixed(self, flag: str) -> str:
        """The option of that name which a choice with a prefix brings, in words; empty where none does."""
        for choice in (choice for choice in self.choices if choice.prefix):
            meant = f"--{choice.prefix.replace('_', '-')}{flag.removeprefix('--')}"
            if choice.names_with(meant):
                return f"; for what --{choice.option} does it is {meant}"
        return ""

    # --- help -------------------------------------------------------------------------------------------------------

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        own = super().get_params(ctx)
        for title, kind in (("Arguments", click.Argument), ("Options", click.Option)):
            if rows := _records([p for p in own if isinstance(p, kind)], ctx):
                with formatter.section(title):
                    formatter.write_dl(rows)
        for choice in self.choices:
            if choice.option in ctx.obj:
                with formatter.section(f"Options of {ctx.obj[choice.option]}"):
                    rows = _records(self.chosen_options(ctx, choice), ctx)
                    formatter.write_dl(rows or [("none", "")])
            else:
                formatter.write_paragraph()
                hint, indent = choice.hint(ctx.command_path), " " * formatter.current_indent
                whole = {"break_on_hyphens": False, "break_long_words": False}  # names are
                lines = textwrap.fill(hint, formatter.width, initial_indent=indent, subsequent_indent=indent, **whole)
                formatter.write(f"{lines}\n")


def _records(parameters: list[click.Parameter], ctx: click.Context) -> list[tuple[str, str]]:
    return [record for p in parameters if (record := p.get_help_record(ctx)) is not None]


class Commands(click.Group):
    """`locum` itself: commands in the order of the work, in sections, each with one whole line."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.sections: dict[str, list[str]] = {}

    def add_section(self, title: str, *commands: Command) -> None:
        self.sections[title] = [command.name for command in commands]
        for command in commands:
            self.add_command(command)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        with one_line(""):
            if args[0] not in self.commands:
                raise click.UsageError(unknown("command", args[0], self.commands))
            return super().resolve_command(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for names in self.sections.values() for name in names]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = max(map(len, self.commands))
        for title, names in self.sections.items():
            with formatter.section(title):
                formatter.write_dl([(name.ljust(width), self.commands[name].short_help) for name in names])
