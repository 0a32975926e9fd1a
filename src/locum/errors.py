"""Every error that Locum raises on purpose.

    LocumError                      anything below; the command line prints it as one line and exits with 2
      OptionError (ValueError)      an option or argument is wrong
      DataError (ValueError)        text or token data is missing, unreadable, empty or too short
      UnsupportedModel              no rule fits this model, or the operation is not safe on it
      CheckpointError               files of a checkpoint are missing, damaged or inconsistent
      StatisticsError               statistics lack what is needed or belong to something else
      PlanError (ValueError)        a plan does not fit the model, or cannot be made
      OutputError                   an output cannot be written where it was asked for
      EngineError                   another engine, in its own process, failed or refused a checkpoint

A message says what is wrong with which value, where, what is allowed and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LocumError(Exception):
    """The root of Locum's own errors."""


class OptionError(LocumError, ValueError):
    """An option or argument is wrong."""


class DataError(LocumError, ValueError):
    """Text or token data is missing, unreadable, empty or too short."""


class UnsupportedModel(LocumError):
    """No rule fits this model, or the operation is not safe on it."""


class CheckpointError(LocumError):
    """Files of a checkpoint are missing, damaged or inconsistent."""


class StatisticsError(LocumError):
    """Statistics lack what is needed or belong to another model or tokenizer."""


class PlanError(LocumError, ValueError):
    """A plan does not fit the model, or cannot be made."""


class OutputError(LocumError):
    """An output cannot be written where it was asked for. `unwritten` is its text, where nothing else is left of it."""

    def __init__(self, message: str, unwritten: str = "") -> None:
        super().__init__(message)
        self.unwritten = unwritten


class EngineError(LocumError):
    """Another engine, in its own process, failed or refused a checkpoint."""


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """A question with the names that are nearest to a wrong one, with a space after it; empty where none is near."""
    bare = {each.removeprefix("--"): each for each in sorted(allowed)}  # dashes are alike in all flags
    close = difflib.get_close_matches(name.removeprefix("--"), bare, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(repr(bare[c]) for c in close)}? " if close else ""


def unknown(what: str, name: str, allowed: Iterable[str]) -> str:
    """A message for an unknown name: close matches first, then everything that is allowed."""
    allowed = sorted(allowed)
    return f"unknown {what} {name!r}: {did_you_mean(name, allowed)}allowed: {', '.join(allowed)}"
