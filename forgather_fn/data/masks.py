"""What packed rows are to attention: which tokens may see which."""

import torch
from torch import Tensor

from forgather_fn.signature import shown


def block_mask(position_ids: Tensor) -> Tensor:
    """Let each token see those before it in its own segment, and nothing of other segments.

    For ``torch.nn.functional.scaled_dot_product_attention(..., attn_mask=mask)``, and as the ``attention_mask`` of
    models that take one of four dimensions. Models of Hugging Face need none: given ``position_ids`` and no mask, they
    make it themselves.

    Args:
        position_ids: (batch, length), starting at 0 with each segment.

    Raises:
        ValueError: They are no integers, or of another shape.

    Returns:
        bool, (batch, 1, length, length): True where the token of the third dimension sees that of the fourth.

    Example:
        >>> block_mask(torch.tensor([[0, 1, 0, 1]]))[0, 0].int().tolist()
        [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    """
    _check("block_mask", position_ids)
    segments = (position_ids == 0).cumsum(-1)
    same = segments[:, None, :, None] == segments[:, None, None, :]
    return same & torch.ones_like(same[0, 0]).tril()


def flash_arguments(position_ids: Tensor) -> dict[str, Tensor | int]:
    """Say where segments begin, as FlashAttention's kernels for unequal lengths take it.

    The names are those that models of Hugging Face take (``FlashAttentionKwargs``). Finding the longest segment waits
    for the device.

    Args:
        position_ids: (batch, length), starting at 0 with each segment; the rows count as laid end to end.

    Raises:
        ValueError: They are no integers, of another shape, or do not start with 0.

    Example:
        >>> flash_arguments(torch.tensor([[0, 1, 0, 1, 2]]))
        {'cu_seq_lens_q': tensor([0, 2, 5], dtype=torch.int32), 'cu_seq_lens_k': tensor([0, 2, 5], dtype=torch.int32),
         'max_length_q': 3, 'max_length_k': 3}
    """
    _check("flash_arguments", position_ids)
    flat = position_ids.reshape(-1)
    starts = torch.nonzero(flat == 0).reshape(-1)
    if not len(starts) or int(starts[0]):
        raise ValueError(
            "flash_arguments: position_ids do not start with 0, so that no segment begins where a row does"
        )
    bounds = torch.cat([starts, starts.new_tensor([flat.numel()])]).to(torch.int32)
    longest = int(bounds.diff().max())
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}


def _check(what: str, position_ids: Tensor) -> None:
    if not isinstance(position_ids, Tensor):
        raise ValueError(f"{what}: position_ids must be a tensor, of shape (batch, length); got {shown(position_ids)}")
    if position_ids.dim() != 2 or position_ids.is_floating_point():
        raise ValueError(
            f"{what}: position_ids must be integers of shape (batch, length); got {position_ids.dtype} of shape "
            f"{tuple(position_ids.shape)}"
        )
