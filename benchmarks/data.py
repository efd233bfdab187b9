"""How fast rows become tokens, what a second start costs, and how memory grows from 1e3 to 1e6 pairs.

    python benchmarks/data.py [--pairs 1000 10000 100000]

Writes JSONL files of made-up chat pairs (about 150 tokens each), and reads them with SmolLM2's tokenizer and
template in fresh processes: without the file of tokens, with it, and as a worker opens it. Prints one row for
each number of pairs: pairs per second and core, seconds of the second start and rows it tokenised, and the
anonymous memory (what is not a mapped file) that the command and a worker have more per pair than for the
fewest pairs. A million pairs take some minutes per core, and 4 GB of disk.
"""

import argparse
import json
import os
import pickle
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import loky
from rich.console import Console
from rich.table import Table

WORDS = ("the", "film", "was", "good", "and", "so", "long", "that", "nobody", "saw", "it", "twice")
STEPS = 4
PAIRS_PER_STEP = 64


def write_pairs(path: Path, count: int) -> None:
    """Write made-up chat pairs, whose lengths and labels vary."""
    drawn = random.Random(0)

    def make_text(longest: int) -> str:
        return " ".join(drawn.choices(WORDS, k=drawn.randint(longest // 4, longest)))

    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            row = {
                "prompt": [{"role": "user", "content": f"{number}: {make_text(60)}"}],
                "chosen": [{"role": "assistant", "content": make_text(80)}],
                "rejected": [{"role": "assistant", "content": make_text(80) + "."}],
                "soft_label": drawn.randint(5, 10) / 10,
            }
            file.write(json.dumps(row) + "\n")


def read_anonymous_memory() -> int:
    """Return the bytes of this process's memory that are not a mapped file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])


def load_as_command(path: Path, folder: Path) -> dict[str, Any]:
    """Load the pairs as a command does, and hand what workers get to a file."""
    from transformers import AutoTokenizer

    from orchestrator.demo.assets import fetch_smollm2
    from preferences.config import DataConfig
    from preferences.load import load_splits
    from preferences.tokens.fitting import Readers
    from preferences.tokens.rendering import Rendering

    rendering = Rendering(AutoTokenizer.from_pretrained(fetch_smollm2()))
    readers = Readers(DataConfig(train=str(path), eval_fraction=0.01), rendering, {"base": rendering})
    rendering.identity  # noqa: B018  # is made once, whatever the number of pairs
    tokenized: list[int] = []
    started, before = time.perf_counter(), read_anonymous_memory()
    train, _ = load_splits(
        readers,
        completions_only=False,
        seed=0,
        folder=folder,
        progress=lambda _, rows: tokenized.append(rows),
    )
    seconds = time.perf_counter() - started
    handed = folder / "handed.pickle"
    handed.write_bytes(pickle.dumps(train.split.files))
    memory = read_anonymous_memory() - before
    return {"seconds": seconds, "tokenized": tokenized[-1] if tokenized else 0, "memory": memory}


def open_as_worker(folder: Path) -> dict[str, Any]:
    """Open the pairs as a worker does, and take the rows of some steps."""
    from preferences.batches import BatchPlan, split_over_ranks

    before = read_anonymous_memory()
    split = pickle.loads((folder / "handed.pickle").read_bytes()).open()
    plan = BatchPlan(len(split), PAIRS_PER_STEP, seed=0)
    lengths = split.policy.pair_lengths
    for step in range(min(STEPS, plan.steps_per_epoch)):
        indices = plan.get_step_indices(0, step)
        for rows in split_over_ranks(indices, lengths, world_size=1, tokens_per_microbatch=8192)[0]:
            assert all(len(split.policy[int(row)].chosen) for row in rows)
    return {"memory": read_anonymous_memory() - before}


def run_apart(*arguments: str) -> dict[str, Any]:
    """Run one of the measurements in a fresh process."""
    output = subprocess.run(
        [sys.executable, __file__, *arguments], check=True, capture_output=True, text=True
    ).stdout
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result


def measure(count: int, folder: Path) -> dict[str, Any]:
    """Measure a first start, a second one, and a worker."""
    path, cache = folder / f"{count}.jsonl", folder / f"cache-{count}"
    write_pairs(path, count)
    cache.mkdir()
    first, second = (run_apart("command", str(path), str(cache)) for _ in range(2))
    worker = run_apart("worker", str(cache))
    assert first["tokenized"] == count
    return {"count": count, "first": first, "second": second, "worker": worker}


def print_table(results: list[dict[str, Any]]) -> None:
    """Print one row for each number of pairs."""
    table = Table(
        "pairs", "pairs/s and core", "second start, s", "tokenised", "command, B/pair", "worker, B/pair"
    )
    cores, fewest = loky.cpu_count(), results[0]
    for result in results:
        more = result["count"] - fewest["count"]
        growth = [
            f"{(result[who]['memory'] - fewest[who]['memory']) / more:.0f}" if more else ""
            for who in ("second", "worker")
        ]
        rate = result["count"] / result["first"]["seconds"] / cores
        table.add_row(
            f"{result['count']:,}",
            f"{rate:,.0f}",
            f"{result['second']['seconds']:.1f}",
            f"{result['second']['tokenized']}",
            *growth,
        )
    console = Console()
    console.print(table)
    console.print(f"{cores} cores")


def main() -> None:
    """Read the command line and measure."""
    if sys.argv[1:2] == ["command"]:
        print(json.dumps(load_as_command(Path(sys.argv[2]), Path(sys.argv[3]))))
        return
    if sys.argv[1:2] == ["worker"]:
        print(json.dumps(open_as_worker(Path(sys.argv[2]))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    options = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with tempfile.TemporaryDirectory(prefix="polyref-data-") as folder:
        print_table([measure(count, Path(folder)) for count in options.pairs])


if __name__ == "__main__":
    main()
