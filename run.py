"""The commands of dylora: `python run.py COMMAND --help`."""

import sys

from dylora.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
