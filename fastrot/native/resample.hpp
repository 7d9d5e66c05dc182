// A box of a picture -> size x size, equal to the bit to fastrot/ops/resample.py.
//
// Shapes.  A box of h x w pixels; n = taps(h, w, size): the box goes to (n * size)^2 by OpenCV's INTER_LINEAR, and
//          each pixel is the mean of its n x n.
// Maths.   Columns first: H = (p[x0] * ax + p[x1] * bx) >> 4, which fits 16 bits (255 * 2049 / 16 = 32,656);
//          rows: (((ay * H[y0]) >> 16) + ((by * H[y1]) >> 16) + 2) >> 2. Weights are 11 bits.
// Idea.    H is kept for two rows, as 16-bit pixels of four channels (the fourth is not used), so each row of the box
//          passes once. A mirrored crop is the same with the columns' table turned round.

#pragma once

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <cmath>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define FASTROT_X86 1
#define AVX2 __attribute__((target("avx2")))
#else
#define FASTROT_X86 0
#endif

namespace fastrot {

constexpr int64_t LONGEST = int64_t(1) << 17;  // pixels a side of a box
constexpr int SPARE = 32;   // bytes behind whatever Scratch gives
constexpr int READ = 16;    // bytes that the wide form reads at a pixel

// Whether the wide instructions run; tests switch them off.
inline bool& wide() {
#if FASTROT_X86
  static bool found = __builtin_cpu_supports("avx2");
#else
  static bool found = false;
#endif
  return found;
}

// Memory that only grows; what it held is gone when it does.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { free(memory_); }

  // Null where there is none left.
  template <typename T>
  T* of(size_t count) {
    const size_t wanted = count * sizeof(T) + SPARE;
    if (wanted > size_) {
      free(memory_);
      memory_ = aligned_alloc(64, (wanted + 63) / 64 * 64);
      size_ = memory_ ? wanted : 0;
    }
    return static_cast<T*>(memory_);
  }

 private:
  void* memory_ = nullptr;
  size_t size_ = 0;
};

// (y, x, height, width, flip) as the order carries it, without the row's number.
struct Box {
  int64_t y, x, h, w;
  bool flip;

  static Box of(const int64_t* row) { return {row[1], row[2], row[3], row[4], row[5] != 0}; }
  // It has pixels, some of them inside.
  bool meets(int64_t height, int64_t width) const {
    return h > 0 && w > 0 && h <= LONGEST && w <= LONGEST && y > -h && x > -w && y < height && x < width;
  }
  bool inside(int64_t height, int64_t width) const {
    return y >= 0 && x >= 0 && y + h <= height && x + w <= width;
  }
};

// Pixels in memory.
struct Pixels {
  const uint8_t* at;
  int64_t stride;      // bytes from row to row
  int step;            // bytes from pixel to pixel: 3, or 4 of which the last is not used
  const uint8_t* end;  // of what may be read
};

// Where each output pixel of an axis takes its two taps, and their weights.
struct Tap {
  int32_t low, high;
  int16_t a, b;
};

inline int64_t taps(int64_t h, int64_t w, int64_t size) {
  int64_t n = 1;
  while (std::max(h, w) > 2 * n * size) n *= 2;
  return n;
}

// OpenCV's own arithmetic: float64, rounded to float32 once. No fused multiply-add may change it (-ffp-contract=off).
inline Tap tap(int64_t i, double scale, int64_t source, bool columns) {
  float f = float((double(i) + 0.5) * scale - 0.5);
  int32_t s = int32_t(f);
  s -= float(s) > f;  // rounded down
  f -= float(s);
  if (columns && s < 0) s = 0, f = 0;
  const int32_t last = int32_t(source - 1);
  if (columns && s >= last) s = last, f = 0;
  return {std::clamp(s, 0, last), std::clamp(s + 1, 0, last), int16_t(std::lrintf((1.0f - f) * 2048.0f)),
          int16_t(std::lrintf(f * 2048.0f))};
}

// The columns of one box: byte offsets of the left taps, and weights as pairs.
//
// The right tap is the next pixel; at the box's last column, where it would lie outside, its weight is 0.
struct Columns {
  int64_t count;  // a multiple of 4; those beyond the true number read the first pixel
  int32_t* offset;
  int16_t* pair;  // [count, 2], in their order
  int16_t* wide;  // [count, 4, 2]: each pair four times, pixels of a group of 4 as 0, 2, 1, 3
};

