"""How a parametrized case is named in the reports of the tests."""

import re


def named(case: object) -> str:
    """Name a case by what it prints as, without addresses: processes that share the tests must call them the same.

    Example:
        >>> named({"rows": (1, 2)})
        "{'rows': (1, 2)}"
        >>> named(object())
        '<object object>'
    """
    return re.sub(r" at 0x[0-9a-f]+", "", str(case))
