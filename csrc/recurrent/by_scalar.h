// From the Scalar of a call to the kernel compiled for its type.
#pragma once

#include "common/vector_half.h"
#include "kernels.h"

namespace seqrec_fast::SEQREC_TIER {

// Kernel<T>::run(arguments…) for the T of `scalar`.
template <template <class> class Kernel, class... Arguments>
auto by_scalar(Scalar scalar, Arguments&&... arguments) {
  switch (scalar) {
    case Scalar::kFloat:
      return Kernel<float>::run(arguments...);
    case Scalar::kDouble:
      return Kernel<double>::run(arguments...);
    case Scalar::kBFloat16:
      return Kernel<BF16>::run(arguments...);
    case Scalar::kHalf:
      break;
  }
  return Kernel<F16>::run(arguments...);
}

}  // namespace seqrec_fast::SEQREC_TIER
