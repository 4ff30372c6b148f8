"""The figures of a report, drawn from records: throughput, where a step goes, bus bandwidth, peers. No pyplot."""

import io
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, NullFormatter, NullLocator

from benchmarks.growth import Growth
from benchmarks.tables import PARTS, PEER_NAMES, replicas_of

Points = Sequence[tuple[float, float]]

# Those of Okabe and Ito (jfly.uni-koeln.de/color), shifted until their contrast is 3:1 on white and on a dark page.
COLORS = ("#2380C0", "#D55E00", "#00966E", "#B8659A", "#7F7F7F")
_PART_COLORS = (*COLORS, "#B8860B", "#8A6FC8")
MARKERS = "osD^vP*"  # of another number than the colours: 35 curves differ
_INK = "#010101"  # text and axes; an SVG has currentColor in its place
_WIDTH = 5.4  # inches; on a phone the figure shrinks to two thirds and its text must still be read
_STYLE: dict[Any, Any] = {
    "text.parse_math": False,  # names are text, also those with dollar signs
    "svg.hashsalt": "distloop",  # the same records, the same bytes
    "font.size": 10,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "errorbar.capsize": 3,
    "lines.markersize": 5,
}


def throughput(title: str, curves: Mapping[str, Sequence[Mapping[str, Any]]], models: Mapping[str, Points]) -> Figure:
    """Draw throughput against replicas; `curves` are results by label, `models` what a fit says, by the same labels."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(title, 3.1)
        for label, results, color, marker in zip(curves, curves.values(), cycle(COLORS), cycle(MARKERS), strict=False):
            sizes = [replicas_of(result["case"]) for result in results]
            rate = results[0]["throughput"]["median"] / sizes[0]
            share = results[-1]["throughput"]["median"] / (rate * sizes[-1])
            name = f"{label}: {share:.0%} of ideal at {sizes[-1]}"
            _draw_intervals(axes, sizes, [result["throughput"] for result in results], name, color, marker)
            axes.plot([0, sizes[-1]], [0, rate * sizes[-1]], "--", color=color, linewidth=1, zorder=1)
            if label in models:
                axes.plot(*zip(*models[label], strict=True), color=color, linewidth=1.2, zorder=1)
        axes.plot([], [], "--", color=_INK, linewidth=1, label="ideal: rate of the smallest, times replicas")
        if models:
            axes.plot([], [], color=_INK, linewidth=1.2, label="scaling model")
        largest = max(replicas_of(result["case"]) for results in curves.values() for result in results)
        axes.set_xticks(
            _apart({replicas_of(result["case"]) for results in curves.values() for result in results}, largest / 20)
        )
        axes.set(xlim=(0, largest * 1.05), ylim=(0, None), xlabel="replicas")
        unit = next(iter(curves.values()))[0]["unit"]
        axes.set_ylabel(f"{unit} a second")
        axes.yaxis.set_major_formatter(EngFormatter(sep=" "))
        _add_legend(figure)
    return figure


def step_time(title: str, bars: Sequence[tuple[str, Mapping[str, Any]]]) -> Figure:
    """Draw where the time of a step goes: `bars` are labels and results."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(title, 1.0 + 0.5 * len(bars))
        longest = max(result["step_ms"]["median"] for _, result in bars)
        measured = [part for part in PARTS if any(_part(result, part) is not None for _, result in bars)]
        for row, (label, result) in enumerate(bars):
            begin = 0.0
            for part, color in zip(PARTS, _PART_COLORS, strict=True):
                width = _part(result, part) or 0.0
                axes.barh(row, width, left=begin, height=0.4, color=color)
                begin += width
            missing = [PARTS[part] for part in measured if _part(result, part) is None and _has(result["case"], part)]
            note = f" ({', '.join(missing)} not measured)" if missing else ""
            axes.text(0, row - 0.27, textwrap.shorten(f"{label}{note}", 72, placeholder="..."), fontsize=9)
            axes.text(begin + longest / 80, row, f"{result['step_ms']['median']:.3g} ms", va="center", fontsize=9)
        axes.set(xlim=(0, longest * 1.15), ylim=(len(bars) - 0.6, -0.75), yticks=[], xlabel="ms a step")
        axes.spines.left.set_visible(False)
        for part, color in zip(PARTS, _PART_COLORS, strict=True):
            if part in measured:
                axes.bar(0, 0, color=color, label=PARTS[part])
        _add_legend(figure)
    return figure


