// Parameters of the kernels that quantize, and access to their elements.
#pragma once

#include "step.cuh"

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;

enum ElementType { kHalf = 0, kBFloat = 1, kFloat = 2 };

// Keys or values of one layer.
struct AppendSide {
    const void *x;               // [B, H, T, D], T = 32 * blocks, elements of `type`; innermost stride 1. With a state:
                                 // exact tokens behind the blocks in the storage dtype, with room for T
    const void *token;           // with a state: new tokens [B, H, D], elements of `token_type`
    const PagePointers *pages;   // pages of the new blocks; the first may be partly filled
    const float *cosine;         // [H, P] of the angles by which pairs are rotated before quantization; or null
    const float *sine;
    const uint32_t *partner;     // [D]: partner | pair << 16; bit 15: second of its pair; 0xffffffff: no pair
    const float *scale;          // [C], or null
    const float *reciprocal;     // [C], 1 / scale
    const float *zero_point;     // [C]
    const float *levels;         // shared by all channels, sorted; null: levels are computed
    const float *boundaries;     // between levels
    const float *coefficients;   // [C, 6] of computed levels; these have no scale and no zero point
    const uint8_t *bits;         // [C]
    const int *word_offset;      // [C], sum of the widths of earlier channels
    const float *compensation;   // [H, D, D], weights of the errors of earlier coordinates; or null
    const float *refinement;     // [H, D, D], weights of the errors of all others, in refinement passes; or null
    const float *token_weight;   // [H, 32] by size class of a token; null: all tokens have equal weight
    const float *weight_edge;    // [H, 31], between size classes
    const float *feedback;       // [H], share of a token's error that is added to the next; null: no noise shaping
    uint16_t *outlier_index;     // [blocks, B, capacity] work space, or null
    uint16_t *outlier_residual;
    int *outlier_count;          // [blocks, B, H]
    int64_t stride[3];           // elements per sequence, head, token
    int64_t token_stride[2];     // of the new token
    int type, words;             // words of a sequence in a page
    int per_token, channel_normalized;  // per_token: each token has thresholds
    int per_side;                // number of elements trimmed at each end of a token
    int cap;                     // largest number of outliers per token; 0: none are stored
    int capacity;                // 32 * cap
    int storage_bfloat;
    int paths;                   // codes follow a trellis
    int refinements;             // number of refinement passes
    int token_type;
};

struct AppendParams {
    AppendSide side[2];
    StepState *state;  // in a step of one token: its place, and whether a block closes; or null
    int batch, heads, head_dim;
    int first_block;   // place of the first new block in the first page; not used with a state
    int head_warps;    // number of heads coded at once, with error compensation
    int tail;          // with a state: number of exact tokens that stay when a block closes
};

KVQ_DEVICE float load_number(const void *x, int type, int64_t place) {
    if (type == kFloat) return static_cast<const float *>(x)[place];
    const uint16_t bits = static_cast<const uint16_t *>(x)[place];
    return type == kHalf ? Half::to_float(bits) : BFloat::to_float(bits);
}

KVQ_DEVICE float load_element(const AppendSide &s, int64_t place) { return load_number(s.x, s.type, place); }

KVQ_DEVICE float from_storage(const AppendSide &s, uint16_t bits) {
    return s.storage_bfloat ? BFloat::to_float(bits) : Half::to_float(bits);
}

KVQ_DEVICE uint16_t to_storage(const AppendSide &s, float x) {
    return s.storage_bfloat ? BFloat::from_float(x) : Half::from_float(x);
}

// Element (head, coordinate) of a token for quantization: rotated with its partner, normalized by its channel.
KVQ_DEVICE float element(const AppendSide &s, int64_t token, int head, int head_dim, int coordinate) {
    const int64_t row = token + s.stride[1] * head;
    float y = load_element(s, row + coordinate);
    if (s.cosine) {
        const uint32_t pair = s.partner[coordinate];
        if (pair != 0xffffffffu) {
            const float other = load_element(s, row + (pair & 0x7fffu));
            const int pairs = int(s.partner[head_dim]);
            const float c = s.cosine[head * pairs + (pair >> 16)], sn = s.sine[head * pairs + (pair >> 16)];
            y = pair & 0x8000u ? __fadd_rn(__fmul_rn(sn, other), __fmul_rn(c, y))
                               : __fsub_rn(__fmul_rn(c, y), __fmul_rn(sn, other));
        }
    }
    if (s.channel_normalized) {
        const int c = head * head_dim + coordinate;
        y = __fmul_rn(__fsub_rn(y, s.zero_point[c]), s.reciprocal[c]);
    }
    return y;
}

// Packs the codes of a channel in a block into a unit.
KVQ_DEVICE void store_unit(const AppendSide &s, uint32_t *codes, int channel, int bits, int place, const uint32_t *low,
                           const uint32_t *high) {
    uint32_t words[8];
    pack_unit(low, high, bits, words);
    uint32_t *target = codes + kPageBlocks * s.word_offset[channel] + place * bits;
#pragma unroll
    for (int i = 0; i < 8; ++i)
        if (i < bits) target[i] = words[i];
}
