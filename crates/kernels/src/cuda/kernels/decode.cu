// One decoding step as one kernel: a block for each processor, which goes through the phases of all layers.
//
// Equation: y = g r (W n + B u) + bias [+ residual] for W [d_out, d_in], or act(gate) up with gate and up such sums; n are rows
//           already times the gain of their norm, r = 1 / sqrt(mean(x^2) + eps), or 1; u_next += A_next y and sum(y^2)
// Shapes:   x, y [m, .] bf16, m <= 32; u [m, ranks, then the sum of squares, then up to a multiple of 8] f32; `beside`, for every eight
//           rows of W: columns of u (gate's, up's, 0, 0), then of gate and of up B^T [most, 8], gains [8], biases [8], then
//           A_next [next, 8] and the next norm's gain [8]
// Source:   mma m16n8k16; a ring of bulk copies as in warp-specialised products; grid barriers
// Cost:     one pass over W by one warp, which never waits for activations: the ring goes on through barriers of the grid. Sums of
//           u are added up in the order in which blocks finish, so last bits differ from run to run
//
// Of a block, one warp brings the weights, 8 multiply, each 256 columns of eight rows of W at a time, and 4 add up what these found
// and finish it, each for eight rows of x. Another tells the grid that the block is done with a phase, and waits for the rest.
#include "act.cuh"
#include "attend.cuh"

/// Tiles whose sums wait for further columns.
constexpr int BATCH = 4;
/// Bytes of barriers.
constexpr int ROOM = 1024;

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/// Values of a row of a stage, which eight threads of a load meet in no bank twice, and of a stage.
constexpr int STRIDE = COLUMNS + 32, STAGE = 8 * STRIDE;

__device__ __forceinline__ void multiply(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0,
                                         unsigned b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

/// The same for f32 rounded to 11 bits, [8, 8] by [8, 8] with rows of A past the eighth 0.
__device__ __forceinline__ void multiply_wide(float (&c)[4], unsigned a0, unsigned a2, unsigned b0, unsigned b1) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %5}, {%7, %8}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(0), "r"(a2), "r"(b0), "r"(b1));
}

/// A value as the sum of two of 11 bits.
struct Split {
    unsigned high, low;

    __device__ __forceinline__ explicit Split(float v) : high(__float_as_uint(v) & 0xffffe000u) {
        low = __float_as_uint(v - __uint_as_float(high));
    }
};

/// A place in a ring.
struct Turn {
    int at = 0, parity = 0;

    __device__ __forceinline__ void next(int length) {
        if (++at == length) {
            at = 0;
            parity ^= 1;
        }
    }
};

/// The shared memory of a block.
struct Room {
    uint64_t full[16], empty[16], record_full[16], record_empty[16], part_full[2], part_empty[2], go;
};
static_assert(sizeof(Room) <= ROOM, "the barriers fit");

/// What every warp knows.
template <int N> struct Block {
    const Token &token;
    Room &room;
    bf16 *ring;
    float *records, *scratch, *us, *un, *sums;

    /// Calls `begin` for each part of the columns of some tiles, then `run` for each of the tiles.
    template <typename B, typename F>
    __device__ __forceinline__ void each(int d_in, int groups, int first, B begin, F run) const {
        const int blocks = gridDim.x, parts = (d_in + COLUMNS - 1) / COLUMNS, many = parts > 1 ? BATCH : 1 << 16;
        for (int base = (blockIdx.x + blocks - first) % blocks; base < groups; base += many * blocks) {
            for (int part = 0; part < parts; part++) {
                begin(part * COLUMNS, min((part + 1) * COLUMNS, d_in));
                int slot = 0;
                for (int tile = base; tile < groups && slot < many; tile += blocks, slot++) {
                    run(tile, slot, part == 0, part == parts - 1);
                }
            }
        }
    }
};

