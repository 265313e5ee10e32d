"""What the README and the docs say is so: the five steps, the loop, every command, every link."""
import importlib
import json
import re
import shlex
import textwrap
from pathlib import Path

import pytest

import common

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
README = PAGES[0].read_text(encoding="utf-8")
DISTILL = (ROOT / "distill.py").read_text(encoding="utf-8")
STANDS_FOR = {"S": "1", "N": "3", "URL": "http://localhost:8000/v1"}  # in commands, for a value


def test_the_five_steps_stand_in_the_same_order():
    """Numbered alike in the README and in main, with the same verbs."""
    named = re.findall(r"^(\d)\. .*?\*\*(.+?)\*\*", README, re.MULTILINE)
    marks = re.findall(r"^ *# (\d)\. (.+)$", DISTILL[DISTILL.index("def main("):], re.MULTILINE)
    assert [number for number, _ in named] == [number for number, _ in marks] == list("12345")
    for (_, words), (_, comment) in zip(named, marks, strict=True):
        assert words.split()[-1] in comment


def test_the_loop_is_that_of_the_script():
    loop, = re.findall(r"```python\n(for step in .*?)```", README, re.DOTALL)
    assert textwrap.indent(loop, " " * 8) in DISTILL


def test_every_link_leads_somewhere():
    for page in PAGES:
        for target, anchor in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)",
                                         page.read_text(encoding="utf-8")):
            file = page.parent / target if target else page
            assert file.exists(), f"{page.name}: {target}"
            if anchor:
                assert anchor in anchors(file), f"{page.name}: {target}#{anchor}"


def anchors(page):
    """The names of a page's headings, as GitHub makes them."""
    names = []
    for heading in re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE):
        names.append(re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-"))
    return names


def commands():
    """("page: command", words after python) of every command in a code block that runs a script."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8") if page.name != "recipes.md" else ""  # of forks
        for kind, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            if kind not in ("", "bash", "sh"):
                continue
            for line in block.replace("\\\n", " ").splitlines():
                if not re.search(r"\b(python|torchrun)\b", line):
                    continue
                for words in script_calls(shlex.split(line, comments=True)):
                    found.append(pytest.param(words, id=f"{page.name}: {' '.join(words)}"))
    return found


def script_calls(words):
    """The calls of scripts in a line's words, without what launches them."""
    calls, call = [], None
    for word in words:
        if word in ("&&", ";", "|", ">", "2>&1", "&", "do", "done"):
            call = None
        elif call is not None:
            call.append(STANDS_FOR.get(word, word))
        elif word in ("gen_data.py", "coldstart.py", "distill.py", "evaluate.py") \
                or re.fullmatch(r"tools\.\w+", word):
            call = [word]
            calls.append(call)
    return calls


def pretend_run(folder, preset):
    """A folder that says it is a run of this preset."""
    (folder / "adapter").mkdir(parents=True, exist_ok=True)
    (folder / "adapter/adapter_model.safetensors").touch()
    args = {"preset": preset, **common.BACKBONES[preset]}
    (folder / "args.json").write_text(json.dumps({"kind": "run", "args": args}))


@pytest.mark.parametrize("words", commands())
def test_every_command_is_parsed(words, tmp_path, monkeypatch):
    """By the script's own parser; the runs and files that it names are there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    module = importlib.import_module(words[0].removesuffix(".py"))
    preset = words[words.index("--preset") + 1] if "--preset" in words else "tiny"
    for stage in ("coldstart", "distill"):
        pretend_run(tmp_path / "out" / preset / stage, preset)
    for flag, word in zip(words, words[1:], strict=False):
        if word.startswith("out/") and flag != "--out" and not word.endswith((".jsonl", ".html")):
            pretend_run(tmp_path / word, preset)
    if words[:2] == ["tools.benchmarks", "visualplanning"]:
        Path(words[2]).parent.mkdir(parents=True)
        Path(words[2]).touch()
    module.parse_args([word for word in words[1:] if word != "..."])
