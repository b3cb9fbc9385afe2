"""Facts of the FLUX transformers that need no reference: counts, keys, positions, packing, references read once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from inkstream.families.flux1 import keys as flux1_keys
from inkstream.families.flux1 import specs as flux1
from inkstream.families.flux1.model import Flux1Transformer, positions
from inkstream.families.flux2 import keys as flux2_keys
from inkstream.families.flux2 import specs as flux2
from inkstream.families.flux2.model import Flux2Transformer, reference_positions, text_positions
from inkstream.nn.flux import FREQUENCIES, Embedder, patchify, plane, unpatchify
from inkstream.nn.forward import ANY, PLAIN, Sample
from inkstream.nn.rope import rope
from inkstream.types import InputError
from inkstream.weights.keymap import translate

TINY1 = flux1.Flux1Config(
    num_layers=2, num_single_layers=2, attention_head_dim=32, num_attention_heads=2, joint_attention_dim=24,
    pooled_projection_dim=20, axes_dims_rope=(4, 14, 14),
)  # fmt: skip
TINY2 = flux2.Flux2Config(
    num_layers=2, num_single_layers=2, attention_head_dim=32, num_attention_heads=2, joint_attention_dim=24,
    axes_dims_rope=(8, 8, 8, 8),
)  # fmt: skip
KLEIN = replace(TINY2, guidance_embeds=False)

PARAMETERS = {
    "flux1-schnell": 11_891_178_560,
    "flux1-dev": 11_901_408_320,
    "flux1-krea-dev": 11_901_408_320,
    "flux1-kontext-dev": 11_901_408_320,
    "flux1-fill-dev": 11_902_391_360,
    "flux1-canny-dev": 11_901_604_928,
    "flux1-depth-dev": 11_901_604_928,
    "flux1-redux-dev": 11_901_408_320,
    "flux1-redux-schnell": 11_891_178_560,
    "flux2-dev": 32_223_281_152,
    "flux2-klein-4b": 3_875_544_576,
    "flux2-klein-base-4b": 3_875_544_576,
    "flux2-klein-9b": 9_078_581_248,
    "flux2-klein-base-9b": 9_078_581_248,
    "flux2-klein-9b-kv": 9_078_581_248,
}
"""As published."""

EMBEDDER = ("in_layer", "out_layer")
NORMS = ("norm.query_norm.scale", "norm.key_norm.scale")
FLUX1_KEYS = {
    *(f"{name}.{kind}" for name in ("img_in", "txt_in") for kind in ("weight", "bias")),
    *(f"{name}_in.{layer}.{k}" for name in ("time", "vector") for layer in EMBEDDER for k in ("weight", "bias")),
    *(f"final_layer.{layer}.{kind}" for layer in ("linear", "adaLN_modulation.1") for kind in ("weight", "bias")),
    *(
        f"double_blocks.0.{stream}_{name}.{kind}"
        for stream in ("img", "txt")
        for name in ("mod.lin", "attn.qkv", "attn.proj", "mlp.0", "mlp.2")
        for kind in ("weight", "bias")
    ),
    *(f"double_blocks.0.{stream}_attn.{norm}" for stream in ("img", "txt") for norm in NORMS),
    *(f"single_blocks.0.{name}.{k}" for name in ("modulation.lin", "linear1", "linear2") for k in ("weight", "bias")),
    *(f"single_blocks.0.{norm}" for norm in NORMS),
}
FLUX2_KEYS = {
    *(f"{name}.weight" for name in ("img_in", "txt_in", "final_layer.linear", "final_layer.adaLN_modulation.1")),
    *(f"time_in.{layer}.weight" for layer in EMBEDDER),
    *(f"double_stream_modulation_{stream}.lin.weight" for stream in ("img", "txt")),
    "single_stream_modulation.lin.weight",
    *(
        f"double_blocks.0.{stream}_{name}.weight"
        for stream in ("img", "txt")
        for name in ("attn.qkv", "attn.proj", "mlp.0", "mlp.2")
    ),
    *(f"double_blocks.0.{stream}_attn.{norm}" for stream in ("img", "txt") for norm in NORMS),
    *(f"single_blocks.0.{name}.weight" for name in ("linear1", "linear2")),
    *(f"single_blocks.0.{norm}" for norm in NORMS),
}
"""Of a model of one block of each kind, that reads no guidance."""


def build(config) -> Flux1Transformer | Flux2Transformer:
    return Flux1Transformer(config) if isinstance(config, flux1.Flux1Config) else Flux2Transformer(config)


def on_meta(config) -> dict[str, Tensor]:
    with torch.device("meta"):
        return build(config).state_dict()


def shaken(config, seed: int = 0):
    """A model with weights far from their neutral start."""
    torch.manual_seed(seed)
    model = build(config).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        torch.nn.init.normal_(weight, mean=1.0 if name.endswith("norm.scale") else 0.0, std=0.1)
    return model


def largest_difference(a: list[Tensor], b: list[Tensor]) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


# Sizes and keys -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*flux1.SPECS, *flux2.SPECS])
def test_every_full_model_has_the_published_number_of_parameters_and_is_known_by_its_shapes(name):
    config = {**flux1.SPECS, **flux2.SPECS}[name].transformer
    state = on_meta(config)
    assert sum(tensor.numel() for tensor in state.values()) == PARAMETERS[name]
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    right, wrong = (flux1, flux2) if name in flux1.SPECS else (flux2, flux1)
    assert right.infer_config(shapes) == config
    with pytest.raises(KeyError):
        wrong.infer_config(shapes)


@pytest.mark.parametrize(("config", "expected"), [(TINY1, FLUX1_KEYS), (TINY2, FLUX2_KEYS)], ids=["flux.1", "flux.2"])
def test_our_names_are_those_of_the_single_files(config, expected):
    small = replace(config, num_layers=1, num_single_layers=1)
    assert on_meta(replace(small, guidance_embeds=False)).keys() == expected
    kinds = ("weight", "bias") if config is TINY1 else ("weight",)
    guidance = {f"guidance_in.{layer}.{kind}" for layer in EMBEDDER for kind in kinds}
    assert on_meta(small).keys() == expected | guidance


def test_the_full_models_have_as_many_keys_as_their_layouts():
    def count(config, rules):
        return len(translate(rules, on_meta(config), back=True))

    dev1, dev2 = flux1.SPECS["flux1-dev"].transformer, flux2.SPECS["flux2-dev"].transformer
    assert (count(dev1, flux1_keys.SINGLE_FILE), count(dev1, flux1_keys.DIFFUSERS)) == (780, 1160)
    assert (count(dev2, flux2_keys.SINGLE_FILE), count(dev2, flux2_keys.DIFFUSERS)) == (299, 331)


def test_the_fused_layers_have_the_published_shapes():
    state = on_meta(flux1.SPECS["flux1-dev"].transformer)
    theirs = translate(flux1_keys.DIFFUSERS, state, back=True)
    assert state["single_blocks.37.linear1.weight"].shape == (21504, 3072)
    assert theirs["single_transformer_blocks.37.attn.to_k.weight"].shape == (3072, 3072)
    assert theirs["single_transformer_blocks.37.proj_mlp.bias"].shape == (12288,)
    for name, wide, narrow in (("dev", 55296, 6144), ("klein-4b", 27648, 3072), ("klein-9b", 36864, 4096)):
        state = on_meta(flux2.SPECS[f"flux2-{name}"].transformer)
        assert state["single_blocks.0.linear1.weight"].shape == (wide, narrow)
        assert state["single_blocks.0.linear2.weight"].shape == (narrow, 4 * narrow)


@pytest.mark.parametrize(
    ("config", "keys"),
    [
        (TINY1, flux1_keys),
        (replace(TINY1, guidance_embeds=False, in_channels=384, out_channels=64), flux1_keys),
        (TINY2, flux2_keys),
        (KLEIN, flux2_keys),
    ],
    ids=["flux.1", "fill", "flux.2", "klein"],
)
def test_each_layout_round_trips_to_the_identity(config, keys):
    state = shaken(config).state_dict()
    for rules in (keys.SINGLE_FILE, keys.DIFFUSERS):
        theirs = translate(rules, state, back=True)
        ours = translate(rules, theirs)
        assert ours.keys() == state.keys()
        assert all(torch.equal(ours[key], state[key]) for key in state)
        again = translate(rules, ours, back=True)
        assert again.keys() == theirs.keys()
        assert all(torch.equal(again[key], theirs[key]) for key in theirs)
    assert not theirs.keys() & state.keys()  # each of their names differs from ours, so each has its rule


@pytest.mark.parametrize(("config", "keys"), [(TINY1, flux1_keys), (TINY2, flux2_keys)], ids=["flux.1", "flux.2"])
def test_norms_are_read_under_either_spelling_and_written_under_one(config, keys):
    state = shaken(config).state_dict()
    other = {key.removesuffix("scale") + "weight" if key.endswith("scale") else key: t for key, t in state.items()}
    assert other.keys() != state.keys()
    assert translate(keys.SINGLE_FILE, other).keys() == state.keys()
    assert translate(keys.SINGLE_FILE, state, back=True).keys() == state.keys()


def test_the_final_layers_scale_and_shift_change_places_between_the_layouts():
    weight = torch.cat((torch.zeros(2, 3), torch.ones(2, 3)))
    for keys in (flux1_keys, flux2_keys):
        ours = translate(keys.DIFFUSERS, {"norm_out.linear.weight": weight})
        assert ours["final_layer.adaLN_modulation.1.weight"][:, 0].tolist() == [1, 1, 0, 0]


# Patches, positions, times ------------------------------------------------------------------------------------------


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 4), st.integers(1, 3))
def test_unpatchify_inverts_patchify(rows, columns, channels, p):
    x = torch.randn(channels, rows * p, columns * p)
    assert torch.equal(unpatchify(patchify(x, p), rows, columns, p), x)


def test_inside_a_patch_the_column_runs_fastest_and_the_channel_slowest():
    x = torch.arange(2 * 2 * 4).reshape(2, 2, 4)  # channel, row, column
    assert patchify(x, 2).tolist() == [[0, 1, 4, 5, 8, 9, 12, 13], [2, 3, 6, 7, 10, 11, 14, 15]]


def test_positions_follow_the_published_rules():
    one = positions(2, (2, 3), [(1, 2)]).tolist()
    assert one[:2] == [[0, 0, 0]] * 2
    assert one[2:8] == [[0, r, c] for r in range(2) for c in range(3)]
    assert one[8:] == [[1, 0, 0], [1, 0, 1]]
    assert text_positions(3).tolist() == [[0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 2]]
    assert plane(0, 1, 2, axes=4).tolist() == [[0, 0, 0, 0], [0, 0, 1, 0]]
    two = [[10, 0, 0, 0], [10, 0, 1, 0], [20, 0, 0, 0], [20, 1, 0, 0]]
    assert reference_positions([(1, 2), (2, 1)]).tolist() == two


def test_times_are_embedded_as_sinusoids_of_a_thousand_times_each_cosines_first():
    embedder = Embedder(FREQUENCIES, 8, bias=False)
    waves = []
    embedder.in_layer.register_forward_pre_hook(lambda module, args: waves.append(args[0]))
    embedder.numbers([0.0, 0.5], PLAIN, ANY)
    half = FREQUENCIES // 2
    assert waves[0][0].tolist() == [1.0] * half + [0.0] * half
    rates = 10_000 ** (-torch.arange(half, dtype=torch.float64) / half)
    expected = torch.cat(((500 * rates).cos(), (500 * rates).sin()))
    assert torch.allclose(waves[0][1].double(), expected, atol=1e-4)


def ask(model, xs, times, prepared) -> list[torch.Tensor]:
    return model([Sample(*each) for each in zip(xs, times, prepared, strict=True)])


# Packing ------------------------------------------------------------------------------------------------------------


def prepare1(model: Flux1Transformer, guidance: float | None = 3.5):
    """Samples of several lengths, sizes and references, with their noisy latents and times."""
    torch.manual_seed(1)
    sizes, lengths, times = [(4, 8), (8, 8), (4, 8), (2, 2)], [5, 12, 5, 1], [1.0, 0.7, 0.7, 0.1]
    references = [[], [torch.randn(16, 6, 4), torch.randn(16, 4, 4)], [], [torch.randn(16, 2, 4)]]
    prepared = [
        model.prepare([torch.randn(n, 24)], [torch.randn(20)], *size, guidance, references=given)[0]
        for n, size, given in zip(lengths, sizes, references)
    ]
    return [torch.randn(16, *size) for size in sizes], times, prepared


def prepare2(model: Flux2Transformer, guidance: float | None = 4.0):
    """As `prepare1`; one sample's references are read once."""
    torch.manual_seed(1)
    sizes, lengths, times = [(2, 4), (4, 4), (2, 4), (1, 1), (2, 4)], [5, 12, 5, 1, 5], [1.0, 0.7, 0.7, 0.1, 0.7]
    references = [[], [torch.randn(128, 3, 2), torch.randn(128, 2, 2)], [], [torch.randn(128, 1, 2)], []]
    references[2] = [torch.randn(128, 2, 5)]
    prepared = [
        model.prepare([torch.randn(n, 24)], *size, guidance, references=given, read_once=i == 2)[0]
        for i, (n, size, given) in enumerate(zip(lengths, sizes, references))
    ]
    return [torch.randn(128, *size) for size in sizes], times, prepared


