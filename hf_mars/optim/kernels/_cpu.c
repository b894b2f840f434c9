/* The step of MARS-AdamW and MARS-Lion for float32 parameters on CPUs: c_t, its clip, the moving averages and the update.
 *
 * Memory traffic is the cost of a step, so this is about words (float32 numbers read or written) per parameter. torch's
 * kernels, one after the other, move 11 words for MARS-AdamW. Here it is 8 without the clip, since
 * c_t is never stored. With the clip the norm ‖c_t‖ must be known before the first update, so g_t is read once more: 9
 * words, fewer where g_t stays in the cache in between. That is enough where ‖g_t‖ and ‖g_prev‖ bound ‖c_t‖ below
 * max_norm, see is_short(). Elsewhere c_t itself is measured, and stored: 10 words where ‖g_prev‖ lets expect it, 11
 * where ‖g_t‖ comes as a surprise.
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
enum { CACHED = 1 << 18 };      /* elements of tensors that are measured, then updated: g_t takes 1 MiB */
enum { BLOCK = 1 << 15 };       /* elements at a time on the way back through them */
enum { ALONE = 1 << 15 };       /* elements below which one thread is faster than several */

typedef struct {
    float kappa;
    float weight1, beta2, weight2;   /* 1 − β1; β2; 1 − β2, which float32 could not tell from a rounded β */
    float eps, gamma;
    float lr, decay;            /* η; 1 − ηλ */
    double max_norm;            /* 0: no clip */
} Settings;

typedef struct {
    float *restrict x, *restrict m, *restrict v;
    const float *restrict g, *restrict g_prev;   /* g_prev may be g itself: then c = g */
    float step_size, inverse_root_bias2;         /* η/(1−β1^t), 1/√(1−β2^t) */
} Pointers;

/* c_t = g_t + κ (g_t − g_prev) */
#define C(i) (g[i] + kappa * (g[i] - g_prev[i]))

typedef struct {
    double c, g;                /* Σ c², Σ g²; of one thread's part of a tensor */
} Squares;

/* c_t takes g_prev's place. */
FOR_EACH_PROCESSOR
static Squares correct(const float *restrict g, float *restrict g_prev, int64_t n, float kappa)
{
    Squares sum = {0, 0};
    for (int64_t start = 0; start < n; start += RUN) {
        int64_t stop = start + RUN < n ? start + RUN : n, i = start;
        float of_c[LANES] = {0}, of_g[LANES] = {0};
        for (; i + LANES <= stop; i += LANES)
            for (int j = 0; j < LANES; j++) {
                float c = C(i + j);
                g_prev[i + j] = c;
                of_c[j] += c * c;
                of_g[j] += g[i + j] * g[i + j];
            }
        for (int j = 0; i < stop; i++, j++) {
            float c = C(i);
            g_prev[i] = c;
            of_c[j] += c * c;
            of_g[j] += g[i] * g[i];
        }
        for (int j = 0; j < LANES; j++) {
            sum.c += of_c[j];
            sum.g += of_g[j];
        }
    }
    return sum;
}

FOR_EACH_PROCESSOR
static double squares(const float *restrict g, int64_t n)
{
    double sum = 0;
    for (int64_t start = 0; start < n; start += RUN) {
        int64_t stop = start + RUN < n ? start + RUN : n, i = start;
        float lanes[LANES] = {0};
        for (; i + LANES <= stop; i += LANES)
            for (int j = 0; j < LANES; j++)
                lanes[j] += g[i + j] * g[i + j];
        for (int j = 0; i < stop; i++, j++)
            lanes[j] += g[i] * g[i];
        for (int j = 0; j < LANES; j++)
            sum += lanes[j];
    }
    return sum;
}

/* |c| as an integer that grows with it; infinity and NaN exceed every finite one. Integers, since a compiler may not
 * reorder comparisons of floats, and would take them one by one. */
static inline int32_t magnitude(float c)
{
    int32_t bits;
    memcpy(&bits, &c, sizeof bits);
    return bits & 0x7fffffff;
}

/* From the nearer end, as torch.lerp does it. */
static inline float lerp(float start, float end, float weight)
{
    return weight < 0.5f ? start + weight * (end - start) : end - (1 - weight) * (end - start);
}

/* m = β1 m + (1−β1) c̃;  v = β2 v + (1−β2) c̃²;  x = (1−ηλ) x − η/(1−β1^t) m / (√v/√(1−β2^t) + ε)
 * Returns the largest magnitude of c̃. */
FOR_EACH_PROCESSOR
static int32_t adamw(Pointers at, int64_t n, Settings s, float clip_factor)
{
    float *restrict x = at.x, *restrict m = at.m, *restrict v = at.v;
    const float *restrict g = at.g, *restrict g_prev = at.g_prev;
    const float kappa = s.kappa;
    int32_t largest = 0;
    for (int64_t i = 0; i < n; i++) {
        float c = clip_factor * C(i);
        float m_i = lerp(m[i], c, s.weight1);
        float v_i = s.beta2 * v[i] + s.weight2 * c * c;
        m[i] = m_i;
        v[i] = v_i;
        x[i] = s.decay * x[i] - at.step_size * m_i / (sqrtf(v_i) * at.inverse_root_bias2 + s.eps);
        largest = magnitude(c) > largest ? magnitude(c) : largest;
    }
    return largest;
}

