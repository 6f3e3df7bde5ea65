"""The README's pieces of Python run as they are printed, and what it names exists."""
import re

from conftest import ROOT

README = (ROOT / "README.md").read_text()


def test_fork_me(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").symlink_to(ROOT / "tiny")
    strategy, task, backbone = re.findall(r"```python\n(.*?)```", README, re.S)
    scope = {}
    exec(strategy, scope)
    assert "dvts" in (said := capsys.readouterr().out) and "best-of-N, same tokens" in said
    exec(task, scope)
    assert "7 pens" in capsys.readouterr().out and scope["tasks"].load("pens", "pens.jsonl")[0].answer == "12"
    exec(backbone, scope)
    assert (tmp_path / "runs" / "llama" / "prm_head.safetensors").exists()
    del scope["search"].STRATEGIES["dvts"], scope["tasks"].TASKS["pens"]


def test_the_table_of_sections_names_what_is_there():
    """Each `file.py`: `name` of the table is defined in that file, and each named test exists."""
    table = README[README.index("| Paper | Where | Test |"):README.index("## The tiny world")]
    sources = {str(f.relative_to(ROOT)): f.read_text() for f in [*ROOT.glob("*.py"), *ROOT.glob("common/*.py")]}
    found = 0
    for file, names in re.findall(r"`([\w/]+\.py)`: ((?:`[\w.]+`(?: \([^)]*\))?(?:, )?)+)", table):
        for name in re.findall(r"`([\w.]+)`", names):
            assert re.search(rf"^\s*(def|class) {name.split('.')[-1]}\b|^{name} =", sources[file], re.M), (file, name)
            found += 1
    assert found > 20
    tests = "".join(f.read_text() for f in (ROOT / "tests").glob("test_*.py"))
    for name in re.findall(r"`(test_\w+?)(?:_?\.\.\.)?`", table):
        assert f"def {name}" in tests or (ROOT / "tests" / f"{name}.py").exists(), name
