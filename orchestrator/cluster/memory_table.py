"""Tables of memory estimates: the one of `polyref check`, and those in the documentation."""

from collections.abc import Sequence
from math import ceil

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from orchestrator.cluster.memory import (
    DEVICE_SIZES_GIB,
    GIB,
    STRATEGIES,
    USABLE_SHARE,
    Memory,
    PolicyWorkload,
    Sizing,
    Strategy,
    estimate_replica_memory,
    estimate_worker_memory,
    find_fewest_workers,
)
from orchestrator.cluster.model_shape import Shape

MODELS = {
    "0.135B": Shape.from_dimensions(
        layers=30, hidden=576, intermediate=1536, heads=9, kv_heads=3, vocabulary=49152, tied=True
    ),
    "1.2B": Shape.from_dimensions(
        layers=16, hidden=2048, intermediate=8192, heads=32, kv_heads=8, vocabulary=128256, tied=True
    ),
    "8B": Shape.from_dimensions(
        layers=32, hidden=4096, intermediate=14336, heads=32, kv_heads=8, vocabulary=128256
    ),
    "70B": Shape.from_dimensions(
        layers=80, hidden=8192, intermediate=28672, heads=64, kv_heads=8, vocabulary=128256
    ),
}
"""From the configs of SmolLM2-135M, Llama-3.2-1B, Llama-3.1-8B and Llama-3.1-70B."""
DOCUMENTED_WORKERS = 8
_LORA_RANK = 16


def format_memory_table(sizing: Sizing) -> RenderableType:
    """Format a run's memory per worker under every strategy, and the fewest workers on common devices."""
    workload = sizing.workload
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("strategy")
    for name in ("GiB", "main memory", *(f"{device} GiB" for device in DEVICE_SIZES_GIB)):
        table.add_column(name, justify="right")
    for strategy in sizing.strategies:
        need = estimate_worker_memory(workload, strategy, sizing.workers)
        is_own = strategy == sizing.strategy
        cells = [f"{strategy} *" if is_own else str(strategy), format_gib(need.device), format_gib(need.host)]
        cells += [
            _format_worker_count(find_fewest_workers(workload, strategy, device))
            for device in DEVICE_SIZES_GIB
        ]
        table.add_row(*cells, style="bold" if is_own else None)
    trained = (
        "all trained"
        if workload.trains_all_weights
        else f"and {_format_weight_count(workload.trained_weights)} of LoRA that are trained"
    )
    heading = (
        f"policy: {_format_weight_count(workload.shape.parameters)} weights, {trained}. On GPUs, GiB that "
        f"each of {sizing.workers} worker(s) needs, and the fewest workers whose devices hold it:"
    )
    return Group(Text(heading), table, *(Text(line) for line in _format_notes(sizing)))


def _format_notes(sizing: Sizing) -> list[str]:
    """Format what the table omits: the run's own parts, the other choice of checkpointing, and references."""
    workload, need = sizing.workload, sizing.memory
    parts = {
        "weights": need.weights,
        "gradients": need.gradients,
        "AdamW": need.moments,
        "activations": need.activations,
        "logits, casts and buffers": need.working,
    }
    other = "false" if workload.checkpointing else "true"
    lines = [
        f"* this run: {', '.join(f'{format_gib(value)} {name}' for name, value in parts.items())}; "
        f"{format_gib(sizing.other_checkpointing.device)} in all with gradient_checkpointing: {other}"
    ]
    for name, replica in sizing.references.items():
        lines.append(
            f"reference {name}: {format_gib(replica.device)} GiB a replica, "
            f"{format_gib(replica.weights)} of it weights"
        )
    lines.append(
        f"estimates for {workload.tokens} tokens a micro-batch; {1 - USABLE_SHARE:.0%} of a device is left "
        "to CUDA itself"
    )
    return lines


def format_documented_tables() -> str:
    """Format the documentation's tables in Markdown, with defaults but `gradient_checkpointing: true`."""
    workloads = {
        f"{name} {'LoRA' if rank else 'full'}": PolicyWorkload(shape.with_lora(rank), checkpointing=True)
        for name, shape in MODELS.items()
        for rank in (_LORA_RANK, 0)
    }
    fewest = [
        [str(strategy), *(_format_fewest_workers(workload, strategy) for workload in workloads.values())]
        for strategy in STRATEGIES
    ]
    needs = [
        [
            str(strategy),
            *(
                _format_memory(estimate_worker_memory(workload, strategy, DOCUMENTED_WORKERS))
                for workload in workloads.values()
            ),
        ]
        for strategy in STRATEGIES
    ]
    references = [
        [form, *(format_gib(estimate_replica_memory(shape, inner, 2.0).device) for shape in MODELS.values())]
        for form, inner in (("bfloat16", 2.0), ("8bit", 1.0), ("4bit", 0.516))
    ]
    tables = (
        ("strategy", workloads, fewest),
        ("strategy", workloads, needs),
        ("reference", MODELS, references),
    )
    return "\n".join(_format_markdown([corner, *columns], rows) for corner, columns, rows in tables)


def format_gib(size: float) -> str:
    """Format bytes as GiB, rounded up to a tenth."""
    return f"{ceil(10 * size / GIB) / 10:.1f}"


def _format_fewest_workers(workload: PolicyWorkload, strategy: Strategy) -> str:
    return " / ".join(
        _format_worker_count(find_fewest_workers(workload, strategy, device)) for device in DEVICE_SIZES_GIB
    )


def _format_memory(need: Memory) -> str:
    return format_gib(need.device) + (f" + {format_gib(need.host)}" if need.host else "")


def _format_weight_count(count: int) -> str:
    return f"{count / 1e9:.3g}B" if count >= 1e9 else f"{count / 1e6:.3g}M"


def _format_worker_count(workers: int | None) -> str:
    return "–" if workers is None else str(workers)


def _format_markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)
