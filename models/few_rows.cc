// Products of a few rows with a matrix that is read once, from main memory, for XLA on a CPU.
//
// With few rows a product takes about as long to read its matrix as to compute. XLA's products do one after the other: they
// read strips of a wide matrix, which the processor does not foresee. Here each block of a strip is asked for while the
// block before it is computed, and what was asked for is read once: what the second cache gives beside it is no more.
//
// Up to ROWS rows: lanes of a vector are columns of the matrix, or for a table what is summed, and registers hold all rows.
// More rows: lanes are the rows.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <thread>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

#if defined(__AVX512F__)
constexpr int64_t LANES = 16, VECTORS = 4;
#elif defined(__AVX__)
constexpr int64_t LANES = 8, VECTORS = 2;
#else
constexpr int64_t LANES = 4, VECTORS = 4;
#endif
constexpr int64_t LINE = 64 / sizeof(float);
// A strip of a matrix: so many of its columns.
constexpr int64_t COLUMNS = 64;

// Up to ROWS rows are few: registers hold ROWS x VECTORS sums, the vectors of one line of a matrix, and a number of a row.
constexpr int64_t ROWS = 6, MOST = 64;
// Few rows: tokens of a table that are read side by side, and how many further on the ones asked for are.
constexpr int64_t TOKENS = 4, AHEAD = 8;
// More rows: columns, and tokens, whose sums are kept at once.
constexpr int64_t AT_ONCE = LANES == LINE ? 16 : 8, TOGETHER = 8;
// Lines of a strip that are read while the ones before them are multiplied: of few rows, and of more.
constexpr int64_t DEPTH = 128, DEPTH_OF_LANES = 64;

typedef float Vector __attribute__((vector_size(LANES * sizeof(float)), aligned(4), may_alias));
typedef float Four __attribute__((vector_size(4 * sizeof(float)), aligned(4), may_alias));

inline Vector& vector(float* at) { return *reinterpret_cast<Vector*>(at); }
inline const Vector& vector(const float* at) { return *reinterpret_cast<const Vector*>(at); }

// Into the second cache: the first has no room for it beside what is being multiplied.
inline void ask(const float* at) {
  __builtin_prefetch(at, 0, 2);
  // Without it GCC takes a function that only asks for one that does nothing, and leaves its calls out.
  asm volatile("");
}

// Share `part` of `parts` of `whole` things.
struct Share {
  int64_t from, to;
  Share(int64_t part, int64_t parts, int64_t whole) : from(whole * part / parts), to(whole * (part + 1) / parts) {}
};

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
// thread will most likely have next, or `parts`. Each thread has a `work` of its own, which may keep something from part to
// part. No thread waits for one that has not begun: all others could be waiting too.
template <typename F>
void shared(ffi::ThreadPool pool, int64_t parts, F work) {
  struct Progress {
    std::atomic<int64_t> taken{0}, done{0};
  };
  auto progress = std::make_shared<Progress>();
  auto run = [progress, parts, work]() mutable {
    for (int64_t part; (part = progress->taken.fetch_add(1)) < parts; progress->done.fetch_add(1))
      work(part, [&] { return std::min(progress->taken.load(std::memory_order_relaxed), parts); });
  };
  for (int64_t helper = 1; helper < std::min(pool.num_threads(), parts); ++helper) pool.Schedule(decltype(run)(run));
  run();
  while (progress->done.load() < parts) std::this_thread::yield();
}

// Few rows.

