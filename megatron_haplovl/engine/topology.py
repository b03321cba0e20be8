"""The process groups in the form in which DeepSpeed asks for them."""

from __future__ import annotations

import torch.distributed as dist

from megatron_haplovl.parallel.groups import ParallelGroups


class DeepSpeedTopology:
    """The groups under the names by which DeepSpeed asks for them (its `mpu` argument)."""

    def __init__(self, groups: ParallelGroups) -> None:
        self._groups = groups

    def get_model_parallel_group(self) -> dist.ProcessGroup | None:
        """Ranks that share each layer's weights."""
        return self._groups.tensor.process_group

    def get_model_parallel_rank(self) -> int:
        """Place among them."""
        return self._groups.tensor.rank

    def get_model_parallel_world_size(self) -> int:
        """Their number."""
        return self._groups.tensor.size

    def get_data_parallel_group(self) -> dist.ProcessGroup | None:
        """Ranks that hold the same weights."""
        return self._groups.replicas.process_group

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Their global ranks."""
        return list(self._groups.replicas.ranks)

    def get_data_parallel_rank(self) -> int:
        """Place among them."""
        return self._groups.replicas.rank

    def get_data_parallel_world_size(self) -> int:
        """Their number."""
        return self._groups.replicas.size
