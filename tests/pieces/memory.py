"""What takes less memory."""

from torch import nn

from forgather_fn.activation_checkpointing import activation_checkpointed
from forgather_fn.activation_offloading import activation_offloaded
from tests import specimens
from tests.pieces.piece import Piece


def inner() -> nn.Module:
    """Make the perceptron with its layers in a block."""
    return nn.Sequential(nn.Sequential(*specimens.mlp()))


PIECES = {
    "activation_checkpointed": Piece(fields=lambda: {"model": lambda: activation_checkpointed(inner(), "0")}),
    "activation_offloaded": Piece(
        fields=lambda: {"model": lambda: activation_offloaded(inner(), "0", least_bytes=0)},
        outside={"compiled": "where tensors wait is then the compiler's; refused"},
    ),
    "in_backward": Piece(
        fields=lambda: {"update": "in_backward"},
        outside={
            "purity": "it is checked with microbatches, whose gradients are added before the update; refused",
            "accumulation": "the same",
            "resume": "the same",
            "compiled": "a compiled step lets go of gradients by itself; refused",
            "worlds": "the gradients of other processes are not there yet; refused",
        },
    ),
}