/// Brings the weights of all phases.
template <int N> __device__ __forceinline__ void stream(const Block<N> &block) {
    const Token &token = block.token;
    Room &room = block.room;
    const int lane = threadIdx.x % 32;
    const uint64_t policy = leave_first();
    Turn stage, record;
    for (int p = 0; p < token.count; p++) {
        const Phase &phase = token.phases[p];
        if (phase.kind != PRODUCT) {
            continue;
        }
        const bf16 *const w = phase.w;
        const float *const beside = phase.beside;
        const int w_stride = phase.w_stride, second = phase.second, groups = phase.groups, floats = phase.record;
        int from = 0, width = 0;
        block.each(
            phase.d_in, groups, phase.first,
            [&](int begin, int end) {
                from = begin;
                width = end - begin;
            },
            [&](int tile, int, bool, bool last) {
                for (int half = 0; half < (second ? 2 : 1); half++) {
                    uint64_t *const full = room.full + stage.at;
                    barrier_wait(room.empty + stage.at, stage.parity ^ 1);
                    if (lane == 0) {
                        barrier_expect(full, 8 * width * static_cast<int>(sizeof(bf16)));
                    }
                    __syncwarp();
                    if (lane < 8) {
                        const size_t row = half * second + tile * 8 + lane;
                        copy_bytes(block.ring + stage.at * STAGE + lane * STRIDE, w + row * w_stride + from,
                                   width * sizeof(bf16), full, policy);
                    }
                    stage.next(token.stages);
                }
                if (last) {
                    barrier_wait(room.record_empty + record.at, record.parity ^ 1);
                    if (lane == 0) {
                        uint64_t *const full = room.record_full + record.at;
                        barrier_expect(full, floats * static_cast<int>(sizeof(float)));
                        copy_bytes(block.records + record.at * token.record, beside + static_cast<size_t>(tile) * floats,
                                   floats * sizeof(float), full, policy);
                    }
                    record.next(token.records);
                }
            });
    }
}

/// The products of the warp's columns and rows.
template <int N>
__device__ __forceinline__ void multiply_all(const Block<N> &block, const Phase &phase, int number, Turn &stage, Turn &part) {
    constexpr int PIECES = OWN / 32, TALL = N == 4 ? 2 : 1, CHAINS = N == 4 ? 2 : 4;
    const Token &token = block.token;
    Room &room = block.room;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int m = token.m;
    const bf16 *const x = phase.x;
    const int halves = phase.second ? 2 : 1;
    const bf16 *const own = block.ring + g * STRIDE + warp * OWN + t * 8;
    float *const sums = block.scratch + warp * 64 * N + lane * 2;
    const int d_in = phase.d_in, groups = phase.groups, first = phase.first;
    if (number > 0) {
        barrier_wait(&room.go, (number - 1) & 1);
    }
    uint4 rows[N][PIECES];
    // Columns from the thread's first one on.
    int left = 0;
    block.each(
        d_in, groups, first,
        [&](int begin, int end) {
            const int column = begin + warp * OWN + t * 8;
            left = end - column;
#pragma unroll
            for (int n = 0; n < N; n++) {
                const int row = n * 8 + g;
                const bf16 *const at = x + in_tiles(N, row, column);
#pragma unroll
                for (int s = 0; s < PIECES; s++) {
                    rows[n][s] = make_uint4(0, 0, 0, 0);
                    if (row < m && s * 32 < left) {
                        rows[n][s] = load_fresh(at + s * N * 256);
                    }
                }
            }
        },
        [&](int, int, bool, bool) {
#pragma unroll 1
            for (int half = 0; half < halves; half++) {
                barrier_wait(room.full + stage.at, stage.parity);
                const bf16 *const at = own + stage.at * STAGE;
                float c[TALL][CHAINS][4] = {};
#pragma unroll
                for (int s = 0; s < PIECES; s++) {
                    uint4 w = make_uint4(0, 0, 0, 0);
                    if (s * 32 < left) {
                        w = *reinterpret_cast<const uint4 *>(at + s * 32);
                    }
#pragma unroll
                    for (int i = 0; i < TALL; i++) {
                        const uint4 a = rows[2 * i][s], b = N > 1 ? rows[2 * i + (N > 1)][s] : make_uint4(0, 0, 0, 0);
                        multiply(c[i][s % CHAINS], a.x, b.x, a.y, b.y, w.x, w.y);
                        multiply(c[i][s % CHAINS], a.z, b.z, a.w, b.w, w.z, w.w);
                    }
                }
#pragma unroll
                for (int i = 0; i < TALL; i++) {
#pragma unroll
                    for (int k = 0; k < 4; k++) {
#pragma unroll
                        for (int chain = 1; chain < CHAINS; chain++) {
                            c[i][0][k] += c[i][chain][k];
                        }
                    }
                }
                __syncwarp();
                if (lane == 0) {
                    barrier_arrive(room.empty + stage.at);
                }
                stage.next(token.stages);
                barrier_wait(room.part_empty + part.at, part.parity ^ 1);
                float *const there = sums + part.at * (WARPS * 64 * N);
#pragma unroll
                for (int i = 0; i < TALL; i++) {
                    if (i * 16 + g < m) {
                        *reinterpret_cast<float2 *>(there + i * 16 * 8) = make_float2(c[i][0][0], c[i][0][1]);
                    }
                    if (N > 1 && i * 16 + 8 + g < m) {
                        *reinterpret_cast<float2 *>(there + (i * 16 + 8) * 8) = make_float2(c[i][0][2], c[i][0][3]);
                    }
                }
                __syncwarp();
                if (lane == 0) {
                    barrier_arrive(room.part_full + part.at);
                }
                part.next(2);
            }
        });
}

