import pytest
import torch

import forgather_fn as ff
from tests.optim.comparing import DTYPES, STORAGES, compare
from tests.toys import Branches, branching, decaying


class Lion(torch.optim.Optimizer):
    """The published program: Chen et al., arXiv 2302.06675, Program 1, line by line."""

    def __init__(self, rows, betas):
        super().__init__(rows, {"lr": 0.0, "betas": betas, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self):
        for row in self.param_groups:
            beta1, beta2 = row["betas"]
            for weight in row["params"]:
                if weight.grad is None:
                    continue
                momentum = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
                update = (momentum * beta1 + weight.grad * (1 - beta1)).sign()
                weight.sub_(row["lr"] * (update + weight * row["weight_decay"]))
                momentum.copy_(momentum * beta2 + weight.grad * (1 - beta2))


@STORAGES
@DTYPES
@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.5, 0.8)])
def test_every_step_is_that_of_the_paper(viewed_elements, dtype, betas):
    compare(
        ff.optim.lion(betas=betas, weight_decay=0.3),
        lambda model: Lion(decaying(model, 0.3), betas),
        dtype=dtype,
        viewed_elements=viewed_elements,
    )


@STORAGES
def test_gradients_that_come_and_go(viewed_elements):
    batches = [branching(*on, seed=i, dtype=torch.float64) for i, on in enumerate([(1, 1), (0, 1), (1, 0), (1, 1)] * 3)]
    compare(
        ff.optim.lion(weight_decay=0.3),
        lambda model: Lion(decaying(model, 0.3), (0.9, 0.99)),
        model=lambda dtype: Branches().to(dtype),
        batches=batches,
        viewed_elements=viewed_elements,
    )


def test_betas_outside_their_range_are_refused():
    with pytest.raises(ValueError, match="lion: betas must be two numbers"):
        ff.optim.lion(betas=(0.9, 1.0))
