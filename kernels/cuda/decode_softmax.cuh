// Online softmax of a page: scores to probabilities, and these to matrix operands.
#pragma once

#include "decode_scores.cuh"
#include "decode_values.cuh"

constexpr bool kTokenScales = !kValueComputed;  // computed levels are scaled per channel

// Scores of all query heads, one after the other, as powers of two.
struct OnlineSoftmax {
    float scale[2];
    float cap;  // softcap times log2 e, or 0
    float maximum[2], sum[2], offset[2];
    int exponent;  // weights seen so far are below 2^exponent

    KVQ_DEVICE OnlineSoftmax(const DecodeParams &p, const Shared &s) : cap(p.softcap * kLog2e) {
        for (int i = 0; i < 2; ++i) {
            scale[i] = s.query_scale[lane_head(i)] * kLog2e;
            maximum[i] = kMinusInfinity, sum[i] = 0.0f, offset[i] = 0.0f;
        }
        exponent = kTokenScales ? -100 : 1;
    }

    // A lane's tokens of product m, half of the block, set; of block lane / 4.
    static KVQ_DEVICE int token(int set, int m, int half) {
        return token_of(m, set) + 16 * half + kSlotStep * lane_slot();
    }

    // Scores to powers of two, hidden ones to minus infinity. `keep` has a bit for each token of the block. Updates the
    // maximum; what was summed before is to be multiplied by `rescale`.
    KVQ_DEVICE void scale_and_mask(Scores &score, uint32_t keep, float (&rescale)[2]) {
        float top[2] = {maximum[0], maximum[1]}, factor[2] = {scale[0], scale[1]};
        if (cap != 0.0f) {
            limit(score);
            factor[0] = factor[1] = cap;
        }
        const bool whole = __all_sync(kAll, keep == kAll);
        keep >>= kSlotStep * lane_slot();
#pragma unroll
        for (int set = 0; set < kSets; ++set)
#pragma unroll
            for (int m = 0; m < 8; ++m)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    float x = score[set][m][i] * factor[i % 2];
                    if (!whole && !(keep >> (token_of(m, set) + 16 * (i / 2)) & 1u)) x = kMinusInfinity;
                    score[set][m][i] = x;
                    top[i % 2] = fmaxf(top[i % 2], x);
                }
#pragma unroll
        for (int i = 0; i < 2; ++i)
            for (int step = kFold ? 2 : 4; step < kWarp; step *= 2)
                top[i] = fmaxf(top[i], __shfl_xor_sync(kAll, top[i], step));
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            rescale[i] = power_of_two(maximum[i] - top[i]);
            maximum[i] = top[i];
            sum[i] *= rescale[i];
            offset[i] *= rescale[i];
        }
    }

    // Scores to probabilities times the tokens' value scales; if outliers need them, also to `probabilities`.
    KVQ_DEVICE void weigh(const DecodeParams &p, Scores &score, const uint4 *token_params, float *probabilities,
                          float (&rescale)[2]) {
        float largest = 0.0f;
        auto weigh_token = [&](int set, int m, int half, uint32_t params) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                float &x = score[set][m][2 * half + i];
                x = power_of_two(x - maximum[i]);
                sum[i] += x;
                if (KVQ_OUTLIERS)
                    probabilities[score_index(lane_id() / 4, token(set, m, half), lane_head(i))] = x;
                if (kTokenScales) {
                    offset[i] += x * float16_to_float(p.storage_bfloat, uint16_t(params >> 16));
                    x *= float16_to_float(p.storage_bfloat, uint16_t(params));
                    largest = fmaxf(largest, x);
                }
            }
        };
        each_token(p, token_params, weigh_token);
        if (kTokenScales) {  // keep the weights within half precision, whatever the token scales
            const int bound = int(__reduce_max_sync(kAll, __float_as_uint(largest)) >> 23) - 126;
            if (bound > exponent) {
                const float shrink = __uint_as_float(uint32_t(127 + max(exponent - bound, -126)) << 23);
                rescale[0] *= shrink;
                rescale[1] *= shrink;
                exponent = bound;
            }
        }
    }

    // The factor for weights before they are rounded to halves.
    KVQ_DEVICE float unit() const { return __uint_as_float(uint32_t(127 + kWeightExponent - exponent) << 23); }

    KVQ_DEVICE void operands(const Scores &score, Weights &weights) const {
        const float by = unit();
#pragma unroll
        for (int mm = 0; mm < 16; ++mm) {
            uint32_t slot[2];
#pragma unroll
            for (int set = 0; set < kSets; ++set) {
                const float *weight = score[set][mm % 8] + 2 * (mm / 8);
                slot[set] = transpose_8x8(pack_half2(by * weight[0], by * weight[1]));
            }
            // Folded, the columns of the second slot are in the lanes of rows 4 to 7, whose heads are not needed.
            if (kFold) slot[1] = __shfl_xor_sync(kAll, slot[0], 16);
            weights[mm][0] = permute(slot[0], slot[1], 0x5410);
            weights[mm][1] = permute(slot[0], slot[1], 0x7632);
        }
    }

  private:
    // Scores to tanh(score / softcap).
    KVQ_DEVICE void limit(Scores &score) const {
        const float inverse[2] = {scale[0] / cap, scale[1] / cap};
#pragma unroll
        for (int set = 0; set < kSets; ++set)
#pragma unroll
            for (int m = 0; m < 8; ++m)
#pragma unroll
                for (int i = 0; i < 4; ++i) score[set][m][i] = soft_limit(score[set][m][i] * inverse[i % 2]);
    }

    // Calls `weigh(set, m, half, params)` for all tokens of a lane with the token's scale and zero point, 1 and 0 for
    // values without them.
    template <class Weigh>
    static KVQ_DEVICE void each_token(const DecodeParams &p, const uint4 *token_params, Weigh weigh) {
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int part = 0; part < 2; ++part) {  // a slice of eight tokens
                uint32_t params[8];
#pragma unroll
                for (int quad = 0; quad < 2; ++quad) {
                    const uint32_t one = p.storage_bfloat ? 0x3f80u : 0x3c00u;
                    uint4 four = {one, one, one, one};
                    if (kTokenScales && p.value_token) four = __ldg(token_params + 4 * half + 2 * part + quad);
                    params[4 * quad] = four.x, params[4 * quad + 1] = four.y;
                    params[4 * quad + 2] = four.z, params[4 * quad + 3] = four.w;
                }
#pragma unroll
                for (int i = 0; i < 4; ++i)
#pragma unroll
                    for (int set = 0; set < kSets; ++set) {
                        const int m = 4 * part + i, first = token_of(m, set) % 8;
                        const uint32_t own = kFold && lane_slot() ? params[first + kSlotStep] : params[first];
                        weigh(set, m, half, own);
                    }
            }
    }
};
