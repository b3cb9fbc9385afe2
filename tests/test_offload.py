"""Weights that live at home and visit the device: what comes out is the same, and nothing stays behind."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from inkstream.nn.offload import Guest, Streamed, mapped_ranges, park
from inkstream.nn.stack import Blocks, visits
from inkstream.weights.files import read_state, write_state

CPU = torch.device("cpu")
WIDTH = 192


class Block(nn.Module):
    apart = ("modulation",)

    def __init__(self):
        super().__init__()
        self.modulation = nn.Linear(WIDTH, WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x):
        return x + self.down(self.up(x).tanh())


@pytest.fixture
def stack():
    torch.manual_seed(3)
    return Blocks(Block() for _ in range(4)).requires_grad_(False)


def run(blocks, x):
    scales = [block.modulation(x) for block in blocks]
    return send(blocks, x, lambda i, block, x: block(x) * scales[i])


def send(blocks, x, call):
    for i, block in visits(blocks):
        x = call(i, block, x)
    return x


def mapped(blocks, path, dtype):
    """The same blocks, their matrices views of a mapped file in another type."""
    write_state(path, {key: tensor.to(dtype) for key, tensor in blocks.state_dict().items()})
    state = read_state(path)
    other = Blocks(Block() for _ in range(len(blocks))).requires_grad_(False)
    other.load_state_dict({k: t.float() if t.ndim == 1 else t for k, t in state.items()}, assign=True)
    return other


def test_streamed_blocks_give_what_resident_ones_give(stack, tmp_path):
    x = torch.randn(5, WIDTH)
    streamed = mapped(stack, tmp_path / "stack.safetensors", torch.bfloat16)
    for block in stack:
        for name in ("up", "down", "modulation"):
            weight = block.get_submodule(name).weight
            weight.copy_(weight.to(torch.bfloat16))
            if name != "down":
                bias = block.get_submodule(name).bias
                bias.copy_(bias.to(torch.bfloat16))
    streamed.stream(Streamed(streamed, CPU, torch.float32))
    for _ in range(2):
        assert torch.equal(run(streamed, x), run(stack, x))


def test_only_one_block_is_on_the_device(stack, tmp_path):
    blocks = mapped(stack, tmp_path / "stack.safetensors", torch.bfloat16)
    blocks.stream(Streamed(blocks, CPU, torch.float32))
    assert blocks.streamed.nbytes == 4 * 4 * WIDTH * WIDTH
    seen = []

    def call(i, block, x):
        seen.append([other.up.weight.dtype for other in blocks])
        return block(x)

    send(blocks, torch.randn(2, WIDTH), call)
    bf16, fp32 = torch.bfloat16, torch.float32
    assert seen == [[fp32 if i == j else bf16 for j in range(4)] for i in range(4)]
    assert all(weight.dtype == bf16 for block in blocks for weight in block.parameters() if weight.ndim > 1)


def test_what_a_block_is_called_apart_for_visits_on_its_own(stack, tmp_path):
    blocks = mapped(stack, tmp_path / "stack.safetensors", torch.bfloat16)
    blocks.stream(Streamed(blocks, CPU, torch.float32))
    assert blocks[0].modulation(torch.ones(1, WIDTH)).dtype == torch.float32
    assert blocks[0].modulation.weight.dtype == torch.bfloat16
    with pytest.raises(RuntimeError):
        blocks[0].modulation(torch.ones(1, WIDTH + 1))
    assert blocks[0].modulation.weight.dtype == torch.bfloat16


@pytest.mark.skipif(not mapped_ranges(), reason="the system does not say what is mapped")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_pages_of_a_mapped_file_leave_memory_after_the_visit(stack, tmp_path, dtype, resident):
    path = tmp_path / "stack.safetensors"
    blocks = mapped(stack, path, dtype)
    whole = sum(weight.nbytes for block in blocks for weight in block.parameters() if weight.ndim > 1)
    x = torch.randn(2, WIDTH)
    expected = run(mapped(stack, tmp_path / "other.safetensors", dtype).float(), x)
    assert sum(float(weight.sum()) for block in blocks for weight in block.parameters())
    assert resident(path) >= whole  # all was touched
    blocks.stream(Streamed(blocks, CPU, torch.float32))
    assert torch.equal(run(blocks, x), expected)
    assert resident(path) < whole / 4
    assert torch.equal(run(blocks, x), expected)


def test_weights_that_are_no_views_of_a_file_are_never_dropped(stack):
    x = torch.randn(2, WIDTH)
    expected = run(stack, x)
    stack.stream(Streamed(stack, CPU, torch.float32))
    assert stack.streamed.nbytes == 0  # they are on the device already
    assert torch.equal(run(stack, x), expected)
    assert torch.equal(run(stack, x), expected)


def test_a_parked_part_goes_home_even_when_it_fails(stack, tmp_path):
    part = mapped(stack, tmp_path / "part.safetensors", torch.bfloat16)
    guest = Guest(part, CPU, torch.float32)
    with pytest.raises(RuntimeError, match="shapes"), park(guest):
        part[0](torch.ones(1, WIDTH + 1))
    with park(guest):
        assert part[0].up.weight.dtype == torch.float32
    assert part[0].up.weight.dtype == torch.bfloat16


def test_packed_bytes_stay_packed(stack):
    stack[0].register_buffer("bytes", torch.zeros(4, 8, dtype=torch.uint8))
    guest = Guest(stack[0], CPU, torch.bfloat16)
    with park(guest):
        assert stack[0].bytes.dtype == torch.uint8
        assert stack[0].up.weight.dtype == torch.bfloat16


def test_a_stopped_run_leaves_every_block_at_home(stack, tmp_path):
    blocks = mapped(stack, tmp_path / "stack.safetensors", torch.bfloat16)
    blocks.stream(Streamed(blocks, CPU, torch.float32))

    def call(i, block, x):
        if i == 2:
            raise KeyboardInterrupt
        return block(x)

    with pytest.raises(KeyboardInterrupt):
        send(blocks, torch.randn(2, WIDTH), call)
    assert all(block.up.weight.dtype == torch.bfloat16 for block in blocks)
