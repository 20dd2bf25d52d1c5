"""Triton kernels of the dense U-Net's layers that only move memory.

All tensors are channels last: a *row* is one voxel with its channels, and rows follow one another
as `(b, z, y, x)`. Sums are float32 in an order that shapes alone decide, without atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def moments_of_parts(
    x, parts, num_rows, part_rows, channels, ROWS: tl.constexpr, CHANNELS: tl.constexpr
):
    """Mean and sum of squared deviations of each part of each image: (B, P, 2, C)."""
    part, image = tl.program_id(0), tl.program_id(2)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    first, last = part * part_rows, tl.minimum((part + 1) * part_rows, num_rows)
    x += image.to(tl.int64) * num_rows * channels
    here = c < channels
    # about a value of the part itself: of a sum of squares little is left where the mean is large
    origin = tl.load(x + first.to(tl.int64) * channels + c, mask=here, other=0).to(tl.float32)
    total = tl.zeros((ROWS, CHANNELS), tl.float32)
    squares = tl.zeros((ROWS, CHANNELS), tl.float32)
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < last)[:, None] & here[None, :]
        value = tl.load(x + row.to(tl.int64)[:, None] * channels + c[None, :], mask=mask, other=0)
        value = tl.where(mask, value.to(tl.float32) - origin[None, :], 0.0)
        total += value
        squares += value * value
    count = (last - first).to(tl.float32)
    total, squares = tl.sum(total, 0), tl.sum(squares, 0)
    parts += ((image * tl.num_programs(0) + part) * 2).to(tl.int64) * channels + c
    tl.store(parts, origin + total / count, mask=here)
    tl.store(parts + channels, squares - total * total / count, mask=here)


@triton.jit
def moments(
    parts, mean, rstd, running_mean, running_var, num_rows, part_rows, channels, eps, momentum,
    NUM_PARTS: tl.constexpr, IMAGES: tl.constexpr, RUNNING: tl.constexpr,
    PARTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Mean and 1/std of each group of `IMAGES` images, (G, C), and running statistics."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    group, here = tl.program_id(1), c < channels
    parts += (group * IMAGES * NUM_PARTS * 2).to(tl.int64) * channels
    number = num_rows * 1.0 * IMAGES
    total = tl.zeros((PARTS, CHANNELS), tl.float32)
    for start in range(0, IMAGES * NUM_PARTS, PARTS):
        p = start + tl.arange(0, PARTS)
        mask = (p < IMAGES * NUM_PARTS)[:, None] & here[None, :]
        rows = tl.minimum(num_rows - (p % NUM_PARTS) * part_rows, part_rows).to(tl.float32)
        at = parts + (p * 2)[:, None] * channels + c[None, :]
        total += tl.load(at, mask=mask, other=0) * rows[:, None] / number
    centre = tl.sum(total, 0)
    squares = tl.zeros((PARTS, CHANNELS), tl.float32)
    for start in range(0, IMAGES * NUM_PARTS, PARTS):
        p = start + tl.arange(0, PARTS)
        mask = (p < IMAGES * NUM_PARTS)[:, None] & here[None, :]
        rows = tl.minimum(num_rows - (p % NUM_PARTS) * part_rows, part_rows).to(tl.float32)
        at = parts + (p * 2)[:, None] * channels + c[None, :]
        off = tl.load(at, mask=mask, other=0) - centre[None, :]
        spread = tl.load(at + channels, mask=mask, other=0)
        squares += tl.where(mask, spread + off * off * rows[:, None], 0.0)
    deviation = tl.sum(squares, 0)
    at = group * channels + c
    tl.store(mean + at, centre, mask=here)
    tl.store(rstd + at, 1 / tl.sqrt_rn(deviation / number + eps), mask=here)
    if RUNNING:
        old_mean = tl.load(running_mean + c, mask=here)
        old_var = tl.load(running_var + c, mask=here)
        unbiased = deviation / (number - 1)
        tl.store(running_mean + c, old_mean + momentum * (centre - old_mean), mask=here)
        tl.store(running_var + c, old_var + momentum * (unbiased - old_var), mask=here)


@triton.jit
def norm_relu_kernel(
    x, out, mean, rstd, weight, bias, num_rows, channels, PER_IMAGE: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """max(0, weight · (x − mean) / std + bias)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c, image = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS), tl.program_id(2)
    here = c < channels
    mask = (row < num_rows)[:, None] & here[None, :]
    at_c = image * PER_IMAGE * channels + c
    scale = tl.load(rstd + at_c, mask=here) * tl.load(weight + c, mask=here)
    shift = tl.load(bias + c, mask=here) - tl.load(mean + at_c, mask=here) * scale
    at = (image.to(tl.int64) * num_rows + row)[:, None] * channels + c[None, :]
    value = tl.load(x + at, mask=mask).to(tl.float32) * scale[None, :] + shift[None, :]
    value = tl.where(value <= 0, 0.0, value)  # NaN stays NaN
    tl.store(out + at, value, mask=mask)


