"""`python -m orchestrator` is `polyref`."""

from orchestrator.cli.main import main

main()
