"""Links that are Python functions of the user's own: no file of polyref's needs to change for one."""

from collections.abc import Callable
from functools import cache
from importlib import import_module

import torch
from torch import Tensor

from losses.settings import LossError

_registered: dict[str, Callable[..., Tensor]] = {}


def register_link(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Make a function a link of this process, under its own name; also as a decorator.

    `LossConfig(link={"type": "function", "function": name})` then uses it. A run file names a function that
    workers can import instead: `package.module:function`.

    Args:
        function: elementwise, of h and keyword `beta`; or of u_chosen, u_rejected and `beta`, where the
            config sets `two_sided: true`. Registered again under one name, the last one counts.
    """
    _registered[function.__name__] = function
    _find_checked.cache_clear()
    return function


def find_link_function(path: str, *, two_sided: bool) -> Callable[..., Tensor]:
    """Find a registered link, or import `package.module:function`, and check it once.

    Raises:
        LossError: there is no such function, or `check_link_function` refuses it.
    """
    return _find_checked(path, two_sided)


@cache
def _find_checked(path: str, two_sided: bool) -> Callable[..., Tensor]:
    module, _, name = path.rpartition(":")
    if not module:
        function = _registered.get(name)
        known = f"; registered are {', '.join(_registered)}" if _registered else ""
    else:
        try:
            function = getattr(import_module(module), name, None)
        except ImportError as error:
            raise LossError(f"link.function {path}: {module} cannot be imported: {error}") from error
        known = ""
    if function is None:
        raise LossError(
            f"link.function {path}: there is no such function{known}; name one as package.module:function, "
            "or register it with polyref.register_link"
        )
    with torch.inference_mode(False), torch.enable_grad():  # it may be first used in an evaluation
        check_link_function(function, path, two_sided=two_sided)
    return function


def check_link_function(function: Callable[..., Tensor], path: str, *, two_sided: bool) -> None:
    """Refuse a function that is not an elementwise, differentiable link.

    It is called with small float64 tensors, one of them (3, 2), and its gradients are compared.

    Raises:
        LossError: it cannot be called as a link is, its result has another shape, depends on other pairs, is
            not finite, or has no gradient.
    """
    count = 2 if two_sided else 1
    shown = f"link.function {path}"
    call = f"{'u_chosen, u_rejected' if two_sided else 'h'}, beta=0.1"
    arguments = [
        torch.linspace(-2.0, -0.1, 6, dtype=torch.float64).roll(shift).reshape(3, 2).requires_grad_()
        for shift in range(count)
    ]
    try:
        losses = function(*arguments, beta=0.1)
        single = function(*(argument[1, 1] for argument in arguments), beta=0.1)
    except Exception as error:  # a function of the user's may raise anything
        raise LossError(f"{shown} fails as f({call}): {type(error).__name__}: {error}") from error
    if not isinstance(losses, Tensor) or losses.shape != (3, 2):
        given = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise LossError(
            f"{shown} gives {given} for arguments of shape (3, 2); it must be elementwise, f({call})"
        )
    if not losses.isfinite().all():
        raise LossError(f"{shown} is not finite between -2 and -0.1")
    if not losses.requires_grad:
        raise LossError(f"{shown} has no gradient; compute it with torch, without detach, item or numpy")
    gradients = torch.autograd.grad(losses[1, 1], arguments, allow_unused=True)
    if not any(gradient is not None and gradient[1, 1] != 0 for gradient in gradients):
        raise LossError(f"{shown} has a gradient of zero, so that nothing would be learnt")
    others = [gradient.flatten()[[0, 1, 2, 4, 5]] for gradient in gradients if gradient is not None]
    apart = not torch.allclose(torch.as_tensor(single).to(losses), losses[1, 1], rtol=1e-9, atol=1e-12)
    if apart or any(gradient.any() for gradient in others):
        raise LossError(f"{shown} depends on the other pairs of its batch; it must be elementwise")
