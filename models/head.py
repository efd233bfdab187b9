"""The lm head over response tokens only, in chunks: a tensor of tokens x vocabulary never exists.

Two implementations with equal results:

LinearHead        a plain linear head, with the scale and soft cap that some architectures apply to its
                  outputs. If it is frozen, the gradient of the hidden states is computed while the chunk's
                  logits exist, so the backward is one multiplication; if it is trained, the backward
                  recomputes the logits.
ModelForwardHead  the model's own forward, with a decoder that returns the given hidden states, under
                  activation checkpointing: exact for whatever a model computes after its decoder (an adapter
                  on the head, unknown scaling), at the cost of one more product per chunk.
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

from models.architecture import find_decoder


@dataclass(frozen=True)
class LogitTransform:
    """The transform of the linear head's outputs z: cap * tanh(scale * z / cap), or scale * z without a cap.

    The cap is Gemma 2's (arXiv:2408.00118, section 2), the scale Cohere's `logit_scale` and Granite's
    1 / `logits_scaling`.
    """

    scale: float = 1.0
    cap: float | None = None

    @classmethod
    def from_config(cls, config: Any) -> "LogitTransform":
        """Read scale and cap from a transformers text config; a missing attribute changes nothing."""
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

    def backpropagate(self, grad: Tensor, logits: Tensor) -> Tensor:
        """Multiply, in place, the gradient of the logits by d logits / d head outputs."""
        if self.cap is not None:
            grad *= 1.0 - (logits / self.cap).square()
        return grad.mul_(self.scale) if self.scale != 1.0 else grad


class Head(Protocol):
    """(N, d) hidden states and (N,) targets -> (N,) log-probs, (N,) entropies in nats or None, and V."""

    def __call__(
        self, hidden: Tensor, targets: Tensor, *, chunk_tokens: int, entropy: bool
    ) -> tuple[Tensor, Tensor | None, int]:
        """Score the targets with at most `chunk_tokens` x V logits at a time, in the backward pass too."""
        ...


@dataclass(frozen=True)
class LinearHead:
    """A plain `nn.Linear` head and the transform of its outputs."""

    linear: nn.Linear
    transform: LogitTransform

    def __call__(
        self, hidden: Tensor, targets: Tensor, *, chunk_tokens: int, entropy: bool
    ) -> tuple[Tensor, Tensor | None, int]:
        """See `Head`."""
        weight, bias = self.linear.weight, self.linear.bias
        logps, entropies = _ChunkedLinear.apply(
            hidden, weight, bias, targets, self.transform, chunk_tokens, entropy
        )
        return logps, entropies if entropy else None, weight.shape[0]


@dataclass(frozen=True)
class ModelForwardHead:
    """Everything that `model` computes after its decoder.

    `max_over_ranks` maps this rank's number of chunks to the number to run, the last of which may be empty.
    """

    model: PreTrainedModel
    max_over_ranks: Callable[[int], int] = int

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """(N, d) hidden states -> (N, V) logits in the model's dtype, as `model(...)` would return them."""
        ids = torch.zeros(1, hidden.shape[0], dtype=torch.long, device=hidden.device)
        with _replace_decoder_output(find_decoder(self.model), hidden[None]):
            return self.model(input_ids=ids, use_cache=False).logits[0]

    def __call__(
        self, hidden: Tensor, targets: Tensor, *, chunk_tokens: int, entropy: bool
    ) -> tuple[Tensor, Tensor | None, int]:
        """See `Head`."""
        vocab_size = 0

        def score(states: Tensor, ids: Tensor) -> tuple[Tensor, Tensor | None]:
            nonlocal vocab_size
            logits = self.compute_logits(states)
            vocab_size = logits.shape[-1]
            logps = logits.to(_get_accumulator_dtype(logits.dtype)).log_softmax(-1)
            chosen = logps.gather(-1, ids[:, None])[:, 0]
            return chosen, _compute_entropy(logps.detach()) if entropy else None

        logps: list[Tensor] = []
        entropies: list[Tensor] = []
        # One chunk at least, so that a rank without tokens still gives every trained weight a (zero)
        # gradient.
        chunk_count = self.max_over_ranks(max(math.ceil(targets.numel() / chunk_tokens), 1))
        for part in (slice(n * chunk_tokens, (n + 1) * chunk_tokens) for n in range(chunk_count)):
            chunk_logps, chunk_entropies = checkpoint(score, hidden[part], targets[part], use_reentrant=False)
            logps.append(chunk_logps)
            entropies += [chunk_entropies] if chunk_entropies is not None else []
        return torch.cat(logps), torch.cat(entropies) if entropy else None, vocab_size


