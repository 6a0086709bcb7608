// Products of a few rows with a matrix that is read once, from main memory, for XLA on a CPU.
//
// With few rows a product takes about as long to read its matrix as to compute. XLA's products do one after the other: they
// read strips of a wide matrix, which the processor does not foresee. Here a matrix is read as it lies in memory where there
// is little to compute (few rows); where there is more, each block of a strip is asked for while the one before it is
// computed, and rows are the lanes of a vector, so that a number of the matrix is read but once more, from a cache.

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
constexpr int64_t LANES = 16;
#elif defined(__AVX__)
constexpr int64_t LANES = 8;
#else
constexpr int64_t LANES = 4;
#endif
constexpr int64_t LINE = 64 / sizeof(float);

// Up to ROWS rows are few. Their matrix is read as it lies in memory, LINES lines at a time, and as many are asked for.
constexpr int64_t ROWS = 6, LINES = 4;
// Few rows: tokens of a table that are read side by side, and how many further on the ones asked for are.
constexpr int64_t TOKENS = 4, AHEAD = 8;
// More rows, up to MOST: columns, and tokens, whose sums are kept at once.
constexpr int64_t MOST = 64, AT_ONCE = LANES == LINE ? 16 : 8, TOGETHER = 8;
// Of a strip of so many columns so many lines are read while the ones before them are multiplied.
constexpr int64_t COLUMNS = 64, DEPTH = 64;

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

// y += x w for `Count` rows, `Lines` lines of w and `columns` of its `width`; the lines at `next` are asked for.
template <int Count, int Lines>
void add(const float* x, int64_t x_row, const float* w, int64_t width, int64_t columns, float* y, bool begins,
         const float* next) {
  float one[Count][Lines];
  for (int r = 0; r < Count; ++r)
    for (int i = 0; i < Lines; ++i) one[r][i] = x[r * x_row + i];
  int64_t f = 0;
  for (; f + LANES <= columns; f += LANES) {
    if (next && f % LINE == 0)
      for (int i = 0; i < Lines; ++i) ask(next + i * width + f);
    Vector own[Lines];
    for (int i = 0; i < Lines; ++i) own[i] = vector(w + i * width + f);
    for (int r = 0; r < Count; ++r) {
      Vector sum = begins ? Vector{} : vector(y + r * width + f);
      for (int i = 0; i < Lines; ++i) sum += one[r][i] * own[i];
      vector(y + r * width + f) = sum;
    }
  }
  for (; f < columns; ++f)
    for (int r = 0; r < Count; ++r) {
      float sum = begins ? 0.0f : y[r * width + f];
      for (int i = 0; i < Lines; ++i) sum += one[r][i] * w[i * width + f];
      y[r * width + f] = sum;
    }
}

