// crc32 as zlib computes it: polynomial 0xEDB88320, all ones before and after.
//
// Idea.  Four 16-byte lanes are folded 64 bytes on at a time by carry-less products, then into one, then reduced
//        (Gopal et al., "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ Instruction", Intel 2009; the
//        constants are its x^k modulo the polynomial). Elsewhere eight tables take eight bytes at a time.

#pragma once

#include "resample.hpp"

namespace fastrot {

struct CrcTables {
  uint32_t of[8][256];
  CrcTables() {
    for (uint32_t i = 0; i < 256; ++i) {
      uint32_t crc = i;
      for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ (crc & 1 ? 0xEDB88320u : 0);
      of[0][i] = crc;
    }
    for (int t = 1; t < 8; ++t)
      for (uint32_t i = 0; i < 256; ++i) of[t][i] = (of[t - 1][i] >> 8) ^ of[0][of[t - 1][i] & 255];
  }
};

// `crc` is the state between bytes, not inverted.
inline uint32_t crc_plain(const uint8_t* at, int64_t bytes, uint32_t crc) {
  static const CrcTables table;
  for (; bytes >= 8; bytes -= 8, at += 8) {
    const uint32_t low = crc ^ (uint32_t(at[0]) | uint32_t(at[1]) << 8 | uint32_t(at[2]) << 16 | uint32_t(at[3]) << 24);
    crc = table.of[7][low & 255] ^ table.of[6][low >> 8 & 255] ^ table.of[5][low >> 16 & 255] ^ table.of[4][low >> 24] ^
          table.of[3][at[4]] ^ table.of[2][at[5]] ^ table.of[1][at[6]] ^ table.of[0][at[7]];
  }
  for (; bytes > 0; --bytes) crc = (crc >> 8) ^ table.of[0][(crc ^ *at++) & 255];
  return crc;
}

#if FASTROT_X86
#define CLMUL __attribute__((target("pclmul,sse4.1")))

CLMUL inline __m128i folded(__m128i lane, __m128i by, __m128i next) {
  const __m128i low = _mm_clmulepi64_si128(lane, by, 0x00), high = _mm_clmulepi64_si128(lane, by, 0x11);
  return _mm_xor_si128(_mm_xor_si128(low, high), next);
}

CLMUL inline __m128i sixteen(const uint8_t* at) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(at)); }

// A multiple of 16 bytes, at least 64.
CLMUL inline uint32_t crc_clmul(const uint8_t* at, int64_t bytes, uint32_t crc) {
  const __m128i by_64 = _mm_set_epi64x(0x01c6e41596, 0x0154442bd4), by_16 = _mm_set_epi64x(0x00ccaa009e, 0x01751997d0);
  __m128i lane[4];
  for (int k = 0; k < 4; ++k) lane[k] = sixteen(at + 16 * k);
  lane[0] = _mm_xor_si128(lane[0], _mm_cvtsi32_si128(int(crc)));
  for (at += 64, bytes -= 64; bytes >= 64; at += 64, bytes -= 64)
    for (int k = 0; k < 4; ++k) lane[k] = folded(lane[k], by_64, sixteen(at + 16 * k));
  __m128i x = lane[0];
  for (int k = 1; k < 4; ++k) x = folded(x, by_16, lane[k]);
  for (; bytes >= 16; at += 16, bytes -= 16) x = folded(x, by_16, sixteen(at));

  const __m128i low_word = _mm_setr_epi32(~0, 0, ~0, 0);  // of each half
  const __m128i by_8 = _mm_set_epi64x(0, 0x0163cd6124), polynomial = _mm_set_epi64x(0x01f7011641, 0x01db710641);
  x = _mm_xor_si128(_mm_srli_si128(x, 8), _mm_clmulepi64_si128(x, by_16, 0x10));  // 128 bits to 96
  x = _mm_xor_si128(_mm_srli_si128(x, 4), _mm_clmulepi64_si128(_mm_and_si128(x, low_word), by_8, 0x00));  // to 64
  __m128i quotient = _mm_clmulepi64_si128(_mm_and_si128(x, low_word), polynomial, 0x10);
  quotient = _mm_clmulepi64_si128(_mm_and_si128(quotient, low_word), polynomial, 0x00);
  return uint32_t(_mm_extract_epi32(_mm_xor_si128(x, quotient), 1));
}
#endif

inline uint32_t crc32_of(const uint8_t* at, int64_t bytes) {
  uint32_t crc = ~0u;
#if FASTROT_X86
  static const bool clmul = __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1");
  if (clmul && wide() && bytes >= 64) {
    const int64_t most = bytes / 16 * 16;
    crc = crc_clmul(at, most, crc);
    at += most, bytes -= most;
  }
#endif
  return ~crc_plain(at, bytes, crc);
}

}  // namespace fastrot
