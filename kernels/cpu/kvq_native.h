// The C interface of the CPU kernels: raw pointers, no torch, no Python.
//
// What the functions compute is defined by kvq_calib/codec; codes are equal bit for bit. Nothing here is kept between
// two calls, but for the threads that wait for work.
#pragma once

#include <cstdint>

// Raised with every change of this interface. A library of another number is not used.
#define KVQ_ABI 2

#if defined(__GNUC__)
#define KVQ_EXPORT __attribute__((visibility("default")))
#else
#error "GCC or Clang is needed: the kernels are written in their vector extensions"
#endif

enum KvqStatus : int32_t {
    KVQ_OK = 0,
    // Something met on the way was no number, so that no path is better than another. Outputs are not to be used.
    KVQ_NOT_A_NUMBER = 1,
    // Sizes or counts that no quantizer has.
    KVQ_BAD_ARGUMENT = 2,
    KVQ_NO_MEMORY = 3,
};

// The trellis codec of one layer's keys or values: C = heads * head_dim channels. Pointers are to contiguous arrays.
struct KvqTrellis {
    int32_t heads;
    int32_t head_dim;
    int32_t states;             // 4, or 1 for the nearest level
    int32_t refinement_passes;  // with refinement_shares
    int32_t level_stride;       // L
    int32_t size_classes;       // of token weights, 0 for none
    int32_t pairs;              // RoPE pairs that are turned, P, 0 for none
    const int32_t* level_count; // [C]: 1 for width 0, else 2 ** width, twice that with four states
    const float* levels;        // [C, L], sorted, finite and below 2 ** 39 in each row
    const float* shares;            // [H, D, D], row = who takes up; null for no error compensation
    const float* refinement_shares; // [H, D, D] or null
    const float* size_edges;        // [H, size_classes - 1], ascending
    const float* class_weight;      // [H, size_classes], finite and not negative
    const int32_t* pair;            // [P, 2], the coordinates of each, none twice
    const float* cosine;            // [H, P], of the angles
    const float* sine;              // [H, P]
};

extern "C" {
// KVQ_ABI of the library.
KVQ_EXPORT int32_t kvq_abi();
// The instruction set it was compiled for.
KVQ_EXPORT const char* kvq_isa();
// Whether this processor has it: 1 or 0. Itself compiled for any processor.
KVQ_EXPORT int32_t kvq_runs_here();

// Codes of keys or values of `batch` sequences, tokens in blocks of 32 from the first on.
//
//   x       head_dim numbers in a row for each sequence, head and token
//   stride  numbers from a sequence, a token and a head to the next
//   weight  [batch, tokens, H], finite and not negative, of the tokens' errors; null: by the classes of their sizes,
//           or all alike where there are none
//   threads to use at most; what is computed does not depend on it
//   codes   [batch, tokens, C], written
//   coded   [batch, tokens, C], what was coded in the last pass; may be null
KVQ_EXPORT int32_t kvq_encode_trellis(const KvqTrellis* codec, const float* x, const int64_t* stride,
                                      const float* weight, int64_t batch, int64_t tokens, int32_t threads,
                                      uint8_t* codes, float* coded);
}
