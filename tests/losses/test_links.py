"""Values and slopes of links against their formulas in mpmath, up to |h| = 10,000 in float32."""

import inspect
import itertools
import math
from collections.abc import Callable
from typing import Any

import mpmath as mp
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mpmath import mpf
from torch import Tensor

from losses.config import LossConfig
from losses.links.catalog import LINKS, build_link
from losses.links.mallows_phi import mallows_phi

H = (0.0, 1e-3, 0.7, 4.0, 30.0, 1e3, 1e4)
BETAS = (0.01, 0.1, 1.0)


def sigma(x: mpf) -> mpf:
    return 1 / (1 + mp.exp(-x))


def log_sigma(x: mpf) -> mpf:
    return -mp.log1p(mp.exp(-x)) if x > 0 else x - mp.log1p(mp.exp(x))


def exact_ropo(h: mpf, b: mpf) -> mpf:
    a = mpf(14)
    return 4 * a**2 / (1 + a) ** 2 * sigma(-b * h) - 4 * a / (1 + a) ** 2 * log_sigma(b * h)


def exact_exo(h: mpf, b: mpf) -> mpf:
    e, x = mpf("0.001"), b * h
    return sigma(x) * (log_sigma(x) - mp.log(1 - e)) + sigma(-x) * (log_sigma(-x) - mp.log(e))


def exact_discopop(h: mpf, b: mpf) -> mpf:
    m = sigma(b * h / mpf("0.05"))
    return -sigma(-b * h / mpf("0.05")) * log_sigma(b * h) + m * mp.exp(-b * h)


def exact_robust(h: mpf, b: mpf) -> mpf:
    e = mpf("0.1")
    return (-(1 - e) * log_sigma(b * h) + e * log_sigma(-b * h)) / (1 - 2 * e)


def exact_orpo(w: mpf, v: mpf, b: mpf) -> mpf:
    return -b * log_sigma(w - v - mp.log(1 - mp.exp(w)) + mp.log(1 - mp.exp(v)))


EXACT: dict[str, Callable[..., mpf]] = {
    "sigmoid": lambda h, b: -log_sigma(b * h),
    "ipo": lambda h, b: (h - 1 / (2 * b)) ** 2,
    "hinge": lambda h, b: max(mpf(0), 1 - b * h),
    "robust": exact_robust,
    "ropo": exact_ropo,
    "exo": exact_exo,
    "discopop": exact_discopop,
    "none": lambda h, b: mpf(0),
    "nca": lambda w, v, b: -log_sigma(b * w) - log_sigma(-b * w) / 2 - log_sigma(-b * v) / 2,
    "bco_pair": lambda w, v, b: -log_sigma(b * w) - log_sigma(-b * v),
    "apo_zero": lambda w, v, b: 1 - sigma(b * w) + sigma(b * v),
    "apo_down": lambda w, v, b: sigma(b * w) + 1 - sigma(b * (w - v)),
    "sppo": lambda w, v, b: (w - 1 / (2 * b)) ** 2 + (v + 1 / (2 * b)) ** 2,
    "orpo": exact_orpo,
}


def build_named_link(name: str, beta: float, **stages: Any) -> tuple[Callable[..., Tensor], bool]:
    if name == "orpo":
        stages = {"length_normalized": True, "references": {"combine": "none"}}
    if name == "none":
        stages = {"sft_weight": 1, "references": {"combine": "none"}}
    link = LossConfig.model_validate({"link": {"type": name}, **stages}).link
    return build_link(link, beta=beta, neg_log_dispersion=torch.ones(())), link.two_sided


