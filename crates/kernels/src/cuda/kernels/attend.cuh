// Attention of the new token of each row over its cache, within the decoding kernel.
//
// Equation: q, k turned by the token's position; o = softmax(scale q k^T) v over the tokens so far; u_next += A_next o
// Shapes:   qkv [m, (heads + 2 kv) d], out [m, heads d] bf16; keys, values [m, capacity, kv, d] bf16; cos, sin [positions, half]
//           f32; the new token's place in the cache and the first place that is no padding by row; head d 64 or 128
// Source:   online softmax arXiv 1805.02867, warps over runs of keys merged as in Flash-Decoding
// Cost:     one pass over keys and values for every G query heads
#pragma once
#include "step.cuh"

/// Floats of shared memory of `team` warps that attend together: `Heads::scratch` has the same.
__host__ __device__ constexpr int team_floats(int d, int g, int team) { return g * d + 2 * d + team * g * (d + 2); }

/// Eight bf16 from eight f32 in shared memory.
__device__ __forceinline__ uint4 packed(const float *p) {
    float v[8];
#pragma unroll
    for (int i = 0; i < 8; i++) {
        v[i] = p[i];
    }
    return pack(v);
}

/// G query heads of one kv head for one row.
struct Item {
    int row, kv, head, count, place, first, begin;
    size_t base;

    __device__ __forceinline__ Item(const Token &token, const Phase &phase, int index) {
        const int group = phase.heads / phase.kv_heads, runs = (group + phase.together - 1) / phase.together;
        const int pair = index / runs, from = (index - pair * runs) * phase.together;
        row = pair / phase.kv_heads;
        kv = pair - row * phase.kv_heads;
        head = kv * group + from;
        count = min(phase.together, group - from);
        place = token.places[row];
        first = token.firsts[row];
        begin = phase.window > 0 ? max(first, place - phase.window + 1) : first;
        base = (static_cast<size_t>(row) * phase.capacity * phase.kv_heads + kv) * phase.head_dim;
    }

