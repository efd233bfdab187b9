"""Links by name. A link is elementwise in h, or in u_chosen and u_rejected if its config is `two_sided`."""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

from torch import Tensor

from losses.config import FunctionLink, LinkConfig
from losses.links.apo_down import apo_down
from losses.links.apo_zero import apo_zero
from losses.links.bco_pair import bco_pair
from losses.links.discopop import discopop
from losses.links.exo import exo
from losses.links.function import find_link_function
from losses.links.hinge import hinge
from losses.links.ipo import ipo
from losses.links.mallows_phi import mallows_phi
from losses.links.nca import nca
from losses.links.none import none
from losses.links.orpo import orpo
from losses.links.robust import robust
from losses.links.ropo import ropo
from losses.links.sigmoid import sigmoid
from losses.links.sppo import sppo

_LINKS = (
    *(sigmoid, ipo, hinge, robust, ropo, exo, discopop, mallows_phi, none),
    *(nca, bco_pair, apo_zero, apo_down, sppo, orpo),
)

LINKS: Mapping[str, Callable[..., Tensor]] = MappingProxyType({link.__name__: link for link in _LINKS})


def build_link(config: LinkConfig, *, beta: float, neg_log_dispersion: Tensor) -> Callable[..., Tensor]:
    """Return the link with its parameters filled in, a function of its tensor arguments alone.

    Args:
        config: type of link and its parameters.
        beta: inverse temperature.
        neg_log_dispersion: broadcastable to the arguments; only mallows_phi reads it.
    """
    if isinstance(config, FunctionLink):
        return partial(find_link_function(config.function, two_sided=config.two_sided), beta=beta)
    parameters = config.model_dump(exclude={"type"})
    if config.type == "mallows_phi":
        parameters["neg_log_dispersion"] = neg_log_dispersion
    return partial(LINKS[config.type], beta=beta, **parameters)
