/* Table rows on a CPU: lookup and update, each in one pass with prefetched memory; dot products of pairs of vectors;
   and the backward pass of ReLUs.

   Lookup and update give the results of plain torch in lightning_dlrm.tables.lookup and lightning_dlrm.optim.rules:
   sums are added in the order of the indices, and a product is fused with the addition after it if torch's kernels fuse
   them.
   Each sum is taken by one thread, so results do not depend on the number of threads.

   Names: B bags (output vectors), F tables, D width, R rows of all tables, N indices of all bags, V vectors, P pairs of
   vectors. */

#include <math.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { LINE = 64, PREFETCH = 24, BAGS_PER_CHUNK = 512, INDICES_PER_CHUNK = 512, MAX_DIGIT_BITS = 9 };

#define INLINE static inline __attribute__((always_inline))

/* Fused only if the processor has one instruction for it; clang does not define __FP_FAST_FMAF even then. */
#if defined(__FP_FAST_FMAF) || defined(__FMA__) || defined(__ARM_FEATURE_FMA)
#define FMA(a, b, c) fmaf(a, b, c)
#else
#define FMA(a, b, c) ((a) * (b) + (c))
#endif

/* Functions of torch's own OpenMP library, set when this library is loaded: the threads of a second OpenMP library
   would spin beside torch's. `#pragma omp parallel` calls GOMP_parallel. */
static void (*parallel)(void (*work)(void *), void *work_arguments, unsigned threads, unsigned flags);
static void (*barrier)(void);
static int (*thread_number)(void);
static int (*thread_count)(void);

void use_threads(void *gomp_parallel, void *gomp_barrier, void *omp_get_thread_num, void *omp_get_num_threads) {
    parallel = (void (*)(void (*)(void *), void *, unsigned, unsigned))gomp_parallel;
    barrier = (void (*)(void))gomp_barrier;
    thread_number = (int (*)(void))omp_get_thread_num;
    thread_count = (int (*)(void))omp_get_num_threads;
}

/* Defines a function that kernels/compiled.py calls; compiled.py reads the structure's members from this file. */
#define ENTRY(structure, function)                                                                                     \
    const size_t function##_size = sizeof(struct structure);                                                           \
    void function(struct structure *all, int threads)

/* Returns the number of the next chunk of work that no thread has taken. */
INLINE int64_t take_chunk(int64_t *next) {
    return __atomic_fetch_add(next, 1, __ATOMIC_RELAXED);
}

/* Returns where a thread's share of some work begins. Torch's matrix products split samples in the same way, so each
   sample stays with the thread that has it in its caches. */
INLINE int64_t share_start(int64_t count, int thread) {
    return count * thread / thread_count();
}

INLINE int64_t minimum(int64_t a, int64_t b) {
    return a < b ? a : b;
}

/* Prefetches into the second-level cache: the first level is too small for so many lines, and a prefetch for writing
   takes longer. */
INLINE void prefetch(const void *at, int64_t bytes) {
    const char *end = (const char *)at + bytes;
    for (const char *line = (const char *)((uintptr_t)at & ~(uintptr_t)(LINE - 1)); line < end; line += LINE)
        __builtin_prefetch(line, 0, 2);
}