CASES = [(TINY1, prepare1), (TINY2, prepare2)]


@pytest.mark.parametrize(("config", "prepare"), CASES, ids=["flux.1", "flux.2"])
def test_every_sample_of_a_mixed_batch_equals_its_run_alone(config, prepare):
    model = shaken(config)
    xs, times, prepared = prepare(model)
    together = ask(model, xs, times, prepared)
    assert all(y.shape == x.shape and y.dtype == torch.float32 for x, y in zip(xs, together))
    alone = [model([Sample(x, t, s)])[0] for x, t, s in zip(xs, times, prepared)]
    assert largest_difference(together, alone) <= 1e-5
    assert largest_difference(ask(model, xs[::-1], times[::-1], prepared[::-1]), alone[::-1]) <= 1e-5


@pytest.mark.parametrize("times", [[0.7, 0.7, 0.7], [0.9, 0.5, 0.1]], ids=["one time", "a time each"])
@pytest.mark.parametrize("config", [TINY1, TINY2], ids=["flux.1", "flux.2"])
def test_samples_of_equal_length_equal_their_runs_alone(config, times):
    model = shaken(config)
    texts, more = torch.randn(3, 6, 24), [torch.randn(3, 20)] if config is TINY1 else []
    prepared = model.prepare(texts, *more, 4, 4, 3.5, times=times)
    xs = list(torch.randn(3, 16 if config is TINY1 else 128, 4, 4))
    alone = [model([Sample(x, t, s)])[0] for x, t, s in zip(xs, times, prepared)]
    assert largest_difference(ask(model, xs, times, prepared), alone) <= 1e-5
    assert largest_difference(alone[:1], alone[1:2]) > 0.01


