"""The command `polyref demo`: from human ratings of film reviews to a registered model, step by step."""

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from orchestrator.cluster.connection import connect_to_ray
from orchestrator.config.paths import resolve_path
from orchestrator.config.run import RunConfig, parse_run
from orchestrator.demo.assets import AssetError, fetch_human_ratings, fetch_smollm2, load_lexicon
from orchestrator.demo.ratings import build_preference_rows, read_movie_reviews, write_rows
from orchestrator.driver.record import RunRecord
from orchestrator.driver.train import train_run
from orchestrator.errors import UsageError
from orchestrator.storage.probe import find_write_problem
from orchestrator.tracking.metrics_file import read_metrics
from orchestrator.tracking.progress import make_plain_console

_SAMPLED_PROMPTS, _SHOWN_PROMPTS = 24, 4
_NEW_TOKENS = 20
_TABLE_METRICS = (
    ("agreement with the majority (eval/accuracy)", "eval/accuracy"),
    ("negative log-likelihood of the votes (eval/label_nll)", "eval/label_nll"),
    ("reward margin, chosen over rejected", "eval/rewards/margins"),
)


MARKER_FILE = ".polyref-demo"
"""A file that says that a folder was made by the demo, which may then delete it."""


def run_demo(folder: str, *, fresh: bool) -> None:
    """Train a film-review reference, then a policy against it and the base model, and print what changed.

    All files are written to `folder`; existing ones are reused unless `fresh`.

    Raises:
        UsageError: the model or the ratings are not in the cache and cannot be fetched; with `fresh`, the
            folder was not made by the demo.
    """
    console, root = make_plain_console(), resolve_path(folder, field="--folder")
    if (problem := find_write_problem(root)) is not None:
        raise UsageError(f"--folder {folder} cannot be written ({problem}); name another")
    if fresh:
        _remove_demo(root)
    try:
        model, ratings, sentiment = fetch_smollm2(), fetch_human_ratings(), load_lexicon()
    except AssetError as error:
        raise UsageError(str(error)) from error
    if not root.exists():
        root.mkdir(parents=True)
        (root / MARKER_FILE).touch()
    rows = build_preference_rows(read_movie_reviews(ratings))
    data = write_rows(rows, root / "data")

    reference, policy = (_load_run_config(name, root, model, data) for name in ("reference", "policy"))
    with connect_to_ray():
        console.print("\n(a) a reference model fine-tuned on film reviews, preset sft")
        train_run(reference)
        console.print("\n(b) a policy trained on votes: soft labels, Mallows dispersion, two references")
        record = train_run(policy)
    console.print("\n(c) what changed, on pairs whose texts were not trained on")
    _print_evaluation(policy, record, console)
    prompts = _pick_prompts(rows.eval)
    _print_continuations(model, policy.folder / "export" / "model", prompts, sentiment, console)
    _print_next_commands(root, policy, record, console)


def _remove_demo(root: Path) -> None:
    """Delete the folder of an earlier demo; refuse any other."""
    if root.exists() and not (root / MARKER_FILE).exists():
        raise UsageError(
            f"{root}: --fresh deletes what a demo has made, and this folder has no {MARKER_FILE}; delete it "
            "yourself, or name another folder with --folder"
        )
    shutil.rmtree(root, ignore_errors=True)


def _load_run_config(name: str, root: Path, model: Path, data: dict[str, Path]) -> RunConfig:
    """Load one of the demonstration's two run files, with the paths of model, data and storage filled in."""
    settings: dict[str, Any] = yaml.safe_load((files("orchestrator.demo") / f"{name}.yaml").read_text())
    settings["storage_path"] = str(root / "runs")
    settings["policy"]["model"] = str(model)
    if name == "policy":
        settings["references"]["models"]["base"]["model"] = str(model)
    for split in ("train", "eval"):
        if split in settings["data"]:
            settings["data"][split] = str(data[Path(settings["data"][split]).stem])
    return parse_run(settings, source=f"{name}.yaml")


def _print_evaluation(policy: RunConfig, record: RunRecord, console: Console) -> None:
    evaluations = [line for line in read_metrics(policy.folder) if "eval/accuracy" in line]
    before, after = evaluations[0], evaluations[-1]
    table = Table(title=f"{record.counts['eval']['pairs']} held-out pairs", title_justify="left")
    for column in ("", "before", "after"):
        table.add_column(column, justify="left" if not column else "right")
    for title, metric in _TABLE_METRICS:
        cells = [f"{line[metric]:.3f}" for line in (before, after)]
        if metric == "eval/accuracy":
            cells = [
                f"{cell} ± {line['eval/accuracy_interval']:.3f}"
                for cell, line in zip(cells, (before, after), strict=True)
            ]
        table.add_row(title, *cells)
    console.print(table)
    console.print("± is half of the 95 % interval; before training no pair is preferred, hence one half")


def _pick_prompts(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the first distinct prompts of the held-out pairs, in the file's order."""
    return list(dict.fromkeys(row["prompt"] for row in rows))[:_SAMPLED_PROMPTS]


@dataclass(frozen=True)
class _Continuations:
    """A model's continuations of the prompts, and their sentiment scores."""

    texts: list[str]
    scores: list[float]


def _print_continuations(
    before: Path, after: Path, prompts: list[str], sentiment: Callable[[str], float], console: Console
) -> None:
    continuations = [_continue_prompts(folder, prompts, sentiment) for folder in (before, after)]
    console.print("\ncontinuations, with their sentiment by the lexicon (-1 to 1)")
    for index in range(_SHOWN_PROMPTS):
        console.print(f"  {prompts[index]}...")
        for label, column in zip(("before", "after"), continuations, strict=True):
            console.print(f"    {label:>6} {column.scores[index]:+.2f}  {column.texts[index]}")
    means = [fmean(column.scores) for column in continuations]
    console.print(f"  mean over {len(prompts)} prompts: {means[0]:+.3f} before, {means[1]:+.3f} after")


def _continue_prompts(folder: Path, prompts: list[str], sentiment: Callable[[str], float]) -> _Continuations:
    """Continue every prompt greedily, so that two models can be compared."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    with torch.inference_mode():
        out = model.generate(
            **batch, max_new_tokens=_NEW_TOKENS, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
    new_tokens = out[:, batch["input_ids"].shape[1] :]
    texts = [" ".join(text.split()) for text in tokenizer.batch_decode(new_tokens, skip_special_tokens=True)]
    return _Continuations(texts, [sentiment(text) for text in texts])


def _print_next_commands(root: Path, policy: RunConfig, record: RunRecord, console: Console) -> None:
    """Print commands to copy, relative to the folder in which the demonstration was started."""
    commands, runs = os.path.relpath(Path(sys.executable).parent), os.path.relpath(root / "runs")
    version = str(record.registered).removeprefix("models:/")
    console.print(f"\nregistered: {record.registered}. Look at it, and at the run's page:")
    console.print(f"  {commands}/polyref models list --storage-path {runs}")
    console.print(f"  {commands}/polyref models show {version} --storage-path {runs}")
    console.print(f"  {commands}/mlflow ui --backend-store-uri sqlite:///{runs}/mlflow.db")
    console.print(f"plots: {os.path.relpath(policy.folder / 'plots')}")
