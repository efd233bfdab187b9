"""The lm head over response tokens only, in chunks: never a tensor of tokens x vocabulary.

Two ways to the same numbers:

LinearHead    a plain linear head, with the scale and soft cap some architectures put behind it. Where it is
              frozen, the gradient of the hidden states is taken while the chunk's logits are there, so the
              backward is one multiplication; where it is trained, the backward makes the logits again.
ReplayedHead  the model's own forward, its decoder answering with the given hidden states, under activation
              checkpointing: exact for whatever a model does behind its decoder (an adapter on the head,
              unknown scaling), at one more product per chunk.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast


@dataclass(frozen=True)
class LogitTail:
    """What follows the linear head: cap * tanh(scale * z / cap), or scale * z without a cap.

    The cap is Gemma 2's (arXiv:2408.00118, section 2), the scale Cohere's `logit_scale` and Granite's
    1 / `logits_scaling`.
    """

    scale: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, config: Any) -> "LogitTail":
        """Read from a transformers text config; attributes it does not have change nothing."""
        scale = getattr(config, "logit_scale", None)
        divisor = getattr(config, "logits_scaling", None)
        return cls(
            scale=(1.0 if scale is None else float(scale)) / (1.0 if divisor is None else float(divisor)),
            cap=getattr(config, "final_logit_softcapping", None),
        )

    def __call__(self, raw: Tensor) -> Tensor:
        """(..., V) head outputs -> (..., V) logits, in the same dtype."""
        if self.scale != 1.0:
            raw = raw * self.scale
        return raw if self.cap is None else torch.tanh(raw / self.cap) * self.cap

    def pull_back(self, grad: Tensor, logits: Tensor) -> Tensor:
        """Multiply, in place, the gradient of the logits by d logits / d head outputs."""
        if self.cap is not None:
            grad *= 1.0 - (logits / self.cap).square()
        return grad.mul_(self.scale) if self.scale != 1.0 else grad


class Head(Protocol):
    """(N, d) hidden states and (N,) targets -> (N,) log-probs, (N,) entropies in nats or None, and V."""

    def __call__(
        self, hidden: Tensor, targets: Tensor, *, chunk_tokens: int, entropy: bool
    ) -> tuple[Tensor, Tensor | None, int]:
        """At most `chunk_tokens` x V logits exist at a time, in the backward pass too."""
        ...


@dataclass(frozen=True)
class LinearHead:
    """A plain `nn.Linear` head and its tail."""

    linear: nn.Linear
    tail: LogitTail

    def __call__(
        self, hidden: Tensor, targets: Tensor, *, chunk_tokens: int, entropy: bool
    ) -> tuple[Tensor, Tensor | None, int]:
        """See `Head`."""
        weight, bias = self.linear.weight, self.linear.bias
        dtype = _compute_dtype(hidden.device, weight.dtype)
        logps, entropies = _ChunkedLinear.apply(
            hidden, weight, bias, targets, self.tail, dtype, chunk_tokens, entropy
        )
        return logps, entropies if entropy else None, weight.shape[0]


@dataclass(frozen=True)
class ReplayedHead:
    """Everything `model` does behind its decoder.

    `most` turns this rank's number of chunks into the number to run, the last of which may be empty.
    """

    model: PreTrainedModel
    most: Callable[[int], int] = int

    def logits(self, hidden: Tensor) -> Tensor:
        """(N, d) -> (N, V) in the model's dtype, as `model(...)` would return them."""
        ids = torch.zeros(1, hidden.shape[0], dtype=torch.long, device=hidden.device)
        with _answering(self.model.get_decoder(), hidden[None]):
            return self.model(input_ids=ids, use_cache=False).logits[0]

    def __call__(
        self, hidden: Tensor, targets: Tensor, *, chunk_tokens: int, entropy: bool
    ) -> tuple[Tensor, Tensor | None, int]:
        """See `Head`."""
        width = 0

        def score(states: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor | None]:
            nonlocal width
            logits = self.logits(states)
            width = logits.shape[-1]
            logps = logits.to(_accumulator(logits.dtype)).log_softmax(-1)
            chosen = logps.gather(-1, wanted[:, None])[:, 0]
            return chosen, _entropy(logps.detach()) if entropy else None

        logps: list[Tensor] = []
        entropies: list[Tensor] = []
        # One chunk at least, so that a rank without tokens still gives every trained weight a (zero)
        # gradient.
        rounds = self.most(max(math.ceil(targets.numel() / chunk_tokens), 1))
        for part in (slice(n * chunk_tokens, (n + 1) * chunk_tokens) for n in range(rounds)):
            chosen, spread = checkpoint(score, hidden[part], targets[part], use_reentrant=False)
            logps.append(chosen)
            entropies += [spread] if spread is not None else []
        return torch.cat(logps), torch.cat(entropies) if entropy else None, width


