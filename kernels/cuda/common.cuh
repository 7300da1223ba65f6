// Shared by all kernels: 16-bit floats, the packed layout of docs/reference/kernels.md, warp matrix products.
//
// Everything here is written once for all bit widths. The same files build with nvcc and, in tests, as C++ for the
// host, where tests/shim stands in for the CUDA headers.
#pragma once

#include <stdint.h>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define KVQ_KERNEL extern "C" __global__
#define KVQ_DEVICE __device__ __forceinline__
#define KVQ_SHARED extern __shared__ uint4 kvq_shared[]
// A number of the compiled variant that the host reads.
#define KVQ_CONSTANT(name, value) extern "C" __device__ const int name = value
#else
#include "cuda_shim.h"
#endif

constexpr int kWarp = 32;
constexpr unsigned kAll = 0xffffffffu;
constexpr int kBlockTokens = 32;
constexpr int kPageBlocks = 8;
constexpr int kPageTokens = kBlockTokens * kPageBlocks;
constexpr int kCoordinateBits = 11;

KVQ_DEVICE int lane_id() { return threadIdx.x % kWarp; }
KVQ_DEVICE int warp_id() { return threadIdx.x / kWarp; }

// threadIdx.x and blockIdx.y, read again at the end of a long kernel, so that no register holds them, or numbers
// computed from them, all the time.
#ifdef __CUDACC__
KVQ_DEVICE int thread_anew() {
    int x;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
    return x;
}
KVQ_DEVICE int block_y_anew() {
    int y;
    asm volatile("mov.u32 %0, %%ctaid.y;" : "=r"(y));
    return y;
}

// Brings the line of an address from memory to the second-level cache. No register waits for it.
KVQ_DEVICE void prefetch_line(const void *address) { asm volatile("prefetch.global.L2 [%0];" : : "l"(address)); }

// The same address, hidden from the compiler, so that it does not keep parts that are the same for all pages in
// registers.
template <typename T> KVQ_DEVICE T *opaque(T *address) {
    asm("" : "+l"(address));
    return address;
}
#endif

// ---- 16-bit floats -------------------------------------------------------------------------------------------

