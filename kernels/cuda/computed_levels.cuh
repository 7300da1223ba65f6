// Computed levels of the trellis codec, for the decode kernel.
// Level i of L of a channel is a polynomial in u = (2 i + 1) / L - 1. An index is moved to the top of a nibble or a
// byte, and from there into the mantissa of a half. Then one multiply-add gives v = 2 i / L - 1, exactly and at any
// width. The host expands the polynomial about u = v + 1 / L. Two tokens are processed together: tokens t and t + 4 of
// a slice of eight, because these are 16 bits apart.
#pragma once

#include "levels.cuh"

KVQ_DEVICE uint32_t multiply_add(uint32_t a, uint32_t b, uint32_t c) {
    return as_bits(__hfma2(as_half2(a), as_half2(b), as_half2(c)));
}
KVQ_DEVICE uint32_t multiply(uint32_t a, uint32_t b) { return as_bits(__hmul2(as_half2(a), as_half2(b))); }

KVQ_DEVICE constexpr uint32_t every_byte(uint32_t byte) { return 0x01010101u * (byte & 0xffu); }

// Inputs for a channel's levels: coefficients, each twice, or in `first` the table of up to eight levels.
struct ChannelNumbers {
    uint4 first, second;
};
KVQ_DEVICE ChannelNumbers numbers_of(const uint4 *rows, int channel) {
    return {rows[2 * channel], rows[2 * channel + 1]};
}

// ---- indices -------------------------------------------------------------------------------------------------

// Indices of the 32 tokens of a unit. Indices of up to 4 bits are at the top of nibbles, with a word for eight tokens;
// wider ones are at the top of bytes, separate for even and odd tokens.
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

// Up to eight levels are cheaper to look up than to compute. So channels of so small a known width have tables, which
// the host makes from their polynomials.
KVQ_DEVICE constexpr bool has_table(int bits, bool paths) { return bits > 0 && bits + int(paths) <= 3; }

// Codes of a unit of known width to indices, which are at the bottom of nibbles if they select from a table. With
// `Paths`, codes are of a trellis: see trellis_index.
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
        constexpr int kUp = has_table(Bits, Paths) ? int(Paths) : 4 - Bits;
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

// The codes of a unit whose width is known at run time, up to `Most` (3 or 4 and more), to nibbles; bits above a code's
// are left in. Without branches, so that lanes of different widths go together.
template <int Most> KVQ_DEVICE void nibbles_of_some(const uint32_t *words, int bits, uint32_t (&code)[4]) {
    const uint32_t third = words[Most > 2 ? 2 : 0];
    const uint32_t upper = masked_or(words[1] >> 2, 0x22222222u, third >> 1 & 0x44444444u);
    const uint32_t top = masked_or(words[0] >> 3, 0x11111111u, upper);
    code[0] = words[0];
    code[1] = bits >= 3 ? words[1] : words[0] >> bits;
    code[2] = bits >= 3 ? third : bits == 2 ? words[1] : words[0] >> 2;
    code[3] = bits >= 3 ? top : bits == 2 ? words[1] >> 2 : words[0] >> 3;
    if constexpr (Most > 3) code[3] = bits >= 4 ? words[3] : code[3];
}

// The bits of a nibble that belong to a code.
KVQ_DEVICE uint32_t nibble_mask(int bits) { return 0x11111111u * (0xfu >> (4 - min(bits, 4))); }

// Codes of 0 to 3 bits (without paths 4) to indices.
template <bool Paths> KVQ_DEVICE Indices<false> narrow_indices(const uint32_t *words, int bits) {
    Indices<false> found;
    uint32_t code[4], before = 0;
    const uint32_t mask = nibble_mask(bits), up = 4 - bits;
    nibbles_of_some<3>(words, bits, code);
#pragma unroll
    for (int s = 0; s < 4; ++s) {
        if constexpr (Paths) {
            const uint32_t free = masked(code[s], mask & 0x11111111u);
            const uint32_t last = __funnelshift_l(before, free, 3 + up);
            found.nibbles[s] = (((code[s] & mask) ^ __funnelshift_l(before, free, 8)) << up) + last;
            before = free;
        } else {
            found.nibbles[s] = (code[s] & mask) << up;
        }
    }
    return found;
}

// Codes of 0 to 5 bits to indices.
template <bool Paths> KVQ_DEVICE Indices<true> medium_indices(const uint32_t *words, int bits) {
    Indices<true> found;
    uint32_t code[4], before = 0;
    const uint32_t mask = nibble_mask(bits), up = 8 - bits;
    const uint32_t low = every_byte(0x0fu << up), last = every_byte(0x80u >> bits);
    nibbles_of_some<4>(words, bits, code);
#pragma unroll
    for (int s = 0; s < 4; ++s) {
        uint32_t own = code[s] & mask, last_of_even = 0, last_of_odd = 0;
        if constexpr (Paths) {
            const uint32_t free = masked(code[s], mask & 0x11111111u);
            own ^= __funnelshift_l(before, free, 8);
            last_of_even = __funnelshift_l(before, free, 3 + up) & last;
            last_of_odd = free << (up - 1) & last;
            before = free;
        }
        // The fifth bit goes to the top of the byte; of narrower codes the word is 0.
        found.even[s] = masked_or(words[4] << (7 - s), 0x80808080u, choose_bits(low, own << up, last_of_even));
        found.odd[s] = masked_or(words[4] << (3 - s), 0x80808080u, choose_bits(low, own >> 4 << up, last_of_odd));
    }
    return found;
}

