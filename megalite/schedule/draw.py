"""A timeline as an SVG picture: one row a rank, one bar an action. Strings only.

The picture paints its own light panel, so it reads alike on a light and on a dark page. As text:
simulate.text_chart. From the command line: tools/draw_schedule.py.
"""

from __future__ import annotations

import math
from html import escape

from megalite.schedule.action import Action, Op
from megalite.schedule.simulate import Timeline, bubble

# Told apart by the common kinds of colour blindness, and light enough for dark digits on top.
COLOURS = {Op.F: "#7fb2e5", Op.B: "#f2a65a", Op.I: "#f4d35e", Op.W: "#8fc98f", Op.R: "#8e44ad"}
NAMES = {
    Op.F: "forward",
    Op.B: "backward",
    Op.I: "input gradient",
    Op.W: "weight gradient",
    Op.R: "reduce",
}

ROW, BAR, LEFT, RIGHT, TOP, BOTTOM = 30, 24, 66, 18, 70, 44
"""Pixels: height of a row and of its bar, and the margins around the rows."""
SHORTEST, NARROWEST, WIDEST = 22.0, 620.0, 2400.0
"""Pixels: wanted width of the shortest action, and the bounds of the whole time axis."""
DIGIT = 6.6
"""Pixels: width of one digit of a label."""


def schedule_svg(timeline: Timeline, title: str) -> str:
    """The SVG of `timeline`, headed by `title` and its bubble.

    Bars of later chunks of a rank are paler. A bar too short for its microbatch's number has none.
    """
    schedule = timeline.schedule
    scale = _scale(timeline)
    width = LEFT + timeline.makespan * scale + RIGHT
    bottom = TOP + ROW * schedule.num_ranks
    height = bottom + BOTTOM
    head = f"{title}: bubble {100 * bubble(timeline):.1f}%"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" '
        f'width="{width:.0f}" height="{height}" font-family="sans-serif" fill="#222" '
        f'role="img" aria-label="{escape(head)}">',
        f'<rect width="{width:.0f}" height="{height}" rx="6" fill="#fcfcfc"/>',
        f'<text x="{LEFT}" y="26" font-size="16" font-weight="bold">{escape(head)}</text>',
        *_legend(timeline),
        *_axis(timeline.makespan, scale, bottom),
    ]
    for rank in range(schedule.num_ranks):
        parts += _row(timeline, rank, scale)
    return "\n".join([*parts, "</svg>", ""])


def _scale(timeline: Timeline) -> float:
    """Pixels per second."""
    shortest = min((e - s for s, e in timeline.spans.values() if e > s), default=1.0)
    makespan = timeline.makespan or 1.0
    return min(max(SHORTEST / shortest, NARROWEST / makespan), WIDEST / makespan)


def _row(timeline: Timeline, rank: int, scale: float) -> list[str]:
    """One rank's label, its track, and its bars."""
    top = TOP + ROW * rank
    middle = top + ROW / 2
    stages = timeline.schedule.stages_of(rank)
    parts = [
        f'<text x="{LEFT - 10}" y="{middle + 4}" font-size="12" text-anchor="end">'
        f"rank {rank}</text>",
        f'<rect x="{LEFT}" y="{middle - BAR / 2}" width="{timeline.makespan * scale:.2f}" '
        f'height="{BAR}" fill="#ececec"/>',
    ]
    # Bars first: the mark of an R must not vanish under the next bar.
    for action, start, end in sorted(timeline.of_rank(rank), key=lambda row: row[0].op is Op.R):
        opacity = 1.0 - 0.55 * stages.index(action.stage) / max(len(stages) - 1, 1)
        parts.append(_bar(action, start, end, scale=scale, middle=middle, opacity=opacity))
    return parts


def _bar(
    action: Action, start: float, end: float, *, scale: float, middle: float, opacity: float
) -> str:
    """One action, with its whole name and times as a tooltip."""
    x, width = LEFT + start * scale, (end - start) * scale
    tip = f"<title>{action}: {start:g} to {end:g}</title>"
    if action.op is Op.R:
        # It may cost nothing: a mark across the row, not a bar.
        return (
            f'<rect x="{x - 1.5:.2f}" y="{middle - ROW / 2 + 1}" width="{max(width, 3):.2f}" '
            f'height="{ROW - 2}" fill="{COLOURS[action.op]}">{tip}</rect>'
        )
    number = str(action.microbatch)
    label = (
        f'<text x="{x + width / 2:.2f}" y="{middle + 4}" font-size="11" text-anchor="middle" '
        f'pointer-events="none">{number}</text>'
        if width >= DIGIT * len(number) + 3
        else ""
    )
    return (
        f'<rect x="{x:.2f}" y="{middle - BAR / 2}" width="{width:.2f}" height="{BAR}" '
        f'fill="{COLOURS[action.op]}" fill-opacity="{opacity:.2f}" stroke="#fcfcfc" '
        f'stroke-width="{min(1.0, width / 4):.2f}">{tip}</rect>{label}'
    )


def _legend(timeline: Timeline) -> list[str]:
    """A swatch for each op that occurs."""
    present = {action.op for action in timeline.spans}
    x, parts = float(LEFT), []
    for op in Op:
        if op in present:
            text = f"{op.value} {NAMES[op]}"
            parts.append(f'<rect x="{x}" y="40" width="12" height="12" fill="{COLOURS[op]}"/>')
            parts.append(f'<text x="{x + 17}" y="50" font-size="12">{text}</text>')
            x += 17 + DIGIT * len(text) + 18
    if timeline.schedule.num_stages > timeline.schedule.num_ranks:
        parts.append(f'<text x="{x}" y="50" font-size="12">paler: later chunk of the rank</text>')
    return parts


def _axis(makespan: float, scale: float, bottom: float) -> list[str]:
    """Time marks at round numbers, six to fifteen of them."""
    rough = makespan / 10 or 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough)
    parts = []
    for i in range(int(makespan / step + 1e-9) + 1):
        x = LEFT + i * step * scale
        parts.append(
            f'<line x1="{x:.2f}" y1="{TOP - 4}" x2="{x:.2f}" y2="{bottom + 4}" stroke="#bbb" '
            'stroke-width="0.6"/>'
            f'<text x="{x:.2f}" y="{bottom + 18}" font-size="11" text-anchor="middle">'
            f"{i * step:g}</text>"
        )
    middle = LEFT + makespan * scale / 2
    parts.append(
        f'<text x="{middle:.2f}" y="{bottom + 36}" font-size="12" text-anchor="middle">time</text>'
    )
    return parts
