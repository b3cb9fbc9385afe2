"""The parts of the queue that need no engine: order, estimates, the feed, the store."""

from __future__ import annotations

import asyncio
import hashlib
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inkstream.serve.engines.pace import Pace, ends
from inkstream.serve.queue.feed import BEHIND, Feed, Happening
from inkstream.serve.queue.schedule import Waiting, in_order
from inkstream.serve.queue.store import WEEK, Search, Store, Upload
from inkstream.types import InputError, Request


def waiting(*jobs: tuple[Any, ...]) -> list[Waiting]:
    """Waiting jobs from (name, key, priority, cost), in the order in which they were sent."""
    return [Waiting(name, key, level, place, "pocket", cost) for place, (name, key, level, cost) in enumerate(jobs)]


def names(order: list[Waiting]) -> str:
    return "".join(job.id for job in order)


def test_jobs_of_one_key_are_drawn_in_the_order_they_came():
    assert names(in_order(waiting(("a", "x", 0, 1), ("b", "x", 0, 9), ("c", "x", 0, 1)), {})) == "abc"


def test_a_higher_priority_goes_first():
    assert names(in_order(waiting(("a", "x", 0, 1), ("b", "x", 5, 1), ("c", "y", -1, 1)), {})) == "bac"


def test_a_key_with_many_jobs_does_not_delay_other_keys():
    jobs = waiting(("a", "x", 0, 1), ("b", "x", 0, 1), ("c", "x", 0, 1), ("d", "y", 0, 1), ("e", "z", 0, 1))
    assert names(in_order(jobs, {})) == "adebc"


def test_turns_are_weighted_by_work_and_not_by_jobs():
    jobs = waiting(("a", "x", 0, 4), ("b", "x", 0, 4), ("c", "y", 0, 1), ("d", "y", 0, 1), ("e", "y", 0, 1))
    assert names(in_order(jobs, {})) == "acdeb"


def test_a_key_that_received_work_waits_for_keys_that_did_not():
    assert names(in_order(waiting(("a", "x", 0, 1), ("b", "y", 0, 1)), {"x": 10.0})) == "ba"


def test_the_loaded_model_is_kept_for_a_while_but_not_for_ever():
    jobs = [Waiting(f"{key}{i}", key, 0, i + 10 * (key == "y"), key, 1.0) for key in "xy" for i in range(5)]
    order = [job.key for job in in_order(jobs, {}, "y", switch=2.5)]
    assert "".join(order) == "yyyxxxxxyy"
    assert "".join(job.key for job in in_order(jobs, {}, "y")) == "xyxyxyxyxy"


@given(st.lists(st.tuples(st.sampled_from("xyz"), st.integers(-2, 2), st.floats(0, 9)), max_size=30))
def test_the_order_has_each_job_once_and_keeps_the_order_within_a_key(jobs):
    order = in_order(waiting(*((str(i), *job) for i, job in enumerate(jobs))), {"x": 3.0}, "pocket", 5.0)
    assert sorted(job.place for job in order) == list(range(len(jobs)))
    for key in "xyz":
        own = [(-job.priority, job.place) for job in order if job.key == key]
        assert own == sorted(own)


def test_jobs_end_one_after_the_other_in_one_slot_and_share_the_engine_in_several():
    assert ends([3.0], [2.0, 4.0], slots=1) == [3.0, 5.0, 9.0]
    assert ends([3.0], [2.0, 4.0], slots=2) == [6.0, 4.0, 9.0]
    assert ends([2.0, 2.0], [], slots=2) == [4.0, 4.0]
    assert ends([], [2.0, None, 4.0], slots=1) == [2.0, None, None]
    assert ends([], [], slots=1) == []


@given(st.lists(st.floats(0, 99), max_size=9), st.integers(1, 5))
def test_the_total_time_does_not_depend_on_the_number_of_slots(seconds, slots):
    found = ends([], seconds, slots)
    assert max(found, default=0.0) == pytest.approx(sum(seconds))
    assert all(end >= own - 1e-6 for end, own in zip(found, seconds))


def test_pace_is_learnt_from_pictures_and_grows_with_steps_and_pixels():
    pace = Pace({})
    small = Request(model="m", width=512, height=512, steps=4)
    large = Request(model="m", width=1024, height=512, steps=8)
    assert not pace.knows("m")
    pace.learn(small, 6.0, shared=3.0)
    assert pace.seconds("m", pace.work(small)) == pytest.approx(2.0)
    assert pace.seconds("m", pace.work(large)) == pytest.approx(8.0)
    pace.learn(small, 4.0)
    assert 2.0 < pace.seconds("m", pace.work(small)) < 4.0


