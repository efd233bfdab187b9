"""Take every step that a GPU takes, on fake tensors; prints a line of JSON for each case.

`python -m tests.support.fake_cuda FOLDER`: the device is compiled in the folder.
"""

import json
import sys
from pathlib import Path

from tests.support.fake_cuda.device import load_device

if __name__ == "__main__":
    load_device(Path(sys.argv[1]))
    from tests.support.fake_cuda.cases import run_cases

    for result in run_cases():
        print(json.dumps(result), flush=True)
