// Levels that are computed, not looked up: the trellis codec's, for the decode kernel.
//
// Level i of L of a channel is a cubic in u = (2 i + 1) / L - 1. An index is brought to the top of a nibble or a byte,
// and that into the mantissa of a half, so that one multiply-add makes v = 2 i / L - 1 of it, exactly and whatever the
// width. The host expands the cubic about u = v + 1 / L. Two tokens go side by side: tokens t and t + 4 of a slice of
// eight, because these stand 16 bits apart.
#pragma once

#include "common.cuh"

KVQ_DEVICE uint32_t multiply_add(uint32_t a, uint32_t b, uint32_t c) {
    return as_bits(__hfma2(as_half2(a), as_half2(b), as_half2(c)));
}
KVQ_DEVICE uint32_t multiply(uint32_t a, uint32_t b) { return as_bits(__hmul2(as_half2(a), as_half2(b))); }

KVQ_DEVICE constexpr uint32_t every_byte(uint32_t byte) { return 0x01010101u * (byte & 0xffu); }

// ---- indices -------------------------------------------------------------------------------------------------

// Indices of the 32 tokens of a unit. Up to 4 bits they stand at the top of nibbles, a word for eight tokens; wider
// ones at the top of bytes, of even and of odd tokens.
template <bool Bytes> struct Indices;

template <> struct Indices<false> {
    uint32_t nibbles[4];

    // v of tokens t and t + 4 of a slice, t = 0 to 3. Nibbles at bit 0 count 1024ths, at bit 4 64ths.
    KVQ_DEVICE void centred(int slice, uint32_t (&v)[4]) const {
        const uint32_t lower = nibbles[slice], upper = lower >> 8;
        v[0] = multiply_add(masked_or(lower, 0x000f000fu, 0x64006400u), 0x30003000u, 0xd808d808u);  // x / 8 - 129
        v[1] = multiply_add(masked_or(lower, 0x00f000f0u, 0x64006400u), 0x20002000u, 0xc880c880u);  // x / 128 - 9
        v[2] = multiply_add(masked_or(upper, 0x000f000fu, 0x64006400u), 0x30003000u, 0xd808d808u);
        v[3] = multiply_add(masked_or(upper, 0x00f000f0u, 0x64006400u), 0x20002000u, 0xc880c880u);
    }
};

template <> struct Indices<true> {
    uint32_t even[4], odd[4];

    KVQ_DEVICE void centred(int slice, uint32_t (&v)[4]) const {
        const uint32_t exponent = 0x64646464u;  // 1024 and more
        v[0] = multiply_add(permute(even[slice], exponent, 0x4240), 0x20002000u, 0xc880c880u);
        v[1] = multiply_add(permute(odd[slice], exponent, 0x4240), 0x20002000u, 0xc880c880u);
        v[2] = multiply_add(permute(even[slice], exponent, 0x4341), 0x20002000u, 0xc880c880u);
        v[3] = multiply_add(permute(odd[slice], exponent, 0x4341), 0x20002000u, 0xc880c880u);
    }
};

// Codes of a unit of known width to indices. With `Paths` codes are of a trellis: see trellis_index.
template <int Bits, bool Paths> struct UnitIndices {
    static constexpr bool kBytes = Bits + int(Paths) > 4;

    static KVQ_DEVICE Indices<kBytes> of(const uint32_t *words) {
        Indices<kBytes> found;
        if constexpr (kBytes)
            in_bytes(words, found);
        else
            in_nibbles(words, found);
        return found;
    }

  private:
    static KVQ_DEVICE void in_nibbles(const uint32_t *words, Indices<false> &found) {
        constexpr int kUp = 4 - Bits;
        uint32_t code[4], before = 0;
        unpack_selectors<Bits>(words, code);
#pragma unroll
        for (int s = 0; s < 4; ++s) {
            if constexpr (Paths) {
                const uint32_t free = code[s] & 0x11111111u;
                const uint32_t last = __funnelshift_l(before, free, 3 + kUp);
                found.nibbles[s] = ((code[s] ^ __funnelshift_l(before, free, 8)) << kUp) + last;
                before = free;
            } else {
                found.nibbles[s] = code[s] << kUp;
            }
        }
    }

    static KVQ_DEVICE void in_bytes(const uint32_t *words, Indices<true> &found) {
        constexpr int kUp = 8 - Bits;  // of the low nibble of an even token
        constexpr uint32_t kLow = every_byte(0x0fu << kUp), kHigh = every_byte(0xffu << (4 + kUp));
        uint32_t high[4] = {0, 0, 0, 0}, before = 0;
        if constexpr (Bits > 5) unpack_selectors<Bits - 4>(words + 4, high);
#pragma unroll
        for (int s = 0; s < 4; ++s) {
            uint32_t code = words[s], last_of_even = 0, last_of_odd = 0;
            if constexpr (Paths) {
                const uint32_t free = masked(code, 0x11111111u);  // opaque, or its shifts are masked anew
                code ^= __funnelshift_l(before, free, 8);
                last_of_even = __funnelshift_l(before, free, 3 + kUp);
                last_of_odd = free << (kUp - 1);
                before = free;
            }
            found.even[s] = choose_bits(kLow, code << kUp, last_of_even);
            found.odd[s] = choose_bits(kLow, code >> (4 - kUp), last_of_odd);
            if constexpr (Bits == 5) {  // bit s of each nibble of the fifth word
                found.even[s] |= (words[4] << (7 - s)) & kHigh;
                found.odd[s] |= (words[4] << (3 - s)) & kHigh;
            } else if constexpr (Bits > 5) {
                found.even[s] |= (high[s] << (4 + kUp)) & kHigh;
                found.odd[s] |= (high[s] << kUp) & kHigh;
            }
        }
    }
};

