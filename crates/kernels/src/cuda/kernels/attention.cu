// Attention of equal numbers of queries and keys on Hopper: tiles brought by one thread, multiplied by two or three warpgroups.
//
// Equation: s_ij = scale q_i . k_j, o_i = sum_j softmax_j(s_ij over visible j) v_j; backward with p_ij = exp(s_ij - lse_i),
//           ds_ij = p_ij (do_i . v_j - do_i . o_i): dv_j = sum_i p_ij do_i, dk_j = scale sum_i ds_ij q_i, dq_i = scale sum_j ds_ij k_j
// Shapes:   q, o [b, t, h, d], k, v [b, t, kv, d] with rows of any stride, d 64 or 128; lse, delta [b, h, padded] in f32, padded a
//           multiple of 128; dq in f32 in the order of the accumulators, see `attention_dq`
// Source:   arXiv 2205.14135, 2307.08691 and 2407.08608 (products of the next tile beside the softmax of this one)
#include "hopper.cuh"

constexpr float LOG2E = 1.4426950408889634f;
constexpr int KEYS = 128;

/// Which keys a query sees.
struct Rules {
    int t, causal, window;  // window 0: none
    const uint32_t *segments;  // of this sequence, or null
    /// First key that query i sees by its place, and one past the last.
    __device__ __forceinline__ int first(int i) const { return window ? max(0, i - window + 1) : 0; }
    __device__ __forceinline__ int end(int i) const { return i >= t ? 0 : causal ? i + 1 : t; }
    /// First query that sees key j by its place, and one past the last.
    __device__ __forceinline__ int first_query(int j) const { return j >= t ? t : causal ? j : 0; }
    __device__ __forceinline__ int end_query(int j) const { return window ? min(t, j + window) : t; }
    __device__ __forceinline__ bool same(int i, int j) const {
        return i < t && j < t && segments[i] == segments[j] && segments[i] != 0xffffffffu;
    }
    /// Whether every query of [i, i + queries) sees every key of [j, j + keys).
    __device__ __forceinline__ bool all(int i, int queries, int j, int keys) const {
        return !segments && j + keys <= t && i + queries <= t && (!causal || j + keys - 1 <= i) &&
               (window == 0 || j > i + queries - 1 - window);
    }
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/// Copies rows [row, row + ROWS) of one head as D / 64 columns of 64.
template <int D, int ROWS>
__device__ __forceinline__ void copy_rows(bf16 *to, const TensorMap *map, uint64_t *barrier, int head, int row, int b) {
#pragma unroll
    for (int c = 0; c < D / 64; c++) copy_tile(to + c * ROWS * 64, map, barrier, c * 64, head, row, b);
}

/// s [64, N] = rows of A times rows of B over D values, both as columns of 64 with `ROWS_A` and `ROWS_B` rows.
template <int D, int ROWS_A, int ROWS_B, int N>
__device__ __forceinline__ void scores(float (&s)[N], uint32_t a, uint32_t b) {
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
        int column = k / 4, within = (k % 4) * 32;
        multiply<0, 0>(s, tile(a + column * ROWS_A * 128 + within, 16), tile(b + column * ROWS_B * 128 + within, 16), k > 0);
    }
}

/// The accumulator's rows of this thread: `row` and `row + 8`; its columns: 8 n + `column` and the next.
struct Place {
    int row, column;
    __device__ __forceinline__ Place() {
        int thread = threadIdx.x % 128;
        row = 16 * (thread / 32) + (thread % 32) / 4;
        column = (thread % 4) * 2;
    }
};

template <int N>
__device__ __forceinline__ void to_operand(const float (&s)[N], uint32_t (&p)[N / 2]) {
#pragma unroll
    for (int i = 0; i < N / 2; i++) p[i] = pack(s[2 * i], s[2 * i + 1]);
}

template <int D, int GROUPS>
struct ForwardShared {
    bf16 q[GROUPS * 64 * D];
    bf16 k[2][KEYS * D];
    bf16 v[2][KEYS * D];
    uint64_t q_full, k_full[2], v_full[2], k_free[2], v_free[2];
};

