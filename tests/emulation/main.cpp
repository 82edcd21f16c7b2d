// The CUDA kernels, emulated, against the CPU kernels: the same call twice, outputs poisoned first.
// Exits with 1 and one line a failure where they differ.
#include <cstdio>
#include <cstring>
#include <functional>
#include <random>
#include <string>

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "pathway_loss.h"
#include "vectors.h"

namespace {

using namespace distpro;

int failures = 0;
std::mt19937 random_bits(0);

template <typename T>
constexpr Dtype kDtype = std::is_same_v<T, float>           ? Dtype::float32
                         : std::is_same_v<T, double>        ? Dtype::float64
                         : std::is_same_v<T, __nv_bfloat16> ? Dtype::bfloat16
                                                            : Dtype::float16;
template <typename T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

double value(double x) { return x; }
double value(__nv_bfloat16 x) { return __bfloat162float(x); }
double value(__half x) { return __half2float(x); }
void assign(float& to, double x) { to = static_cast<float>(x); }
void assign(double& to, double x) { to = x; }
void assign(__nv_bfloat16& to, double x) { to = __float2bfloat16_rn(static_cast<float>(x)); }
void assign(__half& to, double x) { to = __float2half_rn(static_cast<float>(x)); }

// Elements at an address that may be off a 16-byte boundary, poisoned with NaN all around.
template <typename T>
struct Array {
  Array(std::size_t size, int shift = 0) : size(size), memory(size + 32) {
    std::memset(memory.data(), 0xff, memory.size() * sizeof(T));
    const auto address = reinterpret_cast<std::uintptr_t>(memory.data());
    data = memory.data() + (16 - address % 16) % 16 / sizeof(T) + 16 + shift;
  }
  void fill(double mean = 0) {
    std::normal_distribution<double> normal(mean, 1);
    for (std::size_t i = 0; i < size; ++i) assign(data[i], normal(random_bits));
  }
  std::uintptr_t address() const { return reinterpret_cast<std::uintptr_t>(data); }
  bool untouched_outside() const {
    for (const T* at = memory.data(); at != memory.data() + memory.size(); ++at) {
      if ((at < data || at >= data + size) && value(*at) == value(*at)) return false;
    }
    return true;
  }
  std::size_t size;
  std::vector<T> memory;
  T* data;
};

// norm(a - b) <= tolerance * norm(b), NaN where the other is NaN, and nothing written outside.
template <typename T>
void compare(const std::string& what, const Array<T>& a, const Array<T>& b, double tolerance) {
  double error = 0, norm = 0;
  bool same = a.untouched_outside();
  for (std::size_t i = 0; i < a.size; ++i) {
    const double x = value(a.data[i]), y = value(b.data[i]);
    if (x != x || y != y) {
      same = same && x != x && y != y;
    } else {
      error += (x - y) * (x - y);
      norm += y * y;
    }
  }
  if (same && error <= tolerance * tolerance * norm) return;
  ++failures;
  std::printf("%s: relative error %.2e, %s\n", what.c_str(), std::sqrt(error / norm),
              same ? "NaN where expected" : "NaN or writes out of place");
}

struct Case {
  Distance distance;
  std::vector<Shape> shapes;
  std::vector<Layout> layouts;
  std::vector<std::int64_t> teacher_of;
  std::int64_t tile_elements = 8192;
  int shift = 0;     // of every map's start, in elements
  int dropped = -1;  // pathway of weight 0, its maps left NaN
  bool keep_means = true;
};

template <typename T>
void check_loss(const std::string& name, const Case& c) {
  const PathwayPlan plan =
      pathway_plan(kDtype<T>, c.distance, c.shapes, c.layouts, c.teacher_of, c.tile_elements, 16);
  const std::size_t count = c.shapes.size();
  std::vector<Array<T>> students, teachers;
  std::vector<std::uintptr_t> student_at, teacher_at;
  Array<Acc<T>> weights(count), grad_loss(1), grad_per_pathway(count);
  weights.fill(2);
  grad_loss.fill(1);
  grad_per_pathway.fill();
  for (std::size_t p = 0; p < count; ++p) {
    const auto [n, ch, h, w] = c.shapes[p];
    const auto size = static_cast<std::size_t>(n * ch * h * w);
    students.emplace_back(size, c.shift);
    teachers.emplace_back(size, c.shift);
    const bool dropped = static_cast<int>(p) == c.dropped;
    if (dropped) weights.data[p] = 0;
    if (!dropped) students[p].fill(0.3);
    if (!dropped) teachers[p].fill();
  }
  for (std::size_t p = 0; p < count; ++p) {
    std::size_t first = 0;
    while (c.teacher_of[first] != c.teacher_of[p]) ++first;
    student_at.push_back(students[p].address());
    teacher_at.push_back(teachers[first].address());
  }
  const auto means_size = static_cast<std::size_t>(plan.means_size);
  std::vector<Array<Acc<T>>> loss(2, Array<Acc<T>>(1)), each(2, Array<Acc<T>>(count)),
      means(2, Array<Acc<T>>(means_size));
  std::vector<std::vector<Array<T>>> gradients(2);
  for (int cuda = 0; cuda < 2; ++cuda) {
    std::vector<double> partials(plan.tiling.tiles.size(), NAN);
    loss[cuda] = Array<Acc<T>>(1);  // copies keep addresses of their source: make anew
    each[cuda] = Array<Acc<T>>(count);
    means[cuda] = Array<Acc<T>>(means_size);
    const LossForward forward{student_at.data(), teacher_at.data(),
                              weights.data,      loss[cuda].data,
                              each[cuda].data,   c.keep_means ? means[cuda].data : nullptr,
                              partials.data()};
    cuda ? cuda::pathway_loss_forward(plan, forward, nullptr)
         : cpu::pathway_loss_forward(plan, forward);
    if (!c.keep_means) continue;
    std::vector<std::uintptr_t> gradient_at;
    gradients[cuda].reserve(count);
    for (std::size_t p = 0; p < count; ++p) {
      gradients[cuda].emplace_back(students[p].size, c.shift);
      gradient_at.push_back(gradients[cuda][p].address());
    }
    // The CPU's means for both, so that each pass is judged alone.
    const LossBackward backward{student_at.data(), teacher_at.data(), gradient_at.data(),
                                weights.data,      grad_loss.data,    grad_per_pathway.data,
                                means[0].data};
    cuda ? cuda::pathway_loss_backward(plan, backward, nullptr)
         : cpu::pathway_loss_backward(plan, backward);
  }
  const double tolerance = std::is_same_v<T, double> ? 1e-13 : 1e-6;
  compare(name + " loss", loss[1], loss[0], tolerance);
  compare(name + " per_pathway", each[1], each[0], tolerance);
  compare(name + " means", means[1], means[0], tolerance);
  for (std::size_t p = 0; p < gradients[1].size(); ++p) {
    compare(name + " gradient " + std::to_string(p), gradients[1][p], gradients[0][p],
            sizeof(T) == 2 ? 2e-3 : tolerance);
  }
}

template <typename T>
void check_losses(const std::string& type) {
  const std::pair<int, int> sides[] = {
      {1, 1},   {2, 2},  {3, 3},   {4, 4},   {5, 5}, {6, 6}, {7, 7},  {8, 8},   {9, 2},  {3, 9},
      {14, 14}, {14, 6}, {16, 16}, {32, 32}, {5, 1}, {1, 5}, {2, 16}, {28, 28}, {6, 31}, {40, 7}};
  for (const auto& [h, w] : sides) {
    for (const Layout layout : {Layout::planes, Layout::channels_last}) {
      for (const int channels : {3, 24, 64}) {
        const Shape shape{h * w < 100 ? 3 : 2, channels, h, w};
        const std::string name =
            type + (layout == Layout::planes ? " planes " : " channels_last ") +
            std::to_string(channels) + "x" + std::to_string(h) + "x" + std::to_string(w);
        check_loss<T>(name, {Distance::hcl, {shape, shape}, {layout, layout}, {0, 0}});
      }
    }
  }
  const Layout planes = Layout::planes, last = Layout::channels_last;
  // More than a tile, and than a block's shared memory; off the 16-byte boundary; mixed lists.
  check_loss<T>(type + " large plane", {Distance::hcl, {{2, 2, 96, 97}}, {planes}, {0}});
  check_loss<T>(type + " wide plane", {Distance::hcl, {{1, 2, 7, 1300}}, {planes}, {0}});
  check_loss<T>(type + " large channels", {Distance::hcl, {{1, 33, 70, 66}}, {last}, {0}});
  check_loss<T>(type + " large tile", {Distance::hcl, {{2, 300, 8, 8}}, {planes}, {0}, 1 << 20});
  check_loss<T>(type + " large tile 7", {Distance::hcl, {{1, 400, 7, 7}}, {last}, {0}, 1 << 20});
  check_loss<T>(type + " large tile 5", {Distance::hcl, {{3, 300, 5, 5}}, {planes}, {0}, 1 << 20});
  check_loss<T>(type + " small tile", {Distance::hcl, {{2, 40, 7, 7}}, {planes}, {0}, 1});
  check_loss<T>(type + " shifted", {Distance::hcl, {{2, 32, 8, 8}}, {planes}, {0}, 8192, 1});
  check_loss<T>(type + " shifted last", {Distance::hcl, {{2, 32, 8, 8}}, {last}, {0}, 8192, 1});
  check_loss<T>(type + " no means",
                {Distance::hcl, {{2, 32, 8, 8}}, {last}, {0}, 8192, 0, -1, false});
  const Shape a{3, 40, 16, 16}, b{5, 64, 8, 8}, c{2, 17, 7, 5};
  const Case mixed{Distance::hcl,
                   {a, b, a, c, a, b},
                   {planes, last, planes, last, planes, last},
                   {0, 1, 0, 2, 0, 1},
                   2048,
                   0,
                   2};
  check_loss<T>(type + " mixed", mixed);
  for (const Distance distance : {Distance::l2, Distance::l1}) {
    const std::string kind = type + (distance == Distance::l2 ? " l2" : " l1");
    const Shape x{12345, 1, 1, 1}, y{7, 1, 1, 1};
    check_loss<T>(kind, {distance, {x, y, x}, {planes, planes, planes}, {0, 1, 0}, 8192, 0, 2});
    check_loss<T>(kind + " shifted", {distance, {x}, {planes}, {0}, 8192, 1});
  }
}

void check_many() {  // more pathways than a launch takes, and than a second stage takes
  for (const int count : {1, 130, 1030}) {
    Case c{Distance::hcl, {}, {}, {}};
    for (int p = 0; p < count; ++p) {
      c.shapes.push_back({1, 2 + p / 3 % 5, 4, 4});
      c.layouts.push_back(Layout::planes);
      c.teacher_of.push_back(p / 3);
    }
    check_loss<float>(std::to_string(count) + " pathways", c);
  }
  check_loss<float>("no pathway", {Distance::hcl, {}, {}, {}});
}

template <typename T>
void check_dots(const std::string& type, int slots, int shift) {
  const std::vector<std::int64_t> sizes{5000, 12, 5000, 8192, 1, 20000, 5000};
  const std::vector<std::int64_t> right_of{0, 1, 0, 2, 3, 4, 0}, slot_of{2, 0, 1, 2, 0, 4, 2};
  const VectorPlan plan = dots_plan(kDtype<T>, sizes, right_of, slot_of, slots, 2048);
  std::vector<Array<T>> left, right;
  std::vector<std::uintptr_t> left_at, right_at;
  for (const std::int64_t size : sizes) {
    left.emplace_back(size, shift).fill(0.5);
    right.emplace_back(size, shift).fill(0.5);
  }
  for (std::size_t i = 0; i < sizes.size(); ++i) {
    left_at.push_back(left[i].address());
    right_at.push_back(
        right[static_cast<std::size_t>(std::find(right_of.begin(), right_of.end(), right_of[i]) -
                                       right_of.begin())]
            .address());
  }
  Array<Acc<T>> one(slots), other(slots);
  std::vector<double> partials(plan.tiling.tiles.size(), NAN);
  cpu::pathway_dots(plan, {left_at.data(), right_at.data(), one.data, partials.data()});
  cuda::pathway_dots(plan, {left_at.data(), right_at.data(), other.data, partials.data()}, nullptr);
  compare(type + " dots", other, one, std::is_same_v<T, double> ? 1e-13 : 1e-6);
}

template <typename T>
void check_perturb(const std::string& type, int arrays, int shift, double scale) {
  std::vector<std::int64_t> sizes;
  for (int i = 0; i < arrays; ++i) sizes.push_back(1 + i * 7919 % 5000);
  const VectorPlan plan = perturb_plan(kDtype<T>, sizes, 2048);
  std::vector<Array<T>> parameters, directions, plus[2], minus[2];
  std::vector<std::uintptr_t> parameter_at, direction_at;
  for (const std::int64_t size : sizes) {
    parameters.emplace_back(size, shift).fill();
    directions.emplace_back(size, shift).fill();
    for (std::int64_t i = 0; i < size; ++i) directions.back().data[i] *= T(scale);
  }
  for (int i = 0; i < arrays; ++i) {
    parameter_at.push_back(parameters[i].address());
    direction_at.push_back(directions[i].address());
  }
  Array<T> one(1), other(1);
  for (int cuda = 0; cuda < 2; ++cuda) {
    std::vector<double> partials(plan.tiling.tiles.size(), NAN);
    std::vector<std::uintptr_t> plus_at, minus_at;
    plus[cuda].reserve(arrays), minus[cuda].reserve(arrays);
    for (const std::int64_t size : sizes) {
      plus_at.push_back(plus[cuda].emplace_back(size, shift).address());
      minus_at.push_back(minus[cuda].emplace_back(size, shift).address());
    }
    const Perturb call{
        parameter_at.data(),       direction_at.data(), plus_at.data(), minus_at.data(), 0.01,
        (cuda ? other : one).data, partials.data()};
    cuda ? cuda::perturb(plan, call, nullptr) : cpu::perturb(plan, call);
  }
  const double tolerance = std::is_same_v<T, double> ? 1e-13 : 1e-6;
  compare(type + " epsilon", other, one, tolerance);
  for (int i = 0; i < arrays; ++i) {
    compare(type + " plus", plus[1][i], plus[0][i], tolerance);
    compare(type + " minus", minus[1][i], minus[0][i], tolerance);
  }
}

}  // namespace

int main(int arguments, char** argument) {
  const bool all = arguments < 2;
  const auto wanted = [&](const char* what) { return all || !std::strcmp(argument[1], what); };
  if (wanted("float32")) check_losses<float>("float32");
  if (wanted("float64")) check_losses<double>("float64");
  if (wanted("bfloat16")) check_losses<__nv_bfloat16>("bfloat16");
  if (wanted("float16")) check_losses<__half>("float16");
  if (wanted("many")) check_many();
  if (wanted("vectors")) {
    for (const int shift : {0, 1}) {
      check_dots<float>("float32", 5, shift);
      check_dots<double>("float64", 6, shift);
      check_dots<__nv_bfloat16>("bfloat16", 5, shift);
      check_dots<__half>("float16", 5, shift);
      for (const double scale : {1.0, 0.0, 1e-30, std::numeric_limits<double>::infinity()}) {
        check_perturb<float>("float32", 9, shift, scale);
        check_perturb<double>("float64", 9, shift, scale);
      }
    }
    check_perturb<float>("float32, many", 300, 0, 1);
  }
  std::printf("%d failures\n", failures);
  return failures ? 1 : 0;
}
