// Converts packed words to indices of levels; kvq_calib/codec/packing.py defines the places of codes.
// A unit is the words of one channel and block: 32 codes in four slices of eight tokens. A vector has the slices of
// kUnits blocks, one slice per lane, so a page of eight blocks is kGroups vectors of each channel. A vector gives eight
// vectors of levels. The vector and lane of a token depend on the instruction set: token_place() defines them, and
// nothing else depends on them.
#pragma once

#include "page.h"
#include "wide.h"

namespace kvq {

constexpr int kUnits = kLanes / 4;
constexpr int kGroups = kPageBlocks / kUnits;
// Vectors of levels of a group, and of a page.
constexpr int kVectors = 8;
constexpr int kPageVectors = kPageTokens / kLanes;

#if defined(__AVX512F__)
// Vector k has the nibbles k, one slice per lane.
constexpr bool kNibbleOrder = true;
#else
// Byte-wise look-ups: four vectors of the even nibbles, a slice each, then four of the odd ones.
constexpr bool kNibbleOrder = false;
#endif

// The vector of its group, and the lane among four, in which a token of a block stands.
constexpr int vector_of(int token) { return kNibbleOrder ? token & 7 : (token & 1) * 4 + (token >> 3); }
constexpr int quad_lane_of(int token) { return kNibbleOrder ? token >> 3 : token >> 1 & 3; }
// The token at a place.
constexpr int token_at(int vector, int quad_lane) {
    return kNibbleOrder ? quad_lane * 8 + vector : (vector & 3) * 8 + 2 * quad_lane + (vector >> 2);
}
// The index of a token among the kPageTokens floats of a page.
constexpr int token_place(int block, int token) {
    return (block / kUnits * kVectors + vector_of(token)) * kLanes + block % kUnits * 4 + quad_lane_of(token);
}

constexpr uint32_t kLowest = 0x11111111u;  // bit of each nibble
constexpr uint32_t kEven = 0x0f0f0f0fu, kOdd = 0xf0f0f0f0u;

// Each four lanes moved up by a byte, or by eight.
KVQ_INLINE W up_a_byte(W x) {
#if defined(__AVX512F__)
    return (W)_mm512_bslli_epi128((__m512i)x, 1);
#elif defined(__AVX2__)
    return (W)_mm256_bslli_epi128((__m256i)x, 1);
#elif defined(__SSE2__)
    return (W)_mm_bslli_si128((__m128i)x, 1);
#else
    return (W)KVQ_SHUFFLE(Bytes, Bytes{}, (Bytes)x, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30);
#endif
}

// Slices with the codes of up to four bits in nibbles. Bits of a nibble above the code are undefined.
#if defined(__AVX512F__)

// From four contiguous units of `width` words each, at the front of `raw`.
KVQ_INLINE W slices_of(__m512i raw, int width) {
    switch (width) {
        case 4: return (W)raw;
        case 3: {
            // The fourth slice is the top bits of the other three.
            const __m512i place = _mm512_setr_epi32(0, 1, 2, 0, 3, 4, 5, 3, 6, 7, 8, 6, 9, 10, 11, 9);
            const __m512i by = _mm512_set_epi32(0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3);
            const __m512i mask = _mm512_set4_epi32(0, 0x44444444, 0x22222222, 0x11111111);
            const __m512i x = _mm512_permutexvar_epi32(place, raw);
            const __m512i top = _mm512_and_si512(_mm512_srlv_epi32(x, by), mask);
            const __m512i swapped = _mm512_or_si512(top, _mm512_shuffle_epi32(top, _MM_PERM_BADC));
            const __m512i joined = _mm512_or_si512(swapped, _mm512_shuffle_epi32(swapped, _MM_PERM_CDAB));
            return (W)_mm512_mask_blend_epi32(0x8888, x, joined);
        }
        case 2: {
            const __m512i place = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
            const __m512i by = _mm512_set4_epi32(2, 0, 2, 0);
            return (W)_mm512_srlv_epi32(_mm512_permutexvar_epi32(place, raw), by);
        }
        case 1: {
            const __m512i place = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
            return (W)_mm512_srlv_epi32(_mm512_permutexvar_epi32(place, raw), _mm512_set4_epi32(3, 2, 1, 0));
        }
        default: return W{};
    }
}

KVQ_INLINE __mmask16 first_words(int count) { return static_cast<__mmask16>((1u << count) - 1); }

// The units of a group, up to four bits.
KVQ_INLINE W low_slices(const int32_t* words, int width) {
    return slices_of(_mm512_maskz_loadu_epi32(first_words(4 * width), words), width);
}

// Above four bits: the low four bits, and those above them.
KVQ_INLINE void wide_slices(const int32_t* words, int width, W& low, W& high) {
    const __m512i front = _mm512_loadu_si512(words);
    const __m512i back = _mm512_maskz_loadu_epi32(first_words(4 * width - 16), words + 16);
    const __m512i unit = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    const __m512i word = _mm512_set4_epi32(3, 2, 1, 0);
    const __m512i start = _mm512_mullo_epi32(unit, _mm512_set1_epi32(width));
    low = (W)_mm512_permutex2var_epi32(front, _mm512_add_epi32(start, word), back);
    // Lane n of the contiguous high words: word n % above of unit n / above. Further places are not used.
    const int above = width - 4;
    static const uint8_t kUnitOf[5][16] = {{},
                                           {0, 1, 2, 3},
                                           {0, 0, 1, 1, 2, 2, 3, 3},
                                           {0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3},
                                           {0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3}};
    const __m512i of = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)kUnitOf[above]));
    const __m512i number = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    // of * width + 4 + (number - of * above)
    const __m512i place = _mm512_add_epi32(number, _mm512_slli_epi32(_mm512_add_epi32(of, _mm512_set1_epi32(1)), 2));
    high = slices_of(_mm512_permutex2var_epi32(front, place, back), above);
    high &= kLowest * ((1u << above) - 1);
}