/* Returns element `d` of a row of float32, or of bfloat16 if `bf16`. */
INLINE float read_weight(const void *row, int64_t d, bool bf16) {
    if (!bf16)
        return ((const float *)row)[d];
    uint32_t bits = (uint32_t)((const uint16_t *)row)[d] << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* Sets element `d` of a row; bfloat16 is rounded to nearest, ties to even. */
INLINE void write_weight(void *row, int64_t d, bool bf16, float value) {
    if (!bf16) {
        ((float *)row)[d] = value;
        return;
    }
    uint32_t bits;
    memcpy(&bits, &value, 4);
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    ((uint16_t *)row)[d] = value != value ? 0x7fc0 : (uint16_t)rounded;
}

/* ---- Lookup ---- */

struct lookup {
    const char *weight;     /* [R, D] */
    const int32_t *ids;     /* [N], each within its table */
    const int64_t *offsets; /* [B + 1], where each bag begins; NULL if each bag has one id */
    const int32_t *tables;  /* [F], where each table begins; bag b is of table b % F */
    const float *factors;   /* [N] or NULL */
    char *vectors;          /* out [B, D], of the weight's type */
    int32_t *rows;          /* out [N] */
    int64_t *bags;          /* out [N], the bag of each index; NULL if each bag has one id */
    int64_t bag_count, table_count, width, row_count;
    bool bf16;
    int64_t wrong; /* in -1; out: an index whose row does not exist, or N if the offsets do not ascend */
    int64_t next;  /* 0 */
};

INLINE int64_t bag_start(const struct lookup *a, int64_t bag) {
    return a->offsets ? a->offsets[bag] : bag;
}

/* Writes the rows and bags of the indices of some bags; returns false if a row does not exist, or if offsets do not
   ascend. */
INLINE bool find_rows(struct lookup *a, int64_t first, int64_t last) {
    int64_t table = first % a->table_count;
    for (int64_t bag = first; bag < last; bag++) {
        if (bag_start(a, bag) > bag_start(a, bag + 1) || bag_start(a, bag + 1) > bag_start(a, a->bag_count)) {
            __atomic_store_n(&a->wrong, bag_start(a, a->bag_count), __ATOMIC_RELAXED);
            return false;
        }
        for (int64_t i = bag_start(a, bag); i < bag_start(a, bag + 1); i++) {
            const int64_t row = (int64_t)a->ids[i] + a->tables[table];
            if (row < 0 || row >= a->row_count) {
                __atomic_store_n(&a->wrong, i, __ATOMIC_RELAXED);
                return false;
            }
            a->rows[i] = (int32_t)row;
            if (a->bags)
                a->bags[i] = bag;
        }
        table = table + 1 < a->table_count ? table + 1 : 0;
    }
    return true;
}

INLINE void sum_bags(struct lookup *a, int64_t first, int64_t last, int64_t width, bool bf16, bool weighted,
                     float *sum) {
    const int64_t bytes = width * (bf16 ? 2 : 4), begin = bag_start(a, first), end = bag_start(a, last);
    for (int64_t i = begin; i < minimum(end, begin + PREFETCH); i++)
        prefetch(a->weight + a->rows[i] * bytes, bytes);
    for (int64_t bag = first, i = begin; bag < last; bag++) {
        for (int64_t d = 0; d < width; d++)
            sum[d] = 0;
        for (; i < bag_start(a, bag + 1); i++) {
            if (i + PREFETCH < end)
                prefetch(a->weight + a->rows[i + PREFETCH] * bytes, bytes);
            const char *row = a->weight + a->rows[i] * bytes;
            for (int64_t d = 0; d < width; d++) {
                const float value = read_weight(row, d, bf16);
                sum[d] = weighted ? FMA(a->factors[i], value, sum[d]) : sum[d] + value;
            }
        }
        for (int64_t d = 0; d < width; d++)
            write_weight(a->vectors + bag * bytes, d, bf16, sum[d]);
    }
}

/* Copies the rows of bags that have one id each, without factors. */
INLINE void copy_rows(struct lookup *a, int64_t first, int64_t last, int64_t bytes) {
    const int32_t *rows = a->rows;
    const char *weight = a->weight;
    char *vectors = a->vectors;
    for (int64_t i = first; i < minimum(last, first + PREFETCH); i++)
        prefetch(weight + rows[i] * bytes, bytes);
    for (int64_t i = first; i < last; i++) {
        if (i + PREFETCH < last)
            prefetch(weight + rows[i + PREFETCH] * bytes, bytes);
        memcpy(vectors + i * bytes, weight + rows[i] * bytes, (size_t)bytes);
    }
}

static void look_up_chunks(void *work_arguments) {
    struct lookup *a = work_arguments;
    const int64_t chunks = (a->bag_count + BAGS_PER_CHUNK - 1) / BAGS_PER_CHUNK;
    float sum[a->width];
    for (int64_t chunk; (chunk = take_chunk(&a->next)) < chunks;) {
        const int64_t first = chunk * BAGS_PER_CHUNK, last = minimum(first + BAGS_PER_CHUNK, a->bag_count);
        if (!find_rows(a, first, last))
            break;
        /* A width that is known at compile time takes half the time. */
        if (!a->offsets && !a->factors && !a->bf16 && a->width == 16)
            copy_rows(a, first, last, 64);
        else if (!a->offsets && !a->factors)
            copy_rows(a, first, last, a->width * (a->bf16 ? 2 : 4));
        else if (a->factors)
            sum_bags(a, first, last, a->width, a->bf16, true, sum);
        else if (a->bf16)
            sum_bags(a, first, last, a->width, true, false, sum);
        else if (a->width == 16)
            sum_bags(a, first, last, 16, false, false, sum);
        else if (a->width == 64)
            sum_bags(a, first, last, 64, false, false, sum);
        else
            sum_bags(a, first, last, a->width, false, false, sum);
    }
}

ENTRY(lookup, look_up) {
    parallel(look_up_chunks, all, (unsigned)threads, 0);
}

/* ---- Sort ---- */

struct sorting {
    const int32_t *rows; /* [N], from 0 on */
    const int64_t *tags; /* [N], sorted with the rows; NULL for the indices */
    uint64_t *scratch;   /* [2, N] */
    int32_t *counts;     /* [threads + 1, 2^high] */
    int64_t count;
    int64_t bits;  /* of the rows; 0 if they ascend already */
    int64_t high;  /* highest bits, which select the bucket */
    int64_t digit; /* bits that one pass over a bucket sorts by */
    int64_t *next_bucket;
};

/* Returns the row of an index in the upper half, and its tag in the lower half. */
INLINE uint64_t packed(const struct sorting *a, int64_t i) {
    return (uint64_t)(uint32_t)a->rows[i] << 32 | (uint64_t)(a->tags ? a->tags[i] : i);
}

INLINE int64_t row_of(uint64_t index) {
    return (int64_t)(index >> 32);
}

/* Replaces each thread's counts of each bucket by the places of its indices, and writes where the buckets begin. */
static void counts_to_places(const struct sorting *a, int threads) {
    int32_t place = 0, *bucket_starts = a->counts + ((int64_t)threads << a->high);
    for (int64_t bucket = 0; bucket < (int64_t)1 << a->high; bucket++) {
        bucket_starts[bucket] = place;
        for (int thread = 0; thread < threads; thread++) {
            int32_t *counted = a->counts + ((int64_t)thread << a->high) + bucket;
            const int32_t here = *counted;
            *counted = place;
            place += here;
        }
    }
}

/* Sorts a bucket by the lowest `bits` bits of the rows; after an even number of passes the result is in `from`. */
INLINE void sort_bucket(uint64_t *from, uint64_t *to, int64_t count, int64_t bits, int64_t digit) {
    const uint64_t mask = ((uint64_t)1 << digit) - 1;
    for (int64_t shift = 32; shift < 32 + bits; shift += digit) {
        int32_t places[1 << MAX_DIGIT_BITS] = {0}, place = 0;
        for (int64_t i = 0; i < count; i++)
            places[from[i] >> shift & mask]++;
        for (uint64_t value = 0; value <= mask; value++) {
            const int32_t here = places[value];
            places[value] = place;
            place += here;
        }
        for (int64_t i = 0; i < count; i++)
            to[places[from[i] >> shift & mask]++] = from[i];
        uint64_t *swapped = from;
        from = to;
        to = swapped;
    }
}

/* Sorts all indices by row; the sort is stable. All threads together first distribute them by the highest bits to
   buckets that fit in a core's caches. Then each bucket is sorted by the lower bits, the least significant ones first.
   A small number of indices makes one bucket. */
static const uint64_t *sort_indices(const struct sorting *a) {
    const int thread = thread_number(), threads = thread_count();
    const int64_t begin = a->count * thread / threads, end = a->count * (thread + 1) / threads;
    const int64_t buckets = (int64_t)1 << a->high, low = a->bits - a->high;
    uint64_t *from = a->scratch, *to = a->scratch + a->count;
    if (a->high) {
        int32_t *places = a->counts + ((int64_t)thread << a->high);
        memset(places, 0, (size_t)buckets * sizeof *places);
        for (int64_t i = begin; i < end; i++)
            places[a->rows[i] >> low]++;
        barrier();
        if (thread == 0)
            counts_to_places(a, threads);
        barrier();
        for (int64_t i = begin; i < end; i++)
            from[places[a->rows[i] >> low]++] = packed(a, i);
    } else {
        for (int64_t i = begin; i < end; i++)
            from[i] = packed(a, i);
    }
    barrier();
    const int32_t *bucket_starts = a->counts + ((int64_t)threads << a->high);
    for (int64_t bucket; a->bits && (bucket = take_chunk(a->next_bucket)) < buckets;) {
        const int64_t first = a->high ? bucket_starts[bucket] : 0;
        const int64_t last = bucket + 1 < buckets ? bucket_starts[bucket + 1] : a->count;
        sort_bucket(from + first, to + first, last - first, low, a->digit);
    }
    barrier();
    return (low + a->digit - 1) / a->digit % 2 ? to : from;
}

struct sort {
    const int32_t *rows; /* [N], from 0 on */
    int32_t *sorted;     /* out [N]: the rows, ascending */
    int64_t *order;      /* out [N]: their indices; those of equal rows ascend */
    uint64_t *scratch;   /* this and the next lines as in struct sorting */
    int32_t *counts;
    int64_t count, bits, high, digit;
    int64_t next_bucket; /* 0 */
};

static void sort_share(void *work_arguments) {
    struct sort *a = work_arguments;
    const uint64_t *indices = sort_indices(&(struct sorting){.rows = a->rows,
                                                             .scratch = a->scratch,
                                                             .counts = a->counts,
                                                             .count = a->count,
                                                             .bits = a->bits,
                                                             .high = a->high,
                                                             .digit = a->digit,
                                                             .next_bucket = &a->next_bucket});
    const int thread = thread_number();
    for (int64_t i = share_start(a->count, thread); i < share_start(a->count, thread + 1); i++) {
        a->sorted[i] = (int32_t)row_of(indices[i]);
        a->order[i] = (uint32_t)indices[i];
    }
}

ENTRY(sort, sort_rows) {
    parallel(sort_share, all, (unsigned)threads, 0);
}

/* ---- Update: indices are sorted by row; then the gradients of each row are summed and the row is updated ---- */

enum rule { SGD, ADAGRAD, ROW_WISE_ADAGRAD, ADAM };

struct update {
    char *weight;          /* [R, D] */
    float *first, *second; /* optimizer state: [R, D], [R] for row-wise Adagrad, or NULL */
    const int32_t *rows;   /* [N] */
    const int64_t *bags;   /* [N], the output vector of each index; NULL if index i went into vector i */
    const float *factors;  /* [N] or NULL */
    const float *gradient; /* [B, D] */
    uint64_t *scratch;     /* this, `counts`, `bits`, `high` and `digit` as in struct sorting */
    int32_t *counts;
    int64_t count, width, bits, high, digit;
    bool bf16;
    int rule;
    float rate, decay_factor, l2, epsilon;
    float share1, beta2, share2, correction2, adam_rate; /* of Adam: 1 - b1, b2, 1 - b2, 1 - b2^t, lr / (1 - b1^t) */
    int64_t next_bucket, next_chunk; /* 0 */
};

INLINE const float *gradient_of(const struct update *a, uint64_t index, int64_t width) {
    const int64_t output = (uint32_t)index;
    return a->gradient + (a->bags && a->factors ? a->bags[output] : output) * width;
}

INLINE float factor_of(const struct update *a, uint64_t index) {
    return a->factors[(uint32_t)index];
}

/* Returns the mean square of a row, summed in the order in which torch sums eight or more elements. */
INLINE float mean_square(const float *g, int64_t width) {
    float parts[4][8] = {{0}}, sum = 0;
    int64_t d = 0;
    for (; d + 32 <= width; d += 32)
        for (int k = 0; k < 4; k++)
            for (int p = 0; p < 8; p++)
                parts[k][p] += g[d + 8 * k + p] * g[d + 8 * k + p];
    for (; d + 8 <= width; d += 8)
        for (int p = 0; p < 8; p++)
            parts[0][p] += g[d + p] * g[d + p];
    for (int k = 1; k < 4; k++)
        for (int p = 0; p < 8; p++)
            parts[0][p] += parts[k][p];
    for (; d < width; d++)
        sum += g[d] * g[d];
    for (int p = 0; p < 8; p++)
        sum += parts[0][p];
    return sum / (float)width;
}

/* Updates each row whose first index, in sorted order, is at least `first` and below `last`. */
INLINE void update_chunk(struct update *a, const uint64_t *indices, int64_t first, int64_t last, int64_t width,
                         bool bf16, int rule, float *sum, float *values) {
    const int64_t bytes = width * (bf16 ? 2 : 4);
    const int64_t slot = rule == SGD ? 0 : rule == ROW_WISE_ADAGRAD ? 1 : width;
    int64_t begin = first, end, fetched = first;
    while (begin < last && begin > 0 && row_of(indices[begin]) == row_of(indices[begin - 1]))
        begin++;
    for (; begin < last; begin = end) {
        for (fetched = fetched < begin ? begin : fetched; fetched < minimum(begin + PREFETCH, last); fetched++) {
            const int64_t row = row_of(indices[fetched]);
            prefetch(a->weight + row * bytes, bytes);
            if (rule != SGD)
                prefetch(a->first + row * slot, slot * 4);
            if (rule == ADAM)
                prefetch(a->second + row * slot, slot * 4);
            prefetch(gradient_of(a, indices[fetched], width), width * 4);
        }
        const int64_t row = row_of(indices[begin]);
        for (end = begin + 1; end < a->count && row_of(indices[end]) == row;)
            end++;
        char *stored = a->weight + row * bytes;
        const float *g = gradient_of(a, indices[begin], width);
        if (end - begin > 1 || a->factors || a->l2 != 0) {
            for (int64_t d = 0; d < width; d++)
                sum[d] = a->factors ? factor_of(a, indices[begin]) * g[d] : g[d];
            for (int64_t i = begin + 1; i < end; i++) {
                if (i + PREFETCH < end)
                    prefetch(gradient_of(a, indices[i + PREFETCH], width), width * 4);
                g = gradient_of(a, indices[i], width);
                for (int64_t d = 0; d < width; d++)
                    sum[d] = a->factors ? FMA(factor_of(a, indices[i]), g[d], sum[d]) : sum[d] + g[d];
            }
            if (a->l2 != 0)
                for (int64_t d = 0; d < width; d++)
                    sum[d] = FMA(a->l2, read_weight(stored, d, bf16), sum[d]);
            g = sum;
        }
        float *w = bf16 ? values : (float *)stored;
        if (bf16 || a->decay_factor != 1)
            for (int64_t d = 0; d < width; d++)
                w[d] = read_weight(stored, d, bf16) * a->decay_factor;
        if (rule == SGD) {
            for (int64_t d = 0; d < width; d++)
                w[d] = FMA(-a->rate, g[d], w[d]);
        } else if (rule == ADAGRAD) {
            float *squares = a->first + row * width;
            for (int64_t d = 0; d < width; d++) {
                squares[d] = FMA(g[d], g[d], squares[d]);
                w[d] -= a->rate * g[d] / (sqrtf(squares[d]) + a->epsilon);
            }
        } else if (rule == ROW_WISE_ADAGRAD) {
            a->first[row] += mean_square(g, width);
            const float size = a->rate / (sqrtf(a->first[row]) + a->epsilon);
            for (int64_t d = 0; d < width; d++)
                w[d] = FMA(-size, g[d], w[d]);
        } else {
            float *means = a->first + row * width, *squares = a->second + row * width;
            for (int64_t d = 0; d < width; d++) {
                const float apart = g[d] - means[d];
                means[d] = a->share1 < 0.5f ? FMA(a->share1, apart, means[d]) : FMA(a->share1 - 1, apart, g[d]);
                squares[d] = FMA(a->share2 * g[d], g[d], squares[d] * a->beta2);
                w[d] -= means[d] / (sqrtf(squares[d] / a->correction2) + a->epsilon) * a->adam_rate;
            }
        }
        if (bf16)
            for (int64_t d = 0; d < width; d++)
                write_weight(stored, d, true, w[d]);
    }
}

INLINE void update_rows_by(struct update *a, const uint64_t *indices, int64_t first, int64_t last, int rule,
                           float *sum, float *values) {
    if (a->bf16)
        update_chunk(a, indices, first, last, a->width, true, rule, sum, values);
    else if (a->width == 16)
        update_chunk(a, indices, first, last, 16, false, rule, sum, values);
    else if (a->width == 64)
        update_chunk(a, indices, first, last, 64, false, rule, sum, values);
    else
        update_chunk(a, indices, first, last, a->width, false, rule, sum, values);
}

static void update_share(void *work_arguments) {
    struct update *a = work_arguments;
    /* The bags are sorted with the rows: to read them after the sort would take as long as the sort itself. */
    const uint64_t *indices = sort_indices(&(struct sorting){.rows = a->rows,
                                                             .tags = a->factors ? NULL : a->bags,
                                                             .scratch = a->scratch,
                                                             .counts = a->counts,
                                                             .count = a->count,
                                                             .bits = a->bits,
                                                             .high = a->high,
                                                             .digit = a->digit,
                                                             .next_bucket = &a->next_bucket});
    const int64_t chunks = (a->count + INDICES_PER_CHUNK - 1) / INDICES_PER_CHUNK;
    float sum[2 * a->width];
    float *values = sum + a->width;
    for (int64_t chunk; (chunk = take_chunk(&a->next_chunk)) < chunks;) {
        const int64_t first = chunk * INDICES_PER_CHUNK, last = minimum(first + INDICES_PER_CHUNK, a->count);
        if (a->rule == SGD)
            update_rows_by(a, indices, first, last, SGD, sum, values);
        else if (a->rule == ADAGRAD)
            update_rows_by(a, indices, first, last, ADAGRAD, sum, values);
        else if (a->rule == ROW_WISE_ADAGRAD)
            update_rows_by(a, indices, first, last, ROW_WISE_ADAGRAD, sum, values);
        else
            update_rows_by(a, indices, first, last, ADAM, sum, values);
    }
}

ENTRY(update, update_rows) {
    parallel(update_share, all, (unsigned)threads, 0);
}

/* ---- Dot products of pairs of vectors ----

   The sums of four rows and sixteen columns are kept in registers. From here on the compiler may fuse products with
   additions: these sums are not compared with torch's bit for bit. */

#ifdef __clang__
#pragma STDC FP_CONTRACT ON
#else
#pragma GCC optimize("fp-contract=fast")
#endif

/* Floats of one register: compilers keep sums of wider vectors in memory, which takes five times as long. */
#if defined(__AVX512F__)
enum { VECTOR = 16 };
#elif defined(__AVX__)
enum { VECTOR = 8 };
#else
enum { VECTOR = 4 };
#endif
enum { LANES = 16, TILE = 4, PARTS = LANES / VECTOR };

typedef float vector __attribute__((vector_size(4 * VECTOR), aligned(4), may_alias));

struct pairs {
    const char *first;   /* [B, D] */
    const char *others;  /* [B, V - 1, D] */
    char *out;           /* [B, D + P]: the first vector, then the products (i, j), j < i; or the gradient of these */
    char *grad_first;    /* out [B, D]; NULL to compute products, not gradients */
    char *grad_others;   /* out [B, V - 1, D] */
    float *spaces;       /* [threads, space], all zero: scratch memory */
    int64_t samples, vectors, width, space;
    bool bf16_first, bf16_others; /* which tensors are bfloat16; `out` has the type of `first` */
    bool self_interaction;        /* whether to take the products (i, i) too */
};

INLINE int64_t padded(int64_t count) {
    return (count + LANES - 1) / LANES * LANES;
}

INLINE int64_t bytes_of(int64_t count, bool bf16) {
    return count * (bf16 ? 2 : 4);
}

INLINE void read_floats(float *to, const char *from, int64_t count, bool bf16) {
    if (!bf16)
        memcpy(to, from, (size_t)count * 4);
    else
        for (int64_t d = 0; d < count; d++)
            to[d] = read_weight(from, d, true);
}

INLINE void write_floats(char *to, const float *from, int64_t count, bool bf16) {
    if (!bf16)
        memcpy(to, from, (size_t)count * 4);
    else
        for (int64_t d = 0; d < count; d++)
            write_weight(to, d, true, from[d]);
}

/* Adds left[r * row + k * step] * right[k * stride : k * stride + LANES], summed over k, to sum[r] for TILE rows r. */
INLINE void add_tile(vector (*sum)[PARTS], const float *left, int64_t row, int64_t step, const float *right,
                     int64_t stride, int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; k++)
        for (int r = 0; r < TILE; r++)
            for (int p = 0; p < PARTS; p++)
                sum[r][p] += left[r * row + k * step] * *(const vector *)(right + k * stride + p * VECTOR);
}

