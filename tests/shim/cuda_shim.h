// Just enough of CUDA to run kernels/*.cu as C++ on the host, for tests only.
//
// Every CUDA thread is a fiber with a stack of its own, all on one host thread. A fiber runs until it needs other
// lanes (shuffles, votes, matrix products) or a barrier. So the order of execution is fixed, a lane that misses a
// warp-wide operation is found, and shared memory is poisoned before each block, so that what is read before it
// was written shows as NaN. It does not find races between barriers: compute-sanitizer does, on a GPU.
#pragma once

#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>

#define KVQ_KERNEL extern "C"
#define KVQ_DEVICE inline
#define KVQ_SHARED uint4 *kvq_shared = static_cast<uint4 *>(shim::shared)
#define KVQ_CONSTANT(name, value) extern "C" const int name = value
#define __launch_bounds__(...)
#define __grid_constant__

struct uint2 { uint32_t x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct int2 { int x, y; };
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct Index3 { int x, y, z; };
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

inline Index3 threadIdx, blockIdx, blockDim, gridDim;
using std::max;
using std::min;

namespace shim {

constexpr int kLanes = 32, kMostThreads = 1024;
constexpr size_t kStack = 256 << 10;

enum Operation { kShuffle = 1, kBallot, kReduceMax, kReduceAdd, kMatrix, kTranspose, kWarpBarrier };

struct Fiber {
    jmp_buf resume;
    ucontext_t start;
    bool started, finished;
    long barriers;  // block-wide barriers passed
};

struct Warp {
    int operation, arrived;
    long generation;
    uint32_t in[2][kLanes][8];   // by parity of the generation
    uint32_t out[2][kLanes][4];
};

inline Fiber fibers[kMostThreads];
inline Warp warps[kMostThreads / kLanes];
inline jmp_buf scheduler;
inline char *stacks;
inline void *shared;
inline int threads, waiting;
inline long barrier_generation;
inline void (*body)(const void *);
inline const void *arguments;

[[noreturn]] inline void fail(const char *what) {
    fprintf(stderr, "shim: %s (block %d %d %d, thread %d)\n", what, blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x);
    abort();
}

inline void yield() {
    if (!_setjmp(fibers[threadIdx.x].resume)) _longjmp(scheduler, 1);
}

inline void enter() {
    body(arguments);
    fibers[threadIdx.x].finished = true;
    _longjmp(scheduler, 1);
}

// Collects an operand of every lane; the last one to arrive lets `compute` fill the results.
template <class Compute> inline const uint32_t *exchange(int operation, const uint32_t *in, int count, Compute compute) {
    Warp &warp = warps[threadIdx.x / kLanes];
    const int lane = threadIdx.x % kLanes;
    const long generation = warp.generation;
    const int parity = generation % 2;
    if (warp.arrived == 0) warp.operation = operation;
    if (warp.operation != operation) fail("lanes of a warp wait at different operations");
    for (int i = 0; i < count; ++i) warp.in[parity][lane][i] = in[i];
    if (++warp.arrived == kLanes) {
        compute(warp.in[parity], warp.out[parity]);
        warp.arrived = 0;
        ++warp.generation;
    } else {
        while (warp.generation == generation) yield();
    }
    return warp.out[parity][lane];
}

inline void launch(void (*kernel)(const void *), const void *params, int x, int y, int z, int count, int shared_bytes) {
    if (count % kLanes || count > kMostThreads) fail("blocks must be whole warps");
    if (!stacks)
        stacks = static_cast<char *>(mmap(nullptr, kStack * kMostThreads, PROT_READ | PROT_WRITE,
                                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    body = kernel, arguments = params, threads = count;
    gridDim = {x, y, z}, blockDim = {count, 1, 1};
    // A page beyond the end stays inaccessible, so that an overrun is a fault and not a wrong number.
    const size_t page = 4096, size = (size_t(shared_bytes) + page - 1) / page * page;
    char *memory = static_cast<char *>(mmap(nullptr, size + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    mprotect(memory + size, page, PROT_NONE);
    shared = memory + size - (size_t(shared_bytes) + 15) / 16 * 16;
    for (blockIdx.z = 0; blockIdx.z < z; ++blockIdx.z)
        for (blockIdx.y = 0; blockIdx.y < y; ++blockIdx.y)
            for (blockIdx.x = 0; blockIdx.x < x; ++blockIdx.x) {
                memset(memory, 0xff, size);
                barrier_generation = 0, waiting = 0;
                for (int w = 0; w < count / kLanes; ++w) warps[w].arrived = 0, warps[w].generation = 0;
                for (int t = 0; t < count; ++t) fibers[t].started = fibers[t].finished = false;
                int alive = count;
                long idle = 0;
                while (alive) {
                    if (++idle > 100000000) fail("no progress");
                    alive = 0;
                    for (volatile int t = 0; t < count; t = t + 1) {
                        Fiber &fiber = fibers[t];
                        if (fiber.finished) continue;
                        ++alive;
                        threadIdx = {t, 0, 0};
                        if (_setjmp(scheduler)) continue;
                        if (fiber.started) _longjmp(fiber.resume, 1);
                        fiber.started = true;
                        getcontext(&fiber.start);
                        fiber.start.uc_stack.ss_sp = stacks + kStack * t;
                        fiber.start.uc_stack.ss_size = kStack;
                        fiber.start.uc_link = nullptr;
                        makecontext(&fiber.start, enter, 0);
                        setcontext(&fiber.start);
                    }
                }
                for (int w = 0; w < count / kLanes; ++w)
                    if (warps[w].arrived) fail("a lane finished while its warp waited for it");
                if (waiting) fail("a thread finished while others waited at a barrier");
            }
    munmap(memory, size + page);
}

inline float half_value(uint16_t bits) {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const float magnitude = exponent == 0    ? std::ldexp(float(fraction), -24)
                            : exponent == 31 ? (fraction ? NAN : INFINITY)
                                             : std::ldexp(float(1024 + fraction), exponent - 25);
    return bits >> 15 ? -magnitude : magnitude;
}

inline const float *half_table() {
    static float *table = [] {
        float *t = new float[65536];
        for (int i = 0; i < 65536; ++i) t[i] = half_value(uint16_t(i));
        return t;
    }();
    return table;
}

// Round to nearest, ties to even.
inline uint16_t half_bits(double x) {
    const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    x = std::fabs(x);
    if (x != x) return 0x7fff;
    if (x >= 65520.0) return sign | 0x7c00;
    if (x < 0x1p-14) return sign | uint16_t(std::nearbyint(x * 0x1p24));
    int exponent;
    const double fraction = std::frexp(x, &exponent);  // in [0.5, 1)
    const int rounded = int(std::nearbyint(fraction * 2048.0));
    return sign | uint16_t((exponent + 14 << 10) + (rounded - 1024));
}

}  // namespace shim

// Declares `launch_<kernel>(params, grid x, y, z, threads, shared bytes)`.
#define KVQ_HOST_LAUNCH(kernel, Params)                                                                       \
    extern "C" void launch_##kernel(const void *params, int x, int y, int z, int threads, int shared_bytes) { \
        shim::launch([](const void *p) { kernel(*static_cast<const Params *>(p)); }, params, x, y, z,         \
                     threads, shared_bytes);                                                                  \
    }                                                                                                         \
    extern "C" int size_##kernel() { return sizeof(Params); }

inline void __syncthreads() {
    const long generation = shim::barrier_generation;
    if (++shim::waiting == shim::threads) {
        shim::waiting = 0;
        ++shim::barrier_generation;
    } else {
        while (shim::barrier_generation == generation) shim::yield();
    }
}

inline void __syncwarp() {
    shim::exchange(shim::kWarpBarrier, nullptr, 0, [](auto &, auto &) {});
}

template <class T> inline T shim_shuffle(T value, int source) {
    uint32_t in[2] = {0, uint32_t(source)};
    memcpy(in, &value, sizeof(T));
    const uint32_t *out = shim::exchange(shim::kShuffle, in, 2, [](auto &from, auto &to) {
        for (int lane = 0; lane < shim::kLanes; ++lane) to[lane][0] = from[from[lane][1]][0];
    });
    T result;
    memcpy(&result, out, sizeof(T));
    return result;
}
template <class T> inline T __shfl_sync(unsigned, T value, int source) { return shim_shuffle(value, source); }
template <class T> inline T __shfl_xor_sync(unsigned, T value, int mask) {
    return shim_shuffle(value, threadIdx.x % shim::kLanes ^ mask);
}
template <class T> inline T __shfl_up_sync(unsigned, T value, int step) {
    const int lane = threadIdx.x % shim::kLanes;
    return shim_shuffle(value, lane >= step ? lane - step : lane);
}

inline unsigned __ballot_sync(unsigned, bool vote) {
    const uint32_t in = vote;
    return *shim::exchange(shim::kBallot, &in, 1, [](auto &from, auto &to) {
        uint32_t votes = 0;
        for (int lane = 0; lane < shim::kLanes; ++lane) votes |= from[lane][0] << lane;
        for (int lane = 0; lane < shim::kLanes; ++lane) to[lane][0] = votes;
    });
}
inline bool __any_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) != 0; }
inline bool __all_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) == 0xffffffffu; }

