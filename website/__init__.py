"""What makes the site of the documentation: `make docs`. Its pages are in `docs/`."""
