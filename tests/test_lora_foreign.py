"""Adapters' files as other programs write them, made here by formulas that know nothing of our tables of names."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from inkstream.families import adapter_names
from inkstream.families.flux1.specs import DEV
from inkstream.families.flux2.specs import KLEIN_4B
from inkstream.families.zimage.specs import TURBO
from inkstream.weights.lora.changes import Lora
from inkstream.weights.lora.read import read_lora

NAMES = {spec.family: adapter_names(spec) for spec in (TURBO.tiny, DEV.tiny, KLEIN_4B.tiny)}
WIDTH = {family: names.layers[f"{path}"][1] for family, names, path in (
    ("zimage", NAMES["zimage"], "layers.0.attention.qkv"),
    ("flux1", NAMES["flux1"], "double_blocks.0.img_attn.qkv"),
    ("flux2", NAMES["flux2"], "double_blocks.0.img_attn.qkv"),
)}  # fmt: skip

File = dict[str, Tensor]
Deltas = dict[str, Tensor]


class Noise:
    def __init__(self):
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)


def weight_of(family: str, layer: str) -> Tensor:
    generator = torch.Generator().manual_seed(len(layer))
    return torch.randn(*NAMES[family].layers[layer], generator=generator)


def rows(family: str, layer: str, parts: Mapping[int, Tensor]) -> Tensor:
    """Zeros of a layer's size, with parts that begin at some of its rows."""
    whole = torch.zeros(NAMES[family].layers[layer])
    for start, part in parts.items():
        whole[start : start + len(part)] = part
    return whole


def xlabs() -> tuple[File, Deltas]:
    """1 is the picture's side, 2 the text's; qkv of a single block are the first three parts of linear1."""
    noise, d = Noise(), WIDTH["flux1"]
    file, deltas = {}, {}
    for theirs, ours in (("qkv_lora1", "img_attn.qkv"), ("qkv_lora2", "txt_attn.qkv"), ("proj_lora1", "img_attn.proj"),
                         ("proj_lora2", "txt_attn.proj")):  # fmt: skip
        down, up = noise(2, d), noise(3 * d if "qkv" in theirs else d, 2)
        file |= {f"double_blocks.0.processor.{theirs}.down.weight": down}
        file |= {f"double_blocks.0.processor.{theirs}.up.weight": up}
        deltas[f"double_blocks.0.{ours}"] = up @ down
    down, up = noise(2, d), noise(3 * d, 2)
    file |= {"single_blocks.1.processor.qkv_lora.down.weight": down, "single_blocks.1.processor.qkv_lora.up.weight": up}
    deltas["single_blocks.1.linear1"] = rows("flux1", "single_blocks.1.linear1", {0: up @ down})
    down, up = noise(2, 5 * d), noise(d, 2)
    file["single_blocks.1.processor.proj_lora.down.weight"] = down
    file["single_blocks.1.processor.proj_lora.up.weight"] = up
    deltas["single_blocks.1.linear2"] = up @ down
    return file, deltas


def kontext() -> tuple[File, Deltas]:
    noise = Noise()
    file, deltas = {}, {}
    for layer in ("double_blocks.1.txt_attn.qkv", "single_blocks.0.linear1", "final_layer.adaLN_modulation.1",
                  "final_layer.linear", "time_in.in_layer", "double_blocks.0.img_mod.lin"):  # fmt: skip
        height, width = NAMES["flux1"].layers[layer]
        down, up = noise(3, width), noise(height, 3)
        file[f"base_model.model.{layer}.lora_A.weight"], file[f"base_model.model.{layer}.lora_B.weight"] = down, up
        deltas[layer] = up @ down
    return file, deltas


def control() -> tuple[File, Deltas]:
    noise = Noise()
    file, deltas = {}, {}
    for layer in ("double_blocks.0.img_attn.qkv", "double_blocks.0.img_mlp.0", "single_blocks.0.linear2"):
        height, width = NAMES["flux1"].layers[layer]
        down, up, bias = noise(3, width), noise(height, 3), noise(height)
        file |= {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up, f"{layer}.lora_B.bias": bias}
        deltas |= {layer: up @ down, f"{layer}.bias": bias}
    scale = noise(*NAMES["flux1"].vectors["double_blocks.0.img_attn.norm.query_norm.scale"])
    file["double_blocks.0.img_attn.norm.query_norm.scale"] = scale
    deltas["= double_blocks.0.img_attn.norm.query_norm.scale"] = scale
    return file, deltas


