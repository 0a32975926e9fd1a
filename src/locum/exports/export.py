"""`export`: a checkpoint in another form. The forms are the targets in this folder, and those of other packages."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

from ..checkpoints.patch import check_adapter
from ..checkpoints.read import read_headers
from ..checkpoints.skeleton import check_loadable, open_source, read_shape
from ..checkpoints.weight_files import is_adapter
from ..errors import OptionError, unknown
from ..files import check_output, describe_size
from ..options import make_options
from ..stages.options import Force, Help, Out, alone, needed
from .target import TARGETS, Target, write_form


def _forms() -> str:
    """The forms, each with the first sentence of its docstring."""
    return "; ".join(f"{name}: {(cls.__doc__ or '').strip().splitlines()[0]}" for name, cls in TARGETS.items())


@alone
def export(
    model: Path,
    *,
    to: Annotated[str, Help(_forms)],
    out: Out,
    force: Force = False,
    **options: Any,
) -> dict[str, Any]:
    """Write a checkpoint in another form: for llama.cpp, for engines without Locum, or for tools that cannot import it.

    transformers and vLLM read the folders that Locum writes as they are, where Locum is installed beside them. The
    options are those of the form.
    """
    model = Path(model)
    form = chosen_form(to, options)
    out = check_output(needed(out, "out"), force, form.kind, inputs=[model])
    source = open_source(model)
    check_loadable(model, source)
    check_adapter(model, source)
    words = write_form(form, model, out)
    sizes = [read_shape(model).bytes if is_adapter(model) else _size(model), _size(out)]  # of an adapter, with its base
    return {"out": str(out), "form": words, "bytes": sizes, "times_larger": sizes[1] / sizes[0]}


def chosen_form(to: str, options: dict[str, Any]) -> Target:
    """A target with its options. Raises OptionError for an unknown form, and for an option that it does not have."""
    cls = TARGETS[to]
    owners: dict[str, list[str]] = {}
    for name, other in TARGETS.items():
        for item in dataclasses.fields(other):
            owners.setdefault(item.name, []).append(name)
    for name in options:
        flag = "--" + name.replace("_", "-")
        if name not in owners:
            raise OptionError(unknown("option of an export", flag, ["--" + o.replace("_", "-") for o in owners]))
        if to not in owners[name]:
            raise OptionError(
                f"{flag} is an option of --to {' and --to '.join(owners[name])}; --to {to} does not have it"
            )
    return make_options(cls, options)


def _size(path: Path) -> int:
    """Bytes of the tensors in a folder, or of a file."""
    if path.is_file():
        return path.stat().st_size
    return sum(x["data_offsets"][1] - x["data_offsets"][0] for x in read_headers(path).values())


def larger(result: dict[str, Any]) -> str:
    """What an export made, in words."""
    before, after = map(describe_size, result["bytes"])
    times = f"{result['times_larger']:.2f} times the {before} of the checkpoint"
    return f"{result['out']}: {result['form']}; {after}, {times}"
