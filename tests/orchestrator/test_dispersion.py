"""The dispersion of pairs: entropies, phi*, and how they go with what people said."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import scipy.stats
import torch

from losses.dispersion import calibrate_phi_star
from models.config import ModelConfig
from models.load import load_model, locate_model
from orchestrator.driver.dispersion import PairDispersions, draw_dispersions, measure_dispersion
from orchestrator.errors import UsageError
from preferences.load import LoadedPairs, load_pairs
from tests.support import tiny


def make_dispersions(seed: int = 0, *, noise: float = 0.05, count: int = 200) -> PairDispersions:
    drawn = np.random.default_rng(seed)
    labels = drawn.uniform(0.5, 1, count)
    entropies = np.clip(0.2 + 2 * labels * (1 - labels) + drawn.normal(0, noise, count), 0.01, 0.99)
    return PairDispersions(entropies, labels, prompts=count)


def test_what_is_derived_of_entropies() -> None:
    pairs = make_dispersions()
    np.testing.assert_allclose(pairs.neg_log_dispersions, -np.log(pairs.entropies), rtol=1e-12)
    assert pairs.phi_star == pytest.approx(1 / np.mean(-np.log(pairs.entropies)), rel=1e-12)
    assert pairs.phi_star == calibrate_phi_star(torch.as_tensor(pairs.entropies))
    assert PairDispersions(pairs.entropies, np.array([0.5, 0.75, 1.0]), 3).disagreements.tolist() == [
        1,
        0.75,
        0,
    ]


def test_the_correlation_and_its_interval() -> None:
    pairs = make_dispersions()
    found = pairs.correlate()
    assert found is not None
    rank, low, high = found
    expected = scipy.stats.spearmanr(pairs.entropies, 4 * pairs.soft_labels * (1 - pairs.soft_labels))
    assert rank == pytest.approx(expected.statistic, rel=1e-12)
    assert low < rank < high
    # Of many samples without any correlation, about one in twenty has an interval that leaves 0 out.
    drawn = np.random.default_rng(1)
    missed = 0
    for _ in range(400):
        entropies, labels = drawn.uniform(0.1, 0.9, 40), drawn.uniform(0.5, 1, 40)
        interval = PairDispersions(entropies, labels, prompts=40).correlate()
        assert interval is not None
        missed += not interval[1] <= 0 <= interval[2]
    assert 5 <= missed <= 40
    certain = PairDispersions(pairs.entropies, np.ones(200), 200)
    assert certain.correlate() is None
    assert PairDispersions(pairs.entropies, pairs.soft_labels, prompts=4).correlate() is None


def test_a_plot_is_drawn_with_and_without_labels(tmp_path: Path) -> None:
    pairs = make_dispersions()
    for name, drawn in (("soft", pairs), ("hard", PairDispersions(pairs.entropies, np.ones(200), 200))):
        path = draw_dispersions(drawn, tmp_path / f"{name}.png")
        assert path.read_bytes().startswith(b"\x89PNG")


def compute_entropies(folder: str, loaded: LoadedPairs) -> list[float]:
    """Mean entropies by transformers alone, one sequence at a time."""
    settings = ModelConfig(model=folder)
    model = load_model(locate_model(settings), settings, device=torch.device("cpu"), trainable=False)
    encode = tiny.byte_tokenizer()
    means = []
    for pair in loaded.pairs:
        sides = []
        for text in (pair.chosen, pair.rejected):
            prompt = encode(pair.prompt, add_special_tokens=False)["input_ids"]
            answer = [*encode(text, add_special_tokens=False)["input_ids"], encode.eos_token_id]
            logits = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
            spread = torch.distributions.Categorical(logits=logits).entropy().mean()
            sides.append(float(spread / np.log(logits.shape[-1])))
        means.append(sum(sides) / 2)
    return means


@pytest.mark.usefixtures("cluster")
def test_the_pairs_of_a_run(run_of: Any, pairs_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = {"primary": "start", "models": {"start": {"model": "policy"}}}
    run = run_of("pairs", references=start, loss={"preset": "gdpo"})
    path = measure_dispersion(run, split_name="train", to=None)
    table = pyarrow.parquet.read_table(path).to_pydict()
    loaded = load_pairs(run.data.train_sources[0])
    expected = dict(
        zip([pair.source for pair in loaded.pairs], compute_entropies(run.policy.model, loaded), strict=True)
    )
    assert len(table["place"]) == 36  # a quarter is held out
    np.testing.assert_allclose(table["entropy"], [expected[place] for place in table["place"]], rtol=1e-4)
    labels = {pair.source: pair.soft_label for pair in loaded.pairs}
    assert table["soft_label"] == [labels[place] for place in table["place"]]
    printed = capsys.readouterr().out
    assert f"phi* for a mean scale of 1: {1 / np.mean(-np.log(table['entropy'])):.3f}" in printed
    assert "rank correlation of entropy" in printed
    assert path.with_suffix(".png").exists()
    measure_dispersion(run, split_name="train", to=None)  # its own file is replaced
    assert "scoring" not in capsys.readouterr().out  # from the store
    foreign = path.with_name("mine.parquet")
    foreign.write_text("mine")
    with pytest.raises(UsageError, match="is not of this command, so it is not replaced"):
        measure_dispersion(run, split_name="train", to=foreign)
    assert foreign.read_text() == "mine"


def test_a_run_without_references_is_refused(run_of: Any) -> None:
    run = run_of("free", references={}, loss={"preset": "simpo"})
    with pytest.raises(UsageError, match="has no references, whose entropy a dispersion is"):
        measure_dispersion(run, split_name="train", to=None)
