"""A shape that was read from a file has values of the kinds that its fields are of."""

from __future__ import annotations

import dataclasses

import pytest

from locum.models.sizes import shape_of
from locum.shapes import Aside, LayerShape, ModelShape

CLASSES = (ModelShape, LayerShape, Aside)
ENTRIES = [(cls, item.name, item.type) for cls in CLASSES for item in dataclasses.fields(cls)]
OTHERS = {"int": ("x", 1.0, True, None, -1, [1]), "str": (1, None, ["x"]), "bool": (1, "true", None)}


def changed(shape: ModelShape, cls: type, name: str, value: object) -> dict:
    data = shape.to_json()
    holder = {ModelShape: data, LayerShape: data["layers"][0], Aside: data["aside"]}[cls]
    assert name in holder
    holder[name] = value
    return data


def test_what_was_written_is_read(olmoe):
    shape = shape_of(olmoe)
    assert ModelShape.from_json(shape.to_json()) == shape


@pytest.mark.parametrize(("cls", "name", "kind"), [entry for entry in ENTRIES if entry[2] in OTHERS])
def test_a_value_of_another_kind_is_refused(olmoe, cls, name, kind):
    for value in OTHERS[kind]:
        with pytest.raises(TypeError, match=f"{name} is "):
            ModelShape.from_json(changed(shape_of(olmoe), cls, name, value))


def test_every_other_entry_is_known():
    assert {entry[1] for entry in ENTRIES if entry[2] not in OTHERS} == {"layers", "notes", "aside"}
