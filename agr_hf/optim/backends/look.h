/* How native.c looks at tensors: whether they are of the kind that a plan was made for, and where their memory is.
 *
 * It asks torch's functions for C (torch/csrc/inductor/aoti_torch/c/shim.h), whose interface is kept from version to version,
 * a tenth of the time of asking in Python. What they ask is the at::Tensor in an object of Python, whose place `use_torch`
 * learns from one. */

typedef struct { int64_t kind, ndim, *shape, *strides, address; } seen_t;

static struct {
    int32_t (*layout)(void *, int32_t *), (*dtype)(void *, int32_t *), (*device_type)(void *, int32_t *);
    int32_t (*device_index)(void *, int32_t *);
    int32_t (*dim)(void *, int64_t *), (*sizes)(void *, int64_t **), (*strides)(void *, int64_t **);
    int32_t (*data_ptr)(void *, void **);
} ask;
static int32_t strided, cpu; /* layout and device, as torch numbers them */
static PyObject *grad_name, *is_neg;
static PyObject *tensor_types[2]; /* Tensor and Parameter: a subclass may have no memory of its own */
static int tensor_word;           /* of an object of these types, where its at::Tensor is */

/* use_torch(path, Tensor, Parameter, object, tensor): see look.py. */
static PyObject *use_torch(PyObject *module, PyObject *args) {
    (void)module;
    const char *path;
    PyObject *types[2], *object;
    unsigned long long tensor;
    if (!PyArg_ParseTuple(args, "sOOOK", &path, &types[0], &types[1], &object, &tensor)) return NULL;
    void *library = dlopen(path, RTLD_NOLOAD | RTLD_NOW);
    if (!library) Py_RETURN_FALSE;
    int32_t (*number_of[2])(void);
    struct { void *pointer; const char *name; } functions[] = {
        {&ask.layout, "get_layout"}, {&ask.dtype, "get_dtype"}, {&ask.device_type, "get_device_type"},
        {&ask.device_index, "get_device_index"}, {&ask.dim, "get_dim"}, {&ask.sizes, "get_sizes"},
        {&ask.strides, "get_strides"}, {&ask.data_ptr, "get_data_ptr"}, {&number_of[0], "layout_strided"},
        {&number_of[1], "device_type_cpu"},
    };
    for (size_t i = 0; i < sizeof functions / sizeof *functions; i++) {
        char name[64] = "aoti_torch_";
        void *found = dlsym(library, strcat(name, functions[i].name));
        if (!found) Py_RETURN_FALSE;
        *(void **)functions[i].pointer = found;
    }
    strided = number_of[0]();
    cpu = number_of[1]();
    grad_name = PyUnicode_InternFromString("grad");
    is_neg = PyObject_GetAttrString(types[0], "is_neg");
    if (!grad_name || !is_neg) return NULL;
    tensor_word = 0;
    for (int word = 2; word < 4; word++)
        if (((const uintptr_t *)object)[word] == tensor) tensor_word = word;
    for (int i = 0; i < 2; i++) tensor_types[i] = Py_NewRef(types[i]);
    return PyBool_FromLong(tensor_word != 0);
}

static int is_tensor(PyObject *object) {
    PyObject *type = (PyObject *)Py_TYPE(object);
    return type == tensor_types[0] || type == tensor_types[1];
}

/* Whether an object is a tensor with memory of its own. */
static int see(PyObject *object, seen_t *out) {
    if (!is_tensor(object)) return 0;
    void *tensor = (void **)object + tensor_word, *data;
    int32_t layout, dtype, device, index = -1;
    if (ask.layout(tensor, &layout) || layout != strided || ask.dtype(tensor, &dtype) || ask.device_type(tensor, &device) ||
        (device != cpu && ask.device_index(tensor, &index)) || ask.dim(tensor, &out->ndim) ||
        ask.sizes(tensor, &out->shape) || ask.strides(tensor, &out->strides) || ask.data_ptr(tensor, &data))
        return 0;
    out->kind = (int64_t)dtype << 32 | (int64_t)device << 16 | (uint16_t)index;
    out->address = (intptr_t)data;
    return 1;
}

/* What tensors have to look like: for each the place of its description, then descriptions, each of them once. */
typedef struct { const int64_t *words; int64_t length; } kept_t;

static int64_t length_of(const int64_t *description) { return 2 + 2 * description[1]; }

