// What the kernels that quantize are given, and its elements.
#pragma once

#include "step.cuh"

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;

enum ElementType { kHalf = 0, kBFloat = 1, kFloat = 2 };

// Keys or values of one layer.
struct AppendSide {
    const void *x;               // [B, H, T, D], T = 32 * blocks, elements of `type`; innermost stride 1. With a state:
                                 // the exact tokens behind the blocks in storage dtype, T as many as there is room for
    const void *token;           // with a state: the new token [B, H, D], elements of `token_type`
    const PagePointers *pages;   // pages of the new blocks; the first may be partly filled
    const float *cosine;         // [H, P] of the angles by which pairs are turned before quantization, or null
    const float *sine;
    const uint32_t *partner;     // [D]: partner | pair << 16, bit 15: the second of its pair; 0xffffffff: none
    const float *scale;          // [C] of the channels, or null
    const float *reciprocal;     // [C], 1 / scale
    const float *zero_point;     // [C]
    const float *levels;         // of every channel, sorted, or null: they are computed
    const float *boundaries;     // between these
    const float *coefficients;   // [C, 6] of computed levels, which have no scale and no zero point
    const uint8_t *bits;         // [C]
    const int *word_offset;      // [C], sum of the widths before
    const float *compensation;   // [H, D, D], shares of the errors of the coordinates before, or null: none
    const float *refinement;     // [H, D, D], shares of the errors of all others in a refinement pass, or null: none
    const float *token_weight;   // [H, 32] of a token by the class of its size, or null: all count alike
    const float *weight_edge;    // [H, 31]
    const float *feedback;       // [H], what of a token's rounding error the next one takes up, or null: nothing
    uint16_t *outlier_index;     // [blocks, B, capacity] work space, or null
    uint16_t *outlier_residual;
    int *outlier_count;          // [blocks, B, H]
    int64_t stride[3];           // elements per sequence, head, token
    int64_t token_stride[2];     // of the new token
    int type, words;             // words of a sequence in a page
    int per_token, channel_normalized;  // per_token: thresholds are a token's
    int per_side;                // elements trimmed at each end of a token
    int cap;                     // outliers kept per token; 0: none are stored
    int capacity;                // 32 * cap
    int storage_bfloat;
    int paths;                   // codes are of a trellis
    int refinements;             // refinement passes: times that coordinates are coded again
    int token_type;
};

struct AppendParams {
    AppendSide side[2];
    StepState *state;  // of a step of one token: where it goes, and whether a block closes; or null
    int batch, heads, head_dim;
    int first_block;   // place of the first new block in the first of the pages; with a state it says the block
    int head_warps;    // heads coded side by side where errors are compensated
    int tail;          // with a state: exact tokens that stay when a block has closed
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

// Element (head, coordinate) of a token as it is to be quantized: turned with its partner, normalised by its channel.
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

// Packs the codes of a channel's block into its unit.
KVQ_DEVICE void store_unit(const AppendSide &s, uint32_t *codes, int channel, int bits, int place, const uint32_t *low,
                           const uint32_t *high) {
    uint32_t words[8];
    pack_unit(low, high, bits, words);
    uint32_t *target = codes + kPageBlocks * s.word_offset[channel] + place * bits;
#pragma unroll
    for (int i = 0; i < 8; ++i)
        if (i < bits) target[i] = words[i];
}
