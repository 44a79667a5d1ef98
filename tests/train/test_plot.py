"""The pictures, and the numbers in them. What they look like was looked at."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
from matplotlib.figure import Figure

from burnish.train.plot import plot_loss, smooth

TRAINING: list[dict[str, Any]] = [{"loss": 3.0 / step, "learning_rate": 1e-3, "step": step} for step in range(1, 21)]
EVALUATION: list[dict[str, Any]] = [
    {"eval_loss": 2.0, "eval_accuracy": 0.5, "eval_runtime": 1.0, "step": 10},
    {"eval_loss": 1.5, "eval_accuracy": 0.7, "eval_runtime": 1.0, "step": 15},
    {"eval_loss": 1.8, "eval_accuracy": 0.6, "eval_runtime": 1.0, "step": 20},
]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Every figure at the moment it is saved."""
    saved: list[Figure] = []
    save = Figure.savefig

    def keep(self: Figure, *args: Any, **options: Any) -> None:
        saved.append(self)
        save(self, *args, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    return saved


def lines_of(figure: Figure) -> dict[str, list[float]]:
    return {str(line.get_label()): [float(y) for y in line.get_ydata()] for line in figure.axes[0].lines}  # type: ignore[union-attr]


def texts_of(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def test_a_run_with_evaluations_leaves_three_pictures(tmp_path: Path):
    written = plot_loss(tmp_path / "run", [*TRAINING, *EVALUATION, {"train_loss": 1.0, "step": 20}])
    names = ["training_loss.png", "training_eval_loss.png", "training_eval_accuracy.png"]
    assert written == [tmp_path / "run" / name for name in names]
    for path in written:
        header = path.read_bytes()[:24]
        assert header[:8] == b"\x89PNG\r\n\x1a\n"
        assert (int.from_bytes(header[16:20], "big"), int.from_bytes(header[20:24], "big")) == (1200, 675)


def test_the_picture_holds_every_loss_and_their_average(tmp_path: Path, figures: list[Figure]):
    plot_loss(tmp_path / "my-run", TRAINING)
    [figure] = figures
    losses = [logs["loss"] for logs in TRAINING]
    assert lines_of(figure)["each log step"] == losses
    assert lines_of(figure)["moving average, its end marked"] == smooth(losses)
    assert texts_of(figure) == [f"{smooth(losses)[-1]:.3f}"]
    axes = figure.axes[0]
    assert axes.get_title(loc="left") == "my-run · training loss"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("optimizer step", "training loss")


def test_the_best_evaluation_is_pointed_out(tmp_path: Path, figures: list[Figure]):
    plot_loss(tmp_path, EVALUATION)
    loss, accuracy = figures
    assert texts_of(loss) == ["best 1.500 at step 15"]
    assert texts_of(accuracy) == ["best 0.700 at step 15"]


def test_every_evaluated_set_has_a_curve(tmp_path: Path, figures: list[Figure]):
    history = [
        {"eval_law_loss": 2.0, "step": 5},
        {"eval_my_chat_loss": 3.0, "step": 5},
        {"eval_law_loss": 1.0, "step": 9},
    ]
    plot_loss(tmp_path, history)
    [figure] = figures
    curves = lines_of(figure)
    assert curves["law"] == [2.0, 1.0]
    assert curves["my_chat"] == [3.0]
    legend = figure.axes[0].get_legend()
    assert legend is not None and [text.get_text() for text in legend.get_texts()] == ["law", "my_chat"]


def test_one_point_is_a_picture_and_none_is_no_picture(tmp_path: Path):
    assert len(plot_loss(tmp_path, TRAINING[:1])) == 1
    assert plot_loss(tmp_path, []) == []
    assert plot_loss(tmp_path, [{"loss": math.nan, "step": 1}]) == []


def test_a_step_logged_again_after_resuming_counts_once(tmp_path: Path, figures: list[Figure]):
    plot_loss(tmp_path, [{"loss": 5.0, "step": 2}, {"loss": 9.0, "step": 1}, {"loss": 4.0, "step": 2}])
    assert lines_of(figures[0])["each log step"] == [9.0, 4.0]


def test_a_name_that_no_font_can_draw_is_left_out(tmp_path: Path, figures: list[Figure]):
    plot_loss(tmp_path / "run-\U000f0000", TRAINING)  # private use: in no font; drawn, it would warn, and so fail here
    assert figures[0].axes[0].get_title(loc="left") == "training loss"


def test_the_average_of_a_constant_is_the_constant_and_the_first_is_the_first():
    assert smooth([2.0] * 50) == pytest.approx([2.0] * 50)
    assert smooth([7.0, 1.0, 1.0])[0] == pytest.approx(7.0)
    assert smooth([]) == []


def test_the_average_of_noise_is_quieter_than_the_noise():
    noise = [float((17 * i) % 11) for i in range(400)]
    smoothed = smooth(noise)[100:]
    assert max(smoothed) - min(smoothed) < 0.3 * (max(noise) - min(noise))
    assert sum(smoothed) / len(smoothed) == pytest.approx(5.0, abs=0.1)


def test_drawing_changes_no_setting_and_loads_no_pyplot(tmp_path: Path):
    before = dict(mpl.rcParams)
    plot_loss(tmp_path, TRAINING)
    assert dict(mpl.rcParams) == before
    code = (
        "import sys; from burnish.train.plot import plot_loss; assert 'matplotlib' not in sys.modules;"
        f"plot_loss({str(tmp_path)!r}, [{{'loss': 1.0, 'step': 1}}]); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
