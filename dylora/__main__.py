"""`python -m dylora COMMAND`, which is `dylora COMMAND`."""

import sys

from dylora.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
