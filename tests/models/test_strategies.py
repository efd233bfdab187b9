"""Every strategy takes the steps of one process: real gloo ranks, the real training step."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import get_scheduler

import models.zero
from losses.presets import preset
from losses.scores import ReferenceScores
from models.adapters import add_lora, disable_adapter
from models.config import LoraSettings
from models.logprobs import Scorer
from models.parallel import Parallel, ReplicatedParallel, ShardedParallel, ZeroParallel, prepare_parallel
from models.rows import PromptWithResponses, build_rows
from orchestrator.worker.metrics import StepTable
from orchestrator.worker.step import MicroBatch, run_evaluation_pass, run_training_step
from tests.support import tiny

pytestmark = pytest.mark.xdist_group("strategies")  # one process runs what all tests read
CPU = torch.device("cpu")
STEPS, SAVED_AT, SHORT = 20, 15, 4
PAIRS, CLIP = 6, 0.05
# By step in turn: micro-batches of rank 0 and of rank 1. One rank's last micro-batch is empty.
SHARES: list[list[list[list[int]]]] = [
    [[[0, 1, 2]], [[3, 4, 5]]],
    [[[5, 0], [2]], [[1, 3, 4], []]],
    [[[4], [2], [0]], [[1], [3], [5]]],
]
STRATEGIES: dict[str, dict[str, Any]] = {
    "ddp": {"strategy": "ddp"},
    "fsdp": {"strategy": "fsdp"},
    "zero1": {"strategy": "deepspeed", "zero_stage": 1},
    "zero2": {"strategy": "deepspeed", "zero_stage": 2},
    "zero3": {"strategy": "deepspeed", "zero_stage": 3},
}
SHARDED_STRATEGIES = ("fsdp", "zero3")


@dataclass(frozen=True)
class Case:
    """A policy and its training settings."""

    name: str
    lora: tuple[str, ...] = ()
    tied: bool = False
    base: str = "float32"
    precision: str = "float32"
    checkpointing: bool = False
    offload: bool = False
    steps: int = SHORT
    strategies: tuple[str, ...] = SHARDED_STRATEGIES
    tolerance: float = 1e-4

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.precision)


LONG = [
    Case("full", steps=STEPS, strategies=tuple(STRATEGIES)),
    Case("lora", lora=("q_proj", "v_proj"), tied=True, steps=STEPS, strategies=tuple(STRATEGIES)),
]
CASES = [
    *LONG,
    Case("tied", tied=True),
    Case("frozen_head", lora=("q_proj", "down_proj"), checkpointing=True),
    Case("model_forward_head", lora=("q_proj", "lm_head")),
    Case("checkpointing", checkpointing=True),
    Case("offload", offload=True, strategies=("fsdp", "zero1", "zero2", "zero3")),
    Case("bfloat16", precision="bfloat16", strategies=tuple(STRATEGIES), tolerance=2e-2),
    Case(
        "bfloat16_base",
        lora=("q_proj",),
        base="bfloat16",
        precision="bfloat16",
        strategies=tuple(STRATEGIES),
        tolerance=2e-2,
    ),
]


@dataclass
class RunRecord:
    """Results of one run of a case."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    evaluated: list[float] = field(default_factory=list)
    resumed: list[float] = field(default_factory=list)
    overflow: tuple[float, bool] = (0.0, False)
    initial_gap: float = math.nan


def build_policy(case: Case) -> Scorer:
    model = tiny.llama(num_hidden_layers=1, tie_word_embeddings=case.tied)
    for weight in model.parameters():  # as transformers loads a model: no buffer is cast
        weight.data = weight.data.to(getattr(torch, case.base))
    if case.checkpointing:
        # transformers renamed this during version 5.
        new = getattr(model, "activation_checkpointing_enable", None)
        (new or model.gradient_checkpointing_enable)({"use_reentrant": False})
    if case.lora:
        model = add_lora(model, LoraSettings(r=2, target_modules=case.lora), seed=3)
    return Scorer(model.train(), chunk_tokens=4)


