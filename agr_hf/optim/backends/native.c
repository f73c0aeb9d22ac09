/* The step on a CPU in one pass: sums of |g| (and of g^2 where clipping asks), then the update, in one parallel region.
 *
 * Plain C against Python's stable interface, without torch's headers. look.h checks tensors and reads their addresses; the
 * rest knows addresses and numbers only. native.py holds the tensors from the look until the step is done.
 *
 * The tensors are cut into chunks. A chunk's sums are accumulated in float64 and added in the order of the chunks, so the
 * result has the same bits at every repetition and at every number of threads. Tensors are walked in runs that fit the
 * cache: the sums of a run, then its updates, so that the update finds the gradients in the cache.
 *
 * Threads are those of torch's OpenMP, where it is found: they spin for some milliseconds after the backward pass, and
 * threads of our own would have to share the cores with them. In a process that was forked OpenMP's threads are gone, and
 * waiting for them would never end: there, and where torch has no OpenMP, threads are started for each call. Either way a
 * thread computes in the floating-point mode of the caller, and a small step stays in the calling thread.
 */
#define _GNU_SOURCE
#define Py_LIMITED_API 0x030b0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <dlfcn.h>
#include <fenv.h>
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { ADAM, ADAN };
enum { PLAIN, RAW, REGULARIZED, UNUSABLE };
/* Modes of a call and flags of a tensor; the same in native.py. */
enum { SUMS_ONLY = 1, SQUARES = 2, COUPLED_ONLY = 4, NORMS_GIVEN = 8 };
enum { PSI = 1, SECOND_REGULARIZED = 2, COUPLED = 4, SCALED_BY_NORM = 8, PARAM_BF16 = 16, GRAD_BF16 = 32,
       MOMENT_BF16 = 64, AT_RANDOM = 128 };
#define STATES 4
#define NUMBERS 16     /* numbers of a class: a group and step count */
#define CHUNK 65536    /* elements summed or updated at a time: 256 KiB of float32 */
#define UNIT 16384     /* elements of small tensors that a thread takes at a time: with larger ones, threads wait for the last */
#define RUN 131072     /* elements of a run for one or two threads: 512 KiB of float32 gradients; more threads, longer runs */
#define AHEAD_CHUNKS 3 /* where many small tensors are updated, their memory is asked for so many tensors ahead */
#define AHEAD_BYTES 512
#define SMALL 65536    /* elements a thread is worth starting for */

typedef struct {
    void *param;
    const void *grad;
    float *state[STATES];
    uint16_t *rest; /* what rounding took from the parameter, of Kahan's compensation, or NULL */
    int64_t n;
    int param_is_bf16, grad_is_bf16, moment_is_bf16, coupled, at_random;
    uint32_t first_random; /* number of the first element in the random sequence of the step */
    double scale, l2;
} chunk_t;

typedef struct { float scale, l2, up, share, one_minus_b1, b2, one_minus_b2, decay, step_size, correction, eps; } adam_t;
typedef struct {
    float scale, up, share, up_before, share_before, one_minus_b1, b2, one_minus_b2, b3, one_minus_b3;
    float decay, shrink, step_size, difference_step_size, correction, eps;
    int first;
} adan_t;
typedef struct {
    int rule, kind, coupled;
    union { adam_t adam; adan_t adan; };
} update_t;

/* Eight floats at any address; on narrower machines the compiler makes two or more registers of them. */
typedef float vector_t __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t bits_t __attribute__((vector_size(32), aligned(4), may_alias));

/* Sums again in float64, where a float32 overflowed. */
static void precise(const chunk_t *c, int squares, double *norm, double *square) {
    double s = 0, q = 0;
    for (int64_t i = 0; i < c->n; i++) {
        union { uint32_t bits; float value; } g, p = {0};
        if (c->grad_is_bf16) g.bits = (uint32_t)((const uint16_t *)c->grad)[i] << 16;
        else g.value = ((const float *)c->grad)[i];
        if (c->coupled && c->param_is_bf16) {
            p.bits = (uint32_t)((const uint16_t *)c->param)[i] << 16;
            union { uint32_t bits; float value; } rest = {.bits = c->rest ? (uint32_t)c->rest[i] << 16 : 0};
            p.value += rest.value;
        } else if (c->coupled) p.value = ((const float *)c->param)[i];
        s += c->coupled ? fabs(c->scale * g.value + c->l2 * p.value) : fabs((double)g.value);
        if (squares) q += (double)g.value * g.value;
    }
    *norm = s;
    *square = q;
}

