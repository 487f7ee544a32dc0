"""``forgather dashboard``: a page in the browser that shows jobs and commands them."""

import argparse
import threading
import webbrowser
from collections.abc import Callable

from forgather_fn.control.dashboard.serving import dashboard


def command(parser: argparse.ArgumentParser, /) -> Callable[[argparse.Namespace], int]:
    """Add the arguments to a parser, and give what serves the page."""
    parser.add_argument("--port", type=int, default=0, metavar="N", help="on 127.0.0.1 (default: one that is free)")
    parser.add_argument("--open", action="store_true", help="open it in the browser")
    parser.epilog = "example: forgather dashboard --open"

    def execute(options: argparse.Namespace) -> int:
        if not 0 <= options.port <= 65535:
            raise ValueError(f"--port {options.port} is not between 0 and 65535")
        try:
            serving = dashboard(options.port)
            with serving as session:
                print(f"{session.address}\n(it opens once; Ctrl-C ends)", flush=True)
                if options.open:
                    webbrowser.open(session.address)
                _wait()
        except OSError as error:
            raise ValueError(f"--port {options.port} cannot be used: {error.strerror}; try another") from None
        except KeyboardInterrupt:
            pass
        return 0

    return execute


def _wait() -> None:
    """Do nothing until Ctrl-C."""
    threading.Event().wait()
