"""Which tensors a training step and a forward pass of the dense U-Net hold, in their order.

A *walk* goes through the network as the card does and holds and drops blocks of an `Arena` on its
way. Sizes are those of the tensors; what cuDNN takes beside them is `workspace`. Terms are those of
`networks.dense_unet`: of level `i`, `voxels[i]` of the whole batch and `widths[i]` channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.data.arena import Arena, Block

FLOAT32 = "float32"
# cuDNN pads a gradient of logits that is larger, for a head of so few channels: read for 531 MB and
# not for 261, and for 24 channels and not for 48
PADDED_BYTES, PADDED_CHANNELS = 2**28, 32
DENSE_LAYERS, GROWTH_RATE, INNER = 4, 32, 128  # the network's defaults


@dataclass(frozen=True)
class Net:
    """What the memory of a dense U-Net depends on.

    Attributes:
        strides: Pooling per level, a triple each.
        base_channels: Of full resolution.
        num_classes: Background included.
        in_channels: Of the image.
        recompute_levels: Levels that keep no activations.
        mode: `float32`, `float16` or `bfloat16`.
    """

    strides: Sequence[Sequence[int]]
    base_channels: int
    num_classes: int
    in_channels: int = 1
    recompute_levels: int = 0
    mode: str = "float16"

    @property
    def bytes_per_value(self) -> int:
        """Of an activation."""
        return 4 if self.mode == FLOAT32 else 2

    @property
    def widths(self) -> list[int]:
        """Channels of each level."""
        return [self.base_channels * 2**level for level in range(len(self.strides) + 1)]

    @property
    def deepest(self) -> int:
        """Channels that leave the bottleneck."""
        return self.widths[-1] + DENSE_LAYERS * GROWTH_RATE

    @property
    def below(self) -> list[int]:
        """Channels that come up to each level with a decoder."""
        return [*self.widths[1:-1], self.deepest]

    def voxels(self, roi_size: Sequence[int], images: int) -> list[int]:
        """Of each level, all images together."""
        size, found = list(roi_size), [images * math.prod(roi_size)]
        for stride in self.strides:
            size = [n // s for n, s in zip(size, stride, strict=True)]
            found.append(images * math.prod(size))
        return found

    def weights(self) -> list[int]:
        """Values of each convolution's weight, in the order in which they are made."""
        widths = self.widths
        inputs = [self.in_channels, *widths[:-1]]
        blocks = [*zip(inputs, widths, strict=True)]
        joined = [w + up for w, up in zip(widths[:-1], self.below, strict=True)]
        blocks_up = [*zip(joined, widths[:-1], strict=True)][::-1]
        found = [27 * c * n for a, n in blocks for c in (a, n)]
        for layer in range(DENSE_LAYERS):
            found += [(widths[-1] + layer * GROWTH_RATE) * INNER, 27 * INNER * GROWTH_RATE]
        found += [27 * c * n for a, n in blocks_up for c in (a, n)]
        return [*found, widths[0] * self.num_classes]


