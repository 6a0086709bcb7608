// Products of a few rows with a matrix that is read once, from main memory, for XLA on a CPU.
//
// With few rows a product takes about as long to read its matrix as to compute. XLA's products do one after the other: they
// read strips of a wide matrix, which the processor does not foresee. Here each block of a strip is asked for while the
// block before it is computed.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, VECTORS = 4;
#elif defined(__AVX__)
constexpr int LANES = 8, VECTORS = 2;
#else
constexpr int LANES = 4, VECTORS = 4;
#endif
// Registers hold ROWS x VECTORS sums, the vectors of one line of the matrix, and one number of a row.
constexpr int ROWS = 6;
constexpr int64_t COLUMNS = LANES * VECTORS;
constexpr int64_t DEPTH = 128;
constexpr int64_t LINE = 64 / sizeof(float);
// Tokens whose rows of a table are read side by side, and how many further on the ones asked for are.
constexpr int TOKENS = 4;
constexpr int64_t AHEAD = 8;

typedef float Vector __attribute__((vector_size(LANES * sizeof(float)), aligned(4), may_alias));

// Into the second cache: the first has no room for it beside what is being multiplied.
inline void ask(const float* at) { __builtin_prefetch(at, 0, 2); }

// Share `part` of `parts` of `whole` things.
struct Share {
  int64_t from, to;
  Share(int64_t part, int64_t parts, int64_t whole) : from(whole * part / parts), to(whole * (part + 1) / parts) {}
};

// y += x w for `Count` rows, `depth` lines of w and COLUMNS columns; of `ahead` lines at `next` the share is asked for.
template <int Count>
void tile(const float* x, int64_t x_row, const float* w, int64_t width, float* y, int64_t depth, bool begins,
          const float* next, int64_t ahead, Share share) {
  Vector sums[Count][VECTORS];
  for (int r = 0; r < Count; ++r)
    for (int v = 0; v < VECTORS; ++v)
      sums[r][v] = begins ? Vector{} : *reinterpret_cast<const Vector*>(y + r * width + v * LANES);
  for (int64_t k = 0; k < depth; ++k) {
    if (k < ahead)
      for (int64_t line = share.from; line < share.to; ++line) ask(next + k * width + line * LINE);
    Vector own[VECTORS];
    for (int v = 0; v < VECTORS; ++v) own[v] = *reinterpret_cast<const Vector*>(w + k * width + v * LANES);
    for (int r = 0; r < Count; ++r) {
      const float one = x[r * x_row + k];
      for (int v = 0; v < VECTORS; ++v) sums[r][v] += one * own[v];
    }
  }
  for (int r = 0; r < Count; ++r)
    for (int v = 0; v < VECTORS; ++v) *reinterpret_cast<Vector*>(y + r * width + v * LANES) = sums[r][v];
}

// Of the lanes of four vectors, the sums.
typedef float Four __attribute__((vector_size(4 * sizeof(float)), aligned(4), may_alias));

inline Four quarter(const Vector& vector) {
  Four parts[LANES / 4];
  __builtin_memcpy(parts, &vector, sizeof(vector));
  Four total = parts[0];
  for (int part = 1; part < LANES / 4; ++part) total += parts[part];
  return total;
}

inline Four sums_of(const Vector* v) {
  Four totals;
  for (int t = 0; t < 4; ++t) {
    const Four q = quarter(v[t]);
    totals[t] = (q[0] + q[2]) + (q[1] + q[3]);
  }
  return totals;
}

// y_tr = w_t . x_r for TOKENS rows of a table and `Count` of x; of the rows at `next` the share is asked for.
template <int Count>
void dots(const float* x, const float* w, int64_t depth, float* y, int64_t y_row, const float* next, Share share) {
  Vector sums[Count][TOKENS];
  for (auto& of_row : sums)
    for (auto& sum : of_row) sum = Vector{};
  int64_t k = 0;
  for (; k + LANES <= depth; k += LANES) {
    if (next && k % LINE == 0)
      for (int64_t t = share.from; t < share.to; ++t) ask(next + t * depth + k);
    Vector own[TOKENS];
    for (int t = 0; t < TOKENS; ++t) own[t] = *reinterpret_cast<const Vector*>(w + t * depth + k);
    for (int r = 0; r < Count; ++r) {
      Vector one = *reinterpret_cast<const Vector*>(x + r * depth + k);
#if defined(__AVX__)
      // In a register: as an operand in memory it would be loaded again for each of the tokens.
      asm("" : "+v"(one));
#endif
      for (int t = 0; t < TOKENS; ++t) sums[r][t] += one * own[t];
    }
  }
  for (int r = 0; r < Count; ++r) {
    Four totals = sums_of(sums[r]);
    for (int64_t rest = k; rest < depth; ++rest)
      for (int t = 0; t < TOKENS; ++t) totals[t] += x[r * depth + rest] * w[t * depth + rest];
    *reinterpret_cast<Four*>(y + r * y_row) = totals;
  }
}

// Calls `f` with the number of rows, 1 to ROWS, as a constant.
template <int Count = ROWS, typename F>
void of_rows(int64_t count, F f) {
  if constexpr (Count > 0) {
    if (count == Count)
      f(std::integral_constant<int, Count>());
    else
      of_rows<Count - 1>(count, f);
  }
}

