// Cross-correlation loss and gradients (RSD, Barlow Twins) on the CPU: every step around the matrix products fused into
// passes over column blocks, the products by the best GEMM at hand. The algebra is in xdfast/ops/rsd/fast.py.
//
//   1. Columns of both inputs standardised, with p_j = <S_j, T_j> / N; float32, or also bfloat16 as the products want
//   it.
//   2. N < D:  K = T T^T, its lower triangle, by strips of rows (and parts of D when there are more threads than
//   strips).
//      N >= D: P = T^T S / N by tiles, with its squares summed while the tile is in cache.
//   3. N < D:  U = K S by column blocks, f_j = <S_j, U_j> / N^2.    N >= D: U / N = T P by blocks, f_j known from
//   step 2.
//      Then in the same block the gradient  inv_j (2 kappa / N^2 U + c_j T - ratio_j g_j S),
//      c_j = 2/N (p_j - 1 - kappa p_j),  g_j = 2 kappa f_j / N + c_j p_j, times `scale`.
//
// Memory: O(N D), whichever of N and D is larger. One workspace; nothing is kept between calls, so calls from several
// Python threads do not meet.
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/scalar_tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "gemm.h"
#include "passes.h"
#include "rsd_parts.h"
#include "rsd_streamed.h"

namespace xdfast {
namespace {

constexpr int64_t kBlockBytes = 512 << 10;  // of a thread's [N, w] block: half of a usual L2 cache
constexpr int64_t kPanelColumns = 256;      // of the passes before the products
constexpr int64_t kMostColumns = 384;       // of any block

// Pieces of the two products of N >= D: rows of a tile of P, rows and columns of a block of the gradient. Without
// AVX-512 the BLAS wants larger ones (seen on Zen 3); bfloat16 products are blocked here.
struct Pieces {
  int64_t tile_rows, strip_rows, columns;

  explicit Pieces(bool bf16) {
    const bool large = !bf16 && std::string(at::get_cpu_capability()).rfind("AVX512", 0) != 0;
    tile_rows = columns = large ? kMostColumns : 256;
    strip_rows = large ? 512 : 256;
  }
};

// One of the two inputs and what belongs to it. The bfloat16 operands exist where the products want them.
struct Side : Input {
  float* z = nullptr;                 // [N, ld] standardised; gram: [parts, N, N], the first part the sum in the end
  at::BFloat16* rows = nullptr;       // [N, ld] z: A of the Gram matrix (N < D), of the gradient (N >= D)
  at::BFloat16* pairs = nullptr;      // [N/2, ld, 2] z, pairs of rows: B of U = K S, of P = T^T S
  at::BFloat16* across = nullptr;     // N < D: [D/2, ldn, 2], B of the Gram matrix; N >= D: [D, ldn] = z^T, A of P
  at::BFloat16* gram_rows = nullptr;  // [N, ldn] the Gram matrix: A of U = K S
  double* f = nullptr;                // [D] sum over the other side's columns of P^2
};

class CrossCorrelation {
 public:
  CrossCorrelation(Side student, Side teacher, const Options& options)
      : s_(std::move(student)),
        t_(std::move(teacher)),
        o_(options),
        N_(t_.x.size(0)),
        D_(t_.x.size(1)),
        threads_(N_ * D_ * std::min(N_, D_) < kSerialWork ? 1 : at::get_num_threads()),
        gram_form_(N_ < D_),
        gradient_(s_.gradient || t_.gradient),
        pieces_(options.bf16),
        ld_(round_up(D_, 16) + 16),  // no power of two: rows a power of two apart share few cache sets
        ldn_(round_up(N_, 32) + 32),
        strips_(N_, N_ <= 256 ? 32 : 64, 2, 1),
        tiles_(D_, pieces_.tile_rows, 32, threads_),
        panels_(D_, kPanelColumns, 64, threads_),
        blocks_(D_, gram_form_ ? gram_columns() : pieces_.columns, 32, threads_) {
    // Partial Gram matrices over parts of D, where there are more threads than strips; within O(N D) memory.
    parts_ = std::max<int64_t>(1, std::min({2 * threads_ / strips_.count, D_ / N_, D_ / 64}));
    part_columns_ = round_up((D_ + parts_ - 1) / parts_, 64);
    parts_ = (D_ + part_columns_ - 1) / part_columns_;

    workspace_ = allocate(t_.x, [this](Arena& arena) { layout(arena); });
  }

