"""What a run exports is what it trained: for every kind of policy, loaded back by transformers."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from models import merge
from models.adapters import add_lora, disable_adapter, find_adapter
from models.config import LoraSettings, ModelConfig, ModelError, PolicyConfig
from models.load import load_model, load_tokenizer, locate_model
from models.logprobs import Scorer
from models.parallel import prepare_parallel
from models.probe import LogitProbe, build_probe_rows, compute_probe_logits
from models.replicated import Parallel
from models.rows import PromptWithResponses, build_rows
from orchestrator.registry.register import KL_TAG, RegistryError, verify_export
from orchestrator.worker.policy import Policy, export_policy
from tests.support import tiny
from tests.support.policies import ROWS

TRAINING_ROWS = build_rows([PromptWithResponses([1, 2, 3], [[4, 5], [6, 7]])], shared=False, pad_id=0)
CPU = torch.device("cpu")
ADAPTERS: dict[str, dict[str, Any] | None] = {
    "full": None,
    "lora": {"r": 2},
    "dora": {"r": 2, "dora": True},
    "rslora": {"r": 4, "rslora": True},
}


def make_policy(parallel: Parallel, tokenizer: Any, load: Any, dtype: torch.dtype) -> Policy:
    return Policy(
        parallel=parallel,
        load_initial_policy=load,
        tokenizer=tokenizer,
        precision=dtype,
        plain_rows_reason=None,
        pad_id=0,
        peak_flops=None,
    )


def train_policy(folder: Path, adapter: str, *, dtype: str = "float32", steps: int = 3) -> Policy:
    """Load a policy as a run does and take a few steps that make some responses likelier."""
    settings = ADAPTERS[adapter]
    config = PolicyConfig(
        model=str(folder), dtype=dtype, adapter=None if settings is None else LoraSettings(**settings)
    )
    files = locate_model(config)
    load = partial(load_model, files, config, device="cpu", trainable=True)
    precision = getattr(torch, dtype)
    rate = 1e-3 if settings is None else 2e-2
    parallel = prepare_parallel(Scorer(load()), device=CPU, learning_rate=rate, precision=precision)
    for _ in range(steps):
        with parallel.accumulate(last=True):
            parallel.backward(-parallel.module(TRAINING_ROWS).logps.mean())
        parallel.step()
        parallel.zero_grad()
    return make_policy(parallel, load_tokenizer(files, config), load, precision)


class QuantizedScorer(nn.Module):
    """A scorer of a quantised model on a CPU.

    It does not check the model as `Scorer` does: the noise of 8-bit kernels there is too large. And it
    restores the scales of 8-bit layers, which PEFT's DoRA makes them forget there.
    """

    def __init__(self, model: nn.Module, scales: dict[nn.Module, Tensor]) -> None:
        super().__init__()
        self.model, self._scales = model, scales

    @torch.no_grad()
    def compute_logits(self, ids: Tensor) -> Tensor:
        for layer, scale in self._scales.items():
            layer.weight.SCB = scale
        logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits


def adapt_policy(
    folder: Path, adapter: str, *, quantization: str = "none", size: float = 1.0, dtype: str = "bfloat16"
) -> Policy:
    """Load a policy whose adapter has drawn weights of the size that a few steps give.

    A quantised policy is not trained here: on a CPU bitsandbytes' kernels lose its gradients.
    """
    config = ModelConfig(model=str(folder), dtype=dtype, quantization=quantization)
    files = locate_model(config)
    settings = LoraSettings(**(ADAPTERS[adapter] or {}))
    base = load_model(files, config, device="cpu", trainable=False)
    scales = {m: m.state.SCB for m in base.modules() if type(m).__name__ == "Linear8bitLt"}
    model = add_lora(base, settings)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.005 * size)
    scorer: Any = QuantizedScorer(model, scales)
    parallel = Parallel(scorer, torch.optim.SGD(model.parameters()), CPU)
    return make_policy(parallel, load_tokenizer(files, config), None, getattr(torch, dtype))


def export(policy: Policy, folder: Path) -> tuple[Path, LogitProbe]:
    export_policy(policy, folder, probes=ROWS)
    return folder / "model", LogitProbe.load(folder / "probe.safetensors")


def measure_kl(trained: Tensor, other: Tensor) -> float:
    p, q = trained.double().softmax(-1), other.double().softmax(-1)
    return float((p * (p / q).log()).sum(-1).mean())


def load_and_compute(folder: Path, rows: Tensor) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits: Tensor = model.eval()(input_ids=rows).logits
    return logits


@contextmanager
def changed_weights(model: nn.Module) -> Iterator[None]:
    """Check that the block leaves the weights of `model` as they are."""
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    yield
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name]), name


@pytest.fixture(scope="session")
def wide_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama whose layers are wide enough for bitsandbytes' kernels."""
    model = tiny.llama(hidden_size=128, intermediate_size=128, initializer_range=0.08)
    return tiny.save(tmp_path_factory.mktemp("wide"), model, tiny.byte_tokenizer())


