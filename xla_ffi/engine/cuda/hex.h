// Bytes as text, for a store that keeps text.
#ifndef JAX_FUSCO_ENGINE_CUDA_HEX_H_
#define JAX_FUSCO_ENGINE_CUDA_HEX_H_

#include <cstddef>
#include <cstdlib>
#include <string>

namespace jax_fusco::cuda {

inline std::string ToHex(const char* data, size_t size) {
  const char* digits = "0123456789abcdef";
  std::string text;
  for (size_t i = 0; i < size; ++i) {
    const auto byte = static_cast<unsigned char>(data[i]);
    text += digits[byte >> 4];
    text += digits[byte & 15];
  }
  return text;
}
// Bytes that the text lacks stay as they are.
inline void FromHex(const std::string& text, char* data, size_t size) {
  for (size_t i = 0; i < size && 2 * i + 1 < text.size(); ++i) {
    const std::string byte = text.substr(2 * i, 2);
    data[i] = static_cast<char>(std::strtol(byte.c_str(), nullptr, 16));
  }
}

}  // namespace jax_fusco::cuda

#endif  // JAX_FUSCO_ENGINE_CUDA_HEX_H_
