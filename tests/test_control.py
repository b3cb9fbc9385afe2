"""Control nets: files are recognised, pictures follow them alone, together, in some steps and in a batch."""

from __future__ import annotations

import base64
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from inkstream import Engine
from inkstream.engine.drawing.complete import complete
from inkstream.engine.drawing.controls import Controls
from inkstream.engine.drawing.model import Model, advance
from inkstream.engine.files.parts import Unset, locate_control
from inkstream.engine.machine.install import Placement
from inkstream.engine.machine.loader import load, open_model, read
from inkstream.engine.machine.memory import Placing
from inkstream.families.flux1.clip_vision import VisionConfig
from inkstream.families.flux1.control import CONTROLNET, ControlConfig
from inkstream.families.flux1.ip_adapter import IP_ADAPTER, IPAdapterConfig
from inkstream.families.flux1.ip_adapter_instantx import IP_ADAPTER_INSTANTX, InstantXConfig
from inkstream.families.flux1.specs import DEV as FLUX1_DEV
from inkstream.families.flux1.specs import SiglipConfig
from inkstream.families.flux2.control import FUN, FunConfig
from inkstream.families.flux2.specs import DEV as FLUX2_DEV
from inkstream.families.zimage.control import UNION, UnionConfig
from inkstream.types import ControlUse, InputError, Machine, Request
from inkstream.weights.files import write_state
from inkstream.weights.keymap import translate

TINY = {"dim": 64, "n_heads": 2, "n_layers": 1, "n_refiner_layers": 1}
ZIMAGE = {
    "1.0": UnionConfig(**TINY, control_in_dim=16, refiner="plain"),
    "2.0": UnionConfig(**TINY, refiner="layers"),
    "2.1": UnionConfig(**TINY),
}


