// Vectors of the widest kind the processor has, in the language that GCC and Clang share, and the
// functions of real numbers that cpu.cpp needs in loops that the compiler vectorises.
//
// T is a type in memory, A the type of the arithmetic: double for double, else float.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
constexpr int kBlock = kVectorBytes == 64 ? 16 : 8;  // vectors that fit in registers

struct bfloat16 {
  uint16_t bits;
};

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <class A, int N = kVectorBytes / sizeof(A)>
struct Simd {
  typedef A Vector __attribute__((vector_size(N * sizeof(A))));
};
template <class A>
using Vector = typename Simd<A>::Vector;
template <class A>
constexpr int kLanes = kVectorBytes / sizeof(A);
template <class A>
using Integer = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;
template <class A>
using Integers = Vector<Integer<A>>;  // as many as Vector<A> has lanes; what comparisons give

// Zeros that begin with a cache line.
template <class T>
class Buffer {
  struct alignas(64) Line {
    char bytes[64];
  };
  std::vector<Line> lines;

 public:
  explicit Buffer(int64_t size = 0) : lines((size * int64_t(sizeof(T)) + 63) / 64) {}
  T* data() { return reinterpret_cast<T*>(lines.data()); }
};

inline uint32_t widen(uint32_t v) { return v; }  // pairs of bfloat16
inline float widen(float v) { return v; }
inline double widen(double v) { return v; }
inline float widen(bfloat16 v) { return bit_cast<float>(uint32_t(v.bits) << 16); }

inline void narrow(float v, float& to) { to = v; }
inline void narrow(double v, double& to) { to = v; }
inline void narrow(float v, bfloat16& to) {  // to nearest, ties to even
  const uint32_t bits = bit_cast<uint32_t>(v);
  to.bits = uint16_t(v == v ? (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 : 0x7FC0);
}

using Floats = Vector<float>;
using Words = Vector<uint32_t>;
using Longs = Vector<uint64_t>;
using Halves = typename Simd<uint16_t, kLanes<float>>::Vector;

// The bits of floats whose upper halves are theirs in bfloat16, to nearest, ties to even.
inline Words rounded(Floats v) {
  const Words bits = bit_cast<Words>(v), number = bit_cast<Words>(v == v);
  return ((bits + 0x7FFFu + (bits >> 16 & 1u)) & number) | (0x7FC00000u & ~number);
}

template <class A, int... I>
constexpr Integers<A> count_up(std::integer_sequence<int, I...>) {
  return Integers<A>{I...};
}
template <class A>
constexpr Integers<A> kLane = count_up<A>(std::make_integer_sequence<int, kLanes<A>>{});  // 0, 1 …

inline Words pair_up(Floats low, Floats high) {  // two of bfloat16 in every word
#if defined(__AVX512BF16__)
  const Words alternate = bit_cast<Words>(kLane<float>) * 0x10001u + 0x100000u;  // 0, 16, 1, 17 …
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(__m512(high), __m512(low));
  return Words(_mm512_permutexvar_epi16(__m512i(alternate), both));
#else
  return rounded(low) >> 16 | (rounded(high) & 0xFFFF0000u);
#endif
}

// Reads and writes a vector of arithmetic type, or its first `count` lanes where `part` is true.
template <class A, bool part, class T>
inline Vector<A> load(const T* from, int count) {
  Vector<A> v = {};
  if constexpr (part) {
    for (int i = 0; i < count; ++i) v[i] = widen(from[i]);
  } else if constexpr (std::is_same_v<T, bfloat16>) {
    Halves halves;
    std::memcpy(&halves, from, sizeof halves);
    v = bit_cast<Floats>(__builtin_convertvector(halves, Words) << 16);
  } else {
    std::memcpy(&v, from, sizeof v);
  }
  return v;
}

template <class A, bool part, class T>
inline void store(T* to, Vector<A> v, int count) {
  if constexpr (part) {
    for (int i = 0; i < count; ++i) narrow(v[i], to[i]);
  } else if constexpr (std::is_same_v<T, bfloat16>) {
    const Halves halves = __builtin_convertvector(rounded(v) >> 16, Halves);
    std::memcpy(to, &halves, sizeof halves);
  } else {
    std::memcpy(to, &v, sizeof v);
  }
}

// Keeps something in a register of its own. GCC would make pointers of one and distances, and read
// vectors again and again; either way it runs out of registers or of loads.
template <class T>
inline void hold(T*& pointer) {
  asm("" : "+r"(pointer));
}
template <class A>
inline void hold_vector(Vector<A>& v) {
#if defined(__AVX512F__)
  asm("" : "+v"(v));
#elif defined(__x86_64__)
  asm("" : "+x"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
  (void)v;
}

// Reads and writes blocks of V vectors of channels. Whole blocks of bfloat16 come two vectors at a
// time, the even channels before the odd ones: a shift and a mask in place of a conversion.
template <class T, int V, bool part>
constexpr bool kEvenOdd = std::is_same_v<T, bfloat16> && V % 2 == 0 && !part;

template <class A, int V, bool part, class T>
inline void load_block(const T* from, int count, Vector<A>* to) {
  constexpr int lanes = kLanes<A>;
  if constexpr (kEvenOdd<T, V, part>) {
#pragma GCC unroll 16
    for (int v = 0; v < V; v += 2) {
      Words both;
      std::memcpy(&both, from + v * lanes, sizeof both);
      hold_vector<uint32_t>(both);
      to[v] = bit_cast<Floats>(both << 16), to[v + 1] = bit_cast<Floats>(both & 0xFFFF0000u);
    }
  } else {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) to[v] = load<A, part>(from + v * lanes, count - v * lanes);
  }
}

template <class A, int V, bool part, class T>
inline void store_block(T* to, const Vector<A>* from, int count) {
  constexpr int lanes = kLanes<A>;
  if constexpr (kEvenOdd<T, V, part>) {
#pragma GCC unroll 16
    for (int v = 0; v < V; v += 2) {
      const Words both = pair_up(from[v], from[v + 1]);
      std::memcpy(to + v * lanes, &both, sizeof both);
    }
  } else {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) store<A, part>(to + v * lanes, from[v], count - v * lanes);
  }
}

