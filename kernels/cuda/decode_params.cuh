// Parameters of the decode kernel, and its layout of shared memory. decode.cu lists the compile-time constants.
// docs/reference/kernels.md explains the mapping of tokens and channels to lanes.
#pragma once

#include "step.cuh"

constexpr int kDim = KVQ_HEAD_DIM;
constexpr int kHeads = KVQ_HEADS;
constexpr bool kKeyComputed = KVQ_KEY_BITS == 0, kValueComputed = KVQ_VALUE_BITS == 0;
constexpr int kTiles = kDim / 16;      // of 16 value channels
constexpr int kKeySteps = kDim / 8;    // of four RoPE pairs
constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;
static_assert(kDim % 16 == 0 && (kHeads == 4 || kHeads == 8), "no such variant");

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kMinusInfinity = -__builtin_huge_valf();
constexpr int kWeightExponent = 12;       // probabilities are scaled by 2^12, to avoid subnormal halves

// ---- tokens and heads of a lane -----------------------------------------------------------------------------

// Product m of 8 takes two of 16 tokens, in slots 0 and 1. They are neighbours if levels are looked up, and t and t + 4
// if levels are computed.
constexpr bool kNeighbours = !kKeyComputed && !kValueComputed;
constexpr int kSlotStep = kNeighbours ? 1 : 4;
KVQ_DEVICE constexpr int token_of(int m, int slot) {
    return (kNeighbours ? 2 * m : 8 * (m / 4) + m % 4) + kSlotStep * slot;
}

// For up to four query heads, the eight columns of a product are two slots of four heads. For more, each slot has a
// product.
constexpr bool kFold = kHeads == 4;
constexpr int kSets = kFold ? 1 : 2;  // of scores; two if each slot has a product
KVQ_DEVICE int lane_slot() { return kFold ? lane_id() % 4 / 2 : 0; }
KVQ_DEVICE int lane_head(int i) { return 2 * (kFold ? lane_id() % 2 : lane_id() % 4) + i; }

// ---- parameters ----------------------------------------------------------------------------------------------

// With computed levels, channels are sorted so that a step of four pairs, or a tile of 16 value channels, has one kind:
// the widths of its pairs' first and second channels, or of its first and second eight channels. Negative widths are
// kNarrow, kMedium and kAnyWidth. kvq_calib/runtime/cuda/kinds.py has the same lists.
#define KVQ_KEY_KINDS \
    0, 0, 0, 1, 0, 2, 0, 3, 0, 4, 0, 5, 0, 6, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 6, 6, 6, \
        -1, -1, -2, -2, -3, -3
#define KVQ_VALUE_KINDS \
    0, 0, 1, 1, 1, 2, 2, 2, 2, 3, 2, 4, 3, 3, 3, 4, 3, 5, 4, 4, 4, 5, 5, 5, 5, 6, 6, 6, -2, -2, -3, -3
constexpr int kKinds = 24;  // room for this many

struct DecodeParams {
    const uint16_t *query;            // [B, Hq, D], rotated by the model
    const PagePointers *key_pages;    // [pages]; the first is page first_page of the blocks
    const PagePointers *value_pages;  // [pages]
    const int2 *blocks;               // [B, block_stride]: position of the first token, bits of attended tokens
    const Channel *key_channels;      // [H, D]: RoPE pairs (2 i, 2 i + 1), sorted by widths
    const Channel *value_channels;    // [H, D]
    const uint4 *key_levels;          // [H, D, entries] halves in the order of key_channels, in planes up to 32;
    const uint4 *value_levels;        // or [H, D] ChannelNumbers; those of values without c0, see value_affine
    const int2 *key_region;           // [H]: start and size, in bytes, of a head's codes in a sequence's page
    const int2 *value_region;         // [H]
    const uint8_t *key_kinds;         // [H, kKinds] ends of the steps of each kind, with computed levels
    const uint8_t *value_kinds;       // [H, kKinds] ends of the tiles of each kind
    const uint2 *key_angles;          // [H, D / 2]: turns per token, turns at position 0
    const float2 *key_turns;          // [H, kBlockTokens / 2, D / 2]: cosine and sine of the turns of a token
    const float2 *key_pair_scale;     // [H, D / 2]: factor of a pair's levels, and its reciprocal
    const float2 *value_affine;       // [H, D]: factor and offset of a channel of the result
    const uint16_t *exact_key[2];     // sinks and tail, [B, H, n, D]
    const uint16_t *exact_value[2];
    const int *pool_table;            // [B, pool_stride] numbers of pages in a pool; null: no pool
    const char *pool;                 // page 0; a page has kPageTokens of one sequence, and no outliers
    const uint16_t *const *pool_exact;  // [B, 4] addresses: keys of sinks and tail, then values
    int64_t pool_bytes;               // bytes of a page
    int64_t pool_offset[3];           // in a page: codes of keys, codes of values, token scales of values
    const StepState *state;           // of a captured step, with pages and first_token; or null
    const int *exact_positions;       // [B, n0 + n1]; kMasked: not attended
    const uint32_t *exact_angles;     // [D / 2]: turns per token
    const uint32_t *exact_pairs;      // [D / 2]: coordinates of a pair, first | second << 16
    float *partial;                   // [B, Hq, splits, D], not divided by the sum
    float2 *partial_sum;              // [B, Hq, splits]: maximum (log2), sum
    int *arrived;                     // [B, H x subgroups] number of finished splits; 0 before and after
    const float *sink_logits;         // [Hq] logits without a value, natural units; or null
    uint16_t *out;                    // [B, Hq, D] in the dtype of the queries
    int64_t exact_stride[2][2];       // elements per sequence and head, of sinks and tail
    int key_words, value_words;       // 32-bit words of a sequence in a page
    int kv_heads, query_heads, subgroups;
    int first_page, pages;            // pages to read; with a state, 0 and the room for pages
    int packed_splits, splits;
    int exact_count[2];
    int first_token;                  // first attended token of the blocks, counted from block 0
    float scaling, softcap;           // of the scores
    float rope_scaling;               // factor on rotated pairs of exact keys
    int key_rope;                     // whether exact keys are rotated when read
    int value_token;                  // whether values have a scale and a zero point per token
    int query_bfloat, storage_bfloat; // bfloat16 instead of float16: queries and results; storage
    int block_stride;
    int pool_stride;
    int group;  // query heads of a key-value head; a quotient computed here would take a register throughout
};

