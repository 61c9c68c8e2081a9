// The row kernels of every instruction set this machine has, against scalar code.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "tests/native/check.h"
#include "tests/native/floats.h"
#include "tests/native/isas.h"
#include "xla_ffi/core/status.h"
#include "xla_ffi/engine/cpu/rows.h"

namespace jax_fusco::testing {
namespace {

using cpu::Isa;
using cpu::RowKernels;

constexpr int64_t kLengths[] = {0, 1, 7, 15, 16, 17, 63, 64, 65, 1000, 2880};

RowKernels::SumRows SumRowsOf(Isa isa, Float y, Float out) {
  return RowKernels::For(isa).sum_rows[static_cast<int>(y)][static_cast<int>(out)];
}
RowKernels::ScaleAndDot ScaleAndDotOf(Isa isa, Float g, Float y) {
  return RowKernels::For(isa).scale_and_dot[static_cast<int>(g)][static_cast<int>(y)];
}

Float SumType(Float y) { return y == Float::kF64 ? Float::kF64 : Float::kF32; }

// a * b + c rounded once to the type of the sum.
double Fma(double a, double b, double c, Float sum) {
  if (sum == Float::kF64) return std::fma(a, b, c);
  return std::fma(static_cast<float>(a), static_cast<float>(b), static_cast<float>(c));
}

// Rows in memory of exactly their size, at addresses aligned to their elements only.
struct RowSet {
  std::vector<Bytes> memory;
  std::vector<const void*> rows;
  int64_t length;
  Float type;

