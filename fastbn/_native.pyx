# _native.pyx -- arrays in, geometry and pointers down: the only Cython, and the last place that Python can reach.
#
# Every function checks all of its arguments before it writes anything, and errors name the argument. What the C core
# gets is a geometry, tensors, and parameters widened to float64.
import os

cimport cython
cimport numpy as cnp
from cpython.object cimport PyObject
from cpython.pycapsule cimport PyCapsule_New
from libc.math cimport INFINITY, isfinite
from libc.stdint cimport SIZE_MAX, int64_t, intptr_t, uint8_t, uintptr_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcmp, memcpy, memset

import numpy as np

cnp.import_array()

try:
    from ml_dtypes import bfloat16 as _bfloat16
except ImportError:
    _bfloat16 = None

cdef extern from "fastbn.h" nogil:
    ctypedef enum fbn_dtype:
        FBN_F32, FBN_F64, FBN_F16, FBN_BF16, FBN_DTYPE_COUNT
    ctypedef enum fbn_family:
        FBN_ROWS, FBN_COLS
    ctypedef enum fbn_activation:
        FBN_IDENTITY, FBN_RELU, FBN_RELU6, FBN_LEAKY_RELU
    ctypedef enum fbn_status:
        FBN_OK, FBN_BAD_ARGUMENT, FBN_NO_MEMORY
    ctypedef struct fbn_geometry:
        fbn_dtype dtype
        fbn_family family
        int64_t outer, channels, inner
    ctypedef struct fbn_tensor:
        void *data
        int64_t outer_stride, channel_stride
    ctypedef struct fbn_moments:
        int64_t count
        double *mean
        double *mean_lo
        double *m2
    ctypedef struct fbn_affine:
        const double *mean
        const double *mean_lo
        const double *var
        const double *weight
        const double *bias
        double eps
    ctypedef struct fbn_act:
        fbn_activation kind
        double negative_slope
    ctypedef struct fbn_prepared:
        pass
    int64_t fbn_gate_bytes(const fbn_geometry *g)
    fbn_status fbn_moments_of(const fbn_geometry *g, fbn_tensor x, int threads, fbn_moments *out)
    fbn_status fbn_forward(const fbn_geometry *g, fbn_tensor x, const fbn_tensor *residual, fbn_tensor y, uint8_t *gate,
                           const fbn_affine *affine, fbn_act act, int threads, fbn_moments *out, double *var)
    fbn_status fbn_normalize(const fbn_geometry *g, fbn_tensor x, const fbn_tensor *residual, fbn_tensor y,
                             uint8_t *gate, const fbn_affine *affine, fbn_act act, int threads)
    fbn_status fbn_prepare(fbn_dtype dtype, int64_t channels, const fbn_affine *affine, fbn_prepared **out)
    void fbn_release(fbn_prepared *prepared)
    fbn_status fbn_apply(const fbn_geometry *g, fbn_tensor x, const fbn_tensor *residual, fbn_tensor y, uint8_t *gate,
                         const fbn_prepared *prepared, fbn_act act, int threads)
    fbn_status fbn_backward_reduce(const fbn_geometry *g, fbn_tensor x, fbn_tensor dy, const uint8_t *gate,
                                   const fbn_affine *affine, fbn_act act, int threads, double *sum_dy,
                                   double *sum_dy_xmu)
    fbn_status fbn_backward_apply(const fbn_geometry *g, fbn_tensor x, fbn_tensor dy, fbn_tensor dx,
                                  const fbn_tensor *dresidual, const uint8_t *gate, const fbn_affine *affine,
                                  fbn_act act, const double *sum_dy, const double *sum_dy_xmu, double count,
                                  int threads)
    fbn_status fbn_backward(const fbn_geometry *g, fbn_tensor x, fbn_tensor dy, fbn_tensor dx,
                            const fbn_tensor *dresidual, const uint8_t *gate, const fbn_affine *affine, fbn_act act,
                            bint training, int threads, double *grad_bias, double *grad_weight)
    fbn_status fbn_copy(const void *src, void *dst, int64_t bytes, int threads)

cdef extern from "geometry.h" nogil:
    enum:
        FBN_MAX_ARRAYS, FBN_MAX_DIMS
    ctypedef struct fbn_array:
        char *data
        const intptr_t *strides
    bint fbn_collapse(fbn_dtype dtype, int ndim, int channel_axis, const intptr_t *shape, int count,
                      const fbn_array *arrays, fbn_geometry *g, fbn_tensor *tensors)

cdef extern from "plan.h" nogil:
    ctypedef int fbn_op
    ctypedef struct fbn_machine:
        int64_t l2, l3
        bint follows
    ctypedef struct fbn_call:
        fbn_op op
        int threads
        bint gated, adjacent, aligned, beside
        int tensors
    ctypedef struct fbn_plan:
        int team
        int64_t slab, slabs, grain, tile, panel, side, piece, images, turn, ahead, soon, fetch
        bint stream, backwards, beside
    fbn_plan fbn_make_plan(const fbn_geometry *g, const fbn_call *call, const fbn_machine *machine)
    void fbn_machine_init(bint follows)
    const fbn_machine *fbn_this_machine()

cdef extern from "dispatch.h" nogil:
    ctypedef struct fbn_kernels:
        pass
    bint fbn_goes_beside(const fbn_kernels *k, bint backward)
    ctypedef struct fbn_tier:
        const char *name
        bint built, runnable
    const fbn_kernels *fbn_kernels_for(fbn_dtype dtype)
    bint fbn_dispatch(const char *cap)
    const fbn_tier *fbn_tier_at(int i)
    bint fbn_follows_runs()
    const char *fbn_isa_name()

cdef extern from "parallel.h" nogil:
    enum:
        FBN_MAX_THREADS
    ctypedef struct fbn_parallel_counters:
        long long parallel, contended, helped
    void fbn_parallel_init()
    const char *fbn_parallel_runtime()
    bint fbn_parallel_sees_openmp()
    bint fbn_set_num_threads(int n)
    int fbn_get_num_threads()
    fbn_parallel_counters fbn_parallel_count()

cdef extern from "recycle.h" nogil:
    enum:
        FBN_RECYCLED
    ctypedef struct fbn_recycle_state:
        int64_t limit, idle
        int blocks
        long long made, reused, released
    void *fbn_recycle_malloc(size_t bytes)
    void *fbn_recycle_realloc(void *p, size_t bytes)
    void fbn_recycle_free(void *p)
    bint fbn_recycle_set(int64_t limit, int64_t seconds)
    int64_t fbn_recycle_clear()
    fbn_recycle_state fbn_recycle_look()
    void fbn_recycle_init()

cdef extern from "numpy/arrayobject.h":
    ctypedef struct PyDataMemAllocator:
        void *ctx
        void *malloc(void *, size_t) noexcept
        void *calloc(void *, size_t, size_t) noexcept
        void *realloc(void *, void *, size_t) noexcept
        void free(void *, void *, size_t) noexcept
    ctypedef struct PyDataMem_Handler:
        char name[127]
        uint8_t version
        PyDataMemAllocator allocator
    PyObject *PyDataMem_DefaultHandler
    object PyDataMem_SetHandler(object)
    object PyDataMem_GetHandler()
    bint PyArray_CheckExact(object)
    bint PyArray_ISWRITEABLE(cnp.ndarray)
    bint PyArray_ISNOTSWAPPED(cnp.ndarray)
    bint PyArray_IS_C_CONTIGUOUS(cnp.ndarray)
    cnp.ndarray PyArray_NewLikeArray(cnp.ndarray, cnp.NPY_ORDER, PyObject *, int)

