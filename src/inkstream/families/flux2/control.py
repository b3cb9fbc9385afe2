"""FLUX.2 dev's ControlNet, alibaba-pai's "Fun Controlnet Union": blocks beside the model's double blocks.

A control stream of picture tokens, with a copy of the text, runs through blocks of its own, which use the model's
modulation. Before the first block it takes in the model's picture tokens. After each block, a linear layer makes a hint
for a block of the model. Source: VideoX-Fun.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from inkstream.families import Part, Pictures, Shapes
from inkstream.families.flux2.keys import DIFFUSERS
from inkstream.families.flux2.model import Flux2Transformer
from inkstream.families.flux2.specs import Flux2Config
from inkstream.families.parts import inpainting_to_follow, latents_to_follow
from inkstream.nn.around import Around
from inkstream.nn.around.residuals import Hints
from inkstream.nn.flux import DoubleBlock, Packing, Prepared, modulation_of, patchify
from inkstream.nn.forward import ANY, PLAIN, Forward, Rows, Sample
from inkstream.nn.linear import linear
from inkstream.nn.stack import Blocks, visits
from inkstream.types import Conditioning, ControlUse, InputError
from inkstream.weights.keymap import rename

MASK_CHANNELS = 4
"""One for each of the 2 x 2 cells of the autoencoder in a token."""


@dataclass(frozen=True)
class FunConfig:
    """Sizes of a control net, which its weights tell."""

    control_in_dim: int = 260  # channels of the control picture's latents, the mask and the source's latents
    num_layers: int = 4
    attention_head_dim: int = 128
    num_attention_heads: int = 48
    mlp_ratio: float = 3.0

    @property
    def dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim


class FunUnion(nn.Module):
    """A control net. Build it on meta, then assign the weights. See `families.ControlNet` for its contract."""

    def __init__(self, config: FunConfig):
        super().__init__()
        self.config = c = config
        sizes = (c.dim, c.num_attention_heads, round(c.mlp_ratio * c.dim))
        self.control_img_in = nn.Linear(c.control_in_dim, c.dim)
        self.before_proj = nn.Linear(c.dim, c.dim)
        self.control_transformer_blocks = Blocks(
            DoubleBlock(*sizes, gated=True, bias=False, modulated=False) for _ in range(c.num_layers)
        )
        self.after_proj = Blocks(nn.Linear(c.dim, c.dim) for _ in range(c.num_layers))

    @staticmethod
    def sizes_for(transformer: Any) -> FunConfig:
        """Half as many blocks as the model has double blocks, as in the published net."""
        c: Flux2Config = transformer
        return FunConfig(
            control_in_dim=2 * c.in_channels + MASK_CHANNELS,
            num_layers=max(c.num_layers // 2, 1),
            attention_head_dim=c.attention_head_dim,
            num_attention_heads=c.num_attention_heads,
            mlp_ratio=c.mlp_ratio,
        )

    @torch.no_grad()
    def begin(self, family: Any) -> None:
        model: Flux2Transformer = family.transformer
        every = max(len(model.double_blocks) // self.config.num_layers, 1)
        for i, block in enumerate(self.control_transformer_blocks):
            block.load_state_dict(model.double_blocks[i * every].state_dict())
        own = model.img_in.weight.shape[1]
        nn.init.zeros_(self.control_img_in.weight)
        self.control_img_in.weight[:, :own] = model.img_in.weight
        nn.init.zeros_(self.control_img_in.bias)
        nn.init.eye_(self.before_proj.weight)
        nn.init.zeros_(self.before_proj.bias)
        for layer in self.after_proj:
            nn.init.zeros_(cast(nn.Linear, layer).weight)
            nn.init.zeros_(cast(nn.Linear, layer).bias)

    def check(self, family: Any, use: ControlUse) -> None:
        model: Flux2Config = family.transformer.config
        if self.config.dim != model.dim:
            raise InputError(
                f"control net {use.path} is of width {self.config.dim}, {family.spec.name} of {model.dim}: "
                "take one made for this model"
            )
        if self.config.control_in_dim != 2 * model.in_channels + MASK_CHANNELS:
            raise InputError(
                f"control net {use.path} reads {self.config.control_in_dim} channels, {family.spec.name} has "
                f"{2 * model.in_channels + MASK_CHANNELS}: take one made for this model"
            )
        if use.mode:
            raise InputError(f"control net {use.path} knows by itself what its picture shows: leave out #{use.mode}")

    def look(self, family: Any, pictures: Pictures) -> Tensor:
        """Latents of the control picture, a mask of what is kept, latents of what is kept: (C, h, w).

        The last two are zeros without an inpainting.
        """
        latents = latents_to_follow(family, pictures)
        kept = inpainting_to_follow(family, pictures)
        if kept is None:
            return torch.cat((latents, latents.new_zeros(MASK_CHANNELS + len(latents), *latents.shape[1:])))
        cells = F.interpolate(kept[0][None], [2 * side for side in latents.shape[1:]], mode="nearest")[0]
        return torch.cat((latents, F.pixel_unshuffle(cells, 2), kept[1]))

    def follow(
        self, family: Any, seen: Tensor, use: ControlUse, cond: Conditioning, times: Sequence[float], around: Around
    ) -> Around:
        model: Flux2Transformer = family.transformer
        control = patchify(seen, 1).to(model.img_in.weight.dtype)
        forward = Forward(attention_by=model.attention_by)
        every = max(len(model.double_blocks) // self.config.num_layers, 1)

        def begin(samples: Mapping[int, Sample]) -> Hints:
            run: Iterator[Tensor] | None = None

            def hint(stack: str, index: int, before: Tensor, after: Tensor, rows: Rows) -> Tensor | None:
                nonlocal run
                if stack != "double_blocks" or index % every or index // every >= self.config.num_layers:
                    return None
                if index == 0:
                    run = self._run(model, list(samples.values()), control, before, forward)
                assert run is not None
                added = use.scale * next(run)
                return torch.cat((added.new_zeros(len(after) - len(added), added.shape[1]), added))  # none for texts

            return hint

        return Around(residuals=(begin,))

    def _run(
        self, model: Flux2Transformer, samples: Sequence[Sample], control: Tensor, x: Tensor, forward: Forward
    ) -> Iterator[Tensor]:
        """Yields the hint of each block. x: (N, D), what enters the model's blocks: texts, then pictures."""
        prepared: list[Prepared] = [sample.prepared for sample in samples]
        modulation = modulation_of(samples, model.modulate, forward)
        batch = Packing.of(prepared, modulation, None, tuple(range(len(prepared))))
        lengths = [len(batch.texts), len(batch.pictures)]
        text, pictures = x.split(lengths)
        none = [control.new_zeros(len(s.references), control.shape[1]) for s in prepared]  # references have no control
        tokens = torch.cat([piece for nothing in none for piece in (control, nothing)])
        own = linear(self.before_proj, linear(self.control_img_in, tokens, PLAIN, ANY), PLAIN, ANY) + pictures
        x = torch.cat((text, own))
        for (_, block), (_, make) in zip(visits(self.control_transformer_blocks), visits(self.after_proj)):
            x = block(x, modulation.double[:, 0], batch, [], forward)  # all blocks of the model have the same
            yield linear(make, x.split(lengths)[1], PLAIN, ANY)


