"""The command `dispersion`: how much people's preferences scatter, by the primary reference's entropy."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow
import pyarrow.parquet
import scipy.stats
import torch
from rich.console import Console
from rich.table import Table

from losses.config import EntropyDispersion
from losses.dispersion import calibrate_phi_star, compute_neg_log_dispersion
from losses.scores import ReferenceScores
from models.config import ModelConfig
from orchestrator.cluster.connection import connect_to_ray
from orchestrator.config.run import RunConfig
from orchestrator.config.sections import ReferenceConfig
from orchestrator.driver.prepare import PreparedRun
from orchestrator.driver.scoring import score_split, start_services
from orchestrator.driver.train import place_on_cluster, prepare_and_report
from orchestrator.errors import UsageError
from orchestrator.files import replace_file
from orchestrator.references.client import ReferenceClient
from orchestrator.references.service import ReferenceService
from orchestrator.storage.paths import is_uri, run_location
from orchestrator.storage.probe import refuse_unwritable_file
from orchestrator.tracking.plots import COLOURS, STYLE, WIDTH, save_figure
from orchestrator.tracking.progress import make_plain_console
from preferences.split import TokenizedSplit

FILE_MARK = b"polyref.dispersion"
"""Key in the metadata of files that this command has written, and may replace."""
RELEASED_PHI_STAR = 0.29
GROUPS = 5
ROWS_PER_REQUEST = 4096

Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class PairDispersions:
    """What the primary reference's entropy says of each pair, beside what people said.

    Attributes:
        entropies: (N,) mean over both responses of the mean entropy of a token over log V, in [0, 1].
        soft_labels: (N,) share of people who preferred chosen.
        prompts: number of different prompts.
    """

    entropies: Values
    soft_labels: Values
    prompts: int

    @property
    def neg_log_dispersions(self) -> Values:
        """(N,) -log H of each pair, small where preferences scatter; of MallowsPO without phi*."""
        half = torch.as_tensor(self.entropies)
        one = torch.ones_like(half)
        reference = ReferenceScores(one, one, one, one, chosen_entropy=half, rejected_entropy=half)
        values = compute_neg_log_dispersion(EntropyDispersion(phi_star=1.0), [reference], like=half)
        return np.asarray(values)

    @property
    def disagreements(self) -> Values:
        """(N,) 4 p (1 - p): 0 where all people agree, 1 at a tie."""
        return 4 * self.soft_labels * (1 - self.soft_labels)

    @property
    def phi_star(self) -> float:
        """The phi* that makes the mean scale 1."""
        return calibrate_phi_star(torch.as_tensor(self.entropies))

    def correlate(self) -> tuple[float, float, float] | None:
        """Return Spearman's rank correlation of entropy and disagreement, and its 95 % interval.

        The interval is Fisher's, with the standard error of Bonett and Wright (2000, "Sample size
        requirements for estimating Pearson, Kendall and Spearman correlations") for as many observations as
        there are different prompts, because pairs of one prompt are not independent. None if all labels are
        equally sure, or there are fewer than five prompts.
        """
        if self.prompts < 5 or np.ptp(self.disagreements) == 0 or np.ptp(self.entropies) == 0:
            return None
        rank = float(scipy.stats.spearmanr(self.entropies, self.disagreements).statistic)
        if abs(rank) >= 1:
            return rank, rank, rank
        half = 1.959964 * np.sqrt((1 + rank**2 / 2) / (self.prompts - 3))
        low, high = np.tanh(np.arctanh(rank) + np.array([-half, half]))
        return rank, float(low), float(high)


def measure_dispersion(config: RunConfig, *, split_name: str, to: Path | None) -> Path:
    """Score a split with the run's primary reference, and write and print the dispersion of its pairs.

    Returns:
        The Parquet file; a plot is beside it.

    Raises:
        UsageError: the run has no reference or no such split, or the file is not this command's.
    """
    if config.references.primary is None:
        raise UsageError(f"{config.name}: the run has no references, whose entropy a dispersion is; add one")
    path = to or _find_default_file(config, split_name)
    _refuse_foreign_file(path)
    console = make_plain_console()
    prepared = prepare_and_report(_keep_primary(config), console)
    split = prepared.train if split_name == "train" else prepared.eval
    if split is None:
        raise UsageError(f"{config.name}: has no held-out pairs; set data.eval or data.eval_fraction")
    with connect_to_ray(wait_minutes=config.placement.wait_minutes):
        prepared = place_on_cluster(prepared)
        with start_services(prepared) as service:
            score_split(service, split, split_name, prepared.config, console)
            entropies = read_primary_entropies(service, prepared, split)
    prompts = len({hash(prompt.tobytes()) for prompt in split.policy.prompts})
    dispersions = PairDispersions(entropies, np.asarray(split.soft_labels), prompts)
    _write_table(path, dispersions, split, config.references.primary)
    plot = draw_dispersions(dispersions, path.with_suffix(".png"))
    print_dispersions(dispersions, console)
    console.print(f"per pair: {path}\nplot: {plot}")
    return path


def _find_default_file(config: RunConfig, split_name: str) -> Path:
    folder = run_location(config)
    if is_uri(folder):
        raise UsageError(f"{config.name}: is stored at an object store; name a local file with --to")
    return Path(folder) / (
        "dispersion.parquet" if split_name == "train" else f"dispersion-{split_name}.parquet"
    )


def _refuse_foreign_file(path: Path) -> None:
    """Refuse to replace a file that this command has not written, and one that cannot be written."""
    refuse_unwritable_file(path, "--to")
    if not os.path.lexists(path):
        return
    try:
        metadata = (pyarrow.parquet.read_schema(path).metadata or {}) if path.is_file() else {}
    except (OSError, pyarrow.ArrowException):
        metadata = {}
    if FILE_MARK not in metadata:
        raise UsageError(
            f"{path}: exists and is not of this command, so it is not replaced; name another with --to"
        )


def _keep_primary(config: RunConfig) -> RunConfig:
    """Return the run with its primary reference alone, served by replicas."""
    name = config.references.ordered[0]
    primary = config.references.models[name]
    if primary.scored_by_workers:
        settings = {field: getattr(config.policy_model, field) for field in ModelConfig.model_fields}
        primary = ReferenceConfig(**settings)
    references = config.references.model_copy(update={"models": {name: primary}, "use": None, "audit": 0})
    evaluation = config.evaluation.model_copy(update={"sampling": None})
    return config.model_copy(update={"references": references, "evaluation": evaluation})


def read_primary_entropies(service: ReferenceService, prepared: PreparedRun, split: TokenizedSplit) -> Values:
    """Return the (N,) mean entropies of both responses of each pair under the primary reference."""
    name = prepared.config.references.ordered[0]
    client = ReferenceClient({name: service.routers[name]}, {name: split.references[name]})
    parts = []
    for start in range(0, len(split), ROWS_PER_REQUEST):
        client.request_scores(start, np.arange(start, min(start + ROWS_PER_REQUEST, len(split))))
        scores = client.collect_scores(start)[name]
        sides = 2 if split.has_pairs else 1
        parts.append((scores.chosen_entropy + scores.rejected_entropy) / sides)
    return np.concatenate(parts)


def _write_table(path: Path, dispersions: PairDispersions, split: TokenizedSplit, primary: str) -> None:
    table = pyarrow.table(
        {
            "place": list(split.places),
            "chosen_tokens": split.policy.chosen_lengths,
            "rejected_tokens": split.policy.rejected_lengths,
            "entropy": dispersions.entropies,
            "neg_log_dispersion": dispersions.neg_log_dispersions,
            "soft_label": dispersions.soft_labels,
            "disagreement": dispersions.disagreements,
        }
    )
    with replace_file(path) as temporary:
        pyarrow.parquet.write_table(table.replace_schema_metadata({FILE_MARK: primary}), temporary)


def print_dispersions(dispersions: PairDispersions, console: Console) -> None:
    """Print quantiles, phi*, and how entropy goes with people's disagreement."""
    quantiles = np.quantile(dispersions.neg_log_dispersions, (0, 0.1, 0.5, 0.9, 1))
    shown = "  ".join(
        f"{name} {value:.3f}"
        for name, value in zip(("least", "10 %", "median", "90 %", "most"), quantiles, strict=True)
    )
    console.print(f"neg-log-dispersion -log H of {len(dispersions.entropies):,} pairs: {shown}")
    console.print(
        f"phi* for a mean scale of 1: {dispersions.phi_star:.3f} (MallowsPO's released code has "
        f"{RELEASED_PHI_STAR})"
    )
    correlation = dispersions.correlate()
    if correlation is None:
        console.print("entropy and people's disagreement: not compared, as all labels are equally sure")
        return
    rank, low, high = correlation
    console.print(
        f"rank correlation of entropy with people's disagreement 4p(1 - p): {rank:.3f} "
        f"(95 %: {low:.3f} to {high:.3f}, {dispersions.prompts:,} prompts)"
    )
    console.print(_build_groups_table(dispersions))


