"""Which file imports which: the scripts stand on their own, tools/ stands on the scripts."""
import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = [path.stem for path in sorted(ROOT.glob("*.py"))]
FILES = {path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): path
         for folder in (".", "tools", "tiny") for path in sorted((ROOT / folder).glob("*.py"))}


FILES["tools"] = FILES.pop("tools.__init__")


def imported(name):
    """Yields (names of modules, is it inside a function?) of every import in a file."""
    for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield [alias.name for alias in node.names], node.col_offset > 0
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield [node.module, *names], node.col_offset > 0


def imports(name):
    """(modules of this project that a file imports, those that it imports inside a function)."""
    found, inside = set(), set()
    for names, late in imported(name):
        own = {module for module in names if module in FILES}
        found |= own
        inside |= own if late else set()
    return found, inside


def test_the_files_are_found():
    assert {"gen_data", "common", "coldstart", "distill", "evaluate"} <= set(SCRIPTS)
    assert "common" in imports("distill")[0] and "tools.report" in imports("evaluate")[0]


@pytest.mark.parametrize("name", FILES)
def test_no_project_file_is_imported_inside_a_function(name):
    assert not imports(name)[1]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_needs_nothing_of_tools(name):
    allowed = {"tools", "tools.report"} if name == "evaluate" else set()
    assert {module for module in imports(name)[0] if module.startswith("tools")} <= allowed


def test_gen_data_needs_no_model():
    """Not even late, in a function: whoever only draws puzzles has no torch."""
    for names, _ in imported("gen_data"):
        assert not {module.split(".")[0] for module in names} & {"torch", "transformers", "peft"}


def test_no_file_imports_itself_by_way_of_others():
    reached = {name: imports(name)[0] for name in FILES}
    for _ in FILES:
        for name, modules in reached.items():
            reached[name] = modules.union(*(reached[module] for module in modules))
    assert not [name for name, modules in reached.items() if name in modules]


def test_gen_data_loads_no_torch_and_loads_itself_once():
    code = ("import sys, runpy\nsys.argv = ['gen_data.py', '--help']\n"
            "try: runpy.run_path('gen_data.py', run_name='__main__')\nexcept SystemExit: pass\n"
            "sys.exit(bool({'torch', 'common', 'gen_data'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True)
    assert done.returncode == 0
