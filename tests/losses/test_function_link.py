"""Links that are functions of the user's own: found, checked, and the same as a link of polyref's."""

from pathlib import Path

import pytest
import torch

from losses.config import LossConfig
from losses.links.function import register_link
from losses.preference import preference_loss
from losses.scores import PairScores, ReferenceScores
from losses.settings import LossError

MODULE = """
import torch
from torch.nn.functional import logsigmoid


def exponential(h, *, beta):
    return torch.exp(-beta * h)


def own_sigmoid(h, *, beta):
    return -logsigmoid(beta * h)


def own_nca(u_chosen, u_rejected, *, beta):
    chosen, rejected = beta * u_chosen, beta * u_rejected
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


def mean_of_all(h, *, beta): return (-beta * h.mean()).exp() + 0 * h
def ranked(h, *, beta): return h.softmax(0)
def summed(h, *, beta): return h.sum()
def without_beta(h): return h
def detached(h, *, beta): return h.detach()
def constant(h, *, beta): return 0 * h
def logarithm(h, *, beta): return h.log()
def text(h, *, beta): return "h"
"""


@pytest.fixture
def own_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of a module on the path that has links."""
    name = f"links_of_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    return name


def scores(seed: int, grad: bool = False) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [
        *(-20 * torch.rand(8, generator=draw, dtype=torch.float64) for _ in range(2)),
        *(torch.randint(1, 9, (8,), generator=draw).double() for _ in range(2)),
    ]


def losses_and_gradient(**config: object) -> tuple[torch.Tensor, torch.Tensor]:
    chosen, *rest = scores(0)
    policy = PairScores(chosen.requires_grad_(), *rest)
    reference = ReferenceScores(*scores(1), torch.full((8,), 0.3).double(), torch.full((8,), 0.4).double())
    settings = {"beta": 0.2, "soft_label": {"type": "geometric"}} | config
    labels = torch.linspace(0.5, 1, 8, dtype=torch.float64)
    out = preference_loss(policy, [reference], config=LossConfig.model_validate(settings), soft_labels=labels)
    (gradient,) = torch.autograd.grad(out.losses.sum(), chosen)
    return out.losses.detach(), gradient


@pytest.mark.parametrize(
    ("function", "two_sided", "own"),
    [("own_sigmoid", False, "sigmoid"), ("own_nca", True, "nca")],
)
@pytest.mark.parametrize("soft_label", ["none", "geometric", "mixture"])
def test_a_function_gives_what_the_same_link_of_polyrefs_gives(
    own_losses: str, function: str, two_sided: bool, own: str, soft_label: str
) -> None:
    link = {"type": "function", "function": f"{own_losses}:{function}", "two_sided": two_sided}
    stages = {"soft_label": {"type": soft_label}, "dispersion": {"type": "entropy"}}
    mine, theirs = losses_and_gradient(link=link, **stages), losses_and_gradient(link={"type": own}, **stages)
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_a_function_is_called_with_h_and_beta(own_losses: str) -> None:
    link = {"type": "function", "function": f"{own_losses}:exponential"}
    losses, gradient = losses_and_gradient(link=link, soft_label={"type": "none"})
    (chosen, rejected, *_), (ref_chosen, ref_rejected, *_) = scores(0), scores(1)
    h = (chosen - ref_chosen) - (rejected - ref_rejected)
    torch.testing.assert_close(losses, (-0.2 * h).exp(), rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, -0.2 * (-0.2 * h).exp(), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("mean_of_all", "depends on the other pairs"),
        ("ranked", "depends on the other pairs"),
        ("summed", r"gives \(\) for arguments of shape \(3, 2\)"),
        ("without_beta", r"fails as f\(h, beta=0.1\): TypeError"),
        ("detached", "has no gradient"),
        ("constant", "a gradient of zero"),
        ("logarithm", "is not finite"),
        ("text", "gives str for"),
        ("missing", "there is no such function"),
    ],
)
def test_what_is_no_link_is_refused(own_losses: str, function: str, message: str) -> None:
    with pytest.raises(LossError, match=f"link.function {own_losses}:{function}:? .*{message}"):
        losses_and_gradient(link={"type": "function", "function": f"{own_losses}:{function}"})


def test_one_argument_too_few_is_refused(own_losses: str) -> None:
    with pytest.raises(LossError, match=r"fails as f\(u_chosen, u_rejected, beta=0.1\): TypeError"):
        losses_and_gradient(
            link={"type": "function", "function": f"{own_losses}:exponential", "two_sided": True}
        )


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_function_may_be_first_used_without_gradients(own_losses: str, mode: type) -> None:
    link = {"type": "function", "function": f"{own_losses}:exponential"}
    with mode():
        policy = PairScores(*scores(0))
        out = preference_loss(policy, [ReferenceScores(*scores(1))], config=LossConfig(link=link))
    assert out.losses.shape == (8,)


def test_a_missing_module_is_refused() -> None:
    with pytest.raises(LossError, match="no_such_module cannot be imported"):
        losses_and_gradient(link={"type": "function", "function": "no_such_module:f"})


def test_a_registered_function_is_found_by_its_name_and_replaced_by_the_next() -> None:
    def squared(h: torch.Tensor, *, beta: float) -> torch.Tensor:
        return (beta * h - 1) ** 2

    link = {"type": "function", "function": "squared"}
    with pytest.raises(LossError, match=r"link.function squared: there is no such function"):
        losses_and_gradient(link=link)
    assert register_link(squared) is squared
    before, _ = losses_and_gradient(link=link)

    @register_link
    def squared(h: torch.Tensor, *, beta: float) -> torch.Tensor:
        return (beta * h - 2) ** 2

    after, _ = losses_and_gradient(link=link)
    assert not torch.equal(before, after)
