"""Comparing a run's needs with the cluster's resources: refused with the arithmetic, never left pending."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orchestrator.config.run import RunConfig
from orchestrator.config.sections import Resources
from orchestrator.errors import UsageError

REFERENCE_ROLE, TRAINER_ROLE = "polyref_reference", "polyref_trainer"
"""Custom resources that a cluster file gives to the nodes meant for references and for workers. Where some
node has one, the actors that belong there request ROLE_AMOUNT of it."""
ROLE_AMOUNT = 0.001

REPLICA_CPU = 0.1
WORKER_CPU = 0.75
TRIAL_CPU = 0.1
"""Cores requested on a cluster without GPUs: small fractions, so that a laptop with 2 cores runs everything.

A trial of several workers needs a little for the process that starts them; a trial of one worker is that
worker."""


@dataclass(frozen=True)
class Need:
    """A number of equal bundles of resources, and the role that needs them."""

    role: str
    count: int
    bundle: Mapping[str, float]


Node = Mapping[str, float]
"""Total resources of a node that is alive or that an autoscaler may start."""


@dataclass(frozen=True)
class ClusterProfile:
    """The properties of a cluster that default resource requests depend on.

    Attributes:
        gpus: whether any node has a GPU.
        roles: those of REFERENCE_ROLE and TRAINER_ROLE that some node has.
    """

    gpus: bool = False
    roles: frozenset[str] = frozenset()

    @classmethod
    def from_nodes(cls, nodes: Sequence[Node]) -> "ClusterProfile":
        """Return the profile of a cluster of these nodes."""
        offered = {name for node in nodes for name, amount in node.items() if amount > 0}
        return cls("GPU" in offered, frozenset(offered & {REFERENCE_ROLE, TRAINER_ROLE}))

    @property
    def device_type(self) -> str:
        """Device type that models run on in this cluster: "cuda" or "cpu"."""
        return "cuda" if self.gpus else "cpu"


def build_replica_bundle(resources: Resources, profile: ClusterProfile) -> dict[str, float]:
    """Return one reference replica's resources; a whole GPU by default where the cluster has GPUs."""
    return _build_bundle(resources, profile, cpu=REPLICA_CPU, role=REFERENCE_ROLE)


def build_worker_bundle(resources: Resources, profile: ClusterProfile) -> dict[str, float]:
    """Return one policy worker's resources; a whole GPU by default where the cluster has GPUs."""
    return _build_bundle(resources, profile, cpu=WORKER_CPU, role=TRAINER_ROLE)


def _build_bundle(
    resources: Resources, profile: ClusterProfile, *, cpu: float, role: str
) -> dict[str, float]:
    default_cpu, default_gpu = (1.0, 1.0) if profile.gpus else (cpu, 0.0)
    bundle = {
        "CPU": default_cpu if resources.cpu is None else resources.cpu,
        "GPU": default_gpu if resources.gpu is None else resources.gpu,
        **({role: ROLE_AMOUNT} if role in profile.roles else {}),
        **resources.custom,
    }
    return {name: amount for name, amount in bundle.items() if amount > 0}


def list_reference_needs(config: RunConfig, profile: ClusterProfile) -> list[Need]:
    """List the bundles of served references and of a reward model; references scored in process need none."""
    needs = [
        Need(f"reference {name}", reference.replicas, build_replica_bundle(reference.resources, profile))
        for name, reference in config.references.models.items()
        if not reference.scored_by_workers
    ]
    reward = config.evaluation.sampling and config.evaluation.sampling.reward
    if reward and reward.model:
        needs.append(Need("reward model", 1, build_replica_bundle(reward.resources, profile)))
    return needs


def list_worker_needs(config: RunConfig, profile: ClusterProfile) -> list[Need]:
    """List the bundles of the policy's workers."""
    bundle = build_worker_bundle(config.parallel.resources, profile)
    return [Need("worker", config.parallel.workers, bundle)]


def refuse_impossible(config: RunConfig, nodes: Sequence[Node]) -> None:
    """Refuse a run that needs more than the nodes' total resources.

    Raises:
        UsageError: the message has the arithmetic, e.g.
            "needs 3 GPUs: 2 references + 1 worker; the cluster has 2".
    """
    profile = ClusterProfile.from_nodes(nodes)
    references, workers = list_reference_needs(config, profile), list_worker_needs(config, profile)
    stages = [references + workers] if config.references.mode == "live" else [references, workers]
    for stage in stages:
        _refuse_if_short(stage, nodes)
        refuse_if_scattered(stage, nodes)


def list_trial_bundles(config: RunConfig, profile: ClusterProfile) -> list[dict[str, float]]:
    """Return one trial's bundles: its only worker's, or its driver's followed by its workers'."""
    workers = [build_worker_bundle(config.parallel.resources, profile)] * config.parallel.workers
    return workers if len(workers) == 1 else [{"CPU": TRIAL_CPU}, *workers]