@triton.jit
def _gated(grad, x, mean, rstd, weight, bias):
    """Gradient where ReLU let it through, and the normalised values."""
    normal = (x - mean) * rstd
    return tl.where(normal * weight + bias <= 0, 0.0, grad), normal


@triton.jit
def norm_relu_sums_of_parts(
    grad, x, parts, mean, rstd, weight, bias, num_rows, part_rows, channels, grad_stride,
    PER_IMAGE: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Sums of the gated gradient, and of its product with normalised values: (B, P, 2, C)."""
    part, image = tl.program_id(0), tl.program_id(2)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    here, at_c = c < channels, image * PER_IMAGE * channels + c
    m = tl.load(mean + at_c, mask=here)[None, :]
    r = tl.load(rstd + at_c, mask=here)[None, :]
    w, b = tl.load(weight + c, mask=here)[None, :], tl.load(bias + c, mask=here)[None, :]
    first, last = part * part_rows, tl.minimum((part + 1) * part_rows, num_rows)
    total = tl.zeros((ROWS, CHANNELS), tl.float32)
    product = tl.zeros((ROWS, CHANNELS), tl.float32)
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < last)[:, None] & here[None, :]
        at = (image.to(tl.int64) * num_rows + row)[:, None]
        value = tl.load(x + at * channels + c[None, :], mask=mask, other=0).to(tl.float32)
        g = tl.load(grad + at * grad_stride + c[None, :], mask=mask, other=0).to(tl.float32)
        g, normal = _gated(g, value, m, r, w, b)
        total += g
        product += tl.where(mask, g * normal, 0.0)
    parts += ((image * tl.num_programs(0) + part) * 2).to(tl.int64) * channels + c
    tl.store(parts, tl.sum(total, 0), mask=here)
    tl.store(parts + channels, tl.sum(product, 0), mask=here)


@triton.jit
def norm_relu_sums(
    parts, sums, grad_weight, grad_bias, channels, NUM_PARTS: tl.constexpr, IMAGES: tl.constexpr,
    GROUPS: tl.constexpr, PARTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The sums of each group, (G, 2, C), and of all: the gradients of weight and bias."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    here = c < channels
    of_all = tl.zeros((CHANNELS,), tl.float32)
    product_of_all = tl.zeros((CHANNELS,), tl.float32)
    for group in range(GROUPS):
        total = tl.zeros((PARTS, CHANNELS), tl.float32)
        product = tl.zeros((PARTS, CHANNELS), tl.float32)
        for start in range(0, IMAGES * NUM_PARTS, PARTS):
            p = start + tl.arange(0, PARTS)
            mask = (p < IMAGES * NUM_PARTS)[:, None] & here[None, :]
            row = ((group * IMAGES * NUM_PARTS + p) * 2)[:, None]
            at = parts + row.to(tl.int64) * channels + c[None, :]
            total += tl.load(at, mask=mask, other=0)
            product += tl.load(at + channels, mask=mask, other=0)
        of_group, product_of_group = tl.sum(total, 0), tl.sum(product, 0)
        tl.store(sums + group * 2 * channels + c, of_group, mask=here)
        tl.store(sums + (group * 2 + 1) * channels + c, product_of_group, mask=here)
        of_all += of_group
        product_of_all += product_of_group
    tl.store(grad_bias + c, of_all, mask=here)
    tl.store(grad_weight + c, product_of_all, mask=here)


@triton.jit
def norm_relu_backward(
    grad, x, out, mean, rstd, weight, bias, sums, num_rows, channels, grad_stride, number,
    PER_IMAGE: tl.constexpr, FIXED: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Gradient of `x`; of `FIXED` statistics it does not go through mean and std."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c, image = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS), tl.program_id(2)
    here, at_c = c < channels, image * PER_IMAGE * channels + c
    mask = (row < num_rows)[:, None] & here[None, :]
    m = tl.load(mean + at_c, mask=here)[None, :]
    r = tl.load(rstd + at_c, mask=here)[None, :]
    w, b = tl.load(weight + c, mask=here)[None, :], tl.load(bias + c, mask=here)[None, :]
    at = (image.to(tl.int64) * num_rows + row)[:, None]
    value = tl.load(x + at * channels + c[None, :], mask=mask, other=0).to(tl.float32)
    g = tl.load(grad + at * grad_stride + c[None, :], mask=mask, other=0).to(tl.float32)
    g, normal = _gated(g, value, m, r, w, b)
    if not FIXED:
        of_group = sums + image * PER_IMAGE * 2 * channels + c
        total = tl.load(of_group, mask=here)[None, :]
        product = tl.load(of_group + channels, mask=here)[None, :]
        g -= (total + normal * product) / number
    tl.store(out + at * channels + c[None, :], g * (w * r), mask=mask)


@triton.jit
def max_pool(
    x, out, depth, height, width, channels, Z: tl.constexpr, Y: tl.constexpr, X: tl.constexpr,
    POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Largest value of each cell of Z × Y × X voxels; NaN where there is one."""
    cells_x, cells_y, cells_z = width // X, height // Y, depth // Z
    line, c = tl.program_id(0).to(tl.int64), tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    cell = tl.program_id(1) * POSITIONS + tl.arange(0, POSITIONS)
    y, z, image = line % cells_y, line // cells_y % cells_z, line // cells_y // cells_z
    mask = (cell < cells_x)[:, None] & (c < channels)[None, :]
    most = tl.full((POSITIONS, CHANNELS), float("-inf"), tl.float32)
    for dz in tl.static_range(Z):
        for dy in tl.static_range(Y):
            for dx in tl.static_range(X):
                row = ((image * depth + z * Z + dz) * height + y * Y + dy) * width + cell * X + dx
                at = row[:, None] * channels + c[None, :]
                value = tl.load(x + at, mask=mask, other=0).to(tl.float32)
                most = tl.where((value > most) | (value != value), value, most)
    row = line * cells_x + cell
    tl.store(out + row[:, None] * channels + c[None, :], most, mask=mask)


@triton.jit
def max_pool_backward(
    x, grad_pooled, grad_skip, out, depth, height, width, channels, skip_stride,
    Z: tl.constexpr, Y: tl.constexpr, X: tl.constexpr,
    POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """`grad_skip` and, at the first largest voxel of each whole cell, `grad_pooled`."""
    cells_x, cells_y, cells_z = width // X, height // Y, depth // Z
    lines_y, lines_z = tl.cdiv(height, Y), tl.cdiv(depth, Z)
    line, c = tl.program_id(0).to(tl.int64), tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    cell = tl.program_id(1) * POSITIONS + tl.arange(0, POSITIONS)
    y, z, image = line % lines_y, line // lines_y % lines_z, line // lines_y // lines_z
    here = (c < channels)[None, :]
    # sizes are 0 where there is nothing: a scalar and a mask are not to be combined in every Triton
    whole = (cell < tl.where(y < cells_y, tl.where(z < cells_z, cells_x, 0), 0))[:, None] & here
    most = tl.full((POSITIONS, CHANNELS), float("-inf"), tl.float32)
    largest = tl.zeros((POSITIONS, CHANNELS), tl.int32)
    for dz in tl.static_range(Z):
        for dy in tl.static_range(Y):
            for dx in tl.static_range(X):
                row = ((image * depth + z * Z + dz) * height + y * Y + dy) * width + cell * X + dx
                value = tl.load(x + row[:, None] * channels + c[None, :], mask=whole, other=0)
                value = value.to(tl.float32)
                more = (value > most) | (value != value)
                most = tl.where(more, value, most)
                largest = tl.where(more, (dz * Y + dy) * X + dx, largest)
    row = ((image * cells_z + z) * cells_y + y) * cells_x + cell
    pooled = tl.load(grad_pooled + row[:, None] * channels + c[None, :], mask=whole, other=0)
    pooled = pooled.to(tl.float32)
    for dz in tl.static_range(Z):
        for dy in tl.static_range(Y):
            for dx in tl.static_range(X):
                inside = tl.where(z * Z + dz < depth, tl.where(y * Y + dy < height, width, 0), 0)
                mask = (cell * X + dx < inside)[:, None] & here
                row = ((image * depth + z * Z + dz) * height + y * Y + dy) * width + cell * X + dx
                skip = tl.load(grad_skip + row[:, None] * skip_stride + c[None, :], mask=mask)
                share = tl.where(largest == (dz * Y + dy) * X + dx, pooled, 0.0)
                at = out + row[:, None] * channels + c[None, :]
                tl.store(at, skip.to(tl.float32) + share, mask=mask)


@triton.jit
def _taps(o, size_in, size_out):
    """The two inputs that output `o` of an axis is between, and the second one's weight."""
    source = tl.maximum((o.to(tl.float32) + 0.5) * (size_in / size_out) - 0.5, 0.0)
    low = tl.minimum(source.to(tl.int32), size_in - 1)
    return low, tl.minimum(low + 1, size_in - 1), source - low.to(tl.float32)


@triton.jit
def _outputs(j, n, size_in, size_out):
    """Output number `n` of those between inputs `j` and `j` + 1, its weight of the second one,
    and whether there is one; `j` begins at -1, before the first input."""
    first = tl.ceil((j.to(tl.float32) + 0.5) * (size_out / size_in) - 0.5).to(tl.int32)
    o = first + n
    source = (o.to(tl.float32) + 0.5) * (size_in / size_out) - 0.5
    is_inside = tl.where(o >= 0, tl.where(o < size_out, 1, 0), 0)
    is_one = tl.where(tl.floor(source).to(tl.int32) == j, is_inside, 0)
    return o, source - j.to(tl.float32), is_one


@triton.jit
def upsample_kernel(
    x, out, d_in, h_in, w_in, d_out, h_out, w_out, channels, out_stride,
    NUM_Z: tl.constexpr, NUM_Y: tl.constexpr, FIRST: tl.constexpr,
    POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Trilinear interpolation, align_corners False, into the first channels of `out`.

    A program has the outputs that lie between the same inputs along z and y, which it reads once.
    """
    line, c = tl.program_id(0), tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    ox = tl.program_id(1) * POSITIONS + tl.arange(0, POSITIONS)
    jy, jz = line % (h_in + 1) - 1, line // (h_in + 1) % (d_in + 1) - 1
    image = line // (h_in + 1) // (d_in + 1)
    x0, x1, fx = _taps(ox, w_in, w_out)
    fx = fx[:, None]
    mask = (ox < w_out)[:, None] & (c < channels)[None, :]
    z0, z1 = tl.maximum(jz, 0), tl.minimum(jz + 1, d_in - 1)
    y0, y1 = tl.maximum(jy, 0), tl.minimum(jy + 1, h_in - 1)
    left, right = x0[:, None] * channels + c[None, :], x1[:, None] * channels + c[None, :]
    z0y0 = x + ((image * d_in + z0) * h_in + y0).to(tl.int64) * w_in * channels
    z0y1 = x + ((image * d_in + z0) * h_in + y1).to(tl.int64) * w_in * channels
    z1y0 = x + ((image * d_in + z1) * h_in + y0).to(tl.int64) * w_in * channels
    z1y1 = x + ((image * d_in + z1) * h_in + y1).to(tl.int64) * w_in * channels
    v00 = _between(tl.load(z0y0 + left, mask=mask), tl.load(z0y0 + right, mask=mask), fx)
    v01 = _between(tl.load(z0y1 + left, mask=mask), tl.load(z0y1 + right, mask=mask), fx)
    v10 = _between(tl.load(z1y0 + left, mask=mask), tl.load(z1y0 + right, mask=mask), fx)
    v11 = _between(tl.load(z1y1 + left, mask=mask), tl.load(z1y1 + right, mask=mask), fx)
    for ny in tl.static_range(NUM_Y):
        oy, fy, is_y = _outputs(jy, ny + FIRST, h_in, h_out)
        v0, v1 = _between(v00, v01, fy), _between(v10, v11, fy)
        for nz in tl.static_range(NUM_Z):
            oz, fz, is_z = _outputs(jz, nz + FIRST, d_in, d_out)
            row = ((image * d_out + oz) * h_out + oy).to(tl.int64) * w_out + ox
            at = out + row[:, None] * out_stride + c[None, :]
            within = (ox < w_out * is_y * is_z)[:, None] & (c < channels)[None, :]
            tl.store(at, _between(v0, v1, fz), mask=within)


@triton.jit
def _between(low, high, weight):
    return low.to(tl.float32) * (1 - weight) + high.to(tl.float32) * weight


@triton.jit
def _share(o, i, size_in, size_out):
    """Weight of input `i` in output `o` of an axis; 0 outside of it."""
    low, high, weight = _taps(o, size_in, size_out)
    share = tl.where(low == i, 1 - weight, 0.0) + tl.where(high == i, weight, 0.0)
    return tl.where((o >= 0) & (o < size_out), share, 0.0)


@triton.jit
def _first(i, size_in, size_out):
    """The first output of an axis that input `i` has a share in."""
    return tl.floor((i.to(tl.float32) - 0.5) * (size_out / size_in) - 0.5).to(tl.int32) + 1


@triton.jit
def upsample_backward(
    grad, out, d_in, h_in, w_in, d_out, h_out, w_out, channels, grad_stride,
    TAPS_Z: tl.constexpr, TAPS_Y: tl.constexpr, TAPS_X: tl.constexpr,
    POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Gradient of `upsample`'s input: each gathers from the outputs that it has a share in."""
    line, c = tl.program_id(0), tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    ix = tl.program_id(1) * POSITIONS + tl.arange(0, POSITIONS)
    iy, iz, image = line % h_in, line // h_in % d_in, line // h_in // d_in
    first_z, first_y = _first(iz, d_in, d_out), _first(iy, h_in, h_out)
    first_x = _first(ix, w_in, w_out)
    result = tl.zeros((POSITIONS, CHANNELS), tl.float32)
    inside = (ix < w_in)[:, None] & (c < channels)[None, :]
    for tap_z in range(TAPS_Z):
        oz = first_z + tap_z
        wz = _share(oz, iz, d_in, d_out)
        for tap_y in tl.static_range(TAPS_Y):
            oy = first_y + tap_y
            wzy = wz * _share(oy, iy, h_in, h_out)
            base = ((image * d_out + oz) * h_out + oy).to(tl.int64) * w_out
            for tap_x in tl.static_range(TAPS_X):
                ox = first_x + tap_x
                weight = wzy * _share(ox, ix, w_in, w_out)
                mask = inside & (weight != 0)[:, None]
                at = (base + ox)[:, None] * grad_stride + c[None, :]
                result += tl.load(grad + at, mask=mask, other=0).to(tl.float32) * weight[:, None]
    at = (line.to(tl.int64) * w_in + ix)[:, None] * channels + c[None, :]
    tl.store(out + at, result, mask=inside)


@triton.jit
def copy_rows(
    x, out, num_rows, channels, x_stride, out_stride, ROWS: tl.constexpr, CHANNELS: tl.constexpr
):
    """Channels of rows of one stride to rows of another."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    mask = (row < num_rows)[:, None] & (c < channels)[None, :]
    value = tl.load(x + row[:, None] * x_stride + c[None, :], mask=mask)
    tl.store(out + row[:, None] * out_stride + c[None, :], value, mask=mask)