INLINE void put_tile(float *to, int64_t stride, vector (*sum)[PARTS]) {
    for (int r = 0; r < TILE; r++)
        for (int p = 0; p < PARTS; p++)
            *(vector *)(to + r * stride + p * VECTOR) = sum[r][p];
}

INLINE void multiply_pairs(const struct pairs *a, int64_t sample, int64_t width, float *space) {
    const int64_t vectors = a->vectors, across = padded(vectors);
    float *rows = space, *columns = rows + across * width, *products = columns + across * width;
    float *out = products + across * across;
    read_floats(rows, a->first + sample * bytes_of(width, a->bf16_first), width, a->bf16_first);
    read_floats(rows + width, a->others + sample * bytes_of((vectors - 1) * width, a->bf16_others),
                (vectors - 1) * width, a->bf16_others);
    for (int64_t v = 0; v < vectors; v++)
        for (int64_t d = 0; d < width; d++)
            columns[d * across + v] = rows[v * width + d];
    for (int64_t i = 0; i < vectors; i += TILE)
        for (int64_t j = 0; j < i + TILE; j += LANES) {
            vector sum[TILE][PARTS] = {{{0}}};
            add_tile(sum, rows + i * width, width, 1, columns + j, across, 0, width);
            put_tile(products + i * across + j, across, sum);
        }
    memcpy(out, rows, (size_t)width * 4);
    int64_t filled = width;
    for (int64_t i = 0; i < vectors; i++) {
        const int64_t pairs = a->self_interaction ? i + 1 : i;
        memcpy(out + filled, products + i * across, (size_t)pairs * 4);
        filled += pairs;
    }
    write_floats(a->out + sample * bytes_of(filled, a->bf16_first), out, filled, a->bf16_first);
}

