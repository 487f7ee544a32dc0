"""The command: ``python -m benchmarks overhead memory import [--quick] [--json PATH]``."""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # read when torch is imported; its profiler writes to the terminal

import argparse
import datetime as dt
import importlib
import json
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import torch

ROWS: Final = {
    "overhead": "benchmarks.overhead",
    "profile": "benchmarks.profile",
    "compiled": "benchmarks.compiled",
    "everything": "benchmarks.everything",
    "control": "benchmarks.control",
    "scaling": "benchmarks.scaling",
    "pipeline": "benchmarks.pipeline",
    "data": "benchmarks.data",
    "memory": "benchmarks.memory",
    "import": "benchmarks.startup",
    "checkpoint": "benchmarks.checkpoint",
    "resume": "benchmarks.resume",
    "gpu": "benchmarks.gpu",
}
"""Names, and the modules that measure them. To add a row, write one with a function ``run``."""

PACKAGES: Final = ("forgather-fn", "torch", "accelerate", "lightning", "transformers")


def main() -> int:
    """Measure what is asked for, print tables, and write JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure side by side.")
    parser.add_argument("rows", nargs="+", choices=[*ROWS, "all"], metavar="ROW", help=", ".join([*ROWS, "all"]))
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    parser.add_argument("--quick", action="store_true", help="see that everything runs; the numbers say nothing")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    facts = surroundings()
    print("\n".join(f"{name}: {value}" for name, value in facts.items()), end="\n\n")
    tables = []
    for row in ROWS if "all" in asked.rows else dict.fromkeys(asked.rows):
        try:
            for table in importlib.import_module(ROWS[row]).run(asked.quick):
                print(table.text(), flush=True)
                tables.append(table.as_json())
        except ValueError as error:
            print(f"{row}: {error}", file=sys.stderr)
            return 1
    if asked.json:
        asked.json.write_text(json.dumps({**facts, "tables": tables}, indent=1))
    return 0


def surroundings() -> dict[str, Any]:
    """Name what numbers depend on."""
    return {
        "command": f"python -m benchmarks {' '.join(sys.argv[1:])}",
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "versions": ", ".join([f"Python {platform.python_version()}", *map(_version, PACKAGES)]),
        "machine": f"{_processor()}, {os.cpu_count()} cores, torch on {torch.get_num_threads()} thread",
        "load": f"{os.getloadavg()[0]:.1f} when it began",
    }


def _version(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"{package} not installed"


def _processor() -> str:
    described = Path("/proc/cpuinfo")
    lines = described.read_text().splitlines() if described.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


if __name__ == "__main__":
    sys.exit(main())
