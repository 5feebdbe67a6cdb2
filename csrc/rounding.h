// Division and rounding of counts, which are not negative.
#pragma once

#include <cstdint>

namespace cbam {

constexpr int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return divide_up(value, multiple) * multiple;
}

constexpr int64_t power_of_two_from(int64_t value) {
  int64_t power = 1;
  while (power < value) power *= 2;
  return power;
}

}  // namespace cbam
