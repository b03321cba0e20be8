"""Mixed-mask attention: every backend that this machine offers, side by side in one run.

    python benchmarks/attention.py [--json PATH] [--layouts A B C] [--heads 16:16x64 8:2x128]

Heads are query heads : key/value heads x width. On a CPU the default is the pre-decoder's heads (CLIP-ViT-L: 16:16x64)
and a quarter of the post-decoder's (Llama-3-8B: 32:8x128), on a GPU both whole.

`ratio_vs_sdpa` is how many times faster a backend is than torch's scaled_dot_product_attention with the dense boolean
mask. `share_of_ideal` is that ratio over S^2 / P, the ratio of skipping every hidden pair without any other loss.
`tflops` counts visible pairs only: forward 4 P H K, backward 10 P H K. `max_error` is the largest deviation from fp64,
over the output and (fwd+bwd) all gradients, relative to the largest value of each.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measure import machine, median_seconds, peak_mib, print_table, write_json
from megatron_haplovl.kernels.attention import BACKENDS, attention, reference_attention, resolve_backend
from megatron_haplovl.kernels.mask import MixedMask, causal

# Documents as runs of tokens: positive is text, negative one image.
LAYOUTS = {
    "A": [[60, -324, 128]] * 4,
    "B": [[100, -576, 60, -576, 96]] + [[100, -576, 220]] * 3,
    "C": [[60, -2304, 180], [80, -1152, -576, 212], [40, -1296, 244]],
    "D": [[100, -576, 60, -576, 96]] * 2 + [[60, -2304, 180], [100, -576, 220], [80, -1152, -576, 128]],
}
CAUSAL = "flash, document-causal"
"""What FlashAttention does with the same documents and no image: a bar for TFLOP/s."""
COLUMNS = ["layout", "heads", "dtype", "backend", "pass", "median_ms", "ratio_vs_sdpa", "share_of_ideal", "tflops"]


def mixed_mask(documents: list[list[int]]) -> MixedMask:
    """One packed sequence of these documents, without padding."""
    start: list[int] = []
    end: list[int] = []
    position = 0
    for runs in documents:
        first = position
        for run in runs:
            start += [first] * abs(run)
            end += range(position + 1, position + run + 1) if run > 0 else [position - run] * -run
            position += abs(run)
    return MixedMask(torch.tensor([start], dtype=torch.int32), torch.tensor([end], dtype=torch.int32))


def exact(tensors: list[torch.Tensor], grad: torch.Tensor, mask: MixedMask, scale: float) -> list[torch.Tensor]:
    """[out, dq, dk, dv] in fp64, one key/value head at a time to bound the memory."""
    kv_heads = tensors[1].shape[2]
    group = tensors[0].shape[2] // kv_heads
    results = []
    for g in range(kv_heads):
        mine = (slice(None), slice(None), slice(g * group, (g + 1) * group))
        one = (slice(None), slice(None), slice(g, g + 1))
        q, k, v = (
            t[part].detach().double().requires_grad_() for t, part in zip(tensors, (mine, one, one), strict=True)
        )
        out = reference_attention(q, k, v, mask, scale)
        results.append((out.detach(), *torch.autograd.grad(out, (q, k, v), grad[mine].double())))
    return [torch.cat(parts, dim=2) for parts in zip(*results, strict=True)]


def error(ours: list[torch.Tensor], exact_ones: list[torch.Tensor]) -> float:
    """Largest relative deviation, see the head of this file."""
    return max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(ours, exact_ones, strict=False))


def measure(name: str, heads: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """All records of one layout and one shape of heads."""
    device = torch.device(arguments.device)
    shape = re.fullmatch(r"(\d+):(\d+)x(\d+)", heads)
    if shape is None:
        raise SystemExit(f"--heads {heads}: write query heads : key/value heads x width, such as 32:8x128")
    query_heads, kv_heads, width = map(int, shape.groups())
    mask = mixed_mask(LAYOUTS[name])
    length, pairs, scale = mask.num_keys, mask.visible_pairs, width**-0.5
    torch.manual_seed(0)
    drawn = [torch.randn(1, length, h, width) for h in (query_heads, kv_heads, kv_heads)]
    drawn_grad = torch.randn(1, length, query_heads, width)
    records = []
    for dtype in (getattr(torch, d) for d in arguments.dtypes):
        tensors = [t.to(device, dtype).requires_grad_() for t in drawn]
        grad = drawn_grad.to(device, dtype)
        wanted = exact(tensors, grad, mask, scale)
        causal_mask = causal(mask)
        # sdpa first: the others are compared with it.
        for backend in ["sdpa", *(b for b in BACKENDS if b != "sdpa")]:
            if not offered(backend, device, dtype, width, arguments.reference):
                continue
            run = partial(attention, *tensors, mask, scale=scale, backend=backend)
            records += passes(run, tensors, grad, wanted, arguments.repeats, pairs, backend, device)
        if offered("flash", device, dtype, width, arguments.reference):
            run = partial(attention, *tensors, causal_mask, scale=scale, backend="flash_merged")
            records += passes(run, tensors, grad, [], arguments.repeats, causal_mask.visible_pairs, CAUSAL, device)
        for record in records:
            record.setdefault("layout", name)
            record.setdefault("heads", heads)
            record.setdefault("dtype", str(dtype).removeprefix("torch."))
    for record in records:
        base = next(
            r
            for r in records
            if r["backend"] == "sdpa" and (r["dtype"], r["pass"]) == (record["dtype"], record["pass"])
        )
        record["ratio_vs_sdpa"] = base["median_ms"] / record["median_ms"]
        record["share_of_ideal"] = record["ratio_vs_sdpa"] * record.pop("_pairs") / length**2
        like = [r for r in records if (r["dtype"], r["pass"]) == (record["dtype"], record["pass"])]
        for base in like:
            if base["backend"] == "flex":
                record["ratio_vs_flex"] = base["median_ms"] / record["median_ms"]
            if base["backend"] == CAUSAL:
                record["tflops_vs_causal"] = record["tflops"] / base["tflops"]
    return records


def offered(backend: str, device: torch.device, dtype: torch.dtype, width: int, reference: bool) -> bool:
    """Whether a backend runs here; the oracle runs only if it was asked for."""
    try:
        resolve_backend(backend, device, dtype, width)
    except ValueError:
        return False
    return backend != "reference" or reference


def passes(
    run: Callable[[], torch.Tensor],
    tensors: list[torch.Tensor],
    grad: torch.Tensor,
    wanted: list[torch.Tensor],
    repeats: int,
    pairs: int,
    backend: str,
    device: torch.device,
) -> list[dict[str, Any]]:
    """The records of forward alone, and of forward with backward."""
    heads, width = tensors[0].shape[2:]
    without_grad = torch.no_grad()(run)

    def both() -> list[torch.Tensor]:
        out = run()
        return [out.detach(), *torch.autograd.grad(out, tensors, grad)]

    records = []
    for kind, fn, flops in (("fwd", without_grad, 4), ("fwd+bwd", both, 14)):
        result = fn()
        got = [result] if isinstance(result, torch.Tensor) else result
        seconds = median_seconds(fn, 1, repeats)
        records.append(
            {
                "backend": backend,
                "pass": kind,
                "median_ms": 1e3 * seconds,
                "tflops": flops * pairs * heads * width / seconds / 1e12,
                "peak_mib": peak_mib(fn, device),
                "max_error": error(got, wanted) if wanted else None,
                "_pairs": pairs,
            }
        )
    return records


def main() -> None:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write the records to this file")
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument(
        "--layouts", nargs="+", default=list(LAYOUTS) if on_gpu else ["A", "B", "C"], choices=list(LAYOUTS)
    )
    parser.add_argument(
        "--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16", "float16"]
    )
    parser.add_argument("--heads", nargs="+", default=["16:16x64", "32:8x128" if on_gpu else "8:2x128"])
    parser.add_argument("--repeats", type=int, default=20 if on_gpu else 5)
    parser.add_argument("--reference", action="store_true", help="time the oracle, too; it needs much memory")
    arguments = parser.parse_args()

    where = machine(arguments.device)
    print(where)
    records = []
    for name in arguments.layouts:
        mask = mixed_mask(LAYOUTS[name])
        ideal = mask.num_keys**2 / mask.visible_pairs
        print(f"\n{name}: {mask.num_keys} tokens, {mask.visible_pairs} visible pairs, ideal ratio {ideal:.2f}")
        for heads in arguments.heads:
            records += measure(name, heads, arguments)
        print_table(
            [r for r in records if r["layout"] == name],
            [*COLUMNS, *(["ratio_vs_flex", "tflops_vs_causal"] if on_gpu else []), "peak_mib", "max_error"],
        )
    if arguments.json:
        write_json(arguments.json, records, **where)


if __name__ == "__main__":
    main()
