"""A curve drawn with characters, for terminals and log files."""

from __future__ import annotations

import math
from collections.abc import Sequence

MAX_STRIDE = 4
"""Columns between two points of a short curve."""


def draw_curve(
    values: Sequence[float], *, width: int = 60, height: int = 9, ascii_only: bool = False
) -> list[str]:
    """Draw `values` of iterations 1, 2, ..., n as lines of text with both axes.

    Args:
        values: one number an iteration; values that are not finite leave a gap.
        width: columns of the drawing area, at least 2; a longer curve is averaged over neighbours.
        height: rows of the drawing area, at least 2; an odd number has a middle row to label.
        ascii_only: use no character beyond ASCII.

    Returns:
        `height + 2` lines, or none where no value is finite.
    """
    columns = _average(values, min(len(values), width))
    finite = [value for value in columns if math.isfinite(value)]
    if not finite:
        return []
    low, high = math.floor(min(finite)), math.ceil(max(finite))
    # A flat curve needs a height to be drawn in.
    high = max(high, low + 1)
    # Few points are set apart, so that each one is seen.
    stride = max(1, min(MAX_STRIDE, width // len(columns)))
    point, wall, tick, corner, floor = "*|++-" if ascii_only else "\u25cf\u2502\u2524\u2514\u2500"
    rows = [[" "] * (len(columns) * stride) for _ in range(height)]
    for position, value in enumerate(columns):
        if math.isfinite(value):
            # Row 0 is the top one.
            rows[round((high - value) / (high - low) * (height - 1))][position * stride] = point
    lines = []
    for number, row in enumerate(rows):
        labelled = number in (0, height // 2, height - 1)
        level = f"{high - (high - low) * number / (height - 1):7.1f}" if labelled else " " * 7
        lines.append(f"{level} {tick if labelled else wall} {''.join(row)}".rstrip())
    span = (len(columns) - 1) * stride
    ends = "1" if len(values) == 1 else f"1{str(len(values)).rjust(span)}"
    return [*lines, f"{' ' * 8}{corner}{floor * (len(columns) * stride + 1)}", f"{' ' * 10}{ends}  iteration"]


def _average(values: Sequence[float], num_columns: int) -> list[float]:
    """`[num_columns]` means of the finite values in each of `num_columns` runs of neighbours; NaN where a run
    has none."""
    means = []
    for column in range(num_columns):
        run = values[column * len(values) // num_columns : (column + 1) * len(values) // num_columns]
        finite = [value for value in run if math.isfinite(value)]
        means.append(sum(finite) / len(finite) if finite else math.nan)
    return means