/* Computes the gradients L X + L' X of the vectors X, with the gradients of the products in the lower triangle L. */
INLINE void differentiate_pairs(const struct pairs *a, int64_t sample, int64_t width, float *space) {
    const int64_t vectors = a->vectors, across = padded(width), down = padded(vectors);
    float *rows = space, *lower = rows + down * across, *grads = lower + down * down, *upstream = grads + down * across;
    read_floats(rows, a->first + sample * bytes_of(width, a->bf16_first), width, a->bf16_first);
    const char *others = a->others + sample * bytes_of((vectors - 1) * width, a->bf16_others);
    for (int64_t v = 1; v < vectors; v++)
        read_floats(rows + v * across, others + bytes_of((v - 1) * width, a->bf16_others), width, a->bf16_others);
    const int64_t count = width + vectors * (vectors - 1) / 2 + (a->self_interaction ? vectors : 0);
    read_floats(upstream, a->out + sample * bytes_of(count, a->bf16_first), count, a->bf16_first);
    for (int64_t i = 0, next = width; i < vectors; i++) {
        const int64_t pairs = a->self_interaction ? i + 1 : i;
        memcpy(lower + i * down, upstream + next, (size_t)pairs * 4);
        next += pairs;
    }
    for (int64_t i = 0; i < vectors; i += TILE)
        for (int64_t d = 0; d < across; d += LANES) {
            vector sum[TILE][PARTS] = {{{0}}};
            add_tile(sum, lower + i * down, down, 1, rows + d, across, 0, minimum(i + TILE, vectors));
            add_tile(sum, lower + i, 1, down, rows + d, across, i, vectors);
            put_tile(grads + i * across + d, across, sum);
        }
    for (int64_t d = 0; d < width; d++)
        grads[d] += upstream[d];
    write_floats(a->grad_first + sample * bytes_of(width, a->bf16_first), grads, width, a->bf16_first);
    char *grad_others = a->grad_others + sample * bytes_of((vectors - 1) * width, a->bf16_others);
    for (int64_t v = 1; v < vectors; v++)
        write_floats(grad_others + bytes_of((v - 1) * width, a->bf16_others), grads + v * across, width,
                     a->bf16_others);
}

