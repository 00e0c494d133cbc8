"""The kernels in Triton: linear layers with their norm deferred, and attention of one token.

* `matvec` is for one token: each program reads a few rows of the weights and all of `x`, sums the squares of `x` on the
  side, and applies the norm's scale once, to its sums.
* `matmul` is for several tokens: a tiled product whose epilogue applies each token's scale; the sums of squares are of
  the tiles that the product reads anyway.
* `attend` is for one token over a cache: norms of queries and keys, RoPE, the new entry of the cache, and attention.

Sums are in float32, and products of float32 are no TF32. Pointers that are None are parts that there are not. The sizes
of a layer are constants of the compiled kernel, since a model has few of them.

`DEPENDENT` kernels may start before the kernel ahead of them in the stream has ended (programmatic dependent launch):
each reads only weights before it waits for that one.
"""

import triton
import triton.language as tl
from triton import knobs
from triton.language.extra import cuda

_INTERPRETED = tl.constexpr(knobs.runtime.interpret)


@triton.jit
def _add_dot(a, b, sums):
    if _INTERPRETED:  # the interpreter's `tl.dot` takes the bits of bfloat16 for integers; float32 holds them exactly
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, sums, input_precision="ieee")


@triton.jit
def _dots(
    x,
    gain,
    w,
    w_too,
    row,
    rows,
    stride,
    stride_too,
    offset,
    eps,
    INPUTS: tl.constexpr,
    NORM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Products of rows of one matrix, or of the same rows of two, with the norm of `x`: two of `[ROWS]`."""
    at, cols = row + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    here = (at < rows)[:, None]
    w += at.to(tl.int64)[:, None] * stride + cols[None, :]
    tile = tl.load(w, mask=here & (cols < INPUTS)[None, :], other=0.0)
    tile_too = tile
    if w_too is not None:
        w_too += at.to(tl.int64)[:, None] * stride_too + cols[None, :]
        tile_too = tl.load(w_too, mask=here & (cols < INPUTS)[None, :], other=0.0)
    if DEPENDENT:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    sums = tl.zeros((ROWS, BLOCK), tl.float32)
    sums_too = tl.zeros((ROWS, BLOCK), tl.float32)
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, INPUTS, BLOCK):
        now, now_too = tile, tile_too
        if INPUTS > BLOCK:  # what is next is read before what is here is used
            more = here & (start + BLOCK + cols < INPUTS)[None, :]
            tile = tl.load(w + start + BLOCK, mask=more, other=0.0)
            if w_too is not None:
                tile_too = tl.load(w_too + start + BLOCK, mask=more, other=0.0)
        inside = start + cols < INPUTS
        read = tl.load(x + start + cols, mask=inside, other=0.0).to(tl.float32)
        if NORM:
            squares += read * read
        if gain is not None:
            read *= tl.load(gain + start + cols, mask=inside, other=0.0).to(tl.float32) + offset
        sums += now.to(tl.float32) * read[None, :]
        if w_too is not None:
            sums_too += now_too.to(tl.float32) * read[None, :]
    y, y_too = tl.sum(sums, 1), tl.sum(sums_too, 1)
    if NORM:
        scale = tl.rsqrt(tl.sum(squares, 0) / INPUTS + eps)
        y, y_too = y * scale, y_too * scale
    return y, y_too


@triton.jit
def _add_bias(y, bias, at, rows):
    if bias is not None:
        y += tl.load(bias + at, mask=at < rows, other=0.0).to(tl.float32)
    return y


@triton.jit
def _one_matrix(
    x,
    gain,
    w,
    bias,
    residual,
    y,
    row,
    rows,
    stride,
    offset,
    eps,
    factor,
    INPUTS: tl.constexpr,
    NORM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    sums, _ = _dots(x, gain, w, None, row, rows, stride, 0, offset, eps, INPUTS, NORM, ROWS, BLOCK, DEPENDENT)
    at = row + tl.arange(0, ROWS)
    sums = _add_bias(sums, bias, at, rows) * factor
    if residual is not None:
        sums += tl.load(residual + at, mask=at < rows, other=0.0).to(tl.float32)
    tl.store(y + at, sums.to(y.dtype.element_ty), mask=at < rows)


@triton.jit
def matvec(
    x,
    gain,
    w,
    bias,
    residual,
    y,
    rows,
    stride,
    offset,
    eps,
    factor,
    INPUTS: tl.constexpr,
    NORM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """`y = residual + factor (W RMSNorm(x) + bias)` for one token; grid: blocks of `ROWS` rows."""
    row = tl.program_id(0) * ROWS
    _one_matrix(
        x, gain, w, bias, residual, y, row, rows, stride, offset, eps, factor, INPUTS, NORM, ROWS, BLOCK, DEPENDENT
    )


@triton.jit
def three_matvecs(
    x,
    gain,
    q,
    k,
    v,
    q_bias,
    k_bias,
    v_bias,
    y,
    rows,
    kv_rows,
    q_stride,
    k_stride,
    v_stride,
    offset,
    eps,
    INPUTS: tl.constexpr,
    NORM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """`y = [Q; K; V] RMSNorm(x) + biases` for one token; grid: blocks of rows of Q, then of K, then of V."""
    block, blocks, kv_blocks = tl.program_id(0), tl.cdiv(rows, ROWS), tl.cdiv(kv_rows, ROWS)
    if block < blocks:
        _one_matrix(
            x,
            gain,
            q,
            q_bias,
            None,
            y,
            block * ROWS,
            rows,
            q_stride,
            offset,
            eps,
            1.0,
            INPUTS,
            NORM,
            ROWS,
            BLOCK,
            DEPENDENT,
        )
    elif block < blocks + kv_blocks:
        _one_matrix(
            x,
            gain,
            k,
            k_bias,
            None,
            y + rows,
            (block - blocks) * ROWS,
            kv_rows,
            k_stride,
            offset,
            eps,
            1.0,
            INPUTS,
            NORM,
            ROWS,
            BLOCK,
            DEPENDENT,
        )
    else:
        _one_matrix(
            x,
            gain,
            v,
            v_bias,
            None,
            y + rows + kv_rows,
            (block - blocks - kv_blocks) * ROWS,
            kv_rows,
            v_stride,
            offset,
            eps,
            1.0,
            INPUTS,
            NORM,
            ROWS,
            BLOCK,
            DEPENDENT,
        )


@triton.jit
def gated_matvec(
    x,
    gain,
    gate,
    up,
    gate_bias,
    up_bias,
    y,
    rows,
    stride,
    stride_too,
    offset,
    eps,
    INPUTS: tl.constexpr,
    NORM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """`y = silu(gate(RMSNorm(x))) * up(RMSNorm(x))` for one token (SwiGLU); grid: blocks of `ROWS` rows."""
    row = tl.program_id(0) * ROWS
    opened, passed = _dots(
        x, gain, gate, up, row, rows, stride, stride_too, offset, eps, INPUTS, NORM, ROWS, BLOCK, DEPENDENT
    )
    at = row + tl.arange(0, ROWS)
    opened, passed = _add_bias(opened, gate_bias, at, rows), _add_bias(passed, up_bias, at, rows)
    made = opened / (1.0 + tl.exp(-opened)) * passed
    tl.store(y + at, made.to(y.dtype.element_ty), mask=at < rows)


@triton.jit
def matmul(
    x,
    gain,
    w,
    bias,
    y,
    tokens,
    rows,
    x_stride,
    w_stride,
    eps,
    INPUTS: tl.constexpr,
    NORM: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """`y = W RMSNorm(x) + bias`: `[tokens, INPUTS]` -> `[tokens, rows]`; grid: tiles of `TOKENS` x `ROWS` outputs.

    `GROUP` blocks of tokens take turns with the same weights, so that these are still in the L2 cache.
    """
    tile, token_blocks, row_blocks = tl.program_id(0), tl.cdiv(tokens, TOKENS), tl.cdiv(rows, ROWS)
    first = tile // (GROUP * row_blocks) * GROUP
    size = min(token_blocks - first, GROUP)
    token = (first + tile % (GROUP * row_blocks) % size) * TOKENS
    row = tile % (GROUP * row_blocks) // size * ROWS
    token_at, row_at, cols = token + tl.arange(0, TOKENS), row + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    x += tl.where(token_at < tokens, token_at, 0).to(tl.int64)[:, None] * x_stride + cols[None, :]
    w += tl.where(row_at < rows, row_at, 0).to(tl.int64)[None, :] * w_stride + cols[:, None]
    sums = tl.zeros((TOKENS, ROWS), tl.float32)
    squares = tl.zeros((TOKENS,), tl.float32)
    for start in range(0, INPUTS, BLOCK):
        if INPUTS % BLOCK == 0:
            read, weights = tl.load(x + start), tl.load(w + start)
        else:
            inside = start + cols < INPUTS
            read = tl.load(x + start, mask=inside[None, :], other=0.0)
            weights = tl.load(w + start, mask=inside[:, None], other=0.0)
        if NORM:
            wide = read.to(tl.float32)
            squares += tl.sum(wide * wide, 1)
        if gain is not None:
            inside = start + cols < INPUTS
            gains = tl.load(gain + start + cols, mask=inside, other=0.0).to(tl.float32)
            read = (read.to(tl.float32) * gains[None, :]).to(weights.dtype)
        sums = _add_dot(read, weights, sums)
    if NORM:
        sums *= tl.rsqrt(squares / INPUTS + eps)[:, None]
    if bias is not None:
        sums += tl.load(bias + row_at, mask=row_at < rows, other=0.0).to(tl.float32)[None, :]
    y += token_at.to(tl.int64)[:, None] * rows + row_at[None, :]
    tl.store(y, sums.to(y.dtype.element_ty), mask=(token_at < tokens)[:, None] & (row_at < rows)[None, :])


@triton.jit
def rms_norm(x, gain, y, stride, eps, INPUTS: tl.constexpr, BLOCK: tl.constexpr):
    """`RMSNorm(x)`, rounded: `[tokens, INPUTS]` of both; grid: tokens."""
    token, cols = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    read = tl.load(x + token * stride + cols, mask=cols < INPUTS, other=0.0).to(tl.float32)
    made = read * tl.rsqrt(tl.sum(read * read, 0) / INPUTS + eps)
    if gain is not None:
        made *= tl.load(gain + cols, mask=cols < INPUTS, other=0.0).to(tl.float32)
    tl.store(y + token * INPUTS + cols, made.to(y.dtype.element_ty), mask=cols < INPUTS)


@triton.jit
def embed(table, token, position, x, scale, stride, HIDDEN: tl.constexpr, BLOCK: tl.constexpr):
    """`x = scale table[token]` in float32, and the next position; one program."""
    cols = tl.arange(0, BLOCK)
    row = tl.load(token).to(tl.int64) * stride
    read = tl.load(table + row + cols, mask=cols < HIDDEN, other=0.0).to(tl.float32)
    tl.store(x + cols, read * scale, mask=cols < HIDDEN)
    tl.store(position, tl.load(position) + 1)


@triton.jit
def _heads(projected, gain, cos, sin, offset, eps, here, dims, HALF: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Heads `[heads, dims]` after their norm, if there is one, and RoPE: `(a cos - b sin, b cos + a sin)`."""
    rotated = dims < 2 * HALF
    partner = tl.where(dims < HALF, dims + HALF, tl.where(rotated, dims - HALF, dims))
    a = tl.load(projected + dims[None, :], mask=here, other=0.0)
    b = tl.load(projected + partner[None, :], mask=here, other=0.0)
    inside = dims < HEAD_DIM
    if gain is not None:
        scale = tl.rsqrt(tl.sum(a * a, 1) / HEAD_DIM + eps)[:, None]
        a *= scale * (tl.load(gain + dims, mask=inside, other=0.0).to(tl.float32) + offset)[None, :]
        b *= scale * (tl.load(gain + partner, mask=inside, other=0.0).to(tl.float32) + offset)[None, :]
    pair = tl.where(dims < HALF, dims, dims - HALF)
    c = tl.load(cos + pair, mask=rotated, other=1.0)
    s = tl.load(sin + pair, mask=rotated, other=0.0)
    return a * c[None, :] + b * tl.where(dims < HALF, -s, s)[None, :]


@triton.jit
def attend(
    projected,
    q_gain,
    k_gain,
    cos,
    sin,
    position,
    keys,
    values,
    partial,
    arrived,
    y,
    capacity,
    offset,
    qk_eps,
    scale,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    GROUP: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Attention of one token, whose key and value enter the cache; grid: `(KV_HEADS, PARTS)`.

    Each program attends to a part of the cache, for the query heads of one key-value head. The one that ends last puts
    the parts together.

    Args:
        projected: `[(HEADS + 2 KV_HEADS) HEAD_DIM]`, float32, queries first.
        q_gain, k_gain: `[HEAD_DIM]`; None if there are no such norms.
        cos, sin: `[capacity, HALF]`, float32.
        position: `[1]`, the token's.
        keys, values: `[KV_HEADS, capacity, HEAD_DIM]`, in their dtype.
        partial: `[KV_HEADS, PARTS, GROUP, DIMS + 2]`, float32: sums, their largest score and their weight.
        arrived: `[KV_HEADS]`, zeros, which it leaves as it was.
        y: `[HEADS HEAD_DIM]`, float32.
    """
    head, part = tl.program_id(0), tl.program_id(1)
    group, dims = tl.arange(0, GROUP), tl.arange(0, DIMS)
    per_head: tl.constexpr = HEADS // KV_HEADS
    inside = dims < HEAD_DIM
    here = (group < per_head)[:, None] & inside[None, :]
    if DEPENDENT:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    at = tl.load(position)
    cos, sin = cos + at * HALF, sin + at * HALF
    q = _heads(
        projected + (head * per_head + group)[:, None] * HEAD_DIM,
        q_gain,
        cos,
        sin,
        offset,
        qk_eps,
        here,
        dims,
        HALF,
        HEAD_DIM,
    )
    q = q.to(keys.dtype.element_ty)
    keys += head.to(tl.int64) * capacity * HEAD_DIM
    values += head.to(tl.int64) * capacity * HEAD_DIM
    each = tl.cdiv(tl.cdiv(at + 1, BLOCK), PARTS) * BLOCK
    start, end = part * each, min((part + 1) * each, at)
    y += (head * per_head + group)[:, None] * HEAD_DIM + dims[None, :]
    best = tl.full((GROUP,), float("-inf"), tl.float32)
    weight = tl.zeros((GROUP,), tl.float32)
    sums = tl.zeros((GROUP, DIMS), tl.float32)
    if (start <= at) & (at < start + each):  # this program has the new token's key and value
        one = tl.arange(0, 1)
        k = _heads(
            projected + (HEADS + head + one)[:, None] * HEAD_DIM,
            k_gain,
            cos,
            sin,
            offset,
            qk_eps,
            inside[None, :],
            dims,
            HALF,
            HEAD_DIM,
        )
        v = tl.load(projected + (HEADS + KV_HEADS + head) * HEAD_DIM + dims, mask=inside, other=0.0)[None, :]
        k, v = k.to(keys.dtype.element_ty), v.to(values.dtype.element_ty)
        tl.store(keys + at * HEAD_DIM + dims[None, :], k, mask=inside[None, :])
        tl.store(values + at * HEAD_DIM + dims[None, :], v, mask=inside[None, :])
        best = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1) * scale
        weight = tl.full((GROUP,), 1.0, tl.float32)
        sums += v.to(tl.float32)
    for first in range(start, end, BLOCK):
        there = first + tl.arange(0, BLOCK)
        k = tl.load(
            keys + there[None, :] * HEAD_DIM + dims[:, None], mask=(there < end)[None, :] & inside[:, None], other=0.0
        )
        v = tl.load(
            values + there[:, None] * HEAD_DIM + dims[None, :], mask=(there < end)[:, None] & inside[None, :], other=0.0
        )
        scores = _add_dot(q, k, tl.zeros((GROUP, BLOCK), tl.float32)) * scale
        scores = tl.where((there < end)[None, :], scores, float("-inf"))
        better = tl.maximum(best, tl.max(scores, 1))
        chances = tl.exp(scores - better[:, None])
        shrink = tl.exp(best - better)
        weight = weight * shrink + tl.sum(chances, 1)
        sums = _add_dot(chances.to(v.dtype), v, sums * shrink[:, None])
        best = better
    if PARTS > 1:
        mine = partial + (head * PARTS + part) * GROUP * (DIMS + 2) + group * (DIMS + 2)
        tl.store(mine[:, None] + dims[None, :], sums)
        tl.store(mine + DIMS, best)
        tl.store(mine + DIMS + 1, weight)
        tl.debug_barrier()  # so that all of it is written before this program counts as arrived
        if tl.atomic_add(arrived + head, 1, sem="acq_rel") == PARTS - 1:
            tl.store(arrived + head, 0)
            best = tl.full((GROUP,), float("-inf"), tl.float32)
            weight = tl.zeros((GROUP,), tl.float32)
            sums = tl.zeros((GROUP, DIMS), tl.float32)
            for other in range(tl.minimum(PARTS, tl.cdiv(at + 1, each))):
                there = partial + (head * PARTS + other) * GROUP * (DIMS + 2) + group * (DIMS + 2)
                score = tl.load(there + DIMS, cache_modifier=".cg")
                better = tl.maximum(best, score)
                shrink, grow = tl.exp(best - better), tl.exp(score - better)
                weight = weight * shrink + tl.load(there + DIMS + 1, cache_modifier=".cg") * grow
                more = tl.load(there[:, None] + dims[None, :], cache_modifier=".cg")
                sums = sums * shrink[:, None] + more * grow[:, None]
                best = better
            tl.store(y, sums / weight[:, None], mask=here)
    else:
        tl.store(y, sums / weight[:, None], mask=here)
