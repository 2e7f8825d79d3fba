// What reads and writes the features of a tile's keys: sums, dots and scatter; a part of cpu.cpp.
//
// T is the features' type in memory, A that of all arithmetic: double for double, else float.
// image is the layer's image, gradient rows are p.aggregate's.

#pragma once

#include <cstdint>

#include "plan.h"

namespace {

// The loops over keys are functions of their own, so that their sums and pointers have all registers.

// The weighted sum of a query's open keys' corners, V vectors of channels from `image` on.
template <int V, bool part, class T, class A>
__attribute__((noinline)) void sum_keys(const Entries<A>& at, int begin, int end, const T* image,
                                        int64_t down, int64_t right, int count, Vector<A>* total) {
  // With few vectors to a key, more sums hide the latency of the additions.
  constexpr int S = V >= 8 ? 1 : V == 4 ? 2 : 4;
  const int32_t *next = at.picked + begin, *last = at.picked + end;
  const int64_t* corner = at.corner;
  const A* w = at.w0;
  const int64_t apart = at.w1 - at.w0;  // of w0, w1, w2 and w3
  Vector<A> sum[S][V] = {};
  for (; next < last; ++next) {
    const int64_t i = *next;
    const T* c0 = image + corner[i];
    const T *c1 = c0 + right, *c2 = c0 + down, *c3 = c1 + down;
    hold(c1), hold(c2), hold(c3);
    const A w0 = w[i], w1 = w[i + apart], w2 = w[i + 2 * apart], w3 = w[i + 3 * apart];
    const auto add = [&](Vector<A>* to, A w, const T* corner) {
      Vector<A> x[V];
      load_block<A, V, part>(corner, count, x);
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) to[v] += w * x[v];
    };
    add(sum[0], w0, c0), add(sum[1 % S], w1, c1), add(sum[2 % S], w2, c2), add(sum[3 % S], w3, c3);
  }
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v) {
    if constexpr (S == 2) sum[0][v] += sum[1][v];
    if constexpr (S == 4) sum[0][v] = (sum[0][v] + sum[1][v]) + (sum[2][v] + sum[3][v]);
    total[v] = sum[0][v];
  }
}

#if defined(__AVX512BF16__)
template <int... I>  // from words unpacked from the lower and the upper halves of every 128 bits
inline void part_by_two(Floats* v, std::integer_sequence<int, I...>) {
  const Floats a = v[0], b = v[1];
  v[0] = shuffle<float, (I / 4 * 4 + I % 2 * 2 + I / 2 % 2 * 16)...>(a, b);
  v[1] = shuffle<float, (I / 4 * 4 + I % 2 * 2 + I / 2 % 2 * 16 + 1)...>(a, b);
}

// The same with weights in pairs, of an entry's upper and, `apart` further, of its lower corners.
template <int V>
__attribute__((noinline)) void sum_pairs(const Entries<float>& at, int begin, int end,
                                         const bfloat16* image, int64_t down, int64_t right,
                                         const uint32_t* w, int64_t apart, Floats* total) {
  constexpr int lanes = kLanes<float>, S = V >= 8 ? 1 : 2;
  const int32_t *next = at.picked + begin, *last = at.picked + end;
  const int64_t* corner = at.corner;
  Floats sum[S][V] = {};
  const auto add = [&](Floats* to, uint32_t weights, const bfloat16* from) {
    const Words pair = weights - Words{};
#pragma GCC unroll 16
    for (int v = 0; v < V; v += 2) {
      Words a, b;
      std::memcpy(&a, from + v * lanes, sizeof a);
      std::memcpy(&b, from + v * lanes + right, sizeof b);
      hold_vector<uint32_t>(a), hold_vector<uint32_t>(b);
      const Words low = Words(_mm512_unpacklo_epi16(__m512i(a), __m512i(b)));
      const Words high = Words(_mm512_unpackhi_epi16(__m512i(a), __m512i(b)));
      to[v] = add_product<float, uint32_t>(to[v], low, pair);
      to[v + 1] = add_product<float, uint32_t>(to[v + 1], high, pair);
    }
  };
  for (; next < last; ++next) {
    const int64_t i = *next;
    const bfloat16* c0 = image + corner[i];
    add(sum[0], w[i], c0), add(sum[S - 1], w[i + apart], c0 + down);
  }
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v) total[v] = S == 2 ? sum[0][v] + sum[1][v] : sum[0][v];
#pragma GCC unroll 16
  for (int v = 0; v < V; v += 2) part_by_two(total + v, std::make_integer_sequence<int, lanes>{});
}
#endif

