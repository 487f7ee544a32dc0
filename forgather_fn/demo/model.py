"""A byte-level decoder transformer, small enough to be read in one go."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BYTES = 256
"""Size of the vocabulary: every byte is a token."""


class Transformer(nn.Module):
    """Predict the next byte: pre-norm blocks of causal attention with rotary positions, and a gated feed-forward part.

    Linear layers have no biases. Every matrix starts normal with a deviation of 0.02; those that write to the residual
    stream, ``sqrt(2 * layers)`` times smaller, so that its size at the start does not depend on the depth.

    Sources: RMSNorm, Zhang and Sennrich, arXiv 1910.07467; SwiGLU, Shazeer, arXiv 2002.05202; the scale at the start,
    Radford et al., "Language Models are Unsupervised Multitask Learners", 2019.

    Args:
        width: Of the residual stream; a multiple of twice the heads, since rotary positions turn pairs.
        layers: How many blocks.
        heads: Attention heads in each.

    Raises:
        ValueError: The heads do not divide the width into even parts.

    Example:
        >>> Transformer(width=16, layers=2, heads=2)(torch.zeros(3, 10, dtype=torch.int64)).shape
        torch.Size([3, 10, 256])
    """

    def __init__(self, *, width: int, layers: int, heads: int) -> None:
        super().__init__()
        check_heads(width, heads)
        self.head_width = width // heads
        self.embedding = nn.Embedding(BYTES, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, BYTES, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                writes_to_stream = name.endswith(("attention.output.weight", "feed_forward.output.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * layers) ** 0.5 if writes_to_stream else 0.02)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Give the logits of the byte after each.

        Args:
            input_ids: Bytes, int64, shape (batch, time).

        Returns:
            Logits, shape (batch, time, 256); those at a position depend on the bytes up to it.
        """
        angles = rotations(input_ids.shape[1], self.head_width, input_ids.device)
        stream = self.embedding(input_ids)
        for block in self.blocks:
            stream = block(stream, angles)
        logits: Tensor = self.head(self.norm(stream))
        return logits


class Block(nn.Module):
    """One layer: what attention gives is added to the stream, then what the feed-forward part gives."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(width)
        self.attention = Attention(width, heads)
        self.feed_forward_norm = nn.RMSNorm(width)
        self.feed_forward = FeedForward(width)

    def forward(self, stream: Tensor, angles: Tensor) -> Tensor:
        """Map the stream, shape (batch, time, width), to the next layer's."""
        stream = stream + self.attention(self.attention_norm(stream), angles)
        added: Tensor = self.feed_forward(self.feed_forward_norm(stream))
        return stream + added


class Attention(nn.Module):
    """Causal self-attention with rotary positions."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.input = nn.Linear(width, 3 * width, bias=False)
        self.output = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        """Attend from each position to those before it and itself; shapes (batch, time, width)."""
        query, key, value = self.input(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(rotated(query, angles), rotated(key, angles), value, is_causal=True)
        output: Tensor = self.output(mixed.transpose(1, 2).flatten(-2))
        return output


class FeedForward(nn.Module):
    """A gated feed-forward part, about as large as one of four times the width without a gate."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = -(-width * 8 // 3 // 32) * 32  # rounded up to what vector units like
        self.input = nn.Linear(width, 2 * inner, bias=False)
        self.output = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map each position alone; shapes (batch, time, width)."""
        gate, inner = self.input(x).chunk(2, dim=-1)
        output: Tensor = self.output(F.silu(gate) * inner)
        return output


def rotations(time: int, head_width: int, device: torch.device) -> Tensor:
    """Tabulate the angles of rotary positions.

    Position ``t`` turns pair ``i`` of a head by ``t * 10000 ** (-2 i / head_width)`` radians.

    Source: Su et al., "RoFormer", arXiv 2104.09864.

    Returns:
        Cosines and sines, float32, shape (2, time, head_width / 2).
    """
    rates = 10_000.0 ** -(torch.arange(0, head_width, 2, device=device) / head_width)
    turns = torch.outer(torch.arange(time, device=device), rates)
    return torch.stack((turns.cos(), turns.sin()))


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    """Turn the pairs ``(x[..., i], x[..., i + head_width / 2])`` by angles; keep the data type.

    The product of a turned query and a turned key depends on how far apart they are, and not on where.

    Args:
        x: Queries or keys, shape (..., time, head_width).
        angles: As :func:`rotations` gives them.
    """
    cos, sin = angles
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).type_as(x)


def check_heads(width: int, heads: int) -> None:
    """Refuse a width that the heads do not divide into even parts."""
    pairs = 2 * heads
    if width % pairs:
        near = [n for n in (width // pairs * pairs, (width // pairs + 1) * pairs) if n]
        raise ValueError(
            f"width={width} cannot be divided among heads={heads}: rotary positions turn pairs, so each head needs an "
            f"even part. Nearest: {' or '.join(map(str, near))}"
        )
