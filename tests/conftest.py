"""Tiny models with random weights, as folders on disk: what the tests load. And servers, as others reach them."""

from __future__ import annotations

import asyncio
import http.client
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from inkstream.engine.drawing.model import Model
from inkstream.families import SPECS, adapter_names, family_of, parts_of
from inkstream.families.zimage.specs import BASE, TURBO
from inkstream.nn.config import MistralConfig, Qwen3Config
from inkstream.nn.qwen3 import Qwen3
from inkstream.types import Conditioning, Machine, Spec
from inkstream.weights.files import write_state
from inkstream.weights.keymap import translate
from inkstream.weights.lora.changes import LayerChange, Lora, LowRank, Part
from inkstream.weights.lora.write import write_lora
from pretend import scaled_mm

WEIGHTS = {
    "transformer": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
    "text_encoder_2": "model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "image_encoder": "model.safetensors",
    "image_embedder": "diffusion_pytorch_model.safetensors",
}
"""What the published folders call their weights."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Tests of one file run in one worker, unless another --dist is asked for: its fixtures are made once."""
    if config.getoption("dist") != "load":
        return None
    from xdist.scheduler import LoadFileScheduling

    return LoadFileScheduling(config, log)


@pytest.fixture
def no_hub(monkeypatch, tmp_path_factory) -> None:
    """The hub's cache is empty, and it is offline."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def row_scales(monkeypatch) -> None:
    """Lets the CPU multiply 8-bit floats with a scale for each row. Before torch 2.13 only GPUs do."""
    if torch.__version__ < (2, 13):
        monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)


def write_folder(folder: Path, spec: Spec, seed: int = 0) -> Path:
    """A diffusers folder of random weights, in float32, with the family's tokenizers of one token a letter."""
    family = family_of(spec.family)
    for name, content in family.documents(spec).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content, indent=2))
    for name, state in random_states(spec, seed).items():
        rules = family.parts[name].layouts.get("diffusers", ())
        write_state(folder / name / WEIGHTS[name], translate(rules, state, back=True))
    if spec.family == "flux1":
        write_flux1_tokenizers(folder)
    elif isinstance(spec.text_encoder, MistralConfig):
        write_tokenizer(folder / "tokenizer", MISTRALS)
    else:
        write_tokenizer(folder / "tokenizer")
    return folder


def random_states(spec: Spec, seed: int = 0) -> dict[str, dict[str, torch.Tensor]]:
    """Random weights of every part, in our names; norms near one, so that activations stay in range.

    The text encoder has its last layers and norm too, as published ones do.
    """
    parts = parts_of(spec)
    modules = {name: part.build(getattr(spec, name)) for name, part in parts.items() if name != "text_encoder"}
    is_qwen = isinstance(spec.text_encoder, Qwen3Config)
    modules["text_encoder"] = (
        Qwen3(spec.text_encoder, depths=(spec.text_encoder.num_hidden_layers,))
        if is_qwen
        else parts["text_encoder"].build(spec.text_encoder)
    )
    states = {name: modules[name].state_dict() for name in parts}
    if is_qwen:
        states["text_encoder"]["norm.weight"] = torch.empty(spec.text_encoder.hidden_size)
    generator = torch.Generator().manual_seed(seed)
    for state in states.values():
        for name, weight in state.items():
            is_norm = weight.ndim == 1 and "norm" in name and name.endswith(("weight", "scale", "running_var"))
            weight.normal_(mean=1.0 if is_norm or "running_var" in name else 0.0, std=0.1, generator=generator)
    return states


@pytest.fixture(scope="session")
def build() -> Callable[[Spec], Model]:
    """`build(spec)` is a model of random weights; in its text encoder's place is noise that the prompt decides."""
    return build_model


