// The CUDA operators' library as a module of Python: `import mpma_ext._C_cuda` loads it, and its static initialisers
// register the kernels of the other files.

#include <Python.h>

PyMODINIT_FUNC PyInit__C_cuda() {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C_cuda", "MPMA's CUDA operators", -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
