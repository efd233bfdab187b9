"""What references cost a search, measured; and what the same runs cost as TRL runs of their own.

    python benchmarks/search_cost.py --setting full --repeats 3
    python benchmarks/search_cost.py --setting lora --against policy-only

Per repeat, one after the other on this machine, each timed from command to exit:

    search       polyref tune: 8 trials of 4 loss families, all reading 3 served references; empty score store
    policy-only  the same command, settings and data; 8 trials of losses that read no reference
    trl          8 DPO runs of TRL with one reference, each a process of its own, as many at a time as trials

Model, tokenizer and pairs are random, seeded and made on the spot: nothing is downloaded.
"""

import argparse
import json
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml

ROOT = Path(__file__).resolve().parents[1]
RUNS, HELD_OUT, PAIRS_PER_STEP = 8, 8, 16
SHORTEST, LONGEST = 32, 96
"""Words of a prompt and of a response; a word is a token."""
MAX_LENGTH = 256
ACCUMULATED = 4
"""Micro-batches of a TRL step. Of 1, 2 and 4 it is fastest with 4 on a CPU: the less padding."""
COLUMNS = ("prompt", "chosen", "rejected")
LEARNING_RATES, BETAS = (1e-5, 3e-5), (0.05, 0.1, 0.2, 0.4)
LORA = {"r": 16, "alpha": 32}
REFERENCES = ("base", "second", "third")
ARMS = {
    "search": "search, 3 references",
    "policy-only": "the same, no reference",
    "trl": "8 TRL DPO runs, 1 reference each",
}


@dataclass(frozen=True)
class Setting:
    """How the policies are trained, and the most a search may cost against its policy-only runs."""

    name: str
    lora: bool
    epochs: int
    pairs: int
    goal: float


SETTINGS = {
    "full": Setting("full fine-tuning, 2 epochs", lora=False, epochs=2, pairs=256, goal=1.15),
    "lora": Setting("LoRA, 1 epoch", lora=True, epochs=1, pairs=576, goal=1.25),
}


@dataclass(frozen=True)
class Size:
    """The model; a policy and its references are equally large."""

    layers: int = 6
    hidden: int = 256
    vocabulary: int = 4096


@dataclass(frozen=True)
class Measured:
    """One arm of one repeat.

    Attributes:
        arm: which.
        repeat: from 1.
        wall: seconds from the first command's start to the last one's exit.
        training: seconds between a run's evaluation before its first step and its end, summed over runs.
        busy: seconds that the machine's cores worked, whoever for: near cores x wall where nothing idles.
        scored: responses that the references scored.
    """

    arm: str
    repeat: int
    wall: float
    training: float
    busy: float
    scored: int = 0


