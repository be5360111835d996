// Every native schema of xdfast on one screen. Implementations register themselves next to their code
// (TORCH_LIBRARY_IMPL in cpu/*.cpp); the public ops, with autograd and fake kernels, are defined in Python
// (xdfast/ops).
#include <Python.h>

#include <ATen/Version.h>
#include <torch/library.h>

#include <string>

#include "cpu/gemm.h"

TORCH_LIBRARY(xdfast_c, m) {
  // student, teacher [N, D] float32|bfloat16|float16, any strides -> scalars float32; gradients [N, D] in the inputs'
  // dtype, [0, 0] where not needed. statistics [4, D] and gram [N, N] as rsd_prepare returns them for this teacher.
  m.def(
      "rsd_loss(Tensor student, Tensor teacher, float kappa, float eps, bool eps_on_variance, bool bf16, float scale, "
      "bool need_student, bool need_teacher, Tensor? statistics, Tensor? gram) -> "
      "(Tensor loss, Tensor invariance, Tensor decorrelation, Tensor mean_diagonal, Tensor grad_student, Tensor "
      "grad_teacher)");
  // statistics [4, D] float32: mean = hi + lo, 1 / std, ratio; gram = Z Z^T / D [N, N] if N < D, else [0, 0].
  m.def("rsd_prepare(Tensor teacher, float eps, bool eps_on_variance, bool bf16) -> (Tensor statistics, Tensor gram)");
  // The instruction set the kernels run with, as ATen detects it ("AVX512", "AVX2", "DEFAULT", ...).
  m.def("cpu_capability() -> str", []() { return std::string(at::get_cpu_capability()); });
  // Where the matrix products on the CPU come from, and whether bfloat16 products are faster than float32 here.
  m.def("cpu_gemm() -> str", []() { return std::string(xdfast::gemm_source()); });
  m.def("cpu_has_bf16_gemm() -> bool", []() { return xdfast::has_bf16_gemm(); });
}

// `import xdfast._C` only loads the library and so runs the registrations; the module itself is empty.
extern "C" PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", "Registers torch.ops.xdfast_c", -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
