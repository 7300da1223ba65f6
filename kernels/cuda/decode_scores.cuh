// Queries as the kernel multiplies them, and the scores of a page of keys.
#pragma once

#include "computed_levels.cuh"
#include "decode_params.cuh"
#include "levels.cuh"

// ---- queries -------------------------------------------------------------------------------------------------

// The two channels of a pair.
KVQ_DEVICE float2 pair_of_query(const DecodeParams &p, const Shared &s, const uint16_t *q, int pair) {
    const ChannelPair &channels = s.key_channels[pair];
    return make_float2(float16_to_float(p.query_bfloat, q[channels.first.coordinate]),
                       float16_to_float(p.query_bfloat, q[channels.second.coordinate]));
}

// R(-t) q of a pair, scaled.
KVQ_DEVICE float2 turned_query(float2 q, float2 turn, float factor) {
    const float a = factor * q.x, b = factor * q.y;
    return make_float2(a * turn.x + b * turn.y, b * turn.x - a * turn.y);
}

// Fills Shared::query: per product of 16 tokens, step and lane, halves of R(-t) q times the pair's level factor, scaled
// to [-1, 1]. The divisor, times the softmax scaling, goes to query_scale.
KVQ_DEVICE void prepare_queries(const DecodeParams &p, Shared &s, const uint16_t *query, int heads, int head) {
    const float2 *pair_scale = p.key_pair_scale + head * (kDim / 2);
    const float2 *turns = p.key_turns + head * (kBlockTokens / 2) * (kDim / 2);
    for (int h = warp_id(); h < 8; h += kWarps) {
        const uint16_t *q = query + (h < heads ? h : heads - 1) * kDim;
        float largest = 0.0f;
        for (int i = lane_id(); i < kDim / 2; i += kWarp) {
            const float2 own = pair_of_query(p, s, q, i);
            largest = fmaxf(largest, (fabsf(own.x) + fabsf(own.y)) * pair_scale[i].x);
        }
        for (int step = 16; step; step /= 2) largest = fmaxf(largest, __shfl_xor_sync(kAll, largest, step));
        if (lane_id() == 0) s.query_scale[h] = largest;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < 8 * kKeySteps * kWarp; i += kThreads) {
        const int column = i % kWarp / 4, step = i / kWarp % kKeySteps, m = i / (kWarp * kKeySteps);
        const int h = min(kFold ? column % 4 : column, heads - 1), pair = 4 * step + i % 4;
        const float norm = s.query_scale[h] > 0.0f ? 1.0f / s.query_scale[h] : 0.0f;
        const float factor = pair_scale[pair].x * norm;
        float2 q[2] = {make_float2(0.0f, 0.0f), make_float2(0.0f, 0.0f)};  // of the slots
        const float2 own = pair_of_query(p, s, query + h * kDim, pair);
        for (int slot = 0; slot < 2; ++slot)
            if (!kFold || slot == column / 4)
                q[slot] = turned_query(own, __ldg(turns + token_of(m, slot) * (kDim / 2) + pair), factor);
        s.query[i].set(q);
    }
    __syncthreads();
    if (threadIdx.x < 8) s.query_scale[threadIdx.x] *= p.scaling;
}

// The query of a pair's two channels for one token of 16 and one head.
KVQ_DEVICE float2 query_of(const Shared &s, int pair, int token, int head) {
    const int slot = token / kSlotStep % 2, m = kNeighbours ? token / 2 : 4 * (token / 8) + token % 4;
    const int lane = 4 * (kFold ? 4 * slot + head : head) + pair % 4;
    const uint2 q = s.query[query_index(m, pair / 4, lane)].all();
    return __half22float2(as_half2(slot ? permute(q.x, q.y, 0x7632) : permute(q.x, q.y, 0x5410)));
}

// ---- products ------------------------------------------------------------------------------------------------

// Scores of a page. [set][m] are of tokens token_of(m, slot) (0, 1) and 16 more (2, 3) of block lane / 4, of heads
// lane_head(0) and (1); the slot is lane_slot(), or the set.
typedef float Scores[kSets][8][4];

