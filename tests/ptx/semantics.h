// What PTX instructions do, after the PTX ISA (version 9.0), on the fibers of cuda_shim.h. Registers are unsigned
// integers, floats and bools; an instruction's type says how it reads them.
#pragma once

#include <type_traits>

#include "cuda_shim.h"
#include "memory.h"

namespace ptx {

typedef int8_t s8;
typedef int16_t s16;
typedef int32_t s32;
typedef int64_t s64;
typedef uint8_t u8, b8;
typedef uint16_t u16, b16;
typedef uint32_t u32, b32;
typedef uint64_t u64, b64;
typedef float f32;
typedef double f64;
typedef bool pred;
struct f16 { uint16_t bits; };
struct bf16 { uint16_t bits; };
struct f16x2 { uint32_t bits; };

// ---- registers -----------------------------------------------------------------------------------------------

// A value as a register of another kind: floats by their bits, integers extended as their sign says.
template <class To, class From> To into(From value) {
    if constexpr (std::is_same_v<To, From>) {
        return value;
    } else if constexpr (std::is_same_v<From, f16> || std::is_same_v<From, bf16> || std::is_same_v<From, f16x2>) {
        return into<To>(value.bits);
    } else if constexpr (std::is_same_v<To, f16> || std::is_same_v<To, bf16>) {
        return {into<uint16_t>(value)};
    } else if constexpr (std::is_same_v<To, f16x2>) {
        return {into<uint32_t>(value)};
    } else if constexpr (std::is_floating_point_v<From>) {
        std::conditional_t<sizeof(From) == 4, uint32_t, uint64_t> bits;
        memcpy(&bits, &value, sizeof(From));
        return into<To>(bits);
    } else if constexpr (std::is_floating_point_v<To>) {
        const std::conditional_t<sizeof(To) == 4, uint32_t, uint64_t> bits = value;
        To result;
        memcpy(&result, &bits, sizeof(To));
        return result;
    } else {
        return To(value);
    }
}
template <class T, class X> T as(X value) { return into<T>(value); }

template <class A, class B> void split(uint32_t value, A &low, B &high) {
    low = into<A>(uint16_t(value)), high = into<B>(uint16_t(value >> 16));
}
template <class A, class B> void split(uint64_t value, A &low, B &high) {
    low = into<A>(uint32_t(value)), high = into<B>(uint32_t(value >> 32));
}
template <class A, class B> auto join(A low, B high) {
    if constexpr (sizeof(A) == 2)
        return uint32_t(into<uint16_t>(low)) | uint32_t(into<uint16_t>(high)) << 16;
    else
        return uint64_t(into<uint32_t>(low)) | uint64_t(into<uint32_t>(high)) << 32;
}

// ---- integers ------------------------------------------------------------------------------------------------

template <class T> using wide = std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>;
template <class T> using bits_of = std::make_unsigned_t<T>;

#define PTX_BINARY(name, expression)                                      \
    template <class T, class A, class B> T name(A first, B second) {      \
        const T a = as<T>(first), b = as<T>(second);                      \
        return T(expression);                                             \
    }

template <class T, class A> T op_mov(A a) { return as<T>(a); }
template <class T, class A, class B> T op_add(A first, B second) {
    if constexpr (std::is_floating_point_v<T>)
        return as<T>(first) + as<T>(second);
    else
        return T(bits_of<T>(as<T>(first)) + bits_of<T>(as<T>(second)));
}
template <class T, class A, class B> T op_sub(A first, B second) {
    if constexpr (std::is_floating_point_v<T>)
        return as<T>(first) - as<T>(second);
    else
        return T(bits_of<T>(as<T>(first)) - bits_of<T>(as<T>(second)));
}
template <class T, class A, class B> T op_mul_lo(A a, B b) { return T(uint64_t(as<T>(a)) * uint64_t(as<T>(b))); }
template <class T, class A, class B> T op_mul_hi(A a, B b) {
    typedef std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128> Twice;
    return T(Twice(as<T>(a)) * Twice(as<T>(b)) >> (8 * sizeof(T)));
}
template <class T, class A, class B> wide<T> op_mul_wide(A a, B b) {
    const wide<T> product = wide<T>(as<T>(a)) * wide<T>(as<T>(b));
    return sizeof(T) == 2 ? wide<T>(std::conditional_t<std::is_signed_v<T>, int32_t, uint32_t>(product)) : product;
}
template <class T, class A, class B, class C> T op_mad_lo(A a, B b, C c) {
    return T(uint64_t(as<T>(a)) * uint64_t(as<T>(b)) + uint64_t(as<T>(c)));
}
template <class T, class A, class B, class C> wide<T> op_mad_wide(A a, B b, C c) {
    return op_mul_wide<T>(a, b) + as<wide<T>>(c);
}
PTX_BINARY(op_div, b ? a / b : T(-1))
PTX_BINARY(op_rem, b ? a % b : a)
PTX_BINARY(op_and, a & b)
PTX_BINARY(op_or, a | b)
PTX_BINARY(op_xor, a ^ b)
PTX_BINARY(op_min, a < b ? a : b)
template <class T, class A> T op_not(A a) {
    if constexpr (std::is_same_v<T, bool>)
        return !a;
    else
        return T(~as<T>(a));
}
template <class T, class A> T op_neg(A a) {
    if constexpr (std::is_same_v<T, f16x2>)
        return {as<uint32_t>(a) ^ 0x80008000u};
    else if constexpr (std::is_floating_point_v<T>)
        return -as<T>(a);
    else
        return T(-bits_of<T>(as<T>(a)));
}
template <class T, class A> T op_abs(A a) {
    if constexpr (std::is_floating_point_v<T>)
        return std::fabs(as<T>(a));
    else
        return as<T>(a) < 0 ? T(-bits_of<T>(as<T>(a))) : as<T>(a);
}
// Shifts by the width or more give zeros, or the sign.
template <class T, class A, class B> T op_shl(A a, B by) {
    const uint32_t shift = as<uint32_t>(by);
    return shift >= 8 * sizeof(T) ? T(0) : T(bits_of<T>(as<T>(a)) << shift);
}
template <class T, class A, class B> T op_shr(A a, B by) {
    const uint32_t shift = as<uint32_t>(by), most = 8 * sizeof(T) - 1;
    if (shift > most) return std::is_signed_v<T> ? T(as<T>(a) >> most) : T(0);
    return T(as<T>(a) >> shift);
}
template <class T, class A, class B, class C> T op_shf_l_wrap(A low, B high, C by) {
    const uint32_t shift = as<uint32_t>(by) & 31u;
    return uint32_t((uint64_t(as<T>(high)) << 32 | as<T>(low)) << shift >> 32);
}
template <class T, class A, class B, class C> T op_shf_r_wrap(A low, B high, C by) {
    const uint32_t shift = as<uint32_t>(by) & 31u;
    return uint32_t((uint64_t(as<T>(high)) << 32 | as<T>(low)) >> shift);
}
template <class T, class A> uint32_t op_popc(A a) { return uint32_t(__builtin_popcountll(as<T>(a))); }
template <class T, class A> uint32_t op_clz(A a) {
    const T x = as<T>(a);
    return x ? uint32_t(__builtin_clzll(uint64_t(x))) - (64 - 8 * sizeof(T)) : uint32_t(8 * sizeof(T));
}
template <class T, class A> T op_brev(A a) {
    T result = 0;
    for (unsigned i = 0; i < 8 * sizeof(T); ++i) result |= T(as<T>(a) >> i & 1) << (8 * sizeof(T) - 1 - i);
    return result;
}
template <class T, class A> uint32_t op_bfind_shiftamt(A a) {
    const uint32_t x = as<uint32_t>(a);
    return x ? uint32_t(__builtin_clz(x)) : 0xffffffffu;
}
template <class T, class A, class B, class C, class D> T op_bfi(A a, B b, C position, D length) {
    const uint32_t p = as<uint32_t>(position) & 255u, n = as<uint32_t>(length) & 255u;
    T result = as<T>(b);
    for (uint32_t i = 0; i < n && p + i < 8 * sizeof(T); ++i) {
        const T bit = T(1) << (p + i);
        result = T((result & ~bit) | (as<T>(a) >> i & 1 ? bit : T(0)));
    }
    return result;
}
template <class T, class A, class C, class D> T op_bfe(A a, C position, D length) {
    const uint32_t p = as<uint32_t>(position) & 255u, n = as<uint32_t>(length) & 255u, top = 8 * sizeof(T) - 1;
    const bits_of<T> x = bits_of<T>(as<T>(a));
    const bool sign = std::is_signed_v<T> && n && (x >> std::min(p + n - 1, top) & 1);
    bits_of<T> result = 0;
    for (uint32_t i = 0; i <= top; ++i) {
        const bool bit = i < n && p + i <= top ? x >> (p + i) & 1 : sign;
        result |= bits_of<T>(bit) << i;
    }
    return T(result);
}
template <class T, class A, class B, class C> T op_prmt(A first, B second, C control) {
    const uint64_t bytes = uint64_t(as<uint32_t>(second)) << 32 | as<uint32_t>(first);
    uint32_t result = 0;
    for (int i = 0; i < 4; ++i) {
        const uint32_t selector = as<uint32_t>(control) >> (4 * i) & 15u;
        uint32_t byte = uint32_t(bytes >> (8 * (selector & 7u))) & 255u;
        if (selector & 8u) byte = byte & 128u ? 255u : 0u;
        result |= byte << (8 * i);
    }
    return result;
}
template <class T, class A, class B, class C, class D> T op_lop3(A a, B b, C c, D table) {
    const uint32_t x = as<uint32_t>(a), y = as<uint32_t>(b), z = as<uint32_t>(c), look_up = as<uint32_t>(table);
    uint32_t result = 0;
    for (int row = 0; row < 8; ++row)
        if (look_up >> row & 1u) result |= (row & 4 ? x : ~x) & (row & 2 ? y : ~y) & (row & 1 ? z : ~z);
    return result;
}
template <class T, class A, class B> T op_selp(A a, B b, bool choose) { return choose ? as<T>(a) : as<T>(b); }

// ---- comparisons: of floats, those without u are false where an operand is no number -------------------------

#define PTX_COMPARE(name, expression, unordered)                            \
    template <class T, class A, class B> bool op_setp_##name(A first, B second) { \
        const T a = as<T>(first), b = as<T>(second);                        \
        if constexpr (std::is_floating_point_v<T>)                          \
            if (std::isnan(a) || std::isnan(b)) return unordered;           \
        return expression;                                                  \
    }
