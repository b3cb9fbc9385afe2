"""Adapters written by LyCORIS, PEFT and diffusers change our models as they change the reference's, and the reverse."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import diffusers
import peft
import pytest
import torch
from lycoris import LycorisNetwork, create_lycoris
from safetensors.torch import load_file
from torch import Tensor, nn

from inkstream.families import adapter_names, family_of
from inkstream.families.flux1.specs import DEV
from inkstream.families.flux2.specs import KLEIN_4B
from inkstream.families.zimage.specs import TURBO
from inkstream.types import Spec
from inkstream.weights.keymap import translate
from inkstream.weights.lora.changes import LayerChange, Lora, LowRank, Part
from inkstream.weights.lora.factors import Dora
from inkstream.weights.lora.names import Names
from inkstream.weights.lora.read import read_lora
from inkstream.weights.lora.rotations import peft_boft, turned
from inkstream.weights.lora.write import write_lora

SPECS = {"zimage": TURBO.tiny, "flux1": DEV.tiny, "flux2": KLEIN_4B.tiny}
NAMES = {family: adapter_names(spec) for family, spec in SPECS.items()}
BUILT: dict[str, type[nn.Module]] = {
    "zimage": diffusers.ZImageTransformer2DModel,
    "flux1": diffusers.FluxTransformer2DModel,
    "flux2": diffusers.Flux2Transformer2DModel,
}


def build(spec: Spec) -> nn.Module:
    """The reference's transformer with random weights."""
    sizes = family_of(spec.family).documents(spec)["transformer/config.json"]
    torch.manual_seed(0)
    model = BUILT[spec.family](**{key: value for key, value in sizes.items() if not key.startswith("_")})
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.2)
    return model.eval().requires_grad_(False)


def ours(family: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    translated = translate(family_of(family).parts["transformer"].layouts["diffusers"], state)
    return {name: tensor for name, tensor in translated.items() if isinstance(tensor, Tensor)}


def merged(lora: Lora, weights: Mapping[str, Tensor], strength: float = 1.0) -> dict[str, Tensor]:
    """Our weights with an adapter added."""
    changed = {name: weight.clone() for name, weight in weights.items()}
    for path, layer in lora.layers.items():
        weight = weights[f"{path}.weight"]
        for part in layer.parts:
            changed[f"{path}.weight"][part.rows] += strength * part.change.delta(weight[part.rows])
        if layer.bias is not None:
            changed[f"{path}.bias"] += strength * layer.bias
    return changed


def agree(
    a: Mapping[str, Tensor], b: Mapping[str, Tensor], changed: Mapping[str, Tensor], within: float = 1e-5
) -> None:
    """Both are the same, and not the unchanged ones. Weights are of size 1; PEFT and LyCORIS sum in other orders."""
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name] - b[name]).abs().max() <= 1e-6, name
    assert any(not torch.equal(a[name], changed[name]) for name in a)


def as_layer(layer: nn.Module, inputs: int) -> dict[str, Tensor]:
    """The weight and bias of a layer, by what it does to the unit vectors and to zero."""
    bias = layer(torch.zeros(1, inputs))[0]
    found = {"weight": (layer(torch.eye(inputs)) - bias).T}
    return found | ({"bias": bias} if bias.any() else {})


LYCORIS = {
    "LoRA": {"algo": "lora"},
    "rsLoRA": {"algo": "lora", "rs_lora": True},
    "DoRA": {"algo": "lora", "dora_wd": True},
    "DoRA of columns": {"algo": "lora", "dora_wd": True, "wd_on_output": False},
    "LoHa": {"algo": "loha"},
    "DoRA of LoHa": {"algo": "loha", "dora_wd": True},
    "LoKr": {"algo": "lokr", "factor": 4},
    "LoKr with two low-rank factors": {"algo": "lokr", "factor": 16, "linear_dim": 2, "decompose_both": True},
    "LoKr of full factors": {"algo": "lokr", "factor": 8, "full_matrix": True},
    "DoRA of LoKr": {"algo": "lokr", "factor": 4, "dora_wd": True},
    "OFT": {"algo": "diag-oft", "linear_dim": 8},
    "OFT with a limit and scales": {"algo": "diag-oft", "linear_dim": 8, "constraint": 0.004, "rescaled": True},
    "BOFT": {"algo": "boft", "linear_dim": 8},
    "BOFT with a limit and scales": {"algo": "boft", "linear_dim": 4, "constraint": 0.004, "rescaled": True},
    "IA3": {"algo": "ia3"},
    "IA3 of inputs": {"algo": "ia3", "train_on_input": True},
    "GLoRA": {"algo": "glora"},
    "full": {"algo": "full"},
}


