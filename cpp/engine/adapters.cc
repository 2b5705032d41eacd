#include "engine/adapters.h"

#include <algorithm>
#include <set>
#include <utility>

#include "core/error.h"

namespace tutelage {
namespace {

bool ends_with(const std::string& text, const std::string& ending) {
  return text.size() >= ending.size() && text.compare(text.size() - ending.size(), ending.size(), ending) == 0;
}

// "model.layers.0.mlp.up_proj.weight" -> "model.layers.0.mlp.up_proj"
std::string module_of(const Parameter& parameter) {
  return parameter.name.substr(0, parameter.name.size() - std::string(".weight").size());
}

void* at(void* base, std::int64_t index, const KernelTable& table) {
  return static_cast<char*>(base) + index * table.activation_size;
}
const void* at(const void* base, std::int64_t index, const KernelTable& table) {
  return static_cast<const char*>(base) + index * table.activation_size;
}

void* gradient_at(void* grads, std::int64_t index, const KernelTable& table) {
  return static_cast<char*>(grads) + index * table.state_size;
}

// The parameters that one matrix of the engine is made of.
template <class See>
void each_part(const Layout& layout, std::int64_t weight, std::int64_t size, See see) {
  for (const Parameter& p : layout.parameters)
    if (p.offset >= weight && p.offset < weight + size) see(p);
}

}  // namespace

Adapters::Adapters(const Config& c, const Layout& base, const AdapterOptions& options)
    : rank_(options.rank), scale_(options.scale) {
  if (rank_ < 1) throw ArgumentError("rank must be at least 1, but it is " + std::to_string(rank_));
  std::vector<bool> used(options.target_modules.size(), false);
  for (const LayerOffsets& w : base.layers) {
    add_group(base, w.qkv, c.hidden_size, c.qkv_width(), options.target_modules, used);
    add_group(base, w.out, c.query_width(), c.hidden_size, options.target_modules, used);
    add_group(base, w.up, c.hidden_size, c.pre_width(), options.target_modules, used);
    add_group(base, w.down, c.intermediate_size, c.hidden_size, options.target_modules, used);
  }
  for (std::size_t i = 0; i < used.size(); ++i) {
    if (used[i]) continue;
    std::set<std::string> known;
    for (const LayerOffsets& w : base.layers)
      for (const auto& [weight, size] : {std::pair{w.qkv, c.hidden_size * c.qkv_width()},
                                         {w.out, c.query_width() * c.hidden_size},
                                         {w.up, c.hidden_size * c.pre_width()},
                                         {w.down, c.intermediate_size * c.hidden_size}})
        each_part(base, weight, size, [&](const Parameter& p) {
          const std::string module = module_of(p);
          known.insert(module.substr(module.rfind('.') + 1));
        });
    std::string names;
    for (const std::string& name : known) names += (names.empty() ? "" : ", ") + name;
    throw ArgumentError("target_modules names '" + options.target_modules[i] +
                        "', which is no linear layer of this model's blocks; there are " + names);
  }
  if (c.head == Head::scalar) head_ = add("score.weight", {1, c.hidden_size}, Parameter::Init::scalar_head);
}

std::int64_t Adapters::add(std::string name, std::vector<std::int64_t> shape, Parameter::Init init) {
  const std::int64_t size = shape[0] * shape[1], offset = size_;
  parameters_.push_back({std::move(name), std::move(shape), offset, size, true, init});
  size_ += size;
  return offset;
}

void Adapters::add_group(const Layout& base, std::int64_t weight, std::int64_t in, std::int64_t out,
                         const std::vector<std::string>& targets, std::vector<bool>& used) {
  Group group{weight, in, out, size_, 0, {}, false};
  std::vector<std::string> names;
  std::int64_t covered = 0;
  each_part(base, weight, in * out, [&](const Parameter& p) {
    const std::string module = module_of(p);
    bool wanted = targets.empty();
    for (std::size_t i = 0; i < targets.size(); ++i)
      if (module == targets[i] || ends_with(module, "." + targets[i])) wanted = used[i] = true;
    if (!wanted) return;
    names.push_back(module);
    const std::int64_t columns = p.size / in;
    group.modules.push_back({(p.offset - weight) / in, columns, 0});
    covered += columns;
  });
  if (names.empty()) return;
  for (const std::string& name : names) add(name + ".lora_A.weight", {rank_, in}, Parameter::Init::uniform);
  for (std::size_t i = 0; i < names.size(); ++i)
    group.modules[i].b = add(names[i] + ".lora_B.weight", {group.modules[i].out, rank_}, Parameter::Init::zeros);
  group.width = rank_ * static_cast<std::int64_t>(names.size());
  group.whole = covered == out;
  widest_ = std::max(widest_, group.width);
  groups_.push_back(std::move(group));
}

const Adapters::Group* Adapters::of(std::int64_t weight) const {
  const auto found = std::lower_bound(groups_.begin(), groups_.end(), weight,
                                      [](const Group& group, std::int64_t offset) { return group.weight < offset; });
  return found != groups_.end() && found->weight == weight ? &*found : nullptr;
}

std::vector<PackedWeights::Matrix> Adapters::matrices() const {
  std::vector<PackedWeights::Matrix> all;
  for (const Group& group : groups_) {
    all.push_back({group.a, group.width, group.in, false, false});
    for (const Group::Module& module : group.modules) all.push_back({module.b, module.out, rank_, false, false});
  }
  return all;
}

void Adapters::project(const KernelTable& table, const Group& group, const void* params, const PackedWeights* packed,
                       std::int64_t rows, const void* x, void* t, int threads) const {
  Matmul p;
  p.m = rows, p.n = group.width, p.k = group.in;
  p.a = x, p.a_row = group.in, p.a_col = 1;
  p.b = at(params, group.a, table), p.b_row = 1, p.b_col = group.in;
  if (packed != nullptr) p.packed = packed->at(group.a);
  p.c = t, p.c_row = group.width, p.scale = scale_;
  table.matmul(p, threads);
}

void Adapters::begin_output(const KernelTable& table, const Group& group, const void* params, const PackedWeights* packed,
                            std::int64_t rows, const void* t, void* y, int threads) const {
  if (!group.whole) table.zero(y, static_cast<std::size_t>(rows * group.out * table.activation_size));
  for (std::size_t i = 0; i < group.modules.size(); ++i) {
    const Group::Module& module = group.modules[i];
    Matmul p;
    p.m = rows, p.n = module.out, p.k = rank_;
    p.a = at(t, static_cast<std::int64_t>(i) * rank_, table), p.a_row = group.width, p.a_col = 1;
    p.b = at(params, module.b, table), p.b_row = 1, p.b_col = rank_;
    if (packed != nullptr) p.packed = packed->at(module.b);
    p.c = at(y, module.column, table), p.c_row = group.out;
    table.matmul(p, threads);
  }
}

void Adapters::project_back(const KernelTable& table, const Group& group, const void* params, std::int64_t rows, const void* dy,
                            void* d_t, int threads) const {
  for (std::size_t i = 0; i < group.modules.size(); ++i) {
    const Group::Module& module = group.modules[i];
    Matmul p;
    p.m = rows, p.n = rank_, p.k = module.out;
    p.a = at(dy, module.column, table), p.a_row = group.out, p.a_col = 1;
    p.b = at(params, module.b, table), p.b_row = rank_, p.b_col = 1;
    p.c = at(d_t, static_cast<std::int64_t>(i) * rank_, table), p.c_row = group.width, p.scale = scale_;
    table.matmul(p, threads);
  }
}

void Adapters::begin_input(const KernelTable& table, const Group& group, const void* params, std::int64_t rows, const void* d_t,
                           void* dx, int threads) const {
  Matmul p;
  p.m = rows, p.n = group.in, p.k = group.width;
  p.a = d_t, p.a_row = group.width, p.a_col = 1;
  p.b = at(params, group.a, table), p.b_row = group.in, p.b_col = 1;
  p.c = dx, p.c_row = group.in;
  table.matmul(p, threads);
}

void Adapters::gradients(const KernelTable& table, const Group& group, void* grads, const Matmul& over_tokens, const void* x,
                         const void* t, const void* dy, const void* d_t, const std::function<bool(std::int64_t)>& fresh,
                         int threads) const {
  bool overwrite = false;  // the A's of a group get their gradients together, so they are all fresh or none is
  for (std::size_t i = 0; i < group.modules.size(); ++i)
    overwrite = fresh(group.a + static_cast<std::int64_t>(i) * rank_ * group.in);
  Matmul da = over_tokens;
  da.m = group.width, da.n = group.in, da.accumulate = !overwrite;
  da.a = d_t, da.a_row = 1, da.a_col = group.width;
  da.b = x, da.b_row = group.in, da.b_col = 1;
  da.c = gradient_at(grads, group.a, table), da.c_row = group.in, da.c_state = true;
  table.matmul(da, threads);
  for (std::size_t i = 0; i < group.modules.size(); ++i) {
    const Group::Module& module = group.modules[i];
    Matmul db = over_tokens;
    db.m = module.out, db.n = rank_, db.accumulate = !fresh(module.b);
    db.a = at(dy, module.column, table), db.a_row = 1, db.a_col = group.out;
    db.b = at(t, static_cast<std::int64_t>(i) * rank_, table), db.b_row = group.width, db.b_col = 1;
    db.c = gradient_at(grads, module.b, table), db.c_row = rank_, db.c_state = true;
    table.matmul(db, threads);
  }
}

}  // namespace tutelage