PTX_COMPARE(eq, a == b, false)
PTX_COMPARE(ne, a != b, false)
PTX_COMPARE(lt, a < b, false)
PTX_COMPARE(le, a <= b, false)
PTX_COMPARE(gt, a > b, false)
PTX_COMPARE(ge, a >= b, false)
PTX_COMPARE(equ, a == b, true)
PTX_COMPARE(neu, a != b, true)
PTX_COMPARE(ltu, a < b, true)
PTX_COMPARE(leu, a <= b, true)
PTX_COMPARE(gtu, a > b, true)
PTX_COMPARE(geu, a >= b, true)
PTX_COMPARE(num, true, false)
PTX_COMPARE(nan, false, true)

// ---- floats --------------------------------------------------------------------------------------------------

inline float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }
inline float half_to_float(uint16_t bits) { return shim::half_table()[bits]; }
inline uint16_t float_to_half(double x) { return shim::half_bits(x); }

template <class T, class A, class B> T op_add_rn(A a, B b) { return as<T>(a) + as<T>(b); }
template <class T, class A, class B> T op_sub_rn(A a, B b) { return as<T>(a) - as<T>(b); }
template <class T, class A, class B> T op_div_rn(A a, B b) { return as<T>(a) / as<T>(b); }
template <class T, class A, class B> T op_div_approx(A a, B b) { return as<T>(a) / as<T>(b); }
template <class T, class A> T op_rcp_rn(A a) { return T(1) / as<T>(a); }
template <class T, class A> T op_rcp_approx_ftz(A a) { return flushed(1.0f / flushed(as<T>(a))); }
template <class T, class A> T op_sqrt_rn(A a) { return std::sqrt(as<T>(a)); }
template <class T, class A> T op_ex2_approx_ftz(A a) { return flushed(std::exp2(flushed(as<T>(a)))); }
template <class T, class A> T op_sin_approx(A a) { return std::sin(as<T>(a)); }
template <class T, class A> T op_cos_approx(A a) { return std::cos(as<T>(a)); }
template <class T, class A, class B> T op_copysign(A sign, B magnitude) {
    return std::copysign(as<T>(magnitude), as<T>(sign));
}
template <class T, class A, class B> T op_max(A first, B second) {
    const T a = as<T>(first), b = as<T>(second);
    if constexpr (std::is_floating_point_v<T>) return std::isnan(a) ? b : std::isnan(b) ? a : a < b ? b : a;
    return a < b ? b : a;
}

