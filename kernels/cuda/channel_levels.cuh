// The levels of one channel of the trellis codec, as kvq_calib/codec/computed_levels.py rounds them.
#pragma once

#include "common.cuh"

constexpr int kSubsets = 4;  // of the levels of a trellis: s, s + 4, s + 8, ...

constexpr int kCoefficients = 6;

struct ChannelLevels {
    float c[kCoefficients];
    float step;  // 1 / L for L levels
    int bits;

    // `coefficients`: [C, 6], filled up with zeros. `paths`: whether codes are of a trellis, with twice as many levels.
    KVQ_DEVICE ChannelLevels(const float *coefficients, const uint8_t *widths, int channel, bool paths)
        : bits(widths[channel]) {
#pragma unroll
        for (int k = 0; k < kCoefficients; ++k) c[k] = coefficients[int64_t(channel) * kCoefficients + k];
        const int doubled = bits && paths ? bits + 1 : bits;
        step = __uint_as_float(uint32_t(127 - doubled) << 23);
    }

    KVQ_DEVICE float level(int index) const {
        const float u = __fsub_rn(__fmul_rn(float(2 * index + 1), step), 1.0f);  // exact
        float x = c[kCoefficients - 1];
#pragma unroll
        for (int k = kCoefficients - 2; k >= 0; --k) x = __fadd_rn(__fmul_rn(x, u), c[k]);
        return x;
    }

    // The boundary between two levels: above it, the upper one is nearer.
    KVQ_DEVICE float between(int lower, int upper) const {
        return __fmul_rn(__fadd_rn(level(lower), level(upper)), 0.5f);
    }

    // The level nearest to y: its code without a trellis.
    KVQ_DEVICE int nearest(float y) const {
        int code = 0;
        for (int stride = 1 << bits >> 1; stride; stride >>= 1)
            if (between(code + stride - 1, code + stride) < y) code += stride;
        return code;
    }

    // Place in a subset of the level nearest to y, for widths 1 to 7.
    KVQ_DEVICE int nearest(int subset, float y) const {
        int place = 0;
        for (int stride = 1 << bits >> 2; stride; stride >>= 1) {
            const int lower = kSubsets * (place + stride - 1) + subset;
            if (between(lower, lower + kSubsets) < y) place += stride;
        }
        return place;
    }

    KVQ_DEVICE float squared_distance(int subset, int place, float y) const {
        const float distance = __fsub_rn(y, level(kSubsets * place + subset));
        return __fmul_rn(distance, distance);
    }
};
