// The loops that bound the merge on a CPU: they move its bytes and compute next to nothing.
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define BLOCK 16384

#if defined(__AVX512F__)
typedef __m512 vector;
#define STREAM _mm512_stream_ps
#elif defined(__AVX2__)
typedef __m256 vector;
#define STREAM _mm256_stream_ps
#elif defined(__x86_64__)
typedef __m128 vector;
#define STREAM _mm_stream_ps
#else
typedef float vector __attribute__((vector_size(16)));
#define STREAM(to, v) memcpy(to, &v, sizeof(v))
#endif

enum { LANES = sizeof(vector) / sizeof(float) };

static vector load(const float* from) {
  vector v;
  memcpy(&v, from, sizeof(v));
  return v;
}

/// out = Σ of `rows` rows of `elements` floats, `stride` apart; the rest of a vector is left out. `streamed`: past the
/// caches.
void sum_rows(const float* rows, int64_t stride, int64_t count, int64_t elements, float* out, int streamed,
              int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t block = 0; block < elements; block += BLOCK) {
    const int64_t end = block + BLOCK < elements ? block + BLOCK : elements;
    for (int64_t i = block; i + LANES <= end; i += LANES) {
      vector sum = load(rows + i);
      for (int64_t row = 1; row < count; ++row) sum += load(rows + row * stride + i);
      if (streamed) {
        STREAM(out + i, sum);
      } else {
        memcpy(out + i, &sum, sizeof(sum));
      }
    }
  }
}

/// a = b + 3 c, as in STREAM.
void triad(float* a, const float* b, const float* c, int64_t elements, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t block = 0; block < elements; block += BLOCK) {
    const int64_t end = block + BLOCK < elements ? block + BLOCK : elements;
    for (int64_t i = block; i + LANES <= end; i += LANES) {
      vector sum = load(b + i) + 3.0f * load(c + i);
      STREAM(a + i, sum);
    }
  }
}
