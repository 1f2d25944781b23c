"""Every figure at its odd sizes: nothing is clipped, covered or missing."""

import json
import re
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from dylora import plot_loss, plot_maturity
from dylora.cli.main import main
from dylora.evaluation.figures.catalogue import FIGURES, draw
from dylora.evaluation.figures.curves import MOST_STAGES
from dylora.evaluation.figures.style import COLORS, LONGEST_NAME, MANY, styled
from dylora.evaluation.run_files import read_run
from run_folders import write_run, write_stream

OF_STREAMS = ("forgetting", "passed", "forgetting_map", "similarity", "novelty")
OF_RUNS = [name for name in FIGURES if name not in OF_STREAMS]


def faults(figure) -> list[str]:
    """What is wrong with where the parts of a figure lie."""
    with styled():
        renderer = FigureCanvasAgg(figure).get_renderer()
        figure.draw_without_rendering()
        found, (width, height) = [], figure.get_size_inches()
        box = figure.get_tightbbox(renderer)
        if box.x0 < -0.01 or box.y0 < -0.01 or box.x1 > width + 0.01 or box.y1 > height + 0.01:
            found.append(f"clipped: {box} of {width} × {height}")
        plots = [axes for axes in figure.axes if axes.get_visible()]
        for axes in plots:
            area, bar = axes.get_window_extent(renderer), axes.get_label() == "<colorbar>"
            if min(area.width, area.height) < (5 if bar else 60):
                found.append(f"too small: {area.width:.0f} × {area.height:.0f} pixels")
            for legend in figure.legends:
                if legend.get_window_extent(renderer).overlaps(axes.get_tightbbox(renderer)):
                    found.append("the legend covers axes")
        for legend in figure.legends:
            texts = [text.get_window_extent(renderer) for text in legend.get_texts()]
            if any(a.overlaps(b) for n, a in enumerate(texts) for b in texts[:n]):
                found.append("names of the legend overlap")
        return found


@pytest.mark.parametrize(
    ("experts", "sites", "sets"), [(1, 1, 1), (2, 96, 1), (24, 6, 20), (64, 96, 20), (64, 1, 2)]
)
def test_no_figure_of_a_run_is_clipped_or_covered(experts, sites, sets, tmp_path):
    sizes = {"experts": experts, "sites": sites, "sets": sets}
    run = read_run(write_run(tmp_path / "a", steps=4, set_name="a set of a long name, {}", **sizes))
    drawn = {name: draw(name, run) for name in OF_RUNS}
    assert [name for name, figure in drawn.items() if figure is None] == []
    assert {name: found for name, figure in drawn.items() if (found := faults(figure))} == {}


@pytest.mark.parametrize("skills", [1, 6, 20])
def test_no_figure_of_a_stream_is_clipped_or_covered(skills, tmp_path):
    run = read_run(write_stream(tmp_path / "a", skills))
    drawn = {name: draw(name, run) for name in ("loss", *OF_STREAMS) if name != "passed"}
    above = drawn["loss"].axes[0].child_axes[0]
    named = [f"skill {n}" for n in range(0, skills, 2 if skills > MOST_STAGES else 1)]
    assert [text.get_text() for text in above.get_xticklabels()] == named
    assert {name: found for name, figure in drawn.items() if (found := faults(figure))} == {}


def test_a_figure_that_is_cut_off_is_seen(tmp_path):
    figure = draw("usage", read_run(write_run(tmp_path / "a", steps=2, sets=1)))
    figure.set_size_inches(4.2, 0.4)
    figure.set_layout_engine("none")
    assert faults(figure) != []


def test_every_expert_has_a_line_though_an_earlier_one_was_retired(tmp_path):
    run = read_run(write_run(tmp_path / "a", experts=4, retired=1))
    lines = {line.get_label(): line for line in draw("maturity", run).axes[0].lines}
    assert list(lines) == ["expert 0", "expert 1", "expert 2", "expert 3"]
    ends = [line.get_xdata()[-1] for line in lines.values()]
    assert ends == [10, 5, 10, 10]
    run = read_run(write_run(tmp_path / "b", experts=4, retired=1, steps=1))  # never logged
    labels = [line.get_label() for line in draw("maturity", run).axes[0].lines]
    assert labels == ["expert 0", "expert 2", "expert 3"]