#if defined(__x86_64__) && defined(__GNUC__)
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")))
#define NAMED(f) f##_avx512
#include "kernels.h"
#undef TARGET
#undef NAMED
#define TARGET __attribute__((target("avx2,fma")))
#define NAMED(f) f##_avx2
#include "kernels.h"
#undef TARGET
#undef NAMED
#endif
#define TARGET
#define NAMED(f) f##_baseline
#include "kernels.h"

typedef struct {
    const char *name;
    void (*sum)(const chunk_t *, int, double *, double *);
    void (*update)(const chunk_t *, const update_t *);
} isa_t;

static const isa_t ISAS[] = {
#if defined(__x86_64__) && defined(__GNUC__)
    {"avx512", sum_chunk_avx512, update_chunk_avx512},
    {"avx2", sum_chunk_avx2, update_chunk_avx2},
#endif
    {"baseline", sum_chunk_baseline, update_chunk_baseline},
};
enum { ISA_COUNT = sizeof ISAS / sizeof *ISAS };
static const isa_t *isa;

static int supported(const char *name) {
#if defined(__x86_64__) && defined(__GNUC__)
    if (!strcmp(name, "avx512"))
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma");
    if (!strcmp(name, "avx2")) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
    return !strcmp(name, "baseline");
}

/* What a call works on. Columns have one entry for each tensor, in the order of native.py. */
typedef struct {
    int rule, states, mode;
    int64_t rows;
    const int64_t *address[2 + STATES], *rest, *numel, *flags, *class, *first_random; /* rest, first_random: or NULL */
    const double *numbers;
    double *norms, *square_sums, *before; /* before: norms of the previous step, of Adan with AGR */
    int64_t chunks, units, runs;
    int64_t *chunk_row, *chunk_at, *first_chunk, *unit_chunk, *run_unit;
    double *chunk_norm, *chunk_square;
    int64_t *summed_by;          /* of each unit: the thread */
    /* Counters for each run: its sums are taken unit by unit by whoever is free, and finished. */
    atomic_llong *next_sum, *summed;
    atomic_flag *is_taken;       /* of each unit: its update */
    atomic_int arrived;
    fenv_t mode_of_caller;
} job_t;

/* torch's OpenMP, through the interface that the compilers of GNU call, and LLVM's runtime has too. */
static void (*parallel)(void (*)(void *), void *, unsigned, unsigned);

static void forget_openmp(void) { parallel = NULL; }

static int wants_norm(const job_t *j, int64_t row) { return (j->flags[row] & (PSI | SCALED_BY_NORM)) != 0; }

static int is_coupled(const job_t *j, int64_t row) { return (j->flags[row] & COUPLED) != 0; }

/* Whether a sum is to be taken of this tensor in this call. */
static int is_summed(const job_t *j, int64_t row) {
    if (!j->address[1][row] || j->mode & NORMS_GIVEN) return 0;
    if (j->mode & SQUARES) return 1;
    return wants_norm(j, row) && (is_coupled(j, row) || !(j->mode & COUPLED_ONLY));
}

static chunk_t make_chunk(const job_t *j, int64_t index) {
    int64_t row = j->chunk_row[index], at = j->chunk_at[index], flags = j->flags[row], left = j->numel[row] - at;
    const double *numbers = j->numbers + NUMBERS * j->class[row];
    int p_size = flags & PARAM_BF16 ? 2 : 4, g_size = flags & GRAD_BF16 ? 2 : 4;
    /* Clipping's squares are of the gradient alone, and it is not known yet what it is scaled by. */
    int coupled = is_coupled(j, row) && !(j->mode & SQUARES);
    chunk_t c = {
        .param = (char *)(intptr_t)j->address[0][row] + at * p_size,
        .grad = (const char *)(intptr_t)j->address[1][row] + at * g_size,
        .n = left < CHUNK ? left : CHUNK,
        .param_is_bf16 = (flags & PARAM_BF16) != 0,
        .grad_is_bf16 = (flags & GRAD_BF16) != 0,
        .moment_is_bf16 = (flags & MOMENT_BF16) != 0,
        .at_random = j->first_random && flags & AT_RANDOM,
        .first_random = j->first_random ? (uint32_t)(j->first_random[row] + at) : 0,
        .rest = j->rest ? (uint16_t *)(intptr_t)j->rest[row] + at : NULL,
        .coupled = coupled,
        .scale = j->mode & SUMS_ONLY && !coupled ? 1 : numbers[0], /* sums that are handed out are of raw gradients */
        .l2 = numbers[1],
    };
    for (int k = 0; k < j->states; k++)
        c.state[k] = (void *)(intptr_t)(j->address[2 + k][row] + at * (k == 0 && c.moment_is_bf16 ? 2 : 4));
    return c;
}

