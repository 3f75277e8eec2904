// What surrounds the products of one decoding step: token vectors, attention of the new token, and the best token.
//
// Equation: q, k turned by the token's position; o = softmax(scale q k^T) v over the tokens so far; u_next += A_next y
// Shapes:   qkv [m, (heads + 2 kv) d], out [m, heads d] bf16; keys, values [m, capacity, kv, d] bf16; cos, sin [positions, half]
//           f32; the new token's place in the cache and the first place that is no padding by row; head d 64 or 128
// Source:   online softmax arXiv 1805.02867, warps over runs of keys merged as in Flash-Decoding
// Cost:     one pass over keys and values for every block of G query heads
#include "step.cuh"

constexpr int WARPS = 8, THREADS = 32 * WARPS;

/// Eight bf16 from eight f32 in shared memory.
__device__ __forceinline__ uint4 packed(const float *p) {
    float v[8];
#pragma unroll
    for (int i = 0; i < 8; i++) {
        v[i] = p[i];
    }
    return pack(v);
}

/// G query heads of one kv head for one row; blocks (kv heads, rows, runs of G heads of a group).
template <int D, int G>
__device__ __forceinline__ void attend(const bf16 *qkv, int stride, int heads, int kv_heads, bf16 *keys, bf16 *values,
                                       int capacity, const unsigned *places, const unsigned *firsts, const float *cos,
                                       const float *sin, int half, float scale, int window, bf16 *out, int out_stride,
                                       const float *a_next, float *u_next, int next) {
    // Lanes of a key, keys of a warp at once, keys of a thread in flight.
    constexpr int LANES = D / 8, KEYS = 32 / LANES, FLIGHT = G > 4 ? 2 : 4;
    __shared__ float q_s[G * D], k_s[D], v_s[D], tops[WARPS][G], totals[WARPS][G], parts[WARPS][G * D];
    const int kv = blockIdx.x, row = blockIdx.y, group = heads / kv_heads, from = blockIdx.z * G;
    const int count = min(G, group - from), head = kv * group + from;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, sub = lane / LANES, dim = lane % LANES * 8;
    const int row_step = kv_heads * D;
    const size_t base = static_cast<size_t>(row) * capacity * row_step + kv * D;
    // None of these is written by the kernels of this step before the last one.
    const int place = places[row], first = firsts[row], position = place - first;
    const int begin = window > 0 ? max(first, place - window + 1) : first;
    for (int p = begin + threadIdx.x; p < min(place, begin + 4 * THREADS); p += THREADS) {
        prefetch(keys + base + static_cast<size_t>(p) * row_step);
        prefetch(values + base + static_cast<size_t>(p) * row_step);
    }
    const int line = 32;
    for (int i = threadIdx.x; i < next * (count * D / line); i += THREADS) {
        const int j = i / (count * D / line), c = i % (count * D / line) * line;
        prefetch(a_next + static_cast<size_t>(j) * heads * D + head * D + c);
    }
    let_next_start();
    wait_for_results();

    const bf16 *const in = at_row(qkv, stride, row);
    const auto fresh = [&](const bf16 *p) {
        return __uint_as_float(static_cast<unsigned>(__ldcg(reinterpret_cast<const unsigned short *>(p))) << 16);
    };
    for (int i = threadIdx.x; i < (G + 1) * D; i += THREADS) {
        const int h = i / D, c = i % D;
        if (h < G && h >= count) {
            q_s[i] = 0.f;
            continue;
        }
        const bf16 *const x = in + (h < G ? head + h : heads + kv) * D;
        float y = fresh(x + c);
        if (c < 2 * half) {
            const bool low = c < half;
            const int angle = position * half + (low ? c : c - half);
            const float turn = __ldg(sin + angle);
            y = fmaf(y, __ldg(cos + angle), fresh(low ? x + c + half : x + c - half) * (low ? -turn : turn));
        }
        // As the rotation of whole sequences leaves it in memory.
        y = __bfloat162float(__float2bfloat16_rn(y));
        if (h < G) {
            q_s[i] = y * scale * 1.44269504f;
        } else {
            k_s[c] = y;
            v_s[c] = fresh(in + (heads + kv_heads + kv) * D + c);
        }
    }
    __syncthreads();
    if (blockIdx.z == 0 && threadIdx.x < 2 * LANES) {
        const int c = threadIdx.x % LANES * 8;
        const bool is_key = threadIdx.x < LANES;
        bf16 *const to = (is_key ? keys : values) + base + static_cast<size_t>(place) * row_step + c;
        *reinterpret_cast<uint4 *>(to) = packed((is_key ? k_s : v_s) + c);
    }

    float q[G][8], sums[G][8] = {}, top[G], total[G];
#pragma unroll
    for (int h = 0; h < G; h++) {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            q[h][i] = q_s[h * D + dim + i];
        }
        top[h] = -1e30f;
        total[h] = 0.f;
    }
    for (int start = begin; start <= place; start += WARPS * KEYS * FLIGHT) {
        uint4 k[FLIGHT], v[FLIGHT];
        bool live[FLIGHT];
#pragma unroll
        for (int f = 0; f < FLIGHT; f++) {
            const int p = start + (f * WARPS + warp) * KEYS + sub;
            live[f] = p <= place;
            k[f] = v[f] = make_uint4(0, 0, 0, 0);
            if (p < place) {
                const size_t at = base + static_cast<size_t>(p) * row_step + dim;
                k[f] = load_fresh(keys + at);
                v[f] = load_fresh(values + at);
            } else if (p == place) {
                k[f] = packed(k_s + dim);
                v[f] = packed(v_s + dim);
            }
        }
        float scores[FLIGHT][G];
#pragma unroll
        for (int f = 0; f < FLIGHT; f++) {
            float key[8];
            unpack(k[f], key);
#pragma unroll
            for (int h = 0; h < G; h++) {
                float s = 0.f;
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    s = fmaf(q[h][i], key[i], s);
                }
#pragma unroll
                for (int o = LANES / 2; o > 0; o >>= 1) {
                    s += __shfl_xor_sync(0xffffffffu, s, o);
                }
                scores[f][h] = live[f] ? s : -1e30f;
            }
        }