def build_model(spec: Spec) -> Model:
    kind = family_of(spec.family)
    generator = torch.Generator().manual_seed(0)
    modules = {name: kind.parts[name].build(getattr(spec, name)).eval() for name in ("transformer", "vae")}
    for module in modules.values():
        for name, weight in module.state_dict().items():
            one = "norm" in name or "running_var" in name
            weight.normal_(1.0 if one else 0.0, 0.1, generator=generator)
    family = kind(spec, dict.fromkeys(kind.parts) | modules, dict.fromkeys(kind.tokenizers))
    sizes = spec.transformer
    width = sizes.cap_feat_dim if spec.family == "zimage" else sizes.joint_attention_dim

    def encode(prompt: str, references: int = 0) -> Conditioning:
        noise = torch.Generator().manual_seed(len(prompt))
        pooled = torch.randn(1, getattr(sizes, "pooled_projection_dim", 1), generator=noise)
        return Conditioning(torch.randn(5, width, generator=noise), (5,), pooled if spec.family == "flux1" else None)

    family.encode = encode
    return Model(family, torch.device("cpu"), torch.float32)


QWENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
MISTRALS = ("<s>", "</s>", "<pad>", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]",
            "[IMG_END]")  # fmt: skip


def write_tokenizer(folder: Path, specials: Sequence[str] = QWENS) -> None:
    """One token a byte, and the specials behind them: with Qwen's 261 in all."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))


def write_flux1_tokenizers(folder: Path) -> None:
    """CLIP's and T5's, of one token a letter."""
    import transformers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = [*alphabet, *(f"{letter}</w>" for letter in alphabet), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(letters)}
    transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77).save_pretrained(folder / "tokenizer")
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0)]
    pieces += [(chr(i), -2.0) for i in range(33, 127)]
    transformers.T5Tokenizer(vocab=pieces, extra_ids=0).save_pretrained(folder / "tokenizer_2")


@pytest.fixture(scope="session")
def make_folder() -> Callable[..., Path]:
    """`make_folder(folder, spec, seed=0)` writes a diffusers folder of random weights at the sizes of any spec."""
    return write_folder


@pytest.fixture(scope="session")
def resident() -> Callable[[Path], int]:
    """`resident(path)`: bytes of a mapped file that are in this process's memory, as Linux tells them."""
    return resident_bytes


def resident_bytes(path: Path) -> int:
    count, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            ours = line.endswith(str(path))
        elif ours and line.startswith("Rss:"):
            count += int(line.split()[1]) * 1024
    return count


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """A tiny Z-Image Turbo as a diffusers folder. Not to be written to."""
    return write_folder(tmp_path_factory.mktemp("models") / "tiny-turbo", TURBO.tiny)


@pytest.fixture(scope="session")
def tiny_base_folder(tmp_path_factory) -> Path:
    """A tiny undistilled Z-Image as a diffusers folder. Not to be written to."""
    return write_folder(tmp_path_factory.mktemp("models") / "tiny-base", BASE.tiny, seed=1)


def write_upscaler_folder(folder: Path) -> Path:
    """A folder with the upscaling model `twice`, which repeats each pixel."""
    from inkstream.families.upscalers.compact import CompactConfig, SRVGGNetCompact

    network = SRVGGNetCompact(CompactConfig(num_feat=4, num_conv=0, upscale=2))
    torch.save({name: torch.zeros_like(weight) for name, weight in network.state_dict().items()}, folder / "twice.pth")
    return folder