@pytest.mark.parametrize("family", SPECS)
@pytest.mark.parametrize("kind", LYCORIS)
def test_every_algebra_of_lycoris_changes_the_weights_as_its_own_layers_do(family, kind, tmp_path):
    model = build(SPECS[family])
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    LycorisNetwork.apply_preset({"enable_conv": False, "target_module": [], "target_name": [".*"]})
    linear = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    if "boft" in LYCORIS[kind]["algo"]:
        LycorisNetwork.apply_preset({"target_name": [r".*(to_q|to_k|to_v|to_out\.0)$"]})
    network = create_lycoris(model, 1.0, **{"linear_dim": 4, "linear_alpha": 2, **LYCORIS[kind]})
    generator = torch.Generator().manual_seed(1)
    size = 0.4 if "LoHa" in kind or "LoKr" in kind else 0.1  # the product of four small factors is smaller
    for name, parameter in (item for own in network.loras for item in own.named_parameters()):
        around = parameter.detach() if "dora_scale" in name or "rescale" in name else 0.0
        parameter.data = around + size * torch.randn(parameter.shape, generator=generator)
    network.apply_to()
    network.save_weights(str(tmp_path / "a.safetensors"), torch.float32, {})
    after = dict(before)
    with torch.no_grad():
        for name, layer in linear.items():
            after |= {f"{name}.{part}": value for part, value in as_layer(layer, layer.in_features).items()}
    lora = read_lora(tmp_path / "a.safetensors", NAMES[family])
    assert lora.report.dialects == ("lycoris",)
    assert not lora.report.unmatched
    assert lora.report.algebras == (re.split(" with| of columns| of full| of inputs", kind.removeprefix("rs"))[0],)
    theirs, plain = ours(family, after), ours(family, before)
    agree(merged(lora, plain), theirs, plain)
    half = {name: plain[name] + 0.5 * (theirs[name] - plain[name]) for name in plain}
    agree(merged(lora, plain, 0.5), half, plain)


ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "linear", "proj_out"]
PEFT: dict[str, Callable[[], peft.PeftConfig]] = {
    "LoRA": lambda: peft.LoraConfig(r=4, lora_alpha=2, target_modules=ATTENTION),
    "LoRA with ranks and alphas of layers": lambda: peft.LoraConfig(
        r=4,
        lora_alpha=2,
        target_modules=ATTENTION,
        rank_pattern={"to_q": 2, r".*1\.att[a-z]*\.to_k": 3},
        alpha_pattern={"to_q": 7, "to_v": 1},
    ),
    "LoRA of rank-stabilised scale": lambda: peft.LoraConfig(
        r=4, lora_alpha=2, use_rslora=True, target_modules=ATTENTION
    ),
    "LoRA with biases": lambda: peft.LoraConfig(r=4, lora_alpha=2, lora_bias=True, target_modules=["linear"]),
    "DoRA": lambda: peft.LoraConfig(r=4, lora_alpha=2, use_dora=True, target_modules=ATTENTION),
    "LoHa": lambda: peft.LoHaConfig(r=4, alpha=2, target_modules=ATTENTION),
    "LoKr": lambda: peft.LoKrConfig(r=4, alpha=2, decompose_factor=4, target_modules=ATTENTION),
    "LoKr of full factors": lambda: peft.LoKrConfig(r=64, alpha=32, decompose_factor=4, target_modules=ATTENTION),
    "OFT of inputs": lambda: peft.OFTConfig(oft_block_size=8, target_modules=ATTENTION),
    "OFT of inputs with three terms": lambda: peft.OFTConfig(
        oft_block_size=8, num_cayley_neumann_terms=3, target_modules=ATTENTION
    ),
    "OFT of inputs with the exact transform": lambda: peft.OFTConfig(
        oft_block_size=8, use_cayley_neumann=False, target_modules=ATTENTION
    ),
    "OFT of inputs with a limit and one block": lambda: peft.OFTConfig(
        oft_block_size=8, coft=True, eps=1e-1, block_share=True, target_modules=ATTENTION
    ),
    "BOFT of inputs": lambda: peft.BOFTConfig(boft_block_size=8, target_modules=ATTENTION),
    "IA3": lambda: peft.IA3Config(target_modules=["to_q", "to_k", "w2"], feedforward_modules=["w2"]),
}


