"""Scratch folders: gone after use, and after the death of their owner as soon as another process looks."""

import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from orchestrator.storage.scratch import make_scratch_folder, remove_abandoned_scratch

OWNER = """
import time
from orchestrator.storage.scratch import make_scratch_folder
with make_scratch_folder() as folder:
    (folder / "large").write_text("x" * 1000)
    print(folder, flush=True)
    time.sleep(600)
"""


def test_a_killed_owners_scratch_is_deleted_and_a_living_ones_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    (tmp_path / "of another program").mkdir()
    with make_scratch_folder() as mine:
        owner = subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True)
        assert owner.stdout is not None
        others = Path(owner.stdout.readline().strip())
        assert remove_abandoned_scratch() == 0
        assert (others / "large").exists()
        owner.send_signal(signal.SIGKILL)
        owner.wait()
        assert remove_abandoned_scratch() == 1
        assert not others.exists()
        assert mine.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["of another program"]
