/* The hot path of the shared-memory wire: sum buffers that every rank has mapped, publish words, wait for words.
 *
 * Plain C ABI for ctypes; the structs are mirrored in kernel.py. The protocol is that of PureSum in sums.py, word for word,
 * so that a rank with this kernel and one without it can share an arena, and the sums have the same bits:
 *
 *   start     write the header (Python), then publish ready[me] = count
 *   all ready sum my slice over ranks in rank order, scale it, write it into every rank's copy; publish done[me] = count
 *   all done  the buffer holds the result on this rank
 *
 * Nobody starts operation k + 1 on a buffer before it has seen all ranks done with k, so one header a rank is enough.
 * A variant in which every rank sums all of a small buffer into its own copy, which saves the second wait, was tried: with
 * 2 ranks it is as fast at 256 bytes (4.4 us) and slower from 4 KB on (16 KB: 8.4 us against 5.0).
 *
 * Note [sleep]: a rank that sleeps stores in its own control page whom it sleeps for, looks at what it waits for once more,
 * and then waits on that word. A rank that publishes does the reverse: store, fence, look who sleeps. One of the two sees
 * the other. The sleeper's word is cleared by whoever wakes it, so a wake that comes first makes the wait return at once.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <time.h>
#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if defined(PL_CLONES)
#define FAST __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FAST
#endif
#if defined(__clang__)
#define INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define INDEPENDENT _Pragma("GCC ivdep")
#endif
#define EXPORT __attribute__((visibility("default")))

enum { SLEEP = 64 };                                  /* byte offset of the sleep word in a control page */
enum { READY = 0, DONE = 8, BAD = 16, HEADER = 64 };  /* byte offsets in a rank's part of a sheet */
enum { IDLE = 0, STARTED = 1, SUMMED = 2 };           /* stages of an operation */
enum { ANYBODY = 1, RANK = 2 };                       /* sleep words: for anybody, for rank (word - RANK) */
enum { BLOCK = 1024 };                                /* elements summed at a time: they stay in the first cache */
enum { SHY = 64 };                                    /* waits without quick looks; see Note [quick looks] */

typedef struct pl_buffer {
  struct pl_buffer *next; /* list of the buffers under way */
  char *payload;          /* rank r's copy: payload + r * payload_stride */
  char *sheet;            /* rank r's words and headers: sheet + r * sheet_stride */
  double *sums;           /* header sums, private */
  int64_t payload_stride, sheet_stride;
  int64_t low, high;      /* my slice: [low, high) */
  int64_t count;          /* number of the operation under way, or of the last one */
  double divisor;
  int32_t header_size, doubles, weighted, stage, peer, nonfinite;
} pl_buffer;

typedef struct pl_wire {
  pl_buffer *first;
  char *control; /* rank r's control page: control + r * control_stride */
  int64_t control_stride, quick_ns, crowded_ns;
  int32_t rank, size, shy, padding;
} pl_wire;

EXPORT int64_t pl_layout(void) { return (int64_t)sizeof(pl_buffer) * 1000 + (int64_t)sizeof(pl_wire); }

/* ---- words ------------------------------------------------------------------------------------------------------- */
static int64_t load(const void *word) { return atomic_load_explicit((_Atomic int64_t *)word, memory_order_acquire); }

static int64_t now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static _Atomic uint32_t *sleep_word(const pl_wire *w, int32_t rank) {
  return (_Atomic uint32_t *)(w->control + rank * w->control_stride + SLEEP);
}

EXPORT int64_t pl_load(const void *word) { return load(word); }

/* Wake whoever sleeps for me. See Note [sleep]. */
EXPORT void pl_ring(const pl_wire *w) {
  atomic_thread_fence(memory_order_seq_cst);
  for (int32_t r = 0; r < w->size; r++) {
    uint32_t for_whom = atomic_load_explicit(sleep_word(w, r), memory_order_relaxed);
    if (for_whom != ANYBODY && for_whom != (uint32_t)(RANK + w->rank)) continue;
    atomic_store_explicit(sleep_word(w, r), 0, memory_order_seq_cst);
#ifdef __linux__
    syscall(SYS_futex, sleep_word(w, r), FUTEX_WAKE, 1, NULL, NULL, 0);
#endif
  }
}

EXPORT void pl_publish(const pl_wire *w, void *word, int64_t value) {
  atomic_store_explicit((_Atomic int64_t *)word, value, memory_order_release);
  pl_ring(w);
}

/* Announce sleep for a rank, or for anybody. The caller looks at its condition again before it calls pl_doze. */
EXPORT void pl_arm(const pl_wire *w, uint32_t for_whom) {
  atomic_store_explicit(sleep_word(w, w->rank), for_whom, memory_order_seq_cst);
  atomic_thread_fence(memory_order_seq_cst);
}

