"""Z-Image's ControlNets, alibaba-pai's "Fun Controlnet Union": blocks beside the model's that read a control picture.

A control stream of tokens runs through blocks of its own, beside the model's stream: first over the picture's tokens,
during the noise refiner, then over all tokens, during the layers. Before its first block it takes in the model's
stream. After each of its blocks, a linear layer makes a hint, which is added to the output of a block of the model.
Source: VideoX-Fun, whose hints of the refiner reach the model. (diffusers 0.42 adds them to a copy that it drops.)
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from inkstream.families import Part, Pictures, Shapes
from inkstream.families.parts import inpainting_to_follow, latents_to_follow
from inkstream.families.zimage.model import Block, Prepared, ZImageTransformer, fill, patchify
from inkstream.families.zimage.specs import ZImageConfig
from inkstream.nn.around import Around
from inkstream.nn.around.residuals import Hints
from inkstream.nn.forward import ANY, PLAIN, Forward, Rows, Sample
from inkstream.nn.linear import linear
from inkstream.nn.rope import Rope
from inkstream.nn.sight import Sight
from inkstream.nn.stack import Blocks, visits
from inkstream.types import Conditioning, ControlUse, InputError
from inkstream.weights.keymap import Rule, drop, fuse, rename

Refiner = Literal["plain", "layers", "own"]
"""What the control stream runs through beside the noise refiner.

