// kernels.attend on the CPU, forward and backward; kernels/cpu.py compiles this file on first use.
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

#include "vectors.h"

extern "C" struct Problem {  // mirrored in cpu.py, field by field
  int64_t B, H, W, L, K, C, threads;
  double temperature;
  const void* const* features;     // [L] pointers to T [B,H+2,W+2,C], the last stride is 1
  const int64_t* feature_strides;  // [L,3] of image, row and column, in elements
  const void* points;              // A [B,H,W,L,3,K]
  const void* const* mask_maps;    // [L] pointers to A [B,H+2,W+2,K], or null
  const int64_t* mask_strides;     // [L,3]
  const double* gates;             // [L], or null for 1
  const int64_t* seeds;            // [B], or null for no noise
  void* aggregate;                 // T [B,H,W,L,C]  } results of the forward pass; their gradients,
  void* coverage;                  // A [B,H,W,L]    } or null, in the backward pass; contiguous
  double* kept;                    // [B,L]          }
  void* const* grad_features;      // [L] pointers to A [B,H+2,W+2,C], each may be null
  void* grad_points;               // A [B,H,W,L,3,K], or null
  void* const* grad_mask_maps;     // [L] pointers to A [B,H+2,W+2,K], each may be null
  double* grad_gates;              // [B,L], to be summed over B, or null
};

namespace {

constexpr int kTile = 8;  // queries are worked on in tiles of 8 × 8, whose keys share cache lines

// ---- the keys of a tile of queries; key k of query q is entry q * slots + k

template <class A>
struct Entries {  // arrays; in a local copy the compiler sees that no write moves them
  A *y, *x;                           // position within the four corners
  A *f, *logit;                       // softmax over the keys; mask logit with its noise
  A *slope_y, *slope_x;               // of the mask logit
  A *w0, *w1, *w2, *w3;               // gate · f · the corner's share; before, the mask's values
  A* d;                               // [4], gradient · feature at each corner
  int64_t* corner;                    // of the upper left corner, in elements of the layer's image
  Integer<A>*row, *column;            // of that corner, border included
  Integer<A>* open;                   // -1 where the mask is open, else 0
  int32_t* picked;
};

template <class A>
struct Tile {
  explicit Tile(const Problem& p)
      : K(int(p.K)), slots((K + kLanes<A> - 1) / kLanes<A> * kLanes<A>),
        size(kTile * kTile * slots), reals(size * 14), longs(size), ints(size * 3),
        list(size + kSlack) {
    A** arrays[] = {&at.y,  &at.x,  &at.f,  &at.logit, &at.slope_y, &at.slope_x,
                    &at.w0, &at.w1, &at.w2, &at.w3,    &at.d};
    A* next = reals.data();
    for (A** array : arrays) *array = next, next += size;
    at.corner = longs.data(), at.picked = list.data();
    at.row = ints.data(), at.column = at.row + size, at.open = at.column + size;
  }

  int b, l, top, left, height, width;  // queries from (top, left) of image b, keys on layer l
  int K, slots;                        // keys of a query, and entries: whole vectors
  int64_t size;
  int first[kTile * kTile + 1];  // picked[first[q] .. first[q + 1] - 1]: query q's open entries
  A inside[kTile * kTile];       // gate · Σ of f · share in the image, over the open keys
  Entries<A> at;
  std::vector<A> reals;
  std::vector<int64_t> longs;
  std::vector<Integer<A>> ints;
  std::vector<int32_t> list;