/* GCC takes a function that only asks for memory for one without effect, and leaves out its calls. */
#define KEPT __asm__ volatile("")

/* Ask for the start of a chunk's memory; the rest the processor finds by itself. */
static void fetch_chunk(const job_t *j, int64_t index) {
    KEPT;
    chunk_t c = make_chunk(j, index);
    int64_t bytes = c.n * (int64_t)sizeof(float);
    for (int64_t at = 0; at < bytes && at < AHEAD_BYTES; at += 64) {
        __builtin_prefetch((char *)c.param + at, 1);
        __builtin_prefetch((const char *)c.grad + at);
        for (int k = 0; k < j->states; k++) __builtin_prefetch((char *)c.state[k] + at, 1);
    }
}

static int is_usable(double norm) { return norm > 0 && norm < INFINITY; }

/* A power of two and a reciprocal, both far from the ends of float32, whose product is 1 / norm. */
static void split_reciprocal(double norm, float *up, float *share) {
    double factor = norm < 0x1p-100 ? 0x1p100 : norm > 0x1p100 ? 0x1p-100 : 1;
    *up = (float)factor;
    *share = (float)(1 / (norm * factor));
}

static update_t make_update(const job_t *j, int64_t row, double norm) {
    const double *a = j->numbers + NUMBERS * j->class[row];
    int64_t flags = j->flags[row];
    int psi = (flags & PSI) != 0, usable = psi && is_usable(norm), regularized = (flags & SECOND_REGULARIZED) != 0;
    double scale = a[0], l2 = a[1];
    update_t u = {.rule = j->rule, .coupled = is_coupled(j, row)};
    u.kind = !psi ? PLAIN : usable ? (regularized ? REGULARIZED : RAW) : regularized ? PLAIN : UNUSABLE;
    float up = 1, share = 0, up_before = 1, share_before = 0;
    if (usable) split_reciprocal(norm, &up, &share);
    if (flags & SCALED_BY_NORM) scale *= norm, l2 *= norm;
    if (j->rule == ADAM) {
        u.adam = (adam_t){(float)scale, (float)l2, up, share, (float)a[2], (float)a[3], (float)a[4],
                          (float)a[5], (float)a[6], (float)a[7], (float)a[8]};
        return u;
    }
    if (j->before && is_usable(j->before[row])) split_reciprocal(j->before[row], &up_before, &share_before);
    u.adan = (adan_t){(float)scale, up, share, up_before, share_before, (float)a[2], (float)a[3], (float)a[4], (float)a[5],
                      (float)a[6], (float)a[7], (float)a[8], (float)a[9], (float)a[10], (float)a[11], (float)a[12],
                      a[13] != 0};
    return u;
}

static double norm_of_row(const job_t *j, int64_t row) {
    if (!wants_norm(j, row)) return 0;
    /* Given norms are of raw gradients where nothing is added to them. */
    if (j->mode & NORMS_GIVEN)
        return j->norms[row] * (is_coupled(j, row) ? 1 : fabs(j->numbers[NUMBERS * j->class[row]]));
    double norm = 0;
    for (int64_t c = j->first_chunk[row]; c < j->first_chunk[row + 1]; c++) norm += j->chunk_norm[c];
    return norm;
}

