// Attention of one new token per sequence, straight from the packed cache: key scores with RoPE on the fly, online
// softmax, value mix and outliers in one pass; split over the context, with a small reduction behind.
// docs/kernels.md derives the mapping of tokens and channels to lanes.
//
// Compile-time constants:
//   KVQ_HEAD_DIM         multiple of 16
//   KVQ_GROUP            query heads that share a key-value head, 1 to 8
//   KVQ_KEY_BITS, KVQ_VALUE_BITS      1 to 4: every channel; 0: each channel has its own
//   KVQ_KEY_TRELLIS, KVQ_VALUE_TRELLIS  codes are of a trellis: indices of levels have one bit more
//   KVQ_KEY_ENTRIES, KVQ_VALUE_ENTRIES  levels in a table row: 8, 16, 32 (byte permutes), or more (plain lookup)
//   KVQ_KEY_OUTLIERS, KVQ_VALUE_OUTLIERS, KVQ_VALUE_TOKEN (scales per token), KVQ_ROPE, KVQ_SOFTCAP
//   KVQ_QUERY_BFLOAT, KVQ_STORAGE_BFLOAT  bfloat16 rather than float16 queries and results, storage dtype
#include "common.cuh"

constexpr int kDim = KVQ_HEAD_DIM;
constexpr int kGroup = KVQ_GROUP;
constexpr int kSteps = kDim / 16;  // matrix products along the channels of a head
constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;
constexpr int kVariants = 16;  // queries are turned by 0 .. 15 positions, keys by those of tokens 0 and 16
typedef Float16<KVQ_QUERY_BFLOAT != 0>::type Query;
typedef Float16<KVQ_STORAGE_BFLOAT != 0>::type Storage;
static_assert(kDim % 16 == 0 && kGroup >= 1 && kGroup <= 8, "no such variant");

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kMinusInfinity = -__builtin_huge_valf();
constexpr int kMasked = -2147483647 - 1;  // position of an exact token that is not attended
constexpr int kWeightExponent = 12;       // probabilities are scaled by 2^12, clear of half's subnormals

struct DecodeParams {
    const uint16_t *query;            // [B, Hq, D] as the model rotated it
    const PagePointers *key_pages;    // [pages], the first is page first_page of the blocks
    const PagePointers *value_pages;  // [pages]
    const int2 *blocks;               // [B, block_stride]: position of the first token, bits of attended tokens
    const Channel *key_channels;      // [H, D]: RoPE pairs (2 i, 2 i + 1), of like widths side by side
    const Channel *value_channels;    // [H, D]
    const uint4 *key_levels;          // [H, D, entries] halves in the order of key_channels; planes up to 16 entries
    const uint4 *value_levels;        // [H, D, entries]
    const uint2 *key_angles;          // [H, D / 2]: turns per token, turns at position 0
    const float2 *key_pair_scale;     // [H, D / 2]: factor of the levels of a pair, its reciprocal
    const float2 *value_affine;       // [H, D]: factor and offset of a channel of the mixed output
    const uint16_t *exact_key[2];     // sinks and tail, [B, H, n, D]
    const uint16_t *exact_value[2];
    const int *exact_positions;       // [B, n0 + n1], kMasked where not attended
    const uint32_t *exact_angles;     // [D / 2]: turns per token
    const uint32_t *exact_pairs;      // [D / 2]: coordinates of a pair, first | second << 16
    float *partial;                   // [B, Hq, splits, D], not divided by the sum
    float2 *partial_sum;              // [B, Hq, splits]: maximum (log2), sum
    int64_t exact_stride[2][2];       // elements from sequence to sequence, from head to head
    int key_words, value_words;       // 32-bit words of a sequence in a page
    int kv_heads, query_heads, subgroups;
    int first_page, pages;            // pages to read
    int packed_splits, splits;
    int exact_count[2];
    int first_token;                  // tokens of blocks before it, counted from block 0, are not attended
    float scaling, softcap;           // of the scores
    float rope_scaling;               // on rotated pairs of exact keys
    int key_rope;                     // exact keys are rotated on read
    int block_stride;
    int group;  // query heads that share a key-value head; given, because a quotient takes a register throughout
};

// ---- shared memory -------------------------------------------------------------------------------------------

constexpr int kMostPlanes = 32;  // levels in a row of byte planes; wider tables stay outside
constexpr int kKeyRows = KVQ_KEY_ENTRIES <= kMostPlanes ? KVQ_KEY_ENTRIES / 8 : 0;
constexpr int kValueRows = KVQ_VALUE_ENTRIES <= kMostPlanes ? KVQ_VALUE_ENTRIES / 8 : 0;
constexpr int kTokenRow = 33;  // a block of 32 tokens and one column against bank conflicts
constexpr int kScores = KVQ_KEY_OUTLIERS || KVQ_VALUE_OUTLIERS ? kPageBlocks * kTokenRow * kGroup : 0;

struct KeyPlace {  // where outliers of a coordinate find their query and angle
    uint32_t frequency, turn;
    uint32_t query;  // index into Shared::query of variant 0, head 0; bit 31: the second half of a uint2
    float scale;
};

