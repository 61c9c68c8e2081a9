// Grouped matrix products over a plain loop in place of the BLAS, against literal sums. Operands
// are small integers, so that every sum is exact.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "tests/native/check.h"
#include "tests/native/floats.h"
#include "tests/native/isas.h"
#include "xla_ffi/engine/cpu/grouped_matmul.h"

namespace jax_fusco::testing {
namespace {

void PlainSgemm(int order, int transpose_a, int transpose_b, int m, int n, int k, float alpha,
                const float* a, int lda, const float* b, int ldb, float beta, float* c, int ldc) {
  CHECK_EQ(order, 101);
  for (int i = 0; i < m; ++i) {
    for (int j = 0; j < n; ++j) {
      float sum = 0;
      for (int l = 0; l < k; ++l) {
        sum += (transpose_a == 112 ? a[l * lda + i] : a[i * lda + l]) *
               (transpose_b == 112 ? b[j * ldb + l] : b[l * ldb + j]);
      }
      c[i * ldc + j] = alpha * sum + (beta == 0 ? 0 : beta * c[i * ldc + j]);
    }
  }
}

// Integers from -2 to 2.
Bytes Integers(int64_t count, Float type, Random& random) {
  Bytes bytes(static_cast<size_t>(count * SizeOf(type)));
  for (int64_t i = 0; i < count; ++i) {
    Put(bytes.data(), i, type, static_cast<double>(random.Int(-2, 2)));
  }
  return bytes;
}

// NaN everywhere: what is not written shows.
Bytes Garbage(int64_t bytes) { return Bytes(static_cast<size_t>(bytes), static_cast<char>(0xff)); }

Rows AsRows(Bytes& bytes, int64_t count, int64_t length, Float type) {
  return {bytes.data(), count, length * SizeOf(type)};
}

struct Case {
  Float type;
  int64_t num_read, num_out, p, q, total = 0, count;
  std::vector<int32_t> sizes, source, merge;
  std::vector<float> weights;
  Bytes rows, kernel, g;

  // `most_rows` in a group; `p` and `q` from `least` to `most`.
  Case(Random& random, int64_t most_rows, int64_t least, int64_t most) {
    type = random.Of({Float::kBf16, Float::kF16, Float::kF32});
    p = random.Int(least, most);
    q = random.Int(least, most);
    for (int64_t e = random.Int(1, 4); e > 0; --e) {
      sizes.push_back(static_cast<int32_t>(random.OneIn(4) ? 0 : random.Int(1, most_rows)));
      total += sizes.back();
    }
    count = total + random.Int(0, 5);
    num_read = num_out = count;
    if (random.OneIn(2)) Index(&source, &(num_read = random.Int(1, 20)), random);
    if (random.OneIn(2)) Index(&merge, &(num_out = random.Int(1, 20)), random);
    if (random.OneIn(2)) {
      for (int64_t a = 0; a < count; ++a) {
        // Nothing is done with the weight of an assignment that goes nowhere.
        const bool goes = a < total && Source(a) >= 0 && Merge(a) >= 0;
        weights.push_back(goes ? random.Of({0.5f, 1.0f, -1.0f, 2.0f}) : std::nanf(""));
      }
    }
    rows = Integers(num_read * p, type, random);
    kernel = Integers(static_cast<int64_t>(sizes.size()) * p * q, type, random);
    g = Integers(num_out * q, type, random);
  }

  void Index(std::vector<int32_t>* index, const int64_t* rows_there, Random& random) const {
    for (int64_t a = 0; a < count; ++a) {
      index->push_back(static_cast<int32_t>(random.Int(-1, *rows_there - 1)));
    }
  }

  int64_t groups() const { return static_cast<int64_t>(sizes.size()); }
  int64_t Source(int64_t a) const { return source.empty() ? a : source[static_cast<size_t>(a)]; }
  int64_t Merge(int64_t a) const { return merge.empty() ? a : merge[static_cast<size_t>(a)]; }
  double Weight(int64_t a) const { return weights.empty() ? 1 : weights[static_cast<size_t>(a)]; }
  std::vector<double> Values(const Bytes& bytes) const {
    std::vector<double> values(bytes.size() / static_cast<size_t>(SizeOf(type)));
    for (size_t i = 0; i < values.size(); ++i) {
      values[i] = Get(bytes.data(), static_cast<int64_t>(i), type);
    }
    return values;
  }

