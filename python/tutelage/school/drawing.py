"""Pictures of a report as SVG, to stand in the page itself. Colours are the page's, by class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

_WIDTH = 640
"""Of every picture, in its own units; the page scales it."""
_LEFT, _RIGHT = 56, 16
_PLOT = 150
"""Height of a curve's field."""
_TOP, _BELOW = 24, 28
_ROW = 44
"""Height of a stage's two bars."""


def bars(stages: Mapping[str, Mapping[str, float]]) -> str:
    """Of each stage a bar for each of its fractions in 0 .. 1; the classes are the fractions' names."""
    left, right = 84, 64
    field = _WIDTH - left - right
    drawn = []
    for place, (stage, values) in enumerate(stages.items()):
        top = place * _ROW
        drawn.append(f'<text class="name" x="0" y="{top + 8 + 8 * len(values)}">{stage}</text>')
        for line, (name, value) in enumerate(values.items()):
            y = top + 6 + line * 16
            length = value * field
            drawn.append(f'<rect class="{name}" x="{left}" y="{y}" width="{length:.1f}" height="13" rx="2"/>')
            drawn.append(f'<text class="value" x="{left + length + 6:.1f}" y="{y + 11}">{value:.1%} {name}</text>')
    height = len(stages) * _ROW
    label = "; ".join(f"{stage}: " + ", ".join(f"{v:.1%} {n}" for n, v in values.items()) for stage, values in stages.items())
    return _svg(height, label, drawn)


def curve(curves: Mapping[str, Sequence[tuple[float, float]]], unit: str) -> str:
    """Lines through (step, value), by name, on common axes; of "held out" the points are marked, as they are few."""
    points = [point for line in curves.values() for point in line]
    last = max(step for step, _ in points)
    low, high = min(value for _, value in points), max(value for _, value in points)
    span = high - low or 1.0
    width = _WIDTH - _LEFT - _RIGHT

    def place(step: float, value: float) -> tuple[float, float]:
        return _LEFT + width * step / (last or 1), _TOP + _PLOT * (1 - (value - low) / span)

    bottom = _TOP + _PLOT
    drawn = [
        f'<path class="axis" fill="none" d="M{_LEFT} {_TOP}V{bottom}H{_WIDTH - _RIGHT}"/>',
        f'<text x="{_LEFT - 8}" y="{_TOP + 5}" text-anchor="end">{high:.2f}</text>',
        f'<text x="{_LEFT - 8}" y="{bottom}" text-anchor="end">{low:.2f}</text>',
        f'<text x="{_LEFT}" y="{bottom + 20}">step 0</text>',
        f'<text x="{_WIDTH - _RIGHT}" y="{bottom + 20}" text-anchor="end">{last:g}</text>',
        f'<text x="{_LEFT}" y="12">{unit}: {" and ".join(curves)}</text>',
    ]
    for name, line in curves.items():
        kind = name.replace(" ", "-")
        placed = [place(*point) for point in line]
        drawn.append(f'<polyline class="{kind}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in placed)}"/>')
        if name == "held out":
            drawn += [f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in placed]
    label = "; ".join(f"{name}: from {line[0][1]:.2f} to {line[-1][1]:.2f} {unit}" for name, line in curves.items())
    return _svg(bottom + _BELOW, label, drawn)


def _svg(height: float, label: str, drawn: Sequence[str]) -> str:
    inside = "\n".join(drawn)
    return f'<svg viewBox="0 0 {_WIDTH} {height:g}" role="img" aria-label="{label}">\n{inside}\n</svg>'