# Parameters and running statistics are read and written in loops that nothing interrupts while there is a GIL. Where
# there is none, one lock does the same. A forked child renews it: it may have been handed to a thread that is gone.
cdef extern from *:
    """
    #if defined(Py_GIL_DISABLED)
    static PyMutex fbn_numbers_mutex;
    #define fbn_lock_numbers() PyMutex_Lock(&fbn_numbers_mutex)
    #define fbn_unlock_numbers() PyMutex_Unlock(&fbn_numbers_mutex)
    #define fbn_renew_numbers() ((void)(fbn_numbers_mutex = (PyMutex){0}))
    #else
    #define fbn_lock_numbers() ((void)0)
    #define fbn_unlock_numbers() ((void)0)
    #define fbn_renew_numbers() ((void)0)
    #endif
    """
    void lock_numbers "fbn_lock_numbers"() noexcept
    void unlock_numbers "fbn_unlock_numbers"() noexcept
    void renew_numbers "fbn_renew_numbers"() noexcept


def renew_lock():
    """For a forked child, before it has threads."""
    renew_numbers()


# Around a call of the core: other threads may run Python meanwhile, unless it is over before they could.
cdef extern from *:
    """
    enum { FBN_BRIEF = 32768 }; /* bytes of a tensor */
    static PyThreadState *fbn_let_go(Py_ssize_t bytes) { return bytes <= FBN_BRIEF ? NULL : PyEval_SaveThread(); }
    static void fbn_take_back(PyThreadState *state) { if (state != NULL) PyEval_RestoreThread(state); }
    """
    ctypedef struct PyThreadState:
        pass
    PyThreadState *let_go "fbn_let_go"(Py_ssize_t bytes) noexcept
    void take_back "fbn_take_back"(PyThreadState *state) noexcept

# ---- dtypes, activations, tiers: one table each ----

DTYPES = ("float32", "float64", "float16", "bfloat16")
ACTIVATIONS = (None, "relu", "relu6", "leaky_relu")
_OPS = ("moments", "forward", "normalize", "reduce", "backward", "apply")
_FAMILIES = ("rows", "cols")

cdef object _bf16_type = _bfloat16
cdef dict _activation_kinds = {name: kind for kind, name in enumerate(ACTIVATIONS)}


cdef int dtype_code(cnp.ndarray a) except -2:
    """The dtype's number, whatever the byte order; -1 for one that is not ours."""
    cdef int num = cnp.PyArray_TYPE(a)
    if num == cnp.NPY_FLOAT32:
        return FBN_F32
    if num == cnp.NPY_FLOAT64:
        return FBN_F64
    if num == cnp.NPY_FLOAT16:
        return FBN_F16
    if _bf16_type is not None and a.dtype.type is _bf16_type:
        return FBN_BF16
    return -1


cdef fbn_act activation_of(object name, object negative_slope) except *:
    cdef fbn_act act
    cdef object kind = _activation_kinds.get(name) if name is None or type(name) is str else None
    act.negative_slope = real("negative_slope", negative_slope, -INFINITY, INFINITY)
    if kind is None:
        kind = ACTIVATIONS.index(choice("activation", name, ACTIVATIONS))
    act.kind = <fbn_activation><int>kind
    return act


cdef double real(str name, object value, double low, double high) except? -1.0:
    cdef double result
    if type(value) is float:
        result = value
    else:
        if isinstance(value, (bool, np.bool_, str, bytes)) or getattr(value, "shape", ()) != ():
            raise TypeError(f"{name} must be a real number, got {type(value).__name__}")
        try:
            result = float(value)
        except OverflowError:
            result = INFINITY
        except (TypeError, ValueError):
            raise TypeError(f"{name} must be a real number, got {type(value).__name__}") from None
    if not (isfinite(result) and low <= result <= high):
        bounds = f"from {low} to {high}" if high < INFINITY else "finite" if low < 0.0 else "finite and not negative"
        raise ValueError(f"{name} must be {bounds}, got {said(value)}")
    return result


def number(str name, value, double low=-INFINITY, double high=INFINITY):
    """A finite float within bounds."""
    return real(name, value, low, high)


def choice(str name, value, tuple choices):
    """One of some strings, and None where that is among them."""
    if not (isinstance(value, str) or (value is None and None in choices)):
        raise TypeError(f"{name} must be one of {choices}, got {type(value).__name__}")
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {said(value)}")
    return value


def said(value):
    """What came, for a message: as it prints, if it does, in a few words."""
    try:
        text = repr(value)
    except Exception:  # an integer of thousands of digits, or what has a repr of its own
        text = f"an integer of {value.bit_length()} bits" if isinstance(value, int) else type(value).__name__
    return text if len(text) <= 80 else text[:60] + "... (" + str(len(text)) + " characters)"


def flag(str name, value):
    """A bool, for what is as good as one elsewhere ("no", None, an array) is a slip here."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}")
    return bool(value)


# ---- arrays ----

cdef cnp.ndarray view_of(object x, str name):
    """x as an ndarray that shares its memory."""
    if PyArray_CheckExact(x):
        return x
    if cnp.PyArray_Check(x):  # unlike isinstance, which believes an object's __class__
        if isinstance(x, np.ma.MaskedArray):
            raise TypeError(f"{name} must not be a masked array, whose mask would be lost; give its .filled(value)")
        return np.asarray(x)
    if hasattr(x, "__dlpack__"):
        try:
            negative = hasattr(x, "is_neg") and x.is_neg()  # PyTorch exports the memory and forgets the sign
            if not negative:
                return np.from_dlpack(x)
        except Exception as error:
            raise TypeError(f"{name} offers DLPack, but not as a CPU array that NumPy can view: {error}") from error
        raise TypeError(f"{name} is a tensor whose sign is not in its memory; give its resolve_neg()")
    raise TypeError(f"{name} must be a NumPy array or a CPU tensor with __dlpack__, got {type(x).__name__}")


def view(x, str name):
    """The same for Python."""
    return view_of(x, name)


cdef int data_code(cnp.ndarray a, str name) except -1:
    cdef int code = dtype_code(a)
    if code < 0:
        raise TypeError(f"{name} must have dtype float32, float64, float16 or bfloat16, got {a.dtype}")
    return code


cdef int axis_of(cnp.ndarray x, object channel_axis) except -1:
    cdef Py_ssize_t axis
    cdef int ndim = cnp.PyArray_NDIM(x)
    if ndim < 2:
        raise ValueError(f"x must have at least 2 dimensions, got {ndim}")
    if isinstance(channel_axis, bool):
        raise TypeError("channel_axis must be an integer, got bool")
    try:
        axis = channel_axis
    except TypeError:
        raise TypeError(f"channel_axis must be an integer, got {type(channel_axis).__name__}") from None
    except OverflowError:
        axis = ndim
    if axis < -ndim or axis >= ndim:
        raise ValueError(f"channel_axis must be from {-ndim} to {ndim - 1} for {ndim}-D x, got {said(channel_axis)}")
    return <int>(axis + ndim if axis < 0 else axis)


cdef bint same_shape(cnp.ndarray a, cnp.ndarray b) noexcept:
    cdef int i
    if cnp.PyArray_NDIM(a) != cnp.PyArray_NDIM(b):
        return False
    for i in range(cnp.PyArray_NDIM(a)):
        if cnp.PyArray_DIM(a, i) != cnp.PyArray_DIM(b, i):
            return False
    return True


cdef int check_like(cnp.ndarray a, cnp.ndarray x, int code, str name) except -1:
    """a must have x's shape and dtype."""
    if not same_shape(a, x):
        raise ValueError(f"{name} must have the shape of x, {(<object>x).shape}, got {(<object>a).shape}")
    if dtype_code(a) != code:
        raise TypeError(f"{name} must have the dtype of x, {x.dtype}, got {a.dtype}")
    return 0


# ---- memory of results ----

# Large results come from a store of memory that was a result before. NumPy is told by a memory handler, which it notes
# in the array: so an array owns such memory as it owns any other, and may outlive every setting.
cdef void *recycle_malloc(void *_, size_t size) noexcept:
    return fbn_recycle_malloc(size)


cdef void *recycle_calloc(void *_, size_t count, size_t size) noexcept:
    cdef void *p = NULL if size > 0 and count > SIZE_MAX // size else fbn_recycle_malloc(count * size)
    if p != NULL:
        memset(p, 0, count * size)
    return p


cdef void *recycle_realloc(void *_, void *p, size_t size) noexcept:
    return fbn_recycle_realloc(p, size)


cdef void recycle_free(void *_, void *p, size_t size) noexcept:
    fbn_recycle_free(p)


