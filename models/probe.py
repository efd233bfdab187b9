"""Logits of a trained model on a few token rows, for comparison with the exported model when it is loaded."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

_PROBE_ROWS, _PROBE_TOKENS = 4, 16


@dataclass(frozen=True)
class LogitProbe:
    """A few token rows and the trained model's logits for them, taken before it was exported."""

    rows: Tensor
    """(R, T) token ids, all rows equally long."""
    logits: Tensor
    """(R, T, V) float32."""
    dtype: torch.dtype
    """The dtype in which the trained model computed."""

    @classmethod
    def from_model(
        cls,
        model: "torch.nn.Module",
        sequences: Sequence[Sequence[int]],
        *,
        logits: Callable[[Tensor], Tensor] | None = None,
    ) -> "LogitProbe":
        """Run the trained model (adapter enabled) over the first tokens of a few sequences.

        `logits` replaces a plain call of the model where that is not possible, as with sharded weights:
        (R, T) ids -> (R, T, V).

        Raises ValueError if all sequences are empty.
        """
        chosen = [s for s in sequences if len(s) > 0][:_PROBE_ROWS]
        if not chosen:
            raise ValueError("a probe needs at least one token row that is not empty")
        length = min(_PROBE_TOKENS, *(len(s) for s in chosen))
        parameter = next(model.parameters())
        rows = torch.tensor([list(map(int, s[:length])) for s in chosen])
        return cls(
            rows, compute_probe_logits(model, rows) if logits is None else logits(rows), parameter.dtype
        )

    def save(self, path: Path) -> None:
        """Write a safetensors file, for a registration by another process."""
        save_file(
            {"rows": self.rows, "logits": self.logits},
            path,
            {"dtype": str(self.dtype).removeprefix("torch.")},
        )

    @classmethod
    def load(cls, path: Path) -> "LogitProbe":
        """Read a file that `save` wrote."""
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            dtype = getattr(torch, file.metadata()["dtype"])
        tensors = load_file(path)
        return cls(tensors["rows"], tensors["logits"], dtype)


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