/* Sleep until woken, for `nanoseconds` at most, or until a signal (then 1). The sleep is over afterwards. */
EXPORT int32_t pl_doze(const pl_wire *w, uint32_t for_whom, int64_t nanoseconds) {
#ifdef __linux__
  struct timespec t = {nanoseconds / 1000000000, nanoseconds % 1000000000};
  long rc = syscall(SYS_futex, sleep_word(w, w->rank), FUTEX_WAIT, for_whom, &t, NULL, 0);
#else
  struct timespec t = {0, nanoseconds < 50000 ? nanoseconds : 50000}; /* no futex: look again every 50 us */
  int rc = nanosleep(&t, NULL);
  (void)for_whom;
#endif
  int32_t signalled = rc != 0 && errno == EINTR;
  pl_arm(w, 0);
  return signalled;
}

/* ---- sums -------------------------------------------------------------------------------------------------------- */
/* combine: every rank's copy = (copy 0 + copy 1 + ... in this order) * scale, in [low, high). True: a value is not finite.
 *
 * A block at a time: all sums but the last go to `sum`, which stays in cache; the last, the scale and the check are done
 * while the first and the last copy are written, over what was read. No element depends on another, which is what
 * INDEPENDENT tells the compiler. Scaling by 1 changes no bit. */
#define COMBINE(REAL, BITS, EXPONENT)                                                                                  \
  FAST static void add_##REAL(const REAL *x, const REAL *y, REAL *sum, int64_t n) {                                    \
    INDEPENDENT for (int64_t i = 0; i < n; i++) sum[i] = x[i] + y[i];                                                  \
  }                                                                                                                    \
  FAST static int last_##REAL(const REAL *x, const REAL *y, REAL *a, REAL *b, int64_t n, REAL scale) {                 \
    BITS bad = 0;                                                                                                      \
    INDEPENDENT for (int64_t i = 0; i < n; i++) {                                                                      \
      const REAL value = (x[i] + y[i]) * scale;                                                                        \
      BITS bits;                                                                                                       \
      memcpy(&bits, &value, sizeof bits);                                                                              \
      bad |= (bits & EXPONENT) == EXPONENT;                                                                            \
      a[i] = value;                                                                                                    \
      b[i] = value;                                                                                                    \
    }                                                                                                                  \
    return bad != 0;                                                                                                   \
  }                                                                                                                    \
  static const REAL *nothing_##REAL(REAL *sum, int64_t n) { /* -0 is what leaves every number as it is, -0 too */      \
    for (int64_t i = 0; i < n; i++) sum[i] = -(REAL)0;                                                                 \
    return sum;                                                                                                        \
  }                                                                                                                    \
  static int combine_##REAL(char *copies, int64_t stride, int32_t size, int64_t low, int64_t high, double scale) {       \
    REAL sum[BLOCK];                                                                                                   \
    int bad = 0;                                                                                                       \
    for (int64_t at = low; at < high; at += BLOCK) {                                                                   \
      const int64_t n = high - at < BLOCK ? high - at : BLOCK;                                                         \
      REAL *first = (REAL *)copies + at, *last = (REAL *)(copies + (size - 1) * stride) + at;                          \
      const REAL *x = first, *y = last;                                                                                \
      for (int32_t r = 1; r < size - 1; r++, x = sum) add_##REAL(x, (REAL *)(copies + r * stride) + at, sum, n);       \
      if (size == 1) y = nothing_##REAL(sum, n);                                                                       \
      bad |= last_##REAL(x, y, first, last, n, (REAL)scale);                                                           \
      for (int32_t r = 1; r < size - 1; r++)                                                                           \
        memcpy((REAL *)(copies + r * stride) + at, first, (size_t)n * sizeof(REAL));                                   \
    }                                                                                                                  \
    return bad;                                                                                                        \
  }
COMBINE(float, uint32_t, 0x7f800000u)
COMBINE(double, uint64_t, 0x7ff0000000000000ull)

/* ---- one buffer's all-reduce ------------------------------------------------------------------------------------- */
static char *sheet(const pl_buffer *b, int32_t rank) { return b->sheet + rank * b->sheet_stride; }

/* True once every rank has published `word` for this operation; remembers how far it looked. */
static int all_reached(const pl_wire *w, pl_buffer *b, int word) {
  for (; b->peer < w->size; b->peer++)
    if (load(sheet(b, b->peer) + word) < b->count) return 0;
  b->peer = 0;
  return 1;
}

static double sum_headers(const pl_wire *w, pl_buffer *b) {
  for (int32_t i = 0; i < b->header_size; i++) {
    double sum = ((const double *)(sheet(b, 0) + HEADER))[i];
    for (int32_t r = 1; r < w->size; r++) sum += ((const double *)(sheet(b, r) + HEADER))[i];
    b->sums[i] = sum;
  }
  return b->weighted && b->sums[0] != 0.0 ? b->divisor / b->sums[0] : 1.0;
}

static void finish(pl_wire *w, pl_buffer *b) {
  pl_buffer **link = &w->first;
  while (*link && *link != b) link = &(*link)->next;
  if (*link) *link = b->next;
  b->stage = IDLE;
}