  int queries() const { return height * width; }
  int y(int q) const { return top + q / width; }
  int x(int q) const { return left + q % width; }
  int64_t pair(const Problem& p, int q) const {  // index in [B,H,W,L]
    return ((int64_t(b) * p.H + y(q)) * p.W + x(q)) * p.L + l;
  }
};

// Softmax, and the four corners, of the keys of queries begin .. end - 1, which share a row.
template <class A>
void locate(const Problem& p, Tile<A>& tile, int begin, int end) {
  constexpr int lanes = kLanes<A>;
  using Reals = Vector<A>;
  const Entries<A> at = tile.at;
  const Reals height = A(p.H) - Reals{}, width = A(p.W) - Reals{}, outside = A(-1) - Reals{};
  const Integers<A> last_row = Integer<A>(p.H) - 1 - Integers<A>{};
  const Integers<A> last_column = Integer<A>(p.W) - 1 - Integers<A>{};
  const int K = tile.K;
  const A* in = static_cast<const A*>(p.points) + tile.pair(p, begin) * 3 * K;
  const A query_y = A(tile.y(begin));
  for (int q = begin; q < end; ++q, in += p.L * 3 * K) {
    const A query_x = A(tile.left + q - begin);
    Reals top = A(-INFINITY) - Reals{}, sum = {};
    for (int k = 0; k < K; k += lanes) {
      const Reals logit = get_some(in + 2 * K + k, K - k, A(-INFINITY));
      top = logit > top ? logit : top;
    }
    top = top_of<A>(top);
    for (int k = 0, i = q * tile.slots; k < K; k += lanes, i += lanes) {
      const Reals f = exponential(get_some(in + 2 * K + k, K - k, A(-INFINITY)) - top);
      put<A>(at.f + i, f), sum += f;
      Reals y = query_y + get_some(in + k, K - k, A(0));
      Reals x = query_x + get_some(in + K + k, K - k, A(0));
      y = y > -1 ? (y < height ? y : height) : outside;  // NaN is outside
      x = x > -1 ? (x < width ? x : width) : outside;
      Integers<A> row = __builtin_convertvector(y, Integers<A>);
      Integers<A> column = __builtin_convertvector(x, Integers<A>);
      row += y < __builtin_convertvector(row, Reals);  // floor: comparisons give -1
      column += x < __builtin_convertvector(column, Reals);
      row = row < last_row ? row : last_row, column = column < last_column ? column : last_column;
      put<Integer<A>>(at.row + i, row + 1), put<Integer<A>>(at.column + i, column + 1);
      put<A>(at.y + i, y - __builtin_convertvector(row, Reals));
      put<A>(at.x + i, x - __builtin_convertvector(column, Reals));
    }
    const Reals scale = 1 / total_of<A>(sum);
    for (int i = q * tile.slots; i < (q + 1) * tile.slots; i += lanes)
      put<A>(at.f + i, get(at.f + i) * scale);
  }
}

// Where the upper left corners lie in an image with these strides.
template <class A>
void address(Tile<A>& tile, int begin, int end, int64_t down, int64_t right) {
  const Entries<A> at = tile.at;
#pragma omp simd
  for (int i = begin * tile.slots; i < end * tile.slots; ++i)
    at.corner[i] = at.row[i] * down + at.column[i] * right;
}

template <class A>
const A* mask_map(const Problem& p, const Tile<A>& tile) {
  return static_cast<const A*>(p.mask_maps[tile.l]) + tile.b * p.mask_strides[tile.l * 3];
}

// The mask's values at the four corners, and its noise.
template <class A>
void look_up(const Problem& p, Tile<A>& tile, int begin, int end) {
  const Entries<A> at = tile.at;
  const int K = tile.K;
  const int64_t* strides = p.mask_strides + tile.l * 3;
  const int64_t down = strides[1], right = strides[2];
  address(tile, begin, end, down, right);
  const A* map = mask_map(p, tile);
  for (int q = begin; q < end; ++q)
    for (int k = 0, i = q * tile.slots; k < K; ++k, ++i) {
      const A* from = map + at.corner[i] + k;
      at.w0[i] = from[0], at.w1[i] = from[right];
      at.w2[i] = from[down], at.w3[i] = from[down + right];
    }
  for (int q = begin; p.seeds && q < end; ++q) {
    const uint64_t seed = uint64_t(p.seeds[tile.b]);
    const uint64_t counter = ((int64_t(tile.y(q)) * p.W + tile.x(q)) * p.L + tile.l) * K;
#pragma omp simd
    for (int k = 0; k < K; ++k)
      at.logit[q * tile.slots + k] = A(logistic_noise(seed, counter + k));
  }
}

// The list of the open keys, and the corners' weights.
template <class A>
void pick(const Problem& p, Tile<A>& tile, int begin, int end, A gate) {
  constexpr int lanes = kLanes<A>;
  using Reals = Vector<A>;
  const Entries<A> at = tile.at;
  const Integer<A> H = Integer<A>(p.H), W = Integer<A>(p.W);
  const Reals none = {};
  int next = begin ? tile.first[begin] : 0;
  for (int q = begin; q < end; ++q) {
    tile.first[q] = next;
    Reals sum = {};
    for (int k = 0, i = q * tile.slots; k < tile.K; k += lanes, i += lanes) {
      const Reals y = get(at.y + i), x = get(at.x + i), f = gate * get(at.f + i);
      Integers<A> open = kLane<A> < tile.K - k;
      if (p.mask_maps) {
        const Reals v0 = get(at.w0 + i), v1 = get(at.w1 + i);
        const Reals v2 = get(at.w2 + i), v3 = get(at.w3 + i);
        Reals logit = (1 - y) * ((1 - x) * v0 + x * v1) + y * ((1 - x) * v2 + x * v3);
        if (p.seeds) logit += get(at.logit + i);
        if (p.grad_mask_maps) {
          put<A>(at.logit + i, logit);
          put<A>(at.slope_y + i, (1 - x) * (v2 - v0) + x * (v3 - v1));
          put<A>(at.slope_x + i, (1 - y) * (v1 - v0) + y * (v3 - v2));
        }
        open &= logit > 0;
      }
      next = append<A>(at.picked, next, open, i);
      put<Integer<A>>(at.open + i, open);
      const Integers<A> row = get(at.row + i), column = get(at.column + i);
      const Reals inside_y = (row >= 1 ? 1 - y : none) + (row < H ? y : none);
      const Reals inside_x = (column >= 1 ? 1 - x : none) + (column < W ? x : none);
      sum += open ? f * inside_y * inside_x : none;
      const Reals upper = f * (1 - y), lower = f * y;
      put<A>(at.w0 + i, upper * (1 - x)), put<A>(at.w1 + i, upper * x);
      put<A>(at.w2 + i, lower * (1 - x)), put<A>(at.w3 + i, lower * x);
    }
    tile.inside[q] = total_of<A>(sum)[0];
  }
  tile.first[end] = next;
}

// All of the above, a row of queries at a time. Returns how many keys are open.
template <class A>
int plan(const Problem& p, Tile<A>& tile, A gate) {
  const int64_t* strides = p.feature_strides + tile.l * 3;
  for (int begin = 0; begin < tile.queries(); begin += tile.width) {
    const int end = begin + tile.width;
    locate(p, tile, begin, end);
    if (p.mask_maps) look_up(p, tile, begin, end);
    pick(p, tile, begin, end, gate);
    address(tile, begin, end, strides[1], strides[2]);
  }
  return tile.first[tile.queries()];
}

// Asks for what coming tiles read first: the next one's points, and the features and masks half a
// tile beyond it, to the right and below. Keys reach them in no order that a processor could guess.
template <class T, class A>
void ask_ahead(const Problem& p, const Tile<A>& tile, const T* image) {
  constexpr int beyond = kTile + kTile / 2;
  const int64_t bottom = least(tile.top + beyond + kTile, p.H + 2);
  const int64_t right = least(tile.left + beyond + kTile, p.W + 2);
  const auto ask_for = [&](const auto* from, const int64_t* strides, int64_t count) {
    for (int64_t y = tile.top + beyond; y < bottom; ++y)
      for (int64_t x = tile.left + beyond; x < right; ++x)
        ask(from + y * strides[1] + x * strides[2], count);
  };
  ask_for(image, p.feature_strides + tile.l * 3, p.C);
  if (p.mask_maps) ask_for(mask_map(p, tile), p.mask_strides + tile.l * 3, p.K);
  const A* points = static_cast<const A*>(p.points);
  for (int y = tile.top; y < tile.top + tile.height; ++y)
    for (int64_t x = tile.left + kTile; x < least(tile.left + 2 * kTile, p.W); ++x)
      ask(points + (((tile.b * p.H + y) * p.W + x) * p.L + tile.l) * 3 * p.K, 3 * p.K);
}

// ---- features: image is the layer's image, gradient rows are p.aggregate's

// Weighted sums of the open keys' corners; sink(part, query, channel, vector, count) takes them.
template <class T, class A, class F>
void gather(const Problem& p, const Tile<A>& tile, const T* image, F&& sink) {
  constexpr int lanes = kLanes<A>;
  const Entries<A> at = tile.at;
  const int64_t down = p.feature_strides[tile.l * 3 + 1], right = p.feature_strides[tile.l * 3 + 2];
  over_channels<lanes>(int(p.C), [&](auto block, auto part, int c) {
    // With few vectors to a key, more sums hide the latency of the additions.
    constexpr int V = decltype(block)::value, S = V >= 8 ? 1 : V == 4 ? 2 : 4;
    const int count = int(p.C) - c, queries = tile.queries();
    for (int q = 0; q < queries; ++q) {
      Vector<A> sum[S][V] = {};
      for (int e = tile.first[q]; e < tile.first[q + 1]; ++e) {
        const int i = at.picked[e];
        const T *from = image + at.corner[i] + c, *under = from + down;
        const A w0 = at.w0[i], w1 = at.w1[i], w2 = at.w2[i], w3 = at.w3[i];
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) {
          sum[0][v] += w0 * load<A, part>(from + v * lanes, count);
          sum[1 % S][v] += w1 * load<A, part>(from + right + v * lanes, count);
          sum[2 % S][v] += w2 * load<A, part>(under + v * lanes, count);
          sum[3 % S][v] += w3 * load<A, part>(under + right + v * lanes, count);
        }
      }
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) {
        if constexpr (S == 2) sum[0][v] += sum[1][v];
        if constexpr (S == 4) sum[0][v] = (sum[0][v] + sum[1][v]) + (sum[2][v] + sum[3][v]);
        sink(part, q, c + v * lanes, sum[0][v], count);
      }
    }
  });
}