IGNORED = {("LoRA with biases", "flux2"), ("IA3", "flux1"), ("IA3", "flux2")}
"""Layers of FLUX.2 have no biases, which PEFT then cannot merge. Its IA3 scales biases of FLUX.1 too."""


@pytest.mark.filterwarnings(
    "ignore:Failed to load the CUDA",
    "ignore:Setting boft_n_butterfly_factor",
    "ignore:Adapter 'default'. . LoRA tensor",
)
@pytest.mark.parametrize(
    ("kind", "family"), [(kind, family) for kind in PEFT for family in SPECS if (kind, family) not in IGNORED]
)
def test_every_algebra_of_peft_changes_the_weights_as_its_own_merge_does(kind, family, tmp_path):
    model = build(SPECS[family])
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    adapted = peft.get_peft_model(model, PEFT[kind]())
    generator = torch.Generator().manual_seed(1)
    size = 0.4 if "LoHa" in kind or "LoKr" in kind else 0.1
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            around = parameter.detach() if any(word in name for word in ("magnitude", "boft_s", "ia3_l")) else 0.0
            parameter.data = around + size * torch.randn(parameter.shape, generator=generator)
    adapted.save_pretrained(str(tmp_path))
    after = adapted.merge_and_unload().state_dict()
    lora = read_lora(tmp_path, NAMES[family])
    assert lora.report.dialects == ("peft",)
    assert not lora.report.unmatched
    assert lora.report.algebras == (
        kind.partition(" with")[0].partition(" of rank")[0].removesuffix(" of full factors"),
    )
    theirs, plain = ours(family, after), ours(family, before)
    agree(merged(lora, plain), {name: theirs[name] for name in plain}, plain)


