// Every native schema of xdfast on one screen. Implementations register themselves next to their code
// (TORCH_LIBRARY_IMPL in cpu/*.cpp); the public ops, with autograd and fake kernels, are defined in Python
// (xdfast/ops).
#include <Python.h>

#include <ATen/Version.h>
#include <torch/library.h>

#include <string>

#include "cpu/gemm.h"
#include "cpu/panels.h"

TORCH_LIBRARY(xdfast_c, m) {
  // student, teacher [N, D] float32|bfloat16|float16, any strides -> scalars float32; gradients [N, D] in the inputs'
  // dtype, [0, 0] where not needed. statistics [4, D] and gram [N, N] as rsd_prepare returns them for this teacher.
  m.def(
      "rsd_loss(Tensor student, Tensor teacher, float kappa, float eps, bool eps_on_variance, bool bf16, float scale, "
      "bool need_student, bool need_teacher, Tensor? statistics, Tensor? gram) -> "
      "(Tensor loss, Tensor invariance, Tensor decorrelation, Tensor mean_diagonal, Tensor grad_student, Tensor "
      "grad_teacher)");
  // The same with its gradient rule; gradients for what requires one.
  m.def(
      "rsd_loss_autograd(Tensor student, Tensor teacher, float kappa, float eps, bool eps_on_variance, bool bf16, "
      "float scale, Tensor? statistics, Tensor? gram) -> "
      "(Tensor loss, Tensor invariance, Tensor decorrelation, Tensor mean_diagonal)");
  // statistics [4, D] float32: mean = hi + lo, 1 / std, ratio; gram = Z Z^T / D [N, N] if N < D, else [0, 0].
  m.def("rsd_prepare(Tensor teacher, float eps, bool eps_on_variance, bool bf16) -> (Tensor statistics, Tensor gram)");
  // Routed layers (cpu/routed.cpp, cuda/route_plan.cu). gates [units, layers, branches]; see xdfast/ops/route.
  m.def(
      "route_plan_(Tensor gates, Tensor? force, float threshold, bool hard, int rows_per_unit, int samples, "
      "Tensor(a!) gate, Tensor(b!) index, Tensor(c!) count, Tensor(d!) offsets, Tensor(e!) invalid) -> ()");
  // Compact rows of the first `units` entries of index; norm: 0 LayerNorm, 1 RMSNorm, 2 none. statistics [rows, 2] =
  // (mean, 1 / std) if save, else [0, 2]. Vectors are float32.
  m.def(
      "gather_norm(Tensor x, Tensor? weight, Tensor? bias, Tensor index, int units, int rows_per_unit, int norm, "
      "float eps, bool save) -> (Tensor y, Tensor statistics)");
  m.def("scatter_add_(Tensor(a!) x, Tensor y, Tensor? gate, Tensor index, int units, int rows_per_unit) -> ()");
  m.def(
      "norm_backward_(Tensor dy, Tensor x, Tensor? weight, Tensor statistics, Tensor index, int units, "
      "int rows_per_unit, int norm, bool weight_wanted, bool bias_wanted, Tensor(a!) dx) -> "
      "(Tensor weight_sum, Tensor bias_sum)");
  m.def("gather(Tensor x, Tensor? gate, Tensor index, int units, int rows_per_unit) -> Tensor");
  m.def("row_dots(Tensor a, Tensor b) -> Tensor");
  m.def("swiglu(Tensor a) -> Tensor");
  // Softmax attention inside each sample's rows: q [M, H, d], k, v [M', H', d] with H' dividing H, rows in any
  // distance; offsets [B + 1] int32, cumulative. Causal needs as many queries as keys. lse [M, H] float32, natural
  // logarithm.
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, Tensor offsets_q, Tensor offsets_k, float scale, bool causal) -> "
      "(Tensor out, Tensor lse)");
  // act(norm(conv(x))) (1 + scale) + shift + residual along H of x [B, H, I] (cpu/conv_rows.cpp), for inference: panels
  // [ceil(O / 16), kernel * I, 16] and bias [ceil(O / 16) * 16] as xdfast/ops/conv_rows packs them; groups 0: no
  // norm and no Mish; film [B, F] with scale - 1 and shift, O each, from film_offset on.
  m.def(
      "conv_rows(Tensor x, Tensor panels, Tensor? bias, int outputs, int kernel, int stride, int padding, int groups, "
      "Tensor? norm_weight, Tensor? norm_bias, float eps, Tensor? film, int film_offset, Tensor? residual) -> Tensor");
  // The instruction set the kernels run with, as ATen detects it ("AVX512", "AVX2", "DEFAULT", ...).
  m.def("cpu_capability() -> str", []() { return std::string(at::get_cpu_capability()); });
  // Where the matrix products on the CPU come from, and whether bfloat16 products are faster than float32 here.
  m.def("cpu_gemm() -> str", []() {
    return std::string(xdfast::gemm_source()) + (xdfast::panel_products() ? ", of RSD with N < D by own kernels" : "");
  });
  m.def("cpu_has_bf16_gemm() -> bool", []() { return xdfast::has_bf16_gemm(); });
}

// `import xdfast._C` only loads the library and so runs the registrations; the module itself is empty.
extern "C" PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", "Registers torch.ops.xdfast_c", -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