  // (invariance, decorrelation, mean diagonal); gradients into the sides.
  Components run() {
    standardize();
    double squares = 0.0;  // of P: all of it in the Gram form, without the diagonal otherwise
    if (gram_form_) {
      gram_matrices();
      if (!gradient_) squares = gram_inner_product();
    } else {
      squares = product();
    }
    if (gradient_) {
      gradients();
      const double* f = s_.gradient ? s_.f : t_.f;
      for (int64_t j = 0; gram_form_ && j < D_; ++j) squares += f[j];
    }
    return components(p_, D_, squares, gram_form_);
  }

  // Only the teacher: its statistics [4, D], and for N < D its Gram matrix [N, N].
  void prepare(float* statistics, float* gram) {
    standardize();
    std::copy(t_.statistics.hi, t_.statistics.hi + 4 * D_, statistics);
    if (gram_form_) {
      gram_matrices();
      std::copy(t_.gram, t_.gram + N_ * N_, gram);
    }
  }

 private:
  // What is taken here lies in one workspace; called twice, first to count.
  void layout(Arena& arena) {
    p_ = arena.take<double>(D_);
    for (Side* side : {&s_, &t_}) {
      if (!side->x.defined()) continue;
      const bool other_gradient = (side == &s_ ? t_ : s_).gradient;
      const bool own_gram = gram_form_ && !side->gram_known && (other_gradient || !gradient_);
      if (!side->statistics_known) side->statistics = ColumnStatistics::at(arena.take<float>(4 * D_), D_);
      side->z = arena.take<float>(N_ * ld_);
      side->f = arena.take<double>(D_);
      if (own_gram) side->gram = arena.take<float>(parts_ * N_ * N_);
      if (!o_.bf16) continue;
      if (own_gram || (!gram_form_ && other_gradient)) side->rows = arena.take<at::BFloat16>(N_ * ld_);
      if (!gram_form_ || side->gradient) side->pairs = arena.take<at::BFloat16>(round_up(N_, 2) * ld_);
      if (own_gram) side->across = arena.take<at::BFloat16>(ld_ * ldn_);
      if (!gram_form_ && side == &t_) side->across = arena.take<at::BFloat16>(D_ * ldn_);
      if (gram_form_ && other_gradient) side->gram_rows = arena.take<at::BFloat16>(N_ * ldn_);
    }
    if (!gram_form_ && s_.x.defined()) {
      product_ = arena.take<float>(D_ * ld_);
      column_sums_ = arena.take<double>(tiles_.count * D_);
      if (t_.gradient) row_sums_ = arena.take<double>(blocks_.count * D_);
      if (o_.bf16 && s_.gradient) product_pairs_ = arena.take<at::BFloat16>(round_up(D_, 2) * ld_);
      if (o_.bf16 && t_.gradient) {
        product_rows_ = arena.take<at::BFloat16>(D_ * ld_);
        product_across_ = arena.take<at::BFloat16>(ld_ * ld_);
      }
    }
    if (gradient_) {
      block_stride_ = round_up(block_rows() * (blocks_.width + 16), 16);
      block_ = arena.take<float>(threads_ * block_stride_);
    }
  }

  template <typename F>
  void parallel(int64_t count, const F& f) {
    at::parallel_for(0, count, threads_ == 1 ? count : 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) f(i);
      if (o_.bf16) bf16_gemm_release();
    });
  }

  template <typename T>
  StandardizeProblem<T> standardize_problem(const Side& side) {
    return {side.x.const_data_ptr<T>(), side.x.stride(0), N_,     D_, o_.eps, o_.eps_on_variance,
            side.statistics_known,      side.statistics,  side.z, ld_};
  }