// Adds to d four dots a key, open or not: of the gradient's row with each corner's feature.
template <class T, class A>
void dots(const Problem& p, Tile<A>& tile, const T* image) {
  constexpr int lanes = kLanes<A>;
  const Entries<A> at = tile.at;
  const int64_t down = p.feature_strides[tile.l * 3 + 1], right = p.feature_strides[tile.l * 3 + 2];
  const int queries = tile.queries(), K = tile.K;
  over_channels<lanes>(int(p.C), [&](auto block, auto part, int c) {
    constexpr int V = decltype(block)::value;
    const int count = int(p.C) - c;
    for (int q = 0; q < queries; ++q) {
      const T* row = static_cast<const T*>(p.aggregate) + tile.pair(p, q) * p.C + c;
      Vector<A> gradient[V];
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) gradient[v] = load<A, part>(row + v * lanes, count);
      for (int i = q * tile.slots; i < q * tile.slots + K; ++i) {
        const T *from = image + at.corner[i] + c, *under = from + down;
        Vector<A> s0 = {}, s1 = {}, s2 = {}, s3 = {};
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) {
          s0 += gradient[v] * load<A, part>(from + v * lanes, count);
          s1 += gradient[v] * load<A, part>(from + right + v * lanes, count);
          s2 += gradient[v] * load<A, part>(under + v * lanes, count);
          s3 += gradient[v] * load<A, part>(under + right + v * lanes, count);
        }
        add_totals<A>(s0, s1, s2, s3, at.d + i * 4);
      }
    }
  });
}

