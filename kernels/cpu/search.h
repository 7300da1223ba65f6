// Nearest levels of a vector of numbers: the number of boundaries below each.
#pragma once

#include "simd.h"
#include "tables.h"

namespace kvq {

// The nearest level in some of the four subsets of N levels, every kStep-th from kFirst on, and its place in subset s
// as byte s.
template <int L, int N>
struct LinearSearch {
    const float* level;
    const float* boundary;

    KVQ_INLINE explicit LinearSearch(const Channel& channel) : level(channel.level), boundary(channel.boundary) {}

    template <int kFirst, int kStep>
    KVQ_INLINE void find(Floats<L> x, Floats<L>* nearest, Ints<L>& places) const {
        places = Ints<L>{};
#pragma GCC unroll 4
        for (int s = kFirst; s < 4; s += kStep) {
            Floats<L> near = splat<L>(level[s]);
            Ints<L> place = {};
            for (int k = 0; k + 1 < N; k++) {
                const Ints<L> above = x > splat<L>(boundary[4 * k + s]);
                near = above ? splat<L>(level[4 * (k + 1) + s]) : near;
                place -= above;
            }
            nearest[s / kStep] = near;
            places |= place << (8 * s);
        }
    }
};

#if defined(__AVX512F__)
// A look-up of `entries` (16, 32, 64 or 128) floats in one to eight registers.
template <int entries>
KVQ_INLINE __m512 look_up(const float* table, __m512i index) {
    if constexpr (entries == 16) {
        return _mm512_maskz_permutexvar_ps((__mmask16)-1, index, _mm512_load_ps(table));
    } else if constexpr (entries == 32) {
        return _mm512_permutex2var_ps(_mm512_load_ps(table), index, _mm512_load_ps(table + 16));
    } else {
        const __mmask16 high = _mm512_test_epi32_mask(index, _mm512_set1_epi32(entries / 2));
        return _mm512_mask_blend_ps(high, look_up<entries / 2>(table, index),
                                    look_up<entries / 2>(table + entries / 2, index));
    }
}

// The same by one binary search in the boundaries of all subsets together.
template <int N>
struct RankSearch {
    static constexpr int kEntries = rank_entries(N);
    const float* ranks;

    KVQ_INLINE explicit RankSearch(const Channel& channel) : ranks(channel.ranks) {}

    template <int kFirst, int kStep>
    KVQ_INLINE void find(Floats<16> x, Floats<16>* nearest, Ints<16>& places) const {
        // The first step uses one number, the same for all lanes.
        const __mmask16 upper =
            _mm512_cmp_ps_mask(_mm512_set1_ps(ranks[kEntries / 2 - 1]), (__m512)x, _CMP_LT_OQ);
        __m512i rank = _mm512_maskz_set1_epi32(upper, kEntries / 2);
#pragma GCC unroll 8
        for (int step = kEntries / 4; step > 0; step /= 2) {
            const __m512i probe = _mm512_add_epi32(rank, _mm512_set1_epi32(step - 1));
            const __mmask16 below = _mm512_cmp_ps_mask(look_up<kEntries>(ranks, probe), (__m512)x, _CMP_LT_OQ);
            rank = _mm512_mask_add_epi32(rank, below, rank, _mm512_set1_epi32(step));
        }
#pragma GCC unroll 4
        for (int s = kFirst; s < 4; s += kStep)
            nearest[s / kStep] = (Floats<16>)look_up<kEntries>(ranks + (1 + s) * kEntries, rank);
        places = (Ints<16>)look_up<kEntries>(ranks + 5 * kEntries, rank);
    }
};
#endif

#if defined(__AVX2__)
// Subsets of eight levels: each subset's seven boundaries, and its levels, fill one register.
struct OctetSearch {
    __m256 boundary[4], level[4];
    __m256 middle[4];

    KVQ_INLINE explicit OctetSearch(const Channel& channel) {
        for (int s = 0; s < 4; s++) {
            alignas(32) float near[8], edge[8];
            for (int k = 0; k < 8; k++) near[k] = channel.level[4 * k + s];
            for (int k = 0; k < 7; k++) edge[k] = channel.boundary[4 * k + s];
            edge[7] = kInfinity;
            boundary[s] = _mm256_load_ps(edge);
            level[s] = _mm256_load_ps(near);
            middle[s] = _mm256_set1_ps(edge[3]);
        }
    }

    template <int kFirst, int kStep>
    KVQ_INLINE void find(Floats<8> x, Floats<8>* nearest, Ints<8>& places) const {
        places = Ints<8>{};
#pragma GCC unroll 4
        for (int s = kFirst; s < 4; s += kStep) {
            Ints<8> place = ((Floats<8>)middle[s] < x) & 4;
#pragma GCC unroll 2
            for (int step = 2; step > 0; step /= 2) {
                const Ints<8> probe = place + (step - 1);
                place += ((Floats<8>)_mm256_permutevar8x32_ps(boundary[s], (__m256i)probe) < x) & step;
            }
            nearest[s / kStep] = (Floats<8>)_mm256_permutevar8x32_ps(level[s], (__m256i)place);
            places |= place << (8 * s);
        }
    }
};
#endif

// The fastest search for L lanes and subsets of N levels.
template <int L, int N>
struct Search {
    using Type = LinearSearch<L, N>;
};
#if defined(__AVX512F__)
template <int N>
struct RankSearchUpTo32 {
    using Type = RankSearch<N>;
};
template <>
struct Search<16, 4> : RankSearchUpTo32<4> {};
template <>
struct Search<16, 8> : RankSearchUpTo32<8> {};
template <>
struct Search<16, 16> : RankSearchUpTo32<16> {};
template <>
struct Search<16, 32> : RankSearchUpTo32<32> {};
// Whether a group of so many lanes searches by ranks in subsets of so many levels.
constexpr bool searches_ranks(int lanes, int used) { return lanes == 16 && used >= 4 && used <= 32; }
#else
constexpr bool searches_ranks(int, int) { return false; }
#endif
#if defined(__AVX2__)
template <>
struct Search<8, 8> {
    using Type = OctetSearch;
};
#endif

}  // namespace kvq
