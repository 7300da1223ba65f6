// Converts indices to levels: prepares a channel's levels for look-up, and reads a group of blocks at a time.
#pragma once

#include "kvq_native.h"
#include "unpack.h"

namespace kvq {

// Sources of a channel's levels, in order of generality. Columns that are read together are prepared for the kind that
// suits both. A tensor has only one of the last two.
enum Kind : int32_t {
    kConstant = 0,   // one level
    kSixteen = 1,    // a table of up to 16
    kThirtyTwo = 2,  // one of up to 32, in two registers
    kComputed = 3,   // a polynomial
    kListed = 4,     // the tensor's own table, and a factor and a sum of the channel
};

#if defined(__AVX512F__)
constexpr int kMostTabled = 32;
#else
constexpr int kMostTabled = 16;
#endif
// Number of floats of a channel's table, or of its coefficients.
constexpr int kTableFloats = kMostTabled;
constexpr int kCoefficients = 6;

// A channel of the current head.
struct Column {
    int32_t kind;
    int32_t width;
    bool trellis;
    int64_t offset;      // of its words in a row of a page
    const float* table;  // its levels up to kThirtyTwo; kComputed: coefficients, then what leads to u; kListed: factor
                         // and sum
    const float* shared;  // kListed: the tensor's table
};

inline int level_count(const KvqCodes& codes, int64_t channel) {
    const int width = codes.width[channel];
    return width == 0 ? 1 : 1 << (width + (codes.trellis ? 1 : 0));
}
inline int32_t kind_of(const KvqCodes& codes, int64_t channel) {
    const int count = level_count(codes, channel);
    if (count == 1) return kConstant;
    if (count <= kMostTabled) return count <= 16 ? kSixteen : kThirtyTwo;
    return codes.level_count == 0 ? kComputed : kListed;
}

// Levels at places u = (2 i + 1) / L - 1 from coefficients, which include the channel's other factors. Only this
// function depends on the form of levels.
KVQ_INLINE F level_at(F u, const F (&of)[kCoefficients]) {
    F level = of[kCoefficients - 1];
#pragma GCC unroll 8
    for (int n = kCoefficients - 2; n >= 0; n--) level = fused(level, u, of[n]);
    return level;
}

// Factor and sum that convert the index of one of `count` levels to u.
struct Places {
    float step, start;
};
inline Places places_of(int count) { return {2.0f / count, 1.0f / count - 1.0f}; }

// The kLanes levels from index `first` on, of a channel of `count` levels; further ones repeat.
inline F levels_from(const KvqCodes& codes, int64_t channel, int count, int first) {
    I index;
    for (int lane = 0; lane < kLanes; lane++) index[lane] = (first + lane) & (count - 1);
    F level;
    if (codes.level_count > 0) {
        for (int lane = 0; lane < kLanes; lane++) level[lane] = codes.level[index[lane]];
        return level;
    }
    F of[kCoefficients];
    for (int n = 0; n < kCoefficients; n++) of[n] = all(codes.coefficient[channel * kCoefficients + n]);
    const Places places = places_of(count);
    return level_at(fused(__builtin_convertvector(index, F), all(places.step), all(places.start)), of);
}

// Split sixteen floats into four planes of bytes, for byte-wise look-ups.
inline void to_planes(float* sixteen) {
    Quad row[4];
    for (int n = 0; n < 4; n++) {
        const Bytes bytes = load<Bytes>(sixteen + 4 * n);
        row[n] = (Quad)KVQ_SHUFFLE(Bytes, bytes, bytes, 0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    }
    transpose(row);
    for (int n = 0; n < 4; n++) store(sixteen + 4 * n, row[n]);
}

// The sum that is added to the channel's levels times a factor. The result lacks only the contributions of tokens.
struct Affine {
    float factor, sum;
};
inline Affine affine_of(const KvqCodes& codes, int64_t channel) {
    if (codes.scale == nullptr) return {1.0f, 0.0f};
    if (codes.token_scales) return {codes.scale[channel], 0.0f};
    return {codes.scale[channel], codes.zero_point[channel]};
}

// Prepare a channel for a kind that suits it; `room` has kTableFloats floats, aligned to a cache line.
inline void prepare_column(const KvqCodes& codes, int64_t channel, int32_t kind, float* room, Column& column) {
    const int count = level_count(codes, channel);
    const Affine affine = affine_of(codes, channel);
    column = {kind,         codes.width[channel],
              codes.trellis != 0, static_cast<int64_t>(kPageBlocks) * codes.offset[channel],
              room,         codes.level};
    if (kind <= kThirtyTwo) {
        const int used = kind == kThirtyTwo ? 32 : 16;
        for (int first = 0; first < used; first += kLanes) {
            const F level = levels_from(codes, channel, count, first);
            store(room + first, fused(level, all(affine.factor), all(affine.sum)));
        }
        if (kind == kSixteen && !kNibbleOrder) to_planes(room);
    } else if (kind == kComputed) {
        const Places places = places_of(count);
        for (int n = 0; n < kCoefficients; n++)
            room[n] = codes.coefficient[channel * kCoefficients + n] * affine.factor;
        room[0] += affine.sum;
        room[kCoefficients] = places.step;
        room[kCoefficients + 1] = places.start;
    } else {
        room[0] = affine.factor;
        room[1] = affine.sum;
    }
}

#if !defined(__AVX512F__)
// Byte 4 s + j of each 128 bits to lane j; s is a constant after unrolling.
KVQ_INLINE I widened(W bytes, int s) {
    const int b = 4 * s;
#if defined(__AVX2__)
    const __m256i place = _mm256_setr_epi8(b, -1, -1, -1, b + 1, -1, -1, -1, b + 2, -1, -1, -1, b + 3, -1, -1, -1, b,
                                           -1, -1, -1, b + 1, -1, -1, -1, b + 2, -1, -1, -1, b + 3, -1, -1, -1);
    return (I)_mm256_shuffle_epi8((__m256i)bytes, place);
#elif defined(__SSSE3__)
    const __m128i place = _mm_setr_epi8(b, -1, -1, -1, b + 1, -1, -1, -1, b + 2, -1, -1, -1, b + 3, -1, -1, -1);
    return (I)_mm_shuffle_epi8((__m128i)bytes, place);
#else
    const Bytes of = (Bytes)bytes;
    return I{of[b], of[b + 1], of[b + 2], of[b + 3]};
#endif
}
#endif

// Levels of byte indices, from any source: four vectors of tokens. `next` gives the indices of vector n in 32-bit
// lanes.
template <class Next>
KVQ_INLINE void computed_levels(const float* table, Next next, F (&level)[4]) {
    F of[kCoefficients];
    for (int n = 0; n < kCoefficients; n++) of[n] = all(table[n]);
    const F step = all(table[kCoefficients]), start = all(table[kCoefficients + 1]);
#pragma GCC unroll 4
    for (int n = 0; n < 4; n++) level[n] = level_at(fused(__builtin_convertvector(next(n), F), step, start), of);
}

template <class Next>
KVQ_INLINE void listed_levels(const Column& column, Next next, F (&level)[4]) {
#pragma GCC unroll 4
    for (int n = 0; n < 4; n++) {
        const I index = next(n);
#if defined(__AVX512F__)
        const F found = (F)_mm512_i32gather_ps((__m512i)index, column.shared, 4);
#else
        F found;
        for (int lane = 0; lane < kLanes; lane++) found[lane] = column.shared[index[lane]];
#endif
        level[n] = fused(found, all(column.table[0]), all(column.table[1]));
    }
}

// Reads a column: open() takes the words of a group, half<0>() and half<1>() give its eight vectors of levels.
template <int kKind, bool kTrellis>
struct Reader {
    const Column& column;
    Indices found;

    KVQ_INLINE explicit Reader(const Column& column_) : column(column_) {}
    KVQ_INLINE void open(const int32_t* row, int group) {
        found = byte_indices(row + column.offset + group * kUnits * column.width, column.width, column.trellis);
    }
    template <int kHalf>
    KVQ_INLINE void half(F (&level)[4]) const {
        if constexpr (kKind == kComputed) {
            computed_levels(column.table, [&](int n) { return index<kHalf>(n); }, level);
        } else {
            listed_levels(column, [&](int n) { return index<kHalf>(n); }, level);
        }
    }
    template <int kHalf>
    KVQ_INLINE I index(int n) const {
#if defined(__AVX512F__)
        const W bytes = n & 1 ? found.odd : found.even;
        return (I)(bytes >> (8 * (2 * kHalf + n / 2)) & 0xffu);
#else
        return widened(kHalf ? found.odd : found.even, n);
#endif
    }
};

template <bool kTrellis>
struct Reader<kConstant, kTrellis> {
    F only;

    KVQ_INLINE explicit Reader(const Column& column) : only(all(column.table[0])) {}
    KVQ_INLINE void open(const int32_t*, int) {}
    template <int kHalf>
    KVQ_INLINE void half(F (&level)[4]) const {
        for (int n = 0; n < 4; n++) level[n] = only;
    }
};

#if defined(__AVX512F__)

template <bool kTrellis>
struct Reader<kSixteen, kTrellis> {
    const Column& column;
    __m512 table;
    W found;

    KVQ_INLINE explicit Reader(const Column& column_) : column(column_), table(_mm512_load_ps(column_.table)) {}
    KVQ_INLINE void open(const int32_t* row, int group) {
        found = nibble_indices<kTrellis>(row + column.offset + group * kUnits * column.width, column.width);
    }
    template <int kHalf>
    KVQ_INLINE void half(F (&level)[4]) const {
#pragma GCC unroll 4
        for (int n = 0; n < 4; n++)
            level[n] = (F)_mm512_permutexvar_ps((__m512i)(found >> (4 * (4 * kHalf + n))), table);
    }
};

template <bool kTrellis>
struct Reader<kThirtyTwo, kTrellis> {
    const Column& column;
    __m512 low, high;
    Indices found;

    KVQ_INLINE explicit Reader(const Column& column_)
        : column(column_), low(_mm512_load_ps(column_.table)), high(_mm512_load_ps(column_.table + 16)) {}
    KVQ_INLINE void open(const int32_t* row, int group) {
        found = byte_indices(row + column.offset + group * kUnits * column.width, column.width, column.trellis);
    }
    template <int kHalf>
    KVQ_INLINE void half(F (&level)[4]) const {
#pragma GCC unroll 4
        for (int n = 0; n < 4; n++) {
            const W bytes = n & 1 ? found.odd : found.even;
            const __m512i index = (__m512i)(bytes >> (8 * (2 * kHalf + n / 2)));
            level[n] = (F)_mm512_permutex2var_ps(low, index, high);
        }
    }
};

#else

// A table of sixteen bytes by bytes below 16.
KVQ_INLINE W by_bytes(const float* plane, W index) {
#if defined(__AVX2__)
    const __m256i table = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(plane)));
    return (W)_mm256_shuffle_epi8(table, (__m256i)index);
#elif defined(__SSSE3__)
    return (W)_mm_shuffle_epi8(_mm_load_si128(reinterpret_cast<const __m128i*>(plane)), (__m128i)index);
#elif defined(__ARM_NEON)
    return (W)vqtbl1q_u8(vld1q_u8(reinterpret_cast<const uint8_t*>(plane)), (uint8x16_t)index);
#else
    const uint8_t* table = reinterpret_cast<const uint8_t*>(plane);
    Bytes of = (Bytes)index;
    for (int n = 0; n < 16; n++) of[n] = table[of[n]];
    return (W)of;
#endif
}

