/* The step of MARS-AdamW and MARS-Lion for float32 parameters on CPUs: c_t, its clip, the moving averages and the update.
 *
 * Memory traffic is the cost of a step, so this is about words (float32 numbers read or written) per parameter. torch's
 * kernels, one after the other, move 11 words for MARS-AdamW. Here it is 8 without the clip, since
 * c_t is never stored. With the clip the norms ‖c_t‖ of all tensors must be known before the first update, since a step
 * with one that is not finite changes nothing: so g_t is read once more, 9 words. That is enough where ‖g_t‖ and ‖g_prev‖
 * bound ‖c_t‖ below max_norm, see is_short(). Elsewhere c_t itself is measured: 10 words where ‖g_prev‖ lets expect it,
 * 11 where ‖g_t‖ comes as a surprise.
 *
 * Where the gradients are to be multiplied by the factor of a global clip first, that is done in registers: no word more,
 * but that g_t is kept by value. Whoever has measured ‖g_t‖ for that clip gives it to norms(), and g_t is not read for
 * it again.
 *
 * Of a parameter that is spread over processes each has a part: add_squares() measures c_t's, 2 words, the caller adds
 * up over the processes and gives the factors. g_t is kept by value then, 1 word more: 9 without the clip, 11 with it.
 *
 * cpu.py is the only caller; it checks shapes, dtypes and layout. The equations are those of algorithm/correction.py,
 * adamw.py and lion.py, and tests/optim hold the two against each other.
 *
 * Threads are OpenMP's. The library is linked without an OpenMP runtime on purpose: torch has loaded its own, and two
 * pools of threads would fight over the cores.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* A build that runs on any x86-64 and yet uses what the processor has. */
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define FOR_EACH_PROCESSOR __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EACH_PROCESSOR
#endif

enum { LANES = 64 };            /* independent sums, so that additions need not wait for each other */
enum { RUN = 4096 };            /* elements that are added up in float32 */
enum { BLOCK = 1 << 15 };       /* elements at a time */
enum { ALONE = 1 << 15 };       /* elements below which one thread is faster than several */

typedef struct {
    float kappa;
    float weight1, beta2, weight2;   /* 1 − β1; β2; 1 − β2, which float32 could not tell from a rounded β */
    float eps, gamma;
    float lr, decay;            /* η; 1 − ηλ */
    double max_norm;            /* 0: no clip */
} Settings;

typedef struct {
    float *restrict x, *restrict m, *restrict v, *restrict g_prev;   /* g_prev: NULL for c = g */
    const float *restrict g;
    float factor, clip_factor;                   /* g_t = factor · g; c̃ = clip_factor · c */
    int keeps;                                   /* whether g_t is left in g_prev */
    float step_size, inverse_root_bias2;         /* η/(1−β1^t), 1/√(1−β2^t) */
} Pointers;

/* Inlined with flags that are constants, a loop has no branch left for them. */
#define INLINE static inline __attribute__((always_inline))

static const volatile int32_t hidden_zero = 0;   /* as no compiler knows */

/* A product rounded to float32. Compilers fuse products with the sums that they go into, on some processors and, where
 * two are added, the one or the other; so that g_t = factor · g would not be that of gradients multiplied before. They
 * do not where an integer operation comes in between. */
INLINE float rounded(float product, int32_t zero)
{
    int32_t bits;
    memcpy(&bits, &product, sizeof bits);
    bits ^= zero;
    memcpy(&product, &bits, sizeof product);
    return product;
}

/* c_t = g_t + κ (g_t − g_prev) */
INLINE float correct(float g, float g_prev, float kappa)
{
    return g + kappa * (g - g_prev);
}

typedef struct {
    double c, g;                /* Σ c², Σ g²; of one thread's part of a tensor */
} Squares;

/* Of at most RUN elements, where float32 overflowed: squares of 1e19 and more. */
static Squares wide_squares(const float *g, const float *g_prev, int64_t n, float factor, float kappa)
{
    const int32_t zero = hidden_zero;
    Squares sum = {0, 0};
    for (int64_t i = 0; i < n; i++) {
        float g_i = rounded(factor * g[i], zero);
        double c = correct(g_i, g_prev[i], kappa);
        sum.c += c * c;
        sum.g += (double)g_i * g_i;
    }
    return sum;
}

