"""Prints how many elements of weights, gradients and moments rank 0 of four holds, however they are split.

The other ranks are torch's fake process group: collectives do nothing, but every split is the real one.
"""

import json
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from models.logprobs import Scorer
from models.parallel import Parallel, prepare_parallel
from models.rows import PromptWithResponses, build_rows
from tests.support import tiny

WAYS: dict[str, dict[str, Any]] = {
    "fsdp": {"strategy": "fsdp"},
    "ZeRO-1": {"strategy": "deepspeed", "zero_stage": 1},
    "ZeRO-2": {"strategy": "deepspeed", "zero_stage": 2},
    "ZeRO-3": {"strategy": "deepspeed", "zero_stage": 3},
}


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _held(parallel: Parallel) -> dict[str, int]:
    # Stage 3 leaves an empty tensor behind and keeps its part beside it.
    weights = [getattr(w, "ds_tensor", None) for w in parallel._get_trainable_weights().values()]
    weights = [
        w if p is None else p
        for w, p in zip(parallel._get_trainable_weights().values(), weights, strict=True)
    ]
    grads = [w.grad for w in parallel._get_trainable_weights().values() if w.grad is not None]
    parallel.step()
    states = parallel.optimizer.state.values()
    return {
        "weights": sum(_local(w).numel() for w in weights),
        "gradients": sum(_local(g).numel() for g in grads),
        "moments": sum(_local(v).numel() for s in states for k, v in s.items() if k != "step"),
        "masters": sum(w.numel() for w in getattr(parallel, "_partitions", [])),
    }


def main() -> None:
    """All of WAYS, as one line of JSON."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    found = {}
    for name, way in WAYS.items():
        scorer = Scorer(tiny.llama(vocab_size=264).train())
        rows = build_rows([PromptWithResponses([1, 2], [[3, 4], [5, 6]])], shared=True, pad_id=0)
        parallel = prepare_parallel(scorer, device=torch.device("cpu"), learning_rate=1e-3, **way)
        with parallel.accumulate(True):
            parallel.backward(-parallel.module(rows, entropy=True).logps.sum())
        found[name] = _held(parallel)
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