/// One tile of GROUPS * 64 queries.
template <int D, int GROUPS, int PRODUCER_REGISTERS, int REGISTERS>
__device__ __forceinline__ void forward(const TensorMap *map_q, const TensorMap *map_k, const TensorMap *map_v, bf16 *out,
                                        int out_stride, float *lse, int padded, int heads, int kv_heads, float scale,
                                        Rules rules, char *memory) {
    auto &shared = *reinterpret_cast<ForwardShared<D, GROUPS> *>(memory);
    constexpr int QUERIES = GROUPS * 64;
    // The longest rows of tiles begin first.
    int first = (gridDim.y - 1 - blockIdx.y) * QUERIES, head = blockIdx.x % heads, b = blockIdx.x / heads;
    int kv = head / (heads / kv_heads), t = rules.t;
    int end = rules.causal ? min(t, first + QUERIES) : t;
    int begin = rules.window ? max(0, first + 1 - rules.window) / KEYS * KEYS : 0;
    int tiles = (end - begin + KEYS - 1) / KEYS;
    if (threadIdx.x == 0) {
        barrier_init(&shared.q_full, 1);
        for (int i = 0; i < 2; i++) {
            barrier_init(&shared.k_full[i], 1);
            barrier_init(&shared.v_full[i], 1);
            barrier_init(&shared.k_free[i], GROUPS * 4);
            barrier_init(&shared.v_free[i], GROUPS * 4);
        }
        barrier_init_done();
    }
    __syncthreads();
    // Tiles from the last to the first: those that need a mask come first.
    if (threadIdx.x / 128 == GROUPS) {
        give_registers<PRODUCER_REGISTERS>();
        if (threadIdx.x % 128 == 0) {
            barrier_expect(&shared.q_full, QUERIES * D * 2);
            copy_rows<D, QUERIES>(shared.q, map_q, &shared.q_full, head, first, b);
            for (int i = 0; i < tiles; i++) {
                int stage = i % 2, row = begin + (tiles - 1 - i) * KEYS;
                if (i >= 2) barrier_wait(&shared.k_free[stage], (i / 2 - 1) & 1);
                barrier_expect(&shared.k_full[stage], KEYS * D * 2);
                copy_rows<D, KEYS>(shared.k[stage], map_k, &shared.k_full[stage], kv, row, b);
                if (i >= 2) barrier_wait(&shared.v_free[stage], (i / 2 - 1) & 1);
                barrier_expect(&shared.v_full[stage], KEYS * D * 2);
                copy_rows<D, KEYS>(shared.v[stage], map_v, &shared.v_full[stage], kv, row, b);
            }
        }
        return;
    }
    take_registers<REGISTERS>();
    int group = threadIdx.x / 128;
    Place place;
    int row = first + group * 64 + place.row;
    float scale_log2 = scale * LOG2E;
    float o[D / 2], s[KEYS / 2], most[2] = {-INFINITY, -INFINITY}, total[2] = {0, 0}, factor[2];
    uint32_t p[KEYS / 4];
#pragma unroll
    for (int i = 0; i < D / 2; i++) o[i] = 0;
    uint32_t q = shared_address(shared.q) + group * 64 * 128;

    auto score = [&](int i) {
        barrier_wait(&shared.k_full[i % 2], (i / 2) & 1);
        pin(s);
        products_begin();
        scores<D, QUERIES, KEYS>(s, q, shared_address(shared.k[i % 2]));
        products_commit();
    };
    auto add_values = [&](int i) {
        barrier_wait(&shared.v_full[i % 2], (i / 2) & 1);
        uint32_t v = shared_address(shared.v[i % 2]);
        pin(o);
        products_begin();
#pragma unroll
        for (int k = 0; k < KEYS / 16; k++) multiply<1>(o, p + 4 * k, tile(v + k * 16 * 128, KEYS * 128), 1);
        products_commit();
    };
    auto soften = [&](int i) {
        int column = begin + (tiles - 1 - i) * KEYS;
        if (!rules.all(first + group * 64, 64, column, KEYS)) {
            int from = column + place.column, low[2], width[2];
            for (int r = 0; r < 2; r++) {
                low[r] = rules.first(row + 8 * r) - from;
                width[r] = max(0, rules.end(row + 8 * r) - rules.first(row + 8 * r));
            }
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    if (static_cast<unsigned>(8 * n + e % 2 - low[e / 2]) >= static_cast<unsigned>(width[e / 2]))
                        s[4 * n + e] = -INFINITY;
            if (rules.segments) {
#pragma unroll
                for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
                    for (int e = 0; e < 4; e++)
                        if (!rules.same(row + 8 * (e / 2), from + 8 * n + e % 2)) s[4 * n + e] = -INFINITY;
            }
        }
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float high = most[r];
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++) high = fmaxf(high, fmaxf(s[4 * n + 2 * r], s[4 * n + 2 * r + 1]));
            high = fmaxf(high, __shfl_xor_sync(~0u, high, 1));
            high = fmaxf(high, __shfl_xor_sync(~0u, high, 2));
            float shift = high == -INFINITY ? 0 : high * scale_log2;
            factor[r] = most[r] == -INFINITY ? 0 : exp2f(most[r] * scale_log2 - shift);
            most[r] = high;
            float sum = 0;
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
                for (int e = 2 * r; e < 2 * r + 2; e++) {
                    s[4 * n + e] = exp2f(s[4 * n + e] * scale_log2 - shift);
                    sum += s[4 * n + e];
                }
            total[r] = total[r] * factor[r] + sum;
        }
    };
    barrier_wait(&shared.q_full, 0);
    if (tiles > 0) {
        score(0);
        products_wait<0>();
        pin(s);
        if (threadIdx.x % 32 == 0) barrier_arrive(&shared.k_free[0]);
        soften(0);
        to_operand(s, p);
    }
    for (int i = 1; i < tiles; i++) {
        score(i);
        add_values(i - 1);
        products_wait<1>();
        pin(s);
        if (threadIdx.x % 32 == 0) barrier_arrive(&shared.k_free[i % 2]);
        soften(i);
        products_wait<0>();
        pin(o);
        if (threadIdx.x % 32 == 0) barrier_arrive(&shared.v_free[(i - 1) % 2]);
#pragma unroll
        for (int n = 0; n < D / 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) o[4 * n + e] *= factor[e / 2];
        to_operand(s, p);
    }
    if (tiles > 0) {
        add_values(tiles - 1);
        products_wait<0>();
        pin(o);
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        total[r] += __shfl_xor_sync(~0u, total[r], 1);
        total[r] += __shfl_xor_sync(~0u, total[r], 2);
        int i = row + 8 * r;
        if (i < padded && place.column == 0) {
            float sum = total[r] > 0 ? most[r] * scale + logf(total[r]) : INFINITY;
            lse[(static_cast<size_t>(b) * heads + head) * padded + i] = i < t ? sum : INFINITY;
        }
        if (i < t) {
            float inverse = total[r] > 0 ? 1 / total[r] : 0;
            bf16 *to = out + (static_cast<size_t>(b) * t + i) * out_stride + head * D + place.column;
#pragma unroll
            for (int n = 0; n < D / 8; n++)
                *reinterpret_cast<uint32_t *>(to + 8 * n) =
                    pack(o[4 * n + 2 * r] * inverse, o[4 * n + 2 * r + 1] * inverse);
        }
    }
}

