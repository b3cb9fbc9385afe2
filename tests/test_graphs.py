"""CUDA graphs: small forwards are recorded by shape and replayed with new inputs; models on a CPU are not changed.

The recorder here has no GPU: a replay computes again from the memory that a CUDA graph would read.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from inkstream.engine.machine import graphs
from inkstream.engine.machine.graphs import (
    NotRecordable,
    Recordings,
    forward_text_encoder,
    forward_transformer,
    replay_small,
)
from inkstream.families.flux2.model import Flux2Transformer
from inkstream.families.flux2.specs import KLEIN_4B
from inkstream.families.flux3.model import Flux3Transformer
from inkstream.families.flux3.specs import KLEIN
from inkstream.families.qwenimage.model import QwenImageTransformer
from inkstream.families.qwenimage.specs import BASE
from inkstream.families.zimage.model import ZImageTransformer
from inkstream.families.zimage.specs import TURBO
from inkstream.nn.around import Around
from inkstream.nn.around.adapters import Adapter
from inkstream.nn.around.cache import StepCache
from inkstream.nn.forward import Sample
from inkstream.nn.qwen3 import Qwen3


class Recorder:
    """A recorder that counts recordings and keeps its memory fixed, as a CUDA graph does."""

    def __init__(self):
        self.count = 0

    def __call__(self, compute):
        self.count += 1
        outputs = [output.clone() for output in compute()]

        def replay() -> None:
            for output, again in zip(outputs, compute()):
                output.copy_(again)

        return outputs, replay


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random(model: torch.nn.Module) -> torch.nn.Module:
    for i, weight in enumerate(model.parameters()):
        weight.copy_(normal(*weight.shape, seed=i) * 0.2)
    return model.eval()


def zimage(prompt: int, width: int, times=(0.25, 0.5), seed: int = 0):
    """A model and a sample that it has prepared."""
    model = random(ZImageTransformer(TURBO.tiny.transformer))
    scales = model.scales(times)
    sample = model.prepare(normal(prompt, 32, seed=seed), 4, width)
    return model, replace(sample, scales=scales)


def flux(prompt: int, width: int, times=(0.25, 0.5), seed: int = 0):
    config = KLEIN_4B.tiny.transformer
    model = random(Flux2Transformer(config))
    (sample,) = model.prepare([normal(prompt, config.joint_attention_dim, seed=seed)], 4, width, times=times)
    return model, sample


def flow_map(prompt: int, width: int, times=(0.5, 0.25), seed: int = 0):
    """At a time it is told the next one, and 0 at the last."""
    config = KLEIN.tiny.transformer
    model = random(Flux3Transformer(config))
    (sample,) = model.prepare([normal(prompt, config.joint_attention_dim, seed=seed)], 4, width, times=times)
    return model, sample


def qwen(prompt: int, width: int, times=(0.25, 0.5), seed: int = 0):
    config = BASE.tiny.transformer
    model = random(QwenImageTransformer(config))
    (sample,) = model.prepare([normal(prompt, config.context_in_dim, seed=seed)], 4, width, times=times)
    return model, sample


def told(sample, t: float):
    """The sample, with the time that its step goes to if it is a flow map's."""
    return replace(sample, to={0.5: 0.25, 0.25: 0.0}[t]) if hasattr(sample, "to") else sample


def draw(model, samples, times, seed: int = 0) -> tuple[list[torch.Tensor], list[Sample]]:
    channels = model.config.in_channels
    xs = [normal(channels, *[n * getattr(model.config, "patch_size", 1) for n in s.grid], seed=seed) for s in samples]
    asked = [Sample(x, t, told(sample, t)) for x, t, sample in zip(xs, times, samples)]
    return model.forward(asked), asked


@pytest.mark.parametrize("family", [zimage, flux, flow_map, qwen])
def test_steps_prompts_and_seeds_replay_one_recording(family):
    model, sample = family(5, 4)
    _, other = family(5, 4, seed=1)
    recorder = Recorder()
    replayed = partial(forward_transformer, Recordings(recorder), model.forward)
    for seed, (t, given) in enumerate([(0.25, sample), (0.5, sample), (0.25, sample), (0.5, other), (0.25, sample)]):
        (plain,), asked = draw(model, [given], [t], seed)
        assert torch.equal(replayed(asked)[0], plain)
    assert recorder.count == 1  # at the second forward


