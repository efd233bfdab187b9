"""`python -m orchestrator` is `polyref`."""

from orchestrator.cli import main

main()
