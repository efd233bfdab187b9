"""The console command `polyref`, also as `python -m polyref`."""

import polyref  # noqa: F401  (finds polyref's own packages from here on)


def main() -> None:
    """Run the command line."""
    from orchestrator.cli.main import run_command_line

    run_command_line()


if __name__ == "__main__":
    main()