  RowSet(int64_t n, int64_t length, Float type, bool specials, Random& random)
      : length(length), type(type) {
    for (int64_t j = 0; j < n; ++j) {
      const int64_t skipped = random.Int(0, 1);
      memory.push_back(RandomFloats(length + skipped, type, specials, random));
      rows.push_back(memory.back().data() + skipped * SizeOf(type));
    }
  }
};

std::string What(const char* kernel, Isa isa, Float a, Float b, int64_t length) {
  return Concat(kernel, " ", cpu::IsaName(isa), " ", Name(a), " to ", Name(b), " length ", length);
}

void SumRowsIsTheScalarLoop() {
  Random random(1);
  for (Float y : kFloats) {
    for (Float out : kFloats) {
      for (int64_t length : kLengths) {
        for (int64_t n : {0, 1, 2, 8, 9}) {
          const Float sum = SumType(y);
          const RowSet set(n, length, y, n == 9 || n == 1, random);
          const RowSet next(n, length, y, false, random);
          const Bytes weights = RandomFloats(n, sum, false, random);
          Bytes expected(static_cast<size_t>(length * SizeOf(out)));
          for (int64_t i = 0; i < length; ++i) {
            double total = 0;
            for (int64_t j = 0; j < n; ++j) {
              total = Fma(Get(weights.data(), j, sum), Get(set.rows[static_cast<size_t>(j)], i, y),
                          total, sum);
            }
            Put(expected.data(), i, out, total);
          }
          for (Isa isa : Isas()) {
            Bytes result(expected.size(), 'x');
            SumRowsOf(isa, y, out)(set.rows.data(), weights.data(), n, length, result.data(),
                                   next.rows.data());
            const std::string what = What("sum_rows", isa, y, out, length);
            if (!CheckSame(result.data(), expected.data(), length, out, what)) break;
          }
        }
      }
    }
  }
}

// A tree over 16 partial sums, each the fused sum of every 16th element. Elements past the end
// count as zeros, which turns a partial sum of -0 (an underflow) into +0.
double Dot(const void* g, Float g_type, const void* y, Float y_type, int64_t length) {
  const Float sum = SumType(y_type);
  double sums[16] = {};
  for (int64_t i = 0; i < (length + 15) / 16 * 16; ++i) {
    double a = i < length ? Get(g, i, g_type) : 0;
    if (sum == Float::kF32) a = static_cast<float>(a);
    sums[i % 16] = Fma(a, i < length ? Get(y, i, y_type) : 0, sums[i % 16], sum);
  }
  for (int half = 8; half >= 1; half /= 2) {
    for (int i = 0; i < half; ++i) sums[i] = Fma(1, sums[i], sums[i + half], sum);
  }
  return sums[0];
}

void ScaleAndDotIsTheScalarLoop() {
  Random random(2);
  for (Float g : kFloats) {
    for (Float y : kFloats) {
      for (int64_t length : kLengths) {
        for (bool specials : {false, true}) {
          const Float sum = SumType(y);
          const RowSet g_row(2, length, g, specials, random), y_row(1, length, y, specials, random);
          const Bytes weight = RandomFloats(1, sum, false, random);
          Bytes dy(static_cast<size_t>(length * SizeOf(y)));
          Bytes dot(static_cast<size_t>(SizeOf(sum)));
          for (int64_t i = 0; i < length; ++i) {
            double part = Get(g_row.rows[0], i, g);
            if (sum == Float::kF32) part = static_cast<float>(part);
            double product = Get(weight.data(), 0, sum) * part;
            if (sum == Float::kF32) product = static_cast<float>(product);  // exact before
            Put(dy.data(), i, y, product);
          }
          Put(dot.data(), 0, sum, Dot(g_row.rows[0], g, y_row.rows[0], y, length));
          for (Isa isa : Isas()) {
            Bytes got_dy(dy.size(), 'x'), got_dot(dot.size(), 'x');
            ScaleAndDotOf(isa, g, y)(g_row.rows[0], y_row.rows[0], weight.data(), length,
                                     got_dy.data(), got_dot.data(), g_row.rows[1]);
            const std::string what = What("scale_and_dot", isa, g, y, length);
            if (!CheckSame(got_dy.data(), dy.data(), length, y, what + ", dy")) break;
            if (!CheckSame(got_dot.data(), dot.data(), 1, sum, what + ", dot")) break;
          }
        }
      }
    }
  }
}

// Rounds `values` (of type `from`) with a kernel: the sum of one row of weight one.
void CheckRounding(const Bytes& values, Float from, Float to) {
  const int64_t length = static_cast<int64_t>(values.size()) / SizeOf(from);
  Bytes expected(static_cast<size_t>(length * SizeOf(to)));
  for (int64_t i = 0; i < length; ++i) {
    const double value = Get(values.data(), i, from);
    Put(expected.data(), i, to, value + 0.0);  // a sum begins with +0
  }
  const void* const row = values.data();
  const double one = 1;
  const float narrow_one = 1;
  const void* const weight = from == Float::kF64 ? static_cast<const void*>(&one) : &narrow_one;
  for (Isa isa : Isas()) {
    Bytes result(expected.size(), 'x');
    SumRowsOf(isa, from, to)(&row, weight, 1, length, result.data(), &row);
    CheckSame(result.data(), expected.data(), length, to, What("rounding", isa, from, to, length));
  }
}

// Every 16-bit number, and what lies between it and the next: the middle, and a little to each
// side.
void EverySixteenBitNumber() {
  for (Float to : {Float::kBf16, Float::kF16}) {
    Bytes all(size_t{2} << 16), floats(size_t{4} << 18), doubles(size_t{8} << 18);
    for (int64_t bits = 0; bits < 1 << 16; ++bits) {
      const auto narrow = static_cast<uint16_t>(bits);
      std::memcpy(all.data() + 2 * bits, &narrow, 2);
      const double value = Decode16(narrow, to);
      double next = Decode16(static_cast<uint16_t>(narrow + 1), to);
      if (std::isinf(next))
        next = std::copysign(std::ldexp(1.0, 2 - FormatOf(to).min_exponent), value);
      const double middle = value / 2 + next / 2;
      const auto float_middle = static_cast<float>(middle);
      const double tries[] = {value, middle, std::nextafter(middle, 0.0),
                              std::nextafter(middle, 2 * next)};
      const float float_tries[] = {static_cast<float>(value), float_middle,
                                   std::nextafterf(float_middle, 0.0f),
                                   std::nextafterf(float_middle, static_cast<float>(2 * next))};
      std::memcpy(doubles.data() + 32 * bits, tries, 32);
      std::memcpy(floats.data() + 16 * bits, float_tries, 16);
    }
    for (Float wide : {Float::kF32, Float::kF64, Float::kBf16, Float::kF16}) {
      CheckRounding(all, to, wide);  // loads are exact
    }
    CheckRounding(floats, Float::kF32, to);
    CheckRounding(doubles, Float::kF64, to);  // once, not by way of float
    CheckRounding(doubles, Float::kF64, Float::kF32);
  }
}

void StreamRowsCopies() {
  Random random(3);
  for (int64_t bytes : {0, 1, 3, 63, 64, 65, 255, 256, 257, 1000, 4096, 5760}) {
    for (int64_t n : {0, 1, 2, 5}) {
      for (Isa isa : Isas()) {
        const int64_t skipped = random.Int(0, 70);
        std::vector<Bytes> memory;
        std::vector<const void*> rows;
        std::vector<size_t> places;
        Bytes expected(static_cast<size_t>(skipped), 'x');
        for (int64_t m = 0; m < n; ++m) {
          Bytes row(static_cast<size_t>(bytes + random.Int(0, 1)));
          for (char& byte : row) byte = static_cast<char>(random.Bits());
          if (random.OneIn(4)) row.assign(row.size(), '\0');
          const bool zero = std::count(row.begin(), row.end(), '\0') == bytes;
          places.push_back(expected.size());
          expected.insert(expected.end(), row.end() - bytes, row.end());
          if (random.OneIn(3)) expected.resize(expected.size() + random.Int(1, 80), 'x');
          memory.push_back(std::move(row));
          rows.push_back(zero ? nullptr : memory.back().data() + memory.back().size() - bytes);
        }
        Bytes result(expected.size() + 64, 'x');
        expected.resize(result.size(), 'x');
        std::vector<void*> to;
        for (const size_t place : places) to.push_back(result.data() + place);
        RowKernels::For(isa).stream_rows(to.data(), rows.data(), n, bytes);
        if (!CHECK(result == expected)) return;
      }
    }
  }
}

}  // namespace
}  // namespace jax_fusco::testing

int main(int argc, char** argv) {
  using namespace jax_fusco::testing;
  for (jax_fusco::cpu::Isa isa : Isas()) std::printf("%s ", jax_fusco::cpu::IsaName(isa));
  std::printf("\n");
  return RunTests(argc, argv,
                  {{"SumRowsIsTheScalarLoop", SumRowsIsTheScalarLoop},
                   {"ScaleAndDotIsTheScalarLoop", ScaleAndDotIsTheScalarLoop},
                   {"EverySixteenBitNumber", EverySixteenBitNumber},
                   {"StreamRowsCopies", StreamRowsCopies}});
}