cdef PyDataMem_Handler recycle_handler
memcpy(recycle_handler.name, b"fastbn", 7)
recycle_handler.version = 1
recycle_handler.allocator.malloc = recycle_malloc
recycle_handler.allocator.calloc = recycle_calloc
recycle_handler.allocator.realloc = recycle_realloc
recycle_handler.allocator.free = recycle_free

cdef object _recycle = PyCapsule_New(&recycle_handler, "mem_handler", NULL)
cdef bint recycling = False  # whether the store keeps anything


cdef cnp.ndarray fresh(cnp.ndarray x):
    """A new array of x's shape, dtype and memory order. Whoever has set a memory handler of his own gets it."""
    if not recycling or cnp.PyArray_NBYTES(x) < FBN_RECYCLED:
        return PyArray_NewLikeArray(x, cnp.NPY_KEEPORDER, NULL, 0)
    before = PyDataMem_GetHandler()
    if <PyObject *>before != PyDataMem_DefaultHandler:
        return PyArray_NewLikeArray(x, cnp.NPY_KEEPORDER, NULL, 0)
    PyDataMem_SetHandler(_recycle)
    try:
        return PyArray_NewLikeArray(x, cnp.NPY_KEEPORDER, NULL, 0)
    finally:
        PyDataMem_SetHandler(before)


def set_recycling(limit, seconds):
    global recycling
    if not fbn_recycle_set(limit, seconds):
        raise RuntimeError("the store of idle memory is held by a thread that a fork left behind")
    recycling = <int64_t>limit > 0


def clear_recycled():
    return fbn_recycle_clear()


def recycled():
    cdef fbn_recycle_state s = fbn_recycle_look()
    return {"limit": s.limit, "idle": s.idle, "blocks": s.blocks, "made": s.made, "reused": s.reused,
            "released": s.released}


cdef cnp.ndarray output(object out, cnp.ndarray x, int code, str name):
    cdef int i
    cdef cnp.ndarray y
    if out is None:
        for i in range(cnp.PyArray_NDIM(x)):
            if cnp.PyArray_STRIDE(x, i) == 0 and cnp.PyArray_DIM(x, i) > 1:
                return blank(x)
        if PyArray_ISNOTSWAPPED(x):
            return fresh(x)
        return np.empty_like(x, dtype=x.dtype.newbyteorder("="), subok=False)
    if not cnp.PyArray_Check(out):
        raise TypeError(f"{name} must be None or a NumPy array, got {type(out).__name__}")
    y = view_of(out, name)
    check_like(y, x, code, name)
    if not PyArray_ISWRITEABLE(y):
        raise ValueError(f"{name} must be writeable, got a read-only array")
    for i in range(cnp.PyArray_NDIM(y)):
        if cnp.PyArray_STRIDE(y, i) == 0 and cnp.PyArray_DIM(y, i) > 1 and cnp.PyArray_SIZE(y):
            raise ValueError(f"{name} must have memory of its own for every element, got stride 0 along axis {i}")
    return y


cdef void extent(cnp.ndarray a, uintptr_t *low, uintptr_t *high) noexcept:
    cdef int i
    cdef intptr_t reach
    low[0] = <uintptr_t>cnp.PyArray_DATA(a)
    high[0] = low[0] + <uintptr_t>cnp.PyArray_ITEMSIZE(a)
    for i in range(cnp.PyArray_NDIM(a)):
        reach = (cnp.PyArray_DIM(a, i) - 1) * cnp.PyArray_STRIDE(a, i)
        if reach < 0:
            low[0] -= <uintptr_t>(-reach)
        else:
            high[0] += <uintptr_t>reach


cdef bint clashes(cnp.ndarray a, cnp.ndarray out) noexcept:
    """Whether writing out could spoil a that is yet to be read: they overlap, and not element upon element."""
    cdef uintptr_t a0, a1, b0, b1
    cdef int i
    extent(a, &a0, &a1)
    extent(out, &b0, &b1)
    if a1 <= b0 or b1 <= a0:
        return False
    if cnp.PyArray_DATA(a) != cnp.PyArray_DATA(out):
        return True
    for i in range(cnp.PyArray_NDIM(a)):
        if cnp.PyArray_DIM(a, i) > 1 and cnp.PyArray_STRIDE(a, i) != cnp.PyArray_STRIDE(out, i):
            return True
    return False


cdef bint overlaps_itself(cnp.ndarray out):
    """Whether two elements of out may share memory (a window view): then it cannot be written in place. They do not where
    every axis steps over all that the shorter ones reach.
    """
    reach = cnp.PyArray_ITEMSIZE(out)
    for stride, length in sorted((abs(step), n) for step, n in zip((<object>out).strides, (<object>out).shape) if n > 1):
        if stride < reach:
            return True
        reach += stride * (length - 1)
    return False


cdef cnp.ndarray blank(cnp.ndarray like):
    """Native memory without gaps, for an array that is walked as `like` is: its order of axes, and their directions."""
    allocated = np.nditer(
        [like, None], ["zerosize_ok"], [["readonly"], ["writeonly", "allocate"]],
        op_dtypes=[like.dtype, like.dtype.newbyteorder("=")],
    ).operands[1]
    return allocated[tuple([slice(None, None, -1 if s < 0 else None) for s in (<object>like).strides])]


cdef cnp.ndarray native_copy(cnp.ndarray a, cnp.ndarray like):
    cdef cnp.ndarray b = blank(like)
    b[...] = a
    return b


# ---- one call's arrays ----

cdef struct Geometry:
    fbn_geometry g
    fbn_tensor t[4]


cdef class _StandIns:
    """What a call works on where its arrays are no one geometry: copies, as strides, alignment, byte order or overlap
    ask for. The first is x, the second is read beside it, the others are outputs, which finish() puts back.
    """

    cdef cnp.ndarray a0, a1, a2, a3
    cdef list back  # [(array, its stand-in)]


cdef bint collapse(cnp.ndarray x, cnp.ndarray b, cnp.ndarray c, cnp.ndarray d, int code, int axis, Geometry *geo) noexcept:
    """Fills geo; tensors of absent arrays stay NULL."""
    cdef fbn_array arrays[4]
    cdef fbn_tensor tensors[4]
    cdef int where[4]
    cdef int n = 0
    cdef int i
    memset(geo, 0, sizeof(Geometry))
    for i in range(4):
        a = x if i == 0 else b if i == 1 else c if i == 2 else d
        if a is None:
            continue
        if not PyArray_ISNOTSWAPPED(<cnp.ndarray>a):
            return False
        arrays[n].data = <char *>cnp.PyArray_DATA(<cnp.ndarray>a)
        arrays[n].strides = <const intptr_t *>cnp.PyArray_STRIDES(<cnp.ndarray>a)
        where[n] = i
        n += 1
    if not fbn_collapse(<fbn_dtype>code, cnp.PyArray_NDIM(x), axis, <const intptr_t *>cnp.PyArray_DIMS(x), n, arrays,
                        &geo.g, tensors):
        return False
    for i in range(n):
        geo.t[where[i]] = tensors[i]
    return True


cdef bint same_geometry(const fbn_geometry *a, const fbn_geometry *b) noexcept:
    return a.family == b.family and a.outer == b.outer and a.channels == b.channels and a.inner == b.inner


cdef _StandIns stand_ins(cnp.ndarray a0, cnp.ndarray a1, cnp.ndarray a2, cnp.ndarray a3, list back):
    cdef _StandIns s = _StandIns.__new__(_StandIns)
    s.a0, s.a1, s.a2, s.a3, s.back = a0, a1, a2, a3, back
    return s


cdef int still_fits(cnp.ndarray x, cnp.ndarray a, int code) except -1:
    if not same_shape(a, x) or dtype_code(a) != code:
        raise RuntimeError("an array changed its shape or dtype during the call")
    return 0


