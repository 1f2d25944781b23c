"""The documentation: every page can be found, and what it lists is all there is."""

import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

import dylora
from dylora.cli.hints import OLD_FLAGS, all_keys

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
NOTEBOOKS = sorted(path.stem for path in (ROOT / "examples").glob("*.ipynb"))
MADE = {"settings.md", *(f"tutorials/{name}.md" for name in NOTEBOOKS)}  # by docs/pages.py


def pages_of(nav: object) -> Iterator[str]:
    """Every page that a nav names."""
    if isinstance(nav, str):
        yield nav
    elif isinstance(nav, list | dict):
        for item in nav.values() if isinstance(nav, dict) else nav:
            yield from pages_of(item)


def test_every_page_stands_in_the_nav_once_and_exists():
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    there = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")} | MADE
    assert sorted(pages_of(nav)) == sorted(there)


def test_every_public_name_has_a_place_in_the_api_reference():
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    shown = {line.rpartition(".")[2] for line in re.findall(r"^::: (\S+)", text, re.M)}
    assert set(dylora.__all__) - shown == set()


def test_every_member_that_the_api_reference_names_exists():
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    members = re.search(r"DyLoRA_MoE\n +options: \{.*members: \[(.*)\]\}", text)[1].split(", ")
    assert [name for name in members if not hasattr(dylora.DyLoRA_MoE, name)] == []


def test_the_page_of_settings_has_a_row_for_every_field_of_every_section():
    pytest.importorskip("mkdocs")
    import runpy

    module = runpy.run_path(str(DOCS / "pages.py"))
    page = module["settings"]()
    tables = dict(re.findall(r"^## (.+)\n\n((?:\|.*\n)+)", page, re.M))
    assert tables.keys() == module["SECTIONS"].keys()
    sections = {"model", "moe", "data", "train", "eval", "log"}  # with tables of their own
    for title, cls in module["SECTIONS"].items():
        found = re.findall(r"^\| `(\w+)` \|", tables[title], re.M)
        assert found == [item.name for item in fields(cls) if item.name not in sections]


def test_every_config_has_a_row_in_the_table_of_configs():
    rows = re.findall(r"^\| `configs/([\w.]+)` \|", (DOCS / "configs.md").read_text(), re.M)
    assert sorted(rows) == sorted(path.name for path in (ROOT / "configs").glob("*.yaml"))


def test_every_tutorial_has_a_row():
    text = (DOCS / "tutorials" / "index.md").read_text(encoding="utf-8")
    assert re.findall(r"\]\(([\w-]+)\.md\)", text) == NOTEBOOKS


def test_the_migration_guide_has_every_option_of_earlier_scripts_with_what_it_sets():
    text = (DOCS / "migration.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| `--")]
    for flag, (key, value) in OLD_FLAGS.items():
        row = next(line for line in rows if f"`{flag}`" in line)
        assert key in row
        assert value is None or value in row


OURS = re.compile(r"`((?:moe|train|data|eval|log|model)\.\w+)(?:\.(\w+))?")


@pytest.mark.parametrize("page", ["migration.md", "faq.md", "configs.md", "index.md"])
def test_every_setting_and_method_that_a_page_names_exists(page):
    known = {(key, "") for key in all_keys()}
    known |= {(f"model.{name}", "") for name in dir(dylora.DyLoRA_MoE)} | {("model.base", "")}
    known |= {("model.experts", name) for name in ("", *dir(dylora.ExpertManager))}
    named = set(OURS.findall((DOCS / page).read_text(encoding="utf-8")))
    assert named - known == set()
