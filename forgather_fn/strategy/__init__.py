"""Strategies: each makes the same record of functions of a plan."""
