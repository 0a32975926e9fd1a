"""Adapters of many experts at once, each pair with its own: W + B A, where a pair's products with W are made elsewhere.

Letters: P pairs (token, expert), T tokens, D model width, F expert width, G 2F with a gate and F without, R rank.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..kernels.products import Products


def add_first(
    way: Products, y_PG: Tensor, inputs: tuple[Tensor, ...], token_P: Tensor, weight_NGD: Tensor, row_P: Tensor
) -> None:
    """The first product: of the one input, or of gate's half of each weight with the first input and up's with the
    second."""
    width = y_PG.shape[1] // len(inputs)
    for i, x_TD in enumerate(inputs):
        half = slice(i * width, (i + 1) * width)
        way.add(y_PG[:, half], x_TD, weight_NGD[:, half], row_P, token_P)


def add_adapters(
    way: Products,
    pre_PG: Tensor,
    inputs: tuple[Tensor, ...],
    token_P: Tensor,
    stack: nn.Module,
    row_P: Tensor,
    each_P: Tensor,
) -> None:
    """Add what each pair's adapter makes of its token's inputs [T, D]; row -1 is none. `each_P` counts the pairs."""
    low_PR = pre_PG.new_zeros(len(token_P), stack.gate_up_A.shape[1])
    add_first(way, low_PR, inputs, token_P, stack.gate_up_A, row_P)
    f = stack.up_B_FR.shape[1]
    way.add(pre_PG[:, -f:], low_PR[:, -stack.up_B_FR.shape[2] :], stack.up_B_FR, row_P, each_P)
    if hasattr(stack, "gate_B_FR"):
        way.add(pre_PG[:, :f], low_PR[:, : stack.gate_B_FR.shape[2]], stack.gate_B_FR, row_P, each_P)


def scatter_adapters(
    way: Products, total_TD: Tensor, hidden_PF: Tensor, token_P: Tensor, stack: nn.Module, row_P: Tensor, each_P: Tensor
) -> None:
    """Add to each token what the adapters of its pairs make of their hidden states."""
    low_PR = hidden_PF.new_zeros(len(token_P), stack.down_A_RF.shape[1])
    way.add(low_PR, hidden_PF, stack.down_A_RF, row_P, each_P)
    way.scatter(total_TD, low_PR, stack.down_B_DR, row_P, token_P)
