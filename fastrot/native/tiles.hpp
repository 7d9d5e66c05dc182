// Texture tiles of a pack -> pixels: 48 bytes hold 8 x 8 pixels, as four BC4 blocks of Y and one each of Cb and Cr.
//
// BC4.     Two end points e0, e1 and sixteen 3-bit indices. e0 > e1: 0: e0, 1: e1, 2..7: ((8 - i) e0 + (i - 1) e1) / 7;
//          else 2..5: ((6 - i) e0 + (i - 1) e1) / 5, 6: 0, 7: 255. Rounded down, as texture2ddecoder does.
// Colour.  A chroma sample stands for its 2 x 2 pixels. JPEG's full-range BT.601 in 16-bit fixed point, as libjpeg:
//          r = Y + ((91881 cr + 32768) >> 16), b = Y + ((116130 cb + 32768) >> 16),
//          g = Y + ((-22554 cb - 46802 cr + 32768) >> 16), each clipped to 0..255.
// Idea.    An index lies in the two bytes from byte (16 + 3 i) / 8 on: a shuffle brings these to 16 bits, a product
//          moves the index to the top, a shift to the bottom; a second shuffle looks it up in the palette.

#pragma once

#include "resample.hpp"

namespace fastrot {

constexpr int TILE = 48;  // bytes

inline uint8_t clipped(int value) { return uint8_t(std::clamp(value, 0, 255)); }

inline void palette_plain(int e0, int e1, uint8_t* out) {
  const int steps = e0 > e1 ? 7 : 5;
  out[0] = uint8_t(e0), out[1] = uint8_t(e1), out[6] = 0, out[7] = 255;
  for (int i = 2; i <= steps; ++i) out[i] = uint8_t(((steps + 1 - i) * e0 + (i - 1) * e1) / steps);
}

inline void bc4_plain(const uint8_t* block, uint8_t* out) {
  uint8_t palette[8];
  palette_plain(block[0], block[1], palette);
  uint64_t bits = 0;
  for (int i = 0; i < 6; ++i) bits |= uint64_t(block[2 + i]) << (8 * i);
  for (int i = 0; i < 16; ++i) out[i] = palette[bits >> (3 * i) & 7];
}

// A tile as 8 rows of 8 pixels of 4 bytes.
inline void tile_plain(const uint8_t* tile, uint8_t* out, int64_t stride) {
  uint8_t y[4][16], cb[16], cr[16];
  for (int k = 0; k < 4; ++k) bc4_plain(tile + 8 * k, y[k]);
  bc4_plain(tile + 32, cb), bc4_plain(tile + 40, cr);
  for (int i = 0; i < 8; ++i)
    for (int j = 0; j < 8; ++j) {
      const int luma = y[i / 4 * 2 + j / 4][i % 4 * 4 + j % 4];
      const int b = cb[i / 2 * 4 + j / 2] - 128, r = cr[i / 2 * 4 + j / 2] - 128;
      uint8_t* pixel = out + i * stride + 4 * j;
      pixel[0] = clipped(luma + ((91881 * r + 32768) >> 16));
      pixel[1] = clipped(luma + ((-22554 * b - 46802 * r + 32768) >> 16));
      pixel[2] = clipped(luma + ((116130 * b + 32768) >> 16));
      pixel[3] = 0;
    }
}

#if FASTROT_X86
// The eight values that a block may name, as bytes in each half.
AVX2 inline __m256i palette_avx2(int e0, int e1) {
  const bool eight = e0 > e1;
  const __m128i near = eight ? _mm_setr_epi16(7, 0, 6, 5, 4, 3, 2, 1) : _mm_setr_epi16(5, 0, 4, 3, 2, 1, 0, 0);
  const __m128i far = eight ? _mm_setr_epi16(0, 7, 1, 2, 3, 4, 5, 6) : _mm_setr_epi16(0, 5, 1, 2, 3, 4, 0, 0);
  const __m128i divide = _mm_set1_epi16(eight ? 9363 : 13108);  // 65536 / 7 and / 5, rounded up: exact up to 1,785
  const __m128i sum = _mm_add_epi16(_mm_mullo_epi16(near, _mm_set1_epi16(int16_t(e0))),
                                    _mm_mullo_epi16(far, _mm_set1_epi16(int16_t(e1))));
  __m128i values = _mm_mulhi_epu16(sum, divide);
  if (!eight) values = _mm_insert_epi16(values, 255, 7);
  return _mm256_broadcastsi128_si256(_mm_packus_epi16(values, values));
}

// A block's sixteen values, 16 bits each: its rows, two in each half.
AVX2 inline __m256i bc4_avx2(const uint8_t* block) {
  const char none = char(0x80);
  const __m256i windows = _mm256_setr_epi8(2, 3, 2, 3, 2, 3, 3, 4, 3, 4, 3, 4, 4, 5, 4, 5,  //
                                           5, 6, 5, 6, 5, 6, 6, 7, 6, 7, 6, 7, 7, none, 7, none);
  const __m256i to_top = _mm256_setr_epi16(1 << 13, 1 << 10, 1 << 7, 1 << 12, 1 << 9, 1 << 6, 1 << 11, 1 << 8,  //
                                           1 << 13, 1 << 10, 1 << 7, 1 << 12, 1 << 9, 1 << 6, 1 << 11, 1 << 8);
  int64_t bytes;
  memcpy(&bytes, block, 8);
  __m256i index = _mm256_shuffle_epi8(_mm256_set1_epi64x(bytes), windows);
  index = _mm256_srli_epi16(_mm256_mullo_epi16(index, to_top), 13);
  index = _mm256_or_si256(index, _mm256_set1_epi16(int16_t(0x8000)));  // the upper byte looks up a zero
  return _mm256_shuffle_epi8(palette_avx2(block[0], block[1]), index);
}

AVX2 inline __m256i scaled(__m256i low, __m256i high) {  // (x + 32768) >> 16 of 16 numbers, in their order
  const __m256i half = _mm256_set1_epi32(32768);
  return _mm256_packs_epi32(_mm256_srai_epi32(_mm256_add_epi32(low, half), 16),
                            _mm256_srai_epi32(_mm256_add_epi32(high, half), 16));
}

// Sixteen samples, 16 bits each, times a number of more bits, as 32 bits: those that unpack low and high.
struct Wide {
  __m256i low, high;
};

AVX2 inline Wide widened(__m256i samples) {
  const __m256i zero = _mm256_setzero_si256();
  const __m256i centre = _mm256_set1_epi32(128);
  return {_mm256_sub_epi32(_mm256_unpacklo_epi16(samples, zero), centre),
          _mm256_sub_epi32(_mm256_unpackhi_epi16(samples, zero), centre)};
}

AVX2 inline __m256i times(__m256i x, int by) { return _mm256_mullo_epi32(x, _mm256_set1_epi32(by)); }

// A row of 4 chroma values of 16 bits, each twice.
AVX2 inline __m128i doubled(const int16_t* four) {
  const __m128i row = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(four));
  return _mm_unpacklo_epi16(row, row);
}

