"""Layer-wise recovery in closed form: what a layer's output is linear in, by least squares, before AdamW.

    y_t = y0_t + sum_j phi_tj theta_j        theta_j [D]: the constants, and the columns of the second factor of down's adapters

y_t is the output of an MoE layer for token t, phi_tj what the rest of the layer makes of the token: a gate, or a gate times a number
of an adapter's inner product. With y*_t of the original's layer, theta becomes what is least in

    sum_t |y*_t - y0_t - sum_j phi_tj theta_j|^2 + lambda sum_j |theta_j - theta'_j|^2        theta': what it was

over the first batches, with the lambda whose theta is best on the last quarter of them; then over all. Where none is better there than
theta', nothing changes. y0 is what the layer gives with theta = 0, and a number of its output less y0 is phi_tj where theta_j alone is 1
there, so that a pass finds D of them, whatever kinds of parts there are. What theta = 1 gives tells whether the layer is linear.

Letters: T tokens, J numbers phi of a token, D model width, N stacked items, R rank, M tokens that have loss.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .experts import TrainingExperts
from .imitation import first, in_dtype

HELD_OUT = 4  # the last one of so many batches chooses lambda
STRENGTHS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # lambda over the mean of sum_t phi_tj^2
MOST = 4096  # numbers phi of a token: their products are J x J numbers of 8 bytes, three times


class Sums:
    """What least squares need of some tokens: phi^T phi [J, J], phi^T (y* - y0) [J, D] and sum |y* - y0|^2, in float64."""

    def __init__(self, k: int, d: int, device: torch.device) -> None:
        self.gram_JJ = torch.zeros(k, k, dtype=torch.float64, device=device)
        self.cross_JD = torch.zeros(k, d, dtype=torch.float64, device=device)
        self.square = 0.0

    def add(self, phi_MJ: Tensor, missing_MD: Tensor) -> None:
        phi_MJ, missing_MD = phi_MJ.double(), missing_MD.double()
        self.gram_JJ += phi_MJ.T @ phi_MJ
        self.cross_JD += phi_MJ.T @ missing_MD
        self.square += float(missing_MD.square().sum())

    def error(self, theta_JD: Tensor) -> float:
        """sum_t |y*_t - y_t|^2."""
        return self.square + float((theta_JD * (self.gram_JJ @ theta_JD - 2 * self.cross_JD)).sum())

    def solved(self, near_JD: Tensor, strength: float) -> Tensor:
        """The least squares with so strong a pull to `near_JD`. Where they cannot be told, that itself."""
        pull = strength * float(self.gram_JJ.diagonal().mean())
        factor_JJ, failed = torch.linalg.cholesky_ex(
            self.gram_JJ + pull * torch.eye(len(self.gram_JJ)).to(self.gram_JJ)
        )
        if failed or not pull > 0:
            return near_JD
        return near_JD + torch.cholesky_solve(self.cross_JD - self.gram_JJ @ near_JD, factor_JJ)


def chosen(fitted: Sums, held_out: Sums, theta_JD: Tensor) -> Tensor:
    """The theta that the file's first words tell of, from sums over the first batches and over the last."""
    errors = {strength: held_out.error(fitted.solved(theta_JD, strength)) for strength in STRENGTHS}
    best = min(errors, key=errors.__getitem__)
    if not errors[best] < held_out.error(theta_JD):
        return theta_JD
    together = Sums(*fitted.cross_JD.shape, fitted.cross_JD.device)
    together.gram_JJ, together.cross_JD = fitted.gram_JJ + held_out.gram_JJ, fitted.cross_JD + held_out.cross_JD
    return together.solved(theta_JD, best)


