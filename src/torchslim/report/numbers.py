"""Format numbers for reports: a few significant digits, or all of them."""

from __future__ import annotations

import math

from typing_extensions import TypeIs

from torchslim.report.records import Entry, Measured

TIMES, TO = "\u00d7", "\u2013"  # for the page; the table is plain ASCII
BYTE_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


def is_measured(entry: Entry) -> TypeIs[Measured]:
    """Whether an entry has a number, not the reason why there is none."""
    return "value" in entry


def value_of(entry: Entry) -> float | None:
    """Exact number of an entry; None if it was not measured."""
    return entry["value"] if is_measured(entry) else None


def decimals_for(value: float, digits: int) -> int:
    """Number of decimals that show `digits` significant digits of `value`; 0 if its integer part has enough."""
    if value == 0:
        return 0
    exponent = int(f"{abs(value):.{digits - 1}e}".partition("e")[2])  # after rounding: 9.996 is 10.0
    return max(0, digits - 1 - exponent)


def significant(value: float, digits: int = 3) -> str:
    """`value` with at least `digits` significant digits, and an exponent only if it is very small or large.

    >>> significant(47.8905), significant(0.163636), significant(12345.6), significant(3e-9)
    ('47.9', '0.164', '12346', '3.00e-09')
    """
    if value != 0 and not 1e-6 <= abs(value) < 1e15:
        return f"{value:.{digits - 1}e}"
    return f"{value:.{decimals_for(value, digits)}f}"


def duration(seconds: float) -> str:
    """Seconds in words: "0.3 s", "45 s", "12 min", "1.5 h"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def counted(value: float) -> str:
    """A count with three significant digits and an SI suffix.

    >>> counted(708), counted(873412), counted(999_960), counted(1.8e9)
    ('708', '873k', '1.00M', '1.80G')
    """
    if abs(value) < 1000:
        return str(int(value)) if value == int(value) else significant(value)
    for power, suffix in enumerate("kMGT", 1):
        text = significant(value / 1000**power)
        if abs(float(text)) < 1000:
            return f"{text}{suffix}"
    return significant(value)


def exact(value: float) -> str:
    """`value` with all digits; whole numbers are grouped in thousands."""
    return f"{value:,}" if isinstance(value, int) else repr(value)


def byte_unit(size: float) -> tuple[str, int]:
    """Unit that shows a size with one to four digits before the point, and the unit's bytes."""
    power = min(int(math.log(size, 1024)), len(BYTE_UNITS) - 1) if size >= 1 else 0
    return BYTE_UNITS[power], 1024**power


def in_unit(size: float, unit_bytes: int) -> str:
    """A size in a unit, as text; bytes have no decimals."""
    return str(int(size)) if unit_bytes == 1 else significant(size / unit_bytes)


def sized(size: float) -> str:
    """A size in a suitable unit, as text.

    >>> sized(3730), sized(12), sized(46804351)
    ('3.64 KiB', '12 bytes', '44.6 MiB')
    """
    unit, unit_bytes = byte_unit(abs(size))
    return f"{in_unit(size, unit_bytes)} {unit}"


def spread(entry: Measured) -> tuple[str, str, str]:
    """Median, p10 and p90 of a measured entry, with equal numbers of decimals for easy comparison."""
    middle = entry["value"]
    decimals = min(decimals_for(middle, 3), 9)
    low, high = entry.get("low", middle), entry.get("high", middle)
    return f"{middle:.{decimals}f}", f"{low:.{decimals}f}", f"{high:.{decimals}f}"


def metric_text(value: float, unit: str) -> str:
    """A metric without its unit: two decimals for a percentage, else four significant digits."""
    text = f"{value:.2f}" if unit == "%" else significant(value, 4)
    return text.removeprefix("-") if float(text) == 0 else text


def with_unit(text: str, unit: str) -> str:
    """`text` followed by its unit; "" and "1" mean no unit."""
    return text if unit in ("", "1") else f"{text} {unit}"


def ratio_text(ratio: float) -> str:
    """A ratio with two decimals, which show a spread around 1; below 0.1 with three significant digits."""
    return f"{ratio:.2f}" if ratio >= 0.1 else significant(ratio)


def faster(ratio: float) -> str:
    """A speed-up in words, with a factor of at least 1.

    >>> faster(1.8), faster(0.5)
    ('1.80 times faster', '2.00 times slower')
    """
    return f"{ratio_text(ratio)} times faster" if ratio >= 1 else f"{ratio_text(1 / ratio)} times slower"


def smaller(before: float, after: float) -> str:
    """Comparison of two sizes in words.

    >>> smaller(4096, 1024), smaller(1000, 1000), smaller(3730, 3804), smaller(100_000, 99_990)
    ('4.00 times smaller', 'none', '2.0 % larger', '0.010 % smaller')
    """
    if before == after:
        return "none"
    if not before or not after:
        return f"from {sized(before)} to {sized(after)}"
    word, ratio = ("smaller", before / after) if after < before else ("larger", after / before)
    if ratio >= 1.1:
        return f"{ratio_text(ratio)} times {word}"
    percent = abs(before - after) / before * 100
    return f"{significant(percent, 2) if percent >= 0.01 else 'under 0.01'} % {word}"
