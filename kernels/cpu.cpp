// kernels.attend on the CPU, forward and backward; kernels/cpp_backend.py compiles this file on first use.
//
// B batch · L referred layers · K sampled keys per layer and query · H,W grid · C channels
// T is the features' type in memory, A that of all arithmetic: double for double, else float.
//
// Feature and mask rows have a one-pixel border, so the four corners of a position clamped to
// [-1,H] × [-1,W] always lie inside the tensor: no bounds checks, and nothing outside is touched.
// Every sum has one owner and a fixed order: the bits do not depend on the number of threads.

#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "features.h"
#include "plan.h"

namespace {

// From the dots to the gradients of masks, offsets and logits. Returns the gate's gradient.
template <class A>
double spread(const Problem& p, Tile<A>& tile, A gate, A kept_gradient, A* grad_mask) {
  constexpr int lanes = kLanes<A>;
  using Reals = Vector<A>;
  const Entries<A> at = tile.at;
  const Integer<A> H = Integer<A>(p.H), W = Integer<A>(p.W);
  const A height = A(p.H), width = A(p.W), cold = A(1 / p.temperature);
  const int K = tile.K, queries = tile.queries();
  const Reals none = {};
  double gate_gradient = 0;
  for (int q = 0; q < queries; ++q) {
    const int begin = q * tile.slots, end = begin + K;
    const A c = p.coverage ? static_cast<const A*>(p.coverage)[tile.pair(p, q)] : A(0);
    Reals sum = {};
    for (int i = begin; i < end; i += lanes) {
      Reals d[4];
      part_by_four<A>(at.d + i * 4, d);
      if (p.coverage) {
        const Integers<A> row = get(at.row + i), column = get(at.column + i);
        const Reals up = row >= 1 ? c - none : none, low = row < H ? c - none : none;
        d[0] += column >= 1 ? up : none, d[1] += column < W ? up : none;
        d[2] += column >= 1 ? low : none, d[3] += column < W ? low : none;
      }
      const Reals y = get(at.y + i), x = get(at.x + i), f = get(at.f + i);
      const Integers<A> open = get(at.open + i);
      const Reals s = (1 - y) * ((1 - x) * d[0] + x * d[1]) + y * ((1 - x) * d[2] + x * d[3]);
      const Reals f_open = open ? f : none;
      Reals grad_y = gate * f_open * ((1 - x) * (d[2] - d[0]) + x * (d[3] - d[1]));
      Reals grad_x = gate * f_open * ((1 - y) * (d[1] - d[0]) + y * (d[3] - d[2]));
      if (p.mask_maps) {
        const Reals z = get(at.logit + i) * cold, e = exponential(z > 0 ? -z : z);
        const Reals mask = (gate * f * s + kept_gradient) * e / ((1 + e) * (1 + e)) * cold;
        grad_y += mask * get(at.slope_y + i), grad_x += mask * get(at.slope_x + i);
        // Straight-through: the sigmoid's. The mask's shares take the place of the features'.
        const Reals upper = mask * (1 - y), lower = mask * y;
        put<A>(at.w0 + i, upper * (1 - x)), put<A>(at.w1 + i, upper * x);
        put<A>(at.w2 + i, lower * (1 - x)), put<A>(at.w3 + i, lower * x);
      }
      // The gradients of the position take the place of the slopes, those of f of the logit.
      const Reals sent = open ? f * s : none;
      put<A>(at.slope_y + i, grad_y), put<A>(at.slope_x + i, grad_x), put<A>(at.logit + i, sent);
      sum += sent;
    }
    const A total = total_of<A>(sum)[0], mean = gate * total;
    gate_gradient += total;
    if (!p.grad_points) continue;
    const int64_t first = tile.pair(p, q) * 3 * K;
    const A* in = static_cast<const A*>(p.points) + first;
    A* out = static_cast<A*>(p.grad_points) + first;
    const A query_y = A(tile.y(q)), query_x = A(tile.x(q));
    for (int i = begin, k = 0; k < K; i += lanes, k += lanes) {
      const Reals y = query_y + get_some(in + k, K - k, A(0));
      const Reals x = query_x + get_some(in + K + k, K - k, A(0));
      // Farther out, moving changes nothing.
      put_some(out + k, ((y >= -1) & (y <= height)) ? get(at.slope_y + i) : none, K - k);
      put_some(out + K + k, ((x >= -1) & (x <= width)) ? get(at.slope_x + i) : none, K - k);
      put_some(out + 2 * K + k, gate * get(at.logit + i) - get(at.f + i) * mean, K - k);
    }
  }
  const int64_t down = (p.W + 2) * K;
  for (int q = 0; grad_mask && q < queries; ++q)
    for (int k = 0, i = q * tile.slots; k < K; ++k, ++i) {
      A* to = grad_mask + at.row[i] * down + at.column[i] * int64_t(K) + k;
      to[0] += at.w0[i], to[K] += at.w1[i], to[down] += at.w2[i], to[down + K] += at.w3[i];
    }
  return gate_gradient;
}

// ---- the two passes

// Large results come fresh from the system: huge pages spare most of the page faults.
inline void expect_writes(void* start, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = 4096;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(start) + page - 1) / page * page;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(start) + uintptr_t(bytes)) / page * page;
  if (start && bytes >= int64_t(4) << 20)
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)start, (void)bytes;
#endif
}

