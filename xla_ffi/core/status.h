// The outcome of a call: success, or a code and one sentence for the user.
#ifndef JAX_FUSCO_CORE_STATUS_H_
#define JAX_FUSCO_CORE_STATUS_H_

#include <cstdint>
#include <string>
#include <utility>

namespace jax_fusco {

enum class Code : uint8_t { kOk, kInvalidArgument, kDeadlineExceeded, kInternal };

struct Status {
  Code code = Code::kOk;
  std::string message;

  bool ok() const { return code == Code::kOk; }

  static Status Ok() { return {}; }
  static Status InvalidArgument(std::string message) {
    return {Code::kInvalidArgument, std::move(message)};
  }
  static Status DeadlineExceeded(std::string message) {
    return {Code::kDeadlineExceeded, std::move(message)};
  }
  static Status Internal(std::string message) { return {Code::kInternal, std::move(message)}; }
};

namespace internal {
inline void Append(std::string& out, const char* part) { out += part; }
inline void Append(std::string& out, const std::string& part) { out += part; }
inline void Append(std::string& out, int64_t part) { out += std::to_string(part); }
}  // namespace internal

// Concatenates strings and integers.
template <typename... Parts>
std::string Concat(const Parts&... parts) {
  std::string out;
  (internal::Append(out, parts), ...);
  return out;
}

}  // namespace jax_fusco

#endif  // JAX_FUSCO_CORE_STATUS_H_
