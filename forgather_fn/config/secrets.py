"""What is secret, by its name: such values do not go into records."""

import re
from typing import Final

_SECRET: Final = re.compile(
    r"(?:.*[_.-])?(?:token|password|passwd|secret|credentials?)|.*[_-]key|apikey", re.IGNORECASE
)
_WORDS: Final = re.compile(
    r"(?:.*[_.-])?(?:additional_special|bos|cls|eos|mask|pad|sep|unk|image|audio|video)_token|tokens?_key",
    re.IGNORECASE,
)
"""What tokenizers call the tokens that have a meaning."""


def is_secret(name: str) -> bool:
    """Tell whether a name is that of a secret: a token, key, or password.

    Example:
        >>> [is_secret(name) for name in ("hf_token", "WANDB_API_KEY", "password", "pad_token", "key", "tokens")]
        [True, True, True, False, False, False]
    """
    return bool(_SECRET.fullmatch(name)) and not _WORDS.fullmatch(name)
