/* How native.c looks at tensors: whether they are of the kind that a plan was made for, and where their memory is.
 *
 * It asks through DLPack's table of functions, which torch (2.10 and later) offers to C for this, a tenth of the time of
 * asking in Python. The declarations are the head of DLPack's header, version 1; other declarations would be another major
 * version. */

typedef struct {
    void *data;
    struct { int32_t type, index; } device;
    int32_t ndim;
    struct { uint8_t code, bits; uint16_t lanes; } dtype;
    int64_t *shape, *strides;
    uint64_t byte_offset;
} dl_tensor_t;
typedef struct {
    struct { uint32_t major, minor; } version;
    void *previous, *allocator, *from_object, *to_object;
    int (*view)(void *object, dl_tensor_t *out);
    void *stream;
} dl_api_t;

static const dl_api_t *dlpack;
static PyObject *grad_name, *is_neg;
static PyObject *tensor_types[2]; /* Tensor and Parameter: a subclass may have no memory of its own */
static int tensor_word;           /* of an object of these types, where it points to its tensor; 0 where that is not known */

static PyObject *use_dlpack(PyObject *module, PyObject *args) {
    (void)module;
    PyObject *capsule, *types[2], *object;
    unsigned long long tensor;
    if (!PyArg_ParseTuple(args, "OOOOK", &capsule, &types[0], &types[1], &object, &tensor)) return NULL;
    const dl_api_t *found = PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
    if (!found) return NULL;
    if (found->version.major != 1 || !found->view) Py_RETURN_FALSE;
    grad_name = PyUnicode_InternFromString("grad");
    is_neg = PyObject_GetAttrString(types[0], "is_neg");
    if (!grad_name || !is_neg) return NULL;
    for (int i = 0; i < 2; i++) tensor_types[i] = Py_NewRef(types[i]);
    tensor_word = 0;
    for (int word = 2; word < 4; word++)
        if (((const uintptr_t *)object)[word] == tensor) tensor_word = word;
    dlpack = found;
    Py_RETURN_TRUE;
}

static int is_tensor(PyObject *object) {
    PyObject *type = (PyObject *)Py_TYPE(object);
    return type == tensor_types[0] || type == tensor_types[1];
}

/* Whether an object is a tensor with memory of its own. */
static int see(PyObject *object, dl_tensor_t *out) {
    if (!is_tensor(object)) return 0;
    if (!dlpack->view(object, out)) return 1;
    PyErr_Clear();
    return 0;
}

static int64_t head_of(const dl_tensor_t *t) {
    int64_t device = (int64_t)t->device.type << 16 | (t->device.index & 0xffff);
    return device << 32 | (int64_t)t->ndim << 16 | t->dtype.bits << 8 | t->dtype.code;
}

static int64_t ndim_of(int64_t head) { return head >> 16 & 0xff; } /* torch has at most 64 */

static int64_t address_of(const dl_tensor_t *t) { return (int64_t)(intptr_t)t->data + (int64_t)t->byte_offset; }

/* describe(tensors): device, dtype, shape and strides of each as integers, which `look` compares with. */
static PyObject *describe(PyObject *module, PyObject *tensors) {
    (void)module;
    Py_ssize_t count = PyList_Size(tensors), length = 0, at = 0;
    int64_t *words = NULL;
    for (Py_ssize_t i = 0; i < count; i++) {
        dl_tensor_t t;
        if (!see(PyList_GetItem(tensors, i), &t)) {
            free(words);
            return PyErr_Format(PyExc_ValueError, "entry %zd is no tensor with memory of its own", i);
        }
        if (at + 1 + 2 * t.ndim > length) {
            length = 2 * length + 1 + 2 * t.ndim;
            int64_t *longer = realloc(words, length * sizeof(int64_t));
            if (!longer) free(words);
            words = longer;
            if (!words) return PyErr_NoMemory();
        }
        words[at++] = head_of(&t);
        for (int d = 0; d < t.ndim; d++) words[at++] = t.shape[d];
        for (int d = 0; d < t.ndim; d++) words[at++] = t.strides[d];
    }
    PyObject *result = count < 0 ? NULL : PyBytes_FromStringAndSize((char *)words, at * sizeof(int64_t));
    free(words);
    return result;
}