  // Calls visit(group, assignment, row read, row written) where both are there.
  template <typename Visit>
  void ForEach(const Visit& visit) const {
    int64_t a = 0;
    for (int64_t e = 0; e < groups(); ++e) {
      for (int64_t i = 0; i < sizes[static_cast<size_t>(e)]; ++i, ++a) {
        if (Source(a) >= 0 && Merge(a) >= 0) visit(e, a, Source(a), Merge(a));
      }
    }
  }
};

template <typename T>
const T* OrNull(const std::vector<T>& values) {
  return values.empty() ? nullptr : values.data();
}

bool Same(double a, double b) { return a == b || (std::isnan(a) && std::isnan(b)); }

// The sums, rounded once, as `type` has them. Zeros may have either sign.
void CheckSums(const std::vector<double>& sums, const Bytes& found, Float type,
               const std::string& what) {
  for (size_t i = 0; i < sums.size(); ++i) {
    char expected[8];
    Put(expected, 0, type, sums[i]);
    const double value = Get(found.data(), static_cast<int64_t>(i), type);
    if (Same(value, Get(expected, 0, type))) continue;
    Fail(__FILE__, __LINE__,
         what + ": element " + std::to_string(i) + " is " + std::to_string(value) + ", not " +
             std::to_string(sums[i]));
    return;
  }
}

// Forward (rows times kernels) and backward of rows and weights (the same with the kernel
// transposed and the indices swapped).
void CheckMatmul(Case& c, bool transposed, const cpu::Settings& settings) {
  const int64_t depth = transposed ? c.q : c.p, width = transposed ? c.p : c.q;
  const int64_t num_out = transposed ? c.num_read : c.num_out;
  Bytes out = Garbage(num_out * width * SizeOf(c.type));
  std::vector<float> dots(static_cast<size_t>(c.count), 77);
  GroupedMatmulCall call;
  call.type = c.type;
  call.num_groups = c.groups();
  call.num_assignments = c.count;
  call.group_sizes = c.sizes.data();
  call.source = OrNull(transposed ? c.merge : c.source);
  call.merge = OrNull(transposed ? c.source : c.merge);
  call.weights = OrNull(c.weights);
  call.transposed = transposed;
  call.kernel_rows = c.p;
  call.kernel_columns = c.q;
  call.rows =
      transposed ? AsRows(c.g, c.num_out, c.q, c.type) : AsRows(c.rows, c.num_read, c.p, c.type);
  call.kernel = AsRows(c.kernel, c.groups() * c.p, c.q, c.type);
  call.out = AsRows(out, num_out, width, c.type);
  if (transposed) {
    call.partner = AsRows(c.rows, c.num_read, c.p, c.type);
    call.dots = dots.data();
  }
  const Status status = cpu::GroupedMatmul(call, settings);
  if (!CHECK(status.ok())) return;
  const std::vector<double> rows = c.Values(c.rows), kernel = c.Values(c.kernel), g = c.Values(c.g);
  std::vector<double> sums(static_cast<size_t>(num_out * width)), products(dots.size());
  // An element of the kernel is so far from the next one of the sum, and of the result.
  const int64_t next_i = transposed ? 1 : c.q, next_j = transposed ? c.q : 1;
  c.ForEach([&](int64_t e, int64_t a, int64_t read, int64_t written) {
    const double* const x = transposed ? g.data() + written * c.q : rows.data() + read * c.p;
    for (int64_t j = 0; j < width; ++j) {
      const double* const k = kernel.data() + e * c.p * c.q + j * next_j;
      double product = 0;
      for (int64_t i = 0; i < depth; ++i) product += x[i] * k[i * next_i];
      sums[static_cast<size_t>((transposed ? read : written) * width + j)] += c.Weight(a) * product;
      if (transposed) products[static_cast<size_t>(a)] += product * rows.data()[read * c.p + j];
    }
  });
  CheckSums(sums, out, c.type, transposed ? "transposed" : "forward");
  for (size_t a = 0; transposed && a < dots.size(); ++a) {
    CHECK(Same(static_cast<double>(dots[a]), products[a]));
  }
}

void CheckOuter(Case& c, const cpu::Settings& settings) {
  Bytes out = Garbage(static_cast<int64_t>(c.kernel.size()));
  GroupedOuterCall call;
  call.type = c.type;
  call.num_groups = c.groups();
  call.num_assignments = c.count;
  call.group_sizes = c.sizes.data();
  call.source = OrNull(c.source);
  call.merge = OrNull(c.merge);
  call.weights = OrNull(c.weights);
  call.kernel_rows = c.p;
  call.kernel_columns = c.q;
  call.rows = AsRows(c.rows, c.num_read, c.p, c.type);
  call.g = AsRows(c.g, c.num_out, c.q, c.type);
  call.out = AsRows(out, c.groups() * c.p, c.q, c.type);
  if (!CHECK(cpu::GroupedOuter(call, settings).ok())) return;
  const std::vector<double> rows = c.Values(c.rows), g = c.Values(c.g);
  std::vector<double> sums(static_cast<size_t>(c.groups() * c.p * c.q));
  c.ForEach([&](int64_t e, int64_t a, int64_t read, int64_t written) {
    for (int64_t i = 0; i < c.p; ++i) {
      const double scaled = c.Weight(a) * rows.data()[read * c.p + i];
      double* const sum = sums.data() + (e * c.p + i) * c.q;
      for (int64_t j = 0; j < c.q; ++j) sum[j] += scaled * g.data()[written * c.q + j];
    }
  });
  CheckSums(sums, out, c.type, "outer");
}

void Check(Case& c, const cpu::Settings& settings) {
  CheckMatmul(c, false, settings);
  CheckMatmul(c, true, settings);
  CheckOuter(c, settings);
}

cpu::Settings ReadSettings(int threads) {
  cpu::Settings settings;
  CHECK(cpu::Settings::Read(&settings).ok());
  settings.threads = threads;
  return settings;
}

void SmallCases() {
  cpu::SetSgemm(PlainSgemm);
  Random random(1);
  for (int i = 0; i < 200; ++i) {
    Case c(random, i % 4 == 0 ? 70 : 9, 1, 40);
    cpu::Settings settings = ReadSettings(1 + i % 3);
    settings.isa = Isas()[static_cast<size_t>(i / 4) % Isas().size()];
    Check(c, settings);
  }
}

void SeveralTiles() {
  cpu::SetSgemm(PlainSgemm);
  Random random(2);
  for (int i = 0; i < 4; ++i) {
    Case c(random, 290, 513, 540);
    Check(c, ReadSettings(4));
  }
}

// Sums that are made in several parts, several tiles of rows, and strips and panels that are not
// whole.
void SeveralParts() {
  cpu::SetSgemm(PlainSgemm);
  Random random(6);
  for (const cpu::Isa isa : Isas()) {
    if (isa < cpu::Isa::kAvx512) continue;  // SeveralTiles is enough for the BLAS
    for (const Float type : {Float::kBf16, Float::kF32}) {
      const auto suits = [&](const Case& c) {
        const int32_t most = *std::max_element(c.sizes.begin(), c.sizes.end());
        return c.type == type && c.p % 2 == 0 && c.q % 2 == 0 && most > 512;
      };
      Case c(random, 560, 250, 300);
      while (!suits(c)) c = Case(random, 560, 250, 300);
      cpu::Settings settings = ReadSettings(2);
      settings.isa = isa;
      Check(c, settings);
    }
  }
}

// What an earlier call has left in a thread's memory, NaN at worst, is in no sum.
void NothingIsLeft() {
  cpu::SetSgemm(PlainSgemm);
  Random random(8);
  const auto make = [&](Float type, int64_t least, int64_t most) {
    const auto suits = [type](const Case& c) {
      return c.type == type && c.p % 2 == 0 && c.q % 2 == 0 && c.total >= 32 && c.source.empty() &&
             c.merge.empty() && c.weights.empty();
    };
    Case c(random, 80, least, most);
    while (!suits(c)) c = Case(random, 80, least, most);
    return c;
  };
  for (const cpu::Isa isa : Isas()) {
    cpu::Settings settings = ReadSettings(1);
    settings.isa = isa;
    for (const Float type : {Float::kBf16, Float::kF32}) {
      Case before = make(type, 180, 200), c = make(type, 30, 50);
      for (Bytes* bytes : {&before.rows, &before.kernel, &before.g}) {
        *bytes = Garbage(static_cast<int64_t>(bytes->size()));
      }
      Check(before, settings);
      CheckMatmul(c, false, settings);
      Check(before, settings);
      CheckMatmul(c, true, settings);
      Check(before, settings);
      CheckOuter(c, settings);
    }
  }
}

// Tiles that the BLAS cuts itself.
void LargeTiles() {
  cpu::SetSgemm(PlainSgemm);
  Random random(7);
  Case c(random, 1, 1, 1);
  c.type = Float::kF32;
  c.p = 600, c.q = 1600;
  c.sizes = {3, 0, 520};
  c.total = c.count = c.num_read = c.num_out = 523;
  c.source.clear(), c.merge.clear(), c.weights.clear();
  c.rows = Integers(c.count * c.p, c.type, random);
  c.kernel = Integers(c.groups() * c.p * c.q, c.type, random);
  c.g = Integers(c.count * c.q, c.type, random);
  CheckMatmul(c, false, ReadSettings(2));
  CheckOuter(c, ReadSettings(2));
}

// Rows whose distance is a power of two, of every type.
void RowsThatCompete() {
  cpu::SetSgemm(PlainSgemm);
  Random random(4);
  for (int i = 0; i < 4; ++i) {
    Case c(random, 40, 1024, 1024);
    Check(c, ReadSettings(2));
  }
}

std::atomic<int> blas_calls{0};
void CountingSgemm(int order, int transpose_a, int transpose_b, int m, int n, int k, float alpha,
                   const float* a, int lda, const float* b, int ldb, float beta, float* c,
                   int ldc) {
  ++blas_calls;
  PlainSgemm(order, transpose_a, transpose_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}

// Where there are instructions for it, groups of 32 rows and more are multiplied without a BLAS,
// unless it can read many rows in place.
void WhoNeedsTheBlas() {
  cpu::SetSgemm(CountingSgemm);
  Random random(5);
  const cpu::Settings settings = ReadSettings(1);
  bool seen[2][3] = {};  // [index][size]
  for (int i = 0; i < 600; ++i) {
    Case c(random, random.Of({40, 300}), 5, 9);
    const bool index = !c.source.empty();
    if (c.type != Float::kF32 || c.groups() != 1 || c.total == 0) continue;
    const bool ours = c.total >= 32 && (c.total <= 256 || index);
    blas_calls = 0;
    CheckMatmul(c, false, settings);
    CHECK_EQ(blas_calls == 0, ours && settings.isa >= cpu::Isa::kAvx512);
    seen[index][c.total < 32 ? 0 : c.total <= 256 ? 1 : 2] = true;
  }
  for (const auto& sizes : seen) CHECK(sizes[0] && sizes[1] && sizes[2]);
}

// Helpers of a pool that come late, or never, hold nobody up and touch nothing.
void PoolsMayBeSlow() {
  std::vector<std::function<void()>> late;
  const cpu::Workers::Schedule keep = [&late](std::function<void()> task) {
    late.push_back(std::move(task));
  };
  const cpu::Workers::Schedule start = [](std::function<void()> task) {
    std::thread(std::move(task)).detach();
  };
  std::atomic<int64_t> calls{0};
  cpu::Workers::ParallelFor(4, 100, [&](int64_t) { ++calls; }, keep);
  CHECK_EQ(calls.load(), 100);
  CHECK_EQ(late.size(), size_t{3});
  for (const auto& task : late) task();
  CHECK_EQ(calls.load(), 100);
  cpu::Workers::ParallelFor(4, 1000, [&](int64_t) { ++calls; }, start);
  CHECK_EQ(calls.load(), 1100);
}

void RefusesWhatDoesNotFit() {
  cpu::SetSgemm(PlainSgemm);
  Random random(3);
  const cpu::Settings settings = ReadSettings(2);
  std::vector<float> memory(64);
  const auto run = [&](std::vector<int32_t> sizes, std::vector<int32_t> source,
                       std::vector<int32_t> merge) {
    GroupedMatmulCall call;
    call.num_groups = static_cast<int64_t>(sizes.size());
    call.num_assignments = 4;
    call.group_sizes = sizes.data();
    call.source = OrNull(source);
    call.merge = OrNull(merge);
    call.kernel_rows = call.kernel_columns = 2;
    call.rows = call.out = {memory.data(), 4, 8};
    call.kernel = {memory.data(), 4, 8};
    return cpu::GroupedMatmul(call, settings).message;
  };
  const std::string name = "jax_fusco_grouped_matmul: ";
  CHECK_EQ(run({-1, 2}, {}, {}), name + "group_sizes[0] is -1, it must be at least 0.");
  CHECK_EQ(run({3, 2}, {}, {}), name + "group_sizes add up to 5, there are 4 assignments.");
  CHECK_EQ(run({2, 1}, {0, 0, 4, 9}, {}),
           name + "source[2] is 4, which does not exist (of 4 rows).");
  CHECK_EQ(run({2, 1}, {}, {0, 7, 0, 9}),
           name + "merge[1] is 7, which does not exist (of 4 rows).");
  cpu::SetSgemm(nullptr);
  CHECK_EQ(run({2, 1}, {}, {}), name + "no BLAS was loaded, call jax_fusco.register() first.");
}

}  // namespace
}  // namespace jax_fusco::testing

int main(int argc, char** argv) {
  using namespace jax_fusco::testing;
  return RunTests(argc, argv,
                  {{"SmallCases", SmallCases},
                   {"SeveralTiles", SeveralTiles},
                   {"SeveralParts", SeveralParts},
                   {"NothingIsLeft", NothingIsLeft},
                   {"LargeTiles", LargeTiles},
                   {"RowsThatCompete", RowsThatCompete},
                   {"WhoNeedsTheBlas", WhoNeedsTheBlas},
                   {"PoolsMayBeSlow", PoolsMayBeSlow},
                   {"RefusesWhatDoesNotFit", RefusesWhatDoesNotFit}});
}