struct Shared {
    union {
        uint2 query[kVariants * kSteps * kGroup * 4];
        float plain_query[kGroup * kDim];
        float out[kWarps * kGroup * kDim];
    };
    uint4 key_levels[kDim * kKeyRows + 1];
    uint4 value_levels[kDim * kValueRows + 1];
    Channel key_channels[kDim];
    Channel value_channels[kDim];
    uint2 key_angles[kDim / 2];
    KeyPlace places[KVQ_KEY_OUTLIERS ? kDim : 1];
    float scores[kWarps][kScores + 1];
    float4 tiles[kWarps][kSteps][kWarp];  // mixed values, as matrix accumulators: see mix_page
    uint16_t value_place[KVQ_VALUE_OUTLIERS ? kDim : 1];  // of a coordinate in the order of value_channels
    float query_scale[8];
    float maximum[kWarps][8], sum[kWarps][8], offset[kWarps][8];
};

KVQ_CONSTANT(decode_shared_bytes, sizeof(Shared));

KVQ_DEVICE int query_index(int variant, int step, int head, int column) {
    return ((variant * kSteps + step) * kGroup + head) * 4 + column;
}

// ---- units of 32 codes ---------------------------------------------------------------------------------------

template <int Words> KVQ_DEVICE void load_words(const uint32_t *source, uint32_t *words) {
    if constexpr (Words % 4 == 0) {
        for (int i = 0; i < Words / 4; ++i) {
            const uint4 four = __ldg(reinterpret_cast<const uint4 *>(source) + i);
            words[4 * i] = four.x, words[4 * i + 1] = four.y, words[4 * i + 2] = four.z, words[4 * i + 3] = four.w;
        }
    } else if constexpr (Words % 2 == 0) {
        for (int i = 0; i < Words / 2; ++i) {
            const uint2 two = __ldg(reinterpret_cast<const uint2 *>(source) + i);
            words[2 * i] = two.x, words[2 * i + 1] = two.y;
        }
    } else {
        for (int i = 0; i < Words; ++i) words[i] = __ldg(source + i);
    }
}

// `Count` adjacent units of one channel: their words, then their levels slice by slice.
template <int Bits, int Entries, int Count, bool Trellis> struct Units {
    uint32_t words[Count * Bits];

    // `region` is the channel's in its page, `block` the first unit.
    KVQ_DEVICE void load(const uint32_t *region, Channel, int block) {
        load_words<Count * Bits>(region + block * Bits, words);
    }

    struct Decoded {
        Levels<Entries> levels;
        uint32_t selectors[Count][4], high[Count][4];

        // Levels of tokens 4 four .. 4 four + 3 as two pairs.
        KVQ_DEVICE void four(int unit, int four, uint32_t *pair) const {
            levels.lookup(selectors[unit][four / 2], high[unit][four / 2], four % 2, pair);
        }
    };

    KVQ_DEVICE Decoded decode(const uint4 *shared_levels, const uint4 *, int channel, Channel) const {
        Decoded d;
        d.levels.load(shared_levels, channel);
#pragma unroll
        for (int u = 0; u < Count; ++u) {
            unpack_selectors<Bits>(words + u * Bits, d.selectors[u]);
            for (int s = 0; s < 4; ++s) d.high[u][s] = 0;
            if (Trellis) trellis_index(d.selectors[u], d.high[u]);
        }
        return d;
    }
};

// Channels of different widths: the order of channels makes the branches almost always uniform over a warp.
template <int Entries, int Count, bool Trellis> struct Units<0, Entries, Count, Trellis> {
    static constexpr bool kWide = Entries > kMostPlanes;
    static constexpr int kLevels = Trellis ? Entries / 2 : Entries;  // that codes can tell apart
    static constexpr int kMost = kLevels <= 16 ? 4 : kLevels <= 32 ? 5 : 8;
    static constexpr bool kFifth = kMost == 5 && !kWide && !Trellis;
    uint32_t words[Count * kMost];

    KVQ_DEVICE void load(const uint32_t *region, Channel channel, int block) {
#pragma unroll
        for (int u = 0; u < Count; ++u)
#pragma unroll
            for (int i = 0; i < kMost; ++i)
                words[u * kMost + i] =
                    i < channel.bits ? __ldg(region + (block + u) * int(channel.bits) + i) : 0u;
    }

    struct Decoded {
        Levels<kWide ? 8 : Entries> levels;
        const uint16_t *row;
        // The upper nibbles of the four slices, or with kFifth the word of the fifth bits: three registers less.
        uint32_t selectors[Count][4], high[Count][kFifth ? 1 : 4];

        KVQ_DEVICE void four(int unit, int four, uint32_t *pair) const {
            if constexpr (kWide) {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const int token = 4 * four + 2 * i;
                    const uint32_t first = __ldg(row + code_of(selectors[unit], high[unit], token));
                    const uint32_t second = __ldg(row + code_of(selectors[unit], high[unit], token + 1));
                    pair[i] = first | second << 16;
                }
            } else if constexpr (kFifth) {
                const uint32_t fifth = high[unit][0] >> (four / 2) & 0x11111111u;
                levels.lookup(selectors[unit][four / 2], fifth, four % 2, pair);
            } else {
                levels.lookup(selectors[unit][four / 2], high[unit][four / 2], four % 2, pair);
            }
        }
    };

    KVQ_DEVICE Decoded decode(const uint4 *shared_levels, const uint4 *levels, int index, Channel channel) const {
        Decoded d;
        if constexpr (kWide)
            d.row = reinterpret_cast<const uint16_t *>(levels) + int64_t(index) * Entries;
        else
            d.levels.load(shared_levels, index);
#pragma unroll
        for (int u = 0; u < Count; ++u) {
            if constexpr (kMost == 8) {
                unpack_unit(words + u * kMost, channel.bits, d.selectors[u], d.high[u]);
            } else {
                unpack_narrow(words + u * kMost, min(int(channel.bits), 4), d.selectors[u]);
                // Zero where there is no fifth bit.
                if constexpr (kFifth)
                    d.high[u][0] = words[u * kMost + 4];
                else if constexpr (kMost == 5)
                    unpack_selectors<1>(words + u * kMost + 4, d.high[u]);
                else
                    for (int s = 0; s < 4; ++s) d.high[u][s] = 0;
            }
            if (Trellis) trellis_index(d.selectors[u], d.high[u]);
        }
        return d;
    }
};

