"""What the README says of the files is so: line counts, the places of the five steps, its lines."""
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def lines_of(name):
    return (ROOT / name).read_text(encoding="utf-8").splitlines()


def test_the_line_counts_are_true():
    counts = re.findall(r"^\| `([\w./]+\.py)` \| (\d+) \|", README, re.MULTILINE)
    assert len(counts) == 6
    assert counts == [(name, str(len(lines_of(name)))) for name, _ in counts]


def test_the_five_steps_are_where_the_readme_says():
    lines = re.findall(r"\(distill\.py:(\d+)\)", README)
    found = [lines_of("distill.py")[int(line) - 1].strip()[:4] for line in lines]
    assert found == ["# 1.", "# 2.", "# 3.", "# 4.", "# 5."]


def test_it_ends_before_the_reader_does():
    assert len(README.splitlines()) <= 200


def test_every_link_leads_somewhere():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!http|#)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
