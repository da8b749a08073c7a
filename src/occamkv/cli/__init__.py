"""The command line: one file per verb.

Exit codes: 0 done, 1 the check ran and failed, 2 bad input, 3 nothing was quantized.
"""

import sys


def main() -> None:
    """Run the command line; without its extra, say how to install it."""
    try:
        from occamkv.cli.app import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        sys.stderr.write("the command line needs typer and rich. Run: pip install 'occamkv[cli,hf]'\n")
        sys.exit(2)
    app()
