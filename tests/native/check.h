// The harness of the native tests: checks that say where and what, a table of tests, random
// numbers.
#ifndef JAX_FUSCO_TESTS_NATIVE_CHECK_H_
#define JAX_FUSCO_TESTS_NATIVE_CHECK_H_

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <random>
#include <sstream>
#include <string>
#include <vector>

namespace jax_fusco::testing {

inline std::atomic<int> failures{0};

// Reports a failure; the first few are enough to see what is wrong.
inline void Fail(const char* file, int line, const std::string& what) {
  std::fprintf(stderr, "%s:%d: %s\n", file, line, what.c_str());
  if (++failures >= 20) std::_Exit(1);
}

inline bool Check(bool holds, const char* file, int line, const char* text) {
  if (!holds) Fail(file, line, text);
  return holds;
}

template <typename A, typename B>
bool CheckEqual(const A& a, const B& b, const char* file, int line, const char* text) {
  if (a == b) return true;
  std::ostringstream out;
  out << text << ": " << a << " against " << b;
  Fail(file, line, out.str());
  return false;
}

template <typename T>
bool CheckEqual(const std::vector<T>& a, const std::vector<T>& b, const char* file, int line,
                const char* text) {
  if (a == b) return true;
  std::ostringstream out;
  out << text << ": sizes " << a.size() << " and " << b.size();
  for (size_t i = 0; i < a.size() && i < b.size(); ++i) {
    if (a[i] == b[i]) continue;
    out << ", first different at " << i << ": " << +a[i] << " against " << +b[i];
    break;
  }
  Fail(file, line, out.str());
  return false;
}

// Both are expressions that are true where the check holds; a failed one does not stop the test.
#define CHECK(condition) \
  ::jax_fusco::testing::Check(static_cast<bool>(condition), __FILE__, __LINE__, #condition)
#define CHECK_EQ(a, b) ::jax_fusco::testing::CheckEqual((a), (b), __FILE__, __LINE__, #a " == " #b)

struct Test {
  const char* name;
  void (*body)();
};

// Runs the tests, or those named on the command line, or prints their names (--list); the exit
// status of main.
inline int RunTests(int argc, char** argv, std::initializer_list<Test> tests) {
  const bool list = argc == 2 && std::strcmp(argv[1], "--list") == 0;
  for (const Test& test : tests) {
    if (list) {
      std::printf("%s\n", test.name);
      continue;
    }
    bool wanted = argc < 2;
    for (int i = 1; i < argc; ++i) wanted |= std::strcmp(argv[i], test.name) == 0;
    if (!wanted) continue;
    const int before = failures;
    test.body();
    std::printf("%s %s\n", failures == before ? "pass" : "FAIL", test.name);
    std::fflush(stdout);
  }
  return failures == 0 ? 0 : 1;
}

// The same numbers everywhere: the library's distributions differ between systems.
class Random {
 public:
  explicit Random(uint64_t seed) : bits_(seed) {}

  uint64_t Bits() { return bits_(); }
  // In [low, high].
  int64_t Int(int64_t low, int64_t high) {
    return low + static_cast<int64_t>(bits_() % static_cast<uint64_t>(high - low + 1));
  }
  bool OneIn(int64_t n) { return Int(1, n) == 1; }
  template <typename T>
  T Of(std::initializer_list<T> values) {
    return values.begin()[Int(0, static_cast<int64_t>(values.size()) - 1)];
  }

 private:
  std::mt19937_64 bits_;
};

}  // namespace jax_fusco::testing

#endif  // JAX_FUSCO_TESTS_NATIVE_CHECK_H_
