// What fastrot.native calls, by ctypes: batches of boxes of JPEGs, of raw pictures and of a pack's tiles -> crops.
//
// Nothing here checks an address: fastrot/native/__init__.py has compared every record, table and buffer with the
// memory that it lies in. Boxes are looked at, and what a JPEG says of itself is never trusted.

#include <new>

#include "checksum.hpp"
#include "jpeg.hpp"
#include "pool.hpp"
#include "resample.hpp"
#include "tiles.hpp"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using namespace fastrot;

// What a thread keeps from picture to picture.
struct Worker {
  Jpeg jpeg;
  Tiles tiles;
  Resampler resample;
};

enum Status : int32_t { FINE = 0, CHECKSUM = 1, LEFT = 2 };  // LEFT: damaged, or of a kind that others decode

// Where the crops of one recipe come from and go to.
struct Recipe {
  const int64_t* boxes;  // [b, 6]
  uint8_t* out;          // [b, size, size, 3]
  int64_t size;
};

// Records of a .beton.
struct Records : Batch<Worker> {
  Records(int64_t pictures, const uint8_t* const* records, const int64_t* bytes, const int32_t* sizes,
          const uint8_t* raw, const uint32_t* crcs, std::vector<Recipe> recipes, int32_t* status)
      : Batch(pictures), records(records), bytes(bytes), sizes(sizes), raw(raw), crcs(crcs),
        recipes(std::move(recipes)), status(status) {}

  void one(Worker& worker, int64_t i) override { status[i] = crops(worker, i); }

  Status crops(Worker& worker, int64_t i) {
    const int64_t height = sizes[2 * i], width = sizes[2 * i + 1];
    for (const Recipe& each : recipes)
      if (!Box::of(each.boxes + 6 * i).meets(height, width)) return LEFT;
    if (crcs && crc32_of(records[i], bytes[i]) != crcs[i]) return CHECKSUM;
    const Box all = raw[i] ? Box{0, 0, height, width, false} : wanted(i, height, width);
    const Pixels pixels = raw[i] ? Pixels{records[i], width * 3, 3, records[i] + bytes[i]}
                                 : worker.jpeg.box(records[i], bytes[i], height, width, all, !crcs);
    if (!pixels.at) return LEFT;
    for (const Recipe& each : recipes) {
      Box box = Box::of(each.boxes + 6 * i);
      box.y -= all.y, box.x -= all.x;
      uint8_t* out = each.out + i * each.size * each.size * 3;
      if (!worker.resample(pixels, all.h, all.w, box, each.size, out)) return LEFT;
    }
    return FINE;
  }

  // The smallest box of the picture in which lies all that the recipes want of it.
  Box wanted(int64_t i, int64_t height, int64_t width) const {
    int64_t top = height, left = width, bottom = 0, right = 0;
    for (const Recipe& each : recipes) {
      const Box box = Box::of(each.boxes + 6 * i);
      top = std::min(top, std::max<int64_t>(box.y, 0)), bottom = std::max(bottom, std::min(box.y + box.h, height));
      left = std::min(left, std::max<int64_t>(box.x, 0)), right = std::max(right, std::min(box.x + box.w, width));
    }
    return {top, left, bottom - top, right - left, false};
  }

  const uint8_t* const* records;
  const int64_t* bytes;
  const int32_t* sizes;  // [b, 2]: heights and widths
  const uint8_t* raw;
  const uint32_t* crcs;  // null: none
  const std::vector<Recipe> recipes;
  int32_t* status;
};

// Pictures of a pack, by the rows' numbers in the boxes.
struct Packed : Batch<Worker> {
  Packed(int64_t pictures, const uint8_t* data, const int64_t* first, const int32_t* sizes, bool tiles, Recipe recipe,
         int32_t* status)
      : Batch(pictures), data(data), first(first), sizes(sizes), tiles(tiles), recipe(recipe), status(status) {}

  void one(Worker& worker, int64_t i) override {
    const int64_t row = recipe.boxes[6 * i], height = sizes[2 * row], width = sizes[2 * row + 1];
    const uint8_t* picture = data + first[row] * (tiles ? TILE : 3);
    uint8_t* out = recipe.out + i * recipe.size * recipe.size * 3;
    Box box = Box::of(recipe.boxes + 6 * i);
    status[i] = LEFT;
    if (!box.meets(height, width)) return;
    int64_t y = 0, x = 0;
    const Pixels pixels = tiles ? worker.tiles.touched(picture, height, width, box, y, x)
                                : Pixels{picture, width * 3, 3, picture + height * width * 3};
    if (!pixels.at) return;
    box.y -= y, box.x -= x;
    if (worker.resample(pixels, height - y, width - x, box, recipe.size, out)) status[i] = FINE;
  }

  const uint8_t* data;
  const int64_t* first;
  const int32_t* sizes;
  const bool tiles;
  const Recipe recipe;
  int32_t* status;
};

using Threads = Pool<Worker>;

Threads* of(void* pool) { return static_cast<Threads*>(pool); }

}  // namespace

// Raised whenever a signature or its meaning changes: a library of other sources is not used.
EXPORT int fastrot_edition() { return 1; }

// The libjpeg-turbo that it was built for.
EXPORT int fastrot_libjpeg() { return LIBJPEG_TURBO_VERSION_NUMBER; }

// For tests: 0 makes the plain loops run; anything else what the processor has. Returns whether the wide ones run.
EXPORT int fastrot_wide(int on) {
  static const bool found = wide();
  return wide() = found && on;
}

EXPORT uint32_t fastrot_crc32(const uint8_t* at, int64_t bytes) { return crc32_of(at, bytes); }

// Threads that wait for batches; null where there is no memory.
EXPORT void* fastrot_pool(int threads) { return new (std::nothrow) Threads(threads); }

// What is under way is finished, the rest left; the arrays of the batches may go afterwards, and not before.
EXPORT void fastrot_end(void* pool) { delete of(pool); }

// Begin a batch: all arrays must live until fastrot_wait or fastrot_end. Null where there is no memory.
EXPORT void* fastrot_jpeg_crops(void* pool, int64_t pictures, const uint8_t* const* records, const int64_t* bytes,
                                const int32_t* sizes, const uint8_t* raw, const uint32_t* crcs, int recipes,
                                const int64_t* const* boxes, const int64_t* out_sizes, uint8_t* const* out,
                                int32_t* status) try {
  std::vector<Recipe> each;
  for (int k = 0; k < recipes; ++k) each.push_back({boxes[k], out[k], out_sizes[k]});
  return of(pool)->submit(
      std::make_unique<Records>(pictures, records, bytes, sizes, raw, crcs, std::move(each), status));
} catch (const std::bad_alloc&) {
  return nullptr;
}

// The same of a pack: `data` are tiles or, where `tiles` is 0, pixels.
EXPORT void* fastrot_pack_crops(void* pool, int64_t pictures, const uint8_t* data, const int64_t* first,
                                const int32_t* sizes, int tiles, const int64_t* boxes, int64_t size, uint8_t* out,
                                int32_t* status) try {
  return of(pool)->submit(
      std::make_unique<Packed>(pictures, data, first, sizes, tiles != 0, Recipe{boxes, out, size}, status));
} catch (const std::bad_alloc&) {
  return nullptr;
}

// Wait for a batch; it is gone afterwards.
EXPORT void fastrot_wait(void* pool, void* batch) { of(pool)->wait(static_cast<Batch<Worker>*>(batch)); }

// Python looks for this in every extension; the library is opened by ctypes and has no module in it.
EXPORT void* PyInit__native() { return nullptr; }