/// Adds up what the warps found for eight rows of W at a time, and finishes them: each warp for eight rows of x.
template <int N>
__device__ __forceinline__ void finish_all(const Block<N> &block, const Phase &phase, int number, Turn &part, Turn &turn) {
    const Token &token = block.token;
    Room &room = block.room;
    const int warp = threadIdx.x / 32 - WARPS, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, m = token.m;
    const int ranks = phase.ranks, most = phase.most, next = phase.next, u_stride = row_of_u(ranks), next_stride = row_of_u(next);
    const int groups = phase.groups, out_stride = phase.out_stride, halves = phase.second ? 2 : 1;
    const int kind = phase.act, beside = 8 * most + 16, norm = phase.norm, d_in = phase.d_in, first_tile = phase.first;
    const float eps = phase.eps;
    bf16 *const out = phase.out, *const scaled = phase.scaled;
    const bf16 *const residual = phase.residual;
    // The warp's rows of x, u and u_next.
    const int top = warp * 8, c = top + g;
    const bool live = c < m;
    const float *const u = token.read(number) + top * u_stride;
    float *const u_next = token.add(number) + top * next_stride;
    float *const us = block.us + top * u_stride, *const un = block.un + top * next_stride;
    const int count = min(8, m - top) * u_stride, sums = min(8, m - top) * next_stride;
    if (number > 0) {
        barrier_wait(&room.go, (number - 1) & 1);
    }
#pragma unroll 4
    for (int i = lane * 4; i < count; i += 128) {
        *reinterpret_cast<float4 *>(us + i) = __ldcg(reinterpret_cast<const float4 *>(u + i));
    }
    for (int i = lane * 4; i < sums; i += 128) {
        *reinterpret_cast<float4 *>(un + i) = make_float4(0, 0, 0, 0);
    }
    __syncwarp();
    const int own = min(g, m - top - 1);
    const float rstd = norm ? rsqrtf(us[own * u_stride + ranks] / d_in + eps) : 1.f;
    const float *const right = us + own * u_stride + t;
    float squares = 0.f;
    bool any = false;
    block.each(
        d_in, groups, first_tile, [](int, int) {},
        [&](int tile, int slot, bool first, bool last) {
            const size_t at = static_cast<size_t>(c) * out_stride + tile * 8 + 2 * t;
            unsigned before = 0;
            if (residual && last && live) {
                before = __ldcg(reinterpret_cast<const unsigned *>(residual + at));
            }
            float2 value[2];
#pragma unroll
            for (int half = 0; half < 2; half++) {
                if (half == halves) {
                    break;
                }
                barrier_wait(room.part_full + part.at, part.parity);
                const float *const found = block.scratch + part.at * (WARPS * 64 * N) + c * 8 + 2 * t;
                float2 some[WARPS];
#pragma unroll
                for (int s = 0; s < WARPS; s++) {
                    some[s] = *reinterpret_cast<const float2 *>(found + s * 64 * N);
                }
#pragma unroll
                for (int width = WARPS / 2; width > 0; width /= 2) {
#pragma unroll
                    for (int s = 0; s < width; s++) {
                        some[s].x += some[s + width].x;
                        some[s].y += some[s + width].y;
                    }
                }
                value[half] = some[0];
                __syncwarp();
                if (lane == 0) {
                    barrier_arrive(room.part_empty + part.at);
                }
                part.next(2);
                if (!first || !last) {
                    float2 *const kept = reinterpret_cast<float2 *>(block.sums) + (slot * 2 + half) * 32 * N + warp * 32 + lane;
                    if (!first) {
                        value[half].x += kept->x;
                        value[half].y += kept->y;
                    }
                    *kept = value[half];
                }
            }
            if (!last) {
                return;
            }
            any = true;
            barrier_wait(room.record_full + turn.at, turn.parity);
            const float *const record = block.records + turn.at * token.record;
            const float *const a_next = record + 4 + halves * beside, *const next_gain = a_next + 8 * next + 2 * t;
#pragma unroll
            for (int half = 0; half < 2; half++) {
                if (half == halves) {
                    break;
                }
                const float *const b = record + 4 + half * beside;
                const int offset = static_cast<int>(record[half]);
                // Columns of ranks, and what is lost in them by rounding, as products of their own.
                float sum[4] = {value[half].x, value[half].y, 0.f, 0.f}, rest[4] = {};
#pragma unroll 2
                for (int j = 0; j < most; j += 8) {
                    const bool low = j + t < most, high = j + t + 4 < most;
                    const Split a(low ? right[offset + j] : 0.f), e(high ? right[offset + j + 4] : 0.f);
                    const Split x(low ? b[(j + t) * 8 + g] : 0.f), y(high ? b[(j + t + 4) * 8 + g] : 0.f);
                    multiply_wide(sum, a.high, e.high, x.high, y.high);
                    multiply_wide(rest, a.low, e.low, x.high, y.high);
                    multiply_wide(rest, a.high, e.high, x.low, y.low);
                }
                const float2 gain = *reinterpret_cast<const float2 *>(b + 8 * most + 2 * t);
                const float2 bias = *reinterpret_cast<const float2 *>(b + 8 * most + 8 + 2 * t);
                value[half].x = fmaf(sum[0] + rest[0], rstd * gain.x, bias.x);
                value[half].y = fmaf(sum[1] + rest[1], rstd * gain.y, bias.y);
            }
            float2 v = value[0];
            if (halves > 1) {
                by_kind(kind, [&](auto which) {
                    v.x = act<decltype(which)::value>(v.x).value;
                    v.y = act<decltype(which)::value>(v.y).value;
                });
                v.x *= value[1].x;
                v.y *= value[1].y;
            }
            v.x += __uint_as_float(before << 16);
            v.y += __uint_as_float(before & 0xffff0000u);
            const __nv_bfloat162 rounded = __floats2bfloat162_rn(v.x, v.y);
            v = live ? __bfloat1622float2(rounded) : make_float2(0.f, 0.f);
            if (live) {
                const size_t tiled = in_tiles(N, c, tile * 8 + 2 * t);
                *reinterpret_cast<__nv_bfloat162 *>(out + (out_stride > 0 ? at : tiled)) = rounded;
                if (scaled) {
                    *reinterpret_cast<__nv_bfloat162 *>(scaled + tiled) = __floats2bfloat162_rn(v.x * next_gain[0], v.y * next_gain[1]);
                }
            }
            squares = fmaf(v.x, v.x, fmaf(v.y, v.y, squares));
#pragma unroll 2
            for (int j = 0; j < next; j += 8) {
                float2 *const to = reinterpret_cast<float2 *>(un + own * next_stride + j + 2 * t);
                const float2 sum = *to, a = j + g < next ? *reinterpret_cast<const float2 *>(a_next + (j + g) * 8 + 2 * t)
                                                       : make_float2(0.f, 0.f);
                float all[4] = {sum.x, sum.y, 0.f, 0.f}, rest[4] = {};
                const Split x(a.x), y(a.y);
                // Columns 2 t and 2 t + 1 of both: the order of columns does not matter.
                multiply_wide(all, __float_as_uint(v.x), __float_as_uint(v.y), x.high, y.high);
                multiply_wide(rest, __float_as_uint(v.x), __float_as_uint(v.y), x.low, y.low);
                if (live) {
                    *to = make_float2(all[0] + rest[0], all[1] + rest[1]);
                }
            }
            __syncwarp();
            if (lane == 0) {
                barrier_arrive(room.record_empty + turn.at);
            }
            turn.next(token.records);
        });
    if (any && (next > 0 || scaled)) {
        squares += __shfl_xor_sync(0xffffffffu, squares, 1);
        squares += __shfl_xor_sync(0xffffffffu, squares, 2);
        if (live && t == 0) {
            un[g * next_stride + next] = squares;
        }
        __syncwarp();
        for (int i = lane * 4; i < sums; i += 128) {
            add_four(u_next + i, *reinterpret_cast<const float4 *>(un + i));
        }
    }
}