// Adds the gradient's rows to the corners of the open keys in an image of the buffer [B,H+2,W+2,C].
template <class T, class A>
void scatter(const Problem& p, const Tile<A>& tile, A* image) {
  constexpr int lanes = kLanes<A>;
  const Entries<A> at = tile.at;
  const int64_t right = p.C, down = (p.W + 2) * right;
  const int queries = tile.queries();
  over_channels<lanes>(int(p.C), [&](auto block, auto part, int c) {
    constexpr int V = decltype(block)::value;
    const int count = int(p.C) - c;
    const auto add = [&](A* to, Vector<A> v) {
      store<A, part>(to, load<A, part>(to, count) + v, count);
    };
    for (int q = 0; q < queries; ++q) {
      const T* row = static_cast<const T*>(p.aggregate) + tile.pair(p, q) * p.C + c;
      Vector<A> gradient[V];
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) gradient[v] = load<A, part>(row + v * lanes, count);
      for (int e = tile.first[q]; e < tile.first[q + 1]; ++e) {
        const int i = at.picked[e];
        const A w0 = at.w0[i], w1 = at.w1[i], w2 = at.w2[i], w3 = at.w3[i];
        A *to = image + at.row[i] * down + at.column[i] * right + c, *under = to + down;
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) {
          const Vector<A> g = gradient[v];
          add(to + v * lanes, w0 * g), add(to + right + v * lanes, w1 * g);
          add(under + v * lanes, w2 * g), add(under + right + v * lanes, w3 * g);
        }
      }
    }
  });
}

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

