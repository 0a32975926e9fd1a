"""Options, option_fields once: a dataclass field carries its help and its allowed values; the command line is made from it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable
from typing import Any

from .errors import OptionError, did_you_mean, unknown

LARGEST = 2**31 - 1  # of a whole number with no other limit: nothing below Locum fails at it
KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def option(
    default: Any,
    help: str,
    *,
    choices: Iterable[str] = (),
    at_least: float = -math.inf,
    at_most: float | None = None,
    above: float = -math.inf,
    kind: type | None = None,
) -> Any:
    """A dataclass field that is an option: its default, one line of help, and what is allowed.

    Whole numbers are at most LARGEST where nothing else is said. Its type is that of its default; `kind` says it where the default is None, for an option that need not have a value.
    """
    kind = kind or type(default)
    if at_most is None:
        at_most = LARGEST if kind is int else math.inf
    allowed = {
        "kind": kind,
        "help": help,
        "choices": tuple(choices),
        "at_least": at_least,
        "at_most": at_most,
        "above": above,
    }
    return dataclasses.field(default=default, metadata=allowed)


def option_fields(thing: Any) -> list[dataclasses.Field[Any]]:
    """The fields of a dataclass that are options, in order; none for what is no dataclass."""
    fields = dataclasses.fields(thing) if dataclasses.is_dataclass(thing) else ()
    return [item for item in fields if "help" in item.metadata]


def check_options(options: Any, prefix: str = "") -> None:
    """Check every option of a dataclass against what it allows: first its type, that of its default. Raises
    OptionError, which names flags with the prefix."""
    for item in option_fields(options):
        value, allowed, name = getattr(options, item.name), item.metadata, (prefix + item.name).replace("_", "-")
        kind = allowed["kind"]
        if value is None and item.default is None:
            continue
        if kind in KINDS and not (type(value) is kind or (kind is float and type(value) is int)):
            raise OptionError(f"--{name} is {value!r}; it takes {KINDS[kind]}")
        if allowed.get("choices") and value not in allowed["choices"]:
            raise OptionError(unknown(f"value for --{name}", str(value), allowed["choices"]))
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        low, high, above = (
            allowed.get(key, d) for key, d in (("at_least", -math.inf), ("at_most", math.inf), ("above", -math.inf))
        )
        if not (low <= value <= high and value > above):
            bounds = [f"more than {above:g}"] if above > -math.inf else [f"at least {low:g}"] if low > -math.inf else []
            bounds += [f"at most {high:.10g}"] if high < math.inf else []
            raise OptionError(f"--{name} is {value:.10g}; allowed: {' and '.join(bounds) or 'finite numbers'}")


def check_names(
    given: Iterable[str], allowed: Collection[str], owner: str, prefix: str = "", beside: Iterable[str] = ()
) -> None:
    """Refuse names that are not allowed. Raises OptionError: close names first, then all. What is meant may be a name `beside`."""
    for name in given:
        if name not in allowed:
            flag, *flags = ("--" + (prefix + a).replace("_", "-") for a in (name, *allowed))
            others = ["--" + a.replace("_", "-") for a in beside]
            close, all_of_them = did_you_mean(flag, {*flags, *others}), ", ".join(sorted(flags)) or "none"
            raise OptionError(f"{owner} has no option {flag!r}: {close}allowed: {all_of_them}")


def make_options(cls: type, given: dict[str, Any], beside: Iterable[str] = ()) -> Any:
    """An options dataclass from names and values; an unknown name is an OptionError with what is allowed. Names `beside` are those
    of who asks."""
    owner = f"method {cls.name}" if hasattr(cls, "name") else cls.__name__.lower()
    check_names(given, [item.name for item in option_fields(cls)], owner, beside=beside)
    options = cls(**given)
    check_options(options)
    return options