struct Half {
    static KVQ_DEVICE float to_float(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
    static KVQ_DEVICE uint16_t from_float(float x) { return __half_as_ushort(__float2half_rn(x)); }
};

struct BFloat {
    static KVQ_DEVICE float to_float(uint16_t bits) { return __uint_as_float(uint32_t(bits) << 16); }
    static KVQ_DEVICE uint16_t from_float(float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
};

// A format known at run time.
KVQ_DEVICE float float16_to_float(bool brain, uint16_t bits) {
    return brain ? BFloat::to_float(bits) : Half::to_float(bits);
}

KVQ_DEVICE uint32_t pack_half2(float low, float high) {
    __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<uint32_t *>(&pair);
}
KVQ_DEVICE __half2 as_half2(uint32_t bits) { return *reinterpret_cast<__half2 *>(&bits); }
KVQ_DEVICE uint32_t as_bits(__half2 pair) { return *reinterpret_cast<uint32_t *>(&pair); }

// ---- the packed layout ---------------------------------------------------------------------------------------

// Buffers of one page, as kvq_calib.runtime.storage.Page holds them; absent ones are null.
struct PagePointers {
    uint32_t *codes;
    uint16_t *token_params;
    const uint16_t *outlier_index;
    const uint16_t *outlier_residual;
    const void *outlier_start;  // start_bytes each
    int64_t start_bytes;        // 2 or 4
};

// Entries of a page before outlier list `list`.
KVQ_DEVICE int list_start(const PagePointers &page, int list) {
    return page.start_bytes == 2 ? __ldg(static_cast<const uint16_t *>(page.outlier_start) + list)
                                 : __ldg(static_cast<const int *>(page.outlier_start) + list);
}

// A channel of a head: its coordinate, its width, and the sum of the widths before it in the layer.
struct Channel {
    uint32_t word;
    uint16_t coordinate;
    uint16_t bits;
};

// Loads words of codes with the widest loads that their alignment allows.
template <int Words> KVQ_DEVICE void load_words(const uint32_t *source, uint32_t *words) {
    if constexpr (Words % 4 == 0) {
        for (int i = 0; i < Words / 4; ++i) {
            const uint4 four = __ldg(reinterpret_cast<const uint4 *>(source) + i);
            words[4 * i] = four.x, words[4 * i + 1] = four.y, words[4 * i + 2] = four.z, words[4 * i + 3] = four.w;
        }
    } else if constexpr (Words % 2 == 0) {
        for (int i = 0; i < Words / 2; ++i) {
            const uint2 two = __ldg(reinterpret_cast<const uint2 *>(source) + i);
            words[2 * i] = two.x, words[2 * i + 1] = two.y;
        }
    } else {
        for (int i = 0; i < Words; ++i) words[i] = __ldg(source + i);
    }
}

// The codes of a channel in a page; `codes` has those of all channels. One multiply-add.
KVQ_DEVICE const uint32_t *region_of(const uint32_t *codes, const Channel &channel) {
    return codes + uint64_t(channel.word) * kPageBlocks;
}

// The bits words of a unit (32 codes of one channel) as four slices of eight nibbles: selectors[s] holds the low
// four bits of the codes of tokens 8 s .. 8 s + 7. Of width 4 and wider the nibble is complete; narrower codes are
// masked so that every nibble is a code.
template <int Bits> KVQ_DEVICE void unpack_selectors(const uint32_t *words, uint32_t *selectors) {
    static_assert(Bits >= 1 && Bits <= 4, "a nibble");
    if constexpr (Bits == 4) {
        for (int s = 0; s < 4; ++s) selectors[s] = words[s];
    } else if constexpr (Bits == 3) {
        for (int s = 0; s < 3; ++s) selectors[s] = words[s] & 0x77777777u;
        selectors[3] = ((words[0] >> 3) & 0x11111111u) | ((words[1] >> 2) & 0x22222222u) |
                       ((words[2] >> 1) & 0x44444444u);
    } else if constexpr (Bits == 2) {
        for (int s = 0; s < 4; ++s) selectors[s] = (words[s / 2] >> (2 * (s % 2))) & 0x33333333u;
    } else {
        for (int s = 0; s < 4; ++s) selectors[s] = (words[0] >> s) & 0x11111111u;
    }
}

// The inverse: four slices of nibbles (each below 1 << Bits) to Bits words.
template <int Bits> KVQ_DEVICE void pack_selectors(const uint32_t *selectors, uint32_t *words) {
    static_assert(Bits >= 1 && Bits <= 4, "a nibble");
    if constexpr (Bits == 4) {
        for (int s = 0; s < 4; ++s) words[s] = selectors[s];
    } else if constexpr (Bits == 3) {
        for (int p = 0; p < 3; ++p) words[p] = selectors[p] | (((selectors[3] >> p) & 0x11111111u) << 3);
    } else if constexpr (Bits == 2) {
        for (int p = 0; p < 2; ++p) words[p] = selectors[2 * p] | (selectors[2 * p + 1] << 2);
    } else {
        words[0] = selectors[0] | (selectors[1] << 1) | (selectors[2] << 2) | (selectors[3] << 3);
    }
}

// The same for a width known only at run time, 0 to 8: low nibbles, then high nibbles.
KVQ_DEVICE void unpack_narrow(const uint32_t *words, int bits, uint32_t *selectors) {
    switch (bits) {
    case 1: unpack_selectors<1>(words, selectors); break;
    case 2: unpack_selectors<2>(words, selectors); break;
    case 3: unpack_selectors<3>(words, selectors); break;
    case 4: unpack_selectors<4>(words, selectors); break;
    default: selectors[0] = selectors[1] = selectors[2] = selectors[3] = 0;
    }
}

KVQ_DEVICE void unpack_unit(const uint32_t *words, int bits, uint32_t *low, uint32_t *high) {
    unpack_narrow(words, bits > 4 ? 4 : bits, low);
    unpack_narrow(words + 4, bits - 4, high);
}

KVQ_DEVICE void pack_narrow(const uint32_t *selectors, int bits, uint32_t *words) {
    switch (bits) {
    case 1: pack_selectors<1>(selectors, words); break;
    case 2: pack_selectors<2>(selectors, words); break;
    case 3: pack_selectors<3>(selectors, words); break;
    case 4: pack_selectors<4>(selectors, words); break;
    default: break;
    }
}

KVQ_DEVICE void pack_unit(const uint32_t *low, const uint32_t *high, int bits, uint32_t *words) {
    pack_narrow(low, bits > 4 ? 4 : bits, words);
    pack_narrow(high, bits - 4, words + 4);
}

// Codes of a trellis (kvq_calib/codec/trellis.py) to the indices of their levels, in place: low and high nibbles of a
// unit, tokens in order. An index has one bit more than its code. With u the lowest bit of a code, index[t] is
// (code[t] >> 1) << 2 | (u[t] ^ u[t - 2]) << 1 | u[t - 1]: the u of eight tokens move up by one or two nibbles.
KVQ_DEVICE void trellis_index(uint32_t *low, uint32_t *high) {
    uint32_t before = 0;  // u of the slice before; none at the start of a block
#pragma unroll
    for (int s = 0; s < 4; ++s) {
        const uint32_t free = low[s] & 0x11111111u;
        const uint32_t last = __funnelshift_l(before, free, 4), long_ago = __funnelshift_l(before, free, 8);
        high[s] = high[s] << 1 | (low[s] >> 3 & 0x11111111u);
        low[s] = 2u * ((low[s] & 0x77777777u) ^ long_ago) + last;  // no bit meets another
        before = free;
    }
}

KVQ_DEVICE int code_of(const uint32_t *low, const uint32_t *high, int token) {
    const int shift = 4 * (token % 8);
    return int((low[token / 8] >> shift) & 15u) | (int((high[token / 8] >> shift) & 15u) << 4);
}

// ---- rotary angles -------------------------------------------------------------------------------------------

// Angles are 32-bit fixed-point fractions of a turn, so that position * frequency wraps exactly and costs one
// multiply-add. At 2^-33 turns of rounding per token the error at position 10^6 is below 10^-3 rad.
KVQ_DEVICE float turn_to_radians(uint32_t angle) { return float(int32_t(angle)) * 1.4629180792671596e-9f; }

KVQ_DEVICE void fast_sincos(uint32_t angle, float *sine, float *cosine) {
    const float radians = turn_to_radians(angle);  // in [-pi, pi], where the fast functions are good to 2^-20
    *sine = __sinf(radians);
    *cosine = __cosf(radians);
}

KVQ_DEVICE void exact_sincos(uint32_t angle, float *sine, float *cosine) {
    sincospif(float(int32_t(angle)) * 4.6566128730773926e-10f, sine, cosine);
}

// Byte permute with selectors whose top bits are clear, so that no instruction masks them.
#ifdef __CUDACC__
KVQ_DEVICE uint32_t permute(uint32_t low, uint32_t high, uint32_t selectors) {
    uint32_t bytes;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(low), "r"(high), "r"(selectors));
    return bytes;
}

// x & mask, and x & mask | bits in one instruction: opaque, so that the compiler shifts the results for the upper
// four tokens instead of masking twice.
KVQ_DEVICE uint32_t masked(uint32_t x, uint32_t mask) {
    uint32_t result;
    asm("and.b32 %0, %1, %2;" : "=r"(result) : "r"(x), "r"(mask));
    return result;
}
KVQ_DEVICE uint32_t masked_or(uint32_t x, uint32_t mask, uint32_t bits) {
    uint32_t result;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(result) : "r"(x), "r"(mask), "r"(bits));
    return result;
}

