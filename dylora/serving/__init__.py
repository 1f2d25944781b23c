"""Answers to people and programs: one prompt, many at once, and a server."""