// Two halves at a time; every product and sum is rounded once.
template <class T, class Body> T of_halves(Body body) {
    return {uint32_t(float_to_half(body(0))) | uint32_t(float_to_half(body(16))) << 16};
}
inline double half_of(uint32_t bits, int shift) { return half_to_float(uint16_t(bits >> shift)); }
template <class T, class A, class B> T op_mul(A a, B b) {
    if constexpr (std::is_same_v<T, f16x2>)
        return of_halves<T>([&](int s) { return half_of(as<uint32_t>(a), s) * half_of(as<uint32_t>(b), s); });
    else
        return as<T>(a) * as<T>(b);
}
template <class T, class A, class B> T op_mul_rn(A a, B b) { return op_mul<T>(a, b); }
template <class T, class A, class B, class C> T op_fma_rn(A a, B b, C c) {
    if constexpr (std::is_same_v<T, f16x2>)
        return of_halves<T>([&](int s) {
            return half_of(as<uint32_t>(a), s) * half_of(as<uint32_t>(b), s) + half_of(as<uint32_t>(c), s);
        });
    else
        return std::fma(as<T>(a), as<T>(b), as<T>(c));
}

// Conversions: <to, from>.
template <class To, class From, class A> auto op_cvt(A a) {
    const From x = as<From>(a);
    if constexpr (std::is_same_v<To, f32> && std::is_same_v<From, f16>)
        return half_to_float(x.bits);
    else if constexpr (std::is_same_v<To, f32> && std::is_same_v<From, bf16>)
        return into<float>(uint32_t(x.bits) << 16);
    else
        return To(x);
}
template <class To, class From, class A> To op_cvt_rn(A a) {
    const From x = as<From>(a);
    if constexpr (std::is_same_v<To, f16>) {
        return {float_to_half(x)};
    } else if constexpr (std::is_same_v<To, bf16>) {
        const uint32_t bits = into<uint32_t>(x);
        if (std::isnan(x)) return {0x7fff};
        return {uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
    } else {
        return To(x);  // the host rounds to nearest, ties to even
    }
}
template <class To, class From, class A, class B> To op_cvt_rn(A high, B low) {
    static_assert(std::is_same_v<To, f16x2>, "two floats to two halves");
    return {uint32_t(float_to_half(as<From>(low))) | uint32_t(float_to_half(as<From>(high))) << 16};
}
template <class To, class From, class A> To op_cvt_rzi(A a) { return To(std::trunc(as<From>(a))); }
template <class To, class From, class A> To op_cvt_rni(A a) { return To(std::nearbyint(as<From>(a))); }
template <class To, class From, class A> To op_cvt_rmi(A a) { return To(std::floor(as<From>(a))); }

// ---- warps ---------------------------------------------------------------------------------------------------

constexpr int kFirstSite = 100;  // sites stand in the place of the shim's operations

inline void all_lanes(uint32_t mask) {
    if (mask != 0xffffffffu) shim::fail("an operation of a part of a warp");
}
template <class Compute> uint32_t of_warp(int site, uint32_t value, Compute compute) {
    return *shim::exchange(kFirstSite + site, &value, 1, compute);
}

inline void warp_barrier(int site, int64_t mask) {
    all_lanes(uint32_t(mask));
    shim::exchange(kFirstSite + site, nullptr, 0, [](auto &, auto &) {});
    pass_warp_barrier();
}
inline void barrier() {
    __syncthreads();
    pass_barrier();
}

// The lane that each reads: shfl.sync.mode d|p, a, b, c, mask; p is whether that lane is in the segment.
template <class Source, class A, class B, class C, class M>
uint32_t shuffle(int site, A a, B b, C c, M mask, bool &own_inside, Source source) {
    all_lanes(as<uint32_t>(mask));
    const uint32_t in[3] = {as<uint32_t>(a), as<uint32_t>(b), as<uint32_t>(c)};
    const uint32_t *out = shim::exchange(kFirstSite + site, in, 3, [source](auto &from, auto &to) {
        for (int lane = 0; lane < 32; ++lane) {
            const int by = from[lane][1] & 31, clamp = from[lane][2] & 31, segment = from[lane][2] >> 8 & 31;
            const int most = (lane & segment) | (clamp & ~segment), least = lane & segment;
            bool inside;
            const int other = source(lane, by, most, least, segment, inside);
            to[lane][0] = from[inside ? other : lane][0];
            to[lane][1] = inside;
        }
    });
    own_inside = out[1];
    return out[0];
}
#define PTX_SHUFFLE(mode, lane_expression, inside_expression)                                            \
    template <class A, class B, class C, class M>                                                        \
    uint32_t shfl_##mode(int site, A a, B b, C c, M mask, bool &own_inside) {                            \
        return shuffle(site, a, b, c, mask, own_inside,                                                  \
                       [](int lane, int by, int most, int least, int segment, bool &inside) {            \
                           const int j = lane_expression;                                                \
                           inside = inside_expression;                                                   \
                           return j;                                                                     \
                       });                                                                               \
    }
