"""Every strategy takes the steps of one process: real gloo ranks, the real training step."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
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
from models.adapters import adapter_off, add_lora
from models.config import LoraSettings
from models.logprobs import Scorer
from models.parallel import Parallel, Replicated, Sharded, Zero, prepare
from models.rows import Prompted, build_rows
from orchestrator.worker.metrics import StepTable
from orchestrator.worker.step import MicroBatch, run_evaluation_pass, run_training_step

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
SPLIT = ("fsdp", "zero3")


@dataclass(frozen=True)
class Case:
    """A policy, and how it is trained."""

    name: str
    lora: tuple[str, ...] = ()
    tied: bool = False
    base: str = "float32"
    precision: str = "float32"
    checkpointing: bool = False
    offload: bool = False
    steps: int = SHORT
    strategies: tuple[str, ...] = SPLIT
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
    Case("replayed_head", lora=("q_proj", "lm_head")),
    Case("checkpointing", checkpointing=True),
    Case("offload", offload=True, strategies=("fsdp", "zero1", "zero2", "zero3")),
    Case("autocast", precision="bfloat16", strategies=tuple(STRATEGIES), tolerance=2e-2),
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
class Course:
    """What a run of a case did."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    evaluated: list[float] = field(default_factory=list)
    resumed: list[float] = field(default_factory=list)
    overflow: tuple[float, bool] = (0.0, False)


def policy(case: Case) -> Scorer:
    model = tiny.llama(num_hidden_layers=1, tie_word_embeddings=case.tied).to(getattr(torch, case.base))
    if case.checkpointing:
        # transformers renamed this in the course of version 5.
        new = getattr(model, "activation_checkpointing_enable", None)
        (new or model.gradient_checkpointing_enable)({"use_reentrant": False})
    if case.lora:
        model = add_lora(model, LoraSettings(r=2, target_modules=case.lora), seed=3)
    return Scorer(model.train(), chunk_tokens=4)


def prepared(case: Case, **strategy: Any) -> Parallel:
    return prepare(
        policy(case),
        device=CPU,
        precision=case.dtype,
        learning_rate=3e-3,
        weight_decay=0.1,
        eps=1e-6,
        **strategy,
    )


def pairs() -> list[Prompted]:
    generator = np.random.default_rng(0)

    def ids(low: int, high: int) -> np.ndarray:
        return generator.integers(0, 256, size=int(generator.integers(low, high)))

    return [Prompted(ids(3, 9), [ids(2, 8), ids(2, 8)]) for _ in range(PAIRS)]


def reference(parallel: Parallel, case: Case) -> ReferenceScores:
    """The policy's own start where it has an adapter to switch off, else another model."""
    rows = build_rows(pairs(), shared=True, pad_id=0)
    with torch.no_grad():
        if case.lora:
            with adapter_off(parallel.unwrapped.model):
                scores = parallel.unwrapped(rows, entropy=True)
        else:
            scores = Scorer(tiny.llama(seed=1, num_hidden_layers=1))(rows, entropy=True)
    assert scores.entropy is not None
    columns = (scores.logps, scores.lengths, scores.entropy)
    return ReferenceScores(*(f[side::2] for f in columns for side in (0, 1)))


