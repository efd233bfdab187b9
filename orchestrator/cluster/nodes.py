"""Nodes that are alive, and nodes that an autoscaler may start."""

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
"""Variable with the node types that an autoscaler may start, where they cannot be read from its file."""


def list_node_resources() -> list[dict[str, float]]:
    """Return the total resources of every node that is alive or that the autoscaler may still start."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    started = Counter(node.get("Labels", {}).get(_NODE_TYPE) for node in alive)
    return [node["Resources"] for node in alive] + [
        dict(node_type["resources"])
        for name, node_type in _read_node_types().items()
        for _ in range(node_type["max_workers"] - started[name])
    ]


def count_nodes() -> int:
    """Return how many nodes are alive."""
    return sum(node["Alive"] for node in ray.nodes())


def _read_node_types() -> Mapping[str, Any]:
    """Return the node types that the autoscaler may start: `{type: {max_workers, resources}}`.

    Ray has a call for it (`get_cluster_config`) that its open source never fills, so this reads the file that
    the autoscaler of this cluster was started with; it runs on the head, as submitted jobs do. On-premises
    machines, whose size the autoscaler cannot know, are left out. Where it is not a process on this machine,
    as on Kubernetes, POLYREF_NODE_TYPES gives the same in JSON.
    """
    if NODE_TYPES in os.environ:
        try:
            return {
                str(name): {"max_workers": int(entry["max_workers"]), "resources": dict(entry["resources"])}
                for name, entry in json.loads(os.environ[NODE_TYPES]).items()
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
            return {
                name: entry
                for name, entry in config["available_node_types"].items()
                if entry.get("resources") and name != config["head_node_type"]
            }
    return {}
