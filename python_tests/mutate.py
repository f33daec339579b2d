"""Breaks the kernels on purpose and shows the suites go red each time.

Every mutation of csrc/ is made in a scratch copy, built there, and the tests of its op are run with
VLMOPS_LIBRARY pointing at it, up to the first failure; CUDA's kernels run on the emulator. Triton's
are broken in a copy of their module that takes its place, and so is what patches models. Exits 1 if
a mutation goes unnoticed or no longer applies. Not part of `make test`: run `make mutants` after
changing a kernel, a site or the suite.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent

# name -> (file below csrc/, text, replacement)
MUTATIONS = {
    "unchanged": ("common/types.h", "#pragma once", "#pragma once"),
    "flip a sign (half)": (
        "ops/mrope/mrope_cpu.h", "a * cosine - b * sine", "a * cosine + b * sine"),
    "turn odd channels by the angles of even ones (half, bfloat16)": (
        "ops/mrope/mrope_cpu.h", "row, at + o.padded / 2, o)", "row, at, o)"),
    "flip a sign (pairs)": (
        "ops/mrope/mrope_cpu.h", "sines[2 * j] = -sine[j]", "sines[2 * j] = sine[j]"),
    "backward rotates forward": (
        "ops/mrope/mrope.cpp", "{op, rotation, scaling, head_axis, -1.0f}",
        "{op, rotation, scaling, head_axis, 1.0f}"),
    "drop the tail of the channels": (
        "ops/mrope/mrope_cpu.h", "run(Lanes<kNarrowest>{});", ""),
    "drop the odd last channel (bfloat16)": (
        "ops/mrope/mrope_cpu.h", "if (i < r) f(Half{}", "if (false) f(Half{}"),
    "skip the last head": (
        "ops/mrope/mrope_cpu.h", "inner = by_token ? rows.heads : last - first;",
        "inner = by_token ? rows.heads - (rows.heads > 1) : last - first;"),
    "skip the last token of a block": (
        "ops/mrope/mrope_cpu.h", "outer = by_token ? last - first : rows.heads;",
        "outer = by_token ? last - first - (last - first > 1) : rows.heads;"),
    "use a neighbour's position": (
        "ops/mrope/mrope_cpu.h", "s = token % p.tokens;\n  for",
        "s = (token + 1) % p.tokens;\n  for"),
    "use the first batch's positions": (
        "ops/mrope/mrope_cpu.h", "b * p.id_stride[1] + s * p.id_stride[2]",
        "s * p.id_stride[2]"),
    "use one axis for all": (
        "ops/mrope/mrope_cpu.h", "position[t.freq_axis[j]]", "position[0]"),
    "do not copy the rest": (
        "ops/mrope/mrope_cpu.h", "i = n; i < p.head_dim; ++i)", "i = n; i < p.head_dim - 1; ++i)"),
    "ignore the scaling of sines": (
        "ops/mrope/mrope_cpu.h", "sines[j] *= sine_scale", "sines[j] *= p.sine_sign"),
    "reduce angles in two parts": (
        "common/sincos.h", " - turns * 0x1.4c4c662p-59", ""),
    "reduce angles by a rounded pi/2": (
        "common/sincos.h", " - turns * 0x1.10b4611p-30", ""),
    "sine of the wrong quadrant": (
        "common/sincos.h", "si ^ ((quadrant & 2) << 62)", "si ^ ((quadrant & 1) << 63)"),
    "round bfloat16 towards zero": (
        "common/simd.h", "(e + 0x7fffu + ((e >> 16) & 1u)) >> 16", "e >> 16"),
    "write q's input": (
        "ops/mrope/mrope.cpp", "rows.dst = dst.mutable_data_ptr();",
        "rows.dst = src.numel() == 272 ? src.mutable_data_ptr() : dst.mutable_data_ptr();"),
    "norm: mean over the rotated channels alone": (
        "ops/mrope/mrope_cpu.h", "sum_of_squares / static_cast<float>(p.head_dim)",
        "sum_of_squares / static_cast<float>(2 * p.frequencies)"),
    "norm: eps outside the root": (
        "ops/mrope/mrope_cpu.h",
        "__builtin_sqrtf(sum_of_squares / static_cast<float>(p.head_dim) + p.norm_eps)",
        "(__builtin_sqrtf(sum_of_squares / static_cast<float>(p.head_dim)) + p.norm_eps)"),
    "norm: ignore the offset": ("ops/mrope/mrope_cpu.h", " + p.norm_offset", ""),
    "norm: q's weight for k": (
        "ops/mrope/mrope_cpu.h", "first, last, weight[r]);", "first, last, weight[0]);"),
    "norm: let NaN of a weight keep its low bits": (
        "ops/mrope/mrope_cpu.h", "w == w ? w : __builtin_nanf(\"\")", "w"),
    "norm: sum even channels alone (bfloat16)": (
        "ops/mrope/mrope_cpu.h", "odd.part[n] += v.odd * v.odd;", ""),
    "norm: drop the tail of the sum of squares": (
        "ops/mrope/mrope_cpu.h", "for (; i < d; ++i) total +=",
        "for (; i < d - 1; ++i) total +="),
    "norm: leave the rest as it is": (
        "ops/mrope/mrope_cpu.h", "norm.template of<n>(load<n>(x + channel), place)",
        "load<n>(x + channel)"),
    "norm: the first half's weights for both": (
        "ops/mrope/mrope_cpu.h", "return second * t.at.padded + j;", "return j;"),
    "norm: the scale of the first head for all": (
        "ops/mrope/mrope_cpu.h", "Norm{weight, scale[h]}", "Norm{weight, scale[0]}"),
    "norm: let eps below 0 through": (
        "ops/mrope/mrope.cpp", "p.norm_eps > 0.0f && ", ""),
    "norm backward: rotate forward": (
        "ops/mrope/mrope.cpp", "head_axis, -1.0f, norm_eps", "head_axis, 1.0f, norm_eps"),
    "norm backward: forget the mean": ("ops/mrope/mrope_cpu.h", " - xh * mean", ""),
    "norm backward: mean without the weights": (
        "ops/mrope/mrope_cpu.h", "x * load<kFloats>(weight + at) * load", "x * load"),
    "norm backward: weights' gradients of what was not normalised": (
        "ops/mrope/mrope_cpu.h", " + grad * xh);", " + grad * load<kFloats>(head.x + i));"),
    "norm backward: sum all heads in float32": (
        "ops/mrope/mrope_cpu.h", "if (heads_++ % 8 == 0) flush();", "++heads_;"),
    "norm backward: forget all but the last block": (
        "ops/mrope/mrope_cpu.h", "weight_grad[channel] += total", "weight_grad[channel] = total"),
    "norm backward: k's sum into q's": (
        "ops/mrope/mrope_cpu.h", "weight_grad + r * p.head_dim", "weight_grad"),
    "norm backward: write gradients that nobody needs": (
        "ops/mrope/mrope_cpu.h", "if (rows.needs_grad) {", "if (true) {"),
    "norm backward: chunks by the number of threads": (
        "ops/mrope/mrope.cpp", "std::max(grain(elements), (tokens + 63) / 64)",
        "tokens / torch::stable::get_num_threads() + 1"),
    "let ids beyond 2^24 through": (
        "ops/mrope/mrope.cpp", "if (id >= -kMaxId && id <= kMaxId) continue;", "continue;"),
    "patches: the columns of the row above": (
        "ops/patch_embed/patch_embed_cpu.h", "y = g / width % p.grid[1];",
        "y = (g / width + p.grid[1] - 1) % p.grid[1];"),
    "patches: one channel for all": (
        "ops/patch_embed/patch_embed_cpu.h", "row = from + c * p.size_stride[0]", "row = from"),
    "patches: the first frame for all": (
        "ops/patch_embed/patch_embed_cpu.h",
        "from + c * p.size_stride[0] + t * p.size_stride[1]", "from + c * p.size_stride[0]"),
    "patches: frames of the grid alike": (
        "ops/patch_embed/patch_embed_cpu.h",
        "g / width / p.grid[1] * p.grid_stride[0]", "0 * p.grid_stride[0]"),
    "patches: pixels lie side by side": (
        "ops/patch_embed/patch_embed_cpu.h", "} else if (stride != 1) {", "} else if (false) {"),
    "patches: drop the tail of a run": (
        "common/rows.h", "for (; i < n; ++i) f(Lanes<1>(), i);",
        "for (; i < n - 1; ++i) f(Lanes<1>(), i);"),
    "patches: the first channel's map for all": (
        "ops/patch_embed/patch_embed_cpu.h", "p.map + c * p.map_columns", "p.map"),
    "pixels' gradients: one channel for all": (
        "ops/patch_embed/patch_embed_cpu.h", "row = to + c * p.size_stride[0]", "row = to"),
    "pixels' gradients: pixels lie side by side": (
        "ops/patch_embed/patch_embed_cpu.h", "} else if (step != 1) {", "} else if (false) {"),
    "pixels' gradients: without the slope": (
        "ops/patch_embed/patch_embed_cpu.h", "load<1>(run + i)[0] * slope", "load<1>(run + i)[0]"),
    "pixels' gradients: the first channel's slope for all": (
        "ops/patch_embed/patch_embed_cpu.h", "p.map[c * p.map_columns]", "p.map[0]"),
    "sums of rows: the last block is lost": (
        "ops/patch_embed/patch_embed_cpu.h", "(r + 1) % kRows == 0 || r + 1 == rows",
        "(r + 1) % kRows == 0"),
    "tokens: a sum of two whatever else there is": (
        "ops/patch_embed/patch_embed_cpu.h", "p.norm != Norm::kNone || p.position_count != 1",
        "p.position_count != 1"),
    "tokens: a sum of two without regard to weights": (
        "ops/patch_embed/patch_embed_cpu.h", "q.weight == nullptr && q.dtype", "q.dtype"),
    "tokens: a sum of two with one tap of many": (
        "ops/patch_embed/patch_embed_cpu.h", "q.taps == 1 && q.weight", "q.weight"),
    "patches: without the intercept": (
        "ops/patch_embed/patch_embed_cpu.h", " * map[0] + map[1]", " * map[0]"),
    "patches: the image before": (
        "ops/patch_embed/patch_embed_cpu.h", "n / patches * p.image_stride",
        "(n / patches + p.images - 1) % p.images * p.image_stride"),
    "tokens: the prefix is overwritten": (
        "ops/patch_embed/patch_embed_cpu.h", "before = p.prefix_last ? 0 : p.prefix_tokens;\n",
        "before = 0;\n"),
    "tokens: prefix without positions": (
        "ops/patch_embed/patch_embed_cpu.h",
        "      add_positions(p, sum, image, token, -1, first, count);\n", ""),
    "tokens: positions of patches reach the prefix": (
        "ops/patch_embed/patch_embed_cpu.h", "if (q.patches_only && patch < 0) continue;", ""),
    "tokens: patches counted with the prefix": (
        "ops/patch_embed/patch_embed_cpu.h",
        "q.patches_only ? p.first_patch + patch : p.first_token + token",
        "p.first_token + token"),
    "tokens: every image counts from 0": (
        "ops/patch_embed/patch_embed_cpu.h", "p.first_token + token;", "token;"),
    "tokens: one tap": (
        "ops/patch_embed/patch_embed_cpu.h", "tap < q.taps", "tap < 1"),
    "tokens: the first tap's weight for all": (
        "ops/patch_embed/patch_embed_cpu.h", " + tap * q.weight_stride[2]", ""),
    "tokens: the first sequence's rows for all": (
        "ops/patch_embed/patch_embed_cpu.h", "image * q.index_stride[0] + ", ""),
    "tokens: norm without epsilon": (
        "ops/patch_embed/patch_embed_cpu.h", "p.norm == Norm::kLayer, p.norm_eps)",
        "p.norm == Norm::kLayer, 0.0f)"),
    "tokens: LayerNorm without its mean": (
        "ops/patch_embed/patch_embed_cpu.h", "p.norm == Norm::kLayer, p.norm_eps)",
        "false, p.norm_eps)"),
    "tokens: norm without its bias": (
        "ops/patch_embed/patch_embed_cpu.h", "if (p.norm_bias.data != nullptr)", "if (false)"),
    "patches: a remainder of rows is read": (
        "ops/patch_embed/patch_embed.cpp", "p.grid[i] = shown[i] / p.size[i + 1];",
        "p.grid[i] = (shown[i] + p.size[i + 1] - 1) / p.size[i + 1];"),
    "tokens: let rows beyond a table through": (
        "ops/patch_embed/patch_embed.cpp", "if (row < 0 || row >= q.rows)", "if (row < 0)"),
    "tokens: a short table": (
        "ops/patch_embed/patch_embed.cpp", "} else if (q.rows < tokens) {",
        "} else if (q.rows < tokens - 1) {"),
    "tokens: packed images begin at 0": (
        "ops/patch_embed/patch_embed.cpp", "token += g.images * whole.tokens();", ""),
    "attention: hide the last key that a row sees": (
        "common/attention_cpu.h", "limit >= static_cast<int32_t>(first + n) ? load",
        "limit > static_cast<int32_t>(first + n) ? load"),
    "attention: a result of another maximum": (
        "common/attention_cpu.h", "x += load<kFloats>(at) * alpha[u];", "x += load<kFloats>(at);"),
    "attention: a sum of another maximum": (
        "common/attention_cpu.h",
        "load<kFloats>(at) * alpha[u] + sum[u]", "load<kFloats>(at) + sum[u]"),
    "attention: a negative scale as its size": (
        "common/attention_cpu.h",
        "return p.scale < 0.0f ? -1.0f : 1.0f;", "return p.scale < 0.0f ? 1.0f : 1.0f;"),
    "attention: scale 0 hides nothing": (
        "common/attention.h", "steepness == 0.0f ? 0x1p-126f : steepness", "steepness"),
    "attention: what no key was seen for stays": (
        "common/attention_cpu.h", "if (panel.most < 0 || keys == 0) {", "if (panel.most < -1) {"),
    "attention: one head of a group": (
        "common/attention_cpu.h", "static_cast<int>(p.group() == 1 ? 0 : r % p.group())",
        "static_cast<int>(p.group() == 1 ? 0 : 0 * r)"),
    "attention: few rows: a key beyond the last": (
        "common/attention_cpu.h", "i = seen < 0 ? 0 : seen + 1; i",
        "i = seen < 0 ? 0 : seen + 2; i"),
    "attention: few rows: a result of another maximum": (
        "common/attention_cpu.h",
        "load<kFloats>(to) * alpha[r + j] + sums[j][u]", "load<kFloats>(to) + sums[j][u]"),
    "attention: few rows: parts as they are": (
        "common/attention_cpu.h",
        "sum = sum * old + more.sum[r] * by;", "sum = sum + more.sum[r] * by;"),
    "attention: few rows: a part is all that follows": (
        "binding/attention.cpp", "std::min(keys, first + kPartKeys)", "keys"),
    "attention: pairs turned round": (
        "common/attention_cpu.h", "e / 2 + e % 2 * 16", "e / 2 + (1 - e % 2) * 16"),
    "attention: pairs: a key beyond the last": (
        "common/attention_cpu.h", "if (n + 1 < count) odd = base", "if (n < count) odd = base"),
    "attention: pairs: the sign of one in two": (
        "common/attention_cpu.h", "0x80008000u", "0x8000u"),
    "attention: no delta": (
        "common/attention_cpu.h",
        "weight * (dp - load<kFloats>(t_.delta + at_ + u * kFloats))", "weight * dp"),
    "attention: backward sees what is hidden": (
        "common/attention_cpu.h",
        "e = limit >= static_cast<int32_t>(block_.first + n) ? e : Floats{};", ""),
    "attention: backward: padding sees padding": (
        "common/attention_cpu.h", "return hidden ? Floats{} : e;", "return e;"),
    "attention: keys without scale": (
        "common/attention_cpu.h",
        "put_keys<T>(block.dk, p.scale, all", "put_keys<T>(block.dk, 1.0f, all"),
    "attention: queries without scale": (
        "common/attention_cpu.h", "Floats{} + p.scale,", "Floats{} + 1.0f,"),
    "attention: pairs: keys' gradients of all weights": (
        "common/attention_cpu.h", "of_keys(block.rounded_ds, t.q_rows, block.dk)",
        "of_keys(block.rounded_p, t.q_rows, block.dk)"),
    "attention: padding sees padding": (
        "binding/attention.cpp", "add(s, q, seen, valid, q.count, order, order);",
        "add(s, q, k, valid, q.count, order, nullptr);"),
    "attention: the first query sees the first key": (
        "binding/attention.cpp", "at, k.count - q.count,", "at, 0,"),
    "attention: all blocks are seen": (
        "binding/attention.cpp", "if (blocks[key / p_.block]) keys.push_back(key);",
        "keys.push_back(key);"),
    "attention: queries of any mask together": (
        "binding/attention.cpp", "alike[std::string(of, count)]", "alike[std::string(of, 0)]"),
    "attention: queries apart as if side by side": (
        "binding/attention.cpp", "rows.back() - rows.front() == count - 1", "count > 0"),
    "attention: backward: all blocks are seen": (
        "common/attention_cpu.h", "return !h_.job.blocks[key / h_.p.block];", "return false;"),
    "attention: keys behind their number": (
        "common/attention.h", "return {first, within(count, starts.length)};",
        "return {first, starts.length};"),
    "attention: numbers of keys in 32 bits": (
        "binding/attention_call.cpp", "lengths_type = width_of(*call.key_lengths);",
        "lengths_type = IntType::kInt32;"),
    "attention: gradients behind the last key": (
        "binding/attention_call.cpp", "    torch::stable::zero_(dk);\n", ""),
    "attention: numbers of keys of any size": (
        "binding/attention_call.cpp", "if (count < 0 || count > k.size(1))", "if (count < 0)"),
    "gated: q's norm for k": (
        "ops/gated_cross_attention/gated_cross_attention.cpp",
        "normed(o, q, q_norm_weight), normed(o, k, k_norm_weight), v);",
        "normed(o, q, q_norm_weight), normed(o, k, q_norm_weight), v);"),
    "gated: backward of q without its norm": (
        "ops/gated_cross_attention/gated_cross_attention.cpp",
        "grad, normed(o, q, q_norm_weight)", "grad, q"),
    "gated: backward: q's weight for k": (
        "ops/gated_cross_attention/gated_cross_attention.cpp",
        "rms_norm_backward(o.op, dk, k, *k_norm_weight", "rms_norm_backward(o.op, dk, k, "
        "*(q_norm_weight ? q_norm_weight : k_norm_weight)"),
    "gated: no gradient for a norm alone": (
        "ops/gated_cross_attention/gated_cross_attention.cpp", "needs_k || of_k_norm, needs_v);",
        "needs_k, needs_v);"),
    "gated: any eps": (
        "ops/gated_cross_attention/gated_cross_attention.cpp", "if (!(eps > 0.0f &&",
        "if (!(eps >= 0.0f &&"),
    "attention: backward: blocks that begin behind the first key": (
        "common/attention_cpu.h", "int64_t i = block.first / h.p.block; i <= last;",
        "int64_t i = (block.first + h.p.block - 1) / h.p.block; i <= last;"),
    "shuffle: pixels of a block turned on their side": (
        "ops/pixel_shuffle/pixel_shuffle_cpu.h", "base + y * at.y + x * at.x",
        "base + x * at.y + y * at.x"),
    "shuffle: a token's group ends one too late": (
        "ops/pixel_shuffle/pixel_shuffle_cpu.h", "group[1].first <= token) ++group",
        "group[1].first < token) ++group"),
    "shuffle: a block's pixels lie side by side": (
        "ops/pixel_shuffle/pixel_shuffle_cpu.h",
        "while (i + run < n && from.pixel[i + run] == from.pixel[i] + run * c) ++run;", "run = n;"),
    "shuffle: a row's pixels lie side by side": (
        "ops/pixel_shuffle/pixel_shuffle_cpu.h", "each = by_row ? p.factor : 1;",
        "each = p.factor + 0 * by_row;"),
    "shuffle: streamed where memory is not aligned": (
        "common/stream.h", "if (!streams || !aligned(to)) {",
        "if (!streams) {"),
    "shuffle: the tail of a streamed run": (
        "common/stream.h",
        "  __builtin_memcpy(out + i, in + i, bytes - i);\n", ""),
    "shuffle: pixels interleaved in another order": (
        "ops/pixel_shuffle/pixel_shuffle_cpu.h",
        "zip<U, lanes>(at(0), at(2)), odd = zip<U, lanes>(at(1), at(3))",
        "zip<U, lanes>(at(0), at(1)), odd = zip<U, lanes>(at(2), at(3))"),
    "shuffle: pixels taken apart in another order": (
        "ops/pixel_shuffle/pixel_shuffle_cpu.h", "{even.first, odd.first, even.second, odd.second}",
        "{even.first, even.second, odd.first, odd.second}"),
    "shuffle: channels of cyx lie side by side": (
        "ops/pixel_shuffle/pixel_shuffle_cpu.h", "to[k * n + i] = from.pixel[i][k * stride];",
        "to[k * n + i] = from.pixel[i][k];"),
    "shuffle: channels that are averaged lie side by side": (
        "ops/pixel_shuffle/pixel_shuffle_cpu.h", "sum += one(from.pixel[i] + k * stride)",
        "sum += one(from.pixel[i] + k)"),
    "shuffle: sums for means": (
        "ops/pixel_shuffle/pixel_shuffle_cpu.h", "for (auto& v : sum.v) v *= share;", ""),
    "shuffle: means of four pixels of any block": (
        "ops/pixel_shuffle/pixel_shuffle_cpu.h", "k = n == 4 ?", "k = n >= 4 ?"),
    "shuffle: sums for means' gradients": (
        "ops/pixel_shuffle/pixel_shuffle_cpu.h", "const auto v = load<kFloats>(x + k) * share;",
        "const auto v = load<kFloats>(x + k);"),
    "shuffle: norm: what is left of a run has the first's weights": (
        "common/norm_cpu.h", "f(r, i, r * length + i);", "f(r, i, i);"),
    "shuffle: norm: what a mean lacks is not shifted": (
        "common/norm_cpu.h", "const double rest = norm.layer ? sum / count : 0.0;",
        "const double rest = 0.0 * sum;"),
    "shuffle: norm: ignore the offset": (
        "ops/pixel_shuffle/pixel_shuffle_cpu.h", "canonical(element(p.weight, k) + p.offset)",
        "canonical(element(p.weight, k))"),
    "shuffle: norm: low bits of a bias that is NaN": (
        "ops/pixel_shuffle/pixel_shuffle_cpu.h", "s.bias[at] = canonical(element(p.bias, k));",
        "s.bias[at] = element(p.bias, k);"),
    "shuffle: norm backward: along the row": (
        "ops/pixel_shuffle/pixel_shuffle_cpu.h",
        "xs.v[v] = (wg - of.mean_wg - xh * of.mean_along) * of.by.scale;",
        "xs.v[v] = (wg - of.mean_wg) * of.by.scale;"),
    "shuffle: norm backward: rms with a mean": (
        "common/norm_cpu.h", "norm.layer ? all * share : 0.0f", "all * share"),
    "shuffle: norm backward: biases in the order of words": (
        "ops/pixel_shuffle/pixel_shuffle_cpu.h",
        "total[k / s.normed * s.normed + place_of(s, k % s.normed)]",
        "total[k < s.normed ? place_of(s, k) : k]"),
    "shuffle: norm backward: rows that are left over": (
        "ops/pixel_shuffle/pixel_shuffle_cpu.h",
        "for (int i = 0; i < together; ++i) backward_rows<A, 1>",
        "for (int i = 1; i < together; ++i) backward_rows<A, 1>"),
    "shuffle: norm backward: tokens share the place of their pieces": (
        "ops/pixel_shuffle/pixel_shuffle_cpu.h", "s.g[number / of_token % kTogether]", "s.g[0]"),
    "shuffle: norm: a bad guess of the mean is kept": (
        "common/norm_cpu.h", "if (!again && rest * rest > variance) {",
        "if (!again && false) {"),
    "shuffle: chunks by the number of threads": (
        "ops/pixel_shuffle/pixel_shuffle.cpp",
        "std::max(grain(p.block() * p.channels), (p.tokens + 63) / 64)",
        "p.tokens / torch::stable::get_num_threads() + 1"),
    "shuffle: prefixes are merged": (
        "ops/pixel_shuffle/pixel_shuffle.cpp", "at.offset = (first + o.skip_prefix) * s.token;",
        "at.offset = first * s.token;"),
    "shuffle: packed without prefixes": (
        "ops/pixel_shuffle/pixel_shuffle.cpp",
        "pixel += images.count * (o.skip_prefix + images.height * images.width);",
        "pixel += images.count * images.height * images.width;"),
    "shuffle: groups beyond one launch": (
        "ops/pixel_shuffle/pixel_shuffle.cpp", "p.groups[i - begin].first -= first;", ""),
    "shuffle: the right of a remainder is not cleared": (
        "ops/pixel_shuffle/pixel_shuffle.cpp",
        "  clear(torch::stable::narrow(grid, 2, width - right, right));\n", ""),
    "shuffle: let odd widths through": (
        "ops/pixel_shuffle/pixel_shuffle.cpp", "(height % o.factor == 0 && width % o.factor == 0)",
        "height % o.factor == 0"),
    "shuffle: let the norm of averaged channels through": (
        "ops/pixel_shuffle/pixel_shuffle.cpp", 'o.reduction == "mean" && o.norm != "none" &&',
        "false &&"),
    "shuffle: let out lie on the bias": (
        "ops/pixel_shuffle/pixel_shuffle.cpp",
        '  if (bias.has_value()) out.apart_from({o.op, "norm_bias", *bias});\n', ""),
    "shuffle: let any gradient through": (
        "ops/pixel_shuffle/pixel_shuffle.cpp",
        '  check_merged({o.op, "grad", grad}, {o.op, "hidden_states", hidden_states}, c);\n  const',
        "  const"),
    "projector: no slope of the normal distribution": (
        "ops/mlp_projector/mlp_projector_cpu.h", "below + 0.398942280f * x * e", "below"),
    "projector: tanh's slope without its cube": (
        "ops/mlp_projector/mlp_projector_cpu.h", "0.214064449f", "0.0713548163f"),
    "projector: quick_gelu's slope": (
        "ops/mlp_projector/mlp_projector_cpu.h", "1.702f * one", "one"),
    "projector: relu lets gradients through": (
        "ops/mlp_projector/mlp_projector_cpu.h", "x <= 0.0f ? zero : one", "one"),
    "projector: a gate's gradient without what it multiplies": (
        "ops/mlp_projector/mlp_projector_cpu.h", "g * x * y.slope", "g * y.slope"),
    "projector: what a gate multiplies gets all of the gradient": (
        "ops/mlp_projector/mlp_projector_cpu.h", "grad_hidden + i, g * y.f", "grad_hidden + i, g"),
    "projector: no offset": (
        "ops/mlp_projector/mlp_projector_cpu.h", " + p.offset", ""),
    "projector: no bias of the norm": (
        "ops/mlp_projector/mlp_projector_cpu.h", "p.bias.data == nullptr ? Vec", "true ? Vec"),
    "projector: a norm's gradient keeps its mean": (
        "ops/mlp_projector/mlp_projector_cpu.h", "(g - mean - y * slope)", "(g - y * slope)"),
    "projector: a norm's gradient along the row": (
        "ops/mlp_projector/mlp_projector_cpu.h", "(g - mean - y * slope)", "(g - mean)"),
    "projector: rows as if x were contiguous": (
        "ops/mlp_projector/mlp_projector_cpu.h", "row * p.x_stride", "row * p.width"),
    "projector: a row less in each part": (
        "ops/mlp_projector/mlp_projector_cpu.h",
        "(left < kPartRows ? left : kPartRows)", "(left < kPartRows ? left : kPartRows) - 1"),
    "projector: all sums into the first part": (
        "ops/mlp_projector/mlp_projector_cpu.h", "  sums += part * width;\n", ""),
    "projector: weights of another dtype": (
        "ops/mlp_projector/mlp_projector.cpp", "  same_dtype(weight, x);\n", ""),
    "projector: a gate of another width": (
        "ops/mlp_projector/mlp_projector.cpp",
        "gate_bias, input, depth, hidden);", "gate_bias, input, depth, -1);"),
    "crops: rows of them for columns": (
        "ops/hd_transform/hd_transform.h", "1 + y / p.side * image.w_crop + x / p.side",
        "1 + x / p.side * image.w_crop + y / p.side"),
    "crops: the whole view for all": (
        "ops/hd_transform/hd_transform.h", "{Kind::kBlock, crop, y", "{Kind::kBlock, 0, y"),
    "crops: one order for both": (
        "ops/hd_transform/hd_transform.h", "if (second == p.sub_first) {", "if (second) {"),
    "crops: rows of whole pictures where they are cut": (
        "ops/hd_transform/hd_transform.h", "if (x == image.width) return {Kind::kNewline",
        "if (x == image.width - 1) return {Kind::kNewline"),
    "crops: the newline for the separator": (
        "ops/hd_transform/hd_transform_cpu.h", "s.kind == Kind::kNewline ? p.newline : p.separator",
        "p.newline"),
    "crops: the row above within a block": (
        "ops/hd_transform/hd_transform_cpu.h", "from = features + run_of(p, image, s, dy);",
        "from = features + run_of(p, image, s, 0);"),
    "crops: features lie side by side": (
        "ops/hd_transform/hd_transform_cpu.h",
        "const bool adjacent = p.channel_stride == 1 && p.pixel_stride == c;",
        "const bool adjacent = true;"),
    "crops: prefixes are read": (
        "ops/hd_transform/hd_transform_cpu.h", "row = p.prefix + (static_cast<int64_t>(s.y)",
        "row = (static_cast<int64_t>(s.y)"),
    "crops: sums for means": (
        "ops/hd_transform/hd_transform_cpu.h", "sum * scale", "sum"),
    "crops: sums for means (bfloat16)": (
        "ops/hd_transform/hd_transform_cpu.h", "even * p.scale", "even"),
    "crops: images beyond one launch": (
        "ops/hd_transform/hd_transform.cpp", "image.token -= first.token;", ""),
    "crops: let columns beyond them through": (
        "ops/hd_transform/hd_transform.cpp", "width < 0 || width > full_w", "width < 0"),
    "features' gradients: not cleared": (
        "ops/hd_transform/hd_transform_cpu.h",
        "__builtin_memset(static_cast<void*>(to), 0, c * sizeof(T));", ""),
    "features' gradients: of what was cut off": (
        "ops/hd_transform/hd_transform.h",
        "if (row >= image.height || column >= image.width) return -1;", ""),
    "features' gradients: one row of a block": (
        "ops/hd_transform/hd_transform.h", "y % factor * factor + x % factor", "x % factor"),
    "features' gradients: sums for means": (
        "ops/hd_transform/hd_transform_cpu.h", "stride) * p.scale", "stride)"),
    "learned rows: without those of whole views": (
        "ops/hd_transform/hd_transform_cpu.h", "for (int y = 1; y <= p.side; ++y) add(whole_at",
        "for (int y = 1; y < p.side; ++y) add(whole_at"),
    "learned rows: all but the last 64": (
        "ops/hd_transform/hd_transform_cpu.h", "  flush(newline);\n  for", "  for"),
    "residual: tanh of small gates": (
        "common/tanh.h", "near = near * square - 0x1.555532p-2f;", ""),
    "residual: tanh without its sign": ("common/tanh.h", "(far) | sign", "(far)"),
    "residual: the mask ignored": (
        "ops/gated_residual/gated_residual.h",
        "p.row_mask == nullptr || p.row_mask[row_at(p, p.mask_stride, row)]", "true"),
    "residual: a mask side by side": (
        "ops/gated_residual/gated_residual.h", "row_at(p, p.mask_stride, row)", "row"),
    "residual: rows of the last dimension alone": (
        "common/strides.h", "return outer * s.outer + ", "return "),
    "residual: gates of bfloat16 in their own order": (
        "ops/gated_residual/gated_residual_cpu.h", "ordered[A::place(i)] = to[first + i];",
        "ordered[i] = to[first + i];"),
    "residual: sums of bfloat16 in vectors' order": (
        "common/stream.h", "ordered[i] = sums[first + A::place(i)];",
        "ordered[i] = sums[first + i];"),
    "residual: NaN of gates with a payload": (
        "ops/gated_residual/gated_residual_cpu.h",
        'y == y ? y : Vec<float, width>{} + __builtin_nanf("")', "y"),
    "residual: channels side by side": (
        "ops/gated_residual/gated_residual_cpu.h", "one(y + i * y_step);", "one(y + i);"),
    "residual: hidden rows keep their gradient": (
        "ops/gated_residual/gated_residual_cpu.h",
        "__builtin_memset(static_cast<T*>(p.out) + row * p.channels, 0, p.channels * sizeof(T));",
        ";"),
    "residual: rows beyond the last four": (
        "ops/gated_residual/gated_residual_cpu.h", "for (int r = 0; r < together; ++r)",
        "for (int r = 1; r < together; ++r)"),
    "residual: one lane of a single gate": (
        "ops/gated_residual/gated_residual_cpu.h",
        "for (const double lane : lanes) *total += lane;", "*total += lanes[0];"),
    "residual: the slope of another curve": (
        "ops/gated_residual/gated_residual.cpp", "4.0 * e / ((1.0 + e) * (1.0 + e))",
        "4.0 * e / (1.0 + e)"),
    "residual: gradients of the first rows": (
        "ops/gated_residual/gated_residual.cpp", "for (double& all : total) all += *sum++;",
        "for (double& all : total) all = *sum++;"),
    "residual: let y of another shape through": (
        "binding/check.cpp", "shape(other.tensor.sizes(), other.name);", ""),
    "residual: let gates of rows through": (
        "ops/gated_residual/gated_residual.cpp", "(n != channels || last != n)", "n != channels"),
    "residual: an expanded gate for one": (
        "ops/gated_residual/gated_residual.cpp", "g.per_channel = n != 1;",
        "g.per_channel = n != 1 && t.stride(t.dim() - 1) != 0;"),
    "residual: more strides than two": (
        "binding/rows.h", "if (merged.size() > 2) return false;", ""),
    "aggregation: another row of the map": (
        "ops/spatial_aggregate/spatial_aggregate_cpu.h", "cell.y * of.height + i,", "cell.y + i,"),
    "aggregation: another column of the map": (
        "ops/spatial_aggregate/spatial_aggregate_cpu.h", "cell.x * of.width + j}", "cell.x + j}"),
    "aggregation: cells of a square grid": (
        "ops/spatial_aggregate/spatial_aggregate_cpu.h", "i / p.grid_w % p.grid_h",
        "i / p.grid_h % p.grid_h"),
    "aggregation: the mask ignored": (
        "ops/spatial_aggregate/spatial_aggregate_cpu.h",
        "of.mask == nullptr || of.mask[at(of.mask_stride, c)]", "true"),
    "aggregation: gradients of no token stay": (
        "ops/spatial_aggregate/spatial_aggregate_cpu.h",
        "__builtin_memset(static_cast<T*>(grad) + place, 0, depth * sizeof(T));", ";"),
    "aggregation: tokens beyond the last four": (
        "ops/spatial_aggregate/spatial_aggregate_cpu.h", "for (; i < n; ++i) f(Lanes<1>(), i);",
        ""),
    "aggregation: channels beyond the last vector": (
        "ops/spatial_aggregate/spatial_aggregate_cpu.h", "for (; i < d; i += kRest) rest(i);", ""),
    "aggregation: weights that do not add up to 1": (
        "ops/spatial_aggregate/spatial_aggregate_cpu.h", "s[i] /= sum;", "s[i] = s[i];"),
    "aggregation: logits as they are": (
        "ops/spatial_aggregate/spatial_aggregate_cpu.h", "exp<width>(load<width>(s + i) - most)",
        "exp<width>(load<width>(s + i))"),
    "aggregation: the first block of heads": (
        "ops/spatial_aggregate/spatial_aggregate_cpu.h",
        "row<kRow, kStride>(t + i, h);\n        products",
        "row<kRow, kStride>(t + i, h - first);\n        products"),
    "aggregation: heads side by side": (
        "ops/spatial_aggregate/spatial_aggregate_cpu.h",
        "(first + h) * (tokens[t].of->*kStride).head", "(first + h) * p.head_dim"),
    "aggregation: weights without their mean": (
        "ops/spatial_aggregate/spatial_aggregate_cpu.h", "p[i] * (r[i] - mean) * scale",
        "p[i] * r[i] * scale"),
    "aggregation: gradients without the scale": (
        "ops/spatial_aggregate/spatial_aggregate_cpu.h", "(r[i] - mean) * scale", "(r[i] - mean)"),
    "aggregation: gradients of maps of one image": (
        "ops/spatial_aggregate/spatial_aggregate_cpu.h",
        "row = c.batch * p.grid_h * of.height + c.y", "row = c.y"),
    "aggregation: heads' gradients in the first's place": (
        "ops/spatial_aggregate/spatial_aggregate_cpu.h",
        "static_cast<int64_t>(first) * p.head_dim;", "0;"),
    "aggregation: as many keys as there are": (
        "ops/spatial_aggregate/spatial_aggregate.cpp", "p.keys + height * width > kMaxKeys",
        "false"),
    "aggregation: let values of another shape through": (
        "ops/spatial_aggregate/spatial_aggregate.cpp", "value.shape(sizes, key.name);", ""),
    "aggregation: channels anywhere": (
        "ops/spatial_aggregate/spatial_aggregate.cpp", "t.stride(4) == 1 && on_packs(t)",
        "on_packs(t)"),
    "aggregation: gradients of q alone": (
        "ops/spatial_aggregate/spatial_aggregate.cpp", "p.needs_weights || i <= count",
        "p.needs_weights || i == 0"),
    "joined: the same share of both": (
        "ops/perceiver_attention/perceiver_attention_cpu.h",
        "load<width>(other + i) * s.other", "load<width>(other + i) * s.first"),
    "joined: statistics of the media": (
        "ops/perceiver_attention/perceiver_attention_cpu.h",
        "p.statistics[p.heads * p.rows + at] = s.part;", ""),
    "joined: statistics of another row": (
        "ops/perceiver_attention/perceiver_attention_cpu.h",
        "at = head * p.rows + row,", "at = head * p.rows + (row ? row - 1 : 0),"),
    "joined: without the steepness": (
        "ops/perceiver_attention/perceiver_attention.h", "* p.steepness) / part", ") / part"),
    "joined: no media, no number": (
        "ops/perceiver_attention/perceiver_attention.h",
        "  if (of_first == 0.0f) return {0.0f, 1.0f, other, of_other};\n", ""),
    "joined: the gradient of q by the media alone": (
        "ops/perceiver_attention/perceiver_attention_cpu.h",
        "load<width>(x + i) + load<width>(y + i)", "load<width>(x + i)"),
    "joined: the gradient of q in its own dtype": (
        "ops/perceiver_attention/perceiver_attention.cpp",
        "needs_k_latents, needs_v_latents, true);", "needs_k_latents, needs_v_latents, false);"),
    "joined: heads of latents are not looked at": (
        "ops/perceiver_attention/perceiver_attention.cpp",
        "if (k.size(2) != k_latents.size(2))", "if (false)"),
    "queries: the mask is not handed on": (
        "ops/qformer_attention/qformer_attention.cpp",
        '"qformer_attention", key_mask, key_lengths', '"qformer_attention", {}, key_lengths'),
    "queries: the scale is not handed on in backward": (
        "ops/qformer_attention/qformer_attention.cpp",
        "attention::backward(options_of(key_mask, key_lengths, scale)",
        "attention::backward(options_of(key_mask, key_lengths, {})"),
    "norm of a sum: x's bias is forgotten": (
        "ops/add_norm/add_norm_cpu.h",
        "s.v[v] += load<kFloats>(x_bias + i + v * kFloats);", ";"),
    "norm of a sum: x's bias is forgotten at the end": (
        "ops/add_norm/add_norm_cpu.h", "row[i] = one(x + i) + x_bias[i];", "row[i] = one(x + i);"),
    "norm of a sum: one residual for all": (
        "ops/add_norm/add_norm_cpu.h",
        "row_at(p, p.residual_stride, number);\n  T* sum", "0;\n  T* sum"),
    "norm of a sum: sums of what is left": (
        "ops/add_norm/add_norm_cpu.h", "    sums.left += row[i];\n", ""),
    "norm of a sum: rows far from 0": (
        "ops/add_norm/add_norm_cpu.h",
        "const auto off = load<kFloats>(row + i) - about;",
        "const auto off = load<kFloats>(row + i) - 0.0f * about;"),
    "norm of a sum: vectors in the channels' order": (
        "ops/add_norm/add_norm_cpu.h", "table[place_of<A>(i, n)] =", "table[i] ="),
    "norm of a sum: NaN with all bits": (
        "ops/add_norm/add_norm_cpu.h", "canonical(element(v, i))", "element(v, i)"),
    "norm of a sum, backward: without the sum's own gradient": (
        "ops/add_norm/add_norm_cpu.h", " * of.by.scale + added.v[v];", " * of.by.scale;"),
    "norm of a sum, backward: without the mean": (
        "ops/add_norm/add_norm_cpu.h", "(wg - of.mean_wg - y *", "(wg - y *"),
    "norm of a sum, backward: rows that are left": (
        "ops/add_norm/add_norm_cpu.h",
        "for (int r = 0; r < together; ++r) backward_rows<T, 1>", "backward_rows<T, 1>"),
    "norm of a sum, backward: one chunk": (
        "ops/add_norm/add_norm.cpp", "total[static_cast<size_t>(i)] += of[i];",
        "total[static_cast<size_t>(i)] = of[i];"),
    "norm of a sum, backward: chunks by threads": (
        "ops/add_norm/add_norm.cpp", "int64_t{32}, (p.rows + 31) / 32}",
        "int64_t{32}, p.rows / torch::stable::get_num_threads()}"),
}  # fmt: skip

# op -> name -> (text in vlmops/ops/<op>_triton.py, replacement)
TRITON_MUTATIONS = {"add_norm": {
    "unchanged": ("import math", "import math"),
    "without x's bias": ("b_s += _vector(p_x_bias, o_c, m, 0.0)", "b_s += 0.0"),
    "channels beyond the last": ("tl.where(m, b_s - b_mean, 0.0)", "b_s - b_mean"),
    "eps outside the root": ("tl.sqrt_rn(tl.sum(b_s * b_s, 0) / C + eps)",
                             "(tl.sqrt_rn(tl.sum(b_s * b_s, 0) / C) + eps)"),
    "the rounded sum is normed": (
        "b_y, _, _ = _normed(b_s, m,",
        "b_y, _, _ = _normed(b_s.to(p_x.dtype.element_ty).to(tl.float32), m,"),
    "the result in place of the sum": ("tl.store(p_sum + i_row * C + o_c, b_s.to(",
                                       "tl.store(p_sum + i_row * C + o_c, (b_s * 2).to("),
    "gradients without the mean": ("b_of_x -= tl.sum(b_g, 0) / C", "b_of_x -= 0.0"),
    "gradients without the scale": ("b_of_x *= b_scale", "b_of_x *= 1.0"),
    "gradients without what is added": (
        "b_of_x += tl.load(p, mask=m, other=0.0).to(tl.float32)\n        tl.store(p_out",
        "b_of_x += 0.0\n        tl.store(p_out"),
    "weights' gradients of what was not normed": ("(b_x - b_mean[:, None]) * b_scale[:, None]",
                                                   "b_x"),
    "sums of the first part": ("part.sum(0).to(vector.dtype)", "part[0].to(vector.dtype)"),
    "strides of 16 bytes where there are none": (
        "vector = _VECTOR if all(", "vector = _VECTOR if True or all("),
}, "perceiver_attention": {
    "unchanged": ("import functools", "import functools"),
    "the same share of both": ("* b_share_2[:, None]", "* b_share[:, None]"),
    "no media, no number": ("m_second = b_part_2 == 0.0, (b_part == 0.0) & (b_part_2 != 0.0)",
                            "m_second = b_part_2 == 0.0, b_part < 0.0"),
    "statistics of rows by heads": ("o = o_row % n_heads * n_rows + o_row // n_heads",
                                    "o = o_row"),
    "the first maximum": ("(b_top > b_top_2) & ~m_second", "~m_second"),
    "parts of the media": ("tl.store(p_joint + n_all + o, b_part,",
                           "tl.store(p_joint + n_all + o, b_part * 2.0,"),
    "the gradient of q in its own dtype": ("exact_q=True", "exact_q=False"),
    "the gradient of q by the media alone": ("(dq + more).to(", "dq.to("),
    "the mask is not handed on": ("block_mask=o.key_mask,", "block_mask=None,"),
    "queries share no mask": ("tokens_per_block=o.tokens_per_block,", ""),
}, "qformer_attention": {
    "unchanged": ("from typing", "from typing"),
    "the mask is not handed on": ("block_mask=o.key_mask, ", ""),
    "lengths are not handed on": ("key_lengths=o.key_lengths, ", ""),
    "the scale is not handed on": (", scale=o.scale)", ")"),
}, "spatial_aggregate": {
    "unchanged": ("import os", "import os"),
    "another row of the map": ("(i_y * M + o_t // W)", "(i_y + o_t // W)"),
    "another column of the map": ("i_x * W + o_t % W)", "i_x + o_t % W)"),
    "the mask ignored": ("(tl.load(p_m + o_all, mask=m_listed, other=0) != 0)", "m_listed"),
    "masks of the first image": ("tl.load(p_m + o_all,", "tl.load(p_m + o_token,"),
    "heads beyond the last": ("(o_h < n_heads)[:, None] & ", ""),
    "sums of another maximum": ("b_out * b_before[:, None] +", "b_out +"),
    "a mean of another maximum": ("b_mean * b_before +", "b_mean +"),
    "the first block of a window": ("range(0, tl.cdiv(M * W, N))", "range(0, 1)"),
    "weights without their mean": ("(b_r - b_mean[None, :])", "b_r"),
    "gradients without the scale": ("(b_r - b_mean[None, :]) * scale", "(b_r - b_mean[None, :])"),
    "no token, no number": ("tl.where(b_sum == 0.0, 1.0, b_sum)[:, None]", "b_sum[:, None]"),
    "gradients of values as keys'": ("zip(others[:count], others[count:]",
                                     "zip(others[count:], others[:count]"),
    "any strides": ("x.stride(4) == 1 and x.stride(3) == channels and", "x.stride(4) == 1 and"),
    "strides of 16 bytes where there are none": (
        "vector = _VECTOR if all(", "vector = _VECTOR if True or all("),
}, "gated_residual": {
    "unchanged": ("import os", "import os"),
    "the mask ignored": (
        "m = m & (tl.load(p_mask + o_row, mask=m_row, other=0) != 0)", "m = m & True"),
    "the first gate for all": ("o_c if CHANNELS else o_c * 0", "o_c * 0"),
    "tanh of large gates": ("tl.where(b_size < 0.625, b_near,", "tl.where(b_size < 9.0, b_near,"),
    "tanh without its sign": ("tl.where(b_x < 0.0, -b_far, b_far)", "b_far"),
    "hidden rows are rounded": (
        "tl.where(m_added[:, None], b_sum.to(p_out.dtype.element_ty), b_x)",
        "b_sum.to(p_out.dtype.element_ty)"),
    "gradients of hidden rows": ("b_out = tl.where(m_added[:, None], b_out, 0.0)", "b_out = b_out"),
    "the slope of another curve": ("4.0 * b_e / ((1.0 + b_e) * (1.0 + b_e))", "4.0 * b_e"),
    "sums of the first parts": ("range(0, tl.cdiv(n_parts, BM))", "range(0, 1)"),
    "strides of 16 bytes where there are none": (
        "vector = _VECTOR if all(", "vector = _VECTOR if True or all("),
}, "hd_transform": {
    "unchanged": ("import math", "import math"),
    "one row of crops": ("i_y // n_side * n_w_crop + i_x", "i_x"),
    "prefixes are read": ("i_first = n_prefix + (i_y", "i_first = (i_y"),
    "the row above within a block": ("i_part // F * (n_side * F) + i_part % F", "i_part % F"),
    "sums for means": ("(b_sum * (1.0 / (F * F)))", "b_sum"),
    "sums for means' gradients": ("(b * (1.0 / (F * F)))", "b"),
    "newlines of whole pictures where they are cut": (
        "i_token // (n_width + 1)", "i_token // (n_w_crop * n_side + 1)"),
    "gradients of padding": ("image_features.new_zeros(", "image_features.new_empty("),
    "learned rows: the first token of each": ("[:, -1]", "[:, 0]"),
    "strides of 16 bytes where there are none": (
        "vector = _VECTOR if fits else 1", "vector = _VECTOR"),
}, "mrope": {
    "unchanged": ("import ctypes", "import ctypes"),
    "flip a sign": ("b_y = b_a * b_cos[None, :] - b_b", "b_y = b_a * b_cos[None, :] + b_b"),
    "backward rotates forward": (
        "head_axis, scaling, -scaling, norm", "head_axis, scaling, scaling, norm"),
    "use the first batch's positions": (
        "i_b * s_id_b + i_t * s_id_t, s_id_a, s_freq, s_axis,\n        cos",
        "i_t * s_id_t, s_id_a, s_freq, s_axis,\n        cos"),
    "use one axis for all": ("p_ids + o_id + b_axis * s_id_axis", "p_ids + o_id"),
    "drop the last part of pi/2": (
        "    b_r = tl.fma(-b_k, -1.7151245100058819e-15, b_r)\n", ""),
    "trust the first multiple of pi/2": (
        "    b_k += tl.floor(b_r * 0.6366197723675814 + 0.5)\n", ""),
    "skip tiles of k": (
        "(i_part + n_parts - tl.cdiv(n_q, BHQ) % n_parts) % n_parts",
        "i_part + n_parts - tl.cdiv(n_q, BHQ) % n_parts"),
    "address in 32 bits": (
        "i_b, i_t = (i_token // n_tokens).to(tl.int64), (i_token % n_tokens).to(tl.int64)\n"
        "    b_cos",
        "i_b, i_t = i_token // n_tokens, i_token % n_tokens\n    s_q_t = s_q_t.to(tl.int32)\n"
        "    b_cos"),
    "do not copy the rest": ("elif COPY:", "elif False:"),
    "norm: mean over the rotated channels alone": (
        "1.0 / tl.sqrt_rn(b_square / D + eps)\n            b_a",
        "1.0 / tl.sqrt_rn(b_square / (2 * R + 1) + eps)\n            b_a"),
    "norm: forget the rest's squares": (
        "                b_square += _sum(b_c * b_c, axis=1)\n", ""),
    "norm backward: forget the mean": ("(b_a - b_xa * b_mean)", "b_a"),
    "norm backward: weights' gradients of the last token": ("b_sa += b_a", "b_sa = b_a"),
    "norm backward: k's sums for q's": ("(q_weight, sums[0]", "(q_weight, sums[1]"),
    "strides of 16 bytes where there are none": (
        "_VECTOR if all(x % _VECTOR == 0 for s in used for x in s[:3]) else 1", "_VECTOR"),
    "let ids beyond 2^24 through": ("(ids < -MAX_ID) | (ids > MAX_ID)", "ids < -MAX_ID - 2**30"),
}, "gated_cross_attention": {
    "unchanged": ("import torch", "import torch"),
    "q's norm for k": (
        "normed = _normed(o, q, o.q_norm_weight), _normed(o, k, o.k_norm_weight)",
        "normed = _normed(o, q, o.q_norm_weight), _normed(o, k, o.q_norm_weight)"),
    "numbers of keys ignored": ("        key_lengths=o.key_lengths,\n", ""),
    "masks ignored": ("        block_mask=o.block_mask,\n", "        block_mask=None,\n"),
    "backward without norms": (
        "normed = _normed(o, q, weights[0]), _normed(o, k, weights[1])", "normed = q, k"),
    "backward: only what is needed of q": (
        "needs[0] or of_norms[0], needs[1] or of_norms[1]", "needs[0], needs[1]"),
    "eps of others": ("eps=o.norm_eps", "eps=1e-2"),
}, "packed_attention": {
    "unchanged": ("import math", "import math"),
    "numbers of keys anywhere": (
        "n = tl.minimum(tl.maximum(n, 0), n_length).to(tl.int32)", "n = n.to(tl.int32)"),
    "gradients behind the last key": (
        "        dk.zero_()\n        dv.zero_()\n", "        dv.zero_()\n"),
    "tiles of segments side by side": ("m = o // BLOCK + i <= i_tile", "m = o // BLOCK <= i_tile"),
    "the first tile of each segment": ("n_next = n_tiles * BLOCK if EVEN else", "n_next ="),
    "starts anywhere": (
        "o_first = tl.minimum(tl.maximum(o_begin, 0), n_rows)", "o_first = o_begin"),
    "forget sums of earlier keys": ("b_sum = b_sum * b_scale + tl.sum", "b_sum = tl.sum"),
    "forward: last keys of all are seen": (
        "        if not ALL:\n            m = m_key", "        if False:\n            m = m_key"),
    "forward: causal from the first key": (
        "o_last = o_row + (m - n)", "o_last = o_row"),
    "all blocks are seen": ("                m = m & b_blocks\n", "                m = m\n"),
    "all blocks are seen (keys)": (
        "b_s = tl.where(tl.trans(b_seen), b_s, -_INF)", "b_s = b_s"),
    "all blocks are seen (queries)": (
        "m_s = m_s & _blocks(p_seen, o_row, m_row, o_key, m_key, n_block, n_blocks)", "m_s = m_s"),
    "padding sees padding": (
        "m = m & ((b_hidden[:, None] == 0) | (b_h[None, :] == 0))", "m = m & True"),
    "tiles of padding walk over all keys": (
        "_seen(p_padding, o_first, n, 1024)\n                i_first = i_first // BN * BN\n"
        "                i_all",
        "n * 0, n\n                i_first = i_first // BN * BN\n                i_all"),
    "the second part of the channels twice": (
        "b_y_2 = _dot(b_p, b_v_2, b_y_2", "b_y_2 = _dot(b_p, b_v_2, 2.0 * b_y_2"),
    "the first KV head for all": (
        "i_kv = i_head // n_group\n    p_k", "i_kv = i_head * 0\n    p_k"),
    "gradients of keys: the first head of a group": (
        "for i_of_group in range(0, n_group)", "for i_of_group in range(0, 1)"),
    "gradients of keys without scale": ("_store(p_dk, b_dk * scale", "_store(p_dk, b_dk"),
    "gradients without delta": ("(b_dp - b_delta[:, None])", "b_dp"),
    "strides of 16 bytes where there are none": (
        "_VECTOR if all(x % _VECTOR == 0 for s in strides for x in s) else 1", "_VECTOR"),
}, "patch_embed": {
    "unchanged": ("import math", "import math"),
    "rows of a patch for columns": ("o_k // SW % SH)", "o_k % SH)"),
    "the frame for the row": ("o_k // (SW * SH) % ST)", "o_k // SW % ST)"),
    "channels of one frame": ("o_c = o_k // (SW * SH * ST)", "o_c = o_k // (SW * SH) % SC"),
    "skip the last step of K": ("range(0, n_k, BK)", "range(0, n_k - BK + 1, BK)"),
    "skip the tail of K": ("m_w = (o_k < n_k)[:, None]", "m_w = (o_k < n_k // 8 * 8)[:, None]"),
    "a grid of other rows": ("o_h = (o_row % n_grid_h)", "o_h = o_row"),
    "a neighbour's column": ("o_w = (o_patch % n_grid_w)", "o_w = ((o_patch + 1) % n_grid_w)"),
    "pixels of the first image": ("    b_place += o_image * s_b * VEC\n", ""),
    "address pixels in 32 bits": (
        "b_o += o_c.to(tl.int64) * s_c * VEC",
        "b_o += (o_c * (s_c.to(tl.int32) * VEC)).to(tl.int64)"),
    "address tables in 32 bits": (
        "p_row = p_table + b_i * D", "p_row = p_table + (b_i * D).to(tl.int32)"),
    "sum in the weight's dtype": (
        "b_y = tl.dot(b_x, b_w, b_y)",
        "b_y = (b_y + tl.dot(b_x, b_w)).to(dtype).to(tl.float32)"),
    "forget the bias": ("if p_bias is not None:", "if False:"),
    "a prefix at the front that is last": (
        "m_patch = (o_patch >= 0) & (o_patch < n_patches)", "m_patch = (o_patch >= 0)"),
    "the prefix of the first token": ("o_extra = o_token\n", "o_extra = o_token * 0\n"),
    "positions of the first image": ("p_index + o_image * s_index_b", "p_index"),
    "weights of the first token": ("+ o_token * s_factor_n", ""),
    "the first tap alone": ("p_i + i_tap * s_index_t", "p_i"),
    "weights of the first tap": ("p_f + i_tap * s_factor_t", "p_f"),
    "positions of patches for all tokens": ("        if PATCHES_ONLY:", "        if False:"),
    "positions from the start for each image": ("o_token + n_first, m_row", "o_token, m_row"),
    "dense positions without their weight": (
        "            b_row *= tl.load(p_f, mask=m_row, other=0.0).to(tl.float32)[:, None]\n",
        "            b_row *= 1.0\n"),
    "norm: squares of what is not there": (
        "b_n = tl.where(m, b_y - b_mean[:, None], 0.0)", "b_n = b_y - b_mean[:, None]"),
    "norm: eps outside the root": ("axis=1) / D + eps))", "axis=1) / D) + eps))"),
    "norm: prefixes too": ("b_y = tl.where(m_patch[:, None], b_n, b_y)", "b_y = b_n"),
    "norm: forget its weight": (
        "b_n *= tl.load(p_norm + o_d, mask=m_d, other=0.0)",
        "b_n *= 1.0 + 0.0 * tl.load(p_norm + o_d, mask=m_d, other=0.0)"),
    "norm: in every pass": (
        "passes = [(\"none\", position) for", "passes = [(a.norm, position) for"),
    "a second table rounds in between": (
        "out.new_empty(out.shape, dtype=torch.float32) if passes else out", "out"),
    "values of the first channel": ("(o_c * 256)[None, :]", "(o_c * 0)[None, :]"),
    "slopes without intercepts": (
        "* b_slope[None, :] + b_intercept", "* b_slope[None, :] + 0 * b_intercept"),
    "strides of 16 bytes where there are none": (
        "vector = math.gcd(_VECTOR, sizes[3], *strides)", "vector = _VECTOR"),
    "images packed without their prefixes": ("token += math.prod(grid) + a.extra",
                                             "token += math.prod(grid)"),
    "pack: the first image's patches": ("panel[low - begin : high - begin]", "panel[: high - low]"),
    "pack: from the start of an image": ("*strides, low - start, high", "*strides, 0, high"),
    "no limit of the norm": ("channels > MAX_NORM_CHANNELS", "False"),
}, "mlp_projector": {
    "unchanged": ("import os", "import os"),
    "the largest for the sum": (
        "tl.sum(b_of_hidden.to(tl.float32), 0)", "tl.max(b_of_hidden.to(tl.float32), 0)"),
    "the gate alone": ("b_y *= b_x", "b_y *= 1.0"),
    "a norm's gradient keeps its mean": ("b_of_x -= tl.sum(b_g, 0) / W", "b_of_x -= 0.0"),
    "rows as if x were contiguous": ("i_row * s_x * VEC", "i_row * W"),
    "no offset": (".to(tl.float32) + offset", ".to(tl.float32)"),
    "no mean": ("b_x - b_mean, 0.0)", "b_x, 0.0)"),
    "sums of rows beyond the last": ("m_row, m_d = o_row < n_rows,", "m_row, m_d = o_row >= 0,"),
    "a gate's gradient without what it multiplies": ("b_g * b_x * b_slope", "b_g * b_slope"),
}, "pixel_shuffle": {
    "unchanged": ("import os", "import os"),
    "columns of blocks for rows": (
        "(i_number // n_columns).to(tl.int64), (i_number % n_columns).to(tl.int64)",
        "(i_number % n_columns).to(tl.int64), (i_number // n_columns).to(tl.int64)"),
    "pixels of cyx in another order": (
        "tl.interleave(tl.interleave(b_0, b_2), tl.interleave(b_1, b_3))",
        "tl.interleave(tl.interleave(b_0, b_1), tl.interleave(b_2, b_3))"),
    "pixels of cyx that do not exist": (
        "tl.store(p_m, _quads(p_pixels + o_block, o_c, o_c < C, s_y, s_x, VEC), mask=m)",
        "tl.store(p_m, _quads(p_pixels + o_block, o_c, o_c < C, s_y, s_x, VEC))"),
    "the inverse of another order": (
        "(o_k % n_block, o_k // n_block) if CYX else",
        "(o_k % n_block, o_k // n_block) if CYX and not INVERSE else"),
    "channels lie side by side": ("(o_c if UNIT else o_c * s_c)", "o_c"),
    "sums for means": ("(b * (1.0 / n_block)).to(", "b.to("),
    "sums for means' gradients": (".to(tl.float32) * (1.0 / n_block)\n", ".to(tl.float32)\n"),
    "sums for gradients of means that are normed": (
        "b_d = b_d * (1.0 / n_block)", "b_d = b_d * 1.0"),
    "norm: a mean of what is not there": (
        "tl.where(m, b_x - _total(b_x) / n, 0.0)", "b_x - _total(b_x) / n"),
    "norm: no offset": (
        "(_vector(p_weight, o_k, m, s_w, 1.0) + offset)", "_vector(p_weight, o_k, m, s_w, 1.0)"),
    "norm: the second row of pixels for both": ("p_2 = p_0 + s_y * VEC", "p_2 = p_1 + s_y * VEC"),
    "norm: cyx pixels one after the other": (
        "o_k * (F * F) + i_pixel if CYX else i_pixel * C + o_k", "i_pixel * C + o_k"),
    "norm backward: forget the mean": ("b_d -= _total(b_wg) / n", "b_d -= 0.0"),
    "norm backward: the last row's sums": ("b_of_weight += b_g * b_x", "b_of_weight = b_g * b_x"),
    "norm backward: the weight's sums for the bias": (
        "vector_grad(o.norm_bias, 1, of_bias)", "vector_grad(o.norm_bias, 0, of_bias)"),
    "norm backward: sums of the last images": ("torch.cat(sums)[:, which]", "sums[-1][:, which]"),
    "pixels that no token has": (
        "merged.new_empty if covered == hidden_states.numel() else merged.new_zeros",
        "merged.new_empty"),
    "packed without prefixes": (
        "pixel += alike * (o.skip_prefix + h * w)", "pixel += alike * h * w"),
    "strides of 16 bytes where there are none": (
        "return _VECTOR if all(", "return _VECTOR if True or all("),
    "no limit of the norm": ("_normed(o, channels) > MAX_NORM", "False"),
}}  # fmt: skip

# name -> (file below csrc/, text, replacement); run on the emulator
CUDA_MUTATIONS = {
    "unchanged": ("common/types.h", "#pragma once", "#pragma once"),
    "attention: no barrier between tiles": (
        "common/attention.cuh", "__syncthreads();  // tile has come, and the other buffer is free",
        ""),
    "attention: no barrier before what is shared becomes the result": (
        "common/attention.cuh", "__syncthreads();  // shared memory is y's now",
        ""),
    "attention: no barrier before keys become their gradients": (
        "common/attention.cuh", "__syncthreads();  // the keys' place is their gradients' now",
        ""),
    "attention: tiles are not waited for": (
        "common/attention.cuh", "cp_async_wait<0>();\n    __syncthreads();  // tile has come",
        "__syncthreads();  // tile has come"),
    "attention: a key beyond the last": (
        "common/attention.cuh", "first + column >= limit[i][e / 2]",
        "first + column > limit[i][e / 2]"),
    "attention: a result of another maximum": (
        "common/attention.cuh", "y[i][j][2 * half + 1] *= scale;",
        ""),
    "attention: a sum of another maximum": ("common/attention.cuh", "sum[i][half] *= scale;", ""),
    "attention: no sum for backward": (
        "common/attention.cuh", "*parts.at(row) = inverse[i][half];",
        "*parts.at(row) = 1.0f;"),
    "attention: few rows of fewer keys": (
        "ops/packed_attention/packed_attention.cu", "? Few::kAll : Few::kSome",
        "? Few::kAll : Few::kAll"),
    "attention: sums of chunks as they are": (
        "common/attention.cuh", "power_of_2(stats[i * step].x - most) * stats[i * step].y",
        "stats[i * step].y"),
    "attention: without the last chunk": (
        "common/attention.cuh", "(segment.keys + kChunk - 1) / kChunk",
        "segment.keys / kChunk"),
    "attention: one head of a group": (
        "common/attention.cuh", "i * row + (r - i * group) * head",
        "i * row"),
    "attention: no delta": (
        "common/attention.cuh", "x * (ds[0][j][e] - delta[e / 2])",
        "x * ds[0][j][e]"),
    "attention: no delta (keys)": (
        "common/attention.cuh", "s[0][j][e] * (ds[0][j][e] - of[e % 2])",
        "s[0][j][e] * ds[0][j][e]"),
    "attention: the first query sees the first key": (
        "common/attention.cuh", "offset = keys - rows / group",
        "offset = 0"),
    "attention: rows for queries": (
        "common/attention.cuh", "min(keys, q.query(row) + offset + 1)",
        "min(keys, row + offset + 1)"),
    "attention: without the first rows that see a key": (
        "common/attention.cuh", "max(first_key - offset, 0) * group / Tile::kOther",
        "max(first_key - offset, 0) * group / Tile::kOther + (p.causal && first_key > offset)"),
    "attention: padding hides from all": (
        "common/attention.cuh", "hidden_row >> (2 * i + e / 2) & hidden_key >> column & 1",
        "hidden_key >> column & 1"),
    "attention: tiles of padding are left out for all": (
        "common/attention.cuh", "if (!skips && !blocks.hide()) return tile;",
        "if (hidden.data == nullptr && !blocks.hide()) return tile;"),
    "attention: all blocks are seen": (
        "common/attention.cuh", "!blocks.sees(row, first + column)))\n                s[i][j][e]",
        "false))\n                s[i][j][e]"),
    "attention: all blocks are seen (queries)": (
        "common/attention.cuh", "!blocks.sees(row, first + column)))\n              x = 0.0f",
        "false))\n              x = 0.0f"),
    "attention: all blocks are seen (keys)": (
        "common/attention.cuh", "!blocks.sees(first + column, key)))", "false))"),
    "attention: all blocks are seen (float32)": (
        "common/attention.cuh",
        "if (blocks.hide() && !blocks.sees(row, key)) return false;", ""),
    "attention: a row's blocks are the head's": (
        "common/attention.cuh", "of_query(p.group() == 1 ? r : r / p.group())",
        "of_query(r)"),
    "attention: tiles of the first block alone": (
        "common/attention.cuh", "const int last = of_key(end_key - 1);",
        "const int last = of_key(key);"),
    "attention: a segment of the first 32 steps": (
        "common/attention.cuh", "first += last * step;",
        "first = last * step;"),
    "attention: a negative scale as its size": (
        "common/attention.cuh", "a[e] ^= plan.flip;", "a[e] ^= 0;"),
    "attention: gradients of keys without the scale": (
        "common/attention.cuh", "dk_tile + corner, dk, [&](int, int) { return p.scale; }",
        "dk_tile + corner, dk, [&](int, int) { return 1.0f; }"),
    "attention: packs of what is not aligned": (
        "ops/packed_attention/packed_attention.cu", "return aligned(of.data) && of.batch",
        "return true || of.batch"),
    "crops: columns of a block for rows": (
        "ops/hd_transform/hd_transform.cuh", "part / p.factor, part % p.factor)",
        "part % p.factor, part / p.factor)"),
    "crops: channels lie side by side": (
        "ops/hd_transform/hd_transform.cuh", "V == 1 ? at * stride : at", "at"),
    "crops: the first part of learned rows": (
        "ops/hd_transform/hd_transform.cuh", "(learned) + part * p.channels", "(learned)"),
    "crops: packs wherever channels divide": (
        "ops/hd_transform/hd_transform.cu", "p.pixel_stride % v == 0 && p.crop_stride % v == 0",
        "true"),
    "crops: packs of what is not aligned": (
        "ops/hd_transform/hd_transform.cu", "% (v * bytes) == 0", "% bytes == 0"),
    "crops: packs of some images": (
        "ops/hd_transform/hd_transform.cu", "wide = wide && p.images[i].offset % v == 0",
        "wide = wide && p.images[i].offset % v >= 0"),
    "features' gradients: not cleared": (
        "ops/hd_transform/hd_transform.cuh", "return clear_row<V>(to, p.channels);", "return;"),
    "features' gradients: sums for means": (
        "ops/hd_transform/hd_transform.cuh", "to_float(x[k]) * p.scale", "to_float(x[k])"),
    "learned rows: no barrier": (
        "ops/hd_transform/hd_transform.cuh", "  __syncthreads();\n", ""),
    "learned rows: without those of whole views": (
        "ops/hd_transform/hd_transform.cuh", "y < p.side; y += kSlices", "y < 0; y += kSlices"),
    "learned rows: the last launch's images": (
        "ops/hd_transform/hd_transform.cuh", "column] += static_cast", "column] = static_cast"),
    "aggregation: rows of a map side by side": (
        "ops/spatial_aggregate/spatial_aggregate.cuh",
        "key += e.key_stride.y - e.width * e.key_stride.x;", ""),
    "aggregation: tokens of the first row": (
        "ops/spatial_aggregate/spatial_aggregate.cuh", "token += (p_.grid_w - 1) * e.width;", ""),
    "aggregation: masks of the first row": (
        "ops/spatial_aggregate/spatial_aggregate.cuh",
        "mask_ += e.mask_stride.y - e.width * e.mask_stride.x;", ""),
    "aggregation: the mask ignored": (
        "ops/spatial_aggregate/spatial_aggregate.cuh",
        "exists[n] = walk.exists();", "exists[n] = true;"),
    "aggregation: heads beyond the last": (
        "ops/spatial_aggregate/spatial_aggregate.cuh", "place.head < p.heads && ", ""),
    "aggregation: channels beyond the last": (
        "ops/spatial_aggregate/spatial_aggregate.cuh",
        " && place.channel + i * kLanes * kPack<T> < p.head_dim", ""),
    "aggregation: products of half of the lanes": (
        "ops/spatial_aggregate/spatial_aggregate.cuh", "distance = kLanes / 2;",
        "distance = kLanes / 4;"),
    "aggregation: sums of another maximum": (
        "ops/spatial_aggregate/spatial_aggregate.cuh", "sums[i][c] *= before;", ";"),
    "aggregation: the largest logit of one lane": (
        "ops/spatial_aggregate/spatial_aggregate.cuh", "most = of_lanes<kLanes, true>(most);", ""),
    "aggregation: a mean of one lane's tokens": (
        "ops/spatial_aggregate/spatial_aggregate.cuh", "return of_lanes<kLanes>(mean);",
        "return mean;"),
    "aggregation: weights without their mean": (
        "ops/spatial_aggregate/spatial_aggregate.cuh", "(of.y - mean)", "of.y"),
    "aggregation: every lane keeps logits": (
        "ops/spatial_aggregate/spatial_aggregate.cuh",
        "if (tokens.listed[n] && place.channel == 0)", "if (tokens.listed[n])"),
    "aggregation: no barrier before the softmax": (
        "ops/spatial_aggregate/spatial_aggregate.cuh", "  __syncwarp();\n  const float mean",
        "  const float mean"),
    "aggregation: no barrier behind the softmax": (
        "ops/spatial_aggregate/spatial_aggregate.cuh", "  __syncwarp();\n  float sums",
        "  float sums"),
    "aggregation: heads of a warp keep one": (
        "ops/spatial_aggregate/spatial_aggregate.cuh",
        "(place.warp * (kWarpSize / kLanes) + place.of_warp) * p.keys", "place.warp * p.keys"),
    "aggregation: gradients of no token are what a NaN makes": (
        "ops/spatial_aggregate/spatial_aggregate.cuh", "x[c] = exists ? factor * row[i][c] : 0.0f;",
        "x[c] = factor * row[i][c];"),
    "aggregation: no token, no number": (
        "ops/spatial_aggregate/spatial_aggregate.cuh", "sum == 0.0f ? 0.0f : 1.0f / sum",
        "1.0f / sum"),
    "aggregation: more than 48 KiB": (
        "ops/spatial_aggregate/spatial_aggregate.cu",
        "std::min<int64_t>(kMostWarps, kShared / std::max<int64_t>(bytes, 1))",
        "int64_t{kMostWarps}"),
    "aggregation: one pack of two": (
        "ops/spatial_aggregate/spatial_aggregate.cu", "return run<T, 32, 2>(p, backward, stream);",
        "return run<T, 32, 1>(p, backward, stream);"),
    "aggregation: packs of what is not aligned": (
        "ops/spatial_aggregate/spatial_aggregate.cpp", "return on || launch.kernels == nullptr;",
        "return true;"),
    "residual: rows of one warp": (
        "ops/gated_residual/gated_residual.cuh", "tile.number * kWarps + tile.warp",
        "tile.number * kWarps"),
    "residual: the first gate for all": (
        "ops/gated_residual/gated_residual.cuh", "from[(column + e) * gate.stride]",
        "from[column * gate.stride]"),
    "residual: channels beyond the last": (
        "ops/gated_residual/gated_residual.cuh", "if (e >= n) continue;", ""),
    "residual: gradients of hidden rows": (
        "ops/gated_residual/gated_residual.cuh", "added[k] ? g[e] * t[e] : 0.0f", "g[e] * t[e]"),
    "residual: what rounding takes from sums": (
        "ops/gated_residual/gated_residual.cuh",
        "static_cast<double>(sum) + static_cast<double>(lost)", "static_cast<double>(sum)"),
    "residual: no barrier before sums of warps": (
        "ops/gated_residual/gated_residual.cuh", "  __syncthreads();\n  if (p.gate.per_channel) {",
        "  if (p.gate.per_channel) {"),
    "residual: no barrier between halves": (
        "ops/gated_residual/gated_residual.cuh",
        "+= shared[thread + n];\n    __syncthreads();", "+= shared[thread + n];"),
    "residual: packs of what is not aligned": (
        "ops/gated_residual/gated_residual.cu", "% 16 == 0 && s.channel == 1 &&",
        "% 2 == 0 && s.channel == 1 &&"),
    "residual: packs of channels apart": (
        "ops/gated_residual/gated_residual.cu", "s.channel == 1 &&", "true &&"),
    "flip a sign (half)": ("ops/mrope/mrope.cuh", "p.sine_sign * p.scaling", "p.scaling"),
    "flip a sign (pairs)": (
        "ops/mrope/mrope.cuh", "y * c.v[e] + x * s.v[e]", "y * c.v[e] - x * s.v[e]"),
    "use a neighbour's position": (
        "ops/mrope/mrope.cuh", "token.s * p.id_stride[2]",
        "(token.s + 1) % p.tokens * p.id_stride[2]"),
    "use one axis for all": ("ops/mrope/mrope.cuh", "axis = max(0, min(*axis_of, last));",
                             "axis = 0;"),
    "use the first batch's strides": (
        "ops/mrope/mrope.cuh", "b * stride[0] + s * stride[1]", "s * stride[1]"),
    "do not copy the rest": (
        "ops/mrope/mrope.cuh", "else if (active && rows.src != rows.dst) {", "else if (false) {"),
    "copy half of the rest's last item": (
        "ops/mrope/mrope.cuh", "both = second < static_cast<int>(p.head_dim);", "both = turns;"),
    "skip the last head": (
        "ops/mrope/mrope.cuh", "active = place.mine && head + place.group < rows.heads",
        "active = place.mine && head + place.group < rows.heads - (rows.heads > 1)"),
    "no barrier after the table": (
        "ops/mrope/mrope.cuh", "  __syncthreads();\n\n  const float per_channel",
        "\n  const float per_channel"),
    "no barrier between tokens in backward": (
        "ops/mrope/mrope.cuh",
        "shared.table + current * table_size(p));\n    __syncthreads();",
        "shared.table + current * table_size(p));"),
    "one table for two tokens in backward": ("ops/mrope/mrope.cuh", "current ^= 1;", ""),
    "norm without its offset": ("ops/mrope/mrope.cuh", "+ p.norm_offset :", ":"),
    "norm without epsilon": ("ops/mrope/mrope.cuh", " + p.norm_eps)", ")"),
    "gradient of the norm without its mean": (
        "ops/mrope/mrope.cuh", "w.v[e] * scaled - x.v[e] * k", "w.v[e] * scaled"),
    "weight gradient without the last part": (
        "ops/mrope/mrope.cuh", "part < parts; part +=", "part < parts - 1; part +="),
    "weight gradient of the last unit": (
        "ops/mrope/mrope.cuh", "sums[e] += scaled * x.v[e];", "sums[e] = scaled * x.v[e];"),
    "packs whose width depends on strides": (
        "ops/mrope/mrope.cu", "divides(p, 4) && !(fits && has_norm(p))", "divides(p, 4)"),
    "packs where memory is not aligned": (
        "ops/mrope/mrope.cu", "% (v * sizeof(T)) == 0 && ", "% sizeof(T) == 0 && "),
    "units that no warp takes": (
        "ops/mrope/mrope.cuh", "unit += kAhead * stride", "unit += 2 * kAhead * stride"),
    "one thread too few for a head's sum": (
        "ops/mrope/mrope.cuh", "distance = lanes / 2", "distance = lanes / 4"),
    "patches of the line below": (
        "ops/patch_embed/patch_embed.cuh", "line % lines * p.grid_stride[1]",
        "line / lines * p.grid_stride[1]"),
    "the first channel's pixels for all": (
        "ops/patch_embed/patch_embed.cuh", "channel * p.size_stride[0] + plane", "plane"),
    "forget temporal patches": (
        "ops/patch_embed/patch_embed.cuh", "plane % frames * p.size_stride[1] +\n", "\n"),
    "the first channel's map for all": (
        "ops/patch_embed/patch_embed.cuh", "p.map + channel * p.map_columns", "p.map"),
    "read below the weight": (
        "ops/patch_embed/patch_embed.cuh", "(first + r < last ? first + r : last) * pitch",
        "(first + r) * pitch"),
    "one tile in flight too many": (
        "ops/patch_embed/patch_embed.cuh", "else if (stages == 3)\n    cp_async_wait<1>();",
        "else if (stages == 3)\n    cp_async_wait<2>();"),
    "no barrier between tiles": (
        "ops/patch_embed/patch_embed.cuh", "wait_for_stage(stages);\n    __syncthreads();",
        "wait_for_stage(stages);"),
    "no barrier before the slab": (
        "ops/patch_embed/patch_embed.cuh", "cp_async_wait<0>();\n  __syncthreads();",
        "cp_async_wait<0>();"),
    "no barrier after the slab": (
        "ops/patch_embed/patch_embed.cuh", "fill_places<Tile>(p, place, first_row, threadIdx.x);\n"
        "  __syncthreads();", "fill_places<Tile>(p, place, first_row, threadIdx.x);"),
    "another order of half slabs": (
        "ops/patch_embed/patch_embed.cuh", "y.v[e] = flip ? other[e] : one[e];",
        "y.v[e] = one[e];"),
    "chunks of a row exchanged twice": (
        "ops/patch_embed/patch_embed.cuh", "(byte / 16 ^ (row & 7)) * 16",
        "(byte / 16 ^ (row & 15)) * 16"),
    "write beyond the last patch": (
        "ops/patch_embed/patch_embed.cuh", "inside[i] = i * kStride < left;", "inside[i] = true;"),
    "positions of the first tap alone": (
        "ops/patch_embed/patch_embed.cuh", "tap < q.taps; ++tap", "tap < 1; ++tap"),
    "the first sequence's rows of a table": (
        "ops/patch_embed/patch_embed.cuh", "sequence[i] * q.index_stride[0] + token", "token"),
    "patches counted with the prefix": (
        "ops/patch_embed/patch_embed.cuh", "q.patches_only ? p.first_patch",
        "false ? p.first_patch"),
    "a prefix of the first image alone": (
        "ops/patch_embed/patch_embed.cu", "divide_up(p.images * p.prefix_tokens, Tile::kThreads",
        "divide_up(p.prefix_tokens, Tile::kThreads"),
    "copies wider than runs": (
        "ops/patch_embed/patch_embed.cu", "p.size[3] * bytes % unit == 0", "true"),
    "forget the last part of a float32 sum": (
        "ops/patch_embed/patch_embed.cuh", "first_channel, multiply);\n  add_part();",
        "first_channel, multiply);"),
    "projector: every other row of a part": (
        "ops/mlp_projector/mlp_projector.cuh",
        "for (int64_t row = tile.row; row < tile.last; row += kSumWarps)",
        "for (int64_t row = tile.row; row < tile.last; row += 2 * kSumWarps)"),
    "projector: every other row of a norm's part": (
        "ops/mlp_projector/mlp_projector.cuh",
        "tile.row : tile.last; row < tile.last; row += kSumWarps",
        "tile.row : tile.last; row < tile.last; row += 2 * kSumWarps"),
    "projector: sums written over before they are read": (
        "common/row_sums.cuh", "  __syncthreads();  // shared is used again\n", ""),
    "projector: parts of any size have 32 rows": (
        "common/row_sums.cuh", "part_rows = gpu_part_rows(rows, width)", "part_rows = kSmallPart"),
    "projector: as many small parts as there are large ones": (
        "ops/mlp_projector/mlp_projector.cpp",
        "launchers_for(x) != nullptr ? gpu_part_rows(rows, x.size(1)) : kPartRows", "kPartRows"),
    "projector: elements beyond whole packs": (
        "ops/mlp_projector/mlp_projector.cuh", "if (i < elements - packs * V)", "if (false)"),
    "projector: silu for quick_gelu": (
        "ops/mlp_projector/mlp_projector.cuh", "Activation::kQuickGelu>()", "Activation::kSilu>()"),
    "projector: gelu for tanh's": (
        "ops/mlp_projector/mlp_projector.cuh", "Activation::kGeluTanh>()", "Activation::kGelu>()"),
    "projector: infinity in the slope of a tail": (
        "ops/mlp_projector/mlp_projector.cuh", "-(u < -88.0f ? -88.0f : u)", "-u"),
    "projector: a slope without what it multiplies": (
        "ops/mlp_projector/mlp_projector.cuh", "g.v[e] * x.v[e] * y.slope", "g.v[e] * y.slope"),
    "projector: rows as if x were contiguous": (
        "ops/mlp_projector/mlp_projector.cuh", "row * p.x_stride", "row * p.width"),
    "projector: rows to norm as if x were contiguous": (
        "ops/mlp_projector/mlp_projector.cuh", "blockIdx.x * p.x_stride;\n  T* const out",
        "blockIdx.x * p.width;\n  T* const out"),
    "projector: rows of any width as if x were contiguous": (
        "ops/mlp_projector/mlp_projector.cuh", "blockIdx.x * p.x_stride) {}",
        "blockIdx.x * p.width) {}"),
    "projector: any width: every other element": (
        "ops/mlp_projector/mlp_projector.cuh", "i < p.width; i += kAnyThreads",
        "i < p.width; i += 2 * kAnyThreads"),
    "projector: any width: rms with a mean in its gradient": (
        "ops/mlp_projector/mlp_projector.cuh", "p.layer ? sums[0] * per_element : 0.0f",
        "sums[0] * per_element"),
    "projector: no statistics where nobody needs x's gradient": (
        "ops/mlp_projector/mlp_projector.cuh",
        "keep(p.scales, blockIdx.x, by[0]);\n  if (p.grad_x == nullptr) return;",
        "if (p.grad_x != nullptr) keep(p.scales, blockIdx.x, by[0]);\n"
        "  if (p.grad_x == nullptr) return;"),
    "projector: x's gradient that nobody needs": (
        "ops/mlp_projector/mlp_projector.cuh",
        "keep(p.scales, blockIdx.x, by[0]);\n  if (p.grad_x == nullptr) return;",
        "keep(p.scales, blockIdx.x, by[0]);"),
    "projector: no gradient's mean lacks anything": (
        "ops/mlp_projector/mlp_projector.cuh", "by.normed(y.v[e]) * g.v[e]",
        "(y.v[e] - by.mean) * by.scale * g.v[e]"),
    "projector: sums over rows: pairs in odd widths": (
        "ops/mlp_projector/mlp_projector.cuh", "V == 1 || width % V == 0", "true"),
    "projector: sums over rows: columns beyond the last are read": (
        "ops/mlp_projector/mlp_projector.cuh", "column + e < width ? to_float(from[e]) : 0.0f",
        "to_float(from[e])"),
    "projector: sums over rows: columns beyond the last are written": (
        "ops/mlp_projector/mlp_projector.cuh", "if (column + e < width) out[",
        "if (column < width) out["),
    "projector: sums over rows: the first slice for all": (
        "ops/mlp_projector/mlp_projector.cuh", "first = blockIdx.y * kSliceRows",
        "first = 0 * kSliceRows"),
    "projector: sums over rows: slices of slices": (
        "ops/mlp_projector/mlp_projector.cuh", "gridDim.y == 1 || first + kSliceRows > rows",
        "first + kSliceRows > rows"),
    "projector: sums over rows: rows beyond the last": (
        "ops/mlp_projector/mlp_projector.cuh",
        "gridDim.y == 1 || first + kSliceRows > rows ? rows : first + kSliceRows",
        "gridDim.y == 1 ? rows : first + kSliceRows"),
    "projector: sums over rows: partial sums of the bits of x": (
        "ops/mlp_projector/mlp_projector.cu", "by_dtype(DType::kFloat32, false, SumRows{rest",
        "by_dtype(p.dtype, false, SumRows{rest"),
    "projector: packs where x is not aligned": (
        "ops/mlp_projector/mlp_projector.cu", "all_aligned(p.x, ", "all_aligned("),
    "projector: packs beyond the end of a row": (
        "ops/mlp_projector/mlp_projector.cu", "return p.width % pack == 0 && ", "return "),
    "projector: packs of gradients beyond the end of a row": (
        "ops/mlp_projector/mlp_projector.cu", "p.width % pack_of(p.dtype) == 0 &&\n", "\n"),
    "projector: packs in rows that do not begin on one": (
        "ops/mlp_projector/mlp_projector.cu", "p.x_stride % pack == 0 &&\n", "\n"),
    "shuffle: a token's group ends one too late": (
        "ops/pixel_shuffle/pixel_shuffle.cuh", "p.groups[at + 1].first <= token",
        "p.groups[at + 1].first < token"),
    "shuffle: every warp's first segment": (
        "ops/pixel_shuffle/pixel_shuffle.cuh", "first = segment * kAhead * kWarpSize +",
        "first = 0 * segment +"),
    "shuffle: words of cyx exchanged": (
        "ops/pixel_shuffle/pixel_shuffle.cuh", "of[0] >> 16 | (of[1] & 0xffff0000u)",
        "of[1] >> 16 | (of[0] & 0xffff0000u)"),
    "shuffle: pixels of cyx turned on their side": (
        "ops/pixel_shuffle/pixel_shuffle.cuh", "i / 2 * y + i % 2 * x + unit * N",
        "i / 2 * x + i % 2 * y + unit * N"),
    "shuffle: sums for means' gradients": (
        "ops/pixel_shuffle/pixel_shuffle.cuh",
        "share[e] = x[e] * (1.0f / static_cast<float>(p.block()))", "share[e] = x[e]"),
    "shuffle: means of a line": (
        "ops/pixel_shuffle/pixel_shuffle.cuh",
        "const float share = 1.0f / static_cast<float>(p.block());",
        "const float share = 1.0f / static_cast<float>(p.factor);"),
    "shuffle: inverses rounded down": (
        "ops/pixel_shuffle/pixel_shuffle.cuh", "((uint64_t{1} << 32) + n - 1) / n",
        "(uint64_t{1} << 32) / n"),
    "shuffle: one has no inverse": ("ops/pixel_shuffle/pixel_shuffle.cuh", "d == 1 ? n : ", ""),
    "shuffle: normed pixels on the first": (
        "ops/pixel_shuffle/pixel_shuffle.cuh",
        "(pixel > 0 ? pixel * static_cast<int>(p.channels) : 0)", "0"),
    "shuffle: statistics of another pixel of cyx": (
        "ops/pixel_shuffle/pixel_shuffle.cuh", "by[e % S].scale + by[e % S].shift",
        "by[e * S / V].scale + by[e * S / V].shift"),
    "shuffle: statistics kept for one pixel of cyx": (
        "ops/pixel_shuffle/pixel_shuffle.cuh",
        "static_cast<int64_t>(blockIdx.x) * S + s, by[s]",
        "static_cast<int64_t>(blockIdx.x) * S, by[s]"),
    "shuffle: gradients of pixels that nobody needs": (
        "ops/pixel_shuffle/pixel_shuffle.cuh", "if (p.pixels_out == nullptr) return;", ""),
    "shuffle: the last row of a part": (
        "ops/pixel_shuffle/pixel_shuffle.cuh", "static_cast<int>(left) : plan.part_rows;",
        "static_cast<int>(left) : plan.part_rows - 1;"),
    "shuffle: places of a small part": (
        "ops/pixel_shuffle/pixel_shuffle.cuh", "kMostRows = kLargePart / S;",
        "kMostRows = kSmallPart / S;"),
    "shuffle: places read before they are found": (
        "ops/pixel_shuffle/pixel_shuffle.cuh",
        "find_row<layout>(p, first + threadIdx.x);\n  __syncthreads();",
        "find_row<layout>(p, first + threadIdx.x);"),
    "shuffle: sums with another row's statistics": (
        "ops/pixel_shuffle/pixel_shuffle.cuh", "kept(scales, (first + i) * S + s)",
        "kept(scales, i * S + s)"),
    "shuffle: parts overlap": (
        "ops/pixel_shuffle/pixel_shuffle.cuh", "partial + part * 2 * p.normed()",
        "partial + part * p.normed()"),
    "shuffle: parts beyond whole turns": (
        "common/row_sums.cuh", "part < parts; part += kSlices",
        "part < parts / kSlices * kSlices; part += kSlices"),
    "shuffle: any strides: normed cyx pixels one after the other": (
        "ops/pixel_shuffle/pixel_shuffle.cuh",
        "p.order == Order::kYxc ? pixel * p.channels + k : k * p.block() + pixel",
        "pixel * p.channels + k"),
    "shuffle: any strides: rms with a mean in its gradient": (
        "ops/pixel_shuffle/pixel_shuffle.cuh",
        "const float mean_wg = layer ? sums[2] * per_element : 0.0f;",
        "const float mean_wg = sums[2] * per_element;"),
    "shuffle: any strides: sums of the last row": (
        "ops/pixel_shuffle/pixel_shuffle.cuh", "of_weight[k] += g * xh;", "of_weight[k] = g * xh;"),
    "shuffle: packs of channels that are apart": (
        "ops/pixel_shuffle/pixel_shuffle.cu", "p.pixel_stride == 1 && pixels_on", "pixels_on"),
    "shuffle: packs of pixels that are not aligned": (
        "ops/pixel_shuffle/pixel_shuffle.cu", "good = good && stride * size % bytes == 0;",
        "good = good && stride > -bytes * size;"),
    "shuffle: packs of merged tokens that are not aligned": (
        "ops/pixel_shuffle/pixel_shuffle.cu", "on(bytes, base) && token * size % bytes == 0;",
        "on(bytes, base);"),
    "shuffle: four pixels of any factor": (
        "ops/pixel_shuffle/pixel_shuffle.cu", "if (quads && p.factor != 2) return false;", ""),
    "shuffle: blocks whose pixels are far apart": (
        "ops/pixel_shuffle/pixel_shuffle.cu",
        "good = good && p.factor * (at.y + at.x) + p.channels < int64_t{1} << 31;",
        "good = good && at.x < int64_t{1} << 31;"),
    "shuffle: averages by warps that are not whole": (
        "ops/pixel_shuffle/pixel_shuffle.cu", "divide_up(n, kWarpSize) * kWarpSize, kNormThreads",
        "n, kNormThreads"),
    "shuffle: parts of cyx as large as others": (
        "ops/pixel_shuffle/pixel_shuffle.cu", "static_cast<int>(part_rows_of(p) / sets)",
        "static_cast<int>(part_rows_of(p))"),
    "shuffle: large parts end with a small one": (
        "ops/pixel_shuffle/pixel_shuffle.cu", "static_cast<int>(part_rows_of(p) / sets)",
        "static_cast<int>(32 / sets)"),
    "shuffle: no sums of the last part": (
        "ops/pixel_shuffle/pixel_shuffle.cu",
        "const int64_t blocks = parts * divide_up(units, kWarpSize);",
        "const int64_t blocks = (parts - (parts > 1)) * divide_up(units, kWarpSize);"),
    "shuffle: all launches' sums in the first's place": (
        "ops/pixel_shuffle/pixel_shuffle.cpp", "parts + part * 2 * n", "parts"),
    "shuffle: no sums of later launches": (
        "ops/pixel_shuffle/pixel_shuffle.cpp", "    part += parts_of(p);\n", ""),
    "shuffle: the gradient is taken as it lies": (
        "ops/pixel_shuffle/pixel_shuffle.cpp",
        "const Tensor dense = torch::stable::contiguous(grad);", "const Tensor& dense = grad;"),
    "norms: threads for whole warps alone": (
        "common/norm.cuh", "(packs + of_a_warp - 1) / of_a_warp", "packs / of_a_warp"),
    "norms: rows of any length": (
        "common/norm.cuh", "warps * kWarpSize <= kNormThreads ?", "warps > 0 ?"),
    "norms: one buffer for two sums": ("common/norm.cuh", "turn_ ^= 1;", ""),
    "norms: sums before all warps have written theirs": (
        "common/norm.cuh", "\n    __syncthreads();\n", "\n"),
    "norms: sums of warps that are not there": (
        "common/norm.cuh", "lane < warps ? mine[n * kWarpSize + lane] : 0.0f",
        "mine[n * kWarpSize + lane]"),
    "norms: what a mean lacks is not shifted": (
        "common/norm.cuh", "const float rest = layer ? sum * per_element : 0.0f;",
        "const float rest = layer ? 0.0f * sum : 0.0f;"),
    "norms: eps outside the root": (
        "common/norm.cuh", "1.0f / sqrtf(squares * per_element - rest * rest + eps)",
        "1.0f / (sqrtf(squares * per_element - rest * rest) + eps)"),
    "norms: rms without its mean": ("common/norm.cuh", "if (!layer) return;", ""),
    "norms: statistics of another pixel of cyx": (
        "common/norm.cuh", "sums[S + e % S] += x[j][e] * x[j][e];",
        "sums[S + e * S / V] += x[j][e] * x[j][e];"),
    "norms: another pixel of cyx in its gradient": (
        "common/norm.cuh", "const int s = e % S;", "const int s = e * S / V;"),
    "norms: a gradient keeps its mean": (
        "common/norm.cuh", "(layer ? sums[2 * S + s] * per_element : 0.0f) + along * shift",
        "along * shift"),
    "norms: rms with a mean in its gradient": (
        "common/norm.cuh", "layer ? sums[2 * S + s] * per_element : 0.0f",
        "sums[2 * S + s] * per_element"),
    "norms: what a mean lacks is not in its gradient": (
        "common/norm.cuh", "sums[3 * S + s] * scale + sums[2 * S + s] * shift",
        "sums[3 * S + s] * scale"),
    "norms: any length: rms with a mean": (
        "common/norm.cuh", "  if (layer) {\n    for (", "  if (true) {\n    for ("),
    "norms: any length: no offset": (
        "common/norm.cuh", "element(v, k, 0.0f) + offset", "element(v, k, 0.0f)"),
    "norms: statistics are kept for the row before": (
        "common/norm.cuh", "float* const to = scales + row * kScales;",
        "float* const to = scales + (row > 0 ? row - 1 : 0) * kScales;"),
    "norms: what a mean lacks is not kept": (
        "common/norm.cuh", "to[2] = by.shift;", "to[2] = 0.0f;"),
    "norms: sums over rows before all warps have written theirs": (
        "common/norm.cuh", "own[i];\n  __syncthreads();", "own[i];"),
    "norms: sums over rows of half of the warps": (
        "common/norm.cuh", "w < kWarps; ++w", "w < kWarps / 2; ++w"),
    "norms: an offset of both vectors is ignored": (
        "common/norm.cuh", "weight != nullptr && bias != nullptr && offset == 0.0f",
        "weight != nullptr && bias != nullptr"),
    "norms: an offset without a bias is ignored": (
        "common/norm.cuh", "w[e] += offset;", "w[e] += 0.0f;"),
    "norms: a bias without a weight is ignored": (
        "common/norm.cuh", "if (bias != nullptr) load_floats",
        "if (bias != nullptr && weight != nullptr) load_floats"),
    "norms: vectors of two dtypes": (
        "common/norm.cuh", "good = good && v->dtype == dtype &&", "good = good &&"),
    "joined: the same share of both": (
        "ops/perceiver_attention/perceiver_attention.cuh",
        "to_float(y[e]) * s.other", "to_float(y[e]) * s.first"),
    "joined: statistics of rows by heads": (
        "ops/perceiver_attention/perceiver_attention.cuh",
        "at = head * p.rows + row;", "at = row_and_head;"),
    "joined: threads beyond the last": (
        "ops/perceiver_attention/perceiver_attention.cuh",
        "if (thread >= p.rows * p.heads * packs) return;", ""),
    "joined: no statistics": (
        "ops/perceiver_attention/perceiver_attention.cuh", "p.statistics[at] = s.most;", ""),
    "joined: the gradient of q by the media alone": (
        "ops/perceiver_attention/perceiver_attention.cuh",
        "from_float<T>(x[i] + y[i])", "from_float<T>(x[i])"),
    "norm of a sum: without x's bias": (
        "ops/add_norm/add_norm.cuh",
        "if (p.vectors[kXBias].data != nullptr) add(", "if (false) add("),
    "norm of a sum: without the residual": (
        "ops/add_norm/add_norm.cuh",
        "if (p.residual != nullptr) add(", "if (false) add("),
    "norm of a sum: rows beyond the last": (
        "ops/add_norm/add_norm.cuh",
        "if (row >= p.rows) return;  // a warp", "if (false) return;  // a warp"),
    "norm of a sum: any vectors": (
        "ops/add_norm/add_norm.cu", "(x_bias.dtype == p.dtype && aligned(x_bias.data))", "true"),
    "norm of a sum: any strides": (
        "ops/add_norm/add_norm.cu",
        "&& s.outer % kPack<T> == 0 && s.row % kPack<T> == 0", ""),
    "norm of a sum: the residual in backward, element by element": (
        "ops/add_norm/add_norm.cuh", "p.residual == nullptr || p.grad != nullptr",
        "p.residual == nullptr"),
    "norm of a sum, backward: without the sum's own gradient": (
        "ops/add_norm/add_norm.cuh",
        "for (int e = 0; e < V; ++e) held.x[j][e] += more[e];\n    });\n  }\n  T* const out",
        "for (int e = 0; e < V; ++e) held.x[j][e] += 0;\n    });\n  }\n  T* const out"),
    "norm of a sum, backward: of one element": (
        "ops/add_norm/add_norm.cuh", "(wg - mean - by.normed(row(i)) * along)",
        "(wg - by.normed(row(i)) * along)"),
    "norm of a sum, backward: weights' of what was not normed": (
        "ops/add_norm/add_norm.cuh", "by.normed(y.v[e]) * of.v[e]", "y.v[e] * of.v[e]"),
    "norm of a sum, backward: x_bias's of what came": (
        "ops/add_norm/add_norm.cuh",
        "add(sums[kXBias], load<T, V>(p.out, row * p.channels + tile.column));",
        "add(sums[kXBias], of);"),
    "norm of a sum, backward: bias's dtype for all": (
        "ops/add_norm/add_norm.cuh", "switch (g.dtype[blockIdx.y])", "switch (g.dtype[0])"),
}  # fmt: skip

# Under the name of a module in vlmops, the file at a path.
RUN_WITH = """
import importlib.util, sys
name, path = sys.argv[1:3]
package, _, stem = name.rpartition(".")
spec = importlib.util.spec_from_file_location(name, path)
sys.modules[name] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
setattr(importlib.import_module(package), stem, module)
import pytest
sys.exit(pytest.main(sys.argv[3:]))
"""

# name -> (module, text, replacement)
SITE = "vlmops.hf.sites.patch_embed"
AROUND = "vlmops.hf.embeddings"
LAYERS = "vlmops.hf.plain"
SITE_MUTATIONS = {
    "unchanged": (SITE, "_CHANNELS = 16", "_CHANNELS = 16"),
    "patches that overlap": (SITE, "and module.stride == module.kernel_size", ""),
    "patches of one pixel": (SITE, "and math.prod(module.kernel_size) > 1", ""),
    "padding": (SITE, 'and (module.padding == "valid" or not any(module.padding))', ""),
    "dilation": (SITE, "and not any(side != 1 for side in module.dilation)", ""),
    "groups": (SITE, "and module.groups == 1", ""),
    "padded unfolding": (SITE, 'and sides["padding"] == (0, 0)', ""),
    "tokens copied": (SITE, "unflatten(2, grid)", "unflatten(2, grid).contiguous()"),
    "autocast ignored": (SITE, "if torch.is_autocast_enabled(x.device.type):", "if False:"),
    "mixed dtypes": (SITE, "len({t.dtype for t in floats}) == 1", "True"),
    "channels not compared": (SITE, "        and x.shape[1] == weight.shape[1]\n", ""),
    "images below a patch": (SITE, "all(n >= p for n, p in", "all(True or n >= p for n, p in"),
    "ready patches gathered": (SITE, "if sides == patch and x.is_contiguous():", "if False:"),
    "parts of an unfolding not asked": (
        SITE, "if plain.bypassable(unfold, nn.Unfold) and plain.bypassable(linear, nn.Linear):",
        "if True:"),
    "a linear layer counted twice": (SITE, "absorbs=names[1:]", "absorbs=()"),
    "no numeric check": (SITE, "if not error <= _TOLERANCE:", "if False:"),
    "shapes not checked": (SITE, "if ours.shape != exact.shape or", "if"),
    "16-bit products measured where they are float32": (SITE, ".to(computes_in(weight))", ""),
    "hooks refused by nobody": (LAYERS, "return any(getattr(module, name) for name in _HOOKS)",
                                "return False"),
    "traced": (LAYERS, " or torch.jit.is_tracing()", ""),
    "subclasses of tensors": (LAYERS, "type(tensor) not in _TENSORS or ", ""),
    "functorch": (LAYERS, "torch._C._functorch.maybe_current_level() is None and ", ""),
    "forward mode": (LAYERS, " and forward_ad._current_level < 0", ""),
    "devices without a kernel": (LAYERS, "if dispatch.refuses(op, device) is not None:",
                                 "if False:"),
    "dropout": (AROUND, "if isinstance(child, nn.Dropout) and child.training and child.p > 0:",
                "if False:"),
    "positions of another size": (AROUND, " or layout.size not in (None, size)", ""),
    "pixels cast by nobody": (
        AROUND, "if pixels.dtype != dtype and not layout.casts and pixel_map is None:",
        "if False:"),
    "arguments ignored": (AROUND, " and _is_plain(known, args, kwargs)", ""),
    "autocast ignored around": (
        AROUND, "if torch.is_autocast_enabled(pixels.device.type):", "if False:"),
    "prefix always first": (AROUND, "prefix_last=layout.prefix_last", "prefix_last=False"),
    "norm with another epsilon": (AROUND, "norm_eps=layout.eps", "norm_eps=1e-6"),
    "ids not looked up": (
        AROUND, "None if layout.ids is None else getattr(module, layout.ids).reshape(-1, 1)",
        "None"),
    "sums of another dtype": (
        AROUND, "if any(t.dtype != dtype for t in (*weights, *table)):", "if False:"),
    "short tables": (AROUND, "elif len(rows) < tokens or", "elif"),
    "guesses not proved": (
        AROUND, "if not error <= _TOLERANCE * max(", "if False and not error <= _TOLERANCE * max("),
    "options of tables": (
        AROUND, "return options == (None, None, False, False)", "return True"),
    "hooks inside": (AROUND, "if plain.watched(child):", "if False:"),
    "studied by shapes alone": (AROUND, "repr(described), ", ""),
}  # fmt: skip
PROJECTORS, PROJECTOR_SITE = "vlmops.hf.projectors", "vlmops.hf.sites.mlp_projector"
PROJECTOR_MUTATIONS = {
    "unchanged": (PROJECTORS, "_SIDE = 12", "_SIDE = 12"),
    "parts not asked": (
        PROJECTORS, "if part is None or not plain.bypassable(part, kind) or ",
        "if part is None or "),
    "options not asked": (PROJECTORS, " or _options(part) != options:", ":"),
    "dropout": (
        PROJECTORS, "if isinstance(part, nn.Dropout) and part.training and part.p > 0:",
        "if False:"),
    "dropout by a number": (
        PROJECTORS, "return not module.training or all(", "return True or all("),
    "training not tried": (PROJECTORS, "if not torch.equal(trained, ", "if False and (trained, "),
    "autocast ignored": (
        PROJECTORS, "or torch.is_autocast_enabled(x.device.type)", "or False"),
    "mixed dtypes": (PROJECTORS, "or any(t.dtype != x.dtype for t in of_products)", ""),
    "another width": (PROJECTORS, "or x.shape[-1] != of_products[0].shape[1]", ""),
    "any activation": (PROJECTORS, "rtol=0, atol=1e-5", "rtol=0, atol=10"),
    "results not proved": (
        PROJECTORS, "if not error <= _TOLERANCE * max(",
        "if False and not error <= _TOLERANCE * max("),
    "features written to": (
        PROJECTORS, "if not torch.equal(given[0], untouched):", "if False:"),
    "norm with another epsilon": (PROJECTORS, "norm_eps=chain.eps", "norm_eps=1e-5"),
    "no second activation": (
        PROJECTORS, "out_activation=chain.out_activation", "out_activation=None"),
    "gate and layer swapped": (
        PROJECTORS, "(gate.weight, gate.bias)", "(fc1.weight, fc1.bias)"),
    "halves of weights exchanged": (
        PROJECTORS, "return halves[1 - chain.gated], halves[chain.gated]",
        "return halves[chain.gated], halves[1 - chain.gated]"),
    "halves that are added": (
        PROJECTORS, "if _is_product(c.given, act.returned, halves[1 - gated])",
        "if c.given.shape == act.returned.shape"),
    "halves of any dimension": (PROJECTORS, "if chunks != 2 or dim not in", "if False and dim in"),
    "layers not absorbed": (
        PROJECTORS, "linears = tuple(path for chain in layout.chains for path in chain.linears)",
        "linears = ()"),
    "layers of towers": (PROJECTORS, "and not _in_a_layer(model, path)", ""),
    "blocks of towers": (
        PROJECTORS, "return bool(others) and all(", "return False and all("),
    "heads": (PROJECTORS, "and not _is_head(linears, tables)", ""),
    "hooks inside": (PROJECTORS, "if plain.watched(part):", "if False:"),
    "no numeric check": (
        PROJECTOR_SITE, "if not error <= 2 * float(", "if False and not error <= 2 * float("),
    "shapes not checked": (PROJECTOR_SITE, "if ours.shape != exact.shape or", "if"),
    "weights of any dtype": (PROJECTOR_SITE, "if tensor.dtype not in plain.DTYPES or", "if"),
    "devices without a kernel": (
        PROJECTOR_SITE,
        'return dispatch.refuses("mlp_projector", found.linears[0].weight.device)',
        "return None"),
}  # fmt: skip
SHUFFLE_SITE = "vlmops.hf.sites.pixel_shuffle"
HD_SITE = "vlmops.hf.sites.hd_transform"
MOVERS, MERGERS = "vlmops.hf.shuffles", "vlmops.hf.mergers"
SHUFFLE_MUTATIONS = {
    "unchanged": (SHUFFLE_SITE, "if key not in _checked:", "if key not in _checked:"),
    "another scale": (
        SHUFFLE_SITE, "if type(known) is type(scale) and known == scale:", "if True:"),
    "a scale of another type": (SHUFFLE_SITE, "type(known) is type(scale) and ", ""),
    "numbers not looked at": (
        SHUFFLE_SITE, "if any(shuffles.number(module, name) != value", "if False and any(0"),
    "wrong calls": (SHUFFLE_SITE, "if len(args) > len(names) or given.keys() != set(names):",
                    "if False:"),
    "small tensors": (SHUFFLE_SITE, "if shuffles.is_small(x):", "if False:"),
    "no numeric check": (SHUFFLE_SITE, "or not torch.equal(got, expected):", "or False:"),
    "decorated": (SHUFFLE_SITE, "if function is not mover.function:", "if False:"),
    "functions of others": (
        SHUFFLE_SITE, 'if function.__globals__["__name__"] != home:', "if False:"),
    "changed methods": (SHUFFLE_SITE, "reason = changed(module, details.method)",
                        "reason = None"),
    "devices without a kernel": (
        SHUFFLE_SITE, 'return dispatch.refuses("pixel_shuffle", weight.device)', "return None"),
    "watched parts": (SHUFFLE_SITE, "reason = details.does.refuses(module)", "pass"),
    "signature": (
        SHUFFLE_SITE, "    replacement.__signature__ = inspect.signature(function)\n", ""),
    "pools of a projector": (SHUFFLE_SITE, "if not found and mergers", "if mergers"),
    "no square": (MOVERS, "if h * w != x.shape[1]:", "if False:"),
    "odd grids": (MOVERS, "if h % self.factor or w % self.factor:", "if False:"),
    "ranks": (MOVERS, "if x.dim() != (4 if self.takes_grid else 3) or x.numel() == 0:",
              "if x.numel() == 0:"),
    "no tokens": (MOVERS, " or x.numel() == 0:", ":"),
    "methods that write": (MOVERS, 'step.opname == "STORE_ATTR"', "False"),
    "any name": (MOVERS, "len(numbers) != len(names - _NAMES) or None in numbers.values()",
                 "False"),
    "squares alone": (
        MOVERS, "((2 * factor, 3 * factor), (3 * factor, factor))", "((factor, factor),) * 2"),
    "channels in any order": (MOVERS, "if torch.equal(y.double(), expected):", "if True:"),
    "orders that are refused": (
        MOVERS, 'return "it merges blocks of tokens in an order of its own"', "return None"),
    "defaults": (MOVERS, "or ([default] if _factor(default) else [])", ""),
    "classes of ours": (MOVERS, "() if is_ours(cls) else vars(cls).items()",
                        "vars(cls).items()"),
    "one row": (MERGERS, "if any(min(grid) < factor for grid in grids):", "if False:"),
    "tokens missing": (MERGERS, "sum(h * w for h, w in grids) != len(x) or ", ""),
    "no images": (MERGERS, " or x.numel() == 0:\n            return None\n        if any(min(",
                  ":\n            return None\n        if any(min("),
    "sizes that are no integers": (
        MERGERS, "all(type(n) is int for pair in pairs for n in pair)", "True"),
    "no product": (MERGERS, "getattr(module, self.linear)(merged)", "merged"),
    "what is not proved": (MERGERS, " and torch.equal(y, expected)", ""),
    "no comparison": (MERGERS, "or not torch.equal(got, expected):", "or False:"),
    "other sizes": (MERGERS, " or x.shape[1] != self.side**2 or", " or"),
    "autocast": (
        MERGERS, "len(norm.weight) or torch.is_autocast_enabled(x.device.type):",
        "len(norm.weight):"),
    "eps of a pooling": (MERGERS, "eps=self.eps,", "eps=1e-2,"),
    "offset of a pooling": (MERGERS, "norm_offset=self.offset,", ""),
    "pooling not compared": (MERGERS, "if error <= _TOLERANCE:", "if True:"),
    "norms that are watched": (
        MERGERS, "if weight is None or not plain.bypassable(norm, self.norm_class):",
        "if weight is None:"),
    "pools that are watched": (
        MERGERS, "not plain.bypassable(pool, nn.AvgPool2d) or not is_pool(pool, self.factor)",
        "False"),
    "pools of channels first": (MERGERS, "x.stride(1) != 1 or ", ""),
    "pools smaller than a block": (MERGERS, "min(x.shape[2:]) < self.factor or ", ""),
    "pools that have changed": (
        MERGERS, "if not is_pool(module, self.factor) or torch", "if torch"),
    "pools under autocast": (
        MERGERS, "factor) or torch.is_autocast_enabled(x.device.type):", "factor):"),
    "averages not compared": (MERGERS, "if not (got - exact).abs().max() <=",
                              "if False and not (got - exact).abs().max() <="),
    "sizes of averages not compared": (MERGERS, " or got.shape != exact.shape:", ":"),
    "pools of classes of their own": (
        MERGERS, "None if original_class(module) else plain.refusal(module, nn.AvgPool2d)",
        "None"),
    "the last pixels of a pool": (MERGERS, "// self.factor for side in", "// 2 for side in"),
    "products of any width": (
        MERGERS, "any(size * factor**2 == width for size in sizes)", "True"),
    "products of single tokens": (MERGERS, "width not in sizes and ", ""),
    "whatever interpolates": (MERGERS, "and y.shape[1] < side**2:", ":"),
    "blocks that are interpolated": (MERGERS, '"" if side % new == 0 else ', ""),
    "pools with a remainder": (MERGERS, "and not module.ceil_mode", ""),
    "padded pools": (MERGERS, "and module.padding in (0, (0, 0))", ""),
    "pools that overlap": (MERGERS, "and module.stride in (side, (side, side))", ""),
}  # fmt: skip
GRIDS = "vlmops.hf.grids"
ATTENTIONS, ATTENTION_SITE = "vlmops.hf.attentions", "vlmops.hf.sites.packed_attention"
ATTENTION_MUTATIONS = {
    "unchanged": (ATTENTIONS, "MAX_DIM = 256", "MAX_DIM = 256"),
    "every implementation": (ATTENTIONS, "if implementation not in SELECTED:", "if False:"),
    "an sdpa of somebody else": (
        ATTENTIONS, "known = theirs is default or theirs.__module__ == SDPA", "known = True"),
    "segments for another implementation": (
        ATTENTIONS, "if config is not None and config._attn_implementation in SELECTED:",
        "if config is not None:"),
    "varlen arguments for other functions": (ATTENTIONS, " if name not in _VARLEN}", "}"),
    "segments that see each other": (
        ATTENTIONS, "packed_attention(q, k, v, starts, max_seqlen=longest, scale=scale)[None]",
        "packed_attention(q[None], k[None], v[None], scale=scale)"),
    "scale ignored": (
        ATTENTIONS, "packed_attention(q, k, v, scale=scale, causal=causal)",
        "packed_attention(q, k, v, causal=causal)"),
    "causality ignored": (ATTENTIONS, "scale=scale, causal=causal)", "scale=scale)"),
    "eager code that is causal": (ATTENTIONS, "causal = bool(sdpa and ", "causal = bool("),
    "dropout ignored": (ATTENTIONS, 'kwargs.get("dropout") or ', ""),
    "other maths ignored": (
        ATTENTIONS, "any(kwargs.get(name) is not None for name in OTHER_MATHS)", "False"),
    "masks ignored": (ATTENTIONS, "        and (attention_mask is None or carried)\n", ""),
    "heads of any width": (ATTENTIONS, "dim % 8 or not 0 < dim <= MAX_DIM or ", ""),
    "values of any dtype": (ATTENTIONS, "== key.dtype == value.dtype", "== key.dtype"),
    "autocast ignored": (
        ATTENTIONS, "return query.to(dtype), key.to(dtype), value.to(dtype)",
        "return query, key, value"),
    "keys of any shape": (ATTENTIONS, " or dim != key.shape[-1]:", ":"),
    "float64": (ATTENTIONS, 'return plain.runs("packed_attention", (query, key, value))',
                "return True"),
    "weights that are asked for": (ATTENTIONS, 'if kwargs.get("output_attentions"):', "if False:"),
    "weights that are watched": (
        ATTENTIONS, "any(_looks_at_weights(hook) for hook in module._forward_hooks.values())",
        "False"),
    "weights that transformers collects": (
        ATTENTIONS, "any(\"hidden_states\" not in name for name in collected)", "False"),
    "hooks that collect nothing": (
        ATTENTIONS, "return collected is not None and any(", "return True or any("),
    "masks of images for weights": (
        ATTENTIONS, "attention_mask = mask(lengths, query.transpose(1, 2).flatten(2))",
        "attention_mask = None"),
    "masks of padding for weights": (
        ATTENTIONS, "attention_mask = padding_mask(attention_mask, query.dtype)",
        "attention_mask = None"),
    "images of one length": (
        ATTENTIONS, "torch.tensor([0, *lengths]", "torch.tensor([0, sum(lengths)]"),
    "padding behind the patches": (ATTENTIONS, "[:, :, None] | behind", "[:, :, None] | ~behind"),
    "tiles that are used": (ATTENTIONS, "(aspect_ratio_mask == 0)[", "(aspect_ratio_mask != 0)["),
    "towers without padding": (ATTENTIONS, "if num_patches >= target_length or unusual:",
                               "if unusual:"),
    "pictures without a tile": (ATTENTIONS, " & used.any(1).all())", ")"),
    "masks that are no masks": (ATTENTIONS, "bool((used == tiles).all() & ", "bool("),
    "pictures without a tile, unread": (ATTENTIONS, "nothing = padding.all(1)",
                                        "nothing = padding.all(1) & False"),
    "decoders": (
        ATTENTION_SITE, 'if "past_key_values" in parameters and hasattr(module, "is_causal"):',
        "if False:"),
    "prompts of decoders": (
        ATTENTIONS, '        and not (kind == "decode" and query.shape[2] != 1)\n', ""),
    "what is slower in training": (
        ATTENTIONS, 'kind == "inference" and _is_differentiated(query, key, value)', "False"),
    "no numeric check of a step": (
        ATTENTION_SITE, 'return None if off <= _TOLERANCE else f"the numeric check failed: {name} '
        'differs', 'return None and f"{name} differs'),
    "cross attention": (ATTENTION_SITE, "if _OTHERS & set(parameters):", "if False:"),
    "wide heads": (ATTENTION_SITE, "if studied.dim % 8 or studied.dim > attentions.MAX_DIM:",
                   "if False:"),
    "replaced masks": (ATTENTION_SITE, "if home != _forward(mask.tower).__module__:", "if False:"),
    "replaced layers": (
        ATTENTION_SITE, 'if op not in getattr(type(module), OPS, ()) or', "if"),
    "weights in float64": (ATTENTION_SITE, "if dtype == torch.float64:", "if False:"),
    "implementations that are left alone": (
        ATTENTION_SITE, "if selected not in attentions.SELECTED:", "if False:"),
    "no numeric check": (ATTENTION_SITE, "if not off <= _TOLERANCE:", "if False:"),
    "what is slower": (ATTENTION_SITE, "if share < _CLEARLY:", "if True:"),
    "what is small": (
        ATTENTION_SITE, "if queries * keys * heads.heads * heads.dim < _SMALL:", "if False:"),
    "measured again": (ATTENTION_SITE, "if key not in _measured:", "if True:"),
    "patched beside nothing": (
        ATTENTION_SITE, 'frozenset({"mrope", "patch_embed"})', "frozenset()"),
    "grids of other values": (GRIDS, "theirs, values, grid.dtype", "theirs, grid.dtype"),
    "other arguments": (GRIDS, "grid.dtype, plain, tuple(more)", "grid.dtype, tuple(more)"),
    "other helpers": (GRIDS, "key = theirs, values", "key = values"),
    "precomputed made again": (GRIDS, "any(name in kwargs for name in _PRECOMPUTED)", "False"),
    "grids that change": (GRIDS, " or known[1] != version:", ":"),
    "grids read for each helper": (GRIDS, "        _last.grid = known\n", ""),
    "results of inference": (GRIDS, "torch.inference_mode(False), ", ""),
    "all results are kept": (GRIDS, "while len(_results) > _KEPT:", "while False:"),
    "results made again": (GRIDS, "        if result is None:\n", "        if True:\n"),
    "the longest of images": (ATTENTIONS, "know_longest(starts, max(lengths))", "pass"),
    "another longest": (GRIDS, "(result[1:] - result[:-1]).max()", "(result[1:]).max()"),
}  # fmt: skip
KEPT, MEDIA, SEEN = "vlmops.hf.kept", "vlmops.hf.media", "vlmops.hf.seen"
CROSS_SITE = "vlmops.hf.sites.gated_cross_attention"
CROSS_MUTATIONS = {
    "unchanged": (KEPT, "import weakref", "import weakref"),
    "tokens that were written to": (KEPT, "return *places, *versions, autocast",
                                    "return *places, autocast"),
    "another dtype of autocast": (KEPT, "return *places, *versions, autocast",
                                  "return *places, *versions"),
    "the step before of another generation": (
        KEPT, "_kept.get(self) if continues else None", "_kept.get(self)"),
    "what is differentiated": (KEPT, "if torch.is_grad_enabled() and any(", "if False and any("),
    "what somebody watches": (KEPT, "return not plain.watched(module) and ", "return "),
    "whatever was kept": (KEPT, "if kept is not None and kept.given == given:",
                          "if kept is not None:"),
    "kept for ever": (KEPT, "            del _kept[alive]\n", "            pass\n"),
    "nothing is kept": (MEDIA, 'step_of(given.get("past_key_values"))', "step_of(None)"),
    "the mask is expanded": (MEDIA, "if type(mask) is Tensor and mask.dim() == 3:", "if False:"),
    "decoders are not compared": (MEDIA, "(seen.tensor() == mask).all()", "True"),
    "tokens that see all images": (SEEN, "self._mask.images.any(-1)", "self._mask.images.all(-1)"),
    "images of one token": (
        SEEN, "mask.repeat_interleave(self.tokens_per_image, -1)",
        "mask.repeat(1, 1, self.tokens_per_image)"),
    "weights of images": (ATTENTIONS, "            attention_mask = attention_mask.tensor()\n",
                          "            attention_mask = None\n"),
    "weights of tiles": (
        ATTENTIONS, "tiles_mask(attention_mask, key.shape[2], query.dtype)", "None"),
    "hooks see nothing of the text": (
        ATTENTIONS, '        and not (kind == "media" and plain.watched(module))\n', ""),
    "tokens without a tile": (ATTENTIONS, "return seen | ~some, some", "return seen, some"),
    "scale of other models": (
        ATTENTIONS, "gated_cross_attention(q, k, v, seen, size, scale=scale)",
        "gated_cross_attention(q, k, v, seen, size, scale=1.0)"),
    "all projections are kept": (CROSS_SITE, "if any(x is visual for x in inputs)", "if True"),
    "projections that are hooked": (
        CROSS_SITE, "and plain.refusal(getattr(module, name), nn.Linear) is None", "and True"),
    "norms in two steps": (CROSS_SITE, "norms.defers(child):", "False:"),
    "norms of other widths": ("vlmops.hf.norms", "x.dim() != 4 or ", ""),
    "norms of other dtypes": ("vlmops.hf.norms", "x.dtype != weight.dtype or ", ""),
}  # fmt: skip
GATES, GATE_SITE = "vlmops.hf.gates", "vlmops.hf.sites.gated_residual"
GATE_MUTATIONS = {
    "unchanged": (GATES, "class Gate(", "class Gate("),
    "masks of rows the other way round": (
        GATES, "return ~mask if self.stopped else mask != 0", "return mask != 0"),
    "masks of any shape": (GATES, "if self.mask.shape != (*like.shape[:-1], 1):", "if False:"),
    "gates without tanh": (GATES, "if self.squashed and isinstance(branch, Tensor):",
                           "if isinstance(branch, Tensor):"),
    "tanh of tanh": (GATES, "isinstance(gate, Gate) and not gate.squashed",
                     "isinstance(gate, Gate)"),
    "any dtype": (GATES, " or not x.dtype == y.dtype == gate.dtype:", ":"),
    "rows that are not stopped": (GATES, "    if gated.stopped is not None:\n", "    if False:\n"),
    "filled with anything": (GATES, "mask.stopped and value == 0.0", "mask.stopped"),
    "masks that are none": (
        GATE_SITE, "not bool(((value == 0) | (value == 1)).all())", "False"),
    "small tensors": (GATE_SITE, " or x.numel() < SMALL:", ":"),
    "not compared": (GATE_SITE, "return None if off <= _TOLERANCE else f", "return None and f"),
    "calls not counted": (GATE_SITE, "if ran.calls != len(names):", "if False:"),
    "replaced forwards": (GATE_SITE, "next((r for r in reasons if r is not None), None)", "None"),
    "compiled as it is": (GATE_SITE, "torch.compiler.is_compiling() or ", ""),
}  # fmt: skip
HD_MUTATIONS = {
    "unchanged": (HD_SITE, "_SECONDS = 0.5", "_SECONDS = 0.5"),
    "another activation": (HD_SITE, 'activation="gelu"', 'activation="gelu_tanh"'),
    "layers that are watched": (HD_SITE, "return plain.bypassable(layer, nn.Linear)",
                                "return True"),
    "mixed dtypes": (HD_SITE, "and all(t.dtype == x.dtype for t in tensors)", ""),
    "layers not absorbed": (HD_SITE, "absorbs = parts.first, parts.second", "absorbs = ()"),
    "layers exchanged": (
        HD_SITE, "weights = first.weight, first.bias, second.weight, second.bias",
        "weights = first.weight, second.bias, second.weight, first.bias"),
}  # fmt: skip
BLOCK_SITE = "vlmops.hf.sites.add_norm"
BLOCK_MUTATIONS = {
    "unchanged": (BLOCK_SITE, "_DROPS =", "_DROPS ="),
    "not compared with its layers": (
        BLOCK_SITE, "block if same else None", "block"),
    "other names": (
        BLOCK_SITE, "if not set(forward.__code__.co_names) <=", "if False and set() <="),
    "more arguments": (BLOCK_SITE, " or len(inspect.signature(forward).parameters) != 3", ""),
    "dropout in training": (BLOCK_SITE, " or (dropout.training and dropout.p > 0)", ""),
    "hooks on dropout": (BLOCK_SITE, "plain.watched(dropout) or ", ""),
    "hooks on all modules": (
        BLOCK_SITE, "if torch.nn.modules.module._has_any_global_hook():", "if False:"),
    "autocast": (BLOCK_SITE, " or torch.is_autocast_enabled(device)", ""),
    "norms that somebody replaced": (
        BLOCK_SITE, "return plain.bypassable(getattr(module, block.norm), nn.LayerNorm)",
        "return True"),
    "small tensors": (BLOCK_SITE, "SMALL_RECORDED if torch.is_grad_enabled() else SMALL", "0"),
    "small tensors that are recorded": (
        BLOCK_SITE, "SMALL_RECORDED if torch.is_grad_enabled() else SMALL", "SMALL"),
    "compiled as it is": (BLOCK_SITE, "torch.compiler.is_compiling() or ", ""),
    "any shape": (BLOCK_SITE, " or h.shape != residual.shape", ""),
    "any device": (BLOCK_SITE, 'device not in ("cpu", "cuda") or ', ""),
    "eps of torch's": (BLOCK_SITE, ", eps=norm.eps)", ")"),
    "without a bias": (BLOCK_SITE, "norm.weight, norm.bias, eps", "norm.weight, None, eps"),
    "the linear layer twice": (
        BLOCK_SITE, "return norm(h + residual)\n\n        forward",
        "return inner(self, *args, **kwargs)\n\n        forward"),
    "hooked norms": (BLOCK_SITE, "or next(filter(None, reasons), None)", ""),
    "not checked": (BLOCK_SITE, "difference(type(module).__name__, (ours,), (own,))", "None"),
}  # fmt: skip
FOLLOWER, FOLLOWED = "vlmops.hf.eager_attention", "vlmops.hf.eager_modules"
FOLLOWER_MUTATIONS = {
    "unchanged": (FOLLOWER, "SMALL = 1 << 20", "SMALL = 1 << 20"),
    "scales are forgotten": (FOLLOWER, "return x.changed(compute, factor())",
                             "return x.changed(compute)"),
    "divided is multiplied": (FOLLOWER, "lambda: 1.0 / by", "lambda: float(by)"),
    "masks are forgotten": (FOLLOWER, "mask = self.mask if mask is None else mask", "mask = None"),
    "two masks": (FOLLOWER, "if scores.mask is not None or not mask.is_floating_point()",
                  "if not mask.is_floating_point()"),
    "masks that learn": (FOLLOWER, " or mask.requires_grad:", ":"),
    "softmax of another dtype": (FOLLOWER, " and dtype is None", ""),
    "dropout in training": (FOLLOWER, "and (p == 0.0 or not training)", ""),
    "steps that somebody saw": (
        FOLLOWER, "return isinstance(value, kind) and value._value is None",
        "return isinstance(value, kind)"),
    "hooks on children": (
        FOLLOWER, "return not any(plain.watched(child) for child in module.children())",
        "return True"),
    "masks that are looked at once for ever": (
        FOLLOWER, "key = mask._version, rows, lengths", "key = rows, lengths"),
    "rows that see nothing": (FOLLOWER, "elif not bool(seen.any(2).all()):", "elif False:"),
    "masks of each head": (FOLLOWER, "    if mask.shape[1] != 1:\n", "    if False:\n"),
    "masks that say more": (
        FOLLOWER, "if not bool((seen | (mask <= torch.finfo(mask.dtype).min)).all()):",
        "if False:"),
    "not compared": (FOLLOWED, "return None if off <= _TOLERANCE else", "return None if True else"),
    "replaced forwards": (
        FOLLOWED, "        if reason is not None:\n            return reason\n    tensors",
        "        if False:\n            return reason\n    tensors"),
    "doubles": (FOLLOWED, "if doubles else None", "if False else None"),
}  # fmt: skip
JOIN_SITE = "vlmops.hf.sites.perceiver_attention"
JOIN_MUTATIONS = {
    "unchanged": (JOIN_SITE, "OP =", "OP ="),
    "hidden latents": (FOLLOWER, "        if not bool(others.all()):\n", "        if False:\n"),
    "layers that are adapted": (JOIN_SITE, "or _layers(modules)", ""),
    "causal": (JOIN_SITE, "        and not causal\n", ""),
    "booleans are added": (
        JOIN_SITE, "        and (sdpa or not booleans)  # eager code adds them\n", ""),
    "dropout in training": (JOIN_SITE, '        and not kwargs.get("dropout")\n', ""),
    "other maths": (
        JOIN_SITE, "any(kwargs.get(name) is not None for name in OTHER_MATHS)", "False"),
    "scales of others": (JOIN_SITE, 'scale = kwargs.get("scaling")', "scale = None"),
    "functions of others": (JOIN_SITE, "implementation in SELECTED and (", "("),
    "not compared": (
        JOIN_SITE, "        if reason is not None:\n            return reason\n        calls",
        "        if False:\n            return reason\n        calls"),
}  # fmt: skip
SITES = {
    "add_norm": BLOCK_MUTATIONS,
    "eager_attention": FOLLOWER_MUTATIONS,
    "perceiver_attention": JOIN_MUTATIONS,
    "gated_cross_attention": CROSS_MUTATIONS,
    "gated_residual": GATE_MUTATIONS,
    "hd_transform": HD_MUTATIONS,
    "packed_attention": ATTENTION_MUTATIONS,
    "patch_embed": SITE_MUTATIONS,
    "pixel_shuffle": SHUFFLE_MUTATIONS,
    "mlp_projector": PROJECTOR_MUTATIONS,
}


def build(source, build_dir):
    configure = ["cmake", "-S", source, "-B", build_dir, "-G", "Ninja",
                 f"-DPython3_EXECUTABLE={sys.executable}"]  # fmt: skip
    for command in (configure, ["cmake", "--build", build_dir]):
        subprocess.run(command, check=True, capture_output=True)
    return build_dir / "libvlmops.so"


TESTS = [str(ROOT / "python_tests/test_contract.py"), str(ROOT / "python_tests/ops")]


def first_failure(start, tests, *options, **environment):
    """The first test that fails, or None."""
    run = subprocess.run(
        [sys.executable, *start, "-x", "-q", "--no-header", *options, *tests],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode == 0:
        return None
    failed = [line for line in run.stdout.splitlines() if line.startswith("FAILED")]
    return failed[0].removeprefix("FAILED ").split(" - ")[0] if failed else "the suite crashed"


def mutated(path, name, old, new):
    text = path.read_text()
    if old not in text:
        sys.exit(f"{name}: {path.name} no longer contains {old!r}; mend the mutations")
    return text.replace(old, new)


def report(name, failure, seconds):
    """Prints what came of a mutation; returns whether that was to be."""
    expected = (failure is None) == (name.endswith("unchanged"))
    verdict = f"red: {failure}" if failure else "green"
    print(f"{'ok ' if expected else 'BAD'} {name}: {verdict} ({seconds:.0f} s)", flush=True)
    return expected


def broken_sources(mutations):
    """Yields the name of each mutation, and the scratch copy that has it."""
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "source"
        shutil.copytree(ROOT / "csrc", source / "csrc")
        shutil.copy(ROOT / "CMakeLists.txt", source)
        for name, (file, old, new) in mutations.items():
            path = source / "csrc" / file
            path.write_text(mutated(path, name, old, new))
            yield name, source
            # Its time is new, so that the next build makes again what includes it, and no more.
            shutil.copyfile(ROOT / "csrc" / file, path)


def of_op(op, file):
    """Which tests are run for a mutation of a file: those of its op."""
    folder = file.split("/")
    op = op or (folder[1] if folder[0] == "ops" else None)
    if op is None and folder[-1].startswith("attention"):
        op = "attention"  # every op on the core has it in its name
    return "" if op is None else f" and {op}"


def cuda(op=None):
    """Names of the mutations of the CUDA kernels that the emulator did not notice."""
    unnoticed = []
    for name, source in broken_sources(CUDA_MUTATIONS):
        start = time.monotonic()
        environment = {"VLMOPS_TEST_SOURCES": str(source / "csrc")}
        if CUDA_MUTATIONS[name][0].endswith(".cpp"):  # what only GPUs are given
            environment["VLMOPS_LIBRARY"] = str(build(source, source.parent / "build"))
        failure = first_failure(
            ["-m", "pytest"],
            TESTS,
            "-k",
            "emulator" + of_op(op, CUDA_MUTATIONS[name][0]),
            **environment,
        )
        if not report(f"cuda: {name}", failure, time.monotonic() - start):
            unnoticed.append(name)
    return unnoticed


def compiled(op=None):
    """Names of the mutations of csrc/ that went unnoticed, by the tests of an op or by all."""
    unnoticed = []
    for name, source in broken_sources(MUTATIONS):
        start = time.monotonic()
        library = build(source, source.parent / "build")
        failure = first_failure(
            ["-m", "pytest"],
            TESTS,
            "-k",
            "not triton and not emulator" + of_op(op, MUTATIONS[name][0]),
            VLMOPS_LIBRARY=str(library),
        )
        if not report(name, failure, time.monotonic() - start):
            unnoticed.append(name)
    return unnoticed


def triton(op=None):
    """Names of the mutations of the Triton kernels that went unnoticed."""
    unnoticed = []
    with tempfile.TemporaryDirectory() as scratch:
        for of_op in [known for known in TRITON_MUTATIONS if op in (None, known)]:
            copy = Path(scratch) / f"{of_op}_triton.py"
            for name, (old, new) in TRITON_MUTATIONS[of_op].items():
                copy.write_text(mutated(ROOT / f"vlmops/ops/{of_op}_triton.py", name, old, new))
                start = time.monotonic()
                failure = first_failure(
                    ["-c", RUN_WITH, f"vlmops.ops.{of_op}_triton", str(copy)],
                    TESTS[::-1],
                    "-k",
                    f"{of_op} and triton and not opcheck",
                    TRITON_INTERPRET="1",
                )
                if not report(f"triton: {of_op}: {name}", failure, time.monotonic() - start):
                    unnoticed.append(name)
    return unnoticed


def sites(op=None):
    """Names of the mutations of what patches models that went unnoticed."""
    unnoticed = []
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "mutated.py"
        for of_op, mutations in SITES.items():
            if op not in (None, of_op):
                continue
            tests = sorted(map(str, (ROOT / "python_tests/hf").glob(f"test_{of_op}*.py")))
            for name, (module, old, new) in mutations.items():
                copy.write_text(mutated(ROOT / f"{module.replace('.', '/')}.py", name, old, new))
                start = time.monotonic()
                failure = first_failure(["-c", RUN_WITH, module, str(copy)], tests)
                if not report(f"site: {of_op}: {name}", failure, time.monotonic() - start):
                    unnoticed.append(name)
    return unnoticed


def is_of(op, file):
    """Whether an op's own files include this one, or it is one of them."""
    own = f"ops/{op}/"
    on_core = "attention" in op and file.split("/")[-1].startswith("attention")
    return (
        own in file
        or on_core
        or any(f'"{file}"' in path.read_text() for path in (ROOT / "csrc" / own).glob("*"))
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=["compiled", "cuda", "triton", "sites"])
    parser.add_argument("--op", help="mutations of what this op's files have")
    parser.add_argument("--named", default="", help="mutations whose name has this in it")
    args = parser.parse_args()
    if args.op is not None:
        for table in (MUTATIONS, CUDA_MUTATIONS):
            for name in [n for n, (file, *_) in table.items() if not is_of(args.op, file)]:
                del table[name]
    tables = MUTATIONS, CUDA_MUTATIONS, *TRITON_MUTATIONS.values(), *SITES.values()
    for table in tables:
        for name in [n for n in table if args.named not in n]:
            del table[name]
    runs = {"compiled": compiled, "cuda": cuda, "triton": triton, "sites": sites}
    unnoticed = [
        name for kind, run in runs.items() if args.only in (None, kind) for name in run(args.op)
    ]
    print(f"{len(unnoticed)} mutations with an unexpected result")
    return 1 if unnoticed else 0


if __name__ == "__main__":
    sys.exit(main())
