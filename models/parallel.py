"""One small interface to an optimizer step, for any number of processes and every parallel strategy.

The training step is the same code for all: `with parallel.accumulate(last): ...; parallel.backward(loss)` per
micro-batch, then gradient clipping, `step` and `zero_grad`. Gradients are averaged over ranks, so a loss
that is a sum over the global batch is multiplied by `world_size` first. Float32 masters and AdamW are the
same for all strategies, and so are the steps; state saved under one strategy can be restored under another.

In bfloat16 a policy computes with bfloat16 weights, as a frozen reference does, and AdamW steps their float32
masters.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from models.config import ModelError
from models.fsdp import ShardedParallel, shard_scorer
from models.logprobs import Scorer, get_causal_model
from models.replicated import (
    Parallel,
    ReplicatedParallel,
    ensure_process_group,
    get_trainable_weights,
    raise_on_all_ranks,
)
from models.zero import ZeroParallel

__all__ = [
    "Parallel",
    "ReplicatedParallel",
    "ShardedParallel",
    "Strategy",
    "ZeroParallel",
    "get_trainable_weights",
    "has_sharded_weights",
    "prepare_parallel",
    "raise_on_all_ranks",
]

Strategy = Literal["ddp", "fsdp", "deepspeed"]


def prepare_parallel(
    scorer: Scorer,
    *,
    strategy: Strategy = "ddp",
    zero_stage: int = 2,
    offload: bool = False,
    precision: torch.dtype = torch.float32,
    device: torch.device,
    learning_rate: float,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> Parallel:
    """Make `scorer` trainable by the ranks of the default process group, or by this process alone.

    AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101); biases and norms are not decayed.

    Args:
        scorer: already on `device`, or on the CPU if `has_sharded_weights`.
        strategy: ddp; fsdp (torch's `fully_shard`); deepspeed (ZeRO), also for one process.
        zero_stage: of deepspeed, 1 to 3.
        offload: with fsdp and deepspeed, keep what is sharded in main memory and step there.
        precision: dtype that the trained weights, loaded as float32 masters, compute in.
        device: the device that this process computes on.

    Raises:
        ModelError: there is nothing to train, or the model cannot be trained with these settings.
    """
    trained = get_trainable_weights(scorer)
    if not trained:
        raise ModelError("the policy has no weight to train; load it with trainable=True")
    _refuse_flex_on_cpu(scorer, device)
    settings: dict[str, Any] = {"lr": learning_rate, "betas": betas, "eps": eps}
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if strategy == "deepspeed":
        _refuse_quantized(scorer, split=zero_stage == 3)
        ensure_process_group(device)
        groups = _build_parameter_groups(trained, weight_decay)
        return ZeroParallel(
            scorer, groups, settings, device, stage=zero_stage, offload=offload, precision=precision
        )
    split = strategy == "fsdp" and (several or offload)
    replicated = not split and precision != torch.float32
    if split:
        _refuse_quantized(scorer, split=True)
    if split or replicated:
        ensure_process_group(device)
        shard_scorer(scorer, device=device, offload=offload, replicated=replicated, precision=precision)
        if split:
            scorer.equalize_passes()
        trained = get_trainable_weights(scorer)
    fused = (device.type == "cuda" and not (split and offload)) or None
    optimizer = torch.optim.AdamW(_build_parameter_groups(trained, weight_decay), **settings, fused=fused)
    if split or replicated:
        return ShardedParallel(scorer, optimizer, device, replicated=replicated)
    return (ReplicatedParallel if several else Parallel)(scorer, optimizer, device)


def has_sharded_weights(strategy: Strategy, zero_stage: int, *, workers: int, offload: bool = False) -> bool:
    """Return whether weights are sharded or offloaded, and so must be loaded into main memory first."""
    if strategy == "deepspeed":
        return zero_stage == 3
    return strategy == "fsdp" and (workers > 1 or offload)


def _build_parameter_groups(trained: Mapping[str, nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Build AdamW's parameter groups: matrices decay, biases and norms do not."""
    groups: list[dict[str, Any]] = [
        {"params": [w for w in trained.values() if w.dim() >= 2], "weight_decay": weight_decay},
        {"params": [w for w in trained.values() if w.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _refuse_quantized(scorer: Scorer, *, split: bool) -> None:
    if split and getattr(get_causal_model(scorer.model), "is_quantized", False):
        raise ModelError(
            "quantised weights cannot be split over workers; set quantization: none, or parallel.strategy: "
            "ddp (or deepspeed with zero_stage 1 or 2)"
        )


def _refuse_flex_on_cpu(scorer: Scorer, device: torch.device) -> None:
    if (
        device.type == "cpu"
        and get_causal_model(scorer.model).config._attn_implementation == "flex_attention"
    ):
        raise ModelError(
            "attention: flex has no backward pass on a CPU; set attention: sdpa, or train on a GPU"
        )
