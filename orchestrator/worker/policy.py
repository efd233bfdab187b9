"""The policy that a worker trains: load the initial policy, make it parallel, export it at the end."""

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from models.adapters import disable_adapter, find_adapter
from models.config import ModelConfig, ModelError
from models.load import export_model, load_model, load_tokenizer, locate_model
from models.logprobs import Scorer, SequenceScores
from models.merge import copy_in_float32, merge_and_round
from models.parallel import (
    Parallel,
    get_trainable_weights,
    has_sharded_weights,
    prepare_parallel,
    raise_on_all_ranks,
)
from models.probe import LogitProbe, build_probe_rows, compute_probe_logits
from models.rows import Rows
from orchestrator.config.run import RunConfig
from orchestrator.files import write_digests

# Nats per token between a policy's logits in half precision and in float32. On SmolLM2-135M they are 0.003 in
# bfloat16, 0.005 with weights of 4 bits, 0.05 with activations of 8 bits; a misplaced matrix gives several.
_HALF_PRECISION_NATS = 0.5
# Dense bfloat16 matrix FLOP/s as the vendor states them, for model FLOPs utilisation.
# The first name that the device's contains counts.
_PEAK_BFLOAT16 = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "A10G": 70e12,
    "L4": 121e12,
}


@dataclass(frozen=True)
class Policy:
    """A policy ready to train.

    Attributes:
        parallel: scorer, optimizer and communication.
        load_initial_policy: loads another copy of the initial policy, trainable, on the CPU.
        tokenizer: the policy's own.
        precision: dtype that the policy computes in.
        plain_rows_reason: why a prompt is computed once per response instead of once per pair, if it is.
        pad_id: token id that pads rows; padding is masked by spans, never by its id.
        peak_flops: FLOP/s of the device in `precision`, where known.
    """

    parallel: Parallel
    load_initial_policy: Callable[[], PreTrainedModel | PeftModel]
    tokenizer: Any
    precision: torch.dtype
    plain_rows_reason: str | None
    pad_id: int
    peak_flops: float | None

    @property
    def scorer(self) -> Scorer:
        """The policy's scorer without the communication wrapped around it."""
        return self.parallel.scorer

    def score_initial_policy(self, rows: Rows) -> SequenceScores:
        """Score rows under the initial policy: the adapter switched off, no gradient."""
        with disable_adapter(self.scorer.model):
            return self.scorer(rows, entropy=True)

    def count_flops(self, rows: Rows) -> float:
        """Count the model FLOPs of a training step: backward costs twice the forward, or once with LoRA."""
        passes = 2 if find_adapter(self.scorer) is not None else 3
        return passes * self.scorer.estimate_forward_flops(rows)