  void standardize() {
    const Passes& pass = passes();
    parallel(panels_.count, [&](int64_t i) {
      const int64_t d = panels_.begin(i), columns = panels_.length(i), end = d + columns;
      for (Side* side : {&t_, &s_}) {
        if (!side->x.defined()) continue;
        switch (side->x.scalar_type()) {
          case at::kFloat: pass.standardize_float(standardize_problem<float>(*side), d, end); break;
          case at::kBFloat16: pass.standardize_bfloat16(standardize_problem<at::BFloat16>(*side), d, end); break;
          default: pass.standardize_half(standardize_problem<at::Half>(*side), d, end); break;
        }
        const float* z = side->z + d;
        if (side->rows) {
          const int64_t padded = end == D_ ? round_up(columns, 2) : columns;
          pass.to_bfloat16(z, ld_, N_, columns, padded, side->rows + d, ld_);
        }
        if (side->pairs) pass.pair_rows(z, ld_, N_, columns, side->pairs + 2 * d, ld_);
        if (side->across && gram_form_) {
          pass.transpose_words(
              words(side->rows + d), ld_ / 2, N_, (columns + 1) / 2, words(side->across) + d / 2 * ldn_, ldn_);
        } else if (side->across) {
          pass.transpose_words(
              words(side->pairs + 2 * d), ld_, (N_ + 1) / 2, columns, words(side->across + d * ldn_), ldn_ / 2);
        }
      }
      if (s_.x.defined()) {
        pass.column_dots(s_.z + d, ld_, t_.z + d, ld_, N_, columns, p_ + d);
        for (int64_t j = d; j < end; ++j) p_[j] /= static_cast<double>(N_);
      }
    });
  }

  // z z^T / D. By symmetry only strips of rows up to the diagonal; long and short strips take turns in the list,
  // because every thread gets a contiguous part of it.
  void gram_matrices() {
    const Passes& pass = passes();
    for (Side* side : {&s_, &t_}) {
      if (side->gram && !side->gram_known) {
        parallel(strips_.count * parts_, [&](int64_t task) {
          const int64_t turn = task / parts_, part = task % parts_;
          const int64_t strip = turn % 2 ? strips_.count - 1 - turn / 2 : turn / 2;
          const int64_t r = strips_.begin(strip), rows = strips_.length(strip), columns = r + rows;
          const int64_t d = part * part_columns_, depth = std::min(part_columns_, D_ - d);
          float* out = side->gram + part * N_ * N_ + r * N_;
          if (!o_.bf16) {
            const float* z = side->z + d;
            gemm(false, true, rows, columns, depth, 1.0f / static_cast<float>(D_), z + r * ld_, ld_, z, ld_, out, N_);
            return;
          }
          for (int64_t c = 0; c < columns; c += 64) {  // few different shapes: each is compiled once by oneDNN
            bf16_gemm(
                rows, std::min<int64_t>(64, columns - c), round_up(depth, 2), side->rows + r * ld_ + d, ld_,
                side->across + d * ldn_ + 2 * c, ldn_, out + c, N_);
          }
        });
        const float factor = o_.bf16 ? 1.0f / static_cast<float>(D_) : 1.0f;
        parallel(strips_.count, [&](int64_t strip) {
          const int64_t r = strips_.begin(strip), rows = strips_.length(strip), columns = r + rows;
          float* out = side->gram + r * N_;
          if (parts_ > 1 || factor != 1.0f) {
            for (int64_t i = 0; i < rows; ++i) {
              for (int64_t j = 0; j < columns; ++j) {
                float sum = out[i * N_ + j];
                for (int64_t part = 1; part < parts_; ++part) sum += out[part * N_ * N_ + i * N_ + j];
                out[i * N_ + j] = sum * factor;
              }
            }
          }
          pass.transpose_words(words(out), N_, rows, r, words(side->gram) + r, N_);
        });
      }
      if (side->gram_rows) {
        parallel(strips_.count, [&](int64_t strip) {
          const int64_t r = strips_.begin(strip);
          pass.to_bfloat16(
              side->gram + r * N_, N_, strips_.length(strip), N_, round_up(N_, 2), side->gram_rows + r * ldn_, ldn_);
        });
      }
    }
  }

  // ||P||^2 = <T T^T, S S^T> / N^2
  double gram_inner_product() {
    std::vector<double> dots(N_);
    passes().column_dots(s_.gram, N_, t_.gram, N_, N_, N_, dots.data());
    double total = 0.0;
    for (double dot : dots) total += dot;
    return total * static_cast<double>(D_) / static_cast<double>(N_) * static_cast<double>(D_) /
           static_cast<double>(N_);
  }