// ---- shared memory -------------------------------------------------------------------------------------------

// 16-byte rows of a channel's levels: coefficients, or byte planes; tables of more than 32 levels stay outside.
constexpr int level_rows(int bits) { return bits == 0 ? 2 : bits <= 3 ? 1 : bits <= 5 ? 1 << bits >> 3 : 0; }
constexpr int kKeyRows = level_rows(KVQ_KEY_BITS), kValueRows = level_rows(KVQ_VALUE_BITS);
constexpr int kTokenRow = 33;  // a block of 32 tokens, and one more against bank conflicts
constexpr int kScores = KVQ_OUTLIERS ? kPageBlocks * kTokenRow * kHeads : 0;

// The column operands of a product: queries of a pair's two channels for both slots.
template <bool Twice> struct QueryOperand {
    uint2 both;

    KVQ_DEVICE void set(const float2 (&q)[2]) {
        both = make_uint2(pack_half2(q[0].x, q[1].x), pack_half2(q[0].y, q[1].y));
    }
    KVQ_DEVICE uint2 all() const { return both; }
    KVQ_DEVICE uint2 of_slot(int slot) const {
        const uint32_t mask = slot ? 0xffff0000u : 0xffffu;
        return make_uint2(both.x & mask, both.y & mask);
    }
};
// The same with separate slots, so that no masks are needed.
template <> struct QueryOperand<true> {
    uint4 slots;

    KVQ_DEVICE void set(const float2 (&q)[2]) {
        slots.x = pack_half2(q[0].x, 0.0f), slots.y = pack_half2(q[0].y, 0.0f);
        slots.z = pack_half2(0.0f, q[1].x), slots.w = pack_half2(0.0f, q[1].y);
    }
    KVQ_DEVICE uint2 all() const { return make_uint2(slots.x | slots.z, slots.y | slots.w); }
    KVQ_DEVICE uint2 of_slot(int slot) const {
        return slot ? make_uint2(slots.z, slots.w) : make_uint2(slots.x, slots.y);
    }
};
typedef QueryOperand<!kFold && kDim <= 128> Queries;  // separate slots if there is room

struct alignas(16) ChannelPair { Channel first, second; };

struct Shared {
    union {
        Queries query[8 * kKeySteps * kWarp];
        float plain_query[kHeads * kDim];
        float out[kWarps * kHeads * kDim];
    };
    uint4 key_levels[kDim * kKeyRows + 1];
    uint4 value_levels[kDim * kValueRows + 1];
    ChannelPair key_channels[kDim / 2];
    Channel value_channels[kValueComputed ? kDim : 1];
    uint2 key_angles[kDim / 2];
    float scores[kWarps][kScores + 1];
    float4 tiles[kWarps][kTiles][kWarp];  // sums of values, as matrix accumulators: see mix_page
    uint16_t key_place[KVQ_OUTLIERS ? kDim : 1];     // of a coordinate, in the order of key_channels
    float pair_scale[KVQ_OUTLIERS ? kDim / 2 : 1];  // reciprocal of the factor of a pair's levels
    uint8_t key_kinds[kKinds], value_kinds[kKinds];
    int2 region[2];  // of the codes of keys and of values
    float query_scale[8];
    float maximum[kWarps][kHeads], sum[kWarps][kHeads], offset[kWarps][kHeads];
    int last;  // whether this thread block finished last
};

