// Element types of the CPU kernels. Conversions are branch-free bit arithmetic, so that a loop over
// them vectorises on any machine. Included inside a namespace once per instruction set: no includes,
// and nothing that the linker could merge across instruction sets.

struct BFloat16 {
  std::uint16_t bits;
};

struct Half {
  std::uint16_t bits;
};

// clang-format off
template <typename T> struct AccumulationOf { using type = float; };
template <> struct AccumulationOf<double> { using type = double; };
// clang-format on

template <typename T>
using Accumulation = typename AccumulationOf<T>::type;

template <typename To, typename From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "the sizes must agree");
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

inline float load(float x) { return x; }
inline double load(double x) { return x; }
inline float load(BFloat16 x) { return bit_cast<float>(std::uint32_t{x.bits} << 16); }

inline float load(Half x) {
  const std::uint32_t magnitude = (x.bits & 0x7fffu) << 13;
  // 2^112 moves the exponent's bias from 15 to 127 and makes subnormals normal.
  const std::uint32_t finite = bit_cast<std::uint32_t>(bit_cast<float>(magnitude) * 0x1p112f);
  const std::uint32_t special = magnitude | 0x7f800000u;  // infinity and NaN
  const std::uint32_t value = magnitude >= (0x7c00u << 13) ? special : finite;
  return bit_cast<float>(value | (x.bits & 0x8000u) << 16);
}

inline void store(float& to, float x) { to = x; }
inline void store(double& to, double x) { to = x; }

// To nearest, ties to even, as torch rounds.
inline void store(BFloat16& to, float x) {
  const std::uint32_t bits = bit_cast<std::uint32_t>(x);
  const std::uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  to.bits = static_cast<std::uint16_t>(x != x ? 0x7fc0u : rounded);
}

inline void store(Half& to, float x) {
  const std::uint32_t bits = bit_cast<std::uint32_t>(x);
  const std::uint32_t sign = bits >> 16 & 0x8000u;
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  // Subnormal results: adding 0.5 puts the 10 bits kept at the end of the sum's mantissa, rounded.
  const std::uint32_t small = bit_cast<std::uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  const std::uint32_t normal = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  std::uint32_t value = magnitude < (113u << 23) ? small : normal;
  value = magnitude >= (143u << 23) ? 0x7c00u : value;   // 65536 and more, after rounding below too
  value = magnitude > 0x7f800000u ? 0x7e00u : value;     // NaN
  to.bits = static_cast<std::uint16_t>(value | sign);
}
