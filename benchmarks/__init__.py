"""Side-by-side measurements: ``python -m benchmarks all``.

A row is a module with a function ``run(quick) -> iterator of Table``, named in ``__main__.ROWS``.
"""
