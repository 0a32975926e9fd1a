"""How experts' outputs are spread over sizes, in one pass: what lies far from their mean is known only when all of them were seen.

Numbers go by sign and size into the bins of a histogram. Of every octave there are 16 bins, over 32 octaves; smaller numbers are in
the bins beside 0, larger ones in the last.

Letters: Q pairs of one expert, E experts, D model width, H bins of a histogram.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .definitions import statistic
from .events import RoutedEvent
from .shares import BINS

MANTISSA = 4  # bits of it that tell bins of one octave apart
LEAST = -20  # sizes below 2^LEAST are those beside 0
SIZES = BINS // 2


def _bin(value: Tensor) -> Tensor:
    """The bin of each number, by the bits that it has in float32: exponent and mantissa count up as the size does."""
    bits = value.float().view(torch.int32)
    first = (LEAST + 127) << MANTISSA
    size = (((bits & 0x7FFFFFFF) >> (23 - MANTISSA)) - first).clamp(0, SIZES - 1)
    return torch.where(bits < 0, SIZES - 1 - size, SIZES + size)


def edges() -> Tensor:
    """[H + 1] float64: where bins begin and end, from the lowest number to the highest."""
    at = torch.arange(1, SIZES + 1, dtype=torch.float64)
    octave = torch.div(at, 2**MANTISSA, rounding_mode="floor")
    size = torch.ldexp(1 + (at - octave * 2**MANTISSA) / 2**MANTISSA, octave + LEAST)
    return torch.cat([-size.flip(0), size.new_zeros(1), size])


def outside(histogram_EH: Tensor, low_E: Tensor, high_E: Tensor) -> Tensor:
    """[E] how many numbers lie below `low` or above `high`. Those of a bin that is cut lie evenly in it; a bin in which the middle of
    the two lies is inside."""
    begin_H, end_H = edges().to(histogram_EH.device).unfold(0, 2, 1).unbind(1)
    low_E1, high_E1, middle_E1 = low_E[:, None], high_E[:, None], ((low_E + high_E) / 2)[:, None]
    share_EH = (end_H - high_E1).clamp(min=0) + (low_E1 - begin_H).clamp(min=0)
    share_EH = (share_EH / (end_H - begin_H)).clamp(max=1)
    inside_EH = (begin_H <= middle_E1) & (middle_E1 < end_H)
    return (histogram_EH * torch.where(inside_EH, 0.0, share_EH)).sum(dim=1)


@statistic("output_histogram", axes="EH", event=RoutedEvent, on_demand=True)
def output_histogram(event: RoutedEvent) -> Tensor:
    """How many of an expert's output numbers are of every size, as a histogram.

    of f_e(x_t)_d over the tokens that selected e and all d: 16 bins an octave from 2^-20 to 2^12, for either sign

    Needs:    routed tokens' expert outputs; collected on demand only.
    Shapes:   (E, 1024), from the lowest numbers to the highest; bins hold their end that is nearer to 0.
    Units:    numbers; a row sums to n_e D.
    Edges:    0 for a never-routed expert; smaller numbers are in the two bins in the middle, larger ones in the first and the last.
    Cost:     1024 E float64 per layer and domain; one pass over P*D.
    Source:   not from a paper; for EAO of MC-Suite, arXiv 2504.05586.
    """
    found_EH = torch.zeros(len(event.counts), BINS, dtype=torch.float64, device=event.out_PD.device)
    for found_H, out_QD in zip(found_EH, event.out_PD.split(list(event.counts)), strict=True):
        found_H.copy_(torch.bincount(_bin(out_QD).flatten(), minlength=BINS))
    return found_EH
