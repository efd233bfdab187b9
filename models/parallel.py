"""One small interface to an optimizer step, whether one process takes it or many.

The training step is the same text for all: `with parallel.accumulate(last): ...; parallel.backward(loss)` per
micro-batch, then `clip`, `step`, `zero_grad`. Gradients are averaged over ranks, so a loss that is a sum over
the global batch is multiplied by `world_size` first.
"""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from models.config import ModelError
from models.logprobs import Scorer

Strategy = Literal["ddp"]


class Parallel:
    """One process: the scorer, its AdamW, no communication.

    module:    call it with rows for log-probs with gradient.
    unwrapped: the scorer itself, for scoring without gradient and for `models.adapters.adapter_off`.
    """

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
        """Around forward and backward of a micro-batch; only in the step's last are gradients exchanged."""
        yield

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a scalar loss."""
        loss.backward()

    def clip(self, max_norm: float | None) -> Tensor:
        """Scale gradients to a global norm of at most `max_norm` (None: leave them); the norm before."""
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

    def model_state(self) -> dict[str, Tensor]:
        """Trained weights (the adapter's alone where there is one) by name, each once, on the CPU."""
        return {name: weight.detach().cpu().contiguous() for name, weight in self._trained().items()}

    def load_model_state(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `model_state` gave; ModelError where names or shapes differ."""
        trained = self._trained()
        _check_names(trained, state, "weights")
        with torch.no_grad():
            for name, weight in trained.items():
                if weight.shape != state[name].shape:
                    raise ModelError(
                        f"checkpoint weight {name} has shape {tuple(state[name].shape)}, the policy's has "
                        f"{tuple(weight.shape)}; resume with the settings the checkpoint was written with"
                    )
                weight.copy_(state[name])

    def optimizer_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """AdamW's moments and step counts as `<weight>/<quantity>` CPU tensors, and what JSON can hold."""
        tensors = {
            f"{name}/{quantity}": value.detach().cpu().contiguous()
            for name, weight in self._trained().items()
            for quantity, value in self.optimizer.state.get(weight, {}).items()
        }
        return tensors, {"optimizer": type(self.optimizer).__name__, "weights": list(self._trained())}

    def load_optimizer_state(self, tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> None:
        """Put back what `optimizer_state` gave; ModelError where it belongs to other weights."""
        trained = self._trained()
        _check_names(trained, dict.fromkeys(rest["weights"]), "optimizer state")
        moments: dict[str, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            name, quantity = key.rsplit("/", 1)
            moments.setdefault(name, {})[quantity] = value
        names = {weight: name for name, weight in trained.items()}
        order = [names[weight] for group in self.optimizer.param_groups for weight in group["params"]]
        state = {number: moments[name] for number, name in enumerate(order) if name in moments}
        self.optimizer.load_state_dict(
            {"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]}
        )

    def _trained(self) -> dict[str, nn.Parameter]:
        return trained_weights(self.unwrapped)


class Replicated(Parallel):
    """DDP (Li et al. 2020, arXiv:2006.15704): every rank holds the model, gradients are averaged."""

    def __init__(self, scorer: Scorer, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        super().__init__(scorer, optimizer, device)
        # Buffers (rotary frequencies) never change; torch renamed the switch in version 2.13.
        known = inspect.signature(DistributedDataParallel.__init__).parameters
        switch = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        options: dict[str, Any] = {switch: False, "gradient_as_bucket_view": True}
        self._ddp = DistributedDataParallel(scorer, **options)
        self.module = self._ddp

    @property
    def rank(self) -> int:
        """See `Parallel`."""
        return dist.get_rank()

    @property
    def world_size(self) -> int:
        """See `Parallel`."""
        return dist.get_world_size()

    @contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        """See `Parallel`."""
        if last:
            yield
        else:
            with self._ddp.no_sync():
                yield

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """See `Parallel`."""
        dist.all_reduce(tensor)
        return tensor


def prepare(
    scorer: Scorer,
    *,
    strategy: Strategy = "ddp",
    device: torch.device,
    learning_rate: float,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> Parallel:
    """Make `scorer` trainable by the ranks of the default process group, or by this process alone.

    AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101); biases and norms are not decayed. The scorer must
    already be on `device`. Raises ModelError where it has nothing to train.
    """
    trained = trained_weights(scorer)
    if not trained:
        raise ModelError("the policy has no weight to train; load it with trainable=True")
    groups = [
        {"params": [w for w in trained.values() if w.dim() >= 2], "weight_decay": weight_decay},
        {"params": [w for w in trained.values() if w.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        [g for g in groups if g["params"]],
        lr=learning_rate,
        betas=betas,
        eps=eps,
        fused=device.type == "cuda" or None,
    )
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    kinds: dict[str, type[Parallel]] = {"ddp": Replicated}
    return (kinds[strategy] if several else Parallel)(scorer, optimizer, device)


def trained_weights(module: nn.Module) -> dict[str, nn.Parameter]:
    """Weights with gradient by name; a tied weight once, under its first name."""
    return {name: weight for name, weight in module.named_parameters() if weight.requires_grad}


def _check_names(trained: Mapping[str, Any], state: Mapping[str, Any], what: str) -> None:
    if trained.keys() != state.keys():
        missing = sorted(trained.keys() - state.keys())[:3]
        extra = sorted(state.keys() - trained.keys())[:3]
        raise ModelError(
            f"the checkpoint's {what} belong to another policy (missing {missing}, unknown {extra}); "
            "resume with the model and adapter settings the checkpoint was written with"
        )