def _split_into_groups(dispersions: PairDispersions) -> list[npt.NDArray[np.int64]]:
    """Return the pairs of each fifth, from the most scattered to the least."""
    order = np.argsort(-dispersions.entropies, kind="stable")
    return [group for group in np.array_split(order, GROUPS) if len(group)]


def _build_groups_table(dispersions: PairDispersions) -> Table:
    table = Table("by entropy", "pairs", "mean H", "mean p", "ties", box=None, padding=(0, 2, 0, 0))
    names = ["highest fifth", "", "", "", "lowest fifth"]
    for name, group in zip(names, _split_into_groups(dispersions), strict=False):
        labels = dispersions.soft_labels[group]
        ties = f"{(labels == 0.5).mean():.0%}"
        mean_entropy = dispersions.entropies[group].mean()
        table.add_row(name, f"{len(group):,}", f"{mean_entropy:.3f}", f"{labels.mean():.3f}", ties)
    return table


def draw_dispersions(dispersions: PairDispersions, path: Path) -> Path:
    """Draw the histogram of -log H, and people's disagreement in each fifth where labels are soft."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        has_labels = dispersions.correlate() is not None
        figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
        axes = figure.subplots(1, 2 if has_labels else 1, squeeze=False)[0]
        values = dispersions.neg_log_dispersions
        axes[0].hist(values, bins=min(40, max(5, len(values) // 8)), color=COLOURS[0])
        axes[0].axvline(values.mean(), color=COLOURS[5])
        axes[0].set(title="Dispersion of pairs", xlabel="$-\\log H$ (small: scattered)", ylabel="pairs")
        axes[0].annotate(f" mean {values.mean():.2f}", (values.mean(), axes[0].get_ylim()[1]), va="top")
        if has_labels:
            _draw_disagreements(axes[1], dispersions)
        return save_figure(figure, path)


def _draw_disagreements(axes: Any, dispersions: PairDispersions) -> None:
    groups = _split_into_groups(dispersions)[::-1]
    entropies = [dispersions.entropies[group].mean() for group in groups]
    means = [dispersions.disagreements[group].mean() for group in groups]
    errors = [1.96 * dispersions.disagreements[group].std() / np.sqrt(len(group)) for group in groups]
    axes.errorbar(entropies, means, yerr=errors, marker="o", color=COLOURS[0], capsize=3)
    axes.set(title="People's disagreement", xlabel="mean entropy $H$ of a fifth", ylabel="mean $4p(1-p)$")
