"""What the page of one run says in words and tables.

results.json and the like may come from elsewhere: what is not there is left out.
"""

import json
from typing import Any

from dylora.evaluation.figures.style import COLORS
from dylora.evaluation.page.svg import script_text
from dylora.evaluation.report_text import describe_routing, format_loss, format_share
from dylora.evaluation.run_files import RunFiles

Table = tuple[str, list[str], list[list[str]]]  # caption, header, rows
MOST_ANSWERS = 100  # shown of a set
MOST_EVENTS = 6  # shown of an expert's life


def summary(run: RunFiles) -> list[str]:
    """What was run, in a line or two."""
    settings, environment = run.settings, run.environment
    model, moe = settings.get("model", {}), settings.get("moe", {})
    parts = [
        f"base {model.get('base', '?')}",
        f"{len(run.experts) or moe.get('num_experts')} experts",
    ]
    if run.rows:
        tokens = max(row.get("tokens", 0) for row in run.rows)
        parts += [f"{run.rows[-1]['step']:,} steps", f"{tokens:,} target tokens"]
    parts += [str(environment[key]) for key in ("device",) if key in environment]
    parts += [str(run.results["written"])] if "written" in run.results else []
    lines = [", ".join(parts)]
    if routing := run.results.get("routing"):
        lines.append(f"At the end {describe_routing(routing)}.")
    return lines


def results(run: RunFiles) -> list[Table]:
    """A row for each set, with intervals of what was answered."""
    count = run.results.get("test_answers_per_skill") or 0
    rows = run.results.get("sets") or []
    answered = any(row.get("trained_passed") is not None for row in rows)
    header = ["set", "loss of the base", "trained (± 95 %)"]
    header += [f"base passes (of {count})", "trained [95 %]"] if answered else []
    skills = {expert: row.get("skill") for expert, row in enumerate(run.experts)}
    lines = []
    for row in rows:
        trained = format_loss(row["trained_loss"], row.get("loss_half"))
        line = [row["name"], _loss(row["base_loss"]), trained]
        if answered:
            line += [format_share(row[f"{who}_passed"], count) for who in ("base", "trained")]
        expert = row["expert"]
        taught = f", made for {skills[expert]}" if skills.get(expert) else ""
        share = "" if expert is None else f"expert {expert} ({row['expert_share']:.0%}){taught}"
        lines.append([*line, share])
    return [("", [*header, "leading expert (its share)"], lines)] if lines else []


def experts(run: RunFiles) -> list[Table]:
    """A row for each expert that ever was."""
    lines = []
    for number, row in enumerate(run.experts):
        told = [
            f"{event.get('event')} at step {event.get('step')}" for event in row.get("history", [])
        ]
        if len(told) > MOST_EVENTS:
            told = [*told[: MOST_EVENTS - 1], f"and {len(told) - MOST_EVENTS + 1} more"]
        metrics = [run.last(f"expert/{number}/{key}") for key in ("maturity", "load", "tokens")]
        formats = ("{:.2f}", "{:.1%}", "{:,.0f}")
        lines.append(
            [
                *(str(row.get(key) or "") for key in ("name", "state", "skill", "rank", "steps")),
                *("" if value is None else form.format(value)
                  for value, form in zip(metrics, formats, strict=True)),
                "; ".join(told),
            ]
        )  # fmt: skip
    header = ["expert", "state", "skill", "rank", "steps", "maturity", "gate share", "tokens"]
    return [("", [*header, "life"], lines)] if lines else []


def stages(run: RunFiles) -> list[Table]:
    """A row for each stage of a stream, and what the stream comes to."""
    found = run.results.get("stages") or []
    last = found[-1].get("losses") or {} if found else {}
    lines = []
    for stage in found:
        margin, name = stage.get("margin"), stage["name"]
        losses = (stage["base"][0], (stage.get("losses") or {}).get(name), last.get(name))
        lines.append(
            [
                name,
                stage["action"],
                "" if margin is None else f"{margin:.2f} from {stage['nearest']}",
                ", ".join(map(str, stage["experts"])),
                *map(_loss, losses),
            ]
        )
    header = ["stage", "decision", "margin", "expert", "loss of the base", "learned", "now"]
    tables = [("", header, lines)] if lines else []
    measures = [
        [what, *(_loss(run.results[key].get(name)) for name in TRANSFER)]
        for key, what in (("losses", "loss (nats)"), ("passed", "share of answers"))
        if key in run.results
    ]
    if measures:
        tables.append(("What the stream keeps", ["", *TRANSFER], measures))
    return tables


TRANSFER = ("average", "backward", "forward", "forgetting")


def answers(run: RunFiles) -> list[tuple[str, str, list[dict[str, Any]]]]:
    """By set: its name, how many pass, and the answers; older runs kept the texts alone."""
    found = []
    for name, given in (run.results.get("answers") or {}).items():
        rows = [one for one in given if isinstance(one, dict)]
        if rows:
            passed = sum(row["passed"] for row in rows)
            told = f"{passed} of {len(rows)} pass"
            told += f"; the first {MOST_ANSWERS} are shown" if len(rows) > MOST_ANSWERS else ""
            found.append((name, told, rows[:MOST_ANSWERS]))
    return found


def texts(run: RunFiles) -> dict[str, Any] | None:
    """What the page needs to colour texts."""
    found = run.routing
    if not found.get("texts"):
        return None
    data = {"texts": found["texts"], "shared": run.shared, "colors": COLORS}
    names = found["sites"]
    layers = ["all sites, mean", *(f"site {n}: {names[n]}" for n in found["kept_sites"])]
    shown = range(run.shared, min(found["experts"], run.shared + 3 * len(COLORS)))
    return {
        "data": script_text(json.dumps(data, ensure_ascii=False, separators=(",", ":"))),
        "layers": layers,
        "names": [text["set"] for text in found["texts"]],
        "key": [(f"expert {expert}", COLORS[expert % len(COLORS)]) for expert in shown],
    }


def thinned_texts(run: RunFiles) -> str:
    """What routing.json left out of sites."""
    kept, sites = len(run.routing["kept_sites"]), len(run.routing["sites"])
    return f"texts are shown for {kept} of {sites} sites" if kept < sites else ""


def files(run: RunFiles) -> list[tuple[str, str]]:
    """config.yaml and env.json, to be copied."""
    found = [("config.yaml", run.config)] if run.config else []
    if run.environment:
        found.append(("env.json", json.dumps(run.environment, indent=2)))
    return found


def _loss(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
