"""The step on a GPU in Triton: two launches, however many tensors; gpu.py makes the tables.

A program works on one chunk of one tensor. The first launch writes the sums of its gradients, the second adds up the sums of
its tensor in the order of the chunks and updates parameter and state: no atomics, and the same bits at every repetition.
Bytes of an element in float32: the gradient is read twice (8), parameter and both moments read and written (24), 32 in all;
torch's fused AdamW moves 28, and a clipping pass before it 12 more (read, read, write).

The arithmetic is that of native.c, in float32, with sums in float64; addresses are integers that become pointers here, so
that a table of them is all that a launch needs.
"""

import triton
import triton.language as tl

from agr_hf.optim.backends import tables

PSI: tl.constexpr = tl.constexpr(tables.PSI)
SECOND_REGULARIZED: tl.constexpr = tl.constexpr(tables.SECOND_REGULARIZED)
COUPLED: tl.constexpr = tl.constexpr(tables.COUPLED)
SCALED_BY_NORM: tl.constexpr = tl.constexpr(tables.SCALED_BY_NORM)
PARAM_BF16: tl.constexpr = tl.constexpr(tables.PARAM_BF16)
GRAD_BF16: tl.constexpr = tl.constexpr(tables.GRAD_BF16)
MOMENT_BF16: tl.constexpr = tl.constexpr(tables.MOMENT_BF16)
AT_RANDOM: tl.constexpr = tl.constexpr(tables.AT_RANDOM)
# Places of the numbers of a group, as gpu.py writes them.
NUMBERS: tl.constexpr = tl.constexpr(tables.GROUP_NUMBERS)
SCALE: tl.constexpr = tl.constexpr(0)
LR: tl.constexpr = tl.constexpr(1)
EPS: tl.constexpr = tl.constexpr(2)
DECAY: tl.constexpr = tl.constexpr(3)
LAST_STEP: tl.constexpr = tl.constexpr(4)
PROXIMAL: tl.constexpr = tl.constexpr(5)
BETA1: tl.constexpr = tl.constexpr(6)
BETA2: tl.constexpr = tl.constexpr(7)
BETA3: tl.constexpr = tl.constexpr(8)


@triton.jit
def mix(x):
    """rounding.py's hash, of uint32."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def load_wide(address, at, mask, is_bf16):
    if is_bf16:
        raw = tl.load(address.to(tl.pointer_type(tl.uint16)) + at, mask=mask, other=0)
        wide = (raw.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        wide = tl.load(address.to(tl.pointer_type(tl.float32)) + at, mask=mask, other=0.0)
    return wide


@triton.jit
def to_bf16(x, at_random, random):
    """The bits of float32 numbers in bfloat16: to nearest, ties to even, or up by 16 random bits."""
    bits = x.to(tl.uint32, bitcast=True)
    added = tl.where(at_random, random, 0x7FFF + ((bits >> 16) & 1))
    return tl.where(x == x, (bits + added) >> 16, 0x7FC0)


@triton.jit
def store_rounded(address, at, mask, x, is_bf16, at_random, random):
    if is_bf16:
        kept = to_bf16(x, at_random, random)
        tl.store(address.to(tl.pointer_type(tl.uint16)) + at, kept.to(tl.uint16), mask=mask)
    else:
        tl.store(address.to(tl.pointer_type(tl.float32)) + at, x, mask=mask)


@triton.jit
def is_usable(norm):
    return (norm > 0) & (norm < float("inf"))


@triton.jit
def split_reciprocal(norm):
    """A power of two and a reciprocal, both far from the ends of float32, whose product is 1 / norm; 0 for no norm."""
    usable = is_usable(norm)
    safe = tl.where(usable, norm, 1.0)
    up = tl.where(safe < 2.0**-100, 2.0**100, tl.where(safe > 2.0**100, 2.0**-100, 1.0))
    return up.to(tl.float32), tl.where(usable, 1.0 / (safe * up), 0.0).to(tl.float32)


@triton.jit
def shrink(x, up, share):
    """Psi(x) = x (1 - |x| / norm)."""
    return x - x * ((tl.abs(x) * up) * share)


@triton.jit
def sums_kernel(
    addresses, rows, rest, chunk_row, chunk_at, numel, flags, slots, numbers, chunk_norms, chunk_squares,
    SQUARES: tl.constexpr, COUPLED_ONLY: tl.constexpr, HANDED_OUT: tl.constexpr, HAS_REST: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of each chunk sum |g|, or of the effective gradient where decay is L2, and sum g^2 where SQUARES."""
    chunk = tl.program_id(0)
    row = tl.load(chunk_row + chunk)
    start = tl.load(chunk_at + chunk)
    flag = tl.load(flags + row)
    param, grad = tl.load(addresses + row), tl.load(addresses + rows + row)
    is_coupled = (flag & COUPLED) != 0
    wanted = (flag & (PSI | SCALED_BY_NORM)) != 0
    if SQUARES:
        wanted = wanted & (is_coupled == 0)  # it is not known yet what the gradient is scaled by
    if COUPLED_ONLY:
        wanted = wanted & is_coupled
    scale = tl.load(numbers + tl.load(slots + row) * NUMBERS + SCALE)
    decay = tl.load(numbers + tl.load(slots + row) * NUMBERS + DECAY)
    end = tl.minimum(start + CHUNK, tl.load(numel + row))
    reads = wanted
    if SQUARES:
        reads = True
    end = tl.where((grad != 0) & reads, end, start)
    norms = tl.zeros((BLOCK,), tl.float64)
    squares = tl.zeros((BLOCK,), tl.float64)
    for block in range(start, end, BLOCK):
        at = block + tl.arange(0, BLOCK)
        mask = at < end
        x = load_wide(grad, at, mask, (flag & GRAD_BF16) != 0)
        if SQUARES:
            squares += x.to(tl.float64) * x.to(tl.float64)
        if is_coupled & wanted:
            p = load_wide(param, at, mask, (flag & PARAM_BF16) != 0)
            if HAS_REST:
                p += load_wide(tl.load(rest + row), at, mask, True)
            x = scale.to(tl.float32) * x + decay.to(tl.float32) * p
        norms += tl.abs(x).to(tl.float64)
    norm = tl.sum(norms, 0)
    if not HANDED_OUT:  # sums that are handed out are of raw gradients
        norm = norm * tl.where(is_coupled, 1.0, tl.abs(scale))
    tl.store(chunk_norms + chunk, tl.where(wanted, norm, 0.0))
    if SQUARES:
        tl.store(chunk_squares + chunk, tl.sum(squares, 0))