/// x [row] <- table [ids[row]], what becomes of it before the first product, and its part of u.
__device__ __forceinline__ void enter(const Token &token, const Phase &phase, float *u_next) {
    constexpr int SLICES = 8;
    const int lane = threadIdx.x % 32, h = phase.d_in, next = phase.next, pieces = (h + 255) / 256;
    for (int unit = blockIdx.x + threadIdx.x / 32 * gridDim.x; unit < token.m * pieces * SLICES; unit += WARPS * gridDim.x) {
        const int slice = unit % SLICES, piece = unit / SLICES % pieces, row = unit / SLICES / pieces;
        const int column = piece * 256 + lane * 8;
        const bool live = column < h;
        // An id that stands for an error is anything: its scores are not used.
        const unsigned id = min(__ldcg(token.ids + row), static_cast<unsigned>(phase.vocab - 1));
        const uint4 raw = live ? load_fresh(at_row(phase.x, phase.x_stride, id) + column) : make_uint4(0, 0, 0, 0);
        float v[8];
        unpack(raw, v);
        if (slice == 0 && live) {
            const size_t at = static_cast<size_t>(row) * phase.out_stride + column;
            *reinterpret_cast<uint4 *>(phase.out + at) = raw;
            if (phase.scaled) {
                float w[8] = {1.f, 1.f, 1.f, 1.f, 1.f, 1.f, 1.f, 1.f};
                if (phase.gain) {
                    load_wide<true>(phase.gain + column, 8, w);
                }
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    w[i] *= v[i];
                }
                *reinterpret_cast<uint4 *>(phase.scaled + in_tiles(token.eights(), row, column)) = pack(w);
            }
        }
        for (int j = slice; j <= next; j += SLICES) {
            float a[8], sum = 0.f;
            if (j == next || !live) {
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    a[i] = v[i];
                }
            } else {
                load_wide<true>(phase.a_next + static_cast<size_t>(j) * h + column, 8, a);
            }
#pragma unroll
            for (int i = 0; i < 8; i++) {
                sum = fmaf(a[i], v[i], sum);
            }
            sum = sum_warp(sum);
            if (lane == 0) {
                atomicAdd(u_next + row * row_of_u(next) + j, sum);
            }
        }
    }
}

