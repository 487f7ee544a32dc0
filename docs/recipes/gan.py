"""Two models with two optimizers that take turns: a GAN, in one state, one loop, and one checkpoint."""

import toolz
import torch
from torch import nn
from torch.nn.functional import softplus

import forgather_fn as ff


def plan(outputs: int, loss, act=nn.LeakyReLU) -> ff.Plan:
    model = lambda: nn.Sequential(nn.Linear(2, 128), act(), nn.Linear(128, 128), act(), nn.Linear(128, outputs))  # noqa: E731
    return ff.Plan(model=model, loss=loss, optimizer=ff.adam(betas=(0.5, 0.99)), schedule=2e-3)


def tell_apart(scores, batch):
    return ff.Mean(softplus(-scores * batch["sign"]).sum(), len(scores))


def be_taken_for_real(samples, batch):
    return ff.Mean(softplus(-batch["critic"](samples)).sum(), len(samples))


def turns(programs, states, batch):
    fake = programs["generator"].apply(states["generator"], torch.randn_like(batch))
    sign = torch.ones(2 * len(batch), 1).index_fill(0, torch.arange(len(batch), 2 * len(batch)), -1)
    states["critic"], _ = programs["critic"].step(states["critic"], {"input": torch.cat([batch, fake]), "sign": sign})
    critic = ff.frozen(programs["critic"], states["critic"])  # gradients go through it, and not to it
    noise = {"input": torch.randn_like(batch), "critic": critic}
    states["generator"], metrics = programs["generator"].step(states["generator"], noise)
    return states, metrics


angle = 6.28 * torch.rand(1024, generator=torch.Generator().manual_seed(0))
circle = ff.batches(torch.stack([angle.cos(), angle.sin()], 1), batch_size=128)
programs = {"critic": ff.single(plan(1, tell_apart)), "generator": ff.single(plan(2, be_taken_for_real))}
program = ff.joined(programs, turns)
final = toolz.pipe(program.steps(program.init(0), circle), ff.every(250, ff.saved("gan")), ff.until(steps=500), ff.last)
points = programs["generator"].apply(ff.members(final)["generator"], torch.randn(512, 2))
print(f"radius {points.norm(dim=1).mean():.2f}, spread {points.norm(dim=1).std():.2f}")