def onetrainer() -> tuple[File, Deltas]:
    """alpha is a power of 2 over the rank. diffusers' norm_out has scale before shift."""
    noise, d = Noise(), WIDTH["flux1"]
    file = {}

    def pair(name: str, height: int, width: int, alpha: float) -> Tensor:
        down, up = noise(4, width), noise(height, 4)
        start = f"lora_transformer_{name}"
        file[f"{start}.lora_down.weight"], file[f"{start}.lora_up.weight"] = down, up
        file[f"{start}.alpha"] = torch.tensor(alpha)
        return alpha / 4 * up @ down

    parts = {0: pair("single_transformer_blocks_0_attn_to_q", d, d, 1.0),
             2 * d: pair("single_transformer_blocks_0_attn_to_v", d, d, 2.0),
             3 * d: pair("single_transformer_blocks_0_proj_mlp", 4 * d, d, 8.0)}  # fmt: skip
    key = pair("transformer_blocks_1_attn_add_k_proj", d, d, 4.0)
    last = pair("norm_out_linear", 2 * d, d, 4.0)
    return file, {
        "single_blocks.0.linear1": rows("flux1", "single_blocks.0.linear1", parts),
        "double_blocks.1.txt_attn.qkv": rows("flux1", "double_blocks.1.txt_attn.qkv", {d: key}),
        "final_layer.adaLN_modulation.1": torch.cat((last[d:], last[:d])),
    }


def cut_short() -> tuple[File, Deltas]:
    noise, d = Noise(), WIDTH["flux2"]
    file, deltas = {}, {}
    down, up = noise(2, d), noise(d, 2)
    start = "diffusion_model.sformer_blocks.0.attn"
    file |= {f"{start}.to_v.lora_A.weight": down, f"{start}.to_v.lora_B.weight": up}
    deltas["double_blocks.0.img_attn.qkv"] = rows("flux2", "double_blocks.0.img_attn.qkv", {2 * d: up @ down})
    down, up = noise(2, d), noise(d, 2)
    file |= {f"{start}.to_add_out.lora_A.weight": down, f"{start}.to_add_out.lora_B.weight": up}
    deltas["double_blocks.0.txt_attn.proj"] = up @ down
    down, up = noise(2, d), noise(9 * d, 2)
    start = "diffusion_model.single_transformer_blocks.1.attn.to_qkv_mlp_proj"
    file |= {f"{start}.lora_A.weight": down, f"{start}.lora_B.weight": up}
    deltas["single_blocks.1.linear1"] = up @ down
    return file, deltas


def diffsynth() -> tuple[File, Deltas]:
    noise, d = Noise(), WIDTH["zimage"]
    file, parts, deltas = {}, {}, {}
    for i, name in enumerate("qkv"):
        down, up = noise(2, d), noise(d, 2)
        file[f"layers.1.attention.to_{name}.lora_A.default.weight"] = down
        file[f"layers.1.attention.to_{name}.lora_B.default.weight"] = up
        parts[i * d] = up @ down
    deltas["layers.1.attention.qkv"] = rows("zimage", "layers.1.attention.qkv", parts)
    for theirs, ours in (("layers.1.attention.to_out.0", "layers.1.attention.out"),
                         ("context_refiner.0.feed_forward.w2", "context_refiner.0.feed_forward.w2")):  # fmt: skip
        height, width = NAMES["zimage"].layers[ours]
        down, up = noise(2, width), noise(height, 2)
        file |= {f"{theirs}.lora_A.default.weight": down, f"{theirs}.lora_B.default.weight": up}
        deltas[ours] = up @ down
    return file, deltas


def comfyui_fused() -> tuple[File, Deltas]:
    noise, d = Noise(), WIDTH["zimage"]
    down, up, out, bias, norm = noise(2, d), noise(3 * d, 2), noise(d, d), noise(d), noise(d)
    adaln = noise(*NAMES["zimage"].layers["layers.0.adaLN_modulation.0"])
    start = "diffusion_model.layers.0"
    return {
        f"{start}.attention.qkv.lora_A.weight": down,
        f"{start}.attention.qkv.lora_B.weight": up,
        f"{start}.attention.out.diff": out,
        f"{start}.attention_norm1.diff": norm,
        f"{start}.adaLN_modulation.0.set_weight": adaln,
        "diffusion_model.cap_embedder.1.diff_b": bias,
    }, {
        "layers.0.attention.qkv": up @ down,
        "layers.0.attention.out": out,
        "layers.0.adaLN_modulation.0": adaln - weight_of("zimage", "layers.0.adaLN_modulation.0"),
        "cap_embedder.1": torch.zeros(NAMES["zimage"].layers["cap_embedder.1"]),
        "cap_embedder.1.bias": bias,
        "+ layers.0.attention_norm1.weight": norm,
    }


