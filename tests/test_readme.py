"""What README.md and docs/ say is so: snippets run, commands parse, names, links and numbers exist."""
import importlib
import re
import shlex

import pytest
from conftest import ROOT, ahead, printed

import search
from common import tasks

README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SNIPPETS = re.findall(r"```python\n(.*?)```", README + (ROOT / "docs" / "models.md").read_text(), re.S)
TESTS = "".join(f.read_text() for f in (ROOT / "tests").glob("test_*.py"))


# ---------------------------------------------------------------- the snippets of "Fork me"

@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A new folder with the shipped models. What a snippet registers is gone after the test."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").symlink_to(ROOT / "tiny")
    for table in (search.STRATEGIES, tasks.TASKS):
        for name in ("dvts", "pens"):
            monkeypatch.setitem(table, name, None)
            monkeypatch.delitem(table, name)
    monkeypatch.setattr(search, "load_prm", search.load_prm)
    return tmp_path


def test_there_are_four_snippets():
    assert len(SNIPPETS) == 4


@pytest.mark.parametrize("number, want", [(0, r"  dvts +(0\.[5-9]|1\.0)"), (1, r"-> right"), (2, r"  beam search 4x4 +0")])
def test_a_snippet_stands_alone_and_succeeds(number, want, folder, capsys):
    exec(SNIPPETS[number], {})
    assert re.search(want, capsys.readouterr().out)


def test_the_backbone_snippet_leaves_a_prm(folder):
    exec(SNIPPETS[3], {})
    assert (folder / "runs" / "llama" / "prm_head.safetensors").exists()


# ---------------------------------------------------------------- the first command's table

def columns(text):
    """{(domain, line): [accuracy, generated tokens]} of the table that search.py prints."""
    numbers, domain = {}, None
    for line in text.splitlines():
        if re.match(r"\w+, \d+ problems ", line):
            domain = line.split(",")[0]
        elif match := re.match(r"  (\S.*?)  +(\d\.\d+) \[.*?\] +(\d+)", line):
            numbers[domain, match[1]] = [float(match[2]), int(match[3])]
    return numbers


@ahead
def first_table(folder):
    return columns(printed("search", ["--strategy", "beam"], folder))


def test_the_first_command_prints_the_readmes_table(first_table):
    # Another processor may round a token's probability the other way: 2 % of a difference is none.
    assert {key: pytest.approx(value, rel=0.02) for key, value in columns(README).items()} == first_table


def test_the_readmes_table_has_all_lines():
    assert len(columns(README)) == 10


# ---------------------------------------------------------------- names

def section(title):
    return README.split(f"\n## {title}")[1].split("\n## ")[0]


def names():
    """(file, name) wherever the README writes `file.py`: `name`, `name`"""
    pairs = []
    for file, listed in re.findall(r"`([\w/]+\.py)`: ((?:`\w+`(?:, )?)+)", README):
        pairs += [(file, name) for name in re.findall(r"`(\w+)`", listed)]
    return sorted(set(pairs))


@pytest.mark.parametrize("file, name", names())
def test_the_file_defines_the_name(file, name):
    assert re.search(rf"^ *(def|class) {name}\b|^{name} =", (ROOT / file).read_text(), re.M)


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(test_\w+)(?:\.\.\.|`)", README))))
def test_the_test_exists(name):
    assert f"def {name}" in TESTS


@pytest.mark.parametrize("file", sorted(set(re.findall(r"`(test_\w+\.py)`", README))))
def test_the_test_file_exists(file):
    assert (ROOT / "tests" / file).exists()


def test_the_map_is_not_empty():
    assert len(names()) > 30


@pytest.mark.parametrize("file, lines", re.findall(r"\[`(\w+\.py)`\]\(\1\) \|[^|]*\| (\d+) \|",
                                                   section("Read it in one evening")))
def test_a_file_is_about_as_long_as_the_readme_says(file, lines):
    assert len((ROOT / file).read_text().splitlines()) == pytest.approx(int(lines), abs=25)


# ---------------------------------------------------------------- commands and links

def commands():
    """(module, flags) of each `python X.py ...` in code blocks and tables of all pages."""
    found = []
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        for line in re.findall(r"^    (\S.*)$", text, re.M) + re.findall(r"`([^`\n]+)`", text):
            words = shlex.split(line.replace("'", ""), comments=True) if '"' not in line else line.split()
            scripts = [i for i, word in enumerate(words) if re.fullmatch(r"(tiny/)?\w+\.py", word)
                       or re.fullmatch(r"paper\.\w+", word)]
            if scripts and words[0] in ("python", "torchrun", "pip"):
                at = scripts[0]
                module = words[at].removesuffix(".py").replace("/", ".")
                flags = tuple(word for word in words[at:] if word.startswith("--"))
                found.append((module, flags))
    return sorted(set(found))


def help_of(module, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", [module, "--help"])  # some of them take no argv
    with pytest.raises(SystemExit):
        importlib.import_module(module).main()
    return capsys.readouterr().out


@pytest.mark.parametrize("module, flags", commands())
def test_a_command_has_flags_that_exist(module, flags, capsys, monkeypatch):
    text = help_of(module, capsys, monkeypatch)
    if module == "evaluate":  # which takes those of search.py, too
        text += help_of("search", capsys, monkeypatch)
    assert [flag for flag in flags if not re.search(rf"{flag}\b", text)] == []


def slug(heading):
    """The anchor that GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def links():
    """(page, file, anchor) of every link to a file of this repository."""
    found = []
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            if "://" not in target:
                file, _, anchor = target.partition("#")
                found.append((str(page.relative_to(ROOT)), file, anchor))
    return sorted(set(found))


@pytest.mark.parametrize("page, file, anchor", links())
def test_a_link_leads_somewhere(page, file, anchor):
    target = (ROOT / page).parent / file if file else ROOT / page
    headings = re.findall(r"^#+ (.*)$", target.read_text(), re.M) if anchor else []
    assert not anchor or anchor in map(slug, headings)
    assert target.exists()


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 230
