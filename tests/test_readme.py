"""What the README says of the files is so: line counts, the five steps, its links."""
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def lines_of(name):
    return (ROOT / name).read_text(encoding="utf-8").splitlines()


def test_the_line_counts_are_true():
    counts = re.findall(r"^\| `([\w./]+\.py)` \| (\d+) \|", README, re.MULTILINE)
    assert counts and counts == [(name, str(len(lines_of(name)))) for name, _ in counts]


def test_the_five_steps_stand_in_the_same_order():
    """Numbered alike in the README and in main, with the same verbs."""
    named = re.findall(r"^(\d)\. .*?\*\*(.+?)\*\*", README, re.MULTILINE)
    code = "\n".join(lines_of("distill.py"))
    code = code[code.index("def main("):]
    marks = re.findall(r"^ *# (\d)\. (.+)$", code, re.MULTILINE)
    assert [number for number, _ in named] == [number for number, _ in marks] == list("12345")
    for (_, words), (_, comment) in zip(named, marks, strict=True):
        assert words.split()[-1] in comment


def test_it_ends_before_the_reader_does():
    assert len(README.splitlines()) <= 200


def test_every_link_leads_somewhere():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!http|#)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
