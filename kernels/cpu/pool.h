// Threads that wait for work. What is computed never depends on how many there are, for pieces of work share nothing.
#pragma once

#include <cstdint>

namespace kvq {

// Call work(context) on up to `threads` threads at once, this one among them, and return when all calls have. Where
// the threads are busy with another caller's work, this one does it alone.
void run_on_threads(int threads, void (*work)(void*), void* context);

}  // namespace kvq