def prepare_case(case: Case, **strategy: Any) -> Parallel:
    return prepare_parallel(
        build_policy(case),
        device=CPU,
        precision=case.dtype,
        learning_rate=3e-3,
        weight_decay=0.1,
        eps=1e-6,
        **strategy,
    )


def build_pairs() -> list[PromptWithResponses]:
    generator = np.random.default_rng(0)

    def ids(low: int, high: int) -> np.ndarray:
        return generator.integers(0, 256, size=int(generator.integers(low, high)))

    return [PromptWithResponses(ids(3, 9), [ids(2, 8), ids(2, 8)]) for _ in range(PAIRS)]


def score_reference(parallel: Parallel, case: Case) -> ReferenceScores:
    """Score the pairs by the policy's start if it has an adapter to disable, else by another model."""
    rows = build_rows(build_pairs(), shared=True, pad_id=0)
    with torch.no_grad():
        if case.lora:
            with disable_adapter(parallel.scorer.model):
                scores = parallel.scorer(rows, entropy=True)
        else:
            scores = Scorer(tiny.llama(seed=1, num_hidden_layers=1))(rows, entropy=True)
    assert scores.entropy is not None
    columns = (scores.logps, scores.lengths, scores.entropy)
    return ReferenceScores(*(f[side::2] for f in columns for side in (0, 1)))


def build_micro_batches(reference: ReferenceScores, share: list[list[int]]) -> list[MicroBatch]:
    groups = build_pairs()
    return [
        MicroBatch(
            rows=build_rows([groups[i] for i in at], shared=True, pad_id=0),
            slots=torch.tensor(at, dtype=torch.long),
            soft_labels=torch.linspace(0.5, 1, PAIRS, dtype=torch.float64)[at],
            references=(ReferenceScores(*(v[at] for v in vars(reference).values())),),
        )
        for at in share
    ]


LOSS = preset("gdpo", beta=0.1)


def train(
    parallel: Parallel,
    case: Case,
    *,
    first: int = 0,
    rank: int | None = None,
    before_step: Callable[[int, Any], None] = lambda step, schedule: None,
    schedule_state: Mapping[str, Any] | None = None,
) -> RunRecord:
    """Train from step `first`: on the shares of a rank, or on all pairs at once."""
    reference, record = score_reference(parallel, case), RunRecord()
    schedule = get_scheduler("cosine", parallel.optimizer, num_warmup_steps=2, num_training_steps=STEPS)
    if schedule_state is not None:
        schedule.load_state_dict(dict(schedule_state))
        parallel.set_learning_rate(schedule.get_last_lr()[0])
    for step in range(first, case.steps):
        before_step(step, schedule)
        share = SHARES[step % 3][rank] if rank is not None else [list(range(PAIRS))]
        table, norm = run_training_step(
            parallel,
            build_micro_batches(reference, share),
            loss=LOSS,
            table=StepTable(PAIRS, ["start"]),
            clip_norm=CLIP,
        )
        schedule.step()
        record.losses.append(float(table["loss"].mean()))
        record.norms.append(norm)
    share = SHARES[1][rank] if rank is not None else [list(range(PAIRS))]
    table = run_evaluation_pass(
        parallel,
        build_micro_batches(reference, share),
        loss=LOSS,
        table=StepTable(PAIRS, ["start"]),
    )
    record.evaluated = table["loss"].tolist()
    return record


def write_state(parallel: Parallel, file: Path) -> None:
    """Write the full state to a file, on rank 0."""
    state = {
        f"{n}/{key}": v.cpu().contiguous() for n, s in parallel.iterate_full_state() for key, v in s.items()
    }
    if parallel.rank == 0:
        save_file(state, file)