def test_a_listener_that_reconnects_gets_the_missed_lasting_events():
    feed = Feed()
    with feed.listen(job="a") as listener:
        feed.tell("a", "", "picture", {"n": 1})
        seen = feed.name_of(listener.waiting.get_nowait())  # type: ignore[arg-type]
        feed.tell("a", "", "step", {}, lasting=False)
        feed.tell("b", "", "picture", {"n": 2})
        feed.tell("a", "", "succeeded", {"n": 3})
        assert [h.name for h in feed.missed(seen, listener) or []] == ["succeeded"]
        assert feed.missed(None, listener) is None
        assert feed.missed("other-1", listener) is None
        assert feed.missed(f"{seen[:-1]}{int(seen[-1], 16) ^ 1:x}", listener) is None  # a forged id
        other = Feed()
        other.tell("a", "", "picture", {"n": 1})
        assert feed.missed(other.name_of(Happening(1, "a", "", "picture", {"n": 1}, True)), listener) is None


def test_an_event_id_does_not_reveal_the_number_of_events():
    feed = Feed()
    names = [feed.name_of(Happening(number, "a", "", "step", {}, False)) for number in (0, 1, 2, 500)]
    assert names == [feed.name_of(Happening(number, "a", "", "step", {}, False)) for number in (0, 1, 2, 500)]
    assert len({len(name) for name in names}) == 1
    assert all(int(part, 16) > 2**40 for name in names for part in name.split("-"))


def test_a_listener_of_a_key_gets_no_events_of_other_keys():
    feed = Feed()
    with feed.listen(key="x") as listener:
        feed.tell("a", "x", "picture", {})
        feed.tell("b", "y", "picture", {})
        assert listener.waiting.qsize() == 1


def test_a_listener_that_does_not_read_loses_steps_and_is_then_disconnected():
    feed = Feed()
    with feed.listen() as listener:
        for _ in range(BEHIND + 50):
            feed.tell("a", "", "step", {}, lasting=False)
        assert listener.waiting.qsize() == BEHIND
        feed.tell("a", "", "picture", {})
        assert not feed.listened_to()


def test_a_listener_gets_pings_in_silence_and_ends_when_the_feed_closes():
    async def listen() -> list[str]:
        feed, heard = Feed(), []
        with feed.listen() as listener:
            async for happening in listener.all(ping=0.01):
                heard.append(happening.name)
                feed.close()
        return heard

    assert asyncio.run(listen()) == ["ping"]


# The store -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "data")
    store.recover(0.0)
    yield store
    store.close()


def add_job(store: Store, now: float = 100.0, total: int = 1, **more: Any) -> Any:
    return store.add_job(key="", now=now, request={"model": "pocket", "prompt": "x", "seed": 1}, total=total, **more)


def add_picture(store: Store, job: Any, place: int = 0, now: float = 100.0, **request: Any) -> Any:
    part = store.parts / f"{place}.png"
    part.write_bytes(b"pixels")
    digest = hashlib.sha256(b"pixels").hexdigest()
    facts = {"seconds": 1.0, "width": 16, "height": 16, "bytes": 6, "sha256": digest}
    request = {"model": "pocket", "prompt": "x", "seed": 1, **request}
    return store.add_picture(job, place, now, part, {**facts, "request": request})


def restarted(store: Store) -> Store:
    """The store of a new server on the same folder, after this one is closed."""
    store.close()
    return Store(store.folder)


def test_a_job_ends_once(store):
    job = add_job(store)
    assert store.start(job.id, 1.0)
    assert not store.start(job.id, 1.0)
    assert store.end(job.id, "cancelled", 2.0)
    assert not store.end(job.id, "succeeded", 3.0)
    assert store.job(job.id).state == "cancelled"


def test_a_picture_is_stored_once_and_only_while_its_job_runs(store):
    job = add_job(store, total=2)
    assert add_picture(store, job) is None  # the job is not running yet
    store.start(job.id, 1.0)
    picture = add_picture(store, job)
    assert picture is not None
    assert (store.pictures / picture.file).read_bytes() == b"pixels"
    assert add_picture(store, job) is None
    store.end(job.id, "cancelled", 2.0)
    assert add_picture(store, job, 1) is None
    assert [file.name for file in store.pictures.glob("*/*")] == [Path(picture.file).name]
    assert list(store.parts.iterdir()) == []


