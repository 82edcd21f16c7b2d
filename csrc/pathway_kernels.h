// One tile of the pathway loss, and through the headers below all kernels for it. Compiled once per
// instruction set by simd_dispatch.h.
#include "simd_elements.h"
//
#include "channels_kernels.h"
#include "flat_kernels.h"
#include "planes_kernels.h"

// The contribution of `planes` planes, from `first` on, to the pathway's loss. `means`: those of
// the pathway, or null; `scratch`: see scratch_of.
template <typename T>
double forward_tile(const Geometry& g, std::int64_t first, std::int64_t planes, const void* student,
                    const void* teacher, void* means, void* scratch) {
  using A = Accumulation<T>;
  const std::int64_t pixels = g.h * g.w;
  const T* s = static_cast<const T*>(student);
  const T* t = static_cast<const T*>(teacher);
  A* kept = static_cast<A*>(means);
  A* workspace = static_cast<A*>(scratch);
  if (g.layout == Layout::channels_last) {
    const std::int64_t image = first / g.c, channel = first % g.c;
    const std::int64_t start = image * g.c * pixels + channel;
    A* bins = kept ? kept + image * g.c * g.bins + channel : workspace;
    return forward_channels(g, s + start, t + start, planes, bins, kept ? g.c : planes);
  }
  s += first * pixels;
  t += first * pixels;
  if (g.distance == Distance::l1) {
    return g.element_weight * forward_flat<Flat::magnitudes>(s, t, planes * pixels);
  }
  if (g.levels == 0) return g.element_weight * forward_flat<Flat::squares>(s, t, planes * pixels);
  const auto run = g.levels == 3   ? forward_planes<3, T>
                   : g.levels == 2 ? forward_planes<2, T>
                                   : forward_planes<1, T>;
  return run(g, s, t, planes, kept ? kept + first * g.bins : nullptr, workspace);
}

// gradient = coefficient * d loss / d student over the tile.
template <typename T>
void backward_tile(const Geometry& g, std::int64_t first, std::int64_t planes, const void* student,
                   const void* teacher, void* gradient, const void* means, double coefficient,
                   void* scratch) {
  using A = Accumulation<T>;
  const std::int64_t pixels = g.h * g.w;
  const A* kept = static_cast<const A*>(means);
  const bool channels_last = g.layout == Layout::channels_last;
  const std::int64_t image = first / g.c, channel = first % g.c;
  const std::int64_t start = channels_last ? image * g.c * pixels + channel : first * pixels;
  const T* s = static_cast<const T*>(student) + start;
  const T* t = static_cast<const T*>(teacher) + start;
  T* out = static_cast<T*>(gradient) + start;
  if (coefficient == 0) {  // not computed: the maps may hold anything
    for (std::int64_t y = 0; y < (channels_last ? pixels : planes); ++y) {
      const std::int64_t run = channels_last ? planes : pixels;
      const std::int64_t step = channels_last ? g.c : pixels;
      for (std::int64_t k = 0; k < run; ++k) store(out[y * step + k], A{0});
    }
  } else if (channels_last) {
    const A* bins = kept + image * g.c * g.bins + channel;
    backward_channels(g, s, t, out, planes, bins, coefficient);
  } else if (g.distance == Distance::l1) {
    const A scale = static_cast<A>(coefficient * g.element_weight);
    backward_flat<Flat::magnitudes>(s, t, out, planes * pixels, scale);
  } else if (g.levels == 0) {
    const A scale = static_cast<A>(2 * coefficient * g.element_weight);
    backward_flat<Flat::squares>(s, t, out, planes * pixels, scale);
  } else {
    const A* bins = kept + first * g.bins;
    const auto run = g.levels == 3   ? backward_planes<3, T>
                     : g.levels == 2 ? backward_planes<2, T>
                                     : backward_planes<1, T>;
    run(g, s, t, out, planes, bins, coefficient, static_cast<A*>(scratch));
  }
}