@pytest.mark.parametrize(("config", "prepare"), CASES, ids=["flux.1", "flux.2"])
def test_a_foreseen_time_is_answered_as_one_that_was_not(config, prepare):
    model = shaken(config)
    xs, times, plain = prepare(model)
    known = [{t: model.modulate([t], s.embedding[None], PLAIN, ANY)} for s, t in zip(plain, times)]
    ahead = [replace(s, modulation=each) for s, each in zip(plain, known)]
    expected = ask(model, xs, times, plain)
    assert largest_difference(ask(model, xs, times, ahead), expected) <= 1e-5
    assert largest_difference(ask(model, xs, times, [*ahead[:1], *plain[1:]]), expected) <= 1e-5


@pytest.mark.parametrize("config", [TINY1, TINY2], ids=["flux.1", "flux.2"])
def test_foreseen_times_are_computed_once_each_and_in_one_pass(config):
    model, calls = shaken(config), []
    model.time_in.register_forward_hook(lambda module, args, out: calls.append(len(out)))
    more = [torch.randn(1, 20)] if config is TINY1 else []
    (sample,) = model.prepare(torch.randn(1, 6, 24), *more, 4, 4, 3.5, times=[1.0, 0.5, 0.5, 0.25])
    channels = 16 if config is TINY1 else 128
    for t in (1.0, 0.5, 0.25):
        model([Sample(torch.randn(channels, 4, 4), t, sample)])
    assert calls == [3]