// y = x w for `Count` rows, `depth` lines of w, behind which lie `left` more, and `columns` of its `width`.
template <int Count>
void stream(const float* x, int64_t x_row, const float* w, int64_t width, int64_t columns, float* y, int64_t depth,
            int64_t left) {
  int64_t k = 0;
  for (; k + LINES <= depth; k += LINES)
    add<Count, LINES>(x + k, x_row, w + k * width, width, columns, y, k == 0,
                      k + 2 * LINES <= depth + left ? w + (k + LINES) * width : nullptr);
  for (; k < depth; ++k) add<Count, 1>(x + k, x_row, w + k * width, width, columns, y, k == 0, nullptr);
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

// Row after row: x [rows, depth], w [depth, width], y [rows, width]. Of w `lines` lines and `columns` columns are looked at.
struct Product {
  const float *x, *w;
  float* y;
  int64_t rows, depth, width, lines, columns;

  Product at(int64_t n) const {
    return {x + n * rows * depth, w + n * depth * width, y + n * rows * width, rows, depth, width, lines, columns};
  }
};

// Rows of x as lanes: groups of LANES rows, [groups, D, LANES]. Lanes without a row hold what they held: nobody reads their
// sums.
struct Turned {
  int64_t rows, depth, groups;
  float* numbers;

  // One at a time in a thread: all have the same memory, since to ask for some takes as long as to turn. `row` is where the
  // next row of x begins.
  Turned(const float* x, int64_t rows, int64_t row, int64_t depth)
      : rows(rows), depth(depth), groups((rows + LANES - 1) / LANES) {
    struct alignas(64) Line {
      float numbers[LINE];
    };
    static thread_local std::vector<Line> lines;
    lines.resize(std::max<size_t>(lines.size(), (groups * depth * LANES + LINE - 1) / LINE));
    numbers = lines.data()->numbers;
    for (int64_t group = 0; group < groups; ++group)
      turn(x + group * LANES * row, row, here(group), depth, numbers + group * depth * LANES, LANES);
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

// y = x w in the columns [from, to), at most COLUMNS. The strip at `after()` is asked for; that is looked at late, since
// other threads take strips meanwhile.
template <typename After>
void strip(const Product& p, const Turned& x, int64_t from, int64_t to, After after) {
  const int64_t pieces = (to - from) / AT_ONCE;
  Vector sums[MOST / LANES * COLUMNS];
  std::fill(sums, sums + x.groups * pieces * AT_ONCE, Vector{});
  for (int64_t k = 0; k < p.lines; k += DEPTH) {
    const float* own = p.w + k * p.width + from;
    const int64_t block = std::min(DEPTH, p.lines - k), left = p.lines - k - block;
    const float* next = left > 0 ? own + block * p.width : after();
    const int64_t lines = next == nullptr ? 0 : left > 0 ? std::min(DEPTH, left) : block;
    for (int64_t piece = 0; piece < pieces; ++piece)
      for (int64_t group = 0; group < x.groups; ++group) {
        const int64_t turn = piece * x.groups + group;
        const Share share(turn, pieces * x.groups, COLUMNS / LINE);
        lanes<AT_ONCE>(x.of(group) + k * LANES, own + piece * AT_ONCE, 1, p.width, block, &sums[turn * AT_ONCE],
                       [&](int64_t line) {
                         if (line < lines)
                           for (int64_t at = share.from; at < share.to; ++at) ask(next + line * p.width + at * LINE);
                       });
      }
  }
  for (int64_t piece = 0; piece < pieces; ++piece)
    for (int64_t group = 0; group < x.groups; ++group)
      turn(reinterpret_cast<float*>(&sums[(piece * x.groups + group) * AT_ONCE]), LANES, AT_ONCE, x.here(group),
           p.y + group * LANES * p.width + from + piece * AT_ONCE, p.width);
  for (int64_t r = 0; r < p.rows; ++r)
    for (int64_t f = from + pieces * AT_ONCE; f < to; ++f) {
      float sum = 0;
      for (int64_t k = 0; k < p.lines; ++k) sum += p.x[r * p.depth + k] * p.w[k * p.width + f];
      p.y[r * p.width + f] = sum;
    }
}

// Products.

// One of few rows: threads have parts of its lines, whose sums are added at the end.
void by_lines(ffi::ThreadPool pool, const Product& p) {
  const int64_t most = std::max<int64_t>(1, std::min(pool.num_threads(), p.lines / 64));
  const int64_t size = ((p.lines + most - 1) / most + LINES - 1) / LINES * LINES, parts = (p.lines + size - 1) / size;
  const int64_t numbers = p.rows * p.width;
  static thread_local std::vector<float> others;
  others.resize(std::max<size_t>(others.size(), (parts - 1) * numbers));
  shared(pool, parts, [p, size, numbers, others = others.data()](int64_t part, auto) {
    const int64_t from = part * size, depth = std::min(size, p.lines - from);
    of_rows(p.rows, [&](auto count) {
      stream<count>(p.x + from, p.depth, p.w + from * p.width, p.width, p.columns,
                    part == 0 ? p.y : others + (part - 1) * numbers, depth, p.lines - from - depth);
    });
  });
  for (int64_t part = 0; part < parts - 1; ++part)
    for (int64_t r = 0; r < p.rows; ++r)
      for (int64_t i = r * p.width; i < r * p.width + p.columns; ++i) p.y[i] += others[part * numbers + i];
}

// One of more rows: threads have strips.
void by_strips(ffi::ThreadPool pool, const Product& p) {
  const int64_t strips = (p.columns + COLUMNS - 1) / COLUMNS;
  shared(pool, strips, [=, turned = std::optional<Turned>()](int64_t part, auto following) mutable {
    if (!turned) turned.emplace(p.x, p.rows, p.depth, p.lines);
    strip(p, *turned, part * COLUMNS, std::min(p.columns, (part + 1) * COLUMNS), [&]() -> const float* {
      const int64_t other = following();
      return other < strips ? p.w + other * COLUMNS : nullptr;
    });
  });
}

// Several: threads have whole ones.
void one_by_one(ffi::ThreadPool pool, const Product& first, int64_t number) {
  const int64_t strips = (first.columns + COLUMNS - 1) / COLUMNS;
  shared(pool, number, [=](int64_t n, auto following) {
    const Product p = first.at(n);
    if (p.rows <= ROWS)
      return of_rows(p.rows, [&](auto count) {
        stream<count>(p.x, p.depth, p.w, p.width, p.columns, p.y, p.lines, 0);
      });
    const Turned turned(p.x, p.rows, p.depth, p.lines);
    for (int64_t part = 0; part < strips; ++part)
      strip(p, turned, part * COLUMNS, std::min(p.columns, (part + 1) * COLUMNS), [&]() -> const float* {
        const int64_t other = following();
        return part + 1 < strips ? p.w + (part + 1) * COLUMNS : other < number ? first.at(other).w : nullptr;
      });
  });
}

using Matrix = ffi::Buffer<ffi::F32, 2>;
using Matrices = ffi::Buffer<ffi::F32>;
using Used = ffi::Buffer<ffi::S32, 1>;

// y_nbf = sum_d x_nbd w_ndf over the first used_0 of d, for the first used_1 of f; 0 for the others.
ffi::Error Rows(ffi::ThreadPool pool, Matrices x, Matrices w, Used used, ffi::Result<Matrices> y) {
  // Any number of dimensions in front, which all count matrices.
  const size_t last = w.dimensions().size() - 1;
  const int64_t rows = x.dimensions()[last - 1], depth = w.dimensions()[last - 1], width = w.dimensions()[last];
  if (rows > MOST) return ffi::Error(ffi::ErrorCode::kInvalidArgument, "these are products of at most 64 rows");
  const auto of = [&](int i, int64_t all) { return std::clamp<int64_t>(used.typed_data()[i], 0, all); };
  const Product p{x.typed_data(), w.typed_data(), y->typed_data(), rows, depth, width, of(0, depth), of(1, width)};
  const int64_t number = w.element_count() / (depth * width), columns = p.lines > 0 ? p.columns : 0;
  for (int64_t row = 0; columns < width && row < number * rows; ++row)
    std::fill(p.y + row * width + columns, p.y + (row + 1) * width, 0.0f);
  if (columns == 0) return ffi::Error::Success();
  if (number > 1)
    one_by_one(pool, p, number);
  else if (rows <= ROWS)
    by_lines(pool, p);
  else
    by_strips(pool, p);
  return ffi::Error::Success();
}

// y_bv = sum_d x_bd w_vd.
ffi::Error Table(ffi::ThreadPool pool, Matrix x, Matrix w, ffi::Result<Matrix> y) {
  const int64_t rows = x.dimensions()[0], tokens = w.dimensions()[0], depth = w.dimensions()[1], size = 256;
  const float *from = x.typed_data(), *by = w.typed_data();
  float* to = y->typed_data();
  shared(pool, (tokens + size - 1) / size, [=, turned = std::optional<Turned>()](int64_t part, auto) mutable {
    if (rows > ROWS && !turned) turned.emplace(from, rows, depth, depth);
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

// y = x.
ffi::Error Once(Matrices x, ffi::Result<Matrices> y) {
  std::copy(x.typed_data(), x.typed_data() + x.element_count(), y->typed_data());
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    rows, Rows, ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Matrices>().Arg<Matrices>().Arg<Used>().Ret<Matrices>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(table, Table,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Matrix>().Arg<Matrix>().Ret<Matrix>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(once, Once, ffi::Ffi::Bind().Arg<Matrices>().Ret<Matrices>());
