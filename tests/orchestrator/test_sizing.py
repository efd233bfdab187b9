"""Estimates of memory against what torch really holds, and against what is known of public models."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, MambaConfig, MixtralConfig, PreTrainedModel

from models.adapters import add_lora
from models.config import LoraSettings, ModelConfig, ModelError
from models.load import locate_model
from models.logprobs import Scorer
from models.parallel import prepare_parallel
from models.rows import PromptWithResponses, Rows, build_rows
from orchestrator.cluster.memory import (
    GIB,
    STRATEGIES,
    PolicyWorkload,
    Strategy,
    _count_activations,
    can_train,
    estimate_replica_memory,
    estimate_worker_memory,
    find_fewest_workers,
    size_run,
)
from orchestrator.cluster.memory_table import MODELS, format_documented_tables, format_memory_table
from orchestrator.cluster.model_shape import Shape, _count_shape, read_model_shape
from orchestrator.config.run import RunConfig, parse_run
from tests.support import tiny

ROOT = Path(__file__).parents[2]
LORA = LoraSettings(r=4)
SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 448,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}


def _of(model: PreTrainedModel, *, lora: bool, half: bool) -> tuple[torch.nn.Module, PolicyWorkload]:
    """A policy as `load_model` prepares it, and its load."""
    shape = _count_shape(model)
    policy: torch.nn.Module = model
    if lora:
        if half:
            _round_weights(model)
        policy = add_lora(model, LORA)
        shape = replace(shape, adapter=sum(p.numel() for p in policy.parameters() if p.requires_grad))
    width = 2.0 if half else 4.0
    return policy.train(), PolicyWorkload(
        shape, frozen_bytes=width, outer_bytes=width, compute_bytes=int(width)
    )


def _round_weights(model: torch.nn.Module) -> None:
    """Cast the weights as transformers does when it loads a model in bfloat16, and no buffer."""
    for weight in model.parameters():
        weight.data = weight.data.to(torch.bfloat16)


def _rows() -> Rows:
    prompt, chosen, rejected = list(range(32)), list(range(5, 37)), list(range(9, 41))
    return build_rows([PromptWithResponses(prompt, [chosen, rejected])] * 4, shared=True, pad_id=0)


# ------------------------------------------------------------ weights


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("0.135B", 134_515_008), ("1.2B", 1_235_814_400), ("8B", 8_030_261_248), ("70B", 70_553_706_496)],
)
def test_the_documented_models_have_their_published_sizes(name: str, parameters: int) -> None:
    assert MODELS[name].parameters == parameters


def test_an_adapter_on_every_linear_layer_of_a_known_model() -> None:
    """Llama 3.1 8B with rank 16 trains 41,943,040 weights, as PEFT prints for it."""
    assert MODELS["8B"].with_lora(16).adapter == 41_943_040


def test_numbers_and_a_folder_give_the_same_shape(tiny_llama_folder: Path) -> None:
    settings = tiny.llama_config()
    plain = Shape.from_dimensions(
        layers=settings.num_hidden_layers,
        hidden=settings.hidden_size,
        intermediate=settings.intermediate_size,
        heads=settings.num_attention_heads,
        kv_heads=settings.num_key_value_heads,
        vocabulary=settings.vocab_size,
    )
    config = ModelConfig(model=str(tiny_llama_folder))
    found = read_model_shape(locate_model(config), config, lora=LORA)
    assert found == replace(plain.with_lora(4), lora=0)
    model = tiny.llama()
    assert found.parameters == sum(p.numel() for p in model.parameters())
    adapted = add_lora(model, LORA)
    assert found.adapter == sum(p.numel() for p in adapted.parameters() if p.requires_grad)


@pytest.mark.parametrize("build", [tiny.llama, tiny.qwen, tiny.gpt2])
def test_tied_weights_count_once(build: Callable[..., PreTrainedModel]) -> None:
    model = build()
    assert _count_shape(model).parameters == sum(p.numel() for p in model.parameters())


def test_experts_are_all_held_and_few_are_used() -> None:
    settings = MixtralConfig(**tiny.llama_config().to_diff_dict(), num_local_experts=4, num_experts_per_tok=2)
    model = AutoModelForCausalLM.from_config(settings)
    shape = _count_shape(model)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.body > 4 * settings.num_hidden_layers * 3 * 32 * 64  # every expert's three matrices
    assert shape.intermediate == 2 * settings.intermediate_size


def test_a_model_without_attention_heads_is_counted_too() -> None:
    settings = MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=64, state_size=4)
    model = AutoModelForCausalLM.from_config(settings)
    assert _count_shape(model).parameters == sum(p.numel() for p in model.parameters())


def test_an_adapter_reference_is_base_and_adapter(tiny_llama_folder: Path, tmp_path: Path) -> None:
    adapted = add_lora(tiny.llama(), LORA)
    adapted.save_pretrained(tmp_path / "adapter")
    config = ModelConfig(model=str(tmp_path / "adapter"), base=str(tiny_llama_folder))
    found = read_model_shape(locate_model(config), config)
    assert found.adapter == sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert found.parameters == sum(p.numel() for p in tiny.llama().parameters())


def test_an_unknown_architecture_is_refused(tiny_llama_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "not-there"}')
    (tmp_path / "model.safetensors").symlink_to(tiny_llama_folder / "model.safetensors")
    config = ModelConfig(model=str(tmp_path))
    with pytest.raises(ModelError, match="its weights cannot be counted"):
        read_model_shape(locate_model(config), config)


# ------------------------------------------------------------ states


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("half", [False, True])
def test_states_are_the_bytes_that_torch_holds(lora: bool, half: bool) -> None:
    policy, load = _of(tiny.llama(), lora=lora, half=half)
    parallel = prepare_parallel(
        Scorer(policy),  # type: ignore[arg-type]
        precision=torch.bfloat16 if half else torch.float32,
        device=torch.device("cpu"),
        learning_rate=1e-3,
    )
    parallel.backward(-parallel.module(_rows(), entropy=True).logps.sum())
    expected = estimate_worker_memory(load, Strategy("ddp"), 1)
    assert expected.weights == sum(p.nbytes for p in policy.parameters())
    assert expected.gradients == sum(p.grad.nbytes for p in policy.parameters() if p.grad is not None)
    parallel.step()
    states = parallel.optimizer.state.values()
    assert expected.moments == sum(v.nbytes for s in states for k, v in s.items() if k != "step")


def test_split_states_are_what_a_rank_of_four_holds() -> None:
    command = [sys.executable, "-m", "tests.support.sharded_states"]
    said = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, check=True
    )
    held = json.loads(said.stdout.splitlines()[-1])
    load = PolicyWorkload(
        _count_shape(tiny.llama(vocab_size=264)), compute_bytes=4, frozen_bytes=4.0, outer_bytes=4.0
    )
    for name, strategy in (
        ("fsdp", Strategy("fsdp")),
        *((f"ZeRO-{stage}", Strategy("deepspeed", stage)) for stage in (1, 2, 3)),
    ):
        expected, found = estimate_worker_memory(load, strategy, 4), held[name]
        assert expected.weights == 4 * found["weights"], name
        assert expected.moments == 4 * (found["moments"] + found["masters"]), name
    assert estimate_worker_memory(load, Strategy("fsdp"), 4).gradients == 4 * held["fsdp"]["gradients"]


def test_what_moves_to_main_memory_leaves_the_device() -> None:
    load = PolicyWorkload(MODELS["8B"], checkpointing=True)
    for name, stage in (("fsdp", 0), ("deepspeed", 3)):
        near, far = (
            estimate_worker_memory(load, Strategy(name, stage, offload), 4) for offload in (False, True)
        )
        assert far.host == near.weights + near.gradients + near.moments
        assert far.weights == far.gradients == far.moments == 0
        assert far.working == near.working
    near, far = (
        estimate_worker_memory(load, Strategy("deepspeed", 2, offload), 4) for offload in (False, True)
    )
    assert far.weights == near.weights
    assert far.host == near.gradients + near.moments


def test_one_worker_under_fsdp_is_one_worker() -> None:
    load = PolicyWorkload(MODELS["1.2B"])
    assert estimate_worker_memory(load, Strategy("fsdp"), 1) == estimate_worker_memory(
        load, Strategy("ddp"), 1
    )


# ------------------------------------------------------------ activations


def _kept(policy: torch.nn.Module) -> int:
    """Bytes that the backward pass keeps of a forward pass, the model's own tensors apart."""
    scorer = Scorer(policy)  # type: ignore[arg-type]
    own = {t.untyped_storage().data_ptr() for t in (*policy.parameters(), *policy.buffers())}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks:
        scorer(_rows(), entropy=True)
    return sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in own)


