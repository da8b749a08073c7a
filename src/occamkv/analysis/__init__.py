"""Measuring a model: traces of its queries, keys and values, token norms, attention sinks, and advice."""