typedef struct { const int64_t *at, *end; } kept_t;

/* Whether torch negates the elements of a tensor as it reads them: a part of a conjugate may be laid so. */
static int is_negated(PyObject *tensor) {
    PyObject *answer = PyObject_CallFunctionObjArgs(is_neg, tensor, NULL);
    int negated = answer != Py_False;
    Py_XDECREF(answer);
    return negated;
}

/* Compare a tensor with the next description; its address, or -1 where it is of another kind. None has the address 0, and
 * no elements have the address 1: there is something, but nothing to read. `before` is the address in the step before: the
 * dearest question is asked of tensors that moved, or that hold one element: parts of complex numbers lie apart, and no
 * others of them look like a dense tensor. */
static int64_t match(kept_t *kept, PyObject *tensor, int64_t before) {
    int64_t numel = 1;
    const int64_t *at = kept->at;
    if (!tensor || at >= kept->end || kept->end - at < 1 + 2 * ndim_of(at[0])) return -1;
    int64_t ndim = ndim_of(at[0]);
    kept->at += 1 + 2 * ndim;
    if (tensor == Py_None) return 0;
    dl_tensor_t t;
    if (!see(tensor, &t) || head_of(&t) != at[0]) return -1;
    for (int64_t d = 0; d < ndim; d++) {
        if (t.shape[d] != at[1 + d] || t.strides[d] != at[1 + ndim + d]) return -1;
        numel *= t.shape[d];
    }
    int64_t address = numel ? address_of(&t) : 1;
    return !address || ((address != before || numel == 1) && is_negated(tensor)) ? -1 : address;
}

enum { AHEAD = 32 }; /* objects */

/* Ask for memory that is read soon: of an object, then of the tensor that it points to, then of its storage. */
static void fetch_ahead(PyObject *const *at) {
    KEPT;
    PyObject *far = at[AHEAD], *near = at[AHEAD / 2], *next = at[AHEAD / 4];
    if (far) __builtin_prefetch(far);
    if (!tensor_word) return;
    if (near && is_tensor(near))
        for (int line = 0; line < 3; line++) __builtin_prefetch(((const char **)near)[tensor_word] + 64 * line);
    if (!next || !is_tensor(next)) return;
    const char *storage = ((const char ***)next)[tensor_word][2]; /* an address of anything else does no harm */
    __builtin_prefetch(storage);
    __builtin_prefetch(storage + 64);
}