typedef Units<KVQ_KEY_BITS, KVQ_KEY_ENTRIES, 1, KVQ_KEY_TRELLIS != 0> KeyUnit;
typedef Units<KVQ_VALUE_BITS, KVQ_VALUE_ENTRIES, 2, KVQ_VALUE_TRELLIS != 0> ValueUnits;

// ---- queries -------------------------------------------------------------------------------------------------

// Fills Shared::query: per variant t, step and head, halves of R(-t) q times the pair's level factor, scaled to
// [-1, 1]. What was divided out, times the softmax scaling, goes to query_scale.
KVQ_DEVICE void prepare_queries(const DecodeParams &p, Shared &s, const uint16_t *query, int heads, int head) {
    const float2 *pair_scale = p.key_pair_scale + head * (kDim / 2);
    for (int h = warp_id(); h < 8; h += kWarps) {
        const uint16_t *q = query + (h < heads ? h : heads - 1) * kDim;
        float largest = 0.0f;
        for (int i = lane_id(); i < kDim / 2; i += kWarp) {
            const float a = Query::to_float(q[s.key_channels[2 * i].coordinate]);
            const float b = Query::to_float(q[s.key_channels[2 * i + 1].coordinate]);
            largest = fmaxf(largest, (fabsf(a) + fabsf(b)) * pair_scale[i].x);
        }
        for (int step = 16; step; step /= 2) largest = fmaxf(largest, __shfl_xor_sync(kAll, largest, step));
        if (lane_id() == 0) s.query_scale[h] = largest;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kVariants * kSteps * kGroup * 4; i += kThreads) {
        const int column = i % 4, h = i / 4 % kGroup, step = i / (4 * kGroup) % kSteps;
        const int variant = i / (4 * kGroup * kSteps);
        const uint16_t *q = query + (h < heads ? h : heads - 1) * kDim;
        const float norm = s.query_scale[h] > 0.0f ? 1.0f / s.query_scale[h] : 0.0f;
        uint32_t turned[2];
        for (int half = 0; half < 2; ++half) {
            const int pair = 8 * step + 4 * half + column;
            const float factor = pair_scale[pair].x * norm;
            const float a = factor * Query::to_float(q[s.key_channels[2 * pair].coordinate]);
            const float b = factor * Query::to_float(q[s.key_channels[2 * pair + 1].coordinate]);
            float sine = 0.0f, cosine = 1.0f;
            if (KVQ_ROPE) exact_sincos(uint32_t(variant) * s.key_angles[pair].x, &sine, &cosine);
            turned[half] = pack_half2(a * cosine + b * sine, b * cosine - a * sine);
        }
        s.query[i] = make_uint2(turned[0], turned[1]);
    }
    __syncthreads();
    if (threadIdx.x < 8) s.query_scale[threadIdx.x] *= p.scaling;
}

// ---- one page ------------------------------------------------------------------------------------------------

// Turns the pairs of four tokens by the angle of `cosine` and `sine` and lays them out as matrix operands:
// operand[i] is (first, second) of token i.
KVQ_DEVICE void turn_pairs(const uint32_t *first, const uint32_t *second, uint32_t cosine, uint32_t sine,
                           uint32_t *operand) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        uint32_t a = first[i], b = second[i];
        if (KVQ_ROPE) {
            const __half2 c = as_half2(cosine), sn = as_half2(sine);
            a = as_bits(__hfma2(as_half2(first[i]), c, __hneg2(__hmul2(as_half2(second[i]), sn))));
            b = as_bits(__hfma2(as_half2(second[i]), c, __hmul2(as_half2(first[i]), sn)));
        }
        operand[2 * i] = permute(a, b, 0x5410);
        operand[2 * i + 1] = permute(a, b, 0x7632);
    }
}

// Pairs of channels a thread decodes at a time. Two fill a matrix product; where widths differ, or levels are many,
// their code or table takes the registers of one.
constexpr int kPairs = KVQ_KEY_BITS && KVQ_KEY_ENTRIES <= 16 ? 2 : 1;

struct KeyStep {  // what a thread reads of its pairs
    KeyUnit unit[2 * kPairs];
    Channel channel[2 * kPairs];

    KVQ_DEVICE void load(const Shared &s, const uint32_t *codes, int step, int block, int column) {
#pragma unroll
        for (int i = 0; i < 2 * kPairs; ++i) {
            channel[i] = s.key_channels[2 * (4 * kPairs * step + 4 * (i / 2) + column) + i % 2];
            unit[i].load(codes + kPageBlocks * channel[i].word, channel[i], block);
        }
    }
};

