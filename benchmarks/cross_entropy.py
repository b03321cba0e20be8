"""Cross-entropy of a linear head over a large vocabulary: every form that this machine offers, side by side.

    python benchmarks/cross_entropy.py [--json results.json]

`plain` is F.linear, fp32 logits and F.cross_entropy. `ratio_vs_plain` is the plain form's time over this one's, so more
is better. `peak_mib` is everything that is allocated beside the inputs. No form can avoid `gradient_mib`, the gradients
that it returns, so `memory_ratio_vs_plain` compares the peaks less that; less is better. `max_error` is the largest
error of the loss or of an entry of a gradient against fp64 on the same values, relative to the largest entry.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.measure import MIB, machine, median_seconds, peak_mib, print_table, write_json  # noqa: E402
from megatron_haplovl.kernels.capabilities import has_liger  # noqa: E402
from megatron_haplovl.kernels.linear_cross_entropy import linear_cross_entropy  # noqa: E402

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Gradients = dict[str, torch.Tensor]
COLUMNS = (
    ["tokens", "dtype", "head", "pass", "backend", "median_ms", "ratio_vs_plain"]
    + ["peak_mib", "gradient_mib", "memory_ratio_vs_plain", "max_error"]
)  # fmt: skip
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def plain(hidden_ML: torch.Tensor, weight_VL: torch.Tensor, target_M: torch.Tensor) -> torch.Tensor:
    """The whole [M, V] logits, in fp32."""
    return F.cross_entropy(F.linear(hidden_ML, weight_VL).float(), target_M, reduction="sum")


def chunked(hidden_ML: torch.Tensor, weight_VL: torch.Tensor, target_M: torch.Tensor) -> torch.Tensor:
    """This package's form, which also counts the right answers."""
    return linear_cross_entropy(hidden_ML, weight_VL, target_M)[0]


def forms(device: torch.device) -> dict[str, Loss]:
    """Name -> loss; the plain form comes first, because the others are compared with it."""
    found: dict[str, Loss] = {"plain": plain, "chunked": chunked}
    if device.type == "cuda":
        found["compiled"] = torch.compile(plain)
        if has_liger():
            from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

            liger = LigerFusedLinearCrossEntropyLoss(reduction="sum")
            found["liger"] = lambda hidden_ML, weight_VL, target_M: liger(weight_VL, hidden_ML, target_M)
    return found


def reference(hidden_ML: torch.Tensor, weight_VL: torch.Tensor, target_M: torch.Tensor) -> Gradients:
    """Loss and gradients in fp64, a few tokens at a time."""
    hidden_ML, weight_VL = (x.detach().double().requires_grad_() for x in (hidden_ML, weight_VL))
    loss = torch.zeros((), dtype=torch.float64, device=hidden_ML.device)
    for rows in torch.arange(len(hidden_ML), device=hidden_ML.device).split(128):
        part = F.cross_entropy(F.linear(hidden_ML[rows], weight_VL), target_M[rows], reduction="sum")
        part.backward()
        loss += part.detach()
    assert hidden_ML.grad is not None and weight_VL.grad is not None
    return {"loss": loss, "hidden": hidden_ML.grad, "weight": weight_VL.grad}


def largest_error(got: Gradients, expected: Gradients) -> float:
    """The largest error over all tensors that were computed."""
    return max(float((got[name] - expected[name]).abs().max() / expected[name].abs().max()) for name in got)


def measure(loss_fn: Loss, tensors: Gradients, backward: bool, expected: Gradients, repeats: int) -> dict[str, float]:
    """Time, memory and error of one form of one case."""
    hidden_ML, weight_VL, target_M = tensors["hidden"], tensors["weight"], tensors["target"]

    def run() -> Gradients:
        hidden_ML.grad = weight_VL.grad = None
        with torch.set_grad_enabled(backward):
            loss = loss_fn(hidden_ML, weight_VL, target_M)
        if backward:
            loss.backward()
        grads = {"loss": loss.detach(), "hidden": hidden_ML.grad, "weight": weight_VL.grad}
        return {name: value for name, value in grads.items() if value is not None}

    result = {"median_ms": 1000 * median_seconds(run, 1, repeats)}
    # Gradients of earlier calls would be freed while this one is measured.
    hidden_ML.grad = weight_VL.grad = None
    result["peak_mib"] = peak_mib(run, hidden_ML.device)
    got = run()
    result["gradient_mib"] = sum(x.nbytes for name, x in got.items() if name != "loss") / MIB
    result["max_error"] = largest_error(got, expected)
    hidden_ML.grad = weight_VL.grad = None
    return result


def records(
    device: torch.device, dtypes: list[str], tokens: int, vocab: int, width: int, repeats: int
) -> Iterator[dict[str, Any]]:
    """Records of every form, with frozen and trained head, forward alone and with backward."""
    for dtype in dtypes:
        random = torch.Generator(device).manual_seed(0)
        # Logits of a standard deviation of 2, so that the largest of so many words stands out, as in a trained model.
        hidden_ML = torch.randn(tokens, width, device=device, generator=random).to(DTYPES[dtype]).requires_grad_()
        weight_VL = torch.randn(vocab, width, device=device, generator=random).mul_(2 * width**-0.5).to(DTYPES[dtype])
        target_M = torch.randint(0, vocab, (tokens,), device=device, generator=random)
        tensors = {"hidden": hidden_ML, "weight": weight_VL, "target": target_M}
        expected = reference(hidden_ML, weight_VL, target_M)
        for head in ("frozen", "trained"):
            weight_VL.requires_grad_(head == "trained")
            for backward in (False, True):
                baseline: dict[str, float] = {}
                for backend, loss_fn in forms(device).items():
                    result = measure(loss_fn, tensors, backward, expected, repeats)
                    baseline = baseline or result
                    own, plains = (r["peak_mib"] - r["gradient_mib"] for r in (result, baseline))
                    yield {
                        "head": head,
                        "dtype": dtype,
                        "backend": backend,
                        "pass": "fwd+bwd" if backward else "fwd",
                        "tokens": tokens,
                        "vocab": vocab,
                        "width": width,
                        **result,
                        "ratio_vs_plain": baseline["median_ms"] / result["median_ms"],
                        "memory_ratio_vs_plain": own / plains,
                    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--tokens", type=int, nargs="+", help="default: 1024 on a CPU, 4096 and 8192 on a GPU")
    parser.add_argument("--vocab", type=int, default=128256, help="words; default: Llama-3's")
    parser.add_argument("--width", type=int, help="default: 512 on a CPU, 4096 on a GPU")
    parser.add_argument("--repeats", type=int, default=3, help="calls that are timed")
    parser.add_argument("--json", type=Path, help="write the records here")
    args = parser.parse_args()
    device = torch.device(args.device)
    on_gpu = device.type == "cuda"
    width = args.width or (4096 if on_gpu else 512)
    found: list[dict[str, Any]] = []
    for tokens in args.tokens or ([4096, 8192] if on_gpu else [1024]):
        found += records(device, args.dtypes, tokens, args.vocab, width, args.repeats)
    where = machine(device)
    print(f"vocabulary {args.vocab}, width {width}; {where}")
    print_table(found, COLUMNS)
    if args.json:
        write_json(args.json, found, **where)


if __name__ == "__main__":
    main()