def batches(against: ReferenceScores, share: list[list[int]]) -> list[MicroBatch]:
    groups = pairs()
    return [
        MicroBatch(
            rows=build_rows([groups[i] for i in at], shared=True, pad_id=0),
            slots=torch.tensor(at, dtype=torch.long),
            soft_labels=torch.linspace(0.5, 1, PAIRS, dtype=torch.float64)[at],
            references=(ReferenceScores(*(v[at] for v in vars(against).values())),),
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
    at: Callable[[int, Any], None] = lambda step, schedule: None,
    schedule_state: Mapping[str, Any] | None = None,
) -> Course:
    """Steps `first`..: the shares of a rank, or all pairs at once; `at` is called before each."""
    against, course = reference(parallel, case), Course()
    schedule = get_scheduler("cosine", parallel.optimizer, num_warmup_steps=2, num_training_steps=STEPS)
    if schedule_state is not None:
        schedule.load_state_dict(dict(schedule_state))
        parallel.set_learning_rate(schedule.get_last_lr()[0])
    for step in range(first, case.steps):
        at(step, schedule)
        share = SHARES[step % 3][rank] if rank is not None else [list(range(PAIRS))]
        table, norm = run_training_step(
            parallel,
            batches(against, share),
            loss=LOSS,
            table=StepTable(PAIRS, ["start"]),
            clip_norm=CLIP,
            precision=case.dtype,
        )
        schedule.step()
        course.losses.append(float(table["loss"].mean()))
        course.norms.append(norm)
    share = SHARES[1][rank] if rank is not None else [list(range(PAIRS))]
    table = run_evaluation_pass(
        parallel,
        batches(against, share),
        loss=LOSS,
        table=StepTable(PAIRS, ["start"]),
        precision=case.dtype,
    )
    course.evaluated = table["loss"].tolist()
    return course


def write(parallel: Parallel, file: Path) -> None:
    """All of `saved`, from rank 0."""
    state = {f"{n}/{what}": v.cpu().contiguous() for n, s in parallel.saved() for what, v in s.items()}
    if parallel.rank == 0:
        save_file(state, file)


def read(file: Path) -> dict[str, dict[str, Tensor]]:
    state: dict[str, dict[str, Tensor]] = {}
    with safe_open(file, framework="pt") as opened:
        for key in opened.keys():  # noqa: SIM118 (no dictionary)
            name, _, what = key.rpartition("/")
            state.setdefault(name, {})[what] = opened.get_tensor(key)
    return state


def put_back(parallel: Parallel, file: Path) -> None:
    state = read(file)
    parallel.restore(state.__getitem__, state.keys())


def written(parallel: Parallel, rank: int) -> dict[str, Tensor]:
    """What `logits` and `generate` give; ranks ask for texts of different lengths."""
    parallel.unwrapped.eval()
    ids = torch.arange(2 * (3 + rank)).reshape(2, -1)
    given = {
        "logits": parallel.unwrapped.logits(ids),
        "ids": parallel.unwrapped.generate(
            ids,
            do_sample=False,
            max_new_tokens=3 + 2 * rank,
            eos_token_id=None,
            pad_token_id=0,
            synced_gpus=parallel.sharded,
        ),
    }
    parallel.unwrapped.train()
    return given


def run(case: Case, name: str, folder: Path, rank: int) -> None:
    """One case under one strategy, saved in the middle and gone on with under the next strategy."""
    parallel = prepared(case, **STRATEGIES[name], offload=case.offload)
    assert isinstance(parallel, {"ddp": Replicated, "fsdp": Sharded}.get(name, Zero))
    assert parallel.sharded == (name in SPLIT)
    assert (parallel.rank, parallel.world_size) == (rank, 2)
    assert parallel.on_any_rank(rank == 1) == (parallel.sharded or rank == 1)
    stem = folder / f"{case.name}-{name}"

    def save(step: int, schedule: Any) -> None:
        if step == SAVED_AT:
            write(parallel, stem.with_suffix(".middle"))
            stem.with_suffix(".schedule").write_text(json.dumps(schedule.state_dict()))

    course = train(parallel, case, rank=rank, at=save)
    write(parallel, stem.with_suffix(".end"))
    save_file(written(parallel, rank), stem.with_suffix(f".written{rank}"))
    if case.steps > SAVED_AT:
        other = list(STRATEGIES)[(list(STRATEGIES).index(name) + 1) % len(STRATEGIES)]
        resumed = prepared(case, **STRATEGIES[other])
        train(resumed, Case(**{**vars(case), "steps": 1}), rank=rank)  # what restore must replace
        course.resumed = go_on(resumed, case, stem, rank=rank)
    course.overflow = overflow(parallel)
    if rank == 0:
        stem.with_suffix(".json").write_text(json.dumps(asdict(course)))


def overflow(parallel: Parallel) -> tuple[float, bool]:
    """The norm of a gradient that is not finite on rank 0, and whether weights were left as they were."""
    before = {name: state["weight"].clone() for name, state in parallel.saved(moments=False)}
    with parallel.accumulate(last=True):
        scores = parallel.module(build_rows(pairs(), shared=True, pad_id=0))
        parallel.backward(scores.logps.sum() * (1e38 if parallel.rank == 0 else 1.0))
    norm = float(parallel.clip(CLIP))
    parallel.zero_grad()
    return norm, all(torch.equal(s["weight"], before[n]) for n, s in parallel.saved(moments=False))


def go_on(parallel: Parallel, case: Case, stem: Path, *, rank: int | None) -> list[float]:
    """The losses from the checkpoint in the middle on."""
    put_back(parallel, stem.with_suffix(".middle"))
    schedule = json.loads(stem.with_suffix(".schedule").read_text())
    return train(parallel, case, first=SAVED_AT, rank=rank, schedule_state=schedule).losses


def _two_ranks(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    models.zero.PERSISTENT = 0  # so that tiny weights are split, too
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    for case in CASES:
        for name in case.strategies:
            run(case, name, Path(folder), rank)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what two ranks did, all cases in one group because starting it takes long."""
    folder = tmp_path_factory.mktemp("two-ranks")
    mp.spawn(_two_ranks, args=(str(folder),), nprocs=2)
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same by one process, for each case."""
    folder = tmp_path_factory.mktemp("alone")
    for case in CASES:
        parallel, stem = prepared(case), folder / case.name

        def save(step: int, schedule: Any, parallel: Parallel = parallel, stem: Path = stem) -> None:
            if step == SAVED_AT:
                write(parallel, stem.with_suffix(".middle"))

        course = train(parallel, case, at=save)
        write(parallel, stem.with_suffix(".end"))
        for rank in (0, 1):
            save_file(written(parallel, rank), stem.with_suffix(f".written{rank}"))
        stem.with_suffix(".json").write_text(json.dumps(asdict(course)))
    return folder


def course(file: Path) -> Course:
    return Course(**json.loads(file.read_text()))


def assert_same_state(found: Path, expected: Path, *, rtol: float, atol: float) -> None:
    one, other = read(found), read(expected)
    assert list(one) == list(other)
    for name, state in one.items():
        assert state.keys() == other[name].keys() == {"weight", "exp_avg", "exp_avg_sq", "step"}
        for what, value in state.items():
            torch.testing.assert_close(
                value, other[name][what], rtol=rtol, atol=atol, msg=lambda m, n=f"{name}/{what}": f"{n}: {m}"
            )


COMBINED = [pytest.param(case, name, id=f"{case.name}-{name}") for case in CASES for name in case.strategies]


@pytest.mark.parametrize(("case", "name"), COMBINED)
def test_two_ranks_take_the_steps_of_one_process(case: Case, name: str, two_ranks: Path, alone: Path) -> None:
    found, expected = course(two_ranks / f"{case.name}-{name}.json"), course(alone / f"{case.name}.json")
    assert len(found.losses) == case.steps
    assert found.losses == pytest.approx(expected.losses, abs=case.tolerance, rel=case.tolerance)
    assert found.evaluated == pytest.approx(expected.evaluated, abs=case.tolerance, rel=case.tolerance)
    assert found.norms == pytest.approx(expected.norms, rel=max(1e-4, 5 * case.tolerance))
    assert min(expected.norms) > CLIP
    assert expected.losses[-1] < expected.losses[0]


@pytest.mark.parametrize(("case", "name"), COMBINED)
def test_a_gradient_that_is_not_finite_is_told_before_any_weight_is_touched(
    case: Case, name: str, two_ranks: Path
) -> None:
    norm, untouched = course(two_ranks / f"{case.name}-{name}.json").overflow
    assert not math.isfinite(norm)
    assert untouched


@pytest.mark.parametrize("case", LONG, ids=lambda case: case.name)
@pytest.mark.parametrize("name", STRATEGIES)
def test_what_is_saved_is_the_same_whatever_the_strategy(
    case: Case, name: str, two_ranks: Path, alone: Path
) -> None:
    for part in ("middle", "end"):
        assert_same_state(
            two_ranks / f"{case.name}-{name}.{part}", alone / f"{case.name}.{part}", rtol=1e-3, atol=1e-5
        )


@pytest.mark.parametrize("case", LONG, ids=lambda case: case.name)
@pytest.mark.parametrize("name", STRATEGIES)
def test_another_strategy_and_one_process_go_on_from_there(case: Case, name: str, two_ranks: Path) -> None:
    stem = two_ranks / f"{case.name}-{name}"
    uninterrupted = course(stem.with_suffix(".json"))
    assert uninterrupted.resumed == pytest.approx(uninterrupted.losses[SAVED_AT:], abs=1e-5)
    assert go_on(prepared(case), case, stem, rank=None) == pytest.approx(uninterrupted.resumed, abs=1e-5)


@pytest.mark.parametrize("case", [c for c in CASES if c.precision == "float32"], ids=lambda case: case.name)
@pytest.mark.parametrize("name", SPLIT)
def test_logits_and_texts_of_a_split_policy_are_those_of_a_whole_one(
    case: Case, name: str, two_ranks: Path, alone: Path
) -> None:
    for rank in (0, 1):
        with (
            safe_open(two_ranks / f"{case.name}-{name}.written{rank}", framework="pt") as found,
            safe_open(alone / f"{case.name}.written{rank}", framework="pt") as expected,
        ):
            torch.testing.assert_close(
                found.get_tensor("logits"), expected.get_tensor("logits"), rtol=1e-3, atol=1e-3
            )
            assert torch.equal(found.get_tensor("ids"), expected.get_tensor("ids"))


def _one_rank(_: int, folder: str) -> None:
    torch.set_num_threads(1)
    for case in LONG:
        for offload in (False, True):
            parallel = prepared(case, strategy="deepspeed", zero_stage=3, offload=offload)
            assert parallel.world_size == 1
            losses = go_on(parallel, case, Path(folder) / f"{case.name}-zero3", rank=None)
            (Path(folder) / f"{case.name}-{offload}.one").write_text(json.dumps(losses))
    parallel = prepared(LONG[0], strategy="fsdp", offload=True)
    assert isinstance(parallel, Sharded)
    losses = go_on(parallel, LONG[0], Path(folder) / "full-zero3", rank=None)
    (Path(folder) / "full-fsdp.one").write_text(json.dumps(losses))


def test_a_split_policy_of_two_ranks_goes_on_split_on_one(two_ranks: Path) -> None:
    mp.spawn(_one_rank, args=(str(two_ranks),), nprocs=1)
    for stem in ("full-False", "full-True", "full-fsdp", "lora-False", "lora-True"):
        uninterrupted = course(two_ranks / f"{stem.partition('-')[0]}-zero3.json").losses[SAVED_AT:]
        assert json.loads((two_ranks / f"{stem}.one").read_text()) == pytest.approx(uninterrupted, abs=1e-5)
