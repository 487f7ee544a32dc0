"""``forgather control``: which runs go on, where they are, and what they are to do."""

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from forgather_fn.control import jobs
from forgather_fn.control.client import RefusedError, Target, ask, ask_status, target, target_at
from forgather_fn.control.command import Command, ControlError
from forgather_fn.control.process import alive
from forgather_fn.control.watch import watch
from forgather_fn.terminal import instant, printable, span

_ABOUT_JOBS = {"list": "list", "cleanup": "cleanup"}


def command(parser: argparse.ArgumentParser, /) -> Callable[[argparse.Namespace], int]:
    """Add the actions to a parser, and give what runs one."""
    actions = ("list", "status", "watch", *map(str, Command), "cleanup")
    parser.add_argument("action", choices=actions, help="what to do", metavar="ACTION")
    parser.add_argument("job", nargs="?", metavar="JOB", help="the id of a job, as list prints it")
    waiting = parser.add_mutually_exclusive_group()
    waiting.add_argument("--wait", action="store_true", default=True, help="answer when it has happened (default)")
    waiting.add_argument("--no-wait", dest="wait", action="store_false", help="answer when it was asked for")
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="how long to wait (default: as it takes)")
    parser.add_argument(
        "--interval", type=_positive, default=1.0, metavar="SECONDS", help="between looks of watch (default: 1)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--at", metavar="ADDRESS:PORT", help="ask a job there, instead of one of this machine")
    parser.add_argument("--token-file", type=Path, metavar="FILE", help="the token for --at")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _HELP

    def execute(options: argparse.Namespace) -> int:
        if options.action in _ABOUT_JOBS:
            return _list(options.json) if options.action == "list" else _cleanup()
        found = _target(options)
        try:
            if options.action == "watch":
                watch(lambda: ask_status(found), sys.stdout, interval=options.interval)
                return 0
            if options.action == "status":
                return _tell(ask_status(found), options.json, _status_lines)
            answer = ask(found, Command(options.action), wait=options.wait, timeout=options.timeout)
            return _tell(answer, options.json, _answer_lines)
        except RefusedError as error:
            print(printable(str(error)), file=sys.stderr)
            return 1

    return execute


def _positive(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < 86400:
        raise ValueError
    return seconds


_HELP = """actions:
  list         print the jobs of this user: id, running or dead, process, run directory; dead ones are cleaned
  status       print where a job is
  watch        show where it is, live, until it ends or Ctrl-C
  save         save a checkpoint, and go on
  stop         end after this step, saving what the run saves at its end
  save-stop    save a checkpoint, and end
  abort        end and save nothing; older checkpoints stay
  evaluate     evaluate, and go on
  cleanup      remove what dead jobs have left

example: forgather control save demo"""


def _target(options: argparse.Namespace) -> Target:
    if options.at is not None:
        if options.token_file is None or options.job is not None:
            raise ControlError("--at ADDRESS:PORT stands for a job, and needs --token-file FILE")
        try:
            token = options.token_file.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ControlError(f"--token-file {options.token_file}: {error}") from None
        return target_at(options.at, token)
    if options.job is None:
        raise ControlError(f"which job? forgather control {options.action} JOB; forgather control list shows them")
    return target(jobs.find(options.job))


def _list(as_json: bool) -> int:
    """Print one job a line, and clean the dead ones."""
    found = jobs.list_jobs()
    if not found and not as_json:
        print("no jobs: forgather demo, forgather train, and scripts that serve are listed here", file=sys.stderr)
    for job in found:
        state = "running" if job.running else "dead"
        if as_json:
            known = {"run": job.endpoint.run, "pid": job.endpoint.process.pid} if job.endpoint else {}
            print(json.dumps({"job": job.job, "state": state, **known, "fault": job.fault}))
        else:
            print(printable(f"{job.job:24} {state:8} {_where(job)}").rstrip())
    jobs.cleanup()
    return 0


def _where(job: jobs.Job) -> str:
    if job.fault is not None or job.endpoint is None:
        return f"not used: {job.fault}" if job.fault else ""
    process = job.endpoint.process
    place = f"process {process.pid} on {process.host}"
    if job.running and alive(process) is None:
        place += " (which cannot be looked at from here)"
    return f"{place}  {job.endpoint.run or ''}"


def _cleanup() -> int:
    for job in jobs.cleanup():
        print(f"{job.job} removed")
    return 0


def _tell(answer: Mapping[str, Any], as_json: bool, lines: Callable[[Mapping[str, Any]], list[str]]) -> int:
    print(json.dumps(answer) if as_json else "\n".join(map(printable, lines(answer))))
    return 0


def _answer_lines(answer: Mapping[str, Any]) -> list[str]:
    name = answer["command"]
    if answer.get("accepted"):
        return [f"{name}: asked for"]
    at = f"{name}: done at step {answer['step']}"
    if "paths" in answer:
        return [at, *(f"  {path}" for path in answer["paths"])]
    if "results" in answer:
        return [at, *(f"  {metric}: {value}" for metric, value in answer["results"].items())]
    return [at, f"  newest checkpoint: {answer.get('checkpoint') or 'none'}"]


def _status_lines(status: Mapping[str, Any]) -> list[str]:
    lines = []
    for name, value in status.items():
        if name == "metrics" and value:
            lines += [f"{metric}: {_plain(number)}" for metric, number in value.items()]
        elif value not in (None, [], "", {}):
            lines.append(f"{name.replace('_', ' ')}: {_shown(name, value)}")
    return lines


def _shown(name: str, value: Any) -> str:
    if name in ("since", "estimated_end"):
        return instant(value)
    if name == "remaining":
        return span(value)
    if name == "checkpoint":
        return f"{value['path']}, {span(value['age'])} ago"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return _plain(value)


def _plain(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
