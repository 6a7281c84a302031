// Whether tensors are as they were: what seen.py asks one by one, in one pass.
//
// Of torch it needs c10 alone, which compiles in two seconds, a sixth of what python_variable.h takes. So it says itself
// where the Python object of a tensor has its TensorImpl (2.13, 2.14), and asks `_cdata` whether that is so. If it is
// not, `seen` raises, and what is in Python goes on.
//
// In a model the caches are cold here: what was is kept in two blocks, read in order. To ask for memory ahead gained
// nothing.

#include <Python.h>
#include <c10/core/TensorImpl.h>

#include <exception>
#include <memory>
#include <vector>

namespace {

PyObject *tensor_class, *parameter_class;

constexpr char name[] = "hopkit.seen";

struct Was {
  PyObject* object;  // not held: only compared with what is given
  PyTypeObject* type;
  const c10::TensorImpl* impl;
  const c10::StorageImpl* storage;
  const void* memory;
  c10::DispatchKeySet keys;
  int64_t offset;
  uint32_t version;
  c10::ScalarType dtype;
  c10::Device device;
  bool requires_grad;
};

struct All {
  std::vector<Was> tensors;
  std::vector<int64_t> numbers;  // of each tensor: dimensions, sizes, strides
};

const c10::TensorImpl* impl_of(PyObject* tensor) {
  struct Object {
    PyObject_HEAD
    const c10::TensorImpl* impl;
  };
  return reinterpret_cast<const Object*>(tensor)->impl;
}

// Whether this is a tensor that can be looked at; otherwise a Python exception is set.
bool plain(PyObject* object) {
  const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  if (type == tensor_class || type == parameter_class) {
    PyObject* address = PyObject_GetAttrString(object, "_cdata");
    const void* found = address == nullptr ? nullptr : PyLong_AsVoidPtr(address);
    Py_XDECREF(address);
    if (PyErr_Occurred() != nullptr) {
      return false;
    }
    const c10::TensorImpl* impl = impl_of(object);
    if (found == impl && impl->has_storage() && impl->version_counter().enabled()) {
      return true;
    }
  }
  PyErr_SetString(PyExc_TypeError, "no plain tensor, or of another torch");
  return false;
}

void add(All& all, PyObject* object) {
  const c10::TensorImpl& impl = *impl_of(object);
  const c10::StorageImpl* storage = impl.unsafe_storage().unsafeGetStorageImpl();
  const auto sizes = impl.sizes(), strides = impl.strides();
  all.numbers.push_back(impl.dim());
  all.numbers.insert(all.numbers.end(), sizes.begin(), sizes.end());
  all.numbers.insert(all.numbers.end(), strides.begin(), strides.end());
  all.tensors.push_back(
      {object, Py_TYPE(object), &impl, storage, storage->data(), impl.key_set(), impl.storage_offset(),
       impl.version_counter().current_version(), impl.dtype().toScalarType(), impl.device(), impl.requires_grad()});
}

// Keys come first: what has others may have neither a storage nor a version.
bool is(const Was& was, const int64_t*& numbers, PyObject* object) {
  if (object != was.object || Py_TYPE(object) != was.type || impl_of(object) != was.impl) {
    return false;
  }
  const c10::TensorImpl& impl = *was.impl;
  const size_t dim = *numbers++;
  const c10::IntArrayRef sizes(numbers, dim), strides(numbers + dim, dim);
  numbers += 2 * dim;
  return impl.key_set() == was.keys && impl.unsafe_storage().unsafeGetStorageImpl() == was.storage &&
      was.storage->data() == was.memory && impl.version_counter().current_version() == was.version &&
      impl.storage_offset() == was.offset && impl.dtype().toScalarType() == was.dtype &&
      impl.device() == was.device && impl.requires_grad() == was.requires_grad && impl.sizes() == sizes &&
      impl.strides() == strides;
}

PyObject* holds(PyObject* self, PyObject* tensors) {
  if (!PyTuple_Check(tensors)) {
    PyErr_SetString(PyExc_TypeError, "a tuple of tensors is wanted");
    return nullptr;
  }
  const auto& all = *static_cast<All*>(PyCapsule_GetPointer(self, name));
  const size_t count = all.tensors.size();
  bool same = static_cast<size_t>(PyTuple_GET_SIZE(tensors)) == count;
  const int64_t* numbers = all.numbers.data();
  try {
    for (size_t i = 0; same && i < count; i++) {
      same = is(all.tensors[i], numbers, PyTuple_GET_ITEM(tensors, i));
    }
  } catch (const std::exception&) {  // what cannot be asked any more is not as it was
    same = false;
  }
  return PyBool_FromLong(same);
}

PyMethodDef check = {"holds", holds, METH_O, "Whether these are the same tensors, and as they were."};

PyObject* seen(PyObject*, PyObject* tensors) {
  if (!PyTuple_Check(tensors)) {
    PyErr_SetString(PyExc_TypeError, "a tuple of tensors is wanted");
    return nullptr;
  }
  try {
    auto all = std::make_unique<All>();
    all->tensors.reserve(PyTuple_GET_SIZE(tensors));
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tensors); i++) {
      if (!plain(PyTuple_GET_ITEM(tensors, i))) {
        return nullptr;
      }
      add(*all, PyTuple_GET_ITEM(tensors, i));
    }
    all->numbers.shrink_to_fit();
    PyObject* kept = PyCapsule_New(all.get(), name, [](PyObject* capsule) {
      delete static_cast<All*>(PyCapsule_GetPointer(capsule, name));
    });
    if (kept == nullptr) {
      return nullptr;
    }
    all.release();
    PyObject* found = PyCFunction_New(&check, kept);
    Py_DECREF(kept);
    return found;
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

// A class, for as long as the process lives.
PyObject* taken(const char* place, const char* wanted) {
  PyObject* module = PyImport_ImportModule(place);
  PyObject* found = module == nullptr ? nullptr : PyObject_GetAttrString(module, wanted);
  Py_XDECREF(module);
  return found;
}

PyMethodDef methods[] = {
    {"seen", seen, METH_O, "A function that tells whether a tuple is this one of plain tensors, as they are now."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "seen", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit_seen() {
  tensor_class = taken("torch", "Tensor");
  parameter_class = tensor_class == nullptr ? nullptr : taken("torch.nn", "Parameter");
  if (parameter_class == nullptr) {
    return nullptr;
  }
  PyObject* module = PyModule_Create(&definition);
#ifdef Py_GIL_DISABLED
  if (module != nullptr) PyUnstable_Module_SetGIL(module, Py_MOD_GIL_NOT_USED);  // it reads, as torch does
#endif
  return module;
}