def with_copies() -> tuple[File, Deltas]:
    """Both the parts of QKV and the whole are there, with dots for underscores; one copy counts."""
    noise, d = Noise(), WIDTH["zimage"]
    file, parts = {}, {}
    for i, name in enumerate("qkv"):
        down, up = noise(2, d), noise(d, 2)
        file[f"layers.0.attention.to.{name}.lora.down.weight"] = down
        file[f"layers.0.attention.to.{name}.lora.up.weight"] = up
        parts[i] = down, up
    file["layers.0.attention.qkv.lora.down.weight"] = torch.cat([down for down, _ in parts.values()])
    file["layers.0.attention.qkv.lora.up.weight"] = torch.block_diag(*(up for _, up in parts.values()))
    deltas = {i * d: up @ down for i, (down, up) in parts.items()}
    return file, {"layers.0.attention.qkv": rows("zimage", "layers.0.attention.qkv", deltas)}


def mixed() -> tuple[File, Deltas]:
    """Four ways of writing, in one file, in half precision, with alphas for some layers and text encoders."""
    noise, d = Noise(), WIDTH["zimage"]
    file, parts = {}, {}
    starts = (
        "transformer.diffusion_model.layers.0.attention.to_q.{}.my_adapter.weight",
        "lora_unet__layers_0_attention_to_k.{}.weight",
        "model.diffusion_model.layers.0.attention.to_v.{}.weight",
    )
    halves = ("lora_A", "lora_B"), ("lora_down", "lora_up"), ("lora_linear_layer.down", "lora_linear_layer.up")
    for i, (start, (a, b)) in enumerate(zip(starts, halves)):
        down, up = noise(2, d).bfloat16(), noise(d, 2).bfloat16()
        file |= {start.format(a): down, start.format(b): up}
        parts[i * d] = up.float() @ down.float()
    file["lora_unet__layers_0_attention_to_k.alpha"] = torch.tensor(1.0)
    parts[d] = parts[d] / 2
    down, up = noise(2, d), noise(d, 2)
    file |= {"unet.noise_refiner.0.attention.to_out.0_lora.down.weight": down}
    file |= {"unet.noise_refiner.0.attention.to_out.0_lora.up.weight": up}
    file["lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"] = noise(2, 8)
    file["text_encoders.qwen3_4b.transformer.model.layers.0.mlp.up_proj.lora_A.weight"] = noise(2, 8)
    file["bundle_emb.word.qwen"] = noise(2, 8)
    return file, {
        "layers.0.attention.qkv": rows("zimage", "layers.0.attention.qkv", parts),
        "noise_refiner.0.attention.out": up @ down,
    }