// Calls body for each tile in a strip of kTile rows.
template <class A, class F>
inline void over_tiles(const Problem& p, Tile<A>& tile, int strip, F&& body) {
  tile.top = strip * kTile;
  tile.height = p.H - tile.top < kTile ? int(p.H) - tile.top : kTile;
  for (tile.left = 0; tile.left < p.W; tile.left += kTile) {
    tile.width = p.W - tile.left < kTile ? int(p.W) - tile.left : kTile;
    body();
  }
}

// Which of the maps [B,L] keep every key.
template <class A>
void find_open(const Problem& p, Tile<A>& tile, std::vector<char>& open) {
#pragma omp for schedule(dynamic)
  for (int64_t i = 0; i < int64_t(open.size()); ++i) {
    tile.b = int(i / p.L), tile.l = int(i % p.L);
    open[i] = !p.mask_maps || all_open(p, tile);
  }
}

template <class T, class A>
void forward(const Problem& p) {
  const int64_t strips = (p.H + kTile - 1) / kTile, work = p.B * p.L * strips;
  std::vector<char> open(p.B * p.L);
  for (int64_t i = 0; i < p.B * p.L; ++i) p.kept[i] = 0;
  expect_writes(p.aggregate, p.B * p.H * p.W * p.L * p.C * int64_t(sizeof(T)));
#pragma omp parallel num_threads(int(p.threads))
  {
    Tile<A> tile(p);
    find_open(p, tile, open);
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < work; ++item) {
      const int64_t b = item / strips / p.L, l = item / strips % p.L;
      tile.b = int(b), tile.l = int(l), tile.masked = !open[item / strips];
      const A gate = A(p.gates ? p.gates[l] : 1);
      const T* image = static_cast<const T*>(p.features[l]) + b * p.feature_strides[l * 3];
      T* aggregate = static_cast<T*>(p.aggregate);
      int64_t kept = 0;
      over_tiles(p, tile, int(item % strips), [&] {
        if (gate != 0) ask_ahead(p, tile, image);
        kept += plan(p, tile, gate);
        for (int q = 0; q < tile.queries(); ++q) {
          const int64_t pair = tile.pair(p, q);
          static_cast<A*>(p.coverage)[pair] =
              gate != 0 ? tile.inside[q] : A(0);
          if (gate == 0) std::memset(aggregate + pair * p.C, 0, sizeof(T) * p.C);
        }
        if (gate != 0)
          gather(p, tile, image, nullptr,
                 [&](auto block, auto part, int q, int c, const Vector<A>* sums, int count) {
                   store_block<A, block, part>(aggregate + tile.pair(p, q) * p.C + c, sums, count);
                 });
      });
#pragma omp atomic
      p.kept[item / strips] += double(kept);  // whole numbers: exact in any order
    }
  }
}

// ---- a whole module in inference: points, attention and output of a tile stay in the cache

template <class T, class A>
struct Matrices {
  explicit Matrices(const Problem& p)
      : points(factors<T, A>(p.weight, 1, p.C, p.L * 3 * p.K, memory[0])),
        output(factors<T, A>(p.output, p.L, p.C + 1, p.C, memory[1])),
        masks(p.mask_weight ? factors<T, A>(p.mask_weight, p.L, p.C, p.K, memory[2]) : nullptr) {}

  Buffer<Factor<T, A>> memory[3];
  const Factor<T, A>*points, *output, *masks;
};

