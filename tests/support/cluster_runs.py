"""A run of tiny models whose data, models and results lie on the shared folder."""

import json
import random
from pathlib import Path
from typing import Any

from tests.support import tiny
from tests.support.hosts import SHARED

RUN: dict[str, Any] = {
    "name": "sentiment",
    "policy": {"model": f"{SHARED}/models/policy", "adapter": {"r": 4, "alpha": 8}},
    "references": {
        "primary": "base",
        "models": {"base": {"model": "policy"}, "other": {"model": f"{SHARED}/models/other"}},
    },
    "data": {
        "train": f"{SHARED}/pairs.jsonl",
        "eval_fraction": 0.25,
        "max_length": 256,
        "max_prompt_length": 64,
    },
    "loss": {"preset": "mrpo", "soft_label": {"type": "geometric"}},
    "training": {"max_steps": 4, "pairs_per_step": 8, "learning_rate": 1e-2, "save_every": 2},
    "evaluation": {"every_steps": 2},
    "tracking": {"registered_model": "sentiment"},
    "storage_path": f"{SHARED}/runs",
}


def furnish(shared: Path) -> None:
    """Put there what the run reads."""
    for number, name in enumerate(("policy", "other")):
        tiny.save(shared / "models" / name, tiny.llama(seed=number), tiny.byte_tokenizer())
    draw = random.Random(0)
    words = ["good", "bad", "fun", "dull", "nice", "weak", "warm", "cold", "sharp", "flat"]
    with (shared / "pairs.jsonl").open("w") as file:
        for number in range(48):
            chosen, rejected = (" ".join(draw.choices(words, k=draw.randint(1, 8))) for _ in range(2))
            row = {"prompt": f"Film {number % 16} is ", "chosen": chosen, "rejected": rejected}
            file.write(json.dumps(row | {"soft_label": round(draw.uniform(0.5, 1), 2)}) + "\n")
