"""Estimates of the device memory of a policy and its references, under every strategy, before any is loaded.

Weights, gradients and AdamW's moments are counted exactly as `models.parallel` stores them: float32 each for
trained weights, so 4 + 4 + 8 bytes a weight, split over N workers as ZeRO splits them (Rajbhandari et al.
2020, arXiv:1910.02054, section 5 and figure 1): stage 1 the moments, stage 2 gradients too, stage 3 and FSDP
weights too. DeepSpeed updates master weights of its own, 4 more bytes a weight, split in every stage, beside
weights in the dtype that they compute in.
Activations are an upper bound counted over one decoder layer of attention and a gated MLP, in the manner of
Korthikanti et al. 2022 (arXiv:2205.05198, section 4), with attention fused so that no tokens x tokens scores
exist.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from orchestrator.cluster.model_shape import Shape, get_bytes_per_weight, read_model_shape
from orchestrator.config.run import RunConfig

if TYPE_CHECKING:
    from models.locate import ModelFiles

GIB = 2**30
DEVICE_SIZES_GIB = (24, 40, 80, 141)
"""Memory of common devices, in GiB."""
USABLE_SHARE = 0.9
"""Usable share of a device's memory: CUDA's context and fragmentation take the rest."""
MAX_WORKERS = 256
CHUNK_TOKENS = 1024
"""Response tokens whose logits exist at the same time: `models.logprobs.Scorer`'s default."""
REFERENCE_TOKENS = 16384
"""Tokens that a replica on a GPU scores in one batch."""
_ACTIVATION_MARGIN = 1.15  # architectures differ: norms on queries and keys, nonlinearities in several steps
_BUCKET_BYTES = 4 * 50_000_000  # DeepSpeed's gradient bucket, see models.zero
_LIVE_WEIGHTS = 1_000_000_000  # unsplit weights that stage 3 keeps for their next use: DeepSpeed's default
_MASTER_BYTES, _MOMENT_BYTES = 4, 8  # float32 bytes


@dataclass(frozen=True)
class PolicyWorkload:
    """A policy in training: its shape, dtypes and micro-batches.

    Attributes:
        shape: the model's shape; with an adapter, only the adapter is trained.
        frozen_bytes: bytes of a frozen weight in a layer. Not used where every weight is trained.
        outer_bytes: bytes of a frozen weight outside the layers, which quantisation does not change.
        compute_bytes: bytes of an element of a matrix product.
        tokens: tokens of a micro-batch, padding included.
        row_tokens: tokens of its longest row.
        checkpointing: whether layers' activations are computed again in the backward pass.
        quantized: whether frozen weights are quantised; such weights cannot be split.
    """

    shape: Shape
    frozen_bytes: float = 2.0
    outer_bytes: float = 2.0
    compute_bytes: int = 2
    tokens: int = 8192
    row_tokens: int = 2048
    checkpointing: bool = False
    quantized: bool = False

    @property
    def trains_all_weights(self) -> bool:
        """Whether every weight is trained."""
        return self.shape.adapter == 0

    @property
    def trained_weights(self) -> int:
        """Number of trained weights."""
        return self.shape.parameters if self.trains_all_weights else self.shape.adapter

    @property
    def casts_masters(self) -> bool:
        """Whether float32 masters are cast, a layer at a time, to weights that the policy computes with."""
        return self.trains_all_weights and self.compute_bytes < _MASTER_BYTES

    @property
    def frozen_weight_bytes(self) -> float:
        """Bytes of all frozen weights."""
        if self.trains_all_weights:
            return 0.0
        return self.frozen_bytes * self.shape.body + self.outer_bytes * self.shape.root

    @property
    def layer_bytes(self) -> float:
        """Bytes of the largest layer's unsplit weights as they compute, with its share of the adapter."""
        if self.trains_all_weights:
            return float(self.compute_bytes * self.shape.layer)
        return self.frozen_bytes * self.shape.layer + _MASTER_BYTES * self.shape.adapter / self.shape.layers

    @property
    def root_bytes(self) -> float:
        """Bytes of the unsplit weights outside the layers, as they compute."""
        return (self.compute_bytes if self.trains_all_weights else self.outer_bytes) * self.shape.root


@dataclass(frozen=True)
class Strategy:
    """A way to split a policy among workers, as a run file's `parallel` names it."""

    name: str
    stage: int = 0
    offload: bool = False

    def __str__(self) -> str:
        title = f"ZeRO-{self.stage}" if self.name == "deepspeed" else self.name
        return f"{title}, offload" if self.offload else title


STRATEGIES = (
    Strategy("ddp"),
    Strategy("fsdp"),
    Strategy("fsdp", offload=True),
    Strategy("deepspeed", 1),
    Strategy("deepspeed", 2),
    Strategy("deepspeed", 2, offload=True),
    Strategy("deepspeed", 3),
    Strategy("deepspeed", 3, offload=True),
)


