"""Facts of the text encoder that need no reference: counts, packing, depths, causality."""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from inkstream.families.parts import QWEN3, infer_qwen3
from inkstream.families.zimage.specs import TURBO
from inkstream.nn.config import Qwen3Config, read_config
from inkstream.nn.qwen3 import Qwen3, rope, rotate
from inkstream.weights.keymap import translate

TINY = TURBO.tiny.text_encoder
FOUR_B = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "max_position_embeddings": 40960,
    "model_type": "qwen3",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "tie_word_embeddings": True,
    "vocab_size": 151936,
}
"""The published config.json of Qwen3-4B, as far as it says what the network is."""


def encoder(config: Qwen3Config = TINY, depths: tuple[int, ...] | None = None, seed: int = 0) -> Qwen3:
    model = Qwen3(config, depths).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        weight.normal_(mean=1.0 if "norm" in name else 0.0, std=0.2, generator=generator)
    return model


def prompt(length: int, seed: int = 0) -> Tensor:
    return torch.randint(TINY.vocab_size, (length,), generator=torch.Generator().manual_seed(seed))


def apart(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max())


def test_the_published_model_without_what_is_not_read_has_its_number_of_parameters():
    config = read_config(Qwen3Config, FOUR_B)
    assert config == Qwen3Config() == TURBO.text_encoder
    with torch.device("meta"):
        ours, whole = Qwen3(config), Qwen3(config, depths=(36,))
    final_norm, layer = 2560, 100_930_816
    assert sum(p.numel() for p in whole.parameters()) + final_norm == 4_022_468_096
    assert sum(p.numel() for p in ours.parameters()) == 4_022_468_096 - final_norm - layer


def test_published_files_hold_398_keys_of_which_386_are_read():
    config = Qwen3Config()
    with torch.device("meta"):
        whole = {**Qwen3(config, depths=(36,)).state_dict(), "norm.weight": torch.empty(2560)}
        ours = Qwen3(config).state_dict()
    rules = QWEN3.layouts["transformers"]
    theirs = translate(rules, whole, back=True)
    assert len(theirs) == 398
    assert all(key.startswith("model.") for key in theirs)
    read = translate(rules, {**theirs, "lm_head.weight": torch.empty(1)})
    assert read.keys() == whole.keys()
    unread = tuple(QWEN3.unread(config))
    assert [key for key in read if not key.startswith(unread)] == list(ours)
    assert len(ours) == 386
    assert infer_qwen3({name: tuple(weight.shape) for name, weight in whole.items()}) == config


