"""``python -m forgather_fn`` is ``forgather``."""

import sys

from forgather_fn.cli import main

if __name__ == "__main__":
    sys.exit(main())
