// Answers calls of the CPU kernels that another process makes: built for another machine, run under an emulator.
//
// A call comes on standard input, in 64-bit numbers: the function; how many regions of memory, pointers within them,
// and arguments; of each region its size and its address modulo 64; of each pointer the region and offset where it
// stands, and those it points to; of each argument a region and an offset, or -1 and a number. The regions' bytes
// follow. What the function returned and the regions as it left them go to standard output.
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../kernels/cpu/kvq_native.h"

namespace {

typedef int32_t (*Call)(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                        int64_t, int64_t);
constexpr int kMostArguments = 12;
constexpr int64_t kAlignment = 64, kBeyond = 256;

template <typename Function> Call as_call(Function function) { return reinterpret_cast<Call>(function); }

// In the order of FUNCTIONS in emulated.py.
const Call kFunctions[] = {
    as_call(kvq_abi),           as_call(kvq_runs_here),     as_call(kvq_encode_trellis),
    as_call(kvq_encode_scalar), as_call(kvq_pack),          as_call(kvq_list_outliers),
    as_call(kvq_join),          as_call(kvq_attend),        as_call(kvq_dequantize),
    as_call(kvq_turns_within),  as_call(kvq_turns_of_blocks),
};

bool moved(ssize_t (*move)(int, void*, size_t), int file, void* data, size_t size) {
    for (char* at = static_cast<char*>(data); size;) {
        const ssize_t count = move(file, at, size);
        if (count <= 0) return false;
        at += count, size -= size_t(count);
    }
    return true;
}
ssize_t put(int file, void* data, size_t size) { return write(file, data, size); }

bool receive(void* data, size_t size) { return moved(read, 0, data, size); }
bool send(void* data, size_t size) { return moved(put, 1, data, size); }

struct Region {
    int64_t size;
    int64_t misalignment;
};
struct Place {
    int64_t region;
    int64_t offset;
};

bool answer() {
    int64_t head[4];
    if (!receive(head, sizeof head)) return false;
    std::vector<Region> regions(head[1]);
    std::vector<Place> pointers(2 * head[2]), arguments(head[3]);
    if (!receive(regions.data(), regions.size() * sizeof(Region))) return false;
    if (!receive(pointers.data(), pointers.size() * sizeof(Place))) return false;
    if (!receive(arguments.data(), arguments.size() * sizeof(Place))) return false;
    std::vector<char*> held, at;
    for (const Region& region : regions) {
        const size_t room = size_t(region.size + kBeyond + 2 * kAlignment) / kAlignment * kAlignment;
        held.push_back(static_cast<char*>(aligned_alloc(kAlignment, room)));
        at.push_back(held.back() + region.misalignment);
        if (!receive(at.back(), size_t(region.size))) return false;
    }
    for (size_t i = 0; i < pointers.size(); i += 2) {
        const Place &from = pointers[i], &to = pointers[i + 1];
        char* const value = at[to.region] + to.offset;
        memcpy(at[from.region] + from.offset, &value, sizeof value);
    }
    int64_t a[kMostArguments] = {};
    for (size_t i = 0; i < arguments.size(); ++i) {
        const Place& own = arguments[i];
        a[i] = own.region < 0 ? own.offset : int64_t(at[own.region] + own.offset);
    }
    int64_t status = kFunctions[head[0]](a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11]);
    if (!send(&status, sizeof status)) return false;
    for (size_t i = 0; i < regions.size(); ++i)
        if (!send(at[i], size_t(regions[i].size))) return false;
    for (char* block : held) free(block);
    return true;
}

} // namespace

int main() {
    while (answer()) {
    }
}