def _llama(layers: int) -> PreTrainedModel:
    return tiny.llama(num_hidden_layers=layers, **SIZES)


def _qwen(layers: int) -> PreTrainedModel:
    return tiny.qwen(num_hidden_layers=layers, **(SIZES | {"head_dim": 16}))


def _gpt2(layers: int) -> PreTrainedModel:
    return tiny.gpt2(n_embd=128, n_layer=layers, n_head=8, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)


@pytest.mark.parametrize("build", [_llama, _qwen, _gpt2])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("half", [False, True])
def test_activations_are_bounded_and_not_by_much(
    build: Callable[[int], PreTrainedModel], lora: bool, half: bool
) -> None:
    tokens = _rows().input_ids
    policy, load = _of(build(3), lora=lora, half=half)
    if half:
        _round_weights(policy)  # as they compute, a layer at a time
    load = replace(load, tokens=tokens.numel(), row_tokens=tokens.shape[1])
    kept = _kept(policy)
    assert 1.0 <= _count_activations(load) / kept <= 1.5

    fewer, _ = _of(build(2), lora=lora, half=half)
    if half:
        _round_weights(fewer)
    layer = kept - _kept(fewer)  # what is made again, one layer at a time
    settings = {"use_reentrant": False}
    checkpointing = getattr(policy, "activation_checkpointing_enable", policy.gradient_checkpointing_enable)
    checkpointing(settings)
    load = replace(load, checkpointing=True)
    assert 1.0 <= _count_activations(load) / (_kept(policy) + layer) <= 1.6


