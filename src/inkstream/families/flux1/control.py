"""FLUX.1's ControlNets: InstantX's and Shakker's (also Union, Union-Pro 1 and 2) and XLabs' (versions 1 to 3).

A net is a small FLUX.1 with embedders of its own. It reads the noisy picture, the time, the prompt and a control
picture, and after each of its blocks a linear layer makes a residual for the model's blocks. The two kinds differ in
how they see the control picture, by its latents or by convolutions, and in how a few residuals serve many blocks.
Sources: diffusers' FluxControlNetModel; XLabs' x-flux.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor, nn

from inkstream.families import Part, Pictures, Shapes
from inkstream.families.flux1.keys import DIFFUSERS, SINGLE_FILE
from inkstream.families.flux1.model import MLP_RATIO, PATCH, THETA, positions
from inkstream.families.flux1.specs import DEV, Flux1Config
from inkstream.families.nets import CONTROL_MODES
from inkstream.families.parts import latents_to_follow, to_pixels
from inkstream.nn.around import Around
from inkstream.nn.around.residuals import Hints
from inkstream.nn.flux import (
    FREQUENCIES,
    DoubleBlock,
    Embedder,
    Modulation,
    Packing,
    Prepared,
    SingleBlock,
    embed_guidance,
    foresee,
    modulation_of,
    patchify,
    weave,
)
from inkstream.nn.forward import ANY, PLAIN, Forward, Rows, Sample
from inkstream.nn.linear import linear
from inkstream.nn.offload import where_it_computes
from inkstream.nn.rope import rope
from inkstream.nn.stack import Blocks, visits
from inkstream.types import Conditioning, ControlUse, InputError
from inkstream.weights.keymap import rename

CONVOLUTIONS = 8
"""Of an XLabs net: before it, after each of them but the last a SiLU, and every other one halves the picture."""


@dataclass(frozen=True)
class ControlConfig:
    """Sizes of a control net, which its weights tell. Names are those of the published config.json."""

    in_channels: int = 64
    num_layers: int = 5
    num_single_layers: int = 10
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 768
    guidance_embeds: bool = True
    num_mode: int | None = None
    conditioning_embedding_channels: int | None = None  # of the convolutions of an XLabs net
    control_channels: int = 64  # of a patch of what the net sees of the control picture

    @property
    def dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim


class FluxControlNet(nn.Module):
    """A control net. Build it on meta, then assign the weights. See `families.ControlNet` for its contract."""

    def __init__(self, config: ControlConfig):
        super().__init__()
        self.config = c = config
        self.img_in = nn.Linear(c.in_channels, c.dim)
        self.txt_in = nn.Linear(c.joint_attention_dim, c.dim)
        self.time_in = Embedder(FREQUENCIES, c.dim, bias=True)
        self.vector_in = Embedder(c.pooled_projection_dim, c.dim, bias=True)
        self.guidance_in = Embedder(FREQUENCIES, c.dim, bias=True) if c.guidance_embeds else None
        sizes = (c.dim, c.num_attention_heads, MLP_RATIO * c.dim)
        self.double_blocks = Blocks(
            DoubleBlock(*sizes, gated=False, bias=True, modulated=True) for _ in range(c.num_layers)
        )
        self.single_blocks = Blocks(
            SingleBlock(*sizes, gated=False, bias=True, modulated=True) for _ in range(c.num_single_layers)
        )
        self.controlnet_x_embedder = nn.Linear(c.control_channels, c.dim)
        self.controlnet_blocks = Blocks(nn.Linear(c.dim, c.dim) for _ in range(c.num_layers))
        self.controlnet_single_blocks = Blocks(nn.Linear(c.dim, c.dim) for _ in range(c.num_single_layers))
        if c.num_mode is not None:
            self.controlnet_mode_embedder = nn.Embedding(c.num_mode, c.dim)
        if c.conditioning_embedding_channels is not None:
            self.input_hint_block = convolutions(c.conditioning_embedding_channels)

    @staticmethod
    def sizes_for(transformer: Any) -> ControlConfig:
        """Six double blocks at most and no mode, as Shakker's Union-Pro-2.0."""
        c: Flux1Config = transformer
        return ControlConfig(
            in_channels=c.patch_channels,
            num_layers=min(c.num_layers, 6),
            num_single_layers=0,
            attention_head_dim=c.attention_head_dim,
            num_attention_heads=c.num_attention_heads,
            joint_attention_dim=c.joint_attention_dim,
            pooled_projection_dim=c.pooled_projection_dim,
            guidance_embeds=c.guidance_embeds,
            control_channels=c.patch_channels,
        )

    @torch.no_grad()
    def begin(self, family: Any) -> None:
        model = family.transformer
        for name in ("txt_in", "time_in", "vector_in", "guidance_in", "double_blocks", "single_blocks"):
            own, theirs = getattr(self, name), getattr(model, name)
            if own is not None and theirs is not None:
                kept = own.state_dict()
                own.load_state_dict({key: weight for key, weight in theirs.state_dict().items() if key in kept})
        self.img_in.weight.copy_(model.img_in.weight[:, : self.config.in_channels])
        self.img_in.bias.copy_(model.img_in.bias)
        for layer in (self.controlnet_x_embedder, *self.controlnet_blocks, *self.controlnet_single_blocks):
            nn.init.zeros_(cast(nn.Linear, layer).weight)
            nn.init.zeros_(cast(nn.Linear, layer).bias)

    def check(self, family: Any, use: ControlUse) -> None:
        ours, theirs = self.config, cast(Flux1Config, family.transformer.config)
        for name in ("dim", "num_attention_heads", "joint_attention_dim", "pooled_projection_dim"):
            if (a := getattr(ours, name)) != (b := getattr(theirs, name)):
                raise InputError(
                    f"control net {use.path} has {name} {a}, {family.spec.name} has {b}: take one made for this model"
                )
        if ours.conditioning_embedding_channels is None and ours.control_channels != theirs.patch_channels:
            raise InputError(
                f"control net {use.path} reads {ours.control_channels} channels of a control picture, "
                f"{theirs.patch_channels} are known here: take a net without a mask"
            )
        self._mode(use)

    def _mode(self, use: ControlUse) -> int | None:
        """The number of a use's mode, None for a net without modes. Raises InputError if it has no such mode."""
        count = self.config.num_mode
        if count is None:
            if use.mode:
                raise InputError(f"control net {use.path} has no modes: leave out #{use.mode}")
            return None
        known = f"name what the control picture shows: #{', #'.join(CONTROL_MODES[:count])}"
        if not use.mode:
            raise InputError(f"control net {use.path} has modes: {known}")
        number = (
            int(use.mode)
            if use.mode.isdigit()
            else CONTROL_MODES.index(use.mode)
            if use.mode in CONTROL_MODES
            else count
        )
        if number >= count:
            raise InputError(f"control net {use.path} has no mode {use.mode}: {known}")
        return number

    def look(self, family: Any, pictures: Pictures) -> Tensor:
        """(C, h, w): latents of the control picture, or features of its pixels at the size of latents."""
        if self.config.conditioning_embedding_channels is None:
            return latents_to_follow(family, pictures)
        (control,) = pictures.references
        pixels = to_pixels(control.resize((pictures.width, pictures.height), Image.Resampling.LANCZOS))
        device, dtype = where_it_computes(self)
        return self.input_hint_block((pixels * 2 - 1).to(device, dtype)[None])[0]

    def follow(
        self, family: Any, seen: Tensor, use: ControlUse, cond: Conditioning, times: Sequence[float], around: Around
    ) -> Around:
        dtype = self.img_in.weight.dtype
        control = linear(self.controlnet_x_embedder, patchify(seen, PATCH).to(dtype), PLAIN, ANY)
        grid = seen.shape[1] // PATCH, seen.shape[2] // PATCH
        prepared = self._prepare(cond, grid, self._mode(use), times)
        model = family.transformer
        forward = Forward(attention_by=model.attention_by)
        cycles = self.config.conditioning_embedding_channels is not None

        def begin(samples: Mapping[int, Sample]) -> Hints:
            own = [Sample(sample.x, sample.t, prepared[sample.prompt]) for sample in samples.values()]
            run = self._run(own, control, forward)
            made: dict[int, Tensor] = {}  # residuals that are still needed, by the number of the net's block
            number = 0

            def hint(stack: str, index: int, before: Tensor, after: Tensor, rows: Rows) -> Tensor | None:
                nonlocal number
                doubles, singles = len(self.double_blocks), len(self.single_blocks)
                own, blocks = (
                    (doubles, model.double_blocks) if stack == "double_blocks" else (singles, model.single_blocks)
                )
                if not own:
                    return None
                nth = index % own if cycles else index // -(-len(blocks) // own)
                nth += 0 if stack == "double_blocks" else doubles
                while number <= nth:
                    made[number] = next(run)
                    number += 1
                for old in [old for old in made if old < nth and not cycles]:
                    del made[old]
                return use.scale * made[nth]

            return hint

        return Around(residuals=(begin,))

    def _prepare(
        self, cond: Conditioning, grid: tuple[int, int], mode: int | None, times: Sequence[float]
    ) -> list[Prepared]:
        """What is constant over the steps, for each prompt. As the model's, with this net's embedders."""
        c, weight = self.config, self.img_in.weight
        assert cond.pooled is not None
        texts = linear(self.txt_in, cond.tokens.to(weight.dtype), PLAIN, ANY).split(list(cond.lengths))
        if mode is not None:
            token = self.controlnet_mode_embedder.weight[mode : mode + 1].to(weight)
            texts = [torch.cat((token, text)) for text in texts]
        embeddings = self.vector_in(cond.pooled, PLAIN, ANY)
        if self.guidance_in is not None:
            # A model without this input has guidance of its own, or none. The net gets what it was trained with.
            guidance = DEV.guidance if cond.guidance is None else cond.guidance
            guided = embed_guidance(self.guidance_in, guidance, PLAIN)
            embeddings = embeddings if guided is None else embeddings + guided
        axes = (c.attention_head_dim // 8, *(c.attention_head_dim * 7 // 16,) * 2)
        return [
            Prepared(
                text=text,
                references=text[:0],
                rope=rope(positions(len(text), grid, []), axes, THETA, weight.device),
                grid=grid,
                embedding=embedding,
                modulation=foresee(times, embedding, self.modulate, PLAIN),
            )
            for text, embedding in zip(texts, embeddings)
        ]

    def modulate(self, times: Sequence[float], embeddings: Tensor, forward: Forward, rows: Rows) -> Modulation:
        """The modulation of every block at T times, as the model's. There is no last layer."""
        vec = self.time_in.numbers(times, forward, rows) + embeddings
        doubles, singles = cast(list[DoubleBlock], self.double_blocks), cast(list[SingleBlock], self.single_blocks)
        pairs = [(b.txt_mod(vec, forward, rows), b.img_mod(vec, forward, rows)) for b in doubles]
        none = vec.new_zeros(len(vec), 0, 3, self.config.dim)
        return Modulation(
            torch.stack([torch.stack(pair, dim=1) for pair in pairs], dim=1),
            torch.stack([b.modulation(vec, forward, rows) for b in singles], dim=1) if len(singles) else none,
            vec.new_zeros(len(vec), 2, 0),
        )

    def _run(self, samples: Sequence[Sample], control: Tensor, forward: Forward) -> Iterator[Tensor]:
        """Yields the residual of each block, one after the other. control: (L, D)."""
        prepared: list[Prepared] = [sample.prepared for sample in samples]
        modulation = modulation_of(samples, self.modulate, forward)
        batch = Packing.of(prepared, modulation, None, tuple(range(len(prepared))))
        patches = torch.cat([patchify(sample.x, PATCH) for sample in samples]).to(control.dtype)
        pictures = linear(self.img_in, patches, PLAIN, ANY) + control.repeat(len(prepared), 1)
        x = torch.cat([*(s.text for s in prepared), pictures])
        lengths = [len(batch.texts), len(batch.pictures)]
        for (i, block), (_, make) in zip(visits(self.double_blocks), visits(self.controlnet_blocks)):
            x = block(x, modulation.double[:, i], batch, [], forward)
            yield linear(make, x.split(lengths)[1], PLAIN, ANY)
        text, pictures = x.split(lengths)
        x = weave(text.split(batch.texts.lengths), pictures.split(batch.pictures.lengths))
        for (i, block), (_, make) in zip(visits(self.single_blocks), visits(self.controlnet_single_blocks)):
            x = block(x, modulation.single[:, i], batch, [], forward)
            yield linear(make, batch.woven.targets_of(x), PLAIN, ANY)


def convolutions(channels: int) -> nn.Sequential:
    """From pixels to features at the size of latents."""
    layers: list[nn.Module] = []
    for i in range(CONVOLUTIONS):
        halves = i % 2 == 0 and i > 0
        layers += [nn.Conv2d(channels if i else 3, channels, 3, 2 if halves else 1, 1), nn.SiLU()]
    return nn.Sequential(*layers[:-1])


def infer_config(shapes: Shapes) -> ControlConfig:
    """Sizes from the shapes of the weights."""
    dim, channels = shapes["img_in.weight"]
    (head,) = shapes["double_blocks.0.img_attn.norm.query_norm.scale"]
    modes = shapes.get("controlnet_mode_embedder.weight")
    hint = shapes.get("input_hint_block.0.weight")
    doubles, singles = (
        len({name.split(".")[1] for name in shapes if name.startswith(stack)})
        for stack in ("double_blocks.", "single_blocks.")
    )
    return ControlConfig(
        in_channels=channels,
        num_layers=doubles,
        num_single_layers=singles,
        attention_head_dim=head,
        num_attention_heads=dim // head,
        joint_attention_dim=shapes["txt_in.weight"][1],
        pooled_projection_dim=shapes["vector_in.in_layer.weight"][1],
        guidance_embeds="guidance_in.in_layer.weight" in shapes,
        num_mode=modes[0] if modes else None,
        conditioning_embedding_channels=hint[0] if hint else None,
        control_channels=shapes["controlnet_x_embedder.weight"][1],
    )


_HINT = "input_hint_block"

CONTROLNET = Part(
    phases=("steps",),
    build=FluxControlNet,
    config=ControlConfig,
    layouts={
        "diffusers": (
            *DIFFUSERS,
            rename(f"{_HINT}.conv_in", f"{_HINT}.0"),
            *(rename(f"{_HINT}.blocks.{i}", f"{_HINT}.{2 * i + 2}") for i in range(CONVOLUTIONS - 2)),
            rename(f"{_HINT}.conv_out", f"{_HINT}.{2 * CONVOLUTIONS - 2}"),
        ),
        "native": (*SINGLE_FILE, rename("pos_embed_input", "controlnet_x_embedder")),
    },
    infer=infer_config,
)
"""InstantX's and Shakker's nets have diffusers' names, XLabs' the single file's."""
