// Random corruptions of JPEG records, and random tiles, through the extension's own code. native_fuzz.py builds it
// with sanitizers and runs it:  native_fuzz RECORDS TIMES THREADS
//
// RECORDS holds (height, width, bytes) as three int32 and the bytes, again and again. Each corrupted record lies at
// the end of a page behind which nothing may be read. Prints how many were decoded, and how many left.

#include <sys/mman.h>
#include <unistd.h>

#include <random>

#include "../fastrot/native/native.cpp"

namespace {

using Bytes = std::vector<uint8_t>;

struct Picture {
  int32_t height, width;
  Bytes bytes;
};

std::mt19937_64 draws(0);
int64_t draw(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(draws); }

std::vector<Picture> read_all(const char* path) {
  std::vector<Picture> found;
  FILE* file = fopen(path, "rb");
  int32_t head[3];
  while (file && fread(head, 4, 3, file) == 3) {
    Picture next{head[0], head[1], Bytes(size_t(head[2]))};
    if (fread(next.bytes.data(), 1, next.bytes.size(), file) != next.bytes.size()) break;
    found.push_back(next);
  }
  if (file) fclose(file);
  return found;
}

// Memory that ends where what may be read ends.
class Guarded {
 public:
  explicit Guarded(const Bytes& bytes) {
    const size_t page = size_t(sysconf(_SC_PAGESIZE)), pages = (bytes.size() + page - 1) / page;
    size_ = (pages + 1) * page;
    start_ = static_cast<uint8_t*>(mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    at = start_ + pages * page - bytes.size();
    memcpy(const_cast<uint8_t*>(at), bytes.data(), bytes.size());
    mprotect(start_ + pages * page, page, PROT_NONE);
  }
  Guarded(const Guarded&) = delete;
  ~Guarded() { munmap(start_, size_); }
  const uint8_t* at;

 private:
  uint8_t* start_;
  size_t size_;
};

void corrupt(Picture& picture, const std::vector<Picture>& others) {
  Bytes& bytes = picture.bytes;
  const int64_t last = int64_t(bytes.size()) - 1, at = draw(0, last), head = std::min<int64_t>(last, 700);
  switch (draw(0, 9)) {
    case 0: bytes[at] ^= uint8_t(1 << draw(0, 7)); break;
    case 1: bytes[draw(0, head)] ^= uint8_t(1 << draw(0, 7)); break;            // in the tables
    case 2: for (int64_t i = draw(1, 40); i > 0; --i) bytes[draw(0, head)] = uint8_t(draw(0, 255)); break;
    case 3: bytes.resize(size_t(at) + 1); break;                                 // cut short
    case 4: std::fill(bytes.begin() + at, bytes.end(), uint8_t(0)); break;
    case 5: std::fill(bytes.begin() + at, bytes.begin() + std::min(at + 4096, last), uint8_t(0xFF)); break;
    case 6: for (int64_t i = 0; i < 64; ++i) bytes[draw(0, last)] = uint8_t(draw(0, 255)); break;
    case 7: bytes[at] = 0xFF, bytes[std::min(at + 1, last)] = uint8_t(draw(0xC0, 0xFE)); break;  // a marker
    case 8: {  // the end of another
      const Bytes& other = others[size_t(draw(0, int64_t(others.size()) - 1))].bytes;
      bytes.resize(size_t(at));
      bytes.insert(bytes.end(), other.begin() + std::min<int64_t>(at, int64_t(other.size()) - 1), other.end());
      break;
    }
    default:  // a frame that says other sizes or samplings, if it is found
      for (int64_t i = 0; i + 19 < last; ++i)
        if (bytes[i] == 0xFF && bytes[i + 1] >= 0xC0 && bytes[i + 1] <= 0xC2) {
          bytes[i + draw(1, 18)] = uint8_t(draw(0, 255));
          break;
        }
  }
  if (draw(0, 9) == 0) picture.height = int32_t(draw(1, 70));  // the row lies, or the JPEG does
}

// Mostly inside, sometimes over the border, sometimes anything.
void draw_box(int64_t* row, int64_t number, int64_t height, int64_t width) {
  row[0] = number, row[5] = draw(0, 1);
  switch (draw(0, 19)) {
    case 0:
    case 1:
    case 2:
      row[3] = draw(1, 2 * height), row[4] = draw(1, 2 * width);
      row[1] = draw(1 - row[3], height - 1), row[2] = draw(1 - row[4], width - 1);
      break;
    case 3:
      for (int k = 1; k < 5; ++k) row[k] = draw(0, 1) ? draw(INT64_MIN, INT64_MAX) : draw(-300, 300);
      break;
    default:
      row[3] = draw(1, height), row[4] = draw(1, width);
      row[1] = draw(0, height - row[3]), row[2] = draw(0, width - row[4]);
      if (draw(0, 3) == 0) row[1] = height - row[3], row[2] = width - row[4];  // to the last pixel
  }
}

int64_t jpegs(void* pool, const std::vector<Picture>& pictures, int64_t count) {
  static const int64_t sides[] = {1, 5, 17, 32, 64};
  std::vector<std::unique_ptr<Guarded>> memory;
  std::vector<const uint8_t*> records;
  std::vector<int64_t> bytes, boxes[2];
  std::vector<int32_t> sizes, status(static_cast<size_t>(count), -1);
  std::vector<uint8_t> raw, out[2];
  std::vector<uint32_t> crcs;
  const bool checked = draw(0, 3) == 0;
  const int recipes = int(draw(1, 2));
  for (int k = 0; k < 2; ++k) boxes[k].resize(size_t(count) * 6);
  for (int64_t i = 0; i < count; ++i) {
    Picture one = pictures[size_t(draw(0, int64_t(pictures.size()) - 1))];
    if (draw(0, 19)) corrupt(one, pictures);
    raw.push_back(draw(0, 9) == 0);
    if (raw.back()) one.bytes.resize(size_t(one.height) * one.width * 3);  // as the Python side has seen to
    memory.push_back(std::make_unique<Guarded>(one.bytes));
    records.push_back(memory.back()->at);
    bytes.push_back(int64_t(one.bytes.size()));
    crcs.push_back(crc32_of(records.back(), bytes.back()) + (draw(0, 9) == 0));
    sizes.push_back(one.height), sizes.push_back(one.width);
    for (int k = 0; k < 2; ++k) draw_box(&boxes[k][size_t(i) * 6], i, one.height, one.width);
  }
  const int64_t* tables[2] = {boxes[0].data(), boxes[1].data()};
  int64_t out_sizes[2];
  uint8_t* to[2];
  for (int k = 0; k < 2; ++k) {
    out_sizes[k] = sides[draw(0, 4)];
    out[k].resize(size_t(count * out_sizes[k] * out_sizes[k] * 3));
    to[k] = out[k].data();
  }
  void* batch = fastrot_jpeg_crops(pool, count, records.data(), bytes.data(), sizes.data(), raw.data(),
                                   checked ? crcs.data() : nullptr, recipes, tables, out_sizes, to, status.data());
  fastrot_wait(pool, batch);
  return std::count(status.begin(), status.end(), int32_t(FINE));
}

int64_t tiles(void* pool, int64_t count, bool tiled) {
  const int64_t unit = tiled ? TILE : 3, side = tiled ? 8 : 1, size = draw(1, 40);
  std::vector<int64_t> first{0}, boxes(static_cast<size_t>(count) * 6);
  std::vector<int32_t> sizes, status(static_cast<size_t>(count), -1);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t height = draw(1, 60), width = draw(1, 60);
    sizes.push_back(int32_t(height)), sizes.push_back(int32_t(width));
    first.push_back(first.back() + (height + side - 1) / side * ((width + side - 1) / side));
    draw_box(&boxes[size_t(i) * 6], i, height, width);
  }
  Bytes data(static_cast<size_t>(first.back() * unit));
  for (uint8_t& byte : data) byte = uint8_t(draw(0, 255));
  const Guarded guarded(data);
  Bytes out(static_cast<size_t>(count * size * size * 3));
  fastrot_wait(pool, fastrot_pack_crops(pool, count, guarded.at, first.data(), sizes.data(), tiled, boxes.data(), size,
                                        out.data(), status.data()));
  return std::count(status.begin(), status.end(), int32_t(FINE));
}

}  // namespace

int main(int, char** arguments) {
  const std::vector<Picture> pictures = read_all(arguments[1]);
  const int64_t times = atoll(arguments[2]);
  const int threads = atoi(arguments[3]);
  int64_t decoded = 0, cut = 0;
  for (int64_t done = 0; done < times;) {
    void* pool = fastrot_pool(threads);
    fastrot_wide(draw(0, 3) != 0);
    for (int k = 0; k < 8 && done < times; ++k) {
      const int64_t some = std::min<int64_t>(times - done, 6);
      decoded += jpegs(pool, pictures, some);
      cut += tiles(pool, some, k % 2);
      done += some;
    }
    fastrot_end(pool);
  }
  printf("%lld records corrupted: %lld crops made, the others left; %lld crops of tiles and pixels\n", (long long)times,
         (long long)decoded, (long long)cut);
}
