// The pixels of a box of a JPEG, equal to the bit to those of the whole picture: rows above are skipped, columns
// beside are not transformed, rows below are not read.
//
// jpeg_crop_scanline is not exact at its edges, where the smoothing of chroma misses its neighbours: two columns more
// on each side are decoded, and left out.

#pragma once

#include <setjmp.h>
#include <stdio.h>

#include <jpeglib.h>
#if !defined(LIBJPEG_TURBO_VERSION_NUMBER) || LIBJPEG_TURBO_VERSION_NUMBER < 2001000
#error "fastrot's decoder wants libjpeg-turbo 2.1 or later"
#endif

#include "resample.hpp"

namespace fastrot {

// One thread's decompressor: made once, used for every picture.
class Jpeg {
 public:
  Jpeg() {
    info_.err = jpeg_std_error(&errors_.base);
    errors_.base.error_exit = [](j_common_ptr info) { longjmp(reinterpret_cast<Errors*>(info->err)->back, 1); };
    errors_.base.output_message = [](j_common_ptr) {};
    if (!setjmp(errors_.back)) {
      jpeg_create_decompress(&info_);
      made_ = true;
    }
  }
  Jpeg(const Jpeg&) = delete;
  Jpeg& operator=(const Jpeg&) = delete;
  ~Jpeg() {
    if (made_) jpeg_destroy_decompress(&info_);
  }

  // The box (inside the picture) of a JPEG of height x width pixels. `whole`: read the JPEG to its end, so that
  // damage there is met too.
  //
  // `at` is null for what is left to others: a damaged JPEG, one of another size, and the odd kinds (progressive,
  // arithmetic, CMYK, stored as RGB, 12 bits, chroma in other ways than 4:4:4, 4:2:2 and 4:2:0).
  Pixels box(const uint8_t* record, int64_t bytes, int64_t height, int64_t width, const Box& box, bool whole) {
    const Pixels none = {nullptr, 0, 3, nullptr};
    if (!made_ || bytes > INT32_MAX) return none;
    if (setjmp(errors_.back)) {  // libjpeg's errors end here; nothing above it has a destructor to run
      jpeg_abort_decompress(&info_);
      return none;
    }
    jpeg_mem_src(&info_, record, static_cast<unsigned long>(bytes));
    jpeg_read_header(&info_, TRUE);
    if (int64_t(info_.image_height) != height || int64_t(info_.image_width) != width || !plain()) {
      jpeg_abort_decompress(&info_);
      return none;
    }
    info_.out_color_space = JCS_RGB;
    jpeg_start_decompress(&info_);
    const JDIMENSION left = crop(box, width), stride = info_.output_width * 3;
    uint8_t* pixels = memory_.of<uint8_t>(size_t(box.h + 1) * stride);
    if (!pixels) {
      jpeg_abort_decompress(&info_);
      return none;
    }
    skip(JDIMENSION(box.y));
    read(pixels, stride, JDIMENSION(box.h));
    if (whole) finish(pixels + box.h * int64_t(stride), stride);
    const bool sound = info_.err->num_warnings == 0;
    jpeg_abort_decompress(&info_);
    if (!sound) return none;
    return {pixels + (box.x - left) * 3, stride, 3, pixels + box.h * int64_t(stride) + SPARE};
  }

 private:
  struct Errors {
    jpeg_error_mgr base;
    jmp_buf back;
  };

  bool plain() const {
    if (info_.progressive_mode || info_.arith_code || info_.data_precision != 8) return false;
    const jpeg_component_info* c = info_.comp_info;
    if (info_.num_components == 1)
      return info_.jpeg_color_space == JCS_GRAYSCALE && c[0].h_samp_factor == 1 && c[0].v_samp_factor == 1;
    if (info_.num_components != 3 || info_.jpeg_color_space != JCS_YCbCr) return false;
    for (int k = 1; k < 3; ++k)
      if (c[k].h_samp_factor != 1 || c[k].v_samp_factor != 1) return false;
    const int h = c[0].h_samp_factor, v = c[0].v_samp_factor;
    return (h == 1 && v == 1) || (h == 2 && v <= 2);
  }

  // Decode no more columns than wanted: the first one that is.
  JDIMENSION crop(const Box& box, int64_t width) {
    const int64_t left = std::max<int64_t>(box.x - 2, 0), right = std::min(box.x + box.w + 2, width);
    if (left == 0 && right == width) return 0;
    JDIMENSION from = JDIMENSION(left), count = JDIMENSION(right - left);
    jpeg_crop_scanline(&info_, &from, &count);
    return from;
  }

  void skip(JDIMENSION rows) {
    if (rows) jpeg_skip_scanlines(&info_, rows);
  }

  void read(uint8_t* out, size_t stride, JDIMENSION rows) {
    JSAMPROW each[16];
    for (JDIMENSION done = 0; done < rows;) {
      const JDIMENSION some = std::min<JDIMENSION>(rows - done, 16);
      for (JDIMENSION k = 0; k < some; ++k) each[k] = out + (done + k) * stride;
      done += jpeg_read_scanlines(&info_, each, some);
    }
  }

  // To the picture's last bytes. A skip to the end would read none of them; one to the last row reads them all.
  void finish(uint8_t* row, size_t stride) {
    if (const JDIMENSION left = info_.output_height - info_.output_scanline) {
      skip(left - 1);
      read(row, stride, 1);
    }
    jpeg_finish_decompress(&info_);
  }

  jpeg_decompress_struct info_{};
  Errors errors_{};
  bool made_ = false;
  Scratch memory_;
};

}  // namespace fastrot
