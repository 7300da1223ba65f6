// The widest vectors of the instruction set, and operations of attention beyond arithmetic. Sums may be fused and
// reordered here, because attention must be accurate, not equal bit for bit.
#pragma once

#include "halves.h"

namespace kvq {

constexpr int kLanes = kWidest;
typedef Floats<kLanes> F;
typedef Ints<kLanes> I;
typedef Words<kLanes> W;

#if defined(__AVX512F__)
KVQ_INLINE F fused(F a, F b, F c) { return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
KVQ_INLINE F fused_minus(F a, F b, F c) { return (F)_mm512_fmsub_ps((__m512)a, (__m512)b, (__m512)c); }
#elif defined(__AVX2__)
KVQ_INLINE F fused(F a, F b, F c) { return (F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
KVQ_INLINE F fused_minus(F a, F b, F c) { return (F)_mm256_fmsub_ps((__m256)a, (__m256)b, (__m256)c); }
#elif defined(__ARM_NEON)
KVQ_INLINE F fused(F a, F b, F c) { return (F)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
KVQ_INLINE F fused_minus(F a, F b, F c) { return (F)vfmaq_f32((float32x4_t)-c, (float32x4_t)a, (float32x4_t)b); }
#else
KVQ_INLINE F fused(F a, F b, F c) { return a * b + c; }
KVQ_INLINE F fused_minus(F a, F b, F c) { return a * b - c; }
#endif

KVQ_INLINE F all(float x) { return splat<kLanes>(x); }

// Four floats in every four lanes.
KVQ_INLINE F repeated(const float* quad) {
#if defined(__AVX512F__)
    return (F)_mm512_broadcast_f32x4(_mm_loadu_ps(quad));
#elif defined(__AVX2__)
    return (F)_mm256_broadcast_ps(reinterpret_cast<const __m128*>(quad));
#else
    return load<F>(quad);
#endif
}

// A float for each four lanes, in their order.
KVQ_INLINE F spread(const float* of) {
#if defined(__AVX512F__)
    const __m512i lane = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    return (F)_mm512_permutexvar_ps(lane, _mm512_castps128_ps512(_mm_loadu_ps(of)));
#elif defined(__AVX2__)
    return (F)_mm256_insertf128_ps(_mm256_castps128_ps256(_mm_set1_ps(of[0])), _mm_set1_ps(of[1]), 1);
#else
    return all(of[0]);
#endif
}

KVQ_INLINE F greater(F a, F b) { return a > b ? a : b; }

// All lanes joined, halves with halves.
template <typename Join>
KVQ_INLINE float joined(F x, Join join) {
    float halves[kLanes];
    store(halves, x);
    for (int n = kLanes / 2; n > 0; n /= 2)
        for (int lane = 0; lane < n; lane++) halves[lane] = join(halves[lane], halves[lane + n]);
    return halves[0];
}

KVQ_INLINE float sum_of(F x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)x);
#else
    return joined(x, [](float a, float b) { return a + b; });
#endif
}

KVQ_INLINE float greatest_of(F x) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)x);
#else
    return joined(x, [](float a, float b) { return a > b ? a : b; });
#endif
}

// 2 ** x for x up to 127, and at least 2 ** -126. The relative error is 2e-7.
KVQ_INLINE F exp2_of(F x) {
    x = greater(x, all(-126.0f));
    const F nearest = (x + 12582912.0f) - 12582912.0f;  // 1.5 * 2 ** 23: adding it rounds to an integer
    const F rest = x - nearest;
    F power = all(1.5403530e-4f);
    power = fused(power, rest, all(1.3333558e-3f));
    power = fused(power, rest, all(9.6181291e-3f));
    power = fused(power, rest, all(5.5504109e-2f));
    power = fused(power, rest, all(2.4022651e-1f));
    power = fused(power, rest, all(6.9314718e-1f));
    power = fused(power, rest, all(1.0f));
    return (F)((I)power + (__builtin_convertvector(nearest, I) << 23));
}

// The hyperbolic tangent, with an error of 1e-7.
KVQ_INLINE F tanh_of(F x) {
    const F bound = all(15.0f);  // from here on it is 1 in float32
    x = x > bound ? bound : x < -bound ? -bound : x;
    return 1.0f - 2.0f / (exp2_of(x * 2.88539008f) + 1.0f);
}

// Prefetch memory that will be read soon.
KVQ_INLINE void fetch(const void* from, int64_t bytes) {
    const char* line = static_cast<const char*>(from);
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(line + at);
}

}  // namespace kvq
