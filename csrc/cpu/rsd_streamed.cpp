// The algebra is in xdfast/ops/rsd/fast.py.
//
//   1. K = T T^T / D, and S S^T where the teacher has a gradient or nobody has: each thread its blocks of columns, its
//   own K; then their sum.
//   2. Block by block of columns: S and T standardised (T's statistics are known from step 1), p_j = <S_j, T_j> / N,
//   U = K S, f_j = D <S_j, U_j> / N^2, and the gradient  a_j U + c_j T - q_j S.
//
// S and T are read twice, and no [N, D] matrix but the gradient is written.
#include "rsd_streamed.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "panels.h"
#include "passes.h"

namespace xdfast {
namespace {

constexpr int64_t kCacheBytes = 256 << 10;  // of a thread's blocks: half of a usual L2 cache
constexpr int64_t kDeepest = 256;           // columns of a block of step 1
constexpr int64_t kWidest = 128;            // and of step 2
constexpr int64_t kMirror = 64;             // rows of K mirrored at a time
constexpr int64_t kMostRows = 512;          // from about 1000 on K leaves the caches, and BLAS, deeper at a time, wins

int64_t block_columns(int64_t N, int64_t blocks, int64_t widest) {
  return std::clamp<int64_t>(kCacheBytes / (4 * N * blocks) / 32 * 32, 32, widest);
}

int64_t thread_count(int64_t N, int64_t D) {
  return N * D * N < kSerialWork ? 1 : at::get_num_threads();
}

class StreamedGram {
 public:
  StreamedGram(Input student, Input teacher, const Options& options)
      : s_{std::move(student)},
        t_{std::move(teacher)},
        o_(options),
        N_(t_.x.size(0)),
        D_(t_.x.size(1)),
        threads_(thread_count(N_, D_)),
        ld_gram_(round_up(N_, 16) + 16),  // no power of two: rows a power of two apart share few cache sets
        deep_(D_, block_columns(N_, 1, kDeepest), 32, threads_),
        wide_(D_, block_columns(N_, 4, kWidest), 32, threads_),
        parts_(std::min(threads_, deep_.count)) {
    workspace_ = allocate(t_.x, [this](Arena& arena) { layout(arena); });
  }

  Components run() {
    const bool gradient = s_.gradient || t_.gradient;
    if (s_.gradient || !gradient) gram_matrix(t_);
    if (t_.gradient || !gradient) gram_matrix(s_);
    parallel(wide_.count, [&](int64_t i) { finish(wide_.begin(i), wide_.length(i)); });
    double squares = 0.0;
    if (gradient) {
      const double* f = s_.gradient ? s_.f : t_.f;
      for (int64_t j = 0; j < D_; ++j) squares += f[j];
    } else {
      squares = inner_product();
    }
    return components(p_, D_, squares, true);
  }

  void prepare(float* statistics, float* gram) {
    gram_matrix(t_);
    std::copy(t_.statistics.hi, t_.statistics.hi + 4 * D_, statistics);
    for (int64_t i = 0; i < N_; ++i) std::copy(t_.gram + i * ld_gram_, t_.gram + i * ld_gram_ + N_, gram + i * N_);
  }

 private:
  struct Side : Input {
    int64_t ld = 0;       // of the Gram matrix
    double* f = nullptr;  // [D] sum over the other side's columns of P^2
  };

  void layout(Arena& arena) {
    p_ = arena.take<double>(D_);
    const bool gradient = s_.gradient || t_.gradient;
    for (Side* side : {&s_, &t_}) {
      if (!side->x.defined()) continue;
      const bool wanted = (side == &s_ ? t_ : s_).gradient || !gradient;
      if (!side->statistics_known) side->statistics = ColumnStatistics::at(arena.take<float>(4 * D_), D_);
      if (side->gradient) side->f = arena.take<double>(D_);
      side->ld = side->gram_known ? N_ : ld_gram_;
      if (wanted && !side->gram_known) side->gram = arena.take<float>(parts_ * N_ * ld_gram_);
    }
    // Per thread: a block of step 1 and the panel that is multiplied with it, or three of step 2.
    ldz_ = deep_.width + 16;
    ldw_ = wide_.width + 16;
    panel_ = round_up(N_ * ldz_, 16);
    block_ = round_up(N_ * ldw_, 16);
    scratch_each_ = std::max(panel_ + deep_.width * panel_products()->width, 3 * block_);
    scratch_ = arena.take<float>(threads_ * scratch_each_);
  }

  float* scratch() { return scratch_ + at::get_thread_num() * scratch_each_; }

  template <typename F>
  void parallel(int64_t count, const F& f) {
    at::parallel_for(0, count, threads_ == 1 ? count : 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) f(i);
    });
  }

  template <typename T>
  StandardizeProblem<T> problem(const Side& side, int64_t d, int64_t columns, float* z, int64_t ldz) {
    const ColumnStatistics& all = side.statistics;
    return {
        side.x.const_data_ptr<T>() + d,
        side.x.stride(0),
        N_,
        columns,
        o_.eps,
        o_.eps_on_variance,
        side.statistics_known,
        {all.hi + d, all.lo + d, all.inv + d, all.ratio + d},
        z,
        ldz};
  }

