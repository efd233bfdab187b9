"""Whether undisturbed runs end in the same weights, to the last bit, with scores made live and made first.

    python benchmarks/same_bits.py [--runs 5]

Trains a random Llama with LoRA against two references on the CPU, in float32, several times in each
`references.mode` with empty stores. Prints one row for each mode: how many different weights and scores the
runs ended with, and the largest difference of a weight and of a score (nats) from the first run's. Takes a
minute for each run on two cores.
"""

import argparse
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import polyref
from orchestrator.demo.assets import fetch_smollm2

WORDS = ("the", "film", "was", "good", "and", "so", "long", "that", "nobody", "saw", "it", "twice")
REFERENCES = ("one", "other")
NAME = "bits"


def write_inputs(folder: Path) -> None:
    """Write a policy, two references that differ from it, and 160 pairs."""
    tokenizer = AutoTokenizer.from_pretrained(fetch_smollm2())
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    for seed, name in enumerate(("policy", *REFERENCES)):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    drawn = random.Random(0)
    with (folder / "pairs.jsonl").open("w", encoding="utf-8") as file:
        for number in range(160):
            chosen, rejected = (" ".join(drawn.choices(WORDS, k=drawn.randint(2, 20))) for _ in range(2))
            row = {"prompt": f"{number}:", "chosen": f" {chosen}.", "rejected": f" {rejected}!"}
            file.write(json.dumps(row) + "\n")


def train(inputs: Path, mode: str, storage: Path) -> tuple[dict[str, torch.Tensor], dict[bytes, float]]:
    """Train once; return the weights, and the stored scores of both references."""
    run: dict[str, Any] = {
        "name": NAME,
        "policy": {"model": str(inputs / "policy"), "adapter": {"r": 8, "alpha": 16}},
        "references": {
            "primary": "one",
            "mode": mode,
            "models": {name: {"model": str(inputs / name), "replicas": 2} for name in REFERENCES},
        },
        "data": {"train": str(inputs / "pairs.jsonl"), "eval_fraction": 0.1},
        "loss": {"preset": "mrpo"},
        "training": {"max_steps": 40, "pairs_per_step": 8, "learning_rate": 1e-3},
        "storage_path": str(storage),
    }
    polyref.train(run)
    weights = load_file(storage / NAME / "export" / "model" / "model.safetensors")
    scores = {}
    for file in (storage / "scores").rglob("*.parquet"):
        columns = pq.read_table(file)
        keys = [file.parent.name.encode() + key for key in columns["key"].to_pylist()]
        scores |= dict(zip(keys, columns["logp"].to_pylist(), strict=True))
    return weights, scores


def compare(mode: str, runs: int) -> str:
    """Train several times and return a row of the table."""
    with tempfile.TemporaryDirectory() as folder:
        inputs = Path(folder) / "inputs"
        inputs.mkdir()
        write_inputs(inputs)
        results = [train(inputs, mode, Path(folder) / f"run-{number}") for number in range(runs)]
    weights = [torch.cat([tensor.flatten() for tensor in found.values()]) for found, _ in results]
    scores = [np.array([found[key] for key in sorted(found)]) for _, found in results]
    return (
        f"| {mode} | {runs} | {len({w.numpy().tobytes() for w in weights})} "
        f"| {max((w - weights[0]).abs().max().item() for w in weights):.1e} "
        f"| {len({s.tobytes() for s in scores})} | {max(np.abs(s - scores[0]).max() for s in scores):.1e} |"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=5, help="runs in each mode")
    arguments = parser.parse_args()
    rows = [compare(mode, arguments.runs) for mode in ("live", "precompute")]
    print("| references.mode | runs | different weights | apart by | different scores | apart by |")
    print("|---|---|---|---|---|---|")
    print("\n".join(rows))