inline bool make_columns(Columns& columns, Scratch& memory, int64_t w, int64_t count, int step, bool flip) {
  const int64_t padded = (count + 3) / 4 * 4;
  int32_t* at = memory.of<int32_t>(size_t(padded) * 6);
  if (!at) return false;
  columns = {padded, at + padded * 4, reinterpret_cast<int16_t*>(at + padded * 5), reinterpret_cast<int16_t*>(at)};
  const double scale = 1.0 / (double(count) / double(w));
  for (int64_t j = 0; j < padded; ++j) {
    const Tap t = j < count ? tap(flip ? count - 1 - j : j, scale, w, true) : Tap{0, 0, 0, 0};
    columns.offset[j] = t.low * step;
    columns.pair[2 * j] = t.a;
    columns.pair[2 * j + 1] = t.b;
    static const int place[4] = {0, 2, 1, 3};
    int16_t* four = columns.wide + (j / 4 * 4 + place[j % 4]) * 8;
    for (int c = 0; c < 4; ++c) four[2 * c] = t.a, four[2 * c + 1] = t.b;
  }
  return true;
}

// ---- the passes, plain ----

inline void columns_plain(const uint8_t* row, const Columns& to, int step, int16_t* out) {
  for (int64_t j = 0; j < to.count; ++j) {
    const uint8_t* p = row + to.offset[j];
    const int a = to.pair[2 * j], b = to.pair[2 * j + 1];
    for (int c = 0; c < 3; ++c) out[4 * j + c] = int16_t((p[c] * a + p[step + c] * b) >> 4);
    out[4 * j + 3] = 0;
  }
}

inline void rows_plain(const int16_t* low, const int16_t* high, int a, int b, int64_t count, int16_t* out) {
  for (int64_t i = 0; i < 4 * count; ++i) {
    const int value = (((a * low[i]) >> 16) + ((b * high[i]) >> 16) + 2) >> 2;
    out[i] = int16_t(std::clamp(value, 0, 255));
  }
}

inline void store_plain(const int16_t* row, int64_t count, uint8_t* out) {
  for (int64_t j = 0; j < count; ++j)
    for (int c = 0; c < 3; ++c) out[3 * j + c] = uint8_t(row[4 * j + c]);
}

// Sums of 2 x 2: two rows of 16-bit pixels to one of half as many.
inline void halve_plain(const int16_t* one, const int16_t* two, int64_t count, int16_t* out) {
  for (int64_t j = 0; j < count; ++j)
    for (int c = 0; c < 4; ++c) {
      const int64_t i = 8 * j + c;
      out[4 * j + c] = int16_t((one[i] + one[i + 4] + two[i] + two[i + 4] + 2) >> 2);
    }
}

// Means of n x n, n >= 4, halves to even, from the sums of n rows.
inline void mean_of_sums(const uint32_t* sums, int64_t n, int64_t count, int16_t* out) {
  const int shift = 2 * int(std::lround(std::log2(double(n))));
  const uint64_t half = uint64_t(n) * n / 2;
  for (int64_t j = 0; j < count; ++j)
    for (int c = 0; c < 4; ++c) {
      uint64_t sum = 0;
      for (int64_t k = 0; k < n; ++k) sum += sums[4 * (j * n + k) + c];
      out[4 * j + c] = int16_t((sum + half - 1 + ((sum >> shift) & 1)) >> shift);
    }
}

// ---- the same with AVX2 ----

#if FASTROT_X86
// Both taps of a pixel of `step` bytes as 16-bit pairs (r0 r1 g0 g1 b0 b1 0 0), in each half of a register.
AVX2 inline __m256i pairs_of(int step) {
  const char z = char(0x80), s = char(step);
  const __m128i one = _mm_setr_epi8(0, z, s, z, 1, z, char(s + 1), z, 2, z, char(s + 2), z, z, z, z, z);
  return _mm256_broadcastsi128_si256(one);
}

AVX2 inline __m256i two_pixels(const uint8_t* low, const uint8_t* high) {
  const __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(low));
  const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(high));
  return _mm256_inserti128_si256(_mm256_castsi128_si256(a), b, 1);
}

AVX2 inline void columns_avx2(const uint8_t* row, const Columns& to, int step, int16_t* out) {
  const __m256i pairs = pairs_of(step);
  for (int64_t j = 0; j < to.count; j += 4) {
    const int32_t* at = to.offset + j;
    const __m256i* weight = reinterpret_cast<const __m256i*>(to.wide + 8 * j);
    __m256i even = _mm256_shuffle_epi8(two_pixels(row + at[0], row + at[2]), pairs);
    __m256i odd = _mm256_shuffle_epi8(two_pixels(row + at[1], row + at[3]), pairs);
    even = _mm256_srli_epi32(_mm256_madd_epi16(even, _mm256_loadu_si256(weight)), 4);
    odd = _mm256_srli_epi32(_mm256_madd_epi16(odd, _mm256_loadu_si256(weight + 1)), 4);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 4 * j), _mm256_packs_epi32(even, odd));
  }
}