def test_the_next_step_does_not_overwrite_earlier_outputs():
    model, sample = zimage(5, 4)
    replayed = partial(forward_transformer, Recordings(Recorder()), model.forward)
    given = [draw(model, [sample], [0.5], seed) for seed in range(4)]
    kept = [replayed(asked)[0] for _, asked in given]
    assert all(torch.equal(ours, plain[0]) for ours, (plain, _) in zip(kept, given))


def test_a_solver_may_overwrite_its_query():
    model, sample = zimage(5, 4)
    replayed = partial(forward_transformer, Recordings(Recorder()), model.forward)
    x = normal(16, 4, 4)
    for _ in range(4):
        asked = [Sample(x, 0.5, sample)]
        assert torch.equal(replayed(asked)[0], model.forward(asked)[0])
        x.mul_(0.5)


@pytest.mark.parametrize("family", [zimage, flux, flow_map, qwen])
def test_other_shapes_or_batches_have_recordings_of_their_own(family):
    model, short = family(3, 4)
    _, long = family(50, 4)
    _, wide = family(3, 6)
    recorder = Recorder()
    replayed = partial(forward_transformer, Recordings(recorder), model.forward)
    cases = [([short], [0.5]), ([long], [0.5]), ([wide], [0.5]), ([short, long], [0.5, 0.5]),
             ([short, short], [0.25, 0.5])]  # fmt: skip
    for count, (samples, times) in enumerate(cases, start=1):
        for seed in range(3):
            plain, asked = draw(model, samples, times, seed)
            assert all(torch.equal(a, b) for a, b in zip(replayed(asked), plain))
        assert recorder.count == count


def test_guidance_shares_one_noise_tensor_between_two_prompts():
    """The noise tensor of two prompts stays one tensor in a recording, so that shared work is done once."""
    model, short = zimage(3, 4)
    _, long = zimage(50, 4)
    seen, recorder = [], Recorder()

    def forward(samples):
        seen.append(samples[0].x is samples[1].x)
        return model.forward(samples)

    replayed = partial(forward_transformer, Recordings(recorder), forward)
    for seed in range(3):
        x = normal(16, 4, 4, seed=seed)
        asked = [Sample(x, 0.5, short), Sample(x, 0.5, long)]
        ours, plain = replayed(asked), model.forward(asked)
        assert all(torch.equal(a, b) for a, b in zip(ours, plain))
    assert all(seen)
    replayed([Sample(normal(16, 4, 4), 0.5, short), Sample(normal(16, 4, 4), 0.5, long)])
    assert not seen[-1]  # two different tensors have another recording
    assert recorder.count == 1


def test_large_unprepared_or_wrapped_samples_are_not_recorded(monkeypatch):
    model, sample = zimage(5, 4)
    recorder = Recorder()
    replayed = partial(forward_transformer, Recordings(recorder), model.forward)

    def thrice(samples, times):
        for _ in range(3):
            plain, asked = draw(model, samples, times)
            assert torch.equal(replayed(asked)[0], plain[0])

    thrice([sample], [0.75])  # a time outside the schedule
    for _ in range(3):
        replayed([Sample(normal(16, 4, 4), 0.5, sample, Around(StepCache(1, 0.0)))])
    with torch.enable_grad():
        thrice([sample], [0.5])
    monkeypatch.setattr(graphs, "SMALL", 15)
    thrice([sample], [0.5])
    assert recorder.count == 0
    monkeypatch.setattr(graphs, "SMALL", 16)
    thrice([sample], [0.5])
    assert recorder.count == 1


class Scale:
    """An adapter's product that makes a layer's output larger."""

    def __init__(self, factor: float):
        self.factor = factor

    def __call__(self, x: torch.Tensor, plain: torch.Tensor, out: torch.Tensor) -> None:
        out.mul_(self.factor)


