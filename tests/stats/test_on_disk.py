"""Tensors in files: the same numbers as in memory, also when the file is gone; no memory for what nobody reads."""

from __future__ import annotations

import errno
import os

import psutil
import pytest
import torch
from safetensors.torch import save_file

from locum.stats.on_disk import FromFile, Stack


@pytest.mark.parametrize("shape", [(3, 5, 5), (2, 70, 70), (4, 1), (1, 64, 64)])
def test_a_stack_adds_up_rows(tmp_path, shape):
    torch.manual_seed(0)
    stack, expected = Stack(tmp_path, shape), torch.zeros(shape, dtype=torch.float64)
    for row in (0, shape[0] - 1, 0):
        more = torch.randn(shape[1:])
        stack.add(row, more)
        expected[row] += more
    assert torch.equal(stack.tensor(), expected) and list(tmp_path.iterdir()) == []


def test_a_disk_without_room_is_an_error_at_once(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        Stack(tmp_path, (2, 2))


def test_tensors_of_a_file_outlive_it(tmp_path):
    tensors = {"b|x": torch.randn(3, 7, dtype=torch.float64), "a|x": torch.randn(2, dtype=torch.float64)}
    save_file(tensors, tmp_path / "file")
    found = FromFile.open(tmp_path / "file", lambda name: name.endswith("|x"))
    (tmp_path / "file").unlink()
    assert set(found) == set(tensors) and all(torch.equal(found[name], tensors[name]) for name in tensors)
    some = found.named({"x": "b|x"})
    some["x"].zero_()  # is written to memory alone
    assert list(some) == ["x"] and torch.equal(some["x"], tensors["b|x"])


def test_numbers_of_another_kind_are_refused(tmp_path):
    save_file({"x": torch.zeros(2), "y": torch.zeros(2, dtype=torch.float64)}, tmp_path / "file")
    with pytest.raises(ValueError, match="x is F32; expected F64"):
        FromFile.open(tmp_path / "file", lambda name: name != "__metadata__")


def test_what_is_not_read_takes_no_memory(tmp_path):
    rows = 64
    save_file({"x": torch.zeros(rows, 2**17, dtype=torch.float64)}, tmp_path / "file")  # 1 MiB each
    found, process = FromFile.open(tmp_path / "file", lambda name: name == "x"), psutil.Process()
    before = process.memory_info().rss
    for row in range(rows):
        assert float(found["x"][row].sum()) == 0
    assert process.memory_info().rss - before < rows * 2**20 // 4
