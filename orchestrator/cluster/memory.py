"""How much device memory a policy and its references take, under every strategy, before anything is loaded.

Weights, gradients and AdamW's moments are counted exactly as `models.parallel` holds them: float32 each for
what is trained, so 4 + 4 + 8 bytes a weight, split over N workers as ZeRO splits them (Rajbhandari et al.
2020, arXiv:1910.02054, section 5 and figure 1): stage 1 the moments, stage 2 gradients too, stage 3 and FSDP
weights too. DeepSpeed steps on masters of its own, 4 more bytes a weight, split in every stage. Activations
are an upper bound counted over one decoder layer of attention and a gated MLP, in the manner of Korthikanti
et al. 2022 (arXiv:2205.05198, section 4), with attention fused so that no tokens x tokens scores exist.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from orchestrator.cluster.model_shape import Shape, get_bytes_per_weight, read_model_shape
from orchestrator.config.run import RunConfig

if TYPE_CHECKING:
    from models.locate import Located

GIB = 2**30
DEVICE_SIZES_GIB = (24, 40, 80, 141)
"""Device memories in GiB that people have."""
USABLE_SHARE = 0.9
"""Share of a device that may be planned for: CUDA's context and fragmentation take the rest."""
MAX_WORKERS = 256
CHUNK_TOKENS = 1024
"""Response tokens whose logits exist at a time: `models.logprobs.Scorer`'s default."""
REFERENCE_TOKENS = 16384
"""Tokens that a replica on a GPU scores at a time."""
_ACTIVATION_MARGIN = 1.15  # architectures differ: norms on queries and keys, nonlinearities in several steps
_BUCKET_BYTES = 4 * 50_000_000  # DeepSpeed's gradient bucket, see models.zero
_LIVE_WEIGHTS = 1_000_000_000  # weights that stage 3 keeps whole for their next use: DeepSpeed's default
_MASTER_BYTES, _MOMENT_BYTES = 4, 8  # float32 bytes


@dataclass(frozen=True)
class PolicyWorkload:
    """A policy as it is trained: its shape, dtypes and micro-batches.

    Attributes:
        shape: of the model; with an adapter only that is trained.
        frozen_bytes: of a frozen weight in a layer. Not used where every weight is trained.
        outer_bytes: of a frozen weight outside the layers, which quantisation leaves alone.
        compute_bytes: of an element of a matrix product.
        tokens: of a micro-batch, padding included.
        row_tokens: of its longest row.
        checkpointing: whether layers' activations are computed again in the backward pass.
        quantized: whether frozen weights are, which cannot be split.
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
        """How many weights are trained."""
        return self.shape.parameters if self.trains_all_weights else self.shape.adapter

    @property
    def frozen_weight_bytes(self) -> float:
        """Bytes of all frozen weights."""
        if self.trains_all_weights:
            return 0.0
        return self.frozen_bytes * self.shape.body + self.outer_bytes * self.shape.root

    @property
    def layer_bytes(self) -> float:
        """Bytes of the largest layer's weights, whole, with its part of the adapter."""
        if self.trains_all_weights:
            return float(_MASTER_BYTES * self.shape.layer)
        return self.frozen_bytes * self.shape.layer + _MASTER_BYTES * self.shape.adapter / self.shape.layers

    @property
    def root_bytes(self) -> float:
        """Bytes of the weights outside the layers, whole."""
        return (_MASTER_BYTES if self.trains_all_weights else self.outer_bytes) * self.shape.root


@dataclass(frozen=True)
class Strategy:
    """A way to share a policy, as a run file's `parallel` names it."""

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
    """Bytes that one worker needs at its fullest moment; `host` in main memory, the rest on its device.

    `working` is what comes and goes: the head's logits, weights that are whole for a while, casts of weights
    that the backward pass needs, and communication buffers.
    """

    weights: float
    gradients: float
    moments: float
    activations: float
    working: float
    host: float = 0.0

    @property
    def device(self) -> float:
        """All that lies on the device."""
        return self.weights + self.gradients + self.moments + self.activations + self.working

    def fits_device(self, gib: float) -> bool:
        """Whether a device of that many GiB holds it, with room for CUDA itself."""
        return self.device <= USABLE_SHARE * gib * GIB