#if defined(__AVX2__)
#define KVQ_ZIP(part, bits) _mm256_unpack##part##_epi##bits
#define KVQ_ZIPPED(part, bits, a, b) (W) KVQ_ZIP(part, bits)((__m256i)(a), (__m256i)(b))
KVQ_INLINE W zip_low_bytes(W a, W b) {
    return KVQ_ZIPPED(lo, 8, a, b); }
KVQ_INLINE W zip_high_bytes(W a, W b) { return KVQ_ZIPPED(hi, 8, a, b); }
KVQ_INLINE W zip_low_pairs(W a, W b) {
    return KVQ_ZIPPED(lo, 16, a, b); }
KVQ_INLINE W zip_high_pairs(W a, W b) { return KVQ_ZIPPED(hi, 16, a, b); }
#undef KVQ_ZIP
#undef KVQ_ZIPPED
#else
#define KVQ_ZIPPED(...) (W) KVQ_SHUFFLE(Bytes, (Bytes)a, (Bytes)b, __VA_ARGS__)
KVQ_INLINE W zip_low_bytes(W a, W b) {
    return KVQ_ZIPPED(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
KVQ_INLINE W zip_high_bytes(W a, W b) {
    return KVQ_ZIPPED(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}
KVQ_INLINE W zip_low_pairs(W a, W b) {
    return KVQ_ZIPPED(0, 1, 16, 17, 2, 3, 18, 19, 4, 5, 20, 21, 6, 7, 22, 23);
}
KVQ_INLINE W zip_high_pairs(W a, W b) {
    return KVQ_ZIPPED(8, 9, 24, 25, 10, 11, 26, 27, 12, 13, 28, 29, 14, 15, 30, 31);
}
#undef KVQ_ZIPPED
#endif

template <bool kTrellis>
struct Reader<kSixteen, kTrellis> {
    const Column& column;
    W found;

    KVQ_INLINE explicit Reader(const Column& column_) : column(column_) {}
    KVQ_INLINE void open(const int32_t* row, int group) {
        found = nibble_indices<kTrellis>(row + column.offset + group * kUnits * column.width, column.width);
    }
    template <int kHalf>
    KVQ_INLINE void half(F (&level)[4]) const {
        const W index = (kHalf ? found >> 4 : found) & kEven;
        const W a = by_bytes(column.table, index), b = by_bytes(column.table + 4, index);
        const W c = by_bytes(column.table + 8, index), d = by_bytes(column.table + 12, index);
        const W front_low = zip_low_bytes(a, b), front_high = zip_high_bytes(a, b);
        const W back_low = zip_low_bytes(c, d), back_high = zip_high_bytes(c, d);
        level[0] = (F)zip_low_pairs(front_low, back_low);
        level[1] = (F)zip_high_pairs(front_low, back_low);
        level[2] = (F)zip_low_pairs(front_high, back_high);
        level[3] = (F)zip_high_pairs(front_high, back_high);
    }
};

#endif

// For look-ups by nibbles, the trellis is a compile-time constant; otherwise the column says it.
template <int kind, bool trellis>
struct OfKind {
    static constexpr int kKind = kind;
    static constexpr bool kTrellis = trellis;
};

// Call work(OfKind<...>()) for the current kind and codec.
template <class Work>
KVQ_INLINE void with_kind(int32_t kind, bool trellis, Work work) {
    switch (kind) {
        case kConstant: work(OfKind<kConstant, true>()); return;
        case kSixteen: trellis ? work(OfKind<kSixteen, true>()) : work(OfKind<kSixteen, false>()); return;
#if defined(__AVX512F__)
        case kThirtyTwo: work(OfKind<kThirtyTwo, true>()); return;
#endif
        case kComputed: work(OfKind<kComputed, true>()); return;
        default: work(OfKind<kListed, true>()); return;
    }
}

}  // namespace kvq