// Calls `work(part, following)` for every part, on the threads of the pool and this one. `following` is the part that this
// thread will most likely have next, or `parts`. No thread waits for one that has not begun: all others could be waiting too.
template <typename F>
void shared(ffi::ThreadPool pool, int64_t parts, F work) {
  struct Progress {
    std::atomic<int64_t> taken{0}, done{0};
  };
  auto progress = std::make_shared<Progress>();
  auto run = [progress, parts, work] {
    for (int64_t part; (part = progress->taken.fetch_add(1)) < parts; progress->done.fetch_add(1))
      work(part, [&] { return std::min(progress->taken.load(std::memory_order_relaxed), parts); });
  };
  for (int64_t helper = 1; helper < std::min(pool.num_threads(), parts); ++helper) pool.Schedule(decltype(run)(run));
  run();
  while (progress->done.load() < parts) std::this_thread::yield();
}

// y = x w in strips [from, to) of COLUMNS columns; `following` says where the strip is that this thread reads after them.
template <typename F>
void strips(const float* x, const float* w, float* y, int64_t rows, int64_t depth, int64_t width, int64_t from, int64_t to,
            F following) {
  const int64_t groups = (rows + ROWS - 1) / ROWS;
  for (int64_t strip = from; strip < to; ++strip) {
    const float* own = w + strip * COLUMNS;
    for (int64_t k = 0; k < depth; k += DEPTH) {
      const int64_t block = std::min(DEPTH, depth - k), after = depth - k - block;
      const float* next = after > 0 ? own + (k + DEPTH) * width : strip + 1 < to ? own + COLUMNS : following();
      const int64_t ahead = next == nullptr ? 0 : after > 0 ? std::min(block, after) : block;
      for (int64_t group = 0; group < groups; ++group)
        of_rows(std::min<int64_t>(ROWS, rows - group * ROWS), [&](auto count) {
          tile<count>(x + group * ROWS * depth + k, depth, own + k * width, width,
                      y + group * ROWS * width + strip * COLUMNS, block, k == 0, next, ahead,
                      Share(group, groups, COLUMNS / LINE));
        });
    }
  }
}

// y = x w in the columns from `from` on, which fill no strip.
void rest(const float* x, const float* w, float* y, int64_t rows, int64_t depth, int64_t width, int64_t from) {
  for (int64_t r = 0; r < rows && from < width; ++r) {
    float* to = y + r * width;
    std::fill(to + from, to + width, 0.0f);
    for (int64_t k = 0; k < depth; ++k)
      for (int64_t f = from; f < width; ++f) to[f] += x[r * depth + k] * w[k * width + f];
  }
}

using Matrix = ffi::Buffer<ffi::F32, 2>;
using Matrices = ffi::Buffer<ffi::F32>;

// y_nbf = sum_d x_nbd w_ndf.
ffi::Error Rows(ffi::ThreadPool pool, Matrices x, Matrices w, ffi::Result<Matrices> y) {
  // Any number of dimensions in front, which all count matrices.
  const size_t last = w.dimensions().size() - 1;
  const int64_t rows = x.dimensions()[last - 1], depth = w.dimensions()[last - 1], width = w.dimensions()[last];
  const int64_t number = w.element_count() / (depth * width), whole = width / COLUMNS;
  const float *from = x.typed_data(), *by = w.typed_data();
  float* to = y->typed_data();
  if (number == 1) {
    shared(pool, whole + 1, [=](int64_t strip, auto following) {
      if (strip == whole) return rest(from, by, to, rows, depth, width, whole * COLUMNS);
      strips(from, by, to, rows, depth, width, strip, strip + 1, [&]() -> const float* {
        const int64_t other = following();
        return other < whole ? by + other * COLUMNS : nullptr;
      });
    });
  } else {
    shared(pool, number, [=](int64_t n, auto following) {
      const float *own_x = from + n * rows * depth, *own = by + n * depth * width;
      float* own_y = to + n * rows * width;
      strips(own_x, own, own_y, rows, depth, width, 0, whole, [&]() -> const float* {
        const int64_t other = following();
        return other < number && whole > 0 ? by + other * depth * width : nullptr;
      });
      rest(own_x, own, own_y, rows, depth, width, whole * COLUMNS);
    });
  }
  return ffi::Error::Success();
}

// y_bv = sum_d x_bd w_vd.
ffi::Error Table(ffi::ThreadPool pool, Matrix x, Matrix w, ffi::Result<Matrix> y) {
  const int64_t rows = x.dimensions()[0], tokens = w.dimensions()[0], depth = w.dimensions()[1];
  const int64_t groups = (rows + ROWS - 1) / ROWS, size = 64 * TOKENS;
  const float *from = x.typed_data(), *by = w.typed_data();
  float* to = y->typed_data();
  shared(pool, (tokens + size - 1) / size, [=](int64_t part, auto) {
    const int64_t end = std::min(tokens, (part + 1) * size);
    int64_t token = part * size;
    for (; token + TOKENS <= end; token += TOKENS) {
      const float* next = token + AHEAD + TOKENS <= tokens ? by + (token + AHEAD) * depth : nullptr;
      for (int64_t group = 0; group < groups; ++group)
        of_rows(std::min<int64_t>(ROWS, rows - group * ROWS), [&](auto count) {
          dots<count>(from + group * ROWS * depth, by + token * depth, depth, to + group * ROWS * tokens + token, tokens,
                      next, Share(group, groups, TOKENS));
        });
    }
    for (; token < end; ++token)
      for (int64_t r = 0; r < rows; ++r) {
        float total = 0;
        for (int64_t k = 0; k < depth; ++k) total += from[r * depth + k] * by[token * depth + k];
        to[r * tokens + token] = total;
      }
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    rows, Rows, ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Matrices>().Arg<Matrices>().Ret<Matrices>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(table, Table,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Matrix>().Arg<Matrix>().Ret<Matrix>());