  // z [N, columns] of the columns from d on, and zeros up to a whole panel.
  void standardize(const Side& side, int64_t d, int64_t columns, float* z, int64_t ldz) {
    const Passes& pass = passes();
    switch (side.x.scalar_type()) {
      case at::kFloat: pass.standardize_float(problem<float>(side, d, columns, z, ldz), 0, columns); break;
      case at::kBFloat16: pass.standardize_bfloat16(problem<at::BFloat16>(side, d, columns, z, ldz), 0, columns); break;
      default: pass.standardize_half(problem<at::Half>(side, d, columns, z, ldz), 0, columns); break;
    }
    const int64_t padded = round_up(columns, panel_products()->width);
    for (int64_t i = 0; padded > columns && i < N_; ++i) std::fill(z + i * ldz + columns, z + i * ldz + padded, 0.0f);
  }

  void gram_matrix(Side& side) {
    if (side.gram_known) return;
    const PanelProducts& products = *panel_products();
    const float factor = 1.0f / static_cast<float>(D_);
    parallel(parts_, [&](int64_t part) {
      float* z = scratch();
      const int64_t first = deep_.count * part / parts_, last = deep_.count * (part + 1) / parts_;
      for (int64_t i = first; i < last; ++i) {
        standardize(side, deep_.begin(i), deep_.length(i), z, ldz_);
        products.gram(
            z, ldz_, N_, deep_.length(i), factor, i > first, side.gram + part * N_ * ld_gram_, ld_gram_, z + panel_);
      }
    });
    side.statistics_known = true;
    const int64_t strips = (N_ + kMirror - 1) / kMirror;
    parallel(strips, [&](int64_t strip) {
      const int64_t r = strip * kMirror, rows = std::min(kMirror, N_ - r);
      float* out = side.gram + r * ld_gram_;
      for (int64_t part = 1; part < parts_; ++part) {
        const float* more = out + part * N_ * ld_gram_;
        for (int64_t i = 0; i < rows; ++i) {
          for (int64_t j = 0; j <= r + i; ++j) out[i * ld_gram_ + j] += more[i * ld_gram_ + j];
        }
      }
      passes().transpose_words(words(out), ld_gram_, rows, r, words(side.gram) + r, ld_gram_);
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = i + 1; j < rows; ++j) out[i * ld_gram_ + r + j] = out[j * ld_gram_ + r + i];
      }
    });
  }

  // Step 2 for the columns from d on.
  void finish(int64_t d, int64_t columns) {
    float *s = scratch(), *t = s + block_, *u = t + block_;
    standardize(s_, d, columns, s, ldw_);
    standardize(t_, d, columns, t, ldw_);
    passes().column_dots(s, ldw_, t, ldw_, N_, columns, p_ + d);
    for (int64_t j = d; j < d + columns; ++j) p_[j] /= static_cast<double>(N_);
    if (s_.gradient) differentiate(s_, t_, s, t, u, d, columns);
    if (t_.gradient) differentiate(t_, s_, t, s, u, d, columns);
  }

  void differentiate(
      const Side& own, const Side& other, const float* z, const float* x, float* u, int64_t d, int64_t columns) {
    const double n = static_cast<double>(N_), unit = static_cast<double>(D_);
    panel_products()->multiply(other.gram, other.ld, z, ldw_, N_, columns, N_, u, ldw_);
    passes().column_dots(z, ldw_, u, ldw_, N_, columns, own.f + d);
    float a[kWidest], c[kWidest], q[kWidest];
    for (int64_t j = 0; j < columns; ++j) {
      own.f[d + j] *= unit / (n * n);
      const GradientColumn k(
          o_, n, unit, p_[d + j], own.f[d + j], own.statistics.inv[d + j], own.statistics.ratio[d + j]);
      a[j] = k.a, c[j] = k.c, q[j] = k.q;
    }
    passes().combine(u, ldw_, x, z, ldw_, a, c, q, N_, columns, own.gradient + d, D_);
  }

  // ||P||^2 = <T T^T, S S^T> / N^2
  double inner_product() {
    double total = 0.0;
    std::vector<double> dots(N_);
    for (int64_t i = 0; i < N_; ++i) {
      passes().column_dots(s_.gram + i * s_.ld, 0, t_.gram + i * t_.ld, 0, 1, N_, dots.data());
      for (double dot : dots) total += dot;
    }
    const double ratio = static_cast<double>(D_) / static_cast<double>(N_);
    return total * ratio * ratio;
  }

  static uint32_t* words(float* p) { return reinterpret_cast<uint32_t*>(p); }

  Side s_, t_;
  Options o_;
  int64_t N_, D_, threads_, ld_gram_;
  Blocks deep_, wide_;
  int64_t parts_, ldz_ = 0, ldw_ = 0, panel_ = 0, block_ = 0, scratch_each_ = 0;
  at::Tensor workspace_;
  double* p_ = nullptr;  // [D] diagonal of P
  float* scratch_ = nullptr;
};

}  // namespace

bool streams(int64_t N, int64_t D, bool bf16) {
  return N < D && N <= kMostRows && !bf16 && panel_products() && thread_count(N, D) <= std::max<int64_t>(1, 2 * D / N);
}

Components streamed_loss(Input student, Input teacher, const Options& options) {
  return StreamedGram(std::move(student), std::move(teacher), options).run();
}

void streamed_teacher(Input teacher, const Options& options, float* statistics, float* gram) {
  StreamedGram({}, std::move(teacher), options).prepare(statistics, gram);
}

}  // namespace xdfast
