"""What the products of triton_grouped.py would launch, written down and compiled without a device.

    python tests/kernels/triton_launches.py [FORMAT ...]     compiles what a layer of OLMoE's shape launches for sm_90, a line
                                                             of JSON each; formats of its matrices, "" for bfloat16

Nothing runs: tensors are on the meta device, which has no values to wait for.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch.nn import functional
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from locum.containers.container import StandInExperts
from locum.containers.layout import Layout
from locum.kernels import triton_grouped
from locum.plans.plan import KEPT, Base, LayerPlan, Slot, stand_in
from locum.shapes import LayerShape

KERNELS = ("_few", "_many", "_sort", "_find_units", "_sum_units", "_sum_tokens")
POINTERS = {
    torch.uint8: "*u8",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class Launch(NamedTuple):
    kernel: str
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, int]


@contextlib.contextmanager
def written_down() -> Iterator[list[Launch]]:
    launches: list[Launch] = []

    class Recorder:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *arguments, **options: launches.append(Launch(self.name, grid, arguments, options))

    with contextlib.ExitStack() as stack:
        for name in KERNELS:
            stack.enter_context(mock.patch.object(triton_grouped, name, Recorder(name)))
        yield launches


def swiglu(pre_PG: torch.Tensor) -> torch.Tensor:
    gate_PF, up_PF = pre_PG.chunk(2, dim=-1)
    return functional.silu(gate_PF) * up_PF


def olmoe_layer(replaced: int, rank: int, format: str = "") -> StandInExperts:
    """64 experts of 2048 x 1024, the last of them replaced by three bases with adapters, all in a number format."""
    kept = 64 - replaced
    slots = (KEPT,) * kept + tuple(stand_in(e % 3, rank) for e in range(replaced))
    slots = tuple(Slot(tuple(replace(part, format=format) for part in slot.parts)) for slot in slots)
    bases = tuple(Base((kept + b,), (1.0,)) for b in range(3)) if replaced else ()
    shape = LayerShape("experts", 64, 8, 2048, 1024, "router", "softmax", False)
    container = StandInExperts(Layout.of(LayerPlan("experts", slots, bases), shape), swiglu, torch.bfloat16, "meta")
    container.way = "triton"
    return container


def launches_of(container: StandInExperts, tokens: int, top_k: int = 8) -> list[Launch]:
    x_TD = torch.empty(tokens, container.layout.hidden_size, dtype=torch.bfloat16, device="meta")
    index_TK = torch.empty(tokens, top_k, dtype=torch.int64, device="meta")
    with torch.no_grad(), written_down() as launches:
        container(x_TD, index_TK, torch.empty(tokens, top_k, dtype=torch.bfloat16, device="meta"))
    return launches


def resources(launch: Launch) -> dict[str, Any]:
    """What sm_90 needs for a launch: registers, bytes of stack (spills) and of shared memory, tensor core instructions."""
    function = getattr(triton_grouped, launch.kernel)
    signature, constants, attributes = {}, {}, {}
    for i, (parameter, value) in enumerate(zip(function.params, launch.arguments, strict=True)):
        tensor = isinstance(value, torch.Tensor)
        if parameter.is_constexpr or (not tensor and value == 1 and not parameter.do_not_specialize):
            signature[parameter.name], constants[(i,)] = "constexpr", value
        else:
            signature[parameter.name] = POINTERS[value.dtype] if tensor else "i32"
            if tensor or (value % 16 == 0 and not parameter.do_not_specialize):
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature, constants, attributes)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=launch.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(made.asm["cubin"])
        said = subprocess.run([TOOL, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", said).groups())
    words = {"wgmma": "wgmma.mma_async", "mma": "mma.sync", "cp_async": "cp.async.cg"}
    found = {name: made.asm["ptx"].count(word) for name, word in words.items()}
    return {"registers": registers, "stack": stack, "shared": made.metadata.shared, **found}


def main(formats: list[str]) -> None:
    seen = set()
    for format, (replaced, tokens) in itertools.product(formats, ((0, 1), (38, 16), (38, 2048))):
        for launch in launches_of(olmoe_layer(replaced, 16, format), tokens):
            numbers = tuple(value for value in launch.arguments if not isinstance(value, torch.Tensor))
            if (launch.kernel, numbers) not in seen:
                seen.add((launch.kernel, numbers))
                about = {"kernel": launch.kernel, "format": format, "tokens": tokens}
                print(json.dumps(about | resources(launch)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or [""])
