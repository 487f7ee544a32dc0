import pytest
import torch

import forgather_fn as ff
from tests.toys import VIEWED, classifier, labelled, program

STORAGES = pytest.mark.parametrize("viewed_elements", [VIEWED, 0], ids=["views", "own"])
PARTS = 8


def gradient(accumulate, viewed_elements=VIEWED, **changes):
    made = program(
        classifier(torch.bfloat16),
        microbatches=PARTS,
        accumulate=accumulate,
        viewed_elements=viewed_elements,
        **changes,
    )
    found, _, _ = made.gradients(made.init(0), labelled(16, dtype=torch.bfloat16))
    return found


def by_microbatch():
    """Give the gradient of each microbatch, of the mean over all, as one backward pass gives it: in bfloat16."""
    features, labels = labelled(16, dtype=torch.bfloat16)
    found = []
    for rows, classes in zip(features.chunk(PARTS), labels.chunk(PARTS), strict=True):
        model = classifier(torch.bfloat16)
        loss = torch.nn.functional.cross_entropy(model(rows).float(), classes, reduction="sum")
        loss.backward(torch.tensor(1 / 16))
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    return found


@STORAGES
def test_the_sum_is_rounded_once(viewed_elements):
    found, parts = gradient("float32", viewed_elements), by_microbatch()
    plain = gradient("as_built", viewed_elements)
    apart = False
    for name, tensor in found.items():
        assert tensor.dtype == torch.bfloat16
        total = torch.zeros(tensor.shape)
        for part in parts:
            total += part[name].float()
        assert torch.equal(tensor, total.bfloat16())
        apart |= not torch.equal(plain[name], tensor)
    assert apart  # what is rounded at every addition is another gradient


def test_a_compiled_step_adds_in_float32_too():
    found = gradient("float32", compile=True, backend="aot_eager")
    expected = gradient("float32")
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor)


@STORAGES
def test_a_step_uses_it(viewed_elements):
    changes = {"microbatches": PARTS, "viewed_elements": viewed_elements, "optimizer": ff.sgd(), "schedule": 1.0}
    made = program(classifier(torch.bfloat16), accumulate="float32", **changes)
    state, _ = made.step(made.init(0), labelled(16, dtype=torch.bfloat16))
    expected = classifier(torch.bfloat16)
    for name, parameter in expected.named_parameters():
        moved = parameter.detach() - gradient("float32")[name]
        torch.testing.assert_close(state.params[name], moved, atol=2e-3, rtol=1e-2)


def test_where_nothing_is_in_half_precision_it_changes_no_bit():
    def found(accumulate):
        made = program(classifier(), microbatches=PARTS, accumulate=accumulate)
        return made.gradients(made.init(0), labelled(16))[0]

    for name, tensor in found("as_built").items():
        assert torch.equal(found("float32")[name], tensor)


def test_another_program_on_the_module_has_gradients_as_they_are():
    model = classifier(torch.bfloat16)
    wide = program(model, accumulate="float32")
    wide.init(0)
    plain = program(model)
    found, _, _ = plain.gradients(plain.init(0), labelled(6, dtype=torch.bfloat16))
    assert model[0].weight.grad_dtype == torch.bfloat16
    assert found["0.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unroll": True, "compile": True}, "cannot be with unroll=True"),
        ({"compile": "model"}, 'nor with compile="model"'),
        ({"update": "in_backward"}, 'cannot be with accumulate="float32": there is nothing to add'),
        ({"accumulate": "bfloat16"}, "accumulate='bfloat16' is not one of 'as_built', 'float32'"),
    ],
)
def test_what_it_cannot_be_with_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        program(classifier(), **{"accumulate": "float32"} | changes)