  // P [D, D] and the sums of its squares; the sum without the diagonal is returned. In bfloat16 P is kept times N.
  double product() {
    const Passes& pass = passes();
    std::fill(column_sums_, column_sums_ + tiles_.count * D_, 0.0);
    if (row_sums_) std::fill(row_sums_, row_sums_ + blocks_.count * D_, 0.0);
    parallel(tiles_.count * blocks_.count, [&](int64_t task) {
      const int64_t tile = task % tiles_.count, block = task / tiles_.count;
      const int64_t r = tiles_.begin(tile), rows = tiles_.length(tile);
      const int64_t c = blocks_.begin(block), columns = blocks_.length(block);
      float* out = product_ + r * ld_ + c;
      if (o_.bf16) {
        bf16_gemm(rows, columns, round_up(N_, 2), t_.across + r * ldn_, ldn_, s_.pairs + 2 * c, ld_, out, ld_);
      } else {
        gemm(true, false, rows, columns, N_, 1.0f / static_cast<float>(N_), t_.z + r, ld_, s_.z + c, ld_, out, ld_);
      }
      pass.squares(
          out, ld_, rows, columns, c - r, column_sums_ + tile * D_ + c,
          row_sums_ ? row_sums_ + block * D_ + r : nullptr);
      if (product_pairs_) pass.pair_rows(out, ld_, rows, columns, product_pairs_ + r * ld_ + 2 * c, ld_);
      if (product_rows_) {
        const int64_t padded = c + columns == D_ ? round_up(columns, 2) : columns;
        at::BFloat16* rounded = product_rows_ + r * ld_ + c;
        pass.to_bfloat16(out, ld_, rows, columns, padded, rounded, ld_);
        pass.transpose_words(
            words(rounded), ld_ / 2, rows, (columns + 1) / 2, words(product_across_) + c / 2 * ld_ + r, ld_);
      }
    });
    const double unit = product_unit() * product_unit();
    double total = 0.0;
    for (int64_t j = 0; j < D_; ++j) {
      double column = 0.0, row = 0.0;
      for (int64_t tile = 0; tile < tiles_.count; ++tile) column += column_sums_[tile * D_ + j];
      for (int64_t block = 0; row_sums_ && block < blocks_.count; ++block) row += row_sums_[block * D_ + j];
      s_.f[j] = column * unit + p_[j] * p_[j];
      t_.f[j] = row * unit;
      total += column * unit;
    }
    return total;
  }

  // Rows of a block of U: all of them, because f needs whole columns, or a strip where f is known before.
  int64_t block_rows() const { return gram_form_ ? N_ : std::min(N_, pieces_.strip_rows); }

  int64_t gram_columns() const { return std::clamp<int64_t>(kBlockBytes / (4 * N_) / 32 * 32, 64, kPanelColumns); }

  double product_unit() const { return o_.bf16 ? 1.0 / static_cast<double>(N_) : 1.0; }

  // Column blocks (and for N >= D strips of rows) of the gradients, one side after the other.
  void gradients() {
    const int64_t strips = gram_form_ ? 1 : (N_ + pieces_.strip_rows - 1) / pieces_.strip_rows;
    const int64_t each = blocks_.count * strips;
    parallel(each * ((s_.gradient != nullptr) + (t_.gradient != nullptr)), [&](int64_t task) {
      const bool teacher = t_.gradient && (!s_.gradient || task >= each);
      Side& own = teacher ? t_ : s_;
      const Side& other = teacher ? s_ : t_;
      const int64_t block = task % each / strips, strip = task % each % strips;
      const int64_t c = blocks_.begin(block), columns = blocks_.length(block), ldu = blocks_.width + 16;
      float* u = block_ + at::get_thread_num() * block_stride_;
      if (gram_form_) {
        gram_block(own, other, c, columns, u, ldu);
        write_gradient(own, other, 0, N_, c, columns, u, ldu, static_cast<double>(D_));
      } else {
        const int64_t i = strip * pieces_.strip_rows, rows = std::min(pieces_.strip_rows, N_ - i);
        product_block(other, teacher, i, rows, c, columns, u, ldu);
        write_gradient(own, other, i, rows, c, columns, u, ldu, product_unit() * static_cast<double>(N_));
      }
    });
  }

