#include "pool.h"

#include <pthread.h>
#include <signal.h>

namespace kvq {
namespace {

constexpr int kMostThreads = 256;

struct Pool {
    pthread_mutex_t owner;  // held by the caller whose work it is
    pthread_mutex_t lock;   // guards what follows
    pthread_cond_t wake;
    pthread_cond_t done;
    void (*work)(void*);
    void* context;
    int started;  // threads there are
    int wanted;   // threads that may still take part in this work
    int running;  // threads that take part
};

constexpr Pool kEmpty = {PTHREAD_MUTEX_INITIALIZER, PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER,
                         PTHREAD_COND_INITIALIZER,  nullptr, nullptr, 0, 0, 0};
// Never destroyed: threads wait in it until the process ends.
Pool pool = kEmpty;
pthread_once_t once = PTHREAD_ONCE_INIT;

// In a forked child only the caller's thread exists, so it starts new threads.
void begin_anew() { pool = kEmpty; }
void watch_forks() { pthread_atfork(nullptr, nullptr, begin_anew); }

void* wait_for_work(void*) {
    pthread_mutex_lock(&pool.lock);
    for (;;) {
        while (pool.wanted == 0) pthread_cond_wait(&pool.wake, &pool.lock);
        pool.wanted--;
        pool.running++;
        pthread_mutex_unlock(&pool.lock);
        pool.work(pool.context);
        pthread_mutex_lock(&pool.lock);
        if (--pool.running == 0) pthread_cond_signal(&pool.done);
    }
    return nullptr;
}

// With pool.lock held: start up to `count` threads. Fewer threads are not an error.
void start_threads(int count) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);  // signals go to the program's threads
    while (pool.started < count) {
        pthread_t thread;
        if (pthread_create(&thread, nullptr, wait_for_work, nullptr) != 0) break;
        pthread_detach(thread);
        pool.started++;
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

}  // namespace

void run_on_threads(int threads, void (*work)(void*), void* context) {
    if (threads > kMostThreads) threads = kMostThreads;
    if (threads <= 1 || pthread_once(&once, watch_forks) != 0 || pthread_mutex_trylock(&pool.owner) != 0) {
        work(context);
        return;
    }
    pthread_mutex_lock(&pool.lock);
    if (pool.started < threads - 1) start_threads(threads - 1);
    pool.work = work;
    pool.context = context;
    pool.wanted = pool.started < threads - 1 ? pool.started : threads - 1;
    pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.lock);
    work(context);
    pthread_mutex_lock(&pool.lock);
    pool.wanted = 0;  // threads that have not woken yet have nothing left to do
    while (pool.running > 0) pthread_cond_wait(&pool.done, &pool.lock);
    pthread_mutex_unlock(&pool.lock);
    pthread_mutex_unlock(&pool.owner);
}

}  // namespace kvq
