"""What surrounds FlashAttention's operator, proven with an emulation in fp64; and the operator, where there is one.

The emulation keeps to the contract of `VarlenOperator`, in particular: its backward uses the output and the log-sum-exp
that it is given, as the real one does.
"""

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_haplovl.kernels import capabilities, flash_operators
from megatron_haplovl.kernels.attention_flash import flash_attention, flash_merged_attention, varlen_attention
from megatron_haplovl.kernels.flash_operators import Ragged, Saved, VarlenOperator, flash_operator, flash_unavailable
from megatron_haplovl.kernels.mask import MixedMask, causal
from tests.unit.kernels.test_attention import LAYOUTS, mixed_mask
from tests.unit.kernels.test_attention_cpu import random_layout

PLANS = ["segments", "merged"]
SCALE = 0.3


class Emulation:
    """The operator as loops over sequences and heads."""

    def __init__(self):
        self.pairs = 0

    def operator(self):
        return VarlenOperator("emulation", 256, self.forward, self.backward)

    def sequences(self, ragged, queries, heads, kv_heads):
        q_bounds, k_bounds = ragged.q_bounds_M.tolist(), ragged.k_bounds_M.tolist()
        assert ragged.q_bounds_M.dtype == ragged.k_bounds_M.dtype == torch.int32
        assert len(q_bounds) == len(k_bounds) and (q_bounds[0], q_bounds[-1]) == (0, queries)
        lengths = [(b - a, d - c) for a, b, c, d in zip(q_bounds, q_bounds[1:], k_bounds, k_bounds[1:], strict=False)]
        assert all(0 < n <= m for n, m in lengths)
        assert (ragged.longest_q, ragged.longest_k) == tuple(map(max, zip(*lengths, strict=True)))
        for s, (n, m) in enumerate(lengths):
            seen = torch.ones(n, m, dtype=torch.bool)
            if ragged.causal:
                seen = seen.tril(m - n)
            for h in range(heads):
                yield (
                    slice(q_bounds[s], q_bounds[s + 1]),
                    slice(k_bounds[s], k_bounds[s + 1]),
                    h,
                    h * kv_heads // heads,
                    seen,
                )

    def forward(self, q, k, v, ragged, scale):
        assert all(x.stride(-1) == 1 for x in (q, k, v))
        out, lse = torch.full_like(q, torch.nan), torch.full(q.shape[1::-1], torch.nan, dtype=q.dtype)
        for rows, keys, h, g, seen in self.sequences(ragged, len(q), q.shape[1], k.shape[1]):
            scores = (scale * q[rows, h] @ k[keys, g].T).masked_fill(~seen, -torch.inf)
            lse[h, rows] = scores.logsumexp(dim=1)
            out[rows, h] = scores.softmax(dim=1) @ v[keys, g]
            self.pairs += int(seen.sum()) if h == 0 else 0
        return out, lse

    def backward(self, dout, saved, ragged, scale):
        q, k, v, out, lse = saved
        assert all(x.stride(-1) == 1 for x in (dout, *saved)) and lse.is_contiguous()
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for rows, keys, h, g, seen in self.sequences(ragged, len(q), q.shape[1], k.shape[1]):
            probabilities = (scale * q[rows, h] @ k[keys, g].T - lse[h, rows, None]).exp() * seen
            dv[keys, g] += probabilities.T @ dout[rows, h]
            taken_off = (dout[rows, h] * out[rows, h]).sum(dim=1, keepdim=True)
            dscores = scale * probabilities * (dout[rows, h] @ v[keys, g].T - taken_off)
            dq[rows, h] = dscores @ k[keys, g]
            dk[keys, g] += dscores.T @ q[rows, h]
        return dq, dk, dv


def expected_attention(q, k, v, mask, scale=SCALE):
    """Dense softmax in fp64."""
    group = q.shape[2] // k.shape[2]
    k, v = (x.double().repeat_interleave(group, dim=2) for x in (k, v))
    scores = torch.einsum("bqhk,bshk->bhqs", q.double(), k) * scale
    scores = scores.masked_fill(~mask.dense(q.device).unsqueeze(1), -torch.inf)
    return torch.einsum("bhqs,bshk->bqhk", scores.softmax(dim=-1), v)