template <int D, int QUERIES>
struct BackwardShared {
    bf16 k[KEYS * D];
    bf16 v[KEYS * D];
    bf16 q[2][QUERIES * D];
    bf16 g[2][QUERIES * D];
    bf16 ds[3][KEYS * QUERIES];
    float dq[2][64 * 64];
    float lse[2][QUERIES];
    float delta[2][QUERIES];
    uint64_t kv_full, full[2], free[2];
};

/// One tile of 128 keys, over all queries that see them of all heads that read them.
///
/// The two warpgroups have 64 keys each. dq needs the ds of both, so it is made one round later, when both have long been
/// written, and neither waits for the other.
template <int D, int QUERIES>
__device__ __forceinline__ void backward(const TensorMap *map_q, const TensorMap *map_k, const TensorMap *map_v,
                                         const TensorMap *map_g, const float *lse, const float *delta, float *dq, bf16 *dk,
                                         bf16 *dv, int d_stride, int padded, int heads, int kv_heads, float scale, Rules rules,
                                         char *memory) {
    auto &shared = *reinterpret_cast<BackwardShared<D, QUERIES> *>(memory);
    // The first keys are seen by the most queries: those tiles begin first.
    int first = blockIdx.y * KEYS, kv = blockIdx.x % kv_heads, b = blockIdx.x / kv_heads, t = rules.t;
    int shared_by = heads / kv_heads;
    int begin = rules.causal ? first / QUERIES : 0;
    int last = rules.window ? min(t, first + KEYS - 1 + rules.window) : t;
    int tiles = max(0, (last + QUERIES - 1) / QUERIES - begin);
    int rounds = tiles * shared_by;
    if (threadIdx.x == 0) {
        barrier_init(&shared.kv_full, 1);
        for (int i = 0; i < 2; i++) {
            barrier_init(&shared.full[i], 1);
            barrier_init(&shared.free[i], 256);
        }
        barrier_init_done();
    }
    __syncthreads();
    if (threadIdx.x / 128 == 2) {
        give_registers<24>();
        if (threadIdx.x % 128 == 0) {
            barrier_expect(&shared.kv_full, 2 * KEYS * D * 2);
            copy_rows<D, KEYS>(shared.k, map_k, &shared.kv_full, kv, first, b);
            copy_rows<D, KEYS>(shared.v, map_v, &shared.kv_full, kv, first, b);
            for (int i = 0; i < rounds; i++) {
                int stage = i % 2, head = kv * shared_by + i / tiles, row = (begin + i % tiles) * QUERIES;
                if (i >= 2) barrier_wait(&shared.free[stage], (i / 2 - 1) & 1);
                barrier_expect(&shared.full[stage], 2 * QUERIES * D * 2 + 2 * QUERIES * 4);
                copy_rows<D, QUERIES>(shared.q[stage], map_q, &shared.full[stage], head, row, b);
                copy_rows<D, QUERIES>(shared.g[stage], map_g, &shared.full[stage], head, row, b);
                size_t at = (static_cast<size_t>(b) * heads + head) * padded + row;
                copy_bytes(shared.lse[stage], lse + at, QUERIES * 4, &shared.full[stage]);
                copy_bytes(shared.delta[stage], delta + at, QUERIES * 4, &shared.full[stage]);
            }
        }
        return;
    }
    take_registers<240>();
    int group = threadIdx.x / 128;
    Place place;
    int row = first + group * 64 + place.row;
    float scale_log2 = scale * LOG2E;
    float sum_k[D / 2], sum_v[D / 2], s[QUERIES / 2];
#pragma unroll
    for (int i = 0; i < D / 2; i++) sum_k[i] = sum_v[i] = 0;
    uint32_t k = shared_address(shared.k), v = shared_address(shared.v);
    uint32_t own_k = k + group * 64 * 128, own_v = v + group * 64 * 128;
    // Where this thread writes ds: rows of keys, columns of 64 queries, chunks of 8 queries swizzled by the row.
    uint32_t own_ds = shared_address(shared.ds) + (group * 64 + place.row) * 128 + place.column * 2;
    int swizzle = (place.row % 8) * 16;

    // Beyond the last round the scores are of what lies in memory, and are not used: products in flight allow no branches.
    auto score = [&](int i) {
        if (i < rounds) barrier_wait(&shared.full[i % 2], (i / 2) & 1);
        pin(s);
        products_begin();
        scores<D, KEYS, QUERIES>(s, own_k, shared_address(shared.q[i % 2]));
        products_commit();
    };
    // dq of a round: 64 queries and 64 values of the head for each warpgroup, from the ds of both.
    auto add_queries = [&](int i, float(&part)[32]) {
        constexpr bool SPLIT_HEAD = QUERIES == 64;
        uint32_t ds = shared_address(shared.ds[(i + 3) % 3]) + (SPLIT_HEAD ? 0 : group * KEYS * 128);
        uint32_t of_k = k + (SPLIT_HEAD ? group * KEYS * 128 : 0);
        meet(1, 256);
        pin(part);
        products_begin();
#pragma unroll
        for (int c = 0; c < KEYS / 16; c++)
            multiply<1, 1>(part, tile(ds + c * 16 * 128, 16), tile(of_k + c * 16 * 128, 16), c > 0);
        products_commit();
    };
    auto store_queries = [&](int i, const float(&part)[32]) {
        int head = kv * shared_by + i / tiles, column = (begin + i % tiles) * QUERIES;
        if (threadIdx.x % 128 == 0) added();
        meet(2 + group, 128);
#pragma unroll
        for (int n = 0; n < 8; n++)
            reinterpret_cast<float4 *>(shared.dq[group])[n * 128 + threadIdx.x % 128] =
                make_float4(part[4 * n], part[4 * n + 1], part[4 * n + 2], part[4 * n + 3]);
        fence_async();
        meet(2 + group, 128);
        if (threadIdx.x % 128 == 0) {
            size_t at = (static_cast<size_t>(b) * heads + head) * padded * D + static_cast<size_t>(column) * D + group * 4096;
            add_bytes(dq + at, shared.dq[group], 4096 * 4);
        }
    };
    barrier_wait(&shared.kv_full, 0);
    score(0);
    products_wait<0>();
    pin(s);
    for (int i = 0; i < rounds; i++) {
        int stage = i % 2, column = (begin + i % tiles) * QUERIES;
        uint32_t q = shared_address(shared.q[stage]), g = shared_address(shared.g[stage]);
        uint32_t p[QUERIES / 4];
        {
            float d[QUERIES / 2];
            pin(d);
            products_begin();
            scores<D, KEYS, QUERIES>(d, own_v, g);
            products_commit();
#pragma unroll
            for (int n = 0; n < QUERIES / 8; n++) {
                float2 sums = *reinterpret_cast<const float2 *>(&shared.lse[stage][8 * n + place.column]);
#pragma unroll
                for (int e = 0; e < 4; e++)
                    s[4 * n + e] = exp2f(s[4 * n + e] * scale_log2 - (e % 2 ? sums.y : sums.x) * LOG2E);
            }
            if (!rules.all(column, QUERIES, first + group * 64, 64)) {
                int from = column + place.column, low[2], width[2];
                for (int r = 0; r < 2; r++) {
                    int j = row + 8 * r;
                    low[r] = rules.first_query(j) - from;
                    width[r] = max(0, rules.end_query(j) - rules.first_query(j));
                }
#pragma unroll
                for (int n = 0; n < QUERIES / 8; n++)
#pragma unroll
                    for (int e = 0; e < 4; e++)
                        if (static_cast<unsigned>(8 * n + e % 2 - low[e / 2]) >= static_cast<unsigned>(width[e / 2]))
                            s[4 * n + e] = 0;
                if (rules.segments) {
#pragma unroll
                    for (int n = 0; n < QUERIES / 8; n++)
#pragma unroll
                        for (int e = 0; e < 4; e++)
                            if (!rules.same(from + 8 * n + e % 2, row + 8 * (e / 2))) s[4 * n + e] = 0;
                }
            }
            products_wait<0>();
            pin(d);
            uint32_t ds = own_ds + (i % 3) * KEYS * QUERIES * 2;
#pragma unroll
            for (int n = 0; n < QUERIES / 8; n++) {
                float2 means = *reinterpret_cast<const float2 *>(&shared.delta[stage][8 * n + place.column]);
                uint32_t at = ds + (n / 8) * KEYS * 128 + (((n % 8) * 16) ^ swizzle);
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    p[2 * n + r] = pack(s[4 * n + 2 * r], s[4 * n + 2 * r + 1]);
                    uint32_t pair = pack(s[4 * n + 2 * r] * (d[4 * n + 2 * r] - means.x),
                                         s[4 * n + 2 * r + 1] * (d[4 * n + 2 * r + 1] - means.y));
                    asm volatile("st.shared.b32 [%0], %1;" ::"r"(at + r * 8 * 128), "r"(pair) : "memory");
                }
            }
        }
        fence_async();
        meet(2 + group, 128);
        uint32_t ds = shared_address(shared.ds[i % 3]) + group * 64 * 128;
        pin(sum_k);
        pin(sum_v);
        products_begin();
#pragma unroll
        for (int c = 0; c < QUERIES / 16; c++) multiply<1>(sum_v, p + 4 * c, tile(g + c * 16 * 128, QUERIES * 128), 1);
#pragma unroll
        for (int c = 0; c < QUERIES / 16; c++) {
            // 16 queries: a quarter of a column of 64.
            uint32_t of_ds = ds + (c / 4) * KEYS * 128 + (c % 4) * 32;
            multiply<0, 1>(sum_k, tile(of_ds, 16), tile(q + c * 16 * 128, QUERIES * 128), 1);
        }
        products_commit();
        score(i + 1);
        float part[32];
        add_queries(i - 1, part);
        products_wait<0>();
        pin(part);
        pin(sum_k);
        pin(sum_v);
        pin(s);
        barrier_arrive(&shared.free[stage]);
        if (i > 0) store_queries(i - 1, part);
    }
    if (rounds > 0) {
        float part[32];
        add_queries(rounds - 1, part);
        products_wait<0>();
        pin(part);
        store_queries(rounds - 1, part);
    }
    if (threadIdx.x % 128 == 0) added();