class LinearFit:
    """The least squares of one MoE layer in training, from what it is called with for so many batches.

    `block` computes it, with the experts in `container`; `teacher` is that of the original.
    """

    def __init__(self, container: TrainingExperts, block: nn.Module, teacher: nn.Module, batches: int) -> None:
        self.block, self.teacher = block, teacher
        self.fitted_on = batches - max(1, batches // HELD_OUT)
        self.leaves = list(_linear_in(container))
        size, width = sum(x.shape[0] * x.shape[2] for x in self.leaves), container.layout.hidden_size
        self.is_linear = 0 < size <= MOST and self.fitted_on > 0
        if self.is_linear:
            self.sums = [Sums(size, width, self.leaves[0].device) for _ in range(2)]

    @contextlib.contextmanager
    def watching(self, batch: int, mask_BS: Tensor) -> Iterator[None]:
        """Add what the layer is called with while this is entered, which is batch number `batch`."""
        forward = self.block.forward
        if self.is_linear:
            self.block.forward = functools.partial(self._see, forward, self.sums[batch >= self.fitted_on], mask_BS)
        try:
            yield
        finally:
            self.block.__dict__.pop("forward", None)

    def finish(self) -> None:
        """Take the least squares, where the layer's output is linear in what they are of."""
        if self.is_linear:
            self._set(chosen(*self.sums, self._theta().double()))

    def _see(self, forward: Callable[..., Any], sums: Sums, mask_BS: Tensor, *given: Any, **named: Any) -> Any:
        made, theta_JD = forward(*given, **named), self._theta()
        self.is_linear &= first(made).shape[-1] == theta_JD.shape[1]  # else more comes after the experts than a sum
        if not (self.is_linear and mask_BS.any()):
            return made
        given, named = in_dtype(given, torch.float32), in_dtype(named, torch.float32)
        like, outputs = next(self.teacher.parameters()).dtype, []
        with torch.no_grad(), torch.autocast(mask_BS.device.type, enabled=False):
            for tried_JD in (torch.zeros_like(theta_JD), torch.ones_like(theta_JD), *_probes(theta_JD)):
                self._set(tried_JD)
                outputs.append(first(forward(*given, **named))[mask_BS].float())
            self._set(theta_JD)
            theirs = self.teacher(*in_dtype(given, like), **in_dtype(named, like))
        start_MD, ones_MD, *probed = outputs
        phi_MJ = torch.cat([probe_MD - start_MD for probe_MD in probed], dim=1)[:, : len(theta_JD)]
        expected_MD = start_MD + phi_MJ.sum(dim=1, keepdim=True)
        self.is_linear &= torch.allclose(expected_MD, ones_MD, rtol=0, atol=1e-3 * float(ones_MD.abs().max()))
        sums.add(phi_MJ, first(theirs)[mask_BS].float() - start_MD)
        return made

    def _theta(self) -> Tensor:
        """theta [J, D]."""
        return torch.cat([leaf.mT.flatten(0, 1) for leaf in self.leaves]).clone()

    def _set(self, theta_JD: Tensor) -> None:
        parts = theta_JD.split([leaf.shape[0] * leaf.shape[2] for leaf in self.leaves])
        for leaf, part_JD in zip(self.leaves, parts, strict=True):
            leaf.copy_(part_JD.unflatten(0, (len(leaf), -1)).mT)


@contextlib.contextmanager
def watching(fits: Sequence[LinearFit], batch: int, mask_BS: Tensor) -> Iterator[None]:
    """Every fit watches batch number `batch` while this is entered."""
    with contextlib.ExitStack() as entered:
        for fit in fits:
            entered.enter_context(fit.watching(batch, mask_BS))
        yield


def _linear_in(container: TrainingExperts) -> Iterator[Tensor]:
    """What trains and the output is linear in, [N, D, R], as views. An adapter in few bits is rounded, so it is not."""
    for path, stack in container.paths:
        for name in stack.kind.linear:
            leaf = getattr(container.stack(path), name)
            if leaf.requires_grad and name not in container.rounding.get(path, ()):
                yield leaf.detach().view(*leaf.shape[:2], -1)


def _probes(theta_JD: Tensor) -> Iterator[Tensor]:
    """theta in which a number each of the next D is 1, each for another number of the output."""
    size, width = theta_JD.shape
    for begin in range(0, size, width):
        probe_JD, count = torch.zeros_like(theta_JD), min(width, size - begin)
        probe_JD[range(begin, begin + count), range(count)] = 1
        yield probe_JD
