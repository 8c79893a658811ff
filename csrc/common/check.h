// Value checks of the native operators. Types and shapes are checked in Python before an operator is called; what only
// the data can tell (an id out of range) is checked here, by the C++ exceptions that reach Python as the matching
// built-in type.
#pragma once
#include <stdint.h>

#include <sstream>
#include <stdexcept>
#include <string>

namespace seqrec_fast {

template <class... Parts>
std::string message(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

// Arrives in Python as ValueError.
template <class... Parts>
void check_value(bool condition, const Parts&... parts) {
  if (!condition) throw std::invalid_argument(message(parts...));
}

// Arrives in Python as IndexError.
template <class... Parts>
void check_index(bool condition, const Parts&... parts) {
  if (!condition) throw std::out_of_range(message(parts...));
}

// Arrives in Python as RuntimeError. A tensor whose storage was freed (resized to 0 bytes) has no data.
inline const void* check_allocated(const void* data, int64_t numel) {
  if (data == nullptr && numel > 0)
    throw std::runtime_error(
        "a tensor has elements but no memory: its storage was freed (resize_(0)) or never allocated");
  return data;
}

}  // namespace seqrec_fast