cdef _StandIns arrange(cnp.ndarray x, cnp.ndarray other, cnp.ndarray out, cnp.ndarray extra, int code, int axis,
                       Py_ssize_t channels, const fbn_geometry *wanted, object walk, Geometry *geo):
    """Brings x, what is read beside it, and the outputs to x's geometry; to `wanted`, by way of the strides `walk`, where
    there is a gate that was laid out by them. Returns what has to outlive the call besides, if anything.
    """
    cdef _StandIns s = None
    cdef cnp.ndarray y = out
    cdef cnp.ndarray like = x
    # Arguments may have run code of theirs (__float__, __dlpack__) since each was checked. From here on none does.
    if axis >= cnp.PyArray_NDIM(x) or cnp.PyArray_DIM(x, axis) != channels or cnp.PyArray_SIZE(x) == 0:
        raise RuntimeError("x changed its shape during the call")
    still_fits(x, x, code)
    if other is not None:
        still_fits(x, other, code)
    if out is not None:
        still_fits(x, out, code)
    if extra is not None:
        still_fits(x, extra, code)
    if wanted != NULL and (<object>x).strides != walk:
        like = np.lib.stride_tricks.as_strided(np.empty(1, dtype=x.dtype), (<object>x).shape, walk)
    else:
        # The common case: nothing clashes and everything collapses together.
        if out is not None:
            if clashes(x, out) or (other is not None and clashes(other, out)):
                y = blank(x)
                s = stand_ins(x, other, y, extra, [(out, y)])
        if collapse(x, other, y, extra, code, axis, geo) and (wanted == NULL or same_geometry(&geo.g, wanted)) and (
            out is None or PyArray_IS_C_CONTIGUOUS(out) or not overlaps_itself(out)
        ):
            return s
    # Then everything else without gaps, and at last x.
    for move_x in (False, True):
        if like is not x and not move_x:
            continue
        s = stand_ins(x, other, out, extra, [])
        if move_x:
            s.a0 = native_copy(x, like)
        if other is not None:
            s.a1 = native_copy(other, like)
        if out is not None:
            s.a2 = blank(like)
            s.back.append((out, s.a2))
        if extra is not None:
            s.a3 = blank(like)
            s.back.append((extra, s.a3))
        if collapse(s.a0, s.a1, s.a2, s.a3, code, axis, geo) and (wanted == NULL or same_geometry(&geo.g, wanted)):
            return s
    raise RuntimeError("fastbn: arrays without gaps did not collapse to one geometry")


cdef bint has_gaps(cnp.ndarray x) noexcept:
    cdef uintptr_t low, high
    extent(x, &low, &high)
    return high - low != <uintptr_t>cnp.PyArray_NBYTES(x)


cdef int finish(_StandIns s) except -1:
    if s is not None:
        for array, copy in s.back:
            array[...] = copy
    return 0


# ---- parameters ----

cdef cnp.ndarray param_array(object p, Py_ssize_t channels, str name):
    cdef cnp.ndarray a
    if not cnp.PyArray_Check(p) and not hasattr(p, "__dlpack__"):
        raise TypeError(f"{name} must be a 1-D float array of {channels} elements, got {type(p).__name__}")
    a = view_of(p, name)
    if dtype_code(a) < 0:
        raise TypeError(f"{name} must have a float dtype, got {a.dtype}")
    if cnp.PyArray_NDIM(a) != 1 or cnp.PyArray_DIM(a, 0) != channels:
        raise ValueError(
            f"{name} must have one element per channel, shape ({channels},), got {(<object>a).shape}"
        )
    return a


cdef cnp.ndarray readable(object p, Py_ssize_t channels, str name):
    """p as an array for widen()."""
    cdef cnp.ndarray a = param_array(p, channels, name)
    cdef int code = cnp.PyArray_TYPE(a)
    if not (code == cnp.NPY_FLOAT32 or code == cnp.NPY_FLOAT64) or not cnp.PyArray_ISBEHAVED_RO(a):
        return a.astype(np.float64)
    return a


cdef const double *widen(cnp.ndarray a, Py_ssize_t channels, double *to) noexcept:
    """The elements of a as float64; NULL for None."""
    cdef Py_ssize_t i
    cdef Py_ssize_t stride
    cdef const char *data
    if a is None:
        return NULL
    data = <const char *>cnp.PyArray_DATA(a)
    stride = cnp.PyArray_STRIDE(a, 0)
    if cnp.PyArray_TYPE(a) == cnp.NPY_FLOAT32 and PyArray_IS_C_CONTIGUOUS(a):  # a loop that becomes vectors
        for i in range(channels):
            to[i] = (<const float *>data)[i]
    elif cnp.PyArray_TYPE(a) == cnp.NPY_FLOAT32:
        for i in range(channels):
            to[i] = (<const float *>(data + i * stride))[0]
    else:
        for i in range(channels):
            to[i] = (<const double *>(data + i * stride))[0]
    return to


cdef int load(object p, Py_ssize_t channels, str name, double *to) except -1:
    widen(readable(p, channels, name), channels, to)
    return 0


cdef int still_a_parameter(cnp.ndarray a, Py_ssize_t channels) except -1:
    """Absent, or as it was when it was checked: another may have had code of its own, and changed it."""
    cdef int kind
    if a is None:
        return 0
    kind = cnp.PyArray_TYPE(a)
    if cnp.PyArray_NDIM(a) != 1 or cnp.PyArray_DIM(a, 0) != channels or (
        kind != cnp.NPY_FLOAT32 and kind != cnp.NPY_FLOAT64
    ):
        raise RuntimeError("an array changed its shape or dtype during the call")
    return 0


cdef int load_parameters(fbn_affine *affine, _ParamBlock p, object weight, object bias, cnp.ndarray mean=None,
                         cnp.ndarray var=None) except -1:
    """All at once: what a layer's other threads write together (commit, update_running) is read together."""
    cdef cnp.ndarray w = None if weight is None else readable(weight, p.channels, "weight")
    cdef cnp.ndarray b = None if bias is None else readable(bias, p.channels, "bias")
    still_a_parameter(w, p.channels)
    still_a_parameter(b, p.channels)
    still_a_parameter(mean, p.channels)
    still_a_parameter(var, p.channels)
    lock_numbers()
    affine.weight = widen(w, p.channels, p.slot(0))
    affine.bias = widen(b, p.channels, p.slot(1))
    if mean is not None:
        affine.mean = widen(mean, p.channels, p.slot(2))
        affine.var = widen(var, p.channels, p.slot(3))
    unlock_numbers()
    return 0


@cython.freelist(8)
cdef class _ParamBlock:
    """Float64 copies of a call's parameters, `slots` arrays of one element per channel."""

    cdef double *memory
    cdef Py_ssize_t channels

    def __dealloc__(self):
        free(self.memory)

    cdef double *slot(self, int i) noexcept:
        return self.memory + i * self.channels


cdef _ParamBlock params(Py_ssize_t channels, int slots):
    cdef _ParamBlock p = _ParamBlock.__new__(_ParamBlock)
    p.channels = channels
    if channels < 1 << 56:  # else what is multiplied here would overflow, as with a view of strides 0 it could
        p.memory = <double *>malloc(<size_t>(channels * slots + 1) * sizeof(double))
    if p.memory == NULL:
        raise MemoryError(f"no memory for the parameters of {channels} channels")
    return p


cdef int running_check(object r, Py_ssize_t channels, str name) except -1:
    """Running statistics are written in place, so only what can be written without a copy will do."""
    cdef cnp.ndarray a
    if not cnp.PyArray_Check(r):
        raise TypeError(f"{name} must be a 1-D float array of {channels} elements, got {type(r).__name__}")
    a = param_array(r, channels, name)
    if dtype_code(a) != FBN_F32 and dtype_code(a) != FBN_F64:
        raise TypeError(f"{name} must have dtype float32 or float64, got {a.dtype}")
    if not PyArray_ISWRITEABLE(a):
        raise ValueError(f"{name} must be writeable, got a read-only array")
    if channels > 1 and cnp.PyArray_STRIDE(a, 0) == 0:
        raise ValueError(f"{name} must have memory of its own for every channel, got stride 0")
    return 0


