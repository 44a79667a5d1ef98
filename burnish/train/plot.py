"""The curves of a run as pictures, from `TrainerState.log_history`.

Drawn with matplotlib's objects on its Agg canvas: no window, no pyplot, no setting that would outlive the call.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#1f5fa8", "#d9730d", "#2e7d4f", "#8a3fa0", "#b3372f")  # a colour a curve, then from the first again
GREY = "#5f6368"
# For run names and data sets in Chinese, which matplotlib's own font cannot draw: Linux, macOS, Windows
CHINESE = ("Noto Sans CJK SC", "Source Han Sans SC", "WenQuanYi Micro Hei", "PingFang SC", "Microsoft YaHei", "SimHei")


@dataclass(frozen=True)
class Curve:
    name: str  # of the evaluated set; "" where there is one
    steps: list[int]
    values: list[float]


def plot_loss(output_dir: str | os.PathLike[str], log_history: Sequence[Mapping[str, Any]]) -> list[Path]:
    """Draw what there is, and → the pictures that were written into `output_dir`.

    training_loss.png            the loss at every log step, faint, and its exponential moving average (`smooth`)
    training_eval_loss.png       a curve for every evaluated set, its lowest point marked
    training_eval_accuracy.png   the same for accuracy, its highest point marked
    """
    wanted = (
        ("loss", "", "training_loss.png", "training loss", _paint_training),
        ("loss", "eval_", "training_eval_loss.png", "evaluation loss", partial(_paint_evaluation, best=min)),
        (
            "accuracy",
            "eval_",
            "training_eval_accuracy.png",
            "evaluation accuracy",
            partial(_paint_evaluation, best=max),
        ),
    )
    written = []
    for metric, prefix, file, label, paint in wanted:
        if curves := _curves(log_history, prefix, metric):
            _draw(Path(output_dir) / file, label, curves, paint)
            written.append(Path(output_dir) / file)
    return written


def smooth(values: Sequence[float]) -> list[float]:
    """Exponential moving average: s(t) = (1 - a)·s(t-1) + a·x(t), divided by 1 - (1 - a)^t.

    The division takes out that the sum began at 0, so the first value is the first loss. a = 2 / (span + 1) makes the
    average reach back about `span` points: a sixteenth of all, and at least 3.
    """
    alpha = 2 / (max(3, len(values) / 16) + 1)
    average, weight, smoothed = 0.0, 0.0, []
    for value in values:
        average = (1 - alpha) * average + alpha * value
        weight = (1 - alpha) * weight + alpha
        smoothed.append(average / weight)
    return smoothed


def _curves(log_history: Iterable[Mapping[str, Any]], prefix: str, metric: str) -> list[Curve]:
    """`eval_loss` gives a curve without a name, `eval_law_loss` the curve "law". What is not finite is no point."""
    points: dict[str, dict[int, float]] = {}
    for logs in log_history:
        for key, value in logs.items():
            if key != prefix + metric and not (prefix and key.startswith(prefix) and key.endswith(f"_{metric}")):
                continue
            if math.isfinite(value):
                name = key.removeprefix(prefix).removesuffix(metric).removesuffix("_")
                points.setdefault(name, {})[logs["step"]] = value  # a step logged again, after resuming, counts once
    return [
        Curve(name, sorted(by_step), [by_step[step] for step in sorted(by_step)]) for name, by_step in points.items()
    ]


def _draw(path: Path, label: str, curves: list[Curve], paint: Callable[[Axes, list[Curve]], None]) -> None:
    """One picture: 1,200 by 675 pixels, to be read in a README as well as on a slide."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    path.parent.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_axisbelow(True)
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=11, colors=GREY)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    axes.margins(y=0.12)
    paint(axes, curves)
    if len({step for curve in curves for step in curve.steps}) == 1:
        axes.set_xlim(curves[0].steps[0] - 1, curves[0].steps[0] + 1)
    run = path.parent.resolve().name
    axes.set_title(f"{run} · {label}" if _fonts(run) else label, fontsize=14, loc="left", fontfamily=_fonts(run))
    axes.set_xlabel("optimizer step", fontsize=12, color=GREY)
    axes.set_ylabel(label, fontsize=12, color=GREY)
    figure.savefig(path)


def _paint_training(axes: Axes, curves: list[Curve]) -> None:
    steps, values = curves[0].steps, curves[0].values
    smoothed = smooth(values)
    marker = "o" if len(steps) == 1 else None
    axes.plot(steps, values, color=COLOURS[0], alpha=0.3, linewidth=1.2, marker=marker, label="each log step")
    axes.plot(steps, smoothed, color=COLOURS[0], linewidth=2.2, marker=marker, label="moving average, its end marked")
    _point_out(axes, steps[-1], smoothed[-1], f"{smoothed[-1]:.3f}", COLOURS[0])
    axes.legend(frameon=False, fontsize=11)


def _paint_evaluation(axes: Axes, curves: list[Curve], best: Callable[[list[float]], float]) -> None:
    for number, curve in enumerate(curves):
        colour = COLOURS[number % len(COLOURS)]
        label = curve.name if _fonts(curve.name) else f"set {number + 1}"
        axes.plot(curve.steps, curve.values, color=colour, linewidth=2, marker="o", markersize=5, label=label)
        value = best(curve.values)
        step = curve.steps[curve.values.index(value)]
        _point_out(axes, step, value, f"best {value:.3f} at step {step:,}", colour, below=best is min)
    if len(curves) > 1:
        axes.legend(frameon=False, prop={"family": _fonts("".join(curve.name for curve in curves)), "size": 11})


def _point_out(axes: Axes, step: int, value: float, text: str, colour: str, *, below: bool = False) -> None:
    """A ring and its value, on the side of the curve where there is room, within the picture."""
    axes.plot([step], [value], marker="o", markersize=9, color=colour, markerfacecolor="white", markeredgewidth=2)
    first, last = axes.dataLim.intervalx
    at = (step - first) / (last - first) if last > first else 0.5
    side = "left" if at < 0.2 else "right" if at > 0.8 else "center"
    offset = (0, -20) if below else (0, 10)
    axes.annotate(text, (step, value), offset, textcoords="offset points", ha=side, color=colour, fontsize=11)


def _fonts(text: str) -> list[str]:
    """Installed fonts that can draw `text` between them; none where some character would come out as an empty box."""
    from matplotlib import font_manager

    installed = set(font_manager.get_font_names())
    families = ["DejaVu Sans", *(name for name in CHINESE if name in installed)]
    drawn = set[int]()
    for family in families:
        drawn |= font_manager.get_font(font_manager.findfont(family)).get_charmap().keys()
    return families if all(ord(character) in drawn for character in text) else []