// Masks on one row of layer l's image b, border included. Returns whether they keep every key.
template <class T, class A>
bool find_masks(const Problem& p, const Matrices<T, A>& matrices, int64_t l, int64_t b, int64_t y) {
  const int64_t *strides = p.feature_strides + l * 3, count = (p.W + 2) * p.K;
  const T* row = static_cast<const T*>(p.features[l]) + b * strides[0] + y * strides[1];
  const A* bias = static_cast<const A*>(p.mask_bias) + l * p.K;
  A* masks = static_cast<A*>(p.mask_memory) + ((l * p.B + b) * (p.H + 2) + y) * count;
  product<T, A>(
      int(p.W + 2), int(p.C), matrices.masks + l * steps<T>(p.C) * p.K, p.K, int(p.K),
      [&](int x) { return row + x * strides[2]; }, [&](int) { return bias; },
      [&](int x) { return masks + x * p.K; });
  int open = 1;
#pragma omp simd reduction(& : open)
  for (int64_t i = 0; i < count; ++i) open &= masks[i] > 0;
  return open;
}

// The rows of a tile's queries.
template <class T, class A>
struct Rows {
  Rows(const Problem& p, const Tile<A>& tile)
      : width(p.C + kVectorBytes / sizeof(T)), points(kTile * kTile * 3 * p.K),
        totals(kTile * kTile * p.C), sums(kTile * kTile * width),
        pairs(kPairs<T> ? 2 * tile.size : 0) {}

  int64_t width;  // of a row of sums: aggregate, coverage and zeros
  Buffer<A> points, totals;
  Buffer<T> sums;
  Buffer<uint32_t> pairs;  // the weights of the keys' corners, see `sum_pairs`
};

// Adds layer tile.l's part of h(y) to the totals; before the first one, they are h's bias.
template <class T, class A, class F>
void add_layer(const Problem& p, const Matrices<T, A>& matrices, Tile<A>& tile, Rows<T, A>& rows,
               F&& query) {
  const int C = int(p.C), N = tile.queries(), columns = 3 * tile.K;
  const auto total = [&](int q) { return rows.totals.data() + q * C; };
  const auto sum = [&](int q) { return rows.sums.data() + q * rows.width; };
  const T* image =
      static_cast<const T*>(p.features[tile.l]) + tile.b * p.feature_strides[tile.l * 3];
  ask_ahead(p, tile, image);
  const int64_t first = int64_t(tile.l) * columns;
  const A* bias = static_cast<const A*>(p.bias) + first;
  const A* begin = static_cast<const A*>(p.output_bias);
  product<T, A>(
      N, C, matrices.points + first, p.L * columns, columns, query, [&](int) { return bias; },
      [&](int q) { return rows.points.data() + q * columns; });
  tile.points = rows.points.data();
  plan(p, tile, A(1));
  if constexpr (kPairs<T>)
    for (int i = 0; i < N * tile.slots; i += kLanes<A>) {
      const Entries<A>& at = tile.at;
      uint32_t* to = rows.pairs.data() + i;
      put<uint32_t>(to, pair_up(get(at.w0 + i), get(at.w1 + i)));
      put<uint32_t>(to + tile.size, pair_up(get(at.w2 + i), get(at.w3 + i)));
    }
  gather(p, tile, image, kPairs<T> ? rows.pairs.data() : nullptr,
         [&](auto block, auto part, int q, int c, const Vector<A>* v, int count) {
           store_block<A, block, part>(sum(q) + c, v, count);
         });
  for (int q = 0; q < N; ++q) narrow(tile.inside[q], sum(q)[C]);
  product<T, A>(
      N, C + 1, matrices.output + tile.l * steps<T>(C + 1) * C, C, C, sum,
      [&](int q) { return tile.l ? total(q) : begin; }, total);
}

// x + h(y) of a query, whose pixel is counted in [B,H,W].
template <class T, class A>
void add_query(const Problem& p, Rows<T, A>& rows, const T* query, int64_t pixel, int q) {
  const A* total = rows.totals.data() + q * p.C;
  T* result = static_cast<T*>(p.result) + pixel * p.C;
  over_channels<kLanes<A>>(int(p.C), [&](auto block, auto part, int first) {
    for (int v = 0, c = first; v < block; ++v, c += kLanes<A>) {
      const int count = int(p.C) - c;
      const Vector<A> sum = load<A, part>(query + c, count) + load<A, part>(total + c, count);
      store<A, part>(result + c, sum, count);
    }
  });
}

