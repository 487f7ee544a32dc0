"""What launchers say in the environment, held against what a process knows."""

import re
from collections.abc import Mapping, Sequence
from typing import Final

_SIZES: Final = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Where launchers say how many processes they have started: torchrun, and three kinds of MPI. Accelerate reads them."""

_ALONE: Final = """\
a launcher has started {started} processes ({variable}={started}), and this one knows of {known}: each would train by \
itself, on the same data, into the same files. Accelerate looks for the others only where there is a GPU, or where it \
is told that there is none:
  in the program:   accelerator_args={{"cpu": True}}, or Accelerator(cpu=True)
  in the shell:     forgather launch -n {started} --cpu SCRIPT.py ARGS...   (it tells Accelerate)"""

_ONE_OF_SEVERAL: Final = """\
accelerate launch was told to start several processes, and has started one: it does so with --cpu, with a \
configuration of type MULTI_CPU, and where it finds no GPU. Use one of
  forgather launch -n N --cpu SCRIPT.py ARGS...
  torchrun --nproc-per-node N SCRIPT.py ARGS...
(MASTER_ADDR={address} is in the environment, which accelerate launch sets for several processes only. If one is \
meant, and the variable is from elsewhere, unset it.)"""


def number_in(environ: Mapping[str, str], variable: str, default: int, *, least: int = 0) -> int:
    """Read a number that a launcher has put into the environment.

    Args:
        environ: The environment of the process.
        variable: Such as ``RANK``, the number of this process, or ``WORLD_SIZE``, how many there are.
        default: For where it is not set.
        least: The least number that it can be.

    Raises:
        ValueError: It is something else.

    Example:
        >>> number_in({"RANK": "3"}, "RANK", 0), number_in({}, "RANK", 0)
        (3, 0)
    """
    given = environ.get(variable, str(default))
    if re.fullmatch(r"[0-9]{1,9}", given) and int(given) >= least:
        return int(given)
    what = "a number of processes" if least else "the number of this process"
    raise ValueError(
        f"{variable}={given[:40]!r} in the environment: expected {what}, as launchers give it; if it is "
        "from elsewhere, unset it"
    )


def check_world_size(environ: Mapping[str, str], known: int) -> None:
    """Refuse to go on where a launcher means several processes to train together, and this one knows of others.

    What Accelerate 1.15 does without a word was found by trying: ``torchrun`` with ``Accelerator()`` on a machine
    without GPUs gives processes that know nothing of each other, and so does ``accelerate launch --multi_gpu``; with
    ``--cpu --num_processes 2``, or a configuration of type ``MULTI_CPU``, ``accelerate launch`` starts one process.

    Args:
        environ: The environment of the process.
        known: How many processes it knows of, itself included.

    Raises:
        ValueError: They do not agree; with what to use instead.

    Example:
        >>> check_world_size({"WORLD_SIZE": "2"}, 2)
        >>> check_world_size({"WORLD_SIZE": "2"}, 1)
        Traceback (most recent call last):
        ValueError: a launcher has started 2 processes (WORLD_SIZE=2), and this one knows of 1: each would ...
    """
    variable = next((name for name in _SIZES if environ.get(name)), None)
    if variable is not None:
        if number_in(environ, variable, 1, least=1) != known:
            raise ValueError(_ALONE.format(started=environ[variable], variable=variable, known=known))
    elif known == 1 and {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR", "MASTER_PORT"} <= environ.keys():
        raise ValueError(_ONE_OF_SEVERAL.format(address=environ["MASTER_ADDR"]))


def idle_devices(environ: Mapping[str, str], devices: int, command: Sequence[str]) -> str | None:
    """Tell a user who has started one process, without a launcher, of the GPUs that it leaves idle.

    Args:
        environ: The environment of the process.
        devices: How many GPUs it sees.
        command: Its ``sys.argv``.

    Returns:
        A notice with the command that uses all; None where a launcher was used, or there is nothing to tell.

    Example:
        >>> print(idle_devices({}, 4, ["train.py", "--steps", "100"]))
        1 of 4 GPUs is used. For all of them: forgather launch -n 4 train.py --steps 100
    """
    if devices < 2 or any(environ.get(name) for name in _SIZES):
        return None
    return f"1 of {devices} GPUs is used. For all of them: forgather launch -n {devices} {' '.join(command)}"
