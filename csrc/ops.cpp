// Every native schema of xdfast on one screen. Implementations register themselves next to their code
// (TORCH_LIBRARY_IMPL in cpu/*.cpp); the public ops, with autograd and fake kernels, are defined in Python (xdfast/ops).
#include <Python.h>

#include <ATen/Version.h>
#include <torch/library.h>

#include <string>

TORCH_LIBRARY(xdfast_c, m) {
  // x [N, D] float32|bfloat16|float16, any strides -> z [N, D] float32 contiguous, inv [D] float32, ratio [D] float32
  m.def("rsd_standardize(Tensor x, float eps) -> (Tensor z, Tensor inv, Tensor ratio)");
  // The instruction set the kernels run with, as ATen detects it ("AVX512", "AVX2", "DEFAULT", ...).
  m.def("cpu_capability() -> str", []() { return std::string(at::get_cpu_capability()); });
}

// `import xdfast._C` only loads the library and so runs the registrations; the module itself is empty.
extern "C" PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", "Registers torch.ops.xdfast_c", -1, nullptr,
                               nullptr,               nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
