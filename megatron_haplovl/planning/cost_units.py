"""The units that costs are counted in, and what every kind of layer shares."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_haplovl.config.layout import Layout


@dataclass(frozen=True)
class Precision:
    """Bytes per element of each kind of tensor."""

    element: int = 2
    """Bytes in products with weights and in hidden states: 2 in bf16, 4 in fp32."""
    residual: int = 2
    """Bytes in the residual stream: 4 under autocast (bf16 without ZeRO) on a GPU, where norms and sums are fp32."""
    casts_weights: bool = False
    """Autocast: every forward pass makes bf16 copies of the matrices, which live as long as its graph."""
    device: str = "cuda"
    """The chunked loss takes larger chunks on a GPU."""

    @property
    def autocast(self) -> bool:
        """Whether every product casts its own copy of an fp32 input."""
        return self.residual > self.element


def precision_of(bf16: bool, zero_stage: int, device: str = "cuda") -> Precision:
    """Number formats as `engine/deepspeed_config.py` chooses them."""
    if not bf16:
        return Precision(element=4, residual=4, device=device)
    autocast = zero_stage == 0
    # A CPU's autocast leaves norms in bf16.
    return Precision(2, residual=4 if autocast and device == "cuda" else 2, casts_weights=autocast, device=device)


@dataclass(frozen=True)
class Operations:
    """Floating-point operations, by what limits their speed."""

    products: float = 0.0
    """Matrix products with weights."""
    attention: float = 0.0
    """q k^T and the weighted sum of v, over visible pairs."""

    def __add__(self, other: Operations) -> Operations:
        return Operations(self.products + other.products, self.attention + other.attention)

    def __mul__(self, factor: float) -> Operations:
        return Operations(factor * self.products, factor * self.attention)

    @property
    def total(self) -> float:
        """Both."""
        return self.products + self.attention


@dataclass(frozen=True)
class Speeds:
    """The speed that a device reaches, in operations and bytes per second."""

    products: float
    attention: float
    memory: float


@dataclass(frozen=True)
class LayerCost:
    """One entry of the flat layer list, for one rank and one micro-batch."""

    name: str
    """Path of the module: embedding, pre_decoder.0, ..., connector, post_decoder.0, ..., final_norm, lm_head; stage 1
    ends in distillation."""
    parameters: int
    """Parameters on this rank, frozen ones included."""
    trained_parameters: int
    forward: Operations
    backward: Operations
    """Backward as model arithmetic counts it: attention's is twice its forward."""
    recomputed: Operations
    moved_bytes: float
    """Bytes that elementwise operations and norms read and write, forward and backward."""
    saved_bytes: float
    """Bytes that are kept from forward to backward."""
    table_bytes: float
    """Bytes that all blocks of one decoder on a stage keep once: the rotary tables."""
    working_bytes: float
    """The most that is held beyond that for a moment, in forward or backward."""
    boundary_bytes: float
    """The hidden state that a pipeline cut behind this layer sends."""
    tensor_collectives: int
    """All-reduces over the tensor-parallel ranks, forward and backward; an all-gather and a reduce-scatter are one."""
    tensor_bytes: float
    """Bytes that this rank sends for them."""
    context_bytes: float
    """Bytes that this rank sends to context-parallel ranks, forward and backward."""
    teacher_bytes: float = 0.0
    """Bytes of weights that DeepSpeed does not know; every rank has them whole, in the dtype of the products."""
    copied_parameters: int = 0
    """Frozen parameters of the embedding. A pipeline stage that has this layer but not the embedding holds a copy."""

    def seconds(self, speeds: Speeds) -> float:
        """Forward and backward on one device, messages not counted.

        Flash attention's backward computes the scores again: 10 operations per pair and channel, where model arithmetic
        counts 8.
        """
        products = self.forward.products + self.backward.products + self.recomputed.products
        attention = self.forward.attention + 1.25 * self.backward.attention + self.recomputed.attention
        return products / speeds.products + attention / speeds.attention + self.moved_bytes / speeds.memory


def linear(elements: float, tokens: float, trained: bool, path: bool) -> tuple[Operations, Operations]:
    """Forward and backward of a matrix of so many elements.

    Backward makes its own gradient if it trains, and its input's if anything before it trains.
    """
    forward = 2.0 * elements * tokens
    return Operations(forward), Operations(forward * (trained + path))


def norm_saved(width: int, precision: Precision, layer_norm: bool) -> float:
    """Bytes per token that a norm keeps: its input, and its statistics in fp32."""
    return precision.residual * width + (8 if layer_norm else 4)


def all_reduce_bytes(tensor_bytes: float, layout: Layout) -> float:
    """Bytes that a rank sends in a ring's all-reduce over the tensor-parallel ranks."""
    return 2.0 * (layout.tensor - 1) / layout.tensor * tensor_bytes
