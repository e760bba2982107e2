"""What pictures are made of: their colours, and rows of boxes with a piece of text in each."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

PLAIN, DEEP, WARM = "#5b8db8", "#1f4e79", "#d9822b"
GREY, PALE, FAINT = "#b9c2cb", "#dfe4e8", "#68717a"
TINTS = ("#dce9f5", "#f7e3cf")
FOUR = ("#5b8db8", "#e8a75c", "#7fb77e", "#b98fc0")
"""Of four ranks."""
WIDTH = 6.0
"""Inches."""


class Box(NamedTuple):
    """A piece of text on a ground, with a small one below it."""

    text: str
    colour: Any
    below: str = ""

    @property
    def width(self) -> float:
        """In inches, at the sizes of `boxes`."""
        return max(0.069 * len(self.text), 0.05 * len(self.below)) + 0.09


def boxes(rows: list[list[Box]], title: str = "") -> Figure:
    """Rows of boxes, one beside the other; a row that is too long goes on in the next line."""
    lines: list[list[tuple[float, Box]]] = []
    for row in rows:
        at = math.inf
        for box in row:
            if at + box.width > WIDTH:
                lines.append([])
                at = 0.0
            lines[-1].append((at, box))
            at += box.width + 0.035
    step = 0.42 if any(box.below for row in rows for box in row) else 0.3
    height = step * len(lines) + (0.35 if title else 0.05)
    figure = plt.figure(figsize=(WIDTH, height), layout="none")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set(xlim=(0, WIDTH), ylim=(0, height))
    axes.text(0, height - 0.16, title, va="center", style="italic")
    for number, line in enumerate(lines, start=1):
        low = step * (len(lines) - number) + (step - 0.27)
        for at, box in line:
            axes.add_patch(Rectangle((at, low), box.width, 0.24, color=box.colour, lw=0))
            middle = {"x": at + box.width / 2, "ha": "center", "va": "center"}
            axes.text(y=low + 0.115, s=box.text, family="monospace", fontsize=8, **middle)
            axes.text(y=low - 0.07, s=box.below, fontsize=6, color=FAINT, **middle)
    return figure