FOR_EACH_PROCESSOR
static Squares corrected_squares(
    const float *restrict g, const float *restrict g_prev, int64_t n, float factor, float kappa)
{
    const int32_t zero = hidden_zero;
    Squares sum = {0, 0};
    for (int64_t start = 0; start < n; start += RUN) {
        int64_t stop = start + RUN < n ? start + RUN : n, i = start;
        float of_c[LANES] = {0}, of_g[LANES] = {0};
        for (; i + LANES <= stop; i += LANES)
            for (int j = 0; j < LANES; j++) {
                float g_i = rounded(factor * g[i + j], zero), c = correct(g_i, g_prev[i + j], kappa);
                of_c[j] += c * c;
                of_g[j] += g_i * g_i;
            }
        for (int j = 0; i < stop; i++, j++) {
            float g_i = rounded(factor * g[i], zero), c = correct(g_i, g_prev[i], kappa);
            of_c[j] += c * c;
            of_g[j] += g_i * g_i;
        }
        Squares run = {0, 0};
        for (int j = 0; j < LANES; j++) {
            run.c += of_c[j];
            run.g += of_g[j];
        }
        if (!isfinite(run.c + run.g))
            run = wide_squares(g + start, g_prev + start, stop - start, factor, kappa);
        sum.c += run.c;
        sum.g += run.g;
    }
    return sum;
}

FOR_EACH_PROCESSOR
static double squares(const float *restrict g, int64_t n, float factor)
{
    const int32_t zero = hidden_zero;
    double sum = 0;
    for (int64_t start = 0; start < n; start += RUN) {
        int64_t stop = start + RUN < n ? start + RUN : n, i = start;
        float lanes[LANES] = {0};
        for (; i + LANES <= stop; i += LANES)
            for (int j = 0; j < LANES; j++) {
                float g_i = rounded(factor * g[i + j], zero);
                lanes[j] += g_i * g_i;
            }
        for (int j = 0; i < stop; i++, j++) {
            float g_i = rounded(factor * g[i], zero);
            lanes[j] += g_i * g_i;
        }
        double run = 0;
        for (int j = 0; j < LANES; j++)
            run += lanes[j];
        sum += isfinite(run) ? run : wide_squares(g + start, g + start, stop - start, factor, 0).g;
    }
    return sum;
}

enum { INFINITE = 0x7f800000 };

/* |c| as an integer that grows with it; infinity and NaN exceed every finite one. Integers, since a compiler may not
 * reorder comparisons of floats, and would take them one by one. */
static inline int32_t magnitude(float c)
{
    int32_t bits;
    memcpy(&bits, &c, sizeof bits);
    return bits & 0x7fffffff;
}

static inline float finite_or_zero(float g)
{
    return magnitude(g) < INFINITE ? g : 0;
}

/* From the nearer end, as torch.lerp does it. */
static inline float lerp(float start, float end, float weight)
{
    return weight < 0.5f ? start + weight * (end - start) : end - (1 - weight) * (end - start);
}

/* m = β1 m + (1−β1) c̃;  v = β2 v + (1−β2) c̃²;  x = (1−ηλ) x − η/(1−β1^t) m / (√v/√(1−β2^t) + ε)
 * Returns the largest magnitude of c̃. */
INLINE int32_t adamw_with(Pointers at, int64_t n, Settings s, int corrects, int keeps)
{
    float *restrict x = at.x, *restrict m = at.m, *restrict v = at.v, *restrict g_prev = at.g_prev;
    const float *restrict g = at.g;
    const int32_t zero = hidden_zero;
    int32_t largest = 0;
    for (int64_t i = 0; i < n; i++) {
        float g_i = rounded(at.factor * g[i], zero);
        float c = at.clip_factor * correct(g_i, corrects ? g_prev[i] : g_i, s.kappa);
        if (keeps)
            g_prev[i] = finite_or_zero(g_i);
        float m_i = lerp(m[i], c, s.weight1);
        float v_i = s.beta2 * v[i] + rounded(s.weight2 * c * c, zero);
        m[i] = m_i;
        v[i] = v_i;
        x[i] = s.decay * x[i] - at.step_size * m_i / (sqrtf(v_i) * at.inverse_root_bias2 + s.eps);
        largest = magnitude(c) > largest ? magnitude(c) : largest;
    }
    return largest;
}