class Served:
    """The real application on a free port of this machine, in a thread; its engine is a process, as always.

    engine: a Python program to run as that process instead, for tests of one that hangs or is not needed.
    """

    def __init__(self, settings: Any, engine: str | None = None):
        import uvicorn

        from inkstream.serve.app import build
        from inkstream.serve.connections import Connection
        from inkstream.serve.engines.process import COMMAND, EngineProcess

        command = COMMAND if engine is None else (sys.executable, "-c", engine)
        self.app = build(settings, partial(EngineProcess, command=command))
        self.service = self.app.state.service
        config = uvicorn.Config(self.app, "127.0.0.1", 0, http=Connection, log_config=None, timeout_graceful_shutdown=2)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=lambda: asyncio.run(self._server.serve()), daemon=True)
        self._thread.start()
        wait_for(lambda: self._server.started or not self._thread.is_alive())
        assert self._server.started
        self.port = self._server.servers[0].sockets[0].getsockname()[1]

    @property
    def connections(self) -> set[Any]:
        """The connections that are open."""
        return self._server.server_state.connections

    def stop(self) -> None:
        self.service.jobs.feed.close()
        self._server.should_exit = True
        self._thread.join(20)
        assert not self._thread.is_alive()

    def ask(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], Any]:
        """Status, headers, and the body: JSON where it is. body: JSON, or bytes as they are."""
        sent = {"Content-Type": "application/octet-stream" if isinstance(body, bytes) else "application/json"}
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=180)) as connection:
            connection.request(method, path, data, sent | (headers or {}))
            answer = connection.getresponse()
            content = answer.read()
        found = {name.lower(): value for name, value in answer.getheaders()}
        is_json = found.get("content-type", "").startswith("application/json")
        return answer.status, found, json.loads(content) if is_json else content

    def events(self, path: str, headers: dict[str, str] | None = None) -> Iterator[tuple]:
        """Server-sent events as they come: id, name, data. Closing it leaves."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=180)
        connection.request("GET", path, headers=headers or {})
        answer = connection.getresponse()
        assert answer.status == 200
        return read_events(answer, connection)

    def draw(self, **request: Any) -> dict[str, Any]:
        """A small picture's job, accepted."""
        body = {"prompt": "a red circle", "width": 32, "height": 32, "steps": 1, **request}
        status, _, job = self.ask("POST", "/v1/jobs", body)
        assert status == 202, job
        return job

    def ended(self, job: dict[str, Any]) -> dict[str, Any]:
        """The same job when it has ended."""
        wait_for(lambda: self.ask("GET", f"/v1/jobs/{job['id']}")[2]["ended"])
        return self.ask("GET", f"/v1/jobs/{job['id']}")[2]


def read_events(answer: http.client.HTTPResponse, connection: http.client.HTTPConnection) -> Iterator[tuple]:
    event: dict[str, str] = {}
    try:
        while line := answer.readline().decode():
            name, _, value = line.rstrip("\n").partition(": ")
            if name:
                event[name] = value
            elif "data" in event:
                yield event["id"], event["event"], json.loads(event["data"])
                event = {}
    finally:
        connection.close()


def wait_for(condition: Callable[[], Any], seconds: float = 180.0) -> None:
    """Until something is so."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to be"
        time.sleep(0.02)


@pytest.fixture(scope="session")
def until() -> Callable[..., None]:
    """`until(condition)` waits."""
    return wait_for


def write_lora_folder(folder: Path) -> Path:
    """A folder with one adapter for Pocket, `styles/bold`, in kohya's names."""
    names, by = adapter_names(SPECS["pocket"]), torch.Generator().manual_seed(0)
    layers = {
        path: LayerChange([Part(LowRank(torch.randn(2, i, generator=by), torch.randn(o, 2, generator=by) / i))])
        for path, (o, i) in names.layers.items()
        if path.startswith("layers.")
    }
    (folder / "styles").mkdir(parents=True)
    write_lora(folder / "styles" / "bold.safetensors", Lora(layers), names, "kohya")
    return folder


@pytest.fixture(scope="session")
def start_server() -> Callable[..., Served]:
    """`start_server(settings, engine=None)` is a running server; whoever starts it stops it."""
    return Served


@pytest.fixture(scope="session")
def server(tmp_path_factory) -> Iterator[Served]:
    """A server without keys that draws with Pocket, shared by many tests: leave its queue empty and going on."""
    from inkstream.serve.limits import Limits, Settings

    limits = Limits(body_bytes=4 << 20, pictures=8, steps=50, pixels=512 * 512)
    machine = Machine(
        lora_folder=str(write_lora_folder(tmp_path_factory.mktemp("loras"))),
        upscaler_folder=str(write_upscaler_folder(tmp_path_factory.mktemp("upscalers"))),
    )
    served = Served(Settings(tmp_path_factory.mktemp("server"), models=("pocket",), limits=limits, machine=machine))
    yield served
    served.stop()
