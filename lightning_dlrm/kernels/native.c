/* Rows of tables on a CPU: lookup, sort by row, and update, each in one pass over memory that is fetched ahead.

   It computes what plain torch does in lightning_dlrm.contracts.lookup and lightning_dlrm.optim.rules: sums are taken
   index after index, and a product is fused with the addition after it where torch's kernels fuse them. Threads share
   work, never a sum, so their number changes no result.

   Names: B bags (output vectors), F tables, D width, R rows of all tables, N indices of all bags, U distinct rows. */

#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { LINE = 64, AHEAD = 24, BAGS_A_CHUNK = 512, ROWS_A_CHUNK = 512, SMALL_WIDTH = 256 };

#define INLINE static inline __attribute__((always_inline))

#ifdef __FP_FAST_FMAF
#define FMA(a, b, c) fmaf(a, b, c)
#else
#define FMA(a, b, c) ((a) * (b) + (c))
#endif

/* Torch's own threads, handed over when this is loaded: those of a second OpenMP library would wait in loops beside
   them. GOMP_parallel is what `#pragma omp parallel` calls. */
static void (*parallel)(void (*work)(void *), void *what, unsigned threads, unsigned flags);
static void (*wait_for_all)(void);
static int (*thread_number)(void);
static int (*thread_count)(void);

void use_threads(void *gomp_parallel, void *gomp_barrier, void *omp_get_thread_num, void *omp_get_num_threads) {
    parallel = (void (*)(void (*)(void *), void *, unsigned, unsigned))gomp_parallel;
    wait_for_all = (void (*)(void))gomp_barrier;
    thread_number = (int (*)(void))omp_get_thread_num;
    thread_count = (int (*)(void))omp_get_num_threads;
}

/* The next chunk of work that no thread has taken. */
INLINE int64_t take(int64_t *next) {
    return __atomic_fetch_add(next, 1, __ATOMIC_RELAXED);
}

INLINE int64_t least(int64_t a, int64_t b) {
    return a < b ? a : b;
}

/* Into the second cache: the first has no room for so many lines, and asking for them to be written takes longer. */
INLINE void fetch(const void *at, int64_t bytes) {
    const char *end = (const char *)at + bytes;
    for (const char *line = (const char *)((uintptr_t)at & ~(uintptr_t)(LINE - 1)); line < end; line += LINE)
        __builtin_prefetch(line, 0, 2);
}