// Where the processor adds the products of pairs of bfloat16 to floats, rows of T are multiplied
// as 32 bits for two channels each.
#if defined(__AVX512BF16__)
template <class T>
constexpr bool kPairs = std::is_same_v<T, bfloat16>;
#else
template <class T>
constexpr bool kPairs = false;
#endif
template <class T>
constexpr int64_t steps(int64_t terms) {
  return kPairs<T> ? (terms + 1) / 2 : terms;
}
template <class T, class A>
using Factor = std::conditional_t<kPairs<T>, uint32_t, A>;

template <class A, class F>
inline Vector<A> add_product(Vector<A> sum, Vector<F> a, Vector<F> b) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<F, uint32_t>)
    return Floats(_mm512_dpbf16_ps(__m512(sum), (__m512bh)a, (__m512bh)b));
  else
#endif
    return sum + a * b;
}

// A vector's loads and stores where all lanes count, and loads of the first `count` of many.
template <class A>
inline Vector<A> get(const A* from) {
  return load<A, false>(from, 0);
}
template <class A>
inline void put(A* to, Vector<A> v) {
  store<A, false>(to, v, 0);
}
template <class A>
inline Vector<A> get_some(const A* from, int count, A rest) {
  if (count >= kLanes<A>) return get(from);
  Vector<A> v = rest - Vector<A>{};
  for (int i = 0; i < count; ++i) v[i] = from[i];
  return v;
}

template <class A>
inline void put_some(A* to, Vector<A> v, int count) {
  if (count >= kLanes<A>) return put(to, v);
  for (int i = 0; i < count; ++i) to[i] = v[i];
}

// Asks for `count` elements, to be in the cache soon.
template <class T>
inline void ask(const T* from, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(from + i, 0, 2);
  asm volatile("");  // GCC removes calls of functions that do nothing but ask
}
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Lane i of the result is lane I[i] of a followed by b.
template <class A, int... I>
inline Vector<A> shuffle(Vector<A> a, Vector<A> b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, I...);
#else
  return __builtin_shuffle(a, b, Integers<A>{I...});
#endif
}

// Adds lanes `step` apart: of a into the lanes without the bit `step`, of b into the others.
template <class A, int step, int... I>
inline Vector<A> fold(Vector<A> a, Vector<A> b, std::integer_sequence<int, I...>) {
  constexpr int N = kLanes<A>;
  return shuffle<A, (I & step ? N + I - step : I)...>(a, b) +
         shuffle<A, (I & step ? N + I : I + step)...>(a, b);
}

