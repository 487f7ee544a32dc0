"""The registry of pieces: whatever a plan or a loop can be composed of, each as one row that meets every law.

A module of this folder has ``PIECES``, a mapping from names to rows. A name is that of the public function that makes
the piece, and may go on behind a slash (``"adamw/scheduled"``) where a piece has several rows.
``tests/laws/test_pieces.py`` runs all laws over all rows: adding one adds its tests.
"""
