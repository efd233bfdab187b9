"""`python -m orchestrator` is the console command `polyref`."""

from polyref.__main__ import main

main()
