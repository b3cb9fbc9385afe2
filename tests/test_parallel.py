"""Two processes draw the same as one: pictures, prompts, tokens or weights are divided between them.

torchrun --nproc-per-node 2 tests/test_parallel.py FOLDER    # writes what each process got
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from inkstream import cli
from inkstream.engine.drawing.complete import complete
from inkstream.engine.drawing.model import Model
from inkstream.engine.engine import Engine
from inkstream.engine.machine.loader import open_model
from inkstream.engine.machine.memory import Placing
from inkstream.engine.machine.parallel import Crew, Way, choose_way, join_crew
from inkstream.engine.machine.placement import Placed
from inkstream.families import adapter_names
from inkstream.families.flux1.specs import DEV
from inkstream.families.flux2.specs import KLEIN_4B, KLEIN_BASE_4B
from inkstream.families.flux3.specs import KLEIN
from inkstream.families.qwenimage.specs import BASE as QWEN_BASE
from inkstream.families.zimage.specs import BASE, TURBO
from inkstream.nn.around import NOTHING, Around
from inkstream.nn.around.adapters import Adapter
from inkstream.nn.forward import Sample
from inkstream.nn.parallel import Group, share_layers, share_tokens
from inkstream.nn.quant import place
from inkstream.quant.pack import pack
from inkstream.quant.packed import take_columns, unpack
from inkstream.types import Conditioning, InputError, Machine, Request, Spec
from inkstream.weights.files import read_state, write_state
from inkstream.weights.lora.changes import LayerChange, Lora, LowRank, Part
from inkstream.weights.lora.write import write_lora

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d",
            "--rdzv-endpoint", "localhost:0"]  # fmt: skip
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR", "PYTHONWARNINGS": "ignore"}
CLOSE = 1e-5
"""The tolerance for float32 sums in another order, relative to the largest value."""


def with_three_heads(spec: Spec) -> Spec:
    """The tiny model of a spec, wider by a head, so that two processes have two and one."""
    tiny = spec.tiny
    assert tiny is not None
    sizes = tiny.transformer
    heads = {"n_heads": 3, "dim": 96} if tiny.family == "zimage" else {"num_attention_heads": 3}
    return replace(tiny, transformer=replace(sizes, **heads))


ZIMAGE, FLUX1, FLUX2, GUIDED_FLUX2 = (with_three_heads(spec) for spec in (BASE, DEV, KLEIN_4B, KLEIN_BASE_4B))
FLUX3, QWEN = (with_three_heads(spec) for spec in (KLEIN, QWEN_BASE))


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def adapter(transformer: Any, seed: int) -> Around:
    """A product of rank 1 beside that of every layer."""
    products = {}
    for name, layer in transformer.named_modules():
        if isinstance(layer, torch.nn.Linear):
            down, up = (normal(1, n, seed=seed + n) * 0.1 for n in (layer.in_features, layer.out_features))
            products[name] = lambda x, plain, out, down=down, up=up: out.add_((x @ down.T) @ up)
    return Around(adapters=(Adapter.of(transformer, products),))


def forward(
    *sizes: tuple[int, int, int], times: tuple[float, ...] = (), looks: bool = False, adapted: bool = False
) -> Callable[[Model], Any]:
    """One forward of the transformer over several samples. sizes: tokens of the prompt, height and width of the latents
    of each; looks: at a reference, which FLUX.2 reads once; adapted: each by an adapter of its own."""
    times = times or (0.5,) * len(sizes)

    def compute(model: Model) -> list[Tensor]:
        transformer: Any = model.family.transformer  # type: ignore[attr-defined]
        config, prepared = transformer.config, []
        arounds = [adapter(transformer, i) if adapted else NOTHING for i in range(len(sizes))]
        for i, (length, height, width) in enumerate(sizes):
            if model.spec.family == "zimage":
                caption = normal(length, config.cap_feat_dim, seed=i)
                prepared += transformer.prepare_all([caption], height, width, arounds[i])
                continue
            text = [normal(length, config.joint_attention_dim, seed=i)]
            guidance = 3.5 if config.guidance_embeds else None
            if model.spec.family == "flux1":
                pooled = [normal(config.pooled_projection_dim, seed=i)]
                prepared += transformer.prepare(text, pooled, height, width, guidance, around=arounds[i])
            else:
                seen = [normal(config.in_channels, 3, 5, seed=9)] if looks else []
                prepared += transformer.prepare(
                    text, height, width, guidance, references=seen, read_once=looks, around=arounds[i]
                )
        channels = config.in_channels // (4 if model.spec.family == "flux1" else 1)
        xs = [normal(channels, height, width, seed=10 + i) for i, (_, height, width) in enumerate(sizes)]
        return transformer([Sample(*each) for each in zip(xs, times, prepared, arounds)])

    return compute


def sample(count: int = 1, **asked: Any) -> Callable[[Model], list[Tensor]]:
    """All steps of a request."""
    wish = {"prompt": "a red circle", "negative_prompt": "blue", "width": 80, "height": 48, "steps": 3, "seed": 7}
    request = Request.model_validate({**wish, "count": count, **asked})
    return lambda model: [model.sample(request, model.encode(request))]


def encode(width: int) -> Callable[..., Conditioning]:
    """An encoder for tests: one token for each letter, from noise seeded by the prompt."""
    return lambda prompt, references=0: Conditioning(normal(len(prompt), width, seed=len(prompt)), (len(prompt),))


def packed(name: str) -> Callable[[Any], None]:
    """Pack the weights of all layers in blocks."""

    def prepare(transformer: Any) -> None:
        state = transformer.state_dict()
        wanted = [k for k, w in state.items() if "blocks" in k and w.ndim == 2 and "mod" not in k]
        transformer.load_state_dict(
            place(transformer, {**state, **{k: pack(name, state[k]) for k in wanted}}, torch.float32)
        )

    return prepare


def stream(transformer: Any) -> None:
    """Streams the blocks one by one, from weights of half the size."""
    Placed(transformer.bfloat16(), "visiting", torch.device("cpu"), torch.float32).settle()


@dataclass(frozen=True)
class Case:
    way: Way
    spec: Spec
    compute: Callable[[Model], list[Tensor]]
    before: Callable[[Any], None] = lambda transformer: None  # changes the transformer before it is divided
    after: Callable[[Any], None] = lambda transformer: None  # changes it afterwards


MIXED = ((5, 6, 10), (40, 4, 4))
ALIKE = ((5, 6, 10), (7, 6, 10))
TWICE = (0.5, 0.25)
CASES = {
    "cfg z-image": Case("cfg", ZIMAGE, sample()),
    "cfg z-image, on for a while": Case("cfg", ZIMAGE, sample(guidance_until=0.6)),
    "cfg flux2, three pictures": Case("cfg", GUIDED_FLUX2, sample(3)),
    **{
        f"{way} {name}": Case(way, spec, compute)  # type: ignore[arg-type]
        for way in ("context", "tensor")
        for name, spec, compute in (
            ("z-image", ZIMAGE, forward(*ALIKE, times=TWICE)),
            ("z-image of several lengths", ZIMAGE, forward(*MIXED, times=TWICE)),
            ("z-image, guided", ZIMAGE, sample(prompt="a" * 40)),
            ("z-image, cached", ZIMAGE, sample(steps=8, cache="taylor", cache_threshold=0.3)),
            ("flux1", FLUX1, forward((5, 6, 10))),
            ("flux1 at two times", FLUX1, forward(*ALIKE, times=TWICE)),
            ("flux1 of several lengths", FLUX1, forward(*MIXED, times=TWICE)),
            ("flux2 with one word", FLUX2, forward((1, 5, 3))),
            ("flux2 that looks", FLUX2, forward((5, 5, 3), looks=True)),
            ("flux2, guided", GUIDED_FLUX2, sample()),
            ("flux3", FLUX3, sample()),
            ("qwen", QWEN, sample()),
        )
    },
    "context z-image, adapted": Case("context", ZIMAGE, forward(*MIXED, times=TWICE, adapted=True)),
    "context flux1, adapted": Case("context", FLUX1, forward(*MIXED, times=TWICE, adapted=True)),
    "context flux2 that looks, adapted": Case("context", FLUX2, forward((5, 5, 3), looks=True, adapted=True)),
    "context flux2, streamed": Case("context", FLUX2, forward((5, 5, 3)), after=stream),
    "tensor flux2, streamed": Case("tensor", FLUX2, forward((5, 5, 3)), after=stream),
    "tensor flux2, q8_0": Case("tensor", FLUX2, forward((5, 5, 3)), before=packed("q8_0")),
    "tensor flux2, fp8": Case("tensor", FLUX2, forward((5, 5, 3)), before=packed("e4m3")),
}


def run(build: Callable[[Spec], Model], case: Case, crew: Crew | None = None) -> list[Tensor]:
    model = build(case.spec)
    transformer: Any = model.family.transformer  # type: ignore[attr-defined]
    if case.spec.family == "zimage":
        model.family.encode = encode(case.spec.transformer.cap_feat_dim)  # type: ignore[method-assign]
    case.before(transformer)
    if crew is not None:
        crew.settle(Request.model_validate({"guidance": 4.0}), case.spec)
        crew.share(transformer)
        crew.attach(transformer)
    case.after(transformer)
    with torch.inference_mode():
        return [out.clone() for out in case.compute(model)]


WISH = {"prompt": "a red circle", "width": 80, "height": 48, "steps": 3, "seed": 7}
WISHES: dict[str, tuple[Way | None, dict[str, Any]]] = {
    "drawn by replicas": (None, {"count": 3}),
    "drawn by two prompts": (None, {}),
    "drawn by context": (None, {"guidance": 1}),
    "drawn by tensor": ("tensor", {}),
    "drawn by context with an adapter": ("context", {"loras": ["lora:0.5"]}),
    "drawn by tensor with an adapter": ("tensor", {"loras": ["lora:0.5"]}),
}
"""The way (None: chosen by the processes), and the fields of the request in addition to WISH."""


def draw(folder: Path, asked: dict[str, Any], crew: Crew | None = None) -> tuple[Engine, list[Tensor]]:
    """The pictures of a wish, (H, W, 3), by an engine that reads the model's files."""
    engine = Engine(Machine("cpu", lora_folder=str(folder.parent)), crew=crew)
    request = Request.model_validate({**WISH, "model": str(folder), **asked})
    if crew is not None and crew.rank > 0:
        request = Request.model_validate({})  # the first process's is drawn
    return engine, [torch.from_numpy(np.array(image)) for image in engine.generate(request).images]


