// Threads that wait for work. Results do not depend on their number, because pieces of work are independent.
#pragma once

#include <cstdint>

namespace kvq {

// Call work(context) on up to `threads` threads at once, including this one, and return when all calls have returned.
// If the threads are busy with another caller's work, this thread does all of it.
void run_on_threads(int threads, void (*work)(void*), void* context);

}  // namespace kvq