FOR_EACH_PROCESSOR
static int32_t adamw(Pointers at, int64_t n, Settings s)
{
    return at.keeps ? adamw_with(at, n, s, 1, 1) : at.g_prev ? adamw_with(at, n, s, 1, 0) : adamw_with(at, n, s, 0, 0);
}

/* As torch.sign: 0 for NaN. */
static inline float sign(float a)
{
    return (float)((a > 0) - (a < 0));
}

/* m = β1 m + (1−β1) c̃;  x = (1−ηλ) x − η sign(m). With γ > 0, and no g_prev, the kept average is e of the plain
 * g = c, and m = (1−γ) e + γ g. Where c is not finite the average stays as it is: sign(NaN) is 0, and a NaN would stop the
 * element for ever, without a sign of it. Returns the largest magnitude of c̃. */
INLINE int32_t lion_with(Pointers at, int64_t n, Settings s, int corrects, int keeps)
{
    float *restrict x = at.x, *restrict e = at.m, *restrict g_prev = at.g_prev;
    const float *restrict g = at.g;
    const int32_t zero = hidden_zero;
    int32_t largest = 0;
    for (int64_t i = 0; i < n; i++) {
        float g_i = rounded(at.factor * g[i], zero);
        float c = at.clip_factor * correct(g_i, corrects ? g_prev[i] : g_i, s.kappa);
        if (keeps)
            g_prev[i] = finite_or_zero(g_i);
        int32_t size = magnitude(c);
        c = size < INFINITE ? c : e[i];
        float e_i = lerp(e[i], c, s.weight1);
        e[i] = e_i;
        float m_i = corrects || !s.gamma ? e_i : lerp(e_i, c, s.gamma);
        x[i] = s.decay * x[i] - rounded(s.lr * sign(m_i), zero);
        largest = size > largest ? size : largest;
    }
    return largest;
}

FOR_EACH_PROCESSOR
static int32_t lion(Pointers at, int64_t n, Settings s)
{
    return at.keeps ? lion_with(at, n, s, 1, 1) : at.g_prev ? lion_with(at, n, s, 1, 0) : lion_with(at, n, s, 0, 0);
}

typedef struct {
    int64_t count;
    const int64_t *sizes;
    float **x, **m, **v, **g, **g_prev;          /* v: NULL for Lion; g_prev: NULL for c = g */
    float **steps;                               /* t of each tensor; NULL for Lion */
    float factor;                                /* of the global clip: g_t is factor · g */
    const double *prev_norms;                    /* ‖g_prev‖ where it is known, NaN elsewhere */
    const double *known_norms;                   /* ‖g_t‖ where all are known; else NULL */
    const double *clip_factors;                  /* c̃ = factor · c; NULL for c̃ = c */
    int keeps;                                   /* whether g_t is left in g_prev */
    Settings settings;
    double beta1, beta2, lr;
    Squares *sums;                               /* of each tensor, thread by thread */
    int32_t *largest;                            /* of each tensor, thread by thread */
} Step;

static double norm_of_g(const Step *step, int64_t k, int threads)
{
    if (step->known_norms)
        return step->known_norms[k];
    double sum = 0;
    for (int r = 0; r < threads; r++)
        sum += step->sums[r * step->count + k].g;
    return sqrt(sum);
}

static double norm_of_c(const Step *step, int64_t k, int threads)
{
    double sum = 0;
    for (int r = 0; r < threads; r++)
        sum += step->sums[r * step->count + k].c;
    return sqrt(sum);
}

/* ‖c‖ ≤ (1+κ)‖g‖ + κ‖g_prev‖: where that is below max_norm with room for rounding, nothing is clipped, and only g
 * needs to be measured. False where a norm is not known. */