def simpletuner() -> tuple[File, Deltas]:
    """alpha counts where a factor is low-rank, and not where both are full."""
    noise, d = Noise(), WIDTH["flux2"]
    w1, a, b = noise(4, 8), noise(d // 4, 3), noise(3, d // 8)
    full1, full2 = noise(3, 2), noise(3 * d, d // 2)
    a1, b1, w2 = noise(8, 2), noise(2, 4), noise(6 * d // 8, d // 4)
    return {
        "lycoris_transformer_blocks_0_attn_to_add_out.lokr_w1": w1,
        "lycoris_transformer_blocks_0_attn_to_add_out.lokr_w2_a": a,
        "lycoris_transformer_blocks_0_attn_to_add_out.lokr_w2_b": b,
        "lycoris_transformer_blocks_0_attn_to_add_out.alpha": torch.tensor(1.5),
        "lycoris_single_transformer_blocks_0_attn_to_qkv_mlp_proj.lokr_w1": full1,
        "lycoris_single_transformer_blocks_0_attn_to_qkv_mlp_proj.lokr_w2": full2,
        "lycoris_single_transformer_blocks_0_attn_to_qkv_mlp_proj.alpha": torch.tensor(1000.0),
        "lycoris_transformer_blocks_1_ff_context_linear_in.lokr_w1_a": a1,
        "lycoris_transformer_blocks_1_ff_context_linear_in.lokr_w1_b": b1,
        "lycoris_transformer_blocks_1_ff_context_linear_in.lokr_w2": w2,
        "lycoris_transformer_blocks_1_ff_context_linear_in.alpha": torch.tensor(4.0),
    }, {
        "double_blocks.0.txt_attn.proj": 0.5 * torch.kron(w1, a @ b),
        "single_blocks.0.linear1": torch.kron(full1, full2),
        "double_blocks.1.txt_mlp.0": 2 * torch.kron(a1 @ b1, w2),
    }


def dora() -> tuple[File, Deltas]:
    """One norm a row, and one norm a column, of the same sizes."""
    noise, d = Noise(), WIDTH["flux1"]
    down, up, per_row, per_column = noise(2, d), noise(d, 2), noise(d, 1), noise(1, d)
    file: File = {}
    for layer, scale in (("img_attn_proj", per_row), ("txt_attn_proj", per_column)):
        start = f"lora_unet_double_blocks_0_{layer}"
        file |= {f"{start}.lora_down.weight": down.clone(), f"{start}.lora_up.weight": up.clone()}
        file |= {f"{start}.dora_scale": scale, f"{start}.alpha": torch.tensor(4.0)}
    before = [weight_of("flux1", f"double_blocks.0.{side}_attn.proj") for side in ("img", "txt")]
    first, second = (weight + 2 * up @ down for weight in before)
    return file, {
        "double_blocks.0.img_attn.proj": first / first.square().sum(1, keepdim=True).sqrt() * per_row - before[0],
        "double_blocks.0.txt_attn.proj": second / second.square().sum(0, keepdim=True).sqrt() * per_column - before[1],
    }


def loha() -> tuple[File, Deltas]:
    noise, d = Noise(), WIDTH["flux2"]
    a1, b1, a2, b2 = noise(3 * d, 2), noise(2, d), noise(3 * d, 2), noise(2, d)
    start = "lora_unet_double_blocks_0_img_attn_qkv"
    return {
        f"{start}.hada_w1_a": a1,
        f"{start}.hada_w1_b": b1,
        f"{start}.hada_w2_a": a2,
        f"{start}.hada_w2_b": b2,
        f"{start}.alpha": torch.tensor(3.0),
    }, {"double_blocks.0.img_attn.qkv": 1.5 * (a1 @ b1) * (a2 @ b2)}


def prefixed_xlabs() -> tuple[File, Deltas]:
    file, deltas = xlabs()
    return {f"diffusion_model.{key}": tensor for key, tensor in file.items()}, deltas


def convolutions() -> tuple[File, Deltas]:
    """Matrices that are stored as convolutions of size 1, in half precision, with an alpha of one dimension."""
    noise, d = Noise(), WIDTH["flux1"]
    down, up = noise(4, d).half(), noise(d, 4).half()
    start = "lora_unet_double_blocks_1_img_attn_proj"
    return {
        f"{start}.lora_down.weight": down[:, :, None, None],
        f"{start}.lora_up.weight": up[:, :, None, None],
        f"{start}.alpha": torch.tensor([2.0]),
    }, {"double_blocks.1.img_attn.proj": 0.5 * up.float() @ down.float()}


def rotation() -> tuple[File, Deltas]:
    """Four blocks rotate the outputs: the transpose of (I + Q)(I - Q)^-1, then a factor for each row."""
    noise, d = Noise(), WIDTH["zimage"]
    blocks, factors = 0.1 * noise(4, d // 4, d // 4), 1 + 0.1 * noise(d, 1)
    rotated = []
    for block in blocks:
        q = block - block.T
        rotated.append(torch.linalg.inv(torch.eye(d // 4) - q).T @ (torch.eye(d // 4) + q).T)
    before = weight_of("zimage", "layers.1.attention.out")
    start = "lycoris_layers_1_attention_to_out_0"
    return {f"{start}.oft_blocks": blocks, f"{start}.rescale": factors, f"{start}.alpha": torch.tensor(0.0)}, {
        "layers.1.attention.out": factors * (torch.block_diag(*rotated) @ before) - before
    }


def few_numbers() -> tuple[File, Deltas]:
    """IA3 of outputs and of inputs, a norm, and GLoRA, under kohya's prefix."""
    noise = Noise()
    outputs, inputs = "layers.0.feed_forward.w1", "layers.0.feed_forward.w2"
    o, i = NAMES["zimage"].layers[outputs][0], NAMES["zimage"].layers[inputs][1]
    rows_, columns, norm = noise(o), noise(i), noise(WIDTH["zimage"])
    h, w = NAMES["zimage"].layers["layers.1.feed_forward.w3"]
    a1, a2, b1, b2 = noise(w, 3), noise(3, w), noise(h, 3), noise(3, w)
    start = "lora_unet_layers_1_feed_forward_w3"
    return {
        "lora_unet_layers_0_feed_forward_w1.weight": rows_,
        "lora_unet_layers_0_feed_forward_w1.on_input": torch.tensor(0),
        "lora_unet_layers_0_feed_forward_w2.weight": columns,
        "lora_unet_layers_0_feed_forward_w2.on_input": torch.tensor(1),
        "lora_unet_layers_0_ffn_norm1.w_norm": norm,
        **{f"{start}.{name}.weight": t for name, t in {"a1": a1, "a2": a2, "b1": b1, "b2": b2}.items()},
        f"{start}.alpha": torch.tensor(6.0),
    }, {
        outputs: torch.diag(rows_) @ weight_of("zimage", outputs),
        inputs: weight_of("zimage", inputs) @ torch.diag(columns),
        "+ layers.0.ffn_norm1.weight": norm,
        "layers.1.feed_forward.w3": 2 * (weight_of("zimage", "layers.1.feed_forward.w3") @ a1 @ a2 + b1 @ b2),
    }


FILES: dict[str, tuple[str, Callable[[], tuple[File, Deltas]]]] = {
    "XLabs": ("flux1", xlabs),
    "fal's Kontext": ("flux1", kontext),
    "Black Forest Labs' control": ("flux1", control),
    "OneTrainer": ("flux1", onetrainer),
    "a prefix cut off too far": ("flux2", cut_short),
    "DiffSynth": ("zimage", diffsynth),
    "ComfyUI's fused layers": ("zimage", comfyui_fused),
    "both QKV and its parts": ("zimage", with_copies),
    "several dialects": ("zimage", mixed),
    "SimpleTuner's LyCORIS": ("flux2", simpletuner),
    "kohya's DoRA": ("flux1", dora),
    "kohya's LoHa": ("flux2", loha),
    "XLabs with a prefix": ("flux1", prefixed_xlabs),
    "convolutions of size 1": ("flux1", convolutions),
    "LyCORIS' OFT": ("zimage", rotation),
    "LyCORIS' IA3, norms and GLoRA": ("zimage", few_numbers),
}


def deltas_of(lora: Lora, family: str) -> Deltas:
    found = {f"+ {name}": added for name, added in lora.vectors.items()}
    found |= {f"= {name}": value for name, value in lora.replaced.items()}
    for path, layer in lora.layers.items():
        weight = weight_of(family, path)
        found[path] = torch.zeros_like(weight)
        for part in layer.parts:
            found[path][part.rows] += part.change.delta(weight[part.rows])
        if layer.bias is not None:
            found[f"{path}.bias"] = layer.bias
    return found


@pytest.mark.parametrize("kind", FILES)
def test_a_foreign_file_is_read_as_the_change_that_it_is(kind, tmp_path):
    family, make = FILES[kind]
    file, expected = make()
    save_file({key: tensor.contiguous() for key, tensor in file.items()}, tmp_path / "a.safetensors")
    lora = read_lora(tmp_path / "a.safetensors", NAMES[family])
    found = deltas_of(lora, family)
    assert found.keys() == expected.keys()
    for name, delta in expected.items():
        assert (found[name] - delta).abs().max() <= 2e-6 * max(1, float(delta.abs().max())), name


def test_a_folder_of_peft_scales_by_its_configuration(tmp_path):
    """rsLoRA divides alpha by the root of the rank; some layers have an alpha of their own."""
    noise, d = Noise(), WIDTH["zimage"]
    file, products = {}, {}
    for name in ("to_q", "to_k"):
        down, up = noise(4, d), noise(d, 4)
        file[f"base_model.model.transformer.layers.0.attention.{name}.lora_A.weight"] = down
        file[f"base_model.model.transformer.layers.0.attention.{name}.lora_B.weight"] = up
        products[name] = up @ down
    save_file(file, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "use_rslora": True, "alpha_pattern": {"to_k": 2}}
    Path(tmp_path / "adapter_config.json").write_text(json.dumps(config))
    lora = read_lora(tmp_path, NAMES["zimage"])
    found = deltas_of(lora, "zimage")["layers.0.attention.qkv"]
    assert (found[:d] - 4 * products["to_q"]).abs().max() < 1e-5
    assert (found[d : 2 * d] - products["to_k"]).abs().max() < 1e-5
