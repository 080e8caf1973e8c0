"""Numbers as a page says them; a number that is none, such as a NaN in a verdict, is said in words and never drawn."""

import math

from shardconv.progress import span

UNKNOWN = "–"
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def finite(value: object) -> float | None:
    """A number that can be drawn, or None.

    >>> finite(3), finite(float("nan")), finite(None)
    (3.0, None, None)
    """
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def decimal(value: object, digits: int = 3) -> str:
    """A number with as many digits as matter, small and large ones by powers of ten.

    >>> decimal(-0.0123456), decimal(2.5e-9), decimal(0), decimal(12345.6), decimal(float("nan"))
    ('−0.0123', '2.50 × 10⁻⁹', '0', '12,346', 'not a number')
    """
    if not isinstance(value, int | float) or math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "infinite" if value > 0 else "−infinite"
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e7:
        said = f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:#.{digits}g}".rstrip(".")
        return said.replace("-", "−")
    return power(value, digits - 1)


def power(value: float, digits: int) -> str:
    """A number by a power of ten.

    >>> power(1e-6, 0), power(0.25, 1)
    ('10⁻⁶', '2.5 × 10⁻¹')
    """
    mantissa, exponent = f"{value:.{digits}e}".split("e")
    ten = f"10{str(int(exponent)).translate(SUPERSCRIPTS)}"
    return ten if mantissa == "1" else f"{mantissa} × {ten}".replace("-", "−")


def percent(value: object) -> str:
    """A share of one; no share but the whole is called 100%.

    >>> percent(1.0), percent(0.99999), percent(0.57), percent(None)
    ('100%', '99.9%', '57.0%', '–')
    """
    share = finite(value)
    if share is None:
        return UNKNOWN
    return "100%" if share == 1 else f"{math.floor(round(share * 1000, 6)) / 10:.1f}%"


def seconds(value: float) -> str:
    """A short time, or a long one as people say it.

    >>> seconds(0.0213), seconds(6.15), seconds(106.4)
    ('0.02 s', '6.2 s', '1 min 46 s')
    """
    return f"{value:.2f} s" if value < 1 else f"{value:.1f} s" if value < 60 else span(value)


def count(number: int, one: str, many: str = "") -> str:
    """A number of things.

    >>> count(1, "leaf", "leaves"), count(2000, "unit")
    ('1 leaf', '2,000 units')
    """
    return f"{number:,} {one if number == 1 else many or one + 's'}"
