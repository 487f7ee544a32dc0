"""What packed rows are to attention: which tokens may see which."""

import torch
from torch import Tensor


def block_mask(position_ids: Tensor) -> Tensor:
    """Let each token see those before it in its own segment, and nothing of other segments.

    For ``torch.nn.functional.scaled_dot_product_attention(..., attn_mask=mask)``, and as the ``attention_mask`` of
    models that take one of four dimensions. Models of Hugging Face need none: given ``position_ids`` and no mask, they
    make it themselves.

    Args:
        position_ids: (batch, length), starting at 0 with each segment.

    Returns:
        bool, (batch, 1, length, length): True where the token of the third dimension sees that of the fourth.

    Example:
        >>> block_mask(torch.tensor([[0, 1, 0, 1]]))[0, 0].int().tolist()
        [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    """
    segments = (position_ids == 0).cumsum(-1)
    same = segments[:, None, :, None] == segments[:, None, None, :]
    return same & torch.ones_like(same[0, 0]).tril()


def flash_arguments(position_ids: Tensor) -> dict[str, Tensor | int]:
    """Say where segments begin, as FlashAttention's kernels for unequal lengths take it.

    The names are those that models of Hugging Face take (``FlashAttentionKwargs``). Finding the longest segment waits
    for the device.

    Args:
        position_ids: (batch, length), starting at 0 with each segment; the rows count as laid end to end.

    Example:
        >>> flash_arguments(torch.tensor([[0, 1, 0, 1, 2]]))
        {'cu_seq_lens_q': tensor([0, 2, 5], dtype=torch.int32), 'cu_seq_lens_k': tensor([0, 2, 5], dtype=torch.int32),
         'max_length_q': 3, 'max_length_k': 3}
    """
    flat = position_ids.reshape(-1)
    starts = torch.nonzero(flat == 0).reshape(-1)
    bounds = torch.cat([starts, starts.new_tensor([flat.numel()])]).to(torch.int32)
    longest = int(bounds.diff().max())
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}