static int is_short(const Step *step, int64_t k, double length_of_g)
{
    double kappa = step->settings.kappa;
    double length_of_c = step->g_prev ? (1 + kappa) * length_of_g + kappa * step->prev_norms[k] : length_of_g;
    return length_of_c < 0.999 * step->settings.max_norm;
}

/* Whether c_t itself is measured: where the bound will not do, to judge by g_prev unless ‖g_t‖ is known. */
static int is_corrected_first(const Step *step, int64_t k)
{
    if (step->known_norms)
        return !is_short(step, k, step->known_norms[k]);
    return step->g_prev && !is_short(step, k, step->prev_norms[k]);
}

static int is_corrected_late(const Step *step, int64_t k, int threads)
{
    return step->g_prev && !step->known_norms && !is_corrected_first(step, k)
           && !is_short(step, k, norm_of_g(step, k, threads));
}

/* Σ c², and Σ g² where g_prev is there. */
static Squares squares_of_c(const Step *step, int64_t k, int64_t from, int64_t to)
{
    const float *g = step->g[k] + from;
    if (step->g_prev)
        return corrected_squares(g, step->g_prev[k] + from, to - from, step->factor, step->settings.kappa);
    return (Squares){squares(g, to - from, step->factor), 0};
}

static void measure(const Step *step, int64_t k, int64_t from, int64_t to, int thread, int threads)
{
    (void)threads;
    Squares *sum = &step->sums[thread * step->count + k];
    if (is_corrected_first(step, k)) {
        Squares more = squares_of_c(step, k, from, to);
        sum->c += more.c;
        sum->g += more.g;
    } else if (!step->known_norms) {
        sum->g += squares(step->g[k] + from, to - from, step->factor);
    }
}

static void measure_again(const Step *step, int64_t k, int64_t from, int64_t to, int thread, int threads)
{
    if (is_corrected_late(step, k, threads))
        step->sums[thread * step->count + k].c += squares_of_c(step, k, from, to).c;
}

/* NaN where c is not finite. */
static double clip_factor(const Step *step, int64_t k, int threads)
{
    double length = norm_of_g(step, k, threads);
    if (is_corrected_first(step, k) || is_corrected_late(step, k, threads))
        length = norm_of_c(step, k, threads);
    else if (step->g_prev || step->known_norms)
        return 1;
    return !isfinite(length) ? NAN : length <= step->settings.max_norm ? 1 : step->settings.max_norm / length;
}

static void update(const Step *step, int64_t k, int64_t from, int64_t to, int thread, int threads)
{
    (void)threads;
    Pointers at = {.x = step->x[k] + from, .m = step->m[k] + from, .v = step->v ? step->v[k] + from : NULL,
                   .g_prev = step->g_prev ? step->g_prev[k] + from : NULL, .g = step->g[k] + from,
                   .factor = step->factor, .clip_factor = step->clip_factors ? (float)step->clip_factors[k] : 1,
                   .keeps = step->keeps};
    if (step->v) {
        double t = *step->steps[k];
        at.step_size = (float)(step->lr / (1 - pow(step->beta1, t)));
        at.inverse_root_bias2 = (float)(1 / sqrt(1 - pow(step->beta2, t)));
    }
    int32_t *largest = &step->largest[thread * step->count + k];
    int32_t own = (step->v ? adamw : lion)(at, to - from, step->settings);
    *largest = own > *largest ? own : *largest;
}

static void measure_c(const Step *step, int64_t k, int64_t from, int64_t to, int thread, int threads)
{
    (void)threads;
    step->sums[thread * step->count + k].c += squares_of_c(step, k, from, to).c;
}

/* One thread's share of the elements of all tensors, laid end to end: block by block, up or down. */
static void pass(const Step *step, typeof(measure) *work, int backwards, int thread, int threads)
{
    int64_t total = 0;
    for (int64_t k = 0; k < step->count; k++)
        total += step->sizes[k];
    int64_t start = total * thread / threads, stop = total * (thread + 1) / threads;
    int64_t before = backwards ? total : 0;
    for (int64_t i = 0; i < step->count; i++) {
        int64_t k = backwards ? step->count - 1 - i : i, size = step->sizes[k];
        before -= backwards ? size : 0;
        int64_t from = start > before ? start - before : 0;
        int64_t to = stop - before < size ? stop - before : size;
        for (int64_t done = 0; done < to - from; done += BLOCK) {
            int64_t n = to - from - done < BLOCK ? to - from - done : BLOCK;
            int64_t at = backwards ? to - done - n : from + done;
            work(step, k, at, at + n, thread, threads);
        }
        before += backwards ? 0 : size;
    }
}

