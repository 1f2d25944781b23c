"""Routing: from a hidden state to the weight of every expert."""
