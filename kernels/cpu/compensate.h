// Error compensation: a share of the errors of a head's other coordinates is added to each coordinate, see
// kvq_calib/codec/error_compensation.py. Sums run over the coordinates in ascending order, and each product and sum is
// rounded. Coordinates are processed in tiles of four, so that each error is loaded once for four of them; this does
// not change the order of any sum.
#pragma once

#include "path.h"

namespace kvq {

constexpr int kTile = 4;

// A head's coordinates, V vectors of L lanes each: either a block per lane and a token per vector, or the tokens of one
// block in all lanes. The distance from one coordinate to the next is `kStride`.
template <int L, int V>
struct Group {
    static constexpr int kStride = V == kBlock ? kPlane : V;
    // Number of vectors whose sums for a tile fit in registers.
    static constexpr int kSpan = V < 4 || kWidest < 16 ? 2 : 4;
    const Floats<L>* exact;
    Floats<L>* error;
};

// Add shares[row, j] * error[j] for j from `first` to `stop` - 1 to the sums of `rows` coordinates.
template <int L, int V>
void take_up(Floats<L>* sum, const Group<L, V>& group, const float* shares, int size, int rows, int first, int stop) {
    constexpr int kStride = Group<L, V>::kStride, kSpan = Group<L, V>::kSpan;
    if (rows < kTile) {
        for (int row = 0; row < rows; row++)
            for (int j = first; j < stop; j++) {
                const Floats<L> share = splat<L>(shares[row * size + j]);
                for (int t = 0; t < V; t++) sum[row * V + t] += share * group.error[j * kStride + t];
            }
        return;
    }
    for (int begin = 0; begin < V; begin += kSpan) {
        Floats<L> total[kTile][kSpan];
        for (int row = 0; row < kTile; row++)
            for (int t = 0; t < kSpan; t++) total[row][t] = sum[row * V + begin + t];
        for (int j = first; j < stop; j++) {
            const Floats<L>* error = group.error + j * kStride + begin;
#pragma GCC unroll 4
            for (int row = 0; row < kTile; row++) {
                const Floats<L> share = splat<L>(shares[row * size + j]);
#pragma GCC unroll 4
                for (int t = 0; t < kSpan; t++) total[row][t] += share * error[t];
            }
        }
        for (int row = 0; row < kTile; row++)
            for (int t = 0; t < kSpan; t++) sum[row * V + begin + t] = total[row][t];
    }
}

// Writes the numbers to code for coordinates `first` to `first + rows - 1` to fed[rows][V], still without the shares of
// each other's errors in this pass. `shares` is the head's matrix; `again` means a refinement pass.
template <int L, int V>
void feed_tile(Floats<L>* fed, const Group<L, V>& group, const float* shares, int size, int first, int rows,
               bool again) {
    const float* own = shares + first * size;
    if (again) {  // the errors of later coordinates first, as the pass before left them
        for (int n = 0; n < rows * V; n++) fed[n] = Floats<L>{};
        for (int row = 0; row < rows; row++)
            take_up<L, V>(fed + row * V, group, own + row * size, size, 1, first + row + 1, first + rows);
        take_up<L, V>(fed, group, own, size, rows, first + rows, size);
    }
    for (int row = 0; row < rows; row++) {
        const Floats<L>* exact = group.exact + (first + row) * Group<L, V>::kStride;
        Floats<L>* of = fed + row * V;
        for (int t = 0; t < V; t++) of[t] = again ? exact[t] + of[t] : exact[t];
    }
    take_up<L, V>(fed, group, own, size, rows, 0, first);
}

// code(i, what of it is to be coded) for all coordinates of a head in order; `code` notes the error of each. Without
// `shares` it is the coordinate as it stands. `fed` has room for kTile coordinates.
template <int L, int V, class Code>
KVQ_INLINE void for_coordinates(const Group<L, V>& group, const float* shares, int size, bool again, Floats<L>* fed,
                                Code code) {
    if (shares == nullptr) {
        for (int i = 0; i < size; i++) code(i, group.exact + i * Group<L, V>::kStride);
        return;
    }
    for (int first = 0; first < size; first += kTile) {
        const int rows = size - first < kTile ? size - first : kTile;
        feed_tile<L, V>(fed, group, shares, size, first, rows, again);
        for (int row = 0; row < rows; row++) {
            const int i = first + row;
            take_up<L, V>(fed + row * V, group, shares + i * size, size, 1, first, i);
            code(i, fed + row * V);
        }
    }
}

}  // namespace kvq
