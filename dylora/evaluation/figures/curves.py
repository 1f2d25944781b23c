"""Figures over the steps of a run: losses, rates, speed, experts, routing.

Each takes a run and returns a figure, or None where the run has nothing to draw.
"""

import math
from collections.abc import Mapping
from typing import Any

from dylora.evaluation.figures import style
from dylora.evaluation.run_files import Points, RunFiles

NATS = "loss (nats per target token)"
MOST_STAGES = 14  # of a stream that are named above a figure


def loss(run: RunFiles, *, log: bool = False) -> Any:
    """Training loss, validation loss of all sets and of each; circles at step 0 are the base's."""
    train, every = run.points("train/lm_loss"), run.points("val/loss")
    sets = _set_losses(run)
    if not (train or every):
        return None
    figure, grid = style.new_figure()
    axes = grid[0, 0]
    if train:
        axes.plot(*zip(*train, strict=True), label="training", color="#8c8c8c", linewidth=0.8)
    style.draw_curves(figure, axes, sets, counted="set")
    base, total = _base_losses(run)
    for index, name in enumerate(sets):
        if name in base:
            color = style.line_style(index, len(sets))["color"]
            axes.plot(0, base[name], "o", color=color, fillstyle="none", label="_")
    if every and len(sets) != 1:
        shape = "o" if len(every) < 40 else None
        axes.plot(*zip(*every, strict=True), label="all sets", color=style.INK, marker=shape)
    if total is not None:
        axes.axhline(total, color=style.INK, linestyle=":", label="base, all sets", linewidth=1)
    _draw_boundaries(axes, run)
    _name_stages(axes, run)
    limits: dict[str, Any] = {"yscale": "log"} if log else {"ylim": (0, None)}
    return style.finish_curves(figure, axes, "step", NATS, **limits)


def loss_log(run: RunFiles) -> Any:
    """Likewise, with a logarithmic axis."""
    return loss(run, log=True)


def rate(run: RunFiles) -> Any:
    """Learning rate of the experts."""
    return _one_curve(run, "train/lr", "learning rate of experts")


def speed(run: RunFiles) -> Any:
    """Tokens a second, means since the row before."""
    return _one_curve(run, "train/tokens_per_s", "tokens per second")


def memory(run: RunFiles) -> Any:
    """Peak memory so far, of the GPU where there is one."""
    return _one_curve(run, "system/mem_gb", "peak memory (GB)")


def gradient(run: RunFiles) -> Any:
    """Norm of all gradients before clipping."""
    points = {"gradient norm": run.points("train/grad_norm")}
    return _curves(run, points, "gradient norm before clipping", yscale="log")


def maturity(run: RunFiles) -> Any:
    """Maturity of each expert; a line ends where its expert was retired."""
    return _of_experts(run, "maturity", "maturity", ylim=(-0.02, 1.05))


def share(run: RunFiles) -> Any:
    """Each expert's share of the gate sum in one step."""
    return _of_experts(run, "load", "share of the gates", ylim=(0, None))


def tokens(run: RunFiles) -> Any:
    """Sum of each expert's gates over the target tokens so far."""
    return _of_experts(run, "tokens", "target tokens, by gate", ylim=(0, None))


def expert_gradient(run: RunFiles) -> Any:
    """Gradient norm of each expert before clipping."""
    return _of_experts(run, "grad_norm", "gradient norm before clipping", yscale="log")


def entropy(run: RunFiles) -> Any:
    """Mean entropy of a token's routing over sites, and its bound, the log of the experts."""
    points = run.points("router/entropy")
    count = len(run.expert_numbers("maturity")) - run.shared
    lines = [(math.log(count), f"even over {count} experts")] if count > 1 else []
    return _curves(run, {"mean over sites": points}, "entropy (nats)", lines, ylim=(-0.02, None))


def information(run: RunFiles) -> Any:
    """What the chosen expert says about the set: 0 where all sets are routed alike."""
    count, sets = len(_set_losses(run)), run.points("val/information")
    lines = [(0.0, "sets routed alike")]
    lines += [(math.log(count), "an expert of its own for each")] if count > 1 else []
    return _curves(run, {"mean over sites": sets}, "information (nats)", lines)


def active(run: RunFiles) -> Any:
    """Experts that a token uses in the mean: dense at first, sparse later."""
    points = run.points("router/active_experts")
    return _curves(run, {"experts a token": points}, "experts a token uses", ylim=(0, None))