@pytest.mark.parametrize("theta", [10_000.0, 5_000_000.0])
def test_the_rotary_base_is_read_where_either_generation_of_configs_writes_it(theta):
    old = {**FOUR_B, "rope_theta": theta}
    new = {key: value for key, value in FOUR_B.items() if key != "rope_theta"}
    new["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
    assert read_config(Qwen3Config, old) == read_config(Qwen3Config, new) == Qwen3Config(rope_theta=theta)


def test_only_the_layers_that_are_read_are_built():
    assert len(Qwen3(TINY).layers) == TINY.num_hidden_layers - 1
    assert len(Qwen3(TINY, depths=(1,)).layers) == 1
    assert len(Qwen3(TINY, depths=(2, 1)).layers) == 2
    assert len(Qwen3(TINY, depths=(0,)).layers) == 0
    assert not hasattr(Qwen3(TINY), "norm")


def test_states_come_side_by_side_in_the_order_asked_for():
    ids, width = prompt(9), TINY.hidden_size
    model = encoder(replace(TINY, num_hidden_layers=5), depths=(4, 0, 2))
    states = model(ids, [4, 5])
    assert states.shape == (9, 3 * width)
    for depth, state in zip(model.depths, states.split(width, dim=-1)):
        shallow = Qwen3(model.config, depths=(depth,))
        shallow.load_state_dict({name: model.state_dict()[name] for name in shallow.state_dict()})
        assert torch.equal(shallow(ids, [4, 5]), state)
    assert torch.equal(states[:, width : 2 * width], model.embed_tokens(ids))


def test_of_the_states_only_those_asked_for_are_kept():
    """With gradients off a state nobody asked for is freed as soon as the next is there."""
    model = encoder(replace(TINY, num_hidden_layers=7), depths=(2, 6))
    seen, alive = [], []

    def look(layer, args, out):
        seen.append(weakref.ref(out))
        alive.append([depth for depth, state in enumerate(seen, start=1) if state() is not None])

    for layer in model.layers:
        layer.register_forward_hook(look)
    with torch.no_grad():
        model(prompt(5), [5])
    assert alive[-1] == [2, 5, 6]  # 5 was the last layer's input


@pytest.mark.parametrize("lengths", [(3, 11, 1, 40), (7, 7, 7), (5, 5, 2, 2, 5), (64,), (1, 1)], ids=str)
def test_a_prompt_packed_with_others_equals_its_run_alone(lengths):
    model = encoder()
    prompts = [prompt(n, seed) for seed, n in enumerate(lengths)]
    packed = model(torch.cat(prompts), lengths)
    assert packed.std() > 0.5
    for ids, states in zip(prompts, packed.split(lengths)):
        assert apart(model(ids, [len(ids)]), states) <= 1e-5


def test_a_later_token_changes_no_earlier_state():
    model, ids = encoder(), prompt(12)
    changed = ids.clone()
    changed[7] = (changed[7] + 1) % TINY.vocab_size
    before, after = model(ids, [12]), model(changed, [12])
    assert apart(before[:7], after[:7]) <= 1e-6
    assert (before[7:] - after[7:]).abs().amax(dim=-1).min() > 1e-3


def test_the_beginning_of_a_prompt_equals_the_shorter_prompt():
    model, ids = encoder(), prompt(30)
    assert apart(model(ids, [30])[:13], model(ids[:13], [13])) <= 1e-5


def test_each_key_head_serves_its_own_run_of_query_heads():
    """Grouped queries equal full attention whose key heads are the grouped ones repeated in place."""
    grouped = encoder(replace(TINY, num_attention_heads=6, num_key_value_heads=2), depths=(1,))
    full = encoder(replace(grouped.config, num_key_value_heads=6), depths=(1,))
    state = grouped.state_dict()
    for name in ("layers.0.self_attn.k_proj.weight", "layers.0.self_attn.v_proj.weight"):
        state[name] = state[name].unflatten(0, (2, -1)).repeat_interleave(3, dim=0).flatten(0, 1)
    full.load_state_dict(state)
    ids = prompt(10)
    assert apart(grouped(ids, [4, 6]), full(ids, [4, 6])) <= 1e-5
    swapped = {name: w.unflatten(0, (6, -1)).roll(1, 0).flatten(0, 1) if "k_proj" in name else w
               for name, w in state.items()}  # fmt: skip
    full.load_state_dict(swapped)
    assert apart(grouped(ids, [4, 6]), full(ids, [4, 6])) > 1e-2


def test_scores_depend_on_the_distance_of_positions_alone():
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 16, generator=generator, dtype=torch.float64).expand(20, 1, 16) for _ in range(2))
    table = rope([20], 16, 100.0, torch.device("cpu"))
    scores = torch.einsum("ihe,jhe->ij", rotate(q, table).double(), rotate(k, table).double())
    for distance in range(-19, 20):
        assert scores.diagonal(distance).std(unbiased=False) < 1e-5
    assert scores[0].std() > 0.1


def test_every_prompt_counts_its_positions_from_zero():
    cos, sin = rope([3, 2], 4, 100.0, torch.device("cpu"))
    angles = torch.tensor([[p * 1.0, p * 0.1] for p in (0, 1, 2, 0, 1)]).unsqueeze(1)
    assert apart(cos, angles.cos()) <= 1e-6
    assert apart(sin, angles.sin()) <= 1e-6


def test_the_dtype_of_the_weights_is_the_dtype_of_the_states():
    assert encoder().to(torch.bfloat16)(prompt(4), [4]).dtype == torch.bfloat16