#pragma unroll
    for (int r = 0; r < 2; r++) {
        int j = row + 8 * r;
        if (j >= t) continue;
        size_t at = (static_cast<size_t>(b) * t + j) * d_stride + kv * D + place.column;
#pragma unroll
        for (int n = 0; n < D / 8; n++) {
            *reinterpret_cast<uint32_t *>(dk + at + 8 * n) =
                pack(sum_k[4 * n + 2 * r] * scale, sum_k[4 * n + 2 * r + 1] * scale);
            *reinterpret_cast<uint32_t *>(dv + at + 8 * n) = pack(sum_v[4 * n + 2 * r], sum_v[4 * n + 2 * r + 1]);
        }
    }
}

#endif

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define ON_HOPPER(...) __VA_ARGS__
#else
#define ON_HOPPER(...) __trap()
#endif

extern __shared__ __align__(1024) char memory[];

#define FORWARD(NAME, D, GROUPS, PRODUCER_REGISTERS, REGISTERS)                                                               \
    extern "C" __global__ void __launch_bounds__(128 * (GROUPS + 1), 1)                                                       \
        NAME(const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k, const __grid_constant__ TensorMap v,   \
             bf16 *out, int out_stride, float *lse, int t, int padded, int heads, int kv_heads, float scale, int causal,      \
             int window, const uint32_t *segments) {                                                                          \
        ON_HOPPER(Rules rules{t, causal, window, segments ? segments + static_cast<size_t>(blockIdx.x / heads) * t : nullptr}; \
                  forward<D, GROUPS, PRODUCER_REGISTERS, REGISTERS>(&q, &k, &v, out, out_stride, lse, padded, heads,          \
                                                                    kv_heads, scale, rules, memory));                         \
    }