// The same for a width known at run time, 0 to 8 (with paths 7); index 0 of width 0.
template <bool Paths> KVQ_DEVICE Indices<true> indices_of_any(const uint32_t *words, int bits) {
    Indices<true> found;
    uint32_t low[4], high[4];
    unpack_unit(words, bits, low, high);
    if (Paths) trellis_index(low, high);
    const int up = max(8 - bits - int(Paths), 0);
#pragma unroll
    for (int s = 0; s < 4; ++s) {
        found.even[s] = choose_bits(0x0f0f0f0fu, low[s], high[s] << 4) << up;
        found.odd[s] = choose_bits(0x0f0f0f0fu, low[s] >> 4, high[s]) << up;
    }
    return found;
}

// ---- channels ------------------------------------------------------------------------------------------------

constexpr int kAnyWidth = -1;

// What a lane has of one channel: `Count` adjacent units of a known width, 1 to 7 bits.
template <int Bits, int Count, bool Paths> struct ComputedUnits {
    uint32_t words[Count * Bits];

    // `codes` are those of the page, `block` is the first unit.
    KVQ_DEVICE void load(const uint32_t *codes, const Channel &channel, int block) {
        load_words<Count * Bits>(region_of(opaque(codes + block * Bits), channel), words);
    }
    KVQ_DEVICE auto indices(int unit, int) const { return UnitIndices<Bits, Paths>::of(words + unit * Bits); }
};

// Of no width: one level.
template <int Count, bool Paths> struct ComputedUnits<0, Count, Paths> {
    struct One {
        KVQ_DEVICE void centred(int, uint32_t (&v)[4]) const { v[0] = v[1] = v[2] = v[3] = 0xbc00bc00u; }  // -1
    };
    KVQ_DEVICE void load(const uint32_t *, const Channel &, int) {}
    KVQ_DEVICE One indices(int, int) const { return {}; }
};

// Of a width that lanes may have for themselves.
template <int Count, bool Paths> struct ComputedUnits<kAnyWidth, Count, Paths> {
    static constexpr int kMost = 8;
    uint32_t words[Count * kMost];

    KVQ_DEVICE void load(const uint32_t *codes, const Channel &channel, int block) {
        const uint32_t *region = region_of(codes + block * int(channel.bits), channel);
#pragma unroll
        for (int i = 0; i < kMost; ++i)
#pragma unroll
            for (int u = 0; u < Count; ++u)
                words[u * kMost + i] = i < channel.bits ? __ldg(region + u * int(channel.bits) + i) : 0u;
    }
    KVQ_DEVICE Indices<true> indices(int unit, int bits) const {
        return indices_of_any<Paths>(words + unit * kMost, bits);
    }
};

// ---- cubics --------------------------------------------------------------------------------------------------

// c0 + c1 v + c2 v^2 + c3 v^3 of one channel, each twice in a register.
struct Cubic {
    uint4 c;

    KVQ_DEVICE uint32_t operator()(uint32_t v) const {
        return multiply_add(multiply_add(multiply_add(c.w, v, c.z), v, c.y), v, c.x);
    }
};