// Scores of a page: score[t] holds token t (0, 1) and t + 16 (2, 3) of block lane / 4, for heads 2 (lane % 4) and
// the next.
KVQ_DEVICE void score_page(const Shared &s, const uint4 *levels, const uint32_t *codes, int base,
                           float (&score)[16][4]) {
    const int block = lane_id() / 4, column = lane_id() % 4;
    const int head = block < kGroup ? block : kGroup - 1;  // as a column of the query matrix
#pragma unroll
    for (int t = 0; t < 16; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i) score[t][i] = 0.0f;
    KeyStep next;
    if (KVQ_KEY_BITS) next.load(s, codes, 0, block, column);
#pragma unroll 1
    for (int step = 0; step < 2 * kSteps / kPairs; ++step) {
        if (!KVQ_KEY_BITS) next.load(s, codes, step, block, column);
        const KeyStep now = next;
        if (KVQ_KEY_BITS && step + 1 < 2 * kSteps / kPairs) next.load(s, codes, step + 1, block, column);
        uint32_t cosine[kPairs][2], sine[kPairs][2];  // of tokens 0 and 16
        KeyUnit::Decoded unit[2 * kPairs];
#pragma unroll
        for (int i = 0; i < 2 * kPairs; ++i) {
            const int index = 2 * (4 * kPairs * step + 4 * (i / 2) + column) + i % 2;
            unit[i] = now.unit[i].decode(s.key_levels, levels, index, now.channel[i]);
            if (KVQ_ROPE && i % 2 == 0) {
                const uint2 angle = s.key_angles[index / 2];
                const uint32_t turn = uint32_t(base) * angle.x + angle.y;
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    float sn, c;
                    fast_sincos(turn + (half ? 16 * angle.x : 0u), &sn, &c);
                    cosine[i / 2][half] = pack_half2(c, c);
                    sine[i / 2][half] = pack_half2(sn, sn);
                }
            }
        }
#pragma unroll
        for (int four = 0; four < 4; ++four) {
            if (KVQ_KEY_ENTRIES > kMostPlanes) __syncwarp();  // keeps the compiler from fetching all levels at once
            uint32_t operand[2 * kPairs][4];
#pragma unroll
            for (int i = 0; i < 2 * kPairs; ++i) {  // matrix register: pair i / 2, tokens from 0 or from 16
                uint32_t first[2], second[2];
                unit[2 * (i / 2)].four(0, four + 4 * (i % 2), first);
                unit[2 * (i / 2) + 1].four(0, four + 4 * (i % 2), second);
                turn_pairs(first, second, cosine[i / 2][i % 2], sine[i / 2][i % 2], operand[i]);
            }
#pragma unroll
            for (int t = 0; t < 4; ++t) {
                const uint2 q = s.query[query_index(4 * four + t, step * kPairs / 2, head, column)];
                if constexpr (kPairs == 2)
                    mma_16x8x16(score[4 * four + t], operand[0][t], operand[1][t], operand[2][t], operand[3][t], q.x,
                                q.y);
                else
                    mma_16x8x8(score[4 * four + t], operand[0][t], operand[1][t], step % 2 ? q.y : q.x);
            }
        }
    }
}

// Mixes the values of a page into `tiles`, after scaling what is there: a tile holds channels 16 tile + lane / 4
// (x, y) and 8 more (z, w) of the channel order, for the heads of score_page. weights[i] are the matrix operands of
// tokens 2 i and 2 i + 1. The sums rest in shared memory, where they cost two accesses per tile, because registers
// decide how many warps a multiprocessor holds.
KVQ_DEVICE void mix_page(const Shared &s, const uint4 *levels, const uint32_t *codes,
                         const uint32_t (&weights)[16][2], const float (&rescale)[2], float4 (*tiles)[kWarp]) {
    const int row = lane_id() / 4, block = 2 * (lane_id() % 4);
    ValueUnits next[2];
    Channel next_channel[2];
    auto load = [&](int tile) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            next_channel[i] = s.value_channels[16 * tile + 8 * i + row];
            next[i].load(codes + kPageBlocks * next_channel[i].word, next_channel[i], block);
        }
    };
    if (KVQ_VALUE_BITS) load(0);
#pragma unroll 1
    for (int tile = 0; tile < kSteps; ++tile) {
        if (!KVQ_VALUE_BITS) load(tile);
        ValueUnits::Decoded unit[2];
#pragma unroll
        for (int i = 0; i < 2; ++i)
            unit[i] = next[i].decode(s.value_levels, levels, 16 * tile + 8 * i + row, next_channel[i]);
        if (KVQ_VALUE_BITS && tile + 1 < kSteps) load(tile + 1);
        const float4 before = tiles[tile][lane_id()];
        float out[4] = {before.x * rescale[0], before.y * rescale[1], before.z * rescale[0], before.w * rescale[1]};
#pragma unroll
        for (int four = 0; four < 8; ++four) {
            if (KVQ_VALUE_ENTRIES > kMostPlanes) __syncwarp();  // keeps the compiler from fetching all levels at once
            uint32_t operand[4][2];
#pragma unroll
            for (int i = 0; i < 4; ++i) unit[i % 2].four(i / 2, four, operand[i]);
#pragma unroll
            for (int i = 0; i < 2; ++i)
                mma_16x8x16(out, operand[0][i], operand[1][i], operand[2][i], operand[3][i],
                            weights[2 * four + i][0], weights[2 * four + i][1]);
        }
        tiles[tile][lane_id()] = make_float4(out[0], out[1], out[2], out[3]);
    }
}

