"""Files that hold a whole model, as ComfyUI saves checkpoints; and parts that a user chooses."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

import inkstream
from inkstream import Machine
from inkstream.cli import main
from inkstream.engine.files.convert import convert
from inkstream.engine.files.sources import locate
from inkstream.families import family_of
from inkstream.families.flux1.specs import DEV as FLUX1
from inkstream.families.zimage.specs import TURBO
from inkstream.nn.config import CLIPTextConfig, T5Config, VAEConfig
from inkstream.types import InputError, Spec
from inkstream.weights.files import read_header, read_state, write_state
from inkstream.weights.keymap import translate

VAE = VAEConfig(block_out_channels=(32, 32, 32, 32), layers_per_block=1)
ZIMAGE = replace(TURBO.tiny, vae=VAE)
FLUX = replace(
    FLUX1.tiny,
    vae=VAE,
    text_encoder=CLIPTextConfig(1000, 64, 1, 1, 64),
    text_encoder_2=T5Config(vocab_size=1000, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4),
)
ENCODERS = {
    "zimage": {"text_encoder": ("qwen3_4b", "transformers")},
    "flux1": {"text_encoder": ("clip_l", "transformers"), "text_encoder_2": ("t5xxl", "diffusers")},
}
"""Family -> part -> ComfyUI's name of the text encoder, and its layout."""


@pytest.fixture(autouse=True)
def no_hub(monkeypatch, tmp_path_factory):
    """An empty cache, offline."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module", params=[ZIMAGE, FLUX], ids=["zimage", "flux1"])
def spec(request) -> Spec:
    return request.param


@pytest.fixture(scope="module")
def folder(spec, make_folder, tmp_path_factory) -> Path:
    return make_folder(tmp_path_factory.mktemp("folder") / "flux1-dev-turbo", spec)


def state_of(folder: Path, spec: Spec, part: str, layout: str) -> dict[str, torch.Tensor]:
    """A part's weights in one of its layouts."""
    layouts = family_of(spec.family).parts[part].layouts
    ours = translate(layouts.get("diffusers", ()), read_state(folder / part))
    return translate(layouts[layout], ours, back=True)


def write_whole(path: Path, folder: Path, spec: Spec) -> Path:
    """All parts in one file, with the names that ComfyUI's `CheckpointSave` gives them."""
    state = {f"model.diffusion_model.{k}": w for k, w in state_of(folder, spec, "transformer", "native").items()}
    for part, (name, layout) in ENCODERS[spec.family].items():
        state |= {f"text_encoders.{name}.transformer.{k}": w for k, w in state_of(folder, spec, part, layout).items()}
        state[f"text_encoders.{name}.logit_scale"] = torch.tensor(4.6055)
    state |= {f"vae.{k}": w for k, w in state_of(folder, spec, "vae", "ldm").items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    for tokenizer in family_of(spec.family).tokenizers:
        shutil.copytree(folder / tokenizer, path.parent / tokenizer, dirs_exist_ok=True)
    return path


@pytest.fixture(scope="module")
def whole(folder, spec, tmp_path_factory) -> Path:
    """The file in ComfyUI's checkpoints/, with the tokenizers beside it."""
    models = tmp_path_factory.mktemp("comfyui") / "models"
    return write_whole(models / "checkpoints" / "flux1-dev-turbo-fp8.safetensors", folder, spec)


def same_weights(a: inkstream.Model, b: inkstream.Model) -> bool:
    parts = family_of(a.spec.family).parts
    ours, theirs = ({n: getattr(m.spec, n) and w for n, w in modules(m).items()} for m in (a, b))
    assert ours.keys() == theirs.keys() <= parts.keys()
    states = [(x.state_dict(), theirs[name].state_dict()) for name, x in ours.items()]
    return all(x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x) for x, y in states)


def modules(model: inkstream.Model) -> dict[str, torch.nn.Module]:
    names = {"zimage": ("transformer", "text_encoder", "vae"), "flux1": ("transformer", "clip", "t5", "vae")}
    ours = {"clip": "text_encoder", "t5": "text_encoder_2"}
    return {ours.get(name, name): getattr(model.family, name) for name in names[model.spec.family]}


def test_a_whole_model_in_one_file_is_opened_with_all_its_parts(folder, whole):
    model = inkstream.load(folder, Machine("cpu"))
    for path in (whole, whole.parent, whole.parent.parent, whole.parent.parent.parent):
        other = inkstream.load(path, Machine("cpu"))
        assert same_weights(model, other)
        assert other.spec.name == whole.stem
    source = locate(whole)
    assert {found.path for found in source.parts.values()} == {whole}
    assert source.parts["vae"].section == "vae."


def test_it_draws_what_the_folder_draws(folder, whole):
    request = inkstream.Request(prompt="a red ball", seed=1, steps=1)
    pictures = []
    for path in (folder, whole):
        model = inkstream.load(path, Machine("cpu"))
        pictures.append(model.decode(model.sample(request, model.encode(request))))
    # The weights begin at other addresses, for which older torch adds up products in another order.
    assert (pictures[0] - pictures[1]).abs().max() < 1e-5


def test_it_is_converted_part_by_part(folder, whole, tmp_path):
    made = convert(whole, tmp_path / "made")
    assert same_weights(inkstream.load(folder), inkstream.load(made))
    packed = convert(whole, tmp_path / "packed", quant="bf16")
    assert read_header(packed / "text_encoder").tensors.keys() == read_header(made / "text_encoder").tensors.keys()