PTX_SHUFFLE(up, lane - by, j >= most)
PTX_SHUFFLE(down, lane + by, j <= most)
PTX_SHUFFLE(bfly, lane ^ by, j <= most)
PTX_SHUFFLE(idx, least | (by & ~segment), j <= most)

template <class M> uint32_t vote_ballot(int site, bool own, M mask) {
    all_lanes(as<uint32_t>(mask));
    return of_warp(site, own, [](auto &from, auto &to) {
        uint32_t votes = 0;
        for (int lane = 0; lane < 32; ++lane) votes |= from[lane][0] << lane;
        for (int lane = 0; lane < 32; ++lane) to[lane][0] = votes;
    });
}
template <class M> bool vote_any(int site, bool own, M mask) { return vote_ballot(site, own, mask) != 0; }
template <class M> bool vote_all(int site, bool own, M mask) { return vote_ballot(site, own, mask) == 0xffffffffu; }

template <class T, class A, class M, class Join> uint32_t reduce(int site, A own, M mask, Join join) {
    all_lanes(as<uint32_t>(mask));
    return of_warp(site, as<uint32_t>(own), [join](auto &from, auto &to) {
        T all = T(from[0][0]);
        for (int lane = 1; lane < 32; ++lane) all = join(all, T(from[lane][0]));
        for (int lane = 0; lane < 32; ++lane) to[lane][0] = uint32_t(all);
    });
}
template <class T, class A, class M> uint32_t redux_add(int site, A own, M mask) {
    return reduce<u32>(site, own, mask, [](u32 a, u32 b) { return a + b; });
}
template <class T, class A, class M> uint32_t redux_max(int site, A own, M mask) {
    return reduce<T>(site, own, mask, [](T a, T b) { return a < b ? b : a; });
}
template <class T, class A, class M> uint32_t redux_min(int site, A own, M mask) {
    return reduce<T>(site, own, mask, [](T a, T b) { return b < a ? b : a; });
}

