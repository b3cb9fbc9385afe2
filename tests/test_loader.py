"""Loading models from every published layout; errors are found before weights are read."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

import inkstream
from inkstream.engine.files import names
from inkstream.engine.files.convert import convert
from inkstream.engine.files.sources import locate
from inkstream.engine.machine import loader
from inkstream.families import SPECS
from inkstream.families.parts import AUTOENCODER, QWEN3
from inkstream.families.zimage.keys import DIFFUSERS
from inkstream.families.zimage.model import ZImageTransformer
from inkstream.families.zimage.specs import BASE, TURBO, ZImageConfig
from inkstream.nn.config import VAEConfig
from inkstream.nn.qwen3 import Qwen3
from inkstream.nn.vae import Autoencoder
from inkstream.types import InputError, Loading
from inkstream.weights.files import read_header, read_state, write_state
from inkstream.weights.keymap import translate


@pytest.fixture(autouse=True)
def no_hub(monkeypatch, tmp_path_factory):
    """An empty cache, offline."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def folder(tiny_folder, tmp_path) -> Path:
    """A copy of the tiny turbo that a test may change."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "copy"))


@pytest.fixture(scope="module")
def native(tiny_folder, tmp_path_factory) -> Path:
    """The tiny turbo's native folder. Tests must not change it."""
    return convert(tiny_folder, tmp_path_factory.mktemp("native") / "tiny", "native")


def weights(path: Path) -> Path:
    """The one safetensors file in a folder."""
    (file,) = path.glob("*.safetensors")
    return file


State = dict[str, torch.Tensor]


def edit(path: Path, change: Callable[[State], object], metadata: dict[str, str] | None = None) -> None:
    """Writes a file again after `change` has edited its state dict."""
    state = {name: tensor.clone() for name, tensor in read_state(path).items()}
    change(state)
    write_state(path, state, metadata)