static void measure_all(const Step *step, int threads)
{
#pragma omp parallel num_threads(threads)
    {
        int thread = omp_get_thread_num(), team = omp_get_num_threads();
        pass(step, measure, 0, thread, team);
#pragma omp barrier
        int again = 0;   /* the same for every thread */
        for (int64_t k = 0; k < step->count; k++)
            again |= is_corrected_late(step, k, team);
        if (again)
            pass(step, measure_again, 0, thread, team);
    }
}

static void update_all(const Step *step, int threads)
{
#pragma omp parallel num_threads(threads)
    pass(step, update, 1, omp_get_thread_num(), omp_get_num_threads());   /* what was measured last is in the cache */
}

static int threads_for(const Step *step, int threads)
{
    int64_t elements = 0;
    for (int64_t k = 0; k < step->count; k++)
        elements += step->sizes[k];
    return elements < ALONE ? 1 : threads;
}

static void release(Py_buffer **buffers, size_t count)
{
    for (size_t i = 0; i < count; i++)
        PyBuffer_Release(buffers[i]);
}

static PyObject *norms_of_a_group(PyObject *self, PyObject *arguments)
{
    Py_buffer sizes, g, g_prev, norms, known_norms, clip_factors;
    double kappa, max_norm, factor;
    int threads;
    if (!PyArg_ParseTuple(arguments, "y*y*z*w*z*w*dddi", &sizes, &g, &g_prev, &norms, &known_norms, &clip_factors,
                          &kappa, &max_norm, &factor, &threads))
        return NULL;
    Step step = {.count = sizes.len / (Py_ssize_t)sizeof(int64_t), .sizes = sizes.buf, .g = g.buf, .g_prev = g_prev.buf,
                 .factor = (float)factor, .prev_norms = norms.buf, .known_norms = known_norms.buf,
                 .settings = {.kappa = (float)kappa, .max_norm = max_norm}};
    threads = threads_for(&step, threads);
    step.sums = calloc((size_t)(threads * step.count), sizeof *step.sums);
    if (step.sums) {
        Py_BEGIN_ALLOW_THREADS
        measure_all(&step, threads);
        Py_END_ALLOW_THREADS
        for (int64_t k = 0; k < step.count; k++)   /* before ‖g_prev‖ is written over */
            ((double *)clip_factors.buf)[k] = clip_factor(&step, k, threads);
        for (int64_t k = 0; k < step.count; k++)
            ((double *)norms.buf)[k] = norm_of_g(&step, k, threads);
    } else {
        PyErr_NoMemory();
    }
    free(step.sums);
    release((Py_buffer *[]){&sizes, &g, &g_prev, &norms, &known_norms, &clip_factors}, 6);
    if (PyErr_Occurred())
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *add_squares(PyObject *self, PyObject *arguments)
{
    Py_buffer sizes, g, g_prev, sums;
    double kappa, factor;
    int threads;
    if (!PyArg_ParseTuple(arguments, "y*y*z*w*ddi", &sizes, &g, &g_prev, &sums, &kappa, &factor, &threads))
        return NULL;
    Step step = {.count = sizes.len / (Py_ssize_t)sizeof(int64_t), .sizes = sizes.buf, .g = g.buf, .g_prev = g_prev.buf,
                 .factor = (float)factor, .settings = {.kappa = (float)kappa}};
    threads = threads_for(&step, threads);
    step.sums = calloc((size_t)(threads * step.count), sizeof *step.sums);
    if (step.sums) {
        Py_BEGIN_ALLOW_THREADS
#pragma omp parallel num_threads(threads)
        pass(&step, measure_c, 0, omp_get_thread_num(), omp_get_num_threads());
        Py_END_ALLOW_THREADS
        for (int64_t k = 0; k < step.count; k++)
            for (int r = 0; r < threads; r++)
                ((double *)sums.buf)[k] += step.sums[r * step.count + k].c;
    } else {
        PyErr_NoMemory();
    }
    free(step.sums);
    release((Py_buffer *[]){&sizes, &g, &g_prev, &sums}, 4);
    if (PyErr_Occurred())
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *step_of_a_group(PyObject *self, PyObject *arguments)
{
    Py_buffer sizes, x, m, v, g, g_prev, clip_factors, steps;
    double kappa, beta1, beta2, eps, gamma, lr, weight_decay, factor;
    int keeps, threads;
    if (!PyArg_ParseTuple(arguments, "y*y*y*z*y*z*z*z*ddddddddpi", &sizes, &x, &m, &v, &g, &g_prev, &clip_factors,
                          &steps, &kappa, &beta1, &beta2, &eps, &gamma, &lr, &weight_decay, &factor, &keeps, &threads))
        return NULL;
    Settings s = {(float)kappa, (float)(1 - beta1), (float)beta2, (float)(1 - beta2), (float)eps, (float)gamma,
                  (float)lr, (float)(1 - lr * weight_decay), 0};
    Step step = {.count = sizes.len / (Py_ssize_t)sizeof(int64_t), .sizes = sizes.buf, .x = x.buf, .m = m.buf,
                 .v = v.buf, .g = g.buf, .g_prev = g_prev.buf, .steps = steps.buf, .factor = (float)factor,
                 .clip_factors = clip_factors.buf, .keeps = keeps, .settings = s, .beta1 = beta1, .beta2 = beta2,
                 .lr = lr};
    threads = threads_for(&step, threads);
    step.largest = calloc((size_t)(threads * step.count), sizeof *step.largest);
    PyObject *finite = PyList_New((Py_ssize_t)step.count);
    if (step.largest && finite) {
        for (int64_t k = 0; step.steps && k < step.count; k++)
            *step.steps[k] += 1;
        Py_BEGIN_ALLOW_THREADS
        update_all(&step, threads);
        Py_END_ALLOW_THREADS
        for (int64_t k = 0; k < step.count; k++) {
            int32_t largest = 0;
            for (int r = 0; r < threads; r++)
                if (step.largest[r * step.count + k] > largest)
                    largest = step.largest[r * step.count + k];
            PyList_SetItem(finite, k, PyBool_FromLong(largest < INFINITE));
        }
    } else {
        Py_CLEAR(finite);
        PyErr_NoMemory();
    }
    free(step.largest);
    release((Py_buffer *[]){&sizes, &x, &m, &v, &g, &g_prev, &clip_factors, &steps}, 8);
    return finite;
}

static PyMethodDef methods[] = {
    {"norms", norms_of_a_group, METH_VARARGS,
     "norms(sizes, g, g_prev, norms, known_norms, clip_factors, kappa, max_norm, factor, threads): what the clip of "
     "float32 tensors must know. sizes is a buffer of int64, the element counts; g and g_prev are buffers of addresses; "
     "g_t is factor * g. norms is a buffer of doubles: of g_prev where known, else NaN; it becomes the norms of g_t, which "
     "are known_norms unless that is None. clip_factors, of doubles, becomes the factor of each c; NaN where c is not "
     "finite."},
    {"step", step_of_a_group, METH_VARARGS,
     "step(sizes, x, m, v, g, g_prev, clip_factors, steps, kappa, beta1, beta2, eps, gamma, lr, weight_decay, "
     "factor, keeps, threads): one step of MARS-AdamW (v and steps given) or MARS-Lion on float32 tensors, in place; buffers and "
     "factor as above. With keeps, g_t takes g_prev's place, zero where it is not finite. Returns for each tensor whether its c was finite."},
    {"add_squares", add_squares, METH_VARARGS,
     "add_squares(sizes, g, g_prev, sums, kappa, factor, threads): add each tensor's sum of squares of c to the doubles in "
     "sums; buffers and factor as above."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_cpu", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__cpu(void)
{
    return PyModule_Create(&definition);
}
