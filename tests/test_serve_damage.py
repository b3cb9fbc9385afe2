"""Pictures and jobs survive a damaged, an older and an empty database, and truncated files."""

from __future__ import annotations

import hashlib
import random
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from inkstream.engine.pictures.metadata import encode_picture
from inkstream.serve.limits import Settings
from inkstream.serve.queue.store import Store, picture_id, upload_id
from inkstream.types import Request

PAGE = 4096
COUNT = 60


def write_png(path: Path, seed: int = 1) -> Path:
    """A small picture with inkstream's metadata, as the engine writes it."""
    request = Request(prompt=f"picture {seed}", model="pocket", seed=seed, width=32, height=32, steps=1)
    path.write_bytes(encode_picture(Image.new("RGB", (32, 32), (seed % 256, 0, 0)), "PNG", request))
    return path


def filled(folder: Path) -> list[str]:
    """Make a folder with COUNT ended jobs with a picture each and COUNT waiting jobs. Returns the pictures' ids."""
    store = Store(folder)
    store.recover(0.0)
    made = []
    for number in range(2 * COUNT):
        request = {"model": "pocket", "prompt": f"picture {number} " + "x" * 200, "seed": number}
        job = store.add_job(key="", now=100.0, request=request, total=1)
        if number % 2:
            store.start(job.id, 100.0)
            part = write_png(store.parts / "part.png", number)
            digest = hashlib.sha256(part.read_bytes()).hexdigest()
            facts = {"seconds": 1.0, "width": 32, "height": 32, "bytes": part.stat().st_size, "sha256": digest}
            picture = store.add_picture(job, 0, 100.0 + 100 * number, part, {**facts, "request": request})
            assert picture is not None
            store.end(job.id, "succeeded", 100.0)
            made.append(picture.id)
    store.put_setting("secret", "s")
    store.close()
    return made


def names(store: Store) -> set[str]:
    return {row[0] for row in store._db.execute("SELECT id FROM pictures")}


def overwrite(path: Path, start: int, count: int) -> None:
    with path.open("rb+") as file:
        file.seek(start)
        file.write(random.Random(1).randbytes(count))


@pytest.mark.parametrize(
    ("first", "pages", "jobs"),
    [(0, 1, 0), (b"picture 40 ", 4, 60), (b"picture 41 ", 1, 100), (1, 10_000, 0), (0, 10_000, 0)],
    ids=["the first page", "four pages of jobs", "a page", "all pages but the first", "all pages"],
)
def test_a_damaged_database_is_kept_and_all_pictures_and_readable_rows_survive(tmp_path, first, pages, jobs, caplog):
    made = filled(tmp_path)
    path = tmp_path / "inkstream.db"
    start = path.read_bytes().index(first) // PAGE if isinstance(first, bytes) else first
    overwrite(path, start * PAGE, min(pages * PAGE, path.stat().st_size - start * PAGE))
    broken = path.read_bytes()
    store = Store(tmp_path)
    active = store.recover(20_000.0)
    assert names(store) == set(made)
    assert all((store.pictures / picture.file).exists() for picture in store.recent(COUNT))
    there = store._db.execute("SELECT count(*) FROM jobs").fetchone()[0]
    assert jobs <= there <= 2 * COUNT if jobs else there == 0
    assert all(job.state == "queued" for job in active)
    (aside,) = tmp_path.glob("inkstream-damaged-*.db")
    assert aside.read_bytes() == broken
    assert aside.name in caplog.text
    store.close()
    again = Store(tmp_path)
    again.recover(20_000.0)
    assert names(again) == set(made)
    assert len(list(tmp_path.glob("inkstream-damaged-*.db"))) == 1
    again.close()


def test_damaged_pages_lose_only_their_own_rows(tmp_path):
    filled(tmp_path)
    path = tmp_path / "inkstream.db"
    content = path.read_bytes()
    leaves = [at for at in range(0, len(content), PAGE) if content[at] == 13]  # of tables
    start = next(at for at in leaves if b"picture 41 " in content[at : at + PAGE])
    lost = int.from_bytes(content[start + 3 : start + 5], "big")
    overwrite(path, start, PAGE)
    store = Store(tmp_path)
    there = store._db.execute("SELECT count(*) FROM jobs").fetchone()[0]
    assert there == 2 * COUNT - lost
    store.close()


