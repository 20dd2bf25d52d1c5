"""A 3D U-Net with a dense bottleneck; `fused_layers` computes some layers faster than torch does.

A *level* is one resolution. The *skip* of a level is its encoder output, handed to its decoder. The
*reduction* of an axis is the product of its strides: `n` voxels are `n // reduction` at the bottom.
"""

import contextlib
import math
import warnings
from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from networks import fused_layers

NORMS = {"batch": nn.BatchNorm3d, "instance": fused_layers.InstanceNorm}
COUNTS = ("in_channels", "out_channels", "base_channels", "num_dense_layers", "growth_rate")
BOTTLENECK_FACTOR = 4  # a dense layer's 1×1×1 convolution has 4 · growth_rate channels


class DenseUNet(nn.Module):
    """3D U-Net whose bottleneck is a dense block.

    Level `i` has `base_channels · 2^i` channels and two 3×3×3 convolutions, each followed by a
    norm and ReLU. Max pooling leads down, trilinear upsampling to the skip's exact size and
    concatenation with it lead up. With the defaults there are 32, 64, 128 and 256 channels, and
    256 → 384 in the bottleneck at 1/8 resolution.

    Args:
        in_channels: Channels of the image.
        out_channels: Channels of the logits, the number of classes.
        base_channels: Channels at full resolution.
        strides: Pooling between levels, one `(H, W, D)` triple or one int for all axes per
            pooling; 1 leaves an axis as it is. There are `len(strides) + 1` levels.
        norm: `batch` or `instance` (both with learnt scale and shift).
        num_dense_layers: Layers of the bottleneck.
        growth_rate: Channels that each of them appends.
        dropout: Probability in [0, 1) of zeroing a channel that a dense layer appends.
        deep_supervision: Return the logits of every decoder level in train mode.
        recompute_levels: Finest levels, counted from full resolution, whose two blocks keep
            only their inputs for the backward pass and compute the rest again: less memory, more
            time, and the same gradients bit for bit.
        seed: Seed of the initial weights, which are then a function of the arguments alone;
            torch's global random state is left untouched. None draws from the global state.

    Raises:
        ValueError: If an argument is not as described.

    Source: Çiçek et al., 3D U-Net, MICCAI 2016 (levels, skips); Huang et al., Densely connected
        convolutional networks, CVPR 2017 (dense layer, BN–ReLU–1×1×1–BN–ReLU–3×3×3); He et al.,
        Delving deep into rectifiers, ICCV 2015, eq. 10 (Kaiming normal weights, fan-in).
    """

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 2,
        base_channels: int = 32,
        strides: Sequence[int | Sequence[int]] = ((2, 2, 2), (2, 2, 2), (2, 2, 2)),
        norm: str = "batch",
        num_dense_layers: int = 4,
        growth_rate: int = 32,
        dropout: float = 0.0,
        deep_supervision: bool = False,
        recompute_levels: int = 0,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        _check_counts(in_channels, out_channels, base_channels, num_dense_layers, growth_rate)
        _check_options(norm, dropout, deep_supervision, seed)
        self.in_channels, self.out_channels, self.norm = in_channels, out_channels, norm
        self.strides = _triples(strides)
        self.reduction = tuple(math.prod(axis) for axis in zip(*self.strides, strict=True))
        self.deep_supervision = deep_supervision in (True, "true")
        _check_recomputed(recompute_levels, len(self.strides))
        self.recompute_levels = recompute_levels
        widths = [base_channels * 2**i for i in range(len(self.strides) + 1)]
        below = [*widths[1:-1], widths[-1] + num_dense_layers * growth_rate]
        coarse = widths[1:-1] if self.deep_supervision else []
        with torch.random.fork_rng(devices=[]):  # torch's layers draw weights when they are made
            self.encoders = _blocks([in_channels, *widths[:-2]], widths[:-1], norm)
            self.pools = nn.ModuleList(nn.MaxPool3d(stride, stride) for stride in self.strides)
            self.deepest = _ConvBlock(widths[-2], widths[-1], norm)
            inputs = [widths[-1] + i * growth_rate for i in range(num_dense_layers)]
            layers = (_DenseLayer(n, growth_rate, norm, dropout) for n in inputs)
            self.bottleneck = nn.Sequential(*layers)
            joined = [skip + up for skip, up in zip(widths[:-1], below, strict=True)]
            self.decoders = _blocks(joined[::-1], widths[-2::-1], norm)  # deepest first
            self.head = nn.Conv3d(base_channels, out_channels, 1)
            # Last, so that a seed gives the rest the same weights with and without them.
            self.deep_heads = nn.ModuleList(nn.Conv3d(n, out_channels, 1) for n in coarse[::-1])
        self._initialise(None if seed is None else torch.Generator().manual_seed(seed))

    def forward(self, image: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        """Logits `(B, out_channels, H, W, D)` of an image `(B, in_channels, H, W, D)`.

        The image has any floating dtype, and at least `minimum_size`. In train mode with deep
        supervision there is a list of logits, one for each decoder level at its own resolution,
        full resolution first.

        Raises:
            ValueError: If the image has another number of axes or channels, or is too small.
        """
        if not torch.jit.is_tracing():
            self._check(image)
        x = fused_layers.channels_last(image, self.deepest.conv2.weight)
        skips: list[torch.Tensor] = []
        for encoder, pool in zip(self.encoders, self.pools, strict=True):
            x, skip = fused_layers.pool_and_skip(self._at(len(skips), encoder, x), pool)
            skips.append(skip)
        x = self.bottleneck(self.deepest(x))
        levels: list[torch.Tensor] = []
        for decoder in self.decoders:
            skip = skips.pop()
            x = self._at(len(skips), decoder, x, skip)
            levels.append(x)
        logits = self.head(x)
        if not (self.training and self.deep_supervision):
            return logits
        coarse = [head(level) for head, level in zip(self.deep_heads, levels, strict=False)]
        return [logits, *coarse[::-1]]

    def _at(self, level: int, block: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
        """Run a block of a level, and drop what it computed where it is to be recomputed."""
        wanted = level < self.recompute_levels and self.training and torch.is_grad_enabled()
        if not wanted or torch.jit.is_tracing() or torch.compiler.is_compiling():
            return block(*inputs)
        return checkpoint(
            block,
            *inputs,
            use_reentrant=False,
            preserve_rng_state=False,  # there is no dropout in a block
            context_fn=lambda: (contextlib.nullcontext(), _untouched_buffers(block)),
        )

    def minimum_size(self, batch_size: int = 1) -> tuple[int, int, int]:
        """Smallest `(H, W, D)` in voxels that `forward` accepts in the present mode.

        One voxel is left at the bottleneck, or two where the norm needs more than one value per
        channel: instance norm always, batch norm when it trains on a single image.
        """
        size = list(self.reduction)
        if self._values_needed(batch_size) > 1:
            size[size.index(min(size))] *= 2
        return size[0], size[1], size[2]

    def _values_needed(self, batch_size: int) -> int:
        return 2 if self.norm == "instance" or (self.training and batch_size == 1) else 1

    def _check(self, image: torch.Tensor) -> None:
        shape = tuple(image.shape)
        if len(shape) != 5 or shape[1] != self.in_channels:
            raise ValueError(
                f"DenseUNet: expected an image of shape (B, {self.in_channels}, H, W, D), "
                f"got {shape}. Set in_channels to the image's channels."
            )
        voxels = math.prod([n // r for n, r in zip(shape[2:], self.reduction, strict=True)])
        if voxels < self._values_needed(shape[0]):
            smallest = "x".join(map(str, self.minimum_size(shape[0])))
            got = "x".join(map(str, shape[2:]))
            raise ValueError(
                f"DenseUNet: expected an image of at least {smallest} voxels, got {got}. "
                "Enlarge roi_size or reduce strides."
            )

    def __prepare_scriptable__(self) -> nn.Module:
        return _Traced(self)

    def _initialise(self, generator: torch.Generator | None) -> None:
        for conv in (m for m in self.modules() if isinstance(m, nn.Conv3d)):
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu", generator=generator)
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)


class _Traced(nn.Module):
    """The network for `torch.jit.script`, which cannot read how kernels are chosen: its trace."""

    def __init__(self, network: DenseUNet) -> None:
        super().__init__()
        size = [2 * n for n in network.reduction]
        example = network.head.weight.new_zeros(2, network.in_channels, *size)
        with warnings.catch_warnings(action="ignore"):  # torch's check of sizes is not recorded
            self.network = torch.jit.trace(network, example)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.network(image)


class _ConvBlock(nn.Module):
    """Twice 3×3×3 convolution, norm and ReLU; the norm's shift takes the place of a bias.

    The input of a decoder is first upsampled to the size of the skip, and joined to it.
    """

    def __init__(self, in_channels: int, out_channels: int, norm: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(in_channels, out_channels, 3, padding=1, bias=False)
        self.norm1 = _norm(norm, out_channels)
        self.conv2 = nn.Conv3d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = _norm(norm, out_channels)

    def forward(self, x: torch.Tensor, skip: torch.Tensor | None = None) -> torch.Tensor:
        x = x if skip is None else fused_layers.upsample_concat(x, skip)
        x = fused_layers.norm_relu(self.norm1, self.conv1(x))
        return fused_layers.norm_relu(self.norm2, self.conv2(x))


@contextlib.contextmanager
def _untouched_buffers(block: nn.Module) -> Iterator[None]:
    """Let a block update copies of its running statistics: a batch must be counted once."""
    own = [(module._buffers, dict(module._buffers)) for module in block.modules()]
    try:
        for buffers, kept in own:
            buffers.update({name: t.clone() for name, t in kept.items() if t is not None})
        yield
    finally:
        for buffers, kept in own:
            buffers.update(kept)


class _DenseLayer(nn.Module):
    """Appends `growth_rate` channels to its input: norm–ReLU–1×1×1–norm–ReLU–3×3×3."""

    def __init__(self, channels: int, growth_rate: int, norm: str, dropout: float) -> None:
        super().__init__()
        inner = BOTTLENECK_FACTOR * growth_rate
        self.norm1 = _norm(norm, channels)
        self.conv1 = nn.Conv3d(channels, inner, 1, bias=False)
        self.norm2 = _norm(norm, inner)
        self.conv2 = nn.Conv3d(inner, growth_rate, 3, padding=1, bias=False)
        self.dropout = nn.Dropout3d(dropout) if dropout else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        new = self.conv1(fused_layers.norm_relu(self.norm1, x))
        new = self.conv2(fused_layers.norm_relu(self.norm2, new))
        return torch.cat([x, self.dropout(new)], dim=1)  # (B, channels + growth_rate, …)


def _blocks(inputs: list[int], outputs: list[int], norm: str) -> nn.ModuleList:
    return nn.ModuleList(_ConvBlock(*pair, norm) for pair in zip(inputs, outputs, strict=True))


def _norm(norm: str, channels: int) -> nn.Module:
    return NORMS[norm](channels, affine=True)


def _triples(strides: object) -> tuple[tuple[int, ...], ...]:
    """Return `strides` as one triple per pooling."""
    listed = list(strides) if isinstance(strides, list | tuple) else []
    triples = [tuple(s) if isinstance(s, list | tuple) else (s, s, s) for s in listed]
    valid = all(len(t) == 3 and all(_is_int(s, 1) for s in t) for t in triples)
    _expect(bool(triples) and valid, "strides", "a list of positive ints or triples", strides)
    return tuple(triples)


def _check_counts(*counts: int) -> None:
    for name, count in zip(COUNTS, counts, strict=True):
        _expect(_is_int(count, 1), name, "a positive integer", count)


def _check_options(norm: str, dropout: float, deep: bool, seed: int | None) -> None:
    _expect(norm in tuple(NORMS), "norm", "one of " + ", ".join(NORMS), norm)
    valid = type(dropout) in (int, float) and 0 <= dropout < 1
    _expect(valid, "dropout", "a number in [0, 1)", dropout)
    valid = deep in (True, False, "true", "false")  # `monai.bundle` passes words
    _expect(valid, "deep_supervision", "true or false", deep)
    _expect(seed is None or _is_int(seed, 0), "seed", "null or an integer from 0 up", seed)


def _check_recomputed(levels: int, most: int) -> None:
    valid = _is_int(levels, 0) and levels <= most
    _expect(valid, "recompute_levels", f"0 to {most}, as many as there are decoders", levels)


def _is_int(value: object, minimum: int) -> bool:
    return type(value) is int and value >= minimum  # a bool is an instance of int


def _expect(valid: bool, name: str, what: str, value: object) -> None:
    if not valid:
        raise ValueError(f"DenseUNet: expected {name} to be {what}, got {value!r}. Correct {name}.")