@pytest.mark.filterwarnings("ignore:Failed to load the CUDA", "ignore:Setting boft_n_butterfly_factor")
def test_the_butterfly_of_boft_is_pefts():
    """PEFT computes butterflies of more than one stage on GPUs alone; its permutations are taken from its own code."""
    layer = peft.tuners.boft.layer.Linear(nn.Linear(32, 8), "default", peft.BOFTConfig(boft_block_size=4))
    blocks = 0.3 * torch.randn(3, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    rotation = torch.eye(32)
    for i, stage in enumerate(blocks):
        order = layer.perm2mat(layer.block_butterfly_perm(32, 8 // 2**i, 2, 2))
        rotation = order @ torch.block_diag(*layer.cayley_batch(stage)) @ order.T @ rotation
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    assert (turned(peft_boft(blocks), x) + x - x @ rotation.T).abs().max() < 1e-5


PIPELINES: dict[str, Callable[[nn.Module], Any]] = {
    "zimage": lambda model: diffusers.ZImagePipeline(None, None, None, None, model),
    "flux1": lambda model: diffusers.FluxPipeline(None, None, None, None, None, None, model),
    "flux2": lambda model: diffusers.Flux2KleinPipeline(None, None, None, None, model),
}


def low_rank(names: Names, dora: bool = False, only: str = "") -> Lora:
    """A LoRA or a DoRA of scale 0.7 of each layer whose path matches `only`."""
    generator = torch.Generator().manual_seed(0)
    layers = {}
    for path, (height, width) in names.layers.items():
        if not re.match(only, path):
            continue
        down, up = torch.randn(4, width, generator=generator), torch.randn(height, 4, generator=generator)
        change = LowRank(0.3 * down, 0.3 * up, 0.7)
        magnitude = 1 + 0.3 * torch.rand(height, 1, generator=generator)
        layers[path] = LayerChange((Part(Dora(change, magnitude) if dora else change),))
    return Lora(layers)


LOADED = [
    ("diffusers", "", False),
    ("diffusers", "", True),
    ("comfyui", {"zimage": "", "flux2": r"(?!final_layer\.adaLN)"}, False),
    ("kohya", {"zimage": "", "flux1": "double_blocks", "flux2": r"(?!final_layer\.adaLN|.*_modulation)"}, False),
]
"""Dialect, the layers that diffusers converts from it by family, DoRA.

It has no converter for FLUX.1's comfyui, does not swap FLUX.2's last modulation, leaves out FLUX.2's others, and cuts
kohya's FLUX.1 at the rows of the full model.
"""


@pytest.mark.parametrize(
    ("dialect", "only", "dora", "family"),
    [
        (dialect, only if isinstance(only, str) else only[family], dora, family)
        for dialect, only, dora in LOADED
        for family in SPECS
        if isinstance(only, str) or family in only
    ],
)
def test_diffusers_loads_what_we_write_and_changes_its_model_as_we_change_ours(dialect, only, dora, family, tmp_path):
    model = build(SPECS[family])
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    lora = low_rank(NAMES[family], dora, only)
    path = write_lora(tmp_path / "a.safetensors", lora, NAMES[family], dialect)
    pipeline = PIPELINES[family](model)
    pipeline.load_lora_weights(str(path.parent), weight_name=path.name)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    theirs, plain = ours(family, model.state_dict()), ours(family, before)
    agree(merged(lora, plain), theirs, plain)


@pytest.mark.parametrize("family", SPECS)
@pytest.mark.parametrize("dora", [False, True])
def test_peft_loads_the_folder_that_we_write(family, dora, tmp_path):
    model = build(SPECS[family])
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    lora = low_rank(NAMES[family], dora)
    write_lora(tmp_path, lora, NAMES[family], "peft")
    after = peft.PeftModel.from_pretrained(model, str(tmp_path)).merge_and_unload().state_dict()
    theirs, plain = ours(family, after), ours(family, before)
    agree(merged(lora, plain), {name: theirs[name] for name in plain}, plain)


@pytest.mark.parametrize("family", SPECS)
@pytest.mark.parametrize("kind", ["DoRA of columns", "LoHa", "LoKr", "OFT with a limit and scales", "IA3", "GLoRA"])
def test_what_we_write_for_lycoris_is_what_it_wrote(family, kind, tmp_path):
    """A file of LyCORIS is read and written again: each of its tensors comes back, but for those of whole fused layers.

    FLUX's and Z-Image's QKV are three layers there and one here.
    """
    model = build(SPECS[family])
    LycorisNetwork.apply_preset({"enable_conv": False, "target_module": [], "target_name": [".*"]})
    network = create_lycoris(model, 1.0, **{"linear_dim": 4, "linear_alpha": 2, **LYCORIS[kind]})
    generator = torch.Generator().manual_seed(1)
    for parameter in (item for own in network.loras for item in own.parameters()):
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    network.apply_to()
    network.save_weights(str(tmp_path / "theirs.safetensors"), torch.float32, {})
    lora = read_lora(tmp_path / "theirs.safetensors", NAMES[family])
    swapped = lora.layers.pop("final_layer.adaLN_modulation.1", None) if family != "zimage" else None  # not exact
    write_lora(tmp_path / "ours.safetensors", lora, NAMES[family], "lycoris")
    theirs, written = load_file(tmp_path / "theirs.safetensors"), load_file(tmp_path / "ours.safetensors")
    left_out = {key for key in theirs if swapped is not None and key.startswith("lycoris_norm_out")}
    assert theirs.keys() - left_out == written.keys()
    for key, tensor in written.items():
        assert torch.allclose(tensor.flatten(), theirs[key].float().flatten(), atol=1e-6), key