/// ids[row] <- the first of the largest scores, or all ones if one is no number or infinite, or all are minus infinity; the row's
/// next token goes one place further.
__device__ __forceinline__ void best(const Token &token, const Phase &phase, float *scratch) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, vocab = phase.d_in;
    int *const bests = reinterpret_cast<int *>(scratch + WARPS), *const wrongs = bests + WARPS;
    for (int row = blockIdx.x; row < token.m; row += gridDim.x) {
        const bf16 *const at = at_row(phase.x, phase.x_stride, row);
        float top = -INFINITY;
        int index = 0x7fffffff;
        bool wrong = false;
#pragma unroll 4
        for (int i = threadIdx.x * 8; i < vocab; i += 8 * MULTIPLYING) {
            float v[8];
            unpack(load_fresh(at + i), v);
#pragma unroll
            for (int k = 0; k < 8; k++) {
                // All exponent bits set, and not minus infinity; told by bits, since fast arithmetic knows no such values.
                const unsigned raw = __float_as_uint(v[k]);
                wrong |= (raw & 0x7f800000u) == 0x7f800000u && raw != 0xff800000u;
                if (v[k] > top || index == 0x7fffffff) {
                    top = v[k];
                    index = i + k;
                }
            }
        }
        const auto take = [&](float other, int place) {
            if (other > top || (other == top && place < index)) {
                top = other;
                index = place;
            }
        };
#pragma unroll
        for (int o = 16; o > 0; o >>= 1) {
            const float other = __shfl_xor_sync(0xffffffffu, top, o);
            take(other, __shfl_xor_sync(0xffffffffu, index, o));
        }
        wrong = __any_sync(0xffffffffu, wrong);
        if (lane == 0) {
            scratch[warp] = top;
            bests[warp] = index;
            wrongs[warp] = wrong;
        }
        meet(3, MULTIPLYING);
        if (threadIdx.x == 0) {
            for (int w = 1; w < WARPS; w++) {
                take(scratch[w], bests[w]);
                wrong |= wrongs[w] != 0;
            }
            wrong |= __float_as_uint(top) == 0xff800000u;
            token.ids[row] = wrong ? 0xffffffffu : static_cast<unsigned>(index);
            token.places[row] += 1;
        }
        meet(3, MULTIPLYING);
    }
}