  // u = (other's Gram matrix / D) @ z, and f
  void gram_block(Side& own, const Side& other, int64_t c, int64_t columns, float* u, int64_t ldu) {
    if (o_.bf16) {
      bf16_gemm(N_, columns, round_up(N_, 2), other.gram_rows, ldn_, own.pairs + 2 * c, ld_, u, ldu);
    } else {
      gemm(false, false, N_, columns, N_, 1.0f, other.gram, N_, own.z + c, ld_, u, ldu);
    }
    passes().column_dots(own.z + c, ld_, u, ldu, N_, columns, own.f + c);
    const double n = static_cast<double>(N_);
    for (int64_t j = c; j < c + columns; ++j) own.f[j] *= static_cast<double>(D_) / (n * n);
  }

  // u = z_other @ P or z_other @ P^T, rows [i, i + rows)
  void product_block(
      const Side& other, bool teacher, int64_t i, int64_t rows, int64_t c, int64_t columns, float* u, int64_t ldu) {
    if (o_.bf16) {
      bf16_gemm(
          rows, columns, round_up(D_, 2), other.rows + i * ld_, ld_,
          (teacher ? product_across_ : product_pairs_) + 2 * c, ld_, u, ldu);
    } else if (teacher) {
      gemm(false, true, rows, columns, D_, 1.0f, other.z + i * ld_, ld_, product_ + c * ld_, ld_, u, ldu);
    } else {
      gemm(false, false, rows, columns, D_, 1.0f, other.z + i * ld_, ld_, product_ + c, ld_, u, ldu);
    }
  }

  void write_gradient(
      const Side& own, const Side& other, int64_t i, int64_t rows, int64_t c, int64_t columns, const float* u,
      int64_t ldu, double unit) {
    float a[kMostColumns], b[kMostColumns], q[kMostColumns];
    for (int64_t j = 0; j < columns; ++j) {
      const GradientColumn k(
          o_, static_cast<double>(N_), unit, p_[c + j], own.f[c + j], own.statistics.inv[c + j],
          own.statistics.ratio[c + j]);
      a[j] = k.a, b[j] = k.c, q[j] = k.q;
    }
    passes().combine(
        u, ldu, other.z + i * ld_ + c, own.z + i * ld_ + c, ld_, a, b, q, rows, columns, own.gradient + i * D_ + c, D_);
  }

  static uint32_t* words(at::BFloat16* p) { return reinterpret_cast<uint32_t*>(p); }
  static uint32_t* words(float* p) { return reinterpret_cast<uint32_t*>(p); }

  Side s_, t_;
  Options o_;
  int64_t N_, D_, threads_;
  bool gram_form_, gradient_;
  Pieces pieces_;
  int64_t ld_, ldn_, parts_ = 1, part_columns_ = 0;
  Blocks strips_, tiles_, panels_, blocks_;
  at::Tensor workspace_;
  double* p_ = nullptr;                                  // [D] diagonal of P
  float* product_ = nullptr;                             // [D, ld] P
  double *column_sums_ = nullptr, *row_sums_ = nullptr;  // [tiles, D], [blocks, D]
  at::BFloat16* product_pairs_ = nullptr;                // [D/2, ld, 2] P, pairs of rows
  at::BFloat16* product_rows_ = nullptr;                 // [D, ld]
  at::BFloat16* product_across_ = nullptr;               // [D/2, ld, 2] P^T, pairs of rows
  float* block_ = nullptr;                               // per thread
  int64_t block_stride_ = 0;
};

// Rows may be any distance apart; columns have to be neighbours.
at::Tensor with_unit_columns(const at::Tensor& x) {
  return x.size(1) <= 1 || x.stride(1) == 1 ? x : x.contiguous();
}

void check_input(const char* op, const at::Tensor& x) {
  XD_CHECK_MATRIX(op, x);
  XD_CHECK_ROWS(op, x);
  XD_CHECK_CPU(op, x);
  XD_CHECK_FLOAT_OR_HALF(op, x);
}

