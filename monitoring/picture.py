"""Draws the dashboard from what a Prometheus has: `python monitoring/picture.py --url http://127.0.0.1:9090 out.png`.

Not Grafana, but its panels: titles, places, queries, legends and units are those of the dashboard's file.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import urlopen

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator

DASHBOARD = Path(__file__).parent / "grafana/dashboards/ecapa-triton.json"
WIDTH, CELL = 16.0, 0.34  # inches: of the whole, of a row of Grafana's grid, which has 24 columns
COLORS = ["#73bf69", "#f2cc0c", "#8ab8ff", "#ff780a", "#f2495c", "#b877d9", "#5794f2"]
STATES = {"green": "#1f7a3a", "red": "#b3262e"}
Series = list[tuple[str, list[float], list[float]]]


def query(url: str, target: dict[str, Any], begin: float, end: float, step: float) -> Series:
    """Name, times and values of each series; an instant query of Grafana's is the last value of a range here."""
    expression = target["expr"].replace("$__rate_interval", f"{4 * step:.0f}s")
    asked = urlencode({"query": expression, "start": begin, "end": end, "step": step})
    with urlopen(f"{url}/api/v1/query_range?{asked}", timeout=30) as response:
        found = json.load(response)["data"]["result"]
    named = []
    for one in found:
        name = target["legendFormat"]
        for label, value in one["metric"].items():
            name = name.replace("{{" + label + "}}", value)
        times, values = zip(*one["values"], strict=True)
        named.append((name, [at - end for at in times], [float(value) for value in values]))
    return named


def readable(value: float, unit: str) -> str:
    """A value as Grafana writes it, for the units that the dashboard has."""
    if value == 0 and unit != "bool_yes_no":
        return "0"
    if unit == "percentunit":
        return f"{100 * value:.3g} %"
    if unit == "bytes":
        power = min(4, int(math.log2(value) // 10)) if value >= 1 else 0
        return f"{value / 1024**power:.3g} {['B', 'KiB', 'MiB', 'GiB', 'TiB'][power]}"
    if unit in ("µs", "s"):
        seconds = value * (1e-6 if unit == "µs" else 1)
        for size, name in (1, "s"), (1e-3, "ms"), (0, "µs"):
            if seconds >= size:
                return f"{seconds / (size or 1e-6):.3g} {name}"
    if unit == "bool_yes_no":
        return "Yes" if value else "No"
    name = {"reqps": " req/s", "watt": " W"}.get(unit, unit.removeprefix("suffix:") if ":" in unit else "")
    return f"{value:,.0f}{name}" if value >= 1000 else f"{value:.3g}{name}"


def draw_stat(axes: Axes, panel: dict[str, Any], series: Series, end_within: float) -> None:
    """The last values, each on its colour where the panel has colours."""
    defaults, options = panel["fieldConfig"]["defaults"], panel["options"]
    last = [(name, values[-1]) for name, times, values in series if times[-1] > -end_within]
    tiles = [
        (name if options["textMode"] == "name" else readable(value, defaults["unit"]), name, value)
        for name, value in last
    ]
    tiles = tiles or [(defaults.get("noValue", "No data"), "", -math.inf)]
    axes.set(xlim=(0, len(tiles)), ylim=(0, 1), xticks=[], yticks=[])
    for place, (text, name, value) in enumerate(tiles):
        if options["colorMode"] == "background":
            steps = defaults["thresholds"]["steps"]
            color = [step["color"] for step in steps if step["value"] is None or value >= step["value"]][-1]
            axes.axvspan(place + 0.02, place + 0.98, 0.05, 0.95, color=STATES[color])
        under = name if options["textMode"] == "value_and_name" else ""
        axes.text(place + 0.5, 0.62 if under else 0.5, text, ha="center", va="center", fontsize=15, color="white")
        axes.text(place + 0.5, 0.22, under, ha="center", va="center", fontsize=9, color="#ccccdc")


def draw_lines(axes: Axes, panel: dict[str, Any], series: Series, begin: float) -> None:
    """The series over time, stacked where the panel says so."""
    defaults = panel["fieldConfig"]["defaults"]
    unit = defaults["unit"]
    axes.set_xlim(begin / 60, 0)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda minutes, _: f"{minutes:.0f} min" if minutes else "now"))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: readable(value, unit)))
    axes.grid(color="#2c3235", linewidth=0.6)
    if not series:
        why = "no GPU on this host" if "nv_gpu_" in panel["targets"][0]["expr"] else "No data"
        axes.text(0.5, 0.5, why, transform=axes.transAxes, ha="center", va="center", color="#8e8e9a")
        axes.set(yticks=[], xticks=[])
        return
    stacked = "stacking" in defaults["custom"]
    base: dict[float, float] = {}
    for number, (name, times, values) in enumerate(series):
        color = COLORS[number % len(COLORS)]
        below = [base.get(at, 0.0) if stacked else 0.0 for at in times]
        above = [low + value for low, value in zip(below, values, strict=True)]
        base |= dict(zip(times, above, strict=True))
        minutes = [at / 60 for at in times]
        axes.fill_between(minutes, below, above, color=color, alpha=0.4 if stacked else 0.1, linewidth=0)
        axes.plot(minutes, above, color=color, linewidth=1.2, label=name)
    axes.set_ylim(0, defaults.get("max"))
    axes.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=4, fontsize=8, frameon=False, labelcolor="#ccccdc"
    )


