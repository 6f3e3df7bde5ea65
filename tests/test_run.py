"""common/run.py: rows that survive kills, one-line errors, and the common flags."""
import argparse
import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

import common.run
from common.run import (
    add_run_flags,
    amount,
    bar,
    check_run_flags,
    command_line,
    journaled,
    natural,
    need_positive,
    pattern,
    same_flags,
    share,
    whole,
    whole_lines,
)

ROWS = [{"id": "1", "text": "a\u2028b"}, {"id": "2", "text": "c"}, {"id": "3", "text": "\u043a"}]


def lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


# ------------------------------------------------------------ journaled

@pytest.mark.parametrize("resume", [False, True])
def test_unusual_texts_come_back(tmp_path, resume):
    """U+2028 is a line end to str.splitlines() but not to JSONL."""
    (tmp_path / "x").write_text(lines(ROWS[:1]), encoding="utf-8")
    assert journaled(tmp_path / "x", ROWS, lambda items: items, resume=resume) == ROWS
    assert [json.loads(line) for line in whole_lines(tmp_path / "x")] == ROWS


@pytest.mark.parametrize("name", ["x", "[x]", "x*", "x.jsonl"])
def test_after_a_kill_only_the_missing_rows_are_made(tmp_path, name):
    out = tmp_path / name
    part = tmp_path / f"{name}.part0"
    cut = lines(ROWS)[:-3].encode()[:-1]  # in the middle of a line, and of a character
    part.write_bytes(cut)
    (tmp_path / f"{name}.partial").write_text("")
    asked = []

    def make(items):
        asked.extend(item["id"] for item in items)
        return items
    assert journaled(out, ROWS, make, resume=True) == ROWS
    assert asked == ["3"]
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_a_kill_keeps_the_chunks_before_it(tmp_path):
    def make(items):
        if items[0]["id"] == "3":
            raise KeyboardInterrupt
        return items
    with pytest.raises(KeyboardInterrupt):
        journaled(tmp_path / "x", ROWS, make, chunk=1)
    assert (tmp_path / "x.part0").read_text(encoding="utf-8") == lines(ROWS[:2])


def test_rows_of_other_items_stay_at_the_end(tmp_path):
    (tmp_path / "x").write_text(lines(ROWS), encoding="utf-8")
    assert journaled(tmp_path / "x", ROWS[1:], lambda items: items, resume=True) == ROWS[1:]
    assert (tmp_path / "x").read_text(encoding="utf-8") == lines([*ROWS[1:], ROWS[0]])


def test_an_item_without_all_of_its_rows_is_made_again(tmp_path):
    def make(items):
        return [{"id": f"{item}{i}"} for item in items for i in "xy"]
    (tmp_path / "x").write_text('{"id": "ax"}\n{"id": "bx"}\n{"id": "by", "old": 1}\n')
    rows = journaled(tmp_path / "x", ["a", "b"], make, lambda item: [f"{item}x", f"{item}y"],
                     resume=True)
    assert rows == [{"id": "ax"}, {"id": "ay"}, {"id": "bx"}, {"id": "by", "old": 1}]


def test_equal_ids_are_refused():
    with pytest.raises(ValueError, match="1 ids occur more than once, '1'"):
        journaled(None, [ROWS[0], ROWS[0]], lambda items: items)


@pytest.mark.parametrize("line", ["{", "[1]", '{"name": 1}', '{"id": ' + "[" * 100_000],
                         ids=["cut", "list", "no id", "depth"])
def test_a_file_that_cannot_be_resumed_is_named_and_left(tmp_path, line):
    text = '{"id": "1"}\n' + line + "\n"
    (tmp_path / "x").write_text(text)
    with pytest.raises(ValueError, match=r"x:2: not a row that --resume could keep"):
        journaled(tmp_path / "x", ROWS, lambda items: items, resume=True)
    assert (tmp_path / "x").read_text() == text


# ------------------------------------------------------------ flags

@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "-inf"])
def test_numbers_that_are_not_positive(value, capsys):
    parser = command_line("")
    parser.add_argument("--learning-rate", type=float)
    args = parser.parse_args([f"--learning-rate={value}"])
    with pytest.raises(SystemExit):
        need_positive(parser, args, "learning_rate")
    assert f"--learning-rate must be positive, not {float(value)}" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [[], ["--tokens", "5"]])
def test_a_default_may_be_infinite(argv):
    parser = command_line("")
    parser.add_argument("--tokens", type=int, default=math.inf)
    need_positive(parser, parser.parse_args(argv), "tokens")