#pragma unroll
        for (int h = 0; h < G; h++) {
            float highest = top[h];
#pragma unroll
            for (int f = 0; f < FLIGHT; f++) {
                highest = fmaxf(highest, scores[f][h]);
            }
            const float shrink = exp2f(top[h] - highest);
            top[h] = highest;
            total[h] *= shrink;
#pragma unroll
            for (int i = 0; i < 8; i++) {
                sums[h][i] *= shrink;
            }
        }
#pragma unroll
        for (int f = 0; f < FLIGHT; f++) {
            float value[8];
            unpack(v[f], value);
#pragma unroll
            for (int h = 0; h < G; h++) {
                const float weight = live[f] ? exp2f(scores[f][h] - top[h]) : 0.f;
                total[h] += weight;
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    sums[h][i] = fmaf(weight, value[i], sums[h][i]);
                }
            }
        }
    }
#pragma unroll
    for (int h = 0; h < G; h++) {
#pragma unroll
        for (int o = LANES; o < 32; o *= 2) {
            const float other = __shfl_xor_sync(0xffffffffu, top[h], o), highest = fmaxf(top[h], other);
            const float mine = exp2f(top[h] - highest), theirs = exp2f(other - highest);
            total[h] = total[h] * mine + __shfl_xor_sync(0xffffffffu, total[h], o) * theirs;
#pragma unroll
            for (int i = 0; i < 8; i++) {
                sums[h][i] = sums[h][i] * mine + __shfl_xor_sync(0xffffffffu, sums[h][i], o) * theirs;
            }
            top[h] = highest;
        }
        if (sub == 0) {
#pragma unroll
            for (int i = 0; i < 8; i++) {
                parts[warp][h * D + dim + i] = sums[h][i];
            }
        }
        if (lane == 0) {
            tops[warp][h] = top[h];
            totals[warp][h] = total[h];
        }
    }
    __syncthreads();
    bf16 *const to = at_row(out, out_stride, row) + head * D;
    for (int i = threadIdx.x; i < count * D; i += THREADS) {
        const int h = i / D;
        float highest = tops[0][h];
#pragma unroll
        for (int w = 1; w < WARPS; w++) {
            highest = fmaxf(highest, tops[w][h]);
        }
        float sum = 0.f, all = 0.f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            const float weight = exp2f(tops[w][h] - highest);
            sum = fmaf(weight, parts[w][i], sum);
            all = fmaf(weight, totals[w][h], all);
        }
        const bf16 rounded = __float2bfloat16_rn(sum / all);
        to[i] = rounded;
        // The queries are no longer needed.
        q_s[i] = __bfloat162float(rounded);
    }
    __syncthreads();
    for (int j = warp; j < next; j += WARPS) {
        const float *const a = a_next + static_cast<size_t>(j) * heads * D + head * D;
        float sum = 0.f;
        for (int i = lane; i < count * D; i += 32) {
            sum = fmaf(__ldg(a + i), q_s[i], sum);
        }
        sum = sum_warp(sum);
        if (lane == 0) {
            atomicAdd(u_next + row * next + j, sum);
        }
    }
}

