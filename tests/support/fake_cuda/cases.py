"""The cases: a training step, an evaluation with every metric, sampling, and a reference's forward pass."""

import traceback
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch

from losses.config import LossConfig
from losses.presets import PRESETS
from losses.scores import ReferenceScores
from models.adapters import add_lora, find_adapter
from models.config import LoraSettings
from models.logprobs import Scorer
from models.parallel import Parallel
from models.rows import Rows
from orchestrator.config.sections import SamplingConfig
from orchestrator.references.client import ReferenceArrays
from orchestrator.references.messages import PromptGroup, ScoreRequest, Scores
from orchestrator.references.replica import FrozenModel
from orchestrator.worker.batches import BatchLoader
from orchestrator.worker.metrics import (
    MetricFlags,
    StepTable,
    compute_eval_metrics,
    compute_perf_metrics,
    compute_training_metrics,
)
from orchestrator.worker.policy import Policy
from orchestrator.worker.sampling import Sampler
from orchestrator.worker.step import run_evaluation_pass, run_training_step
from preferences.split import TokenizedSplit
from preferences.tokens.tables import RaggedArray, TokenTable
from tests.support import tiny
from tests.support.fake_cuda.device import fake_device

PAIRS = 4
FEW_PRESETS = ("dpo", "mrpo", "sft")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Client:
    """Answers every request for scores with made-up numbers."""

    stall_seconds = 0.0

    def __init__(self, names: tuple[str, ...], scored_by_workers: tuple[str, ...] = ()) -> None:
        self._names, self.scored_by_workers = names, scored_by_workers
        self._rows: dict[Any, int] = {}

    def request_scores(self, batch_id: Any, rows: np.ndarray, names: Any = None) -> None:
        self._rows[batch_id] = len(rows)

    def collect_scores(self, batch_id: Any) -> dict[str, ReferenceArrays]:
        count = self._rows.pop(batch_id)
        # A reference that workers score has no score yet, so that they compute it.
        values = {n: np.nan if n in self.scored_by_workers else 0.5 for n in self._names}
        return {
            name: ReferenceArrays(*(np.full(count, value) for _ in range(6)))
            for name, value in values.items()
        }

    def store_scores(self, name: str, rows: np.ndarray, scores: ReferenceArrays) -> None:
        pass

    def request_sample_scores(self, batch_id: Any, groups: list[PromptGroup], names: Any) -> None:
        self._rows[batch_id] = len(groups)

    def collect_sample_scores(self, batch_id: Any) -> dict[str, Scores]:
        count = self._rows.pop(batch_id)
        return {name: Scores(*(np.full(count, 0.5) for _ in range(3))) for name in self._names[:1]}


def build_model(dtype: torch.dtype, device: torch.device, *, lora: bool) -> Any:
    """Build a policy as `load_model` does; a full one in the dtype that it computes in."""
    with device:
        model = tiny.llama(num_hidden_layers=1)
        for weight in model.parameters():
            weight.data = weight.data.to(dtype)
        if not lora:
            return model
        with mock.patch.object(torch.nn.Module, "to", lambda module, *_, **__: module):
            return add_lora(model, LoraSettings(r=2))  # PEFT would move fake weights, which torch refuses


def build_split(names: tuple[str, ...], *, has_pairs: bool) -> TokenizedSplit:
    draw = np.random.default_rng(0)

    def column(low: int, high: int) -> RaggedArray:
        return RaggedArray.from_rows(
            [draw.integers(0, 256, size=draw.integers(low, high)).tolist() for _ in range(PAIRS)]
        )

    table = TokenTable(column(3, 9), column(2, 8), column(2, 8) if has_pairs else None)
    labels = np.linspace(0.5, 1, PAIRS)
    sources = tuple(f"f:{i}" for i in range(PAIRS))
    references = dict.fromkeys(names, table)
    return TokenizedSplit(
        table, references, labels, sources, has_pairs, True, weights=np.linspace(0.5, 2, PAIRS)
    )


def build_policy(model: Any, device: torch.device) -> Policy:
    scorer = Scorer(model.train(), chunk_tokens=64)
    weights = [weight for weight in scorer.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-3, fused=True)
    return Policy(
        parallel=Parallel(scorer, optimizer, device),
        load_initial_policy=lambda: model,
        tokenizer=tiny.byte_tokenizer(),
        precision=torch.float32,
        plain_rows_reason=None,
        pad_id=0,
        peak_flops=1e12,
    )


