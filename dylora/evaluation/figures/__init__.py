"""Figures of runs, by name; matplotlib is imported only here, when one is drawn."""
