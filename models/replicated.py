"""What a training step is taken with, where every process holds the whole model.

`Parallel` is one process and the interface of all strategies, `Replicated` is DDP. `models.fsdp` and
`models.zero` have those that split the model; `models.parallel.prepare` chooses.
"""

import atexit
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from models.config import ModelError
from models.logprobs import Scorer

State = dict[str, Tensor]
"""Of one trained weight: `weight` and, once AdamW has stepped, `exp_avg`, `exp_avg_sq` and `step`."""


class Parallel:
    """One process: the scorer, its AdamW, no communication.

    module:    call it with rows for log-probs with gradient.
    sharded:   a forward pass is a collective of all ranks, and no rank holds whole weights.
    unwrapped: the scorer itself, for scoring without gradient and for `models.adapters.adapter_off`.
    """

    sharded = False

    def __init__(self, scorer: Scorer, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self.unwrapped = scorer
        self.module: nn.Module = scorer
        self.optimizer = optimizer
        self.device = device

    @property
    def rank(self) -> int:
        """This process's number, 0..world_size-1."""
        return 0

    @property
    def world_size(self) -> int:
        """How many processes share a step."""
        return 1

    @contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        """Around forward and backward of a micro-batch; `last` marks the step's last one."""
        yield

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a scalar loss."""
        loss.backward()

    def clip(self, max_norm: float | None) -> Tensor:
        """Have gradients scaled to a global norm of at most `max_norm` (None: left as they are).

        Returns the whole gradient's norm before that; no weight is touched yet.
        """
        bound = float("inf") if max_norm is None else max_norm
        return torch.nn.utils.clip_grad_norm_(list(self._trained().values()), bound)

    def step(self) -> None:
        """One optimizer step."""
        self.optimizer.step()

    def zero_grad(self) -> None:
        """Forget all gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def set_learning_rate(self, value: float) -> None:
        """Use `value` from the next step on."""
        for group in self.optimizer.param_groups:
            group["lr"] = value

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Replace `tensor` by its sum over all ranks, in place; also returned."""
        return tensor

    def on_any_rank(self, flag: bool) -> bool:
        """Whether a forward pass must be run here because `flag` is set on some rank.

        Only sharded weights need the ranks in step; elsewhere each decides for itself.
        """
        if not self.sharded:
            return flag
        return bool(self.all_reduce_sum(torch.tensor(int(flag), device=self.device)))

    def saved(self, *, moments: bool = True) -> Iterator[tuple[str, State]]:
        """Each trained weight (the adapter's alone where there is one) in turn, whole, with AdamW's moments.

        `{"weight", "exp_avg", "exp_avg_sq", "step"}`, detached, on whatever device, the moments where there
        are any yet. A tied weight comes once. Every rank iterates to the end: shards are put together on the
        way, one weight at a time. The same whatever the strategy and the number of ranks.
        """
        for name, weight in self._trained().items():
            yield name, self._whole(weight, moments)

    def restore(self, read: Callable[[str], Mapping[str, Tensor]], names: Collection[str]) -> None:
        """Put back what `saved` gave, on every rank; without moments, the weights alone.

        `read` gives a weight's whole tensors by its name, `names` are all that it knows. Raises ModelError
        where names or shapes differ.
        """
        trained = self._trained()
        _check_names(trained, names)
        with torch.no_grad():
            for name, weight in trained.items():
                state = read(name)
                _check_shape(name, self._shape(weight), state["weight"])
                self._put_back(weight, state)

    def _trained(self) -> dict[str, nn.Parameter]:
        return trained_weights(self.unwrapped)

    def _shape(self, weight: nn.Parameter) -> torch.Size:
        return weight.shape

    def _whole(self, weight: nn.Parameter, moments: bool) -> State:
        state = self.optimizer.state.get(weight, {}) if moments else {}
        return {"weight": weight.detach()} | {what: value.detach() for what, value in state.items()}

    def _put_back(self, weight: nn.Parameter, state: Mapping[str, Tensor]) -> None:
        weight.copy_(state["weight"])
        if "step" in state:
            moments = {what: state[what].to(weight, copy=True) for what in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[weight] = {"step": step_count(self.optimizer, state, self.device)} | moments


_LONGEST_PROBLEM = 2048  # bytes


@contextmanager
def together(device: torch.device) -> Iterator[None]:
    """Around what each rank does for itself: a ModelError of one is raised by all, and none is left waiting.

    Every rank of the default process group enters; without one it is the error itself.
    """
    problem = ""
    try:
        yield
    except ModelError as error:
        problem = str(error)
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        mine = torch.zeros(_LONGEST_PROBLEM, dtype=torch.uint8)
        said = problem.encode()[:_LONGEST_PROBLEM]
        mine[: len(said)] = torch.frombuffer(bytearray(said), dtype=torch.uint8) if said else 0
        all_said = [torch.zeros_like(mine, device=device) for _ in range(dist.get_world_size())]
        dist.all_gather(all_said, mine.to(device))
        texts = [bytes(row.tolist()).rstrip(b"\0").decode(errors="replace") for row in all_said]
        problem = next(filter(None, texts), "")
    if problem:
        raise ModelError(problem)


class Ranks(Parallel):
    """Several processes of the default process group."""

    @property
    def rank(self) -> int:
        """See `Parallel`."""
        return dist.get_rank()

    @property
    def world_size(self) -> int:
        """See `Parallel`."""
        return dist.get_world_size()

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """See `Parallel`."""
        dist.all_reduce(tensor)
        return tensor


class Replicated(Ranks):
    """DDP (Li et al. 2020, arXiv:2006.15704): every rank holds the model, gradients are averaged."""

    def __init__(self, scorer: Scorer, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        super().__init__(scorer, optimizer, device)
        # Buffers (rotary frequencies) never change; torch renamed the switch in version 2.13.
        known = inspect.signature(DistributedDataParallel.__init__).parameters
        switch = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        options: dict[str, Any] = {switch: False, "gradient_as_bucket_view": True}
        self._ddp = DistributedDataParallel(scorer, **options)
        self.module = self._ddp

    @contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        """See `Parallel`; only the last micro-batch's backward exchanges gradients."""
        if last:
            yield
        else:
            with self._ddp.no_sync():
                yield


def trained_weights(module: nn.Module) -> dict[str, nn.Parameter]:
    """Weights with gradient by name; a tied weight once, under its first name."""
    return {name: weight for name, weight in module.named_parameters() if weight.requires_grad}


def step_count(optimizer: torch.optim.Optimizer, state: Mapping[str, Tensor], device: torch.device) -> Tensor:
    """A saved step count where AdamW keeps it: on the CPU, or with the weights in its fused form."""
    return state["step"].to(device if optimizer.defaults.get("fused") else "cpu", copy=True)


def group_of_one(device: torch.device) -> None:
    """Make the default process group of this process alone, unless there is one; it lasts as long as that."""
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        atexit.register(_leave_group)


def _leave_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _check_names(trained: Collection[str], names: Collection[str]) -> None:
    if set(trained) != set(names):
        missing = sorted(set(trained) - set(names))[:3]
        extra = sorted(set(names) - set(trained))[:3]
        raise ModelError(
            f"the checkpoint's weights belong to another policy (missing {missing}, unknown {extra}); "
            "resume with the model and adapter settings the checkpoint was written with"
        )


def _check_shape(name: str, shape: torch.Size, saved: Tensor) -> None:
    if shape != saved.shape:
        raise ModelError(
            f"checkpoint weight {name} has shape {tuple(saved.shape)}, the policy's has {tuple(shape)}; "
            "resume with the settings the checkpoint was written with"
        )
