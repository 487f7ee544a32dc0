"""The commands about configurations: one file each, found by ``forgather_fn.cli``."""