cdef int check(fbn_status status) except -1:
    if status == FBN_NO_MEMORY:
        raise MemoryError("fastbn: no memory for the scratch of this call")
    if status != FBN_OK:
        raise ValueError("fastbn: the core refused the sizes or strides of this call")
    return 0


# ---- what a forward leaves ----

@cython.freelist(8)
cdef class Saved:
    """What a forward leaves for its backward: the statistics, the call's settings, and the gate where one is needed.

    Immutable. ``count`` is the number of elements per channel, and 0 where the statistics were constants (inference).
    """

    cdef readonly int64_t count
    cdef readonly bint moved  # whether running statistics followed this batch
    cdef readonly double eps
    cdef readonly int channel_axis
    cdef readonly bint has_residual
    cdef fbn_act act
    cdef double *mean_
    cdef double *mean_lo
    cdef double *var_
    cdef Py_ssize_t channels
    cdef object gate
    cdef object walk  # the strides of the forward's x, which the gate follows
    cdef fbn_geometry geometry
    cdef int code, ndim
    cdef Py_ssize_t shape[FBN_MAX_DIMS]

    def __init__(self):
        raise TypeError("Saved comes from batch_norm_forward")

    def __dealloc__(self):
        free(self.mean_)  # and the two behind it

    cdef object column(self, double *numbers):
        """Numbers of ours as a read-only array that keeps us alive."""
        cdef cnp.npy_intp size = self.channels
        cdef cnp.ndarray a = cnp.PyArray_SimpleNewFromData(1, &size, cnp.NPY_FLOAT64, numbers)
        cnp.set_array_base(a, self)
        cnp.PyArray_CLEARFLAGS(a, cnp.NPY_ARRAY_WRITEABLE)
        return a

    @property
    def activation(self):
        return ACTIVATIONS[<int>self.act.kind]

    @property
    def negative_slope(self):
        return self.act.negative_slope

    @property
    def mean(self):
        return self.column(self.mean_)

    @property
    def var(self):
        return self.column(self.var_)

    def __copy__(self):
        return self

    def __deepcopy__(self, memo):
        return self

    def __reduce__(self):
        raise TypeError("Saved cannot be pickled: what a forward leaves is for the backward of its own process")

    def __repr__(self):
        return f"<fastbn Saved: {self.channels} channels, count {self.count}, activation {self.activation!r}>"


cdef cnp.ndarray vector(Py_ssize_t channels, int typenum=cnp.NPY_FLOAT64):
    cdef cnp.npy_intp size = channels
    return cnp.PyArray_SimpleNew(1, &size, typenum)


cdef Saved new_saved(cnp.ndarray x, int code, int axis, double eps, fbn_act act, bint has_residual):
    cdef Saved s = Saved.__new__(Saved)
    s.eps = eps
    s.channel_axis = axis
    s.act = act
    s.has_residual = has_residual
    s.code = code
    s.ndim = cnp.PyArray_NDIM(x)
    memcpy(s.shape, cnp.PyArray_DIMS(x), <size_t>s.ndim * sizeof(Py_ssize_t))
    s.channels = cnp.PyArray_DIM(x, axis)
    s.mean_ = <double *>malloc(<size_t>(3 * s.channels + 1) * sizeof(double))
    if s.mean_ == NULL:
        raise MemoryError(f"no memory for the statistics of {s.channels} channels")
    s.mean_lo = s.mean_ + s.channels
    s.var_ = s.mean_lo + s.channels
    return s


cdef bint of_that_shape(Saved s, cnp.ndarray x) noexcept:
    return cnp.PyArray_NDIM(x) == s.ndim and memcmp(s.shape, cnp.PyArray_DIMS(x),
                                                    <size_t>s.ndim * sizeof(Py_ssize_t)) == 0


cdef _StandIns arrange_forward(Saved s, cnp.ndarray x, cnp.ndarray residual, cnp.ndarray y, int code, int axis,
                               Py_ssize_t channels, Geometry *geo):
    """With an activation after a residual, whose sign cannot be recomputed, one bit an element is kept. The backward
    finds it by the geometry of x without gaps, which is what all that it may have to copy collapses to.
    """
    cdef Geometry tight
    cdef const fbn_geometry *wanted = NULL
    cdef bint gated = s is not None and s.has_residual and s.act.kind != FBN_IDENTITY
    cdef _StandIns moved
    if gated and has_gaps(x):
        collapse(blank(x), None, None, None, code, axis, &tight)
        wanted = &tight.g
    moved = arrange(x, residual, y, None, code, axis, channels, wanted, None if wanted == NULL else (<object>x).strides,
                    geo)
    if gated:
        s.geometry = geo.g
        s.gate = np.empty(fbn_gate_bytes(&geo.g), dtype=np.uint8)
        s.walk = (<object>(x if moved is None else moved.a0)).strides
    return moved


cdef uint8_t *gate_data(Saved s) noexcept:
    return NULL if s.gate is None else <uint8_t *>cnp.PyArray_DATA(<cnp.ndarray>s.gate)


# ---- forward ----

cdef tuple run_forward(object x_given, object running_mean, object running_var, object weight, object bias,
                       object momentum, object eps_given, object channel_axis, object activation,
                       object negative_slope, object residual_given, object out, bint guard, object layer):
    cdef cnp.ndarray x = view_of(x_given, "x")
    cdef int code = data_code(x, "x")
    cdef int axis = axis_of(x, channel_axis)
    cdef Py_ssize_t channels = cnp.PyArray_DIM(x, axis)
    cdef double eps = real("eps", eps_given, 0.0, INFINITY)
    cdef fbn_act act = activation_of(activation, negative_slope)
    cdef double factor = real("momentum", momentum, -INFINITY, INFINITY)
    cdef cnp.ndarray residual = None
    cdef cnp.ndarray y
    cdef _ParamBlock p = params(channels, 3)
    cdef fbn_affine affine
    cdef fbn_moments stats
    cdef Geometry geo
    cdef Saved saved
    cdef _StandIns moved
    cdef fbn_status status
    cdef int threads = fbn_get_num_threads()
    cdef fbn_tensor *other = NULL
    cdef uint8_t *gate
    memset(&affine, 0, sizeof(affine))
    affine.eps = eps
    load_parameters(&affine, p, weight, bias)
    if residual_given is not None:
        residual = view_of(residual_given, "residual")
        check_like(residual, x, code, "residual")
    # Last of what an argument with code of its own could still change.
    if running_mean is not None:
        running_check(running_mean, channels, "running_mean")
    if running_var is not None:
        running_check(running_var, channels, "running_var")
    if cnp.PyArray_SIZE(x) > 0 and cnp.PyArray_SIZE(x) == channels:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {list((<object>x).shape)}"
        )
    y = output(out, x, code, "out")
    saved = new_saved(x, code, axis, eps, act, residual is not None)
    if cnp.PyArray_SIZE(x) == 0:
        memset(saved.mean_, 0, <size_t>(3 * channels) * sizeof(double))
        return y, saved
    stats.mean, stats.mean_lo, stats.m2 = saved.mean_, saved.mean_lo, p.slot(2)
    result = y, saved
    if layer is not None:
        tracked = layer._tracked
        count = tracked + 1
        if guard:
            skipped = layer._skipped
            missed = skipped + 1
    moved = arrange_forward(saved, x, residual, y, code, axis, channels, &geo)
    gate = gate_data(saved)
    if residual is not None:
        other = &geo.t[1]
    state = let_go(cnp.PyArray_NBYTES(x))
    status = fbn_forward(&geo.g, geo.t[0], other, geo.t[2], gate, &affine, act, threads, &stats, saved.var_)
    take_back(state)
    check(status)
    finish(moved)
    saved.count = stats.count
    if layer is not None:
        if layer._tracked is not tracked:  # an argument has code of its own, which has trained the layer meanwhile
            count = layer._tracked + 1
        if guard and layer._skipped is not skipped:
            missed = layer._skipped + 1
    # From here on nothing asks for memory, and no signal is handled: a counter moves together with the statistics.
    lock_numbers()
    saved.moved = update_running(running_mean, running_var, factor, &stats, channels, guard)
    unlock_numbers()
    if layer is not None:
        if saved.moved:
            layer._tracked = count
        else:
            layer._skipped = missed
    return result