@pytest.mark.parametrize("family", [zimage, flux])
def test_forwards_with_adapters_are_recorded_for_these_adapters(family):
    model, sample = family(5, 4)
    path = "layers.0.attention.out" if family is zimage else "single_blocks.0.linear2"
    arounds = [Around(adapters=(Adapter.of(model, {path: Scale(factor)}),)) for factor in (0.5, 2.0)]
    recorder = Recorder()
    replayed = partial(forward_transformer, Recordings(recorder), model.forward)

    def draw_with(*chosen: Around, seed: int = 0) -> torch.Tensor:
        size = [n * getattr(model.config, "patch_size", 1) for n in sample.grid]
        xs = [normal(model.config.in_channels, *size, seed=seed + i) for i in range(len(chosen))]
        asked = [Sample(x, 0.5, sample, around) for x, around in zip(xs, chosen)]
        plain, ours = model.forward(asked), replayed(asked)
        assert all(torch.equal(a, b) for a, b in zip(ours, plain))
        return ours[0]

    outputs = [[draw_with(around, seed=seed) for seed in range(3)] for around in arounds]
    assert recorder.count == 2  # one for each adapter
    assert not torch.equal(outputs[0][0], outputs[1][0])
    for seed in range(3):
        draw_with(Around(adapters=arounds[0].adapters), seed=seed)  # another picture with the same adapter
    assert recorder.count == 2
    for seed in range(3):
        draw_with(*arounds, seed=seed)
    assert recorder.count == 3
    for seed in range(3):
        draw_with(*arounds[::-1], seed=seed)
    assert recorder.count == 4


def test_a_recording_ends_with_the_adapters_that_it_reads():
    class Held:
        """Stands for an adapter, which a CUDA graph does not keep alive."""

    made = []

    def record(compute):
        outputs = compute()
        made.append(1)
        return outputs, lambda: None

    recordings, held, other = Recordings(record), Held(), Held()
    for owners in ([held, other], [other], [held]):
        for _ in range(3):
            recordings.run((), [torch.ones(2)], lambda given: [given[0] + 1], owners)
    assert len(made) == len(recordings._kept) == 3
    del held, owners
    assert len(recordings._kept) == 1
    recordings.run((), [torch.ones(2)], lambda given: [given[0] + 1], [other])
    assert len(made) == 3


def test_recording_is_tried_once_if_it_fails():
    tried = []

    def refuse(compute):
        tried.append(1)
        raise NotRecordable("called a synchronizing operation")

    recordings = Recordings(refuse)
    for _ in range(4):
        assert recordings.run((), [torch.ones(2)], lambda given: [given[0] + 1])[0].tolist() == [2, 2]
    assert len(tried) == 1


def test_the_least_recently_used_recordings_are_dropped(monkeypatch):
    monkeypatch.setattr(graphs, "KEPT", 2)
    recorder = Recorder()
    recordings = Recordings(recorder)
    for size, count in [(1, 0), (1, 1), (2, 1), (2, 2), (1, 2), (3, 2), (3, 3), (1, 3), (2, 3), (2, 4)]:
        recordings.run((), [torch.ones(size)], lambda given: [given[0] + 1])
        assert recorder.count == count


def test_prompts_are_padded_so_that_few_lengths_are_recorded():
    model = random(Qwen3(TURBO.tiny.text_encoder))
    recorder = Recorder()
    replayed = partial(forward_text_encoder, Recordings(recorder), model.forward)
    for count in (5, 7, 32, 9, 33, 40, 64):
        ids = torch.arange(count)
        assert torch.allclose(replayed(ids, [count]), model(ids, [count]), atol=1e-5)
    assert recorder.count == 2  # of 32 tokens and of 64
    ids = torch.arange(9)
    for _ in range(3):
        assert torch.equal(replayed(ids, [4, 5]), model(ids, [4, 5]))
        assert torch.equal(replayed(ids, [9], [6]), model(ids, [9], [6]))
    assert recorder.count == 2


def test_a_model_on_the_cpu_is_not_changed():
    modules = {"transformer": zimage(3, 4)[0], "text_encoder": random(Qwen3(TURBO.tiny.text_encoder))}
    for part, module in modules.items():
        replay_small(part, module)
    assert all("forward" not in vars(module) for module in modules.values())
