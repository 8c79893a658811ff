// A filter for tests/backends/test_vector_math.py: reads float32 from stdin, applies one function of the vectors,
// writes float32.
#include <stdio.h>
#include <string.h>

#define SEQREC_TIER tier_test
#include "common/vector_half.h"
#include "common/vector_math.h"

using namespace seqrec_fast::SEQREC_TIER;

template <class Narrow>
static F32 through(F32 x) {
  Narrow memory[kLanes];
  store(memory, x);
  return load(memory);
}

// The first n lanes, for every n in turn, each through a part load and a part store.
template <class T>
static void copy_parts(const float* in, float* out) {
  for (int n = 0; n <= kLanes; ++n) {
    T memory[kLanes], copy[kLanes];
    store(memory, load(in));
    memset(copy, 0, sizeof copy);
    store_first(copy, n, load_first(memory, n));
    store(out + n * kLanes, load(copy));
  }
}

int main(int count, char** arguments) {
  if (count != 2) return 2;
  const char* name = arguments[1];
  float in[kLanes] = {}, out[kLanes * (kLanes + 1)] = {};
  for (size_t n; (n = fread(in, sizeof(float), kLanes, stdin)) > 0;) {
    const F32 x = load(in);
    size_t results = n;
    if (!strcmp(name, "exp")) {
      store(out, exp(x));
    } else if (!strcmp(name, "sigmoid")) {
      store(out, sigmoid(x));
    } else if (!strcmp(name, "tanh")) {
      store(out, tanh(x));
    } else if (!strcmp(name, "bf16")) {
      store(out, through<BF16>(x));
    } else if (!strcmp(name, "fp16")) {
      store(out, through<F16>(x));
    } else if (!strcmp(name, "reduce_add")) {
      out[0] = reduce_add(x);
      results = 1;
    } else if (!strcmp(name, "negative_bits")) {
      out[0] = (float)mask_bits(x < 0.0f);
      results = 1;
    } else if (!strcmp(name, "parts") || !strcmp(name, "bf16_parts") || !strcmp(name, "fp16_parts")) {
      if (name[0] == 'p') copy_parts<float>(in, out);
      if (name[0] == 'b') copy_parts<BF16>(in, out);
      if (name[0] == 'f') copy_parts<F16>(in, out);
      results = kLanes * (kLanes + 1);
    } else if (!strcmp(name, "lanes")) {
      out[0] = kLanes;
      results = 1;
    } else {
      return 2;
    }
    if (fwrite(out, sizeof(float), results, stdout) != results) return 1;
  }
  return 0;
}
