// SPDX-License-Identifier: Apache-2.0
// Random numbers that depend on a key and a place alone, and dropout by them.
// Included by kernels_body.h, once for each instruction set.

namespace qgnn {
namespace QGNN_ISA {

// Philox4x32-10 (Salmon et al., SC 2011): four numbers of 32 bits from a counter and a key.
QGNN_INLINE void philox(std::uint32_t c[4], std::uint32_t k0, std::uint32_t k1) {
  for (int i = 0; i < 10; ++i) {
    const std::uint64_t a = 0xD2511F53ull * c[0], b = 0xCD9E8D57ull * c[2];
    const std::uint32_t c1 = c[1], c3 = c[3];
    c[0] = static_cast<std::uint32_t>(b >> 32) ^ c1 ^ k0;
    c[1] = static_cast<std::uint32_t>(b);
    c[2] = static_cast<std::uint32_t>(a >> 32) ^ c3 ^ k1;
    c[3] = static_cast<std::uint32_t>(a);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// Counter: row (40 bits), column/4 (24 bits), epoch (32), layer (16), stage (8), round (8); the lane is column mod 4.
QGNN_INLINE void draw(const Key& key, i64 row, i64 group, std::uint32_t out[4]) {
  const std::uint64_t r = static_cast<std::uint64_t>(row);
  out[0] = static_cast<std::uint32_t>(r);
  out[1] = static_cast<std::uint32_t>(r >> 32) | static_cast<std::uint32_t>(group) << 8;
  out[2] = key.epoch;
  out[3] = key.layer | key.stage << 16 | key.round << 24;
  philox(out, static_cast<std::uint32_t>(key.seed), static_cast<std::uint32_t>(key.seed >> 32));
}

static void philox_one(const std::uint32_t counter[4], const std::uint32_t key[2], std::uint32_t out[4]) {
  std::memcpy(out, counter, 4 * sizeof(std::uint32_t));
  philox(out, key[0], key[1]);
}

constexpr int kGroups = 8;
constexpr int kEntries = 4 * kGroups;  // that eight draws are for, unless a row names a column twice

// `draw` for eight groups in a row; each build has its own.
static void draw_groups(const Key& key, i64 row, i64 group, std::uint32_t out[4 * kGroups]);

// Of eight rows one group each.
static void draw_places(const Key& key, const i64 rows[kGroups], const i64 groups[kGroups],
                        std::uint32_t out[4 * kGroups]);

// Calls use(column, numbers, count) for the columns of a row, up to 32 at a time.
template <typename Use>
QGNN_INLINE void each_run(const Key& key, i64 row, i64 columns, Use use) {
  std::uint32_t numbers[4 * kGroups];
  i64 c = 0;
  for (; c + 4 * kGroups <= columns; c += 4 * kGroups) {
    draw_groups(key, row, c / 4, numbers);
    use(c, numbers, 4 * kGroups);
  }
  for (; c < columns; c += 4) {
    draw(key, row, c / 4, numbers);
    use(c, numbers, columns - c < 4 ? static_cast<int>(columns - c) : 4);
  }
}

static void keyed_bits(Key key, const i64* rows, i64 columns, std::uint32_t* out, i64 begin, i64 end) {
  for (i64 row = begin; row < end; ++row)
    each_run(key, rows[row], columns, [&](i64 c, const std::uint32_t* v, int n) {
      std::memcpy(out + row * columns + c, v, n * sizeof *v);
    });
}

static void dropout_dense(Key key, const i64* rows, i64 columns, std::uint64_t threshold, float kept, float* out,
                          i64 begin, i64 end) {
  if (threshold > 0xFFFFFFFFull) {  // p so near to 1 that no number reaches it
    std::memset(out + begin * columns, 0, (end - begin) * columns * sizeof(float));
    return;
  }
  const std::uint32_t least = static_cast<std::uint32_t>(threshold);
  for (i64 row = begin; row < end; ++row)
    each_run(key, rows[row], columns, [&](i64 c, const std::uint32_t* v, int n) {
      float* to = out + row * columns + c;
      for (int i = 0; i < n; ++i) to[i] = v[i] >= least ? kept : 0.0f;
    });
}

// keep[e]: whether `dropout_dense` of the key keeps the place of stored entry e.
static void keep_csr(Key key, const i64* rows, const i64* indptr, const std::int32_t* indices, std::uint64_t threshold,
                     std::uint8_t* keep, i64 begin, i64 end) {
  // Eight draws at a time, whatever rows they are of, for as many entries as they serve. A branch on whether an entry
  // shares its draw with the one before would be guessed wrong half the time, so that each writes the next draw's place.
  i64 place[kGroups + 1] = {}, group[kGroups + 1] = {}, first = indptr[begin];
  std::uint32_t numbers[4 * kGroups];
  std::uint8_t number_of[kEntries];
  int draws = 0, entries = 0;
  const auto use = [&]() __attribute__((always_inline)) {
    draw_places(key, place, group, numbers);
    for (int i = 0; i < entries; ++i) keep[first + i] = numbers[number_of[i]] >= threshold;
    first += entries;
    draws = entries = 0;
  };
  for (i64 row = begin; row < end; ++row) {
    i64 last = -1;
    for (i64 e = indptr[row]; e < indptr[row + 1]; ++e) {
      const i64 here = indices[e] / 4;
      int fresh = here != last;
      if (draws + fresh > kGroups || entries == kEntries) {
        use();
        fresh = 1;
      }
      place[draws] = rows[row];
      group[draws] = last = here;
      draws += fresh;
      number_of[entries++] = static_cast<std::uint8_t>(4 * (draws - 1) + indices[e] % 4);
    }
  }
  if (entries > 0) use();
}

}  // namespace QGNN_ISA
}  // namespace qgnn
