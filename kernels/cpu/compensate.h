// Error compensation: what each coordinate of a head takes up of the errors of the others, see
// kvq_calib/codec/error_compensation.py. Sums run over the coordinates in ascending order, products and sums rounded
// one by one. Coordinates are taken in tiles of four, so that an error that was loaded serves four of them; the order
// in which each sum runs stays what it is.
#pragma once

#include "path.h"

namespace kvq {

constexpr int kTile = 4;
// Tokens whose sums for a tile stand in registers.
constexpr int kSpan = kWidest == 16 ? 4 : 2;

// A head's coordinates in a group of blocks: [D][kPlane] vectors each.
template <int L>
struct Group {
    const Floats<L>* exact;
    Floats<L>* error;
};

// Add shares[row, j] * error[j] for j from `first` to `stop` - 1 to the sums of `rows` coordinates.
template <int L>
void take_up(Floats<L>* sum, const Group<L>& group, const float* shares, int size, int rows, int first, int stop) {
    if (rows < kTile) {
        for (int row = 0; row < rows; row++)
            for (int j = first; j < stop; j++) {
                const Floats<L> share = splat<L>(shares[row * size + j]);
                for (int t = 0; t < kBlock; t++) sum[row * kBlock + t] += share * group.error[j * kPlane + t];
            }
        return;
    }
    for (int begin = 0; begin < kBlock; begin += kSpan) {
        Floats<L> total[kTile][kSpan];
        for (int row = 0; row < kTile; row++)
            for (int t = 0; t < kSpan; t++) total[row][t] = sum[row * kBlock + begin + t];
        for (int j = first; j < stop; j++) {
            const Floats<L>* error = group.error + j * kPlane + begin;
#pragma GCC unroll 4
            for (int row = 0; row < kTile; row++) {
                const Floats<L> share = splat<L>(shares[row * size + j]);
#pragma GCC unroll 4
                for (int t = 0; t < kSpan; t++) total[row][t] += share * error[t];
            }
        }
        for (int row = 0; row < kTile; row++)
            for (int t = 0; t < kSpan; t++) sum[row * kBlock + begin + t] = total[row][t];
    }
}

// What is to be coded of the coordinates `first` to `first + rows - 1`, but for what they take up of each other's
// errors in this pass: into fed[rows][32]. `shares` is the head's matrix; `again` where this is a refinement pass.
template <int L>
void feed_tile(Floats<L>* fed, const Group<L>& group, const float* shares, int size, int first, int rows, bool again) {
    const float* own = shares + first * size;
    if (again) {  // the errors of later coordinates first, as the pass before left them
        for (int n = 0; n < rows * kBlock; n++) fed[n] = Floats<L>{};
        for (int row = 0; row < rows; row++)
            take_up<L>(fed + row * kBlock, group, own + row * size, size, 1, first + row + 1, first + rows);
        take_up<L>(fed, group, own, size, rows, first + rows, size);
    }
    for (int row = 0; row < rows; row++) {
        const Floats<L>* exact = group.exact + (first + row) * kPlane;
        Floats<L>* of = fed + row * kBlock;
        for (int t = 0; t < kBlock; t++) of[t] = again ? exact[t] + of[t] : exact[t];
    }
    take_up<L>(fed, group, own, size, rows, 0, first);
}

}  // namespace kvq
