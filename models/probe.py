"""Logits of a trained model on a few token rows, for comparison with the exported model when it is loaded."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

_PROBE_ROWS, _PROBE_TOKENS = 4, 16
# Nats per token that rounding may make. Float32 on two devices makes 1e-9; on SmolLM2-135M weights rounded to
# bfloat16 make 0.002, and activations rounded to 8 bits, as in files of earlier versions, 0.05.
_FULL_PRECISION, _HALF_PRECISION = 1e-6, 5e-2
# An export must be nearer to the trained policy than this share of the initial policy's distance. Where the
# trained change was lost the share is 1; where it was rounded to 8 bits, 0.4.
_NEAR = 0.25


@dataclass(frozen=True)
class LogitProbe:
    """A few token rows and the trained model's logits for them, taken before it was exported."""

    rows: Tensor
    """(R, T) token ids, all rows equally long."""
    logits: Tensor
    """(R, T, V) float32."""
    dtype: torch.dtype
    """The dtype in which `logits` were computed."""
    initial_logits: Tensor | None = None
    """(R, T, V) float32, the initial policy's; None in files of earlier versions."""

    def save(self, path: Path) -> None:
        """Write a safetensors file, for a registration by another process."""
        tensors = {"rows": self.rows, "logits": self.logits, "initial_logits": self.initial_logits}
        save_file(
            {name: tensor for name, tensor in tensors.items() if tensor is not None},
            path,
            {"dtype": str(self.dtype).removeprefix("torch.")},
        )

    @classmethod
    def load(cls, path: Path) -> "LogitProbe":
        """Read a file that `save` wrote."""
        with safe_open(path, "pt") as file:
            dtype = getattr(torch, file.metadata()["dtype"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return cls(tensors["rows"], tensors["logits"], dtype, tensors.get("initial_logits"))

    def measure_distance(self, logits: Tensor) -> float:
        """Return KL(trained || other), the mean over the probe's tokens, in nats per token."""
        trained, other = (x.double().log_softmax(-1) for x in (self.logits, logits))
        return float((trained.exp() * (trained - other)).sum(-1).mean())

    def measure_initial_distance(self) -> float | None:
        """Return `measure_distance` of the initial policy; None if the probe does not hold its logits."""
        return None if self.initial_logits is None else self.measure_distance(self.initial_logits)

    def find_fault(self, logits: Tensor, dtype: torch.dtype) -> str | None:
        """Return why `logits` of weights of `dtype` are not the trained policy's; None if they are.

        They may differ by rounding, and must be clearly nearer to the trained policy's than the initial
        policy's are, unless training changed nothing.
        """
        if logits.shape != self.logits.shape:
            return f"its logits are {tuple(logits.shape)}, not {tuple(self.logits.shape)}"
        distance, initial = self.measure_distance(logits), self.measure_initial_distance()
        full = {dtype, self.dtype} <= {torch.float32, torch.float64}
        allowed = _FULL_PRECISION if full else _HALF_PRECISION
        if initial is not None and initial > _FULL_PRECISION:
            allowed = min(allowed, _NEAR * initial)
        if distance <= allowed:
            return None
        start = "" if initial is None else f"; the initial policy's differ by {initial:.1e}"
        return (
            f"its logits differ by {distance:.1e} nats per token from the trained policy's, "
            f"where {allowed:.0e} is allowed{start}"
        )


def build_probe_rows(sequences: Sequence[Sequence[int]]) -> Tensor:
    """Cut a few sequences to (R, T) rows of equal length; raise ValueError if all of them are empty."""
    chosen = [s for s in sequences if len(s) > 0][:_PROBE_ROWS]
    if not chosen:
        raise ValueError("a probe needs at least one token row that is not empty")
    length = min(_PROBE_TOKENS, *(len(s) for s in chosen))
    return torch.tensor([list(map(int, s[:length])) for s in chosen])


def compute_probe_logits(model: "torch.nn.Module", rows: Tensor) -> Tensor:
    """(R, T) token ids -> (R, T, V) float32 logits on the CPU, in eval mode."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            logits: Tensor = model(input_ids=rows.to(next(model.parameters()).device), use_cache=False).logits
    finally:
        model.train(was_training)
    return logits.float().cpu().contiguous()