static int matches(const seen_t *t, const int64_t *description) {
    if (t->kind != description[0] || t->ndim != description[1]) return 0;
    size_t bytes = t->ndim * sizeof(int64_t);
    return !memcmp(t->shape, description + 2, bytes) && !memcmp(t->strides, description + 2 + t->ndim, bytes);
}

/* describe(tensors): device, dtype, shape and strides of each as integers, which `look` compares with. */
static PyObject *describe(PyObject *module, PyObject *tensors) {
    (void)module;
    Py_ssize_t count = PyList_Size(tensors);
    int64_t length = count, room = 0, *words = NULL;
    for (Py_ssize_t i = 0; i < count; i++) {
        seen_t t;
        if (!see(PyList_GetItem(tensors, i), &t)) {
            free(words);
            return PyErr_Format(PyExc_ValueError, "entry %zd is no tensor with memory of its own", i);
        }
        if (length + 2 + 2 * t.ndim > room) {
            room = 2 * length + 2 + 2 * t.ndim;
            int64_t *longer = realloc(words, room * sizeof(int64_t));
            if (!longer) free(words);
            words = longer;
            if (!words) return PyErr_NoMemory();
        }
        int64_t at = count;
        while (at < length && !matches(&t, words + at)) at += length_of(words + at);
        words[i] = at;
        if (at < length) continue;
        words[at] = t.kind;
        words[at + 1] = t.ndim;
        memcpy(words + at + 2, t.shape, t.ndim * sizeof(int64_t));
        memcpy(words + at + 2 + t.ndim, t.strides, t.ndim * sizeof(int64_t));
        length += length_of(words + at);
    }
    PyObject *result = count < 0 ? NULL : PyBytes_FromStringAndSize((char *)words, length * sizeof(int64_t));
    free(words);
    return result;
}

/* Whether torch negates the elements of a tensor as it reads them: a part of a conjugate may be laid so. */
static int is_negated(PyObject *tensor) {
    PyObject *answer = PyObject_CallFunctionObjArgs(is_neg, tensor, NULL);
    int negated = answer != Py_False;
    Py_XDECREF(answer);
    return negated;
}

enum { AHEAD = 16 }; /* objects */

/* Ask for memory that is read soon: of an object, then of the tensor that it points to, then of its storage. */
static void fetch_ahead(PyObject *const *at) {
    KEPT;
    PyObject *far = at[AHEAD], *near = at[AHEAD / 2], *next = at[AHEAD / 4];
    if (far) __builtin_prefetch(far);
    if (near && is_tensor(near))
        for (int line = 0; line < 3; line++) __builtin_prefetch(((const char **)near)[tensor_word] + 64 * line);
    if (!next || !is_tensor(next)) return;
    const char *storage = ((const char ***)next)[tensor_word][2]; /* an address of anything else does no harm */
    __builtin_prefetch(storage);
    __builtin_prefetch(storage + 64);
}

/* Compare a tensor with its description; its address, or -1 where it is of another kind. None has the address 0, and no
 * elements have the address 1: there is something, but nothing to read. `before` is the address in the step before: the
 * dearest question is asked of tensors that moved, or that hold one element: parts of complex numbers lie apart, and no
 * others of them look like a dense tensor. */
static int64_t match(const kept_t *kept, int64_t entry, PyObject *tensor, int64_t before) {
    if (!tensor || entry >= kept->length) return -1;
    if (tensor == Py_None) return 0;
    int64_t at = kept->words[entry], numel = 1;
    seen_t t;
    if (at < 0 || at + 2 > kept->length || at + length_of(kept->words + at) > kept->length) return -1;
    if (!see(tensor, &t) || !matches(&t, kept->words + at)) return -1;
    for (int64_t d = 0; d < t.ndim; d++) numel *= t.shape[d];
    int64_t address = numel ? t.address : 1;
    return !address || ((address != before || numel == 1) && is_negated(tensor)) ? -1 : address;
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
    const kept_t kept = {described.buf, described.len / (Py_ssize_t)sizeof(int64_t)};
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
            *found = match(&kept, i * (2 + key_count) + k, row[k], *found);
            fits = *found > 0 || (!*found && k == 1);
        }
        live += address[rows + i] != 0;
        for (Py_ssize_t c = 0; fits && c < column_count; c++) {
            fetch_ahead(row + 2 + key_count + c);
            seen_t t;
            PyObject *view = row[2 + key_count + c];
            fits = view && view == PyList_GetItem(column[c].views, i) && see(view, &t) &&
                   t.address == column[c].base + i * column[c].size;
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
