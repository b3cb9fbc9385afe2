"""Upscaling models: files are read and recognised, tiles are one picture, and `inkstream upscale` loses nothing."""

from __future__ import annotations

import json
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from inkstream.cli import main
from inkstream.engine.drawing.upscaling import Enlarging, Loaded, Upscalers, enlarge, in_tiles, read_upscaler
from inkstream.engine.files.upscalers import find_upscaler, upscalers_in
from inkstream.engine.pictures.metadata import describe, read_request, save_picture
from inkstream.families.upscalers import build_upscaler, dat, hat, plksr, span, swinir
from inkstream.families.upscalers.compact import CompactConfig, SRVGGNetCompact
from inkstream.families.upscalers.esrgan import RRDBConfig, RRDBNet
from inkstream.types import Enlargement, InputError, Request
from inkstream.weights.files import write_state
from inkstream.weights.torch_file import read_torch_file

CPU = torch.device("cpu")
OLD = {"_use_new_zipfile_serialization": False}


def randomised(network: nn.Module, gain: float = 1.0) -> dict[str, Tensor]:
    """A network's state with random weights of about unit gain."""
    generator = torch.Generator().manual_seed(0)
    state = network.state_dict()
    for weight in state.values():
        if weight.ndim > 1:
            weight.normal_(std=gain / weight[0].numel() ** 0.5, generator=generator)
        else:
            weight.fill_(0.1)
    return state


def published(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state with the names of Real-ESRGAN's releases."""
    return {re.sub(r"^conv_up\.(\d)", lambda found: f"conv_up{int(found[1]) + 1}", n): w for n, w in state.items()}


def compact(scale: int = 2) -> dict[str, Tensor]:
    return randomised(SRVGGNetCompact(CompactConfig(num_feat=8, num_conv=2, upscale=scale)))


def loaded(state: dict[str, Tensor]) -> Loaded:
    architecture, network = build_upscaler(state)
    return Loaded("net", architecture, network, CPU)  # type: ignore[arg-type]


def result_of(steps: Enlarging) -> Image.Image:
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


# Files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{}, OLD], ids=["zip", "old"])
def test_the_tensors_of_a_torch_file_are_read_whatever_is_around_them(tmp_path, how):
    layer = nn.Conv2d(3, 4, 3)
    state = layer.state_dict()
    turned = state["weight"].half().transpose(0, 1)[1:]
    for content, expected in (
        (state, state),
        (OrderedDict(a=layer.weight, b=turned), {"a": state["weight"], "b": turned}),
        ({"params": {"x": state["bias"]}, "params_ema": state, "iter": 3, "rate": 0.5}, state),
        ({"state_dict": {"params": state}}, state),
    ):
        torch.save(content, tmp_path / "net.pth", **how)
        found = read_torch_file(tmp_path / "net.pth")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], weight) for name, weight in expected.items())


class Bomb:
    """A pickle of it makes a file when it is unpickled."""

    def __init__(self, place: Path):
        self.place = place

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.place),)


def test_a_torch_file_that_is_a_bomb_is_refused_at_once(tmp_path):
    """Tuples of tuples, which would be compared for ever as a key; and zeros, packed to a thousandth of their size."""
    path = tmp_path / "net.pth"
    deep = b"\x80\x02})q\0"  # an empty dict, and an empty tuple, which is kept as 0
    deep += b"".join(b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(200))  # each holds the last twice
    deep += b"K\x01s."
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("net/data.pkl", deep)
    with pytest.raises(InputError, match=r"net.pth has a name that is no text: take a .safetensors file"):
        read_torch_file(path)
    torch.save({"a": torch.zeros(1_000_000)}, tmp_path / "whole.pth")
    with zipfile.ZipFile(tmp_path / "whole.pth") as whole, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in whole.namelist():
            packed.writestr(name, whole.read(name))
    assert path.stat().st_size < 20_000
    with pytest.raises(InputError, match=r"net.pth is compressed, which torch does not do: take a .safetensors file"):
        read_torch_file(path)


@pytest.mark.parametrize("how", ["zip", "old", "plain"])
def test_a_torch_file_that_calls_code_is_refused_in_one_line_and_runs_nothing(tmp_path, how):
    path, place = tmp_path / "net.pth", tmp_path / "harm"
    content = {"weight": torch.zeros(2), "bomb": Bomb(place)}
    if how == "plain":
        path.write_bytes(pickle.dumps(content["bomb"]))
    else:
        torch.save(content, path, **({} if how == "zip" else OLD))
    with pytest.raises(InputError, match=r"net.pth calls (posix|nt).mkdir, and nothing in it was run: take a .safeten"):
        read_torch_file(path)
    assert not place.exists()