def _part(result: Mapping[str, Any], part: str) -> float | None:
    return result["breakdown_ms"].get(part)


def _has(case: Mapping[str, Any], part: str) -> bool:
    """Return whether a step of the case can have the part at all."""
    if part == "comm_exposed":
        return replicas_of(case) > 1
    return case["mode"] == "e2e" or part not in ("eval", "save")


def growth(title: str, series: Sequence[Growth]) -> Figure:
    """Draw milliseconds a step against one number, both on logarithmic scales."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(title, 3.1)
        axes.set(xscale="log", yscale="log", xlabel=series[0].number, ylabel="ms a step")
        for one, color, marker in zip(series, cycle(COLORS), cycle(MARKERS), strict=False):
            places, steps = zip(*one.points, strict=True)
            _draw_intervals(axes, places, steps, one.fixed, color, marker)
            axes.plot(places, [step["median"] for step in steps], color=color, linewidth=0.8, zorder=1)
        axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
        axes.yaxis.set_major_formatter(EngFormatter(sep=" "))
        axes.yaxis.set_minor_formatter(NullFormatter())
        _add_legend(figure)
    return figure


def bus_bandwidth(
    title: str, curves: Mapping[str, Sequence[Mapping[str, Any]]], models: Mapping[str, Points]
) -> Figure:
    """Draw the bus bandwidth of all-reduces against their size; `curves` are `comm_point` lines by label."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(title, 3.1)
        axes.set_xscale("log", base=2)
        for label, points, color, marker in zip(curves, curves.values(), cycle(COLORS), cycle(MARKERS), strict=False):
            intervals = [_bandwidth(point) for point in points]
            _draw_intervals(axes, [point["bytes"] for point in points], intervals, label, color, marker)
            if label in models:
                axes.plot(*zip(*models[label], strict=True), color=color, linewidth=1.2, zorder=1)
        if models:
            axes.plot([], [], color=_INK, linewidth=1.2, label="fit")
        axes.set(ylim=(0, None), xlabel="bytes of an all-reduce", ylabel="bus bandwidth")
        sizes = [point["bytes"] for points in curves.values() for point in points]
        axes.set_xticks(_ticks_of_bytes(min(sizes), max(sizes)), minor=False)
        axes.xaxis.set_major_formatter(lambda size, _: _bytes(size))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(EngFormatter("B/s", sep=" "))
        _add_legend(figure)
    return figure