class _ChunkedLinear(torch.autograd.Function):
    """log softmax(tail(h W' + b))[target] and its entropy, per token.

    d logp / d logits = onehot(target) - softmax. Softmax and sums run in float32 (float64 for a float64
    model).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        tail: LogitTail,
        dtype: torch.dtype,
        chunk_tokens: int,
        entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        count, accumulator = targets.numel(), _accumulator(dtype)
        logps = torch.empty(count, dtype=accumulator, device=hidden.device)
        entropies = torch.empty(count if entropy else 0, dtype=accumulator, device=hidden.device)
        head_trained = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        eager = ctx.needs_input_grad[0] and not head_trained
        unit = torch.empty_like(hidden) if eager else None  # d logp / d hidden, for an upstream gradient of 1
        with torch.autocast(hidden.device.type, enabled=False):
            matrix, offset = weight.to(dtype), None if bias is None else bias.to(dtype)
            for part in _chunks(count, chunk_tokens):
                logits = tail(F.linear(hidden[part].to(dtype), matrix, offset))
                spread = logits.to(accumulator).log_softmax(-1)
                logps[part] = spread.gather(-1, targets[part, None])[:, 0]
                if entropy:
                    entropies[part] = _entropy(spread)
                if unit is not None:
                    unit[part] = _logit_grad(spread, logits, targets[part], tail, None).to(dtype) @ matrix
        ctx.save_for_backward(unit, hidden if head_trained else None, weight, bias, targets)
        ctx.settings = (tail, dtype, chunk_tokens)
        ctx.mark_non_differentiable(entropies)
        return logps, entropies

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        unit, hidden, weight, bias, targets = ctx.saved_tensors
        if unit is not None:
            return (unit * upstream[:, None].to(unit.dtype), *([None] * 7))
        if hidden is None:
            return (None,) * 8
        tail, dtype, chunk_tokens = ctx.settings
        grads = [
            torch.zeros_like(t) if n else None
            for t, n in zip((hidden, weight, bias), ctx.needs_input_grad, strict=False)
        ]
        grad_hidden, grad_weight, grad_bias = grads
        with torch.autocast(hidden.device.type, enabled=False):
            matrix, offset = weight.to(dtype), None if bias is None else bias.to(dtype)
            for part in _chunks(targets.numel(), chunk_tokens):
                states = hidden[part].to(dtype)
                logits = tail(F.linear(states, matrix, offset))
                spread = logits.to(_accumulator(dtype)).log_softmax(-1)
                grad = _logit_grad(spread, logits, targets[part], tail, upstream[part]).to(dtype)
                if grad_hidden is not None:
                    grad_hidden[part] = grad @ matrix
                if grad_weight is not None:
                    grad_weight += grad.T @ states
                if grad_bias is not None:
                    grad_bias += grad.sum(0)
        return (grad_hidden, grad_weight, grad_bias, *([None] * 5))


def _logit_grad(
    logps: Tensor, logits: Tensor, targets: Tensor, tail: LogitTail, upstream: Tensor | None
) -> Tensor:
    """Gradient of the head's outputs; overwrites `logps` (C, V)."""
    grad = logps.exp_().neg_()
    grad[torch.arange(len(targets), device=targets.device), targets] += 1.0
    grad = tail.pull_back(grad, logits)
    return grad if upstream is None else grad.mul_(upstream[:, None])


def _entropy(logps: Tensor) -> Tensor:
    """(C, V) log-probs -> (C,) entropies in nats."""
    return -torch.linalg.vecdot(logps.exp(), logps)


def _chunks(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _compute_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype a linear layer runs in here: the weights', or autocast's."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else dtype


class _Answer(BaseModelOutputWithPast):
    """A decoder's output with hidden states alone: whatever else an architecture looks for is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
        return


@contextmanager
def _answering(decoder: nn.Module, hidden: Tensor) -> Iterator[None]:
    """Let `decoder(...)` return `hidden` (1, N, d) for a while."""
    own = decoder.__dict__.get("forward")

    def answer(*_: Any, **__: Any) -> _Answer:
        return _Answer(last_hidden_state=hidden)

    decoder.forward = answer
    try:
        yield
    finally:
        if own is None:
            del decoder.forward
        else:
            decoder.forward = own


def head_of(model: PreTrainedModel) -> tuple[Head, str | None]:
    """The exact head for `model`, and why it is not the fast one (None where it is).

    The fast head must reproduce the model's own logits on hidden states of several sizes (a soft cap or a
    scale shows on large ones only). The probe runs no decoder and changes nothing.
    """
    replayed = ReplayedHead(model)
    linear = model.get_output_embeddings()
    if type(linear) is not nn.Linear:
        return replayed, f"its head is a {type(linear).__name__}, not a plain linear layer"
    tail = LogitTail.of(model.config.get_text_config())
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(6, linear.in_features, generator=generator, dtype=torch.float64)
    states *= torch.tensor([0.1, 1.0, 10.0, 0.1, 1.0, 10.0], dtype=torch.float64)[:, None]
    states = states.to(linear.weight)
    with torch.no_grad():
        expected = replayed.logits(states).float()
        found = tail(linear(states)).float()
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-5}.get(linear.weight.dtype, 2e-2)
    if expected.shape == found.shape and torch.allclose(expected, found, rtol=tolerance, atol=tolerance):
        return LinearHead(linear, tail), None
    return replayed, "what follows its linear head is not a known scale or soft cap"


def max_entropy(width: int) -> float:
    """log V, the entropy of the uniform distribution over the head's V outputs."""
    return math.log(width)
