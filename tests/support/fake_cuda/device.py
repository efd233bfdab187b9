"""Load a CUDA device that does nothing, and record where the host waits for it."""

import ctypes
import importlib.util
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).parents[3]
_ROOMS = ("models", "losses", "orchestrator")


def load_device(folder: Path) -> None:
    """Compile and load the device; torch, which resolves its devices on import, must not be imported yet."""
    assert "torch" not in sys.modules
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.submodule_search_locations
    torch_folder = Path(next(iter(spec.submodule_search_locations)))
    libraries, built = torch_folder / "lib", folder / "device.so"
    source = Path(__file__).with_name("device.cpp")
    options = ["-std=c++20", "-O0", "-shared", "-fPIC", f"-I{torch_folder / 'include'}", f"-L{libraries}"]
    links = ["-lc10", "-ltorch_cpu", f"-Wl,-rpath,{libraries}"]
    subprocess.run(["g++", *options, str(source), "-o", str(built), *links], check=True)
    ctypes.CDLL(str(built))


@contextmanager
def fake_device() -> Iterator[tuple["torch.device", Counter[str]]]:
    """Make all tensors fake; yield the CUDA device and a counter of the places that wait for it.

    What the host reads of a device is made up: a fraction is 0, an integer 1, a condition true, and nothing
    is non-zero.
    """
    import numpy as np
    import torch
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode

    aten, waits = torch.ops.aten, Counter[str]()

    def record(tensor: torch.Tensor) -> None:
        if tensor.device.type == "cuda":
            waits[_find_caller()] += 1

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is aten._local_scalar_dense.default:
                record(args[0])
                return True if args[0].dtype == torch.bool else 0.0 if args[0].is_floating_point() else 1
            if func in (aten.allclose.default, aten.equal.default):
                record(args[0])
                return True
            if func is aten.nonzero.default:
                record(args[0])
                return args[0].new_empty((0, args[0].dim()), dtype=torch.long)
            if func is aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1]):
                record(args[0])
                return args[0]
            if func is aten._to_copy.default and (kwargs or {}).get("device") == torch.device("cpu"):
                record(args[0])
            return func(*args, **(kwargs or {}))

    def read_array(tensor: torch.Tensor, **_: Any) -> Any:
        return np.ones(tuple(tensor.shape), dtype=str(tensor.dtype).removeprefix("torch."))

    FakeTensor.numpy = read_array  # type: ignore[method-assign]
    with FakeTensorMode(allow_non_fake_inputs=True), Reads():
        yield torch.device("cuda", 0), waits


def _find_caller() -> str:
    """Return file and function of the innermost frame of our own code."""
    frame = sys._getframe()
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in _ROOMS:
            return f"{path.relative_to(ROOT)}: {frame.f_code.co_name}"
        assert frame.f_back is not None
        frame = frame.f_back
    return "elsewhere"