static void update_unit(job_t *j, int64_t unit, int64_t *row, update_t *u) {
    for (int64_t c = j->unit_chunk[unit]; c < j->unit_chunk[unit + 1]; c++) {
        if (*row != j->chunk_row[c]) {
            *row = j->chunk_row[c];
            *u = make_update(j, *row, norm_of_row(j, *row));
        }
        if (c + AHEAD_CHUNKS < j->unit_chunk[unit + 1]) fetch_chunk(j, c + AHEAD_CHUNKS);
        chunk_t chunk = make_chunk(j, c);
        isa->update(&chunk, u);
    }
}

/* Take sums of a run's tensors, as many as the other threads leave. */
static void sum_run(job_t *j, int64_t run, int64_t me) {
    int64_t first = j->run_unit[run], end = j->run_unit[run + 1], unit;
    while ((unit = first + atomic_fetch_add_explicit(&j->next_sum[run], 1, memory_order_relaxed)) < end) {
        j->summed_by[unit] = me;
        for (int64_t c = j->unit_chunk[unit]; c < j->unit_chunk[unit + 1]; c++)
            if (is_summed(j, j->chunk_row[c])) {
                chunk_t chunk = make_chunk(j, c);
                isa->sum(&chunk, j->mode & SQUARES, &j->chunk_norm[c], &j->chunk_square[c]);
            }
        atomic_fetch_add_explicit(&j->summed[run], 1, memory_order_release);
    }
}

/* Wait for the sums of a run. It spins, for the wait is short, and yields where cores are fewer. */
static void wait_for_sums(job_t *j, int64_t run) {
    int64_t units = j->run_unit[run + 1] - j->run_unit[run];
    for (int spins = 0; atomic_load_explicit(&j->summed[run], memory_order_acquire) < units; spins++)
        if (spins > 2000) sched_yield();
}

static void work(job_t *j) {
    int64_t me = atomic_fetch_add_explicit(&j->arrived, 1, memory_order_relaxed);
    update_t u = {0};
    int64_t row = -1;
    for (int64_t run = 0; run < j->runs; run++) {
        sum_run(j, run, me);
        if (j->mode & SUMS_ONLY) continue;
        wait_for_sums(j, run);
        /* What a thread has summed is in the cache of its core still, and what it summed last surely. It updates that first,
         * then what the others have left: with the units of another core a step takes up to twice as long. */
        int64_t first = j->run_unit[run], end = j->run_unit[run + 1];
        for (int others = 0; others < 2; others++)
            for (int64_t unit = end - 1; unit >= first; unit--)
                if ((others || j->summed_by[unit] == me) && !atomic_flag_test_and_set_explicit(&j->is_taken[unit],
                                                                                              memory_order_relaxed))
                    update_unit(j, unit, &row, &u);
    }
}

static void work_in_mode(void *argument) {
    job_t *j = argument;
    fenv_t own;
    fegetenv(&own);
    fesetenv(&j->mode_of_caller);
    work(j);
    fesetenv(&own);
}

static void *work_in_thread(void *argument) {
    work_in_mode(argument);
    return NULL;
}

/* Cut the tensors into chunks, chunks into units that a thread takes at a time, units into runs. 0 if memory is short. */
static int cut(job_t *j, int64_t total, int threads) {
    int64_t most = total / CHUNK + j->rows + 1, run_length = RUN * (int64_t)(threads > 2 ? threads / 2 : 1);
    j->chunk_row = malloc((5 * most + j->rows + 4) * sizeof(int64_t) + 2 * most * sizeof(double));
    if (!j->chunk_row) return 0;
    j->chunk_at = j->chunk_row + most;
    j->unit_chunk = j->chunk_at + most;
    j->run_unit = j->unit_chunk + most + 1;
    j->first_chunk = j->run_unit + most + 2;
    j->summed_by = j->first_chunk + j->rows + 1;
    j->chunk_norm = (double *)(j->summed_by + most);
    j->chunk_square = j->chunk_norm + most;
    j->run_unit[0] = 0;
    int64_t in_unit = 0, in_run = 0;
    for (int64_t row = 0; row < j->rows; row++) {
        int64_t numel = j->address[1][row] ? j->numel[row] : 0;
        j->first_chunk[row] = j->chunks;
        /* A run holds whole tensors: the norm of each is known before its first update. */
        if (in_run && in_run + numel > run_length) j->run_unit[++j->runs] = j->units, in_run = in_unit = 0;
        for (int64_t at = 0; at < numel; at += CHUNK) {
            int64_t n = numel - at < CHUNK ? numel - at : CHUNK;
            if (!in_unit || in_unit + n > UNIT) j->unit_chunk[j->units++] = j->chunks, in_unit = 0;
            j->chunk_row[j->chunks] = row;
            j->chunk_at[j->chunks++] = at;
            in_unit += n, in_run += n;
        }
    }
    if (in_run) j->run_unit[++j->runs] = j->units;
    j->first_chunk[j->rows] = j->chunks;
    j->unit_chunk[j->units] = j->chunks;
    j->next_sum = calloc(j->runs + 1, sizeof *j->next_sum);
    j->summed = calloc(j->runs + 1, sizeof *j->summed);
    j->is_taken = calloc(j->units + 1, sizeof *j->is_taken);
    return j->next_sum && j->summed && j->is_taken;
}