@pytest.mark.parametrize(("config", "prepare"), CASES, ids=["flux.1", "flux.2"])
def test_in_bfloat16_the_answer_is_float32_and_nearly_the_same(config, prepare):
    model = shaken(config)
    xs, times, prepared = prepare(model)
    exact = ask(model, xs, times, prepared)
    xs, times, prepared = prepare(model.bfloat16())
    for y, z in zip(exact, ask(model, xs, times, prepared)):
        assert z.dtype == torch.float32
        assert float((y - z).norm() / y.norm()) < 0.05


def test_prompts_prepared_together_equal_prompts_prepared_alone():
    one, two = shaken(TINY1), shaken(TINY2)
    texts, pooled = [torch.randn(3, 24), torch.randn(9, 24)], [torch.randn(20), torch.randn(20)]
    x1, x2, seen = torch.randn(16, 4, 4), torch.randn(128, 4, 4), [torch.randn(128, 2, 3)]
    both = ask(one, [x1, x1], [0.5, 0.5], one.prepare(texts, pooled, 4, 4, 3.5))
    each = [ask(one, [x1], [0.5], one.prepare([s], [p], 4, 4, 3.5))[0] for s, p in zip(texts, pooled)]
    assert largest_difference(both, each) <= 1e-5
    for once in (False, True):
        both = ask(two, [x2, x2], [0.5, 0.5], two.prepare(texts, 4, 4, 3.5, references=seen, read_once=once))
        each = [ask(two, [x2], [0.5], two.prepare([s], 4, 4, 3.5, references=seen, read_once=once))[0] for s in texts]
        assert largest_difference(both, each) <= 1e-5


