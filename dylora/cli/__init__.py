"""The command line: `run.py COMMAND`."""
