"""JSON text as data: everything that Locum reads as JSON, it reads here."""

from __future__ import annotations

import json
from typing import Any

from .errors import LocumError


def parse_json(text: str | bytes, **settings: Any) -> Any:
    """What JSON text says. `settings` are those of json.loads.

    Whatever Python cannot read as JSON is a json.JSONDecodeError, also what nests deeper or has longer numbers than
    Python follows; bytes that are no text are a UnicodeDecodeError. Both are ValueErrors.
    """
    try:
        return json.loads(text, **settings)
    except (json.JSONDecodeError, UnicodeDecodeError, LocumError):  # the last from a hook in `settings`
        raise
    except RecursionError:
        raise json.JSONDecodeError("nested too deeply", "", 0) from None
    except ValueError as error:
        raise json.JSONDecodeError(str(error), "", 0) from None