AVX2 inline void tile_avx2(const uint8_t* tile, uint8_t* out, int64_t stride) {
  const Wide cb = widened(bc4_avx2(tile + 32)), cr = widened(bc4_avx2(tile + 40));
  alignas(32) int16_t red[16], green[16], blue[16], luma[4][16];
  _mm256_store_si256(reinterpret_cast<__m256i*>(red), scaled(times(cr.low, 91881), times(cr.high, 91881)));
  _mm256_store_si256(reinterpret_cast<__m256i*>(blue), scaled(times(cb.low, 116130), times(cb.high, 116130)));
  _mm256_store_si256(reinterpret_cast<__m256i*>(green),
                     scaled(_mm256_add_epi32(times(cb.low, -22554), times(cr.low, -46802)),
                            _mm256_add_epi32(times(cb.high, -22554), times(cr.high, -46802))));
  for (int k = 0; k < 4; ++k) _mm256_store_si256(reinterpret_cast<__m256i*>(luma[k]), bc4_avx2(tile + 8 * k));
  for (int i = 0; i < 8; ++i) {
    const int16_t *left = luma[i / 4 * 2] + i % 4 * 4, *right = left + 16;
    const __m128i y = _mm_unpacklo_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(left)),
                                         _mm_loadl_epi64(reinterpret_cast<const __m128i*>(right)));
    const __m128i r = _mm_add_epi16(y, doubled(red + i / 2 * 4));
    const __m128i g = _mm_add_epi16(y, doubled(green + i / 2 * 4));
    const __m128i b = _mm_add_epi16(y, doubled(blue + i / 2 * 4));
    const __m128i rg = _mm_packus_epi16(r, g), b0 = _mm_packus_epi16(b, _mm_setzero_si128());
    const __m128i mixed = _mm_unpacklo_epi8(rg, _mm_unpackhi_epi64(rg, rg));  // r g r g ...
    const __m128i other = _mm_unpacklo_epi8(b0, _mm_setzero_si128());         // b 0 b 0 ...
    __m128i* to = reinterpret_cast<__m128i*>(out + i * stride);
    _mm_storeu_si128(to, _mm_unpacklo_epi16(mixed, other));
    _mm_storeu_si128(to + 1, _mm_unpackhi_epi16(mixed, other));
  }
}
#endif

// The tiles of a picture that a box touches, as pixels of 4 bytes; the picture's tiles lie row-major at `tiles`.
class Tiles {
 public:
  // Null in `at`: memory ran out. `y`, `x`: where the first of these pixels lies in the picture.
  Pixels touched(const uint8_t* tiles, int64_t height, int64_t width, const Box& box, int64_t& y, int64_t& x) {
    const int64_t across = (width + 7) / 8;
    const int64_t top = std::max<int64_t>(box.y, 0) / 8, left = std::max<int64_t>(box.x, 0) / 8;
    const int64_t bottom = (std::min(box.y + box.h, height) + 7) / 8, right = (std::min(box.x + box.w, width) + 7) / 8;
    const int64_t stride = (right - left) * 32;
    uint8_t* pixels = memory_.of<uint8_t>(size_t(bottom - top) * 8 * stride);
    if (!pixels) return {nullptr, 0, 4, nullptr};
    for (int64_t i = top; i < bottom; ++i)
      for (int64_t j = left; j < right; ++j)
        decode(tiles + (i * across + j) * TILE, pixels + (i - top) * 8 * stride + (j - left) * 32, stride);
    y = top * 8, x = left * 8;
    return {pixels, stride, 4, pixels + (bottom - top) * 8 * stride + SPARE};
  }

 private:
  static void decode(const uint8_t* tile, uint8_t* out, int64_t stride) {
#if FASTROT_X86
    if (wide()) return tile_avx2(tile, out, stride);
#endif
    tile_plain(tile, out, stride);
  }

  Scratch memory_;
};

}  // namespace fastrot
