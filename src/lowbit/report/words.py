"""Numbers as people read them: bytes, seconds, counts."""

from typing import Any


def size_words(n: "float | None") -> str:
    """Bytes, powers of 1000.

    >>> size_words(1_234_567), size_words(512), size_words(269_060_000)
    ('1.23 MB', '512 bytes', '269 MB')
    """
    if n is None:
        return "-"
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= scale:
            return f"{n / scale:.0f} {unit}" if n >= 100 * scale else f"{n / scale:.3g} {unit}"
    return f"{n:.0f} bytes"


def time_words(seconds: "float | None") -> str:
    """A duration.

    >>> time_words(3.21), time_words(75), time_words(3700)
    ('3.2 s', '1 min 15 s', '1 h 01 min')
    """
    if seconds is None:
        return "-"
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def count_words(n: int) -> str:
    """A count.

    >>> count_words(134_500_000), count_words(9_000)
    ('134.5 million', '9,000')
    """
    return f"{n / 1e9:.2f} billion" if n >= 1e9 else f"{n / 1e6:.1f} million" if n >= 1e6 else f"{n:,}"


def number(value: Any, digits: int = 3) -> str:
    """A float with so many digits; "-" for None; anything else as it is.

    >>> number(0.123456), number(None), number(7)
    ('0.123', '-', '7')
    """
    return "-" if value is None else f"{value:.{digits}g}" if isinstance(value, float) else str(value)