#define ATTEND_KERNEL(name, d, g)                                                                                          \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) name(                                                         \
        const bf16 *qkv, int stride, int heads, int kv_heads, bf16 *keys, bf16 *values, int capacity,                      \
        const unsigned *places, const unsigned *firsts, const float *cos, const float *sin, int half, float scale,         \
        int window, bf16 *out, int out_stride, const float *a_next, float *u_next, int next) {                             \
        attend<d, g>(qkv, stride, heads, kv_heads, keys, values, capacity, places, firsts, cos, sin, half, scale, window,  \
                     out, out_stride, a_next, u_next, next);                                                               \
    }

ATTEND_KERNEL(attend_64_1, 64, 1)
ATTEND_KERNEL(attend_64_2, 64, 2)
ATTEND_KERNEL(attend_64_4, 64, 4)
ATTEND_KERNEL(attend_64_8, 64, 8)
ATTEND_KERNEL(attend_128_1, 128, 1)
ATTEND_KERNEL(attend_128_2, 128, 2)
ATTEND_KERNEL(attend_128_4, 128, 4)
ATTEND_KERNEL(attend_128_8, 128, 8)

/// x [row] <- table [ids[row]], and its part of u_next; blocks of 128 columns and one row, 128 threads.
extern "C" __global__ void __launch_bounds__(128) attend_embed(const unsigned *ids, const bf16 *table, int vocab, bf16 *x, int h,
                                                               const float *a_next, float *u_next, int next) {
    __shared__ float values[128];
    const int row = blockIdx.y, base = blockIdx.x * 128, column = base + threadIdx.x, width = min(128, h - base);
    let_next_start();
    wait_for_results();
    // An id that stands for an error is anything: its scores are not used.
    const unsigned id = min(ids[row], static_cast<unsigned>(vocab - 1));
    if (column < h) {
        const bf16 value = table[static_cast<size_t>(id) * h + column];
        x[static_cast<size_t>(row) * h + column] = value;
        values[threadIdx.x] = __bfloat162float(value);
    }
    __syncthreads();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int j = warp; j < next; j += 4) {
        float sum = 0.f;
        for (int i = lane; i < width; i += 32) {
            sum = fmaf(__ldg(a_next + static_cast<size_t>(j) * h + base + i), values[i], sum);
        }
        sum = sum_warp(sum);
        if (lane == 0) {
            atomicAdd(u_next + row * next + j, sum);
        }
    }
}

/// ids[row] <- the first of the largest scores, or all ones if one is no number or infinite, or all are minus infinity; the row's
/// next token goes one place further. One block of 1024 threads a row; vocab is a multiple of 8.
extern "C" __global__ void __launch_bounds__(1024) attend_best(const bf16 *scores, int vocab, unsigned *ids, unsigned *places) {
    __shared__ float tops[32];
    __shared__ int bests[32];
    const int row = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    wait_for_results();
    const bf16 *const at = at_row(scores, vocab, row);
    float top = -INFINITY;
    int best = 0x7fffffff;
    bool wrong = false;
#pragma unroll 4
    for (int i = threadIdx.x * 8; i < vocab; i += 8192) {
        float v[8];
        unpack(load_fresh(at + i), v);
#pragma unroll
        for (int k = 0; k < 8; k++) {
            // All exponent bits set, and not minus infinity; told by bits, since fast arithmetic knows no such values.
            const unsigned raw = __float_as_uint(v[k]);
            wrong |= (raw & 0x7f800000u) == 0x7f800000u && raw != 0xff800000u;
            if (v[k] > top || best == 0x7fffffff) {
                top = v[k];
                best = i + k;
            }
        }
    }
    const auto take = [&](float other, int index) {
        if (other > top || (other == top && index < best)) {
            top = other;
            best = index;
        }
    };
#pragma unroll
    for (int o = 16; o > 0; o >>= 1) {
        const float other = __shfl_xor_sync(0xffffffffu, top, o);
        take(other, __shfl_xor_sync(0xffffffffu, best, o));
    }
    if (lane == 0) {
        tops[warp] = top;
        bests[warp] = best;
    }
    wrong = __syncthreads_or(wrong);
    if (warp == 0) {
        top = tops[lane];
        best = bests[lane];
#pragma unroll
        for (int o = 16; o > 0; o >>= 1) {
            const float other = __shfl_xor_sync(0xffffffffu, top, o);
            take(other, __shfl_xor_sync(0xffffffffu, best, o));
        }
        if (lane == 0) {
            wrong |= __float_as_uint(top) == 0xff800000u;
            ids[row] = wrong ? 0xffffffffu : static_cast<unsigned>(best);
            places[row] += 1;
        }
    }
}