// The bits of x where the mask is set, of y elsewhere, in one instruction; the compiler alone would use two.
KVQ_DEVICE uint32_t choose_bits(uint32_t mask, uint32_t x, uint32_t y) {
    uint32_t result;
    asm("lop3.b32 %0, %1, %2, %3, 0xCA;" : "=r"(result) : "r"(mask), "r"(x), "r"(y));
    return result;
}
#endif

// 2^x with a relative error of 2^-22; 0 for minus infinity and for results that would be subnormal.
#ifdef __CUDACC__
KVQ_DEVICE float power_of_two(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
#endif

// tanh(x) with an absolute error below 2^-21.
KVQ_DEVICE float soft_limit(float x) { return 1.0f - __fdividef(2.0f, 1.0f + power_of_two(2.8853900817779268f * x)); }

// ---- tensor cores --------------------------------------------------------------------------------------------

#ifdef __CUDACC__
// D += A B with A 16 x 16 and B 16 x 8 halves, D 16 x 8 floats. Let g = lane / 4 and j = lane % 4. A thread has of A
// rows g (a0, a2) and g + 8 (a1, a3), columns 2 j, 2 j + 1 (a0, a1) and 2 j + 8, 2 j + 9 (a2, a3). Of B it has rows
// like A's columns, column g. Of D it has rows g (0, 1) and g + 8 (2, 3), columns 2 j and 2 j + 1.
KVQ_DEVICE void mma_16x8x16(float *d, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Transposes an 8 x 8 matrix of halves. Each thread holds row g, columns 2 j and 2 j + 1.
KVQ_DEVICE uint32_t transpose_8x8(uint32_t row) {
    uint32_t column;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(column) : "r"(row));
    return column;
}
#endif