// Adds the sums of the lanes of four vectors to to[0], …, to[3].
template <class A>
inline void add_totals(Vector<A> a, Vector<A> b, Vector<A> c, Vector<A> d, A* to) {
  constexpr int N = kLanes<A>;
  if constexpr (N == 2) {
    to[0] += a[0] + a[1], to[1] += b[0] + b[1], to[2] += c[0] + c[1], to[3] += d[0] + d[1];
  } else {
    constexpr auto all = std::make_integer_sequence<int, N>{};
    Vector<A> v = fold<A, N / 4>(fold<A, N / 2>(a, b, all), fold<A, N / 2>(c, d, all), all);
    if constexpr (N >= 8) v = fold<A, N / 8>(v, v, all);
    if constexpr (N >= 16) v = fold<A, N / 16>(v, v, all);
    to[0] += v[0], to[1] += v[N / 2], to[2] += v[N / 4], to[3] += v[N / 4 * 3];
  }
}

// Joins the lanes pairwise, `step` and fewer apart; every lane gets the result.
template <class A, int step, class F, int... I>
inline Vector<A> join(Vector<A> v, F&& pair, std::integer_sequence<int, I...> all) {
  v = pair(v, shuffle<A, (I ^ step)...>(v, v));
  if constexpr (step > 1) v = join<A, step / 2>(v, pair, all);
  return v;
}
template <class A>
inline Vector<A> total_of(Vector<A> v) {
  constexpr auto all = std::make_integer_sequence<int, kLanes<A>>{};
  return join<A, kLanes<A> / 2>(v, [](Vector<A> a, Vector<A> b) { return a + b; }, all);
}
template <class A>
inline Vector<A> top_of(Vector<A> v) {
  constexpr auto all = std::make_integer_sequence<int, kLanes<A>>{};
  return join<A, kLanes<A> / 2>(v, [](Vector<A> a, Vector<A> b) { return a > b ? a : b; }, all);
}

// Reads groups of four numbers: the first of each group to `to[0]`, and so on.
template <class A, int... I>
inline void part_by_four(const A* from, Vector<A>* to, std::integer_sequence<int, I...>) {
  constexpr int N = kLanes<A>;
  Vector<A> even[2], odd[2];
  for (int i = 0; i < 2; ++i) {
    const Vector<A> a = get(from + 2 * i * N), b = get(from + (2 * i + 1) * N);
    even[i] = shuffle<A, (2 * I)...>(a, b), odd[i] = shuffle<A, (2 * I + 1)...>(a, b);
  }
  to[0] = shuffle<A, (2 * I)...>(even[0], even[1]);
  to[1] = shuffle<A, (2 * I)...>(odd[0], odd[1]);
  to[2] = shuffle<A, (2 * I + 1)...>(even[0], even[1]);
  to[3] = shuffle<A, (2 * I + 1)...>(odd[0], odd[1]);
}
template <class A>
inline void part_by_four(const A* from, Vector<A>* to) {
  part_by_four<A>(from, to, std::make_integer_sequence<int, kLanes<A>>{});
}

// Appends to a list first + i for each lane i that is open (-1, not 0); returns its new length. May
// write kSlack elements past that.
constexpr int kSlack = 16;
template <class A>
inline int append(int32_t* list, int length, Integers<A> open, int32_t first) {
#if defined(__AVX512F__)
  const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  unsigned bits;
  if constexpr (sizeof(A) == 8)
    bits = _mm512_test_epi64_mask(__m512i(open), __m512i(open));
  else
    bits = _mm512_test_epi32_mask(__m512i(open), __m512i(open));
  const __m512i indices = _mm512_add_epi32(lanes, _mm512_set1_epi32(first));
  _mm512_storeu_si512(list + length, _mm512_maskz_compress_epi32(__mmask16(bits), indices));
  return length + __builtin_popcount(bits);
#else
#if defined(__AVX2__) && defined(__BMI2__)
  if constexpr (sizeof(A) == 4) {  // the numbers 0 .. 7 as bytes, without those of closed lanes
    const unsigned bits = unsigned(_mm256_movemask_ps(__m256(open)));
    const uint64_t bytes = _pdep_u64(bits, 0x0101010101010101) * 0xFF;
    const __m128i lanes = _mm_cvtsi64_si128(int64_t(_pext_u64(0x0706050403020100, bytes)));
    put<int32_t>(list + length, Integers<A>(_mm256_cvtepu8_epi32(lanes)) + first);
    return length + __builtin_popcount(bits);
  }
#endif
  for (int i = 0; i < kLanes<A>; ++i) list[length] = first + i, length -= int(open[i]);
  return length;
#endif
}

