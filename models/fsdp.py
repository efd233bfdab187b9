"""Fully sharded data parallelism: torch's `fully_shard` (FSDP2; Zhao et al. 2023, arXiv:2304.11277).

It also serves replicated policies that compute in bfloat16: `fully_shard` keeps float32 masters, casts a
layer's weights for its forward and backward pass, and sums gradients in float32.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from models.logprobs import Scorer, get_causal_model
from models.replicated import DistributedParallel, WeightState, get_trainable_weights, place_step_count


class ShardedParallel(DistributedParallel):
    """FSDP: every rank has one shard of each weight, gradient and moment.

    Weights are gathered one decoder layer at a time. The scorer is the root: embeddings, last norm and lm
    head are whole while its forward and backward pass run, so the chunked head reads a plain weight. Each
    micro-batch's gradients are reduced at once, because whole gradients do not fit into memory.

    Args:
        replicated: every rank has all shards, so that no forward pass is a collective, and gradients are
            summed over ranks once in a step.
    """

    def __init__(
        self, scorer: Scorer, optimizer: torch.optim.Optimizer, device: torch.device, *, replicated: bool
    ) -> None:
        super().__init__(scorer, optimizer, device)
        self._weights = get_trainable_weights(scorer)
        self._replicated, self.sharded = replicated, not replicated

    @contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        """See `Parallel`."""
        if self._replicated:
            assert isinstance(self.module, FSDPModule)
            self.module.set_requires_all_reduce(last)
        yield

    def clip_gradients(self, max_norm: float | None) -> Tensor:
        """See `Parallel`."""
        gradients = [_to_local(w.grad) for w in self._weights.values() if w.grad is not None]
        squares = torch.nn.utils.get_total_norm(gradients).to(self.device).square()
        norm = (squares if self._replicated else self.all_reduce_sum(squares)).sqrt()
        if max_norm is not None:
            scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
            for gradient in gradients:
                gradient.mul_(scale.to(gradient.device))
        return norm

    def make_weights_whole(self) -> None:
        """See `Parallel`."""
        for module in self.scorer.modules():
            if isinstance(module, FSDPModule):
                module.unshard()

    def _get_trainable_weights(self) -> dict[str, nn.Parameter]:
        return self._weights

    def _gather_state(self, weight: nn.Parameter, moments: bool) -> WeightState:
        state = super()._gather_state(weight, moments)
        return {key: _gather_full_tensor(value, self.device) for key, value in state.items()}

    def _restore_weight(self, weight: nn.Parameter, state: Mapping[str, Tensor]) -> None:
        self._copy_shard(weight, state["weight"])
        if "step" in state:
            self.optimizer.state[weight] = moments = {
                "step": place_step_count(self.optimizer, state, self.device),
                "exp_avg": torch.zeros_like(weight),
                "exp_avg_sq": torch.zeros_like(weight),
            }
            self._copy_shard(moments["exp_avg"], state["exp_avg"])
            self._copy_shard(moments["exp_avg_sq"], state["exp_avg_sq"])

    def _copy_shard(self, shard: Tensor, whole: Tensor) -> None:
        """Copy this rank's part of the whole tensor into its shard."""
        assert isinstance(shard, DTensor)
        part = distribute_tensor(
            whole.to(self.device), shard.device_mesh, shard.placements, src_data_rank=None
        )
        shard.to_local().copy_(part.to_local())


def shard_scorer(
    scorer: Scorer, *, device: torch.device, offload: bool, replicated: bool, precision: torch.dtype
) -> None:
    """Shard the scorer's weights over the default process group, in place, and move the shards to `device`.

    Whole weights pass through `device` one decoder layer at a time.

    Args:
        scorer: with weights in the dtype of their masters.
        device: of this process.
        offload: keep the shards in main memory, where AdamW steps.
        replicated: give every rank all shards, and leave frozen weights alone.
        precision: dtype that the trained weights are cast to for their forward and backward pass.
    """
    ranks = dist.get_world_size()
    mesh = (
        init_device_mesh(device.type, (ranks, 1), mesh_dim_names=("replicas", "shards"))
        if replicated
        else init_device_mesh(device.type, (ranks,))
    )
    settings: dict[str, Any] = {
        "mesh": mesh,
        "offload_policy": CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else OffloadPolicy(),
        # The root is resharded between passes too: a LoRA adapter that is disabled and enabled there, and
        # weights that are restored, must find shards.
        "reshard_after_forward": True,
    }
    if replicated:
        settings["ignored_params"] = {weight for weight in scorer.parameters() if not weight.requires_grad}
    if precision != torch.float32:
        # A model loaded in that precision casts its inputs itself, some of them not at all.
        settings["mp_policy"] = MixedPrecisionPolicy(
            param_dtype=precision, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    for module in (*_iterate_layers(get_causal_model(scorer.model)), scorer):
        fully_shard(module, **settings)
    for method in (Scorer.compute_logits, Scorer.generate):
        register_fsdp_forward_method(scorer, method.__name__)


def _iterate_layers(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the decoder's layers: the entries of the outermost module lists."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from _iterate_layers(child)


def _to_local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _gather_full_tensor(tensor: Tensor, device: torch.device) -> Tensor:
    """Gather a sharded tensor on `device`, because there are no collectives over shards in main memory."""
    if not isinstance(tensor, DTensor):
        return tensor
    there = DTensor.from_local(
        tensor.to_local().to(device),
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )
    return there.full_tensor()