@pytest.mark.parametrize("kind, text", [
    (share, "-0.1"), (share, "1.1"), (share, "nan"), (share, "inf"),
    (amount, "-0.1"), (amount, "nan"), (amount, "inf"), (whole, "-1"), (natural, "0")])
def test_numbers_out_of_bounds(kind, text):
    with pytest.raises(argparse.ArgumentTypeError, match=f"is expected, not {text}"):
        kind(text)


def test_a_broken_regular_expression():
    assert pattern("^a") == "^a"
    with pytest.raises(argparse.ArgumentTypeError, match="is no regular expression: missing \\)"):
        pattern("(")


def test_without_a_terminal_a_bar_is_a_line_every_half_minute(capsys, monkeypatch):
    now = [0.0]
    with bar(4, "problems") as progress:
        monkeypatch.setattr(progress, "_time", lambda: now[0])
        progress.start_t = progress.last_print_t = 0.0
        for second in (1, 20, 31, 40):
            now[0] = second
            progress.update()
        assert capsys.readouterr().err.split("\n")[0].strip() == "problems: 3 of 4, 00:31 gone, 00:10 left"


def test_without_a_terminal_a_bar_shows_that_it_lives(capsys, monkeypatch):
    """One chunk of problems may take minutes, in which nothing is finished."""
    monkeypatch.setattr(common.run, "PAUSE", 0.1)
    with bar(4, "problems"):
        time.sleep(0.5)
        assert "problems: 0 of 4, 00:00 gone, ? left" in capsys.readouterr().err


@pytest.mark.parametrize("kind, text", [(share, "0"), (share, "1"), (amount, "0"), (amount, "2e9")])
def test_numbers_within_bounds(kind, text):
    assert kind(text) == float(text)


@pytest.mark.parametrize("kind", [share, amount])
def test_a_word_is_no_number(kind, capsys):
    parser = command_line("")
    parser.add_argument("--x", type=kind)
    with pytest.raises(SystemExit):
        parser.parse_args(["--x", "much"])
    assert "argument --x: invalid number value: 'much'" in capsys.readouterr().err


def parse(*argv):
    parser = command_line("")
    add_run_flags(parser)
    parser.add_argument("--k", type=int, default=4)
    return parser, parser.parse_args(list(map(str, argv)))


@pytest.mark.parametrize("left", ["x", "x.part0", "x.votes", "x.votes.part0"])
def test_an_output_that_exists_is_not_overwritten(tmp_path, left, capsys):
    (tmp_path / left).write_text("precious\n")
    with pytest.raises(SystemExit):
        check_run_flags(*parse("--out", tmp_path / "x"))
    assert f"{left} exists: pass --resume" in capsys.readouterr().err


def test_resume_refuses_other_flags(tmp_path, capsys):
    same_flags(*parse("--out", tmp_path / "x"))
    (tmp_path / "x").write_text("")
    same_flags(*parse("--out", tmp_path / "x", "--resume", "--limit", 7))  # no row depends on it
    with pytest.raises(SystemExit):
        same_flags(*parse("--out", tmp_path / "x", "--resume", "--k", 5))
    assert "x was begun with --k 4, not 5" in capsys.readouterr().err


# ------------------------------------------------------------ one line

@pytest.mark.parametrize("error", [ValueError, OSError, ImportError])
def test_what_the_user_can_mend_is_one_line(error, capsys):
    parser, _ = parse()
    with pytest.raises(SystemExit) as stopped:
        with parser:
            raise error("rows.jsonl:3: bad")
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"{parser.prog}: error: rows.jsonl:3: bad\n"


def test_an_error_of_ours_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        with parse()[0]:
            raise ZeroDivisionError


SLEEP = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits that it is ignored
from common.run import add_run_flags, command_line
parser = command_line("")
add_run_flags(parser)
parser.parse_args(sys.argv[1:])
with parser:
    print("started", flush=True)
    for _ in range(600):  # a signal may wake another thread
        time.sleep(0.1)
"""


@pytest.mark.parametrize("argv, hint", [
    ([], ""), (["--out", "x"], "; the same command with --resume goes on from there")])
def test_ctrl_c_is_one_line_that_says_how_to_resume(argv, hint):
    child = subprocess.Popen([sys.executable, "-c", SLEEP, *argv], cwd=ROOT, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert child.stdout.readline() == "started\n"
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert err == f"-c: error: stopped by Ctrl-C{hint}\n"
    assert child.returncode == 130