@dataclass(frozen=True)
class Bench:
    """Where everything lies and how it is run."""

    folder: Path
    setting: Setting
    pairs: int
    at_once: int

    @property
    def steps(self) -> int:
        return self.setting.epochs * -(-self.pairs // PAIRS_PER_STEP)

    @property
    def threads(self) -> int:
        """Of each run, as `polyref tune` shares out the cores."""
        return max(1, (os.cpu_count() or 1) // self.at_once)


# ------------------------------------------------------------------ models and data


def make_material(bench: Bench, size: Size) -> int:
    """Write tokenizer, three models and both splits; returns the model's parameters."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    words = ["<pad>", "<eos>", "<unk>", *(f"w{n}" for n in range(size.vocabulary - 3))]
    raw = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.hidden * 8 // 3 // 32 * 32,
        num_hidden_layers=size.layers,
        num_attention_heads=max(1, size.hidden // 64),
        max_position_embeddings=2 * MAX_LENGTH,
        initializer_range=0.05,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    for seed, name in enumerate(REFERENCES):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        model.save_pretrained(bench.folder / name)
        tokenizer.save_pretrained(bench.folder / name)
    rng = np.random.default_rng(0)
    for split, count in (("train", bench.pairs), ("eval", HELD_OUT)):
        rows = [_pair(rng, words[3:]) for _ in range(count)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (bench.folder / f"{split}.jsonl").write_text(lines)
    return sum(weight.numel() for weight in model.parameters())


def _pair(rng: np.random.Generator, words: Sequence[str]) -> dict[str, Any]:
    texts = [" ".join(rng.choice(words, rng.integers(SHORTEST, LONGEST + 1))) for _ in range(3)]
    prompt, chosen, rejected = texts
    label = round(float(rng.uniform(0.6, 1.0)), 3)
    return {"prompt": prompt, "chosen": f" {chosen}", "rejected": f" {rejected}", "soft_label": label}


def read_rows(folder: Path, split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]


def unique_responses(bench: Bench) -> int:
    rows = read_rows(bench.folder, "train") + read_rows(bench.folder, "eval")
    return len({(row["prompt"], row[side]) for row in rows for side in ("chosen", "rejected")})


# ------------------------------------------------------------------ the two searches


def sweep_file(bench: Bench, arm: str, storage: Path) -> dict[str, Any]:
    """The sweep of `search`, or of `policy-only`: they differ in losses and references alone."""
    never = bench.steps + 1
    run: dict[str, Any] = {
        "name": "base",
        "policy": {"model": str(bench.folder / "base"), "adapter": LORA if bench.setting.lora else None},
        "data": {
            **{split: str(bench.folder / f"{split}.jsonl") for split in ("train", "eval")},
            "max_length": MAX_LENGTH,
            "max_prompt_length": MAX_LENGTH // 2,
        },
        "training": {
            "epochs": bench.setting.epochs,
            "pairs_per_step": PAIRS_PER_STEP,
            "tokens_per_microbatch": 2048,
            "precision": "float32",
            "save_every": never,
        },
        "evaluation": {"every_steps": never},
        "storage_path": str(storage),
    }
    if arm == "search":
        models = {name: {"model": str(bench.folder / name)} for name in REFERENCES}
        run |= {"loss": {"preset": "mrpo"}, "references": {"primary": "base", "models": models}}
        space: dict[str, Any] = {
            "loss.preset": {"grid": ["mrpo", "gdpo", "mallows_theta", "ipo"]},
            "loss.references.combine": "harmonic",
            "loss.references.weights": "adaptive",
        }
    else:
        run |= {"loss": {"preset": "cpo"}}
        space = {
            "loss.preset": {"grid": ["cpo", "simpo"]},
            "loss.sft_weight": 0.0,
            "loss.beta": {"grid": list(BETAS[:2])},
        }
    return {
        "name": arm,
        "run": run,
        "space": space | {"training.learning_rate": {"grid": list(LEARNING_RATES)}},
        "search": {"algorithm": "grid"},
        "max_concurrent": bench.at_once,
        "promote": None,
    }


def measure_search(bench: Bench, arm: str, repeat: int) -> Measured:
    """One search from an empty folder, checked to have done what it is measured for."""
    storage = bench.folder / f"{arm}-{repeat}"
    sweep = bench.folder / f"{arm}-{repeat}.yaml"
    sweep.write_text(yaml.safe_dump(sweep_file(bench, arm, storage), sort_keys=False))
    log = bench.folder / f"{arm}-{repeat}.log"
    wall, busy = run_all([[sys.executable, "-m", "orchestrator", "tune", str(sweep)]], [log], bench)

    at_once = re.search(r"searching, (\d+) trial\(s\) at a time", log.read_text())
    side_by_side = int(at_once[1]) if at_once else 0
    check(side_by_side == bench.at_once, f"{log}: {side_by_side} trials at a time; set --at-once to that")
    trials = [json.loads(path.read_text()) for path in storage.glob(f"{arm}/trials/*/trial.json")]
    check(len(trials) == RUNS, f"{log}: {len(trials)} trials, not {RUNS}")
    for trial in trials:
        ended = (trial["status"], trial["step"])
        check(ended == ("finished", bench.steps), f"{log}: trial {trial['number']} ended as {ended}")
    scores = json.loads((storage / arm / "run.json").read_text())["result"]["scores"]
    expected = dict.fromkeys(REFERENCES, unique_responses(bench)) if arm == "search" else {}
    scored = {name: counts["scored"] for name, counts in scores.items()}
    check(scored == expected, f"{log}: references scored {scored}, unique responses are {expected}")
    training = sum(_training_seconds(path) for path in storage.glob(f"{arm}/trials/*/metrics.jsonl"))
    shutil.rmtree(storage)
    return Measured(arm, repeat, wall, training, busy, sum(scored.values()))


def _training_seconds(metrics: Path) -> float:
    times = [json.loads(line)["time"] for line in metrics.read_text().splitlines()]
    return times[-1] - times[0]  # the first line is the evaluation before the first step


# ------------------------------------------------------------------ TRL


def measure_trl(bench: Bench, repeat: int) -> Measured:
    """As many DPO runs as the search has trials, each a process, so many at a time."""
    commands, logs, results = [], [], []
    for number in range(RUNS):
        result = bench.folder / f"trl-{repeat}-{number}.json"
        task = {
            "folder": str(bench.folder),
            "lora": bench.setting.lora,
            "epochs": bench.setting.epochs,
            "threads": bench.threads,
            "beta": BETAS[number // 2],
            "learning_rate": LEARNING_RATES[number % 2],
            "result": str(result),
        }
        commands.append([sys.executable, __file__, "--trl-run", json.dumps(task)])
        logs.append(result.with_suffix(".log"))
        results.append(result)
    wall, busy = run_all(commands, logs, bench)
    told = [json.loads(result.read_text()) for result in results]
    for log, run in zip(logs, told, strict=True):
        check(run["steps"] == bench.steps, f"{log}: {run['steps']} steps, not {bench.steps}")
    return Measured("trl", repeat, wall, sum(run["seconds"] for run in told), busy)


def trl_run(task: dict[str, Any]) -> None:
    """One DPO run as a user would write it: TRL's defaults but for what has to equal a trial's."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer

    torch.set_num_threads(task["threads"])
    folder, result = Path(task["folder"]), Path(task["result"])
    splits = {}
    for split in ("train", "eval"):
        rows = [{name: row[name] for name in COLUMNS} for row in read_rows(folder, split)]
        splits[split] = Dataset.from_list(rows)
    config = DPOConfig(
        output_dir=str(result.with_suffix("")),
        model_init_kwargs={"dtype": "float32"},
        beta=task["beta"],
        learning_rate=task["learning_rate"],
        num_train_epochs=task["epochs"],
        per_device_train_batch_size=PAIRS_PER_STEP // ACCUMULATED,
        per_device_eval_batch_size=HELD_OUT,
        gradient_accumulation_steps=ACCUMULATED,
        max_length=MAX_LENGTH,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        max_grad_norm=1.0,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )
    lora = LoraConfig(
        r=LORA["r"], lora_alpha=LORA["alpha"], target_modules="all-linear", task_type="CAUSAL_LM"
    )
    trainer = DPOTrainer(
        str(folder / "base"),
        args=config,
        train_dataset=splits["train"],
        eval_dataset=splits["eval"],
        peft_config=lora if task["lora"] else None,
    )
    trainer.evaluate()
    began = time.time()
    trainer.train()
    trainer.evaluate()
    told = {"steps": trainer.state.global_step, "seconds": time.time() - began}
    result.write_text(json.dumps(told))


# ------------------------------------------------------------------ running and telling


def run_all(commands: Sequence[Sequence[str]], logs: Sequence[Path], bench: Bench) -> tuple[float, float]:
    """Run commands, so many at a time, to their end; wall seconds and seconds of busy cores."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "RAY_ADDRESS": "local",  # a cluster of its own, started and ended with the search
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_WAIT_POLICY": "PASSIVE",
        "OMP_NUM_THREADS": str(bench.threads),
    }
    waiting = list(zip(commands, logs, strict=True))
    running: list[tuple[subprocess.Popen[bytes], Path]] = []
    busy, began = _busy_seconds(), time.perf_counter()
    try:
        while waiting or running:
            while waiting and len(running) < bench.at_once:
                command, log = waiting.pop(0)
                with log.open("w") as out:
                    process = subprocess.Popen(
                        command, stdout=out, stderr=subprocess.STDOUT, env=environment, cwd=bench.folder
                    )
                running.append((process, log))
            time.sleep(0.05)
            for process, log in [one for one in running if one[0].poll() is not None]:
                running.remove((process, log))
                tail = "\n".join(log.read_text().splitlines()[-20:])
                check(process.returncode == 0, f"exit {process.returncode}; the end of {log}:\n{tail}")
    finally:
        for process, _ in running:
            process.terminate()
        for process, _ in running:
            process.wait()
    return time.perf_counter() - began, _busy_seconds() - busy


def _busy_seconds() -> float:
    times = psutil.cpu_times()
    return float(times.user + times.system + times.nice)


def check(holds: bool, otherwise: str) -> None:
    if not holds:
        raise SystemExit(otherwise)


def describe(bench: Bench, size: Size, parameters: int) -> str:
    memory = psutil.virtual_memory().total / 2**30
    packages = ", ".join(
        f"{name} {version(name)}" for name in ("torch", "ray", "transformers", "peft", "mlflow", "trl")
    )
    return (
        f"{bench.setting.name}; {RUNS} runs, {bench.at_once} at a time with {bench.threads} thread(s) each\n"
        f"machine: {os.cpu_count()} cores, {memory:.0f} GiB, {platform.system()} {platform.machine()}, "
        f"Python {platform.python_version()}\n"
        f"packages: {packages}\n"
        f"model: {parameters / 1e6:.1f} M parameters, {size.layers} layers of {size.hidden}, "
        f"vocabulary {size.vocabulary}, float32\n"
        f"data: {bench.pairs} pairs, {HELD_OUT} held out, prompts and responses of {SHORTEST} to {LONGEST} "
        f"tokens; {bench.steps} steps of {PAIRS_PER_STEP} pairs per run"
    )


def tell(measured: Sequence[Measured], bench: Bench) -> str:
    """Every measurement, the ratios of every repeat with their medians, and what was scored."""
    width = max(map(len, ARMS.values()))
    lines = [f"{'repeat  run':{width + 8}}  {'wall s':>8}  {'training s':>10}  {'core s':>8}"]
    for one in measured:
        figures = f"{one.wall:8.1f}  {one.training:10.1f}  {one.busy:8.1f}"
        lines.append(f"{one.repeat:>6}  {ARMS[one.arm]:{width}}  {figures}")
    wide = width + len(": training only")
    lines += ["", f"{'search against':{wide}}  {'median':>8}  every repeat"]
    for arm in ARMS:
        if arm == "search" or all(one.arm != arm for one in measured):
            continue
        for name, value in (("wall", lambda m: m.wall), ("training only", lambda m: m.training)):
            ratios = _ratios(measured, arm, value)
            each = " ".join(f"{ratio:.3f}" for ratio in ratios)
            median = statistics.median(ratios)
            told = f"{ARMS[arm]}: {name}"
            goal = f"   goal {bench.setting.goal}: {'met' if median <= bench.setting.goal else 'missed'}"
            met = goal if (arm, name) == ("policy-only", "wall") else ""
            lines.append(f"{told:{wide}}  {median:8.3f}  {each}{met}")
    scored = {one.scored for one in measured if one.arm == "search"}
    unique = unique_responses(bench)
    lines.append(
        f"\nresponses scored per search: {', '.join(f'{n:,}' for n in scored)} = "
        f"{unique:,} unique x {len(REFERENCES)} references"
    )
    return "\n".join(lines)


def _ratios(measured: Sequence[Measured], arm: str, value: Any) -> list[float]:
    """Of the search to another arm, repeat by repeat."""
    of = {(one.arm, one.repeat): value(one) for one in measured}
    repeats = sorted({one.repeat for one in measured})
    return [of["search", repeat] / of[arm, repeat] for repeat in repeats if (arm, repeat) in of]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cores = os.cpu_count() or 1
    parser.add_argument("--setting", choices=SETTINGS, default="full")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--against", default="policy-only,trl", help="what to compare with (default: both)")
    parser.add_argument("--pairs", type=int, help="training pairs (default: 256 full, 576 lora)")
    parser.add_argument("--layers", type=int, default=Size.layers)
    parser.add_argument("--hidden", type=int, default=Size.hidden)
    parser.add_argument("--vocabulary", type=int, default=Size.vocabulary)
    parser.add_argument("--at-once", type=int, default=min(cores, RUNS), help="runs side by side")
    parser.add_argument("--folder", type=Path, help="keep logs here (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="write all measurements to this file, one a line")
    parser.add_argument("--quick", action="store_true", help="see that it works: figures mean nothing")
    parser.add_argument("--trl-run", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.arms = ["search", *arguments.against.split(",")]
    if unknown := set(arguments.arms) - set(ARMS):
        parser.error(f"--against takes policy-only and trl, got {', '.join(unknown)}")
    return arguments


def benchmark(arguments: argparse.Namespace, folder: Path) -> None:
    """Make the material, run every arm of every repeat, and print as it goes."""
    setting = SETTINGS[arguments.setting]
    size = Size(arguments.layers, arguments.hidden, arguments.vocabulary)
    pairs, repeats = arguments.pairs or setting.pairs, arguments.repeats
    if arguments.quick:
        size, pairs, repeats = Size(2, 64, 512), 32, 1
    folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(folder.resolve(), setting, pairs, arguments.at_once)
    parameters = make_material(bench, size)
    print(describe(bench, size, parameters) + "\n", flush=True)
    measured: list[Measured] = []
    for repeat in range(1, repeats + 1):
        turn = (repeat - 1) % len(arguments.arms)  # so that a drift of the machine favours none
        for arm in arguments.arms[turn:] + arguments.arms[:turn]:
            one = measure_trl(bench, repeat) if arm == "trl" else measure_search(bench, arm, repeat)
            measured.append(one)
            print(f"repeat {repeat}: {ARMS[arm]}: {one.wall:.1f} s", flush=True)
            if arguments.json:
                lines = [json.dumps(asdict(one)) + "\n" for one in measured]
                arguments.json.write_text("".join(lines))
    print("\n" + tell(measured, bench))
    if arguments.quick:
        print("--quick: it works; the figures mean nothing")


def main() -> None:
    arguments = parse_arguments()
    if arguments.trl_run:
        trl_run(json.loads(arguments.trl_run))
        return
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed, where installed, says that it chose it
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    if arguments.folder:
        benchmark(arguments, arguments.folder)
        return
    with tempfile.TemporaryDirectory(prefix="search-cost-") as folder:
        benchmark(arguments, Path(folder))


if __name__ == "__main__":
    main()
