from collections import deque

import pytest

from forgather_fn.control import Command
from forgather_fn.control.agreement import FARTHEST, SECONDS, _Polled, agreeing
from forgather_fn.world import ALONE


class Table:
    """A poll of processes that take turns in one: what they gave together is known one poll later."""

    def __init__(self, size):
        self.size, self.votes, self.polls = size, [[] for _ in range(size)], 0

    def of(self, rank):
        def poll(number):
            mine = self.votes[rank]
            mine.append(number)
            self.polls += rank == 0
            return max(votes[len(mine) - 2] for votes in self.votes) if len(mine) > 1 else 0

        return poll


def acted(paces, asked, size=3):
    """Run steps of these durations, with commands at some; give what each process did, by step, and the polls."""
    now, table = [0.0], Table(size)
    agrees = [_Polled(table.of(rank), rank == 0, lambda: now[0]) for rank in range(size)]
    found = []
    for step, pace in enumerate(paces):
        now[0] += pace
        found.append([agree(asked.get(step) if rank == 0 else None) for rank, agree in enumerate(agrees)])
    return found, table.polls


@pytest.mark.parametrize(
    "paces", [[0.1] * 600, [1e-5] * 600, [0.001] * 600, [0.001] * 200 + [0.5] * 400, [0.5] * 300 + [0.0] * 300]
)
def test_all_act_on_the_same_commands_at_the_same_steps_in_order(paces):
    asked = {0: Command.SAVE, 3: Command.EVALUATE, 4: Command.SAVE, 30: Command.STOP}
    found, _ = acted(paces + [0.5] * 600, asked)
    assert all(len(set(step)) == 1 for step in found)
    done = [step[0] for step in found if step[0] is not None]
    assert done == list(asked.values())


def test_a_command_acts_one_step_later_where_steps_are_slow():
    found, polls = acted([2 * SECONDS] * 20, {7: Command.SAVE})
    assert [step for step, one in enumerate(found) if one[0] is not None] == [8]
    assert polls == 20


def test_polls_are_rare_where_steps_are_fast():
    _, polls = acted([SECONDS / 10] * 1000, {})
    assert 95 <= polls <= 115
    _, polls = acted([0.0] * 2560, {})
    assert polls <= 2560 / FARTHEST + 3


def test_a_command_waits_no_longer_than_two_polls():
    paces = [SECONDS / 10] * 200
    found, _ = acted(paces, {100: Command.ABORT})
    (step,) = [step for step, one in enumerate(found) if one[0] is not None]
    assert 100 < step <= 121


def test_one_process_agrees_at_once():
    agree = agreeing(ALONE)
    assert [agree(command) for command in (None, Command.SAVE, None)] == [None, Command.SAVE, None]


def test_what_waits_is_kept_in_order():
    table = Table(1)
    agree = _Polled(table.of(0), True, lambda: 0.0)
    agree.waiting = deque([Command.SAVE])
    assert [agree(None) for _ in range(FARTHEST + 3)].count(Command.SAVE) == 1
