"""The policy a worker trains: opened from its start, made parallel, exported when done."""

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from models.adapters import adapter_off, find_adapter, merge
from models.config import ModelConfig, ModelError
from models.load import export, load_model, load_tokenizer, locate
from models.logprobs import Scorer, SequenceScores
from models.parallel import Parallel, prepare, shards, together, trained_weights
from models.probe import Probe
from models.rows import Rows
from orchestrator.config.run import RunConfig

# Dense bfloat16 matrix FLOP/s that vendors state, for model FLOPs utilisation.
_PEAK_BFLOAT16 = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "A10G": 70e12, "L4": 121e12}


@dataclass(frozen=True)
class Policy:
    """A policy ready to train.

    Attributes:
        parallel: scorer, optimizer and communication.
        start: loads the policy's start anew, trainable, on the CPU.
        tokenizer: the policy's own.
        precision: dtype of matrix products.
        sharing_refused: why a prompt is computed once per response instead of once per pair, if it is.
        pad_id: what fills rows; masked by spans, never by its id.
        peak_flops: of the device in `precision`, where known.
    """

    parallel: Parallel
    start: Callable[[], PreTrainedModel | PeftModel]
    tokenizer: Any
    precision: torch.dtype
    plain_rows_reason: str | None
    pad_id: int
    peak_flops: float | None

    @property
    def scorer(self) -> Scorer:
        """The policy's scorer without communication around it."""
        return self.parallel.unwrapped

    def score_start(self, rows: Rows) -> SequenceScores:
        """Scores of the policy's own start: the adapter switched off, no gradient.

        Not under autocast: they are stored under the start's fingerprint, as a replica would score it.
        """
        with adapter_off(self.scorer.model):
            return self.scorer(rows, entropy=True)

    def count_flops(self, rows: Rows) -> float:
        """Model FLOPs of a training step: backward costs twice the forward, or once with LoRA."""
        passes = 2 if find_adapter(self.scorer) is not None else 3
        return passes * self.scorer.forward_flops(rows)


def open_policy(config: RunConfig, start: ModelConfig, *, device: torch.device, local_workers: int) -> Policy:
    """Load the policy's start and make it trainable.

    Args:
        config: the run file.
        start: the policy's start, pinned; it is located on this node.
        device: this worker's. Weights that are to be sharded are read into main memory, and only the shards
            come here.
        local_workers: workers on this machine, which share its cores.
    """
    if device.type == "cpu":
        torch.set_num_threads(max(1, _count_cores() // local_workers))
    training, parallel = config.training, config.parallel
    # Decided by what the policy runs on, wherever it is loaded.
    settings = config.policy.model_copy(update={"dtype": config.policy.dtype_on(device.type)})
    in_shards = shards(parallel.strategy, parallel.stage, workers=parallel.workers, offload=parallel.offload)
    with together(device):
        try:
            located = locate(start)
            load = partial(load_model, located, settings, trainable=True, seed=training.seed)
            model = load(
                device=torch.device("cpu") if in_shards else device,
                activation_checkpointing=training.gradient_checkpointing,
            )
            scorer, tokenizer = Scorer(model), load_tokenizer(located, config.policy)
        except ModelError as error:
            raise ModelError(f"policy: {error}") from error
    refused = (
        "policy.prefix_sharing is off" if config.policy.prefix_sharing == "off" else scorer.sharing_refusal
    )
    precision = _choose_precision(training.precision, device)
    return Policy(
        parallel=prepare(
            scorer,
            strategy=parallel.strategy,
            zero_stage=parallel.stage,
            offload=parallel.offload,
            precision=precision,
            device=device,
            learning_rate=training.learning_rate,
            weight_decay=training.weight_decay,
        ),
        start=partial(load, device=torch.device("cpu")),
        tokenizer=tokenizer,
        precision=precision,
        plain_rows_reason=refused,
        pad_id=0,
        peak_flops=_peak_flops(device, precision),
    )


def export_policy(policy: Policy, folder: Path, *, probes: Sequence[Sequence[int]]) -> None:
    """Write the trained policy, all or nothing: `model/`, with LoRA also `adapter/`, `probe.safetensors`.

    Every rank calls it, rank 0 writes.

    `model/` loads in transformers as it is (LoRA merged); the probe holds the logits of the policy in hand on
    a few token rows, for comparison with whatever is loaded back later. Merging changes the policy in place:
    this is the last thing done with it.
    """
    device = policy.parallel.device
    policy.scorer.eval()
    probe = Probe.of(
        policy.scorer.model, probes, logits=lambda rows: policy.scorer.logits(rows.to(device)).float().cpu()
    )
    model = _gather_model(policy)
    if model is None:
        return
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    probe.save(part / "probe.safetensors")
    if find_adapter(model) is not None:
        export(model, policy.tokenizer, part / "adapter")
    export(merge(model), policy.tokenizer, part / "model")
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


def _gather_model(policy: Policy) -> PreTrainedModel | PeftModel | None:
    """The trained model in one piece, on rank 0 alone.

    Shards are put together one weight at a time, into a copy of the start: that is all the memory it takes.
    """
    parallel = policy.parallel
    if not parallel.sharded:
        return policy.scorer.model if parallel.rank == 0 else None
    with together(parallel.device):
        model = policy.start() if parallel.rank == 0 else None
    weights = {} if model is None else trained_weights(model)
    with torch.no_grad():
        for name, state in parallel.saved(moments=False):
            if model is not None:
                weights[name.removeprefix("model.")].copy_(state["weight"])
    return model


def _count_cores() -> int:
    """Cores that this process may use; fewer than the machine has where it was given some of them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _choose_precision(asked: str, device: torch.device) -> torch.dtype:
    if asked == "auto":
        asked = "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[asked]


def _peak_flops(device: torch.device, precision: torch.dtype) -> float | None:
    if device.type != "cuda" or precision != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for key, flops in _PEAK_BFLOAT16.items() if key in name), None)