@dataclass(frozen=True)
class Memory:
    """Peak memory of one worker in bytes; `host` is in main memory, the rest on its device.

    `working` is temporary memory: the head's logits, weights that are gathered or cast for a while, and
    communication buffers.
    """

    weights: float
    gradients: float
    moments: float
    activations: float
    working: float
    host: float = 0.0

    @property
    def device(self) -> float:
        """Bytes on the device."""
        return self.weights + self.gradients + self.moments + self.activations + self.working

    def fits_device(self, gib: float) -> bool:
        """Whether it fits a device of that many GiB, with room for CUDA itself."""
        return self.device <= USABLE_SHARE * gib * GIB


def estimate_worker_memory(workload: PolicyWorkload, strategy: Strategy, workers: int) -> Memory:
    """Estimate the memory that each of `workers` workers needs under the strategy."""
    trained, frozen = workload.trained_weights, workload.frozen_weight_bytes
    weights, gradients, moments = (
        _MASTER_BYTES * trained + frozen,
        float(_MASTER_BYTES * trained),
        float(_MOMENT_BYTES * trained),
    )
    unsplit = weights  # read into main memory, where they are split before a device gets any of them
    working, host = _count_head(workload), 0.0
    is_split = strategy.name == "fsdp" and (workers > 1 or strategy.offload)
    if workload.casts_masters and strategy.name != "deepspeed" and not is_split:
        working += _count_gathered_weights(workload)
    if is_split:
        weights, gradients, moments = weights / workers, gradients / workers, moments / workers
        working += _count_gathered_weights(workload)
        if strategy.offload:
            weights, gradients, moments, host = 0.0, 0.0, 0.0, weights + gradients + moments
        host = max(host, unsplit)
    elif strategy.name == "deepspeed":
        masters, moments = _MASTER_BYTES * trained / workers, moments / workers
        if workload.casts_masters:
            weights = float(workload.compute_bytes * trained)
        working += 2 * _BUCKET_BYTES
        if strategy.stage >= 2:
            gradients /= workers
        if strategy.stage == 3:
            weights /= workers
            working += _count_live_weights(workload)
        else:
            working += 0.0 if strategy.offload else gradients / workers if strategy.stage == 1 else gradients
        if strategy.offload:
            host = masters + moments + (gradients if strategy.stage >= 2 else gradients / workers)
            host += weights if strategy.stage == 3 else 0.0
            weights = 0.0 if strategy.stage == 3 else weights
            gradients = gradients if strategy.stage == 1 else 0.0
            moments = 0.0
        else:
            moments += masters
        if strategy.stage == 3:
            host = max(host, unsplit)
    return Memory(weights, gradients, moments, _count_activations(workload), working, host)


def find_fewest_workers(workload: PolicyWorkload, strategy: Strategy, gib: float) -> int | None:
    """Find the fewest workers (a power of two) whose devices of `gib` GiB fit the policy; None if none do."""
    count = 1
    while count <= MAX_WORKERS:
        if estimate_worker_memory(workload, strategy, count).fits_device(gib):
            return count
        count *= 2
    return None


def can_train(workload: PolicyWorkload, strategy: Strategy) -> bool:
    """Whether the strategy can train the policy at all: quantised weights cannot be split."""
    return not (workload.quantized and (strategy.name == "fsdp" or strategy.stage == 3))


def _count_activations(workload: PolicyWorkload) -> float:
    """Count the bytes of activations that the forward pass keeps for the backward pass.

    Per token and layer: both norms keep their float32 input and output (16 d bytes); the linear layers their
    two inputs of width d; attention its q, k, v (k and v repeated for grouped queries), output, and that
    output again in the next layer's layout; the MLP its gate before and after the nonlinearity, its up
    projection, and their product. A margin for what other architectures keep is added to the sum.
    """
    shape, size = workload.shape, workload.compute_bytes
    layer = (16 + 2 * size) * shape.hidden + 5 * size * shape.attention + 4 * size * shape.intermediate
    layers = shape.layers * size * shape.hidden + layer if workload.checkpointing else shape.layers * layer
    ends = 4 * _MASTER_BYTES * shape.hidden  # embeddings, the last norm, the head's input
    mask = workload.row_tokens * (1 + size)  # of rows that share their prompt: which token attends to which
    return float(_ACTIVATION_MARGIN * workload.tokens * (layers + ends + mask))


def _count_head(workload: PolicyWorkload) -> float:
    """Count the bytes of a chunk's logits, log-probs, probabilities and gradient, and of the head's own."""
    shape, size = workload.shape, workload.compute_bytes
    chunk = min(CHUNK_TOKENS, workload.tokens) * shape.vocabulary * (size + 3 * _MASTER_BYTES)
    # The head's gradient: the sum over chunks, and a chunk's part before it is added.
    matrix = shape.vocabulary * shape.hidden
    gradient = matrix * (_MASTER_BYTES + size) if workload.trains_all_weights else 0
    return float(chunk + gradient)