INLINE void pairs_of_sample(const struct pairs *a, int64_t sample, int64_t width, float *space) {
    if (a->grad_first)
        differentiate_pairs(a, sample, width, space);
    else
        multiply_pairs(a, sample, width, space);
}

static void pairs_share(void *work_arguments) {
    struct pairs *a = work_arguments;
    const int thread = thread_number();
    float *space = a->spaces + thread * a->space;
    for (int64_t s = share_start(a->samples, thread); s < share_start(a->samples, thread + 1); s++) {
        if (a->width == 16)
            pairs_of_sample(a, s, 16, space);
        else if (a->width == 64)
            pairs_of_sample(a, s, 64, space);
        else
            pairs_of_sample(a, s, a->width, space);
    }
}

ENTRY(pairs, pair_products) {
    parallel(pairs_share, all, (unsigned)threads, 0);
}

/* ---- ReLU of bfloat16, for which torch takes four times as long ---- */

struct relu_bf16 {
    uint16_t *values; /* in and out [N] */
    int64_t count;
};

static void relu_share(void *work_arguments) {
    const struct relu_bf16 *a = work_arguments;
    const int thread = thread_number();
    const int64_t end = share_start(a->count, thread + 1);
    /* Negative numbers have the highest bit set. NaN stays, as in torch. */
    for (int64_t i = share_start(a->count, thread); i < end; i++)
        a->values[i] = a->values[i] >= 0x8000 && a->values[i] <= 0xff80 ? 0 : a->values[i];
}