AVX2 inline __m256i blend(const int16_t* low, const int16_t* high, __m256i a, __m256i b) {
  const __m256i one = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(low));
  const __m256i two = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(high));
  const __m256i sum = _mm256_add_epi16(_mm256_mulhi_epi16(one, a), _mm256_mulhi_epi16(two, b));
  return _mm256_srai_epi16(_mm256_add_epi16(sum, _mm256_set1_epi16(2)), 2);
}

AVX2 inline void rows_avx2(const int16_t* low, const int16_t* high, int a, int b, int64_t count, int16_t* out) {
  const __m256i wa = _mm256_set1_epi16(int16_t(a)), wb = _mm256_set1_epi16(int16_t(b));
  const __m256i most = _mm256_set1_epi16(255);
  for (int64_t j = 0; j < count; j += 4) {
    const __m256i value = _mm256_min_epi16(blend(low + 4 * j, high + 4 * j, wa, wb), most);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 4 * j), value);
  }
}

// Eight pixels as two registers of 16-bit channels -> 24 bytes at `out`, of which 28 are written.
AVX2 inline void store_eight(__m256i first, __m256i second, uint8_t* out) {
  const char z = char(0x80);
  const __m256i dense = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, z, z, z, z));
  __m256i bytes = _mm256_permute4x64_epi64(_mm256_packus_epi16(first, second), 0xD8);
  bytes = _mm256_shuffle_epi8(bytes, dense);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_castsi256_si128(bytes));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 12), _mm256_extracti128_si256(bytes, 1));
}

// `count` pixels, with up to 28 bytes of anything behind them.
AVX2 inline void blend_and_store(const int16_t* low, const int16_t* high, int a, int b, int64_t count, uint8_t* out) {
  const __m256i wa = _mm256_set1_epi16(int16_t(a)), wb = _mm256_set1_epi16(int16_t(b));
  for (int64_t j = 0; j < count; j += 8) {
    const __m256i first = blend(low + 4 * j, high + 4 * j, wa, wb);
    store_eight(first, blend(low + 4 * j + 16, high + 4 * j + 16, wa, wb), out + 3 * j);
  }
}

AVX2 inline void store_avx2(const int16_t* row, int64_t count, uint8_t* out) {
  for (int64_t j = 0; j < count; j += 8) {
    const __m256i first = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + 4 * j));
    store_eight(first, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + 4 * j + 16)), out + 3 * j);
  }
}

AVX2 inline void halve_avx2(const int16_t* one, const int16_t* two, int64_t count, int16_t* out) {
  for (int64_t j = 0; j < count; j += 4) {
    __m256i sums[2];
    for (int k = 0; k < 2; ++k)
      sums[k] = _mm256_add_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(one + 8 * j + 16 * k)),
                                 _mm256_loadu_si256(reinterpret_cast<const __m256i*>(two + 8 * j + 16 * k)));
    const __m256i four = _mm256_add_epi16(_mm256_unpacklo_epi64(sums[0], sums[1]),
                                          _mm256_unpackhi_epi64(sums[0], sums[1]));
    const __m256i mean = _mm256_srli_epi16(_mm256_add_epi16(four, _mm256_set1_epi16(2)), 2);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 4 * j), _mm256_permute4x64_epi64(mean, 0xD8));
  }
}
#endif

// ---- the whole ----

// One thread's resampler: its tables and rows are used again.
class Resampler {
 public:
  // Write the box of a picture of height x width pixels into out [size, size, 3]. False: memory ran out.
  bool operator()(const Pixels& picture, int64_t height, int64_t width, const Box& box, int64_t size, uint8_t* out) {
    const int64_t n = taps(box.h, box.w, size), many = n * size;
    picture_ = picture, height_ = height, width_ = width, box_ = box, inside_ = box.inside(height, width);
    copy_ = copied_.of<uint8_t>(size_t(box.w) * picture.step);
    if (!make_columns(columns_, table_, box.w, many, picture.step, box.flip)) return false;
    length_ = (columns_.count + 4) * 4;  // the wide form reads up to 4 pixels more
    int16_t* rows = rows_.of<int16_t>(size_t(length_) * 5);
    if (!rows || !copy_) return false;
    for (int k = 0; k < 2; ++k) kept_[k] = rows + k * length_, holds_[k] = -1;
    int16_t *made[2] = {rows + 2 * length_, rows + 3 * length_}, *mean = rows + 4 * length_;
    const double scale = 1.0 / (double(many) / double(box.h));
    if (n == 1) return plain_bilinear(scale, size, out, reinterpret_cast<uint8_t*>(mean));
    if (n == 2) {
      for (int64_t i = 0; i < size; ++i) {
        for (int k = 0; k < 2; ++k) blended(tap(2 * i + k, scale, box_.h, false), made[k]);
        halve(made[0], made[1], size, mean);
        store(mean, size, out + i * size * 3, i == size - 1, reinterpret_cast<uint8_t*>(made[0]));
      }
      return true;
    }
    uint32_t* sums = sums_.of<uint32_t>(size_t(length_));
    if (!sums) return false;
    for (int64_t i = 0; i < size; ++i) {
      memset(sums, 0, size_t(length_) * sizeof *sums);
      for (int64_t k = 0; k < n; ++k) {
        blended(tap(n * i + k, scale, box_.h, false), made[0]);
        for (int64_t at = 0; at < 4 * many; ++at) sums[at] += uint32_t(made[0][at]);
      }
      mean_of_sums(sums, n, size, mean);
      store(mean, size, out + i * size * 3, i == size - 1, reinterpret_cast<uint8_t*>(made[0]));
    }
    return true;
  }