static int advance(pl_wire *w, pl_buffer *b) {
  if (b->stage == STARTED) {
    if (!all_reached(w, b, READY)) return 0;
    const double scale = sum_headers(w, b);
    const int64_t bad =
        b->doubles ? combine_double(b->payload, b->payload_stride, w->size, b->low, b->high, scale)
                   : combine_float(b->payload, b->payload_stride, w->size, b->low, b->high, scale);
    memcpy(sheet(b, w->rank) + BAD, &bad, sizeof bad);
    b->stage = SUMMED;
    pl_publish(w, sheet(b, w->rank) + DONE, b->count);
  }
  if (b->stage == SUMMED) {
    if (!all_reached(w, b, DONE)) return 0;
    b->nonfinite = 0;
    for (int32_t r = 0; r < w->size; r++) b->nonfinite |= load(sheet(b, r) + BAD) != 0;
    finish(w, b);
  }
  return 1;
}

/* Begin the next operation on a buffer; its header is already in place. */
EXPORT void pl_start(pl_wire *w, pl_buffer *b, double divisor, int32_t weighted) {
  b->count++;
  b->divisor = divisor;
  b->weighted = weighted;
  b->stage = STARTED;
  b->peer = 0;
  pl_buffer **link = &w->first;
  while (*link) link = &(*link)->next;
  b->next = NULL;
  *link = b;
  pl_publish(w, sheet(b, w->rank) + READY, b->count);
}

/* Do what can be done without waiting; 1 when the buffer holds the result. */
EXPORT int32_t pl_poll(pl_wire *w, pl_buffer *b) { return advance(w, b); }

/* Advance every buffer under way: a peer may wait for my slice of any of them. True: one of them moved. */
EXPORT int32_t pl_serve(pl_wire *w) {
  int32_t moved = 0;
  for (pl_buffer *b = w->first, *next; b; b = next) {
    next = b->next;
    const int32_t stage = b->stage, peer = b->peer;
    advance(w, b);
    moved |= b->stage != stage || b->peer != peer;
  }
  return moved;
}

/* Wait for one buffer. 1: done. 0: `nanoseconds` have passed or a signal came, and the caller has other things to look at.
 *
 * Note [quick looks]: before it sleeps, a rank looks again and again for a while, and yields the processor between two looks.
 * Alone on its core it loses nothing by that and saves a sleep and a wake; beside its peers it lets them get on. But a yield
 * to somebody who computes can last milliseconds. A rank that meets this is shy for a while: it sleeps at once, and is woken
 * as soon as its peer is there. */
EXPORT int32_t pl_wait(pl_wire *w, pl_buffer *b, int64_t nanoseconds) {
  const int64_t begin = now_ns();
  const int shy = w->shy > 0 && w->shy-- > 0;
  for (;;) {
    pl_serve(w);
    if (b->stage == IDLE) return 1;
    const int64_t waited = now_ns() - begin;
    if (!shy && w->shy == 0 && waited < w->quick_ns) {
      sched_yield();
      if (now_ns() - begin - waited > w->crowded_ns) w->shy = SHY;
    } else if (waited >= nanoseconds) {
      return 0;
    } else {
      const uint32_t for_whom = w->first->next ? (uint32_t)ANYBODY : RANK + (uint32_t)b->peer;
      pl_arm(w, for_whom);
      if (pl_serve(w))
        pl_arm(w, 0);
      else if (pl_doze(w, for_whom, nanoseconds - waited))
        return 0;
    }
  }
}

/* Bit mask of the ranks that a buffer waits for; the first 62 of them. */
EXPORT int64_t pl_missing(const pl_wire *w, const pl_buffer *b) {
  int64_t mask = 0;
  if (b->stage == IDLE) return 0;
  for (int32_t r = 0; r < w->size && r < 62; r++)
    if (load(sheet(b, r) + (b->stage == STARTED ? READY : DONE)) < b->count) mask |= (int64_t)1 << r;
  return mask;
}

/* Add fixed-point numbers of two words: exchange/exact.py says what for. No step rounds but the two that cut. */
FAST static void fold(const float *x, double *high, double *low, int64_t n, double cut_high, double cut_low) {
  for (int64_t i = 0; i < n; i++) {
    const double t = ((double)x[i] + cut_low) - cut_low, h = (t + cut_high) - cut_high;
    high[i] += h;
    low[i] += t - h;
  }
}

FAST static void fold_first(const float *x, double *high, double *low, int64_t n, double cut_high, double cut_low) {
  for (int64_t i = 0; i < n; i++) {
    const double t = ((double)x[i] + cut_low) - cut_low, h = (t + cut_high) - cut_high;
    high[i] = h;
    low[i] = t - h;
  }
}

EXPORT void pl_fold(const float *x, double *high, double *low, int64_t n, double cut_high, double cut_low, int32_t first) {
  (first ? fold_first : fold)(x, high, low, n, cut_high, cut_low);
}
