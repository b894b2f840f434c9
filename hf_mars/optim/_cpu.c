/* One pass over memory a step, for float32 parameters on CPUs: c_t, its clip, the moving averages and the update.
 *
 * torch has no kernel for it. Composed of torch's, MARS-AdamW moves 10 words a parameter through memory without the
 * clip and 11 with it, here 8 and, where a tensor stays in the cache between the norm and the update, no more with it.
 *
 * cpu.py is the only caller; it checks shapes, dtypes and layout. The equations are those of correction.py, adamw.py
 * and lion.py, and tests/test_cpu_kernel.py holds the two against each other.
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
enum { CACHED = 1 << 21 };      /* elements of tensors that are measured, then updated: g_t and g_prev take 16 MiB */
enum { ALONE = 1 << 15 };       /* elements below which one thread is faster than several */

typedef struct {
    float kappa1;               /* 1 + κ */
    float beta1, beta2, eps, gamma;
    float lr, decay;            /* η; 1 − ηλ */
    double max_norm;            /* 0: no clip */
} Settings;

typedef struct {
    float *restrict x, *restrict m, *restrict v;
    const float *restrict g, *restrict g_prev;   /* g_prev may be g itself: then c = g */
    float step_size, root_bias2;                 /* η/(1−β1^t), √(1−β2^t) */
} Pointers;

/* c_t = g_prev + (1+κ)(g_t − g_prev) */
#define C(i) (g_prev[i] + kappa1 * (g[i] - g_prev[i]))

/* Σ c² of n elements. */
FOR_EACH_PROCESSOR
static double squares(const float *restrict g, const float *restrict g_prev, int64_t n, float kappa1)
{
    double sum = 0;
    for (int64_t start = 0; start < n; start += 4096) {
        int64_t stop = start + 4096 < n ? start + 4096 : n, i = start;
        float lanes[LANES] = {0};
        for (; i + LANES <= stop; i += LANES)
            for (int j = 0; j < LANES; j++) {
                float c = C(i + j);
                lanes[j] += c * c;
            }
        for (int j = 0; i < stop; i++, j++) {
            float c = C(i);
            lanes[j] += c * c;
        }
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

/* m = β1 m + (1−β1) c̃;  v = β2 v + (1−β2) c̃²;  x = (1−ηλ) x − η/(1−β1^t) m / (√v/√(1−β2^t) + ε)
 * Returns the largest magnitude of c̃. */
FOR_EACH_PROCESSOR
static int32_t adamw(Pointers at, int64_t n, Settings s, float scale)
{
    float *restrict x = at.x, *restrict m = at.m, *restrict v = at.v;
    const float *restrict g = at.g, *restrict g_prev = at.g_prev;
    const float kappa1 = s.kappa1, b1 = s.beta1, b2 = s.beta2;
    int32_t largest = 0;
    for (int64_t i = 0; i < n; i++) {
        float c = scale * C(i);
        float m_i = m[i] + (1 - b1) * (c - m[i]);
        float v_i = b2 * v[i] + (1 - b2) * c * c;
        m[i] = m_i;
        v[i] = v_i;
        x[i] = s.decay * x[i] - at.step_size * m_i / (sqrtf(v_i) / at.root_bias2 + s.eps);
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
static int32_t lion(Pointers at, int64_t n, Settings s, float scale)
{
    float *restrict x = at.x, *restrict e = at.m;
    const float *restrict g = at.g, *restrict g_prev = at.g_prev;
    const float kappa1 = s.kappa1;
    int32_t largest = 0;
    for (int64_t i = 0; i < n; i++) {
        float c = scale * C(i);
        float e_i = e[i] + (1 - s.beta1) * (c - e[i]);
        e[i] = e_i;
        x[i] = s.decay * x[i] - s.lr * sign(e_i + s.gamma * (c - e_i));
        largest = magnitude(c) > largest ? magnitude(c) : largest;
    }
    return largest;
}

typedef struct {
    int64_t count;
    const int64_t *sizes;
    float **x, **m, **v, **g, **g_prev;          /* v: NULL for Lion; g_prev: NULL for c = g */
    const double *step_sizes, *root_bias2;       /* NULL for Lion */
    Settings settings;
    double *sums;                                /* Σ c² of each tensor, thread by thread */
    int32_t *largest;                            /* of each tensor, thread by thread */
} Step;

static Pointers pointers(const Step *step, int64_t k, int64_t offset)
{
    const float *g_prev = step->g_prev ? step->g_prev[k] : step->g[k];
    Pointers at = {step->x[k] + offset, step->m[k] + offset, NULL, step->g[k] + offset, g_prev + offset, 0, 0};
    if (step->v) {
        at.v = step->v[k] + offset;
        at.step_size = (float)step->step_sizes[k];
        at.root_bias2 = (float)step->root_bias2[k];
    }
    return at;
}

static double norm(const Step *step, int64_t k, int threads)
{
    double sum = 0;
    for (int r = 0; r < threads; r++)
        sum += step->sums[r * step->count + k];
    return sqrt(sum);
}

enum Pass { MEASURE, UPDATE };

/* One thread's part of a pass over tensors first … last−1: its share of their elements, laid end to end. */
static void pass(const Step *step, enum Pass what, int64_t first, int64_t last, int thread, int threads)
{
    const Settings *s = &step->settings;
    int64_t total = 0, before = 0;
    for (int64_t k = first; k < last; k++)
        total += step->sizes[k];
    int64_t start = total * thread / threads, stop = total * (thread + 1) / threads;
    for (int64_t k = first; k < last && before < stop; before += step->sizes[k++]) {
        int64_t from = start > before ? start - before : 0;
        int64_t to = stop - before < step->sizes[k] ? stop - before : step->sizes[k];
        if (from >= to)
            continue;
        Pointers at = pointers(step, k, from);
        if (what == MEASURE) {
            step->sums[thread * step->count + k] = squares(at.g, at.g_prev, to - from, s->kappa1);
            continue;
        }
        float scale = 1;
        if (s->max_norm) {
            double length = norm(step, k, threads);
            scale = length <= s->max_norm ? 1 : (float)(s->max_norm / length);   /* NaN stays NaN */
        }
        step->largest[thread * step->count + k] = (step->v ? adamw : lion)(at, to - from, *s, scale);
    }
}

/* Norms need whole tensors before the first update: a barrier between the two passes over a few tensors at a time,
 * which are then still in the cache. */
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
                pass(step, MEASURE, first, last, thread, team);
#pragma omp barrier
            }
            pass(step, UPDATE, first, last, thread, team);
        }
    }
}