ENTRY(relu_bf16, relu_bf16) {
    parallel(relu_share, all, (unsigned)threads, 0);
}

/* ---- The backward pass of a ReLU and of the bias before it ---- */

enum { SIDE = 16, ROWS_PER_SUM = 64 };

struct relu {
    char *grad;             /* in: gradient of the ReLU's result [B, D]; out: gradient of its input */
    const char *activation; /* [B, D], the ReLU's result */
    char *transposed;       /* out [D, B]: the gradient of the input, transposed; or NULL */
    float *sums;            /* out [chunks of ROWS_PER_SUM rows, D]: sums; the first one becomes the bias's gradient */
    int64_t samples, width;
    bool bf16; /* whether `grad`, `activation` and `transposed` are bfloat16 */
};

/* Sets a row's gradient to 0 where the ReLU's result is 0, and adds the row to the sums. */
INLINE void differentiate_row(const struct relu *a, int64_t row, bool bf16, float *restrict sums) {
    void *restrict grad = a->grad + bytes_of(row * a->width, bf16);
    const void *restrict activation = a->activation + bytes_of(row * a->width, bf16);
    for (int64_t d = 0; d < a->width; d++) {
        /* The gradient stays if the activation is NaN, as in torch. */
        const bool passes = !(read_weight(activation, d, bf16) <= 0);
        const float upstream = read_weight(grad, d, bf16);
        sums[d] += passes ? upstream : 0;
        if (bf16)
            ((uint16_t *)grad)[d] = passes ? ((uint16_t *)grad)[d] : 0;
        else
            ((float *)grad)[d] = passes ? upstream : 0;
    }
}