@pytest.mark.parametrize("config", [TINY1, TINY2], ids=["flux.1", "flux.2"])
def test_only_the_targets_rows_go_through_the_last_blocks_second_half(config):
    model, rows = shaken(config), []
    for block in model.single_blocks:
        block.linear2.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    more, channels, p = ([torch.randn(1, 20)], 16, 2) if config is TINY1 else ([], 128, 1)
    x, reference = torch.randn(channels, 4 * p, 3 * p), torch.randn(channels, 2 * p, 5 * p)
    ask(model, [x], [0.5], model.prepare(torch.randn(1, 7, 24), *more, 4 * p, 3 * p, 3.5, references=[reference]))
    assert rows == [7 + 12 + 10, 12]


@pytest.mark.parametrize("shift", [1, 7, 100])
def test_moving_all_tokens_along_the_axis_of_pictures_changes_nothing(shift):
    move3, move4 = torch.tensor([shift, 0, 0]), torch.tensor([shift, 0, 0, 0])
    one, two = shaken(TINY1), shaken(TINY2)
    (first,) = one.prepare([torch.randn(6, 24)], [torch.randn(20)], 4, 6, 3.5, references=[torch.randn(16, 4, 4)])
    (second,) = two.prepare([torch.randn(6, 24)], 2, 3, 3.5, references=[torch.randn(128, 2, 2)])
    at3 = positions(6, (2, 3), [(2, 2)])
    at4 = torch.cat((text_positions(6), plane(0, 2, 3, 4), reference_positions([(2, 2)])))
    for model, x, sample, at, move, theta in (
        (one, torch.randn(16, 4, 6), first, at3, move3, 10_000),
        (two, torch.randn(128, 2, 3), second, at4, move4, 2000),
    ):
        here, moved, one_moved = at, at + move, torch.cat((at[:-1], at[-1:] + move))
        still = model([Sample(x, 0.5, sample)])
        differences = []
        for where in (here, moved, one_moved):
            table = rope(where.cpu(), model.config.axes_dims_rope, theta, where.device)
            differences.append(largest_difference(still, model([Sample(x, 0.5, replace(sample, rope=table))])))
        assert differences[0] == 0
        assert differences[1] <= 1e-4
        assert differences[2] > 1e-3