def estimate_worker_memory(load: PolicyWorkload, strategy: Strategy, workers: int) -> Memory:
    """What each of `workers` needs under the strategy."""
    trained, frozen = load.trained_weights, load.frozen_weight_bytes
    weights, gradients, moments = (
        _MASTER_BYTES * trained + frozen,
        float(_MASTER_BYTES * trained),
        float(_MOMENT_BYTES * trained),
    )
    whole = weights  # read into main memory where it is cut, before a device has any of it
    working, host = _count_head(load) + _count_casts(load), 0.0
    if strategy.name == "fsdp" and (workers > 1 or strategy.offload):
        weights, gradients, moments = weights / workers, gradients / workers, moments / workers
        working += _count_gathered_weights(load)
        if strategy.offload:
            weights, gradients, moments, host = 0.0, 0.0, 0.0, weights + gradients + moments
        host = max(host, whole)
    elif strategy.name == "deepspeed":
        masters, moments = _MASTER_BYTES * trained / workers, moments / workers
        working += 2 * _BUCKET_BYTES
        if strategy.stage >= 2:
            gradients /= workers
        if strategy.stage == 3:
            weights /= workers
            working += _count_live_weights(load)
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
            host = max(host, whole)
    return Memory(weights, gradients, moments, _count_activations(load), working, host)


def find_fewest_workers(load: PolicyWorkload, strategy: Strategy, gib: float) -> int | None:
    """The fewest workers (a power of two) whose devices of `gib` GiB hold the policy; None: not so."""
    count = 1
    while count <= MAX_WORKERS:
        if estimate_worker_memory(load, strategy, count).fits_device(gib):
            return count
        count *= 2
    return None


def can_train(load: PolicyWorkload, strategy: Strategy) -> bool:
    """Whether the policy can be trained so at all: quantised weights cannot be split."""
    return not (load.quantized and (strategy.name == "fsdp" or strategy.stage == 3))


def _count_activations(load: PolicyWorkload) -> float:
    """What the backward pass keeps of the forward pass.

    Per token and layer: both norms keep their float32 input and output (16 d bytes); every linear layer its
    input, cast for each of the five that read one of width d where products are in half precision; attention
    its q, k, v (k and v repeated for grouped queries), output, and that output again in the next layer's
    layout; the MLP its gate before and behind the nonlinearity, its up projection, and their product. On top
    of the sum comes a margin for what other architectures keep.
    """
    shape, size = load.shape, load.compute_bytes
    inputs = 5 if size < _MASTER_BYTES else 2
    layer = (16 + inputs * size) * shape.hidden + 5 * size * shape.attention + 4 * size * shape.intermediate
    residual = max(_MASTER_BYTES if load.trains_all_weights else load.outer_bytes, size) * shape.hidden
    layers = shape.layers * residual + layer if load.checkpointing else shape.layers * layer
    ends = 4 * _MASTER_BYTES * shape.hidden  # embeddings, the last norm, the states that meet the head
    mask = load.row_tokens * (1 + size)  # of rows that share their prompt: which token sees which
    return float(_ACTIVATION_MARGIN * load.tokens * (layers + ends + mask))


def _count_head(load: PolicyWorkload) -> float:
    """A chunk's logits, log-probs, probabilities and gradient, and the head's own cast and gradient."""
    shape, size = load.shape, load.compute_bytes
    chunk = min(CHUNK_TOKENS, load.tokens) * shape.vocabulary * (2 * size + 2 * _MASTER_BYTES)
    matrix = shape.vocabulary * shape.hidden
    cast = matrix * size if (_MASTER_BYTES if load.trains_all_weights else load.outer_bytes) != size else 0
    gradient = (
        matrix * (_MASTER_BYTES + size) if load.trains_all_weights else 0
    )  # its sum and a chunk's part, before it is added
    return float(chunk + cast + gradient)


def _count_casts(load: PolicyWorkload) -> float:
    """Half-precision copies of layers' weights that autocast makes and the backward pass needs."""
    bytes_in_memory = _MASTER_BYTES if load.trains_all_weights else load.frozen_bytes
    if bytes_in_memory <= load.compute_bytes:
        return 0.0
    return float(load.compute_bytes * (load.shape.layer if load.checkpointing else load.shape.body))