def _count_gathered_weights(workload: PolicyWorkload) -> float:
    """Count FSDP's unsplit bytes: two layers, the weights outside the layers, and their gradients."""
    # A layer and the next one are gathered at the same time.
    gradients = (
        2 * _MASTER_BYTES * workload.shape.layer + _MASTER_BYTES * workload.shape.root
        if workload.trains_all_weights
        else 0
    )
    return 2 * workload.layer_bytes + workload.root_bytes + gradients


def _count_live_weights(workload: PolicyWorkload) -> float:
    """Count stage 3's unsplit bytes: weights kept for their next use, and a layer's gradients."""
    share = min(1.0, _LIVE_WEIGHTS / workload.shape.parameters)
    all_bytes = workload.compute_bytes * workload.trained_weights + workload.frozen_weight_bytes
    gradients = _MASTER_BYTES * workload.shape.layer if workload.trains_all_weights else 0
    return max(share * all_bytes, 2 * workload.layer_bytes + workload.root_bytes) + gradients


def estimate_replica_memory(
    shape: Shape, weight_bytes: float, outer_bytes: float, *, tokens: int = REFERENCE_TOKENS
) -> Memory:
    """Estimate the memory of one replica of a reference: its weights, and a forward pass at its peak."""
    size = 4 if outer_bytes == _MASTER_BYTES else 2
    weights = weight_bytes * shape.body + outer_bytes * shape.root + _MASTER_BYTES * shape.adapter
    widest = 2 * _MASTER_BYTES * shape.hidden + size * (4 * shape.attention + 3 * shape.intermediate)
    chunk = min(CHUNK_TOKENS, tokens) * shape.vocabulary * (2 * size + 2 * _MASTER_BYTES)
    return Memory(weights, 0.0, 0.0, float(tokens * widest), float(chunk))


@dataclass(frozen=True)
class Sizing:
    """A run's memory.

    Attributes:
        workload: the policy as the run file trains it.
        strategy: the run file's strategy.
        workers: number of its workers.
        references: memory of one replica of each served reference, by name.
    """

    workload: PolicyWorkload
    strategy: Strategy
    workers: int
    references: Mapping[str, Memory]

    @property
    def strategies(self) -> tuple[Strategy, ...]:
        """All strategies that can train this policy, the run's own among them."""
        candidates = STRATEGIES if self.strategy in STRATEGIES else (*STRATEGIES, self.strategy)
        return tuple(s for s in candidates if can_train(self.workload, s))

    @property
    def memory(self) -> Memory:
        """Memory that each worker of the run needs."""
        return estimate_worker_memory(self.workload, self.strategy, self.workers)

    @property
    def other_checkpointing(self) -> Memory:
        """Memory that each worker needs with the other value of `training.gradient_checkpointing`."""
        other = replace(self.workload, checkpointing=not self.workload.checkpointing)
        return estimate_worker_memory(other, self.strategy, self.workers)


def size_run(
    config: RunConfig,
    policy: "ModelFiles",
    references: Mapping[str, "ModelFiles"],
    *,
    device_type: str = "cuda",
) -> Sizing:
    """Estimate a run's memory from its models' configs alone.

    Args:
        config: the run file.
        policy: the located model that the policy starts from.
        references: located references by name; those scored in process are left out.
        device_type: the device that `dtype: auto` and `precision: auto` are resolved for.

    Raises:
        ModelError: a config cannot be read, or its architecture is unknown.
    """
    layer, outer = get_bytes_per_weight(config.policy_model, device_type)
    workload = PolicyWorkload(
        shape=read_model_shape(policy, config.policy, lora=config.policy.adapter),
        frozen_bytes=layer,
        outer_bytes=outer,
        compute_bytes=int(outer),
        tokens=config.training.tokens_per_microbatch,
        # A prompt followed by two responses, each pair of prompt and response within max_length.
        row_tokens=min(config.training.tokens_per_microbatch, 2 * config.data.max_length),
        checkpointing=config.training.gradient_checkpointing,
        quantized=config.policy.quantization != "none",
    )
    parallel = config.parallel
    stage = parallel.stage if parallel.strategy == "deepspeed" else 0
    return Sizing(
        workload=workload,
        strategy=Strategy(parallel.strategy, stage, parallel.offload),
        workers=parallel.workers,
        references={
            name: estimate_replica_memory(
                read_model_shape(references[name], reference), *get_bytes_per_weight(reference, device_type)
            )
            for name, reference in config.references.models.items()
            if not reference.scored_by_workers
        },
    )