def infer_config(shapes: Shapes) -> FunConfig:
    """Sizes from the shapes of the weights."""
    dim, channels = shapes["control_img_in.weight"]
    (head,) = shapes["control_transformer_blocks.0.img_attn.norm.query_norm.scale"]
    return FunConfig(
        control_in_dim=channels,
        num_layers=len({name.split(".")[1] for name in shapes if name.startswith("control_transformer_blocks.")}),
        attention_head_dim=head,
        num_attention_heads=dim // head,
        mlp_ratio=shapes["control_transformer_blocks.0.img_mlp.2.weight"][1] / dim,
    )


_STACK = "control_transformer_blocks"

FUN = Part(
    phases=("steps",),
    build=FunUnion,
    config=FunConfig,
    layouts={
        "published": (
            rename(f"{_STACK}.0.before_proj", "before_proj"),
            rename(f"{_STACK}.{{}}.after_proj", "after_proj.{}"),
            *(
                replace(
                    rule,
                    theirs=tuple(f"control_{name}" for name in rule.theirs),
                    ours=tuple(name.replace("double_blocks", _STACK) for name in rule.ours),
                )
                for rule in DIFFUSERS
                if rule.theirs[0].startswith("transformer_blocks")
            ),
        )
    },
    infer=infer_config,
)
"""alibaba-pai's FLUX.2-dev Fun Controlnet Union: the first file and 2602."""