KVQ_CONSTANT(decode_shared_bytes, sizeof(Shared));

// Number of thread blocks per multiprocessor: three with up to 168 registers. Two for variants that need more
// registers: more than four query heads, or tables of five and more bits. Less where shared memory has no room for as
// many; then a thread may use more registers.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ == 900 || (__CUDA_ARCH__ >= 1000 && __CUDA_ARCH__ < 1200)
constexpr int kSharedKilobytes = 228;
#elif __CUDA_ARCH__ == 800 || __CUDA_ARCH__ == 870
constexpr int kSharedKilobytes = 164;
#else
constexpr int kSharedKilobytes = 100;
#endif
constexpr int kMostBlocks = kFold && KVQ_KEY_BITS <= 4 && KVQ_VALUE_BITS <= 4 ? 3 : 2;
constexpr int kBlocksInShared = kSharedKilobytes * 1024 / int(sizeof(Shared) + 1024);  // each takes 1 KiB more
constexpr int kResidentBlocks = kMostBlocks < kBlocksInShared ? kMostBlocks : kBlocksInShared > 1 ? kBlocksInShared : 1;
KVQ_CONSTANT(decode_resident_blocks, kResidentBlocks);

// Values with a table have one width, and stand in the order of their coordinates.
KVQ_DEVICE Channel value_channel(const Shared &s, int place) {
    if constexpr (kValueComputed) return s.value_channels[place];
    const int first = s.region[1].x / (4 * kPageBlocks);
    return {uint32_t(first + place * KVQ_VALUE_BITS), uint16_t(place), uint16_t(KVQ_VALUE_BITS)};
}

KVQ_DEVICE int query_index(int m, int step, int lane) { return (m * kKeySteps + step) * kWarp + lane; }
KVQ_DEVICE int score_index(int block, int token, int head) { return (block * kTokenRow + token) * kHeads + head; }

struct Share {  // query heads of a thread block
    int head;   // key-value head
    int first, heads;

    KVQ_DEVICE Share(const DecodeParams &p, int block) {
        head = block / p.subgroups;
        const int before = block % p.subgroups * kHeads;
        first = head * p.group + before;
        heads = min(kHeads, p.group - before);
    }
};

// Block lane / 4 of a page: the position of its first token, and a bit for each of its tokens that is attended.
struct LaneBlock {
    int base;
    uint32_t keep;

    KVQ_DEVICE LaneBlock(const DecodeParams &p, int row, int page, int first_token) {
        const int number = page * kPageBlocks + lane_id() / 4;
        const int2 block = __ldg(p.blocks + int64_t(row) * p.block_stride + number);
        base = block.x, keep = uint32_t(block.y);
        const int hidden = first_token - number * kBlockTokens;  // tokens that have left the window
        if (hidden > 0) keep &= hidden < kBlockTokens ? kAll << hidden : 0u;
    }
};

// The codes and token scales of one sequence in a page.
struct SequencePage {
    const uint32_t *codes;
    const uint16_t *token_params;
    const PagePointers *lists;  // outliers

    KVQ_DEVICE SequencePage(const DecodeParams &p, bool values, int row, int page) : lists(nullptr) {
        if (p.pool_table) {
            const int number = __ldg(p.pool_table + int64_t(row) * p.pool_stride + page);
            const char *at = p.pool + p.pool_bytes * number;
            codes = reinterpret_cast<const uint32_t *>(at + p.pool_offset[values]);
            token_params = reinterpret_cast<const uint16_t *>(at + p.pool_offset[2]);
            return;
        }
        lists = (values ? p.value_pages : p.key_pages) + page - p.first_page;
        codes = lists->codes + int64_t(row) * (values ? p.value_words : p.key_words);
        token_params = lists->token_params + int64_t(row) * kPageTokens * 2;
    }
};

// Prefetches the codes of a head in a page: those of values while keys are read, and the other way round. This is far
// enough ahead of the loads, and the second-level cache has room for it: 12 KiB per warp at 3 bits.
KVQ_DEVICE void prefetch_codes(const DecodeParams &p, const Shared &s, bool values, int row, int page) {
    constexpr int kLine = 128;
    const char *begin = reinterpret_cast<const char *>(SequencePage(p, values, row, page).codes) + s.region[values].x;
    const char *end = begin + s.region[values].y;
    begin -= uintptr_t(begin) % kLine;
    for (begin += kLine * lane_id(); begin < end; begin += kLine * kWarp) prefetch_line(begin);
}

// A quarter of a block's outlier list, which four lanes share. Entries are sorted by token, so lanes rarely collide.
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