def collapse(run: RunFiles) -> Any:
    """The largest share that any expert has at any site; 1: a site uses one expert alone."""
    found = {
        "largest at any site": run.points("router/max_usage"),
        "mean over sites": run.points("router/top1_share"),
    }
    return _curves(run, found, "share", ylim=(0, 1.05))


def dead(run: RunFiles) -> Any:
    """Experts that are hardly chosen at a site, summed over sites."""
    points = run.points("router/dead_experts")
    top = max((count for _, count in points), default=0) or 1  # none, the whole run: at the axis
    found = {"dead experts": points}
    return _curves(run, found, "dead experts, all sites", ylim=(-0.03 * top, 1.06 * top))


def sparse_cost(run: RunFiles) -> Any:
    """By how much the loss would grow if all experts were sparse now."""
    points, lines = run.points("val/sparse_cost"), [(0.0, "costs nothing")]
    return _curves(run, {"cost": points}, "cost of sparsity now (nats)", lines)


def compare_losses(runs: Mapping[str, list[RunFiles]], *, log: bool = False) -> Any:
    """Validation loss of several runs; runs of one group, such as seeds, have one colour."""
    figure, grid = style.new_figure()
    axes = grid[0, 0]
    for index, (name, group) in enumerate(runs.items()):
        for place, run in enumerate(group):
            points = run.points("val/loss")
            if points:
                label = style.shorten(name) if place == 0 else "_"
                looks = style.line_style(index, len(runs)) | {"marker": "o"}
                axes.plot(*zip(*points, strict=True), label=label, **looks)
    if not axes.lines:
        return None
    scale: dict[str, Any] = {"yscale": "log"} if log else {}
    return style.finish_curves(figure, axes, "step", "validation loss (nats)", **scale)


# Parts


def _one_curve(run: RunFiles, key: str, ylabel: str) -> Any:
    return _curves(run, {ylabel: run.points(key)}, ylabel, ylim=(0, None))


def _curves(
    run: RunFiles,
    curves: Mapping[str, Points],
    ylabel: str,
    lines: list[tuple[float, str]] | None = None,
    counted: str = "",
    **limits: Any,
) -> Any:
    """A figure of some curves, with horizontal lines that say what their values mean; counted: see
    `draw_curves`."""
    curves = {name: points for name, points in curves.items() if points}
    if not curves:
        return None
    figure, grid = style.new_figure()
    style.draw_curves(figure, grid[0, 0], curves, counted=counted)
    for number, (height, meaning) in enumerate(lines or []):
        dash, color = (":", "--")[number % 2], style.COLORS[-1]
        grid[0, 0].axhline(height, color=color, linestyle=dash, label=meaning, linewidth=1)
    _draw_boundaries(grid[0, 0], run)
    return style.finish_curves(figure, grid[0, 0], "step", ylabel, **limits)


def _of_experts(run: RunFiles, metric: str, ylabel: str, **limits: Any) -> Any:
    """One line for each expert that ever was."""
    numbers = run.expert_numbers(metric)
    curves = {f"expert {e}": run.points(f"expert/{e}/{metric}") for e in numbers}
    return _curves(run, curves, ylabel, counted="expert", **limits)


def _set_losses(run: RunFiles) -> dict[str, Points]:
    """Validation losses by set."""
    found = {key.removeprefix("val/loss/"): run.points(key) for key in run.keys("val/loss/.+")}
    return {name: points for name, points in found.items() if points}


def _base_losses(run: RunFiles) -> tuple[dict[str, float], float | None]:
    """Of the base, from results.json: by set, and over all targets."""
    rows = [row for row in run.results.get("sets", []) if row.get("base_loss") is not None]
    by_set = {row["name"]: row["base_loss"] for row in rows}
    targets = sum(row.get("targets", 0) for row in rows)
    if not targets:
        return by_set, None
    return by_set, sum(row["base_loss"] * row["targets"] for row in rows) / targets


def _draw_boundaries(axes: Any, run: RunFiles) -> None:
    """Where the stages of a stream begin."""
    for step, _ in run.boundaries[1:]:
        axes.axvline(step, color=style.COLORS[-1], linewidth=0.5, label="_")


def _name_stages(axes: Any, run: RunFiles) -> None:
    """The names of a stream's stages above where they begin, as far as there is room."""
    every = max(1, -(-len(run.boundaries) // MOST_STAGES))
    named = run.boundaries[::every]
    if named:
        above = axes.secondary_xaxis("top")
        names = [style.shorten(name) for _, name in named]
        above.set_xticks([step for step, _ in named], names, rotation=35, ha="left", fontsize=7)
        above.tick_params(length=0, pad=1)
        above.spines["top"].set_visible(False)
