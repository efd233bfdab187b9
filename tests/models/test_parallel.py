"""One process and two gloo ranks take the same step; saved state is restored exactly."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file

from models.adapters import add_lora, disable_adapter, find_adapter
from models.config import LoraSettings, ModelError
from models.logprobs import Scorer, get_causal_model
from models.parallel import (
    Parallel,
    ReplicatedParallel,
    has_sharded_weights,
    prepare_parallel,
    raise_on_all_ranks,
)
from models.rows import PromptWithResponses, build_rows
from tests.support import tiny
from tests.support.plain_logits import GROUPS, weighted

CPU = torch.device("cpu")
# One rank's micro-batches; the second rank's last one is empty.
SHARES = [[GROUPS[:1], GROUPS[1:2]], [GROUPS[2:], []]]


def build_policy(lora: bool) -> Scorer:
    model = tiny.llama()
    return Scorer((add_lora(model, LoraSettings(r=2), seed=3) if lora else model).train(), chunk_tokens=4)


def prepare_policy(lora: bool = False, **settings: Any) -> Parallel:
    return prepare_parallel(build_policy(lora), device=CPU, learning_rate=1e-2, weight_decay=0.1, **settings)


def accumulate_gradients(
    parallel: Parallel, microbatches: list[list[PromptWithResponses]], *, count: int
) -> float:
    """Accumulate gradients of the sum over all ranks' sequences / count; return this rank's sum."""
    total = 0.0
    for index, groups in enumerate(microbatches):
        rows = build_rows(groups, shared=True, pad_id=0)
        with parallel.accumulate(last=index == len(microbatches) - 1):
            loss = parallel.module(rows).logps.sum() / count * parallel.world_size
            if find_adapter(parallel.scorer) is not None:  # scoring in between must not disturb the step
                with disable_adapter(parallel.module):
                    parallel.module(rows)
            parallel.backward(loss)
        total += float(loss.detach())
    return total


def copy_weights(parallel: Parallel) -> dict[str, torch.Tensor]:
    return {name: state["weight"].clone() for name, state in parallel.iterate_full_state(moments=False)}


def copy_state(parallel: Parallel) -> dict[str, dict[str, torch.Tensor]]:
    return {
        name: {key: v.clone() for key, v in state.items()} for name, state in parallel.iterate_full_state()
    }


def take_two_steps(parallel: Parallel, share: list[list[PromptWithResponses]]) -> dict[str, torch.Tensor]:
    state = {}
    for step in range(2):
        accumulate_gradients(parallel, share, count=7)
        state[f"norm{step}"] = parallel.clip_gradients(0.5)
        if step == 0:
            state |= {
                f"gradient/{n}": p.grad.clone()
                for n, p in parallel.scorer.named_parameters()
                if p.grad is not None
            }
        parallel.step()
        parallel.zero_grad()
    return state | {f"weight/{n}": p for n, p in copy_weights(parallel).items()}


def raise_on_rank_1(rank: int) -> None:
    if rank == 1:
        raise ModelError(f"no such file ö on rank {rank}")


def _run_rank(rank: int, rendezvous: str, out: str) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("error", category=FutureWarning)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    try:
        for lora in (False, True):
            parallel = prepare_policy(lora)
            assert isinstance(parallel, ReplicatedParallel)
            assert (parallel.rank, parallel.world_size) == (rank, 2)
            numbers = torch.tensor([1.0, 10.0]) * (rank + 1)
            assert parallel.all_reduce_sum(numbers) is numbers
            assert numbers.tolist() == [3.0, 30.0]
            with pytest.raises(ModelError, match="no such file ö on rank 1"), raise_on_all_ranks(CPU):
                raise_on_rank_1(rank)
            with raise_on_all_ranks(CPU):
                pass
            save_file(take_two_steps(parallel, SHARES[rank]), f"{out}/{lora}-{rank}.safetensors")
    finally:
        dist.destroy_process_group()


def test_two_ranks_take_the_step_of_one(tmp_path: Path) -> None:
    mp.spawn(_run_rank, args=(str(tmp_path / "rendezvous"), str(tmp_path)), nprocs=2)
    for lora in (False, True):
        expected = take_two_steps(prepare_policy(lora), SHARES[0] + SHARES[1])
        for rank in (0, 1):
            found = load_file(tmp_path / f"{lora}-{rank}.safetensors")
            assert found.keys() == expected.keys()
            for name, value in found.items():
                torch.testing.assert_close(
                    value, expected[name], rtol=2e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
                )


def test_one_process_steps_as_plain_adamw() -> None:
    parallel, model = prepare_policy(), tiny.llama()
    assert (parallel.rank, parallel.world_size) == (0, 1)
    numbers = torch.tensor([1.0])
    assert parallel.all_reduce_sum(numbers) is numbers
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    plain = [p for p in model.parameters() if p.dim() < 2]
    assert decayed
    assert plain
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}], lr=1e-2
    )
    scorer, rows = Scorer(model, chunk_tokens=4), build_rows(GROUPS, shared=True, pad_id=0)
    for _ in range(2):
        parallel.backward(weighted(parallel.module(rows).logps))
        weighted(scorer(rows).logps).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        torch.testing.assert_close(parallel.clip_gradients(0.5), norm)
        optimizer.step()
        parallel.step()
        optimizer.zero_grad()
        parallel.zero_grad()
    for name, weight in copy_weights(parallel).items():
        torch.testing.assert_close(
            weight, dict(scorer.named_parameters())[name].detach(), rtol=1e-6, atol=1e-7
        )


def test_norm_is_measured_without_clipping_when_no_bound_is_given() -> None:
    parallel = prepare_policy()
    parallel.backward(parallel.module(build_rows(GROUPS, shared=True, pad_id=0)).logps.sum())
    before = {n: p.grad.clone() for n, p in parallel.scorer.named_parameters()}
    expected = torch.stack([g.norm() for g in before.values()]).norm()
    torch.testing.assert_close(parallel.clip_gradients(None), expected)
    assert all(torch.equal(p.grad, before[n]) for n, p in parallel.scorer.named_parameters())


def test_learning_rate_can_be_set() -> None:
    parallel = prepare_policy()
    parallel.set_learning_rate(0.0)
    before = copy_weights(parallel)
    take_two_steps(parallel, SHARES[0])
    assert all(torch.equal(w, before[n]) for n, w in copy_weights(parallel).items())


@pytest.mark.parametrize("lora", [False, True])
def test_state_is_restored_bit_for_bit(lora: bool, tmp_path: Path) -> None:
    first = prepare_policy(lora)
    take_two_steps(first, SHARES[0])
    state = {f"{name}/{key}": v for name, parts in copy_state(first).items() for key, v in parts.items()}
    save_file(state, tmp_path / "state.safetensors")
    read = load_file(tmp_path / "state.safetensors")

    second = prepare_policy(lora)
    take_two_steps(second, SHARES[1])
    parts = ("weight", "exp_avg", "exp_avg_sq", "step")
    second.restore_full_state(
        lambda name: {part: read[f"{name}/{part}"] for part in parts}, {k.rpartition("/")[0] for k in read}
    )
    expected, found = take_two_steps(first, SHARES[1]), take_two_steps(second, SHARES[1])
    assert all(torch.equal(found[n], expected[n]) for n in expected)


def test_state_has_only_the_adapter_and_a_tied_weight_once() -> None:
    assert all("lora_" in name for name in copy_weights(prepare_policy(lora=True)))
    tied = copy_weights(prepare_parallel(Scorer(tiny.qwen()), device=CPU, learning_rate=1.0))
    assert "model.model.embed_tokens.weight" in tied
    assert "model.lm_head.weight" not in tied


def test_state_before_the_first_step_has_no_moments_and_is_restored() -> None:
    parallel = prepare_policy()
    state = copy_state(parallel)
    assert all(parts.keys() == {"weight"} for parts in state.values())
    take_two_steps(parallel, SHARES[0])
    assert all(parts["step"] == 2 for parts in copy_state(parallel).values())
    parallel.restore_full_state(state.__getitem__, state.keys())
    assert all(torch.equal(weight, state[name]["weight"]) for name, weight in copy_weights(parallel).items())


def test_the_state_of_another_policy_is_refused() -> None:
    state = copy_state(prepare_policy())
    with pytest.raises(ModelError, match=r"belong to another policy .*resume with the model and adapter"):
        prepare_policy(lora=True).restore_full_state(state.__getitem__, state.keys())
    wide = prepare_parallel(Scorer(tiny.llama(vocab_size=300)), device=CPU, learning_rate=1.0)
    with pytest.raises(ModelError, match=r"has shape \(261, 32\), the policy's has \(300, 32\)"):
        wide.restore_full_state(state.__getitem__, state.keys())


def test_one_process_has_no_group_unless_it_shards_or_offloads() -> None:
    assert type(prepare_policy(strategy="fsdp")) is Parallel
    assert not dist.is_initialized()
    assert not has_sharded_weights("ddp", 2, workers=4)
    assert not has_sharded_weights("deepspeed", 2, workers=4, offload=True)
    assert not has_sharded_weights("fsdp", 2, workers=1)
    assert has_sharded_weights("fsdp", 2, workers=2)
    assert has_sharded_weights("fsdp", 2, workers=1, offload=True)
    assert has_sharded_weights("deepspeed", 3, workers=1)


@pytest.mark.parametrize(
    "split", [{"strategy": "fsdp", "offload": True}, {"strategy": "deepspeed", "zero_stage": 3}]
)
def test_quantised_weights_are_not_sharded(split: dict[str, Any]) -> None:
    scorer = build_policy(lora=True)
    get_causal_model(scorer.model).is_quantized = True  # as set by bitsandbytes
    with pytest.raises(ModelError, match="quantised weights cannot be split over workers; set quantization"):
        prepare_parallel(scorer, device=CPU, learning_rate=1.0, **split)


def test_flex_attention_does_not_train_on_a_cpu() -> None:
    scorer = build_policy(lora=False)
    get_causal_model(scorer.model).config._attn_implementation = "flex_attention"
    with pytest.raises(ModelError, match="flex has no backward pass on a CPU; set attention: sdpa"):
        prepare_parallel(scorer, device=CPU, learning_rate=1.0)


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(ModelError, match="no weight to train; load it with trainable=True"):
        prepare_parallel(Scorer(tiny.llama().requires_grad_(False)), device=CPU, learning_rate=1.0)