using Results = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Results rsd_loss(
    const at::Tensor& student, const at::Tensor& teacher, double kappa, double eps, bool eps_on_variance, bool bf16,
    double scale, bool need_student, bool need_teacher, const std::optional<at::Tensor>& statistics,
    const std::optional<at::Tensor>& gram) {
  check_input("rsd_loss", student);
  check_input("rsd_loss", teacher);
  TORCH_CHECK_VALUE(
      student.sizes() == teacher.sizes(), "rsd_loss: student ", student.sizes(), " and teacher ", teacher.sizes(),
      " must have the same shape");
  TORCH_CHECK_VALUE(student.size(1) >= 1, "rsd_loss: at least one column is needed");
  TORCH_CHECK_VALUE(!bf16 || has_bf16_gemm(), "rsd_loss: this CPU has no bfloat16 products");
  TORCH_CHECK_VALUE(!(need_teacher && statistics), "rsd_loss: a prepared teacher cannot have a gradient");
  const int64_t N = student.size(0), D = student.size(1);
  const auto fp32 = student.options().dtype(at::kFloat);
  Input s{with_unit_columns(student)}, t{with_unit_columns(teacher)};
  at::Tensor known_statistics, known_gram;
  if (statistics) {
    TORCH_CHECK_VALUE(
        statistics->sizes() == at::IntArrayRef({4, D}) && statistics->scalar_type() == at::kFloat,
        "rsd_loss: statistics must be float32 [4, ", D, "], but has shape ", statistics->sizes());
    known_statistics = statistics->contiguous();
    t.statistics = ColumnStatistics::at(const_cast<float*>(known_statistics.const_data_ptr<float>()), D);
    t.statistics_known = true;
  }
  if (gram && N < D) {
    TORCH_CHECK_VALUE(
        gram->sizes() == at::IntArrayRef({N, N}), "rsd_loss: gram must be [", N, ", ", N, "], but has shape ",
        gram->sizes());
    known_gram = gram->to(at::kFloat).contiguous();
    t.gram = const_cast<float*>(known_gram.const_data_ptr<float>());
    t.gram_known = true;
  }
  // Gradients leave the kernel in float32; for half inputs they are rounded once, here.
  at::Tensor grad_s = at::empty({need_student ? N : 0, need_student ? D : 0}, fp32);
  at::Tensor grad_t = at::empty({need_teacher ? N : 0, need_teacher ? D : 0}, fp32);
  if (need_student) s.gradient = grad_s.mutable_data_ptr<float>();
  if (need_teacher) t.gradient = grad_t.mutable_data_ptr<float>();
  const Options options{kappa, eps, scale, eps_on_variance, bf16};
  const auto [invariance, decorrelation, diagonal] = streams(N, D, bf16)
                                                         ? streamed_loss(std::move(s), std::move(t), options)
                                                         : CrossCorrelation({s}, {t}, options).run();
  const auto scalar = [&](double value) { return at::scalar_tensor(value, fp32); };
  return {
      scalar(scale * (invariance + kappa * decorrelation)),
      scalar(invariance),
      scalar(decorrelation),
      scalar(diagonal),
      grad_s.to(student.scalar_type()),
      grad_t.to(teacher.scalar_type())};
}

std::tuple<at::Tensor, at::Tensor> rsd_prepare(const at::Tensor& teacher, double eps, bool eps_on_variance, bool bf16) {
  check_input("rsd_prepare", teacher);
  TORCH_CHECK_VALUE(teacher.size(1) >= 1, "rsd_prepare: at least one column is needed");
  TORCH_CHECK_VALUE(!bf16 || has_bf16_gemm(), "rsd_prepare: this CPU has no bfloat16 products");
  const int64_t N = teacher.size(0), D = teacher.size(1);
  const auto fp32 = teacher.options().dtype(at::kFloat);
  at::Tensor statistics = at::empty({4, D}, fp32), gram = at::empty({N < D ? N : 0, N < D ? N : 0}, fp32);
  Input t{with_unit_columns(teacher)};
  const Options options{0.0, eps, 1.0, eps_on_variance, bf16};
  if (streams(N, D, bf16)) {
    streamed_teacher(std::move(t), options, statistics.mutable_data_ptr<float>(), gram.mutable_data_ptr<float>());
  } else {
    CrossCorrelation problem(Side{}, {t}, options);
    problem.prepare(statistics.mutable_data_ptr<float>(), N < D ? gram.mutable_data_ptr<float>() : nullptr);
  }
  return {statistics, gram};
}

}  // namespace
}  // namespace xdfast

TORCH_LIBRARY_IMPL(xdfast_c, CPU, m) {
  m.impl("rsd_loss", &xdfast::rsd_loss);
  m.impl("rsd_prepare", &xdfast::rsd_prepare);
}