cdef void running_move(cnp.ndarray a, double factor, const double *batch) noexcept:
    """a = (1 - factor) * a + factor * batch, in a's dtype, whatever its alignment, byte order and stride."""
    cdef Py_ssize_t n = cnp.PyArray_DIM(a, 0)
    cdef Py_ssize_t stride = cnp.PyArray_STRIDE(a, 0)
    cdef bint is_narrow = cnp.PyArray_TYPE(a) == cnp.NPY_FLOAT32
    cdef bint swapped = not PyArray_ISNOTSWAPPED(a)
    cdef size_t size = sizeof(float) if is_narrow else sizeof(double)
    cdef char *at = <char *>cnp.PyArray_DATA(a)
    cdef float narrow
    cdef double wide
    cdef char *number = <char *>&narrow if is_narrow else <char *>&wide
    cdef Py_ssize_t i
    if is_narrow and cnp.PyArray_ISCARRAY(a):  # the same in a loop that becomes vectors
        for i in range(n):
            (<float *>at)[i] = <float>((1.0 - factor) * <double>(<float *>at)[i] + factor * batch[i])
        return
    for i in range(n):
        memcpy(number, at, size)
        if swapped:
            reverse(number, size)
        wide = (1.0 - factor) * (<double>narrow if is_narrow else wide) + factor * batch[i]
        narrow = <float>wide
        if swapped:
            reverse(number, size)
        memcpy(at, number, size)
        at += stride