// y += x w for `Count` rows, `depth` lines of w and VECTORS vectors of columns; `also(k)` asks for what follows.
template <int Count, typename F>
void tile(const float* x, int64_t x_row, const float* w, int64_t width, float* y, int64_t depth, bool begins, F also) {
  Vector sums[Count][VECTORS];
  for (int r = 0; r < Count; ++r)
    for (int v = 0; v < VECTORS; ++v) sums[r][v] = begins ? Vector{} : vector(y + r * width + v * LANES);
  for (int64_t k = 0; k < depth; ++k) {
    also(k);
    Vector own[VECTORS];
    for (int v = 0; v < VECTORS; ++v) own[v] = vector(w + k * width + v * LANES);
    for (int r = 0; r < Count; ++r) {
      const float one = x[r * x_row + k];
      for (int v = 0; v < VECTORS; ++v) sums[r][v] += one * own[v];
    }
  }
  for (int r = 0; r < Count; ++r)
    for (int v = 0; v < VECTORS; ++v) vector(y + r * width + v * LANES) = sums[r][v];
}

// Of the lanes of four vectors, the sums.
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

// y_tr = w_t . x_r for TOKENS rows of a table and `Count` of x; what is at `next` is asked for.
template <int Count>
void dots(const float* x, const float* w, int64_t depth, float* y, int64_t y_row, const float* next) {
  Vector sums[Count][TOKENS] = {};
  int64_t k = 0;
  for (; k + LANES <= depth; k += LANES) {
    if (next && k % LINE == 0)
      for (int64_t t = 0; t < TOKENS; ++t) ask(next + t * depth + k);
    Vector own[TOKENS];
    for (int t = 0; t < TOKENS; ++t) own[t] = vector(w + t * depth + k);
    for (int r = 0; r < Count; ++r) {
      Vector one = vector(x + r * depth + k);
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

// More rows.

// to_ji = from_ij for i < m and j < n.
void turn(const float* from, int64_t from_row, int64_t m, int64_t n, float* to, int64_t to_row) {
  for (int64_t i = 0; i < m - m % 4; i += 4) {
    for (int64_t j = 0; j < n - n % 4; j += 4) {
      Four rows[4];
      for (int r = 0; r < 4; ++r) rows[r] = *reinterpret_cast<const Four*>(from + (i + r) * from_row + j);
      for (int c = 0; c < 4; ++c)
        *reinterpret_cast<Four*>(to + (j + c) * to_row + i) = Four{rows[0][c], rows[1][c], rows[2][c], rows[3][c]};
    }
    for (int64_t j = n - n % 4; j < n; ++j)
      for (int64_t r = i; r < i + 4; ++r) to[j * to_row + r] = from[r * from_row + j];
  }
  for (int64_t i = m - m % 4; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) to[j * to_row + i] = from[i * from_row + j];
}

// Rows of x as lanes: groups of LANES rows, [groups, D, LANES], with zeros where there is no row.
struct Turned {
  int64_t rows, depth, groups;
  float* numbers;

  // One at a time in a thread: all have the same memory, since to ask for some takes as long as to turn.
  Turned(const float* x, int64_t rows, int64_t depth) : rows(rows), depth(depth), groups((rows + LANES - 1) / LANES) {
    struct alignas(64) Line {
      float numbers[LINE];
    };
    static thread_local std::vector<Line> lines;
    lines.resize(std::max<size_t>(lines.size(), (groups * depth * LANES + LINE - 1) / LINE));
    numbers = lines.data()->numbers;
    for (int64_t group = 0; group < groups; ++group) {
      float* to = numbers + group * depth * LANES;
      if (here(group) < LANES) std::fill(to, to + depth * LANES, 0.0f);
      turn(x + group * LANES * depth, depth, here(group), depth, to, LANES);
    }
  }

  int64_t here(int64_t group) const { return std::min(LANES, rows - group * LANES); }
  const float* of(int64_t group) const { return numbers + group * depth * LANES; }
};

// sums_j += w_jk x_k for `Count` of j and `depth` of k; `also(k)` asks for what follows.
template <int Count, typename F>
inline void lanes(const float* x, const float* w, int64_t by_j, int64_t by_k, int64_t depth, Vector* sums, F also) {
  Vector own[Count];
  for (int j = 0; j < Count; ++j) own[j] = sums[j];
  for (int64_t k = 0; k < depth; ++k) {
    also(k);
    const Vector one = vector(x + k * LANES);
    for (int j = 0; j < Count; ++j) own[j] += w[j * by_j + k * by_k] * one;
  }
  for (int j = 0; j < Count; ++j) sums[j] = own[j];
}

// Products.

// Row after row: x [rows, depth], w [depth, width], y [rows, width].
struct Product {
  const float *x, *w;
  float* y;
  int64_t rows, depth, width;
};

// Calls `f(k, block, next, ahead)` for block after block of a strip: k is its first line, `block` how many it has; `ahead`
// lines at `next` follow it, in the strip or at `after()`, which is looked at late: other threads take strips meanwhile.
template <typename After, typename F>
void blocks(const Product& p, int64_t most, const float* strip, After after, F f) {
  for (int64_t k = 0; k < p.depth; k += most) {
    const int64_t block = std::min(most, p.depth - k), left = p.depth - k - block;
    const float* next = left > 0 ? strip + (k + block) * p.width : after();
    f(k, block, next, next == nullptr ? 0 : left > 0 ? std::min(most, left) : block);
  }
}

// y = x w in the columns [from, to), for few rows; returns where what it left begins.
template <typename After>
int64_t few(const Product& p, int64_t from, int64_t to, After after) {
  constexpr int64_t wide = LANES * VECTORS;
  const int64_t end = to - (to - from) % wide;
  of_rows(p.rows, [&](auto count) {
    blocks(p, DEPTH, p.w + from, after, [&](int64_t k, int64_t block, const float* next, int64_t ahead) {
      for (int64_t column = from; column < end; column += wide)
        tile<count>(p.x + k, p.depth, p.w + k * p.width + column, p.width, p.y + column, block, k == 0, [&](int64_t line) {
          if (line < ahead)
            for (int64_t at = column - from; at < column - from + wide; at += LINE) ask(next + line * p.width + at);
        });
    });
  });
  return end;
}

// As `few`, for more rows.
template <typename After>
int64_t many(const Product& p, const Turned& x, int64_t from, int64_t to, After after) {
  const int64_t pieces = (to - from) / AT_ONCE;
  Vector sums[MOST / LANES * COLUMNS];
  std::fill(sums, sums + x.groups * pieces * AT_ONCE, Vector{});
  blocks(p, DEPTH_OF_LANES, p.w + from, after, [&](int64_t k, int64_t block, const float* next, int64_t ahead) {
    for (int64_t piece = 0; piece < pieces; ++piece)
      for (int64_t group = 0; group < x.groups; ++group) {
        const int64_t turn = piece * x.groups + group;
        const Share share(turn, pieces * x.groups, COLUMNS / LINE);
        lanes<AT_ONCE>(x.of(group) + k * LANES, p.w + k * p.width + from + piece * AT_ONCE, 1, p.width, block,
              &sums[turn * AT_ONCE], [&](int64_t line) {
                if (line < ahead)
                  for (int64_t at = share.from; at < share.to; ++at) ask(next + line * p.width + at * LINE);
              });
      }
  });
  for (int64_t piece = 0; piece < pieces; ++piece)
    for (int64_t group = 0; group < x.groups; ++group)
      turn(reinterpret_cast<float*>(&sums[(piece * x.groups + group) * AT_ONCE]), LANES, AT_ONCE, x.here(group),
           p.y + group * LANES * p.width + from + piece * AT_ONCE, p.width);
  return from + pieces * AT_ONCE;
}

// y = x w in the columns [from, to); the strip at `after()` is asked for.
template <typename After>
void strip(const Product& p, const std::optional<Turned>& x, int64_t from, int64_t to, After after) {
  const int64_t left = x ? many(p, *x, from, to, after) : few(p, from, to, after);
  for (int64_t r = 0; r < p.rows && left < to; ++r) {
    float* y = p.y + r * p.width;
    std::fill(y + left, y + to, 0.0f);
    for (int64_t k = 0; k < p.depth; ++k)
      for (int64_t f = left; f < to; ++f) y[f] += p.x[r * p.depth + k] * p.w[k * p.width + f];
  }
}

using Matrix = ffi::Buffer<ffi::F32, 2>;
using Matrices = ffi::Buffer<ffi::F32>;


// y_nbf = sum_d x_nbd w_ndf.
ffi::Error Rows(ffi::ThreadPool pool, Matrices x, Matrices w, ffi::Result<Matrices> y) {
  // Any number of dimensions in front, which all count matrices.
  const size_t last = w.dimensions().size() - 1;
  const int64_t rows = x.dimensions()[last - 1], depth = w.dimensions()[last - 1], width = w.dimensions()[last];
  const int64_t number = w.element_count() / (depth * width), strips = (width + COLUMNS - 1) / COLUMNS;
  if (rows > MOST) return ffi::Error(ffi::ErrorCode::kInvalidArgument, "these are products of at most 64 rows");
  const Product first{x.typed_data(), w.typed_data(), y->typed_data(), rows, depth, width};
  const auto of = [=](int64_t n) {
    return Product{first.x + n * rows * depth, first.w + n * depth * width, first.y + n * rows * width, rows, depth, width};
  };
  if (number == 1) {
    const Product p = of(0);
    shared(pool, strips, [=, turned = std::optional<Turned>()](int64_t part, auto following) mutable {
      if (rows > ROWS && !turned) turned.emplace(p.x, rows, depth);
      strip(p, turned, part * COLUMNS, std::min(width, (part + 1) * COLUMNS), [&]() -> const float* {
        const int64_t other = following();
        return other < strips ? p.w + other * COLUMNS : nullptr;
      });
    });
  } else {
    shared(pool, number, [=](int64_t n, auto following) {
      const Product p = of(n);
      std::optional<Turned> turned;
      if (rows > ROWS) turned.emplace(p.x, rows, depth);
      for (int64_t part = 0; part < strips; ++part)
        strip(p, turned, part * COLUMNS, std::min(width, (part + 1) * COLUMNS), [&]() -> const float* {
          const int64_t other = following();
          return part + 1 < strips ? p.w + (part + 1) * COLUMNS : other < number ? of(other).w : nullptr;
        });
    });
  }
  return ffi::Error::Success();
}

// y_bv = sum_d x_bd w_vd.
ffi::Error Table(ffi::ThreadPool pool, Matrix x, Matrix w, ffi::Result<Matrix> y) {
  const int64_t rows = x.dimensions()[0], tokens = w.dimensions()[0], depth = w.dimensions()[1], size = 256;
  const float *from = x.typed_data(), *by = w.typed_data();
  float* to = y->typed_data();
  shared(pool, (tokens + size - 1) / size, [=, turned = std::optional<Turned>()](int64_t part, auto) mutable {
    if (rows > ROWS && !turned) turned.emplace(from, rows, depth);
    const int64_t end = std::min(tokens, (part + 1) * size);
    int64_t token = part * size;
    const auto later = [&](int64_t step, int64_t many) {
      return token + step + many <= tokens ? by + (token + step) * depth : nullptr;
    };
    if (turned) {
      for (; token + TOGETHER <= end; token += TOGETHER)
        for (int64_t group = 0; group < turned->groups; ++group) {
          Vector sums[TOGETHER] = {};
          const Share share(group, turned->groups, TOGETHER);
          const float* next = later(TOGETHER, TOGETHER);
          lanes<TOGETHER>(turned->of(group), by + token * depth, depth, 1, depth, sums, [&](int64_t k) {
            if (next && k % LINE == 0)
              for (int64_t t = share.from; t < share.to; ++t) ask(next + t * depth + k);
          });
          turn(reinterpret_cast<float*>(sums), LANES, TOGETHER, turned->here(group),
               to + group * LANES * tokens + token, tokens);
        }
    } else {
      for (; token + TOKENS <= end; token += TOKENS)
        of_rows(rows, [&](auto count) {
          dots<count>(from, by + token * depth, depth, to + token, tokens, later(AHEAD, TOKENS));
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