# ------------------------------------------------------------ what fits


def test_fewest_workers_fit_and_half_of_them_do_not() -> None:
    load = PolicyWorkload(MODELS["8B"], checkpointing=True)
    strategy = Strategy("deepspeed", 3)
    fewest = find_fewest_workers(load, strategy, 40)
    assert fewest is not None
    assert (
        estimate_worker_memory(load, strategy, fewest).device
        <= 0.9 * 40 * GIB
        < estimate_worker_memory(load, strategy, fewest // 2).device
    )
    assert find_fewest_workers(load, Strategy("ddp"), 80) is None


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_more_workers_never_need_more_each(strategy: Strategy) -> None:
    load = PolicyWorkload(MODELS["1.2B"])
    needs = [estimate_worker_memory(load, strategy, workers).device for workers in (2, 4, 8, 16)]
    assert needs == sorted(needs, reverse=True)


def test_quantised_weights_are_split_by_nobody() -> None:
    load = PolicyWorkload(MODELS["8B"].with_lora(16), frozen_bytes=0.516, quantized=True)
    assert {str(s) for s in STRATEGIES if can_train(load, s)} == {
        "ddp",
        "ZeRO-1",
        "ZeRO-2",
        "ZeRO-2, offload",
    }
    assert (
        estimate_worker_memory(load, Strategy("ddp"), 1).weights
        < 0.4 * estimate_worker_memory(replace(load, frozen_bytes=2.0), Strategy("ddp"), 1).weights
    )


def test_a_reference_is_its_weights_and_one_pass() -> None:
    shape = MODELS["8B"]
    need = estimate_replica_memory(shape, 2.0, 2.0)
    assert need.weights == 2 * 8_030_261_248
    assert need.gradients == need.moments == 0
    assert estimate_replica_memory(shape, 1.0, 2.0).weights == 2 * shape.root + shape.body


# ------------------------------------------------------------ run files and tables


def _run(folder: Path, **changes: Any) -> RunConfig:
    content: dict[str, Any] = {
        "name": "sized",
        "policy": {"model": str(folder), "adapter": {"r": 4}},
        "references": {
            "primary": "start",
            "models": {"start": {"model": "policy"}, "other": {"model": str(folder), "dtype": "float32"}},
        },
        "data": {"train": "pairs.jsonl"},
        "loss": {"preset": "dpo", "references": {"combine": "harmonic"}},
        "parallel": {"workers": 4, "strategy": "deepspeed", "zero_stage": 1, "offload": True},
    }
    return parse_run(content | changes, source="run.yaml")


def test_a_run_file_is_sized_from_configs_alone(tiny_llama_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text((tiny_llama_folder / "config.json").read_text())
    save_file({"none": torch.zeros(1)}, folder / "model.safetensors")  # only its header is read
    config = _run(folder)
    located = locate_model(ModelConfig(model=str(folder)))
    found = size_run(config, located, {"start": located, "other": located})
    assert set(found.references) == {"other"}  # what is scored in process needs no replica
    assert found.references["other"].weights == 4 * found.workload.shape.parameters
    assert found.workload.frozen_bytes == found.workload.compute_bytes == 2
    assert found.strategy in found.strategies
    assert found.memory == estimate_worker_memory(found.workload, Strategy("deepspeed", 1, offload=True), 4)
    on_cpu = size_run(config, located, {"start": located, "other": located}, device_type="cpu")
    assert on_cpu.workload.frozen_bytes == on_cpu.workload.compute_bytes == 4

    console = Console(width=100)
    with console.capture() as said:
        console.print(format_memory_table(found))
    text = said.get()
    assert "ZeRO-1, offload *" in text
    assert "reference other:" in text
    assert "with gradient_checkpointing: true" in text
    assert max(len(line.rstrip()) for line in text.splitlines() if line.startswith(("ddp", "ZeRO"))) <= 80


def test_the_documentation_says_what_is_computed() -> None:
    page = (ROOT / "docs" / "sizing.md").read_text()
    written = page.split("<!-- sizing: begin -->\n")[1].split("<!-- sizing: end -->")[0]
    assert written == format_documented_tables()