KVQ_DEVICE int score_index(int block, int token, int head) { return (block * kTokenRow + token) * kGroup + head; }

// A quarter of the outlier list of the block that four lanes share: entries are sorted by token, so lanes rarely meet.
struct OutlierRange {
    int begin, end;

    KVQ_DEVICE OutlierRange(const DecodeParams &p, const PagePointers &page, int row, int head) {
        const int block = lane_id() / 4, part = lane_id() % 4;
        const int batch = gridDim.z;
        const int list = (block * batch + row) * p.kv_heads + head;
        const int first = list_start(page, list), count = list_start(page, list + 1) - first;
        begin = first + count * part / 4;
        end = first + count * (part + 1) / 4;
    }
};

// Adds the scores of outlying key elements to `scores`.
KVQ_DEVICE void score_outliers(const DecodeParams &p, const Shared &s, const PagePointers &page, int row, int head,
                               int base, float *scores) {
    const OutlierRange range(p, page, row, head);
    const int block = lane_id() / 4;
    for (int i = range.begin; i < range.end; ++i) {
        const uint32_t index = __ldg(page.outlier_index + i);
        const float residual = Storage::to_float(__ldg(page.outlier_residual + i));
        const int token = index >> kCoordinateBits;
        const KeyPlace place = s.places[index & ((1 << kCoordinateBits) - 1)];
        float sine, cosine;  // the second element of a pair is the first, a quarter turn on
        fast_sincos(uint32_t(base + (token & 16)) * place.frequency + place.turn, &sine, &cosine);
        const float c = residual * place.scale * cosine, sn = residual * place.scale * sine;
        const uint2 *query = s.query + (place.query & 0x7fffffffu) + query_index(token & 15, 0, 0, 0);
#pragma unroll
        for (int h = 0; h < kGroup; ++h) {
            const uint2 both = query[4 * h];
            const float2 q = __half22float2(as_half2(place.query >> 31 ? both.y : both.x));
            atomicAdd(scores + score_index(block, token, h), c * q.x + sn * q.y);
        }
    }
}

// Adds probability times residual of outlying value elements to `tiles`, at the scale `unit` of the weights.
KVQ_DEVICE void mix_outliers(const DecodeParams &p, const Shared &s, const PagePointers &page, int row, int head,
                             const float *probabilities, float unit, float4 (*tiles)[kWarp]) {
    const OutlierRange range(p, page, row, head);
    const int block = lane_id() / 4;
    for (int i = range.begin; i < range.end; ++i) {
        const uint32_t index = __ldg(page.outlier_index + i);
        const float residual = unit * Storage::to_float(__ldg(page.outlier_residual + i));
        const int place = s.value_place[index & ((1 << kCoordinateBits) - 1)];
        const float *probability = probabilities + score_index(block, index >> kCoordinateBits, 0);
        float *row_sums = reinterpret_cast<float *>(&tiles[place / 16][4 * (place % 8)]) + place / 8 % 2 * 2;
#pragma unroll
        for (int h = 0; h < kGroup; ++h) atomicAdd(row_sums + h / 2 * 4 + h % 2, probability[h] * residual);
    }
}

// ---- a split -------------------------------------------------------------------------------------------------

struct Share {  // the query heads of a thread block
    int head;   // their key-value head
    int first, heads;

    KVQ_DEVICE Share(const DecodeParams &p, int block) {
        head = block / p.subgroups;
        const int before = block % p.subgroups * kGroup;
        first = head * p.group + before;
        heads = min(kGroup, p.group - before);
    }
};

// Combines what the warps of a block found and writes it as one split. Packed values are still to be scaled.
KVQ_DEVICE void write_split(const DecodeParams &p, Shared &s, bool packed) {
    __syncthreads();
    const Share share(p, block_y_anew());
    const float2 *affine = p.value_affine + share.head * kDim;
    const int row = blockIdx.z;
    for (int i = thread_anew(); i < share.heads * kDim; i += kThreads) {
        const int h = i / kDim, coordinate = i % kDim;
        float maximum = kMinusInfinity, sum = 0.0f, offset = 0.0f, mixed = 0.0f;
        for (int w = 0; w < kWarps; ++w) maximum = fmaxf(maximum, s.maximum[w][h]);
        for (int w = 0; w < kWarps; ++w) {
            if (s.maximum[w][h] == kMinusInfinity) continue;
            const float weight = power_of_two(s.maximum[w][h] - maximum);
            sum += weight * s.sum[w][h];
            offset += weight * s.offset[w][h];
            mixed += weight * s.out[(w * kGroup + h) * kDim + coordinate];
        }
        const float2 channel = packed ? affine[coordinate] : make_float2(1.0f, 0.0f);
        const int64_t split = (int64_t(row) * p.query_heads + share.first + h) * p.splits + blockIdx.x;
        p.partial[split * kDim + coordinate] = channel.y * sum + channel.x * (offset + mixed);
        if (coordinate == 0) p.partial_sum[split] = make_float2(maximum, sum);
    }
}