template <class T, class A>
void module(const Problem& given) {
  Problem p = given;
  const int64_t strips = (p.H + kTile - 1) / kTile, *strides = p.query_strides;
  const int64_t lines = p.H + 2, map = lines * (p.W + 2) * p.K;
  const Matrices<T, A> matrices(p);
  std::vector<const void*> maps(p.L);
  std::vector<int64_t> map_strides;
  for (int64_t l = 0; p.mask_weight && l < p.L; ++l) {
    maps[l] = static_cast<A*>(p.mask_memory) + l * p.B * map;
    map_strides.insert(map_strides.end(), {map, (p.W + 2) * p.K, p.K});
  }
  if (p.mask_weight) p.mask_maps = maps.data(), p.mask_strides = map_strides.data();
  std::vector<char> open(p.L * p.B * lines, 1);
  expect_writes(p.mask_memory, p.L * p.B * map * int64_t(sizeof(A)));
  expect_writes(p.result, p.B * p.H * p.W * p.C * int64_t(sizeof(T)));
#pragma omp parallel num_threads(int(p.threads))
  {
    Tile<A> tile(p);
    Rows<T, A> rows(p, tile);
#pragma omp for schedule(dynamic, 8)
    for (int64_t item = 0; item < (p.mask_maps ? p.L * p.B * lines : 0); ++item)
      open[item] = find_masks(p, matrices, item / lines / p.B, item / lines % p.B, item % lines);
    const auto query = [&](int q) {
      return static_cast<const T*>(p.query) + tile.b * strides[0] + tile.y(q) * strides[1] +
             tile.x(q) * strides[2];
    };
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < p.B * strips; ++item) {
      tile.b = int(item / strips);
      over_tiles(p, tile, int(item % strips), [&] {
        for (tile.l = 0; tile.l < p.L; ++tile.l) {
          tile.masked = std::memchr(open.data() + (tile.l * p.B + tile.b) * lines, 0, lines);
          add_layer(p, matrices, tile, rows, query);
        }
        for (int q = 0; q < tile.queries(); ++q) add_query(p, rows, query(q), tile.pixel(p, q), q);
      });
    }
  }
}

// What one image and layer send back: the unit of work of the backward pass.
template <class T, class A>
struct Share {
  const Problem& p;
  A gate, kept_gradient;
  const T* image;
  A *features, *mask;  // gradients, null where not wanted
  T* result;           // the features' gradient, of which `features` is the sum before rounding
  bool reads, shut_gate, flows;

  Share(const Problem& p, int64_t b, int64_t l, Buffer<A>& memory) : p(p) {
    const int64_t pixels = (p.H + 2) * (p.W + 2);
    gate = A(p.gates ? p.gates[l] : 1);
    kept_gradient = A(p.kept && p.mask_maps ? p.kept[b * p.L + l] : 0);
    image = static_cast<const T*>(p.features[l]) + b * p.feature_strides[l * 3];
    T* sent = static_cast<T*>(p.grad_features[l]);
    features = nullptr;
    if (sent) result = sent + b * pixels * p.C, features = summed(memory);
    mask = p.mask_maps ? static_cast<A*>(p.grad_mask_maps[l]) : nullptr;
    if (features) std::memset(features, 0, sizeof(A) * pixels * p.C);
    if (mask) std::memset(mask += b * pixels * p.K, 0, sizeof(A) * pixels * p.K);
    reads = gate != 0 && p.aggregate && (p.grad_points || mask || p.grad_gates);
    shut_gate = gate == 0 && p.grad_gates;    // its gradient is what the layer would have sent
    flows = gate != 0 || kept_gradient != 0;  // else every other gradient is zero
  }

  A* summed(Buffer<A>& memory) const {
    if constexpr (std::is_same_v<T, A>)
      return result;
    else
      return memory.data();
  }

  void round() const {
    if (std::is_same_v<T, A> || !features) return;
    const int64_t size = (p.H + 2) * (p.W + 2) * p.C;
    int64_t i = 0;
    for (; i + kLanes<A> <= size; i += kLanes<A>) store<A, false>(result + i, get(features + i), 0);
    for (; i < size; ++i) narrow(features[i], result[i]);
  }
};

