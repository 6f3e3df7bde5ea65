"""The house stays readable: lengths, columns, nesting and flags of every file that is read. ruff pins the columns.

These are rules of this repository (.github/CONTRIBUTING.md). A fork that grows deletes this file."""
import ast
import importlib
import re

import pytest
from conftest import ROOT

CONCEPTS = {"prm_model": None, "annotate": 28, "train": 28, "search": 30, "evaluate": 28, "similarity": 18}  # flags
FOLDERS = (".", "common", "common/grading", "common/formats", "paper", "beyond")
FILES = sorted(f for folder in FOLDERS for f in (ROOT / folder).glob("*.py"))
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def nodes(file, *kinds):
    return [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, kinds)]


def nested(comprehension):
    """Does it hold another one, or two `for`s?"""
    inner = [node for node in ast.walk(comprehension) if isinstance(node, COMPREHENSIONS) and node is not comprehension]
    return bool(inner) or len(comprehension.generators) > 1


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_a_file_can_be_read(file):
    most = 350 if file.stem in CONCEPTS and file.parent == ROOT else 400
    assert len(file.read_text().splitlines()) <= most
    long = [f.name for f in nodes(file, ast.FunctionDef) if f.end_lineno - f.lineno >= 50 and f.name != "train"]
    assert long == []
    conditions = nodes(file, ast.IfExp)
    assert [n.lineno for n in conditions if isinstance(n.body, ast.IfExp) or isinstance(n.orelse, ast.IfExp)] == []


@pytest.mark.parametrize("file", [f.name for f in FILES if f.parent == ROOT / "common" and f.stem != "__init__"])
def test_the_map_of_the_plumbing_has_the_file(file):
    assert f"`{file}`" in (ROOT / "common" / "README.md").read_text()


def test_the_six_concepts_fit_into_an_evening():
    lines = sum(len((ROOT / f"{name}.py").read_text().splitlines()) for name in CONCEPTS)
    assert lines <= 1800, "a rule of this repository, no bug: a fork may delete this file"


def test_comprehensions_are_flat():
    lines = []
    for file in FILES:
        lines += [f"{file.name}:{node.lineno}" for node in nodes(file, *COMPREHENSIONS) if nested(node)]
    assert len(lines) <= 10, lines


@pytest.mark.parametrize("script, most", [(name, most) for name, most in CONCEPTS.items() if most])
def test_flags_are_few(script, most, capsys):
    with pytest.raises(SystemExit):
        importlib.import_module(script).main(["--help"])
    flags = set(re.findall(r"^\s+(--[a-zA-Z][\w-]*)", capsys.readouterr().out, re.M)) - {"--help"}
    assert len(flags) <= most, sorted(flags)


@pytest.mark.parametrize("file", sorted((ROOT / "tests").glob("*.py")), ids=lambda f: f.name)
def test_a_failing_assert_says_which_of_two_things_failed(file):
    joined = [a.lineno for a in nodes(file, ast.Assert) if isinstance(a.test, ast.BoolOp) and isinstance(a.test.op, ast.And)]
    assert joined == []
