// The extension module. Importing or loading it registers the kernels of cpu/ and cuda/ for the
// operators whose schemas, reference implementations and gradients are in ops.py.
#ifndef Py_LIMITED_API // newer versions of PyTorch define it
#define Py_LIMITED_API 0x030a0000
#endif
#include <Python.h>

extern "C" PyObject* PyInit__C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}
