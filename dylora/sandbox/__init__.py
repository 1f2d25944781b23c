"""Running untrusted programs; imports nothing of dylora."""