// Codes of 0 to 8 bits (with paths 7) to indices.
template <bool Paths> KVQ_DEVICE Indices<true> any_indices(const uint32_t *words, int bits) {
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

// ---- polynomials ---------------------------------------------------------------------------------------------

// c0 + c1 v + c2 v^2 + ... of one channel, each coefficient twice in a register: cubics of up to 32 levels, quintics of
// more.
template <bool Quintic> struct Polynomial {
    static constexpr int kCount = Quintic ? 6 : 4;
    uint32_t c[kCount];

    KVQ_DEVICE explicit Polynomial(const ChannelNumbers &own) {
        const uint32_t all[] = {own.first.x, own.first.y, own.first.z, own.first.w, own.second.x, own.second.y};
#pragma unroll
        for (int k = 0; k < kCount; ++k) c[k] = all[k];
    }
    KVQ_DEVICE uint32_t operator()(uint32_t v) const {
        uint32_t x = c[kCount - 1];
#pragma unroll
        for (int k = kCount - 2; k >= 0; --k) x = multiply_add(x, v, c[k]);
        return x;
    }
};

// Levels of a unit: `eight` has those of a slice, tokens i and i + 4. Indices of up to four bits stand in nibbles.
template <bool Bytes, bool Quintic> struct PolynomialLevels {
    Indices<Bytes> index;
    Polynomial<Quintic> polynomial;

    KVQ_DEVICE void eight(int slice, uint32_t (&pairs)[4]) const {
        uint32_t v[4];
        index.centred(slice, v);
#pragma unroll
        for (int i = 0; i < 4; ++i) pairs[i] = polynomial(v[i]);
    }
};

struct TableLevels {
    Indices<false> index;
    Levels<8> table;

    KVQ_DEVICE void eight(int slice, uint32_t (&pairs)[4]) const {
        uint32_t low[2], high[2];
        table.lookup(index.nibbles[slice], 0, 0, low);
        table.lookup(index.nibbles[slice], 0, 1, high);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            pairs[2 * i] = permute(low[i], high[i], 0x5410);
            pairs[2 * i + 1] = permute(low[i], high[i], 0x7632);
        }
    }
};

// ---- channels ------------------------------------------------------------------------------------------------

// Classes of widths that may differ by lane: up to 3 bits, up to 5, any.
constexpr int kNarrow = -1, kMedium = -2, kAnyWidth = -3;

// A lane's part of one channel: `Count` adjacent units of a known width, 1 to 7 bits.
template <int Bits, int Count, bool Paths> struct ComputedUnits {
    uint32_t words[Count * Bits];

    // `codes`: codes of the page; `block`: the first unit.
    KVQ_DEVICE void load(const uint32_t *codes, const Channel &channel, int block) {
        load_words<Count * Bits>(region_of(opaque(codes + block * Bits), channel), words);
    }
    KVQ_DEVICE auto levels(int unit, int, const ChannelNumbers &own) const {
        typedef UnitIndices<Bits, Paths> Unit;
        constexpr bool kQuintic = Bits + Paths > 5;
        const auto index = Unit::of(words + unit * Bits);
        if constexpr (has_table(Bits, Paths))
            return TableLevels{index, {own.first}};
        else
            return PolynomialLevels<Unit::kBytes, kQuintic>{index, Polynomial<kQuintic>(own)};
    }
};

// Width 0: one level.
template <int Count, bool Paths> struct ComputedUnits<0, Count, Paths> {
    struct One {
        uint32_t level;
        KVQ_DEVICE void eight(int, uint32_t (&pairs)[4]) const { pairs[0] = pairs[1] = pairs[2] = pairs[3] = level; }
    };
    KVQ_DEVICE void load(const uint32_t *, const Channel &, int) {}
    KVQ_DEVICE One levels(int, int, const ChannelNumbers &own) const { return {own.first.x}; }
};

// A width that may differ by lane.
template <int Most, int Count> struct SomeUnits {
    uint32_t words[Count * Most];

    KVQ_DEVICE void load(const uint32_t *codes, const Channel &channel, int block) {
        const uint32_t *region = region_of(codes + block * int(channel.bits), channel);
#pragma unroll
        for (int i = 0; i < Most; ++i)
#pragma unroll
            for (int u = 0; u < Count; ++u)
                words[u * Most + i] = i < channel.bits ? __ldg(region + u * int(channel.bits) + i) : 0u;
    }
};
template <int Count, bool Paths> struct ComputedUnits<kNarrow, Count, Paths> : SomeUnits<3, Count> {
    KVQ_DEVICE PolynomialLevels<false, false> levels(int unit, int bits, const ChannelNumbers &own) const {
        return {narrow_indices<Paths>(this->words + unit * 3, bits), Polynomial<false>(own)};
    }
};
template <int Count, bool Paths> struct ComputedUnits<kMedium, Count, Paths> : SomeUnits<5, Count> {
    KVQ_DEVICE PolynomialLevels<true, true> levels(int unit, int bits, const ChannelNumbers &own) const {
        return {medium_indices<Paths>(this->words + unit * 5, bits), Polynomial<true>(own)};
    }
};
template <int Count, bool Paths> struct ComputedUnits<kAnyWidth, Count, Paths> : SomeUnits<8, Count> {
    KVQ_DEVICE PolynomialLevels<true, true> levels(int unit, int bits, const ChannelNumbers &own) const {
        return {any_indices<Paths>(this->words + unit * 8, bits), Polynomial<true>(own)};
    }
};