// Calls body(V, part, first channel) for blocks of V vectors of channels; the last may be in part.
template <int lanes, class F>
inline void over_channels(int C, F&& body) {
  constexpr auto whole = std::false_type{};
  int c = 0;
  for (; C - c >= kBlock * lanes; c += kBlock * lanes)
    body(std::integral_constant<int, kBlock>{}, whole, c);
  if constexpr (kBlock > 8)
    if (C - c >= 8 * lanes) body(std::integral_constant<int, 8>{}, whole, c), c += 8 * lanes;
  if (C - c >= 4 * lanes) body(std::integral_constant<int, 4>{}, whole, c), c += 4 * lanes;
  if (C - c >= 2 * lanes) body(std::integral_constant<int, 2>{}, whole, c), c += 2 * lanes;
  if (C - c >= lanes) body(std::integral_constant<int, 1>{}, whole, c), c += lanes;
  if (c < C) body(std::integral_constant<int, 1>{}, std::true_type{}, c);
}

// Matrices [n,rows,columns] for `product` with rows of T; kept in `memory` if not as they are.
template <class T, class A>
const Factor<T, A>* factors(const void* matrices, int64_t n, int64_t rows, int64_t columns,
                            Buffer<Factor<T, A>>& memory) {
  const A* from = static_cast<const A*>(matrices);
  if constexpr (kPairs<T>) {
    memory = Buffer<uint32_t>(n * steps<T>(rows) * columns);
    uint32_t* to = memory.data();
    for (int64_t i = 0; i < n; ++i, from += rows * columns)
      for (int64_t r = 0; r < rows; r += 2, to += columns)
        for (int64_t c = 0; c < columns; c += kLanes<A>) {
          const A* first = from + r * columns + c;
          const int count = int(least(columns - c, kLanes<A>));
          const Floats second = r + 1 < rows ? get_some(first + columns, count, A(0)) : Floats{};
          put_some<uint32_t>(to + c, pair_up(get_some(first, count, A(0)), second), count);
        }
    return memory.data();
  } else {
    return from;
  }
}

