"""All of DeepSpeed's undocumented names that are in use: each must still exist, and no unlisted one may be used.

After an upgrade of DeepSpeed, read this test first.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import deepspeed
import pytest
import torch

REPOSITORY = Path(__file__).parents[3]
ENGINE = REPOSITORY / "megatron_haplovl" / "engine"

_ENGINE = "deepspeed.runtime.engine:DeepSpeedEngine"
_PIPELINE = "deepspeed.runtime.pipe.engine:PipelineEngine"
_ZERO_1_2 = "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer"
_ZERO_3 = "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3"
_FRAGMENT = "deepspeed.utils.tensor_fragment:tensor_fragment"
_SCHEDULE = "deepspeed.runtime.pipe.schedule"

INTERNALS = [
    ("deepspeed.ops", "__compatible_ops__"),
    (_ENGINE, "_take_model_step"),
    (_ENGINE, "basic_optimizer"),
    (_ENGINE, "bfloat16_enabled"),
    (_ENGINE, "global_steps"),
    (_ENGINE, "micro_steps"),
    (_ENGINE, "set_train_batch_size"),
    (_ENGINE, "skipped_steps"),
    (_ENGINE, "train_batch_size"),
    (_ENGINE, "zero_grad"),
    (_ENGINE, "zero_optimization_stage"),
    (_PIPELINE, "_allocate_or_extend_buffers"),
    (_PIPELINE, "_exec_optimizer_step"),
    (_PIPELINE, "_INSTRUCTION_MAP"),
    (_PIPELINE, "set_train_batch_size"),
    (_ZERO_1_2, "_update_scale"),
    (_ZERO_1_2, "_wait_for_offload_copies"),
    (_ZERO_1_2, "averaged_gradients"),
    (_ZERO_1_2, "check_grad_overflow"),
    (_ZERO_1_2, "cpu_offload"),
    (_ZERO_1_2, "has_overflow"),
    (_ZERO_1_2, "single_partition_of_fp32_groups"),
    ("deepspeed.runtime.bf16_optimizer:BF16_Optimizer", "fp32_groups_flat_partition"),
    ("deepspeed.runtime.bf16_optimizer:BF16_Optimizer", "fp32_groups_gradient_flat_partition"),
    (_ZERO_3, "_get_norm_groups"),
    (_ZERO_3, "_update_scale"),
    (_ZERO_3, "averaged_gradients"),
    (_ZERO_3, "fp32_partitioned_groups_flat"),
    (_ZERO_3, "get_param_id"),
    (_ZERO_3, "grad_position"),
    (_ZERO_3, "offload_optimizer"),
    (_ZERO_3, "offload_param"),
    ("deepspeed.runtime.zero.partition_parameters", "ds_numel"),
    ("deepspeed.runtime.zero.partition_parameters", "ds_tensor"),
    ("deepspeed.utils.mixed_precision_linkage", "_hp_mapping"),
    (_FRAGMENT, "hp_fragment_address"),
    (_FRAGMENT, "lp_fragment_address"),
    (_FRAGMENT, "param_group_index"),
    ("deepspeed.utils.tensor_fragment:fragment_address", "numel"),
    ("deepspeed.utils.tensor_fragment:fragment_address", "start"),
    ("deepspeed.utils.groups", "mpu"),
    ("deepspeed.runtime.pipe.topology", "PipeModelDataParallelTopology"),
    (_SCHEDULE, "BackwardPass"),
    (_SCHEDULE, "ForwardPass"),
    (_SCHEDULE, "OptimizerStep"),
    (_SCHEDULE, "TrainSchedule"),
    ("deepspeed.runtime.utils", "partition_balanced"),
    ("deepspeed.runtime.utils", "partition_uniform"),
]
"""Where a name is defined or assigned, and the name: classes, attributes and globals that are not documented."""

PARAMETERS = [
    (_ENGINE, "backward", "scale_wrt_gas"),
    (_PIPELINE, "eval_batch", "bcast_loss"),
    (_PIPELINE, "eval_batch", "num_micro_batches"),
    (_PIPELINE, "eval_batch", "reduce_output"),
    ("deepspeed.runtime.pipe.topology:PipeModelDataParallelTopology", "__init__", "num_dp"),
    ("deepspeed.runtime.pipe.topology:PipeModelDataParallelTopology", "__init__", "num_mp"),
    ("deepspeed.runtime.pipe.topology:PipeModelDataParallelTopology", "__init__", "num_pp"),
]
"""A class, its method, and a parameter that is given by name and is not documented."""

ASKED_FOR = [
    ("deepspeed.runtime.utils", "tensor_model_parallel"),
    ("deepspeed.runtime.engine", "get_data_parallel_world_size"),
    ("deepspeed.runtime.engine", "get_model_parallel_rank"),
    ("deepspeed.utils.groups", "get_data_parallel_group"),
    ("deepspeed.utils.groups", "get_data_parallel_group_ranks"),
    ("deepspeed.runtime.engine", "get_data_parallel_rank"),
    ("deepspeed.utils.groups", "get_model_parallel_world_size"),
    ("deepspeed.runtime.zero.stage_1_and_2", "get_model_parallel_group"),
]
"""Where DeepSpeed asks for a name of ours: the mark on a slice of a parameter, and the methods of its `mpu`."""

DOCUMENTED = {
    "backward",
    "destroy",
    "eval",
    "eval_batch",
    "get_global_grad_norm",
    "gradient_accumulation_steps",
    "optimizer",
    "step",
    "train",
    "train_batch",
}
"""Other attributes of an engine that may be used."""


def users(name: str) -> str:
    """The files that use a name."""
    paths = [*ENGINE.glob("*.py"), *(REPOSITORY / "megatron_haplovl" / "parallel").glob("*.py")]
    paths += [path for path in (REPOSITORY / "tests").rglob("*.py") if path != Path(__file__)]
    word = re.compile(rf"\b{name}\b")
    found = [str(path.relative_to(REPOSITORY)) for path in sorted(paths) if word.search(path.read_text("utf-8"))]
    assert found, f"nothing uses DeepSpeed's {name} any more; take it off this list"
    return ", ".join(found)


def complaint(owner: str, what: str, name: str) -> str:
    return f"DeepSpeed {deepspeed.__version__}: {owner} {what} {name}, which {users(name)} needs"


@pytest.mark.parametrize(("owner", "name"), INTERNALS)
def test_deepspeed_still_has(owner: str, name: str) -> None:
    sentence = complaint(owner, "has no", name)
    try:
        place = resolve_name(owner)
    except (ImportError, AttributeError) as error:
        raise AssertionError(sentence) from error
    assigned = re.compile(rf"^\s*(\w+\.)?{name}\s*(:|=(?!=))", re.MULTILINE)
    assert hasattr(place, name) or assigned.search(inspect.getsource(place)), sentence


@pytest.mark.parametrize(("owner", "method", "name"), PARAMETERS)
def test_deepspeed_still_takes(owner: str, method: str, name: str) -> None:
    # The source and not the signature, which DeepSpeed's decorators hide.
    head = re.search(rf"def {method}\((.*?)\):", inspect.getsource(resolve_name(owner)), re.DOTALL)
    taken = set() if head is None else set(re.findall(r"\w+", head[1]))
    assert name in taken, complaint(f"{owner}.{method}", "takes no", name)


@pytest.mark.parametrize(("module", "name"), ASKED_FOR)
def test_deepspeed_still_asks_for(module: str, name: str) -> None:
    asked = re.compile(rf"\.{name}\b")
    assert asked.search(inspect.getsource(resolve_name(module))), complaint(module, "does not ask for", name)


def uses(tree: ast.AST) -> Iterator[tuple[int, str, str]]:
    """Line, what something is called, and the attribute of it that is used."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            base, name = node.value, node.attr
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in ("getattr", "hasattr", "setattr")
            and isinstance(node.args[1], ast.Constant)
        ):
            base, name = node.args[0], str(node.args[1].value)
        else:
            continue
        words = ast.unparse(base).split(".")
        if "config" not in words:
            yield node.lineno, words[-1].strip("_"), name


@pytest.mark.parametrize("path", sorted(ENGINE.glob("*.py")), ids=lambda path: path.name)
def test_nothing_else_is_used(path: Path) -> None:
    listed = {name for _, name in (*INTERNALS, *ASKED_FOR)}
    parameter: Any = torch.nn.Parameter(torch.zeros(1))
    known = {
        "engine": DOCUMENTED,
        "optimizer": set(dir(torch.optim.AdamW([parameter]))),
        "parameter": set(dir(parameter)),
        "mapping": set(),
    }
    for line, called, name in uses(ast.parse(path.read_text("utf-8"))):
        assert called not in known or name in known[called] | listed, (
            f"{path.relative_to(REPOSITORY)}:{line} uses .{name} of DeepSpeed's {called}; list it in {__file__}"
        )