def random_inputs(
    mask, heads, kv_heads, width=4, seed=0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys, values and the weights of the output in the loss."""
    generator = torch.Generator().manual_seed(seed)
    batch, rows = mask.kv_start_BS.shape

    def draw(tokens, heads):
        shape = (batch, tokens, heads, width)
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    return draw(rows, heads), draw(mask.num_keys, kv_heads), draw(mask.num_keys, kv_heads), draw(rows, heads)


def batch_of(*masks):
    return MixedMask(torch.cat([m.kv_start_BS for m in masks]), torch.cat([m.kv_end_BS for m in masks]))


def worst_errors(mask, plan, operator, heads=2, kv_heads=1, seed=0):
    q, k, v, weight = random_inputs(mask, heads, kv_heads, seed=seed)
    out = varlen_attention(q, k, v, mask, SCALE, plan, operator)
    grads = torch.autograd.grad((out * weight).sum(), (q, k, v))
    expected = expected_attention(q, k, v, mask)
    expected_grads = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    pairs = zip((out, *grads), (expected, *expected_grads), strict=True)
    return [(a - b).abs().max().item() for a, b in pairs]


def mask_of(starts, ends):
    """One sequence."""
    return MixedMask(torch.tensor([starts], dtype=torch.int32), torch.tensor([ends], dtype=torch.int32))


MASKS = {name: lambda layout=layout: mixed_mask(*layout)[0] for name, layout in LAYOUTS.items()} | {
    "only padding": lambda: mixed_mask([], 3)[0],
    "padding first": lambda: mask_of([0, 1, 2, 2, 2], [1, 2, 3, 5, 5]),
    "images only, then text only": lambda: mixed_mask([[-3, -2], [4], [-2]], 1)[0],
    "batch": lambda: batch_of(mixed_mask([[5, -4, 3]], 0)[0], mixed_mask([[2, -2], [6]], 2)[0]),
    "batch without padding": lambda: batch_of(mixed_mask([[5, -4, 3]], 0)[0], mixed_mask([[12]], 0)[0]),
    "chunk": lambda: mixed_mask([[3, -4, 2, -3, 2]], 0)[0].rows(9, 13),
    "batch of chunks": lambda: batch_of(mixed_mask([[3, -4, 2]], 0)[0], mixed_mask([[1, -2], [6]], 0)[0]).rows(3, 9),
    "chunk of two documents": lambda: mixed_mask([[3], [2, -3, 2], [-2, 2]], 0)[0].rows(4, 12),
    "one token of decoding": lambda: mixed_mask([[3, -4, 2]], 0)[0].rows(8, 9),
    "causal images": lambda: causal(mixed_mask([[3, -4, 2], [-2, 2]], 0)[0]),
}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (7, 1)])
def test_output_and_gradients(plan, name, heads, kv_heads):
    emulation, mask = Emulation(), MASKS[name]()
    # Measured worst case 2.2e-15.
    assert max(worst_errors(mask, plan, emulation.operator(), heads, kv_heads)) < 1e-12
    alone = sum(s.end - s.start for s in mask.segments if s.kind == "alone")
    assert emulation.pairs == mask.visible_pairs - alone


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("seed", range(12))
def test_random_layouts(plan, seed):
    mask, _ = mixed_mask(*random_layout(seed))
    # Measured worst case 2.2e-15.
    assert max(worst_errors(mask, plan, Emulation().operator(), seed=seed)) < 1e-12


@pytest.mark.parametrize("plan", PLANS)
def test_gradcheck(plan):
    mask, _ = mixed_mask([[2, -3, 1], [-2]], 1)
    q, k, v, _ = random_inputs(mask, heads=2, kv_heads=1, width=2)
    operator = Emulation().operator()
    assert torch.autograd.gradcheck(lambda q, k, v: varlen_attention(q, k, v, mask, SCALE, plan, operator), (q, k, v))


def test_own_log_sum_exp_of_each_call_would_be_wrong():
    """These tests see the trap of the merged plan."""
    emulation, mask = Emulation(), mixed_mask([[3, -6, 2]], 0)[0]

    def backward(dout, saved, ragged, scale):
        q, k, v, *_ = saved
        out, lse = emulation.forward(q, k, v, ragged, scale)
        return emulation.backward(dout, saved._replace(out_RHK=out, lse_HR=lse), ragged, scale)

    trapped = VarlenOperator("trapped", 256, emulation.forward, backward)
    assert max(worst_errors(mask, "segments", trapped)) < 1e-12
    forward_error, *gradient_errors = worst_errors(mask, "merged", trapped)
    assert forward_error < 1e-12
    assert min(gradient_errors) > 0.1


@pytest.mark.parametrize("plan", PLANS)
def test_packed_equals_per_document(plan):
    documents = [[3, -4, 2], [5], [-3, -2, 1]]
    packed, _ = mixed_mask(documents, 2)
    q, k, v, _ = random_inputs(packed, heads=4, kv_heads=2)
    operator = Emulation().operator()
    out = varlen_attention(q, k, v, packed, SCALE, plan, operator)
    start = 0
    for document in documents:
        mask, dense = mixed_mask([document], 0)
        rows = slice(start, start + len(dense))
        alone = varlen_attention(q[:, rows], k[:, rows], v[:, rows], mask, SCALE, plan, operator)
        assert torch.equal(out[:, rows], alone)
        start = rows.stop


@pytest.mark.parametrize("plan", PLANS)
def test_hidden_keys_do_not_leak_and_later_tokens_of_the_same_image_do(plan):
    mask, dense = mixed_mask([[2, -3, -2, 2], [3, -2]], 2)
    q, k, v, _ = random_inputs(mask, heads=2, kv_heads=1)
    operator = Emulation().operator()
    out = varlen_attention(q, k, v, mask, SCALE, plan, operator)
    for j in range(len(dense)):
        k2, v2 = k.clone(), v.clone()
        k2[0, j] += 1.0
        v2[0, j] -= 1.0
        changed = (varlen_attention(q, k2, v2, mask, SCALE, plan, operator) != out).flatten(2).any(dim=2)[0]
        assert torch.equal(changed, dense[:, j])


def test_calls_are_few_and_built_once():
    """Two calls, whatever the number of documents; one if there is no image, and padding then copies nothing."""
    mask, _ = mixed_mask([[3, -4, 2], [5], [-3, -2, 1]], 2)
    for plan in PLANS:
        calls: list[Any] = []
        emulation = Emulation()

        def forward(q, k, v, ragged, scale, calls=calls, emulation=emulation):
            calls.append((q, k, ragged))
            return emulation.forward(q, k, v, ragged, scale)

        operator = VarlenOperator("counted", 256, forward, emulation.backward)
        q, k, v, _ = random_inputs(mask, heads=2, kv_heads=1)
        varlen_attention(q, k, v, mask, SCALE, plan, operator)
        varlen_attention(q, k, v, mask, SCALE, plan, operator)
        assert [ragged.causal for _, _, ragged in calls] == 2 * [True, plan == "merged"]
        # The second layer takes the first layer's bounds.
        assert calls[0][2] is calls[2][2]
        text, _ = mixed_mask([[3], [4]], 2)
        q, k, v, _ = random_inputs(text, heads=2, kv_heads=1)
        calls.clear()
        varlen_attention(q, k, v, text, SCALE, plan, operator)
        ((q_call, k_call, _),) = calls
        assert (q_call.data_ptr(), k_call.data_ptr()) == (q.data_ptr(), k.data_ptr())


def test_inputs_of_any_strides():
    mask, _ = mixed_mask([[3, -4, 2]], 0)  # without padding, the merged plan's first call gets them as they are
    q, k, v, _ = random_inputs(mask, heads=2, kv_heads=1)
    operator = Emulation().operator()
    out = varlen_attention(q, k, v, mask, SCALE, "merged", operator)
    a, b, c = (x.detach().transpose(1, 3).contiguous().transpose(1, 3).requires_grad_() for x in (q, k, v))
    assert a.stride(-1) != 1
    assert torch.equal(varlen_attention(a, b, c, mask, SCALE, "merged", operator), out)
    # The gradient of a sum is one number, expanded.
    grads = [
        torch.autograd.grad(varlen_attention(*x, mask, SCALE, "merged", operator).sum(), x)
        for x in ((q, k, v), (a, b, c))
    ]
    for grad, strided_grad in zip(*grads, strict=True):
        assert torch.equal(grad, strided_grad)


def test_half_precision():
    """The operator is in bf16 and exact inside; 40 segments see the same keys, and their terms are added in fp32."""
    mask, _ = mixed_mask([[1, -2] * 20], 0)
    emulation = Emulation()

    def forward(q, k, v, ragged, scale):
        out, lse = emulation.forward(q.double(), k.double(), v.double(), ragged, scale)
        return out.bfloat16(), lse.float()

    def backward(dout, saved, ragged, scale):
        grads = emulation.backward(dout.double(), Saved(*(x.double() for x in saved)), ragged, scale)
        return tuple(x.bfloat16() for x in grads)

    operator = VarlenOperator("emulation in bf16", 256, forward, backward)
    q, k, v, weight = (x.detach().bfloat16().requires_grad_() for x in random_inputs(mask, heads=2, kv_heads=1))
    expected = expected_attention(q, k, v, mask)
    expected_grads = torch.autograd.grad((expected * weight.double()).sum(), (q, k, v))
    for plan in PLANS:
        out = varlen_attention(q, k, v, mask, SCALE, plan, operator)
        grads = torch.autograd.grad((out * weight).sum(), (q, k, v))
        assert out.dtype == torch.bfloat16 and all(grad.dtype == torch.bfloat16 for grad in grads)
        # Relative to the largest entry. Measured worst case 2.1e-3 forward, 5.9e-3 backward; 3e-2 if added in bf16.
        assert (out.double() - expected).abs().max() < 1e-2 * expected.abs().max()
        for grad, expected_grad in zip(grads, expected_grads, strict=True):
            assert (grad.double() - expected_grad.double()).abs().max() < 1e-2 * expected_grad.abs().max()


def test_merged_refuses_rows_that_do_not_see_themselves():
    short = MixedMask(torch.zeros(1, 3, dtype=torch.int32), torch.tensor([[1, 2, 2]], dtype=torch.int32))
    q, k, v, _ = random_inputs(short, heads=2, kv_heads=1)
    with pytest.raises(ValueError, match="rows 1 to 3 of sequence 0 see those before 2; use backend flash"):
        varlen_attention(q, k, v, short, SCALE, "merged", Emulation().operator())
    assert max(worst_errors(short, "segments", Emulation().operator())) < 1e-12


def test_what_flash_attention_does_not_know(monkeypatch):
    cpu = torch.device("cpu")
    assert flash_unavailable(cpu, torch.bfloat16, 64) == "runs on NVIDIA GPUs, not on cpu"
    mask, _ = mixed_mask([[3]], 0)
    for backend in (flash_attention, flash_merged_attention):
        with pytest.raises(ValueError, match="no FlashAttention-2: runs on NVIDIA GPUs, not on cpu"):
            q, k, v, _ = random_inputs(mask, heads=2, kv_heads=1)
            backend(q, k, v, mask, SCALE)
    operator = dataclasses.replace(Emulation().operator(), largest_head=128)
    monkeypatch.setattr(flash_operators, "_choice", lambda device, version: lambda: operator)
    monkeypatch.setattr(flash_operators, "flash_operator", lambda device, version: operator)
    assert flash_unavailable(cpu, torch.float32, 64) == "computes in bf16 or fp16, not in torch.float32"
    for width in (12, 136):
        reason = flash_unavailable(cpu, torch.bfloat16, width)
        assert reason == f"emulation has head widths that are multiples of 8 up to 128, not {width}"
    assert flash_unavailable(cpu, torch.bfloat16, 128) is None


@pytest.mark.parametrize(
    ("version", "capability", "installed", "expected"),
    [
        (2, (7, 5), {"2", "torch"}, "needs compute capability 8.0, cuda has 7.5"),
        (2, (8, 0), {"2", "3", "4", "torch"}, "torch_flash_attention"),
        (2, (10, 0), {"2", "3", "4", "torch"}, "torch_flash_attention"),
        (2, (9, 0), {"2", "3", "4"}, "flash_attention_2"),
        (2, (9, 0), {"3", "4"}, "torch was built without it, and the flash-attn package is not installed"),
        (3, (9, 0), {"2", "3", "torch"}, "flash_attention_3"),
        (3, (9, 0), {"2", "4", "torch"}, "FlashAttention-3 is not installed"),
        (3, (8, 0), {"3"}, "needs compute capability 9, cuda has 8.0"),
        (4, (9, 0), {"4"}, "flash_attention_4"),
        (4, (10, 0), {"3", "4", "torch"}, "flash_attention_4"),
        (4, (10, 0), {"3", "torch"}, "flash-attn-4 is not installed"),
        (4, (12, 0), {"4"}, "needs compute capability 9 or 10, cuda has 12.0"),
    ],
)
def test_which_operator_is_chosen(monkeypatch, version, capability, installed, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: "torch" in installed)
    for number in "234":
        monkeypatch.setattr(capabilities, f"has_flash_attention_{number}", lambda n=number: n in installed)
    choice = flash_operators._choice(torch.device("cuda"), version)
    assert (choice if isinstance(choice, str) else choice.__name__) == expected


class Recording(TorchDispatchMode):
    """Notes what each argument of torch's operators is given, by the name that the operator's schema has for it."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        arguments = func._schema.arguments
        named = {a.name: x for a, x in zip(arguments, args, strict=False)} | (kwargs or {})
        self.calls.append((str(func), {a.name: a.default_value for a in arguments if a.name not in named}, named))
        return func(*args, **(kwargs or {}))


def test_arguments_of_torchs_operators():
    """They fit the schemas of this torch; the meta device stands in for a GPU."""
    q_bounds, k_bounds = (torch.zeros(3, dtype=torch.int32, device="meta") for _ in range(2))
    ragged = Ragged(q_bounds, k_bounds, 5, 7, True)
    q, dout = (torch.empty(9, 4, 16, dtype=torch.bfloat16, device="meta") for _ in range(2))
    k, v = (torch.empty(12, 2, 16, dtype=torch.bfloat16, device="meta") for _ in range(2))
    operator = flash_operators.torch_flash_attention()
    with Recording() as recording:
        out, lse = operator.forward(q, k, v, ragged, SCALE)
        grads = operator.backward(dout, Saved(q, k, v, out, lse), ragged, SCALE)
    assert (out.shape, out.dtype, lse.shape, lse.dtype) == (q.shape, q.dtype, (4, 9), torch.float32)
    assert [g.shape for g in grads] == [q.shape, k.shape, v.shape]

    bounds = {"cum_seq_q": q_bounds, "cum_seq_k": k_bounds, "max_q": 5, "max_k": 7}
    common = {"query": q, "key": k, "value": v, **bounds, "dropout_p": 0.0, "is_causal": True, "scale": SCALE}
    expected = {
        "aten._flash_attention_forward.default": common | {"return_debug_mask": False},
        "aten._flash_attention_backward.default": common | {"grad_out": dout, "out": out, "logsumexp": lse},
    }
    calls = {name: (defaults, named) for name, defaults, named in recording.calls if "flash" in name}
    assert calls.keys() == expected.keys()
    for name, (defaults, named) in calls.items():
        assert set(defaults.values()) == {None}
        assert (named.pop("rng_state", None) is None) == (named.pop("unused", None) is None) == ("forward" in name)
        assert named.keys() == expected[name].keys()
        for argument, value in named.items():
            assert value is expected[name][argument] or not isinstance(value, torch.Tensor)
            assert isinstance(value, torch.Tensor) or value == expected[name][argument]


# --- With the real operators ------------------------------------------------------------------------------------------


@pytest.fixture(params=["torch_flash_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4"])
def gpu_operator(request):
    """Each FlashAttention that this machine offers."""
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    major = torch.cuda.get_device_capability()[0]
    majors = {"flash_attention_3": (9,), "flash_attention_4": (9, 10)}.get(request.param, range(8, 99))
    if major not in majors:
        pytest.skip(f"{request.param} does not run on compute capability {major}")
    if request.param != "torch_flash_attention" and not getattr(capabilities, f"has_{request.param}")():
        pytest.skip(f"{request.param} is not installed")
    return getattr(flash_operators, request.param)()


def long_mask(documents, padding=0):
    """As `mixed_mask`, without its matrix of all pairs."""
    starts: list[int] = []
    ends: list[int] = []
    for runs in documents:
        first = len(starts)
        for run in runs:
            position = len(starts)
            starts += [first] * abs(run)
            ends += [position - run] * -run if run < 0 else range(position + 1, position + run + 1)
    for _ in range(padding):
        starts.append(len(starts))
        ends.append(len(ends) + 1)
    return mask_of(starts, ends)


def test_long_mask_is_mixed_mask():
    for seed in range(3):
        layout = random_layout(seed)
        mask, short = long_mask(*layout), mixed_mask(*layout)[0]
        assert torch.equal(mask.kv_start_BS, short.kv_start_BS) and torch.equal(mask.kv_end_BS, short.kv_end_BS)


GPU_LAYOUTS = {
    "edges that cross tiles": lambda: long_mask([[3, -130, 129, -1, 5], [-257], [64, -64, -65, 1]], 77),
    "6,144 tokens": lambda: long_mask([[200, -576, 300, -576, 100], [700, -2304, 400], [-576, 300]], 112),
    "chunk": lambda: long_mask([[200, -576, 300, -576, 100]]).rows(776, 1752),
}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("layout", GPU_LAYOUTS)
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_gpu_at_most_twice_the_error_of_dense_attention(gpu_operator, plan, layout, width, dtype):
    heads, kv_heads, scale = 28, 4, width**-0.5
    mask = GPU_LAYOUTS[layout]()
    inputs = [x.detach().to("cuda", dtype) for x in random_inputs(mask, heads, kv_heads, width)]

    def with_gradients(compute, q, k, v, weight):
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        out = compute(q, k, v)
        return [x.double() for x in (out.detach(), *torch.autograd.grad((out * weight).sum(), (q, k, v)))]

    def dense(q, k, v):
        k, v = (x.repeat_interleave(heads // kv_heads, dim=2).transpose(1, 2) for x in (k, v))
        seen = mask.dense(q.device).unsqueeze(1)
        return F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=seen, scale=scale).transpose(1, 2)

    # In groups of heads, to save memory.
    q, k, v, weight = (x.double() for x in inputs)
    group = heads // kv_heads
    exact = [
        with_gradients(
            lambda q, k, v: expected_attention(q, k, v, mask, scale),
            q[:, :, g * group : (g + 1) * group],
            k[:, :, g : g + 1],
            v[:, :, g : g + 1],
            weight[:, :, g * group : (g + 1) * group],
        )
        for g in range(kv_heads)
    ]
    exact = [torch.cat(x, dim=2) for x in zip(*exact, strict=True)]
    ours = with_gradients(lambda q, k, v: varlen_attention(q, k, v, mask, scale, plan, gpu_operator), *inputs)
    theirs = with_gradients(dense, *inputs)
    for a, b, c in zip(ours, theirs, exact, strict=True):
        assert (a - c).norm() <= 2 * (b - c).norm()
        assert (a - c).abs().max() <= 1e-2 * c.abs().max()


@pytest.mark.parametrize("plan", PLANS)
def test_on_a_gpu_the_host_never_waits(gpu_operator, plan):
    def run():
        mask = long_mask([[30, -70, 20], [50]], 6)
        q, k, v = (
            torch.randn(1, 176, h, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for h in (4, 2, 2)
        )
        varlen_attention(q, k, v, mask, SCALE, plan, gpu_operator).backward(torch.ones_like(q))

    run()  # compiles and allocates
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_on_a_gpu_an_operator_is_chosen():
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    if torch.cuda.get_device_capability()[0] < 8:
        pytest.skip("needs compute capability 8.0")
    assert flash_operator(torch.device("cuda")).name
