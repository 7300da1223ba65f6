// Sizes of a page of packed codes.
#pragma once

namespace kvq {

constexpr int kPageBlocks = 8;
constexpr int kBlockTokens = 32;
constexpr int kPageTokens = kPageBlocks * kBlockTokens;
constexpr int kMostWidth = 8;

}  // namespace kvq
