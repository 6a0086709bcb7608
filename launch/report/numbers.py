"""Numbers as a reader wants them."""

import math

from evaluation.intervals import Interval


def number(value: float | None, digits: int = 4) -> str:
    """A number in so many digits; large and small ones by powers of ten, whole ones whole."""
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value == int(value) and abs(value) < 1e7:
        return f"{int(value):,}".replace("-", "−")
    if abs(value) >= 1e7 or abs(value) < 1e-4:
        return f"{value:.{digits - 1}e}".replace("e+0", "e").replace("e+", "e").replace("e-0", "e-").replace("-", "−")
    return f"{value:,.{max(digits - 1 - math.floor(math.log10(abs(value))), 0)}f}".replace("-", "−")


def spread(interval: Interval) -> str:
    """A mean and half its interval; of one value there is none."""
    if math.isinf(interval.half):
        return f"{number(interval.mean)} (n = {interval.count})"
    places = _places(interval.half)
    return f"{interval.mean:.{places}f} ± {interval.half:.{places}f}".replace("-", "−")


def bounds(interval: Interval) -> str:
    """A difference and the ends of its interval."""
    if math.isinf(interval.half):
        return f"{_signed(interval.mean, 4)} (n = {interval.count})"
    places = _places(interval.half)
    ends = f"{_signed(interval.low, places)} to {_signed(interval.high, places)}"
    return f"{_signed(interval.mean, places)} ({ends})"


def probability(p: float | None) -> str:
    """A p value."""
    return "–" if p is None or math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def _signed(value: float, places: int) -> str:
    return f"{value:+.{places}f}".replace("-", "−")


def _places(half: float) -> int:
    """Decimals that show two digits of an uncertainty."""
    return 4 if half <= 0 else min(max(1 - math.floor(math.log10(half)), 0), 6)
