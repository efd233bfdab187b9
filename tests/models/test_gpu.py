"""Tests that need a GPU: FlexAttention's masks, bfloat16 kernels, fused AdamW, offloading."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from transformers import PreTrainedModel

from models.logprobs import Scorer
from models.parallel import has_sharded_weights, prepare_parallel
from models.rows import build_rows
from tests.support import tiny
from tests.support.plain_logits import GROUPS, assert_equal_gradients, gradients, weighted

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def score_groups(model: PreTrainedModel, *, shared: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    scorer = Scorer(model, chunk_tokens=8)
    assert scorer.prefix_sharing_unavailable_reason is None
    logps = scorer(build_rows(GROUPS, shared=shared, pad_id=0).to(model.device)).logps
    return logps.detach().cpu(), {n: g.cpu() for n, g in gradients(model, weighted(logps.cpu())).items()}


@pytest.mark.parametrize(
    ("make", "attention"),
    [
        *(
            (make, kind)
            for make in (tiny.llama_config, tiny.qwen_config)
            for kind in ("sdpa", "flex_attention")
        ),
        (tiny.gpt2_config, "sdpa"),  # transformers has no flex for it
    ],
)
def test_scores_on_a_gpu_equal_those_on_a_cpu(make: Callable[..., object], attention: str) -> None:
    # FlexAttention's kernels need heads of at least 16 channels.
    width = {"n_embd": 64} if make is tiny.gpt2_config else {"hidden_size": 64, "head_dim": 16}
    expected, gradient = score_groups(tiny.build(make(**width)), shared=False)
    model = tiny.build(make(**width), attention=attention).to("cuda")
    for shared in (True, False):
        logps, found = score_groups(model, shared=shared)
        torch.testing.assert_close(logps, expected, rtol=1e-3, atol=0.0)
        assert_equal_gradients(found, gradient, 1e-2)


def test_bfloat16_on_a_gpu_stays_near_float32() -> None:
    expected, _ = score_groups(tiny.llama(), shared=True)
    logps, _ = score_groups(tiny.llama().to("cuda", torch.bfloat16), shared=True)
    torch.testing.assert_close(logps, expected, rtol=2e-2, atol=0.5)


def test_fused_adamw_steps_as_the_plain_one() -> None:
    states = []
    for device in ("cpu", "cuda"):
        model = tiny.llama().to(device)
        parallel = prepare_parallel(Scorer(model), device=torch.device(device), learning_rate=1e-2)
        rows = build_rows(GROUPS, shared=True, pad_id=0).to(device)
        parallel.backward(parallel.module(rows).logps.sum())
        parallel.clip_gradients(1.0)
        parallel.step()
        states.append({name: state["weight"].cpu() for name, state in parallel.iterate_full_state()})
    drift = torch.cat([(states[0][n] - w).flatten() for n, w in states[1].items()])
    assert drift.abs().mean() < 1e-4


def take_steps(**strategy: Any) -> list[float]:
    """Return the losses of three steps of one process, sharded or offloaded as `strategy` says."""
    stage, offload = strategy.get("zero_stage", 2), strategy.get("offload", False)
    load_on_cpu = has_sharded_weights(strategy.get("strategy", "ddp"), stage, workers=1, offload=offload)
    model = tiny.llama().to("cpu" if load_on_cpu else "cuda").train()
    parallel = prepare_parallel(Scorer(model), device=torch.device("cuda", 0), learning_rate=1e-2, **strategy)
    rows, sums = build_rows(GROUPS, shared=True, pad_id=0).to("cuda"), []
    for _ in range(3):
        with parallel.accumulate(last=True):
            loss = -parallel.module(rows, entropy=True).logps.sum()
            parallel.backward(loss)
        parallel.clip_gradients(1.0)
        parallel.step()
        parallel.zero_grad()
        sums.append(float(loss.detach()))
    assert all(torch.isfinite(state["weight"]).all() for _, state in parallel.iterate_full_state())
    parallel.scorer.eval()
    generated = parallel.scorer.generate(rows.input_ids[:1, :4], max_new_tokens=2, pad_token_id=0)
    assert generated.shape[1] > 4
    return sums


def _run_strategies(_: int, file: str) -> None:
    zero = [
        {"strategy": "deepspeed", "zero_stage": s, "offload": o} for s in (1, 2, 3) for o in (False, True)
    ]
    found = [take_steps(**strategy) for strategy in ({}, {"strategy": "fsdp", "offload": True}, *zero)]
    Path(file).write_text(json.dumps(found))


def test_sharded_and_offloaded_policies_step_as_a_replicated_one(tmp_path: Path) -> None:
    mp.spawn(_run_strategies, args=(str(tmp_path / "sums.json"),), nprocs=1)
    plain, *others = json.loads((tmp_path / "sums.json").read_text())
    assert plain[-1] < plain[0]
    for other in others:
        assert other == pytest.approx(plain, rel=1e-3)
