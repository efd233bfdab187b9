"""Send the rows of a split to workers as the places of files, which other nodes copy once."""

from collections import deque
from dataclasses import dataclass
from pathlib import Path

import ray
from filelock import FileLock
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.errors import RunFailed
from orchestrator.files import cache_folder, replace_file
from preferences.split import SplitFiles, TokenizedSplit
from preferences.tokens.pair_files import compute_checksum

BLOCK_BYTES = 1 << 26
BLOCKS_AHEAD = 4


@dataclass(frozen=True)
class SentSplit:
    """The files of a split, and the node that has them."""

    files: SplitFiles
    node: str


def send_split(split: TokenizedSplit) -> ray.ObjectRef:
    """Put the places of a split's rows into Ray's object store; its files stay on this node."""
    assert split.files is not None
    return ray.put(SentSplit(split.files, ray.get_runtime_context().get_node_id()))


def receive_split(sent: ray.ObjectRef) -> TokenizedSplit:
    """Open a split that was sent; files that this machine does not have are copied to its cache.

    Raises:
        RunFailed: a file cannot be copied, or was changed after it was sent.
    """
    split: SentSplit = ray.get(sent)
    checksums = dict(zip(split.files.paths, split.files.checksums, strict=True))
    is_here = ray.get_runtime_context().get_node_id() == split.node

    def find_file(path: Path) -> Path:
        return path if is_here else copy_file(path, split.node, checksums[path])

    return split.files.open(find_file)


def copy_file(path: Path, node: str, checksum: str) -> Path:
    """Copy a file from a node to this machine's cache, unless it is there; workers of a node share the copy.

    Raises:
        RunFailed: the copy is not the file that was sent.
    """
    copy = cache_folder("data", path.name)
    copy.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(copy.with_suffix(".lock")):
        if copy.exists() and compute_checksum(copy) == checksum:
            return copy
        with replace_file(copy) as temporary:
            _download(path, node, temporary)
            if compute_checksum(temporary) != checksum:
                raise RunFailed(
                    f"the tokenised data in {path} is damaged or was changed while the run starts; "
                    "delete the file, and start the run again"
                )
    return copy


def _download(path: Path, node: str, target: Path) -> None:
    """Read a file on its node block by block, some of them ahead, and write it."""
    strategy = NodeAffinitySchedulingStrategy(node, soft=False)
    read = ray.remote(num_cpus=0)(_read_block).options(scheduling_strategy=strategy)
    size = ray.get(ray.remote(num_cpus=0)(_read_size).options(scheduling_strategy=strategy).remote(path))
    starts = iter(range(0, size, BLOCK_BYTES))
    waiting: deque[ray.ObjectRef] = deque()
    with target.open("wb") as file:
        for start in starts:
            waiting.append(read.remote(path, start, BLOCK_BYTES))
            if len(waiting) == BLOCKS_AHEAD:
                file.write(ray.get(waiting.popleft()))
        while waiting:
            file.write(ray.get(waiting.popleft()))


def _read_size(path: Path) -> int:
    return path.stat().st_size


def _read_block(path: Path, start: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return file.read(size)