inline unsigned __reduce_max_sync(unsigned, unsigned value) {
    return *shim::exchange(shim::kReduceMax, &value, 1, [](auto &from, auto &to) {
        uint32_t best = 0;
        for (int lane = 0; lane < shim::kLanes; ++lane) best = std::max(best, from[lane][0]);
        for (int lane = 0; lane < shim::kLanes; ++lane) to[lane][0] = best;
    });
}
inline unsigned __reduce_add_sync(unsigned, unsigned value) {
    return *shim::exchange(shim::kReduceAdd, &value, 1, [](auto &from, auto &to) {
        uint32_t sum = 0;
        for (int lane = 0; lane < shim::kLanes; ++lane) sum += from[lane][0];
        for (int lane = 0; lane < shim::kLanes; ++lane) to[lane][0] = sum;
    });
}

inline float atomicAdd(float *target, float value) {  // fibers are not interrupted
    const float before = *target;
    *target = before + value;
    return before;
}

inline int atomicAdd(int *target, int value) {
    const int before = *target;
    *target = before + value;
    return before;
}
inline void __threadfence() {}  // thread blocks follow each other

template <class T> inline T __ldg(const T *source) { return *source; }
template <class T> inline T __ldcg(const T *source) { return *source; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline uint32_t __funnelshift_l(uint32_t low, uint32_t high, int shift) {
    return shift % 32 ? high << shift % 32 | low >> (32 - shift % 32) : high;
}
inline float __uint_as_float(uint32_t x) { float y; memcpy(&y, &x, 4); return y; }
inline uint32_t __float_as_uint(float x) { uint32_t y; memcpy(&y, &x, 4); return y; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __sinf(float x) { return std::sin(x); }
inline float __cosf(float x) { return std::cos(x); }
inline void sincospif(float x, float *sine, float *cosine) {
    *sine = float(std::sin(M_PI * double(x)));
    *cosine = float(std::cos(M_PI * double(x)));
}
inline float power_of_two(float x) { return std::exp2(x); }
inline void prefetch_line(const void *) {}

// ---- 16-bit floats -------------------------------------------------------------------------------------------

struct __half { uint16_t bits; };
struct __half2 { uint16_t low, high; };
struct __nv_bfloat16 { uint16_t bits; };
inline __half __ushort_as_half(uint16_t bits) { return {bits}; }
inline uint16_t __half_as_ushort(__half x) { return x.bits; }
inline float __half2float(__half x) { return shim::half_table()[x.bits]; }
inline __half __float2half_rn(float x) { return {shim::half_bits(x)}; }
inline __half2 __floats2half2_rn(float low, float high) { return {shim::half_bits(low), shim::half_bits(high)}; }
inline float2 __half22float2(__half2 x) { return {shim::half_table()[x.low], shim::half_table()[x.high]}; }
inline __half2 __hneg2(__half2 x) { return {uint16_t(x.low ^ 0x8000), uint16_t(x.high ^ 0x8000)}; }
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
    const float *t = shim::half_table();
    return {shim::half_bits(double(t[a.low]) * t[b.low] + t[c.low]),
            shim::half_bits(double(t[a.high]) * t[b.high] + t[c.high])};
}
inline __half2 __hmul2(__half2 a, __half2 b) { return __hfma2(a, b, {0x8000, 0x8000}); }
inline uint16_t __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
    const uint32_t bits = __float_as_uint(x);
    if (x != x) return {0x7fff};
    return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

// ---- what common.cuh writes in PTX ---------------------------------------------------------------------------

inline uint32_t masked(uint32_t x, uint32_t mask) { return x & mask; }
inline int thread_anew() { return int(threadIdx.x); }
inline int block_y_anew() { return int(blockIdx.y); }
template <typename T> inline T *opaque(T *address) { return address; }
inline uint32_t masked_or(uint32_t x, uint32_t mask, uint32_t bits) { return (x & mask) | bits; }
inline uint32_t choose_bits(uint32_t mask, uint32_t x, uint32_t y) { return (x & mask) | (y & ~mask); }

inline uint32_t permute(uint32_t low, uint32_t high, uint32_t selectors) {
    const uint64_t bytes = uint64_t(high) << 32 | low;
    uint32_t result = 0;
    for (int i = 0; i < 4; ++i) {
        const uint32_t selector = selectors >> (4 * i) & 15;
        if (selector > 7) shim::fail("a byte-permute selector replicates a sign");
        result |= uint32_t(bytes >> (8 * selector) & 255) << (8 * i);
    }
    return result;
}

inline void mma_16x8x16(float *d, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    const uint32_t in[6] = {a0, a1, a2, a3, b0, b1};
    const uint32_t *out = shim::exchange(shim::kMatrix, in, 6, [](auto &from, auto &to) {
        const float *t = shim::half_table();
        float a[16][16], b[8][16];  // b by column
        for (int lane = 0; lane < shim::kLanes; ++lane)
            for (int i = 0; i < 6; ++i)
                for (int half = 0; half < 2; ++half) {
                    const float x = t[from[lane][i] >> (16 * half) & 0xffff];
                    const int column = 2 * (lane % 4) + half;
                    if (i < 4) a[lane / 4 + 8 * (i % 2)][column + 8 * (i / 2)] = x;
                    else b[lane / 4][column + 8 * (i - 4)] = x;
                }
        for (int lane = 0; lane < shim::kLanes; ++lane)
            for (int i = 0; i < 4; ++i) {
                const float *row = a[lane / 4 + 8 * (i / 2)], *column = b[2 * (lane % 4) + i % 2];
                float sum = 0.0f;
                for (int k = 0; k < 16; ++k) sum += row[k] * column[k];
                to[lane][i] = __float_as_uint(sum);
            }
    });
    for (int i = 0; i < 4; ++i) d[i] += __uint_as_float(out[i]);
}

inline uint32_t transpose_8x8(uint32_t row) {
    return *shim::exchange(shim::kTranspose, &row, 1, [](auto &from, auto &to) {
        for (int lane = 0; lane < shim::kLanes; ++lane) {
            uint32_t pair = 0;
            for (int half = 0; half < 2; ++half) {
                const int source_row = 2 * (lane % 4) + half, column = lane / 4;
                pair |= (from[4 * source_row + column / 2][0] >> (16 * (column % 2)) & 0xffff) << (16 * half);
            }
            to[lane][0] = pair;
        }
    });
}
