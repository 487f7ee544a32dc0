"""Small models and data, and the loop that an engineer writes by hand: what the library is compared with."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import forgather_fn as ff
from forgather_fn.random import key

VIEWED = 10**9
"""``viewed_elements`` of a plan whose gradients are views of a flat buffer, however large the model; 0 for none."""

Rows = tuple[Tensor, Tensor]


def classifier(dtype: torch.dtype = torch.float32, *, hidden: int = 7, seed: int = 0) -> nn.Sequential:
    """Make a model of 5 features and 3 classes; no tensor in it is a whole number of vectors."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, hidden), nn.Tanh(), nn.Linear(hidden, 3)).to(dtype)


class Noisy(nn.Module):
    """Dropout, batch statistics, and a buffer that is assigned anew: all that a step must derive, or put back."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(5, 16, bias=False), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 3))
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, features: Tensor) -> Tensor:
        self.seen = self.seen + features.detach().sum()
        out: Tensor = self.body(features)
        return out


class Branches(nn.Module):
    """Two branches, of which a batch says which are used: gradients come and go."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.left, self.shared, self.right = nn.Linear(5, 3), nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, features: Tensor, which: Tensor) -> Tensor:
        left, right = which.tolist()
        out: Tensor = self.shared(features)
        out = out + self.left(features) if left else out
        return out + self.right(features) if right else out


def branching(left: bool, right: bool, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Draw a batch that uses these branches."""
    features, labels = labelled(6, seed=seed, dtype=dtype)
    return features, torch.tensor([left, right]), labels


def labelled(count: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Rows:
    """Draw rows of 5 features, and their classes."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(count, 5, generator=generator, dtype=torch.float64).to(dtype)
    return features, torch.randint(0, 3, (count,), generator=generator)


def labelled_batches(count: int, size: int = 6, *, dtype: torch.dtype = torch.float32) -> list[Rows]:
    """Draw batches of labelled rows, each of its own."""
    return [labelled(size, seed=seed, dtype=dtype) for seed in range(count)]


def program(model: Any, **changes: Any) -> ff.Program:
    """Make the program of a plain plan: cross-entropy, AdamW, a constant learning rate."""
    plain: dict[str, Any] = {
        "model": model,
        "loss": ff.losses.cross_entropy,
        "optimizer": ff.adamw(weight_decay=0.1),
        "schedule": 1e-2,
    }
    return ff.single(ff.Plan(**(plain | changes)))


def trained(model: Any, batches: Iterable[Any], **changes: Any) -> ff.TrainState:
    """Train a model over batches with a plain plan."""
    made = program(model, **changes)
    return ff.fold(made.step, made.init(0), batches)


def decaying(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Make the parameter groups of ``adamw`` for an optimizer of torch: matrices decay, others do not."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trainable if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0},
    ]


def fused_adamw(model: nn.Module, learning_rate: float = 1e-2) -> torch.optim.Optimizer:
    """Make what :func:`program` trains with."""
    return torch.optim.AdamW(decaying(model, 0.1), lr=learning_rate, fused=True)


def mean_cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    """Give the mean loss of a batch, with the arithmetic of ``losses.cross_entropy``."""
    *inputs, target = batch
    logits = model(*inputs)
    exact = logits.float() if logits.dtype.itemsize < 4 else logits
    return F.cross_entropy(exact, target, reduction="sum") / len(target)


def by_hand(
    model: nn.Module,
    batches: Iterable[Any],
    optimizer: torch.optim.Optimizer,
    *,
    loss: Callable[[nn.Module, Any], Tensor] = mean_cross_entropy,
    learning_rate: Callable[[int], float] | None = None,
    max_norm: float | None = None,
    seed: int = 0,
) -> nn.Module:
    """Train a model with a plain loop, on the same random keys as the library."""
    model.train()
    for step, batch in enumerate(batches):
        for options in optimizer.param_groups if learning_rate else []:
            options["lr"] = learning_rate(step) * options.get("factor", 1.0)
        optimizer.zero_grad(set_to_none=True)
        torch.manual_seed(key(seed, step, 0, "forward"))
        loss(model, batch).backward()
        if max_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
    return model


def assert_same_tensors(ours: Any, module: nn.Module, *, atol: float = 0.0, rtol: float = 0.0) -> None:
    """Compare a state's parameters and buffers with a module's: to the bit, unless told how far."""
    held = {**ours.params, **ours.frozen, **ours.buffers}
    theirs = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    assert set(held) == set(theirs)
    for name, tensor in theirs.items():
        torch.testing.assert_close(held[name], tensor.detach(), atol=atol, rtol=rtol, msg=lambda m, n=name: f"{n}: {m}")


def assert_equal(one: ff.TrainState, other: ff.TrainState) -> None:
    """Compare two whole states to the bit."""
    found = ff.difference(one, other)
    assert found is None, found


def assert_no_gradients(module: nn.Module) -> None:
    """Check that nothing of a backward pass is left behind."""
    for name, parameter in module.named_parameters():
        assert parameter.grad is None or not parameter.grad.any(), name


@contextlib.contextmanager
def unchanged(state: ff.TrainState) -> Iterator[None]:
    """Check that a block leaves a state readable and as it was, to the bit."""
    before = state.copy()
    yield
    assert_equal(state, before)
