// The loss and its gradient rule in C++: through Python's autograd.Function a small loss costs more than its
// arithmetic. The same rules as xdfast/ops/rsd/op.py, which the compiler, transforms and tensor subclasses see instead.
#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

namespace xdfast {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using Parts = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // loss, invariance, decorrelation, mean diagonal
using AllParts = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;  // and both gradients

struct Settings {
  double kappa, eps, scale;
  bool eps_on_variance;
};

AllParts compute(
    const Tensor& student, const Tensor& teacher, const Settings& o, bool bf16, bool need_student, bool need_teacher,
    const std::optional<Tensor>& statistics, const std::optional<Tensor>& gram) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("xdfast_c::rsd_loss", "")
                             .typed<AllParts(
                                 const Tensor&, const Tensor&, double, double, bool, bool, double, bool, bool,
                                 const std::optional<Tensor>&, const std::optional<Tensor>&)>();
  return op.call(
      student, teacher, o.kappa, o.eps, o.eps_on_variance, bf16, o.scale, need_student, need_teacher, statistics, gram);
}

Tensor standardized(const Tensor& x, const Settings& o) {
  const Tensor centred = x - x.mean(0);
  // std() and not the root of var(): in a constant column its gradient is 0 and not NaN.
  return o.eps_on_variance ? centred / (x.var(0, /*unbiased=*/false) + o.eps).sqrt()
                           : centred / (x.std(0, /*unbiased=*/false) + o.eps);
}

// The equation, differentiable to any order.
Tensor reference(const Tensor& student, const Tensor& teacher, const Settings& o) {
  const Tensor s = standardized(student.to(at::kFloat), o), t = standardized(teacher.to(at::kFloat), o);
  const Tensor p = t.t().mm(s) / s.size(0);
  const Tensor diagonal = p.diagonal();
  const Tensor off = (p - p.diagonal().diag()).square().sum();
  return ((diagonal - 1).square().sum() + o.kappa * off) * o.scale;
}

class RSDFunction : public torch::autograd::Function<RSDFunction> {
 public:
  static variable_list forward(
      AutogradContext* ctx, const Tensor& student, const Tensor& teacher, const Settings& o, bool bf16,
      const std::optional<Tensor>& statistics, const std::optional<Tensor>& gram) {
    const bool need_student = student.requires_grad(), need_teacher = teacher.requires_grad();
    at::AutoDispatchBelowADInplaceOrView below;
    auto [loss, invariance, decorrelation, diagonal, grad_s, grad_t] =
        compute(student, teacher, o, bf16, need_student, need_teacher, statistics, gram);
    ctx->save_for_backward({student, teacher, grad_s, grad_t});
    ctx->saved_data["settings"] = std::vector<double>{o.kappa, o.eps, o.scale, o.eps_on_variance ? 1.0 : 0.0};
    ctx->mark_non_differentiable({invariance, decorrelation, diagonal});
    ctx->set_materialize_grads(false);
    return {loss, invariance, decorrelation, diagonal};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list out(6);
    const Tensor& grad = grads[0];
    if (!grad.defined()) return out;
    const variable_list saved = ctx->get_saved_variables();
    const bool need_student = saved[2].numel() > 0, need_teacher = saved[3].numel() > 0;
    if (at::GradMode::is_enabled()) {
      // create_graph=True: the saved gradient is a number to autograd, its own derivative would be silently lost.
      const auto settings = ctx->saved_data["settings"].toDoubleVector();
      const Settings o{settings[0], settings[1], settings[2], settings[3] != 0.0};
      c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
      variable_list wanted;
      if (need_student) wanted.push_back(saved[0]);
      if (need_teacher) wanted.push_back(saved[1]);
      const variable_list exact = torch::autograd::grad(
          {reference(saved[0], saved[1], o)}, wanted, {}, /*retain_graph=*/true, /*create_graph=*/true);
      if (need_student) out[0] = exact.front() * grad.to(exact.front().scalar_type());
      if (need_teacher) out[1] = exact.back() * grad.to(exact.back().scalar_type());
      return out;
    }
    const bool is_one =
        grad.item<float>() == 1.0f;  // then no pass over the saved gradient; autograd copies what others hold
    if (need_student) out[0] = is_one ? saved[2] : saved[2] * grad.to(saved[2].scalar_type());
    if (need_teacher) out[1] = is_one ? saved[3] : saved[3] * grad.to(saved[3].scalar_type());
    return out;
  }
};

Parts without_gradient(
    const Tensor& student, const Tensor& teacher, double kappa, double eps, bool eps_on_variance, bool bf16,
    double scale, const std::optional<Tensor>& statistics, const std::optional<Tensor>& gram) {
  auto [loss, invariance, decorrelation, diagonal, grad_s, grad_t] =
      compute(student, teacher, Settings{kappa, eps, scale, eps_on_variance}, bf16, false, false, statistics, gram);
  return {loss, invariance, decorrelation, diagonal};
}

Parts with_gradient(
    const Tensor& student, const Tensor& teacher, double kappa, double eps, bool eps_on_variance, bool bf16,
    double scale, const std::optional<Tensor>& statistics, const std::optional<Tensor>& gram) {
  if (!at::GradMode::is_enabled() || !(student.requires_grad() || teacher.requires_grad())) {
    at::AutoDispatchBelowADInplaceOrView below;
    return without_gradient(student, teacher, kappa, eps, eps_on_variance, bf16, scale, statistics, gram);
  }
  const variable_list parts =
      RSDFunction::apply(student, teacher, Settings{kappa, eps, scale, eps_on_variance}, bf16, statistics, gram);
  return {parts[0], parts[1], parts[2], parts[3]};
}

}  // namespace
}  // namespace xdfast

TORCH_LIBRARY_IMPL(xdfast_c, AutogradCPU, m) {
  m.impl("rsd_loss_autograd", &xdfast::with_gradient);
}
TORCH_LIBRARY_IMPL(xdfast_c, CPU, m) {
  m.impl("rsd_loss_autograd", &xdfast::without_gradient);
}
