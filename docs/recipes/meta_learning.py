"""Meta-learning: the model's forward pass adapts to a task by gradient steps, and training goes through them (MAML)."""

import toolz
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

import forgather_fn as ff


class Adapting(nn.Module):
    """Fit a copy of the network to the examples of each task, and predict by it (Finn et al., 2017)."""

    def __init__(self, steps: int, rate: float) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(1, 40), nn.Tanh(), nn.Linear(40, 1))
        self.steps, self.rate = steps, rate

    def forward(self, x: torch.Tensor, y: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        def task(x, y, query):
            params = dict(self.body.named_parameters())
            for _ in range(self.steps):
                slope = grad(lambda p: nn.functional.mse_loss(functional_call(self.body, p, (x,)), y))(params)
                params = {name: params[name] - self.rate * slope[name] for name in params}
            return functional_call(self.body, params, (query,))

        return vmap(task)(x, y, query)


draw = torch.Generator().manual_seed(0)
x = 4 * torch.rand(1024, 20, 1, generator=draw) - 2  # tasks: sines of other heights and phases, 10 points to learn from
height, phase = (torch.rand(1024, 1, 1, generator=draw) * scale for scale in (2.0, 3.0))
y = (height + 0.5) * torch.sin(2 * x + phase)
data = ff.batches((x[:, :10], y[:, :10], x[:, 10:], y[:, 10:]), batch_size=32)
plan = ff.Plan(model=lambda: Adapting(3, 0.1), loss=ff.losses.mse, optimizer=ff.adamw(), schedule=0.01)
program = ff.single(plan)
state = program.init(seed=0)
print("before", program.evaluate(state, data))
final = toolz.pipe(program.steps(state, data), ff.until(steps=80), ff.last)
print("after", program.evaluate(final, data))
