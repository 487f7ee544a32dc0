"""Activations: the numbers of a forward pass, which leaves no trace."""

import pytest
import toolz
import torch
from torch import nn

import forgather_fn as ff
from forgather_fn.diagnostics import activation_statistics, activations
from tests.toys import Noisy, classifier, labelled, labelled_batches, program


def rectified() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 3))


def by_hand(module: nn.Sequential, features: torch.Tensor) -> dict[str, torch.Tensor]:
    found, x = {}, features
    with torch.no_grad():
        for number, layer in enumerate(module.eval()):
            x = found[str(number)] = layer(x)
    return {name: tensor.double() for name, tensor in found.items()}


@pytest.mark.parametrize("changes", [{}, {"compile": True}, {"compile": "model"}, {"microbatches": 3}], ids=str)
def test_numbers_are_those_of_the_layers_called_by_hand(changes):
    made = program(rectified(), backend="eager", **changes) if "compile" in changes else program(rectified(), **changes)
    state = made.init(0)
    for batch in labelled_batches(2):
        state, _ = made.step(state, batch)
    made.evaluate(state, [labelled(6)])  # a graph that was made without hooks would go on without them
    found = activations(made, state, labelled(6, seed=7))
    expected = by_hand(made.export(state), labelled(6, seed=7)[0])
    assert list(found) == ["0", "1", "2", "3"]
    for name, tensor in expected.items():
        one = found[name]
        assert one.elements == tensor.numel()
        assert one.mean == pytest.approx(tensor.mean().item(), abs=1e-6)
        assert one.std == pytest.approx(tensor.std(correction=0).item(), rel=1e-4)
        assert one.rms == pytest.approx(tensor.square().mean().sqrt().item(), rel=1e-5)
        assert one.largest == pytest.approx(tensor.abs().max().item(), rel=1e-6)
        assert one.zeros == pytest.approx((tensor == 0).double().mean().item())
    assert 0.2 < found["1"].zeros < 0.8


def test_a_module_that_is_called_twice_counts_twice():
    shared = nn.Linear(5, 5)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared, self.head = shared, nn.Linear(5, 3)

        def forward(self, features):
            return self.head(self.shared(self.shared(features)))

    made = program(Twice())
    assert activations(made, made.init(0), labelled(6), modules="shared")["shared"].elements == 60


def test_outputs_may_be_nested_and_whole_numbers_are_passed_over():
    class Nested(nn.Module):
        def forward(self, features):
            return {"ids": features.long(), "hidden": (features + 1, features)}

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.nested, self.head = Nested(), nn.Linear(5, 3)

        def forward(self, features):
            return self.head(self.nested(features)["hidden"][0])

    made = program(Model())
    features, labels = labelled(6)
    found = activations(made, made.init(0), (features, labels))["nested"]
    assert found.mean == pytest.approx((features + 1).mean().item(), abs=1e-6)


def test_it_leaves_no_trace():
    made, other = program(Noisy), program(Noisy)
    state, expected = made.init(0), other.init(0)
    for batch in labelled_batches(3):
        state, _ = made.step(state, batch)
        expected, _ = other.step(expected, batch)
        before, torch_state = state.copy(), torch.get_rng_state()
        activations(made, state, batch)
        assert ff.difference(before, state) is None
        assert torch.equal(torch_state, torch.get_rng_state())
        assert made.module().training
        assert not any(module._forward_hooks for module in made.module().modules())
    assert ff.difference(state, expected) is None


def test_hooks_are_gone_when_the_forward_pass_fails():
    made = program(classifier())
    state = made.init(0)
    with pytest.raises(RuntimeError, match="shapes"):
        activations(made, state, (torch.zeros(6, 9), torch.zeros(6, dtype=torch.long)))
    assert not any(module._forward_hooks for module in made.module().modules())


def test_the_average_may_be_looked_at():
    made = program(classifier(), average=ff.ema(0.9), schedule=0.5)
    state, _ = made.step(made.init(0), labelled(6))
    trained, averaged = (activations(made, state, labelled(6), params=which) for which in ("params", "ema"))
    assert trained["0"].rms != averaged["0"].rms


def test_names_that_match_nothing_list_the_nearest():
    made = program(classifier())
    with pytest.raises(ValueError, match=r"no module has a name like 'layers\.\*'; there are, the nearest first: "):
        activations(made, made.init(0), labelled(6), modules="layers.*")


def test_modules_that_are_never_called_are_refused():
    class Held(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(5, 3)])

        def forward(self, features):
            return self.layers[0](features)

    made = program(Held())
    with pytest.raises(ValueError, match="layers give out no floating tensor"):
        activations(made, made.init(0), labelled(6), modules="layers")


@pytest.mark.parametrize("batch", [None, labelled(6, seed=9)], ids=["step", "own"])
def test_results_of_an_observer(batch):
    made, rows = program(classifier), []
    toolz.pipe(
        made.steps(made.init(0), labelled_batches(3)),
        ff.every(2, activation_statistics(modules="0", batch=batch), ff.report(rows.append)),
        ff.last,
    )
    assert {name for name in rows[0].values if name.startswith("activation")} == {
        "activation_rms/0", "activation_max/0", "activation_zeros/0",
    }  # fmt: skip
    expected, _ = made.step(made.init(0), labelled(6, seed=0))
    expected, _ = made.step(expected, labelled(6, seed=1))
    given = labelled(6, seed=1) if batch is None else batch
    assert rows[0].values["activation_rms/0"] == activations(made, expected, given)["0"].rms