@pytest.fixture(scope="session")
def wide_gpt2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2, whose layers hold their weights transposed and whose head is tied."""
    model = tiny.gpt2(n_embd=128, initializer_range=0.08)
    return tiny.save(tmp_path_factory.mktemp("wide_gpt2"), model, tiny.byte_tokenizer(chat=False))


@pytest.mark.parametrize("adapter", list(ADAPTERS))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_trained_policy(tiny_llama_folder: Path, tmp_path: Path, adapter: str, dtype: str) -> None:
    policy = train_policy(tiny_llama_folder, adapter, dtype=dtype)
    rows = build_probe_rows(ROWS)
    trained = policy.scorer.eval().compute_logits(rows).float()
    folder, probe = export(policy, tmp_path / "export")
    found, initial = load_and_compute(folder, rows), load_and_compute(tiny_llama_folder, rows)
    assert measure_kl(trained, initial) > 1e-3
    assert measure_kl(trained, found) < (1e-8 if dtype == "float32" else 0.1 * measure_kl(trained, initial))
    verify_export(folder, probe)
    with pytest.raises(RegistryError, match=r"initial policy's differ by"):
        verify_export(tiny_llama_folder, probe)


@pytest.mark.parametrize("size", [1.0, 0.1])
@pytest.mark.parametrize("adapter", ["lora", "dora", "rslora"])
@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_a_quantised_policy(
    wide_folder: Path, tmp_path: Path, quantization: str, adapter: str, size: float
) -> None:
    pytest.importorskip("bitsandbytes")
    policy = adapt_policy(wide_folder, adapter, quantization=quantization, size=size)
    folder, probe = export(policy, tmp_path / "export")
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert probe.initial_logits is not None
    initial = measure_kl(probe.logits, probe.initial_logits)
    assert initial > 1e-6
    assert measure_kl(probe.logits, load_and_compute(folder, probe.rows)) < 0.1 * initial
    verify_export(folder, probe)
    base = export_base(policy, tmp_path / "base")
    if (
        size < 1
    ):  # all logits of the base are within 4 % of the largest, which half precision may make of them
        change = (load_and_compute(base, probe.rows) - probe.logits).abs().max() / probe.logits.abs().max()
        assert change < 4e-2
    with pytest.raises(RegistryError, match=r"initial policy's differ by"):
        verify_export(base, probe)
    # In the kernels' own arithmetic, whose noise is the larger the fewer bits activations have.
    with torch.no_grad():
        computed = policy.scorer.compute_logits(probe.rows).float()
    assert measure_kl(computed, probe.logits) < 0.02


def export_base(policy: Policy, folder: Path) -> Path:
    """Write what is left of a policy whose adapter is lost."""
    model = merge.copy_in_float32(policy.scorer.model)
    model.unload().to(torch.bfloat16).save_pretrained(folder)
    return folder


def test_a_quantised_gpt2_whose_layers_are_transposed(wide_gpt2_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    policy = adapt_policy(wide_gpt2_folder, "lora", quantization="4bit")
    folder, probe = export(policy, tmp_path / "export")
    assert float(verify_export(folder, probe)[KL_TAG]) < 1e-2


def test_an_export_leaves_the_policy_as_it_was(tiny_llama_folder: Path, tmp_path: Path) -> None:
    policy = train_policy(tiny_llama_folder, "lora")
    with changed_weights(policy.scorer.model):
        export(policy, tmp_path / "export")
    assert find_adapter(policy.scorer.model) is not None


@pytest.mark.parametrize(("size", "dtype"), [(1.0, torch.bfloat16), (0.04, torch.float32)])
def test_weights_stay_float32_where_rounding_would_lose_the_change(
    wide_folder: Path, tmp_path: Path, size: float, dtype: torch.dtype
) -> None:
    folder, probe = export(adapt_policy(wide_folder, "lora", size=size), tmp_path / "export")
    assert {w.dtype for w in load_file(folder / "model.safetensors").values()} == {dtype}
    assert json.loads((folder / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    verify_export(folder, probe)


@pytest.mark.parametrize(
    ("adapter", "dtype"), [("full", "float32"), ("lora", "float32"), ("lora", "bfloat16")]
)
def test_a_policy_that_no_step_changed(
    tiny_llama_folder: Path, tmp_path: Path, adapter: str, dtype: str
) -> None:
    folder, probe = export(
        train_policy(tiny_llama_folder, adapter, dtype=dtype, steps=0), tmp_path / "export"
    )
    assert probe.initial_logits is not None
    assert measure_kl(probe.logits, probe.initial_logits) < 1e-9
    verify_export(folder, probe)


def test_weights_that_are_not_the_policys_are_not_exported(
    wide_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = adapt_policy(wide_folder, "lora")
    other = adapt_policy(wide_folder, "lora", size=400.0).scorer.model
    monkeypatch.setattr("orchestrator.worker.policy._gather_model", lambda _: other)
    with pytest.raises(ModelError, match=r"weights to be exported are .* nats per token from the policy"):
        export(policy, tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_the_probe_holds_the_initial_policys_logits(tiny_llama_folder: Path, tmp_path: Path) -> None:
    policy = train_policy(tiny_llama_folder, "lora")
    _, probe = export(policy, tmp_path / "export")
    with disable_adapter(policy.scorer):
        initial = compute_probe_logits(policy.scorer.model, probe.rows)
    assert probe.initial_logits is not None
    torch.testing.assert_close(probe.initial_logits, initial)
