"""Compile the kernels of `tiered/kernels/triton_kernels.py` ahead of time, and print what they take, as Markdown.

No device is needed, nor a driver. For docs/benchmarks/gpu.md; a test compiles some of them and looks at the numbers.

    python tools/gpu_kernels.py                                      every scheme and compute capability
    python tools/gpu_kernels.py --groups 64 --capabilities 80 90     some
    python tools/gpu_kernels.py --json                               as lines of JSON
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

CAPABILITIES: Final = (75, 80, 86, 89, 90, 100, 103, 120)
GROUPS: Final = (32, 64, 128)
_PRODUCTS: Final = re.compile(r"\b(wgmma|tcgen05|mma)\.(?:mma_async|mma|sync)")
_SIZES: Final = ("rows", "out", "in_features", "x_stride", "y_stride")
_NEW_IN_BF16: Final = 80
"""Below it devices compute in float16, and products are not Triton's."""


@dataclass(frozen=True)
class Compiled:
    """A kernel for one compute capability."""

    kernel: str
    """With its tile: rows of the weight x rows of activations."""
    scheme: str
    dtype: str
    capability: int
    registers: int
    """Per thread."""
    stack: int
    """Bytes per thread to which registers are spilled."""
    shared: int
    """Bytes per block."""
    products: str
    """The instructions that multiply matrices: mma, wgmma or tcgen05; "" where there are none."""


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description="Compile the kernels for GPUs ahead of time, and say what they take.")
    parser.add_argument("--groups", type=int, nargs="+", default=GROUPS, help="group sizes of weights")
    parser.add_argument("--capabilities", type=int, nargs="+", default=CAPABILITIES, help="75 for 7.5, and so on")
    parser.add_argument("--json", action="store_true", help="a line of JSON per kernel")
    asked = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as cache:
        os.environ.setdefault("TRITON_CACHE_DIR", cache)
        made = compiled(asked.groups, asked.capabilities)
        if asked.json:
            for item in made:
                print(json.dumps(asdict(item)), flush=True)
        else:
            print("\n".join(as_table(list(made), asked.capabilities)))


def compiled(groups: Iterable[int], capabilities: Iterable[int]) -> Iterator[Compiled]:
    """Every kernel as devices of these compute capabilities run it."""
    for capability in capabilities:
        for group in groups:
            yield from _of_device(capability, group)


def as_table(made: Sequence[Compiled], capabilities: Sequence[int]) -> Iterator[str]:
    """Lines of Markdown: a row per kernel and scheme, a column per compute capability."""
    names = [f"{capability // 10}.{capability % 10}" for capability in capabilities]
    yield f"| kernel (tile) | weights | {' | '.join(names)} |"
    yield "|-|-|" + "-|" * len(names)
    cells: dict[tuple[str, str], dict[int, str]] = {}
    for item in made:
        spilled = f", {item.stack} B spilled" if item.stack else ""
        products = f" {item.products}" if item.products else ""
        cell = f"{item.registers}, {item.shared / 1024:.0f} KiB{spilled}{products}"
        cells.setdefault((item.kernel, item.scheme), {})[item.capability] = cell
    for (kernel, scheme), by_capability in sorted(cells.items()):
        row = " | ".join(by_capability.get(capability, "-") for capability in capabilities)
        yield f"| {kernel} | {scheme} | {row} |"


def _of_device(capability: int, group: int) -> Iterator[Compiled]:
    import triton.language as tl

    from tiered.kernels import triton_kernels as kernels

    has_products = capability >= _NEW_IN_BF16
    dtype, dot = ("bf16", tl.bfloat16) if has_products else ("fp16", tl.float16)
    for bits in (4, 8):
        scheme: dict[str, Any] = {"bits": bits, "group": group}
        tile = {"tile_out": kernels.DEQUANTIZE.out}
        yield _compiled(kernels.dequantize_kernel, kernels.DEQUANTIZE, scheme | tile, dtype, capability)
        if not has_products:
            tile = {"tile_out": kernels.SUMS.out, "has_bias": True}
            yield _compiled(kernels.linear_by_sums_kernel, kernels.SUMS, scheme | tile, dtype, capability)
            continue
        for tiling in (kernels.LINEAR, kernels.LINEAR_FEW):
            tile = {"tile_out": tiling.out, "tile_rows": tiling.rows, "has_bias": True}
            yield _compiled(kernels.linear_kernel, tiling, scheme | tile | {"dot": dot}, dtype, capability)
            if bits == 8:
                constants = {"group": group} | tile
                yield _compiled(kernels.linear_int8_kernel, tiling, constants, dtype, capability)


def _compiled(kernel: Any, tiling: Any, constants: dict[str, Any], dtype: str, capability: int) -> Compiled:
    """`kernel` as it is compiled where pointers and sizes are multiples of 16, as those of models are."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    of_x = "*i8" if "x_scale" in kernel.arg_names else f"*{dtype}"
    types = {"x": of_x, "x_scale": "*fp32", "q": "*u8", "scale": "*fp16", "zero": "*u8"}
    types |= {"bias": f"*{dtype}", "y": f"*{dtype}"} | dict.fromkeys(_SIZES, "i32")
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    aligned = {
        (number,): [["tt.divisibility", 16]]
        for number, name in enumerate(kernel.arg_names)
        if name not in constants and name != "rows"
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": tiling.warps, "num_stages": tiling.stages}
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, stack = _usage(made.asm["cubin"])
    name = kernel.__name__.removesuffix("_kernel")
    return Compiled(
        kernel=f"{name} ({tiling.out} x {tiling.rows})",
        scheme=f"int{constants.get('bits', 8)}-g{constants['group']}",
        dtype=dtype,
        capability=capability,
        registers=registers,
        stack=stack,
        shared=made.metadata.shared,
        products=" ".join(sorted(set(_PRODUCTS.findall(made.asm["ptx"])))),
    )


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes of its stack."""
    import triton

    program = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([program, "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", done.stdout)
    if found is None:
        sys.exit(f"gpu_kernels: cuobjdump says nothing of registers: {done.stdout}")
    return int(found[1]), int(found[2])


if __name__ == "__main__":
    main(sys.argv[1:])