/* A weight is float32, or where `half` bfloat16. */
INLINE float read_weight(const void *row, int64_t d, bool half) {
    if (!half)
        return ((const float *)row)[d];
    uint32_t bits = (uint32_t)((const uint16_t *)row)[d] << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* Rounds to nearest, ties to even. */
INLINE void write_weight(void *row, int64_t d, bool half, float value) {
    if (!half) {
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
    const int64_t *offsets; /* [B + 1], where each bag begins; NULL for one id each */
    const int32_t *tables;  /* [F], where each table begins; bag b is of table b % F */
    const float *factors;   /* [N] or NULL */
    char *vectors;          /* out [B, D], of the weight's type */
    int32_t *rows;          /* out [N] */
    int64_t *bags;          /* out [N], the bag of each index; NULL for one id each */
    int64_t bag_count, table_count, width, row_count;
    bool half;
    int64_t wrong; /* out: an index whose row does not exist, or -1 */
    int64_t next;
};

INLINE int64_t bag_begin(const struct lookup *a, int64_t bag) {
    return a->offsets ? a->offsets[bag] : bag;
}

/* Writes the rows and bags of some bags' indices; false where one has no row. */
INLINE bool find_rows(struct lookup *a, int64_t first, int64_t last) {
    int64_t table = first % a->table_count;
    for (int64_t bag = first; bag < last; bag++) {
        for (int64_t i = bag_begin(a, bag); i < bag_begin(a, bag + 1); i++) {
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

INLINE void sum_bags(struct lookup *a, int64_t first, int64_t last, int64_t width, bool half, bool weighted,
                     float *sum) {
    const int64_t bytes = width * (half ? 2 : 4), begin = bag_begin(a, first), end = bag_begin(a, last);
    for (int64_t i = begin; i < least(end, begin + AHEAD); i++)
        fetch(a->weight + a->rows[i] * bytes, bytes);
    for (int64_t bag = first, i = begin; bag < last; bag++) {
        for (int64_t d = 0; d < width; d++)
            sum[d] = 0;
        for (; i < bag_begin(a, bag + 1); i++) {
            if (i + AHEAD < end)
                fetch(a->weight + a->rows[i + AHEAD] * bytes, bytes);
            const char *row = a->weight + a->rows[i] * bytes;
            for (int64_t d = 0; d < width; d++) {
                const float value = read_weight(row, d, half);
                sum[d] = weighted ? FMA(a->factors[i], value, sum[d]) : sum[d] + value;
            }
        }
        for (int64_t d = 0; d < width; d++)
            write_weight(a->vectors + bag * bytes, d, half, sum[d]);
    }
}

/* Where every bag is one row, without a factor. */
INLINE void copy_rows(struct lookup *a, int64_t first, int64_t last, int64_t bytes) {
    const int32_t *rows = a->rows;
    const char *weight = a->weight;
    char *vectors = a->vectors;
    for (int64_t i = first; i < least(last, first + AHEAD); i++)
        fetch(weight + rows[i] * bytes, bytes);
    for (int64_t i = first; i < last; i++) {
        if (i + AHEAD < last)
            fetch(weight + rows[i + AHEAD] * bytes, bytes);
        memcpy(vectors + i * bytes, weight + rows[i] * bytes, (size_t)bytes);
    }
}

static void look_up_chunks(void *what) {
    struct lookup *a = what;
    const int64_t chunks = (a->bag_count + BAGS_A_CHUNK - 1) / BAGS_A_CHUNK;
    float small[SMALL_WIDTH], *sum = a->width > SMALL_WIDTH ? malloc((size_t)a->width * 4) : small;
    for (int64_t chunk; (chunk = take(&a->next)) < chunks;) {
        const int64_t first = chunk * BAGS_A_CHUNK, last = least(first + BAGS_A_CHUNK, a->bag_count);
        if (!find_rows(a, first, last))
            break;
        /* Widths that are known when this is compiled take half the time of others. */
        if (!a->offsets && !a->factors && !a->half && a->width == 16)
            copy_rows(a, first, last, 64);
        else if (!a->offsets && !a->factors)
            copy_rows(a, first, last, a->width * (a->half ? 2 : 4));
        else if (a->factors)
            sum_bags(a, first, last, a->width, a->half, true, sum);
        else if (a->half)
            sum_bags(a, first, last, a->width, true, false, sum);
        else if (a->width == 16)
            sum_bags(a, first, last, 16, false, false, sum);
        else if (a->width == 64)
            sum_bags(a, first, last, 64, false, false, sum);
        else
            sum_bags(a, first, last, a->width, false, false, sum);
    }
    if (sum != small)
        free(sum);
}

void look_up(struct lookup *all, int threads) {
    all->wrong = -1;
    all->next = 0;
    parallel(look_up_chunks, all, (unsigned)threads, 0);
}

/* ---- Sort by row: least significant digit first, stable ---- */

struct sort {
    const int32_t *rows;     /* [N] */
    const int64_t *bags;     /* [N], or NULL where index i went into bag i */
    const float *factors;    /* [N] or NULL */
    uint64_t *scratch;       /* [2, N]: row and index of each, in one number */
    int32_t *counts;         /* [threads, 2^digit] */
    int64_t *sorted_rows;    /* out [U of N], distinct, ascending */
    int64_t *starts;         /* out [U of N]: where the indices of each row begin */
    int64_t *sorted_bags;    /* out [N], row after row */
    float *sorted_factors;   /* out [N] or NULL */
    int64_t count, bits, digit;
    int64_t distinct; /* out: U */
};

/* Where each thread's numbers of each bucket go, from how many there are. */
static void turn_into_places(struct sort *a, int threads) {
    int32_t place = 0;
    for (int64_t bucket = 0; bucket < (int64_t)1 << a->digit; bucket++)
        for (int thread = 0; thread < threads; thread++) {
            int32_t *counted = a->counts + ((int64_t)thread << a->digit) + bucket;
            const int32_t here = *counted;
            *counted = place;
            place += here;
        }
}

static void sort_part(void *what) {
    struct sort *a = what;
    const int thread = thread_number(), threads = thread_count();
    const int64_t begin = a->count * thread / threads, end = a->count * (thread + 1) / threads;
    const uint64_t mask = ((uint64_t)1 << a->digit) - 1;
    int32_t *places = a->counts + ((int64_t)thread << a->digit);
    uint64_t *from = a->scratch, *to = a->scratch + a->count;
    for (int64_t i = begin; i < end; i++)
        from[i] = (uint64_t)(uint32_t)a->rows[i] << 32 | (uint64_t)i;
    for (int64_t shift = 32; shift < 32 + a->bits; shift += a->digit) {
        memset(places, 0, (mask + 1) * sizeof *places);
        for (int64_t i = begin; i < end; i++)
            places[from[i] >> shift & mask]++;
        wait_for_all();
        if (thread == 0)
            turn_into_places(a, threads);
        wait_for_all();
        for (int64_t i = begin; i < end; i++)
            to[places[from[i] >> shift & mask]++] = from[i];
        wait_for_all();
        uint64_t *swapped = from;
        from = to;
        to = swapped;
    }
    int32_t first_ones = 0;
    for (int64_t i = begin; i < end; i++)
        first_ones += i == 0 || from[i] >> 32 != from[i - 1] >> 32;
    a->counts[thread] = first_ones;
    wait_for_all();
    int64_t u = 0;
    for (int before = 0; before < thread; before++)
        u += a->counts[before];
    for (int64_t i = begin; i < end; i++) {
        const uint32_t index = (uint32_t)from[i];
        a->sorted_bags[i] = a->bags ? a->bags[index] : (int64_t)index;
        if (a->factors)
            a->sorted_factors[i] = a->factors[index];
        if (i == 0 || from[i] >> 32 != from[i - 1] >> 32) {
            a->sorted_rows[u] = (int64_t)(from[i] >> 32);
            a->starts[u++] = i;
        }
    }
    if (thread == threads - 1)
        a->distinct = u;
}

void sort_lookups(struct sort *all, int threads) {
    parallel(sort_part, all, (unsigned)threads, 0);
}

/* ---- Update ---- */

enum rule { SGD, ADAGRAD, ROW_WISE_ADAGRAD, ADAM };

struct update {
    char *weight;          /* [R, D] */
    float *first, *second; /* [R, D], or [R] for row-wise Adagrad: the rule's state, or NULL */
    const int64_t *rows;   /* [U], distinct */
    const int64_t *starts; /* [U], where the indices of each row begin; NULL for one each */
    const int64_t *bags;   /* [N], whose gradient each index has; NULL where index i has gradient i */
    const float *factors;  /* [N] or NULL */
    const float *gradient; /* [B, D] */
    int64_t distinct, count, width;
    bool half;
    int rule;
    float rate, kept, l2, epsilon;
    float share1, beta2, share2, correction2, adam_rate; /* of Adam: 1 - b1, b2, 1 - b2, 1 - b2^t, lr / (1 - b1^t) */
    int64_t next;
};

INLINE int64_t row_begin(const struct update *a, int64_t u) {
    return !a->starts ? u : u < a->distinct ? a->starts[u] : a->count;
}

INLINE const float *gradient_of(const struct update *a, int64_t i, int64_t width) {
    return a->gradient + (a->bags ? a->bags[i] : i) * width;
}

/* The mean square, in the order in which torch sums a row of eight or more. */
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

INLINE void move_rows(struct update *a, int64_t first, int64_t last, int64_t width, bool half, int rule, float *sum,
                      float *moved) {
    const int64_t bytes = width * (half ? 2 : 4);
    const int64_t slot = rule == SGD ? 0 : rule == ROW_WISE_ADAGRAD ? 1 : width;
    for (int64_t u = first - AHEAD; u < last; u++) {
        if (u + AHEAD < last) {
            const int64_t row = a->rows[u + AHEAD];
            fetch(a->weight + row * bytes, bytes);
            if (rule != SGD)
                fetch(a->first + row * slot, slot * 4);
            if (rule == ADAM)
                fetch(a->second + row * slot, slot * 4);
            fetch(gradient_of(a, row_begin(a, u + AHEAD), width), width * 4);
        }
        if (u < first)
            continue;
        const int64_t row = a->rows[u], begin = row_begin(a, u), end = row_begin(a, u + 1);
        char *place = a->weight + row * bytes;
        const float *g = gradient_of(a, begin, width);
        if (end - begin > 1 || a->factors || a->l2 != 0) {
            for (int64_t d = 0; d < width; d++)
                sum[d] = a->factors ? a->factors[begin] * g[d] : g[d];
            for (int64_t i = begin + 1; i < end; i++) {
                if (i + AHEAD < end)
                    fetch(gradient_of(a, i + AHEAD, width), width * 4);
                g = gradient_of(a, i, width);
                for (int64_t d = 0; d < width; d++)
                    sum[d] = a->factors ? FMA(a->factors[i], g[d], sum[d]) : sum[d] + g[d];
            }
            if (a->l2 != 0)
                for (int64_t d = 0; d < width; d++)
                    sum[d] = FMA(a->l2, read_weight(place, d, half), sum[d]);
            g = sum;
        }
        float *w = half ? moved : (float *)place;
        if (half || a->kept != 1)
            for (int64_t d = 0; d < width; d++)
                w[d] = read_weight(place, d, half) * a->kept;
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
        if (half)
            for (int64_t d = 0; d < width; d++)
                write_weight(place, d, true, w[d]);
    }
}

INLINE void move_rows_by(struct update *a, int64_t first, int64_t last, int rule, float *sum, float *moved) {
    if (a->half)
        move_rows(a, first, last, a->width, true, rule, sum, moved);
    else if (a->width == 16)
        move_rows(a, first, last, 16, false, rule, sum, moved);
    else if (a->width == 64)
        move_rows(a, first, last, 64, false, rule, sum, moved);
    else
        move_rows(a, first, last, a->width, false, rule, sum, moved);
}

static void move_chunks(void *what) {
    struct update *a = what;
    const int64_t chunks = (a->distinct + ROWS_A_CHUNK - 1) / ROWS_A_CHUNK;
    float small[2 * SMALL_WIDTH], *sum = a->width > SMALL_WIDTH ? malloc((size_t)a->width * 8) : small;
    float *moved = sum + a->width;
    for (int64_t chunk; (chunk = take(&a->next)) < chunks;) {
        const int64_t first = chunk * ROWS_A_CHUNK, last = least(first + ROWS_A_CHUNK, a->distinct);
        if (a->rule == SGD)
            move_rows_by(a, first, last, SGD, sum, moved);
        else if (a->rule == ADAGRAD)
            move_rows_by(a, first, last, ADAGRAD, sum, moved);
        else if (a->rule == ROW_WISE_ADAGRAD)
            move_rows_by(a, first, last, ROW_WISE_ADAGRAD, sum, moved);
        else
            move_rows_by(a, first, last, ADAM, sum, moved);
    }
    if (sum != small)
        free(sum);
}

void update_rows(struct update *all, int threads) {
    all->next = 0;
    parallel(move_chunks, all, (unsigned)threads, 0);
}
