"""What the charts share: colours are theme tokens that the page's script resolves, again whenever the theme changes.

"var(--x)" is a colour or font of the style sheet, "heat(t)" the point t (0..1) of its sequential scale.
"""

from __future__ import annotations

from typing import Any

Figure = dict[str, Any]
GRID = {"gridcolor": "var(--grid)", "zeroline": False, "linecolor": "var(--grid)"}


def layout(**settings: Any) -> Figure:
    """A figure's frame in the page's colours."""
    return {"paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)", "autosize": True,
            "margin": {"l": 64, "r": 16, "t": 40, "b": 52},
            "font": {"family": "var(--sans)", "size": 13, "color": "var(--ink)"},
            "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": "var(--baseline)", "activecolor": "var(--ink)"},
            "hoverlabel": {"bgcolor": "var(--card)", "bordercolor": "var(--grid)", "align": "left",
                           "font": {"color": "var(--ink)"}}, **settings}