KVQ_DEVICE void attend_packed(const DecodeParams &p, Shared &s, int head, int first_head, int heads) {
    const int row = blockIdx.z, group = lane_id() / 4, column = lane_id() % 4;
    const uint16_t *query = p.query + (int64_t(row) * p.query_heads + first_head) * kDim;
    for (int i = threadIdx.x; i < kDim; i += kThreads) {
        s.key_channels[i] = p.key_channels[head * kDim + i];
        s.value_channels[i] = p.value_channels[head * kDim + i];
        if (KVQ_VALUE_OUTLIERS) s.value_place[s.value_channels[i].coordinate] = uint16_t(i);
        if (i < kDim / 2) s.key_angles[i] = p.key_angles[head * (kDim / 2) + i];
    }
    for (int i = threadIdx.x; i < kDim * kKeyRows; i += kThreads)
        s.key_levels[i] = p.key_levels[head * kDim * kKeyRows + i];
    for (int i = threadIdx.x; i < kDim * kValueRows; i += kThreads)
        s.value_levels[i] = p.value_levels[head * kDim * kValueRows + i];
    __syncthreads();
    prepare_queries(p, s, query, heads, head);
    if (KVQ_KEY_OUTLIERS) {
        for (int i = threadIdx.x; i < kDim; i += kThreads) {
            const int pair = i / 2;
            KeyPlace place;
            place.frequency = s.key_angles[pair].x;
            place.turn = s.key_angles[pair].y + (i % 2 ? 0x40000000u : 0u);
            place.query = query_index(0, pair / 8, 0, pair % 4) | (pair / 4 % 2 ? 0x80000000u : 0u);
            place.scale = p.key_pair_scale[head * (kDim / 2) + pair].y;
            s.places[s.key_channels[i].coordinate] = place;
        }
    }
    __syncthreads();

    // The query columns of heads beyond the group repeat its last head and are dropped at the end.
    float scale[2];
    int own_head[2];
    for (int i = 0; i < 2; ++i) {
        own_head[i] = 2 * column + i < kGroup ? 2 * column + i : kGroup - 1;
        scale[i] = s.query_scale[own_head[i]] * (KVQ_SOFTCAP ? 1.0f / p.softcap : kLog2e);
    }
    const float cap = p.softcap * kLog2e;
    float *scores = s.scores[warp_id()];
    float4(*tiles)[kWarp] = s.tiles[warp_id()];
    for (int i = 0; i < kSteps; ++i) tiles[i][lane_id()] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    float maximum[2] = {kMinusInfinity, kMinusInfinity}, sum[2] = {0.0f, 0.0f}, offset[2] = {0.0f, 0.0f};
    int exponent = KVQ_VALUE_TOKEN ? -100 : 1;  // weights seen so far are below 2^exponent

    const int begin = p.first_page + int(int64_t(p.pages) * blockIdx.x / p.packed_splits);
    const int end = p.first_page + int(int64_t(p.pages) * (blockIdx.x + 1) / p.packed_splits);
    for (int page = begin + warp_id(); page < end; page += kWarps) {
        const int2 block = __ldg(p.blocks + int64_t(row) * p.block_stride + page * kPageBlocks + group);
        const int base = block.x;
        uint32_t keep = uint32_t(block.y);
        const int hidden = p.first_token - (page * kPageBlocks + group) * kBlockTokens;  // left the window
        if (hidden > 0) keep &= hidden < 32 ? kAll << hidden : 0u;
        if (!__any_sync(kAll, keep != 0)) continue;
        const PagePointers &keys = p.key_pages[page - p.first_page], &values = p.value_pages[page - p.first_page];

        float score[16][4];
        score_page(s, p.key_levels + (KVQ_KEY_ENTRIES > kMostPlanes ? int64_t(head) * kDim * KVQ_KEY_ENTRIES / 8 : 0),
                   opaque(keys.codes + int64_t(row) * p.key_words), base, score);
        if (KVQ_KEY_OUTLIERS) {
            for (int i = lane_id(); i < kScores; i += kWarp) scores[i] = 0.0f;
            __syncwarp();
            score_outliers(p, s, keys, row, head, base, scores);
            __syncwarp();
#pragma unroll
            for (int t = 0; t < 16; ++t)
#pragma unroll
                for (int i = 0; i < 4; ++i) score[t][i] += scores[score_index(group, t + 8 * (i & 2), own_head[i % 2])];
            __syncwarp();
        }

        // Scores in powers of two, masked; the new maximum; probabilities.
        float top[2] = {maximum[0], maximum[1]};
        const bool whole = __all_sync(kAll, keep == kAll);
#pragma unroll
        for (int t = 0; t < 16; ++t)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float x = score[t][i] * scale[i % 2];
                if (KVQ_SOFTCAP) x = cap * tanhf(x);
                if (!whole && !(keep >> (t + 8 * (i & 2)) & 1u)) x = kMinusInfinity;
                score[t][i] = x;
                top[i % 2] = fmaxf(top[i % 2], x);
            }
#pragma unroll
        for (int i = 0; i < 2; ++i)
            for (int step = 4; step < kWarp; step *= 2) top[i] = fmaxf(top[i], __shfl_xor_sync(kAll, top[i], step));

        float rescale[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            rescale[i] = power_of_two(maximum[i] - top[i]);
            maximum[i] = top[i];
            sum[i] *= rescale[i];
            offset[i] *= rescale[i];
        }
        const uint4 *token_params = opaque(reinterpret_cast<const uint4 *>(
            values.token_params + (int64_t(row) * kPageTokens + group * kBlockTokens) * 2));
        float largest = 0.0f;
#pragma unroll
        for (int quad = 0; quad < 8; ++quad) {
            uint4 four;
            if (KVQ_VALUE_TOKEN) four = __ldg(token_params + quad);
            const uint32_t params[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int token = 4 * quad + j;
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    float &x = score[token % 16][2 * (token / 16) + i];
                    x = power_of_two(x - maximum[i]);
                    sum[i] += x;
                    if (KVQ_VALUE_OUTLIERS && 2 * column + i < kGroup)
                        scores[score_index(group, token, 2 * column + i)] = x;
                    if (KVQ_VALUE_TOKEN) {
                        offset[i] += x * Storage::to_float(uint16_t(params[j] >> 16));
                        x *= Storage::to_float(uint16_t(params[j]));
                        largest = fmaxf(largest, x);
                    }
                }
            }
        }
        if (KVQ_VALUE_TOKEN) {  // keep the weights within half precision, whatever the token scales
            const int bound = int(__reduce_max_sync(kAll, __float_as_uint(largest)) >> 23) - 126;
            if (bound > exponent) {
                const float shrink = __uint_as_float(uint32_t(127 + max(exponent - bound, -126)) << 23);
                rescale[0] *= shrink;
                rescale[1] *= shrink;
                exponent = bound;
            }
        }
        const float unit = __uint_as_float(uint32_t(127 + kWeightExponent - exponent) << 23);
        uint32_t weights[16][2];
