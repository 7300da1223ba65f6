// The path of least weighted squared error with noise shaping (kvq_calib/codec/noise_shaping.py): a share of each
// rounding error is added to the next token. So the numbers to code differ between the four survivors, and each has a
// separate search. Every operation is rounded; ties go to the predecessor, and in the end to the state, of the lower
// number.
#pragma once

#include "path.h"

namespace kvq {

// One block in each lane.
template <int L, int N>
void shaped_path(const Channel& channel, const Floats<L>* u, Tokens<L> tokens, Coded<L>& coded) {
    const typename Search<L, N>::Type search(channel);
    Floats<L> level[kBlock][4], cost[4], error[4];
    Ints<L> place[kBlock][4];  // bit 8: whether the predecessor is the higher one
    for (int s = 0; s < 4; s++) {
        cost[s] = splat<L>(s == 0 ? 0.0f : kInfinity);
        error[s] = Floats<L>{};
    }
    for (int t = 0; t < kBlock; t++) {
        Floats<L> total[4][2], made[4][2], near[4][2];
        Ints<L> places[4];
        auto search_from = [&](auto of) KVQ_ALWAYS_INLINE {
            constexpr int s = decltype(of)::kSize, last = s & 1;
            const Floats<L> target = u[t] + tokens.gain[t] * error[s];
            search.template find<last, 2>(target, near[s], places[s]);
#pragma GCC unroll 2
            for (int n = 0; n < 2; n++) {
                made[s][n] = target - near[s][n];
                Floats<L> distance = made[s][n] * made[s][n];
                if (tokens.weight != nullptr) distance *= tokens.weight[t];
                if (tokens.present != nullptr) distance = (Floats<L>)((Ints<L>)distance & tokens.present[t]);
                total[s][n] = cost[s] + distance;
            }
        };
        search_from(OfSize<0>());
        search_from(OfSize<1>());
        search_from(OfSize<2>());
        search_from(OfSize<3>());
#pragma GCC unroll 4
        for (int after = 0; after < 4; after++) {
            // From states last and last + 2; the subset of code c is 2 (c ^ u[t - 2]) + u[t - 1].
            const int last = after >> 1, free = after & 1;
            const Ints<L> high = total[last + 2][free ^ 1] < total[last][free];
            cost[after] = high ? total[last + 2][free ^ 1] : total[last][free];
            error[after] = high ? made[last + 2][free ^ 1] : made[last][free];
            level[t][after] = high ? near[last + 2][free ^ 1] : near[last][free];
            const Ints<L> low_place = places[last] >> (8 * (2 * free + last)) & 0xff;
            const Ints<L> high_place = places[last + 2] >> (8 * (2 * (free ^ 1) + last)) & 0xff;
            place[t][after] = high ? high_place | 0x100 : low_place;
        }
    }
    const Floats<L> all = (cost[0] + cost[1]) + (cost[2] + cost[3]);
    coded.not_a_number |= all != all;
    Ints<L> state = cheapest<L>(cost);
    for (int t = kBlock - 1; t >= 0; t--) {
        const Ints<L> found = pick<L>(place[t], state);
        coded.code[t] = ((found & 0xff) << 1) | (state & 1);
        coded.seen[t] = pick<L>(level[t], state);
        state = (state >> 1) + (found >> 8 << 1);
    }
}

}  // namespace kvq
