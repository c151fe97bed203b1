"""The command line: help, arguments that are refused before any work, and output."""

import os
import subprocess
import sys
import types

import pytest

import cybn
from cybn import demo
from cybn.__main__ import main


def test_bare_prints_help(capsys):
    assert main([]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("usage: cybn ")
    assert all(command in shown.out for command in ("info", "bench", "demo"))
    assert not shown.err


def test_each_command_says_how_long_it_takes(capsys):
    main([])
    words = " ".join(capsys.readouterr().out.split())
    assert "threads; at once" in words
    assert "under 30 seconds" in words
    assert "half a minute" in words


@pytest.mark.parametrize("words", [["learn"], ["demo", "--seed", "x"], ["bench", "--threads", "0"]])
def test_what_is_no_command_is_refused(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    assert "usage: cybn" in capsys.readouterr().err


def test_version_and_info(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert main(["info"]) == 0
    assert capsys.readouterr().out.startswith(f"cybn {cybn.__version__}")


def test_as_a_module():
    done = subprocess.run(
        [sys.executable, "-P", "-m", "cybn"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("usage: cybn")


# ---- the demo ----------------------------------------------------------------------------


@pytest.fixture
def untrained(monkeypatch):
    """Replace the demo's packages and its training; return a list of calls of the training."""
    began = []

    def module(name, **names):
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(**names))

    module("threadpoolctl", threadpool_limits=lambda *a, **k: cybn.threads(1))
    module("cybn.demo.data", load_digits=began.append)
    module("cybn.demo.experiments", FULL=1, QUICK=2, run_all=lambda *given: given)
    module("cybn.demo.picture", draw=lambda results, path: path.write_bytes(b"PNG"))
    module("cybn.demo.table", write_table=lambda results: "| a table |\n")
    return began


def test_the_folder_is_made_and_the_files_are_written(untrained, tmp_path, capsys):
    folder = tmp_path / "a" / "b"
    for _ in range(2):  # the second time, the files are overwritten
        assert main(["demo", "--output", str(folder)]) == 0
    assert sorted(file.name for file in folder.iterdir()) == ["cybn-demo.md", "cybn-demo.png"]
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first.endswith("Takes about half a minute.")
    assert last.startswith(f"Wrote {folder / 'cybn-demo.png'} and")
    assert last.endswith("Took 0 seconds.")


def blocked_by_a_file(tmp_path):
    (tmp_path / "file").touch()
    return tmp_path / "file" / "folder"


def blocked_by_a_folder(tmp_path):
    (tmp_path / "cybn-demo.md").mkdir()
    return tmp_path


def without_permission(tmp_path):
    tmp_path.chmod(0o555)
    if os.access(tmp_path, os.W_OK):
        pytest.skip("this user may write anywhere")
    return tmp_path


def read_only(tmp_path):
    return "/proc/self"  # not even root can write here


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (blocked_by_a_file, "where no file can be written (Not a directory); name another folder"),
        (without_permission, "where no file can be written (Permission denied); name another"),
        (read_only, "where no file can be written ("),
        (blocked_by_a_folder, "cybn-demo.md' is there already and cannot be written; remove it"),
    ],
)
def test_what_cannot_be_written_is_found_before_the_work(
    make, message, untrained, tmp_path, capsys
):
    if make is read_only and not os.path.isdir("/proc/self"):
        pytest.skip("needs /proc")
    folder = make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert main(["demo", "--output", str(folder)]) == 1
    assert not untrained
    shown = capsys.readouterr()
    assert shown.err.startswith("cybn: ")
    assert message in shown.err
    assert not shown.out
    assert sorted(tmp_path.rglob("*")) == before


def test_a_read_only_working_directory(untrained, capsys, monkeypatch):
    if not os.path.isdir("/proc/self"):
        pytest.skip("needs /proc")
    monkeypatch.chdir("/proc/self")
    assert main(["demo"]) == 1
    assert "output is '.', where no file can be written" in capsys.readouterr().err
    assert not untrained


def test_a_missing_package_is_named(untrained, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "threadpoolctl", None)
    assert main(["demo", "--output", str(tmp_path / "new")]) == 1
    assert "pip install 'cybn[demo]'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_no_progress_bar_away_from_a_terminal(tmp_path):
    for name in ("matplotlib", "sklearn", "threadpoolctl", "tqdm"):
        pytest.importorskip(name)
    command = [sys.executable, "-P", "-m", "cybn", "demo", "--quick", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "step" not in done.stderr
    assert "\r" not in done.stderr
    assert done.stdout.startswith("Trains small networks")
    assert demo.ABOUT[True] in done.stdout
