"""What a user can get wrong has one clear ``ValueError``: what was given, what was expected, where, the fix."""

import pydoc
import warnings

import attrs
import pytest
import toolz
import torch
from torch import nn
from torch.nn import functional as F

import forgather_fn as ff
from forgather_fn.reports import bar
from tests.toys import classifier, labelled, labelled_batches, program


def trains(data=None, steps=3, **changes):
    """Do what a user does: a plan, a program, a state, steps over data."""
    made = program(changes.pop("model", None) or classifier(), **changes)
    run = made.steps(made.init(0), labelled_batches(steps) if data is None else data)
    return toolz.pipe(run, ff.until(steps=steps), ff.last)


class Shrinking(torch.utils.data.Dataset):
    """Loses a sample during the epoch."""

    def __init__(self):
        self.length = 20

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        self.length = 19
        return tuple(column[0] for column in labelled(1, seed=index))


def halved():
    def update(gradients, state, **context):
        return {name: gradient[:1] for name, gradient in gradients.items()}, state

    return ff.Transform(lambda params: None, update, "halved")


def consumed():
    made = program(classifier())
    state = made.init(0)
    made.step(state, labelled(6))
    made.step(state, labelled(6))


def scripted():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that TorchScript is deprecated
        return torch.jit.script(nn.Linear(5, 3))


def with_state(call):
    """Call with a program that has a state, and its state."""
    made = program(classifier())
    call(made, made.init(0))