def read_state(file: Path) -> dict[str, dict[str, Tensor]]:
    state: dict[str, dict[str, Tensor]] = {}
    with safe_open(file, framework="pt") as opened:
        for entry in opened.keys():  # noqa: SIM118 (no dictionary)
            name, _, key = entry.rpartition("/")
            state.setdefault(name, {})[key] = opened.get_tensor(entry)
    return state


def restore_state_from(parallel: Parallel, file: Path) -> None:
    state = read_state(file)
    parallel.restore_full_state(state.__getitem__, state.keys())


def compute_outputs(parallel: Parallel, rank: int) -> dict[str, Tensor]:
    """Compute logits and generated tokens; ranks generate texts of different lengths."""
    parallel.scorer.eval()
    ids = torch.arange(2 * (3 + rank)).reshape(2, -1)
    outputs = {
        "logits": parallel.scorer.compute_logits(ids),
        "ids": parallel.scorer.generate(
            ids,
            do_sample=False,
            max_new_tokens=3 + 2 * rank,
            eos_token_id=None,
            pad_token_id=0,
            synced_gpus=parallel.sharded,
        ),
    }
    parallel.scorer.train()
    return outputs


def run_case(case: Case, name: str, folder: Path, rank: int) -> None:
    """Run one case under one strategy, save in the middle and resume under the next strategy."""
    parallel = prepare_case(case, **STRATEGIES[name], offload=case.offload)
    masters = name == "ddp" and case.precision != "float32"  # kept by fully_shard
    kinds = {"ddp": ShardedParallel if masters else ReplicatedParallel, "fsdp": ShardedParallel}
    assert isinstance(parallel, kinds.get(name, ZeroParallel))
    assert parallel.sharded == (name in SHARDED_STRATEGIES)
    assert (parallel.rank, parallel.world_size) == (rank, 2)
    assert parallel.needs_forward_pass(rank == 1) == (parallel.sharded or rank == 1)
    stem = folder / f"{case.name}-{name}"

    def save(step: int, schedule: Any) -> None:
        if step == SAVED_AT:
            write_state(parallel, stem.with_suffix(".middle"))
            stem.with_suffix(".schedule").write_text(json.dumps(schedule.state_dict()))

    gap = measure_initial_gap(parallel, case)
    record = train(parallel, case, rank=rank, before_step=save)
    record.initial_gap = gap
    write_state(parallel, stem.with_suffix(".end"))
    save_file(compute_outputs(parallel, rank), stem.with_suffix(f".written{rank}"))
    if case.steps > SAVED_AT:
        other = list(STRATEGIES)[(list(STRATEGIES).index(name) + 1) % len(STRATEGIES)]
        resumed = prepare_case(case, **STRATEGIES[other])
        train(resumed, Case(**{**vars(case), "steps": 1}), rank=rank)  # state that the restore must replace
        record.resumed = resume_training(resumed, case, stem, rank=rank)
    record.overflow = measure_overflow(parallel)
    if rank == 0:
        stem.with_suffix(".json").write_text(json.dumps(asdict(record)))


def measure_initial_gap(parallel: Parallel, case: Case) -> float:
    """Return the largest difference of a score between the untrained policy and its model as a reference.

    The reference has weights in the case's dtype and float32 buffers, as transformers loads it.
    """
    model = tiny.llama(num_hidden_layers=1, tie_word_embeddings=case.tied)
    for weight in model.parameters():
        weight.data = weight.data.to(case.dtype)
    rows, reference = build_rows(build_pairs(), shared=True, pad_id=0), Scorer(model, chunk_tokens=4)
    with torch.no_grad():
        found, expected = parallel.module(rows, entropy=True), reference(rows, entropy=True)
    return max(float((f - e).abs().max()) for f, e in zip(found, expected, strict=True))