cdef void reverse(char *bytes, size_t n) noexcept:
    cdef size_t i
    for i in range(n // 2):
        bytes[i], bytes[n - 1 - i] = bytes[n - 1 - i], bytes[i]


cdef bint update_running(cnp.ndarray mean, cnp.ndarray var, double factor, fbn_moments *stats,
                         Py_ssize_t channels, bint guard) noexcept:
    """Moves both, the variance by the unbiased one; or neither, and returns False, where `guard` finds a statistic of the
    batch that is not finite in the dtype of the running one. The sums of squares become those variances.
    """
    cdef double rest = <double>stats.count - 1.0
    cdef double *unbiased = stats.m2
    cdef Py_ssize_t i
    if var is not None:
        for i in range(channels):
            unbiased[i] /= rest
    if guard:
        for i in range(channels):
            if not (holds(mean, stats.mean[i]) and holds(var, unbiased[i])):
                return False
    if mean is not None:
        running_move(mean, factor, stats.mean)
    if var is not None:
        running_move(var, factor, unbiased)
    return True


cdef bint holds(cnp.ndarray a, double value) noexcept:
    """Whether value is finite in a's dtype."""
    return a is None or isfinite(<double><float>value if cnp.PyArray_TYPE(a) == cnp.NPY_FLOAT32 else value)


def forward(x, weight, bias, eps, channel_axis, activation, negative_slope, residual, out):
    return run_forward(x, None, None, weight, bias, 0.0, eps, channel_axis, activation, negative_slope, residual, out,
                       False, None)


def forward_train(x, running_mean, running_var, weight, bias, momentum, eps, channel_axis, activation, negative_slope,
                  residual, out, guard=False, layer=None):
    return run_forward(x, running_mean, running_var, weight, bias, momentum, eps, channel_axis, activation,
                       negative_slope, residual, out, guard, layer)


# ---- inference ----

cdef class Prepared:
    """One channel-wise affine map made ready once; immutable, thread-safe."""

    cdef fbn_prepared *prepared
    cdef int code
    cdef Py_ssize_t channels
    cdef object axis
    cdef fbn_act act

    def __cinit__(self, *args, **kwargs):
        self.prepared = NULL

    def __init__(self, dtype, mean, var, weight, bias, eps, channel_axis, activation, negative_slope):
        cdef fbn_affine affine
        cdef _ParamBlock p
        cdef fbn_prepared *prepared = NULL
        cdef int code = data_code(np.empty(0, dtype=dtype), "dtype")
        cdef cnp.ndarray first = view_of(mean, "mean")
        cdef fbn_act act = activation_of(activation, negative_slope)
        cdef Py_ssize_t channels
        if isinstance(channel_axis, bool) or not hasattr(channel_axis, "__index__"):
            raise TypeError(f"channel_axis must be an integer, got {type(channel_axis).__name__}")
        axis = channel_axis.__index__()
        if cnp.PyArray_NDIM(first) != 1:
            raise ValueError(f"mean must be 1-D, got {cnp.PyArray_NDIM(first)} dimensions")
        channels = cnp.PyArray_DIM(first, 0)
        p = params(channels, 4)
        memset(&affine, 0, sizeof(affine))
        fill_affine(&affine, p, mean, var, weight, bias, eps)
        with cython.critical_section(self):
            if self.prepared != NULL:  # asked at last, for an argument may have called us
                raise TypeError("a prepared map is immutable")
            check(fbn_prepare(<fbn_dtype>code, channels, &affine, &prepared))
            self.code, self.channels, self.act, self.axis = code, channels, act, axis
            self.prepared = prepared

    def __dealloc__(self):
        fbn_release(self.prepared)

    def __call__(self, x, residual=None, out=None):
        cdef cnp.ndarray vx = view_of(x, "x")
        cdef cnp.ndarray vr = None
        cdef cnp.ndarray y
        cdef int code = data_code(vx, "x")
        cdef int axis
        cdef Geometry geo
        cdef _StandIns moved
        cdef fbn_status status
        cdef fbn_tensor *other = NULL
        cdef int threads = fbn_get_num_threads()
        if self.prepared == NULL:
            raise TypeError("this map was never prepared")
        axis = axis_of(vx, self.axis)
        if code != self.code:
            raise TypeError(f"x must have dtype {DTYPES[self.code]}, got {vx.dtype}")
        if cnp.PyArray_DIM(vx, axis) != self.channels:
            raise ValueError(
                f"x must have {self.channels} channels along axis {axis}, got {cnp.PyArray_DIM(vx, axis)}"
            )
        if residual is not None:
            vr = view_of(residual, "residual")
            check_like(vr, vx, code, "residual")
            other = &geo.t[1]
        y = output(out, vx, code, "out")
        if cnp.PyArray_SIZE(vx) == 0:
            return out if out is not None else y
        moved = arrange(vx, vr, y, None, code, axis, self.channels, NULL, None, &geo)
        state = let_go(cnp.PyArray_NBYTES(vx))
        status = fbn_apply(&geo.g, geo.t[0], other, geo.t[2], NULL, self.prepared, self.act, threads)
        take_back(state)
        check(status)
        finish(moved)
        return out if out is not None else y


cdef int fill_affine(fbn_affine *affine, _ParamBlock p, object mean, object var, object weight, object bias,
                     object eps, str mean_name="mean", str var_name="var") except -1:
    cdef cnp.ndarray m
    cdef cnp.ndarray v
    affine.eps = real("eps", eps, 0.0, INFINITY)
    m = readable(mean, p.channels, mean_name)
    v = readable(var, p.channels, var_name)
    return load_parameters(affine, p, weight, bias, m, v)


cdef tuple run_normalize(object x_given, object mean, object var, object weight, object bias, object eps,
                         object channel_axis, object activation, object negative_slope, object residual_given,
                         object out, bint save, str mean_name, str var_name):
    cdef cnp.ndarray x = view_of(x_given, "x")
    cdef int code = data_code(x, "x")
    cdef int axis = axis_of(x, channel_axis)
    cdef Py_ssize_t channels = cnp.PyArray_DIM(x, axis)
    cdef fbn_act act = activation_of(activation, negative_slope)
    cdef cnp.ndarray residual = None
    cdef cnp.ndarray y
    cdef _ParamBlock p = params(channels, 4)
    cdef fbn_affine affine
    cdef Geometry geo
    cdef Saved saved = None
    cdef _StandIns moved
    cdef fbn_status status
    cdef int threads = fbn_get_num_threads()
    cdef fbn_tensor *other = NULL
    cdef uint8_t *gate = NULL
    memset(&affine, 0, sizeof(affine))
    fill_affine(&affine, p, mean, var, weight, bias, eps, mean_name, var_name)
    if residual_given is not None:
        residual = view_of(residual_given, "residual")
        check_like(residual, x, code, "residual")
        other = &geo.t[1]
    y = output(out, x, code, "out")
    if save:
        saved = new_saved(x, code, axis, affine.eps, act, residual is not None)
        memcpy(saved.mean_, affine.mean, <size_t>channels * sizeof(double))
        memset(saved.mean_lo, 0, <size_t>channels * sizeof(double))
        memcpy(saved.var_, affine.var, <size_t>channels * sizeof(double))
    if cnp.PyArray_SIZE(x) == 0:
        return y, saved
    moved = arrange_forward(saved, x, residual, y, code, axis, channels, &geo)
    if save:
        gate = gate_data(saved)
    state = let_go(cnp.PyArray_NBYTES(x))
    status = fbn_normalize(&geo.g, geo.t[0], other, geo.t[2], gate, &affine, act, threads)
    take_back(state)
    check(status)
    finish(moved)
    return y, saved


def normalize(x, mean, var, weight, bias, eps, channel_axis, activation, negative_slope, residual, out,
              mean_name="running_mean", var_name="running_var"):
    y, _ = run_normalize(x, mean, var, weight, bias, eps, channel_axis, activation, negative_slope, residual, out, False,
                         mean_name, var_name)
    return y if out is None else out


def forward_eval(x, mean, var, weight, bias, eps, channel_axis, activation, negative_slope, residual, out):
    return run_normalize(x, mean, var, weight, bias, eps, channel_axis, activation, negative_slope, residual, out, True,
                         "running_mean", "running_var")


def commit(layer, list pairs, tracked):
    """Copies every (to, from) of equal dtype and size, all at once, and sets the counter of a layer whose lock is held."""
    cdef cnp.ndarray to, source
    for to, source in pairs:  # the layer's own arrays are in anybody's reach
        if not (same_shape(to, source) and to.dtype == source.dtype):
            raise ValueError(
                f"an array of the layer must have the shape and dtype that it was made with, {(<object>source).shape} and "
                f"{source.dtype}, got {(<object>to).shape} and {to.dtype}"
            )
        if not (PyArray_ISWRITEABLE(to) and PyArray_IS_C_CONTIGUOUS(to) and PyArray_IS_C_CONTIGUOUS(source)):
            raise ValueError("an array of the layer must be writeable and contiguous, got one that is not")
    lock_numbers()
    for to, source in pairs:
        memcpy(cnp.PyArray_DATA(to), cnp.PyArray_DATA(source), <size_t>cnp.PyArray_NBYTES(to))
    unlock_numbers()
    if tracked is not None:
        layer._tracked = tracked


# ---- backward ----

cdef cnp.ndarray gradient_of(object param, int code, Py_ssize_t channels, const double *values):
    """In the parameter's dtype, or that of parameters for such data."""
    cdef Py_ssize_t i
    cdef cnp.ndarray like = None if param is None else view_of(param, "weight")
    cdef cnp.ndarray g
    if (code != FBN_F64) if like is None else (cnp.PyArray_TYPE(like) == cnp.NPY_FLOAT32):
        g = vector(channels, cnp.NPY_FLOAT32)
        for i in range(channels):
            (<float *>cnp.PyArray_DATA(g))[i] = <float>values[i]
        return g
    g = vector(channels)
    for i in range(channels):
        (<double *>cnp.PyArray_DATA(g))[i] = values[i]
    if like is None:
        return g
    with np.errstate(all="ignore"):  # no error once dx is written
        return g.astype(like.dtype.newbyteorder("="), copy=False)


def backward(grad_output, x, Saved saved not None, weight, bias, out):
    cdef cnp.ndarray vx = view_of(x, "x")
    cdef cnp.ndarray dy = view_of(grad_output, "grad_output")
    cdef int code = data_code(vx, "x")
    cdef int axis = saved.channel_axis
    cdef Py_ssize_t channels
    cdef cnp.ndarray dx
    cdef cnp.ndarray dresidual = None
    cdef _ParamBlock p
    cdef fbn_affine affine
    cdef Geometry geo
    cdef _StandIns moved
    cdef fbn_status status
    cdef int threads = fbn_get_num_threads()
    cdef fbn_tensor *extra = NULL
    cdef const uint8_t *gate
    cdef const fbn_geometry *wanted = NULL
    cdef double *grad_bias
    cdef double *grad_weight
    cdef bint training = saved.count > 0
    cdef Py_ssize_t i
    if code != saved.code:
        raise TypeError(f"x must have the dtype of the forward's x, {DTYPES[saved.code]}, got {vx.dtype}")
    if not of_that_shape(saved, vx):
        shape = tuple([saved.shape[i] for i in range(saved.ndim)])
        raise ValueError(f"x must have the shape of the forward's x, {shape}, got {(<object>vx).shape}")
    check_like(dy, vx, code, "grad_output")
    channels = cnp.PyArray_DIM(vx, axis)
    p = params(channels, 4)
    memset(&affine, 0, sizeof(affine))
    affine.eps = saved.eps
    affine.mean, affine.mean_lo, affine.var = saved.mean_, saved.mean_lo, saved.var_
    load_parameters(&affine, p, weight, bias)
    grad_bias = p.slot(2)
    grad_weight = p.slot(3)
    dx = output(out, vx, code, "out")
    if saved.has_residual:
        dresidual = output(None, vx, code, "grad_residual")
        extra = &geo.t[3]
    if cnp.PyArray_SIZE(vx) == 0:
        memset(grad_bias, 0, <size_t>(2 * channels) * sizeof(double))
    else:
        gate = gate_data(saved)
        if gate != NULL:
            wanted = &saved.geometry
        moved = arrange(vx, dy, dx, dresidual, code, axis, channels, wanted, saved.walk, &geo)
        state = let_go(cnp.PyArray_NBYTES(vx))
        status = fbn_backward(&geo.g, geo.t[0], geo.t[1], geo.t[2], extra, gate, &affine, saved.act, training, threads,
                              grad_bias, grad_weight)
        take_back(state)
        check(status)
        finish(moved)
    dweight = gradient_of(weight, code, channels, grad_weight)
    dbias = gradient_of(weight if bias is None else bias, code, channels, grad_bias)
    return dx if out is None else out, dweight, dbias, dresidual


# ---- building blocks ----

cdef cnp.ndarray zeros(Py_ssize_t channels):
    cdef cnp.npy_intp size = channels
    return cnp.PyArray_ZEROS(1, &size, cnp.NPY_FLOAT64, 0)


cdef double *numbers_of(cnp.ndarray a) noexcept:
    return <double *>cnp.PyArray_DATA(a)


def moments(x, channel_axis):
    cdef cnp.ndarray vx = view_of(x, "x")
    cdef int code = data_code(vx, "x")
    cdef int axis = axis_of(vx, channel_axis)
    cdef Py_ssize_t channels = cnp.PyArray_DIM(vx, axis)
    cdef fbn_moments stats
    cdef cnp.ndarray mean, mean_lo, m2
    cdef Geometry geo
    cdef _StandIns moved
    cdef fbn_status status
    cdef int threads = fbn_get_num_threads()
    mean, mean_lo, m2 = zeros(channels), zeros(channels), zeros(channels)
    for made in (mean, mean_lo, m2):
        cnp.PyArray_CLEARFLAGS(made, cnp.NPY_ARRAY_WRITEABLE)
    if cnp.PyArray_SIZE(vx) == 0:
        return 0, mean, mean_lo, m2
    stats.mean = numbers_of(mean)
    stats.mean_lo = numbers_of(mean_lo)
    stats.m2 = numbers_of(m2)
    moved = arrange(vx, None, None, None, code, axis, channels, NULL, None, &geo)
    state = let_go(cnp.PyArray_NBYTES(vx))
    status = fbn_moments_of(&geo.g, geo.t[0], threads, &stats)
    take_back(state)
    check(status)
    return stats.count, mean, mean_lo, m2


def backward_reduce(grad_output, x, mean, channel_axis):
    cdef cnp.ndarray vx = view_of(x, "x")
    cdef cnp.ndarray dy = view_of(grad_output, "grad_output")
    cdef int code = data_code(vx, "x")
    cdef int axis = axis_of(vx, channel_axis)
    cdef Py_ssize_t channels = cnp.PyArray_DIM(vx, axis)
    cdef fbn_affine affine
    cdef fbn_act act = activation_of(None, 0.0)
    cdef Geometry geo
    cdef _StandIns moved
    cdef fbn_status status
    cdef int threads = fbn_get_num_threads()
    cdef _ParamBlock p = params(channels, 1)
    cdef cnp.ndarray sum_dy, sum_dy_xmu
    check_like(dy, vx, code, "grad_output")
    load(mean, channels, "mean", p.slot(0))
    memset(&affine, 0, sizeof(affine))
    affine.mean = affine.var = p.slot(0)  # sums without an activation do not look at the variance
    sum_dy, sum_dy_xmu = zeros(channels), zeros(channels)
    if cnp.PyArray_SIZE(vx) == 0:
        return sum_dy, sum_dy_xmu
    moved = arrange(vx, dy, None, None, code, axis, channels, NULL, None, &geo)
    state = let_go(cnp.PyArray_NBYTES(vx))
    status = fbn_backward_reduce(&geo.g, geo.t[0], geo.t[1], NULL, &affine, act, threads, numbers_of(sum_dy),
                                 numbers_of(sum_dy_xmu))
    take_back(state)
    check(status)
    return sum_dy, sum_dy_xmu


def backward_apply(grad_output, x, mean, var, weight, sum_dy, sum_dy_xmu, count, eps, channel_axis, out):
    cdef cnp.ndarray vx = view_of(x, "x")
    cdef cnp.ndarray dy = view_of(grad_output, "grad_output")
    cdef int code = data_code(vx, "x")
    cdef int axis = axis_of(vx, channel_axis)
    cdef Py_ssize_t channels = cnp.PyArray_DIM(vx, axis)
    cdef fbn_affine affine
    cdef fbn_act act = activation_of(None, 0.0)
    cdef Geometry geo
    cdef _StandIns moved
    cdef fbn_status status
    cdef int threads = fbn_get_num_threads()
    cdef _ParamBlock p = params(channels, 6)
    cdef cnp.ndarray dx
    cdef double n = real("count", count, 0.0, INFINITY)
    cdef double *a = p.slot(4)
    cdef double *b = p.slot(5)
    check_like(dy, vx, code, "grad_output")
    memset(&affine, 0, sizeof(affine))
    fill_affine(&affine, p, mean, var, weight, None, eps)
    load(sum_dy, channels, "sum_dy", a)
    load(sum_dy_xmu, channels, "sum_dy_xmu", b)
    dx = output(out, vx, code, "out")
    if cnp.PyArray_SIZE(vx) > 0:
        moved = arrange(vx, dy, dx, None, code, axis, channels, NULL, None, &geo)
        state = let_go(cnp.PyArray_NBYTES(vx))
        status = fbn_backward_apply(&geo.g, geo.t[0], geo.t[1], geo.t[2], NULL, NULL, &affine, act, a, b, n, threads)
        take_back(state)
        check(status)
        finish(moved)
    return dx if out is None else out


# ---- the machine ----

def set_num_threads(int n):
    if not fbn_set_num_threads(n):
        raise ValueError(f"the number of threads must be from 1 to {FBN_MAX_THREADS}, got {n}")


def get_num_threads():
    return fbn_get_num_threads()


def isa():
    return fbn_isa_name().decode()


cdef tuple tiers(bint need_runnable):
    names = []
    i = 0
    while fbn_tier_at(i) != NULL:
        if fbn_tier_at(i).runnable or (fbn_tier_at(i).built and not need_runnable):
            names.append(fbn_tier_at(i).name.decode())
        i += 1
    return tuple(names)


def isas():
    return tiers(True)


def built_isas():
    return tiers(False)


def known_isas():
    names = []
    i = 0
    while fbn_tier_at(i) != NULL:
        names.append(fbn_tier_at(i).name.decode())
        i += 1
    return tuple(names)


def use_isa(name):
    """Exactly this tier."""
    if choice("isa", name, known_isas()) not in isas():
        raise ValueError(f"isa must be one that this machine has, {', '.join(isas())}; got {name!r}")
    fbn_dispatch(name.encode())


def parallel_runtime():
    return fbn_parallel_runtime().decode()


def parallel_sees_openmp():
    return bool(fbn_parallel_sees_openmp())


def parallel_counters():
    cdef fbn_parallel_counters c = fbn_parallel_count()
    return {"parallel": c.parallel, "contended": c.contended, "helped": c.helped}


def machine():
    return {"l2": fbn_this_machine().l2, "l3": fbn_this_machine().l3, "follows": bool(fbn_this_machine().follows)}


def plan(str op, str dtype, str family, outer, channels, inner, threads, gated=False, adjacent=True,
         residual=False, machine=None, aligned=True, beside=None):
    """The plan's decisions for a call, without running it; beside and machine override what the kernels in use can do,
    and what `machine` returns."""
    cdef fbn_geometry g
    cdef fbn_call call
    cdef fbn_machine m = fbn_this_machine()[0]
    cdef fbn_plan p
    g.dtype = <fbn_dtype><int>DTYPES.index(dtype)
    g.family = <fbn_family><int>_FAMILIES.index(family)
    g.outer, g.channels, g.inner = outer, channels, inner
    call.op = _OPS.index(op)
    call.threads, call.gated, call.adjacent, call.aligned = threads, gated, adjacent, aligned
    call.beside = fbn_goes_beside(fbn_kernels_for(g.dtype), op == "backward") if beside is None else beside
    call.tensors = {"moments": 1, "backward": 3, "apply": 3}.get(op, 2) + bool(residual)
    if machine is not None:
        m.l2, m.l3 = machine["l2"], machine["l3"]
        m.follows = machine.get("follows", False)
    p = fbn_make_plan(&g, &call, &m)
    return {"team": p.team, "slab": p.slab, "slabs": p.slabs, "grain": p.grain, "tile": p.tile, "panel": p.panel,
            "side": p.side, "piece": p.piece, "images": p.images, "turn": p.turn, "ahead": p.ahead, "soon": p.soon,
            "fetch": p.fetch, "stream": bool(p.stream),
            "beside": bool(p.beside), "backwards": bool(p.backwards)}


def copy(src, dst, int threads):
    cdef cnp.ndarray a = view_of(src, "src")
    cdef cnp.ndarray b = view_of(dst, "dst")
    cdef int64_t size = cnp.PyArray_NBYTES(a)
    cdef const void *p = cnp.PyArray_DATA(a)
    cdef void *q = cnp.PyArray_DATA(b)
    cdef fbn_status status
    for name, array in (("src", a), ("dst", b)):
        if not (array.flags.c_contiguous or array.flags.f_contiguous):
            raise ValueError(f"{name} must be contiguous")
    if cnp.PyArray_NBYTES(b) != size:
        raise ValueError(f"dst must have the size of src, {size} bytes, got {b.nbytes}")
    if not PyArray_ISWRITEABLE(b):
        raise ValueError("dst must be writeable, got a read-only array")
    if (<uintptr_t>p) % 64 or (<uintptr_t>q) % 64:
        raise ValueError("src and dst must be aligned to 64 bytes")
    with nogil:
        status = fbn_copy(p, q, size, threads)
    check(status)


cdef int _init() except -1:
    cap = os.environ.get("FASTBN_ISA", "").strip()
    cdef bytes name = choice("FASTBN_ISA", cap, known_isas()).encode() if cap else None
    cdef const char *best = NULL
    fbn_machine_init(fbn_follows_runs())
    fbn_parallel_init()
    fbn_recycle_init()
    # The best tier up to that one, whether the machine has it or a lesser.
    if name is not None:
        best = name
    if not fbn_dispatch(best):
        raise ValueError(f"FASTBN_ISA must be one that this machine could have, such as {', '.join(isas())}; got {cap!r}")
    return 0


_init()
