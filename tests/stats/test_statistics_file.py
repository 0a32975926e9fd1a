"""Statistics come back from their file as they were, and what is no such file is refused with a word about it."""

from __future__ import annotations

import errno
import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from locum.errors import StatisticsError
from locum.files import (
    read_tensors,
)
from locum.shapes import LayerShape, ModelShape
from locum.stats.origin import Origin, SearchedBy
from locum.stats.statistics_file import load_statistics, save_statistics, statistics_id
from locum.stats.sums import Statistics


def statistics(**more):
    shape = ModelShape("toy", (LayerShape("a.b.experts", 4, 2, 3, 5, "r", "softmax", True),), 10, 40, 4)
    generator = torch.Generator().manual_seed(0)
    sums = {
        "count": torch.randint(9, (2, 4), generator=generator).double(),
        "output_sum": torch.randn(2, 4, 3, dtype=torch.float64, generator=generator),
        "tokens": torch.tensor([7.0, 8.0], dtype=torch.float64),
    }
    known = {"command": "ä", "seed": 0, "versions": {"torch": "2"}, **more}
    return Statistics(
        ("code", "prose"),
        {"a.b.experts": sums},
        Origin(shape, "ä", "t", ("d", "e")),
        15,
        known,
        SearchedBy("moe-i2", {"seed": 3, "pruned": 0.5}),
        7,
        {"batch_size": 8, "needs": ["count"]},
    )


def test_statistics_come_back_as_they_were(tmp_path):
    before = statistics()
    save_statistics(before, tmp_path / "s.safetensors")
    after = load_statistics(tmp_path / "s.safetensors")
    assert (after.domains, after.provenance) == (before.domains, json.loads(json.dumps(before.provenance)))
    for field in ("origin", "tokens", "searched", "next_block", "asked"):
        assert getattr(after, field) == getattr(before, field)
    assert after.layers.keys() == before.layers.keys()
    for name, named in before.layers.items():
        assert after.layers[name].keys() == named.keys()
        for key, tensor in named.items():
            assert torch.equal(after.layers[name][key], tensor) and after.layers[name][key].dtype == tensor.dtype
    assert after.shape == before.shape


@pytest.mark.parametrize("partial", [True, False])
def test_statistics_files_of_version_1_are_read(tmp_path, partial):
    """There everything was in the provenance."""
    new = statistics()
    words = dict(new.provenance, shape=new.shape.to_json(), tokens=15, model_fingerprint="ä", tokenizer_fingerprint="t")
    words |= {"data_fingerprint": ["d", "e"], "search": {"method": "moe-i2", "options": {"seed": 3}, "sample": 9}}
    words |= {"next_block": 7} if partial else {}
    notes = {"format_version": 1, "domains": list(new.domains), "provenance": words}
    tensors = {f"{layer}|{name}": tensor for layer, named in new.layers.items() for name, tensor in named.items()}
    save_file(tensors, tmp_path / "old", {"locum-statistics": json.dumps(notes)})
    old = load_statistics(tmp_path / "old")
    assert (old.domains, old.origin, old.tokens, old.provenance) == (new.domains, new.origin, 15, new.provenance)
    assert (old.searched, old.next_block) == (SearchedBy("moe-i2", {"seed": 3}), 7 if partial else None)
    assert all(
        torch.equal(tensor, old.layers["a.b.experts"][name]) for name, tensor in new.layers["a.b.experts"].items()
    )


