"""Nodes that are alive, and those that an autoscaler may start."""

import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import ray
import yaml

from orchestrator.errors import UsageError

_NODE_TYPE = "ray.io/node-group"
"""The label that Ray gives a node with the name of its type in the cluster file."""


NODE_TYPES = "POLYREF_NODE_TYPES"
"""Set where it cannot be seen what an autoscaler may start."""


def list_node_resources() -> list[dict[str, float]]:
    """Total resources of every node that is alive, and of those that the autoscaler may still start."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    started = Counter(node.get("Labels", {}).get(_NODE_TYPE) for node in alive)
    return [node["Resources"] for node in alive] + [
        dict(kind["resources"])
        for name, kind in _read_node_types().items()
        for _ in range(kind["max_workers"] - started[name])
    ]


def count_nodes() -> int:
    """How many nodes are alive."""
    return sum(node["Alive"] for node in ray.nodes())


def _read_node_types() -> Mapping[str, Any]:
    """What the autoscaler may start: `{type: {max_workers, resources}}`.

    Ray has an answer of its own (`get_cluster_config`) that its open source never fills, so the file is read
    that the autoscaler of this cluster was started with; it runs on the head, as submitted jobs do. One's own
    machines, whose size it cannot know, are left out. Where it is no process here, as on Kubernetes,
    POLYREF_NODE_TYPES says the same in JSON.
    """
    if NODE_TYPES in os.environ:
        try:
            return {
                str(name): {"max_workers": int(kind["max_workers"]), "resources": dict(kind["resources"])}
                for name, kind in json.loads(os.environ[NODE_TYPES]).items()
            }
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UsageError(
                f"{NODE_TYPES} is not the autoscaler's node types in JSON ({type(error).__name__}: {error}); "
                'write {"trainers": {"max_workers": 4, "resources": {"CPU": 48, "GPU": 4}}}'
            ) from None
    autoscaler = f"--gcs-address={ray.get_runtime_context().gcs_address}"
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        files = [word.partition("=")[2] for word in command if word.startswith("--autoscaling-config=")]
        if autoscaler in command and files:
            config = yaml.safe_load(Path(files[0]).expanduser().read_text(encoding="utf-8"))
            kinds = config["available_node_types"]
            return {n: k for n, k in kinds.items() if k.get("resources") and n != config["head_node_type"]}
    return {}