// Adds product m of a step: keys of a pair's first and second channel, from token 0 and from token 16.
KVQ_DEVICE void add_product(const Shared &s, Scores &score, int m, int step, const uint32_t (&first)[2],
                            const uint32_t (&second)[2]) {
    const Queries queries = s.query[query_index(m, step, lane_id())];
#pragma unroll
    for (int set = 0; set < kSets; ++set) {
        const uint2 q = kFold ? queries.all() : queries.of_slot(set);
        mma_16x8x16(score[set][m], first[0], first[1], second[0], second[1], q.x, q.y);
    }
}

// Cosine and sine of a pair, each twice in a register, for tokens 0 to 15 and 16 to 31 of a block.
struct Turn {
    uint32_t cosine[2], sine[2];

    KVQ_DEVICE Turn(const Shared &s, int pair, int base) {
        const uint2 angle = s.key_angles[pair];
        const uint32_t start = uint32_t(base) * angle.x + angle.y;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float sn, c;
            fast_sincos(start + (half ? 16 * angle.x : 0u), &sn, &c);
            cosine[half] = pack_half2(c, c);
            sine[half] = pack_half2(sn, sn);
        }
    }

    KVQ_DEVICE void operator()(int half, uint32_t &first, uint32_t &second) const {
        const __half2 a = as_half2(first), b = as_half2(second), c = as_half2(cosine[half]), sn = as_half2(sine[half]);
        first = as_bits(__hfma2(a, c, __hneg2(__hmul2(b, sn))));
        second = as_bits(__hfma2(b, c, __hmul2(a, sn)));
    }
};

// Scores that a step of four pairs adds; `decode(channel, slice, pairs)` has the levels of a lane's pair.
template <class Decode>
KVQ_DEVICE void add_step(const Shared &s, Scores &score, int step, const Turn &turn, Decode decode) {
#pragma unroll
    for (int slice = 0; slice < 2; ++slice) {
        uint32_t level[2][2][4];  // channel of the pair, half of the block
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            decode(0, slice + 2 * half, level[0][half]);
            decode(1, slice + 2 * half, level[1][half]);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            uint32_t first[2], second[2];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                first[half] = level[0][half][i], second[half] = level[1][half][i];
                turn(half, first[half], second[half]);
            }
            add_product(s, score, 4 * slice + i, step, first, second);
        }
    }
}

// ---- levels from tables --------------------------------------------------------------------------------------

// Pairs of channels that a thread decodes at a time; with many levels, the table needs the registers of one pair.
constexpr int kPairs = KVQ_KEY_BITS <= 4 ? 2 : 1;

template <int Bits> struct KeyStep {  // what a thread reads of its pairs
    TableUnits<Bits, 1> unit[2 * kPairs];

    KVQ_DEVICE void load(const Shared &s, const uint32_t *codes, int step) {
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
            const ChannelPair pair = s.key_channels[4 * (kPairs * step + i) + lane_id() % 4];
            unit[2 * i].load(codes, pair.first, lane_id() / 4);
            unit[2 * i + 1].load(codes, pair.second, lane_id() / 4);
        }
    }
};

template <int Bits>
KVQ_DEVICE void score_tables(const Shared &s, const uint4 *levels, const uint32_t *codes, int base, Scores &score) {
    constexpr int kSteps = kKeySteps / kPairs;
    KeyStep<Bits> next;
    next.load(s, codes, 0);
#pragma unroll 1
    for (int step = 0; step < kSteps; ++step) {
        const KeyStep<Bits> now = next;
        if (step + 1 < kSteps) next.load(s, codes, step + 1);
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
            const int number = kPairs * step + i, pair = 4 * number + lane_id() % 4;
            const typename TableUnits<Bits, 1>::Decoded unit[2] = {
                now.unit[2 * i].decode(s.key_levels, levels, 2 * pair),
                now.unit[2 * i + 1].decode(s.key_levels, levels, 2 * pair + 1)};
            add_step(s, score, number, Turn(s, pair, base), [&](int channel, int slice, uint32_t (&pairs)[4]) {
                if (TableUnits<Bits, 1>::kPlain) __syncwarp();  // keeps the compiler from fetching all levels at once
                unit[channel].template eight<kNeighbours>(0, slice, pairs);
            });
        }
    }
}

