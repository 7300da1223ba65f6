// Queries of a library before it is used.
#include "kvq_native.h"

extern "C" {

int32_t kvq_abi() { return KVQ_ABI; }

const char* kvq_isa() {
#if defined(__AVX512F__)
    return "x86-64-v4";
#elif defined(__AVX2__)
    return "x86-64-v3";
#elif defined(__x86_64__)
    return "x86-64-v2";
#elif defined(__aarch64__)
    return "neon";
#else
    return "generic";
#endif
}

#if defined(__x86_64__)
__attribute__((target("arch=x86-64")))
#endif
int32_t kvq_runs_here() {
#if defined(__x86_64__)
    __builtin_cpu_init();
#if defined(__AVX512F__)
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw")) return 0;
    if (!__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl")) return 0;
    if (!__builtin_cpu_supports("avx512cd")) return 0;
#endif
#if defined(__AVX2__)
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
    if (!__builtin_cpu_supports("bmi") || !__builtin_cpu_supports("bmi2")) return 0;
#endif
    return __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("popcnt");
#else
    return 1;
#endif
}
}