CASES = {
    "a loss that returns a plain tensor": (
        lambda: trains(loss=lambda outputs, batch: F.cross_entropy(outputs, batch[1])),
        r"the loss returned a tensor of shape \(\) for 'loss'; expected a Mean\(total, weight\).*"
        r"Return Mean\(losses\.sum\(\), losses\.numel\(\)\), or use losses\.from_output",
    ),
    "more microbatches than samples": (
        lambda: trains(microbatches=7),
        r"microbatches=7, but the batch has 6 samples.*larger batch_size or fewer microbatches",
    ),
    "more microbatches than the stream's batches have": (
        lambda: trains(ff.batches(labelled(20), batch_size=6), microbatches=7),
        r"microbatches=7, but batch_size=6",
    ),
    "an empty dataset": (
        lambda: trains(ff.batches([], batch_size=6)),
        r"the dataset \(a list\) is empty: there is no batch to make of it",
    ),
    "a lazy module": (
        lambda: trains(model=nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 3))),
        r"0\.weight.*lazy.*run the model once on an example batch",
    ),
    "an embedding with sparse gradients": (
        lambda: trains(model=nn.Sequential(nn.Embedding(4, 3, sparse=True))),
        r"0\.weight asks for sparse gradients.*sparse=False",
    ),
    "a schedule that returns nan": (
        lambda: trains(schedule=lambda step: float("nan") if step == 1 else 1e-3),
        r"nan.*step 1|step 1.*nan",
    ),
    "a parameter group that matches nothing": (
        lambda: trains(optimizer=ff.adamw(groups=[ff.group("encoder.*", frozen=True)])),
        r"group 'encoder\.\*' matches no parameter; the parameters are '0\.bias', '0\.weight'",
    ),
    "a transform that changes a shape": (
        lambda: trains(transforms=[halved()]),
        r"transform halved: it changed 0\.weight from \(7, 5\) torch\.float32 to \(1, 5\).*keeps shapes",
    ),
    "a dataset that changes length during an epoch": (
        lambda: trains(ff.batches(Shrinking(), batch_size=6)),
        r"the dataset has 19 samples, but had 20 when batches\(\) was called",
    ),
    "a consumed state": (
        consumed,
        r"(?s)consumed by step 0.*state, metrics = program\.step\(state, batch\).*state\.copy\(\).*donate=False",
    ),
    "a loss that does not depend on the model": (
        lambda: trains(loss=lambda outputs, batch: ff.Mean(outputs.detach().sum(), 1)),
        r"total does not depend on any trainable parameter.*detached",
    ),
    "a batch without a target": (
        lambda: trains([{"input": labelled(6)[0]}]),
        r"the batch has no target: expected one of labels.*got \['input'\]",
    ),
    "a batch that the model does not take": (
        lambda: trains([{"features": labelled(6)[0], "labels": labelled(6)[1]}]),
        r"no key of the batch is an argument of Sequential\.forward: the batch has 'features', 'labels'.*'input'",
    ),
    "a batch that cannot be counted": (
        lambda: trains(["text"]),
        r"cannot count the samples of a batch without tensors: str; make tensors of arrays and lists .*Batch\(data",
    ),
    "a state that was not taken apart": (
        lambda: with_state(lambda made, state: made.step(made.step(state, labelled(6)), labelled(6))),
        r"expected a TrainState, got a tuple: .*state, metrics = program\.step\(state, batch\)",
    ),
    "an evaluation of what a step returned": (
        lambda: with_state(lambda made, state: made.evaluate(made.step(state, labelled(6)), [labelled(6)])),
        r"expected a TrainState, got a tuple: .*take it apart",
    ),
    "a function in the place of a state": (
        lambda: with_state(lambda made, state: made.steps(made.init, labelled_batches(1))),
        r"expected a TrainState, got a function: make one by program\.init\(seed\)",
    ),
    "a batch in the place of a state": (
        lambda: with_state(lambda made, state: made.step(labelled(6), state)),
        r"expected a TrainState, got a tuple: make one by program\.init\(seed\)",
    ),
    "a stream in the place of a state": (
        lambda: with_state(lambda made, state: made.steps(ff.batches(labelled(6), batch_size=2), state)),
        r"expected a TrainState, got an IndexedStream",
    ),
    "a stream of a stream": (
        lambda: ff.batches(ff.batches(labelled(6), batch_size=2), batch_size=2),
        r"this is a stream already, of batches: give its dataset",
    ),
    "a loop over one batch": (
        lambda: trains(labelled(6)),
        r"expected a stream or an iterable of batches: a tuple is one batch; one batch alone is \[batch\]",
    ),
    "a loop over a dataset": (
        lambda: trains(torch.utils.data.TensorDataset(*labelled(6))),
        r"the items of a dataset \(TensorDataset\) are samples. Use ff\.batches\(data, batch_size=",
    ),
    "an evaluation of one batch": (
        lambda: with_state(lambda made, state: made.evaluate(state, labelled(6))),
        r"a tuple is one batch; one batch alone is \[batch\]",
    ),
    "a step that is not finite": (
        lambda: trains([(labelled(6)[0] / 0, labelled(6)[1])]),
        r'step 0 \(the 1st\): .*not finite.*on_nonfinite="skip"',
    ),
    "a model with nothing to train": (
        lambda: trains(model=nn.Linear(5, 3).requires_grad_(False)),
        r"Linear has no parameter that asks for a gradient",
    ),
    "an average that is not kept": (
        lambda: (made := program(classifier())).evaluate(made.init(0), labelled_batches(1), params="ema"),
        r"keeps no average; add Plan\(average=ff\.ema\(decay\)\)",
    ),
    "an evaluation of nothing": (
        lambda: (made := program(classifier())).evaluate(made.init(0), []),
        r"the evaluation data gave no batch",
    ),
    "a dataset that can only be iterated": (
        lambda: trains(ff.batches(iter([1, 2]), batch_size=1)),
        r"a list_iterator can be read only once.*Give what makes it: ff\.batches\(lambda: read",
    ),
    "what gives nothing in the place of a stage": (
        lambda: with_state(lambda made, state: toolz.pipe(made.steps(state, []), lambda steps: None, ff.last)),
        r"expected steps, got a NoneType: what stands before it is no stage.*ff\.every\(1, print\)",
    ),
    "a stage after the end": (
        lambda: with_state(lambda made, state: toolz.pipe(made.steps(state, []), ff.last, ff.every(1, print))),
        r"expected steps, got a TrainState: a pipe begins with program\.steps\(state, data\), and ff\.last.*its end",
    ),
    "a pipe that begins with data": (
        lambda: toolz.pipe(ff.batches(labelled(6), batch_size=2), ff.until(steps=1), ff.last),
        r"expected steps, got an IndexedStream: a pipe begins with program\.steps\(state, data\)",
    ),
    "an end within a pipe": (
        lambda: ff.last(ff.until(steps=1)),
        r"expected steps, got a function: a pipe begins with program\.steps\(state, data\): toolz\.pipe\(program",
    ),
    "one name for the set of those that are wanted": (
        lambda: with_state(lambda made, state: made.step(state, labelled(6), wants="gradient_norms")),
        r"asked for 'gradient_norms', which is one name: wants takes a set of them, {'gradient_norms'}",
    ),
    "a function that makes a sink": (
        lambda: ff.report(bar),
        r"a sink is what bar\(\.\.\.\) gives: write bar\(\.\.\.\), and not bar",
    ),
    "a function that makes a transform": (
        lambda: program(classifier(), transforms=(ff.clipped,)),
        r"transforms takes Transforms such as ff\.clipped\(1\.0\), got forgather_fn\.transforms.* it is called",
    ),
    "a function that makes an average": (
        lambda: program(classifier(), average=ff.ema),
        r"average takes one such as ff\.ema\(0\.999\), got forgather_fn\.average\.ema; this makes one",
    ),
    "a text in the place of a truth": (
        lambda: program(classifier(), donate="no"),
        r"Plan: donate must be True or False, got 'no'",
    ),
    "one label a sample in a language model's loss": (
        lambda: trains(loss=ff.losses.causal_lm),
        r"logits of shape \(6, 3\) do not fit labels of shape \(6,\): .*one label, use ff\.losses\.cross_entropy",
    ),
    "a model of TorchScript": (
        lambda: trains(model=scripted()),
        r"model is a \w*Script\w*, .*give the module that it was made of, and compile with Plan\(compile=True\)",
    ),
    "a run that there is not": (
        lambda: program(classifier()).restore("no/such/run"),
        r"no/such/run has no checkpoint that can be loaded: it does not exist; expected a run directory",
    ),
    "weights of another tool": (
        lambda: program(classifier()).restore(__file__),
        r"test_errors\.py has no checkpoint that can be loaded: it is a file; expected a run directory",
    ),
    "epochs of data without a length": (
        lambda: toolz.pipe(
            (made := program(classifier())).steps(made.init(0), labelled_batches(1)), ff.until(epochs=1)
        ),
        r"until\(epochs=\.\.\.\) needs a stream of known length",
    ),
}