/* Copies bits: the elements are integers of the size of the values. */
#define TRANSPOSE(name, element)                                                                                       \
    INLINE void name(const element *from, int64_t width, element *to, int64_t samples, int64_t rows,                   \
                     int64_t columns) {                                                                                \
        element transposed[SIDE][SIDE];                                                                                \
        for (int64_t r = 0; r < rows; r++)                                                                             \
            for (int64_t c = 0; c < columns; c++)                                                                      \
                transposed[c][r] = from[r * width + c];                                                                \
        for (int64_t c = 0; c < columns; c++)                                                                          \
            memcpy(to + c * samples, transposed[c], (size_t)rows * sizeof *to);                                        \
    }
TRANSPOSE(transpose_bf16, uint16_t)
TRANSPOSE(transpose_float, uint32_t)

#ifdef __AVX512BW__
/* Transposes a square in registers: four times, the first half of its rows is interleaved with the second half. With
   shorter vectors, compilers turn this into moves of single elements. */
#ifdef __clang__
#define ZIP(vector, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define ZIP(vector, a, b, ...) __builtin_shuffle(a, b, (vector){__VA_ARGS__})
#endif
#define TRANSPOSE_SQUARE(name, element)                                                                                \
    INLINE void name(const element *from, int64_t width, element *to, int64_t samples) {                               \
        typedef element vector __attribute__((vector_size(SIDE * sizeof(element)), aligned(sizeof(element))));         \
        vector rows[SIDE], zipped[SIDE];                                                                               \
        for (int r = 0; r < SIDE; r++)                                                                                 \
            memcpy(rows + r, from + r * width, sizeof *rows);                                                          \
        for (int round = 0; round < 4; round++) {                                                                      \
            for (int r = 0; r < SIDE / 2; r++) {                                                                       \
                const vector a = rows[r], b = rows[r + SIDE / 2];                                                      \
                zipped[2 * r] = ZIP(vector, a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);             \
                zipped[2 * r + 1] = ZIP(vector, a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);   \
            }                                                                                                          \
            memcpy(rows, zipped, sizeof rows);                                                                         \
        }                                                                                                              \
        for (int c = 0; c < SIDE; c++)                                                                                 \
            memcpy(to + c * samples, rows + c, sizeof *rows);                                                          \
    }