/* As torch.sign: 0 for NaN. */
static inline float sign(float a)
{
    return (float)((a > 0) - (a < 0));
}

/* m = β1 m + (1−β1) c̃;  x = (1−ηλ) x − η sign(m). With γ > 0 the kept average is e of the plain g = c, and
 * m = (1−γ) e + γ g. Returns the largest magnitude of c̃. */
FOR_EACH_PROCESSOR
static int32_t lion(Pointers at, int64_t n, Settings s, float clip_factor)
{
    float *restrict x = at.x, *restrict e = at.m;
    const float *restrict g = at.g, *restrict g_prev = at.g_prev;
    const float kappa = s.kappa;
    int32_t largest = 0;
    for (int64_t i = 0; i < n; i++) {
        float c = clip_factor * C(i);
        float e_i = lerp(e[i], c, s.weight1);
        e[i] = e_i;
        x[i] = s.decay * x[i] - s.lr * sign(s.gamma ? lerp(e_i, c, s.gamma) : e_i);
        largest = magnitude(c) > largest ? magnitude(c) : largest;
    }
    return largest;
}

typedef struct {
    int64_t count;
    const int64_t *sizes;
    float **x, **m, **v, **g, **g_prev;          /* v: NULL for Lion; g_prev: NULL for c = g */
    float **steps;                               /* t of each tensor; NULL for Lion */
    const double *prev_norms;                    /* ‖g_prev‖ where it is known, NaN elsewhere */
    Settings settings;
    double beta1, beta2, lr;
    Squares *sums;                               /* of each tensor, thread by thread */
    int32_t *largest;                            /* of each tensor, thread by thread */
} Step;

static double norm_of_g(const Step *step, int64_t k, int threads)
{
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
    return (1 + kappa) * length_of_g + kappa * step->prev_norms[k] < 0.999 * step->settings.max_norm;
}

/* Whether c_t itself is measured, and then takes g_prev's place: where the bound will not do, to judge by g_prev. */
static int is_corrected_first(const Step *step, int64_t k)
{
    return step->g_prev && !is_short(step, k, step->prev_norms[k]);
}

static int is_corrected_late(const Step *step, int64_t k, int threads)
{
    return step->g_prev && !is_corrected_first(step, k) && !is_short(step, k, norm_of_g(step, k, threads));
}

static void measure(const Step *step, int64_t k, int64_t from, int64_t to, int thread, int threads)
{
    (void)threads;
    Squares *sum = &step->sums[thread * step->count + k];
    if (is_corrected_first(step, k)) {
        Squares more = correct(step->g[k] + from, step->g_prev[k] + from, to - from, step->settings.kappa);
        sum->c += more.c;
        sum->g += more.g;
    } else {
        sum->g += squares(step->g[k] + from, to - from);
    }
}

static void measure_again(const Step *step, int64_t k, int64_t from, int64_t to, int thread, int threads)
{
    if (is_corrected_late(step, k, threads))
        step->sums[thread * step->count + k].c +=
            correct(step->g[k] + from, step->g_prev[k] + from, to - from, step->settings.kappa).c;
}

static void update(const Step *step, int64_t k, int64_t from, int64_t to, int thread, int threads)
{
    const Settings *s = &step->settings;
    const float *g_prev = step->g_prev ? step->g_prev[k] : step->g[k], *g = step->g[k];
    float clip_factor = 1;
    if (s->max_norm) {
        int is_corrected = is_corrected_first(step, k) || is_corrected_late(step, k, threads);
        if (is_corrected)
            g = g_prev;         /* c_t is in g_prev's place */
        if (is_corrected || !step->g_prev) {
            double length = is_corrected ? norm_of_c(step, k, threads) : norm_of_g(step, k, threads);
            clip_factor = length <= s->max_norm ? 1 : (float)(s->max_norm / length);   /* NaN stays NaN */
        }
    }
    Pointers at = {step->x[k] + from, step->m[k] + from, NULL, g + from, g_prev + from, 0, 0};
    if (step->v) {
        at.v = step->v[k] + from;
        double t = *step->steps[k];
        at.step_size = (float)(step->lr / (1 - pow(step->beta1, t)));
        at.inverse_root_bias2 = (float)(1 / sqrt(1 - pow(step->beta2, t)));
    }
    int32_t largest = (step->v ? adamw : lion)(at, to - from, *s, clip_factor);
    int32_t *known = &step->largest[thread * step->count + k];
    *known = largest > *known ? largest : *known;
}

