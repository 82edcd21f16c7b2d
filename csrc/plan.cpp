#include "plan.h"

#include <algorithm>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <string>
#include <unordered_map>

namespace distpro {
namespace {

constexpr std::int64_t kMaxElements = std::numeric_limits<std::int64_t>::max();
constexpr std::int64_t kMaxTiles = std::numeric_limits<std::int32_t>::max();  // blocks of a grid
constexpr std::int64_t kPlaneGroup = 8;

template <typename... Parts>
void require(bool good, const Parts&... parts) {
  if (good) return;
  std::ostringstream text;
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}

std::string to_string(const Shape& s) {
  std::ostringstream text;
  text << "[" << s[0] << ", " << s[1] << ", " << s[2] << ", " << s[3] << "]";
  return text.str();
}

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return a / b + (a % b != 0); }

void check_shape(std::size_t pathway, const Shape& shape) {
  std::int64_t room = kMaxElements;
  for (const std::int64_t size : shape) {
    require(size >= 1, "tile_plan: pathway ", pathway, " has shape ", to_string(shape),
            ", but every size must be at least 1");
    room /= size;
  }
  require(room >= 1, "tile_plan: pathway ", pathway, " has shape ", to_string(shape),
          ", more elements than 64 bits count");
}

// Planes of a tile: `wanted`, but at least `least`, in whole groups if it can hold one.
std::int64_t tile_step(std::int64_t run, std::int64_t wanted, std::int64_t group,
                       std::int64_t least) {
  const std::int64_t step = std::min(std::max(wanted, least), run);
  return step >= group ? step - step % group : step;
}

}  // namespace

std::vector<Level> hcl_levels(std::int64_t height) {
  require(height >= 1, "hcl_levels: height is ", height, ", but must be at least 1");
  std::vector<Level> levels{{0, 1.0}};
  double sum = 1.0;
  for (const std::int64_t level : {4, 2, 1}) {
    if (level >= height) continue;
    levels.push_back({level, levels.back().weight / 2});
    sum += levels.back().weight;
  }
  for (Level& level : levels) level.weight /= sum;
  return levels;
}

std::vector<Bin> pool_bins(std::int64_t size, std::int64_t level) {
  require(size >= 1, "pool_bins: size is ", size, ", but must be at least 1");
  require(level >= 1, "pool_bins: level is ", level, ", but must be at least 1");
  // size = whole * level + rest keeps i * size from overflowing: both bounds are i * whole plus a
  // fraction of `rest`, which is below `level`.
  const std::int64_t whole = size / level;
  const std::int64_t rest = size % level;
  std::vector<Bin> bins;
  bins.reserve(static_cast<std::size_t>(level));
  for (std::int64_t i = 0; i < level; ++i) {
    bins.push_back({i * whole + i * rest / level,  //
                    (i + 1) * whole + ceil_div((i + 1) * rest, level)});
  }
  return bins;
}

Tiling tile_plan(const std::vector<Shape>& shapes, const std::vector<Layout>& layouts,
                 const std::vector<std::int64_t>& teacher_of, std::int64_t tile_elements,
                 std::int64_t tile_channels) {
  require(shapes.size() == layouts.size(), "tile_plan: ", shapes.size(), " shapes, but ",
          layouts.size(), " layouts");
  require(shapes.size() == teacher_of.size(), "tile_plan: ", shapes.size(), " shapes, but ",
          teacher_of.size(), " teacher maps; each pathway needs one of both");
  require(tile_elements >= 1, "tile_plan: tile_elements is ", tile_elements,
          ", but must be at least 1");
  require(tile_channels >= 1, "tile_plan: tile_channels is ", tile_channels,
          ", but must be at least 1");

  std::vector<std::vector<std::size_t>> groups;  // the pathways of each teacher map
  std::unordered_map<std::int64_t, std::size_t> group_of;
  for (std::size_t p = 0; p < shapes.size(); ++p) {
    check_shape(p, shapes[p]);
    const auto [found, is_new] = group_of.try_emplace(teacher_of[p], groups.size());
    if (is_new) groups.emplace_back();
    std::vector<std::size_t>& group = groups[found->second];
    group.push_back(p);
    require(shapes[p] == shapes[group.front()], "tile_plan: pathways ", group.front(), " and ", p,
            " share teacher map ", teacher_of[p],
            ", but their shapes differ: ", to_string(shapes[group.front()]), " and ",
            to_string(shapes[p]));
    require(layouts[p] == layouts[group.front()], "tile_plan: pathways ", group.front(), " and ", p,
            " share teacher map ", teacher_of[p], ", but their layouts differ");
  }

  Tiling tiling;
  std::vector<Tile>& tiles = tiling.tiles;
  tiling.series.resize(shapes.size());
  for (const std::vector<std::size_t>& group : groups) {
    const auto [n, c, h, w] = shapes[group.front()];
    const bool channels_last = layouts[group.front()] == Layout::channels_last;
    const std::int64_t run = channels_last ? c : n * c;  // planes within which a tile must stay
    const std::int64_t step =
        tile_step(run, tile_elements / (h * w), channels_last ? tile_channels : kPlaneGroup,
                  channels_last ? tile_channels : 1);
    const std::int64_t runs = n * c / run;
    const auto pathways = static_cast<std::int64_t>(group.size());
    const auto first_tile = static_cast<std::int64_t>(tiles.size());
    const std::int64_t room = kMaxTiles - first_tile;
    require(ceil_div(run, step) <= room / pathways / runs, "tile_plan: tiles of ", tile_elements,
            " elements make more than ", kMaxTiles, " tiles; raise tile_elements");
    const std::int64_t count = ceil_div(run, step) * runs;
    tiles.reserve(static_cast<std::size_t>(first_tile + count * pathways));
    tiling.map_starts.push_back(first_tile);
    for (std::int64_t k = 0; k < pathways; ++k) {
      tiling.series[group[static_cast<std::size_t>(k)]] = {first_tile + k, pathways, count, step};
    }
    for (std::int64_t start = 0; start < n * c; start += run) {
      for (std::int64_t first = 0; first < run; first += step) {
        for (const std::size_t p : group) {
          tiles.push_back(
              {static_cast<std::int64_t>(p), start + first, std::min(step, run - first)});
        }
      }
    }
  }
  tiling.map_starts.push_back(static_cast<std::int64_t>(tiles.size()));
  return tiling;
}

}  // namespace distpro
