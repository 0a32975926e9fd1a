"""Arguments of public functions in their natural forms: one thing for a list of one, a number or a list where text is declared.

The command line turns text into the types of a signature; here the same is done for what Python hands over. What has no such
form is refused in one line, before any work, in the words of options.py.
"""

from __future__ import annotations

import functools
import inspect
import os
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch

from .errors import OptionError
from .options import KINDS

WORDS = {**KINDS, Path: "a path", Sequence: "a list", types.NoneType: "None"}
NONE = object()  # a value that has no form of a kind
Function = TypeVar("Function", bound=Callable[..., Any])


def in_declared_forms(function: Function) -> Function:
    """A function whose arguments come in the forms that its annotations declare. Raises OptionError for one that cannot.

    What stands for an option of its own (`**options`), a callable, or an annotation of no class is handed on as it is.
    """
    signature = inspect.signature(function)

    @functools.cache
    def hints() -> dict[str, Any]:
        return typing.get_type_hints(function)

    @functools.wraps(function)
    def run(*given: Any, **options: Any) -> Any:
        bound = signature.bind(*given, **options)
        for name, value in bound.arguments.items():
            parameter = signature.parameters[name]
            if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                said = ("--" if parameter.kind is parameter.KEYWORD_ONLY else "") + name.replace("_", "-")
                bound.arguments[name] = declared(value, hints().get(name, Any), said)
        return function(*bound.args, **bound.kwargs)

    return run  # type: ignore[return-value]


def declared(value: Any, hint: Any, said: str) -> Any:
    """A value in the form that a type hint declares, the first of several that fits. Raises OptionError, which names it `said`."""
    kinds = _kinds_of(hint)
    if any(kind in (Any, Callable) or isinstance(kind, TypeVar) for kind in map(_origin_of, kinds)):
        return value
    for kind in kinds:
        if (found := _form(value, kind)) is not NONE:
            return found
    takes = list(dict.fromkeys(_words(kind) for kind in kinds if kind is not types.NoneType))
    shown = value if isinstance(value, (str, int, float, list, tuple, types.NoneType)) else f"a {type(value).__name__}"
    shown = shown if shown is not value else repr(value)
    raise OptionError(f"{said} is {shown if len(shown) <= 80 else shown[:77] + '...'}; it takes {' or '.join(takes)}")


def _form(value: Any, kind: Any) -> Any:
    """The value as one of a kind, NONE where it has no such form."""
    origin = _origin_of(kind)
    if origin is Mapping:
        return value if isinstance(value, Mapping) else NONE
    if origin is Sequence:
        several = isinstance(value, Iterable) and not isinstance(value, (str, bytes, os.PathLike, Mapping))
        items = [_first_form(item, typing.get_args(kind)[0]) for item in (value if several else [value])]
        return NONE if any(item is NONE for item in items) else tuple(items)
    if isinstance(value, bool) or kind is bool:
        return value if type(value) is kind else NONE
    if kind is int and isinstance(value, Integral):
        return int(value)  # NumPy's too
    if kind is float and isinstance(value, Real):
        return float(value)
    if kind is Path and isinstance(value, (str, os.PathLike)):
        return Path(value)
    if kind is str:
        return _text(value)
    return value if isinstance(value, origin) else NONE


def _text(value: Any) -> Any:
    """Text as it is, a number in digits, a device by its name, a list of these with commas between, as the command line takes it."""
    if isinstance(value, (str, torch.device)):
        return str(value)
    if isinstance(value, Real) and not isinstance(value, bool):
        return str(int(value) if isinstance(value, Integral) else float(value))
    if isinstance(value, (list, tuple)):
        words = [_text(item) for item in value]
        return NONE if any(word is NONE for word in words) else ",".join(words)
    return NONE


def _first_form(value: Any, hint: Any) -> Any:
    return next((found for kind in _kinds_of(hint) if (found := _form(value, kind)) is not NONE), NONE)


def _kinds_of(hint: Any) -> tuple[Any, ...]:
    if typing.get_origin(hint) is Annotated:
        hint = typing.get_args(hint)[0]
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _origin_of(kind: Any) -> Any:
    return typing.get_origin(kind) or kind


def _words(kind: Any) -> str:
    origin = _origin_of(kind)
    if origin is Sequence:
        return " or ".join(f"{_words(each)} or several" for each in _kinds_of(typing.get_args(kind)[0]))
    return WORDS.get(origin, f"a {origin.__name__}")