/* One thread's share of the elements of tensors first … last−1, laid end to end: block by block, up or down. */
static void pass(const Step *step, typeof(measure) *work, int backwards, int64_t first, int64_t last, int thread,
                 int threads)
{
    int64_t total = 0;
    for (int64_t k = first; k < last; k++)
        total += step->sizes[k];
    int64_t start = total * thread / threads, stop = total * (thread + 1) / threads;
    int64_t before = backwards ? total : 0;
    for (int64_t i = 0; i < last - first; i++) {
        int64_t k = backwards ? last - 1 - i : first + i, size = step->sizes[k];
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

/* Norms need whole tensors before the first update: barriers between the passes over a few tensors at a time, which are
 * then still in the cache. */
static void run(const Step *step, int threads)
{
#pragma omp parallel num_threads(threads)
    {
        int thread = omp_get_thread_num(), team = omp_get_num_threads();
        for (int64_t first = 0, last; first < step->count; first = last) {
            int64_t elements = 0;
            for (last = first; last < step->count && (last == first || elements + step->sizes[last] <= CACHED); last++)
                elements += step->sizes[last];
            if (step->settings.max_norm) {
                pass(step, measure, 0, first, last, thread, team);
#pragma omp barrier
                int again = 0;   /* the same for every thread */
                for (int64_t k = first; k < last; k++)
                    again |= is_corrected_late(step, k, team);
                if (again) {
                    pass(step, measure_again, 0, first, last, thread, team);
#pragma omp barrier
                }
            }
            pass(step, update, 1, first, last, thread, team);   /* what was measured last is in the cache */
        }
    }
}

static PyObject *step_of_a_group(PyObject *self, PyObject *arguments)
{
    Py_buffer sizes, x, m, v, g, g_prev, norms, steps;
    double kappa, beta1, beta2, eps, gamma, lr, weight_decay, max_norm;
    int threads;
    if (!PyArg_ParseTuple(arguments, "y*y*y*z*y*z*w*z*ddddddddi", &sizes, &x, &m, &v, &g, &g_prev, &norms, &steps,
                          &kappa, &beta1, &beta2, &eps, &gamma, &lr, &weight_decay, &max_norm, &threads))
        return NULL;
    Settings s = {(float)kappa, (float)(1 - beta1), (float)beta2, (float)(1 - beta2), (float)eps, (float)gamma,
                  (float)lr, (float)(1 - lr * weight_decay), max_norm};
    Step step = {sizes.len / (Py_ssize_t)sizeof(int64_t), sizes.buf, x.buf, m.buf, v.buf, g.buf, g_prev.buf, steps.buf,
                 norms.buf, s, beta1, beta2, lr, NULL, NULL};
    int64_t elements = 0;
    for (int64_t k = 0; k < step.count; k++)
        elements += step.sizes[k];
    if (elements < ALONE)
        threads = 1;
    step.sums = calloc((size_t)(threads * step.count), sizeof *step.sums);
    step.largest = calloc((size_t)(threads * step.count), sizeof *step.largest);
    PyObject *finite = PyList_New((Py_ssize_t)step.count);
    if (step.sums && step.largest && finite) {
        for (int64_t k = 0; step.steps && k < step.count; k++)
            *step.steps[k] += 1;
        Py_BEGIN_ALLOW_THREADS
        run(&step, threads);
        Py_END_ALLOW_THREADS
        for (int64_t k = 0; k < step.count; k++) {
            int32_t largest = 0;
            for (int r = 0; r < threads; r++)
                if (step.largest[r * step.count + k] > largest)
                    largest = step.largest[r * step.count + k];
            PyList_SetItem(finite, k, PyBool_FromLong(largest < 0x7f800000));
            ((double *)norms.buf)[k] = s.max_norm ? norm_of_g(&step, k, threads) : NAN;
        }
    } else {
        Py_CLEAR(finite);
        PyErr_NoMemory();
    }
    free(step.sums);
    free(step.largest);
    Py_buffer *buffers[] = {&sizes, &x, &m, &v, &g, &g_prev, &norms, &steps};
    for (size_t i = 0; i < sizeof buffers / sizeof *buffers; i++)
        PyBuffer_Release(buffers[i]);
    return finite;
}

static PyMethodDef methods[] = {
    {"step", step_of_a_group, METH_VARARGS,
     "step(sizes, x, m, v, g, g_prev, norms, steps, kappa, beta1, beta2, eps, gamma, lr, weight_decay, max_norm, "
     "threads): one step of MARS-AdamW (v and steps given) or MARS-Lion on float32 tensors, in place. sizes is a "
     "buffer of int64, the element counts; x, m, v, g, g_prev and steps are buffers of addresses. norms is a buffer of "
     "doubles: of g_prev where known, else NaN; it becomes the norms of g, or NaN without a clip. Returns for each "
     "tensor whether its c was finite."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_cpu", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__cpu(void)
{
    return PyModule_Create(&definition);
}
