// Codes of one channel's block, with or without a trellis.
#pragma once

#include "shaped.h"

namespace kvq {

// Codes of one channel's elements u[32].
template <int L>
void code_channel(const Channel& channel, int states, const Floats<L>* u, Tokens<L> tokens, Coded<L>& coded) {
    if (channel.count > 1 && states == 1) return nearest_levels<L>(channel, u, coded);
    const bool found = with_subsets(channel.count, [&](auto of) {
        constexpr int N = decltype(of)::kSize;
        tokens.gain != nullptr ? shaped_path<L, N>(channel, u, tokens, coded)
                               : best_path<L, N>(channel, u, tokens, coded);
    });
    if (found) return;
    for (int t = 0; t < kBlock; t++) {  // width 0: one level and no choice
        coded.code[t] = Ints<L>{};
        coded.seen[t] = splat<L>(channel.level[0]);
    }
}

}  // namespace kvq