FORWARD(attention_forward_64, 64, 3, 32, 160)
FORWARD(attention_forward_128, 128, 2, 24, 240)

#define BACKWARD(NAME, D, QUERIES)                                                                                            \
    extern "C" __global__ void __launch_bounds__(384, 1)                                                                      \
        NAME(const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k, const __grid_constant__ TensorMap v,   \
             const __grid_constant__ TensorMap g, const float *lse, const float *delta, float *dq, bf16 *dk, bf16 *dv,        \
             int d_stride, int t, int padded, int heads, int kv_heads, float scale, int causal, int window,                   \
             const uint32_t *segments) {                                                                                      \
        ON_HOPPER(Rules rules{t, causal, window, segments ? segments + static_cast<size_t>(blockIdx.x / kv_heads) * t : nullptr}; \
                  backward<D, QUERIES>(&q, &k, &v, &g, lse, delta, dq, dk, dv, d_stride, padded, heads, kv_heads, scale,      \
                                       rules, memory));                                                                       \
    }

BACKWARD(attention_backward_64, 64, 128)
BACKWARD(attention_backward_128, 128, 64)

/// delta[i] = do_i . o_i for rows [b, t, h, d], eight values a thread; lse and delta of the padding so that it counts nothing.
extern "C" __global__ void attention_delta(const bf16 *g, int g_stride, const bf16 *o, int o_stride, float *delta, float *lse,
                                           int t, int padded, int heads, int d) {
    // Neighbouring threads have neighbouring heads of one row.
    int across = d / 8, b = blockIdx.y;
    long long thread = blockIdx.x * static_cast<long long>(blockDim.x) + threadIdx.x;
    int column = thread % across * 8, head = thread / across % heads, i = thread / across / heads;
    float sum = 0;
    if (i < t) {
        size_t row = static_cast<size_t>(b) * t + i;
        uint4 x = *reinterpret_cast<const uint4 *>(g + row * g_stride + head * d + column);
        uint4 y = *reinterpret_cast<const uint4 *>(o + row * o_stride + head * d + column);
        const __nv_bfloat162 *a = reinterpret_cast<const __nv_bfloat162 *>(&x);
        const __nv_bfloat162 *c = reinterpret_cast<const __nv_bfloat162 *>(&y);
#pragma unroll
        for (int k = 0; k < 4; k++) {
            float2 u = __bfloat1622float2(a[k]), v = __bfloat1622float2(c[k]);
            sum += u.x * v.x + u.y * v.y;
        }
    }
    for (int step = across / 2; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    if (column == 0 && i < padded) {
        size_t at = (static_cast<size_t>(b) * heads + head) * padded + i;
        delta[at] = sum;
        if (i >= t) lse[at] = INFINITY;
    }
}

/// dq as rows: `from` holds, for each head, tiles of 64 x 64 in the order of the accumulators, for d 64 one below the other, for
/// d 128 two side by side.
extern "C" __global__ void attention_dq(const float4 *from, bf16 *to, int stride, int t, int padded, int heads, int d,
                                        float scale) {
    int head = blockIdx.y, b = blockIdx.z, across = d / 64;
    int thread = threadIdx.x % 128, n = blockIdx.x % 2 * 4 + threadIdx.x / 128, block = blockIdx.x / 2;
    size_t base = (static_cast<size_t>(b) * heads + head) * padded * d / 4;
    float4 value = from[base + static_cast<size_t>(block) * 1024 + n * 128 + thread];
    int row = block / across * 64 + 16 * (thread / 32) + (thread % 32) / 4;
    int column = block % across * 64 + 8 * n + (thread % 4) * 2;
    bf16 *at = to + (static_cast<size_t>(b) * t + row) * stride + head * d + column;
    if (row < t) *reinterpret_cast<__nv_bfloat162 *>(at) = __floats2bfloat162_rn(value.x * scale, value.y * scale);
    if (row + 8 < t)
        *reinterpret_cast<__nv_bfloat162 *>(at + static_cast<size_t>(8) * stride) =
            __floats2bfloat162_rn(value.z * scale, value.w * scale);
}