def open_policy(
    config: RunConfig, initial_policy: ModelConfig, *, device: torch.device, local_workers: int
) -> Policy:
    """Load the initial policy and make it trainable.

    Args:
        config: the run file.
        initial_policy: its settings, pinned; it is located on this node.
        device: this worker's. Weights to be sharded are read into main memory, and only the shards are moved
            to the device.
        local_workers: workers on this machine, which share its cores.

    Raises:
        ModelError: the model cannot be loaded or trained; every rank raises it.
    """
    if device.type == "cpu":
        torch.set_num_threads(max(1, _count_cores() // local_workers))
    training, parallel = config.training, config.parallel
    # The dtype depends on the device that the policy runs on, also where it is loaded on the CPU.
    dtype = config.policy_model.resolve_dtype(device.type)
    settings, precision = config.policy.model_copy(update={"dtype": dtype}), getattr(torch, dtype)
    in_shards = has_sharded_weights(
        parallel.strategy, parallel.stage, workers=parallel.workers, offload=parallel.offload
    )
    with raise_on_all_ranks(device):
        try:
            located = locate_model(initial_policy)
            load = partial(load_model, located, settings, trainable=True, seed=training.seed)
            model = load(
                device=torch.device("cpu") if in_shards else device,
                activation_checkpointing=training.gradient_checkpointing,
            )
            scorer, tokenizer = Scorer(model), load_tokenizer(located, config.policy)
        except ModelError as error:
            raise ModelError(f"policy: {error}") from error
    plain_rows_reason = (
        "policy.prefix_sharing is off"
        if config.policy.prefix_sharing == "off"
        else scorer.prefix_sharing_unavailable_reason
    )
    return Policy(
        parallel=prepare_parallel(
            scorer,
            strategy=parallel.strategy,
            zero_stage=parallel.stage,
            offload=parallel.offload,
            precision=precision,
            device=device,
            learning_rate=training.learning_rate,
            weight_decay=training.weight_decay,
        ),
        load_initial_policy=partial(load, device=torch.device("cpu")),
        tokenizer=tokenizer,
        precision=precision,
        plain_rows_reason=plain_rows_reason,
        pad_id=0,
        peak_flops=_lookup_peak_flops(device, precision),
    )


def export_policy(policy: Policy, folder: Path, *, probes: Sequence[Sequence[int]]) -> None:
    """Write the trained policy, all or nothing: `model/`, with LoRA also `adapter/`, `probe.safetensors`.

    `SHA256SUMS` beside them has the digests of all files.

    Every rank calls it, rank 0 writes.

    `model/` loads in transformers as it is (LoRA merged). The probe holds the logits of the trained and of
    the initial policy on a few token rows, to compare them with those of a policy loaded later. Nothing can
    be trained after the export.

    Raises ModelError where the gathered weights are not those that the policy computes with.
    """
    device, rows = policy.parallel.device, build_probe_rows(probes)
    policy.scorer.eval()
    logits = policy.scorer.compute_logits(rows.to(device)).float().cpu()
    initial_logits = _reload_initial_logits(policy, rows)
    model = _gather_model(policy)
    if model is None:
        return
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    exact = copy_in_float32(model)
    if find_adapter(exact) is not None:
        export_model(exact, policy.tokenizer, part / "adapter")
        with disable_adapter(exact):
            initial_logits = compute_probe_logits(exact, rows)
    probe = LogitProbe(rows, logits, torch.float32, initial_logits)
    if policy.precision != torch.float32:
        probe = _replace_noisy_logits(probe, exact)
    probe.save(part / "probe.safetensors")
    export_model(merge_and_round(model, exact, probe, policy.precision), policy.tokenizer, part / "model")
    write_digests(part)
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


def _reload_initial_logits(policy: Policy, rows: Tensor) -> Tensor | None:
    """Compute on rank 0 the logits of the initial policy, of which a policy without adapter keeps no copy."""
    if find_adapter(policy.scorer) is not None:
        return None
    with raise_on_all_ranks(policy.parallel.device):
        return compute_probe_logits(policy.load_initial_policy(), rows) if policy.parallel.rank == 0 else None


def _replace_noisy_logits(probe: LogitProbe, exact: PreTrainedModel | PeftModel) -> LogitProbe:
    """Replace a policy's logits in half precision by those that float32 arithmetic gives with its weights.

    The former are noisier than a small change by training is large.

    Args:
        probe: with the policy's own logits.
        exact: a copy of the weights to be exported, in float32.

    Raises:
        ModelError: the copy is another model than the policy.
    """
    replaced = replace(probe, logits=compute_probe_logits(exact, probe.rows))
    if not (distance := replaced.measure_distance(probe.logits)) <= _HALF_PRECISION_NATS:
        raise ModelError(
            f"policy: the weights to be exported are {distance:.1g} nats per token from the policy that was "
            "trained, more than rounding; start the run again to export from its checkpoint, with precision: "
            "float32 if that repeats it"
        )
    return replaced


def _gather_model(policy: Policy) -> PreTrainedModel | PeftModel | None:
    """Return the whole trained model on rank 0, and None on the other ranks.

    Shards are gathered one weight at a time into a copy of the initial policy, which is all the memory it
    takes.
    """
    parallel = policy.parallel
    if not parallel.sharded:
        parallel.make_weights_whole()
        return policy.scorer.model if parallel.rank == 0 else None
    with raise_on_all_ranks(parallel.device):
        model = policy.load_initial_policy() if parallel.rank == 0 else None
    weights = {} if model is None else get_trainable_weights(model)
    with torch.no_grad():
        for name, state in parallel.iterate_full_state(moments=False):
            if model is not None:
                # The policy computes with its masters rounded.
                weights[name.removeprefix("model.")].copy_(state["weight"].to(policy.precision))
    return model


def _count_cores() -> int:
    """Count the cores that this process may use: fewer than the machine's where it is limited to some."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _lookup_peak_flops(device: torch.device, precision: torch.dtype) -> float | None:
    """Return the device's peak FLOP/s, if it is a known GPU and the precision is bfloat16."""
    if device.type != "cuda" or precision != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for key, flops in _PEAK_BFLOAT16.items() if key in name), None)
