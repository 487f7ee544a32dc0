import torch
from torch import nn

import forgather_fn as ff

RATE = ff.schedules.piecewise(boundaries=(100,), values=(0.0, 1.0))


def stack():
    layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "layers": layers, "head": nn.Linear(4, 5)})
    model["embed"].requires_grad_(False)
    return model


def test_rows_say_what_updates_each_parameter():
    optimizer = ff.optim.muon(
        weight_decay=0.2,
        groups=[ff.group("layers.0.*", learning_rate=RATE)],
        rest=ff.adamw(weight_decay=lambda step: 0.1, groups=[ff.group("head.bias", frozen=True)]),
    )
    table = ff.optim.describe(optimizer, stack())
    rows = {row.name: row for row in table.rows}
    assert list(rows) == [name for name, _ in stack().named_parameters()]
    first, other = rows["layers.0.weight"], rows["layers.1.weight"]
    assert (first.part, first.optimizer, first.learning_rate) == ("muon", "orthogonal", repr(RATE))
    assert (other.learning_rate, other.weight_decay) == ("1.0", "0.2")
    assert (rows["head.weight"].part, rows["head.weight"].optimizer) == ("rest", "adamw")
    assert "lambda" in rows["head.weight"].weight_decay
    assert rows["layers.2.bias"].weight_decay == "0.0"
    assert {name for name, row in rows.items() if row.frozen} == {"embed.weight", "head.bias"}


def test_it_prints_by_group_and_folds_names_that_differ_in_numbers():
    text = repr(ff.optim.describe(ff.adamw(weight_decay=0.1), stack()))
    assert text.splitlines() == [
        "frozen: 1 tensors, 20 elements",
        "    embed.weight [5, 4]",
        "all: 4 tensors, 68 elements, learning rate x 1.0, weight decay 0.1",
        "  by adamw",
        "    layers.*.weight [4, 4] x 3",
        "    head.weight [5, 4]",
        "all: 4 tensors, 17 elements, learning rate x 1.0, weight decay 0.0",
        "  by adamw",
        "    layers.*.bias [4] x 3",
        "    head.bias [5]",
        "9 tensors, 105 elements",
    ]


def test_it_takes_parameters_by_name():
    found = ff.optim.describe(ff.from_torch(torch.optim.Adagrad), {"w": torch.zeros(2, 3)})
    assert [(row.name, row.optimizer, row.weight_decay) for row in found.rows] == [("w", "from_torch", "")]


def test_a_wrapper_of_a_composed_one_shows_its_parts():
    optimizer = ff.optim.lookahead(ff.optim.master_weights(ff.optim.muon(rest=ff.optim.lion())))
    rows = {row.name: row.optimizer for row in ff.optim.describe(optimizer, stack()).rows}
    assert rows["layers.0.weight"] == "orthogonal"
    assert rows["head.weight"] == "lion"
