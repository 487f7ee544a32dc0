"""An ensemble trained in one vmapped step: its members' parameters are stacked, so the optimizer sees one model."""

import copy

import toolz
import torch
from torch import nn

import forgather_fn as ff


class Ensemble(nn.Module):
    """Call several models of one kind at once; the outputs are ``[batch, members, ...]``."""

    def __init__(self, build, members: int) -> None:
        super().__init__()
        models = [build() for _ in range(members)]
        stacked, _ = torch.func.stack_module_state(models)
        self.stacked = nn.ParameterDict({name.replace(".", "/"): nn.Parameter(t) for name, t in stacked.items()})
        self.skeleton = [copy.deepcopy(models[0]).to("meta")]  # in a list, so that it is no part of this module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        params = {name.replace("/", "."): tensor for name, tensor in self.stacked.items()}
        call = lambda p: torch.func.functional_call(self.skeleton[0], p, (x,))  # noqa: E731
        return torch.func.vmap(call, out_dims=1, randomness="different")(params)


def loss(outputs: torch.Tensor, batch) -> ff.Mean:
    samples, members, _ = outputs.shape
    labels = batch[1][:, None].expand(samples, members)
    return ff.Mean(nn.functional.cross_entropy(outputs.transpose(1, 2), labels, reduction="sum") / members, samples)


build = lambda: nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))  # noqa: E731
x = torch.randn(512, 8, generator=torch.Generator().manual_seed(0))
data = ff.batches((x, x[:, :4].argmax(1)), batch_size=64)
program = ff.single(ff.Plan(model=lambda: Ensemble(build, 5), loss=loss, optimizer=ff.adamw(), schedule=0.01))
final = toolz.pipe(program.steps(program.init(seed=0), data), ff.until(steps=100), ff.last)
print(program.evaluate(final, data), "members agree:", program.apply(final, x).argmax(-1).float().std(1).mean().item())