// Weighted sums of the open keys' corners; sink(block, part, query, channel, sums, count) takes them,
// a block of vectors as `load_block` gives it. pairs: null, or the weights for `sum_pairs`.
template <class T, class A, class F>
void gather(const Problem& p, const Tile<A>& tile, const T* image, const uint32_t* pairs,
            F&& sink) {
  const int64_t down = p.feature_strides[tile.l * 3 + 1], right = p.feature_strides[tile.l * 3 + 2];
  over_channels<kLanes<A>>(int(p.C), [&](auto block, auto part, int c) {
    constexpr int V = decltype(block)::value;
    const int count = int(p.C) - c, queries = tile.queries();
    for (int q = 0; q < queries; ++q) {
      Vector<A> sum[V];
      const int begin = tile.first[q], end = tile.first[q + 1];
#if defined(__AVX512BF16__)
      if constexpr (kEvenOdd<T, V, part>)
        if (pairs) {
          sum_pairs<V>(tile.at, begin, end, image + c, down, right, pairs, tile.size, sum);
          sink(block, part, q, c, sum, count);
          continue;
        }
#endif
      sum_keys<V, part>(tile.at, begin, end, image + c, down, right, count, sum);
      sink(block, part, q, c, sum, count);
    }
  });
}

// Adds to d four dots a key of a query, open or not: of the gradient's row with each corner's
// feature, V vectors of channels from `image` and `row` on.
template <int V, bool part, class T, class A>
__attribute__((noinline)) void dot_keys(const Entries<A>& at, int begin, int end, const T* image,
                                        int64_t down, int64_t right, int count, const T* row) {
  const int64_t *corner = at.corner + begin, *last = at.corner + end;
  A* d = at.d + begin * 4;
  using F = std::conditional_t<kEvenOdd<T, V, part>, Factor<T, A>, A>;
  constexpr int N = std::is_same_v<F, A> ? V : V / 2;
  const auto read = [&](const T* from, Vector<F>* to) {
    if constexpr (N == V)
      load_block<A, V, part>(from, count, to);
    else
      std::memcpy(to, from, N * sizeof *to);
  };
  Vector<F> gradient[N];
  read(row, gradient);
  const auto dot = [&](const T* corner) {
    Vector<F> x[N];
    Vector<A> sum = {};
    read(corner, x);
#pragma GCC unroll 16
    for (int v = 0; v < N; ++v) sum = add_product<A, F>(sum, gradient[v], x[v]);
    return sum;
  };
  for (; corner < last; ++corner, d += 4) {
    const T* c0 = image + *corner;
    const T *c1 = c0 + right, *c2 = c0 + down, *c3 = c1 + down;
    hold(c1), hold(c2), hold(c3);
    const Vector<A> s0 = dot(c0), s1 = dot(c1), s2 = dot(c2), s3 = dot(c3);
    add_totals<A>(s0, s1, s2, s3, d);
  }
}

template <class T, class A>
void dots(const Problem& p, Tile<A>& tile, const T* image) {
  const int64_t down = p.feature_strides[tile.l * 3 + 1], right = p.feature_strides[tile.l * 3 + 2];
  over_channels<kLanes<A>>(int(p.C), [&](auto block, auto part, int c) {
    for (int q = 0; q < tile.queries(); ++q) {
      const T* row = static_cast<const T*>(p.aggregate) + tile.pair(p, q) * p.C + c;
      dot_keys<decltype(block)::value, part>(tile.at, q * tile.slots, q * tile.slots + tile.K,
                                             image + c, down, right, int(p.C) - c, row);
    }
  });
}

// Adds a query's gradient to the corners of its open keys, V vectors of channels from `image` on.
template <int V, bool part, class T, class A>
__attribute__((noinline)) void add_keys(const Entries<A>& at, int begin, int end, A* image,
                                        int64_t down, int64_t right, int count, const T* row) {
  constexpr int lanes = kLanes<A>;
  const int32_t *next = at.picked + begin, *last = at.picked + end;
  const Integer<A>*rows = at.row, *columns = at.column;
  const A* w = at.w0;
  const int64_t apart = at.w1 - at.w0;  // of w0, w1, w2 and w3
  Vector<A> gradient[V];
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v) gradient[v] = load<A, part>(row + v * lanes, count);
  const auto add = [&](A* to, Vector<A> v) {
    store<A, part>(to, load<A, part>(to, count) + v, count);
  };
  for (; next < last; ++next) {
    const int64_t i = *next;
    A* c0 = image + rows[i] * down + columns[i] * right;
    A *c1 = c0 + right, *c2 = c0 + down, *c3 = c1 + down;
    hold(c1), hold(c2), hold(c3);
    const A w0 = w[i], w1 = w[i + apart], w2 = w[i + 2 * apart], w3 = w[i + 3 * apart];
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      const Vector<A> g = gradient[v];
      add(c0 + v * lanes, w0 * g), add(c1 + v * lanes, w1 * g);
      add(c2 + v * lanes, w2 * g), add(c3 + v * lanes, w3 * g);
    }
  }
}

// Adds the gradient's rows to the corners of the open keys in an image of the buffer [B,H+2,W+2,C].
template <class T, class A>
void scatter(const Problem& p, const Tile<A>& tile, A* image) {
  const int64_t right = p.C, down = (p.W + 2) * right;
  over_channels<kLanes<A>>(int(p.C), [&](auto block, auto part, int c) {
    for (int q = 0; q < tile.queries(); ++q) {
      const T* row = static_cast<const T*>(p.aggregate) + tile.pair(p, q) * p.C + c;
      add_keys<decltype(block)::value, part>(tile.at, tile.first[q], tile.first[q + 1], image + c,
                                             down, right, int(p.C) - c, row);
    }
  });
}

}  // namespace