@triton.jit
def add_chunks_kernel(first_chunk, chunk_sums, sums, BLOCK: tl.constexpr):
    """Sums of tensors from those of their chunks."""
    row = tl.program_id(0)
    tl.store(sums + row, add_chunks(first_chunk, chunk_sums, row, BLOCK))


@triton.jit
def add_chunks(first_chunk, chunk_sums, row, BLOCK: tl.constexpr):
    start, end = tl.load(first_chunk + row), tl.load(first_chunk + row + 1)
    total = tl.zeros((BLOCK,), tl.float64)
    for block in range(start, end, BLOCK):
        at = block + tl.arange(0, BLOCK)
        total += tl.load(chunk_sums + at, mask=at < end, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def update_kernel(
    addresses, rows, rest, chunk_row, chunk_at, first_chunk, numel, flags, slots, numbers, steps, first_random,
    chunk_norms, given_norms, norms, norms_before, norms_after, skipped, SKIPS: tl.constexpr,
    ADAN: tl.constexpr, NORMS_GIVEN: tl.constexpr, HAS_REST: tl.constexpr, DRAWS: tl.constexpr,
    KEEPS_NORM: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Update parameter and state of each chunk. `steps` count this one; they, the numbers of a group and whether the step is
    `skipped` stay on the device, so that a recorded launch sees the present ones."""
    chunk = tl.program_id(0)
    row = tl.load(chunk_row + chunk)
    start = tl.load(chunk_at + chunk)
    flag = tl.load(flags + row)
    group = numbers + tl.load(slots + row) * NUMBERS
    step = tl.load(steps + row).to(tl.float64)
    scale, lr, eps = tl.load(group + SCALE), tl.load(group + LR), tl.load(group + EPS).to(tl.float32)
    decay = tl.load(group + DECAY)
    is_coupled = (flag & COUPLED) != 0
    psi = ((flag & PSI) != 0) & (step <= tl.load(group + LAST_STEP))
    if NORMS_GIVEN:
        norm = tl.load(given_norms + row) * tl.where(is_coupled, 1.0, tl.abs(scale))
    else:
        norm = add_chunks(first_chunk, chunk_norms, row, 128)
    regularized = (flag & SECOND_REGULARIZED) != 0
    up, share = split_reciprocal(tl.where(psi, norm, 0.0))
    by_norm = tl.where((flag & SCALED_BY_NORM) != 0, norm, 1.0)
    factor = (scale * by_norm).to(tl.float32)
    l2 = (decay * by_norm).to(tl.float32)
    b1, b2 = tl.load(group + BETA1), tl.load(group + BETA2)
    new1, keep2, new2 = (1 - b1).to(tl.float32), b2.to(tl.float32), (1 - b2).to(tl.float32)
    size1 = (lr / (1 - tl.exp(step * tl.log(b1)))).to(tl.float32)
    shrunk_by = tl.where(is_coupled, 1.0, 1 - lr * decay).to(tl.float32)
    param, grad = tl.load(addresses + row), tl.load(addresses + rows + row)
    first_moment, second_moment = tl.load(addresses + 2 * rows + row), tl.load(addresses + 3 * rows + row)
    param_bf16, moment_bf16 = (flag & PARAM_BF16) != 0, (flag & MOMENT_BF16) != 0
    at_random = (flag & AT_RANDOM) != 0
    if SKIPS:
        grad = tl.where(tl.load(skipped) != 0, 0, grad)  # as where there is no gradient
    end = tl.where(grad != 0, tl.minimum(start + CHUNK, tl.load(numel + row)), start)
    if ADAN:
        b3 = tl.load(group + BETA3)
        correction = (1 / tl.sqrt(1 - tl.exp(step * tl.log(b3)))).to(tl.float32)
        keep3, new3 = b3.to(tl.float32), (1 - b3).to(tl.float32)
        size2 = (lr * b2 / (1 - tl.exp(step * tl.log(b2)))).to(tl.float32)
        difference, previous = tl.load(addresses + 4 * rows + row), tl.load(addresses + 5 * rows + row)
        proximal = tl.load(group + PROXIMAL) != 0
        shrunk_by = tl.where(proximal, 1.0, shrunk_by)
        shrunk_after = tl.where(proximal, 1 / (1 + lr * decay), 1.0).to(tl.float32)
        up_before, share_before = up, share
        if KEEPS_NORM:
            up_before, share_before = split_reciprocal(tl.load(norms_before + row))
            if start == 0:
                kept = psi & (regularized == 0) & is_usable(norm)
                before = tl.load(norms_before + row)
                tl.store(norms_after + row, tl.where(grad == 0, before, tl.where(kept, norm, float("inf"))))
    else:
        correction = (1 / tl.sqrt(1 - tl.exp(step * tl.log(b2)))).to(tl.float32)
    if start == 0:
        tl.store(norms + row, norm)
    for block in range(start, end, BLOCK):
        at = block + tl.arange(0, BLOCK)
        mask = at < end
        x = factor * load_wide(grad, at, mask, (flag & GRAD_BF16) != 0)
        p = load_wide(param, at, mask, param_bf16)
        if HAS_REST:
            p += load_wide(tl.load(rest + row), at, mask, True)
        x = tl.where(is_coupled, x + l2 * p, x)
        y = shrink(x, up, share)
        m = load_wide(first_moment, at, mask, moment_bf16)
        v = load_wide(second_moment, at, mask, False)
        if ADAN:
            d = load_wide(difference, at, mask, False)
            x = tl.where(regularized & psi, y, x)
            before = tl.where(step == 1, -x, load_wide(previous, at, mask, False))
            change = x + before
            y_change = tl.where(step == 1, 0.0, y + shrink(before, up_before, share_before))
            y_change = tl.where(psi & (regularized == 0), y_change, change)
            m = m + new1 * (y - m)
            d = keep2 * d + new2 * y_change
            ahead = x + keep2 * change
            v = keep3 * v + new3 * ahead * ahead
            moved = (size1 * m + size2 * d) / (tl.sqrt(v) * correction + eps)
            p = (p * shrunk_by - moved) * shrunk_after
            store_rounded(difference, at, mask, d, False, False, tl.zeros((BLOCK,), tl.uint32))
            store_rounded(previous, at, mask, -x, False, False, tl.zeros((BLOCK,), tl.uint32))
        else:
            z = tl.where(regularized, y, x)
            m = m + new1 * (y - m)
            v = keep2 * v + new2 * z * z
            p = p * shrunk_by - size1 * m / (tl.sqrt(v) * correction + eps)
        random = tl.zeros((BLOCK,), tl.uint32)
        if DRAWS:
            random = mix((tl.load(first_random + row) + at).to(tl.uint32))
        store_rounded(param, at, mask, p, param_bf16, at_random, random & 0xFFFF)
        store_rounded(first_moment, at, mask, m, moment_bf16, at_random, random >> 16)
        store_rounded(second_moment, at, mask, v, False, False, random)
        if HAS_REST:
            kept_bits = to_bf16(p, at_random, random & 0xFFFF)
            kept_wide = (kept_bits << 16).to(tl.float32, bitcast=True)
            store_rounded(tl.load(rest + row), at, mask, p - kept_wide, True, False, random)