def test_lines_are_told_apart_by_colour_and_dashes_and_more_by_a_colour_bar(tmp_path):
    for count in (MANY, MANY + 1):
        axes = draw(
            "share", read_run(write_run(tmp_path / str(count), experts=count, steps=2))
        ).axes
        looks = {(str(line.get_color()), line.get_linestyle()) for line in axes[0].lines}
        assert len(looks) == count
        assert len(axes) == (1 if count == MANY else 2)


def test_the_colours_differ_for_readers_without_red_or_without_green():
    """By Viénot, Brettel and Mollon (1999), in linear RGB."""
    from matplotlib.colors import to_rgb

    def seen(color, without):
        red, green, blue = (one**2.2 for one in to_rgb(color))
        mixed = (
            (0.11238 * red + 0.88762 * green)
            if without == "red"
            else (0.29275 * red + 0.70725 * green)
        )
        return mixed ** (1 / 2.2), blue ** (1 / 2.2)

    for without in ("red", "green"):
        found = [seen(color, without) for color in COLORS]
        apart = [
            abs(a[0] - b[0]) + abs(a[1] - b[1]) for n, a in enumerate(found) for b in found[:n]
        ]
        assert min(apart) > 0.1


def test_a_map_shows_the_share_over_an_even_one_of_those_that_are_chosen(tmp_path):
    folder = write_run(tmp_path / "a", experts=4, sites=1, sets=1, shared=1)
    routing = json.loads((folder / "routing.json").read_text())
    routing["usage"] = {"x": [[0.5, 0.3, 0.1, 0.1]]}
    (folder / "routing.json").write_text(json.dumps(routing))
    figure = draw("usage", read_run(folder))
    assert figure.axes[0].images[0].get_array().flatten().tolist() == pytest.approx([1.8, 0.6, 0.6])
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["1", "2", "3"]


def test_names_that_mean_something_to_matplotlib_are_drawn_as_they_are(tmp_path):
    name = "_$x^2$ " + "long " * 9
    run = read_run(write_run(tmp_path / "a", sets=2, set_name=name + "{}"))
    figure = draw("loss", run)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels[1].startswith(r"\$x^2\$ long")
    assert max(map(len, labels)) <= LONGEST_NAME + 2
    assert faults(figure) == []


@pytest.mark.parametrize(
    ("form", "begins"), [("pdf", b"%PDF"), ("svg", b"<?xml"), ("png", b"\x89PNG")]
)
def test_the_command_writes_a_figure_in_each_format(form, begins, tmp_path, capsys):
    folder = write_run(tmp_path / "a", steps=2)
    command = ["plot", str(folder), "--figure", "usage", "loss", "--format", form]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    for name in ("usage", "loss"):
        assert (tmp_path / "out" / f"{name}.{form}").read_bytes().startswith(begins)
    assert f"usage.{form}, loss.{form}" in capsys.readouterr().out


def test_the_same_run_gives_the_same_file(tmp_path):
    folder = write_run(tmp_path / "a", steps=2)
    for out in ("1", "2"):
        command = ["plot", str(folder), "--figure", "loss", "--out", str(tmp_path / out)]
        for form in ("pdf", "svg"):
            assert main([*command, "--format", form]) == 0
    for form in ("pdf", "svg"):
        one, other = (tmp_path / out / f"loss.{form}" for out in ("1", "2"))
        assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--figure", "usge"], "there is no figure usge; did you mean 'usage'?"),
        (["--figure", "novelty"], "holds nothing of novelty"),
        (["--format", "gif"], "--format is 'gif', but must be"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_a_line(arguments, told, tmp_path, capsys):
    folder = write_run(tmp_path / "a", steps=2)
    assert main(["plot", str(folder), *arguments]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1


def test_a_folder_is_needed_and_has_to_hold_a_run(tmp_path, capsys):
    assert main(["plot"]) == 2
    assert "DIR is missing" in capsys.readouterr().err
    assert main(["plot", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err


def test_the_document_names_every_figure():
    text = (Path(__file__).parents[2] / "docs" / "report.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    assert sorted(re.findall(r"`(\w+)`", "".join(rows))) == sorted(FIGURES)


def test_the_functions_of_the_package_draw_from_a_file_of_metrics(tmp_path):
    metrics = write_run(tmp_path / "a", steps=2) / "metrics.jsonl"
    plot_loss(metrics, tmp_path / "loss.svg")
    plot_maturity(metrics, tmp_path / "maturity.svg")
    assert re.search("nats per target token", (tmp_path / "loss.svg").read_text())
    assert re.search("expert 3", (tmp_path / "maturity.svg").read_text())