#pragma unroll
        for (int pair = 0; pair < 16; ++pair) {
            uint32_t transposed[2];
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const float *weight = score[(2 * pair + j) % 16] + 2 * (pair / 8);
                transposed[j] = transpose_8x8(pack_half2(unit * weight[0], unit * weight[1]));
            }
            weights[pair][0] = permute(transposed[0], transposed[1], 0x5410);
            weights[pair][1] = permute(transposed[0], transposed[1], 0x7632);
        }
        mix_page(s, p.value_levels + (KVQ_VALUE_ENTRIES > kMostPlanes ? int64_t(head) * kDim * KVQ_VALUE_ENTRIES / 8 : 0),
                 opaque(values.codes + int64_t(row) * p.value_words), weights, rescale, tiles);
        if (KVQ_VALUE_OUTLIERS) {
            __syncwarp();
            mix_outliers(p, s, values, row, head, scores, unit, tiles);
        }
        __syncwarp();
    }

    __syncthreads();  // Shared::out takes the place of the queries
    const int thread = thread_anew(), warp = thread / kWarp, lane = thread % kWarp;
    const int row_group = lane / 4, head_column = 2 * (lane % 4);
    const float undo = __uint_as_float(uint32_t(127 + exponent - kWeightExponent) << 23);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        for (int step = 4; step < kWarp; step *= 2) {
            sum[i] += __shfl_xor_sync(kAll, sum[i], step);
            offset[i] += __shfl_xor_sync(kAll, offset[i], step);
        }
        if (head_column + i >= kGroup) continue;
        if (row_group == 0) {
            s.maximum[warp][head_column + i] = maximum[i];
            s.sum[warp][head_column + i] = sum[i];
            s.offset[warp][head_column + i] = offset[i];
        }
        float *target = s.out + (warp * kGroup + head_column + i) * kDim;
#pragma unroll
        for (int tile = 0; tile < kSteps; ++tile) {
            const float4 out = s.tiles[warp][tile][lane];
            target[s.value_channels[16 * tile + row_group].coordinate] = undo * (i ? out.y : out.x);
            target[s.value_channels[16 * tile + 8 + row_group].coordinate] = undo * (i ? out.w : out.z);
        }
    }
    write_split(p, s, true);
}

