"""docs/results.md: every figure of a study stands in the tables that `benchmarks/study.py` wrote."""

import re
from pathlib import Path

import pytest


DOCS = Path(__file__).parents[2] / "docs"
SECTIONS = re.split(r"^## ", (DOCS / "results.md").read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
STUDIES = [section for section in SECTIONS if "figures/study_" in section]
# Code, links and comments hold settings and paths, not results.
NOT_RESULTS = re.compile(r"^```.*?^```|`[^`]*`|<!--.*?-->|\]\([^)]*\)|arXiv\s+[\d.]+", re.MULTILINE | re.DOTALL)
SETTINGS = re.compile(
    r"(?:r|α) = [\d.]+(?:(?:, [\d.]+)* and [\d.]+)?|r at [\d.]+|[\d.]+M parameters|cost [\d.]+|commit \w+"
)


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().removeprefix("|").removesuffix("|").split("|")]


def tables_of(section: str) -> str:
    names = sorted(set(re.findall(r"figures/(study_\w+\.md)", section)))
    return "\n".join((DOCS / "figures" / name).read_text(encoding="utf-8") for name in names)


def title(section: str) -> str:
    return section.splitlines()[0]


def test_each_study_has_a_section():
    linked = set(re.findall(r"figures/(study_\w+)\.md", "".join(STUDIES)))
    assert linked == {path.stem for path in (DOCS / "figures").glob("study_*.md")}


@pytest.mark.parametrize("section", STUDIES, ids=title)
def test_rows_are_those_of_the_study(section):
    full = tables_of(section)
    case = ""
    for line in section.splitlines():
        row = cells(line)
        if "±" not in line or not line.startswith("|"):
            continue
        case = row.pop(0) or case if "| data |" in section else ""
        of_case = full.split(f"## {case}: ")[1:] if case else [full]
        rows = [cells(found) for part in of_case for found in part.splitlines() if found.startswith("|")]
        shown = [cell for cell in row if cell]
        assert any(set(shown) <= set(found) for found in rows), f"{case}: {line}"


@pytest.mark.parametrize("section", STUDIES, ids=title)
def test_figures_in_the_text_are_those_of_the_study(section):
    full = set(re.findall(r"\d+\.\d+", tables_of(section)))
    text = "\n".join(line for line in section.splitlines() if not line.startswith("|"))
    text = SETTINGS.sub("", NOT_RESULTS.sub("", text))
    assert set(re.findall(r"\d+\.\d+", text)) <= full


CASES = {
    "digits": "defaults",
    "CNN": "defaults_cnn",
    "SST-2": "defaults_sst2",
    "SST-2, LoRA": "defaults_lora",
    "pretrained ViT": "convergence",
}


def test_table_of_the_defaults_is_that_of_its_studies():
    """A row has the methods of one case: accuracies of plain training, then differences from it."""
    section = next(section for section in STUDIES if title(section) == "Which metric and r for a default")
    header, _, *rows = [cells(line) for line in section.splitlines() if line.startswith("|")]
    for case, *shown in rows:
        data, wrong = case.rsplit(", ", 1)
        full = (DOCS / "figures" / f"study_{CASES[data]}.md").read_text(encoding="utf-8")
        share, _, size = wrong.removesuffix(")").partition(" (")
        lines = full.split(f"## {share} wrong{', ' * bool(size)}{size}: accuracy")[1].split("\n## ")[0].splitlines()
        by_method = {cells(line)[0]: cells(line) for line in lines if line.startswith("|")}
        for method, cell in zip(header[1:], shown, strict=True):
            if method in ("plain", "twice the epochs"):
                method = "plain, " * (method != "plain") + method
                expected = by_method[method][4].split(" ")[0] if method in by_method else ""
            else:
                found = by_method.get(method.replace(", ", ", r = "), [""] * 6)[5]
                expected = re.sub(r" \([^)]*\)$", "", found).replace(" ± ", " (") + ")" * ("±" in found)
            assert cell == expected, f"{case}: {method}"


@pytest.mark.parametrize("section", SECTIONS[1:-1], ids=title)
def test_each_study_begins_with_its_command(section):
    assert section.splitlines()[2] == "```bash"
