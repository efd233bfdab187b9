"""Plain log-probs and entropies: one sequence at a time, all logits, nothing shared, chunked or selected."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.rows import PromptWithResponses

GROUPS = [
    PromptWithResponses([11, 12, 13, 14, 15], [[21, 22, 23, 24], [31, 32], [21, 22, 99]]),
    PromptWithResponses([41], [[51], [61, 62, 63, 64, 65, 66, 67]]),
    PromptWithResponses(list(range(70, 90)), [[5, 6, 7], [8, 9, 10, 11]]),
]


def plain_scores(model: nn.Module, groups: Sequence[PromptWithResponses]) -> tuple[Tensor, Tensor]:
    """(S,) log-probs and (S,) mean entropies over log V, from `model(...).logits`."""
    logps, entropies = [], []
    for group in groups:
        for response in group.responses:
            ids = torch.tensor([[*group.prompt, *response]])
            logits = model(input_ids=ids).logits[0, len(group.prompt) - 1 : -1]
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            logps.append(torch.log_softmax(logits, -1)[range(len(response)), list(response)].sum())
            spread = torch.distributions.Categorical(logits=logits.detach()).entropy()
            entropies.append(spread.mean() / math.log(logits.shape[-1]))
    return torch.stack(logps), torch.stack(entropies)


def weighted(logps: Tensor) -> Tensor:
    """A scalar that weighs sequences differently, so that a mix-up of their gradients shows."""
    return (logps * torch.linspace(-1.0, 2.0, len(logps), dtype=logps.dtype)).sum()


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Gradients of all trained weights by name; the model's own are cleared before and after."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    assert found.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad(set_to_none=True)
    return found


def assert_equal_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], relative: float) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        error = (gradient - expected[name]).norm() / expected[name].norm().clamp_min(1e-30)
        assert error <= relative, f"{name}: relative gradient error {error:.2g}"