// Sinks and tail: 16-bit keys and values, a token at a time per warp.
KVQ_DEVICE void attend_exact(const DecodeParams &p, Shared &s, int head, int first_head, int heads) {
    constexpr int kOwn = (kDim + kWarp - 1) / kWarp;
    constexpr int kPairs = (kDim / 2 + kWarp - 1) / kWarp;
    const int row = blockIdx.z, lane = lane_id();
    const int count = p.exact_count[0] + p.exact_count[1];
    const uint16_t *query = p.query + (int64_t(row) * p.query_heads + first_head) * kDim;
    for (int i = threadIdx.x; i < heads * kDim; i += kThreads) s.plain_query[i] = p.scaling * Query::to_float(query[i]);
    __syncthreads();
    const int parts = p.splits - p.packed_splits, part = blockIdx.x - p.packed_splits;
    const int begin = int(int64_t(count) * part / parts), end = int(int64_t(count) * (part + 1) / parts);
    float out[kGroup][kOwn], maximum[kGroup], sum[kGroup];
#pragma unroll
    for (int h = 0; h < kGroup; ++h) {
        maximum[h] = kMinusInfinity, sum[h] = 0.0f;
#pragma unroll
        for (int i = 0; i < kOwn; ++i) out[h][i] = 0.0f;
    }
    for (int token = begin + warp_id(); token < end; token += kWarps) {
        const int position = __ldg(p.exact_positions + int64_t(row) * count + token);
        if (position == kMasked) continue;
        const int side = token >= p.exact_count[0];
        const int64_t place = p.exact_stride[side][0] * row + p.exact_stride[side][1] * head +
                              int64_t(side ? token - p.exact_count[0] : token) * kDim;
        float score[kGroup];
#pragma unroll
        for (int h = 0; h < kGroup; ++h) score[h] = 0.0f;
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
            const int pair = i * kWarp + lane;
            if (pair >= kDim / 2) continue;
            const int first = __ldg(p.exact_pairs + pair) & 0xffffu, second = __ldg(p.exact_pairs + pair) >> 16;
            float a = Storage::to_float(p.exact_key[side][place + first]);
            float b = Storage::to_float(p.exact_key[side][place + second]);
            const uint32_t frequency = __ldg(p.exact_angles + pair);
            if (p.key_rope && frequency) {
                float sine, cosine;
                exact_sincos(uint32_t(position) * frequency, &sine, &cosine);
                const float turned = (a * cosine - b * sine) * p.rope_scaling;
                b = (a * sine + b * cosine) * p.rope_scaling;
                a = turned;
            }
#pragma unroll
            for (int h = 0; h < kGroup; ++h)
                if (h < heads) score[h] += a * s.plain_query[h * kDim + first] + b * s.plain_query[h * kDim + second];
        }
#pragma unroll
        for (int h = 0; h < kGroup; ++h) {
            for (int step = 16; step; step /= 2) score[h] += __shfl_xor_sync(kAll, score[h], step);
            if (KVQ_SOFTCAP) score[h] = p.softcap * tanhf(score[h] / p.softcap);
            const float x = score[h] * kLog2e, top = fmaxf(maximum[h], x);
            const float rescale = power_of_two(maximum[h] - top), probability = power_of_two(x - top);
            maximum[h] = top;
            sum[h] = sum[h] * rescale + probability;
#pragma unroll
            for (int i = 0; i < kOwn; ++i) {
                const int coordinate = i * kWarp + lane;
                if (coordinate < kDim)
                    out[h][i] = out[h][i] * rescale +
                                probability * Storage::to_float(p.exact_value[side][place + coordinate]);
            }
        }
    }
    __syncthreads();
#pragma unroll
    for (int h = 0; h < kGroup; ++h) {
        if (lane == 0) {
            s.maximum[warp_id()][h] = maximum[h];
            s.sum[warp_id()][h] = sum[h];
            s.offset[warp_id()][h] = 0.0f;
        }
#pragma unroll
        for (int i = 0; i < kOwn; ++i)
            if (i * kWarp + lane < kDim) s.out[(warp_id() * kGroup + h) * kDim + i * kWarp + lane] = out[h][i];
    }
    write_split(p, s, false);
}

// Grid: splits, key-value heads x subgroups of query heads, sequences; 128 threads; sizeof(Shared) bytes.
KVQ_KERNEL void __launch_bounds__(kThreads, 2) decode_attention(const __grid_constant__ DecodeParams p) {
    KVQ_SHARED;
    Shared &s = *reinterpret_cast<Shared *>(kvq_shared);
    const Share share(p, blockIdx.y);
    if (blockIdx.x < p.packed_splits)
        attend_packed(p, s, share.head, share.first, share.heads);
    else
        attend_exact(p, s, share.head, share.first, share.heads);
}

// ---- reduction -----------------------------------------------------------------------------------------------

struct ReduceParams {
    const float *partial;
    const float2 *partial_sum;
    const float *sink_logits;  // [Hq], natural units, or null: a logit per head that takes probability, no value
    uint16_t *out;             // [B, Hq, D] in the queries' dtype
    int packed_splits, splits;
};

// Grid: query heads, sequences; 128 threads; 4 * splits bytes of shared memory.
KVQ_KERNEL void __launch_bounds__(kThreads) reduce_splits(const __grid_constant__ ReduceParams p) {
    KVQ_SHARED;
    float *weight = reinterpret_cast<float *>(kvq_shared);
    const int64_t head = int64_t(blockIdx.y) * gridDim.x + blockIdx.x;
    const float2 *sums = p.partial_sum + head * p.splits;
    const float own = p.sink_logits ? p.sink_logits[blockIdx.x] * kLog2e : kMinusInfinity;
    // Every warp computes the same sum: no exchange between warps, and few splits.
    float maximum = own;
    for (int i = lane_id(); i < p.splits; i += kWarp) maximum = fmaxf(maximum, sums[i].x);
    for (int step = 16; step; step /= 2) maximum = fmaxf(maximum, __shfl_xor_sync(kAll, maximum, step));
    float sum = 0.0f;
    for (int i = lane_id(); i < p.splits; i += kWarp) {
        const float w = sums[i].x == kMinusInfinity ? 0.0f : power_of_two(sums[i].x - maximum);
        sum += w * sums[i].y;
        if (warp_id() == 0) weight[i] = w;
    }
    for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(kAll, sum, step);
    if (own > kMinusInfinity) sum += power_of_two(own - maximum);
    __syncthreads();
    const float inverse = sum > 0.0f ? 1.0f / sum : 0.0f;
    for (int d = threadIdx.x; d < kDim; d += kThreads) {
        const float *column = p.partial + head * p.splits * kDim + d;
        float packed = 0.0f, exact = 0.0f;
#pragma unroll 8
        for (int i = 0; i < p.packed_splits; ++i) packed += weight[i] * column[int64_t(i) * kDim];
        for (int i = p.packed_splits; i < p.splits; ++i) exact += weight[i] * column[int64_t(i) * kDim];
        p.out[head * kDim + d] = Query::from_float((packed + exact) * inverse);
    }
}