def edit_json(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def same_weights(a: inkstream.Model, b: inkstream.Model) -> bool:
    ours, theirs = ([getattr(m.family, part).state_dict() for part in m.family.parts] for m in (a, b))
    return all(torch.equal(x[name], y[name]) for x, y in zip(ours, theirs) for name in x)


def refused(path: Path | str, *said: str) -> str:
    """The one-line error of a load. Checks that it contains all of `said` and that no weight was read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, "read_state", lambda path: pytest.fail(f"{path} was read"))
        with pytest.raises(InputError) as caught:
            inkstream.load(path)
    message = str(caught.value)
    assert "\n" not in message
    for text in said:
        assert text in message
    return message


# Layouts ------------------------------------------------------------------------------------------------------------


def test_a_diffusers_folder_is_loaded_with_its_configs(tiny_folder, tiny_base_folder):
    for path, spec in ((tiny_folder, TURBO.tiny), (tiny_base_folder, BASE.tiny)):
        model = inkstream.load(path, inkstream.Machine("cpu"))
        expected = ("transformer", "text_encoder", "vae", "shift", "steps", "guidance", "abilities")
        known = replace(TURBO if spec is TURBO.tiny else BASE, **{k: getattr(spec, k) for k in expected[:4]})
        assert {k: getattr(model.spec, k) for k in expected} == {k: getattr(known, k) for k in expected}
        assert model.spec.name == path.name


def test_weights_are_loaded_for_inference_only(tiny_folder):
    model = inkstream.load(str(tiny_folder), inkstream.Machine("cpu"))
    for module in (model.family.transformer, model.family.text_encoder, model.family.vae):
        assert not module.training
        assert all(p.device.type == "cpu" and not p.requires_grad for p in module.parameters())


def test_the_native_folder_and_its_file_load_like_the_folder_they_came_from(tiny_folder, native):
    model = inkstream.load(tiny_folder)
    for path in (native, weights(native)):
        other = inkstream.load(path)
        assert same_weights(model, other)
        assert other.spec.shift == 3.0
        assert other.spec.steps == TURBO.steps


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
@pytest.mark.parametrize("layout", ["native", "diffusers"])
def test_a_single_file_is_read_in_either_layout_with_a_prefix_or_without(tiny_folder, native, tmp_path, prefix, layout):
    folder = Path(shutil.copytree(native, tmp_path / "m"))
    header = read_header(weights(folder))

    def change(state):
        theirs = translate(DIFFUSERS, state, back=True) if layout == "diffusers" else dict(state)
        state.clear()
        state.update({prefix + name: tensor for name, tensor in theirs.items()})

    edit(weights(folder), change, {"config": header.metadata["config"]})
    assert same_weights(inkstream.load(tiny_folder), inkstream.load(weights(folder)))


def test_flat_pad_tokens_and_an_unused_norm_are_accepted(tiny_folder, native, tmp_path):
    folder = Path(shutil.copytree(native, tmp_path / "m"))
    config = read_header(weights(folder)).metadata["config"]

    def change(state):
        state["x_pad_token"] = state["x_pad_token"][0]
        state["norm_final.weight"] = torch.ones(64)

    edit(weights(folder), change, {"config": config})
    assert same_weights(inkstream.load(tiny_folder), inkstream.load(folder))


def test_a_text_encoder_may_lack_its_unused_last_layer(tiny_folder, folder):
    def change(state):
        for name in [name for name in state if name.startswith(("layers.2.", "norm."))]:
            del state[name]

    edit(weights(folder / "text_encoder"), change)
    assert same_weights(inkstream.load(tiny_folder), inkstream.load(folder))


def test_shards_are_one_model(tiny_folder, folder):
    for part in ("transformer", "text_encoder"):
        file = weights(folder / part)
        state = {name: tensor.clone() for name, tensor in read_state(file).items()}
        file.unlink()
        assert len(write_state(file, state, shard_bytes=100_000)) > 1
    assert same_weights(inkstream.load(tiny_folder), inkstream.load(folder))


# ComfyUI ------------------------------------------------------------------------------------------------------------

# Sizes that can be inferred from shapes alone: the published head width, and VAE groups of 32.
PLAIN = replace(
    TURBO.tiny,
    transformer=ZImageConfig(dim=64, n_layers=1, n_refiner_layers=1, n_heads=2, cap_feat_dim=32, axes_dims=(8, 12, 12)),
    vae=VAEConfig(block_out_channels=(32, 32, 32, 32), layers_per_block=1),
)


@pytest.fixture(scope="module")
def plain_folder(make_folder, tmp_path_factory) -> Path:
    return make_folder(tmp_path_factory.mktemp("plain") / "plain", PLAIN)


@pytest.fixture
def tree(plain_folder, tmp_path) -> Path:
    """ComfyUI's models/, with files of other models among them, and the tokenizer in the hub's cache."""
    models = tmp_path / "ComfyUI" / "models"
    states = {part: read_state(weights(plain_folder / part)) for part in ("transformer", "text_encoder", "vae")}
    states["transformer"] = translate(DIFFUSERS, states["transformer"])
    states["text_encoder"] = translate(QWEN3.layouts["transformers"], states["text_encoder"], back=True)
    states["vae"] = translate(AUTOENCODER.layouts["ldm"], states["vae"], back=True)
    for name, state in {
        "diffusion_models/z/z_turbo.safetensors": states["transformer"],
        "diffusion_models/other.safetensors": {"double_blocks.0.weight": torch.ones(3)},
        "text_encoders/qwen.safetensors": states["text_encoder"],
        "text_encoders/clip_l.safetensors": {"text_model.weight": torch.ones(3)},
        "vae/ae.safetensors": states["vae"],
        "vae/sdxl.safetensors": {**states["vae"], "quant_conv.weight": torch.ones(8, 8, 1, 1)},
    }.items():
        (models / name).parent.mkdir(parents=True, exist_ok=True)
        write_state(models / name, state)
    cache = Path(constants.HF_HUB_CACHE) / "models--Tongyi-MAI--Z-Image-Turbo"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs/main").write_text("abc")
    shutil.copytree(plain_folder / "tokenizer", cache / "snapshots/abc/tokenizer")
    return models


def test_comfyuis_models_are_read_in_place(plain_folder, tree):
    model = inkstream.load(plain_folder)
    for path in (tree, tree.parent, tree / "diffusion_models/z/z_turbo.safetensors"):
        other = inkstream.load(path)
        assert same_weights(model, other)
        assert other.spec.name == "z_turbo"
        assert (other.spec.transformer, other.spec.text_encoder, other.spec.vae) == (
            PLAIN.transformer, PLAIN.text_encoder, PLAIN.vae
        )  # fmt: skip


def test_the_old_names_of_comfyuis_folders_are_read_too(plain_folder, tree):
    (tree / "diffusion_models").rename(tree / "unet")
    (tree / "text_encoders").rename(tree / "clip")
    assert same_weights(inkstream.load(plain_folder), inkstream.load(tree))


def test_a_tree_with_several_models_is_refused(tree):
    shutil.copyfile(tree / "diffusion_models/z/z_turbo.safetensors", tree / "diffusion_models/z_base.safetensors")
    refused(tree, "2 models", "diffusion_models/z/z_turbo.safetensors", "diffusion_models/z_base.safetensors")
    assert inkstream.load(tree / "diffusion_models/z_base.safetensors").spec.name == "z_base"


def test_a_part_beside_the_model_takes_precedence_over_several_that_fit(tree):
    shutil.copyfile(tree / "vae/ae.safetensors", tree / "vae/other.safetensors")
    message = refused(tree, "vae", "ae.safetensors", "other.safetensors")
    chosen = Path(message.rsplit(" into ", 1)[1])
    chosen.mkdir()
    (chosen / "ae.safetensors").symlink_to(tree / "vae/ae.safetensors")
    inkstream.load(tree)


def test_the_error_for_a_part_missing_from_a_tree_names_the_files_tried(tree):
    (tree / "vae/ae.safetensors").unlink()
    refused(tree, "vae", "sdxl.safetensors", "quant_conv")
    (tree / "vae/sdxl.safetensors").unlink()
    refused(tree, "z_turbo.safetensors has no vae")


def test_a_text_encoder_of_another_width_in_a_tree_is_named(tree, plain_folder, make_folder, tmp_path):
    wide = replace(PLAIN, text_encoder=replace(PLAIN.text_encoder, hidden_size=48))
    other = make_folder(tmp_path / "wide", wide)
    file = tree / "text_encoders/wide.safetensors"
    shutil.copyfile(weights(other / "text_encoder"), file)
    assert same_weights(inkstream.load(plain_folder), inkstream.load(tree))  # the one that fits is taken
    for name in ("qwen", "clip_l"):
        (tree / f"text_encoders/{name}.safetensors").unlink()
    refused(tree, "wide.safetensors has hidden_size 48", "wants 32")


def test_without_a_tokenizer_the_remedy_is_named(tree):
    shutil.rmtree(constants.HF_HUB_CACHE)
    refused(tree, "no tokenizer", "hf download Tongyi-MAI/Z-Image-Turbo --include 'tokenizer/*'")


# Errors --------------------------------------------------------------------------------------------------------------


def test_the_error_for_an_unknown_name_lists_similar_ones():
    assert "did you mean" in refused("z-image-trubo", "z-image-trubo is not a known model", "z-image-turbo")
    refused("sdxl", *SPECS, "OWNER/NAME")
    refused("models/not/there", "models/not/there is not a known model, file or folder")
    refused("./there.safetensors", "there.safetensors")


def test_an_unpublished_model_is_refused():
    refused("z-image-omni", "not published")


def test_offline_a_model_that_is_not_cached_is_refused():
    refused("z-image-turbo", "Tongyi-MAI/Z-Image-Turbo", "HF_HUB_OFFLINE")
    refused("someone/something", "someone/something is not a file or folder here, and", "HF_HUB_OFFLINE")


def test_a_folder_without_a_model_is_refused_with_what_is_expected(tmp_path, native):
    refused(tmp_path, str(tmp_path), "model_index.json")
    shutil.copyfile(weights(native / "vae"), tmp_path / "vae.safetensors")
    refused(tmp_path, "vae.safetensors is an autoencoder, not a transformer that is known here", "--vae")
    shutil.copyfile(weights(native / "vae"), tmp_path / "again.safetensors")
    refused(tmp_path, "not again.safetensors, vae.safetensors")


def test_a_pickle_is_refused_with_the_remedy(tmp_path):
    (tmp_path / "model.ckpt").write_bytes(b"")
    refused(tmp_path / "model.ckpt", "model.ckpt is a pickle", "convert it to safetensors")


def test_a_file_of_another_kind_of_model_is_named_by_its_keys(tmp_path):
    write_state(tmp_path / "x.safetensors", {f"unet.{i}": torch.ones(2) for i in range(9)})
    refused(tmp_path / "x.safetensors", "x.safetensors is not a known transformer", "unet.0, unet.1, unet.2 and 6 more")


@pytest.mark.parametrize("part", ["transformer", "text_encoder", "vae", "tokenizer"])
def test_a_missing_part_is_named(folder, part):
    shutil.rmtree(folder / part)
    refused(folder, str(folder / part))


@pytest.mark.parametrize("part", ["transformer", "text_encoder", "vae"])
def test_a_part_without_its_weights_is_named(folder, part):
    weights(folder / part).unlink()
    refused(folder, str(folder / part), "no safetensors")


@pytest.mark.parametrize("part", ["transformer", "text_encoder", "vae"])
def test_unknown_missing_and_misshapen_weights_are_named(folder, part):
    file = weights(folder / part)
    original = file.read_bytes()
    name = {"transformer": "t_embedder.mlp.0.weight", "text_encoder": "layers.1.mlp.up_proj.weight"}.get(
        part, "encoder.mid_block.attentions.0.to_q.weight"
    )
    edit(file, lambda state: state.update({f"odd.{i}": torch.ones(1) for i in range(5)}))
    refused(folder, str(folder / part), "odd.0, odd.1, odd.2 and 2 more")
    file.write_bytes(original)
    edit(file, lambda state: state.pop(name))
    refused(folder, str(folder / part), f"lacks {name}")
    file.write_bytes(original)
    edit(file, lambda state: state.update({name: state[name][:-1].clone()}))
    rows, columns = read_header(file).tensors[name].shape
    refused(folder, str(folder / part), f"{rows}x{columns}", f"expected {rows + 1}x{columns}")


def test_a_missing_part_of_a_fused_weight_is_named(folder):
    edit(weights(folder / "transformer"), lambda state: state.pop("layers.1.attention.to_k.weight"))
    refused(folder, str(folder / "transformer"), "layers.1.attention.to_k.weight is missing")


def test_missing_weights_have_the_names_of_the_file(folder):
    edit(weights(folder / "transformer"), lambda state: state.pop("all_x_embedder.2-1.bias"))
    refused(folder, "lacks all_x_embedder.2-1.bias")


def test_a_file_cut_short_by_a_broken_download_is_named(folder):
    file = weights(folder / "transformer")
    file.write_bytes(file.read_bytes()[:-100])
    refused(folder, str(file), "cut short", "download it again")


def test_a_text_encoder_of_another_width_is_named(folder, make_folder, tmp_path):
    wide = replace(TURBO.tiny, text_encoder=replace(TURBO.tiny.text_encoder, hidden_size=48))
    shutil.rmtree(folder / "text_encoder")
    shutil.copytree(make_folder(tmp_path / "wide", wide) / "text_encoder", folder / "text_encoder")
    refused(folder, str(folder / "text_encoder"), "hidden_size 48", str(folder / "transformer"), "wants 32")


def test_an_autoencoder_of_other_channels_is_named(folder, make_folder, tmp_path):
    other = replace(TURBO.tiny, vae=replace(TURBO.tiny.vae, latent_channels=4))
    shutil.rmtree(folder / "vae")
    shutil.copytree(make_folder(tmp_path / "other", other) / "vae", folder / "vae")
    refused(folder, str(folder / "vae"), "latent_channels 4", "wants 16")


def test_a_config_that_does_not_fit_its_weights_is_named(folder):
    edit_json(folder / "transformer/config.json", n_layers=3)
    refused(folder, str(folder / "transformer"), "lacks layers.2.")
    edit_json(folder / "transformer/config.json", n_layers=2, dim=96)
    refused(folder, str(folder / "transformer"), "does not fit its config", "expected")


@pytest.mark.parametrize(
    ("field", "value"),
    [("dim", 0), ("dim", -64), ("dim", "wide"), ("n_heads", 0), ("dim", None), ("n_layers", 1.5), ("axes_dims", 3)],
)
def test_an_invalid_config_is_named(folder, field, value):
    edit_json(folder / "transformer/config.json", **{field: value})
    refused(folder, str(folder / "transformer"))


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00"])
@pytest.mark.parametrize("name", ["transformer/config.json", "scheduler/scheduler_config.json", "vae/config.json"])
def test_a_broken_json_file_is_named(folder, name, text):
    (folder / name).write_text(text)
    refused(folder, str(folder / name))


def test_unknown_keys_in_a_config_are_ignored(folder):
    edit_json(folder / "transformer/config.json", some_new_key=[1, 2], _diffusers_version="9.9")
    inkstream.load(folder)


def test_a_scaled_fp8_file_is_named_as_quantised(native, tmp_path):
    folder = Path(shutil.copytree(native, tmp_path / "m"))
    edit(weights(folder), lambda state: state.update({"layers.0.attention.qkv.scale_weight": torch.ones(())}))
    refused(folder, "layers.0.attention.qkv.scale_weight", "quantised", "take the bf16 file")


@pytest.mark.parametrize("shift", ["3", [3.0], {}])
def test_a_shift_that_is_no_number_is_named(folder, shift):
    edit_json(folder / "scheduler/scheduler_config.json", shift=shift)
    refused(folder, "scheduler_config.json says shift is")


@pytest.mark.parametrize(
    ("declared", "said"),
    [
        ({"_class_name": "ZImageControlNetPipeline", "controlnet": ["diffusers", "ZImageControlNetModel"]},
         ["m declares controlnet (ZImageControlNetModel), which is not used: it draws as it does without"]),
        ({"_class_name": "ZImageControlNetPipeline"},
         ["m declares ZImageControlNetPipeline, but no ControlNet is used"]),
        ({"siglip": ["transformers", "Siglip2VisionModel"], "siglip_processor": ["transformers", "Siglip2Processor"]},
         ["m declares siglip (Siglip2VisionModel), which is not used: it draws as it does without"]),
        ({"image_encoder": [None, None], "feature_extractor": ["transformers", "CLIPImageProcessor"]}, []),
    ],
)  # fmt: skip
def test_a_part_that_the_folder_declares_and_that_is_not_used_is_named(folder, declared, said):
    edit_json(folder / "model_index.json", **declared)
    events = []
    locate(folder, events.append)
    assert [event.note for event in events if event.note] == [line.replace("m ", f"{folder.name} ", 1) for line in said]


def test_the_transformers_folder_stands_for_the_model_folder(tiny_folder):
    model = inkstream.load(tiny_folder / "transformer")
    assert same_weights(inkstream.load(tiny_folder), model)
    assert model.spec.name == tiny_folder.name


def test_several_files_that_fit_as_one_part_are_refused(native, tmp_path):
    folder = Path(shutil.copytree(native, tmp_path / "m"))
    (config,) = (folder / "vae").glob("*.json")
    metadata = {"config": config.read_text()}
    config.unlink()
    edit(weights(folder / "vae"), lambda state: None, metadata)
    inkstream.load(folder)
    shutil.copyfile(weights(folder / "vae"), folder / "vae/other.safetensors")
    refused(folder, "all fit as vae", "vae/other.safetensors", f"into {folder}/vae/")


def test_quantised_weights_are_named(folder):
    name = "layers.0.feed_forward.w1.weight"
    edit(weights(folder / "transformer"), lambda state: state.update({name: state[name].to(torch.int8)}))
    refused(folder, name, "quantised")


def test_a_tokenizer_of_more_tokens_than_the_text_encoder_knows_is_named(folder, make_folder, tmp_path):
    small = replace(TURBO.tiny, text_encoder=replace(TURBO.tiny.text_encoder, vocab_size=128))
    shutil.rmtree(folder / "text_encoder")
    shutil.copytree(make_folder(tmp_path / "small", small) / "text_encoder", folder / "text_encoder")
    refused(folder, str(folder / "tokenizer"), "261 tokens", "128")


# Devices, dtypes, memory --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bf16", "bfloat16", "fp16", "fp32"])
def test_weights_take_the_dtype_asked_for_and_the_autoencoder_stays_float32_on_the_cpu(tiny_folder, dtype):
    model = inkstream.load(tiny_folder, inkstream.Machine("cpu", dtype))
    wanted = loader.DTYPES[dtype]
    assert model.dtype == wanted
    assert {p.dtype for p in model.family.transformer.parameters()} == {wanted}
    assert {p.dtype for p in model.family.text_encoder.parameters()} == {wanted}
    assert {p.dtype for p in model.family.vae.parameters()} == {torch.float32}


def test_files_of_another_dtype_are_cast(tiny_folder, folder):
    for part in ("transformer", "text_encoder", "vae"):
        edit(weights(folder / part), lambda state: state.update({k: v.bfloat16() for k, v in state.items()}))
    model, exact = inkstream.load(folder), inkstream.load(tiny_folder)
    for name, weight in model.family.transformer.state_dict().items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, exact.family.transformer.state_dict()[name].bfloat16().float())


def test_on_a_gpu_the_autoencoder_takes_the_models_dtype_unless_it_would_overflow():
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert loader.dtype_of("vae", torch.bfloat16, gpu) == torch.bfloat16
    assert loader.dtype_of("vae", torch.float16, gpu) == torch.float32
    assert loader.dtype_of("vae", torch.bfloat16, cpu) == torch.float32
    assert loader.dtype_of("transformer", torch.float16, gpu) == torch.float16


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dtype": "fp8"}, "dtype fp8 is not supported: take float32, fp32"),
        ({"device": "gpu"}, "device gpu is not known"),
        ({"device": "cuda:99"}, "device cuda:99 is not there"),
        ({"device": "meta"}, "device meta is not there"),
    ],
)
def test_an_unavailable_device_or_dtype_is_named(tiny_folder, options, said):
    with pytest.raises(InputError, match=said):
        inkstream.load(tiny_folder, inkstream.Machine(**options))


def test_progress_names_each_part_and_ends_at_its_last_byte(tiny_folder):
    events: list[Loading] = []
    inkstream.load(tiny_folder, progress=events.append)
    assert list(dict.fromkeys(e.what for e in events)) == ["transformer", "text_encoder", "vae"]
    for part in ("transformer", "text_encoder", "vae"):
        done = [e.done_bytes for e in events if e.what == part]
        assert done[0] == 0
        assert done == sorted(done)
        assert done[-1] == next(e.total_bytes for e in events if e.what == part)


MEASURE = """
import sys
import inkstream.engine.drawing.model, inkstream.families.zimage.family
from inkstream import Machine, load
def memory():
    return int(dict(line.split(":") for line in open("/proc/self/status"))["RssAnon"].split()[0]) * 1024
def look(event):
    global peak
    peak = max(peak, memory() - before)
for path, dtype in zip(sys.argv[1::2], sys.argv[2::2]):
    peak, before = 0, memory()
    model = load(path, Machine("cpu", dtype), progress=look)
    look(None)
    del model
    print(peak)
print("sympy" in sys.modules)
"""


@pytest.fixture(scope="module")
def heavy(make_folder, tmp_path_factory) -> Path:
    """A diffusers folder with 190 MB of transformer."""
    config = ZImageConfig(dim=1024, n_layers=1, n_refiner_layers=1, n_heads=8, cap_feat_dim=32, axes_dims=(32, 48, 48))
    return make_folder(tmp_path_factory.mktemp("heavy") / "heavy", replace(TURBO.tiny, transformer=config))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measures memory as Linux does")
def test_loading_makes_no_second_copy(heavy, tmp_path):
    """Peak private memory: none for mapped weights, their own size for fused weights and the result of a cast."""
    native = convert(heavy, tmp_path / "native", "native")
    sizes = {name: tensor.nbytes for name, tensor in read_header(heavy / "transformer").tensors.items()}
    size, fused = sum(sizes.values()), sum(n for name, n in sizes.items() if ".attention.to_q." in name) * 3
    assert size > 150e6
    cases = [(native, "fp32", 0), (heavy, "fp32", fused), (native, "bf16", size / 2), (heavy, "bf16", size / 2 + fused)]
    command = [sys.executable, "-c", MEASURE, *(str(word) for path, dtype, _ in cases for word in (path, dtype))]
    *peaks, tracer = subprocess.check_output(command, text=True).split()
    for (path, dtype, allowed), peak in zip(cases, peaks):
        assert int(peak) < allowed + 16e6, (path, dtype)
    assert tracer == "False"  # building on meta imports none of torch's tracer


def sparse(path: Path, tensors: State) -> None:
    """A sparse safetensors file: a header and a hole, so that it takes no disk space."""
    header, offset = {}, 0
    for name, tensor in tensors.items():
        end = offset + 2 * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + offset)


def test_published_sizes_are_inferred_from_the_headers_of_comfyuis_files(tmp_path, plain_folder):
    with torch.device("meta"):
        transformer = ZImageTransformer(TURBO.transformer).state_dict()
        text_encoder = Qwen3(TURBO.text_encoder, depths=(36,)).state_dict()
        vae = Autoencoder(TURBO.vae).state_dict()
        text_encoder["norm.weight"] = torch.empty(2560)
    file = tmp_path / "diffusion_models/z_image_turbo_bf16.safetensors"
    sparse(file, {f"model.diffusion_model.{name}": tensor for name, tensor in transformer.items()})
    theirs = translate(QWEN3.layouts["transformers"], text_encoder, back=True)
    sparse(tmp_path / "text_encoders/qwen_3_4b.safetensors", theirs)
    sparse(tmp_path / "vae/ae.safetensors", translate(AUTOENCODER.layouts["ldm"], vae, back=True))
    shutil.copytree(plain_folder / "tokenizer", tmp_path / "diffusion_models/tokenizer")
    source = locate(tmp_path)
    assert source.spec == replace(TURBO, name="z_image_turbo_bf16", licence="unknown", commercial=False)
    assert source.parts["transformer"].path == file
    assert file.stat().st_size > 12.3e9


def test_everything_is_checked_from_headers_alone(tiny_folder, monkeypatch):
    monkeypatch.setattr(loader, "read_state", lambda path: pytest.fail(f"{path} was read"))
    source = locate(tiny_folder)
    assert set(source.parts) == {"transformer", "text_encoder", "vae"}
    assert all(p.is_meta for found in source.parts.values() for p in found.module.parameters())
    assert names.PUBLISHED[0] == "model_index.json"
