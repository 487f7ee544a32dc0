"""Where backward passes leave their gradients: how much of it there is, and when."""

import types
import weakref

import pytest
import torch

import forgather_fn as ff
from forgather_fn import flat
from tests.toys import classifier, labelled, program


@pytest.fixture
def held(monkeypatch):
    """Count the gradient buffers that are held when another one is made."""
    alive, counts = weakref.WeakSet(), []

    def zeros(layout, device, room=0, make=flat.zeros):
        counts.append(len(alive))
        made = make(layout, device, room)
        alive.update(made.buffers)
        return made

    monkeypatch.setattr("forgather_fn.workspace.flat_storage", types.SimpleNamespace(zeros=zeros))
    return counts


def test_one_storage_is_made_and_kept(held):
    made = program(classifier())
    state = made.init(0)
    for _ in range(3):
        state, _ = made.step(state, labelled(6))
    assert held == [0]


def test_on_one_process_of_a_launcher_too(held):
    made = ff.accelerated(program(classifier()).plan)
    state = made.init(0)
    for _ in range(3):
        state, _ = made.step(state, labelled(6))
    assert held == [0]


def test_the_old_one_goes_before_the_new_one_comes(held):
    model = classifier()
    made = program(model)
    state, _ = made.step(made.init(0), labelled(6))
    model.double().float()  # which moves gradients too
    with pytest.warns(UserWarning, match="were moved to other memory"):
        made.step(state, labelled(6))
    assert held == [0, 0]


def test_room_that_is_asked_for_during_a_step_is_there_in_the_next(held):
    from forgather_fn.workspace import workspace

    layout = flat.layout_of({"a": torch.zeros(100)})
    parameter = torch.nn.Parameter(torch.zeros(100))
    own = workspace(layout, [[parameter]], torch.device("cpu"), 1000)
    own.clear()
    parameter.sum().backward()
    own.reserve(7)
    assert own.collect(1, 1.0).views["a"].sum() == 100
    own.clear()
    (buffer,) = own.collect(1, 1.0).flat.buffers
    assert buffer.untyped_storage().nbytes() == (len(buffer) + 7) * 4
    assert held == [0, 0]