def test_after_a_crash_running_jobs_are_queued_and_half_written_files_are_removed(store):
    running, finished, waited, queued = (add_job(store, waited=i == 2) for i in range(4))
    for job in (running, finished, waited):
        store.start(job.id, 1.0)
    kept = add_picture(store, finished)  # and the server dies before it writes the end
    own = store.pictures / "1970-01" / "mine.png"
    own.write_bytes(b"not ours")
    (store.parts / "half").write_bytes(b"half")
    store = restarted(store)
    assert [job.id for job in store.recover(5.0)] == [running.id, queued.id]
    states = {job.id: job.state for job in store.list_jobs(None, None, None, 9)}
    assert (states[running.id], states[finished.id], states[waited.id]) == ("queued", "succeeded", "cancelled")
    assert own.exists()
    assert (store.pictures / kept.file).exists()
    assert list(store.parts.iterdir()) == []
    store.close()


def test_a_picture_that_did_not_reach_the_disk_before_a_power_cut_is_drawn_again(store):
    job, older = add_job(store), add_job(store)
    for one, now in ((older, 100.0), (job, 1000.0)):
        store.start(one.id, now)
        picture = add_picture(store, one, now=now)
        store.end(one.id, "succeeded", now)
        (store.pictures / picture.file).write_bytes(b"")
    store.settle()
    store = restarted(store)
    (again,) = store.recover(2000.0)
    assert (again.id, again.state, again.ended) == (job.id, "queued", None)
    assert len(store.pictures_of(older.id)) == 1  # that one was long on the disk: somebody has emptied it since
    store.close()


def test_two_servers_do_not_share_a_folder(store):
    with pytest.raises(InputError, match="in use by another server"):
        Store(store.folder)


def test_a_folder_of_a_newer_version_is_refused_and_not_changed(store):
    store.close()
    with sqlite3.connect(store.folder / "inkstream.db") as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(InputError, match="newer inkstream"):
        Store(store.folder)


@pytest.mark.parametrize(
    ("text", "found"),
    [("橘猫", [0]), ("猫", [1, 0]), ("Grün", [2]), ("cat blue", [3]), ("100%", [4]), ("_", []),
     ("pocket", [4, 3, 2, 1, 0]), ("777", [3]), ("", [4, 3, 2, 1, 0])],
)  # fmt: skip
def test_every_word_is_found_in_any_case_and_in_chinese_of_two_characters(store, text, found):
    job = add_job(store, total=5)
    store.start(job.id, 1.0)
    prompts = ["一只橘猫在窗边", "黑猫", "ein GRÜNER Kreis", "a blue cat", "at 100% size"]
    made = [add_picture(store, job, i, prompt=prompt, seed=777 if i == 3 else 1).id for i, prompt in enumerate(prompts)]
    pictures, total = store.search(Search(text=text), None, 10)
    assert [made.index(picture.id) for picture in pictures] == found
    assert total == len(found)


def test_a_deleted_picture_can_be_restored_for_a_week(store):
    job = add_job(store)
    store.start(job.id, 1.0)
    picture = add_picture(store, job)
    store.mark(picture.id, None, 1000.0)
    assert store.search(Search(), None, 9)[1] == 0
    assert store.search(Search(deleted=True), None, 9)[1] == 1
    store.tidy(1000.0 + WEEK - 1)
    store.mark(picture.id, None, None, undelete=True)
    assert store.search(Search(), None, 9)[1] == 1
    store.mark(picture.id, None, 1000.0)
    store.tidy(1001.0 + WEEK)
    assert store.picture(picture.id) is None
    assert list(store.pictures.glob("*/*")) == []
    assert store.drawn_today("", 100.0) == 1  # what was drawn stays counted


def test_uploads_are_removed_after_a_week_unless_a_job_uses_them(store):
    for name in ("ua", "ub"):
        store.add_upload(Upload(name, "", 100.0, 1, 1, 1, "image/png", f"{name}.png"), b"x")
    add_job(store, uploads=["ua"])
    store.tidy(101.0 + WEEK)
    assert [file.name for file in store.uploads.iterdir()] == ["ua.png"]
    assert store.upload("ub") is None


def test_callers_do_not_share_idempotency_keys(store):
    add_job(store, token="t")
    assert store.repeated("", "t") is not None
    assert store.repeated("someone", "t") is None
    with pytest.raises(sqlite3.IntegrityError):
        add_job(store, token="t")
    assert len(store.active()) == 1
