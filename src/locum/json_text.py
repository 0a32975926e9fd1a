"""JSON text as data: everything that Locum reads as JSON, it reads here."""

from __future__ import annotations

import json
import re
from typing import Any

from .errors import LocumError

ESCAPED = re.compile(r"\\u[dD][89a-fA-F]")  # of half a pair, or of both halves of one
SURROGATE = re.compile("[\ud800-\udfff]")
DEEPEST = 200  # levels: what walks through data calls itself, and Python follows a thousand calls


def parse_json(text: str | bytes, halves: bool = False, **settings: Any) -> Any:
    """What JSON text says. `settings` are those of json.loads; `halves` lets half surrogate pairs pass.

    Whatever Python cannot read as JSON is a json.JSONDecodeError, also what nests deeper than DEEPEST or has longer numbers than
    Python follows, and text that no file and no terminal takes; bytes that are no text are a UnicodeDecodeError. Both are
    ValueErrors.
    """
    try:
        data = json.loads(text, **settings)
        escaped = not halves and ESCAPED.search(text if isinstance(text, str) else text.decode("latin-1"))
        if escaped and SURROGATE.search(json.dumps(data, ensure_ascii=False)):
            raise json.JSONDecodeError("half a surrogate pair, which is not Unicode text", "", 0)
        if _opened(text) > DEEPEST and _depth(data) > DEEPEST:
            raise json.JSONDecodeError("nested too deeply", "", 0)
        return data
    except (json.JSONDecodeError, UnicodeDecodeError, LocumError):  # the last from a hook in `settings`
        raise
    except RecursionError:
        raise json.JSONDecodeError("nested too deeply", "", 0) from None
    except ValueError as error:
        raise json.JSONDecodeError(str(error), "", 0) from None


def _opened(text: str | bytes) -> int:
    """As many levels as there can be."""
    return text.count("[") + text.count("{") if isinstance(text, str) else text.count(b"[") + text.count(b"{")


def _depth(data: Any) -> int:
    level, depth = [data], -1
    while level:
        held = (
            value.values() if isinstance(value, dict) else value for value in level if isinstance(value, (dict, list))
        )
        level, depth = [item for items in held for item in items], depth + 1
    return depth
