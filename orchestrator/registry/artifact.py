"""A trained policy in MLflow's layout for transformers models, with the exported folder copied unchanged.

    MLmodel lineage.json requirements.txt python_env.yaml
    model/                  the transformers folder: safetensors, config, tokenizer, README.md
    model/adapter/          for LoRA, the adapter alone; model/ is the merged model
    components/tokenizer/   where MLflow looks for the tokenizer

`MLmodel` is written through `mlflow.models.Model` and not by `mlflow.transformers.save_model`, which would
load the weights, move them to a GPU that may be in use, write them again and silently lose a LoRA adapter.
"""

import json
import platform
import shutil
from importlib.metadata import version
from pathlib import Path, PurePath

from orchestrator.errors import UsageError
from orchestrator.files import digest_folder, link_tree
from orchestrator.registry.download import ADAPTER
from orchestrator.registry.lineage import HUB, LINEAGE_FILE, Lineage
from orchestrator.registry.model_card import render_model_card

_REQUIRED = ("torch", "transformers", "safetensors", "accelerate")


def refuse_incomplete_export(folder: Path, adapter: Path | None) -> None:
    """Raise UsageError unless the folders hold a model with its tokenizer and, if given, an adapter."""
    required = {folder / "config.json": "a model", folder / "tokenizer_config.json": "a tokenizer"}
    if adapter is not None:
        required[adapter / "adapter_config.json"] = "an adapter"
        required[adapter / "adapter_model.safetensors"] = "an adapter"
    for path, content in required.items():
        if not path.is_file():
            raise UsageError(
                f"{path.parent} holds no {path.name}: export {content} there before it is registered"
            )
    if not any(folder.glob("*.safetensors")):
        raise UsageError(f"{folder} holds no safetensors: export the model's weights there first")


def build_artifact(root: Path, name: str, folder: Path, adapter: Path | None, lineage: Lineage) -> str:
    """Write the version's files under the empty folder `root`; return the digest of `root/model`."""
    from transformers import AutoTokenizer

    model = root / "model"
    link_tree(folder, model)
    if adapter is not None:
        shutil.rmtree(model / ADAPTER, ignore_errors=True)
        link_tree(adapter, model / ADAPTER)
        _pin_adapter_base(model / ADAPTER, lineage.base_model)
    card = model / "README.md"
    card.unlink(missing_ok=True)  # a hard link: writing through it would change the export
    card.write_text(render_model_card(name, lineage, adapter=adapter is not None), encoding="utf-8")
    (root / LINEAGE_FILE).write_text(lineage.to_json(), encoding="utf-8")
    AutoTokenizer.from_pretrained(folder).save_pretrained(root / "components" / "tokenizer")
    _write_environment(root)
    _write_mlmodel(root, lineage.base_model)
    return digest_folder(model)


def _pin_adapter_base(adapter: Path, base_model: str) -> None:
    """Make the adapter's config name its base on the hub with its commit, instead of this machine's copy.

    The path stays if the base is a local folder, or another adapter merged into its base: neither has a name
    on the hub.
    """
    (adapter / "README.md").unlink(missing_ok=True)  # PEFT's own card names folders of this machine too
    hub, path = HUB.fullmatch(base_model), adapter / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    if hub is None or PurePath(config.get("base_model_name_or_path") or "").name != hub["commit"]:
        return
    config |= {"base_model_name_or_path": hub["id"], "revision": hub["commit"]}
    path.unlink()  # a hard link: writing through it would change the export
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_environment(root: Path) -> None:
    # A local version such as 2.13.0+cpu is on no public index.
    pins = [f"{package}=={version(package).partition('+')[0]}" for package in _REQUIRED]
    (root / "requirements.txt").write_text("\n".join(pins) + "\n", encoding="utf-8")
    environment = f"python: {platform.python_version()}\ndependencies:\n- -r requirements.txt\n"
    (root / "python_env.yaml").write_text(environment, encoding="utf-8")


def _write_mlmodel(root: Path, base_model: str) -> None:
    import mlflow.pyfunc
    import transformers
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, DataType, Schema

    config = json.loads((root / "model" / "config.json").read_text(encoding="utf-8"))
    text = Schema([ColSpec(DataType.string)])
    model = Model(signature=ModelSignature(inputs=text, outputs=text))
    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    model.add_flavor(
        "transformers",
        transformers_version=transformers.__version__,
        task="text-generation",
        instance_type="TextGenerationPipeline",
        pipeline_model_type=config["architectures"][0],
        source_model_name=base_model,
        model_binary="model",
        torch_dtype=f"torch.{dtype}",
        components=["tokenizer"],
        tokenizer_type="AutoTokenizer",
    )
    mlflow.pyfunc.add_to_model(model, loader_module="mlflow.transformers", python_env="python_env.yaml")
    model.save(str(root / "MLmodel"))