# References read once -----------------------------------------------------------------------------------------------


def under_a_mask(model: Flux2Transformer, x: Tensor, t: float, text: Tensor, references: list[Tensor]) -> Tensor:
    """The whole sequence [text, references, target] in one dense pass: references are modulated at time 0 and a mask
    lets them see each other alone. Written from the blocks' weights, not through their code."""
    heads, width = model.config.num_attention_heads, model.config.attention_head_dim
    n_text, n_seen, n = len(text), sum(r[0].numel() for r in references), x[0].numel()
    at = torch.cat((text_positions(n_text), reference_positions([r.shape[1:] for r in references])))
    at = torch.cat((at, plane(0, *x.shape[1:], axes=4)))
    rates = 2000.0 ** -(torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    turns = torch.polar(torch.ones(()), torch.cat([axis[:, None] * rates for axis in at.T], dim=-1).float())[:, None]
    is_seen = torch.zeros(n_text + n_seen + n, dtype=torch.bool)
    is_seen[n_text : n_text + n_seen] = True
    mask = ~is_seen[:, None] | is_seen[None, :]  # who may look (rows) at whom

    def turn(y):
        return torch.view_as_real(torch.view_as_complex(y.unflatten(-1, (-1, 2))) * turns).flatten(-2)

    def attend(q, k, v):
        q, k, v = (y.transpose(0, 1) for y in (turn(q), turn(k), v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(0, 1).flatten(1)

    def normed(norm, y):
        return y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6) * norm.scale

    def qkv(y, norm):
        q, k, v = (part.unflatten(-1, (heads, width)) for part in y.chunk(3, dim=-1))
        return normed(norm.query_norm, q), normed(norm.key_norm, k), v

    def blend(modulator, picture):  # of each token, the modulation at its own time
        noisy, clean = (modulator(model.time_in.numbers([time], PLAIN, ANY), PLAIN, ANY)[0] for time in (t, 0.0))
        own = is_seen[n_text:] if picture else is_seen
        return torch.where(own[:, None, None], clean, noisy).unbind(1)

    def enter(y, shift, scale):
        return (1 + scale) * F.layer_norm(y, y.shape[-1:], eps=1e-6) + shift

    def swiglu(y):
        gate, up = y.chunk(2, dim=-1)
        return F.silu(gate) * up

    def mlp(net, y):
        return net[2](swiglu(net[0](y)))

    words = model.txt_in(text)
    pictures = model.img_in(torch.cat([y.flatten(1).T for y in (*references, x)]))
    of_text = model.double_stream_modulation_txt(model.time_in.numbers([t], PLAIN, ANY), PLAIN, ANY)[0]
    of_picture, of_all = blend(model.double_stream_modulation_img, True), blend(model.single_stream_modulation, False)
    for block in model.double_blocks:
        sides = [(block.txt_attn, words, of_text), (block.img_attn, pictures, of_picture)]
        parts = [qkv(side.qkv(enter(y, m[0], m[1])), side.norm) for side, y, m in sides]
        out = attend(*(torch.cat(both) for both in zip(*parts)))
        words = words + of_text[2] * block.txt_attn.proj(out[:n_text])
        pictures = pictures + of_picture[2] * block.img_attn.proj(out[n_text:])
        words = words + of_text[5] * mlp(block.txt_mlp, enter(words, of_text[3], of_text[4]))
        pictures = pictures + of_picture[5] * mlp(block.img_mlp, enter(pictures, of_picture[3], of_picture[4]))
    both = torch.cat((words, pictures))
    for block in model.single_blocks:
        dim = both.shape[-1]
        wide = block.linear1(enter(both, of_all[0], of_all[1]))
        out = attend(*qkv(wide[:, : 3 * dim], block.norm))
        both = both + of_all[2] * block.linear2(torch.cat((out, swiglu(wide[:, 3 * dim :])), dim=-1))
    shift, scale = model.final_layer.adaLN_modulation(model.time_in.numbers([t], PLAIN, ANY), PLAIN, ANY)[0].chunk(2)
    return model.final_layer.linear(enter(both[-n:], shift, scale)).T.reshape(x.shape)


def test_references_read_once_equal_the_whole_sequence_under_its_mask_at_every_step():
    model = shaken(KLEIN)
    text, references = torch.randn(6, 24), [torch.randn(128, 3, 2), torch.randn(128, 2, 4)]
    (sample,) = model.prepare([text], 3, 5, references=references, read_once=True)
    for t in (1.0, 0.6, 0.0):
        x = torch.randn(128, 3, 5)
        got, expected = model([Sample(x, t, sample)])[0], under_a_mask(model, x, t, text, references)
        assert float(expected.abs().max()) > 1
        assert largest_difference([got], [expected]) <= 1e-5


def test_references_read_once_are_not_read_again():
    model, rows = shaken(KLEIN), []
    model.double_blocks[0].img_attn.qkv.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    text, references = torch.randn(6, 24), [torch.randn(128, 3, 2), torch.randn(128, 2, 4)]
    (sample,) = model.prepare([text], 3, 5, references=references, read_once=True)
    for t in (1.0, 0.5):
        model([Sample(torch.randn(128, 3, 5), t, sample)])
    assert rows == [14, 15, 15]
    assert len(sample.memory) == 4
    assert all(len(k) == len(v) == 14 and v.untyped_storage().nbytes() == v.nbytes for k, v in sample.memory)


def test_reading_once_differs_from_reading_at_every_step_and_without_references_is_the_same():
    model = shaken(KLEIN)
    text, x, references = torch.randn(6, 24), torch.randn(128, 3, 5), [torch.randn(128, 3, 2)]

    def answer(given, once):
        return ask(model, [x], [0.5], model.prepare([text], 3, 5, references=given, read_once=once))

    assert largest_difference(answer(references, True), answer(references, False)) > 0.01
    assert largest_difference(answer([], True), answer([], False)) == 0


# Errors and training ------------------------------------------------------------------------------------------------


def test_a_guidance_that_is_not_read_and_one_that_is_missing_are_refused():
    text, pooled = torch.randn(1, 4, 24), torch.randn(1, 20)
    with pytest.raises(InputError, match=r"guidance is None.*: give a number, such as 3\.5"):
        build(TINY1).prepare(text, pooled, 4, 4)
    with pytest.raises(InputError, match=r"guidance is None.*: give a number, such as 3\.5"):
        build(TINY2).prepare(text, 4, 4)
    with pytest.raises(InputError, match=r"guidance 4\.0 is given, but this model takes none: give None"):
        build(KLEIN).prepare(text, 4, 4, 4.0)


@pytest.mark.parametrize(("config", "prepare"), CASES, ids=["flux.1", "flux.2"])
def test_every_weight_has_a_gradient(config, prepare):
    model = shaken(config).requires_grad_(True)
    xs, times, prepared = prepare(model)
    sum(y.square().sum() for y in ask(model, xs, times, prepared)).backward()
    assert [name for name, w in model.named_parameters() if w.grad is None or not w.grad.abs().sum()] == []
