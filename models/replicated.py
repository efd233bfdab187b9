"""Parallel strategies in which every process has the whole model.

`Parallel` is a single process and the interface of all strategies, `ReplicatedParallel` is DDP. The
strategies that shard the model are in `models.fsdp` and `models.zero`; `models.parallel.prepare_parallel`
chooses.
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

WeightState = dict[str, Tensor]
"""State of one trained weight: `weight` and, once AdamW has stepped, `exp_avg`, `exp_avg_sq` and `step`."""


class Parallel:
    """A single process: the scorer and its AdamW, without communication.

    module:    call it with rows for log-probs with gradient.
    sharded:   whether a forward pass is a collective of all ranks and no rank has whole weights.
    unwrapped: the scorer itself, for scoring without gradient and for disabling its adapter.
    """

    sharded = False

    def __init__(self, scorer: Scorer, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self.scorer = scorer
        self.module: nn.Module = scorer
        self.optimizer = optimizer
        self.device = device

    @property
    def rank(self) -> int:
        """Rank of this process, 0..world_size-1."""
        return 0

    @property
    def world_size(self) -> int:
        """Number of processes that share a step."""
        return 1

    @contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        """Context for forward and backward of a micro-batch; `last` marks the step's last one."""
        yield

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a scalar loss."""
        loss.backward()

    def clip_gradients(self, max_norm: float | None) -> Tensor:
        """Scale the gradients to a global norm of at most `max_norm` (None: no scaling).

        Returns the whole gradient's norm before scaling; no weight is changed yet.
        """
        bound = float("inf") if max_norm is None else max_norm
        return torch.nn.utils.clip_grad_norm_(list(self._get_trainable_weights().values()), bound)

    def step(self) -> None:
        """Take one optimizer step."""
        self.optimizer.step()

    def zero_grad(self) -> None:
        """Clear all gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def set_learning_rate(self, value: float) -> None:
        """Use learning rate `value` from the next step on."""
        for group in self.optimizer.param_groups:
            group["lr"] = value

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Replace `tensor` by its sum over all ranks, in place; also returned."""
        return tensor

    def needs_forward_pass(self, flag: bool) -> bool:
        """Return whether this rank must run a forward pass because `flag` is set on some rank.

        Only sharded weights need all ranks in the same forward passes; otherwise each rank decides by its own
        flag.
        """
        if not self.sharded:
            return flag
        return bool(self.all_reduce_sum(torch.tensor(int(flag), device=self.device)))

    def make_weights_whole(self) -> None:
        """Make all weights of an unsharded policy plain tensors of the dtype they compute in.

        Nothing can be trained afterwards.
        """

    def iterate_full_state(self, *, moments: bool = True) -> Iterator[tuple[str, WeightState]]:
        """Yield name and full state of each trained weight (only the adapter's if there is one).

        The state is `{"weight", "exp_avg", "exp_avg_sq", "step"}`, detached, on any device; before the first
        step, and without `moments`, only the weight. A tied weight is yielded once. Every rank must iterate
        to the end: shards are gathered on the way, one weight at a time. The state is the same for all
        strategies and numbers of ranks.
        """
        for name, weight in self._get_trainable_weights().items():
            yield name, self._gather_state(weight, moments)

    def restore_full_state(self, read: Callable[[str], Mapping[str, Tensor]], names: Collection[str]) -> None:
        """Restore the state that `iterate_full_state` yielded, on every rank; without moments, only weights.

        `read` returns a weight's full tensors by its name, `names` are all names that it knows. Raises
        ModelError if names or shapes differ.
        """
        trained = self._get_trainable_weights()
        _check_names(trained, names)
        with torch.no_grad():
            for name, weight in trained.items():
                state = read(name)
                _check_shape(name, self._get_full_shape(weight), state["weight"])
                self._restore_weight(weight, state)

    def _get_trainable_weights(self) -> dict[str, nn.Parameter]:
        return get_trainable_weights(self.scorer)

    def _get_full_shape(self, weight: nn.Parameter) -> torch.Size:
        return weight.shape

    def _gather_state(self, weight: nn.Parameter, moments: bool) -> WeightState:
        state = self.optimizer.state.get(weight, {}) if moments else {}
        return {"weight": weight.detach()} | {key: value.detach() for key, value in state.items()}

    def _restore_weight(self, weight: nn.Parameter, state: Mapping[str, Tensor]) -> None:
        weight.copy_(state["weight"])
        if "step" in state:
            moments = {key: state[key].to(weight, copy=True) for key in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[weight] = {
                "step": place_step_count(self.optimizer, state, self.device)
            } | moments


_MAX_MESSAGE_BYTES = 2048


@contextmanager
def raise_on_all_ranks(device: torch.device) -> Iterator[None]:
    """Context for work that each rank does on its own: a ModelError of one rank is raised on all of them.

    No rank is then left waiting in a collective. Every rank of the default process group must enter; without
    a group the error is raised again.
    """
    message = ""
    try:
        yield
    except ModelError as error:
        message = str(error)
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        buffer = torch.zeros(_MAX_MESSAGE_BYTES, dtype=torch.uint8)
        encoded = message.encode()[:_MAX_MESSAGE_BYTES]
        buffer[: len(encoded)] = torch.frombuffer(bytearray(encoded), dtype=torch.uint8) if encoded else 0
        gathered = [torch.zeros_like(buffer, device=device) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, buffer.to(device))
        messages = [bytes(row.tolist()).rstrip(b"\0").decode(errors="replace") for row in gathered]
        message = next(filter(None, messages), "")
    if message:
        raise ModelError(message)


class DistributedParallel(Parallel):
    """A strategy of several processes: the ranks of the default process group."""

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


class ReplicatedParallel(DistributedParallel):
    """DDP (Li et al. 2020, arXiv:2006.15704): every rank has the whole model, gradients are averaged."""

    def __init__(self, scorer: Scorer, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        super().__init__(scorer, optimizer, device)
        # Buffers (rotary frequencies) never change; torch renamed this option in version 2.13.
        known = inspect.signature(DistributedDataParallel.__init__).parameters
        switch = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        options: dict[str, Any] = {switch: False, "gradient_as_bucket_view": True}
        self._ddp = DistributedDataParallel(scorer, **options)
        self.module = self._ddp

    @contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        """See `Parallel`; only the last micro-batch's backward reduces gradients."""
        if last:
            yield
        else:
            with self._ddp.no_sync():
                yield


def get_trainable_weights(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the weights with gradient by name; a tied weight once, under its first name."""
    return {name: weight for name, weight in module.named_parameters() if weight.requires_grad}


def place_step_count(
    optimizer: torch.optim.Optimizer, state: Mapping[str, Tensor], device: torch.device
) -> Tensor:
    """Copy a saved step count to where AdamW keeps it: the CPU, or `device` in its fused form."""
    return state["step"].to(device if optimizer.defaults.get("fused") else "cpu", copy=True)


def ensure_process_group(device: torch.device) -> None:
    """Create a default process group of this process alone unless a group exists; it is destroyed at exit."""
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        atexit.register(_destroy_process_group)


def _destroy_process_group() -> None:
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