// ---- levels that are computed --------------------------------------------------------------------------------

// Steps whose pairs have these widths, from `step` to `end`.
template <int First, int Second>
KVQ_DEVICE void score_kind(const Shared &s, const uint32_t *codes, int base, int step, int end, Scores &score) {
    constexpr bool kPaths = KVQ_KEY_PATHS;
    const int block = lane_id() / 4;
#pragma unroll 1
    for (; step < end; ++step) {
        const int pair = 4 * step + lane_id() % 4;
        const ChannelPair channels = s.key_channels[pair];
        ComputedUnits<First, 1, kPaths> first;
        ComputedUnits<Second, 1, kPaths> second;
        first.load(codes, channels.first, block);
        second.load(codes, channels.second, block);
        const Turn turn(s, pair, base);
        const auto first_levels = first.levels(0, channels.first.bits, numbers_of(s.key_levels, 2 * pair));
        const auto second_levels = second.levels(0, channels.second.bits, numbers_of(s.key_levels, 2 * pair + 1));
        add_step(s, score, step, turn, [&](int channel, int slice, uint32_t (&pairs)[4]) {
            if (channel)
                second_levels.eight(slice, pairs);
            else
                first_levels.eight(slice, pairs);
        });
    }
}

// The kinds of steps, in their order in memory: widths of a pair's first and second channel.
// kvq_calib/runtime/cuda/kinds.py lists the same.
template <int Kind> KVQ_DEVICE void score_kinds(const Shared &, const uint32_t *, int, int, Scores &) {}

template <int Kind, int First, int Second, int... More>
KVQ_DEVICE void score_kinds(const Shared &s, const uint32_t *codes, int base, int begin, Scores &score) {
    const int end = s.key_kinds[Kind];
    score_kind<First, Second>(s, codes, base, begin, end, score);
    score_kinds<Kind + 1, More...>(s, codes, base, end, score);
}

KVQ_DEVICE void score_page(const Shared &s, const uint4 *levels, const uint32_t *codes, int base, Scores &score) {
#pragma unroll
    for (int set = 0; set < kSets; ++set)
#pragma unroll
        for (int m = 0; m < 8; ++m)
#pragma unroll
            for (int i = 0; i < 4; ++i) score[set][m][i] = 0.0f;
    if constexpr (kKeyComputed)
        score_kinds<0, KVQ_KEY_KINDS>(s, codes, base, 0, score);
    else
        score_tables<KVQ_KEY_BITS>(s, levels, codes, base, score);
}

// ---- outliers ------------------------------------------------------------------------------------------------

// Adds the scores of outlying key elements to `scores`.
KVQ_DEVICE void score_outliers(const DecodeParams &p, const Shared &s, const PagePointers &page, int row, int head,
                               int heads, int base, float *scores) {
    const OutlierRange range(p, page, row, head);
    const int block = lane_id() / 4;
    for (int i = range.begin; i < range.end; ++i) {
        const uint32_t index = __ldg(page.outlier_index + i);
        const float residual = float16_to_float(p.storage_bfloat, __ldg(page.outlier_residual + i));
        const int token = index >> kCoordinateBits;
        const int place = s.key_place[index & ((1 << kCoordinateBits) - 1)], pair = place / 2;
        const uint2 angle = s.key_angles[pair];
        // The second element of a pair is the first, a quarter turn on.
        const uint32_t start = angle.y + (place % 2 ? 0x40000000u : 0u);
        float sine, cosine;
        fast_sincos(uint32_t(base + (token & 16)) * angle.x + start, &sine, &cosine);
        const float c = residual * s.pair_scale[pair] * cosine, sn = residual * s.pair_scale[pair] * sine;
        for (int h = 0; h < heads; ++h) {
            const float2 q = query_of(s, pair, token & 15, h);
            atomicAdd(scores + score_index(block, token, h), c * q.x + sn * q.y);
        }
    }
}