class Walk:
    """One way through the network.

    Args:
        net: The network.
        arena: Where its tensors are.
        roi_size: Of a patch.
        images: Patches at once.
    """

    def __init__(self, net: Net, arena: Arena, roi_size: Sequence[int], images: int) -> None:
        self.net, self.arena = net, arena
        self.voxels, self.widths = net.voxels(roi_size, images), net.widths
        self.size = net.bytes_per_value
        self.hold, self.drop = arena.hold, arena.drop

    def map(self, level: int, channels: int) -> Block:
        """A feature map."""
        return self.hold(self.voxels[level] * channels * self.size)

    # ---------------------------------------------------------------- forward

    def convolve(self, level: int, channels: int, out: int, taps: int = 27) -> list[Block]:
        """Output of a convolution and, of mixed precision, its weights in half precision."""
        weights = taps * channels * out
        cast = [self.hold(2 * weights)] if self.size == 2 else []
        found = self.map(level, out)
        turned = self.turned(weights, channels, taps)
        self.work(level, channels, out, weights)
        self.drop(*turned)
        return [found, *cast]

    def turned(self, weights: int, channels: int, taps: int) -> list[Block]:
        """Weights in channels last, as a convolution of images in it wants them."""
        differs = self.size == 4 and taps > 1 and channels > 1
        return [self.hold(4 * weights)] if differs else []

    def work(
        self, level: int, channels: int, out: int, weights: int, *, back: bool = False
    ) -> None:
        """What a convolution takes for itself, and gives back."""
        size = workspace(self.net, self.voxels[level], channels, out, weights, back=back)
        if size:
            self.drop(self.hold(size))

    def block(
        self, level: int, channels: int, *, keeps: bool, again: bool = False,
        casts_input: bool = False,
    ) -> list[Block]:  # fmt: skip
        """Twice convolution, norm and ReLU.

        Args:
            level: Where.
            channels: Of its input.
            keeps: Whether what is in between stays for the backward pass.
            again: Whether it is computed only for that, its output left out.
            casts_input: Whether its input is not in half precision yet.

        Returns:
            The output, then y1, a1 and y2, where they are kept, then weights in half precision.
        """
        width = self.widths[level]
        cast = [self.map(level, channels)] if casts_input and self.size == 2 else []
        y1, *w1 = self.convolve(level, channels, width)
        if not keeps:
            self.drop(*cast, *w1)
        a1 = self.map(level, width)
        if not keeps:
            self.drop(y1)
        y2, *w2 = self.convolve(level, width, width)
        if not keeps:
            self.drop(*w2)
        a2 = self.map(level, width)
        if not keeps:
            self.drop(y2, a1)
            return [a2]
        if again:
            self.drop(a2)
        return [a2, y1, a1, y2, *w1, *w2]

    def pool(self, level: int) -> Block:
        """Output of pooling, first of no certain layout."""
        first = self.map(level + 1, self.widths[level])
        found = self.map(level + 1, self.widths[level])
        self.drop(first)
        return found

    def dense(self, x: Block, number: int) -> Block:
        """Output of a layer of the bottleneck of which nothing is kept but `x`, its input."""
        level, channels = len(self.net.strides), self.widths[-1] + number * GROWTH_RATE
        a1 = self.map(level, channels)
        y, *w1 = self.convolve(level, channels, INNER, 1)
        self.drop(*w1, a1)
        a2 = self.map(level, INNER)
        new, *w2 = self.convolve(level, INNER, GROWTH_RATE)
        self.drop(*w2, a2, y)
        found = self.map(level, channels + GROWTH_RATE)
        self.drop(new)
        if number:
            self.drop(x)
        return found

    # ---------------------------------------------------------------- backward

    def convolve_back(
        self, level: int, channels: int, out: int, gone: Sequence[Block], cast: Sequence[Block],
        taps: int = 27, *, wanted: bool = True,
    ) -> tuple[list[Block], Block]:  # fmt: skip
        """Gradients of a convolution's input, if `wanted`, and of its weights, float32."""
        weights = taps * channels * out
        grad = [self.map(level, channels)] if wanted else []
        first = [self.hold(2 * weights)] if self.size == 2 else []
        turned = self.turned(weights, channels, taps)
        self.work(level, channels, out, weights, back=True)
        if self.size == 4:
            self.drop(*turned)
            first = [self.hold(4 * weights)]  # and of the weights' own layout
        self.drop(*gone, *cast)
        found = self.hold(4 * weights) if turned or self.size == 2 else first.pop()
        self.drop(*first)
        return grad, found

    def block_back(
        self, level: int, channels: int, grad: Block | None, kept: list[Block],
        given: Sequence[Block], *, wanted: bool = True,
    ) -> tuple[list[Block], list[Block]]:  # fmt: skip
        """Through a block: gradient of its input, if `wanted`, and of its weights.

        Args:
            level: Where.
            channels: Of the block's input.
            grad: Of its output; `None`: it stays.
            kept: y1, a1, y2 and weights in half precision.
            given: Its input, where nobody else needs it.
            wanted: Whether the input's gradient is.
        """
        width = self.widths[level]
        y1, a1, y2, *casts = kept
        w1, w2 = casts[: len(casts) // 2], casts[len(casts) // 2 :]
        of_y2 = self.map(level, width)
        self.drop(*([] if grad is None else [grad]), y2)
        (of_a1,), second = self.convolve_back(level, width, width, [of_y2, a1], w2)
        of_y1 = self.map(level, width)
        self.drop(of_a1, y1)
        found, first = self.convolve_back(
            level, channels, width, [of_y1, *given], w1, wanted=wanted
        )
        return found, [first, second]


def workspace(net: Net, voxels: int, channels: int, out: int, weights: int, *, back: bool) -> float:
    """Bytes that cuDNN takes for itself during a convolution; of the larger ones."""
    if net.mode == FLOAT32:  # its kernels want channels first
        return 0 if channels < 4 else 4 * (voxels * (channels + out) + weights)
    is_head = weights == channels * out and out == net.num_classes
    pads = out % 4 and channels <= PADDED_CHANNELS and 2 * voxels * out > PADDED_BYTES
    if is_head and back and pads:
        return 2 * voxels * 8 * math.ceil(out / 8)  # of a gradient, its classes in eights
    return 0


def step(walk: Walk) -> tuple[list[Block], Block]:
    """A training step; what it leaves are the gradients of the weights, and the logits."""
    net, deepest = walk.net, len(walk.net.strides)
    is_half, widths = walk.size == 2, walk.widths
    inputs = [net.in_channels, *widths[:-1]]
    kept: list[list[Block]] = []  # of each encoder: a2, y1, a1, y2, weights
    pooled: list[list[Block]] = [[]]  # the input of each encoder
    for level in range(deepest):
        keeps = level >= net.recompute_levels
        if keeps and level == 0 and is_half:
            pooled[0] = [walk.map(0, net.in_channels)]
        casts = level == 0 and not keeps
        kept.append(walk.block(level, inputs[level], keeps=keeps, casts_input=casts))
        pooled.append([walk.pool(level)])
    bottom = walk.block(deepest, inputs[deepest], keeps=True)
    dense, x = _dense(walk, bottom[0])
    ups: list[list[Block]] = []  # of each decoder, deepest first: a2, y1, a1, y2, weights
    joined: list[Block] = []
    up = x
    for level in reversed(range(deepest)):
        keeps = level >= net.recompute_levels
        cat = walk.map(level, widths[level] + net.below[level])
        ups.append(walk.block(level, widths[level] + net.below[level], keeps=keeps))
        joined.append(cat)
        if not keeps:
            walk.drop(cat)
        elif level == deepest - 1:
            walk.drop(up)
        up = ups[-1][0]
    logits, *of_head = walk.convolve(0, widths[0], net.num_classes, 1)
    for number, level in enumerate(reversed(range(deepest))):  # what no decoder needs again
        if level and level - 1 >= net.recompute_levels:
            walk.drop(ups[number][0])

    of_logits = walk.map(0, net.num_classes)
    (grad,), weight = walk.convolve_back(
        0, widths[0], net.num_classes, [of_logits, ups[-1][0]], of_head, 1
    )
    gradients = [weight]
    skips: list[Block] = []
    for level in range(deepest):
        number = deepest - 1 - level
        channels = widths[level] + net.below[level]
        mine, cat = ups[number][1:], joined[number]
        if level < net.recompute_levels:
            cat = walk.map(level, channels)
            mine = walk.block(level, channels, keeps=True, again=True)[1:]
        (of_cat,), found = walk.block_back(level, channels, grad, mine, [cat])
        gradients += found
        skips.append(of_cat)
        if level < net.recompute_levels:
            walk.drop(x if number == 0 else ups[number - 1][0])
        grad = walk.map(level + 1, net.below[level])
    grad, found = _dense_back(walk, dense, grad)
    gradients += found
    (grad,), found = walk.block_back(deepest, inputs[deepest], grad, bottom[1:], pooled[deepest])
    gradients += found
    for level in reversed(range(deepest)):
        a2, *mine = kept[level]
        whole = walk.map(level, widths[level])
        walk.drop(grad, skips[level], a2)
        given = pooled[level]
        if level < net.recompute_levels:
            if level == 0 and is_half:
                given = [walk.map(0, net.in_channels)]
            mine = walk.block(level, inputs[level], keeps=True, again=True)[1:]
        rest, found = walk.block_back(level, inputs[level], whole, mine, given, wanted=level > 0)
        gradients += found
        grad = rest[0] if rest else whole
    return gradients, logits


def _dense(walk: Walk, x: Block) -> tuple[list[list[Block]], Block]:
    """The bottleneck: of each layer its input, what its convolutions read, weights; the output."""
    level, channels, layers = len(walk.net.strides), walk.widths[-1], []
    for _ in range(DENSE_LAYERS):
        a1 = walk.map(level, channels)
        y, *w1 = walk.convolve(level, channels, INNER, 1)
        a2 = walk.map(level, INNER)
        new, *w2 = walk.convolve(level, INNER, GROWTH_RATE)
        channels += GROWTH_RATE
        layers.append([x, a1, y, a2, *w1, *w2])
        x = walk.map(level, channels)
        walk.drop(new)
    return layers, x


def _dense_back(walk: Walk, layers: list[list[Block]], grad: Block) -> tuple[Block, list[Block]]:
    level, gradients = len(walk.net.strides), []
    for number in reversed(range(DENSE_LAYERS)):
        channels = walk.widths[-1] + number * GROWTH_RATE
        x, a1, y, a2, *casts = layers[number]
        w1, w2 = casts[: len(casts) // 2], casts[len(casts) // 2 :]
        (of_a2,), second = walk.convolve_back(level, INNER, GROWTH_RATE, [a2], w2)
        of_y = walk.map(level, INNER)
        walk.drop(of_a2, y)
        (of_a1,), first = walk.convolve_back(level, channels, INNER, [of_y, a1], w1, 1)
        of_x = walk.map(level, channels)
        walk.drop(of_a1, x)
        total = walk.map(level, channels)
        walk.drop(grad, of_x)
        grad = total
        gradients += [first, second]
    return grad, gradients


def forward(walk: Walk) -> Block:
    """A forward pass without a backward pass; what it leaves are the logits."""
    net, deepest = walk.net, len(walk.net.strides)
    inputs, widths = [net.in_channels, *walk.widths[:-1]], walk.widths
    skips: list[Block] = []
    x: list[Block] = []
    for level in range(deepest):
        (a2,) = walk.block(level, inputs[level], keeps=False, casts_input=level == 0)
        walk.drop(*x)
        skips.append(a2)
        x = [walk.pool(level)]
    (bottom,) = walk.block(deepest, inputs[deepest], keeps=False)
    up = bottom
    for layer in range(DENSE_LAYERS):
        up = walk.dense(up, layer)
    walk.drop(bottom, *x)
    levels: list[Block] = []
    for level in reversed(range(deepest)):
        if level < deepest - 1:
            walk.drop(skips.pop())
        cat = walk.map(level, widths[level] + net.below[level])
        (a2,) = walk.block(level, widths[level] + net.below[level], keeps=False)
        walk.drop(cat, *([up] if level == deepest - 1 else []))
        levels.append(a2)
    logits, *cast = walk.convolve(0, widths[0], net.num_classes, 1)
    walk.drop(*cast, *skips, *levels[::-1])
    return logits
