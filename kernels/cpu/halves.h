// Conversions of float16 and bfloat16, the storage types. Rounding is as in torch: to nearest, ties to even.
#pragma once

#include "simd.h"

namespace kvq {

KVQ_INLINE float from_bfloat(uint16_t bits) {
    const uint32_t word = static_cast<uint32_t>(bits) << 16;
    float number;
    std::memcpy(&number, &word, 4);
    return number;
}

// From a finite number.
KVQ_INLINE float from_half(uint16_t bits) {
#if defined(__F16C__)
    return _cvtsh_ss(bits);
#else
    float number;
    if ((bits & 0x7c00) == 0) {  // below the normal numbers
        number = static_cast<float>(bits & 0x3ff) * 5.9604644775390625e-8f;
        return bits & 0x8000 ? -number : number;
    }
    const uint32_t size = (static_cast<uint32_t>(bits & 0x7fff) << 13) + 0x38000000u;
    const uint32_t word = static_cast<uint32_t>(bits & 0x8000) << 16 | size;
    std::memcpy(&number, &word, 4);
    return number;
#endif
}

// Larger numbers become infinite.
KVQ_INLINE uint16_t to_bfloat(float x) {
    uint32_t word;
    std::memcpy(&word, &x, 4);
    return static_cast<uint16_t>((word + 0x7fffu + (word >> 16 & 1)) >> 16);
}

KVQ_INLINE uint16_t to_half(float x) {
#if defined(__F16C__)
    return static_cast<uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT));
#else
    uint32_t word;
    std::memcpy(&word, &x, 4);
    const uint32_t sign = word >> 16 & 0x8000, size = word & 0x7fffffff;
    if (size >= 0x47800000) return static_cast<uint16_t>(sign | 0x7c00);  // 65536 and more
    if (size < 0x38800000) {  // below the normal numbers: adding 0.5 rounds to their step
        float shifted;
        std::memcpy(&shifted, &size, 4);
        shifted += 0.5f;
        std::memcpy(&word, &shifted, 4);
        return static_cast<uint16_t>(sign | (word - 0x3f000000));
    }
    return static_cast<uint16_t>(sign | ((size + 0xc8000fff + (size >> 13 & 1)) >> 13));
#endif
}

KVQ_INLINE float half_to_float(uint16_t bits, bool bfloat) { return bfloat ? from_bfloat(bits) : from_half(bits); }
KVQ_INLINE uint16_t float_to_half(float x, bool bfloat) { return bfloat ? to_bfloat(x) : to_half(x); }
KVQ_INLINE bool is_finite(uint16_t bits, bool bfloat) {
    const uint16_t exponent = bfloat ? 0x7f80 : 0x7c00;
    return (bits & exponent) != exponent;
}

// Convert `count` numbers.
inline void halves_to_floats(const uint16_t* from, int count, bool bfloat, float* to) {
    int i = 0;
#if defined(__F16C__)
    if (!bfloat)
        for (; i + 8 <= count; i += 8)
            _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
#endif
    for (; i < count; i++) to[i] = half_to_float(from[i], bfloat);
}

// Convert to the storage type. Return whether all results are finite.
inline bool floats_to_halves(const float* from, int count, bool bfloat, uint16_t* to) {
    int i = 0;
    bool finite = true;
#if defined(__F16C__)
    if (!bfloat)
        for (; i + 8 <= count; i += 8)
            _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                             _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
#endif
    for (; i < count; i++) to[i] = float_to_half(from[i], bfloat);
    for (i = 0; i < count; i++) finite &= is_finite(to[i], bfloat) && from[i] == from[i];
    return finite;
}

}  // namespace kvq