// out[r] = start[r] + Σ in[r][c] · weight[c] for R rows and V vectors of columns. Not inline, so that
// the sums have all registers.
template <int R, int V, bool part, class T, class W, class A>
__attribute__((noinline)) void multiply(const T* const (&in)[R], int64_t terms, const W* weight,
                                        int64_t step, const A* const (&start)[R],
                                        A* const (&out)[R], int count) {
  constexpr int lanes = kLanes<A>;
  const auto term = [](const T* from, int64_t c) {
    if constexpr (kPairs<T>) {
      W both;
      std::memcpy(&both, from + 2 * c, sizeof both);
      return both;
    } else {
      return widen(from[c]);
    }
  };
  Vector<A> sum[R * V];
#pragma GCC unroll 16
  for (int i = 0; i < R * V; ++i) sum[i] = load<A, part>(start[i / V] + i % V * lanes, count);
  for (int64_t c = 0; c < terms; ++c, weight += step) {
    Vector<W> w[V];
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      w[v] = load<W, part>(weight + v * lanes, count);
      hold_vector<W>(w[v]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < R * V; ++i)
      sum[i] = add_product<A, W>(sum[i], term(in[i / V], c) - Vector<W>{}, w[i % V]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < R * V; ++i) store<A, part>(out[i / V] + i % V * lanes, sum[i], count);
}

// The same for all queries of a tile and all columns. in(q), start(q) and out(q) are rows; the
// columns of `weight`, of `factors`, are `step` apart.
template <class T, class A, class In, class Start, class Out>
void product(int queries, int inner, const Factor<T, A>* weight, int64_t step, int columns, In&& in,
             Start&& start, Out&& out) {
  constexpr int lanes = kLanes<A>, widest = kBlock / 4;  // sums of four rows, in half the registers
  const auto rows = [&](auto some, int q) {
    constexpr int N = decltype(some)::value;
    const T* from[N];
    const A* begin[N];
    A* to[N];
    for (int r = 0; r < N; ++r) from[r] = in(q + r), begin[r] = start(q + r), to[r] = out(q + r);
    int o = 0;
    const auto block = [&](auto wide, auto part) {
      constexpr int V = decltype(wide)::value;
      multiply<N, V, decltype(part)::value>(from, steps<T>(inner), weight + o, step, begin, to,
                                            columns - o);
      for (int r = 0; r < N; ++r) begin[r] += V * lanes, to[r] += V * lanes;
      o += V * lanes;
    };
    constexpr auto whole = std::false_type{};
    if constexpr (N <= 4) {
      if constexpr (widest > 3)
        while (columns - o >= 4 * lanes) block(std::integral_constant<int, 4>{}, whole);
      while (columns - o >= 3 * lanes) block(std::integral_constant<int, 3>{}, whole);
      if (columns - o >= 2 * lanes) block(std::integral_constant<int, 2>{}, whole);
    }
    if (columns - o >= lanes) block(std::integral_constant<int, 1>{}, whole);
    if (o < columns) block(std::integral_constant<int, 1>{}, std::true_type{});
  };
  int q = 0;
  if (columns < 2 * lanes)
    for (; q + 8 <= queries; q += 8) rows(std::integral_constant<int, 8>{}, q);
  for (; q + 4 <= queries; q += 4) rows(std::integral_constant<int, 4>{}, q);
  for (; q < queries; ++q) rows(std::integral_constant<int, 1>{}, q);
}

// Cephes polynomials, good to 2 units in the last place.

inline Vector<double> exponential(Vector<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}

inline Floats exponential(Floats x) {  // for x <= 0; 0 below -87, NaN stays NaN
  const Floats clamped = x > -87.0f ? x : -87.0f - Floats{};
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Floats shifted = clamped * 1.44269504f + magic, n = shifted - magic;
  const Floats r = clamped - n * 0.693359375f + n * 2.12194440e-4f;
  Floats p = 1.9875691500e-4f * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Words exponent = bit_cast<Words>(shifted) - (bit_cast<uint32_t>(magic) - 127);
  const Floats power = p * bit_cast<Floats>(exponent << 23);
  return x >= -87.0f ? power : (x < -87.0f ? Floats{} : x);
}

inline float logarithm(float x) {  // for 0 < x < 1, normal
  const int32_t bits = bit_cast<int32_t>(x);
  const int32_t exponent = (bits - 0x3F3504F3) >> 23;  // brings the mantissa to [√½, √2)
  const float m = bit_cast<float>(bits - exponent * (1 << 23)) - 1.0f, e = float(exponent);
  float p = 7.0376836292e-2f;
  p = p * m - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  const float small = p * m * m * m - e * 2.12194440e-4f - 0.5f * m * m;
  return m + small + e * 0.693359375f;
}

inline Longs low_product(Longs a, uint32_t b) {  // of the lower halves of 64 bits
#if defined(__AVX512F__)
  return Longs(_mm512_mul_epu32(__m512i(a), _mm512_set1_epi64(b)));
#elif defined(__AVX2__)
  return Longs(_mm256_mul_epu32(__m256i(a), _mm256_set1_epi64x(b)));
#else
  return (a & 0xFFFFFFFFu) * uint64_t(b);
#endif
}

// Logistic noise for counters from `counter` on, at least `count`, whole vectors of float.
// Philox4x32-10, see philox.py; what the upper halves hold never reaches a lower one.
template <class A>
inline void draw_noise(uint64_t seed, uint64_t counter, int count, A* to) {
  constexpr int lanes = kLanes<uint64_t>, pair = 2 * lanes;  // two hide each other's latency
  for (int i = 0; i < count; i += pair) {
    Longs c0[2], c1[2], c2[2] = {}, c3[2] = {}, k0 = seed - Longs{}, k1 = k0 >> 32;
    for (int h = 0; h < 2; ++h) {
      c0[h] = counter + uint64_t(i + h * lanes) + bit_cast<Longs>(kLane<double>);
      c1[h] = c0[h] >> 32;
    }
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        const Longs p0 = low_product(c0[h], 0xD2511F53u), p1 = low_product(c2[h], 0xCD9E8D57u);
        c0[h] = p1 >> 32 ^ c1[h] ^ k0, c2[h] = p0 >> 32 ^ c3[h] ^ k1;
        c1[h] = p1, c3[h] = p0;
      }
      k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    uint64_t bits[pair];
    std::memcpy(bits, c0, sizeof bits);
#pragma omp simd
    for (int lane = 0; lane < pair; ++lane) {
      const float u = (float(int32_t(uint32_t(bits[lane]) >> 9)) + 0.5f) * (1.0f / (1 << 23));
      to[i + lane] = A(logarithm(u) - logarithm(1.0f - u));
    }
  }
}

}  // namespace
