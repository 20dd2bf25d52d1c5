"""The sums that Dice and cross-entropy are made of, and their gradient, a pass each, in Triton.

A tile is `(ROWS, CHUNK, RUN)`: `ROWS · RUN` voxels and one chunk of the classes. It is one vector
per thread, along what are neighbours in memory: voxels, or classes where channels are last. There
are no atomics, and the order of every sum is fixed: two runs agree bit for bit.
"""

# ruff: noqa: N806, RUF005, SIM108
# mypy: disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _special(x, NAME: tl.constexpr, FAST: tl.constexpr):
    """Log2 or inverse of x in [1, C]; such as are right for all numbers take tens of steps."""
    if FAST:
        return tl.inline_asm_elementwise(
            NAME + ".approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.log2(x) if NAME == "lg2" else 1 / x


@triton.jit
def _softmax(x_at, is_voxel, classes, stride, C: tl.constexpr, CHUNK: tl.constexpr):
    """Return per chunk 2^(x' - m) with x' = x · log2(e) and m the largest x'; m; the sum over C."""
    xs, es = (), ()
    for k in tl.static_range((C + CHUNK - 1) // CHUNK):
        mask = is_voxel
        if (k + 1) * CHUNK > C:
            mask = is_voxel & (classes < C - k * CHUNK)
        x = tl.load(x_at + k * CHUNK * stride, mask=mask, other=-float("inf")).to(tl.float32)
        xs = xs + (x,)
        if k == 0:
            largest = x
        else:
            largest = tl.maximum(largest, x)
    m = tl.where(is_voxel, tl.max(largest, 1, keep_dims=True) * LOG2E, 0.0)
    for k in tl.static_range((C + CHUNK - 1) // CHUNK):
        e = tl.exp2(tl.fma(xs[k], LOG2E, -m))
        es = es + (e,)
        if k == 0:
            added = e
        else:
            added += e
    return es, m, tl.sum(added, 1, keep_dims=True)


@triton.jit
def _read(
    logits, label, start, voxel, num_voxels, classes, stride, ignored,
    C: tl.constexpr, IS_LAST: tl.constexpr, HAS_IGNORED: tl.constexpr, CHUNK: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """Return of a tile 2^(x' - m), its factor to p, the voxels' classes, and -log2(p) of these."""
    is_voxel = voxel < num_voxels - start
    at = logits + start * (C if IS_LAST else 1) + voxel * (C if IS_LAST else 1)
    es, m, added = _softmax(at + classes * stride, is_voxel, classes, stride, C, CHUNK)
    target = tl.load(label + start + voxel, mask=is_voxel, other=0).to(tl.int32)
    valid = is_voxel
    if HAS_IGNORED:
        valid = is_voxel & (target != ignored)
    known = valid & (target >= 0) & (target < C)
    own = tl.load(at + target * stride, mask=known, other=0.0).to(tl.float32)
    nll = _special(added, "lg2", FAST) - tl.fma(own, LOG2E, -m)
    inverse = tl.where(valid, _special(added, "rcp", FAST), 0.0)
    # m takes part so that the compiler leaves what is counted where the logits are
    from_first = tl.where(known & (m > -float("inf")), target, -CHUNK) - classes
    return es, inverse, target, known, from_first, nll


@triton.jit(do_not_specialize=["ignored"])
def sums_kernel(
    logits, label, weights, partials, num_voxels, ignored,
    C: tl.constexpr, IS_LAST: tl.constexpr, HAS_WEIGHTS: tl.constexpr, HAS_IGNORED: tl.constexpr,
    FAST: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, RUN: tl.constexpr,
    DICE: tl.constexpr, ENTROPY: tl.constexpr,
):  # fmt: skip
    """A row of `partials` per program: overlap, mass, size by class; then entropy and weight."""
    NUM_CHUNKS: tl.constexpr = (C + CHUNK - 1) // CHUNK
    volume = tl.program_id(1).to(tl.int64)  # offsets in a batch may exceed 32 bits
    classes = tl.arange(0, CHUNK)[None, :, None]
    voxel = tl.arange(0, ROWS)[:, None, None] * RUN + tl.arange(0, RUN)[None, None, :]
    stride = 1 if IS_LAST else tl.cast(num_voxels, tl.int64)
    logits += volume * num_voxels * C
    label += volume * num_voxels
    overlap, mass, size = (), (), ()
    for _ in tl.static_range(NUM_CHUNKS):
        zeros = tl.zeros((ROWS, CHUNK, RUN), tl.float32)
        overlap, mass, size = overlap + (zeros,), mass + (zeros,), size + (zeros,)
    entropy = tl.zeros((ROWS, 1, RUN), tl.float32)

    first = tl.program_id(0).to(tl.int64)
    for tile in range(first, tl.cdiv(num_voxels, ROWS * RUN), tl.num_programs(0)):
        es, inverse, target, known, from_first, nll = _read(
            logits, label, tile * (ROWS * RUN), voxel, num_voxels, classes, stride, ignored,
            C, IS_LAST, HAS_IGNORED, CHUNK, FAST,
        )  # fmt: skip
        own = tl.exp2(-nll)
        if ENTROPY:
            if HAS_WEIGHTS:
                nll *= tl.load(weights + target, mask=known, other=0.0)
            entropy += tl.where(known, nll, 0.0)
        before, overlap, mass, size = (overlap, mass, size), (), (), ()
        for k in tl.static_range(NUM_CHUNKS):
            is_own = from_first == k * CHUNK
            size = size + (tl.where(is_own, before[2][k] + 1.0, before[2][k]),)
            if DICE:
                more = tl.where(is_own, before[0][k] + own, before[0][k])
                overlap, mass = overlap + (more,), mass + (before[1][k] + es[k] * inverse,)
            else:
                overlap, mass = before[0], before[1]

    row = partials + (volume * tl.num_programs(0) + tl.program_id(0)) * (3 * C + 2)
    n = tl.arange(0, CHUNK)
    weight = tl.zeros((CHUNK,), tl.float32)
    for k in tl.static_range(NUM_CHUNKS):
        at, is_class = row + k * CHUNK + n, n < C - k * CHUNK
        count = tl.sum(tl.sum(size[k], 2), 0)
        tl.store(at, tl.sum(tl.sum(overlap[k], 2), 0), mask=is_class)
        tl.store(at + C, tl.sum(tl.sum(mass[k], 2), 0), mask=is_class)
        tl.store(at + 2 * C, count, mask=is_class)
        if HAS_WEIGHTS:
            count *= tl.load(weights + k * CHUNK + n, mask=is_class, other=0.0)
        weight += count
    tl.store(row + 3 * C, tl.sum(tl.sum(tl.sum(entropy, 2), 1), 0) * LN2)
    tl.store(row + 3 * C + 1, tl.sum(weight, 0))


@triton.jit(do_not_specialize=["ignored"])
def gradient_kernel(
    logits, label, weights, rates, gradient, num_voxels, ignored,
    C: tl.constexpr, IS_LAST: tl.constexpr, HAS_WEIGHTS: tl.constexpr, HAS_IGNORED: tl.constexpr,
    FAST: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """Gradient by the logits, of `rates`: the loss's by each volume's sums, as in `partials`."""
    NUM_CHUNKS: tl.constexpr = (C + CHUNK - 1) // CHUNK
    volume = tl.program_id(1).to(tl.int64)
    classes = tl.arange(0, CHUNK)[None, :, None]
    voxel = tl.arange(0, ROWS)[:, None, None] * RUN + tl.arange(0, RUN)[None, None, :]
    stride = 1 if IS_LAST else tl.cast(num_voxels, tl.int64)
    logits += volume * num_voxels * C
    gradient += volume * num_voxels * C
    label += volume * num_voxels
    rates += volume * (3 * C + 2)
    of_mass = ()
    for k in tl.static_range(NUM_CHUNKS):
        of_class = rates + C + k * CHUNK + classes
        of_mass = of_mass + (tl.load(of_class, mask=classes < C - k * CHUNK, other=0.0),)
    of_entropy = tl.load(rates + 3 * C)

    first = tl.program_id(0).to(tl.int64)
    num_tiles = tl.cdiv(num_voxels, ROWS * RUN)
    for tile in range(first, num_tiles, tl.num_programs(0)):
        start = (num_tiles - 1 - tile) * (ROWS * RUN)  # the cache still has some of the end
        es, inverse, target, known, from_first, nll = _read(
            logits, label, start, voxel, num_voxels, classes, stride, ignored,
            C, IS_LAST, HAS_IGNORED, CHUNK, FAST,
        )  # fmt: skip
        by_overlap = tl.load(rates + target, mask=known, other=0.0) * tl.exp2(-nll)
        by_overlap = tl.where(known, by_overlap, 0.0)
        by_entropy = tl.where(known, of_entropy, 0.0)
        if HAS_WEIGHTS:
            by_entropy *= tl.load(weights + target, mask=known, other=0.0)
        for k in tl.static_range(NUM_CHUNKS):
            if k == 0:
                by_mass = es[k] * of_mass[k]
            else:
                by_mass += es[k] * of_mass[k]
        by_mass = tl.sum(by_mass, 1, keep_dims=True) * inverse
        by_all = (by_entropy - by_mass - by_overlap) * inverse
        at = gradient + start * (C if IS_LAST else 1) + voxel * (C if IS_LAST else 1)
        at += classes * stride
        for k in tl.static_range(NUM_CHUNKS):
            g = es[k] * tl.fma(of_mass[k], inverse, by_all)
            g = tl.where(from_first == k * CHUNK, g + (by_overlap - by_entropy), g)
            mask = voxel < num_voxels - start
            if (k + 1) * CHUNK > C:
                mask = mask & (classes < C - k * CHUNK)
            tl.store(at + k * CHUNK * stride, g, mask=mask)


@triton.jit(do_not_specialize=["num_levels"])
def value_kernel(
    totals, weights, value, rates, num_levels, dice_weight, ce_weight, smooth,
    C: tl.constexpr, FIRST: tl.constexpr, HAS_WEIGHTS: tl.constexpr, BATCH_DICE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The loss of `SegmentationLoss._sums` of all levels, and its `rates`; in float64."""
    n = tl.arange(0, BLOCK)
    is_class = n < C
    share = tl.where(is_class & (n >= FIRST), 1.0, 0.0).to(tl.float64) / (C - FIRST)
    if HAS_WEIGHTS:
        share *= tl.load(weights + n, mask=is_class, other=0.0)
    parts = tl.zeros((), tl.float64)
    for level in range(num_levels):
        parts += tl.exp2(-1.0 * level)
    loss = tl.zeros((), tl.float64)
    for level in range(num_levels):
        factor = tl.exp2(-1.0 * level) / parts
        of_terms = share * dice_weight * factor
        if BATCH_DICE:
            row, rate = totals + level * (3 * C + 2), rates + level * (3 * C + 2)
            both = tl.load(row + C + n, is_class, 0.0) + tl.load(row + 2 * C + n, is_class, 0.0)
            both += smooth
            ratio = (2 * tl.load(row + n, is_class, 0.0) + smooth) / both
            loss += tl.sum(of_terms * (1 - ratio), 0)
            tl.store(rate + n, -2 * of_terms / both, mask=is_class)
            tl.store(rate + C + n, of_terms * ratio / both, mask=is_class)
            tl.store(rate + 2 * C + n, of_terms * ratio / both, mask=is_class)
            row, rate = row + 3 * C, rate + 3 * C
        else:
            row, rate = totals + level * (2 * C + 2), rates + level * (2 * C + 2)
            of_terms /= tl.load(row + C + n, is_class, 1.0)  # the number of volumes
            loss += tl.sum(of_terms * tl.load(row + n, is_class, 0.0), 0)
            tl.store(rate + n, of_terms, mask=is_class)
            tl.store(rate + C + n, tl.zeros((BLOCK,), tl.float64), mask=is_class)
            row, rate = row + 2 * C, rate + 2 * C
        # without a valid voxel the mean is 0
        of_entropy = ce_weight * factor / tl.maximum(tl.load(row + 1), 1e-30)
        loss += of_entropy * tl.load(row)
        tl.store(rate, of_entropy)
        tl.store(rate + 1, of_entropy * 0)  # no logit changes it
    tl.store(value, loss)
