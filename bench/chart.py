"""The benchmark's bar chart, as SVG."""

from __future__ import annotations

import math
from html import escape

COLOURS = ("#2f6f4f", "#6aa884", "#a5d0b6", "#c8813c", "#e0b070", "#b04a4a", "#55627a", "#a9b4c6")


def bar_chart(us: dict[str, dict[str, float]], machine: str) -> str:
    """A group of bars for each pattern, a bar for each system: us[system][pattern], logarithmic."""
    systems = list(us)
    patterns = list(next(iter(us.values())))
    bar, gap, left, top, height = 16, 26, 60, 70, 300
    group = bar * len(systems) + gap
    width = left + group * len(patterns) + 20
    values = [us[s][p] for s in systems for p in patterns]
    low = 10 ** math.floor(math.log10(min(values)))
    high = 10 ** math.ceil(math.log10(max(values)))

    def y(value: float) -> float:
        return top + height * (1 - math.log(value / low) / math.log(high / low))

    parts = [
        f'<text x="{left}" y="22" font-size="15" font-weight="bold">'
        + "µs an access, logarithmic: shorter is faster</text>",
        f'<text x="{left}" y="42" fill="#555">{escape(machine)}</text>',
    ]
    decade = low
    while decade <= high:
        parts.append(
            f'<line x1="{left}" x2="{width - 20}" y1="{y(decade):.1f}" y2="{y(decade):.1f}" '
            f'stroke="#ddd"/><text x="{left - 8}" y="{y(decade) + 4:.1f}" text-anchor="end">'
            f"{decade:g}</text>"
        )
        decade *= 10
    for g, pattern in enumerate(patterns):
        x = left + g * group + gap / 2
        for index, system in enumerate(systems):
            value = us[system][pattern]
            parts.append(
                f'<rect x="{x + index * bar:.1f}" y="{y(value):.1f}" width="{bar - 2}" '
                f'height="{top + height - y(value):.1f}" fill="{COLOURS[index % len(COLOURS)]}">'
                f"<title>{escape(system)}, {pattern}: {value:.2f} µs</title></rect>"
            )
        middle = x + bar * len(systems) / 2
        parts.append(f'<text x="{middle:.1f}" y="{top + height + 18}" text-anchor="middle">'
                     f"{pattern}</text>")  # fmt: skip
    for index, system in enumerate(systems):
        row, column = divmod(index, 3)
        x, line = left + column * 230, top + height + 44 + row * 20
        parts.append(
            f'<rect x="{x}" y="{line - 11}" width="12" height="12" '
            f'fill="{COLOURS[index % len(COLOURS)]}"/><text x="{x + 18}" y="{line}">'
            f"{escape(system)}</text>"
        )
    total = top + height + 60 + 20 * ((len(systems) + 2) // 3)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{total}" '
        f'viewBox="0 0 {width} {total}" font-family="sans-serif" font-size="12">\n'
        f'<rect width="{width}" height="{total}" fill="white"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )
