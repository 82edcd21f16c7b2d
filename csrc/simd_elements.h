// Element types of the CPU kernels, as scalars and vectors. Included inside a namespace once per
// instruction set, with kVectorBytes declared: no includes, and nothing that the linker could merge
// across instruction sets.

struct BFloat16 {
  std::uint16_t bits;
};

struct Half {
  std::uint16_t bits;
};

// Vectors of floats and of doubles, and of as many 32-bit and 16-bit integers as Floats has floats.
typedef float Floats __attribute__((vector_size(kVectorBytes)));
typedef double Doubles __attribute__((vector_size(kVectorBytes)));
typedef std::uint32_t Words __attribute__((vector_size(kVectorBytes)));
typedef std::uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));

// clang-format off
template <typename T> struct AccumulationOf { using scalar = float; using vector = Floats; };
template <> struct AccumulationOf<double> { using scalar = double; using vector = Doubles; };
// clang-format on

template <typename T>
using Accumulation = typename AccumulationOf<T>::scalar;
template <typename T>
using Vector = typename AccumulationOf<T>::vector;
template <typename T>
constexpr int kLanes = sizeof(Vector<T>) / sizeof(Accumulation<T>);

#define DISTPRO_INLINE inline __attribute__((always_inline))

template <typename To, typename From>
DISTPRO_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "the sizes must agree");
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

// Conversions are branch-free bit arithmetic, for scalars (F = float, U = uint32_t) and vectors
// alike: no special instructions are needed.

template <typename F, typename U>
DISTPRO_INLINE F from_half(U bits) {
  const U magnitude = (bits & 0x7fffu) << 13;
  // 2^112 moves the exponent's bias from 15 to 127 and makes subnormals normal.
  const U finite = bit_cast<U>(bit_cast<F>(magnitude) * 0x1p112f);
  const U special = magnitude | 0x7f800000u;  // infinity and NaN
  return bit_cast<F>((magnitude >= (0x7c00u << 13) ? special : finite) | (bits & 0x8000u) << 16);
}

// Rounds to nearest, ties to even, like PyTorch.
template <typename U, typename F>
DISTPRO_INLINE U to_bfloat16(F x) {
  const U bits = bit_cast<U>(x), nan = U{} + 0x7fc0u;
  const U rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  return (bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded;
}

template <typename U, typename F>
DISTPRO_INLINE U to_half(F x) {
  const U bits = bit_cast<U>(x), infinity = U{} + 0x7c00u, nan = U{} + 0x7e00u;
  const U magnitude = bits & 0x7fffffffu;
  // Subnormal results: adding 0.5 rounds to the 10 bits kept, at the end of the sum's mantissa.
  const U small = bit_cast<U>(bit_cast<F>(magnitude) + 0.5f) - 0x3f000000u;
  const U normal = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  U value = magnitude < (113u << 23) ? small : normal;
  value = magnitude >= (143u << 23) ? infinity : value;
  value = magnitude > 0x7f800000u ? nan : value;
  return value | (bits >> 16 & 0x8000u);
}

DISTPRO_INLINE float load(float x) { return x; }
DISTPRO_INLINE double load(double x) { return x; }
DISTPRO_INLINE float load(BFloat16 x) { return bit_cast<float>(std::uint32_t{x.bits} << 16); }
DISTPRO_INLINE float load(Half x) { return from_half<float>(std::uint32_t{x.bits}); }

DISTPRO_INLINE void store(float& to, float x) { to = x; }
DISTPRO_INLINE void store(double& to, double x) { to = x; }
DISTPRO_INLINE void store(BFloat16& to, float x) {
  to.bits = static_cast<std::uint16_t>(to_bfloat16<std::uint32_t>(x));
}
DISTPRO_INLINE void store(Half& to, float x) {
  to.bits = static_cast<std::uint16_t>(to_half<std::uint32_t>(x));
}

DISTPRO_INLINE Floats load_vector(const float* from) {
  Floats to;
  __builtin_memcpy(&to, from, sizeof(to));
  return to;
}
DISTPRO_INLINE Doubles load_vector(const double* from) {
  Doubles to;
  __builtin_memcpy(&to, from, sizeof(to));
  return to;
}
DISTPRO_INLINE Words load_words(const void* from) {
#ifdef DISTPRO_AVX512
  // GCC 12 compiles the conversion below to five instructions; this is one.
  typedef short Shorts __attribute__((vector_size(32)));
  typedef int Ints __attribute__((vector_size(64)));
  Shorts bits;
  __builtin_memcpy(&bits, from, sizeof(bits));
  return bit_cast<Words>(__builtin_ia32_pmovzxwd512_mask(bits, Ints{}, 0xffff));
#else
  Halves bits;
  __builtin_memcpy(&bits, from, sizeof(bits));
  return __builtin_convertvector(bits, Words);
#endif
}
DISTPRO_INLINE Floats load_vector(const BFloat16* from) {
  return bit_cast<Floats>(load_words(from) << 16);
}
DISTPRO_INLINE Floats load_vector(const Half* from) { return from_half<Floats>(load_words(from)); }

DISTPRO_INLINE void store_vector(float* to, const Floats& x) {
  __builtin_memcpy(to, &x, sizeof(x));
}
DISTPRO_INLINE void store_vector(double* to, const Doubles& x) {
  __builtin_memcpy(to, &x, sizeof(x));
}
DISTPRO_INLINE void store_vector(BFloat16* to, const Floats& x) {
  const Halves bits = __builtin_convertvector(to_bfloat16<Words>(x), Halves);
  __builtin_memcpy(to, &bits, sizeof(bits));
}
DISTPRO_INLINE void store_vector(Half* to, const Floats& x) {
  const Halves bits = __builtin_convertvector(to_half<Words>(x), Halves);
  __builtin_memcpy(to, &bits, sizeof(bits));
}

// A scalar if V is float or double, else a vector.
template <typename V, typename T>
DISTPRO_INLINE V read(const T* from) {
  if constexpr (sizeof(V) == sizeof(Accumulation<T>)) {
    return load(*from);
  } else {
    return load_vector(from);
  }
}

template <typename V, typename T>
DISTPRO_INLINE void write(T* to, const V& x) {
  if constexpr (sizeof(V) == sizeof(Accumulation<T>)) {
    store(*to, x);
  } else {
    store_vector(to, x);
  }
}

template <typename A, typename V>
DISTPRO_INLINE double sum_of(const V& x) {
  A parts[sizeof(V) / sizeof(A)];
  __builtin_memcpy(parts, &x, sizeof(x));
  double sum = 0;
  for (const A part : parts) sum += part;
  return sum;
}

// Prefetches numbers that will be read soon; any address is allowed.
template <typename T>
DISTPRO_INLINE void prefetch(const T* from, std::int64_t size) {
  const char* bytes = reinterpret_cast<const char*>(from);
  const std::int64_t end = size * static_cast<std::int64_t>(sizeof(T));
  for (std::int64_t i = 0; i < end; i += 64) __builtin_prefetch(bytes + i);
}
