"""The blocks' elementwise operations: ours beside the plain form, forward and backward, time and saved memory.

python benchmarks/elementwise.py [--json PATH]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measure import MIB, machine, median_seconds, print_table, write_json
from megatron_haplovl.kernels.elementwise import quick_gelu, rms_norm, rotate, silu_product

TOKENS, WIDTH, MLP_WIDTH, HEADS = 2910, 768, 2048, 12


def plain_rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x * cos + rotate_half(x) * sin."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def cases(
    dtype: torch.dtype, device: torch.device
) -> dict[str, tuple[Callable[..., Any], Callable[..., Any], list[torch.Tensor]]]:
    """Name -> (ours, plain, inputs that are differentiated)."""

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype, requires_grad=True)

    head = WIDTH // HEADS
    cos, sin = torch.randn(2, 1, TOKENS, 1, head, device=device, dtype=dtype)
    return {
        "rotate": (lambda x: rotate(x, cos, sin), lambda x: plain_rotate(x, cos, sin), [draw(1, TOKENS, HEADS, head)]),
        "quick_gelu": (quick_gelu, lambda x: x * torch.sigmoid(1.702 * x), [draw(1, TOKENS, MLP_WIDTH)]),
        "silu_product": (
            silu_product,
            lambda gate, up: F.silu(gate) * up,
            [draw(1, TOKENS, MLP_WIDTH), draw(1, TOKENS, MLP_WIDTH)],
        ),
        "rms_norm": (
            lambda x, weight: rms_norm(x, weight, 1e-5),
            lambda x, weight: F.rms_norm(x, weight.shape, weight, 1e-5),
            [draw(1, TOKENS, WIDTH), draw(WIDTH)],
        ),
    }


def saved_mib(fn: Callable[..., torch.Tensor], inputs: list[torch.Tensor]) -> float:
    """What autograd keeps beside the inputs."""
    known = {x.untyped_storage().data_ptr() for x in inputs}
    kept: dict[int, torch.Tensor] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in known:
            kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        fn(*inputs)
    return sum(x.untyped_storage().nbytes() for x in kept.values()) / MIB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write the records to this file")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    records = []
    for dtype in (torch.float32, torch.bfloat16):
        for name, (ours, plain, inputs) in cases(dtype, device).items():
            for form, fn in (("plain", plain), ("ours", ours)):
                grad = torch.randn_like(fn(*inputs))

                def both(
                    fn: Callable[..., torch.Tensor] = fn, x: list[torch.Tensor] = inputs, g: torch.Tensor = grad
                ) -> None:
                    torch.autograd.grad(fn(*x), x, g)

                seconds = median_seconds(both, 2, 9)
                record = {"operation": name, "dtype": str(dtype).removeprefix("torch."), "form": form}
                records.append({**record, "median_ms": 1e3 * seconds, "saved_mib": saved_mib(fn, inputs)})
    where = machine(device)
    print(f"{TOKENS} tokens, width {WIDTH}, MLP {MLP_WIDTH}; {where}")
    print_table(records, list(records[0]))
    if arguments.json:
        write_json(arguments.json, records, **where)


if __name__ == "__main__":
    main()
