"""The high-water mark of memory."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from locum.measure.memory import peak_bytes, start_peak

CPU = torch.device("cpu")
SIZE = 200 * 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="other systems cannot start the mark anew")
def test_the_mark_is_where_memory_was_most_since_it_was_started():
    assert start_peak(CPU)
    before = peak_bytes(CPU)
    grown = np.ones(SIZE, dtype=np.uint8)
    high = peak_bytes(CPU)
    assert high > before + 0.9 * SIZE
    del grown
    assert peak_bytes(CPU) > high - 2**20  # the kernel counts in batches of pages
    assert start_peak(CPU)
    assert peak_bytes(CPU) < high - 0.9 * SIZE