def measure_overflow(parallel: Parallel) -> tuple[float, bool]:
    """Return the norm of a gradient that is not finite on rank 0, and whether weights are unchanged."""
    before = {name: state["weight"].clone() for name, state in parallel.iterate_full_state(moments=False)}
    with parallel.accumulate(last=True):
        scores = parallel.module(build_rows(build_pairs(), shared=True, pad_id=0))
        parallel.backward(scores.logps.sum() * (1e38 if parallel.rank == 0 else 1.0))
    norm = float(parallel.clip_gradients(CLIP))
    parallel.zero_grad()
    return norm, all(
        torch.equal(s["weight"], before[n]) for n, s in parallel.iterate_full_state(moments=False)
    )


def resume_training(parallel: Parallel, case: Case, stem: Path, *, rank: int | None) -> list[float]:
    """Resume from the checkpoint in the middle; return the losses."""
    restore_state_from(parallel, stem.with_suffix(".middle"))
    schedule = json.loads(stem.with_suffix(".schedule").read_text())
    return train(parallel, case, first=SAVED_AT, rank=rank, schedule_state=schedule).losses


def _run_two_ranks(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    models.zero.PERSISTENCE_THRESHOLD = 0  # so that tiny weights are partitioned too
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    for case in CASES:
        for name in case.strategies:
            run_case(case, name, Path(folder), rank)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the results of two ranks; one group runs all cases because it is slow to start."""
    folder = tmp_path_factory.mktemp("two-ranks")
    mp.spawn(_run_two_ranks, args=(str(folder),), nprocs=2)
    return folder


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the results of one process for each case."""
    folder = tmp_path_factory.mktemp("one_process")
    for case in CASES:
        parallel, stem = prepare_case(case), folder / case.name

        def save(step: int, schedule: Any, parallel: Parallel = parallel, stem: Path = stem) -> None:
            if step == SAVED_AT:
                write_state(parallel, stem.with_suffix(".middle"))

        gap = measure_initial_gap(parallel, case)
        record = train(parallel, case, before_step=save)
        record.initial_gap = gap
        write_state(parallel, stem.with_suffix(".end"))
        for rank in (0, 1):
            save_file(compute_outputs(parallel, rank), stem.with_suffix(f".written{rank}"))
        stem.with_suffix(".json").write_text(json.dumps(asdict(record)))
    return folder


def read_record(file: Path) -> RunRecord:
    return RunRecord(**json.loads(file.read_text()))


def assert_same_state(found: Path, expected: Path, *, rtol: float, atol: float) -> None:
    one, other = read_state(found), read_state(expected)
    assert list(one) == list(other)
    for name, state in one.items():
        assert state.keys() == other[name].keys() == {"weight", "exp_avg", "exp_avg_sq", "step"}
        for key, value in state.items():
            torch.testing.assert_close(
                value, other[name][key], rtol=rtol, atol=atol, msg=lambda m, n=f"{name}/{key}": f"{n}: {m}"
            )


COMBINED = [pytest.param(case, name, id=f"{case.name}-{name}") for case in CASES for name in case.strategies]


@pytest.mark.parametrize(("case", "name"), COMBINED)
def test_two_ranks_take_the_steps_of_one_process(
    case: Case, name: str, two_ranks: Path, one_process: Path
) -> None:
    found, expected = (
        read_record(two_ranks / f"{case.name}-{name}.json"),
        read_record(one_process / f"{case.name}.json"),
    )
    assert len(found.losses) == case.steps
    assert found.losses == pytest.approx(expected.losses, abs=case.tolerance, rel=case.tolerance)
    assert found.evaluated == pytest.approx(expected.evaluated, abs=case.tolerance, rel=case.tolerance)
    assert found.norms == pytest.approx(expected.norms, rel=max(1e-4, 5 * case.tolerance))
    assert min(expected.norms) > CLIP
    assert expected.losses[-1] < expected.losses[0]


@pytest.mark.parametrize(("case", "name"), COMBINED)
def test_an_untrained_policy_scores_exactly_as_its_reference(
    case: Case, name: str, two_ranks: Path, one_process: Path
) -> None:
    assert read_record(two_ranks / f"{case.name}-{name}.json").initial_gap == 0.0
    assert read_record(one_process / f"{case.name}.json").initial_gap == 0.0


@pytest.mark.parametrize(("case", "name"), COMBINED)
def test_a_gradient_that_is_not_finite_is_reported_before_any_weight_changes(
    case: Case, name: str, two_ranks: Path
) -> None:
    norm, untouched = read_record(two_ranks / f"{case.name}-{name}.json").overflow
    assert not math.isfinite(norm)
    assert untouched


@pytest.mark.parametrize("case", LONG, ids=lambda case: case.name)
@pytest.mark.parametrize("name", STRATEGIES)
def test_all_strategies_save_the_same_state(
    case: Case, name: str, two_ranks: Path, one_process: Path
) -> None:
    for part in ("middle", "end"):
        assert_same_state(
            two_ranks / f"{case.name}-{name}.{part}",
            one_process / f"{case.name}.{part}",
            rtol=1e-3,
            atol=1e-5,
        )


@pytest.mark.parametrize("case", LONG, ids=lambda case: case.name)
@pytest.mark.parametrize("name", STRATEGIES)
def test_another_strategy_and_one_process_resume_from_the_checkpoint(
    case: Case, name: str, two_ranks: Path
) -> None:
    stem = two_ranks / f"{case.name}-{name}"
    uninterrupted = read_record(stem.with_suffix(".json"))
    assert uninterrupted.resumed == pytest.approx(uninterrupted.losses[SAVED_AT:], abs=1e-5)
    assert resume_training(prepare_case(case), case, stem, rank=None) == pytest.approx(
        uninterrupted.resumed, abs=1e-5
    )


@pytest.mark.parametrize("case", [c for c in CASES if c.precision == "float32"], ids=lambda case: case.name)
@pytest.mark.parametrize("name", SHARDED_STRATEGIES)
def test_a_sharded_policy_gives_the_logits_and_texts_of_one_process(
    case: Case, name: str, two_ranks: Path, one_process: Path
) -> None:
    for rank in (0, 1):
        with (
            safe_open(two_ranks / f"{case.name}-{name}.written{rank}", framework="pt") as found,
            safe_open(one_process / f"{case.name}.written{rank}", framework="pt") as expected,
        ):
            torch.testing.assert_close(
                found.get_tensor("logits"), expected.get_tensor("logits"), rtol=1e-3, atol=1e-3
            )
            assert torch.equal(found.get_tensor("ids"), expected.get_tensor("ids"))


def _run_one_rank(_: int, folder: str) -> None:
    torch.set_num_threads(1)
    for case in LONG:
        for offload in (False, True):
            parallel = prepare_case(case, strategy="deepspeed", zero_stage=3, offload=offload)
            assert parallel.world_size == 1
            losses = resume_training(parallel, case, Path(folder) / f"{case.name}-zero3", rank=None)
            (Path(folder) / f"{case.name}-{offload}.one").write_text(json.dumps(losses))
    parallel = prepare_case(LONG[0], strategy="fsdp", offload=True)
    assert isinstance(parallel, ShardedParallel)
    losses = resume_training(parallel, LONG[0], Path(folder) / "full-zero3", rank=None)
    (Path(folder) / "full-fsdp.one").write_text(json.dumps(losses))


def test_a_sharded_policy_of_two_ranks_resumes_sharded_on_one(two_ranks: Path) -> None:
    mp.spawn(_run_one_rank, args=(str(two_ranks),), nprocs=1)
    for stem in ("full-False", "full-True", "full-fsdp", "lora-False", "lora-True"):
        uninterrupted = read_record(two_ranks / f"{stem.partition('-')[0]}-zero3.json").losses[SAVED_AT:]
        assert json.loads((two_ranks / f"{stem}.one").read_text()) == pytest.approx(uninterrupted, abs=1e-5)
