"""Arguments and options of the command line, from where they are declared: signatures and dataclasses of options."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import click
from click.core import ParameterSource

from ..errors import did_you_mean
from ..options import option_fields
from ..registry import Registry

HIDDEN = ("progress", "options", "json")  # parameters that are not for the command line
LONGEST = 60  # characters of a list of choices beside an option; its line of help has them too


class Argument(click.Argument):
    """An argument with a line of help, which click has from 8.5 on only; empty where its name says all."""

    def __init__(self, *given: Any, about: str, **named: Any) -> None:
        super().__init__(*given, **named)
        self.about = about

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        return (self.human_readable_name, self.about) if self.about else None


def parameters_of(function: Callable[..., Any]) -> list[click.Parameter]:
    """Arguments and options of a function, from its signature and the Help in its annotations."""
    hints = typing.get_type_hints(function, include_extras=True)
    parameters: list[click.Parameter] = []
    for name, parameter in inspect.signature(function).parameters.items():
        if name in HIDDEN:
            continue
        annotation, help_text = hints[name], ""
        if typing.get_origin(annotation) is Annotated:
            annotation, marker = typing.get_args(annotation)[:2]
            help_text = marker.line
        kind, several = _type_of(annotation)
        if kind is bool and parameter.default is False:  # a switch of the command
            parameters.append(click.Option(["--" + name.replace("_", "-")], is_flag=True, help=help_text))
            continue
        required = parameter.default is parameter.empty
        if parameter.kind is not parameter.KEYWORD_ONLY:
            nargs = -1 if several else 1
            parameters.append(Argument([name], type=kind, nargs=nargs, required=required, about=help_text))
            continue
        given = {"required": True} if required else {"default": parameter.default}
        parameters.append(_option(name, kind, help_text, multiple=several, **given))
    return parameters


def options_of(options: type | None, prefix: str = "") -> list[click.Option]:
    """One option for every option field of a dataclass, its name after the prefix; none for None."""
    if options is None:
        return []
    return [_field_option(field, prefix) for field in option_fields(options)]


def flags_of(options: Sequence[click.Parameter]) -> list[str]:
    """Every flag of these options, `--no-x` too."""
    return [flag for option in options for flag in (*option.opts, *option.secondary_opts) if flag.startswith("-")]


def typed_again(ctx: click.Context, without: Sequence[str]) -> list[str]:
    """The arguments and options that were typed, but for these, as words of another command line."""
    words: list[str] = []
    for parameter in ctx.command.get_params(ctx):
        if parameter.name in without or ctx.get_parameter_source(parameter.name) is not ParameterSource.COMMANDLINE:
            continue
        value = ctx.params[parameter.name]
        for each in value if isinstance(value, tuple) else (value,):
            if isinstance(parameter, click.Argument):
                words.append(str(each))
            elif isinstance(each, bool):
                words.append((parameter.opts if each else parameter.secondary_opts)[0])
            else:
                words += [parameter.opts[0], str(each)]
    return words


def _field_option(field: Any, prefix: str) -> click.Option:
    choices = f"[{'|'.join(field.metadata.get('choices', ()))}]"
    shown = {} if choices == "[]" else {"metavar": choices if len(choices) <= LONGEST else "NAME"}
    return _option(prefix + field.name, field.metadata["kind"], field.metadata["help"], default=field.default, **shown)


def _option(name: str, kind: Any, help_text: str, **given: Any) -> click.Option:
    flag, default = "--" + name.replace("_", "-"), given.get("default")
    if kind is bool:
        return click.Option([f"{flag}/--no-{flag[2:]}"], show_default=True, help=help_text, **given)
    return click.Option([flag, name], type=kind, help=help_text, show_default=default not in (None, "", ()), **given)


def _type_of(annotation: Any) -> tuple[Any, bool]:
    """The click type of an annotation, and whether the option may be given several times."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        annotation = next(a for a in typing.get_args(annotation) if a is not type(None))
    if typing.get_origin(annotation) is Sequence:
        return _type_of(typing.get_args(annotation)[0])[0], True
    if annotation is Path:
        return click.Path(path_type=Path), False
    return annotation, False


@dataclass(frozen=True)
class Choice:
    """An option of a command that names a registered thing, such as --method NAME, which brings options of its own.

    A command with two of them gives the options of one a prefix. `shared` are options that come with every name.
    """

    option: str  # the parameter's name
    registry: Registry[Any]  # of dataclasses of options
    shared: type | None = None
    prefix: str = ""
    offers: Callable[[Any], bool] = lambda thing: True  # those that the command can use

    def options(self, name: str | None) -> list[click.Option]:
        """The options that come with a name. Raises OptionError for an unknown one."""
        if name is None:
            return []
        return [*options_of(self.shared, self.prefix), *options_of(self.registry[name], self.prefix)]

    def names_with(self, flag: str) -> list[str]:
        """The names that an option comes with."""
        return [name for name in self.registry if flag in flags_of(self.options(name))]

    def hint(self, command_path: str) -> str:
        """How to see the options that come with a name, and the names."""
        names = ", ".join(name for name, thing in self.registry.items() if self.offers(thing))
        see = f"{command_path} --{self.option} NAME --help"
        return f"Every {self.registry.kind} has options of its own: {see}. NAME is one of: {names}."

    def misplaced(self, name: str | None, flag: str, taken: Sequence[str]) -> str:
        """A message for an option that the thing of this name lacks and another has; `taken` are the command's own."""
        kind, have_it = self.registry.kind, " or ".join(self.names_with(flag))
        if name is None:
            return f"option {flag!r} comes with --{self.option} {have_it}"
        theirs = sorted(each for each in flags_of(self.options(name)) if each not in taken)
        here = f"{kind} {name} has no option {flag!r}: {did_you_mean(flag, theirs)}"
        return f"{here}allowed: {', '.join(theirs) or 'none'}; {kind} {have_it} has it"
