"""Downloads from the hub, against a fake hub on this machine: requests, headers and failures."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from inkstream.weights import hub

REPO = "someone/model"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = "transformer/a.safetensors"
PATTERNS = ("model_index.json", "transformer/*.safetensors", "vae/*.safetensors")


class FakeHub:
    """A fake hub with one repository. `failures`: file -> the results of its next requests; `log`: all requests."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.failures: dict[str, list[str]] = {}
        self.status: int | None = None  # if set, the answer to every request about the repository
        self.code = ""
        self.repo = REPO
        self.knows_ranges = True
        self.elsewhere = ""  # if set, files are redirected there
        self.log: list[tuple[str, str, dict[str, str]]] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.answer(self, body=True)

            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        self.address = f"http://127.0.0.1:{self.server.server_port}"

    def asked(self, start: str = "") -> list[str]:
        """The paths of the GET requests so far that start so."""
        return [path for method, path, _ in self.log if method == "GET" and path.startswith(start)]

    def downloads(self) -> list[str]:
        resolve = f"/{self.repo}/resolve/{COMMIT}/"
        return sorted(path.removeprefix(resolve) for path in self.asked(resolve))

    def answer(self, request: BaseHTTPRequestHandler, body: bool) -> None:
        path = request.path.partition("?")[0]
        self.log.append((request.command, path, {k.lower(): v for k, v in request.headers.items()}))
        api, resolve = f"/api/models/{self.repo}", f"/{self.repo}/resolve/{COMMIT}/"
        if self.status is not None and path.startswith((api, resolve)):
            self.send(request, self.status, b"{}", {"X-Error-Code": self.code}, body)
        elif path.startswith(f"{api}/tree/"):
            self.send_json(request, [self.entry(name) for name in self.files], body)
        elif path in (api, f"{api}/revision/main"):
            siblings = [{"rfilename": name, "size": len(data)} for name, data in self.files.items()]
            card = {"license": "apache-2.0"}
            self.send_json(request, {"id": self.repo, "sha": COMMIT, "siblings": siblings, "cardData": card}, body)
        elif path.startswith(resolve) and path.removeprefix(resolve) in self.files:
            self.send_file(request, path.removeprefix(resolve), body)
        else:
            self.send(request, 404, b"{}", {"X-Error-Code": "EntryNotFound"}, body)

    def entry(self, name: str) -> dict[str, Any]:
        data = self.files[name]
        return {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}

    def send_file(self, request: BaseHTTPRequestHandler, name: str, body: bool) -> None:
        data = self.files[name]
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
        if self.elsewhere:
            where = {"Location": self.elsewhere + request.path, "X-Linked-Size": str(len(data))}
            self.send(request, 302, b"", {**headers, "X-Linked-Etag": headers["ETag"], **where}, body)
            return
        failure = self.failures[name].pop(0) if body and self.failures.get(name) else ""
        if failure == "500":
            self.send(request, 500, b"", headers, body)
            return
        start = 0
        span = request.headers.get("Range") if self.knows_ranges else None
        if span:
            start = int(span.removeprefix("bytes=").rstrip("-"))
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        request.send_response(206 if span else 200)
        for key, value in headers.items():
            request.send_header(key, value)
        request.send_header("Content-Length", str(len(data) - start))
        request.end_headers()
        if body and failure == "break":
            request.wfile.write(data[start : start + len(data) // 2])
            request.wfile.flush()
            request.connection.close()
            request.close_connection = True
        elif body and failure == "slow":
            for i in range(start, len(data), 1 << 20):
                request.wfile.write(data[i : i + (1 << 20)])
                time.sleep(0.02)
        elif body:
            request.wfile.write(data[start:] if failure != "garble" else b"?" * (len(data) - start))

    def send_json(self, request: BaseHTTPRequestHandler, data: Any, body: bool) -> None:
        self.send(request, 200, json.dumps(data).encode(), {"Content-Type": "application/json"}, body)

    def send(
        self, request: BaseHTTPRequestHandler, status: int, data: bytes, headers: dict[str, str], body: bool
    ) -> None:
        request.send_response(status)
        for key, value in headers.items():
            request.send_header(key, value)
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        if body:
            request.wfile.write(data)


@pytest.fixture
def fake() -> Iterator[FakeHub]:
    fake = FakeHub()
    fake.files = {
        "model_index.json": b'{"_class_name": "X"}',
        "transformer/a.safetensors": bytes(range(256)) * 400,
        "vae/b.safetensors": b"vae" * 1000,
        "vae/b.bin": b"a pickle",
        "assets/picture.png": b"png",
        ".gitattributes": b"",
    }
    yield fake
    fake.server.shutdown()
    fake.server.server_close()


def environment(fake: FakeHub | str, home: Path, **more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")}
    address = fake if isinstance(fake, str) else fake.address
    hf = {"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_TOKEN": "hf_secret", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return {**kept, **hf, **more}


CALL = f"""
import json, sys
from inkstream.types import InputError
from inkstream.weights import hub
seen = []
try:
    made = [
        hub.offer({REPO!r}, {PATTERNS!r}) if what == "offer" else
        str(hub.cached({REPO!r}, {PATTERNS!r})) if what == "cached" else
        str(hub.fetch({REPO!r}, {PATTERNS!r}, seen.append))
        for what in sys.argv[1:]
    ]
    print(json.dumps({{"made": made, "seen": seen}}))
except InputError as error:
    print(json.dumps({{"error": str(error)}}))
"""


def call(fake: FakeHub | str, home: Path, *what: str, **more: str) -> dict[str, Any]:
    """Calls functions of `hub` in turn, in another process that uses the fake hub."""
    command = [sys.executable, "-W", "error", "-c", CALL, *what]
    done = subprocess.run(command, env=environment(fake, home, **more), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_repository_is_fetched_once_without_unneeded_files_or_the_token(fake, tmp_path):
    first = call(fake, tmp_path, "cached", "offer", "fetch", "cached")
    before, offer, fetched, after = first["made"]
    needed = {name: data for name, data in fake.files.items() if name.endswith("safetensors") or name == PATTERNS[0]}
    folder = Path(fetched)
    assert (before, after) == ("None", fetched)
    assert {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()} == needed
    size = sum(map(len, needed.values()))
    assert offer == [size, size, "apache-2.0"]
    assert first["seen"] == sorted(first["seen"])
    assert first["seen"][-1] == size
    assert fake.downloads() == sorted(needed)
    assert not [headers for _, _, headers in fake.log if "authorization" in headers or "hf_secret" in str(headers)]

    fake.log.clear()
    assert call(fake, tmp_path, "cached", "fetch")["made"] == [fetched, fetched]
    assert call(fake, tmp_path, "cached", "fetch", HF_HUB_OFFLINE="1")["made"] == [fetched, fetched]
    assert not fake.log


def ranges(fake: FakeHub) -> list[str | None]:
    return [headers.get("range") for method, path, headers in fake.log if method == "GET" and path.endswith(LARGE)]


def test_a_broken_download_is_resumed(fake, tmp_path):
    fake.files[LARGE] = os.urandom(24 << 20)
    fake.failures[LARGE] = ["break", "500"]
    folder = Path(call(fake, tmp_path, "fetch")["made"][0])
    assert (folder / LARGE).read_bytes() == fake.files[LARGE]
    first, *rest = ranges(fake)
    assert first == "bytes=0-"
    assert rest == [f"bytes={12 << 20}-"] * 2
    assert not list(tmp_path.rglob("*.partial"))
    assert not [headers for _, _, headers in fake.log if "authorization" in headers or "hf_secret" in str(headers)]


def test_the_download_of_a_killed_process_is_resumed(fake, tmp_path):
    fake.files[LARGE] = os.urandom(32 << 20)
    fake.failures[LARGE] = ["slow"]
    command = [sys.executable, "-c", CALL.replace("seen.append", "lambda n: print(n, flush=True)"), "fetch"]
    process = subprocess.Popen(command, env=environment(fake, tmp_path), stdout=-1, text=True)
    while int(process.stdout.readline()) < 8 << 20:
        pass
    process.kill()
    process.communicate()
    folder = Path(call(fake, tmp_path, "fetch")["made"][0])
    assert (folder / LARGE).read_bytes() == fake.files[LARGE]
    first, again = ranges(fake)
    assert first == "bytes=0-"
    assert int(again.removeprefix("bytes=").rstrip("-")) >= 8 << 20


def test_a_server_without_ranges_sends_the_whole_file_again(fake, tmp_path):
    fake.files[LARGE] = os.urandom(24 << 20)
    fake.failures[LARGE] = ["break"]
    fake.knows_ranges = False
    folder = Path(call(fake, tmp_path, "fetch")["made"][0])
    assert (folder / LARGE).read_bytes() == fake.files[LARGE]


def test_a_file_with_a_wrong_digest_is_fetched_again(fake, tmp_path):
    fake.files[LARGE] = bytes(20 << 20)
    fake.failures[LARGE] = ["garble"]
    folder = Path(call(fake, tmp_path, "fetch")["made"][0])
    assert (folder / LARGE).read_bytes() == fake.files[LARGE]
    assert ranges(fake) == ["bytes=0-"] * 2


def test_a_redirect_to_another_host_is_followed_without_the_token(fake, tmp_path):
    """Large files: the hub redirects to a signed link on another host."""
    fake.files[LARGE] = os.urandom(20 << 20)
    elsewhere = FakeHub()
    elsewhere.files = fake.files
    fake.elsewhere = elsewhere.address
    folder = Path(call(fake, tmp_path, "fetch")["made"][0])
    assert (folder / LARGE).read_bytes() == fake.files[LARGE]
    assert elsewhere.downloads() == ["model_index.json", LARGE, "vae/b.safetensors"]
    assert not [headers for _, _, headers in elsewhere.log if "authorization" in headers]


def test_after_a_failure_only_missing_files_are_fetched(fake, tmp_path):
    fake.failures["vae/b.safetensors"] = ["500"] * 20
    failed = call(fake, tmp_path, "fetch")
    assert fake.address in failed["error"]
    assert "try again" in failed["error"]
    fake.failures.clear()
    fake.log.clear()
    cached, (missing, total, _), _ = call(fake, tmp_path, "cached", "offer", "fetch")["made"]
    assert cached == "None"
    assert missing == len(fake.files["vae/b.safetensors"]) < total
    assert fake.downloads() == ["vae/b.safetensors"]


def test_a_cache_that_another_program_filled_in_part_is_completed(fake, tmp_path):
    """Another program has fetched one file, so the cache does not know the repository's list of files."""
    cache = tmp_path / "hub" / "models--someone--model"
    snapshot = cache / "snapshots" / COMMIT
    for path, content in ((cache / "refs/main", COMMIT.encode()), (snapshot / "model_index.json", b"{}")):
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
    offline = call(fake, tmp_path, "cached", "fetch", HF_HUB_OFFLINE="1")
    assert offline["made"] == [str(snapshot)] * 2
    online = call(fake, tmp_path, "cached", "fetch", "cached")
    assert online["made"] == ["None", str(snapshot), str(snapshot)]
    assert fake.downloads() == [LARGE, "vae/b.safetensors"]


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        (404, "RepoNotFound", "has no repository someone/model"),
        (401, "RepoNotFound", "has no repository someone/model"),
        (403, "GatedRepo", "someone/model is gated: accept its terms"),
        (503, "", "refused someone/model"),
    ],
)
def test_a_refusal_of_the_hub_is_one_line(fake, tmp_path, status, code, said):
    fake.status, fake.code = status, code
    for what in ("offer", "fetch"):
        error = call(fake, tmp_path, what)["error"]
        assert said in error
        assert "\n" not in error


@pytest.mark.slow
def test_without_a_connection_the_error_names_the_remedy(tmp_path):
    nobody = "http://127.0.0.1:9"
    for what in ("offer", "fetch"):
        assert "check the connection" in call(nobody, tmp_path, what)["error"]
        assert "HF_HUB_OFFLINE is set: unset it" in call(nobody, tmp_path, what, HF_HUB_OFFLINE="1")["error"]


@pytest.mark.parametrize(
    ("endpoint", "sent"),
    [
        ("https://huggingface.co", None),
        ("http://huggingface.co", False),
        ("https://hf-mirror.com", False),
        ("https://huggingface.co.evil.com", False),
        ("https://huggingface.co@evil.com", False),
        ("https://evil.com/huggingface.co", False),
    ],
)
def test_the_token_is_sent_to_the_official_host_alone(monkeypatch, endpoint, sent):
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    assert hub.token() is sent


def test_a_full_disk_is_reported(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "not" / "yet"))
    hub.check_space(REPO, 1000)
    with pytest.raises(hub.InputError, match=r"needs 1000000000\.0 GB and .* free: make room, or set HF_HOME"):
        hub.check_space(REPO, 10**18)


IN_A_THREAD = f"""
import threading, time
from inkstream.weights import hub
threading.Thread(target=lambda: hub.fetch({REPO!r}, {PATTERNS!r}, lambda n: print(n, flush=True)), daemon=True).start()
time.sleep(60)
"""


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
def test_ctrl_c_ends_a_download_in_a_thread_and_keeps_the_part(fake, tmp_path):
    fake.files[LARGE] = bytes(400 << 20)
    fake.failures[LARGE] = ["slow"]
    command = [sys.executable, "-c", IN_A_THREAD]
    process = subprocess.Popen(command, env=environment(fake, tmp_path), stdout=-1, stderr=-1, text=True)
    while int(process.stdout.readline()) < 5 << 20:
        pass
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    (partial,) = tmp_path.rglob("*.partial")  # kept for the next time, and far from whole
    assert 5 << 20 <= partial.stat().st_size < len(fake.files[LARGE])


LOAD = """
import json, sys
import inkstream
events = []
model = inkstream.load("z-image-turbo", inkstream.Machine("cpu"), progress=events.append)
print(json.dumps([model.spec.name, [[e.what, e.done_bytes, e.total_bytes] for e in events]]))
"""


@pytest.mark.slow
def test_a_download_shows_size_and_licence_first(fake, tmp_path, tiny_folder):
    fake.repo = "Tongyi-MAI/Z-Image-Turbo"
    fake.files = {str(p.relative_to(tiny_folder)): p.read_bytes() for p in tiny_folder.rglob("*") if p.is_file()}
    fake.files["README.md"] = b"# Z-Image"
    output = subprocess.check_output([sys.executable, "-c", LOAD], env=environment(fake, tmp_path), text=True)
    name, events = json.loads(output.splitlines()[-1])
    assert name == "z-image-turbo"
    size = sum(len(data) for name, data in fake.files.items() if name != "README.md")
    what = "download of Tongyi-MAI/Z-Image-Turbo, 0.0 GB, licence apache-2.0"
    assert events[0] == [what, 0, size]
    assert [what, size, size] in events
    assert events[-1][0] == "vae"
    assert "README.md" not in fake.downloads()


ASK_FOR_LORAS = """
import json, sys
from pathlib import Path
from inkstream.cli.download import agree_to_loras
from inkstream.cli.terminal import Terminal
from inkstream.engine.files.loras import find_lora
from inkstream.types import InputError, LoraUse, Machine
machine = Machine(lora_folder=sys.argv[1])
for lora in sys.argv[2:]:
    yes, lora = lora.startswith("yes "), lora.removeprefix("yes ")
    try:
        with Terminal(quiet=True) as terminal:
            agree_to_loras([lora], machine, yes, terminal)
        print(json.dumps(str(find_lora(LoraUse.read(lora).path, Path(sys.argv[1])))))
    except InputError as error:
        print(json.dumps("error: " + str(error)))
"""


def ask_for_loras(fake: FakeHub | str, home: Path, *loras: str, **more: str) -> list[str]:
    """Name adapters on a command line, one after the other. Returns their files, or the errors."""
    command = [sys.executable, "-W", "error", "-c", ASK_FOR_LORAS, str(home / "loras"), *loras]
    done = subprocess.run(command, env=environment(fake, home, **more), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_an_adapter_is_named_by_its_place_on_the_hub(fake, tmp_path):
    fake.files = {
        "style.safetensors": b"style" * 1000,
        "old/style.safetensors": b"old" * 1000,
        "peft/adapter_model.safetensors": b"peft" * 1000,
        "peft/adapter_config.json": b"{}",
        "picture.png": b"png",
    }
    asked, file, again, folder, several, missing = ask_for_loras(
        fake, tmp_path, f"{REPO}/style.safetensors:0.8", f"yes {REPO}/style.safetensors:0.8@0-0.5",
        f"{REPO}/style.safetensors", f"yes {REPO}/peft/adapter_model.safetensors", f"yes {REPO}",
        f"yes {REPO}/new.safetensors",
    )  # fmt: skip
    assert asked == (
        f"error: {REPO}/style.safetensors is not downloaded yet ({REPO}: 0 MB, licence apache-2.0): "
        "add --yes to download it, or give --lora a local path"
    )
    assert Path(file).read_bytes() == fake.files["style.safetensors"]
    assert again == file
    assert Path(folder).with_name("adapter_config.json").read_bytes() == b"{}"
    assert several == (
        f"error: {REPO} has 3 files (style.safetensors, old/style.safetensors, peft/adapter_model.safetensors): "
        f"name one, such as --lora {REPO}/style.safetensors"
    )
    assert missing == f"error: {REPO} on the hub has no new.safetensors: look at its files there"
    assert fake.downloads() == ["peft/adapter_config.json", "peft/adapter_model.safetensors", "style.safetensors"]
    (offline,) = ask_for_loras(fake, tmp_path, f"{REPO}/style.safetensors", HF_HUB_OFFLINE="1")
    assert offline == file


def test_the_only_adapter_of_a_repository_needs_no_file_name(fake, tmp_path):
    fake.files = {"style.safetensors": b"style" * 1000, "picture.png": b"png"}
    file, again = ask_for_loras(fake, tmp_path, f"yes {REPO}:0.8", REPO)
    assert Path(file).read_bytes() == fake.files["style.safetensors"]
    assert again == file


def test_an_adapter_that_no_hub_has_is_told_in_one_line(fake, tmp_path):
    (tmp_path / "loras" / "people").mkdir(parents=True)
    (tmp_path / "loras" / "people" / "ann.safetensors").write_bytes(b"ann")
    fake.status, fake.code = 404, "RepoNotFound"
    here, unknown, word, path = ask_for_loras(
        fake, tmp_path, "people/ann", f"yes {REPO}", "style", "runs/style.safetensors"
    )  # fmt: skip
    assert Path(here).read_bytes() == b"ann"
    assert not fake.downloads()
    assert unknown.startswith(f"error: lora {REPO} is not a file here, and {fake.address} has no repository {REPO}")
    assert word.startswith("error: lora style is neither a file nor a name in")
    assert path.startswith("error: lora runs/style.safetensors is neither a file nor a name in")
    (offline,) = ask_for_loras(fake, tmp_path, f"yes {REPO}", HF_HUB_OFFLINE="1")
    assert offline == (
        f"error: lora {REPO} is not a file here, and {REPO} is not complete in the cache and HF_HUB_OFFLINE is set: "
        "unset it once, or give a local path"
    )
    (unreachable,) = ask_for_loras("http://127.0.0.1:9", tmp_path, f"yes {REPO}")
    assert f"{REPO} could not be downloaded from http://127.0.0.1:9" in unreachable