def test_a_damaged_torch_file_is_refused_in_one_line(tmp_path):
    path = tmp_path / "net.pth"
    torch.save(compact(), path)
    whole = path.read_bytes()
    torch.save(compact(), path, **OLD)
    old = path.read_bytes()
    for content in (b"", b"version https://git-lfs", b"hello", whole[: len(whole) // 2], old[:-100], old[:200]):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"^[^\n]*net.pth[^\n]*: (download it again|take a .safetensors file)$"):
            read_torch_file(path)


def test_tensors_that_reach_beyond_their_numbers_are_refused(tmp_path):
    path = tmp_path / "net.pth"
    torch.save({"weight": torch.arange(6.0)}, path, **OLD)
    changed = path.read_bytes().replace(b"K\x06\x85", b"K\x07\x85")  # a shape of 7 in a storage of 6
    path.write_bytes(changed)
    with pytest.raises(InputError, match="reaches beyond its numbers"):
        read_torch_file(path)


@pytest.mark.parametrize("config", [
    RRDBConfig(8, 4, 1, doublings=2), RRDBConfig(8, 4, 2, doublings=1), RRDBConfig(8, 4, 1, doublings=0),
    RRDBConfig(8, 4, 1, doublings=3), RRDBConfig(8, 4, 1, 2, unshuffle=2), RRDBConfig(8, 4, 1, 2, unshuffle=4),
    RRDBConfig(8, 4, 1, plus=True),
])  # fmt: skip
def test_the_sizes_of_an_esrgan_follow_from_its_shapes(config, tmp_path):
    state = randomised(RRDBNet(config))
    write_state(tmp_path / "net.safetensors", published(state))
    torch.save({"params_ema": published(state)}, tmp_path / "net.pth")
    for suffix in ("safetensors", "pth"):
        found = read_upscaler(tmp_path / f"net.{suffix}", "net", CPU)
        assert found.architecture == "ESRGAN"
        assert found.network.scale == 2**config.doublings // config.unshuffle
        x = torch.rand(1, 3, 6, 7)
        assert found.network(x).shape == (1, 3, 6 * found.network.scale, 7 * found.network.scale)


OTHERS = {
    "PLKSR": (plksr.PLKSR, plksr.PLKSRConfig(8, 2, 2, kernel_size=5, part=2)),
    "PLKSR of 3 x 3": (plksr.PLKSR, plksr.PLKSRConfig(8, 1, 4, kernel_size=5, part=4, mixer=(1, 3), attention=False)),
    "PLKSR real": (plksr.PLKSR, plksr.PLKSRConfig(8, 2, 3, kernel_size=5, part=2, mixer=(3, 3), norm="group")),
    "PLKSR real with samples": (
        plksr.PLKSR, plksr.PLKSRConfig(8, 2, 2, kernel_size=5, part=2, mixer=(3, 3), norm="layer", samples=True),
    ),
    "SwinIR": (swinir.SwinIR, swinir.SwinIRConfig(12, (2, 1), (2, 3), 4, 24, num_feat=8)),
    "SwinIR classical": (swinir.SwinIR, swinir.SwinIRConfig(12, (2,), (2,), 4, 24, 2, "pixelshuffle", "3conv", 8)),
    "SwinIR light": (swinir.SwinIR, swinir.SwinIRConfig(12, (2,), (2,), 4, 24, 3, "pixelshuffledirect")),
    "SwinIR of blocks": (swinir.SwinIR, swinir.SwinIRConfig(12, (2,), (2,), 4, 24, num_feat=8, unshuffle=2)),
    "DAT": (dat.DAT, dat.DATConfig(32, (3, 2), (2, 4), (2, 4), 64, num_feat=8)),
    "DAT light": (dat.DAT, dat.DATConfig(32, (2,), (2,), (4, 4), 64, upscale=2, narrow=True, direct=True)),
    "HAT": (hat.HAT, hat.HATConfig(12, (2, 1), (2, 3), 4, 6, 4, 2, 24, 2, 8)),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
@torch.no_grad()
def test_the_sizes_of_the_other_architectures_follow_from_their_shapes(name):
    build, config = OTHERS[name]
    own = build(config).eval()
    randomised(own)
    if name.startswith("DAT"):  # a file holds these tables
        for attention in (m for m in own.modules() if isinstance(m, dat.WindowAttention)):
            attention.relative_position_index.random_(0, len(attention.rpe_biases)).round_()
    state = published({key: weight.clone() for key, weight in own.state_dict().items()})
    found, network = build_upscaler(state)
    assert found == name.split()[0]
    assert {key: w.shape for key, w in network.state_dict().items()} == {
        k: w.shape for k, w in own.state_dict().items()
    }
    x = torch.rand(1, 3, 11, 9)
    assert network.scale == own.scale
    result = network(x)
    assert result.shape == (1, 3, 11 * own.scale, 9 * own.scale)
    assert torch.allclose(result, own(x))


@torch.no_grad()
def test_the_parts_of_a_convolution_of_span_become_one():
    generator = torch.Generator().manual_seed(0)
    parts = {
        "sk": nn.Conv2d(3, 4, 1), "conv.0": nn.Conv2d(3, 6, 1), "conv.1": nn.Conv2d(6, 8, 3),
        "conv.2": nn.Conv2d(8, 4, 1), "eval_conv": nn.Conv2d(3, 4, 3),
    }  # fmt: skip
    state = {f"c.{name}.{key}": weight for name, layer in parts.items() for key, weight in layer.state_dict().items()}
    folded = span.fold(state)
    assert folded.keys() == {"c.weight", "c.bias"}
    x = torch.randn(2, 3, 7, 6, generator=generator)
    chain = parts["conv.2"](parts["conv.1"](parts["conv.0"](x))) + parts["sk"](x)[:, :, 1:-1, 1:-1]
    assert torch.allclose(nn.functional.conv2d(x, folded["c.weight"], folded["c.bias"]), chain, atol=1e-5)


def test_files_that_are_no_upscaler_are_told_in_one_line(tmp_path):
    def refused(state: dict[str, Tensor]) -> str:
        write_state(tmp_path / "x.safetensors", state)
        with pytest.raises(InputError) as told:
            read_upscaler(tmp_path / "x.safetensors", "x", CPU)
        return str(told.value).partition("x.safetensors ")[2]

    whole = compact()
    assert refused({"layers.0.weight": torch.zeros(2, 2)}).startswith(
        "is no upscaler that is known here, it holds layers.0.weight: take one of ESRGAN, Compact, SPAN"
    )
    assert refused({n: w for n, w in whole.items() if n != "body.2.bias"}) == (
        "lacks body.2.bias of Compact: download it again"
    )
    grey = {**whole, "body.0.weight": torch.zeros(8, 1, 3, 3)}
    assert refused(grey) == "looks like Compact, but its weights have unknown shapes: download it again"
    more = {**published(randomised(RRDBNet(RRDBConfig(8, 4, 1)))), "odd": torch.zeros(1)}
    assert refused(more) == "holds odd, which ESRGAN does not have: take another file"


def test_names_are_found_in_folders_of_other_programs_and_safetensors_come_first(tmp_path):
    web = tmp_path / "webui"
    for name in ("models/ESRGAN/4x-a.pth", "models/RealESRGAN/b.pth", "models/Stable-diffusion/c.safetensors",
                 "models/ESRGAN/b.safetensors", "models/ESRGAN/deep/d.pt", "models/ESRGAN/notes.txt"):  # fmt: skip
        (web / name).parent.mkdir(parents=True, exist_ok=True)
        (web / name).touch()
    assert list(upscalers_in(web)) == ["4x-a", "b", "deep/d"] == list(upscalers_in(web / "models"))
    assert find_upscaler("b", web).suffix == ".safetensors"
    assert list(upscalers_in(web / "models" / "ESRGAN")) == ["4x-a", "b", "deep/d"]
    with pytest.raises(InputError, match=r"upscaler 4x is neither a file nor a name in .*: did you mean 4x-a\?"):
        find_upscaler("4x", web)
    with pytest.raises(InputError, match=r"notes.txt is no file of an upscaling model: take one that ends in"):
        find_upscaler(str(web / "models/ESRGAN/notes.txt"), web)


def test_a_model_is_kept_until_its_file_changes(tmp_path):
    torch.save(compact(2), tmp_path / "net.pth")
    upscalers = Upscalers(tmp_path, CPU)
    first = upscalers.get("net")
    assert upscalers.get("net") is first
    torch.save(compact(4), tmp_path / "net.pth")
    assert upscalers.get("net").network.scale == 4


# Tiles ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(70, 50), (33, 90), (20, 64), (31, 31)])
def test_tiles_are_the_whole_picture_to_rounding_if_their_overlap_covers_what_a_pixel_depends_on(size):
    model, image = loaded(compact(2)), noise(*size)  # four convolutions: a pixel depends on 4 around it
    whole = np.asarray(result_of(in_tiles(image, model, tile=128)), np.int16)
    tiled = np.asarray(result_of(in_tiles(image, model, tile=48, overlap=16)), np.int16)
    assert whole.shape == (2 * size[1], 2 * size[0], 3)
    assert np.abs(whole - tiled).max() <= 1


def test_tiles_of_a_deep_network_leave_no_seam():
    model = loaded(published(randomised(RRDBNet(RRDBConfig(16, 8, 6)), gain=1.4)))  # depends on about 100 pixels
    image = noise(16, 16).resize((160, 96), Image.Resampling.BICUBIC)
    whole, tiled = (np.asarray(result_of(in_tiles(image, model, tile=tile)), np.float64) for tile in (512, 64))
    assert np.abs(whole - tiled).mean() < 0.5
    steps = np.abs(np.diff(tiled, axis=1)).mean((0, 2)) / np.abs(np.diff(whole, axis=1)).mean((0, 2)).clip(0.1)
    assert steps.min() > 0.9
    assert steps.max() < 1.1


def test_a_picture_grows_as_often_as_it_takes_and_gets_the_exact_size():
    model, image = loaded(compact(2)), noise(20, 10)
    for size, tiles in (((40, 20), 1), ((30, 15), 1), ((120, 60), 3), ((50, 50), 3), ((20, 10), 0), ((16, 16), 1)):
        steps, done = enlarge(image, size, model), 0
        result = None
        while result is None:
            try:
                done += next(steps)[0]
            except StopIteration as end:
                result = end.value
        assert (result.size, done) == (size, tiles), size
    assert result_of(enlarge(image, (44, 22), None)).tobytes() == image.resize((44, 22), 1).tobytes()
    same = loaded(compact(1))
    assert result_of(enlarge(image, image.size, same)).tobytes() != image.tobytes()
    with pytest.raises(InputError, match="20000x20000 pixels, more than the limit of 256 megapixels"):
        result_of(enlarge(image, (20_000, 20_000), None))


def test_numbers_that_are_not_finite_are_told():
    state = compact()
    state["body.0.bias"][0] = float("nan")
    with pytest.raises(InputError, match="numbers that are not finite: its file is damaged"):
        result_of(in_tiles(noise(8, 8), loaded(state)))


@pytest.mark.parametrize(("text", "size"), [("2x", (200, 100)), ("1.5", (150, 75)), ("300x200", (300, 200))])
def test_an_enlargement_is_a_factor_or_a_size(text, size):
    given = Enlargement.read(text)
    assert given.of(100, 50) == size
    assert Enlargement.read(str(given)) == given
    for wrong in ("0.5x", "17x", "x", "2xx", "9x20", "-2", "nan"):
        with pytest.raises(InputError, match=r"is neither a factor|is out of range"):
            Enlargement.read(wrong)


# The command ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The current folder, with a model and a picture of ours."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    torch.save(compact(2), tmp_path / "models" / "two.pth")
    request = Request(prompt="a fox", seed=7, width=48, height=32)
    save_picture(noise(48, 32), tmp_path / "fox.png", request)
    return tmp_path


def run(*words: str) -> int:
    return main(["upscale", *words, "--upscaler-folder", "models", "--device", "cpu"])


def test_a_picture_keeps_its_request_and_says_what_was_done(folder, capsys):
    assert run("fox.png", "-m", "two") == 0
    said = capsys.readouterr()
    assert said.out == "fox-96x64.png\n"
    assert "48x32 to 96x64 by two (Compact)" in said.err
    with Image.open("fox-96x64.png") as image:
        assert image.size == (96, 64)
    facts = describe("fox-96x64.png")
    assert facts["enlarged"] == ["48x32 to 96x64 by two (Compact)"]
    assert facts["request"]["prompt"] == "a fox"
    found = read_request("fox-96x64.png")
    assert (found.request.seed, found.request.width) == (7, 48)
    assert found.ignored == {"enlarged": ["48x32 to 96x64 by two (Compact)"]}
    assert run("fox-96x64.png", "--scale", "1.5x", "-o", "more.webp") == 0
    assert describe("more.webp")["enlarged"] == [
        "48x32 to 96x64 by two (Compact)", "96x64 to 144x96 by Lanczos resampling",
    ]  # fmt: skip
    assert read_request("more.webp").request.seed == 7


def test_nothing_is_overwritten_and_wrong_options_are_told_before_any_work(folder, capsys):
    assert run("fox.png") == 0
    assert run("fox.png") == 0
    assert sorted(path.name for path in folder.glob("fox-*")) == ["fox-96x64-2.png", "fox-96x64.png"]
    for words, told in (
        (("fox.png", "-o", "fox.png"), "fox.png exists and is not overwritten"),
        (("fox.png", "none.png"), "picture none.png does not exist"),
        (("fox.png", "-m", "tow"), "did you mean two?"),
        (("fox.png", "--scale", "0.5x"), "neither a factor from 1x to 16x"),
        (("fox.png", "--tile", "8"), "tile 8 is out of range: take 64 to 8192"),
        (("fox.png", "-o", "fox.gif"), "is not a format for saving"),
    ):
        capsys.readouterr()
        assert run(*words) == 2
        assert told in capsys.readouterr().err
    assert len(list(folder.glob("fox*"))) == 3


def test_several_pictures_go_into_a_folder_in_one_go(folder, capsys):
    noise(10, 20).save("other.jpg")
    assert run("fox.png", "other.jpg", "-m", "two", "--scale", "4x", "-o", "large", "--json") == 0
    done = json.loads(capsys.readouterr().out)["pictures"]
    assert [Path(one["path"]).name for one in done] == ["fox-192x128.png", "other-40x80.png"]
    assert all(Image.open(one["path"]).size == (one["width"], one["height"]) for one in done)


def test_alpha_stays_and_orientation_is_honoured_and_16_bits_are_told(folder, capsys):
    image = noise(20, 10).convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize((20, 10)))
    image.save("clear.png")
    assert run("clear.png", "-m", "two", "-o", "out.png") == 0
    with Image.open("out.png") as result:
        assert result.mode == "RGBA"
        ours = np.asarray(result.getchannel("A"), np.int16)
    expected = np.asarray(image.getchannel("A").resize((40, 20), Image.Resampling.LANCZOS), np.int16)
    assert np.abs(ours - expected).max() == 0
    assert run("clear.png", "-o", "out.jpg") == 2
    assert "has transparent pixels, which a JPEG cannot hold" in capsys.readouterr().err
    assert not Path("out.jpg").exists()
    exif = Image.Exif()
    exif[0x0112] = 6
    noise(20, 10).save("turned.jpg", exif=exif)
    assert run("turned.jpg", "-o", "upright.png") == 0
    with Image.open("upright.png") as result:
        assert result.size == (20, 40)
        assert result.getexif().get(0x0112, 1) == 1
    Image.fromarray(np.full((10, 20), 40_000, np.uint16)).save("deep.png")
    capsys.readouterr()
    assert run("deep.png", "-o", "flat.png") == 0
    assert "deep.png has more than 8 bits a channel: the result has 8" in capsys.readouterr().err


def test_an_interrupt_leaves_no_half_file(folder, monkeypatch, capsys):
    from inkstream.cli.terminal import Terminal

    def interrupt(self: Terminal, what: str, done: int, total: int, note: str = "") -> None:
        if done == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Terminal, "wait", interrupt)
    before = sorted(folder.iterdir())
    noise(100, 80).save("wide.png")
    assert run("wide.png", "fox.png", "-m", "two", "--tile", "64") == 130
    assert sorted(folder.iterdir()) == sorted([*before, folder / "wide.png"])
    assert "stopped; 0 of 2 done" in capsys.readouterr().err


def test_without_pictures_the_models_are_listed(folder, capsys):
    assert run() == 0
    assert capsys.readouterr().out == "two\n"
    assert main(["upscale", "--upscaler-folder", "nowhere"]) == 2
    assert "there are no pictures, and no upscaling models in nowhere" in capsys.readouterr().err
