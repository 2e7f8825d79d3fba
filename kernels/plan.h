// Which keys a tile of queries reads, where, and with what weights: the first half of cpu.cpp.
//
// B batch · L referred layers · K sampled keys per layer and query · H,W grid · C channels
// A is the type of all arithmetic: double for double features, else float.

#pragma once

#include <cstdint>

#include "vectors.h"

extern "C" struct Problem {  // mirrored in cpp_backend.py, field by field
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
  void* const* grad_features;      // [L] pointers to T [B,H+2,W+2,C], each may be null
  void* grad_points;               // A [B,H,W,L,3,K], or null
  void* const* grad_mask_maps;     // [L] pointers to A [B,H+2,W+2,K], each may be null
  double* grad_gates;              // [B,L], to be summed over B, or null
  // Of a whole module; there are no points, no masks and no aggregate then:
  const void* query;             // T [B,H,W,C], the last stride is 1; C is even for bfloat16
  const int64_t* query_strides;  // [3] of image, row and column
  const void* weight;            // A [C,L·3·K], of the points; their bias A [L·3·K]
  const void* bias;
  const void* mask_weight;  // A [L,C,K], of the masks, or null; their bias A [L,K]
  const void* mask_bias;
  void* mask_memory;        // A [L,B,H+2,W+2,K], for the masks
  const void* output;       // A [L,C+1,C], g behind h, and in the last row what coverage is times
  const void* output_bias;  // A [C]
  void* result;             // T [B,H,W,C], contiguous
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
        size(kTile * kTile * slots + kLanes<A>), reals(size * 14), longs(size), ints(size * 3),
        list(size + kSlack) {
    A** arrays[] = {&at.y,  &at.x,  &at.f,  &at.logit, &at.slope_y, &at.slope_x,
                    &at.w0, &at.w1, &at.w2, &at.w3,    &at.d};
    A* next = reals.data();
    for (A** array : arrays) *array = next, next += size;
    at.corner = longs.data(), at.picked = list.data();
    at.row = ints.data(), at.column = at.row + size, at.open = at.column + size;
  }

  int b, l, top, left, height, width;  // queries from (top, left) of image b, keys on layer l
  bool masked = false;                 // whether masks are read, rather than known to be open
  int K, slots;                        // keys of a query, and entries: whole vectors
  int64_t size;  // of an array, and a line more: not all of a query's entries fall into one set
  int first[kTile * kTile + 1];  // picked[first[q] .. first[q + 1] - 1]: query q's open entries
  A inside[kTile * kTile];       // gate · Σ of f · share in the image, over the open keys
  Entries<A> at;
  const A* points = nullptr;  // [q,3,K] of this layer, if the module computes them itself
  Buffer<A> reals;
  Buffer<int64_t> longs;
  Buffer<Integer<A>> ints;
  Buffer<int32_t> list;

  const A* points_of(const Problem& p, int q) const {
    return points ? points + q * 3 * K : static_cast<const A*>(p.points) + pair(p, q) * 3 * K;
  }
  int queries() const { return height * width; }
  int y(int q) const { return top + q / width; }
  int x(int q) const { return left + q % width; }
  int64_t pixel(const Problem& p, int q) const {  // index in [B,H,W]
    return (int64_t(b) * p.H + y(q)) * p.W + x(q);
  }
  int64_t pair(const Problem& p, int q) const { return pixel(p, q) * p.L + l; }  // in [B,H,W,L]
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
  const A query_y = A(tile.y(begin));
  for (int q = begin; q < end; ++q) {
    const A* in = tile.points_of(p, q);
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
    const A scale = 1 / total_of<A>(sum)[0];
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

// Whether the map keeps every key, wherever it is read without noise: all values are above 0, and so
// is what lies between them.
template <class A>
bool all_open(const Problem& p, const Tile<A>& tile) {
  const int64_t* strides = p.mask_strides + tile.l * 3;
  const A* map = mask_map(p, tile);
  bool open = !p.seeds;
  for (int64_t y = 0; open && y < p.H + 2; ++y) {
    Integers<A> all = ~Integers<A>{};
    for (int64_t x = 0; x < p.W + 2; ++x)
      for (int k = 0; k < tile.K; k += kLanes<A>)
        all &= get_some(map + y * strides[1] + x * strides[2] + k, tile.K - k, A(1)) > 0;
    for (int i = 0; i < kLanes<A>; ++i) open &= all[i] != 0;
  }
  return open;
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
    draw_noise(seed, counter, K, at.logit + q * tile.slots);
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
      if (tile.masked) {
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
    if (tile.masked) look_up(p, tile, begin, end);
    pick(p, tile, begin, end, gate);
    address(tile, begin, end, strides[1], strides[2]);
  }
  return tile.first[tile.queries()];
}

// Asks for what coming tiles read first: the next one's points, and the features and masks in the
// columns half a tile beyond it (those above, which the last strip read, have left the cache by
// now). Keys reach them in no order that a processor could guess.
template <class T, class A>
void ask_ahead(const Problem& p, const Tile<A>& tile, const T* image) {
  constexpr int beyond = kTile + kTile / 2;
  const int64_t top = tile.top > kTile / 2 ? tile.top - kTile / 2 : 0;
  const int64_t bottom = least(tile.top + beyond + kTile, p.H + 2);
  const int64_t right = least(tile.left + beyond + kTile, p.W + 2);
  const auto ask_for = [&](const auto* from, const int64_t* strides, int64_t count) {
    for (int64_t y = top; y < bottom; ++y)
      for (int64_t x = tile.left + beyond; x < right; ++x)
        ask(from + y * strides[1] + x * strides[2], count);
  };
  ask_for(image, p.feature_strides + tile.l * 3, p.C);
  if (tile.masked) ask_for(mask_map(p, tile), p.mask_strides + tile.l * 3, p.K);
  const A* points = static_cast<const A*>(p.points);
  for (int y = tile.top; points && y < tile.top + tile.height; ++y)
    for (int64_t x = tile.left + kTile; x < least(tile.left + 2 * kTile, p.W); ++x)
      ask(points + (((tile.b * p.H + y) * p.W + x) * p.L + tile.l) * 3 * p.K, 3 * p.K);
}

}  // namespace