TRANSPOSE_SQUARE(transpose_square_bf16, uint16_t)
TRANSPOSE_SQUARE(transpose_square_float, uint32_t)
#else
#define transpose_square_bf16(from, width, to, samples) transpose_bf16(from, width, to, samples, SIDE, SIDE)
#define transpose_square_float(from, width, to, samples) transpose_float(from, width, to, samples, SIDE, SIDE)
#endif

INLINE void differentiate_rows(const struct relu *a, int64_t first, int64_t last, bool bf16, float *sums) {
    for (int64_t row = first; row < last; row++)
        differentiate_row(a, row, bf16, sums);
    for (int64_t column = 0; a->transposed && column < a->width; column += SIDE) {
        const int64_t columns = minimum(SIDE, a->width - column), rows = last - first;
        const char *from = a->grad + bytes_of(first * a->width + column, bf16);
        char *to = a->transposed + bytes_of(column * a->samples + first, bf16);
        const bool whole = rows == SIDE && columns == SIDE;
        if (bf16 && whole)
            transpose_square_bf16((const uint16_t *)from, a->width, (uint16_t *)to, a->samples);
        else if (bf16)
            transpose_bf16((const uint16_t *)from, a->width, (uint16_t *)to, a->samples, rows, columns);
        else if (whole)
            transpose_square_float((const uint32_t *)from, a->width, (uint32_t *)to, a->samples);
        else
            transpose_float((const uint32_t *)from, a->width, (uint32_t *)to, a->samples, rows, columns);
    }
}

static void relu_gradients_share(void *work_arguments) {
    struct relu *a = work_arguments;
    const int thread = thread_number();
    const int64_t chunks = (a->samples + ROWS_PER_SUM - 1) / ROWS_PER_SUM, end = share_start(chunks, thread + 1);
    for (int64_t chunk = share_start(chunks, thread); chunk < end; chunk++) {
        const int64_t first = chunk * ROWS_PER_SUM, last = minimum(first + ROWS_PER_SUM, a->samples);
        float *sums = a->sums + chunk * a->width;
        memset(sums, 0, (size_t)a->width * 4);
        for (int64_t row = first; row < last; row += SIDE)
            if (a->bf16)
                differentiate_rows(a, row, minimum(row + SIDE, last), true, sums);
            else
                differentiate_rows(a, row, minimum(row + SIDE, last), false, sums);
    }
}

ENTRY(relu, relu_gradients) {
    parallel(relu_gradients_share, all, (unsigned)threads, 0);
    /* Sums are added in a fixed order, so that the result does not depend on the number of threads. */
    const int64_t chunks = (all->samples + ROWS_PER_SUM - 1) / ROWS_PER_SUM;
    for (int64_t chunk = 1; chunk < chunks; chunk++)
        for (int64_t d = 0; d < all->width; d++)
            all->sums[d] += all->sums[chunk * all->width + d];
}
