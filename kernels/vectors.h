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
using Halves = typename Simd<uint16_t, kLanes<float>>::Vector;

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
    const Words bits = bit_cast<Words>(v), number = bit_cast<Words>(v == v);
    const Words rounded = (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
    const Halves halves = __builtin_convertvector((rounded & number) | (0x7FC0u & ~number), Halves);
    std::memcpy(to, &halves, sizeof halves);
  } else {
    std::memcpy(to, &v, sizeof v);
  }
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

// Keeps something in a register of its own. GCC would make pointers of one and distances, and read
// vectors again and again; either way it runs out of registers or of loads.
template <class T>
inline void hold(T*& pointer) {
  asm("" : "+r"(pointer));
}
template <class A>
inline void hold_vector(Vector<A>& v) {
#if defined(__x86_64__) || defined(__aarch64__)
  asm("" : "+x"(v));
#endif
  (void)v;
}

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

template <class A, int... I>
constexpr Integers<A> count_up(std::integer_sequence<int, I...>) {
  return Integers<A>{I...};
}
template <class A>
constexpr Integers<A> kLane = count_up<A>(std::make_integer_sequence<int, kLanes<A>>{});  // 0, 1 …

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

// out[r] = start[r] + Σ in[r][c] · weight[c] for R rows and V vectors of columns. Not inline, so that
// the sums have all registers.
template <int R, int V, bool part, class T, class A>
__attribute__((noinline)) void multiply(const T* const (&in)[R], int inner, const A* weight,
                                        int64_t step, const A* const (&start)[R],
                                        A* const (&out)[R], int count) {
  constexpr int lanes = kLanes<A>;
  Vector<A> sum[R * V];
#pragma GCC unroll 16
  for (int i = 0; i < R * V; ++i) sum[i] = load<A, part>(start[i / V] + i % V * lanes, count);
  for (int c = 0; c < inner; ++c, weight += step) {
    Vector<A> w[V];
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      w[v] = load<A, part>(weight + v * lanes, count);
      hold_vector<A>(w[v]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < R * V; ++i) sum[i] += widen(in[i / V][c]) * w[i % V];
  }
#pragma GCC unroll 16
  for (int i = 0; i < R * V; ++i) store<A, part>(out[i / V] + i % V * lanes, sum[i], count);
}

// The same for all queries of a tile and all columns. in(q), start(q) and out(q) are rows.
template <class A, class In, class Start, class Out>
void product(int queries, int inner, const A* weight, int64_t step, int columns, In&& in,
             Start&& start, Out&& out) {
  constexpr int lanes = kLanes<A>, R = 4;  // with three vectors, sums fit in 16 registers
  const auto rows = [&](auto some, int q) {
    constexpr int N = decltype(some)::value;
    std::decay_t<decltype(in(0))> from[N];
    const A* begin[N];
    A* to[N];
    for (int r = 0; r < N; ++r) from[r] = in(q + r), begin[r] = start(q + r), to[r] = out(q + r);
    int o = 0;
    const auto block = [&](auto wide, auto part) {
      constexpr int V = decltype(wide)::value;
      multiply<N, V, decltype(part)::value>(from, inner, weight + o, step, begin, to, columns - o);
      for (int r = 0; r < N; ++r) begin[r] += V * lanes, to[r] += V * lanes;
      o += V * lanes;
    };
    constexpr auto whole = std::false_type{};
    while (columns - o >= 3 * lanes) block(std::integral_constant<int, 3>{}, whole);
    if (columns - o >= 2 * lanes) block(std::integral_constant<int, 2>{}, whole);
    if (columns - o >= lanes) block(std::integral_constant<int, 1>{}, whole);
    if (o < columns) block(std::integral_constant<int, 1>{}, std::true_type{});
  };
  int q = 0;
  for (; q + R <= queries; q += R) rows(std::integral_constant<int, R>{}, q);
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

inline float logistic_noise(uint64_t seed, uint64_t counter) {  // Philox4x32-10, see philox.py
  uint32_t c0 = uint32_t(counter), c1 = uint32_t(counter >> 32), c2 = 0, c3 = 0;
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t(c0) * 0xD2511F53u, p1 = uint64_t(c2) * 0xCD9E8D57u;
    c0 = uint32_t(p1 >> 32) ^ c1 ^ k0, c2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
    c1 = uint32_t(p1), c3 = uint32_t(p0);
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  const float u = (float(int32_t(c0 >> 9)) + 0.5f) * (1.0f / (1 << 23));
  return logarithm(u) - logarithm(1.0f - u);
}

}  // namespace
