"""Blocks are compiled by regions, once for all prompts, sizes and numbers of pictures."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from inkstream.cli.machine import make_engine, words_of
from inkstream.engine.engine import Engine
from inkstream.engine.machine.compile import compile_blocks
from inkstream.families.flux2.model import Flux2Transformer
from inkstream.families.flux2.specs import KLEIN_4B
from inkstream.families.zimage.model import ZImageTransformer
from inkstream.families.zimage.specs import TURBO
from inkstream.nn.forward import Sample
from inkstream.nn.stack import Blocks
from inkstream.types import Machine

Size = tuple[int, int, int]
"""Tokens of a prompt, height and width of the latents."""


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch.compiler.reset()
    with torch.inference_mode():
        yield
    torch.compiler.reset()


class Count:
    """A backend that counts its calls and compiles nothing."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]):
        self.graphs += 1
        return graph.forward


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def zimage() -> ZImageTransformer:
    return random(ZImageTransformer(TURBO.tiny.transformer))


def flux() -> Flux2Transformer:
    config = KLEIN_4B.tiny.transformer
    return random(Flux2Transformer(replace(config, num_single_layers=3)))


def random(model):
    for i, weight in enumerate(model.parameters()):
        weight.data.copy_(normal(*weight.shape, seed=i) * 0.2)
    return model.eval().requires_grad_(False)


def draw(model, sizes: list[Size], times: list[float]) -> list[torch.Tensor]:
    config = model.config
    if isinstance(model, ZImageTransformer):
        samples = [model.prepare(normal(n, config.cap_feat_dim), h, w) for n, h, w in sizes]
    else:
        texts = [normal(n, config.joint_attention_dim) for n, _, _ in sizes]
        samples = [model.prepare([text], h, w)[0] for text, (_, h, w) in zip(texts, sizes)]
    xs = [normal(config.in_channels, h, w, seed=h * w) for _, h, w in sizes]
    return model([Sample(*each) for each in zip(xs, times, samples)])


def agree(ours, plain, sizes: list[Size], times: list[float]) -> None:
    for a, b in zip(draw(ours, sizes, times), draw(plain, sizes, times)):
        assert torch.allclose(a, b, atol=1e-4)


@pytest.mark.parametrize(("build", "regions"), [(zimage, 2), (flux, 4)])
def test_another_prompt_size_or_time_compiles_nothing_anew(build, regions):
    plain, model, count = build(), build(), Count()
    assert compile_blocks(model, backend=count) == regions  # before and after attention, in each kind of block
    agree(model, plain, [(20, 4, 4)], [0.5])
    first = count.graphs
    assert regions <= first <= 2 * regions  # all blocks of a kind share them
    for size in [(50, 4, 4), (20, 8, 6), (70, 6, 10), (20, 4, 4)]:
        agree(model, plain, [size], [0.25])
    assert count.graphs == first


@pytest.mark.slow
def test_another_number_of_pictures_compiles_nothing_anew():
    plain, model, count = zimage(), zimage(), Count()
    compile_blocks(model, backend=count)
    agree(model, plain, [(20, 4, 4)], [0.5])
    first = count.graphs
    agree(model, plain, [(20, 4, 4), (50, 4, 6)], [0.5, 0.5])  # guidance: two prompts at one time
    assert count.graphs == first
    agree(model, plain, [(20, 4, 4), (50, 4, 6)], [0.5, 0.25])  # the first batch of several times is new
    several = count.graphs
    agree(model, plain, [(20, 6, 4), (60, 4, 4), (20, 6, 8)], [0.5, 0.25, 0.75])
    assert count.graphs == several


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # of inductor's import
def test_blocks_are_compiled_only_with_the_option(tiny_folder):
    for compiled in (True, False):
        engine = Engine(Machine("cpu", compile=compiled))
        list(engine.load(str(tiny_folder)))
        stacks = [stack for stack in engine.model.family.transformer.modules() if isinstance(stack, Blocks)]
        assert stacks
        assert all(("enter" in vars(block)) == ("leave" in vars(block)) == compiled for s in stacks for block in s)


def test_the_option_reaches_the_engine_and_the_repeat_command():
    machine = Machine(compile=True, memory="8GiB")
    assert make_engine(machine).machine.compile
    assert words_of(machine) == ["--memory=8GiB", "--compile"]


def test_a_block_region_is_traced_without_graph_breaks():
    """The region arrives as a real compiler gets it: basic torch operations with dynamic sizes."""
    torch._dynamo.utils.counters.clear()
    plain, model = zimage(), zimage()
    compile_blocks(model, backend="aot_eager")
    for size in [(20, 4, 4), (50, 6, 4)]:
        agree(model, plain, [size], [0.5])
    assert not torch._dynamo.utils.counters["graph_break"]