// The gradient of a gate that is shut.
template <class T, class A>
double shut_gate_gradient(const Share<T, A>& share, const Tile<A>& tile) {
  const Problem& p = share.p;
  double gradient = 0;
  for (int q = 0; p.coverage && q < tile.queries(); ++q)
    gradient += static_cast<const A*>(p.coverage)[tile.pair(p, q)] * tile.inside[q];
  if (p.aggregate)
    gather(p, tile, share.image, nullptr,
           [&](auto block, auto part, int q, int c, const Vector<A>* sent, int count) {
             Vector<A> row[block], sum = {};
             load_block<A, block, part>(
                 static_cast<const T*>(p.aggregate) + tile.pair(p, q) * p.C + c, count, row);
             for (int v = 0; v < block; ++v) sum += sent[v] * row[v];
             gradient += total_of<A>(sum)[0];
           });
  return gradient;
}

// Adds a tile's gradients to its share's. Returns the gate's.
template <class T, class A>
double backward_tile(const Share<T, A>& share, Tile<A>& tile) {
  const Problem& p = share.p;
  double gate = 0;
  if (share.flows || share.shut_gate) {
    ask_ahead(p, tile, share.image);
    plan(p, tile, share.shut_gate ? A(1) : share.gate);
  }
  if (share.shut_gate) gate = shut_gate_gradient(share, tile);
  if (share.flows) {
    std::memset(tile.at.d, 0, sizeof(A) * tile.queries() * tile.slots * 4);
    if (share.reads) dots(p, tile, share.image);
    if (share.features && share.gate != 0 && p.aggregate) scatter<T>(p, tile, share.features);
    const double open_gate = spread(p, tile, share.gate, share.kept_gradient, share.mask);
    return share.shut_gate ? gate : open_gate;
  }
  for (int q = 0; p.grad_points && q < tile.queries(); ++q)
    std::memset(static_cast<A*>(p.grad_points) + tile.pair(p, q) * 3 * p.K, 0,
                sizeof(A) * 3 * p.K);
  return gate;
}

// Whether gradients of features are wanted that are summed elsewhere, before they are rounded.
template <class T, class A>
bool sums_features(const Problem& p) {
  bool wanted = false;
  for (int64_t l = 0; l < p.L; ++l) wanted |= p.grad_features[l] != nullptr;
  return wanted && !std::is_same_v<T, A>;
}

template <class T, class A>
void backward(const Problem& p) {
  const int strips = int((p.H + kTile - 1) / kTile);
  const int64_t pixels = p.B * (p.H + 2) * (p.W + 2);
  for (int64_t l = 0; l < p.L; ++l) {
    expect_writes(p.grad_features[l], pixels * p.C * int64_t(sizeof(T)));
    if (p.mask_maps) expect_writes(p.grad_mask_maps[l], pixels * p.K * int64_t(sizeof(A)));
  }
  expect_writes(p.grad_points, p.B * p.H * p.W * p.L * p.K * 3 * int64_t(sizeof(A)));
#pragma omp parallel num_threads(int(p.threads))
  {
    Tile<A> tile(p);
    Buffer<A> memory(sums_features<T, A>(p) ? (p.H + 2) * (p.W + 2) * p.C : 0);
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < p.B * p.L; ++item) {
      tile.b = int(item / p.L), tile.l = int(item % p.L);
      const Share<T, A> share(p, tile.b, tile.l, memory);
      tile.masked = p.mask_maps;
      double gate = 0;
      for (int strip = 0; strip < strips; ++strip)
        over_tiles(p, tile, strip, [&] { gate += backward_tile(share, tile); });
      share.round();
      if (p.grad_gates) p.grad_gates[item] = gate;
    }
  }
}

}  // namespace

extern "C" {
void forward_float32(const Problem* p) { forward<float, float>(*p); }
void forward_bfloat16(const Problem* p) { forward<bfloat16, float>(*p); }
void forward_float64(const Problem* p) { forward<double, double>(*p); }
void module_float32(const Problem* p) { module<float, float>(*p); }
void module_bfloat16(const Problem* p) { module<bfloat16, float>(*p); }
void module_float64(const Problem* p) { module<double, double>(*p); }
void backward_float32(const Problem* p) { backward<float, float>(*p); }
void backward_bfloat16(const Problem* p) { backward<bfloat16, float>(*p); }
void backward_float64(const Problem* p) { backward<double, double>(*p); }
}
