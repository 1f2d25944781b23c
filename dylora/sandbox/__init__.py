"""Running untrusted programs. Imports nothing of dylora."""
