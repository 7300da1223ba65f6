// The scalar codec's levels, in a table that is read by byte permutes.
#pragma once

#include "common.cuh"

// Levels are halves, with low and high bytes in separate planes. One byte permute selects from eight bytes of a plane.
// `Levels<8>` is for indices of 1 to 3 bits, `Levels<16>` for 4 bits, `Levels<32>` for 5 bits, with the top bits in the
// nibbles of `high`.
template <int Count> struct Levels;

template <> struct Levels<8> {
    uint4 plane;  // low bytes (x, y), high bytes (z, w)

    KVQ_DEVICE void load(const uint4 *table, int channel) { plane = table[channel]; }

    // Half a slice: pair[i] holds tokens 4 half + 2 i and the next.
    KVQ_DEVICE void lookup(uint32_t selectors, uint32_t, int half, uint32_t *pair) const {
        const uint32_t select = half ? selectors >> 16 : selectors;
        const uint32_t low = permute(plane.x, plane.y, select);
        const uint32_t high = permute(plane.z, plane.w, select);
        pair[0] = permute(low, high, 0x5140);
        pair[1] = permute(low, high, 0x7362);
    }
};

template <> struct Levels<16> {
    uint4 low_plane, high_plane;

    KVQ_DEVICE void load(const uint4 *table, int channel) {
        low_plane = table[2 * channel];
        high_plane = table[2 * channel + 1];
    }

    KVQ_DEVICE void lookup(uint32_t selectors, uint32_t, int half, uint32_t *pair) const {
        // Byte i of the first or second result, by the top bit of code i. Both words serve eight tokens.
        uint32_t within = masked(selectors, 0x77777777u);
        uint32_t choose = masked_or(selectors >> 1, 0x44444444u, 0x32103210u);
        if (half) within >>= 16, choose >>= 16;
        const uint32_t low = permute(permute(low_plane.x, low_plane.y, within),
                                     permute(low_plane.z, low_plane.w, within), choose);
        const uint32_t high = permute(permute(high_plane.x, high_plane.y, within),
                                      permute(high_plane.z, high_plane.w, within), choose);
        pair[0] = permute(low, high, 0x5140);
        pair[1] = permute(low, high, 0x7362);
    }
};

template <> struct Levels<32> {
    uint4 low_plane[2], high_plane[2];

    KVQ_DEVICE void load(const uint4 *table, int channel) {
        for (int i = 0; i < 2; ++i) {
            low_plane[i] = table[4 * channel + i];
            high_plane[i] = table[4 * channel + 2 + i];
        }
    }

    static KVQ_DEVICE uint32_t bytes(const uint4 *plane, uint32_t within, uint32_t choose, uint32_t choose_upper) {
        uint32_t found[2];
#pragma unroll
        for (int i = 0; i < 2; ++i)
            found[i] =
                permute(permute(plane[i].x, plane[i].y, within), permute(plane[i].z, plane[i].w, within), choose);
        return permute(found[0], found[1], choose_upper);
    }

    KVQ_DEVICE void lookup(uint32_t selectors, uint32_t high, int half, uint32_t *pair) const {
        uint32_t within = masked(selectors, 0x77777777u);
        uint32_t choose = masked_or(selectors >> 1, 0x44444444u, 0x32103210u);
        uint32_t choose_upper = high << 2 | 0x32103210u;
        if (half) within >>= 16, choose >>= 16, choose_upper >>= 16;
        const uint32_t lower = bytes(low_plane, within, choose, choose_upper);
        const uint32_t upper = bytes(high_plane, within, choose, choose_upper);
        pair[0] = permute(lower, upper, 0x5140);
        pair[1] = permute(lower, upper, 0x7362);
    }
};

// ---- units ---------------------------------------------------------------------------------------------------

// `Count` adjacent units of one channel, and its table: byte planes up to 5 bits, plain halves of more.
template <int Bits, int Count> struct TableUnits {
    static constexpr int kEntries = Bits <= 3 ? 8 : 1 << Bits;
    static constexpr bool kPlain = Bits > 5;
    uint32_t words[Count * Bits];

    // `codes`: codes of the page; `block`: the first unit.
    KVQ_DEVICE void load(const uint32_t *codes, const Channel &channel, int block) {
        load_words<Count * Bits>(region_of(codes + block * Bits, channel), words);
    }

    struct Decoded {
        Levels<kPlain ? 8 : kEntries> levels;
        const uint16_t *row;
        // The upper nibbles of the four slices, or with 5 bits the word of the fifth bits, which saves three registers.
        uint32_t selectors[Count][4], high[Count][Bits > 5 ? 4 : 1];

        // Levels of tokens 4 four .. 4 four + 3 as two pairs of neighbours.
        KVQ_DEVICE void four(int unit, int four, uint32_t *pair) const {
            const uint32_t *low = selectors[unit];
            if constexpr (kPlain) {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const int token = 4 * four + 2 * i;
                    const uint32_t first = __ldg(row + code_of(low, high[unit], token));
                    const uint32_t second = __ldg(row + code_of(low, high[unit], token + 1));
                    pair[i] = first | second << 16;
                }
            } else {
                const uint32_t fifth = Bits == 5 ? high[unit][0] >> (four / 2) & 0x11111111u : 0;
                levels.lookup(low[four / 2], fifth, four % 2, pair);
            }
        }

        // Levels of a slice of eight: tokens 2 i and 2 i + 1, or without `Neighbours` i and i + 4.
        template <bool Neighbours> KVQ_DEVICE void eight(int unit, int slice, uint32_t (&pairs)[4]) const {
            four(unit, 2 * slice, pairs);
            four(unit, 2 * slice + 1, pairs + 2);
            if constexpr (!Neighbours) {
                const uint32_t a = pairs[0], b = pairs[1];
                pairs[0] = permute(a, pairs[2], 0x5410);
                pairs[1] = permute(a, pairs[2], 0x7632);
                pairs[2] = permute(b, pairs[3], 0x5410);
                pairs[3] = permute(b, pairs[3], 0x7632);
            }
        }
    };

    // The table of `channel` is in `shared`, or a plain one in `outside`.
    KVQ_DEVICE Decoded decode(const uint4 *shared, const uint4 *outside, int channel) const {
        Decoded d;
        if constexpr (kPlain)
            d.row = reinterpret_cast<const uint16_t *>(outside) + int64_t(channel) * kEntries;
        else
            d.levels.load(shared, channel);
#pragma unroll
        for (int u = 0; u < Count; ++u) {
            const uint32_t *own = words + u * Bits;
            unpack_selectors<(Bits < 4 ? Bits : 4)>(own, d.selectors[u]);
            if constexpr (Bits == 5) d.high[u][0] = own[4];
            if constexpr (Bits > 5) unpack_selectors<Bits - 4>(own + 4, d.high[u]);
        }
        return d;
    }
};
