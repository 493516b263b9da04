# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""The kernels: a program computes tiles of a matrix product and uses them where they are made.

Shapes: T tokens, V vocabulary entries, D hidden size, S splits of the vocabulary; a lower-case t
or v is what a tile holds of it.

Matrices are read through tensor descriptors: by the copy engine where the hardware has one, by
plain loads elsewhere. What lies outside a matrix reads as zero and is not written. `_place` orders
the programs so that those which run at one time read the same rows and columns.
"""

import triton
import triton.language as tl

# Where no logit is: finite, so that no difference of two is NaN.
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def _place(tile_rows, tile_columns, GROUP: tl.constexpr):
    """Row and column of this program's tile: down GROUP rows, then on by a column."""
    program = tl.program_id(0)
    first = program // (GROUP * tile_columns) * GROUP
    height = tl.minimum(tile_rows - first, GROUP)
    within = program % (GROUP * tile_columns)
    return first + within % height, within // height


@triton.jit
def _logits(
    hidden_TD, weight_VD, token, entry, D, scale,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Scaled logits of ROWS tokens from `token` on, at COLUMNS vocabulary entries from `entry`."""
    sums_tv = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, D, DEPTH):
        weight_vd = weight_VD.load([entry, start])
        sums_tv = tl.dot(hidden_TD.load([token, start]), weight_vd.T, sums_tv)
    return sums_tv * scale


@triton.jit(do_not_specialize=["T"])
def reduce_logits(
    hidden, weight, targets, peaks, masses, moments, target_logits, T, V, D, scale,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
    RUN: tl.constexpr,
):  # fmt: skip
    """What a token needs of its logits in each split of RUN tiles: their peak m, their mass
    sum e^(z-m) and moment sum e^(z-m) (z-m), (S, T); and the target's, (T,), where it is found."""
    tiles = tl.cdiv(V, COLUMNS)
    row, split = _place(tl.cdiv(T, ROWS), tl.cdiv(tiles, RUN), GROUP)
    hidden_TD = tl.make_tensor_descriptor(hidden, [T, D], [D, 1], [ROWS, DEPTH])
    weight_VD = tl.make_tensor_descriptor(weight, [V, D], [D, 1], [COLUMNS, DEPTH])
    token_t = row * ROWS + tl.arange(0, ROWS)
    inside_t = token_t < T
    target_t = tl.load(targets + token_t, mask=inside_t, other=-1)
    peak_t = tl.full((ROWS,), LOWEST, tl.float32)
    mass_t = tl.zeros((ROWS,), tl.float32)
    moment_t = tl.zeros((ROWS,), tl.float32)
    target_logit_t = tl.zeros((ROWS,), tl.float32)
    first, last = split * RUN, tl.minimum(split * RUN + RUN, tiles)
    for tile in range(first, last):
        logits_tv = _logits(
            hidden_TD, weight_VD, row * ROWS, tile * COLUMNS, D, scale, ROWS, COLUMNS, DEPTH
        )
        entry_v = tile * COLUMNS + tl.arange(0, COLUMNS)
        logits_tv = tl.where(entry_v[None, :] < V, logits_tv, LOWEST)
        target_logits_tv = tl.where(entry_v[None, :] == target_t[:, None], logits_tv, 0.0)
        target_logit_t += tl.sum(target_logits_tv, 1)
        new_peak_t = tl.maximum(peak_t, tl.max(logits_tv, 1))
        drop_t = peak_t - new_peak_t
        old_mass_t = tl.exp(drop_t) * mass_t
        old_moment_t = tl.exp(drop_t) * moment_t + old_mass_t * drop_t
        logits_tv -= new_peak_t[:, None]
        mass_tv = tl.exp(logits_tv)
        mass_t = old_mass_t + tl.sum(mass_tv, 1)
        moment_t = old_moment_t + tl.sum(mass_tv * logits_tv, 1)
        peak_t = new_peak_t
    place_t = split.to(tl.int64) * T + token_t
    tl.store(peaks + place_t, peak_t, mask=inside_t)
    tl.store(masses + place_t, mass_t, mask=inside_t)
    tl.store(moments + place_t, moment_t, mask=inside_t)
    found_t = (target_t >= first * COLUMNS) & (target_t < last * COLUMNS)
    tl.store(target_logits + token_t, target_logit_t, mask=found_t)


@triton.jit(do_not_specialize=["T", "first_entry"])
def differentiate_logits(
    hidden, weight, grad_logits, targets, peaks, log_masses, entropies, grad_logprobs,
    grad_entropies, T, V, D, stride, first_entry, scale,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
    RUN: tl.constexpr,
):  # fmt: skip
    """The gradient of scaled logits, (T, V) with rows `stride` apart. The V vocabulary entries are
    those of a block, which begins at `first_entry`; `weight` holds the block alone."""
    tiles = tl.cdiv(V, COLUMNS)
    row, run = _place(tl.cdiv(T, ROWS), tl.cdiv(tiles, RUN), GROUP)
    hidden_TD = tl.make_tensor_descriptor(hidden, [T, D], [D, 1], [ROWS, DEPTH])
    weight_VD = tl.make_tensor_descriptor(weight, [V, D], [D, 1], [COLUMNS, DEPTH])
    grad_logits_TV = tl.make_tensor_descriptor(grad_logits, [T, V], [stride, 1], [ROWS, COLUMNS])
    token_t = row * ROWS + tl.arange(0, ROWS)
    inside_t = token_t < T
    target_t = tl.load(targets + token_t, mask=inside_t, other=-1) - first_entry
    peak_t = tl.load(peaks + token_t, mask=inside_t, other=0.0)
    log_mass_t = tl.load(log_masses + token_t, mask=inside_t, other=0.0)
    entropy_t = tl.load(entropies + token_t, mask=inside_t, other=0.0)
    grad_logprob_t = tl.load(grad_logprobs + token_t, mask=inside_t, other=0.0)
    grad_entropy_t = tl.load(grad_entropies + token_t, mask=inside_t, other=0.0)
    for tile in range(run * RUN, tl.minimum(run * RUN + RUN, tiles)):
        logits_tv = _logits(
            hidden_TD, weight_VD, row * ROWS, tile * COLUMNS, D, scale, ROWS, COLUMNS, DEPTH
        )
        # d log p_y / dz = [y] - p;  dH / dz = -p (log p + H)
        logprobs_tv = logits_tv - peak_t[:, None] - log_mass_t[:, None]
        slope_tv = grad_entropy_t[:, None] * (logprobs_tv + entropy_t[:, None])
        grad_logits_tv = -tl.exp(logprobs_tv) * (slope_tv + grad_logprob_t[:, None])
        entry_v = tile * COLUMNS + tl.arange(0, COLUMNS)
        is_target_tv = entry_v[None, :] == target_t[:, None]
        grad_logits_tv += tl.where(is_target_tv, grad_logprob_t[:, None], 0.0)
        grad_logits_tv = grad_logits_tv.to(grad_logits.dtype.element_ty)
        grad_logits_TV.store([row * ROWS, tile * COLUMNS], grad_logits_tv)


@triton.jit(do_not_specialize=["T"])
def multiply(
    grad_logits, right, result, T, V, D, stride, scale,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
    TRANSPOSED: tl.constexpr, ADDED: tl.constexpr,
):  # fmt: skip
    """result = scale * grad_logits @ right; where ADDED, added to what is there.

    `grad_logits` is (T, V), its rows `stride` apart, and where TRANSPOSED, its transpose counts;
    `right` and `result` are D wide. `scale` is in memory, a single number."""
    if TRANSPOSED:
        M, K = V, T
    else:
        M, K = T, V
    row, column = _place(tl.cdiv(M, ROWS), tl.cdiv(D, COLUMNS), GROUP)
    if TRANSPOSED:
        left_KM = tl.make_tensor_descriptor(grad_logits, [K, M], [stride, 1], [DEPTH, ROWS])
    else:
        left_MK = tl.make_tensor_descriptor(grad_logits, [M, K], [stride, 1], [ROWS, DEPTH])
    right_KD = tl.make_tensor_descriptor(right, [K, D], [D, 1], [DEPTH, COLUMNS])
    result_MD = tl.make_tensor_descriptor(result, [M, D], [D, 1], [ROWS, COLUMNS])
    sums_md = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, K, DEPTH):
        if TRANSPOSED:
            left_mk = left_KM.load([start, row * ROWS]).T
        else:
            left_mk = left_MK.load([row * ROWS, start])
        sums_md = tl.dot(left_mk, right_KD.load([start, column * COLUMNS]), sums_md)
    sums_md *= tl.load(scale)
    if ADDED:
        sums_md += result_MD.load([row * ROWS, column * COLUMNS])
    result_MD.store([row * ROWS, column * COLUMNS], sums_md.to(result.dtype.element_ty))