def test_a_row_with_damaged_json_is_the_only_one_lost(tmp_path):
    filled(tmp_path)
    path = tmp_path / "inkstream.db"
    content = path.read_bytes()
    place = content.index(b'{"model": "pocket", "prompt": "picture 4 ')
    overwrite(path, place, 4)
    store = Store(tmp_path)
    assert len(store.recover(20_000.0)) == COUNT - 1
    assert store.setting("secret") == "s"
    store.close()


def test_a_truncated_database_is_repaired(tmp_path):
    made = filled(tmp_path)
    path = tmp_path / "inkstream.db"
    with path.open("rb+") as file:
        file.truncate(path.stat().st_size // 2)
    store = Store(tmp_path)
    store.recover(20_000.0)
    assert names(store) == set(made)
    store.close()


def test_a_sound_database_is_left_as_it_is(tmp_path):
    made = filled(tmp_path)
    store = Store(tmp_path)
    assert len(store.recover(20_000.0)) == COUNT
    assert names(store) == set(made)
    assert not list(tmp_path.glob("inkstream-damaged-*"))
    store.close()


def test_an_interrupted_repair_loses_nothing(tmp_path, monkeypatch):
    made = filled(tmp_path)
    overwrite(tmp_path / "inkstream.db", 4 * PAGE, 4 * PAGE)

    def cut(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("inkstream.serve.queue.store.os.replace", cut)
        with pytest.raises(KeyboardInterrupt):
            Store(tmp_path)
    store = Store(tmp_path)
    assert store.recover(20_000.0)
    assert names(store) == set(made)
    store.close()


def test_pictures_are_found_again_with_an_empty_or_older_database(tmp_path, start_server):
    served = start_server(Settings(tmp_path, models=("pocket",)))
    first = served.ended(served.draw(prompt="the first", seed=1))
    served.service.store._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    shutil.copy(tmp_path / "inkstream.db", tmp_path.parent / "older.db")
    second = served.ended(served.draw(prompt="the second", seed=2, count=2))
    files = {one["id"]: served.ask("GET", one["url"])[2] for job in (first, second) for one in job["pictures"]}
    served.stop()
    for older in (tmp_path.parent / "older.db", None):
        for file in tmp_path.glob("inkstream.db*"):
            file.unlink()
        if older:
            shutil.copy(older, tmp_path / "inkstream.db")
        served = start_server(Settings(tmp_path, models=("pocket",)), engine="input()")
        pictures = served.ask("GET", "/v1/pictures")[2]["pictures"]
        assert {one["id"]: served.ask("GET", one["url"])[2] for one in pictures} == files
        assert {one["id"]: one["seed"] for one in pictures}[second["pictures"][1]["id"]] == 3
        assert served.ask("GET", "/v1/pictures?q=second")[2]["total"] == 2
        assert all(served.ask("GET", one["thumbnail"])[0] == 200 for one in pictures)
        own = [one for one in pictures if one["id"] == first["pictures"][0]["id"]]
        assert (own[0]["job"] == first["id"]) == bool(older)
        served.stop()


def test_a_picture_whose_row_was_lost_in_a_crash_gets_it_back_and_is_not_drawn_again(tmp_path):
    store = Store(tmp_path)
    store.recover(0.0)
    job = store.add_job(key="k", now=100.0, request={"model": "pocket", "prompt": "x", "seed": 1}, total=2)
    store.start(job.id, 100.0)
    (store.pictures / "2026-11").mkdir()
    for place in (0, 1):
        write_png(store.pictures / "2026-11" / f"{picture_id(job.id, place)}.png", 1 + place)
        store.close()
        store = Store(tmp_path)
        assert len(store.recover(200.0)) == 1 - place
        found = store.pictures_of(job.id)
        assert [(one.place, one.key, one.seed) for one in found] == [(at, "k", 1 + at) for at in range(place + 1)]
        store.start(job.id, 300.0)
    assert store.job(job.id).state == "succeeded"
    store.close()


def test_broken_and_foreign_files_are_neither_shown_nor_removed(tmp_path):
    store = Store(tmp_path)
    folder = store.pictures / "2026-11"
    folder.mkdir()
    whole = write_png(folder / "whole.png").read_bytes()
    for number, content in enumerate((b"", b"text", whole[:-20], whole[: len(whole) // 2])):
        (folder / f"p{number:020x}.png").write_bytes(content)
    Image.new("RGB", (8, 8)).save(folder / f"p{9:020x}.png")
    (folder / "photo.png").write_bytes(whole)
    (store.uploads / "u1.png").write_bytes(b"half")
    store.recover(100.0)
    assert names(store) == set()
    assert len(list(folder.iterdir())) == 7
    assert (store.uploads / "u1.png").exists()
    store.close()


def test_uploads_are_found_again_and_keep_their_key_if_the_database_has_it(tmp_path):
    for owner, known in (("ann", True), ("ben", False)):
        store = Store(tmp_path / owner)
        store.recover(0.0)
        if known:
            store.add_job(key=owner, now=1.0, request={"model": "pocket", "prompt": "x", "seed": 1}, total=1)
        data = write_png(tmp_path / "x.png").read_bytes()
        name = upload_id(owner, data)
        (store.uploads / f"{name}.png").write_bytes(data)
        store.recover(100.0)
        upload = store.upload(name)
        assert upload is not None
        assert (upload.key, upload.width, upload.type) == (owner if known else "", 32, "image/png")
        store.close()


def test_a_picture_that_is_deleted_for_good_does_not_come_back_after_a_crash(tmp_path, monkeypatch):
    filled(tmp_path)
    store = Store(tmp_path)
    store.recover(20_000.0)
    store.mark(store.recent(1)[0].id, None, 20_000.0)

    def cut(self: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Store, "_change", cut)
        with pytest.raises(KeyboardInterrupt):
            store.tidy(1e9)
    store.close()
    store = Store(tmp_path)
    store.recover(1e9)
    assert len(names(store)) == COUNT - 1
    store.close()


def test_damage_during_a_run_is_reported_in_one_line_and_repaired_at_the_next_start(tmp_path, start_server):
    made = filled(tmp_path)
    served = start_server(Settings(tmp_path, models=("pocket",)), engine="input()")
    served.service.store._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    for db in (served.service.store._db, served.service.store._reader):
        db.execute("PRAGMA cache_size = 0")
    path = tmp_path / "inkstream.db"
    overwrite(path, 2 * PAGE, path.stat().st_size - 2 * PAGE)
    status, _, body = served.ask("GET", "/v1/pictures?limit=500")
    assert status == 500
    assert "damaged" in body["error"]["message"]
    assert "restart the server to repair it" in body["error"]["message"]
    assert served.ask("GET", "/healthz")[0] == 200
    served.stop()
    served = start_server(Settings(tmp_path, models=("pocket",)), engine="input()")
    assert {one["id"] for one in served.ask("GET", "/v1/pictures?limit=500")[2]["pictures"]} == set(made)
    served.stop()


def test_a_truncated_picture_is_reported_as_damaged(tmp_path, start_server):
    filled(tmp_path)
    served = start_server(Settings(tmp_path, models=("pocket",)), engine="input()")
    one, other = served.ask("GET", "/v1/pictures?limit=2")[2]["pictures"]
    for picture, keep in ((one, 60), (other, 12)):
        (file,) = tmp_path.glob(f"pictures/*/{picture['id']}.png")
        file.write_bytes(file.read_bytes()[:keep])
        status, _, body = served.ask("GET", picture["thumbnail"])
        assert (status, "damaged" in body["error"]["message"]) == (404, True)
        assert served.ask("GET", picture["url"])[0] == 200  # what is left of it
    assert not list(tmp_path.glob("thumbnails/.*"))
    served.stop()
    with closing(sqlite3.connect(tmp_path / "inkstream.db")) as db:
        assert db.execute("SELECT count(*) FROM pictures").fetchone()[0] == COUNT
