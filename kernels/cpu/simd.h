// Vectors of L floats or integers, in the extensions that GCC and Clang share, so that there is one source for all
// instruction sets. Faster instructions of a set are hidden behind common names.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 finds both in its own intrinsics
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#if defined(__SSSE3__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define KVQ_INLINE inline __attribute__((always_inline))
#define KVQ_ALWAYS_INLINE __attribute__((always_inline))

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
    typedef uint32_t W __attribute__((vector_size(16)));
    typedef uint8_t B __attribute__((vector_size(4)));
};
template <>
struct Lanes<8> {
    typedef float F __attribute__((vector_size(32)));
    typedef int32_t I __attribute__((vector_size(32)));
    typedef uint32_t W __attribute__((vector_size(32)));
    typedef uint8_t B __attribute__((vector_size(8)));
};
template <>
struct Lanes<16> {
    typedef float F __attribute__((vector_size(64)));
    typedef int32_t I __attribute__((vector_size(64)));
    typedef uint32_t W __attribute__((vector_size(64)));
    typedef uint8_t B __attribute__((vector_size(16)));
};

template <int L>
using Floats = typename Lanes<L>::F;
template <int L>
using Ints = typename Lanes<L>::I;
template <int L>
using Words = typename Lanes<L>::W;

// Four floats, and sixteen bytes.
typedef float Quad __attribute__((vector_size(16)));
typedef uint8_t Bytes __attribute__((vector_size(16)));

#if defined(__clang__)
#define KVQ_SHUFFLE(Order, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define KVQ_SHUFFLE(Order, a, b, ...) __builtin_shuffle(a, b, Order{__VA_ARGS__})
#endif
#define KVQ_QUADS(a, b, ...) KVQ_SHUFFLE(Ints<4>, a, b, __VA_ARGS__)

template <class Vector>
KVQ_INLINE Vector load(const void* from) {
    Vector vector;
    std::memcpy(&vector, from, sizeof vector);
    return vector;
}
template <class Vector>
KVQ_INLINE void store(void* to, Vector vector) {
    std::memcpy(to, &vector, sizeof vector);
}

KVQ_INLINE void transpose(Quad (&q)[4]) {
    const Quad a = KVQ_QUADS(q[0], q[1], 0, 4, 1, 5), b = KVQ_QUADS(q[0], q[1], 2, 6, 3, 7);
    const Quad c = KVQ_QUADS(q[2], q[3], 0, 4, 1, 5), d = KVQ_QUADS(q[2], q[3], 2, 6, 3, 7);
    q[0] = KVQ_QUADS(a, c, 0, 1, 4, 5);
    q[1] = KVQ_QUADS(a, c, 2, 3, 6, 7);
    q[2] = KVQ_QUADS(b, d, 0, 1, 4, 5);
    q[3] = KVQ_QUADS(b, d, 2, 3, 6, 7);
}

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
template <int L, class Vector>
KVQ_INLINE Vector pick(const Vector* of, Ints<L> number) {
    const Ints<L> odd = (number & 1) != 0;
    const Vector low = odd ? of[1] : of[0], high = odd ? of[3] : of[2];
    return (number & 2) != 0 ? high : low;
}

template <int L>
KVQ_INLINE bool any(Ints<L> mask) {
    int32_t found = 0;
    for (int lane = 0; lane < L; lane++) found |= mask[lane];
    return found != 0;
}

}  // namespace kvq