class _ChunkedLinear(torch.autograd.Function):
    """log softmax(transform(h W' + b))[target] and the softmax's entropy, per token.

    d logp / d logits = onehot(target) - softmax. Logits, softmax and sums are float32 (float64 for a float64
    model).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        transform: LogitTransform,
        chunk_tokens: int,
        entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        count, dtype = targets.numel(), weight.dtype
        accumulator = _get_accumulator_dtype(dtype)
        logps = torch.empty(count, dtype=accumulator, device=hidden.device)
        entropies = torch.empty(count if entropy else 0, dtype=accumulator, device=hidden.device)
        head_trained = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        eager = ctx.needs_input_grad[0] and not head_trained
        unit = torch.empty_like(hidden) if eager else None  # d logp / d hidden, for an upstream gradient of 1
        wide = _widen(weight)
        for part in _iterate_chunks(count, chunk_tokens):
            logits = transform(_project(hidden[part].to(dtype), wide, bias))
            log_probs = logits.log_softmax(-1)
            logps[part] = log_probs.gather(-1, targets[part, None])[:, 0]
            if entropy:
                entropies[part] = _compute_entropy(log_probs)
            if unit is not None:
                grad = _compute_logit_gradient(log_probs, logits, targets[part], transform, None)
                unit[part] = grad.to(dtype) @ weight
        ctx.save_for_backward(unit, hidden if head_trained else None, weight, bias, targets)
        ctx.settings = (transform, chunk_tokens)
        ctx.mark_non_differentiable(entropies)
        return logps, entropies

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        unit, hidden, weight, bias, targets = ctx.saved_tensors
        if unit is not None:
            return (unit * upstream[:, None].to(unit.dtype), *([None] * 6))
        if hidden is None:
            return (None,) * 7
        transform, chunk_tokens = ctx.settings
        dtype = weight.dtype
        grads = [
            torch.zeros_like(t, dtype=_get_accumulator_dtype(dtype)) if needed else None
            for t, needed in zip((hidden, weight, bias), ctx.needs_input_grad, strict=False)
        ]
        grad_hidden, grad_weight, grad_bias = grads
        wide = _widen(weight)
        for part in _iterate_chunks(targets.numel(), chunk_tokens):
            states = hidden[part].to(dtype)
            logits = transform(_project(states, wide, bias))
            log_probs = logits.log_softmax(-1)
            grad = _compute_logit_gradient(log_probs, logits, targets[part], transform, upstream[part])
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            grad = grad.to(dtype)
            if grad_hidden is not None:
                grad_hidden[part] = (grad @ weight).to(grad_hidden)
            if grad_weight is not None:
                grad_weight += grad.T @ states
        given = (hidden, weight, bias)
        casts = [None if g is None else g.to(t.dtype) for g, t in zip(grads, given, strict=True)]
        return (*casts, *([None] * 4))


def _widen(matrix: Tensor) -> Tensor:
    """Return the matrix as `_project` takes it: in float32 where no kernel sums bfloat16 into float32."""
    return matrix if matrix.device.type == "cuda" else matrix.to(_get_accumulator_dtype(matrix.dtype))


def _project(states: Tensor, matrix: Tensor, offset: Tensor | None) -> Tensor:
    """(C, d) states -> (C, V) head outputs in float32, or float64 for a float64 model.

    Half-precision products are summed in float32 and stay so: rounded to bfloat16, logits near 20 would be
    0.06 to 0.13 apart.
    """
    accumulator = _get_accumulator_dtype(matrix.dtype)
    if matrix.dtype == accumulator:
        return F.linear(states.to(accumulator), matrix, None if offset is None else offset.to(accumulator))
    product = torch.mm(states, matrix.t(), out_dtype=accumulator)
    return product if offset is None else product + offset.to(accumulator)


def _compute_logit_gradient(
    logps: Tensor, logits: Tensor, targets: Tensor, transform: LogitTransform, upstream: Tensor | None
) -> Tensor:
    """Compute the gradient of the head's outputs; overwrites `logps` (C, V)."""
    grad = logps.exp_().neg_()
    grad[torch.arange(len(targets), device=targets.device), targets] += 1.0
    grad = transform.backpropagate(grad, logits)
    return grad if upstream is None else grad.mul_(upstream[:, None])


def _compute_entropy(logps: Tensor) -> Tensor:
    """(C, V) log-probs -> (C,) entropies in nats."""
    return -torch.linalg.vecdot(logps.exp(), logps)


def _iterate_chunks(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def _get_accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class _DecoderOutput(BaseModelOutputWithPast):
    """A decoder's output with hidden states only; any other attribute that an architecture reads is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
        return


@contextmanager
def _replace_decoder_output(decoder: nn.Module, hidden: Tensor) -> Iterator[None]:
    """Make `decoder(...)` return `hidden` (1, N, d) inside the context."""
    own = decoder.__dict__.get("forward")

    def answer(*_: Any, **__: Any) -> _DecoderOutput:
        return _DecoderOutput(last_hidden_state=hidden)

    decoder.forward = answer
    try:
        yield
    finally:
        if own is None:
            del decoder.forward
        else:
            decoder.forward = own


def select_head(model: PreTrainedModel) -> tuple[Head, str | None]:
    """Return an exact head for `model`, and the reason why it is not the fast `LinearHead` (None if it is).

    The fast head must reproduce the model's own logits on hidden states of several magnitudes (a soft cap or
    a scale shows only on large ones). The probe does not run the decoder and changes nothing.
    """
    fallback = ModelForwardHead(model)
    linear = model.get_output_embeddings()
    if type(linear) is not nn.Linear:
        return fallback, f"its head is a {type(linear).__name__}, not a plain linear layer"
    transform = LogitTransform.from_config(model.config.get_text_config())
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(6, linear.in_features, generator=generator, dtype=torch.float64)
    states *= torch.tensor([0.1, 1.0, 10.0, 0.1, 1.0, 10.0], dtype=torch.float64)[:, None]
    states = states.to(linear.weight)
    with torch.no_grad():
        expected = fallback.compute_logits(states).float()
        found = transform(linear(states)).float()
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-5}.get(linear.weight.dtype, 2e-2)
    if expected.shape == found.shape and torch.allclose(expected, found, rtol=tolerance, atol=tolerance):
        return LinearHead(linear, transform), None
    return fallback, "its linear head is not followed by a known scale or soft cap"


def compute_max_entropy(vocab_size: int) -> float:
    """Return log V, the entropy of the uniform distribution over the head's V outputs."""
    return math.log(vocab_size)