plain: blocks that make no hints and do not take in the model's stream (version 1.0). layers: all layers, of which the
first make the refiner's hints (2.0). own: blocks for it (2.1 and later).
"""
Run = Generator[Tensor, None, Tensor]
"""Yields the hint of each block, and returns the control stream behind the last."""


@dataclass(frozen=True)
class UnionConfig:
    """Sizes of a control net, which its weights tell."""

    dim: int = 3840
    n_heads: int = 30
    norm_eps: float = 1e-5
    control_in_dim: int = 33  # channels: of the control picture's latents; with a mask and the source's, if inpainting
    n_layers: int = 15
    n_refiner_layers: int = 2
    refiner: Refiner = "own"
    patch_size: int = 2


class Union(nn.Module):
    """A control net. Build it on meta, then assign the weights. See `families.ControlNet` for its contract."""

    def __init__(self, config: UnionConfig):
        super().__init__()
        self.config = c = config
        sizes = ZImageConfig(dim=c.dim, n_heads=c.n_heads, norm_eps=c.norm_eps)
        self.control_x_embedder = nn.Linear(c.patch_size**2 * c.control_in_dim, c.dim)
        self.control_layers = Blocks(Block(sizes) for _ in range(c.n_layers))
        self.before_layers = nn.Linear(c.dim, c.dim)
        self.after_layers = Blocks(nn.Linear(c.dim, c.dim) for _ in range(c.n_layers))
        if c.refiner != "layers":
            self.control_noise_refiner = Blocks(Block(sizes) for _ in range(c.n_refiner_layers))
        if c.refiner == "own":
            self.before_refiner = nn.Linear(c.dim, c.dim)
            self.after_refiner = Blocks(nn.Linear(c.dim, c.dim) for _ in range(c.n_refiner_layers))

    @staticmethod
    def sizes_for(transformer: Any) -> UnionConfig:
        """Half as many layers as the model, as in the published nets; no inpainting."""
        c: ZImageConfig = transformer
        return UnionConfig(
            dim=c.dim,
            n_heads=c.n_heads,
            norm_eps=c.norm_eps,
            control_in_dim=c.in_channels,
            n_layers=max(c.n_layers // 2, 1),
            n_refiner_layers=c.n_refiner_layers,
            patch_size=c.patch_size,
        )

    @torch.no_grad()
    def begin(self, family: Any) -> None:
        model: ZImageTransformer = family.transformer
        every = max(len(model.layers) // self.config.n_layers, 1)
        for i, block in enumerate(self.control_layers):
            block.load_state_dict(model.layers[i * every].state_dict())
        for block, theirs in zip(self.control_noise_refiner, model.noise_refiner):
            block.load_state_dict(theirs.state_dict())
        embedder, theirs = self.control_x_embedder, model.x_embedder
        nn.init.zeros_(embedder.weight)  # a patch has its channels together, so the control picture's come first
        width, own = self.config.control_in_dim, model.config.in_channels
        embedder.weight.unflatten(1, (-1, width))[..., :own] = theirs.weight.unflatten(1, (-1, own))
        embedder.bias.copy_(theirs.bias)
        for layer in (self.before_layers, self.before_refiner):
            nn.init.eye_(layer.weight)
            nn.init.zeros_(layer.bias)
        for layer in (*self.after_layers, *self.after_refiner):
            nn.init.zeros_(cast(nn.Linear, layer).weight)
            nn.init.zeros_(cast(nn.Linear, layer).bias)

    def check(self, family: Any, use: ControlUse) -> None:
        model: ZImageConfig = family.transformer.config
        ours, theirs = (self.config.dim, self.config.n_heads), (model.dim, model.n_heads)
        if ours != theirs:
            raise InputError(
                f"control net {use.path} is of width {ours[0]} with {ours[1]} heads, {family.spec.name} of {theirs[0]} "
                f"with {theirs[1]}: take one made for this model"
            )
        if use.mode:
            raise InputError(f"control net {use.path} knows by itself what its picture shows: leave out #{use.mode}")

    def look(self, family: Any, pictures: Pictures) -> Tensor:
        """Latents of the control picture, then a mask of what is kept, then latents of what is kept: (C, h, w).

        The last two are zeros without an inpainting, and left out for nets that cannot read them.
        """
        latents = latents_to_follow(family, pictures)
        more = self.config.control_in_dim - len(latents)
        if not more:
            return latents
        kept = inpainting_to_follow(family, pictures)
        if kept is None:
            return torch.cat((latents, latents.new_zeros(more, *latents.shape[1:])))
        mask = F.interpolate(kept[0][None], latents.shape[1:], mode="nearest")[0]
        return torch.cat((latents, mask, kept[1]))

    def follow(
        self, family: Any, seen: Tensor, use: ControlUse, cond: Conditioning, times: Sequence[float], around: Around
    ) -> Around:
        model: ZImageTransformer = family.transformer
        patches = patchify(seen, self.config.patch_size).to(model.x_pad_token.dtype)
        embedded = fill(linear(self.control_x_embedder, patches, PLAIN, ANY), model.x_pad_token)
        known = self.norm_weights(model, [1 - t for t in dict.fromkeys(times)], around)
        by_layers = self.config.refiner == "layers" or self._is_zero()

        def begin(samples: Mapping[int, Sample]) -> Hints:
            (t,) = {sample.t for sample in samples.values()}
            norms = known.get(t) or self.norm_weights(model, [t], around)[t]
            return self._hints(model, embedded, norms, samples, use.scale, by_layers)

        return Around(residuals=(begin,))

    def norm_weights(self, model: ZImageTransformer, times: Sequence[float], around: Around) -> dict[float, Norms]:
        """The weights of the blocks' norms at each time, the model's own. The time's embedding is the model's too."""
        if not times:
            return {}
        t = torch.tensor(
            [t * model.config.t_scale for t in times], dtype=torch.float32, device=model.x_pad_token.device
        )
        c = model.t_embedder(t, Forward.ahead(around), Rows.alone(len(times)))
        stacks = [self.control_layers, getattr(self, "control_noise_refiner", ())]
        layers, refiner = ([block.norm_weights(c).split(1) for block in stack] for stack in stacks)  # type: ignore[union-attr]
        return {t: Norms(*([one[i] for one in stack] for stack in (layers, refiner))) for i, t in enumerate(times)}

    def _is_zero(self) -> bool:
        """Whether the refiner's own blocks were never trained, as in files of version 2.0 that have them."""
        if self.config.refiner != "own" or self.before_refiner.weight.is_meta:
            return False
        return not self.before_refiner.weight.any()

    def _hints(
        self,
        model: ZImageTransformer,
        embedded: Tensor,
        norms: Norms,
        samples: Mapping[int, Sample],
        scale: float,
        by_layers: bool,
    ) -> Hints:
        """The hints of one forward. The control stream goes on when a block of the model waits for its hint."""
        prepared: dict[int, Prepared] = {i: sample.prepared for i, sample in samples.items()}
        every = max(len(model.layers) // self.config.n_layers, 1)
        plain = self.config.refiner == "plain"
        forward = Forward(attention_by=model.attention_by)
        run: Run | None = None  # what is being run through now
        refined: dict[int, Tensor] = {}  # the picture's control stream behind the refiner, by sample

        def begin_refiner(x: Tensor | None, owners: Sequence[int]) -> Run:
            table = Rope.cat([prepared[i].rope[: len(embedded)] for i in owners])
            lengths = [len(embedded)] * len(owners)
            c = embedded.repeat(len(owners), 1)
            if x is None:
                return through(c, self.control_noise_refiner, None, norms.refiner, table, lengths, forward)
            if by_layers:
                c = linear(self.before_layers, c, PLAIN, ANY) + x
                return through(c, self.control_layers, self.after_layers, norms.layers, table, lengths, forward)
            c = linear(self.before_refiner, c, PLAIN, ANY) + x
            return through(c, self.control_noise_refiner, self.after_refiner, norms.refiner, table, lengths, forward)

        def end_refiner(run: Run, owners: Sequence[int]) -> None:
            while True:  # blocks of the refiner that the model has no block for
                try:
                    next(run)
                except StopIteration as end:
                    refined.update(zip(owners, end.value.split(len(embedded))))
                    return

        def begin_layers(x: Tensor, rows: Rows) -> Run:
            own = [prepared[i] for i in rows.samples]
            pieces = x.split([span.length for span in rows.spans])
            contexts = pieces[1::2]  # behind each target picture
            first = next(iter(refined.values()))  # samples that are alike have one picture
            streams = [s for i, context in zip(rows.samples, contexts) for s in (refined.get(i, first), context)]
            c = linear(self.before_layers, torch.cat(streams), PLAIN, ANY) + x
            table, sights = Rope.cat([s.rope for s in own]), [s.sight for s in own]
            stack = (self.control_layers, self.after_layers, norms.layers)
            return through(c, *stack, table, rows.lengths, forward, sights)

        owners: Sequence[int] = ()

        def hint(stack: str, index: int, before: Tensor, after: Tensor, rows: Rows) -> Tensor | None:
            nonlocal run, owners
            if stack == "noise_refiner" and not plain:
                if index == 0:
                    run, owners = begin_refiner(before, rows.samples), rows.samples
                assert run is not None
                return scale * next(run) if index < self.config.n_refiner_layers else None
            if stack != "layers" or index % every or index // every >= self.config.n_layers:
                return None
            if index == 0:
                if plain:
                    run, owners = begin_refiner(None, rows.samples), rows.samples
                assert run is not None
                end_refiner(run, owners)
                run = begin_layers(before, rows)
            assert run is not None
            added = scale * next(run)
            return added if len(added) == len(after) else rows.targets_of(added)

        return hint


@dataclass(frozen=True)
class Norms:
    """The weights of the norms of each block at one time, (1, 4, D) each."""

    layers: Sequence[Tensor]
    refiner: Sequence[Tensor]


def through(
    c: Tensor,
    blocks: Blocks,
    after: Blocks | None,
    norms: Sequence[Tensor],
    table: Rope,
    lengths: Sequence[int],
    forward: Forward,
    sights: Sequence[Sight | None] = (),
) -> Run:
    """Runs a control stream through blocks. c: (N, D), with the layout of `table`, `lengths` and `sights`.

    after: the layer that makes the hint of each block; None: the blocks make none.
    """
    makers = None if after is None else iter(visits(after))
    for i, block in visits(blocks):
        c = block(c, norms[i], None, table, lengths, None, forward, ANY, sights)
        if makers is not None:
            _, make = next(makers)
            yield linear(make, c, PLAIN, ANY)
    return c


def infer_config(shapes: Shapes) -> UnionConfig:
    """Sizes from the shapes of the weights. Shapes do not tell all: see `Union._is_zero`."""
    dim, patch = shapes["control_x_embedder.weight"]
    (head,) = shapes["control_layers.0.attention.q_norm.weight"]
    layers, refiners = (_count(shapes, f"{stack}.") for stack in ("control_layers", "control_noise_refiner"))
    has_hints, is_first = "after_refiner.0.weight" in shapes, patch // 4 < FIRST_INPAINTING
    refiner: Refiner = "own" if has_hints else "plain" if is_first and refiners else "layers"
    return UnionConfig(
        dim=dim,
        n_heads=dim // head,
        control_in_dim=patch // 4,
        n_layers=layers,
        n_refiner_layers=refiners if refiner != "layers" else 2,
        refiner=refiner,
    )


FIRST_INPAINTING = 33
"""Input channels from which a net reads inpaintings too: version 2.0 and later."""


def _count(shapes: Shapes, prefix: str) -> int:
    return len({name.removeprefix(prefix).split(".")[0] for name in shapes if name.startswith(prefix)})


_STACKS = ("control_layers", "control_noise_refiner")

_OWN: tuple[Rule, ...] = (
    rename("control_all_x_embedder.2-1", "control_x_embedder"),
    *(
        rule
        for stack, name in zip(_STACKS, ("layers", "refiner"))
        for rule in (
            rename(f"{stack}.0.before_proj", f"before_{name}"),
            rename(f"{stack}.{{}}.after_proj", f"after_{name}.{{}}"),
        )
    ),
    drop("x_pad_token"),  # copies of the model's
    drop("cap_pad_token"),
)

PUBLISHED: tuple[Rule, ...] = (
    *_OWN,
    *(
        rule
        for stack in _STACKS
        for rule in (
            fuse(
                *(f"{stack}.{{}}.attention.to_{x}" for x in "qkv"),
                ours=f"{stack}.{{}}.attention.qkv",
            ),
            rename(f"{stack}.{{}}.attention.to_out.0", f"{stack}.{{}}.attention.out"),
            rename(f"{stack}.{{}}.attention.norm_q", f"{stack}.{{}}.attention.q_norm"),
            rename(f"{stack}.{{}}.attention.norm_k", f"{stack}.{{}}.attention.k_norm"),
        )
    ),
)
"""Names in the published files: the blocks have diffusers' names."""

UNION = Part(
    phases=("steps",),
    build=Union,
    config=UnionConfig,
    layouts={"published": PUBLISHED, "native": _OWN},
    infer=infer_config,
)
"""alibaba-pai's Fun Controlnet Union: 1.0, 2.0, 2.1 and later, lite and tile."""