def list_points(name: str, two_sided: bool) -> list[tuple[float, ...]]:
    if name == "orpo":  # mean log-probs per token
        values = (-1e-3, -0.4, -2.0, -40.0, -1e4)
        return [(w, v) for w in values for v in values]
    signed = sorted({sign * h for h in H for sign in (1, -1)})
    return [(w, v) for w in signed for v in signed] if two_sided else [(h,) for h in signed]


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("name", EXACT)
def test_float32_values_and_slopes_at_any_size(name: str, beta: float) -> None:
    link, two_sided = build_named_link(name, beta)
    rows = torch.tensor(list_points(name, two_sided), dtype=torch.float32)
    arguments = [column.clone().requires_grad_() for column in rows.unbind(dim=1)]
    values = link(*arguments)
    slopes = (
        torch.autograd.grad(values.sum(), arguments, allow_unused=True, materialize_grads=True)
        if values.requires_grad
        else [torch.zeros_like(a) for a in arguments]
    )
    assert values.dtype == torch.float32

    with mp.workdps(60):
        exact_values, exact_slopes = [], []
        for row in rows.tolist():
            at = [mpf(x) for x in row]
            exact_values.append(float(EXACT[name](*at, mpf(beta))))
            exact_slopes.append(
                [float(_estimate_slope(EXACT[name], at, i, mpf(beta))) for i in range(len(at))]
            )
    expected = torch.tensor(exact_values, dtype=torch.float64)
    torch.testing.assert_close(values.detach().double(), expected, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(slopes, torch.tensor(exact_slopes, dtype=torch.float64).T, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6 * beta)


def _estimate_slope(function: Callable[..., mpf], at: list[mpf], index: int, beta: mpf) -> mpf:
    """Central difference at a step far below any curvature here, exact to about 30 digits."""
    step = mpf(10) ** -20
    up, down = list(at), list(at)
    up[index] += step
    down[index] -= step
    return (function(*up, beta) - function(*down, beta)) / (2 * step)


def test_certain_responses_have_finite_odds() -> None:
    link, _ = build_named_link("orpo", 0.1)
    for w, v in ((0.0, -1.0), (-1.0, 0.0), (0.0, 0.0)):
        chosen, rejected = (torch.tensor([x], requires_grad=True) for x in (w, v))
        loss = link(chosen, rejected)
        assert loss.isfinite()
        for slope in torch.autograd.grad(loss.sum(), (chosen, rejected)):
            assert slope.isfinite()


def test_every_link_has_a_config_a_module_of_its_name_and_its_declared_arguments() -> None:
    for name, link in LINKS.items():
        stages = {"dispersion": {"type": "constant", "value": 1}} if name == "mallows_phi" else {}
        _, two_sided = build_named_link(name, 0.1, **stages)
        tensors = [
            p.name for p in inspect.signature(link).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD
        ]
        assert tensors == (["u_chosen", "u_rejected"] if two_sided else ["h"])
        assert inspect.getmodule(link).__name__ == f"losses.links.{name}"  # type: ignore[union-attr]
    assert set(LINKS) == {*EXACT, "mallows_phi"}


# ---------------------------------------------------------------- mallows_phi


def exact_g(t: mpf, lam: mpf, edge: mpf) -> mpf:
    def q(u: mpf) -> mpf:
        return u / (1 - mp.exp(-lam * u))

    def outside(t: mpf) -> mpf:
        return q(t + 1) - q(t) if t > 0 else 1 - (q(-t + 1) - q(-t))

    if abs(t) >= edge:
        return outside(t)
    rise, slope = outside(edge) - mpf(1) / 2, mp.diff(outside, edge)
    a = (3 * rise - slope * edge) / (2 * edge)
    b = (slope * edge - rise) / (2 * edge**3)
    return mpf(1) / 2 + a * t + b * t**3


@pytest.mark.parametrize("lam", [1e-3, 0.1, 0.7, 2.67])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mallows_phi_at_any_size(lam: float, dtype: torch.dtype) -> None:
    h = torch.tensor(
        [0.0, 0.3, -0.3, 0.49, 2.0, -2.0, 50.0, -50.0, 1e3, -1e3, 1e4, -1e4], dtype=dtype, requires_grad=True
    )
    dispersion = torch.tensor(lam, dtype=dtype)
    values = mallows_phi(h, beta=0.5, neg_log_dispersion=dispersion, smoothing=0.5)
    (slopes,) = torch.autograd.grad(values.sum(), h)
    assert values.dtype == dtype

    exact_lam = mpf(dispersion.item())
    for at, value, slope in zip(h.tolist(), values.tolist(), slopes.tolist(), strict=True):
        t = mpf(at) / 2
        # 1 - g cancels as many digits as exp(-lam t) is small.
        with mp.workdps(50 + int(lam * abs(t))):
            step = mpf(10) ** -20
            g = exact_g(t, exact_lam, mpf("0.5"))
            up, down = exact_g(t + step, exact_lam, mpf("0.5")), exact_g(t - step, exact_lam, mpf("0.5"))
            exact = float(-mp.log(g)), float(-(up - down) / (2 * step) / g / 2)
        relative = 1e-6 if dtype == torch.float32 else 1e-8
        assert value == pytest.approx(exact[0], rel=relative, abs=1e-38)
        assert slope == pytest.approx(exact[1], rel=relative, abs=1e-38)


@pytest.mark.parametrize("lam", [0.05, 0.7, 2.0])
def test_mallows_phi_is_the_share_of_rankings_that_agree(lam: float) -> None:
    """All rankings of 5 items, each with weight exp(-lam * number of inverted pairs)."""
    agreed, total = torch.zeros(4, dtype=torch.float64), 0.0
    for ranking in itertools.permutations(range(5)):
        inversions = sum(a > b for a, b in itertools.combinations(ranking, 2))
        weight = math.exp(-lam * inversions)
        total += weight
        for distance in range(1, 5):
            agreed[distance - 1] += weight * (ranking.index(0) < ranking.index(distance))
    distances = torch.arange(1, 5, dtype=torch.float64)
    torch.testing.assert_close(compute_probability(distances, lam, 0.5), agreed / total, rtol=1e-12, atol=0)


lams = st.floats(0.01, 5)
edges = st.floats(0.01, 3)


def compute_probability(t: Tensor, lam: float, edge: float) -> Tensor:
    dispersion = torch.tensor(lam, dtype=torch.float64)
    return (-mallows_phi(t, beta=1.0, neg_log_dispersion=dispersion, smoothing=edge)).exp()


@settings(max_examples=100, deadline=None)
@given(lam=lams, edge=edges)
def test_mallows_probability_rises_and_is_symmetric(lam: float, edge: float) -> None:
    t = torch.linspace(-12, 12, 401, dtype=torch.float64)
    g = compute_probability(t, lam, edge)
    torch.testing.assert_close(g + g.flip(0), torch.ones_like(g), rtol=1e-12, atol=0)
    # Strictly, except where g is 1 to the last bit.
    rises = g.diff() > 0
    assert (rises | (g[1:] > 1 - 1e-12)).all()


@settings(max_examples=100, deadline=None)
@given(lam=lams, edge=edges, side=st.sampled_from([1.0, -1.0]))
def test_mallows_loss_has_one_value_and_slope_at_the_smoothing_edge(
    lam: float, edge: float, side: float
) -> None:
    dispersion = torch.tensor(lam, dtype=torch.float64)
    gap = 1e-11
    t = (side * torch.tensor([edge - gap, edge + gap], dtype=torch.float64)).requires_grad_()
    losses = mallows_phi(t, beta=1.0, neg_log_dispersion=dispersion, smoothing=edge)
    slopes = torch.autograd.grad(losses.sum(), t)[0]
    assert losses[0].item() == pytest.approx(losses[1].item(), abs=1e-7)
    assert slopes[0].item() == pytest.approx(slopes[1].item(), rel=1e-5)


def test_mallows_slope_at_the_start_is_not_zero() -> None:
    h = torch.zeros(1, requires_grad=True)
    (slope,) = torch.autograd.grad(
        mallows_phi(h, beta=0.1, neg_log_dispersion=torch.tensor(0.3), smoothing=0.5).sum(), h
    )
    assert slope.item() < -1e-3
