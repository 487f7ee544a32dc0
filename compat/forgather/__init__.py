"""The package under which trainers are imported: ``forgather.ml``."""
