"""Starts the launcher: `python -s -S -P …/launcher/__main__.py`, the protocol on stdin and stdout.

The folder is imported as a package of its own, without dylora and what that imports.
"""

import importlib
import os
import sys

folder = os.path.dirname(os.path.abspath(__file__))
sys.path.append(os.path.dirname(folder))
main = importlib.import_module(f"{os.path.basename(folder)}.jobs").main
sys.path.pop()  # programs find the standard library only
main()
