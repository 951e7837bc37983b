"""The demo's pictures: plain Unicode for a terminal, PNG through matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fastlstm.io.files import replacing

if TYPE_CHECKING:
    from fastlstm.demo import DemoResult

__all__ = ["plot_png", "plot_text"]

BLOCKS = " ▁▂▃▄▅▆▇█"
MARK = "●"
MIN_WIDTH, MIN_HEIGHT = 50, 8


def plot_text(result: DemoResult, width: int = 80, height: int = 20) -> str:
    """Draw what happened as bars and what was forecast as dots, a column or more for each year.

    Where not all years fit, the earliest are left out.

    Parameters
    ----------
    result : DemoResult
    width, height : int
        Size in characters: at least 50 by 8.

    Returns
    -------
    str
        `height` lines of at most `width` characters, joined by newlines: a legend, the plot, an axis and its years.

    Raises
    ------
    ValueError
        If `width` is under 50 or `height` under 8.
    """
    if width < MIN_WIDTH or height < MIN_HEIGHT:
        raise ValueError(
            f"`width` and `height` must be at least {MIN_WIDTH} and {MIN_HEIGHT}, got {width} and {height}"
        )
    years = np.concatenate([result.years, result.future_years])
    actual = np.concatenate([result.actual, np.full(len(result.future), np.nan)])
    forecast = np.concatenate([result.forecast, result.future])

    rows = height - 3
    top = np.ceil(max(result.actual.max(), forecast.max()) / 50.0) * 50.0
    label_width = len(f"{top:.0f}") + 2
    span = max(1, (width - label_width) // len(years))
    shown = min(len(years), (width - label_width) // span)
    years, actual, forecast = years[-shown:], actual[-shown:], forecast[-shown:]

    cells = np.full((rows, shown * span), " ")
    for column, (bar, dot) in enumerate(zip(actual.tolist(), forecast.tolist(), strict=True)):
        cells[:, column * span : (column + 1) * span] = _bar(bar / top, rows)[:, None]
        row = rows - 1 - min(int(dot / top * rows), rows - 1)
        cells[row, column * span + span // 2] = MARK

    ticks = {round((1.0 - value / top) * rows): f"{value:.0f}" for value in np.linspace(0.0, top, 5)[1:]}
    lines = [f"{ticks.get(row, ''):>{label_width - 2}} {'┤' if row in ticks else '│'}" for row in range(rows)]
    lines = [label + "".join(line).rstrip() for label, line in zip(lines, cells, strict=True)]
    axis = ["─"] * (shown * span)
    names = [" "] * (shown * span)
    for position in np.flatnonzero(years % 10 == 0).tolist():
        column, name = position * span + span // 2, str(years[position])
        if column + len(name) <= len(names):
            axis[column] = "┬"
            names[column : column + len(name)] = name
    legend = f"█ actual  {MARK} forecast, free-running from {result.future_years[0]}"
    return "\n".join(
        [
            " " * label_width + legend,
            *lines,
            f"{0:>{label_width - 2}} └" + "".join(axis),
            (" " * label_width + "".join(names)).rstrip(),
        ]
    )


def _bar(share: float, rows: int) -> NDArray[np.str_]:
    """Blocks, top to bottom, that fill the lowest `share` of so many rows; nan fills none."""
    eighths = 0 if np.isnan(share) else round(share * rows * 8)
    return np.array([BLOCKS[min(max(eighths - 8 * row, 0), 8)] for row in reversed(range(rows))])


def plot_png(result: DemoResult, path: str) -> None:
    """Draw the same picture with matplotlib.

    Parameters
    ----------
    result : DemoResult
    path : str
        The file to write; its suffix says the format, which is PNG without one.

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    OSError
        If the file cannot be written.
    ValueError
        If matplotlib does not know the format.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("a PNG needs matplotlib: pip install matplotlib") from error

    figure = Figure(figsize=(10.0, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.fill_between(result.years, result.actual, color="#d9c7a3", label="sunspot number")
    axes.plot(result.years, result.forecast, "-o", color="#1f4e79", markersize=3, label="LSTM, one year ahead")
    axes.plot(result.future_years, result.future, "--o", color="#c0392b", markersize=3, label="LSTM, free-running")
    rmse = {error.method: error.rmse for error in result.errors if error.horizon == 1}
    axes.set_title(
        f"Yearly sunspot numbers {result.years[0]}-{result.years[-1]}, never seen in training. "
        f"RMSE: LSTM {rmse['LSTM']:.1f}, seasonal naive {rmse['seasonal naive']:.1f}"
    )
    axes.set_xlabel("year")
    axes.set_ylabel("sunspot number")
    axes.set_ylim(bottom=0.0)
    axes.legend(loc="upper right", frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    with replacing(path) as file:
        figure.savefig(file, format=Path(path).suffix[1:] or "png")
