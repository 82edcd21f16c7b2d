#include "geometry.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace distpro {
namespace {

Axis axis(std::int64_t size, const Geometry& g) {
  std::vector<std::int64_t> edges{0, size};
  for (int l = 0; l < g.levels; ++l) {
    for (const Bin& bin : pool_bins(size, g.level[l])) {
      edges.push_back(bin.start);
      edges.push_back(bin.end);
    }
  }
  std::sort(edges.begin(), edges.end());
  edges.erase(std::unique(edges.begin(), edges.end()), edges.end());

  Axis result{};
  result.segments = static_cast<int>(edges.size()) - 1;
  std::copy(edges.begin(), edges.end(), result.edge);
  for (int l = 0; l < g.levels; ++l) {
    const std::vector<Bin> bins = pool_bins(size, g.level[l]);
    for (int i = 0; i < result.segments; ++i) {
      int& first = result.first[l][i];
      while (bins[first].end <= edges[i]) ++first;
      int& end = result.end[l][i];
      end = first;
      while (end < g.level[l] && bins[end].start <= edges[i]) ++end;
    }
  }
  return result;
}

}  // namespace

Geometry geometry(const Pathway& pathway, Distance distance) {
  Geometry g{};
  g.distance = distance;
  g.layout = pathway.layout;
  g.n = pathway.shape[0], g.c = pathway.shape[1], g.h = pathway.shape[2], g.w = pathway.shape[3];
  const double planes = static_cast<double>(g.n) * static_cast<double>(g.c);
  g.element_weight =
      pathway.levels[0].weight / (planes * static_cast<double>(g.h) * static_cast<double>(g.w));
  for (std::size_t k = 1; k < pathway.levels.size(); ++k) {
    const auto level = static_cast<int>(pathway.levels[k].level);
    const int l = g.levels++;
    g.level[l] = level;
    g.first_bin[l] = g.bins;
    g.bin_weight[l] = pathway.levels[k].weight / (planes * level * level);
    const std::vector<Bin> rows = pool_bins(g.h, level), columns = pool_bins(g.w, level);
    for (const Bin& row : rows) {
      for (const Bin& column : columns) {
        const auto area = static_cast<double>((row.end - row.start) * (column.end - column.start));
        g.inverse_area[g.bins] = 1 / area;
        g.gradient_factor[g.bins++] = 2 * g.bin_weight[l] / area;
      }
    }
  }
  g.rows = axis(g.h, g);
  g.columns = axis(g.w, g);
  for (int i = 0; i < g.rows.segments; ++i) {
    for (int j = 0; j < g.columns.segments; ++j) {
      BinList& containing = g.bins_containing[i][j];
      for (int l = 0; l < g.levels; ++l) {
        for (int r = g.rows.first[l][i]; r < g.rows.end[l][i]; ++r) {
          for (int c = g.columns.first[l][j]; c < g.columns.end[l][j]; ++c) {
            containing.bin[containing.count++] = g.first_bin[l] + r * g.level[l] + c;
          }
        }
      }
    }
  }
  return g;
}

}  // namespace distpro