template <int N> __device__ __forceinline__ void step(const Token &token) {
    extern __shared__ __align__(128) unsigned char shared[];
    Room &room = *reinterpret_cast<Room *>(shared);
    bf16 *const ring = reinterpret_cast<bf16 *>(shared + ROOM);
    float *const records = reinterpret_cast<float *>(ring + token.stages * STAGE);
    float *const scratch = records + token.records * token.record;
    float *const us = scratch + token.scratch, *const un = us + token.u_size, *const sums = un + token.u_size;
    const Block<N> block{token, room, ring, records, scratch, us, un, sums};
    const int warp = threadIdx.x / 32;
    // Warps with rows of x.
    const int finishing = (token.m + 7) / 8;
    if (threadIdx.x == 0) {
        for (int i = 0; i < token.stages; i++) {
            barrier_init(room.full + i, 1);
            barrier_init(room.empty + i, WARPS);
        }
        for (int i = 0; i < token.records; i++) {
            barrier_init(room.record_full + i, 1);
            barrier_init(room.record_empty + i, finishing);
        }
        for (int i = 0; i < 2; i++) {
            barrier_init(room.part_full + i, WARPS);
            barrier_init(room.part_empty + i, finishing);
        }
        barrier_init(&room.go, 1);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    if (warp < WARPS) {
        take_registers<192>();
        Turn stage, part;
        for (int p = 0; p < token.count; p++) {
            const Phase &phase = token.phases[p];
            float *const u_next = token.add(p);
            if (phase.kind == PRODUCT) {
                multiply_all(block, phase, p, stage, part);
            } else if (phase.kind == ATTEND) {
                attend_heads(token, phase, p, &room.go, scratch, u_next);
            } else {
                if (p > 0) {
                    barrier_wait(&room.go, (p - 1) & 1);
                }
                if (phase.kind == ENTER) {
                    enter(token, phase, u_next);
                } else {
                    best(token, phase, scratch);
                }
            }
            meet_later(2, ALL);
        }
    } else if (warp < STREAM) {
        give_registers<88>();
        const int thread = threadIdx.x - MULTIPLYING;
        Turn part, turn;
        for (int p = 0; p < token.count; p++) {
            const Phase &phase = token.phases[p];
            if (phase.kind == PRODUCT && warp - WARPS < finishing) {
                finish_all(block, phase, p, part, turn);
            } else if (p > 0) {
                barrier_wait(&room.go, (p - 1) & 1);
            }
            float *const old = token.read(p + 2);
            for (int i = blockIdx.x * FINISHING + thread; i < token.u_size; i += gridDim.x * FINISHING) {
                old[i] = 0.f;
            }
            meet_later(2, ALL);
        }
    } else {
        give_registers<40>();
        if (warp == STREAM) {
            stream(block);
        } else if (warp == MEET) {
            for (int p = 0; p < token.count; p++) {
                if (p + 1 < token.count && token.phases[p + 1].kind == ATTEND) {
                    attend_prefetch(token, token.phases[p + 1]);
                }
                meet(2, ALL);
                if (p + 1 < token.count && threadIdx.x % 32 == 0) {
                    meet_grid(token.counter, (p + 1) * gridDim.x);
                    barrier_arrive(&room.go);
                }
                __syncwarp();
            }
        }
    }
}

#define STEP_KERNEL(name, n)                                                                                               \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) name(const __grid_constant__ Token token) { step<n>(token); }

#else

#define STEP_KERNEL(name, n) extern "C" __global__ void name(const __grid_constant__ Token token) {}

#endif

STEP_KERNEL(decode_8, 1)
STEP_KERNEL(decode_16, 2)
STEP_KERNEL(decode_32, 4)