/* 0 if memory is short; then nothing has been written. */
static int run_job(job_t *j, int threads) {
    int64_t total = 0;
    for (int64_t row = 0; row < j->rows; row++)
        if (j->address[1][row]) total += j->numel[row];
    if (threads > total / SMALL) threads = (int)(total / SMALL);
    if (threads < 1) threads = 1;
    int fits = cut(j, total, threads);
    pthread_t *started = fits ? malloc(threads * sizeof(pthread_t)) : NULL;
    fegetenv(&j->mode_of_caller);
    if (started) {
        if (threads > 1 && parallel) {
            parallel(work_in_mode, j, (unsigned)threads, 0);
        } else {
            int count = 1;
            while (count < threads && !pthread_create(&started[count], NULL, work_in_thread, j)) count++;
            work(j);
            for (int i = 1; i < count; i++) pthread_join(started[i], NULL);
        }
        for (int64_t row = 0; row < j->rows; row++) {
            if (is_summed(j, row) && wants_norm(j, row) && !(j->mode & SQUARES && is_coupled(j, row)))
                j->norms[row] = norm_of_row(j, row);
            if (j->mode & SQUARES) {
                double square = 0;
                for (int64_t c = j->first_chunk[row]; c < j->first_chunk[row + 1]; c++) square += j->chunk_square[c];
                j->square_sums[row] = square;
            }
            if (j->before && !(j->mode & SUMS_ONLY) && j->address[1][row]) {
                double norm = (j->flags[row] & (PSI | SECOND_REGULARIZED)) == PSI ? norm_of_row(j, row) : 0;
                j->before[row] = is_usable(norm) ? norm : INFINITY;
            }
        }
    }
    free(started);
    free(j->chunk_row);
    free(j->next_sum);
    free(j->summed);
    free(j->is_taken);
    return started != NULL;
}

#include "look.h"

static PyObject *run(PyObject *module, PyObject *args) {
    (void)module;
    Py_buffer addresses, fixed, class, numbers, norms, squares, first;
    int rule, states, mode, threads;
    unsigned long long before;
    if (!PyArg_ParseTuple(args, "iiiiy*y*y*y*w*w*Ky*", &rule, &states, &mode, &threads, &addresses, &fixed, &class,
                          &numbers, &norms, &squares, &before, &first))
        return NULL;
    int64_t rows = norms.len / (int64_t)sizeof(double), classes = numbers.len / (int64_t)sizeof(double) / NUMBERS;
    PyObject *result = NULL;
    int fits = rule >= ADAM && rule <= ADAN && states == (rule == ADAM ? 2 : 4) && squares.len == norms.len &&
               (addresses.len == (2 + states) * norms.len || addresses.len == (3 + states) * norms.len) &&
               (!first.len || first.len == norms.len) && fixed.len == 2 * norms.len && class.len == norms.len;
    for (int64_t row = 0; fits && row < rows; row++)
        fits = ((const int64_t *)class.buf)[row] >= 0 && ((const int64_t *)class.buf)[row] < classes;
    if (!fits) {
        PyErr_SetString(PyExc_ValueError, "the tables of the native step do not fit each other");
    } else {
        job_t j = {.rule = rule, .states = states, .mode = mode, .rows = rows};
        for (int k = 0; k < 2 + states; k++) j.address[k] = (const int64_t *)addresses.buf + k * rows;
        j.rest = addresses.len == (3 + states) * norms.len ? (const int64_t *)addresses.buf + (2 + states) * rows : NULL;
        j.first_random = first.len ? first.buf : NULL;
        j.numel = fixed.buf;
        j.flags = j.numel + rows;
        j.class = class.buf;
        j.numbers = numbers.buf;
        j.norms = norms.buf;
        j.square_sums = squares.buf;
        j.before = (double *)(intptr_t)before;
        int done;
        Py_BEGIN_ALLOW_THREADS
        done = run_job(&j, threads);
        Py_END_ALLOW_THREADS
        if (done) result = Py_NewRef(Py_None);
        else PyErr_NoMemory();
    }
    PyBuffer_Release(&addresses);
    PyBuffer_Release(&fixed);
    PyBuffer_Release(&class);
    PyBuffer_Release(&numbers);
    PyBuffer_Release(&norms);
    PyBuffer_Release(&squares);
    PyBuffer_Release(&first);
    return result;
}