def random_state(net: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = net.state_dict()
    for name, weight in state.items():
        is_norm = weight.ndim == 1 and "norm" in name and name.endswith(("weight", "scale"))
        weight.normal_(mean=1.0 if is_norm else 0.0, std=0.1, generator=generator)
    return state


def write_union(path: Path, config: UnionConfig = ZIMAGE["2.1"], seed: int = 0) -> Path:
    """A file with the published names."""
    state = translate(UNION.layouts["published"], random_state(UNION.build(config), seed), back=True)
    write_state(path, state)
    return path


def picture(colour: str = "white", size: tuple[int, int] = (70, 50)) -> Image.Image:
    image = Image.new("RGB", size, "black")
    image.paste(colour, (10, 10, 40, 30))
    return image


def wish(folder: Path, **fields: Any) -> Request:
    return Request(
        **{"prompt": "a fox", "width": 64, "height": 64, "steps": 4, "seed": 0, "model": str(folder), **fields}
    )


@pytest.fixture(scope="module")
def nets(tmp_path_factory) -> Path:
    """A folder of nets for the tiny Z-Image."""
    folder = tmp_path_factory.mktemp("controls")
    for name, config in ZIMAGE.items():
        write_union(folder / f"union-{name}.safetensors", config)
    write_union(folder / "other.safetensors", seed=1)
    return folder


@pytest.fixture(scope="module")
def engine(nets) -> Engine:
    return Engine(Machine(device="cpu", dtype="fp32", control_folder=str(nets)))


def drawn(engine: Engine, request: Request) -> bytes:
    (image,) = engine.generate(request).images
    return image.tobytes()


@pytest.mark.parametrize("version", ZIMAGE)
def test_each_version_changes_the_picture_and_the_control_picture_counts(engine, tiny_base_folder, version):
    plain = drawn(engine, wish(tiny_base_folder))
    net = {"control_nets": [f"union-{version}:1"]}
    first = drawn(engine, wish(tiny_base_folder, control=[picture()], **net))
    other = drawn(engine, wish(tiny_base_folder, control=[picture("red", (200, 100))], **net))
    assert len({plain, first, other}) == 3
    again = drawn(engine, wish(tiny_base_folder, control=[picture()], control_nets=[f"union-{version}:0"]))
    assert again == plain


def test_each_window_follows_its_part_of_the_control_picture(engine, nets, tiny_base_folder):
    left, right = picture(size=(96, 64)), picture(size=(96, 64)).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    fields = {"width": 96, "tile": 64, "steps": 2, "control_nets": ["union-2.1:2"]}
    maps = [wish(tiny_base_folder, control=[one], **fields) for one in (left, right)]
    model = load(tiny_base_folder, Machine(device="cpu", dtype="fp32", control_folder=str(nets)))
    runs = [model.start(one, model.encode(one), None) for one in (complete(one, model.spec) for one in maps)]
    assert [run.forwards for run in runs] == [2, 2]
    with torch.inference_mode():
        answers = [[model.family.answer(run.samples(number))[0] for number in range(2)] for run in runs]
    for number in range(2):
        assert not torch.allclose(answers[0][number], answers[1][number])
    assert drawn(engine, maps[0]) != drawn(engine, maps[1])
    small = {"width": 64, "control": [left], "control_nets": ["union-2.1"]}
    assert drawn(engine, wish(tiny_base_folder, **small, tile=64)) == drawn(engine, wish(tiny_base_folder, **small))
    again = engine.generate(wish(tiny_base_folder, **small, upscale="2x", upscale_strength=0.5, tile=64))
    assert again.images[0].size == (128, 128)


def test_nets_add_up_and_are_on_in_their_steps_only(engine, tiny_base_folder):
    both = {"control": [picture(), picture("red")]}
    results = {
        nets: drawn(engine, wish(tiny_base_folder, **both, control_nets=nets))
        for nets in (
            ("union-2.1", "other"), ("union-2.1", "other:0"), ("union-2.1@0-0.5", "other:0"),
            ("union-2.1@0.5-1", "other:0"), ("union-2.1@0.5-1", "other@0-0.5"),
        )
    }  # fmt: skip
    assert len({*results.values()}) == len(results)
    alone = drawn(engine, wish(tiny_base_folder, control=[picture()], control_nets=["union-2.1"]))
    assert alone == results["union-2.1", "other:0"]


def test_a_net_reads_the_inpainting_and_the_pixels_outside_the_mask_stay(engine, tiny_base_folder):
    start, mask = picture("blue", (64, 64)), Image.new("RGB", (64, 64), "black")
    mask.paste("white", (32, 0, 64, 64))
    fields = {"image": start, "mask": mask, "control": [picture()]}
    new = engine.generate(wish(tiny_base_folder, **fields, control_nets=["union-2.1"])).images[0]
    left = (0, 0, 32, 64)
    assert new.crop(left).tobytes() == start.crop(left).tobytes()
    model = load(tiny_base_folder, Machine(device="cpu", dtype="fp32", control_folder=engine.machine.control_folder))
    (seen,) = model.encode(wish(tiny_base_folder, **fields, control_nets=["union-2.1"])).controls
    assert seen.shape == (33, 8, 8)
    assert torch.equal(seen[16], (torch.arange(8) < 4).float().expand(8, 8))  # 1 is kept
    (without,) = model.encode(wish(tiny_base_folder, control=[picture()], control_nets=["union-2.1"])).controls
    assert torch.equal(without[:16], seen[:16])
    assert not without[16:].any()


def runs_of(model: Model, wishes: list[Request]) -> list[Tensor]:
    """Their latents, drawn together."""
    with torch.inference_mode():
        whole = [complete(one, model.spec) for one in wishes]
        runs = [model.start(one, model.encode(one), None) for one in whole]
        while pending := [run for run in runs if run.query is not None]:
            advance(model.family, pending)
    return [run.result for run in runs]


@pytest.mark.parametrize("version", ZIMAGE)
def test_pictures_with_and_without_nets_share_forwards_with_guidance_and_step_caches(nets, tiny_base_folder, version):
    model = load(tiny_base_folder, Machine(device="cpu", dtype="fp32", control_folder=str(nets)))
    net = {"control": [picture()], "control_nets": [f"union-{version}"], "guidance": 3.0}
    wishes = [
        wish(tiny_base_folder, **net),
        wish(tiny_base_folder, width=96, seed=1),
        wish(tiny_base_folder, **net, height=48, seed=2, steps=8, cache="first-block", cache_threshold=10),
        wish(tiny_base_folder, control=[picture("red")], control_nets=["other@0-0.5"], seed=3, steps=6),
        wish(tiny_base_folder, **net, seed=4, regions=["0,0,0.5x1:a tree", "32,16,16x32:a long text of a box"]),
    ]
    for ours, request in zip(runs_of(model, wishes), wishes):
        (alone,) = runs_of(model, [request])
        torch.testing.assert_close(ours, alone, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("version", ZIMAGE)
def test_a_streamed_net_draws_what_a_resident_one_draws(nets, tiny_base_folder, version):
    request = wish(tiny_base_folder, control=[picture()], control_nets=[f"union-{version}"], guidance=3.0)
    images = [
        drawn(Engine(Machine(device="cpu", dtype="fp32", placement=place, control_folder=str(nets))), request)
        for place in ("resident", "streamed")
    ]
    assert images[0] == images[1]


def test_admission_counts_the_weights_of_nets(nets, tiny_base_folder):
    machine = Machine(device="cpu", dtype="fp32", control_folder=str(nets))
    placing = Placing(open_model(tiny_base_folder, machine))
    with_net = wish(tiny_base_folder, control=[picture()], control_nets=["union-2.1"])
    for plain, more in zip(placing.plans(wish(tiny_base_folder)), placing.plans(with_net)):
        size = (nets / "union-2.1.safetensors").stat().st_size
        added = more.peak - plain.peak
        assert added > (0.9 * size if plain.placement != "streamed" else 0)


def test_a_net_stays_until_a_request_does_without_it(engine, tiny_base_folder):
    def held() -> int:
        return len(engine.model.controls._held)  # type: ignore[union-attr]

    drawn(engine, wish(tiny_base_folder, control=[picture()], control_nets=["other"]))
    drawn(engine, wish(tiny_base_folder, control=[picture()], control_nets=["other"]))
    assert held() == 1
    drawn(engine, wish(tiny_base_folder))
    assert held() == 0


def test_the_request_that_comes_back_draws_the_picture_again(engine, tiny_base_folder):
    result = engine.generate(wish(tiny_base_folder, control=[picture()], control_nets=["union-2.1:0.6@0-0.8"]))
    assert result.requests[0].control_nets == ("union-2.1:0.6@0-0.8",)
    assert engine.generate(result.requests[0]).images[0].tobytes() == result.images[0].tobytes()


@pytest.mark.parametrize(
    ("text", "use"),
    [
        ("net", ControlUse("net")),
        ("a/net.safetensors:0.5@0-0.8#canny", ControlUse("a/net.safetensors", 0.5, 0, 0.8, "canny")),
        ("net#3", ControlUse("net", mode="3")),
        ({"path": "net", "scale": 1, "from": 0.1, "mode": "pose"}, ControlUse("net", 1, 0.1, 1, "pose")),
    ],
)
def test_a_use_is_read_and_written(text, use):
    assert ControlUse.read(text) == use
    assert ControlUse.read(str(use)) == use


@pytest.mark.parametrize("path", ["net:0.5", "net@0-0.5", "net:1@0-1", "net#canny"])
def test_a_path_that_ends_like_an_option_is_written_out(path):
    use = ControlUse(path, mode="pose")
    assert ControlUse.read(str(use)) == use


def test_wrong_nets_are_told_in_one_line(engine, nets, tiny_base_folder, tmp_path):
    def refused(net: str, pictures: int = 1) -> str:
        with pytest.raises(InputError) as told:
            engine.generate(wish(tiny_base_folder, control=[picture()] * pictures, control_nets=[net]))
        return str(told.value)

    assert "did you mean union-2." in refused("union-2")
    assert refused("union-2.1", 2) == (
        "1 control net and 2 control pictures were given: give each control picture (--control) its net (--control-net)"
    )
    assert "leave out #canny" in refused("union-2.1#canny")
    wide = write_union(tmp_path / "wide.safetensors", UnionConfig(dim=96, n_heads=3, n_layers=1, n_refiner_layers=1))
    assert "is of width 96 with 3 heads" in refused(str(wide))
    assert "take one made for this model" in refused(str(wide))
    (tmp_path / "net.pth").write_bytes(b"x")
    assert "is a pickle" in refused(str(tmp_path / "net.pth"))
    write_state(tmp_path / "odd.safetensors", {"odd.weight": torch.zeros(2)})
    assert "is not a control net, it holds odd.weight" in refused(str(tmp_path / "odd.safetensors"))
    write_state(tmp_path / "lora.safetensors", {"layers.0.lora_A.weight": torch.zeros(2, 2)})
    assert "is a LoRA, not a control net" in refused(str(tmp_path / "lora.safetensors"))
    state = translate(UNION.layouts["published"], random_state(UNION.build(ZIMAGE["2.1"])), back=True)
    state["control_layers.0.attention.to_q.weight"][0, 0] = float("nan")
    write_state(tmp_path / "nan.safetensors", state)
    assert "holds numbers that are not finite, in control_layers.0.attention.qkv" in refused(
        str(tmp_path / "nan.safetensors")
    )
    del state["control_layers.0.attention.to_out.0.weight"]
    write_state(tmp_path / "cut.safetensors", state)
    assert "lacks control_layers.0.attention.to_out.0.weight" in refused(str(tmp_path / "cut.safetensors"))
    with pytest.raises(InputError, match=r"with -m, and this one with --control-net"):
        engine.generate(wish(nets / "union-2.1.safetensors"))
    with pytest.raises(InputError, match="pocket takes no control nets: leave them out, or take z-image-turbo"):
        engine.generate(Request(prompt="x", control=[picture()], control_nets=["union-2.1"]))


IP = IPAdapterConfig(
    dim=64, num_layers=2, tokens=4, token_width=32, vector_width=24,
    vision=VisionConfig(28, 14, hidden_size=64, intermediate_size=64, num_hidden_layers=1, projection_dim=24),
)  # fmt: skip
INSTANTX = InstantXConfig(
    dim=64, num_blocks=4, tokens=4, token_width=32, vector_width=72,
    vision=SiglipConfig(28, 14, hidden_size=72, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1),
)  # fmt: skip
SMALL = {
    "num_layers": 1, "attention_head_dim": 32, "num_attention_heads": 2, "joint_attention_dim": 32,
    "pooled_projection_dim": 64,
}  # fmt: skip
FLUX = {
    "instantx": (FLUX1_DEV, CONTROLNET, "diffusers", ControlConfig(**SMALL, num_single_layers=1), ""),
    "union": (FLUX1_DEV, CONTROLNET, "diffusers", ControlConfig(**SMALL, num_single_layers=1, num_mode=7), "#pose"),
    "union-pro-2": (FLUX1_DEV, CONTROLNET, "diffusers", ControlConfig(**SMALL, num_single_layers=0), ""),
    "xlabs": (
        FLUX1_DEV, CONTROLNET, "native",
        ControlConfig(**SMALL, num_single_layers=0, conditioning_embedding_channels=16), "",
    ),
    "fun": (
        FLUX2_DEV, FUN, "published", FunConfig(control_in_dim=36, num_layers=1, attention_head_dim=32,
                                               num_attention_heads=2), "",
    ),
    "ip-adapter": (FLUX1_DEV, IP_ADAPTER, "xlabs", IP, ""),
    "ip-adapter-instantx": (FLUX1_DEV, IP_ADAPTER_INSTANTX, "instantx", INSTANTX, ""),
}  # fmt: skip


@pytest.mark.parametrize("name", FLUX)
def test_pictures_of_flux_with_and_without_nets_share_forwards(name, build, tmp_path):
    spec, part, layout, config, mode = FLUX[name]
    with torch.no_grad():
        model = build(spec.tiny)
    path = tmp_path / f"{name}.safetensors"
    write_state(path, translate(part.layouts[layout], random_state(part.build(config)), back=True))

    def read_net(path: Path, use: ControlUse) -> nn.Module:
        found = locate_control(type(model.family), "tiny", path)
        assert found.config == config
        return read(found, Placement(torch.device("cpu"), torch.float32, rules=found.rules))

    model.controls = Controls(model.family, tmp_path, read_net)
    net = {"control": [picture()], "control_nets": [f"{name}:0.5{mode}"]}
    wishes = [
        wish(tmp_path, **net),
        wish(tmp_path, width=96, seed=1),
        wish(tmp_path, **net, height=96, seed=2, steps=8, cache="first-block", cache_threshold=10),
        wish(tmp_path, control=[picture("red")], control_nets=[f"{name}@0-0.5{mode}"], seed=3),
    ]
    together = runs_of(model, wishes)
    for ours, request in zip(together, wishes):
        (alone,) = runs_of(model, [request])
        torch.testing.assert_close(ours, alone, rtol=1e-3, atol=1e-3)
    (plain,) = runs_of(model, [wish(tmp_path)])
    assert not torch.allclose(plain, together[0], rtol=1e-3, atol=1e-3)
    other = write_union(tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="is a control net for another family of models: take one made for tiny"):
        locate_control(type(model.family), "tiny", other)


def test_a_union_net_of_flux1_wants_a_mode_that_it_has(build):
    family = build(FLUX1_DEV.tiny).family
    with torch.device("meta"):
        union = CONTROLNET.build(ControlConfig(**SMALL, num_mode=7))
        plain = CONTROLNET.build(ControlConfig(**SMALL))
    union.check(family, ControlUse("net", mode="pose"))
    union.check(family, ControlUse("net", mode="4"))
    with pytest.raises(InputError, match="has modes: name what the control picture shows: #canny, #tile, "):
        union.check(family, ControlUse("net"))
    with pytest.raises(InputError, match="net has no mode 7: name what"):
        union.check(family, ControlUse("net", mode="7"))
    with pytest.raises(InputError, match="has no modes: leave out #pose"):
        plain.check(family, ControlUse("net", mode="pose"))


@pytest.mark.parametrize(
    ("part", "config", "blocks"), [(IP_ADAPTER, IP, (2, 2)), (IP_ADAPTER_INSTANTX, INSTANTX, (4, 4))]
)
def test_an_ip_adapter_without_its_image_encoder_or_for_other_blocks_is_refused(part, config, blocks, build):
    family = build(FLUX1_DEV.tiny).family
    with torch.device("meta"):
        alone = part.build(replace(config, vision=None))
        wide = part.build(replace(config, dim=128))
        whole = part.build(config)
    whole.check(family, ControlUse("face"))
    with pytest.raises(
        InputError, match=r"face has no image encoder: give a folder with its file and model\.safetensor"
    ):
        alone.check(family, ControlUse("face"))
    told = f"face is for {blocks[0]} blocks of width 128, tiny-flux1-dev has {blocks[1]} of 64: take one made"
    with pytest.raises(InputError, match=told):
        wide.check(family, ControlUse("face"))
    with pytest.raises(InputError, match="face has no modes: leave out #canny"):
        whole.check(family, ControlUse("face", mode="canny"))


FLUX_PUBLISHED = {
    "InstantX Union": (CONTROLNET, "diffusers", ControlConfig(num_mode=10)),
    "Union-Pro": (CONTROLNET, "diffusers", ControlConfig(num_mode=10)),
    "Union-Pro-2.0": (CONTROLNET, "diffusers", ControlConfig(num_layers=6, num_single_layers=0)),
    "XLabs v3": (
        CONTROLNET, "native", ControlConfig(num_layers=2, num_single_layers=0, conditioning_embedding_channels=16)
    ),
    "FLUX.2 Fun Union": (FUN, "published", FunConfig()),
    "XLabs IP-Adapter": (IP_ADAPTER, "xlabs", IPAdapterConfig(tokens=4, vision=VisionConfig())),
    "XLabs IP-Adapter 2": (IP_ADAPTER, "xlabs", IPAdapterConfig()),
    "InstantX IP-Adapter": (IP_ADAPTER_INSTANTX, "instantx", InstantXConfig(vision=SiglipConfig())),
}  # fmt: skip


@pytest.mark.parametrize("name", FLUX_PUBLISHED)
def test_published_files_of_flux_are_recognised_at_full_size(name):
    part, layout, config = FLUX_PUBLISHED[name]
    with torch.device("meta"), Unset():
        state = part.build(config).state_dict()
    theirs = translate(part.layouts[layout], state, back=True)
    back = translate(part.layouts[layout], theirs)
    assert part.infer({key: tuple(weight.shape) for key, weight in back.items()}) == config
    assert back.keys() == state.keys()
    telling = {
        "InstantX Union": "controlnet_mode_embedder.weight", "XLabs v3": "pos_embed_input.weight",
        "FLUX.2 Fun Union": "control_transformer_blocks.3.attn.to_q.weight",
        "XLabs IP-Adapter": "vision_model.encoder.layers.23.self_attn.q_proj.weight",
        "InstantX IP-Adapter": "ip_adapter.56.to_k_ip.weight",
        "XLabs IP-Adapter 2": "double_blocks.18.processor.ip_adapter_double_stream_k_proj.weight",
    }  # fmt: skip
    assert telling.get(name, "controlnet_x_embedder.weight") in theirs


PUBLISHED = {
    "1.0": ({"control_in_dim": 16, "n_layers": 6, "refiner": "plain"}, 1_550_778_368),
    "2.0": ({"n_layers": 15, "refiner": "layers"}, 2_950_156_800),
    "2.1": ({"n_layers": 15, "refiner": "own"}, 3_356_225_792),
    "lite": ({"n_layers": 3, "refiner": "own"}, 1_008_308_480),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_of_z_image_are_recognised_at_full_size(name):
    sizes, count = PUBLISHED[name]
    config = UnionConfig(**sizes)
    with torch.device("meta"), Unset():
        state = UNION.build(config).state_dict()
    assert sum(weight.numel() for weight in state.values()) == count
    theirs = translate(UNION.layouts["published"], state, back=True)
    assert "control_all_x_embedder.2-1.weight" in theirs
    assert "control_layers.0.before_proj.weight" in theirs
    back = translate(UNION.layouts["published"], theirs | {"x_pad_token": torch.empty(1, 3840, device="meta")})
    assert UNION.infer({key: tuple(weight.shape) for key, weight in back.items()}) == config
    assert back.keys() == state.keys()


@pytest.mark.parametrize("net", ["/etc/passwd", "../secret", "none"])
def test_clients_of_a_server_name_only_nets_of_its_folder(server, net):
    edges = "data:image/png;base64," + base64.b64encode(png(picture())).decode()
    body = {"prompt": "x", "control": [edges], "control_nets": [net]}
    status, _, answer = server.ask("POST", "/v1/jobs", body)
    assert status == 404
    assert answer["error"]["code"] == "control_net_not_found"
    assert answer["error"]["param"] == "control_nets"


def test_clients_of_a_server_cannot_name_a_file_as_control_picture(server):
    body = {"prompt": "x", "control": ["/etc/passwd"], "control_nets": ["none"]}
    status, _, answer = server.ask("POST", "/v1/jobs", body)
    assert status == 400
    assert "control.0 is neither a data URL nor upload:ID" in answer["error"]["message"]


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