def _count_gathered_weights(load: PolicyWorkload) -> float:
    """FSDP: a layer and the next one, the weights outside the layers, and their gradients, whole."""
    gradients = (
        2 * _MASTER_BYTES * load.shape.layer + _MASTER_BYTES * load.shape.root
        if load.trains_all_weights
        else 0
    )
    return 2 * load.layer_bytes + load.root_bytes + gradients


def _count_live_weights(load: PolicyWorkload) -> float:
    """Stage 3: weights that DeepSpeed keeps whole for their next use, and a layer's gradients."""
    share = min(1.0, _LIVE_WEIGHTS / load.shape.parameters)
    everything = _MASTER_BYTES * load.trained_weights + load.frozen_weight_bytes
    gradients = _MASTER_BYTES * load.shape.layer if load.trains_all_weights else 0
    return max(share * everything, 2 * load.layer_bytes + load.root_bytes) + gradients


def estimate_replica_memory(
    shape: Shape, weight_bytes: float, outer_bytes: float, *, tokens: int = REFERENCE_TOKENS
) -> Memory:
    """What one copy of a frozen reference needs: its weights, and the widest moment of a forward pass."""
    size = 4 if outer_bytes == _MASTER_BYTES else 2
    weights = weight_bytes * shape.body + outer_bytes * shape.root + _MASTER_BYTES * shape.adapter
    widest = 2 * _MASTER_BYTES * shape.hidden + size * (4 * shape.attention + 3 * shape.intermediate)
    chunk = min(CHUNK_TOKENS, tokens) * shape.vocabulary * (2 * size + 2 * _MASTER_BYTES)
    return Memory(weights, 0.0, 0.0, float(tokens * widest), float(chunk))


@dataclass(frozen=True)
class Sizing:
    """A run's memory.

    Attributes:
        load: the policy as the run file trains it.
        own: the run file's strategy.
        workers: its workers.
        references: one replica of each reference that is served, by name.
    """

    workload: PolicyWorkload
    strategy: Strategy
    workers: int
    references: Mapping[str, Memory]

    @property
    def strategies(self) -> tuple[Strategy, ...]:
        """All that could train this policy, the run's own among them."""
        every = STRATEGIES if self.strategy in STRATEGIES else (*STRATEGIES, self.strategy)
        return tuple(s for s in every if can_train(self.workload, s))

    @property
    def memory(self) -> Memory:
        """What each worker of the run needs."""
        return estimate_worker_memory(self.workload, self.strategy, self.workers)

    @property
    def other_checkpointing(self) -> Memory:
        """The same with the other choice of `training.gradient_checkpointing`."""
        other = replace(self.workload, checkpointing=not self.workload.checkpointing)
        return estimate_worker_memory(other, self.strategy, self.workers)


def size_run(
    config: RunConfig,
    policy: "Located",
    references: Mapping[str, "Located"],
    *,
    device_type: str = "cuda",
) -> Sizing:
    """A run's memory, from its models' configs alone.

    Args:
        config: the run file.
        policy: where the policy's start lies.
        references: where references lie, by name; those scored in process are left out.
        device_type: what `dtype: auto` and `precision: auto` are decided for.

    Raises:
        ModelError: a config cannot be read, or its architecture is unknown.
    """
    precision = config.training.precision
    half = precision == "bfloat16" or (precision == "auto" and device_type == "cuda")
    layer, outer = get_bytes_per_weight(config.policy, device_type)
    load = PolicyWorkload(
        shape=read_model_shape(policy, config.policy, lora=config.policy.adapter),
        frozen_bytes=layer,
        outer_bytes=outer,
        compute_bytes=2 if half else 4,
        tokens=config.training.tokens_per_microbatch,
        # A prompt with two responses behind it, each pair of prompt and response within max_length.
        row_tokens=min(config.training.tokens_per_microbatch, 2 * config.data.max_length),
        checkpointing=config.training.gradient_checkpointing,
        quantized=config.policy.quantization != "none",
    )
    parallel = config.parallel
    stage = parallel.stage if parallel.strategy == "deepspeed" else 0
    return Sizing(
        workload=load,
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
