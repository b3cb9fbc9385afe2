"""`inkstream batch`: files of requests, the manifest, and resuming after a stop, with tiny models."""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import io
import json
import threading
import time
from _thread import interrupt_main
from contextlib import closing
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from inkstream import Engine, Request
from inkstream.cli import main
from inkstream.cli.batch import duration, read_rows, seed_of
from inkstream.clients.manifest import Manifest, digest
from inkstream.clients.many import Drawn, draw_many
from inkstream.engine.pictures.metadata import read_request
from inkstream.serve.limits import Limits, Settings
from inkstream.types import Failed, Loading, Machine, Step

SMALL = ["-W", "32", "-H", "32", "--steps", "2", "--quiet"]
SCRIPT = Path(__file__).parent.parent / "scripts" / "batch_fault.py"


def fault_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("batch_fault", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lines_in(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    return sorted(lines, key=lambda line: (line["row"], line["index"]))


def pictures_in(folder: Path) -> dict[str, int]:
    """The names of the pictures and their modification times."""
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.png")}


@pytest.fixture
def words(tiny_folder, tmp_path, monkeypatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    return ["--out", "out", "-m", str(tiny_folder), *SMALL]


def write(name: str, text: str) -> str:
    Path(name).write_text(text)
    return name


def problems(capsys) -> list[str]:
    return capsys.readouterr().err.splitlines()


# Drawing


def test_each_line_of_a_text_file_becomes_a_picture_and_a_line_of_the_manifest(words, capsys):
    write("foxes.txt", "a red fox\n\n  a blue fox \n")
    assert main(["batch", "foxes.txt", *words]) == 0
    first, second = lines_in(Path("out"))
    assert (first["row"], second["row"]) == (1, 3)
    assert first["file"].startswith("00001-a-red-fox-")
    assert second["seed"] == seed_of(3, 0) != first["seed"]
    assert sorted(capsys.readouterr().out.split()) == sorted(f"out/{line['file']}" for line in (first, second))
    for line in (first, second):
        data = (Path("out") / line["file"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == line["sha256"]
        assert line["seconds"] > 0
    carried = read_request(f"out/{second['file']}").request
    assert (carried.prompt, carried.seed, carried.steps) == ("a blue fox", second["seed"], 2)


def test_a_picture_is_the_one_that_generate_draws(words, tiny_folder):
    write("foxes.jsonl", '{"prompt": "a red fox", "seed": 5}\n{"prompt": "two foxes"}\n')
    assert main(["batch", "foxes.jsonl", *words]) == 0
    asked = Request(prompt="a red fox", seed=5, model=str(tiny_folder), width=32, height=32, steps=2)
    alone = Engine(Machine("cpu")).generate(asked).images[0]
    drawn = Image.open(f"out/{lines_in(Path('out'))[0]['file']}")
    assert np.abs(np.asarray(drawn).astype(int) - np.asarray(alone)).max() <= 1


def test_rows_win_over_options_and_count_gives_each_picture_a_line(words):
    table = io.StringIO()
    rows = [["prompt", "seed", "count", "width"], ["a fox, red", "7", "2", ""], ['a "fox"\nin two lines', "", "", "48"]]
    csv.writer(table).writerows(rows)
    write("foxes.csv", "\ufeff" + table.getvalue())
    assert main(["batch", "foxes.csv", *words, "--seed", "1"]) == 0
    lines = lines_in(Path("out"))
    assert [(line["row"], line["index"], line["seed"]) for line in lines] == [
        (2, 0, 7),
        (2, 1, 8),
        (3, 0, seed_of(3, 1)),
    ]
    sizes = [Image.open(f"out/{line['file']}").size for line in lines]
    assert sizes == [(32, 32), (32, 32), (48, 32)]
    assert read_request(f"out/{lines[2]['file']}").request.prompt == 'a "fox"\nin two lines'


def test_paths_in_a_row_are_relative_to_the_file(words, tmp_path):
    (tmp_path / "rows").mkdir()
    Image.new("RGB", (32, 32), "red").save("rows/start.png")
    Image.new("RGB", (32, 32), "blue").save("start.png")
    write("rows/edits.jsonl", '{"prompt": "a fox", "image": "start.png", "strength": 0}\n')
    assert main(["batch", "rows/edits.jsonl", *words]) == 0
    before = pictures_in(Path("out"))
    assert read_request(f"out/{next(iter(before))}").request.image == "rows/start.png"
    Image.new("RGB", (32, 32), "green").save("rows/start.png")
    assert main(["batch", "rows/edits.jsonl", *words]) == 0
    assert len(pictures_in(Path("out"))) == 2  # another picture under the same name is another request


def test_rows_are_drawn_model_by_model_in_any_order(tiny_folder, tiny_base_folder):
    models = [str(tiny_folder), str(tiny_base_folder)] * 3
    wishes = [Request(prompt=f"fox {i}", model=model, seed=i, width=32, height=32, steps=1, guidance=1)
              for i, model in enumerate(models)]  # fmt: skip
    told = list(draw_many(Engine(Machine("cpu")), wishes, 2))
    assert [place % 2 for place, event in told if isinstance(event, Drawn)] == [0, 0, 0, 1, 1, 1]
    loads = {(place % 2, event.what) for place, event in told if isinstance(event, Loading) and event.what != "prompt"}
    assert {turn for turn, _ in loads} == {0, 1}


def test_a_row_that_cannot_be_drawn_does_not_fail_others(tiny_folder):
    wishes = [Request(prompt=f"fox {i}", model=model, seed=i, width=32, height=32, steps=1)
              for i, model in enumerate((str(tiny_folder), "/nowhere", str(tiny_folder)))]  # fmt: skip
    ends = {
        place: event
        for place, event in draw_many(Engine(Machine("cpu")), wishes, 4)
        if isinstance(event, Drawn | Failed)
    }
    assert [type(ends[place]) for place in range(3)] == [Drawn, Failed, Drawn]
    assert "/nowhere" in ends[1].error


def test_closing_stops_within_a_step(tiny_folder):
    wishes = [Request(prompt="a fox", model=str(tiny_folder), seed=i, width=32, height=32, steps=500) for i in range(6)]
    before = threading.active_count()
    told = draw_many(Engine(Machine("cpu")), wishes, 3)
    for _, event in told:
        if isinstance(event, Step):
            break
    began = time.monotonic()
    told.close()
    assert time.monotonic() - began < 5
    assert threading.active_count() == before


# Resuming


def test_the_same_command_again_draws_only_what_is_missing_damaged_or_changed(words, capsys):
    write("foxes.txt", "one fox\ntwo foxes\nthree foxes\nfour foxes\n")
    loud = [word for word in words if word != "--quiet"]
    assert main(["batch", "foxes.txt", *words]) == 0
    before = pictures_in(Path("out"))
    assert main(["batch", "foxes.txt", *loud]) == 0
    assert "4 of 4 pictures are there, 0 to draw" in problems(capsys)
    assert pictures_in(Path("out")) == before

    one, two, three, _ = (line["file"] for line in lines_in(Path("out")))
    Path("out", one).unlink()
    Path("out", two).write_bytes(Path("out", two).read_bytes()[:-9])
    write("foxes.txt", "one fox\ntwo foxes\nthree wolves\nfour foxes\n")
    assert main(["batch", "foxes.txt", *loud]) == 0
    said = problems(capsys)
    assert "1 of 4 pictures are there, 3 to draw" in said
    assert "1 rows have changed: they are drawn again, and the old pictures stay" in said
    after = pictures_in(Path("out"))
    assert {name for name in after if after[name] != before.get(name)} > {one, two}
    assert after[three] == before[three]
    assert [line["row"] for line in lines_in(Path("out"))] == [1, 2, 3, 4]
    assert "three-wolves" in lines_in(Path("out"))[2]["file"]


def test_the_state_after_a_crash_is_repaired(words):
    write("foxes.txt", "one fox\ntwo foxes\n")
    assert main(["batch", "foxes.txt", *words]) == 0
    manifest = Path("out/manifest.jsonl")
    first, second = manifest.read_bytes().splitlines(keepends=True)
    manifest.write_bytes(first + second[:40])  # killed while the line was written, after the picture's rename
    Path("out/.00009-x.png.part").write_bytes(b"half a picture")
    assert main(["batch", "foxes.txt", *words]) == 0
    assert [line["row"] for line in lines_in(Path("out"))] == [1, 2]
    assert len(pictures_in(Path("out"))) == 2
    assert list(Path("out").glob(".*.part")) == []


def test_manifest_lines_of_rows_that_were_removed_stay(words):
    write("some.txt", "one fox\n")
    write("all.txt", "one fox\ntwo foxes\n")
    for name, count in (("all.txt", 2), ("some.txt", 2), ("all.txt", 2)):
        assert main(["batch", name, *words]) == 0
        assert len(lines_in(Path("out"))) == count


def test_an_interrupt_keeps_finished_pictures_and_prints_how_to_resume(words, capsys):
    write("foxes.txt", "".join(f"{i} foxes\n" for i in range(40)))

    def interrupt() -> None:
        while not any(Path("out").glob("*.png")):
            time.sleep(0.01)
        interrupt_main()

    threading.Thread(target=interrupt, daemon=True).start()
    assert main(["batch", "foxes.txt", *(word for word in words if word != "--quiet"), "--slots", "1"]) == 130
    assert "pictures are in out: the same command resumes" in problems(capsys)[-1]
    assert 0 < len(lines_in(Path("out"))) < 40


def test_two_runs_into_one_folder_are_refused(words, capsys):
    write("foxes.txt", "one fox\n")
    with closing(Manifest(Path("out"))):
        assert main(["batch", "foxes.txt", *words]) == 2
    assert "another run draws into out" in problems(capsys)[-1]


@pytest.mark.slow
def test_a_killed_run_resumes(tiny_folder, tmp_path):
    words = ["-m", str(tiny_folder), "-W", "32", "-H", "32", "--steps", "50", "--slots", "2"]
    outcome = fault_script().ordeal(tmp_path, 16, 1, words)
    assert outcome["problems"] == []
    assert outcome["pictures"] == outcome["lines"] == 16
    assert 0 < outcome["killed at"][0] < 16


# Errors


def test_all_bad_rows_are_named_before_anything_is_drawn(words, capsys):
    write("rows.jsonl", "\n".join([
        '{"prompt": "a fox", "width": 33, "steps": 2}',
        '{"prompt": "a fox", "stpes": 2}',
        '{"prompt": "a fox"',
        '["a fox"]',
        '{"steps": 0, "width": 7, "prompt": "a fox"}',
        '{"prompt": " "}',
        '{"prompt": "a fox", "image": "none.png"}',
        '{"prompt": "a fox", "model": "/nowhere"}',
        '{"prompt": "a fox", "solver": "eular"}',
        '{"prompt": "a good one"}',
    ]))  # fmt: skip
    assert main(["batch", "rows.jsonl", *words]) == 2
    *named, last = problems(capsys)
    told = dict.fromkeys(range(1, 11), "")
    for line in named:
        told[int(line.partition(": ")[0].rpartition(" ")[2])] += line.partition(": ")[2] + "\n"
    assert "width 33 is not a multiple of 16" in told[1]
    assert "'stpes' is not a field of a request: did you mean steps?" in told[2]
    assert "is not valid JSON" in told[3]
    assert "is not a JSON object" in told[4]
    assert "width 7 is too small: give 16 or more" in told[5]
    assert "steps 0 is too small: give 1 or more" in told[5]
    assert "there is no prompt" in told[6]
    assert "picture none.png does not exist" in told[7]
    assert "/nowhere" in told[8]
    assert "solver eular is not known: did you mean euler?" in told[9]
    assert told[10] == ""
    assert "9 rows of rows.jsonl cannot be drawn" in last
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("promt,seed\na fox,1\n", 1, "column 'promt' is no field of a request"),
        ("prompt;seed\na fox;1\n", 1, "put commas between them"),
        ("prompt,seed\na fox, red,1\n", 2, "has 3 cells under 2 names"),
        ('prompt,seed\n"a fox,1\n', 2, "is not valid CSV"),
    ],
)
def test_an_invalid_table_is_refused_with_its_line_number(text, line, says, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text(text)
    ((where, problem),) = read_rows(path, {})[1]
    assert where == line
    assert says in problem


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["rows.pdf"], "its name must end in .txt, .csv, .jsonl"),
        (["none.txt"], "cannot be read"),
        (["empty.txt"], "has no rows"),
        (["rows.txt", "--ray", "--server", "http://127.0.0.1:1"], "give one of them"),
        (["rows.txt", "--engines", "2"], "add --ray"),
        (["rows.txt", "--slots", "0"], "give 1 or more"),
        (["rows.txt", "--out", "rows.txt/x"], "a file is in the way"),
    ],
)
def test_an_invalid_command_prints_one_line_with_the_remedy(words, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write("rows.txt", "a fox\n")
    write("empty.txt", "\n\n")
    out = [] if "--out" in words else ["--out", "out"]
    assert main(["batch", *words, *out]) == 2
    assert says in problems(capsys)[-1]


SHOP = "SKU,Title,Size,Style,Price\nA-1,a red heart,32x48,,9.5\nB 2,two blue stars,64×32,bold,3\n"


def test_the_columns_of_a_shop_are_named_and_its_pictures_have_its_names(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write("list.csv", SHOP)
    words = ["--columns", "SKU=name", "--columns", "Title=prompt", "--columns", "Size=size", "--steps", "1"]
    assert main(["batch", "list.csv", "--out", "out", *words, "--json"]) == 0
    shown = capsys.readouterr()
    assert "columns that are left out: Price, Style" in shown.err
    assert sorted(path.name for path in Path("out").glob("*.png")) == ["A-1.png", "B 2.png"]
    assert Image.open("out/A-1.png").size == (32, 48)
    assert Image.open("out/B 2.png").size == (64, 32)
    before = Path("out/A-1.png").read_bytes()
    write("list.csv", SHOP.replace("a red heart", "a green heart"))
    assert main(["batch", "list.csv", "--out", "out", *words]) == 0
    assert "1 rows have changed" in capsys.readouterr().err
    kept = list(Path("out").glob("A-1-*.png"))
    assert [path.read_bytes() for path in kept] == [before]  # nothing that was drawn is lost
    assert Path("out/A-1.png").read_bytes() != before
    assert main(["batch", "list.csv", "--out", "out", *words]) == 0
    assert "2 of 2 pictures are there, 0 to draw" in capsys.readouterr().err
    header, *rows = Path("list.csv").read_text().splitlines()
    write("list.csv", "\n".join([header, *reversed(rows)]))  # other lines give other seeds
    now = {path.read_bytes() for path in Path("out").glob("*.png")}
    assert main(["batch", "list.csv", "--out", "out", *words]) == 0
    assert now < {path.read_bytes() for path in Path("out").glob("*.png")}


def test_names_and_sizes_need_no_columns_and_a_count_numbers_the_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("rows.jsonl", '{"prompt": "a red disc", "name": "disc.png", "size": "32x32", "count": 2}\n')
    assert main(["batch", "rows.jsonl", "--out", "out", "--steps", "1"]) == 0
    assert sorted(path.name for path in Path("out").glob("*.png")) == ["disc-1.png", "disc-2.png"]


def test_a_name_that_a_count_makes_is_a_name_too(tmp_path, monkeypatch, capsys):
    """Two rows with one file would be drawn again and again in turns."""
    monkeypatch.chdir(tmp_path)
    rows = ['{"prompt": "a disc", "name": "a", "count": 2}', '{"prompt": "a heart", "name": "A-1"}']
    write("rows.jsonl", "\n".join(rows))
    assert main(["batch", "rows.jsonl", "--out", "out", "--steps", "1"]) == 2
    assert "line 2: name 'A-1.png' is that of line 1, too" in problems(capsys)[0]


def test_bad_rows_are_told_and_skipped_if_asked(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [
        "name,prompt,size",
        "a,a red disc,32x32",
        "a,a blue disc,32x32",
        "b/c,a disc,32x32",
        "d,a disc,large",
        "e,,32x32",
    ]
    write("rows.csv", "\n".join(rows) + "\n")
    assert main(["batch", "rows.csv", "--out", "out", "--steps", "1"]) == 2
    told = problems(capsys)
    assert "line 3: name 'a.png' is that of line 2, too: give each row a name of its own" in told[0]
    assert "line 4: name 'b/c' cannot be a file's name" in told[1]
    assert "line 5: size 'large' is no size: write it as 1024x768" in told[2]
    assert "line 6: there is no prompt" in told[3]
    assert "add --skip-bad to draw the others" in told[-1]
    assert not Path("out").exists()
    assert main(["batch", "rows.csv", "--out", "out", "--steps", "1", "--skip-bad", "--json"]) == 1
    shown = capsys.readouterr()
    assert "4 rows are skipped" in shown.err
    assert json.loads(shown.out)["bad"] == [3, 4, 5, 6]
    assert [path.name for path in Path("out").glob("*.png")] == ["a.png"]


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        (["Title"], "--columns 'Title' is no COLUMN=FIELD: write it as Title=prompt"),
        (["Title=promt"], "did you mean prompt?"),
        (["Titel=prompt"], "list.csv has no column 'Titel': it has Price, SKU, Size, Style, Title"),
        (["Title=prompt", "SKU=prompt"], "--columns names prompt twice: name it once"),
    ],
)
def test_a_wrong_column_is_told_in_a_line(columns, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write("list.csv", SHOP)
    words = [word for column in columns for word in ("--columns", column)]
    assert main(["batch", "list.csv", "--out", "out", *words]) == 2
    assert says in problems(capsys)[-1]


def test_a_column_may_be_one_more_lora(tmp_path):
    path = tmp_path / "list.csv"
    path.write_text("Title,Style,Light\na disc,bold:0.5,dusk\na heart,,dusk\n")
    rows, wrong, unused = read_rows(path, {"Title": "prompt", "Style": "lora", "Light": "lora"})
    assert not wrong
    assert not unused
    assert [fields["lora"] for _, fields in rows] == [["bold:0.5", "dusk"], ["dusk"]]


def test_a_server_draws_a_file_and_a_refused_row_is_listed_and_retried(server, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write("rows.jsonl", '{"prompt": "a red disc"}\n{"prompt": "a disc", "steps": 51}\n{"prompt": "a blue disc"}\n')
    address = f"http://127.0.0.1:{server.port}"
    command = ["batch", "rows.jsonl", "--out", "out", "-W", "32", "-H", "32", "--server", address]
    assert main([*command, "--steps", "1", "--json"]) == 1
    shown = capsys.readouterr()
    told = json.loads(shown.out)
    assert [one["row"] for one in told["failed"]] == [2]
    assert "rows.jsonl, line 2: steps 51 is too many: take at most 50" in shown.err
    before = pictures_in(Path("out"))
    assert len(before) == 2
    assert main([*command, "--steps", "1"]) == 1
    assert pictures_in(Path("out")) == before
    lines = lines_in(Path("out"))
    assert [line["row"] for line in lines] == [1, 2, 3]
    assert "51" in lines[1]["error"]
    assert read_request(f"out/{lines[0]['file']}").request.model == "pocket"


@pytest.mark.slow
def test_batch_waits_for_a_server_with_a_full_queue(start_server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("rows.txt", "".join(f"{i} red discs\n" for i in range(4)))
    served = start_server(Settings(tmp_path / "data", models=("pocket",), slots=1, limits=Limits(queue=1)))
    try:
        address = f"http://127.0.0.1:{served.port}"
        assert main(["batch", "rows.txt", "--out", "out", *SMALL, "--server", address]) == 0
        assert served.service.metrics.refused.labels("429")._value.get() > 0
    finally:
        served.stop()
    assert len(pictures_in(Path("out"))) == 4


def test_a_missing_server_or_model_is_reported_at_once(server, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write("rows.txt", "a fox\n")
    assert main(["batch", "rows.txt", "--out", "out", "--server", "http://127.0.0.1:1"]) == 2
    assert "does not answer" in problems(capsys)[-1]
    assert main(["batch", "rows.txt", "--out", "out", "-m", "z", "--server", f"http://127.0.0.1:{server.port}"]) == 2
    assert "model z is not offered by the server: take pocket" in problems(capsys)[0]


# Details


def test_seeds_depend_on_the_row_and_the_base_seed_alone():
    seeds = [seed_of(line, base) for line in range(1, 200) for base in (0, 1)]
    assert len(set(seeds)) == len(seeds)
    assert seed_of(1, 0) == int.from_bytes(hashlib.sha256(b"0 1").digest()[:4], "big")


def test_a_digest_covers_only_the_set_fields():
    assert digest(Request(prompt="x", seed=1)) == digest(Request(prompt="x", seed=1, count=1, guidance=None))
    assert digest(Request(prompt="x", seed=1)) != digest(Request(prompt="x", seed=2))


def test_durations_are_printed_in_one_or_two_units():
    assert [duration(s) for s in (3.4, 89, 100, 3599, 7260)] == ["3 s", "89 s", "2 min", "1 h 0 min", "2 h 1 min"]


def test_without_ray_the_error_names_the_extra(words, capsys):
    if importlib.util.find_spec("ray") is not None:
        pytest.skip("ray is installed")
    write("foxes.txt", "one fox\n")
    assert main(["batch", "foxes.txt", *words, "--ray"]) == 2
    assert "pip install 'inkstream[ray]'" in problems(capsys)[-1]