def weigh(engine: Engine) -> Tensor:
    """The bytes of the loaded transformer."""
    family: Any = engine.model.family
    return torch.tensor(sum(weight.nbytes for weight in family.transformer.state_dict().values()))


def results(name: str, tensors: list[Tensor]) -> Iterator[tuple[str, Tensor]]:
    return ((f"{name}.{i}", tensor) for i, tensor in enumerate(tensors))


def main(folder: Path) -> None:
    """The program of each of the two processes."""
    from conftest import build_model

    state: dict[str, Tensor] = {}
    for name, case in CASES.items():
        state |= results(name, run(build_model, case, join_crew(case.way, "cpu")))
    for name, (way, asked) in WISHES.items():
        engine, pictures = draw(folder / "model", asked, join_crew(way, "cpu"))
        state |= results(name, pictures)
    state["bytes"] = weigh(engine)
    write_state(folder / f"{os.environ['RANK']}.safetensors", state)
    given = ["generate", "a red circle", "-m", str(folder / "model"), "-W", "64", "-H", "48", "--steps", "1", "-s", "7"]
    for words in (
        ["-c", "3", "-o", str(folder / "pictures/")],
        ["--parallel", "cfg", "--guidance", "1", "-o", str(folder)],
        ["--parallel", "cfg", "--cache", "taylor", "-o", str(folder)],
    ):
        cli.main([*given, *words])


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_folder) -> Path:
    folder = tmp_path_factory.mktemp("parallel")
    make_folder(folder / "model", GUIDED_FLUX2)
    names, by = adapter_names(GUIDED_FLUX2), torch.Generator().manual_seed(0)
    layers = {
        path: LayerChange([Part(LowRank(torch.randn(2, i, generator=by), torch.randn(o, 2, generator=by) / i))])
        for path, (o, i) in names.layers.items()
    }
    write_lora(folder / "lora.safetensors", Lora(layers), names, "diffusers")
    return folder