def main() -> None:
    """Draws one picture."""
    parser = argparse.ArgumentParser(description="Draws the dashboard from what a Prometheus has.")
    parser.add_argument("picture", type=Path)
    parser.add_argument("--url", default="http://127.0.0.1:9090", help="of Prometheus (%(default)s)")
    parser.add_argument("--minutes", type=float, default=60, help="up to now (%(default)s)")
    parser.add_argument(
        "--step", type=float, default=15, help="seconds between two points, scrape_interval (%(default)s)"
    )
    options = parser.parse_args()
    dashboard = json.loads(DASHBOARD.read_text())
    rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in dashboard["panels"])
    end, span = time.time(), 60 * options.minutes
    plt.style.use("dark_background")
    figure = plt.figure(figsize=(WIDTH, CELL * rows), facecolor="#111217")
    for panel in dashboard["panels"]:
        at = panel["gridPos"]
        lines = panel["type"] == "timeseries"
        left, low, right, high = (0.75, 0.66, 0.2, 0.4) if lines else (0.12, 0.12, 0.12, 0.4)  # inches
        x, y = at["x"] * WIDTH / 24 + left, (rows - at["y"] - at["h"]) * CELL + low
        width, height = at["w"] * WIDTH / 24 - left - right, at["h"] * CELL - low - high
        corner = (at["x"] / 24 + 0.003, (rows - at["y"] - at["h"]) / rows + 0.003)
        size = (at["w"] / 24 - 0.006, at["h"] / rows - 0.006)
        figure.add_artist(Rectangle(corner, *size, transform=figure.transFigure, color="#181b1f", zorder=-1))
        place = (x / WIDTH, y / (CELL * rows), width / WIDTH, height / (CELL * rows))
        axes = figure.add_axes(place, facecolor="#181b1f")
        axes.tick_params(labelsize=8, colors="#8e8e9a", length=0)
        for side in axes.spines.values():
            side.set_visible(False)
        axes.set_title(panel["title"], x=(0.15 - left) / width, ha="left", fontsize=10, color="#ccccdc")
        targets = panel["targets"]
        series = [one for target in targets for one in query(options.url, target, end - span, end, options.step)]
        if lines:
            draw_lines(axes, panel, series, -span)
        else:
            draw_stat(axes, panel, series, 2 * options.step)
    figure.savefig(options.picture, dpi=75, facecolor=figure.get_facecolor())


if __name__ == "__main__":
    main()
