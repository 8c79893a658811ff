// The Python module `seqrec_fast._C`. It has no functions: importing it loads the shared library, whose static
// initialisers register the native implementations with the dispatcher. Schemas are defined from Python
// (seqrec_fast/_schema.py), so a library that fails to load leaves every operator callable through `reference`.
#include <Python.h>

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