/* count(steps, live): see native.py. */
static PyObject *count(PyObject *module, PyObject *args) {
    (void)module;
    unsigned long long address;
    Py_buffer live;
    if (!PyArg_ParseTuple(args, "Ky*", &address, &live)) return NULL;
    float *steps = (float *)(intptr_t)address;
    int equal = 1;
    for (Py_ssize_t row = 0; row < live.len; row++) {
        steps[row] += ((const char *)live.buf)[row];
        equal = equal && steps[row] == steps[0];
    }
    PyObject *result = equal && live.len ? PyFloat_FromDouble(steps[0]) : PyList_New(live.len);
    for (Py_ssize_t row = 0; result && PyList_Check(result) && row < live.len; row++)
        if (PyList_SetItem(result, row, PyFloat_FromDouble(steps[row]))) Py_CLEAR(result);
    PyBuffer_Release(&live);
    return result;
}

static PyObject *select_isa(PyObject *module, PyObject *args) {
    (void)module;
    const char *name = NULL;
    if (!PyArg_ParseTuple(args, "|z", &name)) return NULL;
    for (int i = 0; i < ISA_COUNT; i++)
        if (supported(ISAS[i].name) && (!name || !strcmp(name, ISAS[i].name))) {
            isa = &ISAS[i];
            return PyUnicode_FromString(isa->name);
        }
    PyErr_Format(PyExc_ValueError, "this processor has no instruction set %s", name);
    return NULL;
}

static PyObject *use_openmp(PyObject *module, PyObject *args) {
    (void)module;
    const char *path = NULL;
    if (!PyArg_ParseTuple(args, "z", &path)) return NULL;
    void *library = path ? dlopen(path, RTLD_NOLOAD | RTLD_NOW) : NULL;
    parallel = NULL;
    if (library) *(void **)&parallel = dlsym(library, "GOMP_parallel");
    return PyBool_FromLong(parallel != NULL);
}

static PyMethodDef methods[] = {
    {"run", run, METH_VARARGS,
     "run(rule, states, mode, threads, addresses, fixed, classes, numbers, norms, squares, before, first): see native.py"},
    {"count", count, METH_VARARGS, "count(steps, live): add a step to those that live; see native.py"},
    {"look", look, METH_VARARGS,
     "look(params, grads, states, keys, columns, kept, addresses): the addresses of a step's tensors; see look.py"},
    {"read_grads", read_grads, METH_O, "read_grads(params): the list of their gradients, and whether all have memory of their own"},
    {"describe", describe, METH_O, "describe(tensors): what `look` compares tensors with"},
    {"use_torch", use_torch, METH_VARARGS,
     "use_torch(path, Tensor, Parameter, object, tensor): look at tensors through the functions of this library, if it has "
     "them; `tensor` is the address of the tensor of an object"},
    {"select_isa", select_isa, METH_VARARGS,
     "select_isa(name=None): compute with these instructions, by default the widest that the processor has; their name"},
    {"use_openmp", use_openmp, METH_VARARGS,
     "use_openmp(path): compute in the threads of this OpenMP library, if it is loaded; in threads of one's own for None"},
    {NULL, NULL, 0, NULL},
};
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_native", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__native(void) {
    for (int i = 0; i < ISA_COUNT && !isa; i++)
        if (supported(ISAS[i].name)) isa = &ISAS[i];
    pthread_atfork(NULL, NULL, forget_openmp);
    return PyModule_Create(&definition);
}
