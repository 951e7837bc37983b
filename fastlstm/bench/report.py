"""Tables and a chart of a comparison, made from what `compare` returns or from its JSON."""

from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

__all__ = ["MARKS", "markdown", "require_matplotlib", "terminal", "write_chart", "write_readme"]

MARKS = {
    "infer": ("<!-- bench:start -->", "<!-- bench:end -->"),
    "train": ("<!-- bench-train:start -->", "<!-- bench-train:end -->"),
}
"""For each mode, the lines of a file between which its tables are put."""

WHAT = {"infer": "", "train": "training, forward and backward; "}

COLORS, MARKERS = ("#2471a3", "#d68910", "#1e8449", "#7d3c98"), "oDsv"
TICKS = (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100, 200, 500, 1000)

Result = dict[str, Any]


def markdown(result: Result) -> str:
    """Return the comparison as Markdown: machine, a table for each number of threads, what is slower or left out.

    Parameters
    ----------
    result : dict
        What `compare` returned.

    Returns
    -------
    str
    """
    parts = [_preamble(result)]
    for threads in _thread_counts(result):
        header, *rows = _table(result, threads, bold="**")
        rule = ["---", "---", *["---:"] * (len(header) - 2)]
        parts.append(f"**{_threads_text(threads)}**")
        parts.append("\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows)))
    parts += [_losses(result), *_memory(result), *[f"- {note}" for note in _notes(result)]]
    return "\n\n".join(part for part in parts if part)


def terminal(result: Result) -> str:
    """Return the comparison as plain text: machine, a table for each number of threads, what is slower or left out.

    Parameters
    ----------
    result : dict
        What `compare` returned.

    Returns
    -------
    str
    """
    parts = [_preamble(result).replace("`", "")]
    for threads in _thread_counts(result):
        table = _table(result, threads, bold="")
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = []
        for row in table:
            left = [text.ljust(width) for text, width in zip(row[:2], widths[:2], strict=True)]
            right = [text.rjust(width) for text, width in zip(row[2:], widths[2:], strict=True)]
            lines.append("  ".join([*left, *right]).rstrip())
        parts.append("\n".join([_threads_text(threads), *lines]))
    text = "\n\n".join([*parts, _losses(result).replace("**", ""), *_memory(result), *_notes(result)])
    return text.replace("µ", "u").replace("–", "-")  # a terminal may have nothing but ASCII


def write_readme(result: Result, path: Path) -> None:
    """Put the Markdown between the `MARKS` of its mode in a file, in place of what is there.

    Parameters
    ----------
    result : dict
        What `compare` returned.
    path : pathlib.Path
        The file; it is changed.

    Raises
    ------
    ValueError
        If the two marks are not in the file once each, in this order.
    """
    first, last = MARKS[result["mode"]]
    text = path.read_text(encoding="utf-8")
    before, start, rest = text.partition(first)
    _, end, after = rest.partition(last)
    if not start or not end or first in rest or last in after:
        raise ValueError(f"{path} must have the line {first} and after it the line {last}, once each")
    path.write_text(f"{before}{first}\n\n{markdown(result)}\n\n{last}{after}", encoding="utf-8")


def require_matplotlib() -> None:
    """Raise a ValueError that says what to install if matplotlib is not there."""
    if find_spec("matplotlib") is None:
        raise ValueError("a chart needs matplotlib: pip install matplotlib")


def write_chart(result: Result, path: Path) -> None:
    """Draw the ratio of every case on a logarithmic axis, a point for each number of threads.

    Parameters
    ----------
    result : dict
        What `compare` returned.
    path : pathlib.Path
        PNG file to write.

    Raises
    ------
    ValueError
        If matplotlib is not installed, or no case has a ratio.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rated = [entry for entry in result["results"] if entry["ratio"] is not None]
    if not rated:
        raise ValueError("there is no ratio to draw: it takes fastlstm and a peer")
    names = list(dict.fromkeys((entry["case"]["regime"], entry["case"]["name"]) for entry in rated))
    regimes = list(dict.fromkeys(regime for regime, _ in names))
    # One row a case and one for the heading of each regime, top to bottom.
    rows: dict[tuple[str, str], int] = {}
    headings: dict[str, int] = {}
    for regime in regimes:
        headings[regime] = len(rows) + len(headings)
        for name in (name for of, name in names if of == regime):
            rows[regime, name] = len(rows) + len(headings)
    height = len(rows) + len(headings)

    figure = Figure(figsize=(9, 1.6 + 0.27 * height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    by_row = axes.get_yaxis_transform()  # x from 0 to 1 across the axes, y in rows
    counts = _thread_counts(result)
    for index, threads in enumerate(counts):
        color, marker = COLORS[index % len(COLORS)], MARKERS[index % len(MARKERS)]
        column: dict[str, Any] = {"transform": by_row, "color": color, "size": 8, "ha": "right", "va": "center"}
        ratios = {
            rows[entry["case"]["regime"], entry["case"]["name"]]: entry["ratio"]
            for entry in rated
            if entry["threads"] == threads
        }
        apart = 0.2 * (index - (len(counts) - 1) / 2)
        heights = [row + apart for row in ratios]
        axes.scatter(
            list(ratios.values()), heights, s=30, marker=marker, color=color, zorder=3, label=_threads_text(threads)
        )
        for row, ratio in ratios.items():
            weight = "normal" if ratio >= 1 else "bold"
            axes.text(1.06 + 0.06 * index, row, _ratio_text(ratio), weight=weight, **column)
        for mean in result["geometric_means"]:
            if mean["threads"] == threads:
                row = headings[mean["regime"]]
                axes.text(1.06 + 0.06 * index, row, _ratio_text(mean["ratio"]), style="italic", **column)
    for regime, row in headings.items():
        axes.text(0.005, row, regime, transform=by_row, size=9, weight="bold", va="center")
        axes.text(0.995, row, "geometric mean", transform=by_row, size=8, style="italic", ha="right", va="center")
    lowest, highest = (choose(entry["ratio"] for entry in rated) for choose in (min, max))
    axes.set_xscale("log")
    axes.set_xlim(min(0.7, lowest / 1.2), max(1.5, highest * 1.2))
    axes.axvspan(axes.get_xlim()[0], 1, color="#c0392b", alpha=0.07, linewidth=0)
    axes.axvline(1, color="0.2", linewidth=1.2)
    ticks = [tick for tick in TICKS if axes.get_xlim()[0] <= tick <= axes.get_xlim()[1]]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.grid(axis="x", color="0.92", zorder=0)
    axes.set_yticks(list(rows.values()), [name for _, name in rows])
    axes.set_ylim(height - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_xlabel("times as fast as the fastest peer in the same run (left of 1: slower)")
    peers = [engine["title"] for engine in result["engines"].values() if engine["peer"]]
    axes.set_title(f"fastlstm beside {_listed(peers)}: {_what_text(result)}", fontsize=11, loc="left")
    axes.legend(loc="lower right", bbox_to_anchor=(1.02, 1), ncols=len(counts), frameon=False, fontsize=9)
    figure.savefig(path, dpi=144)


def _thread_counts(result: Result) -> list[int]:
    return list(dict.fromkeys(entry["threads"] for entry in result["results"]))


def _threads_text(threads: int) -> str:
    return "1 thread" if threads == 1 else f"{threads} threads"


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _what_text(result: Result) -> str:
    lengths = "" if result["lengths"] == "full" else ", lengths drawn evenly from 1..T"
    return f"{WHAT[result['mode']]}{' and '.join(result['dtypes'])}{lengths}"


def _ratio_text(ratio: float) -> str:
    """Return a ratio with two decimals, rounded down: 1.00 is never a loss.

    >>> _ratio_text(0.998), _ratio_text(0.29), _ratio_text(2.5)
    ('0.99', '0.29', '2.50')
    """
    return f"{math.floor(ratio * 100 + 1e-9) / 100:.2f}"


def _time_text(seconds: float) -> str:
    """Return a time with three digits and its unit.

    >>> _time_text(4.812e-6), _time_text(0.0316), _time_text(1.26)
    ('4.81 µs', '31.6 ms', '1.26 s')
    """
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size or unit == "µs":
            value = seconds / size
            break
    return f"{value:.{max(0, 2 - len(str(int(value))) + 1)}f} {unit}"


def _preamble(result: Result) -> str:
    machine, versions = result["machine"], dict(result["versions"])
    titles = {name: engine["title"] for name, engine in result["engines"].items()}
    listed = [
        f"{titles.get(name, name.capitalize() if name == 'python' else name)} {versions[name]}" for name in versions
    ]
    cores = "1 core" if machine["cores"] == 1 else f"{machine['cores']} cores"
    environment = "".join(f", {name}={value}" for name, value in machine["environment"].items())
    return "\n".join(
        [
            f"{machine['cpu']}, {cores}, {', '.join(machine['features'])}; {machine['system']}{environment}.",
            f"{', '.join(listed)}.",
            f"{_what_text(result)}; median of {result['rounds']} rounds; `{result['command']}`",
        ]
    )


def _table(result: Result, threads: int, bold: str) -> list[list[str]]:
    """Return the rows of the table for a number of threads, header first; each regime ends with its geometric mean."""
    engines = result["engines"]
    entries = [entry for entry in result["results"] if entry["threads"] == threads]
    means = {mean["regime"]: mean for mean in result["geometric_means"] if mean["threads"] == threads}
    with_peak = any(entry["share_of_peak"] is not None for entry in entries)
    header = ["case", "I, H, L, D, N, T", *(engine["title"] for engine in engines.values()), "ratio"]
    rows = [[*header, "of peak"] if with_peak else header]
    for regime in dict.fromkeys(entry["case"]["regime"] for entry in entries):
        for entry in entries:
            if entry["case"]["regime"] == regime:
                rows.append(_row(entry, engines, with_peak, bold))
        if regime in means:
            mean = means[regime]
            blank = [""] * len(engines)
            count = "1 case" if mean["cases"] == 1 else f"{mean['cases']} cases"
            row = [
                f"{bold}{regime}{bold}",
                f"geometric mean of {count}",
                *blank,
                f"{bold}{_ratio_text(mean['ratio'])}{bold}",
            ]
            rows.append([*row, ""] if with_peak else row)
    return rows


def _row(entry: dict[str, Any], engines: dict[str, Any], with_peak: bool, bold: str) -> list[str]:
    times = {name: entry["engines"].get(name, {}).get("median") for name in engines}
    raced = [seconds for name, seconds in times.items() if seconds and (engines[name]["peer"] or name == "fastlstm")]
    fastest = min(raced, default=None)
    cells = []
    for seconds in times.values():
        text = "–" if seconds is None else _time_text(seconds)
        cells.append(f"{bold}{text}{bold}" if seconds is not None and seconds == fastest else text)
    case = entry["case"]
    row = [case["name"], ", ".join(str(case[size]) for size in "IHLDNT"), *cells]
    row.append("–" if entry["ratio"] is None else _ratio_text(entry["ratio"]))
    if with_peak:
        row.append("–" if entry["share_of_peak"] is None else f"{entry['share_of_peak']:.0%}")
    return row


def _losses(result: Result) -> str:
    rated = [entry for entry in result["results"] if entry["ratio"] is not None]
    if not rated:
        return "No ratio: it takes fastlstm and a peer."
    slower = [entry for entry in rated if entry["ratio"] < 1]
    won = f"fastlstm is the fastest in {len(rated) - len(slower)} of {len(rated)}"
    if not slower:
        return f"{won}."
    lost = [
        f"{entry['case']['name']} with {_threads_text(entry['threads'])} ({_ratio_text(entry['ratio'])}, "
        f"{result['engines'][entry['fastest_peer']]['title']})"
        for entry in slower
    ]
    return f"{won} and **slower** in {len(slower)}: {', '.join(lost)}."


def _memory(result: Result) -> list[str]:
    """Return the memory of each case for which it was measured, a line each."""
    lines = []
    for entry in result["results"]:
        measured = {name: engine["memory"] for name, engine in entry["engines"].items() if engine.get("memory")}
        texts = [
            f"{result['engines'][name]['title']} "
            + (memory.get("reason") or f"{memory['calls'] / 1e6:.1f} MB (process {memory['peak'] / 1e6:.0f} MB)")
            for name, memory in measured.items()
        ]
        if texts:
            where = f"{entry['case']['name']} with {_threads_text(entry['threads'])}"
            lines.append(f"Peak memory of {where}, above what the process held before: {', '.join(texts)}.")
    return lines


def _notes(result: Result) -> list[str]:
    """Return what was left out, and why, one line each; the same reason at several cases is told once."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for entry in result["results"]:
        for name, engine in entry["engines"].items():
            if "reason" in engine:
                where = f"{entry['case']['name']} with {_threads_text(entry['threads'])}"
                reasons.setdefault((name, engine["reason"].splitlines()[0]), []).append(where)
    notes = [
        f"{result['engines'][name]['title']} left out of {', '.join(where)}: {reason}"
        for (name, reason), where in reasons.items()
    ]
    missing = result["not_installed"]
    return [*notes, *([f"Not installed: {', '.join(missing)}"] if missing else [])]