def peers(title: str, results: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw the throughput of peers, relative to the hand-written loop where it has one; the failed come last."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(title, 1.1 + 0.36 * len(results))
        measured = [result for result in results if result["throughput"]]
        failed = [result for result in results if not result["throughput"]]
        loops = [result["throughput"]["median"] for result in measured if _peer(result) == "loop"]
        for row, result in enumerate(measured):
            rate = result["throughput"]
            middle, low, high = (rate[name] / (loops[0] if loops else 1.0) for name in ("median", "low", "high"))
            color = COLORS[1] if _peer(result) == "distloop" else COLORS[0]
            axes.errorbar(middle, row, xerr=[[middle - low], [high - middle]], fmt="o", color=color)
        for row, result in enumerate(failed, len(measured)):
            error = textwrap.fill(f"failed: {result['error']}", 58, max_lines=2)
            axes.text(0.02, row, error, transform=axes.get_yaxis_transform(), va="center", fontsize=8.5)
        if loops:
            axes.plot([1, 1], [-0.5, len(measured) - 0.5], ":", color=_INK, linewidth=0.8)
            axes.set_xlabel("throughput / median of the hand-written loop")
        elif measured:
            axes.set_xlabel(f"{measured[0]['unit']} a second")
            axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
        axes.set_yticks(range(len(results)), [PEER_NAMES[_peer(result)] for result in measured + failed])
        axes.set_ylim(len(results) - 0.5, -0.5)
        axes.grid(False, axis="y")
    return figure


def _peer(result: Mapping[str, Any]) -> str:
    return result["case"]["peer"]


def to_png(figure: Figure) -> bytes:
    """Return a PNG on white, to be read on any background."""
    content = io.BytesIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(content, format="png", dpi=200, facecolor="white")
    return content.getvalue()


def to_svg(figure: Figure) -> str:
    """Return an SVG to put into a page: no background, and text and axes in the colour of the text around it."""
    content = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(content, format="svg", transparent=True, metadata={"Date": None})
    svg = content.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    # Comments repeat the text; ids of groups (axes_1) would be in a page more than once, and nothing refers to them.
    return re.sub(r' id="[A-Za-z0-9.]+_[0-9]+"|<!--.*?-->\n?|<metadata>.*?</metadata>', "", svg, flags=re.DOTALL)


def _figure(title: str, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    axes = figure.add_subplot()
    wrapped = textwrap.fill(title, 60, max_lines=2)
    figure.suptitle(wrapped, x=0.015, ha="left", fontsize=11, fontweight="bold")
    axes.grid(alpha=0.15, color=_INK)
    axes.set_axisbelow(True)
    return figure, axes


def _draw_intervals(
    axes: Axes, places: Sequence[float], intervals: Sequence[Mapping[str, Any]], label: str, color: str, marker: str
) -> None:
    middles = [interval["median"] for interval in intervals]
    below = [interval["median"] - interval["low"] for interval in intervals]
    above = [interval["high"] - interval["median"] for interval in intervals]
    axes.errorbar(places, middles, yerr=[below, above], fmt=marker, color=color, label=label)


def _add_legend(figure: Figure) -> None:
    """Add a legend below; the figure grows by its height."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    wrapped = [textwrap.fill(label, 64, max_lines=2) for label in labels]
    columns = 2 if max(map(len, labels)) < 30 else 1
    lines = sum(text.count("\n") + 1 for text in wrapped) / columns
    figure.set_figheight(figure.get_figheight() + 0.19 * math.ceil(lines))
    figure.legend(handles, wrapped, loc="outside lower left", ncols=columns, fontsize=9)


def _apart(places: set[int], distance: float) -> list[int]:
    """Return the places, from the largest down, but for those too near to one that is kept."""
    kept: list[int] = []
    for place in sorted(places, reverse=True):
        if not kept or kept[-1] - place >= distance:
            kept.append(place)
    return kept


def _bandwidth(point: Mapping[str, Any]) -> dict[str, float]:
    """Return the interval of `busbw`, in bytes a second: that of the time, turned over."""
    seconds = point["seconds"]
    rates = {name: point["busbw"] * seconds["median"] / seconds[name] for name in ("low", "high")}
    return {"median": point["busbw"], "low": rates["high"], "high": rates["low"]}


def _ticks_of_bytes(smallest: int, largest: int) -> list[int]:
    """Return powers of two, at most nine."""
    first, last = math.floor(math.log2(smallest)), math.ceil(math.log2(largest))
    return [2**power for power in range(first, last + 1, 1 + (last - first) // 8)]


def _bytes(size: float) -> str:
    power = min(int(math.log2(size)) // 10, 3) if size >= 1 else 0
    return f"{size / 1024**power:g} {('B', 'KiB', 'MiB', 'GiB')[power]}"