static PyObject *update(PyObject *self, PyObject *arguments)
{
    Py_buffer sizes, x, m, v, g, g_prev, step_sizes, root_bias2;
    Settings s;
    int threads;
    if (!PyArg_ParseTuple(arguments, "y*y*y*z*y*z*z*z*fffffffdi", &sizes, &x, &m, &v, &g, &g_prev, &step_sizes,
                          &root_bias2, &s.kappa1, &s.beta1, &s.beta2, &s.eps, &s.gamma, &s.lr, &s.decay, &s.max_norm,
                          &threads))
        return NULL;
    Step step = {sizes.len / (Py_ssize_t)sizeof(int64_t), sizes.buf, x.buf, m.buf, v.buf, g.buf, g_prev.buf,
                 step_sizes.buf, root_bias2.buf, s, NULL, NULL};
    int64_t elements = 0;
    for (int64_t k = 0; k < step.count; k++)
        elements += step.sizes[k];
    if (elements < ALONE)
        threads = 1;
    step.sums = calloc((size_t)(threads * step.count), sizeof *step.sums);
    step.largest = calloc((size_t)(threads * step.count), sizeof *step.largest);
    PyObject *finite = PyList_New((Py_ssize_t)step.count);
    if (step.sums && step.largest && finite) {
        Py_BEGIN_ALLOW_THREADS
        run(&step, threads);
        Py_END_ALLOW_THREADS
        for (int64_t k = 0; k < step.count; k++) {
            int32_t largest = 0;
            for (int r = 0; r < threads; r++)
                if (step.largest[r * step.count + k] > largest)
                    largest = step.largest[r * step.count + k];
            PyList_SET_ITEM(finite, k, PyBool_FromLong(largest < 0x7f800000));
        }
    } else {
        Py_CLEAR(finite);
        PyErr_NoMemory();
    }
    free(step.sums);
    free(step.largest);
    Py_buffer *buffers[] = {&sizes, &x, &m, &v, &g, &g_prev, &step_sizes, &root_bias2};
    for (size_t i = 0; i < sizeof buffers / sizeof *buffers; i++)
        PyBuffer_Release(buffers[i]);
    return finite;
}

static PyMethodDef methods[] = {
    {"update", update, METH_VARARGS,
     "update(sizes, x, m, v, g, g_prev, step_sizes, root_bias2, kappa1, beta1, beta2, eps, gamma, lr, decay, max_norm, "
     "threads): one step of MARS-AdamW (v given) or MARS-Lion on float32 tensors, in place. The first five and g_prev "
     "are buffers of int64: element counts and addresses. Returns for each tensor whether its c was finite."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_cpu", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__cpu(void)
{
    return PyModule_Create(&definition);
}