def build_loader(
    policy: Policy, client: Client, names: tuple[str, ...], *, has_pairs: bool, device: torch.device
) -> BatchLoader:
    return BatchLoader(
        build_split(names, has_pairs=has_pairs),
        reference_names=names,
        client=client,  # type: ignore[arg-type]
        score_initial_policy=policy.score_initial_policy,
        on_any_rank=policy.parallel.needs_forward_pass,
        rank=0,
        world_size=1,
        tokens_per_microbatch=30,
        shared_rows=True,
        pad_id=0,
        device=device,
        count_flops=policy.count_flops,
    )


def take_step(policy: Policy, loss: LossConfig) -> None:
    """Train on a batch in several micro-batches, evaluate it, and compute every metric."""
    device = policy.parallel.device
    count = max(loss.min_references, 0 if loss.reference_free else 1)
    names = tuple(f"r{i}" for i in range(count))
    client = Client(names, names[:1] if find_adapter(policy.scorer) is not None else ())
    loader = build_loader(policy, client, names, has_pairs=not loss.completions_only, device=device)
    loss = loss.with_phi_star(0.5) if loss.needs_calibration else loss
    flags = MetricFlags(not loss.completions_only, True, True, True)
    indices = np.arange(PAIRS)
    for train in (True, False):
        loader.request_scores(("rows", 0), indices)
        batches, cost = loader.collect_batches(("rows", 0), indices)
        table = StepTable(PAIRS, names, device)
        table.add_cost(cost)
        if train:
            microbatches = list(batches)
            assert len(microbatches) > 1
            for batch in microbatches:
                check_device(batch.rows, batch.references, device)
            before = {n: (w.dtype, w.device) for n, w in policy.scorer.named_parameters()}
            run_training_step(policy.parallel, microbatches, loss=loss, table=table, clip_norm=1.0)
            assert before == {n: (w.dtype, w.device) for n, w in policy.scorer.named_parameters()}
            compute_training_metrics(table, flags)
            compute_perf_metrics(table, seconds=1.0, world_size=1, peak_flops=1e12)
        else:
            run_evaluation_pass(policy.parallel, batches, loss=loss, table=table)
            compute_eval_metrics(table, flags)
        assert (table.values.device.type, table.values.dtype) == ("cpu", torch.float64)


def check_device(rows: Rows, references: tuple[ReferenceScores, ...], device: torch.device) -> None:
    tensors = [value for value in vars(rows).values() if isinstance(value, torch.Tensor)]
    tensors += [value for reference in references for value in vars(reference).values()]
    assert {tensor.device for tensor in tensors} == {device}


def take_samples(policy: Policy) -> None:
    """Sample responses and measure their KL; torch without CUDA cannot fork the device's random state."""
    split = build_split(("r0",), has_pairs=True)
    config = SamplingConfig(prompts=4, max_new_tokens=3)
    client: Any = Client(("r0",))
    sampler = Sampler(config, policy, split, np.arange(PAIRS), client, ["r0"], [], None, 0, 1, seed=0)
    with mock.patch("orchestrator.worker.sampling._fork_seed", return_value=nullcontext()):
        assert "eval/kl/r0" in sampler.measure_policy(0)


def score_reference(policy: Policy) -> None:
    """Score responses as a replica does."""
    model, device = policy.scorer.model.eval(), policy.parallel.device
    for shared in (True, False):
        frozen = FrozenModel("r0", Scorer(model), device=device, shared=shared, budget=40)
        draw = np.random.default_rng(0)
        groups = [
            PromptGroup(draw.integers(0, 256, size=5, dtype=np.int32), [row, row], [b"k" * 16] * 2)
            for row in draw.integers(0, 256, size=(4, 7), dtype=np.int32)
        ]
        scores = frozen.score(ScoreRequest.pack(groups))
        assert not scores.missing.any()
    model.train()


def run_cases() -> Iterator[dict[str, Any]]:
    """Yield name, error (empty if there is none) and waits for the device by place, of every case."""
    for kind, dtype in DTYPES.items():
        for lora in (False, True):
            label = f"{'lora' if lora else 'full'} {kind}"
            with fake_device() as (device, waits):
                policy = build_policy(build_model(dtype, device, lora=lora), device)
                # The loss knows neither adapter nor weights' dtype: all presets for one of the policies.
                names = PRESETS if label == "full float32" else FEW_PRESETS
                steps = {f"step {name}": partial(take_step, policy, PRESETS[name]) for name in names}
                others = {"sampling": take_samples, "reference": score_reference}
                for name, case in (steps | {n: partial(c, policy) for n, c in others.items()}).items():
                    error = ""
                    waits.clear()
                    try:
                        case()
                    except Exception:
                        error = traceback.format_exc()
                    yield {"name": f"{name}, {label}", "error": error, "waits": dict(waits)}
