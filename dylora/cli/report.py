"""`run.py report`: the page of a run, or of several beside each other."""

from dataclasses import dataclass
from pathlib import Path

from dylora.cli.options import check_out
from dylora.fields import option


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """One page for any browser of what a run has left, or several runs beside each other, or a
    comparison."""

    runs: list[str] = option(metavar="DIR [DIR ...]", many=True, positional=True)
    """Folders of runs or streams, or the one of a comparison."""
    out: str | None = option(None, metavar="FILE")
    """The page; none: report.html in the run's folder, comparison.html here for several runs."""
    prompt: list[str] = option([], metavar="TEXT [TEXT ...]", many=True)
    """Prompts that the run's best checkpoint answers, to show which expert leads their tokens."""


def run(options: ReportOptions, overrides: list[str]) -> None:
    from dylora.evaluation.page.page import PAGE, write_page

    folders = [Path(folder) for folder in options.runs]
    check_out(options.out)
    if options.prompt:
        add_prompts(folders, options.prompt)
    out = folders[0] / PAGE if len(folders) == 1 else Path("comparison.html")
    out = out if options.out is None else Path(options.out)
    try:
        write_page(folders, out)
    except ImportError as error:
        raise ValueError(str(error)) from error
    print(f"wrote {out} ({out.stat().st_size / 1e6:.1f} MB)")


def add_prompts(folders: list[Path], prompts: list[str]) -> None:
    """Let the run answer, and keep how the tokens were routed."""
    from dylora.cli.config_file import load_run_config
    from dylora.evaluation.routing_texts import add_prompts as keep
    from dylora.evaluation.run_files import ROUTING_FILE

    if len(folders) > 1:
        raise ValueError("--prompt is for the report of one run: give one folder")
    config = load_run_config(str(folders[0] / "config.yaml"), [])
    keep(folders[0], config, folders[0] / ROUTING_FILE, prompts)
