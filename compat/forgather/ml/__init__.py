"""Trainer classes over the functions of :mod:`forgather_fn`."""
