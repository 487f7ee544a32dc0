"""How fast a training goes: functions of counts and seconds."""

import attrs


@attrs.frozen
class Count:
    """What had been consumed at an instant.

    Attributes:
        seconds: The instant, by any clock.
        samples: Of the whole job, all processes together.
        tokens: As above.
    """

    seconds: float
    samples: int
    tokens: int


def throughput(before: Count, after: Count) -> dict[str, float]:
    """Give samples and tokens per second between two instants; nothing, where no time has passed.

    Example:
        >>> throughput(Count(10.0, 640, 81_920), Count(12.0, 704, 90_112))
        {'samples_per_second': 32.0, 'tokens_per_second': 4096.0}
    """
    elapsed = after.seconds - before.seconds
    if elapsed <= 0:
        return {}
    return {
        "samples_per_second": (after.samples - before.samples) / elapsed,
        "tokens_per_second": (after.tokens - before.tokens) / elapsed,
    }
