// Vectors of L floats or integers in the extensions that GCC and Clang share, so that one source serves every
// instruction set; what a set does better by instructions of its own stands behind the same names.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#define KVQ_INLINE inline __attribute__((always_inline))

namespace kvq {

// Lanes of the widest vector.
#if defined(__AVX512F__)
constexpr int kWidest = 16;
#elif defined(__AVX__)
constexpr int kWidest = 8;
#else
constexpr int kWidest = 4;
#endif

#if defined(__AVX2__) || defined(__ARM_NEON)
constexpr bool kShiftsByLane = true;
#else
constexpr bool kShiftsByLane = false;
#endif

template <int L>
struct Lanes;
template <>
struct Lanes<4> {
    typedef float F __attribute__((vector_size(16)));
    typedef int32_t I __attribute__((vector_size(16)));
    typedef uint8_t B __attribute__((vector_size(4)));
};
template <>
struct Lanes<8> {
    typedef float F __attribute__((vector_size(32)));
    typedef int32_t I __attribute__((vector_size(32)));
    typedef uint8_t B __attribute__((vector_size(8)));
};
template <>
struct Lanes<16> {
    typedef float F __attribute__((vector_size(64)));
    typedef int32_t I __attribute__((vector_size(64)));
    typedef uint8_t B __attribute__((vector_size(16)));
};

template <int L>
using Floats = typename Lanes<L>::F;
template <int L>
using Ints = typename Lanes<L>::I;

template <int L>
KVQ_INLINE Floats<L> splat(float x) {
    return x - Floats<L>{};  // adding would turn -0 into 0
}

// `bits` bits of each word, from `bits` times the lane's number (0 to 3) on.
template <int L, int bits>
KVQ_INLINE Ints<L> field(Ints<L> word, Ints<L> number) {
    if constexpr (kShiftsByLane) {
        word >>= number * bits;
    } else {
        word = (number & 2) != 0 ? word >> (2 * bits) : word;
        word = (number & 1) != 0 ? word >> bits : word;
    }
    return word & ((1 << bits) - 1);
}

// One of four by the lane's number.
template <int L>
KVQ_INLINE Floats<L> pick(const Floats<L>* of, Ints<L> number) {
    const Ints<L> odd = (number & 1) != 0;
    const Floats<L> low = odd ? of[1] : of[0], high = odd ? of[3] : of[2];
    return (number & 2) != 0 ? high : low;
}

template <int L>
KVQ_INLINE bool any(Ints<L> mask) {
    int32_t found = 0;
    for (int lane = 0; lane < L; lane++) found |= mask[lane];
    return found != 0;
}

}  // namespace kvq