 private:
  bool plain_bilinear(double scale, int64_t size, uint8_t* out, uint8_t* aside) {
    for (int64_t i = 0; i < size; ++i) {
      const Tap t = tap(i, scale, box_.h, false);
      const int16_t *low = passed(t.low), *high = passed(t.high);
      uint8_t* to = out + i * size * 3;
#if FASTROT_X86
      if (wide()) {  // it writes beyond the row: into the next, or aside
        const bool last = i == size - 1 || size < 16;
        blend_and_store(low, high, t.a, t.b, size, last ? aside : to);
        if (last) memcpy(to, aside, size_t(size) * 3);
        continue;
      }
#endif
      int16_t* row = reinterpret_cast<int16_t*>(aside);
      rows_plain(low, high, t.a, t.b, size, row);
      store_plain(row, size, to);
    }
    return true;
  }

  void blended(const Tap& t, int16_t* out) {
    const int16_t *low = passed(t.low), *high = passed(t.high);
#if FASTROT_X86
    if (wide()) return rows_avx2(low, high, t.a, t.b, columns_.count, out);
#endif
    rows_plain(low, high, t.a, t.b, columns_.count, out);
  }

  static void halve(const int16_t* one, const int16_t* two, int64_t size, int16_t* out) {
#if FASTROT_X86
    if (wide()) return halve_avx2(one, two, size, out);
#endif
    halve_plain(one, two, size, out);
  }

  static void store(const int16_t* row, int64_t size, uint8_t* out, bool last, uint8_t* aside) {
#if FASTROT_X86
    if (wide()) {
      last = last || size < 16;
      store_avx2(row, size, last ? aside : out);
      if (last) memcpy(out, aside, size_t(size) * 3);
      return;
    }
#endif
    (void)last, (void)aside;
    store_plain(row, size, out);
  }

  // A row of the box after the pass over its columns. Rows are asked for in order, so two are enough.
  const int16_t* passed(int64_t y) {
    int16_t* out = kept_[y & 1];
    if (holds_[y & 1] == y) return out;
    holds_[y & 1] = y;
    const uint8_t* row = source(box_.y + y);
#if FASTROT_X86
    if (wide()) {
      columns_avx2(row, columns_, picture_.step, out);
      return out;
    }
#endif
    columns_plain(row, columns_, picture_.step, out);
    return out;
  }

  // The box's part of row y of the picture, with READ bytes that may be read at its last pixel: where it lies, or,
  // at the end of the memory and for a box that reaches over the border, a copy with zeros outside.
  const uint8_t* source(int64_t y) {
    const int step = picture_.step;
    const int64_t left = std::max<int64_t>(box_.x, 0), right = std::min(box_.x + box_.w, width_);
    const uint8_t* row = y < 0 || y >= height_ ? nullptr : picture_.at + y * picture_.stride + left * step;
    if (inside_ && picture_.end - row >= (box_.w - 1) * step + READ) return row;
    memset(copy_, 0, size_t(box_.w) * step);
    if (row) memcpy(copy_ + (left - box_.x) * step, row, size_t(right - left) * step);
    return copy_;
  }

  Scratch table_, rows_, sums_, copied_;
  Columns columns_{};
  Pixels picture_{};
  Box box_{};
  bool inside_ = false;      // the box, in the picture
  uint8_t* copy_ = nullptr;  // of one row of the box
  int64_t height_ = 0, width_ = 0, length_ = 0, holds_[2] = {-1, -1};
  int16_t* kept_[2] = {};
};

}  // namespace fastrot