    static __device__ __forceinline__ int all(const Token &token, const Phase &phase) {
        const int group = phase.heads / phase.kv_heads;
        return token.m * phase.kv_heads * ((group + phase.together - 1) / phase.together);
    }
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/// By one warp, a phase early: what the block's items will read and no phase of this step writes, since its way is long while
/// weights are in the queue.
__device__ __forceinline__ void attend_prefetch(const Token &token, const Phase &phase) {
    constexpr int MOST = 1024;
    const int lane = threadIdx.x % 32, items = Item::all(token, phase), d = phase.head_dim, next = phase.next;
    const size_t step = static_cast<size_t>(phase.kv_heads) * d;
    for (int index = blockIdx.x; index < items; index += gridDim.x) {
        const Item item(token, phase, index);
        for (int i = lane; i < min(item.place - item.begin, MOST); i += 32) {
            const size_t at = item.base + (item.begin + i) * step;
            for (int c = 0; c < d; c += 64) {
                prefetch(phase.keys + at + c);
                prefetch(phase.values + at + c);
            }
        }
        const int lines = item.count * d / 32;
        for (int i = lane; i < next * lines; i += 32) {
            prefetch(phase.a_next + (static_cast<size_t>(i / lines) * phase.heads + item.head) * d + i % lines * 32);
        }
    }
}

template <int D, int G>
__device__ __forceinline__ void attend(const Token &token, const Phase &phase, int number, uint64_t *go, float *scratch,
                                       float *u_next) {
    // Lanes of a key, keys of a warp at once, keys of a thread in flight.
    constexpr int LANES = D / 8, KEYS = 32 / LANES, FLIGHT = G > 2 ? 2 : 4;
    const int team = phase.team, threads = 32 * team, which = threadIdx.x / threads, thread = threadIdx.x % threads;
    const int warp = thread / 32, lane = thread % 32, sub = lane / LANES, dim = lane % LANES * 8;
    float *const q_s = scratch + which * team_floats(D, G, team), *const k_s = q_s + G * D, *const v_s = k_s + D;
    float *const tops = v_s + D, *const totals = tops + team * G, *const parts = totals + team * G;
    const int heads = phase.heads, kv_heads = phase.kv_heads, half = phase.half, next = phase.next;
    const bf16 *const keys = phase.keys, *const values = phase.values;
    const size_t step = static_cast<size_t>(kv_heads) * D;
    const int items = Item::all(token, phase), teams = WARPS / team;
    const float scale = phase.scale * 1.44269504f;
    bool waits = number > 0;
    for (int index = blockIdx.x + which * gridDim.x; index < items; index += teams * gridDim.x) {
        const Item item(token, phase, index);
        const int place = item.place, position = place - item.first;
        const bf16 *const in = at_row(phase.x, phase.x_stride, item.row);
        // Earlier steps wrote these.
        uint4 k[FLIGHT], v[FLIGHT];
        const auto bring = [&](int start) {
#pragma unroll
            for (int f = 0; f < FLIGHT; f++) {
                const int p = start + (f * team + warp) * KEYS + sub;
                k[f] = v[f] = make_uint4(0, 0, 0, 0);
                if (p < place) {
                    const size_t at = item.base + p * step + dim;
                    k[f] = load_fresh(keys + at);
                    v[f] = load_fresh(values + at);
                }
            }
        };
        bring(item.begin);
        if (waits) {
            barrier_wait(go, (number - 1) & 1);
            waits = false;
        }
#pragma unroll 4
        for (int i = thread; i < (G + 1) * D; i += threads) {
            const int h = i / D, c = i % D;
            if (h < G && h >= item.count) {
                q_s[i] = 0.f;
                continue;
            }
            const bf16 *const x = in + (h < G ? item.head + h : heads + item.kv) * D;
            float y = fresh(x + c);
            if (c < 2 * half) {
                const bool low = c < half;
                const int angle = position * half + (low ? c : c - half);
                const float turn = __ldg(token.sin + angle);
                y = fmaf(y, __ldg(token.cos + angle), fresh(low ? x + c + half : x + c - half) * (low ? -turn : turn));
            }
            // As the rotation of whole sequences leaves it in memory.
            y = wide(__float2bfloat16_rn(y));
            if (h < G) {
                q_s[i] = y * scale;
            } else {
                k_s[c] = y;
                v_s[c] = fresh(in + (heads + kv_heads + item.kv) * D + c);
            }
        }
        meet(3 + which, threads);
        if (item.head % (heads / phase.kv_heads) == 0 && thread < 2 * LANES) {
            const int c = thread % LANES * 8;
            const bool is_key = thread < LANES;
            bf16 *const to = (is_key ? phase.keys : phase.values) + item.base + place * step + c;
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
        for (int start = item.begin; start <= place; start += team * KEYS * FLIGHT) {
            bool live[FLIGHT];
#pragma unroll
            for (int f = 0; f < FLIGHT; f++) {
                const int p = start + (f * team + warp) * KEYS + sub;
                live[f] = p <= place;
                if (p == place) {
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
            if (start + team * KEYS * FLIGHT <= place) {
                bring(start + team * KEYS * FLIGHT);
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
                    parts[(warp * G + h) * D + dim + i] = sums[h][i];
                }
            }
            if (lane == 0) {
                tops[warp * G + h] = top[h];
                totals[warp * G + h] = total[h];
            }
        }
        meet(3 + which, threads);
        const int eights = token.eights(), out_stride = phase.out_stride;
        for (int i = thread; i < item.count * D; i += threads) {
            const int h = i / D;
            float highest = tops[h];
#pragma unroll 4
            for (int w = 1; w < team; w++) {
                highest = fmaxf(highest, tops[w * G + h]);
            }
            float sum = 0.f, all = 0.f;
#pragma unroll 4
            for (int w = 0; w < team; w++) {
                const float weight = exp2f(tops[w * G + h] - highest);
                sum = fmaf(weight, parts[w * G * D + i], sum);
                all = fmaf(weight, totals[w * G + h], all);
            }
            const bf16 rounded = __float2bfloat16_rn(sum / all);
            const int column = item.head * D + i;
            phase.out[out_stride > 0 ? static_cast<size_t>(item.row) * out_stride + column : in_tiles(eights, item.row, column)] = rounded;
            // The queries are no longer needed.
            q_s[i] = wide(rounded);
        }
        meet(3 + which, threads);
        // Four rows of A at a time, in flight together; what is past their end counts for nothing.
        for (int from = warp; from < next; from += 4 * team) {
            float sum[4] = {};
#pragma unroll
            for (int c = 0; c < G * D / 32; c++) {
                const int i = c * 32 + lane, column = min(i, item.count * D - 1);
                const float y = i == column ? q_s[i] : 0.f;
#pragma unroll
                for (int k = 0; k < 4; k++) {
                    const int j = min(from + k * team, next - 1);
                    sum[k] = fmaf(__ldg(phase.a_next + (static_cast<size_t>(j) * heads + item.head) * D + column), y, sum[k]);
                }
            }
#pragma unroll
            for (int k = 0; k < 4; k++) {
                const float all = sum_warp(sum[k]);
                if (lane == 0 && from + k * team < next) {
                    atomicAdd(u_next + item.row * row_of_u(next) + from + k * team, all);
                }
            }
        }
        meet(3 + which, threads);
    }
    if (waits) {
        barrier_wait(go, (number - 1) & 1);
    }
}

template <int D>
__device__ __forceinline__ void attend_some(const Token &token, const Phase &phase, int number, uint64_t *go, float *scratch,
                                            float *u_next) {
    if (phase.together == 1) {
        attend<D, 1>(token, phase, number, go, scratch, u_next);
    } else if (phase.together == 2) {
        attend<D, 2>(token, phase, number, go, scratch, u_next);
    } else {
        attend<D, 4>(token, phase, number, go, scratch, u_next);
    }
}

__device__ __forceinline__ void attend_heads(const Token &token, const Phase &phase, int number, uint64_t *go, float *scratch,
                                             float *u_next) {
    if (phase.head_dim == 64) {
        attend_some<64>(token, phase, number, go, scratch, u_next);
    } else {
        attend_some<128>(token, phase, number, go, scratch, u_next);
    }
}

#endif