/* look(params, grads, states, keys, columns, kept, addresses): see look.py. */
static PyObject *look(PyObject *module, PyObject *args) {
    (void)module;
    PyObject *params, *grads, *states, *keys, *columns;
    Py_buffer described, addresses;
    if (!PyArg_ParseTuple(args, "O!O!O!O!O!y*w*", &PyList_Type, &params, &PyList_Type, &grads, &PyList_Type, &states,
                          &PyTuple_Type, &keys, &PyList_Type, &columns, &described, &addresses))
        return NULL;
    Py_ssize_t rows = PyList_Size(params), key_count = PyTuple_Size(keys), column_count = PyList_Size(columns);
    int64_t *address = addresses.buf;
    kept_t kept = {described.buf, (const int64_t *)described.buf + described.len / (Py_ssize_t)sizeof(int64_t)};
    int fits = PyList_Size(grads) == rows && PyList_Size(states) == rows &&
               addresses.len == (Py_ssize_t)sizeof(int64_t) * rows * (2 + key_count);
    /* Numbers of the rows: the views of one vector that part.py made, where it made them. */
    struct { PyObject *key, *views; long long base, size; } column[STATES];
    fits = fits && column_count <= STATES;
    for (Py_ssize_t c = 0; fits && c < column_count; c++)
        fits = PyArg_ParseTuple(PyList_GetItem(columns, c), "OO!LL", &column[c].key, &PyList_Type, &column[c].views,
                                &column[c].base, &column[c].size);
    /* All objects first, row by row: what is known ahead can be fetched ahead, for at a thousand small tensors a step waits
     * for little else than the memory of Python's objects. */
    Py_ssize_t width = 2 + key_count + column_count, total = fits ? rows * width : 0;
    PyObject **objects = calloc(total + AHEAD, sizeof *objects);
    if (!objects) PyErr_NoMemory();
    fits = fits && objects;
    for (Py_ssize_t i = 0; fits && i < rows; i++) {
        PyObject *state = PyList_GetItem(states, i), **row = objects + i * width;
        if (i + 4 < rows) __builtin_prefetch(PyList_GetItem(states, i + 4));
        row[0] = PyList_GetItem(params, i);
        row[1] = PyList_GetItem(grads, i);
        for (Py_ssize_t k = 0; k < key_count; k++) row[2 + k] = PyDict_GetItemWithError(state, PyTuple_GetItem(keys, k));
        for (Py_ssize_t c = 0; c < column_count; c++) row[2 + key_count + c] = PyDict_GetItemWithError(state, column[c].key);
        /* Held, for a question to torch may run code of the user's (a TorchFunctionMode). */
        for (Py_ssize_t k = 0; k < width; k++) Py_XINCREF(row[k]);
    }
    long long live = 0;
    for (Py_ssize_t i = 0; fits && i < rows; i++) {
        PyObject **row = objects + i * width;
        for (Py_ssize_t k = 0; fits && k < 2 + key_count; k++) {
            fetch_ahead(row + k);
            int64_t *found = address + k * rows + i;
            *found = match(&kept, row[k], *found);
            fits = *found > 0 || (!*found && k == 1);
        }
        live += address[rows + i] != 0;
        for (Py_ssize_t c = 0; fits && c < column_count; c++) {
            fetch_ahead(row + 2 + key_count + c);
            dl_tensor_t t;
            PyObject *view = row[2 + key_count + c];
            fits = view && view == PyList_GetItem(column[c].views, i) && see(view, &t) &&
                   address_of(&t) == column[c].base + i * column[c].size;
        }
    }
    for (Py_ssize_t i = 0; objects && i < total; i++) Py_XDECREF(objects[i]);
    free(objects);
    PyBuffer_Release(&described);
    PyBuffer_Release(&addresses);
    if (PyErr_Occurred()) return NULL;
    return PyLong_FromLongLong(fits ? live : -1);
}

/* read_grads(params): the list of their gradients, and whether all tensors have memory of their own. */
static PyObject *read_grads(PyObject *module, PyObject *params) {
    (void)module;
    int plain = 1;
    Py_ssize_t count = PyList_Size(params);
    PyObject *grads = count < 0 ? NULL : PyList_New(count);
    for (Py_ssize_t i = 0; grads && i < count; i++) {
        PyObject *ahead[AHEAD + 1] = {0}, *param = PyList_GetItem(params, i);
        for (int distance = AHEAD; distance >= AHEAD / 4; distance /= 2)
            if (i + distance < count) ahead[distance] = PyList_GetItem(params, i + distance);
        fetch_ahead(ahead);
        PyObject *grad = PyObject_GetAttr(param, grad_name);
        plain = plain && is_tensor(param) && grad && (grad == Py_None || is_tensor(grad));
        if (!grad || PyList_SetItem(grads, i, grad)) Py_CLEAR(grads);
    }
    return grads ? Py_BuildValue("NO", grads, plain ? Py_True : Py_False) : NULL;
}