def test_a_part_that_the_file_lacks_is_looked_for_beside_it(folder, whole, tmp_path):
    state = {k: w.clone() for k, w in read_state(whole).items() if not k.startswith("vae.")}
    path = tmp_path / "models" / "checkpoints" / "half.safetensors"
    path.parent.mkdir(parents=True)
    save_file(state, path)
    for tokenizer in whole.parent.glob("tokenizer*"):
        shutil.copytree(tokenizer, path.parent / tokenizer.name)
    with pytest.raises(InputError, match=r"half\.safetensors has no vae: put the vae published with it into"):
        locate(path)
    (tmp_path / "models/vae").mkdir()
    save_file({k[4:]: w.clone() for k, w in read_state(whole).items() if k.startswith("vae.")},
              tmp_path / "models/vae/ae.safetensors")  # fmt: skip
    assert same_weights(inkstream.load(folder), inkstream.load(path))


def test_a_whole_file_gives_one_part_to_another_model(folder, whole, tmp_path, spec):
    path = tmp_path / "alone.safetensors"
    write_state(path, state_of(folder, spec, "transformer", "native"))
    for tokenizer in whole.parent.glob("tokenizer*"):
        shutil.copytree(tokenizer, tmp_path / tokenizer.name)
    with pytest.raises(InputError, match="has no text_encoder"):
        locate(path)
    model = inkstream.load(path, Machine("cpu", text_encoder=str(whole), vae=str(whole)))
    assert same_weights(inkstream.load(folder), model)


def test_a_weight_that_no_part_knows_is_named(whole, tmp_path):
    state = {k: w.clone() for k, w in read_state(whole).items()}
    save_file({**state, "something.weight": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=r"x\.safetensors holds something\.weight, which no known transformer has"):
        locate(tmp_path / "x.safetensors")


# Choosing parts -----------------------------------------------------------------------------------------------------


@pytest.fixture
def tree(folder, spec, tmp_path) -> Path:
    """ComfyUI's models/, with two text encoders and two autoencoders that fit."""
    models = tmp_path / "models"
    files = {"diffusion_models/z_turbo": ("transformer", "native"), "vae/a": ("vae", "ldm"), "vae/b": ("vae", "ldm")}
    for part, (name, layout) in ENCODERS[spec.family].items():
        files |= {f"text_encoders/{name}": (part, layout), f"text_encoders/{name}_other": (part, layout)}
    for file, (part, layout) in files.items():
        (models / file).parent.mkdir(parents=True, exist_ok=True)
        write_state(models / f"{file}.safetensors", state_of(folder, spec, part, layout))
    for tokenizer in family_of(spec.family).tokenizers:
        shutil.copytree(folder / tokenizer, models / "diffusion_models" / tokenizer)
    return models


def only(path: Path, *names: str) -> Path:
    """A folder of links to some files of another."""
    folder = path.parent / "only"
    folder.mkdir()
    for name in names:
        (folder / f"{name}.safetensors").symlink_to(path / f"{name}.safetensors")
    return folder


def test_two_parts_that_fit_are_told_apart_by_the_users_choice(tree, spec):
    with pytest.raises(InputError, match=r"all fit as text_encoder of z_turbo.*choose one with --text-encoder PATH"):
        locate(tree)
    names = [f"{name}_other" for name, _ in ENCODERS[spec.family].values()]
    chosen = {"text_encoder": str(only(tree / "text_encoders", *names)), "vae": str(tree / "vae/b.safetensors")}
    source = locate(tree, chosen=chosen)
    assert [source.parts[part].path.stem for part in ENCODERS[spec.family]] == names
    assert source.parts["vae"].path.stem == "b"
    with pytest.raises(InputError, match=r"all fit as vae of .*choose one with --vae PATH"):
        locate(tree, chosen={"text_encoder": chosen["text_encoder"]})


def test_a_choice_that_does_not_fit_is_named(tree):
    with pytest.raises(InputError, match=r"a\.safetensors is an autoencoder, not a text_encoder that is known here"):
        locate(tree, chosen={"text_encoder": str(tree / "vae/a.safetensors")})
    with pytest.raises(InputError, match=r"none does not exist: give the vae as a file or folder"):
        locate(tree, chosen={"vae": str(tree / "none")})
    with pytest.raises(InputError, match="all fit as vae of"):
        locate(tree, chosen={"vae": str(tree / "vae")})
    (tree / "empty").mkdir()
    with pytest.raises(InputError, match="empty holds no weight file: give the vae as a file"):
        locate(tree, chosen={"vae": str(tree / "empty")})


def test_the_command_line_chooses(tree, folder, spec, tmp_path, capsys):
    names = [name for name, _ in ENCODERS[spec.family].values()]
    chosen = [f"--text-encoder={only(tree / 'text_encoders', *names)}", f"--vae={tree / 'vae/b.safetensors'}"]
    assert main(["convert", str(tree), str(tmp_path / "made")]) == 2
    assert "choose one with --text-encoder PATH" in capsys.readouterr().err
    assert main(["convert", str(tree), str(tmp_path / "made"), *chosen]) == 0
    assert same_weights(inkstream.load(folder), inkstream.load(tmp_path / "made"))