@pytest.fixture(scope="module")
def two(folder) -> tuple[list[dict[str, torch.Tensor]], str, str]:
    """The results of each of two processes, and their stdout and stderr."""
    done = subprocess.run(
        [*TORCHRUN, __file__, str(folder)], env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [read_state(folder / f"{rank}.safetensors") for rank in (0, 1)], done.stdout, done.stderr  # type: ignore[return-value]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_processes_compute_the_same_as_one(two, build, name):
    for key, alone in results(name, run(build, CASES[name])):
        for state in two[0]:
            assert (state[key] - alone).abs().max() < CLOSE * alone.abs().max(), key
        assert torch.equal(two[0][0][key], two[0][1][key]), key


@pytest.mark.slow
@pytest.mark.parametrize("name", WISHES)
def test_an_engine_in_each_of_two_processes_draws_the_pictures_of_one(two, folder, name):
    (first, second), _, _ = two
    _, alone = draw(folder / "model", WISHES[name][1])
    drawn = [first[key] for key, _ in results(name, alone)]
    if name == "drawn by replicas":
        assert all(torch.equal(a, b) for a, b in zip(drawn, alone, strict=True))
        assert [key for key in second if key.startswith(name)] == [f"{name}.0"]  # of its own
    else:  # a value near the border between two bytes may round either way
        assert max((a.int() - b.int()).abs().max() for a, b in zip(drawn, alone, strict=True)) <= 1


@pytest.mark.slow
def test_prompts_in_two_processes_give_bit_identical_pictures(two, folder):
    engine = Engine(Machine("cpu"))
    list(engine.load(str(folder / "model")))
    family: Any = engine.model.family
    together = family.answer
    family.answer = lambda samples: [together([sample])[0] for sample in samples]
    (picture,) = engine.generate(Request.model_validate({**WISH, "model": str(folder / "model")})).images
    assert np.array_equal(np.array(picture), two[0][0]["drawn by two prompts.0"])


@pytest.mark.slow
def test_each_process_holds_its_share_of_the_weights(two, folder):
    alone = weigh(draw(folder / "model", {"steps": 1})[0])
    shares = [state["bytes"] for state in two[0]]
    assert max(shares) < 0.9 * alone
    assert sum(shares) > alone  # modulation and embedders are in both


def test_predicted_memory_is_that_of_one_process_share(folder):
    opened = open_model(folder / "model", Machine("cpu"))
    request = complete(Request.model_validate(WISH), opened.source.spec)

    def foreseen(share: Callable[[Any], None]) -> int:
        return Placing(replace(opened, crew=SimpleNamespace(share=share))).plans(request)[0].phases["steps"]  # type: ignore[arg-type]

    whole = foreseen(lambda transformer: None)
    assert foreseen(lambda transformer: share_layers(transformer, Group(0, 2))) < whole - 1_000_000  # weights
    assert foreseen(lambda transformer: share_tokens(transformer, Group(0, 2))) < whole  # what is computed with them


@pytest.mark.slow
def test_only_process_0_writes_pictures_and_prints_messages(two, folder):
    _, stdout, stderr = two
    names = [f"a-red-circle-{seed}.png" for seed in (7, 8, 9)]
    assert stdout.split() == [str(folder / "pictures" / name) for name in names]
    assert stderr.count("2 processes: each process draws different pictures (--parallel replicas)") == 1
    assert stderr.count("again: torchrun --nproc-per-node 2 -m inkstream generate") == 1
    assert len({np.array(Image.open(path)).tobytes() for path in stdout.split()}) == 3


@pytest.mark.slow
def test_a_request_that_the_way_cannot_draw_is_refused_once(two):
    refused = [line for line in two[2].splitlines() if line.startswith("inkstream: ")]
    assert [line.partition(":")[2].split(",")[0].strip() for line in refused] == [
        "--parallel cfg needs guidance",
        "--cache taylor needs both prompts in one process",
    ]


def test_the_default_way_is_replicas_then_cfg_then_context():
    def chosen(spec: Spec, processes: int, **asked: Any) -> str:
        return choose_way(Request.model_validate(asked), spec, processes)

    assert chosen(BASE, 2, count=2) == chosen(TURBO, 2, count=5) == "replicas"
    assert chosen(BASE, 2) == chosen(BASE, 4, count=3) == "cfg"
    assert chosen(BASE, 3) == chosen(BASE, 2, cache="taylor") == chosen(TURBO, 2) == "context"


@pytest.mark.parametrize("name", ["q8_0", "int4", "int8", "e4m3"])
def test_columns_of_a_packed_weight_are_those_of_the_whole(name):
    weight, runs = pack(name, normal(6, 256, seed=0)), [(0, 64), (128, 256)]
    assert torch.equal(unpack(take_columns(weight, runs)), take_columns(unpack(weight), runs))


def test_a_packed_weight_is_not_cut_inside_a_block():
    with pytest.raises(InputError, match="cut only at multiples of 32 columns, not at 0 to 48: take the bf16 file"):
        take_columns(pack("q8_0", normal(6, 256, seed=0)), [(0, 48)])


def test_parallel_is_refused_without_torchrun(capsys):
    assert cli.main(["generate", "a", "--parallel", "cfg"]) == 2
    assert "torchrun --nproc-per-node 2 -m inkstream generate --parallel cfg" in capsys.readouterr().err


@pytest.mark.slow
def test_ctrl_c_ends_all_processes(folder):
    words = [
        "generate",
        "a",
        "-m",
        str(folder / "model"),
        "--steps",
        "1000",
        "-o",
        str(folder),
        "--parallel",
        "context",
    ]
    running = subprocess.Popen(
        [*TORCHRUN, "-m", "inkstream", *words],
        env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert running.stderr is not None
    try:
        said = [next(running.stderr)]
        while "(--parallel context)" not in said[-1]:
            said.append(next(running.stderr))
        children = children_of(running.pid)
        assert len(children) >= 2
        running.send_signal(signal.SIGINT)
        said += running.communicate(timeout=20)[1].splitlines()
    finally:
        running.kill()
    assert any("stopped; 0 of 1 done" in line for line in said)
    assert not [child for child in children if Path(f"/proc/{child}").exists()]


def children_of(process: int) -> list[int]:
    """The processes that a process started."""
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