#else

// Of one unit.
KVQ_INLINE Words<4> unit_slices(const int32_t* words, int width) {
    const uint32_t* w = reinterpret_cast<const uint32_t*>(words);
    switch (width) {
        case 4: return load<Words<4>>(words);
        case 3: {
            // The fourth slice is the top bits of the other three.
            const uint32_t top = (w[0] >> 3 & kLowest) | (w[1] >> 2 & 2 * kLowest) | (w[2] >> 1 & 4 * kLowest);
            return Words<4>{w[0], w[1], w[2], top};
        }
        case 2: return Words<4>{w[0], w[0] >> 2, w[1], w[1] >> 2};
        case 1: return Words<4>{w[0], w[0] >> 1, w[0] >> 2, w[0] >> 3};
        default: return Words<4>{};
    }
}

// The units of a group, `step` words apart.
KVQ_INLINE W group_slices(const int32_t* words, int width, int step) {
#if defined(__AVX2__)
    const __m128i first = (__m128i)unit_slices(words, width), second = (__m128i)unit_slices(words + step, width);
    return (W)_mm256_inserti128_si256(_mm256_castsi128_si256(first), second, 1);
#else
    (void)step;
    return unit_slices(words, width);
#endif
}

KVQ_INLINE W low_slices(const int32_t* words, int width) { return group_slices(words, width, width); }

KVQ_INLINE void wide_slices(const int32_t* words, int width, W& low, W& high) {
    low = group_slices(words, 4, width);
    high = group_slices(words + 4, width - 4, width) & (kLowest * ((1u << (width - 4)) - 1));
}

#endif

// The four low bits of the indices that a trellis makes of slices of codes: of code c[t] = 2 f + u it is
// 4 f + 2 (u[t] ^ u[t - 2]) + u[t - 1], where f is not masked beyond three bits of the code.
KVQ_INLINE W trellis_nibbles(W slices, int width) {
    const W lowest = slices & kLowest;
    const W two_before = up_a_byte(lowest);
    const W before = (lowest << 4) | (two_before >> 4 & 1u);
    const int kept = width < 3 ? width : 3;
    const W doubled = ((slices & (kLowest * ((1u << kept) - 1))) ^ two_before) << 1;
    return doubled | before;
}

// Indices of up to four bits in nibbles. With a trellis the bits above are clear, without undefined.
template <bool kTrellis>
KVQ_INLINE W nibble_indices(const int32_t* words, int width) {
    const W slices = low_slices(words, width);
    return kTrellis ? trellis_nibbles(slices, width) : slices;
}

// Indices of up to eight bits: bytes of the even nibbles' tokens, and of the odd ones'.
struct Indices {
    W even, odd;
};

KVQ_INLINE Indices byte_indices(const int32_t* words, int width, bool trellis) {
    W low, high = {};
    if (width > 4) {
        wide_slices(words, width, low, high);
    } else {
        low = low_slices(words, width);
        if (!trellis && width < 4) low &= kLowest * ((1u << width) - 1);
    }
    if (!trellis) return {(low & kEven) | (high << 4 & kOdd), (low >> 4 & kEven) | (high & kOdd)};
    const W nibbles = trellis_nibbles(low, width);
    Indices found = {nibbles & kEven, nibbles >> 4 & kEven};
    if (width >= 4) {  // from here on an index has five bits and more
        found.even |= (low << 1 & 0x10101010u) | (high << 5 & 0xe0e0e0e0u);
        found.odd |= (low >> 3 & 0x10101010u) | (high << 1 & 0xe0e0e0e0u);
    }
    return found;
}

}  // namespace kvq