// ---- matrices ------------------------------------------------------------------------------------------------

// Fragments of mma.m16n8k16 with f16: of A, a0 and a1 (the first register) are row lane / 4, a2 and a3 eight rows on,
// a4 and a5 eight columns on, a6 and a7 both; columns 2 (lane % 4) and the next. Of B, b0 and b1 are rows 2 (lane % 4)
// and the next, b2 and b3 eight rows on; column lane / 4. Of C and D, c0 and c1 are row lane / 4, c2 and c3 eight on;
// columns 2 (lane % 4) and the next. All of a result is rounded once, where tensor cores round less than well.
struct Registers4 { uint32_t r[4]; template <class... X> Registers4(X... x) : r{into<uint32_t>(x)...} {} };
struct Registers2 { uint32_t r[2]; template <class... X> Registers2(X... x) : r{into<uint32_t>(x)...} {} };

inline void mma_m16n8k16(int site, float *d, Registers4 a, Registers2 b, Registers4 c) {
    const uint32_t in[6] = {a.r[0], a.r[1], a.r[2], a.r[3], b.r[0], b.r[1]};
    const uint32_t *out = shim::exchange(kFirstSite + site, in, 6, [](auto &from, auto &to) {
        float left[16][16], right[16][8];
        for (int lane = 0; lane < 32; ++lane) {
            const int row = lane / 4, column = 2 * (lane % 4);
            for (int i = 0; i < 8; ++i) {
                const float x = half_to_float(uint16_t(from[lane][i / 2] >> (16 * (i % 2))));
                left[row + (i / 2 % 2 ? 8 : 0)][column + i % 2 + (i >= 4 ? 8 : 0)] = x;
            }
            for (int i = 0; i < 4; ++i) {
                const float x = half_to_float(uint16_t(from[lane][4 + i / 2] >> (16 * (i % 2))));
                right[column + i % 2 + (i >= 2 ? 8 : 0)][row] = x;
            }
        }
        for (int lane = 0; lane < 32; ++lane)
            for (int i = 0; i < 4; ++i) {
                const int row = lane / 4 + (i >= 2 ? 8 : 0), column = 2 * (lane % 4) + i % 2;
                float sum = 0.0f;
                for (int k = 0; k < 16; ++k) sum += left[row][k] * right[k][column];
                to[lane][i] = into<uint32_t>(sum);
            }
    });
    for (int i = 0; i < 4; ++i) d[i] = into<float>(out[i]) + into<float>(c.r[i]);
}

// movmatrix.m8n8.trans.b16: a lane holds columns 2 (lane % 4) and the next of row lane / 4.
template <class A> uint32_t movmatrix_trans(int site, A own) {
    return of_warp(site, as<uint32_t>(own), [](auto &from, auto &to) {
        for (int lane = 0; lane < 32; ++lane) {
            uint32_t result = 0;
            for (int i = 0; i < 2; ++i) {
                const int row = 2 * (lane % 4) + i, column = lane / 4;  // of the matrix before
                result |= (from[4 * row + column / 2][0] >> (16 * (column % 2)) & 0xffffu) << (16 * i);
            }
            to[lane][0] = result;
        }
    });
}

}  // namespace ptx
