"""Layers that predict further tokens, which transformers does not load: what becomes of their experts.

They are laid out as the model's own layers are, and a config has one number of experts for all. So where that number stays,
they are copied as they are. Where a stock checkpoint loses experts, theirs leave by the plan of the last MoE layer, whose
output they start from. Where their tensors are not named as that layer's, such layers are left out, and config.json says so.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from .cuts import Cut, Headers, LayerCuts

NUMBERED = re.compile(r"(.*?\.\d+\.)(.+)")  # the path of a layer, and what is in it
OF_EXPERTS = re.compile(r"(^|\.)(local_)?experts\.")


@dataclass(frozen=True)
class Followers:
    """What follows the last MoE layer where a stock checkpoint loses experts, and what is left out there."""

    cuts: tuple[Cut, ...] = ()
    left: frozenset[str] = frozenset()


def find_followers(last: LayerCuts, headers: Headers, unread: Collection[str]) -> Followers:
    """`last` are the cuts of the last MoE layer, `unread` the tensors that transformers does not load."""
    layers = {found[1] for name in headers if name not in unread and (found := NUMBERED.fullmatch(name))}
    inside: dict[str, dict[str, str]] = {}  # of each layer that is read by nobody: its tensors by their names inside
    for name in unread:
        if (found := NUMBERED.fullmatch(name)) and found[1] not in layers:
            inside.setdefault(found[1], {})[found[2]] = name
    cuts: list[Cut] = []
    for tensors in inside.values():
        follow = [_alike(cut, tensors, headers) for cut in (*last.experts, *last.router)]
        known = {name for cut in follow if cut is not None for name in cut.names}
        odd = any(OF_EXPERTS.search(path) and name not in known for path, name in tensors.items())
        if odd or (known and None in follow):
            return Followers(left=frozenset(name for layer in inside.values() for name in layer.values()))
        cuts += [cut for cut in follow if cut is not None]
    return Followers(tuple(cuts))


def _alike(cut: Cut, tensors: dict[str, str], headers: Headers) -> Cut | None:
    """The cut of another layer whose tensors have the same names inside it, and the same shapes."""
    found = []
    for name in cut.names:
        path = NUMBERED.fullmatch(name)
        other = tensors.get(path[2]) if path else None
        if other is None or headers[other]["shape"] != headers[name]["shape"]:
            return None
        found.append(other)
    return Cut(tuple(found), cut.axis)