template <class T, class A>
void forward(const Problem& p) {
  const int64_t strips = (p.H + kTile - 1) / kTile, work = p.B * p.L * strips;
  for (int64_t i = 0; i < p.B * p.L; ++i) p.kept[i] = 0;
  expect_writes(p.aggregate, p.B * p.H * p.W * p.L * p.C * int64_t(sizeof(T)));
#pragma omp parallel num_threads(int(p.threads))
  {
    Tile<A> tile(p);
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < work; ++item) {
      const int64_t b = item / strips / p.L, l = item / strips % p.L;
      tile.b = int(b), tile.l = int(l);
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
          gather(p, tile, image, [&](auto part, int q, int c, Vector<A> v, int count) {
            store<A, part>(aggregate + tile.pair(p, q) * p.C + c, v, count);
          });
      });
#pragma omp atomic
      p.kept[item / strips] += double(kept);  // whole numbers: exact in any order
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
  bool reads, shut_gate, flows;

  Share(const Problem& p, int64_t b, int64_t l) : p(p) {
    const int64_t pixels = (p.H + 2) * (p.W + 2);
    gate = A(p.gates ? p.gates[l] : 1);
    kept_gradient = A(p.kept && p.mask_maps ? p.kept[b * p.L + l] : 0);
    image = static_cast<const T*>(p.features[l]) + b * p.feature_strides[l * 3];
    features = static_cast<A*>(p.grad_features[l]);
    mask = p.mask_maps ? static_cast<A*>(p.grad_mask_maps[l]) : nullptr;
    if (features) std::memset(features += b * pixels * p.C, 0, sizeof(A) * pixels * p.C);
    if (mask) std::memset(mask += b * pixels * p.K, 0, sizeof(A) * pixels * p.K);
    reads = gate != 0 && p.aggregate && (p.grad_points || mask || p.grad_gates);
    shut_gate = gate == 0 && p.grad_gates;    // its gradient is what the layer would have sent
    flows = gate != 0 || kept_gradient != 0;  // else every other gradient is zero
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
    gather(p, tile, share.image, [&](auto part, int q, int c, Vector<A> sent, int count) {
      const T* row = static_cast<const T*>(p.aggregate) + tile.pair(p, q) * p.C + c;
      const Vector<A> product = sent * load<A, part>(row, count);
      A sum = 0;
      for (int i = 0; i < kLanes<A>; ++i) sum += product[i];
      gradient += sum;
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

template <class T, class A>
void backward(const Problem& p) {
  const int strips = int((p.H + kTile - 1) / kTile);
  const int64_t pixels = p.B * (p.H + 2) * (p.W + 2);
  for (int64_t l = 0; l < p.L; ++l) {
    expect_writes(p.grad_features[l], pixels * p.C * int64_t(sizeof(A)));
    if (p.mask_maps) expect_writes(p.grad_mask_maps[l], pixels * p.K * int64_t(sizeof(A)));
  }
  expect_writes(p.grad_points, p.B * p.H * p.W * p.L * p.K * 3 * int64_t(sizeof(A)));
#pragma omp parallel num_threads(int(p.threads))
  {
    Tile<A> tile(p);
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < p.B * p.L; ++item) {
      tile.b = int(item / p.L), tile.l = int(item % p.L);
      const Share<T, A> share(p, tile.b, tile.l);
      double gate = 0;
      for (int strip = 0; strip < strips; ++strip)
        over_tiles(p, tile, strip, [&] { gate += backward_tile(share, tile); });
      if (p.grad_gates) p.grad_gates[item] = gate;
    }
  }
}

}  // namespace

extern "C" {
void forward_float32(const Problem* p) { forward<float, float>(*p); }
void forward_bfloat16(const Problem* p) { forward<bfloat16, float>(*p); }
void forward_float64(const Problem* p) { forward<double, double>(*p); }
void backward_float32(const Problem* p) { backward<float, float>(*p); }
void backward_bfloat16(const Problem* p) { backward<bfloat16, float>(*p); }
void backward_float64(const Problem* p) { backward<double, double>(*p); }
}