def count_trial_slots(config: RunConfig, nodes: Sequence[Node], *, routers: float) -> int:
    """Count the trials that can run at the same time beside the references, which are placed first.

    Args:
        config: the run file that trials start from.
        nodes: total resources of every node.
        routers: cores that the references' routers reserve.

    Raises:
        UsageError: not even one trial fits; the message has the arithmetic.
    """
    refuse_impossible(config, nodes)
    profile, free = ClusterProfile.from_nodes(nodes), [defaultdict(float, node) for node in nodes]
    served = list_reference_needs(config, profile)
    if config.references.mode == "precompute":  # they have ended by then; a reward model for samples has not
        served = [need for need in served if not need.role.startswith("reference")]
    reference_bundles = [("reference", need.bundle) for need in served for _ in range(need.count)]
    _place_bundles([("routers", {"CPU": routers}), *reference_bundles], free)
    trial = [("trial", bundle) for bundle in list_trial_bundles(config, profile)]
    if not all(bundle for _, bundle in trial):
        raise UsageError("a trial requests no resources; set parallel.resources.cpu or .gpu to more than 0")
    slots = 0
    while _place_bundles(trial, free) is None:
        slots += 1
    if not slots:
        reserved = _format_terms([(need, need.count) for need in served]) or "nothing"
        raise UsageError(
            f"not even one trial fits: it requests {_format_bundle_sum(trial)}, beside {reserved}; "
            f"nodes offer {_format_nodes(nodes)}. "
            "Lower parallel.workers or resources (a single worker may take a fraction, e.g. {gpu: 0.5}); "
            "references.mode: precompute scores everything first and frees the references' devices"
        )
    return slots


def _refuse_if_short(needs: Sequence[Need], nodes: Sequence[Node]) -> None:
    for resource in sorted({name for need in needs for name in need.bundle}):
        terms = [(need, need.count * need.bundle[resource]) for need in needs if resource in need.bundle]
        wanted = sum(amount for _, amount in terms)
        offered = sum(node.get(resource, 0) for node in nodes)
        if wanted > offered + 1e-9:
            raise UsageError(
                f"needs {_format_amount(wanted, resource)}: {_format_terms(terms)}; "
                f"the cluster has {offered:g}. "
                "Lower parallel.workers, a reference's replicas, or resources (references and a single "
                "worker may take fractions, e.g. {gpu: 0.5}); references.mode: precompute lets references "
                "and workers take turns"
            )


def refuse_if_scattered(needs: Sequence[Need], nodes: Sequence[Node]) -> None:
    """Refuse needs of which a bundle fits on no single node, even if all fit in total.

    The scarcest bundles are placed first: those with GPUs or custom resources before those with cores alone,
    which are placed on the nodes with the fewest GPUs.
    """
    bundles = [(need.role, need.bundle) for need in needs for _ in range(need.count)]
    unplaced = _place_bundles(bundles, [defaultdict(float, node) for node in nodes])
    if unplaced is not None:
        raise UsageError(
            f"{unplaced[0]} needs {_format_bundle_sum([unplaced])} on one node, and no node has room for it "
            f"beside the rest (nodes offer: {_format_nodes(nodes)}). Lower its resources or use larger nodes"
        )


Bundle = tuple[str, Mapping[str, float]]
"""A role, and the resources that it needs on one node."""


def _place_bundles(bundles: Sequence[Bundle], free: list[defaultdict[str, float]]) -> Bundle | None:
    """Subtract the bundles from the free resources.

    Returns:
        The first bundle that does not fit, in which case nothing is subtracted; None if all fit.
    """
    left = [node.copy() for node in free]
    for role, bundle in sorted(bundles, key=lambda item: _rank_scarcity(item[1]), reverse=True):
        candidates = [node for node in left if all(node[r] + 1e-9 >= a for r, a in bundle.items())]
        chosen = min(candidates, key=lambda node: (node["GPU"], node["CPU"]), default=None)
        if chosen is None:
            return role, bundle
        for resource, amount in bundle.items():
            chosen[resource] -= amount
    free[:] = left
    return None


def _rank_scarcity(bundle: Mapping[str, float]) -> tuple[int, float, float]:
    custom = sum(name not in ("CPU", "GPU") for name in bundle)
    return custom, bundle.get("GPU", 0), bundle.get("CPU", 0)


def _format_nodes(nodes: Sequence[Node]) -> str:
    """Format nodes as in `1 CPU; 4 x 8 CPU, 1 GPU (polyref_trainer)`."""
    counts = Counter(_format_node(node) for node in nodes)
    return "; ".join(offer if count == 1 else f"{count} x {offer}" for offer, count in counts.items())


def _format_node(node: Node) -> str:
    amounts = ", ".join(f"{node[name]:g} {name}" for name in ("CPU", "GPU") if node.get(name)) or "nothing"
    roles = [role for role in (REFERENCE_ROLE, TRAINER_ROLE) if node.get(role)]
    return f"{amounts} ({', '.join(roles)})" if roles else amounts


def _format_bundle_sum(bundles: Sequence[Bundle]) -> str:
    total: Counter[str] = Counter()
    for _, bundle in bundles:
        total.update(bundle)
    return ", ".join(f"{amount:g} {resource}" for resource, amount in total.items())


def _format_amount(count: float, resource: str) -> str:
    plural = "s" if resource in ("CPU", "GPU") and count != 1 else ""
    return f"{count:g} {resource}{plural}"


def _format_terms(terms: Sequence[tuple[Need, float]]) -> str:
    """Format `2 references + 1 worker` where each needs one, `2 references x 0.5 + ...` otherwise."""
    counts: Counter[tuple[str, float]] = Counter()
    for need, amount in terms:
        counts[need.role.split()[0], amount / need.count] += need.count
    parts = [
        f"{count} {role}{'s' if count > 1 else ''}" + ("" if each == 1 else f" x {each:g}")
        for (role, each), count in counts.items()
    ]
    return " + ".join(parts)
