"""How fast machines compute and send: a GPU's data sheet with the shares assumed to be reached, and a measured CPU.

Where a pipeline is cut depends on the ratios of these figures only; the planner's times depend on the figures.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_haplovl.planning.cost_units import Speeds

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The speeds that one rank's device reaches, and its network in one direction, in bytes per second."""

    speeds: Speeds
    gpus_per_node: int
    intra_node: float
    inter_node: float
    intra_hop: float
    """Seconds that a step of a ring takes beside sending its bytes."""
    inter_hop: float

    def bandwidth(self, stride: int, size: int) -> float:
        """Bytes per second of a rank in a group of `size` ranks, `stride` apart, in an exchange with any of them."""
        return self.intra_node if stride * size <= self.gpus_per_node else self.inter_node

    def ring_latency(self, stride: int, size: int) -> float:
        """Seconds that a ring's all-gather or reduce-scatter of zero bytes takes; an all-reduce takes twice that."""
        nodes = max(1, stride * size // self.gpus_per_node)
        borders = nodes if nodes > 1 else 0
        return (size - 1 - min(borders, size - 1)) * self.intra_hop + borders * self.inter_hop


@dataclass(frozen=True, kw_only=True)
class Cluster(Machine):
    """`gpus` machines of one kind, and what the planner must know of them."""

    gpus: int
    memory: float
    """Bytes that a rank may use: the GPU's, less CUDA's context, NCCL's buffers and fragmentation."""
    peak: float
    """bf16 operations per second of the data sheet, without sparsity. MFU is a share of this."""
    overlap: float
    """Share of ZeRO 3's messages that can pass beside arithmetic; nothing else is overlapped."""
    host_link: float
    """Bytes per second between a GPU and its host, for what is offloaded."""
    host_memory: float
    """A rank's share of its host's memory bandwidth."""


@dataclass(frozen=True)
class DataSheet:
    """A GPU and its network, and the shares that are assumed to be reached. The defaults are nodes of eight H100 SXM;
    `docs/reports/parallelism_plans.md` says where each figure comes from. Nothing here was measured."""

    gpus_per_node: int = 8
    memory_gib: float = 79.0
    reserved_gib: float = 6.0
    peak_tflops: float = 989.0
    memory_gb_per_second: float = 3350.0
    intra_node_gb_per_second: float = 450.0
    inter_node_gb_per_second: float = 50.0
    intra_hop_microseconds: float = 1.3
    inter_hop_microseconds: float = 8.0
    efficiency: float = 0.55
    attention_efficiency: float = 0.35
    overlap: float = 0.8
    host_link_gb_per_second: float = 64.0
    host_memory_gb_per_second: float = 76.0
    bandwidth_efficiency: float = 0.75

    def cluster(self, gpus: int) -> Cluster:
        """The cluster with the speeds that are reached."""
        peak, bandwidth = 1e12 * self.peak_tflops, 1e9 * self.bandwidth_efficiency
        return Cluster(
            gpus=gpus,
            gpus_per_node=self.gpus_per_node,
            memory=(self.memory_gib - self.reserved_gib) * GIB,
            peak=peak,
            speeds=Speeds(
                products=self.efficiency * peak,
                attention=self.attention_efficiency * peak,
                memory=bandwidth * self.memory_gb_per_second,
            ),
            intra_node=bandwidth * self.intra_node_gb_per_second,
            inter_node=bandwidth * self.inter_node_gb_per_second,
            intra_hop=1e-6 * self.intra_hop_microseconds,
            inter_hop=1e-6 * self.inter_hop_microseconds,
            overlap=self.overlap,
            host_link=bandwidth * self.host_link_gb_per_second,
            host_memory=bandwidth * self.host_memory_gb_per_second,
        )


# What the device calls itself -> bf16 TFLOP/s of its data sheet, dense. The first name that fits counts.
_PEAKS = (
    ("B200", 2250.0),
    ("GH200", 989.0),
    ("H200", 989.0),
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.0),
    ("H800", 989.0),
    ("H20", 148.0),
    ("A100", 312.0),
    ("A800", 312.0),
    ("L40S", 362.0),
    ("L4", 121.0),
)


def peak_operations(device_name: str) -> float | None:
    """bf16 operations per second that a GPU's data sheet promises, without sparsity; None for one that is not known.

    Args:
        device_name: what the device calls itself, such as `NVIDIA H100 80GB HBM3`.
    """
    words = device_name.split()
    if "MIG" in words:  # A part of a GPU.
        return None
    for name, peak in _PEAKS:
        first, *rest = name.split()
        if any(word == first or word.startswith(f"{first}-") for word in words) and all(word in words for word in rest):
            return 1e12 * peak
    return None


# Keys: whether products are in bf16. These rates come closest to the times of the layers in
# `benchmarks/pipeline_balance.py` at an eighth and at a quarter of haplovl-7b's widths, on one core of an Intel Xeon
# (Sapphire Rapids, AMX) with torch 2.13, 2026-11-22. They meet the ratio of a pre-decoder block to a post-decoder block
# within 6 % in fp32 and within 15 % in bf16. gloo's rates are those between two processes there.
_CPU_SPEEDS = {
    False: Speeds(products=160e9, attention=65e9, memory=5.5e9),
    True: Speeds(products=1000e9, attention=82e9, memory=3.5e9),
}
_GLOO_BANDWIDTH, _GLOO_HOP = 1.6e9, 5e-5


def machine_of(device: str, bf16: bool) -> Machine:
    """The machine that a pipeline is cut for.

    Args:
        device: `cuda` (any GPU: nodes of eight H100) or `cpu` (gloo on one machine).
        bf16: whether products are in bf16. That makes a CPU's products much faster, but not its elementwise operations.

    Raises:
        ValueError: another device.
    """
    match device:
        case "cuda":
            return DataSheet().cluster(gpus=8)
        case "cpu":
            return Machine(
                speeds=_CPU_SPEEDS[bf16],
                gpus_per_node=2**16,
                intra_node=_GLOO_BANDWIDTH,
                inter_node=_GLOO_BANDWIDTH,
                intra_hop=_GLOO_HOP,
                inter_hop=_GLOO_HOP,
            )
        case _:
            raise ValueError(f"the speed of device {device!r} is not known; a pipeline is cut for cuda or cpu")
