"""ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054) through DeepSpeed's engine.

Stage 1 splits the moments over the ranks, stage 2 the gradients too, stage 3 the weights as well. DeepSpeed
is imported when a `ZeroParallel` is created.
"""

import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.config import ModelError
from models.logprobs import Scorer
from models.replicated import DistributedParallel, WeightState, get_trainable_weights, place_step_count

# Elements of a gradient bucket: 200 MB, where DeepSpeed's own 2 GB would crowd a small device.
_BUCKET_ELEMENTS = 50_000_000
# Elements up to which stage 3 keeps a weight whole on every rank, once it is gathered.
PERSISTENCE_THRESHOLD = 100_000


class ZeroParallel(DistributedParallel):
    """A DeepSpeed engine behind the interface of all strategies.

    The step is AdamW's on float32 masters, and gradients are summed over ranks in float32, so that results
    equal those of the other strategies. All weights compute in `precision`; in bfloat16, stage 1 sums the
    gradients of micro-batches in bfloat16.

    Args:
        groups: AdamW's parameter groups.
        settings: AdamW's lr, betas and eps.
        stage: 1, 2 or 3.
        offload: keep moments in main memory and step there (in stage 3 the weights' partitions too).
    """

    def __init__(
        self,
        scorer: Scorer,
        groups: list[dict[str, Any]],
        settings: dict[str, Any],
        device: torch.device,
        *,
        stage: int,
        offload: bool,
        precision: torch.dtype,
    ) -> None:
        deepspeed = _import_deepspeed(device)
        self.stage, self.sharded = stage, stage == 3
        config = _build_config(stage, offload=offload, precision=precision, device=device)
        if stage == 3:
            with torch.no_grad():
                for weight in get_trainable_weights(scorer).values():  # DeepSpeed casts them in other stages
                    weight.data = weight.to(precision)
            _partition_weights(deepspeed, scorer, device, config)
        if offload and device.type == "cuda":
            optimizer = _build_cpu_adam(deepspeed, groups, settings)
        else:
            optimizer = torch.optim.AdamW(groups, **settings, fused=device.type == "cuda" or None)
        super().__init__(scorer, optimizer, device)
        self._weights = get_trainable_weights(scorer)
        self._engine = deepspeed.initialize(model=scorer, optimizer=optimizer, config=config)[0]
        if stage == 3:
            # Gathered once for the scorer's whole pass: no submodule's forward gathers the weights that the
            # chunked head reads.
            for weight in scorer.head_weights:
                deepspeed.zero.register_external_parameter(scorer, weight)
            scorer.synchronize_chunk_counts(self._reduce_max)
            scorer.equalize_passes()
        self._zero = self._engine.optimizer
        self.module = self._engine
        self._initialize_moments()

    @contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        """See `Parallel`."""
        self._engine.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        """See `Parallel`."""
        self._engine.backward(loss)

    def clip_gradients(self, max_norm: float | None) -> Tensor:
        """See `Parallel`; DeepSpeed scales the gradients when it steps."""
        self._zero.clip_grad = 0.0 if max_norm is None else max_norm
        if self.stage == 3:
            from deepspeed.utils import safe_get_local_grad

            parts = torch.stack([safe_get_local_grad(w).norm() for w in self._weights.values()])
            return self.all_reduce_sum(parts.square().sum()).sqrt()
        norm = torch.as_tensor(self._zero.scaled_global_norm(), dtype=torch.float32, device=self.device)
        # DeepSpeed reports -1 for a norm that is not finite.
        return torch.where(norm >= 0, norm, float("inf"))

    def step(self) -> None:
        """See `Parallel`."""
        self._engine.step()

    def zero_grad(self) -> None:
        """See `Parallel`."""
        self._zero.zero_grad()

    def _get_trainable_weights(self) -> dict[str, nn.Parameter]:
        return self._weights

    def _get_full_shape(self, weight: nn.Parameter) -> torch.Size:
        return torch.Size(getattr(weight, "ds_shape", weight.shape))

    def _gather_state(self, weight: nn.Parameter, moments: bool) -> WeightState:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        state = {"weight": safe_get_full_fp32_param(weight)}
        steps = self.optimizer.state[self._partitions[0]]["step"]
        if moments and steps:
            state |= {m: safe_get_full_optimizer_state(weight, m) for m in ("exp_avg", "exp_avg_sq")}
            state["step"] = torch.tensor(float(steps))
        return {key: value.detach() for key, value in state.items()}

    def _restore_weight(self, weight: nn.Parameter, state: Mapping[str, Tensor]) -> None:
        from deepspeed import zero
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        if self.stage == 3:
            with zero.GatheredParameters([weight], modifier_rank=0):
                if self.rank == 0:
                    weight.copy_(state["weight"])
            safe_set_local_fp32_param(weight, self._slice_partition(weight, state["weight"]))
        else:
            weight.copy_(state["weight"])
            safe_set_full_fp32_param(weight, state["weight"])
        if "step" in state:
            self._restore_moments(weight, state)

    def _restore_moments(self, weight: nn.Parameter, state: Mapping[str, Tensor]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        for partition in self._partitions:  # one count for all weights
            moments = self.optimizer.state[partition]
            plain = isinstance(moments["step"], Tensor)
            moments["step"] = (
                place_step_count(self.optimizer, state, self.device) if plain else int(state["step"])
            )
        for moment in ("exp_avg", "exp_avg_sq"):
            if self.stage == 3:
                safe_set_local_optimizer_state(weight, self._slice_partition(weight, state[moment]), moment)
            else:
                safe_set_full_optimizer_state(weight, state[moment], moment)

    def _reduce_max(self, count: int) -> int:
        """Return the largest of the ranks' counts."""
        largest = torch.tensor(count, device=self.device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return int(largest)

    @property
    def _partitions(self) -> list[Tensor]:
        """The flat float32 masters that AdamW steps: one per parameter group, or several in stage 3."""
        zero = self._zero
        found: list[Tensor] = (
            zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups
        )
        return found

    def _initialize_moments(self) -> None:
        """Create moments of zero and link each weight to its own.

        DeepSpeed does so after the first step, but then only for the first parameter group.
        """
        plain = isinstance(self.optimizer, torch.optim.AdamW)
        for partition in self._partitions:
            state = self.optimizer.state[partition]
            state["step"] = (
                place_step_count(self.optimizer, {"step": torch.tensor(0.0)}, self.device) if plain else 0
            )
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(partition), torch.zeros_like(partition)
        if self.stage != 3:
            self._zero._lazy_init_hp_params_optimizer_state()

    def _slice_partition(self, weight: nn.Parameter, whole: Tensor) -> Tensor:
        """Return this rank's part of a whole tensor as stage 3 partitions it: flat, the last one padded."""
        size = weight.ds_tensor.numel()  # type: ignore[attr-defined]
        part = whole.new_zeros(size)
        mine = whole.flatten()[self.rank * size : (self.rank + 1) * size]
        part[: len(mine)] = mine
        return part


def _import_deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed, set the device that it uses and silence its log."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # DeepSpeed reads here which of the visible devices this process uses.
    os.environ["LOCAL_RANK"] = str(device.index or 0)
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.ERROR)
    # DeepSpeed calls functions that torch has deprecated.
    warnings.filterwarnings("ignore", message="`torch.distributed.*is deprecated", category=FutureWarning)
    import deepspeed

    logger.setLevel(logging.ERROR)
    if device.type == "cpu":
        # Shared memory between the ranks of a machine is faster, but is compiled at first use, for a minute.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _build_cpu_adam(
    deepspeed: Any, groups: list[dict[str, Any]], settings: dict[str, Any]
) -> torch.optim.Optimizer:
    try:
        optimizer: torch.optim.Optimizer = deepspeed.ops.adam.DeepSpeedCPUAdam(groups, **settings)
    except (RuntimeError, OSError, ImportError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ModelError(
            f"offload with deepspeed compiles its CPU Adam, which failed here ({reason}); install g++ and "
            "Python's headers on the nodes, or use strategy: fsdp, which compiles nothing"
        ) from error
    return optimizer


def _build_config(
    stage: int, *, offload: bool, precision: torch.dtype, device: torch.device
) -> dict[str, Any]:
    memory = {"device": "cpu", "pin_memory": device.type == "cuda"}
    split: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket_size": _BUCKET_ELEMENTS,
        "allgather_bucket_size": _BUCKET_ELEMENTS,
        "stage3_param_persistence_threshold": PERSISTENCE_THRESHOLD,
        # It would replace torch's own linear function for the whole process.
        "memory_efficient_linear": False,
    }
    if offload:
        split["offload_optimizer"] = memory
    if offload and stage == 3:
        split["offload_param"] = memory
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": split,
        "zero_force_ds_cpu_optimizer": False,
        "communication_data_type": "fp32",
        "bf16": {"enabled": precision == torch.bfloat16},
        # In stage 1 DeepSpeed would take another optimizer, which cannot be inspected like the others.
        "data_types": {"grad_accum_dtype": "fp32" if stage > 1 or precision == torch.float32 else "bf16"},
    }


def _partition_weights(deepspeed: Any, scorer: Scorer, device: torch.device, config: dict[str, Any]) -> None:
    """Partition the weights for stage 3; whole weights pass through `device` one at a time."""
    deepspeed.init_distributed(dist_backend=dist.get_backend())
    # DeepSpeed would round buffers too, and rotary frequencies with them.
    buffers = [(module, *item) for module in scorer.modules() for item in module.named_buffers(recurse=False)]
    buffers = [(module, name, buffer.clone()) for module, name, buffer in buffers]
    deepspeed.zero.Init(module=scorer, config_dict_or_path=config)
    for module, name, buffer in buffers:
        setattr(module, name, buffer.to(device))
