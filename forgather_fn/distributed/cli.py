"""``forgather launch``: start a training on all devices of this machine, or of several."""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from forgather_fn.interrupt import EXIT_CODE, PREEMPTIONS

PASSED_ON: Final[Mapping[str, tuple[str, str]]] = {
    "nnodes": ("N", "how many machines; or FEWEST:MOST"),
    "node-rank": ("RANK", "which of them this is, from 0"),
    "master-addr": ("HOST", "the first machine, as the others reach it"),
    "master-port": ("PORT", "a free port of the first machine"),
    "rdzv-backend": ("NAME", "how machines find each other, instead of the three above: c10d"),
    "rdzv-endpoint": ("HOST:PORT", "where they find each other"),
    "rdzv-id": ("NAME", "a name of the run that all machines give"),
    "local-addr": ("HOST", "this machine, as the others reach it"),
    "max-restarts": ("N", "how often all are started again when one has failed (see docs/distributed-training.md)"),
    "shutdown-timeout": ("SECONDS", "what processes have to save and end, when they are told to (default: 120)"),
    "log-dir": ("DIR", "where the output of each process goes, with --redirects or --tee"),
    "redirects": ("WHAT", "of each process, to a file: 1 its output, 2 its errors, 3 both; or RANK:WHAT,..."),
    "tee": ("WHAT", "the same, and to the terminal as well"),
}
"""The options of torchrun that this command has too: what they stand for, and what they do."""

_SIGNALS: Final = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"


def command(parser: argparse.ArgumentParser, /) -> Callable[[argparse.Namespace], int]:
    """Add the arguments of ``forgather launch`` to a parser, and give what starts the processes."""
    parser.usage = "%(prog)s [-n N] [--cpu] [options] SCRIPT.py ARGS...\n       %(prog)s [...] -m MODULE ARGS..."
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("-n", type=int, metavar="N", help="processes on this machine (default: one for each GPU)")
    parser.add_argument("--cpu", action="store_true", help="train on the CPU, also where there are GPUs")
    parser.add_argument("-m", dest="module", action="store_true", help="SCRIPT is the name of a module")
    group = parser.add_argument_group("several machines, and more", "passed on to torchrun, whose documentation tells")
    for name, (metavar, text) in PASSED_ON.items():
        group.add_argument(f"--{name}", metavar=metavar, help=text)
    parser.add_argument("script", metavar="SCRIPT", help="what each process runs")
    rest = parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="ARGS", help="what it is given")
    rest.required = False  # as of Python 3.12; before, a script that is missing is told as two things that are
    parser.epilog = (
        "examples:\n"
        "  forgather launch -n 2 --cpu train.py --steps 100\n"
        "  forgather launch -n 8 --nnodes 2 --node-rank 0 --master-addr ada --master-port 29500 train.py\n\n"
        "The exit code is that of the process that failed first, 128 and more for one that a signal killed, 75 where\n"
        "the run was told to end by SIGTERM or SIGUSR1, 130 by Ctrl-C."
    )

    def execute(options: argparse.Namespace) -> int:
        given = {name: getattr(options, name.replace("-", "_")) for name in PASSED_ON}
        passed = [f"--{name}={value}" for name, value in given.items() if value is not None]
        return launch(
            [options.script, *options.arguments],
            options.n,
            cpu=options.cpu,
            module=options.module,
            passed_on=passed,
        )

    return execute


def launch(
    script: Sequence[str],
    processes: int | None,
    *,
    cpu: bool = False,
    module: bool = False,
    passed_on: Sequence[str] = (),
) -> int:
    """Start processes on this machine with torch's launcher, and wait for them.

    They have ``RANK``, ``WORLD_SIZE`` and the like in their environments. Each computes with its share of the threads
    that one process would take, where ``OMP_NUM_THREADS`` does not say how many. SIGTERM, SIGUSR1 and Ctrl-C are passed
    on to them.

    Args:
        script: What each runs, and with which arguments.
        processes: How many, on this machine; None for one for each GPU.
        cpu: Train on the CPU, also where there are GPUs.
        module: Whether the first of ``script`` is the name of a module, and not a file.
        passed_on: Options of torchrun.

    Returns:
        The exit code of the process that failed first; 0 where none did.

    Raises:
        ValueError: The number is not given, and there is no GPU; or there is no such script.
    """
    import torch
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if processes is None:
        processes = 0 if cpu else torch.cuda.device_count()
    if processes < 1:
        raise ValueError("launch: expected a number of processes, -n N, of at least 1; without it, one GPU or more")
    if not module and not Path(script[0]).is_file():
        raise ValueError(f"launch: {script[0]}: no such file; expected SCRIPT.py ARGS..., or -m MODULE ARGS...")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // processes)))
    if cpu or not torch.accelerator.is_available():
        os.environ.update(ACCELERATE_USE_CPU="true", CUDA_VISIBLE_DEVICES="")
    arguments = run.parse_args(  # type: ignore[no-untyped-call]
        [
            f"--nproc-per-node={processes}",
            f"--signals-to-handle={_SIGNALS}",
            "--shutdown-timeout=120",
            *passed_on,
            *(["--module"] if module else []),
            "--",  # or an option of the script that begins as one of torchrun's would be taken for it
            *script,
        ]
    )
    try:
        run.run(arguments)  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        sys.stderr.write(f"{error}\n")
        code = _root([(one.timestamp, one.exitcode) for one in error.failures.values()])
        return code if code > 0 else 128 - code
    except SignalException as error:
        number = signal.Signals(error.sigval)
        return EXIT_CODE if number in PREEMPTIONS else 128 + number
    return 0


def _root(failures: Sequence[tuple[int, int]]) -> int:
    """Choose the exit code of the process that failed first.

    The launcher counts whole seconds, and ends the others by SIGTERM as soon as one has failed; so they are the last
    choice, and of the same second those that were killed come before those that ended because of it.

    Args:
        failures: Of each process that failed, when, and its exit code; that of a signal is negative.
    """
    return min(failures, key=lambda one: (one[1] == -signal.SIGTERM, one[0], one[1] >= 0))[1]
