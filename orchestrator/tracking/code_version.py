"""The version of the code that runs."""

import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def read_code_tags(folder: Path | None = None) -> dict[str, str]:
    """Return tags with polyref's version and, inside a git checkout, the commit."""
    try:
        tags = {"polyref.version": version("polyref")}
    except PackageNotFoundError:  # it runs from a working folder, as in a submitted job
        tags = {"polyref.version": "not installed"}
    command = ["git", "rev-parse", "HEAD"]
    try:
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return tags
    return tags | {"mlflow.source.git.commit": result.stdout.strip()}
