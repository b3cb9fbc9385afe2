"""How published files pack a matrix, written here from the formats' descriptions: where each number is.

A packing takes a layer's name and its matrix (N, K) float32, and returns the tensors in the file, and the matrix that
they mean. Nothing here uses the readers that it tests.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import torch
from torch import Tensor

Packing = Callable[[str, Tensor], tuple[dict[str, Tensor], Tensor]]
"""(layer, matrix) -> ({name: tensor}, what it means)"""

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
"""The positive numbers of E2M1, by their codes (OCP Microscaling Formats v1.0, table 3)."""


def json_bytes(data: object) -> Tensor:
    return torch.tensor(list(json.dumps(data).encode()), dtype=torch.uint8)


def plain(dtype: torch.dtype) -> Packing:
    """A cast without scales."""
    return lambda layer, w: ({f"{layer}.weight": w.to(dtype)}, w.to(dtype).float())


def mark(layer: str, **said: object) -> dict[str, Tensor]:
    return {f"{layer}.comfy_quant": json_bytes(said)}


def fp8_scaled(layer: str, w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """ComfyUI's earlier fp8: one scale of the weight, one of the input."""
    scale = w.abs().max() / 448
    q = (w / scale).to(E4M3)
    one = torch.ones(())
    return {f"{layer}.weight": q, f"{layer}.scale_weight": scale, f"{layer}.scale_input": one}, q.float() * scale


