// Memory as PTX sees it, and who may touch a byte of shared memory when.
//
// Two accesses to a byte by different threads, one of them a write and not both atomic, are a race unless a barrier of
// the block lies between them, or, of lanes of one warp, a barrier of the warp. Shuffles, votes and matrix products
// order no memory.
#pragma once

#include <vector>

#include "cuda_shim.h"

namespace ptx {

constexpr int kWarps = 32;

struct Writer {
    long epoch = -1, warp_epoch = -1;
    int thread = -1, site = 0;
    bool atomic = false;
};
struct Readers {  // of one warp
    long epoch = -1, warp_epoch = -1;
    uint32_t lanes = 0;
};

inline std::vector<Writer> writers;   // of each byte
inline std::vector<Readers> readers;  // of each byte, for each warp
inline int shared_bytes, warps;
inline long epoch[1024], warp_epoch[1024];  // of each thread: block barriers passed, warp barriers passed
inline long latest;                         // epoch that no block before has reached
inline int block_x, block_y, block_z;
inline long found_races;

inline void begin(int bytes, int threads) {
    shared_bytes = bytes, warps = threads / 32, block_x = -1;
    if (writers.size() < size_t(bytes)) writers.resize(bytes);
    if (readers.size() < size_t(bytes) * kWarps) readers.resize(size_t(bytes) * kWarps);
}

// Epochs of a block are beyond those of the block before, so that nothing has to be cleared.
inline void enter_block() {
    if (block_x == blockIdx.x && block_y == blockIdx.y && block_z == blockIdx.z) return;
    block_x = blockIdx.x, block_y = blockIdx.y, block_z = blockIdx.z;
    ++latest;
    for (long &each : epoch) each = latest;
}
inline void pass_barrier() {
    enter_block();
    ++epoch[threadIdx.x];
    ++warp_epoch[threadIdx.x];
    latest = std::max(latest, epoch[threadIdx.x]);
}
inline void pass_warp_barrier() {
    enter_block();
    ++warp_epoch[threadIdx.x];
}

inline void report(const char *what, long at, int site, int other, int other_site) {
    if (found_races++ < 8)
        fprintf(stderr, "race: %s at byte %ld of shared memory: thread %d (instruction %d), thread %d (instruction %d), "
                "block %d %d %d\n", what, at, int(threadIdx.x), site, other, other_site, blockIdx.x, blockIdx.y, blockIdx.z);
}

inline void touch(long at, bool write, bool atomic, int site) {
    const int thread = threadIdx.x, warp = thread / 32;
    const uint32_t lane = 1u << thread % 32;
    Writer &last = writers[at];
    Readers *read = &readers[at * kWarps];
    const bool unordered = last.epoch == epoch[thread] && last.thread != thread &&
                           (last.thread / 32 != warp || last.warp_epoch == warp_epoch[thread]);
    if (unordered && !(atomic && last.atomic))
        report(write ? "two writes" : "a read after a write", at, site, last.thread, last.site);
    if (!write) {
        Readers &own = read[warp];
        if (own.epoch != epoch[thread] || own.warp_epoch != warp_epoch[thread])
            own = {epoch[thread], warp_epoch[thread], 0};
        own.lanes |= lane;
        return;
    }
    for (int w = 0; w < warps; ++w) {
        if (read[w].epoch != epoch[thread]) continue;
        const uint32_t others = w != warp ? read[w].lanes
                                          : read[w].warp_epoch == warp_epoch[thread] ? read[w].lanes & ~lane : 0u;
        if (others) report("a write after a read", at, site, 32 * w + __builtin_ctz(others), 0);
    }
    last = {epoch[thread], warp_epoch[thread], thread, site, atomic};
}

inline uint64_t shared_base() { return uint64_t(uintptr_t(shim::shared)); }

inline void check_alignment(int site, uint64_t address, size_t bytes) {
    if (address % bytes == 0) return;
    fprintf(stderr, "instruction %d: %zu bytes at %llx\n", site, bytes, (unsigned long long)address);
    shim::fail("an access that is not aligned");
}

// The memory of an access: `kind` is 0 for a read, 1 for a write, 2 for an atomic operation.
inline char *shared_place(int site, uint64_t offset, size_t bytes, int kind) {
    enter_block();
    check_alignment(site, shared_base() + offset, bytes);
    if (offset + bytes > uint64_t(shared_bytes)) {
        fprintf(stderr, "instruction %d: byte %llu of %d\n", site, (unsigned long long)offset, shared_bytes);
        shim::fail("an access outside shared memory");
    }
    for (size_t i = 0; i < bytes; ++i) touch(long(offset + i), kind > 0, kind == 2, site);
    return static_cast<char *>(shim::shared) + offset;
}
inline bool is_shared(uint64_t address) {
    return address >= shared_base() && address < shared_base() + uint64_t(shared_bytes);
}
inline char *generic_place(int site, uint64_t address, size_t bytes, int kind) {
    if (is_shared(address)) return shared_place(site, address - shared_base(), bytes, kind);
    check_alignment(site, address, bytes);
    return reinterpret_cast<char *>(uintptr_t(address));
}
inline char *global_place(int site, uint64_t address, size_t bytes, int) {
    if (is_shared(address)) shim::fail("shared memory by an address of global memory");
    check_alignment(site, address, bytes);
    return reinterpret_cast<char *>(uintptr_t(address));
}
inline char *const_place(int site, uint64_t address, size_t bytes, int kind) {
    return global_place(site, address, bytes, kind);
}
inline char *param_place(int, uint64_t address, size_t, int) { return reinterpret_cast<char *>(uintptr_t(address)); }

template <class T> T read(const char *at, int index) {
    T value;
    memcpy(&value, at + index * sizeof(T), sizeof(T));
    return value;
}
template <class To, class From> To into(From value);
template <class T, class X> void write(char *at, int index, X value) {
    const T stored = into<T>(value);
    memcpy(at + index * sizeof(T), &stored, sizeof(T));
}
template <class T, class X> T add_at(char *at, X value) {  // fibers are not interrupted
    const T before = read<T>(at, 0), after = T(before + into<T>(value));
    memcpy(at, &after, sizeof(T));
    return before;
}

}  // namespace ptx

extern "C" inline __attribute__((used)) long ptx_races() {
    const long found = ptx::found_races;
    ptx::found_races = 0;
    return found;
}