def test_the_same_statistics_give_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        save_statistics(statistics(), tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_statistics_files_that_are_none(tmp_path):
    path = tmp_path / "s.safetensors"
    with pytest.raises(StatisticsError, match=r"no statistics file at .*s\.safetensors.*locum calibrate"):
        load_statistics(path)
    save_statistics(statistics(), path)
    whole_file = path.read_bytes()
    for content in (b"", b"garbage" * 9, whole_file[:-5], whole_file[: len(whole_file) // 2]):
        path.write_bytes(content)
        with pytest.raises(StatisticsError, match=r"s\.safetensors.*(again|locum calibrate)"):
            load_statistics(path)
    for header in (None, {"format": "pt"}, {"locum-statistics": '{"format_version": 99}'}):
        save_file({"x": torch.zeros(2)}, path, header)
        with pytest.raises(StatisticsError, match="not a Locum statistics file of version"):
            load_statistics(path)
    for notes in ("", "{", "[]", "1", '{"format_version": 1, "domains": []}'):
        save_file({"x": torch.zeros(2)}, path, {"locum-statistics": notes})
        with pytest.raises(StatisticsError, match=r"s\.safetensors"):
            load_statistics(path)


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        *(("asked", value) for value in (3, "x", [1])),
        *(("searched", value) for value in (3, {"name": "moe-i2"}, {"name": "moe-i2", "options": 3})),
        *(("next_block", value) for value in ("3", 1.5, [])),
        *(("provenance", 3), ("tokens", "x"), ("domains", 3), ("origin", None)),
    ],
)
def test_statistics_whose_notes_are_damaged_are_refused(tmp_path, entry, value):
    path = tmp_path / "s.safetensors"
    save_statistics(statistics(), path)
    tensors, header = read_tensors(path)
    notes = json.loads(header["locum-statistics"])
    assert entry in notes
    save_file(tensors, path, {"locum-statistics": json.dumps(notes | {entry: value})})
    with pytest.raises(StatisticsError, match=r"s\.safetensors have damaged notes .*calibrate again"):
        load_statistics(path)


@pytest.mark.parametrize(
    "what", ["a.b.experts|count", "a.b.experts|output_sum", "a.b.experts|tokens", "next_block", "tokens"]
)
def test_what_was_changed_in_a_file_is_found(tmp_path, what):
    path = tmp_path / "s.safetensors"
    save_statistics(statistics(), path)
    tensors, header = read_tensors(path)
    notes = json.loads(header["locum-statistics"])
    with safe_open(path, "pt") as file:
        written = file.metadata()["checksum"]
    if what in tensors:
        tensors[what].view(-1)[-1] += 1
    else:
        notes[what] += 1
    save_file(tensors, path, {"locum-statistics": json.dumps(notes), "checksum": written})
    with pytest.raises(StatisticsError, match="have changed since they were written"):
        load_statistics(path)


def test_a_sample_of_large_sums_is_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr("locum.stats.statistics_file._is_large", lambda key: key.endswith("|output_sum"))
    path = tmp_path / "s.safetensors"
    save_statistics(statistics(), path)
    assert load_statistics(path).id == statistics().id
    with safe_open(path, "pt") as file:
        header = file.metadata()
    save_file(load_file(path) | {"a.b.experts|output_sum": torch.ones(2, 4, 3, dtype=torch.float64)}, path, header)
    with pytest.raises(StatisticsError, match="have changed since they were written"):
        load_statistics(path)


def test_the_id_of_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(StatisticsError, match="no statistics file at"):
        statistics_id(tmp_path / "pipe")


def test_sums_of_a_layer_that_is_not_named_are_refused(tmp_path):
    path = tmp_path / "s.safetensors"
    save_statistics(statistics(), path)
    tensors, header = read_tensors(path)
    key = min(tensors)
    save_file({("|" if name == key else name): tensor for name, tensor in tensors.items()}, path, header)
    with pytest.raises(StatisticsError, match=r"s\.safetensors have sums of ''.*calibrate again"):
        load_statistics(path)


def test_statistics_that_may_not_be_read_say_so(tmp_path, monkeypatch):
    """safetensors says of such a file that it is not there."""
    save_statistics(statistics(), tmp_path / "s.safetensors")

    def refuse(*given):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("locum.files.Path.open", refuse)
    with pytest.raises(StatisticsError, match=r"s\.safetensors cannot be read: Permission denied; let this user"):
        load_statistics(tmp_path / "s.safetensors")


def test_ids_of_files_that_were_written_before_stay(tmp_path):
    """What a shape says of layers since then is in no file that was written before, and plans name their statistics by the id."""
    shape = ModelShape("toy", (LayerShape("a.b.experts", 4, 2, 3, 5, "r", "softmax", True),), 10, 40, 4)
    sums = {"count": torch.arange(8.0, dtype=torch.float64).view(2, 4)}
    origin, searched = Origin(shape, "m", "t", ("d", "e")), SearchedBy("moe-i2", {"seed": 3})
    made = Statistics(("code", "prose"), {"a.b.experts": sums}, origin, 15, {}, searched, 7, {"batch_size": 8})
    assert made.id == "9bf7998499767ddc"  # by version 5ba11d5 of the sources