@pytest.mark.parametrize(("wrong", "message"), CASES.values(), ids=CASES.keys())
def test_it_is_one_clear_error(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()


CALLS = {
    "a step without a batch": (
        lambda: with_state(lambda made, state: made.step(state)),
        r"^Program\.step\(\) missing 1 required positional argument: 'batch'",
    ),
    "a step of a joint program without a batch": (
        lambda: (made := ff.joined({"one": program(classifier())}, lambda *given: None)).step(made.init(0)),
        r"^Program\.step\(\) missing 1 required positional argument: 'batch'",
    ),
    "an evaluation without data": (
        lambda: with_state(lambda made, state: made.evaluate(state)),
        r"^Program\.evaluate\(\) missing 1 required positional argument: 'data'",
    ),
    "a learning rate of the optimizer": (
        lambda: ff.adamw(lr=1e-3),
        r"^adamw: .* 'lr'; it takes .*, each by its name; the learning rate is the plan's",
    ),
    "a learning rate of the plan": (
        lambda: program(classifier(), lr=1e-3),
        r"^Plan: .* 'lr'; it takes .*schedule.*; the learning rate is the plan's: Plan\(schedule=1e-3\)$",
    ),
    "a learning rate of a schedule": (
        lambda: ff.schedules.cosine(peak=1e-3, lr=1e-3, total=100),
        r"^cosine: .* 'lr'; it takes .*; the learning rate is peak$",
    ),
    "an optimizer that is called as torch's are": (
        lambda: ff.adamw(classifier().parameters(), weight_decay=0.1),
        r"^adamw: too many positional arguments; .*; the learning rate is the plan's: .*, and parameters",
    ),
    "a field of a plan that there is not": (
        lambda: attrs.evolve(program(classifier()).plan, schedul=1e-3),
        r"^Plan: got an unexpected keyword argument 'schedul'; it takes schedule, ",
    ),
    "a schedule whose arguments have no names": (
        lambda: ff.schedules.cosine(1e-3, 10, 100),
        r"^cosine: too many positional arguments; it takes peak, warmup, total, final, each by its name$",
    ),
    "a loop over a stream that was not started": (
        lambda: next(iter(ff.batches(labelled(6), batch_size=2))),
        r"`for batch in stream\.start\(seed=0, samples=0\)`, or `for tick in program\.steps\(state, stream\)`",
    ),
    "an observer in the place of a stage": (
        lambda: with_state(
            lambda made, state: toolz.pipe(made.steps(state, []), ff.evaluated(labelled_batches(1)), ff.last)
        ),
        r"an observer is not a stage, .*ff\.every\(100, observer\)",
    ),
}


@pytest.mark.parametrize(("wrong", "message"), CALLS.values(), ids=CALLS.keys())
def test_a_wrong_call_says_how_it_is_made(wrong, message):
    with pytest.raises(TypeError, match=message):
        wrong()


def test_a_name_that_there_is_not_is_compared_with_those_that_there_are():
    with pytest.raises(AttributeError, match="module 'forgather_fn' has no attribute 'adam_w'") as error:
        ff.adam_w  # noqa: B018
    assert error.value.obj is ff  # of which the interpreter looks up the nearest name
    assert error.value.name == "adam_w"


def test_help_of_a_function_of_a_program_tells_its_contract():
    made = program(classifier())
    told = pydoc.plain(pydoc.render_doc(made.step))
    assert "Consume a state and a batch; give the next state." in told
    assert "wants: Metrics beyond the usual ones" in told
    for name in ("init", "restore", "gradients", "update", "evaluate", "apply", "export"):
        function = getattr(made, name)
        assert function.__name__ == name
        assert len(function.__doc__.splitlines()) > 2


def test_a_model_that_wants_arguments_says_who_called_it():
    with pytest.raises(TypeError, match="in_features") as error:
        program(nn.Linear).init(0)
    assert "while building the plan's model: torch.nn" in error.value.__notes__[0]
    assert "give Plan(model=lambda: Model(...))" in error.value.__notes__[0]


def test_a_tick_prints_on_a_line_or_two():
    made = program(classifier())
    (tick,) = made.steps(made.init(0), labelled_batches(1))
    assert repr(tick).startswith("Tick(state=TrainState(step=1, ")
    assert "batch=<tuple>" in repr(tick)
    assert len(repr(tick)) < 500


def test_errors_have_names_where_they_are_caught_by_name():
    assert issubclass(ff.ConsumedStateError, ValueError)
    assert issubclass(ff.NonFiniteError, ValueError)
    assert not issubclass(ff.ConsumedStateError, ff.NonFiniteError)