def fp8_marked(layer: str, w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """ComfyUI's fp8 with format marks."""
    scale = w.abs().max() / 448
    q = (w / scale).to(E4M3)
    tensors = {f"{layer}.weight": q, f"{layer}.weight_scale": scale, f"{layer}.input_scale": torch.ones(())}
    return tensors | mark(layer, format="float8_e4m3fn"), q.float() * scale


def fp8_rows(layer: str, w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """A scale for each row, without marks."""
    scale = w.abs().amax(1, keepdim=True) / 448
    q = (w / scale).to(E4M3)
    return {f"{layer}.weight": q, f"{layer}.weight_scale": scale}, q.float() * scale


def int8_rows(layer: str, w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    scale = w.abs().amax(1, keepdim=True) / 127
    q = (w / scale).round().to(torch.int8)
    return {f"{layer}.weight": q, f"{layer}.weight_scale": scale} | mark(
        layer, format="int8_tensorwise"
    ), q.float() * scale


def regular_hadamard(size: int) -> Tensor:
    """Kronecker powers of a 4 x 4 matrix whose rows all have the same sum."""
    h = four = torch.tensor([[1.0, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]])
    while len(h) < size:
        h = torch.kron(h, four)
    return h / size**0.5


def turned(w: Tensor, size: int) -> Tensor:
    return (w.view(len(w), -1, size) @ regular_hadamard(size).T).reshape(w.shape)


def largest_turn(columns: int) -> int:
    return next(size for size in (256, 64, 16) if columns % size == 0)


def int8_convrot(layer: str, w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """int8 rows of a matrix whose runs of 256 inputs were turned."""
    size = largest_turn(w.shape[1])
    t = turned(w, size)
    scale = t.abs().amax(1, keepdim=True) / 127
    q = (t / scale).round().to(torch.int8)
    said = mark(layer, format="int8_tensorwise", convrot=True, convrot_groupsize=size)
    return {f"{layer}.weight": q, f"{layer}.weight_scale": scale} | said, turned(q.float() * scale, size)


def convrot_w4a4(layer: str, w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """4-bit integers in two's complement, the even column in the low half, turned, a scale for each row."""
    size = largest_turn(w.shape[1])
    t = turned(w, size)
    scale = t.abs().amax(1) / 7
    q = (t / scale[:, None]).round().clamp(-7, 7).int()
    packed = ((q[:, ::2] & 15) | ((q[:, 1::2] & 15) << 4)).to(torch.uint8).view(torch.int8)
    said = mark(layer, format="convrot_w4a4", convrot_groupsize=size)
    return {f"{layer}.weight": packed, f"{layer}.weight_scale": scale} | said, turned(q * scale[:, None], size)


def tiles(scales: Tensor) -> Tensor:
    """Scales (rows, groups) as the tensor cores read them: tiles of 128 x 4, filled with zeros (cuBLAS's manual)."""
    rows, groups = scales.shape
    high, wide = -(-rows // 128), -(-groups // 4)
    out = torch.zeros(high * wide * 512, dtype=torch.uint8)
    raw = scales.view(torch.uint8)
    r, g = torch.meshgrid(torch.arange(rows), torch.arange(groups), indexing="ij")
    at = (r // 128 * wide + g // 4) * 512 + r % 32 * 16 + r % 128 // 32 * 4 + g % 4
    out[at.flatten()] = raw.flatten()
    return out.view(high * 128, wide * 4)


def nvfp4(layer: str, w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """ComfyUI's NVFP4: the first of two numbers in the high half, scales of 16 numbers in tiles, and one of all."""
    whole = w.abs().max() / (448 * 6)
    groups = w.view(len(w), -1, 16)
    scale = (groups.abs().amax(-1) / 6 / whole).to(E4M3)
    by = scale.float().clamp(min=1e-9)[..., None] * whole
    codes, numbers = fp4_codes(groups / by)
    codes = codes.view(len(w), -1)
    packed = (codes[:, ::2] << 4) | codes[:, 1::2]
    tensors = {
        f"{layer}.weight": packed,
        f"{layer}.weight_scale": tiles(scale).view(E4M3),
        f"{layer}.weight_scale_2": whole,
    }
    meant = (numbers * scale.float()[..., None] * whole).view(w.shape)
    return tensors | mark(layer, format="nvfp4"), meant


def nvfp4_modelopt(layer: str, w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """NVIDIA's Model Optimizer: the first of two numbers in the low half, scales as they are."""
    whole = w.abs().max() / (448 * 6)
    groups = w.view(len(w), -1, 16)
    scale = (groups.abs().amax(-1) / 6 / whole).to(E4M3)
    codes, numbers = fp4_codes(groups / (scale.float().clamp(min=1e-9)[..., None] * whole))
    codes = codes.view(len(w), -1)
    tensors = {
        f"{layer}.weight": codes[:, ::2] | (codes[:, 1::2] << 4),
        f"{layer}.weight_scale": scale,
        f"{layer}.weight_scale_2": whole,
        f"{layer}.input_scale": torch.ones(()),
    }
    return tensors, (numbers * scale.float()[..., None] * whole).view(w.shape)


def fp4_codes(x: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest E2M1: codes with the sign as the highest bit, and the numbers."""
    code = (x.abs()[..., None] - FP4).abs().argmin(-1)
    numbers = FP4[code] * x.sign()
    return (code | ((numbers < 0).long() << 3)).to(torch.uint8), numbers


def mxfp8(layer: str, w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """ComfyUI's MXFP8: e4m3 with a power of two for 32 numbers, in tiles, as bytes."""
    scale, q, meant = _microscaled(w)
    return {f"{layer}.weight": q, f"{layer}.weight_scale": tiles(scale)} | mark(layer, format="mxfp8"), meant


def mxfp8_modelopt(layer: str, w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    scale, q, meant = _microscaled(w)
    return {f"{layer}.weight": q, f"{layer}.weight_scale": scale}, meant


def _microscaled(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    groups = w.view(len(w), -1, 32)
    exponent = (groups.abs().amax(-1) / 448).log2().ceil()
    q = (groups / 2 ** exponent[..., None]).to(E4M3)
    meant = (q.float() * 2 ** exponent[..., None]).view(w.shape)
    return (exponent + 127).to(torch.uint8), q.view(w.shape), meant


# bitsandbytes -------------------------------------------------------------------------------------------------------

NF4 = torch.tensor([
    -1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.091050036, 0.0, 0.0795803, 0.1609302,
    0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
])  # fmt: skip
FP4_BNB = torch.tensor([
    0.0, 0.005208333, 0.6666667, 1.0, 0.33333334, 0.5, 0.16666667, 0.25,
    -0.0, -0.005208333, -0.6666667, -1.0, -0.33333334, -0.5, -0.16666667, -0.25,
])  # fmt: skip


def bnb(kind: str, double: bool) -> Packing:
    """bitsandbytes' 4 bits in blocks of 64 of the flattened matrix; the first of two numbers in the high half."""
    values = NF4 if kind == "nf4" else FP4_BNB

    def pack(layer: str, w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        blocks = w.reshape(-1, 64)
        absmax = blocks.abs().amax(1)
        said: dict[str, object] = {"quant_type": kind, "blocksize": 64, "dtype": "bfloat16", "shape": list(w.shape)}
        name, own = f"{layer}.weight", {}
        if double:
            offset = absmax.mean()
            table = torch.linspace(-1, 1, 256)
            padded = torch.zeros(-(-len(absmax) // 256) * 256)
            padded[: len(absmax)] = absmax - offset
            nested = padded.view(-1, 256).abs().amax(1)
            codes = ((padded.view(-1, 256) / nested[:, None])[..., None] - table).abs().argmin(-1)
            absmax_q = codes.flatten()[: len(absmax)].to(torch.uint8)
            absmax = torch.stack([table[int(c)] * nested[i // 256] + offset for i, c in enumerate(absmax_q)])
            own = {f"{name}.nested_absmax": nested, f"{name}.nested_quant_map": table}
            said |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": float(offset)}
        codes = ((blocks / absmax[:, None])[..., None] - values).abs().argmin(-1)
        meant = (values[codes] * absmax[:, None]).view(w.shape)
        codes = codes.flatten().to(torch.uint8)
        tensors = {
            name: ((codes[::2] << 4) | codes[1::2]).view(-1, 1),
            f"{name}.absmax": absmax_q if double else absmax,
            f"{name}.quant_map": values,
            f"{name}.quant_state.bitsandbytes__{kind}": json_bytes(said),
        }
        return tensors | own, meant

    return pack


def bnb_int8(layer: str, w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """LLM.int8: rows scaled to 127, beside the largest magnitude of each."""
    most = w.abs().amax(1)
    q = (w / most[:, None] * 127).round().to(torch.int8)
    own = {f"{layer}.weight": q, f"{layer}.SCB": most, f"{layer}.weight_format": torch.tensor(0, dtype=torch.uint8)}
    return own, q.float() * most[:, None] / 127


# nunchaku -----------------------------------------------------------------------------------------------------------


def place_code(n: Tensor, k: Tensor, columns: int) -> Tensor:
    """The half byte that holds output n, input k, from the loops of nunchaku's W4 layout.

    Tiles of 128 outputs x 64 inputs; in a tile 8 packs of 16 outputs; in a pack 8 x 4 lanes with 4 words of 32 bits; a
    lane has the outputs lane and lane + 8, and the inputs from 8 * lane and from 32 + 8 * lane, 8 to a word.
    """
    pack, half, lane_n = n % 128 // 16, n % 16 // 8, n % 8
    deep, lane_k, nibble = k % 64 // 32, k % 32 // 8, k % 8
    words = ((n // 128 * (columns // 64) + k // 64) * 8 + pack) * 32 + lane_n * 4 + lane_k
    return (words * 4 + half * 2 + deep) * 8 + nibble


def place_scale(n: Tensor, group: Tensor, groups: int) -> Tensor:
    """Where a 16-bit scale is: a lane of 4 loads the outputs 2i, 2i + 1, 2i + 8, 2i + 9 of a run of 16."""
    run, rest = n % 128 // 16, n % 16
    return (n // 128 * groups + group) * 128 + run * 16 + rest % 8 // 2 * 4 + rest // 8 * 2 + rest % 2


def place_small_scale(n: Tensor, group: Tensor, groups: int) -> Tensor:
    """Where an 8-bit scale is: lane 4l + p loads the outputs 8p + l, +32, +64, +96, four groups of each."""
    lane, block = n % 8 * 4 + n % 32 // 8, n % 128 // 32
    return ((n // 128 * (groups // 4) + group // 4) * 32 + lane) * 16 + block * 4 + group % 4


def place_low_rank(n: Tensor, k: Tensor, packs: int, rank_outer: bool) -> Tensor:
    """Where a number of a low-rank matrix is: packs of 16 x 16, in each 8 x 4 lanes with 8 numbers.

    n, k: the row and column of the fragment that tensor cores read. rank_outer: packs of n change fastest (down).
    """
    pack_n, pack_k = n // 16, k // 16
    pack = pack_k * packs + pack_n if rank_outer else pack_n * packs + pack_k
    inside_n, inside_k = n % 16, k % 16
    lane = inside_n % 8 * 4 + inside_k % 8 // 2
    return ((pack * 32 + lane) * 2 + inside_n // 8) * 4 + inside_k // 8 * 2 + inside_k % 2


def scatter(values: Tensor, place: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """A matrix's numbers, each at its place."""
    n, k = torch.meshgrid(*(torch.arange(size) for size in values.shape), indexing="ij")
    flat = torch.empty(values.numel(), dtype=values.dtype)
    flat[place(n, k).flatten()] = values.flatten()
    return flat


def packed_vector(v: Tensor) -> Tensor:
    return scatter(v.view(-1, 1), lambda n, g: place_scale(n, g, 1))


def svdquant(
    floats: bool, later: bool = False, rank: int = 16, after_gelu: Callable[[str], bool] = lambda layer: False
) -> Packing:
    """A quantised matrix with smoothed inputs, and a low-rank branch. later: the names of nunchaku's later files.

    The bias is packed beside it, by `svdquant_bias`.
    """
    names = ("smooth_factor", "proj_down", "proj_up") if later else ("smooth", "lora_down", "lora_up")

    def pack(layer: str, w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        rows, columns = w.shape
        generator = torch.Generator().manual_seed(rows + columns)
        smooth = (torch.rand(columns, generator=generator) + 0.5).bfloat16()
        down = (torch.randn(rank, columns, generator=generator) * 0.02).bfloat16()
        up = (torch.randn(rows, rank, generator=generator) * 0.02).bfloat16()
        left = (w - up.float() @ down.float()) * smooth.float()
        size = 16 if floats else 64
        groups = left.view(rows, -1, size)
        if floats:
            channel = (torch.rand(rows, generator=generator) + 0.5).bfloat16()
            whole = torch.tensor(0.01)
            by = channel.float()[:, None] * whole
            scale = (groups.abs().amax(-1) / 6 / by).to(E4M3)
            codes, numbers = fp4_codes(groups / (scale.float() * by)[..., None])
            residual = (numbers * (scale.float() * by)[..., None]).view(w.shape)
            flat = scatter(scale.view(torch.uint8), lambda n, g: place_small_scale(n, g, columns // size))
            own = {"wscales": flat.view(E4M3).view(columns // size, rows), "wcscales": packed_vector(channel)}
            own["wtscale"] = whole
        else:
            scale = (groups.abs().amax(-1) / 7).bfloat16()
            numbers = (groups / scale.float()[..., None]).round().clamp(-8, 7)
            codes = (numbers.int() & 15).to(torch.uint8)
            residual = (numbers * scale.float()[..., None]).view(w.shape)
            flat = scatter(scale, lambda n, g: place_scale(n, g, columns // size))
            own = {"wscales": flat.view(columns // size, rows)}
        halves = scatter(codes.view(w.shape), lambda n, k: place_code(n, k, columns))
        own["qweight"] = (halves[::2] | (halves[1::2] << 4)).view(torch.int8).view(rows, columns // 2)
        own[names[0]] = packed_vector(smooth)
        own[names[0] + "_orig"] = packed_vector(smooth)
        # down: fragments are (rank, inputs), stored as (inputs, rank); up: fragments are (outputs, rank)
        own[names[1]] = scatter(down, lambda r, c: place_low_rank(r, c, rank // 16, True)).view(columns, rank)
        own[names[2]] = scatter(up, lambda c, r: place_low_rank(c, r, rank // 16, False)).view(rows, rank)
        smoothed = residual / smooth.float()
        bias = -0.171875 * smoothed.sum(1) if after_gelu(layer) and not floats else torch.zeros(rows)
        own["bias"] = packed_vector(bias.bfloat16())  # what makes the layer's own bias zero
        return {f"{layer}.{name}": tensor for name, tensor in own.items()}, smoothed + up.float() @ down.float()

    return pack


def awq(layer: str, w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """nunchaku's modulations: a feature's 3 or 6 rows together, 4 bits with scale and zero, and 1 added to scales."""
    rows, columns = w.shape
    kinds = rows // columns
    mixed = torch.stack([w[s * columns + d] for d in range(columns) for s in range(kinds)])
    groups = mixed.view(rows, -1, 64)
    scale = (groups.abs().amax(-1) / 7).bfloat16()
    zero = (-7 * scale.float()).bfloat16()
    q = ((groups - zero.float()[..., None]) / scale.float()[..., None]).round().clamp(0, 15).int().view(rows, columns)
    words = torch.zeros(rows // 4 * columns, dtype=torch.int32)
    n, k = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    at = ((n // 4 * (columns // 64) + k // 64) * 4 + n % 4) * 16 + k % 64 // 32 * 8 + k % 8
    words.index_add_(0, at.flatten(), (q << 4 * (k % 32 // 8)).int().flatten())
    words = words.view(rows // 4, columns)
    qweight = torch.where(words > 32767, words - 65536, words).to(torch.int16).view(torch.int32)
    fill = -(-(columns // 64) // 16) * 16
    padded = [torch.zeros(fill, rows, dtype=torch.bfloat16) for _ in range(2)]
    padded[0][: columns // 64], padded[1][: columns // 64] = scale.t(), zero.t()
    bias = torch.zeros(columns, kinds)
    bias[:, 1] += 1
    if kinds == 6:
        bias[:, 4] += 1
    meant = (q.view(rows, -1, 64) * scale.float()[..., None] + zero.float()[..., None]).view(rows, columns)
    back = torch.stack([meant[d * kinds + s] for s in range(kinds) for d in range(columns)])
    own = {"qweight": qweight, "wscales": padded[0], "wzeros": padded[1], "bias": bias.flatten().bfloat16()}
    return {f"{layer}.{name}": tensor for name, tensor in own.items()}, back
