"""Draws small charts with logarithmic axes as SVG."""

import math

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 300, 220, 52, 14, 26, 40
COLORS = "#1565c0", "#e65100"


def svg(panels):
    """`panels`: (column, row, x-axis title, y-axis title, {name: [(x, y)]})."""
    columns, rows = (1 + max(panel[place] for panel in panels) for place in (0, 1))
    drawn = "\n".join(
        f'<g transform="translate({column * WIDTH} {row * HEIGHT})">{chart(*rest)}</g>' for column, row, *rest in panels
    )
    return f"""<svg xmlns="http://www.w3.org/2000/svg" width="{columns * WIDTH}" height="{rows * HEIGHT}"
 font-family="sans-serif" font-size="11">
<rect width="100%" height="100%" fill="white"/>
{drawn}
</svg>
"""


def chart(x_title, y_title, curves):
    points = [point for curve in curves.values() for point in curve]
    x, x_ticks = axis([x for x, _ in points], LEFT, WIDTH - RIGHT)
    y, y_ticks = axis([y for _, y in points], HEIGHT - BOTTOM, TOP)
    parts = [text(LEFT, 16, y_title, "start", "bold"), text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, x_title)]
    for tick in x_ticks:
        parts += [line(x(tick), TOP, x(tick), HEIGHT - BOTTOM), text(x(tick), HEIGHT - BOTTOM + 14, short(tick))]
    for tick in y_ticks:
        parts += [line(LEFT, y(tick), WIDTH - RIGHT, y(tick)), text(LEFT - 5, y(tick) + 4, short(tick), "end")]
    for (name, curve), color in zip(curves.items(), COLORS):
        path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in curve)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
        parts += [f'<circle cx="{x(a):.1f}" cy="{y(b):.1f}" r="3" fill="{color}"/>' for a, b in curve]
        parts.append(text(LEFT + 8, TOP + 14 * (1 + [*curves].index(name)), name, "start", color=color))
    return "".join(parts)


def axis(values, start, end):
    """Returns (function from value to position, tick values). The range covers whole powers of ten."""
    low, high = math.floor(math.log10(min(values)) + 1e-9), math.ceil(math.log10(max(values)) - 1e-9)
    high = max(high, low + 1)
    return (
        lambda value: start + (end - start) * (math.log10(value) - low) / (high - low),
        [10.0**power for power in range(low, high + 1)],
    )


def short(value):
    for size, letter in (1e6, "M"), (1e3, "k"):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def text(x, y, words, anchor="middle", weight="normal", color="#333"):
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}" fill="{color}">{words}</text>'


def line(x1, y1, x2, y2):
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="#ddd"/>'
