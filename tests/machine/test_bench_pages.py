"""What becomes of a run: files, tables, pages, the command line; never of two machines at once."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from bench_cases import CACHE, run, steady

import cybn.bench
from cybn.__main__ import main
from cybn.bench import BenchError, plans
from cybn.bench.markdown import check_page, write_page
from cybn.bench.results import Results, merge
from cybn.bench.tables import BLOCKS

HERE = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    monkeypatch.setattr(plans, "usable_cpus", lambda: 2)
    monkeypatch.setattr(plans, "last_level_bytes", lambda: CACHE)


def parts(**second):
    """Return a run of ResNet-50 and one of all else, which differ in what is given."""
    one = run(steady, bars=True, groups=["resnet50"])
    two = run(steady, bars=True, groups=["tiny", "edge"])
    two.memory = []
    for name, changes in second.items():
        getattr(two, name).update(changes)
    return one, two


# ---- files ---------------------------------------------------------------------------------------


def test_a_run_survives_its_file(tmp_path):
    results = run(steady, bars=True)
    results.save(tmp_path / "run.json")
    assert Results.read(tmp_path / "run.json") == results


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"records": [{"group": 1}]}', '{"records": 3}'])
def test_other_files_are_refused(tmp_path, text):
    file = tmp_path / "other.json"
    file.write_text(text)
    with pytest.raises(BenchError, match=r"other\.json is not a file that"):
        Results.read(file)


def test_two_runs_of_one_machine_go_together():
    one, two = parts(machine={"load before": "0.7"})
    before = json.dumps([asdict(one), asdict(two)])
    both = merge([one, two])
    assert both.records == one.records + two.records
    assert both.memory == one.memory
    assert merge([one]) == one
    assert json.dumps([asdict(one), asdict(two)]) == before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"machine": {"cpu": "another"}}, "different machines .*cpu is 'made up' .*'another'"),
        ({"machine": {"extra": "a disk"}}, "different machines .*extra is None"),
        ({"machine": {"numpy": "9"}}, "different machines"),
        ({"peers": {"PyTorch": "2.1"}}, "different versions .*PyTorch"),
        ({"settings": {"shown": "quickest turn"}}, "different settings .*shown"),
        ({"settings": {"last-level cache": 1}}, "different settings .*last-level"),
    ],
)
def test_figures_of_two_machines_never_mix(changes, words):
    with pytest.raises(BenchError, match=words):
        merge(parts(**changes))


def test_ratios_stay_within_a_run():
    one, _ = parts()
    with pytest.raises(BenchError, match="two runs have resnet50 in float32"):
        merge([one, one])


# ---- pages ---------------------------------------------------------------------------------------


def test_a_new_page_has_every_block(tmp_path):
    page = tmp_path / "new.md"
    write_page(run(steady), page)
    text = page.read_text()
    for name in BLOCKS:
        assert f"<!-- bench: {name} -->" in text
    assert "Not measured" not in text.replace("missed -->\n\nNot measured in this run.", "")
    for line in text.splitlines():
        if line.startswith("|"):
            assert line.endswith("|")
            assert "nan" not in line
    rows = [line for line in text.splitlines() if line.startswith("| 64x112x112 |")]
    # 10.27 ms a copy, cybn as long, GB/s 20, fresh, PyTorch's both, oneDNN
    assert rows[0] == "| 64x112x112 | 10.3 | 10.3 | 20 | 10.3 | 103 | 103 | 20.6 |"
    assert "| training forward / copy floor | ResNet-50, batch 32 | met | 1.000 | 2 |" in text


def test_only_marked_places_of_a_page_change(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "above `<!-- bench: bars -->`\n<!-- bench: tiny -->\nold\n<!-- end of bench -->\nbelow\n"
    )
    write_page(run(steady, bars=True, groups=["tiny"]), page)
    once = page.read_text()
    assert once.startswith("above `<!-- bench: bars -->`\n<!-- bench: tiny -->\n")
    assert once.endswith("<!-- end of bench -->\nbelow\n")
    assert "old" not in once
    assert "| 60x100 |" in once
    write_page(run(steady, bars=True, groups=["tiny"]), page)
    assert page.read_text() == once


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("no marks", "has no place for tables"),
        ("words of <!-- bench: tiny -->\n<!-- end of bench -->", "has no place for tables"),
        ("<!-- bench: figures -->\n<!-- end of bench -->", "asks for 'figures'"),
        (
            "<!-- bench: tiny -->\n\n<!-- bench: bars -->\n<!-- end of bench -->",
            "without its <!-- end of bench -->",
        ),
    ],
)
def test_pages_that_cannot_be_filled(tmp_path, text, words):
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(BenchError, match=words):
        check_page(page)
    assert page.read_text() == text


@pytest.mark.skipif(not (HERE / "docs").exists(), reason="the pages are not beside the tests")
@pytest.mark.parametrize("page", ["README.md", "docs/performance.md"])
def test_the_pages_of_the_project_can_be_filled(page, tmp_path):
    copy = tmp_path / "copy.md"
    copy.write_text((HERE / page).read_text("utf-8"), "utf-8")
    write_page(run(steady), copy)
    assert "| 64x112x112 | 10.3 | 10.3 | 20 |" in copy.read_text("utf-8")


def test_a_page_in_no_folder(tmp_path):
    with pytest.raises(BenchError, match="is no folder"):
        check_page(tmp_path / "nowhere" / "page.md")


# ---- the command line ----------------------------------------------------------------------------


def test_options_reach_the_bench(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(cybn.bench, "run", lambda **options: calls.append(options))
    assert main(["bench"]) == 0
    words = "bench --bars --quick --groups tiny resnet50 --threads 1 2 --peers pytorch --quickest"
    words += " --operations forward --dtypes float64 --layouts channels-last"
    files = ["--json", "a.json", "--picture", "a.png", "--markdown", "a.md", "b.md"]
    assert main([*words.split(), *files]) == 0
    plain, full = calls
    assert not any(plain.values())
    given = {k: [str(p) for p in v] if k == "markdown" else v for k, v in full.items()}
    given |= {k: str(given[k]) for k in ("json", "picture")}
    assert given == {
        "bars": True,
        "quick": True,
        "quickest": True,
        "groups": ["tiny", "resnet50"],
        "threads": [1, 2],
        "peers": ["pytorch"],
        "operations": ["forward"],
        "dtypes": ["float64"],
        "layouts": ["channels-last"],
        "json": "a.json",
        "picture": "a.png",
        "markdown": ["a.md", "b.md"],
        "stored": [],
    }


@pytest.mark.parametrize(
    "wrong", ["--groups vgg", "--threads 0", "--peers mkl", "--dtypes float16"]
)
def test_wrong_options(wrong, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["bench", *wrong.split()])
    assert wrong.split()[0] in capsys.readouterr().err


def test_two_machines_on_the_command_line(tmp_path, capsys):
    pytest.importorskip("rich")
    files = [tmp_path / "one.json", tmp_path / "two.json"]
    for file, results in zip(files, parts(machine={"cpu": "another"}), strict=True):
        results.save(file)
    assert main(["bench", "--from", *map(str, files)]) == 1
    assert "figures of different machines" in capsys.readouterr().err


def test_a_stored_run_is_reported(tmp_path, capsys):
    pytest.importorskip("rich")
    file, page = tmp_path / "run.json", tmp_path / "page.md"
    run(steady, bars=True).save(file)
    assert main(["bench", "--bars", "--from", str(file), "--markdown", str(page)]) == 0
    out = capsys.readouterr().out
    assert "bars met" in out
    assert "made up" in out
    assert page.exists()
    assert main(["bench", "--from", str(file)]) == 0
    assert "53 layers of ResNet-50, forward + backward" in capsys.readouterr().out


def test_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    from cybn.bench.picture import draw

    results = run(steady, bars=True, groups=["resnet50"], operations=["forward"])
    draw(results, tmp_path / "run.png")
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
