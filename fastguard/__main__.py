"""The command `fastguard`, and `python -m fastguard`: without the extra of the command line, the line to run."""

from __future__ import annotations

import sys

from fastguard.extras import MissingExtraError


def main() -> int:
    """Entry point of the `fastguard` script; returns the exit code."""
    try:
        from fastguard import cli
    except MissingExtraError as error:
        print(f"fastguard: {error}", file=sys.stderr)
        return error.exit_code
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
