#include "core/error.h"
#include "core/tensor.h"
#include "test.h"

using namespace tutelage;

namespace {
TensorView view() { return {"hidden", nullptr, DType::float32, Place::cpu, false, {3, 4}, {4, 1}}; }
}  // namespace

TEST(a_good_view_passes_every_check) {
  const TensorView x = view();
  x.require_cpu().require_dtype(DType::float32).require_contiguous().require_shape({3, -1}).require_shape({3, 4});
  CHECK(x.rank() == 2 && x.size() == 12 && x.describe() == "float32 [3, 4] on the CPU", x.describe());
}

TEST(errors_name_the_argument_what_was_expected_and_what_came) {
  TensorView x = view();
  CHECK_THROWS(ArgumentError, "argument 'hidden' must be float64, but it is float32 [3, 4] on the CPU",
               x.require_dtype(DType::float64));
  CHECK_THROWS(ArgumentError, "argument 'hidden' must have shape [any, 5], but it is float32 [3, 4] on the CPU",
               x.require_shape({-1, 5}));
  CHECK_THROWS(ArgumentError, "argument 'hidden' must have shape [3, 4, 1], but it is float32 [3, 4] on the CPU",
               x.require_shape({3, 4, 1}));
  CHECK_THROWS(ArgumentError, "argument 'hidden' must have shape [], but it is float32 [3, 4] on the CPU", x.require_shape({}));
  x.strides = {1, 3};
  CHECK_THROWS(ArgumentError, "argument 'hidden' must be contiguous; call .contiguous() on it first", x.require_contiguous());
  x.place = Place::other, x.dtype = DType::other;
  CHECK_THROWS(ArgumentError, "argument 'hidden' must be on the CPU, but it is another dtype [3, 4] on another device",
               x.require_cpu());
}

TEST(contiguity_ignores_strides_that_move_nothing) {
  TensorView x = view();
  x.shape = {1, 4}, x.strides = {99, 1};
  CHECK(x.contiguous());
  x.shape = {2, 4}, x.strides = {8, 1};
  CHECK(!x.contiguous());
  x.shape = {}, x.strides = {};
  CHECK(x.contiguous() && x.size() == 1);
  x.shape = {0, 4}, x.strides = {1, 9};
  CHECK(x.size() == 0 && x.contiguous());
}

TEST(dtypes_have_names_and_sizes) {
  const DType all[] = {DType::float32, DType::float64, DType::bfloat16, DType::int32, DType::boolean, DType::other};
  const char* names[] = {"float32", "float64", "bfloat16", "int32", "bool", "another dtype"};
  const std::int64_t sizes[] = {4, 8, 2, 4, 1, 0};
  for (int i = 0; i < 6; ++i) CHECK(dtype_name(all[i]) == std::string(names[i]) && dtype_size(all[i]) == sizes[i], names[i]);
}

TEST(cu_seqlens_start_at_zero_never_fall_and_end_at_the_number_of_tokens) {
  const std::int32_t good[] = {0, 2, 2, 5};
  require_cu_seqlens(good, 3, 5);
  const std::int32_t late[] = {1, 5}, falling[] = {0, 4, 3, 5};
  CHECK_THROWS(ArgumentError, "cu_seqlens must start at 0, but it starts at 1", require_cu_seqlens(late, 1, 5));
  CHECK_THROWS(ArgumentError, "cu_seqlens must never fall, but entry 2 is 3 after 4", require_cu_seqlens(falling, 3, 5));
  CHECK_THROWS(ArgumentError, "cu_seqlens must end at the number of tokens, 6, but it ends at 5",
               require_cu_seqlens(good, 3, 6));
}

TEST(a_token_id_out_of_range_is_named_with_its_sequence_and_position) {
  const std::int32_t cu_seqlens[] = {0, 2, 2, 5};
  std::int32_t ids[] = {0, 9, 3, 4, 5};
  require_token_ids("tokens", ids, 5, 10, cu_seqlens, 3);
  ids[4] = 10;
  CHECK_THROWS(ArgumentError, "tokens: token id 10 at position 2 of sequence 2 is outside the vocabulary of 10 ids (0 to 9)",
               require_token_ids("tokens", ids, 5, 10, cu_seqlens, 3));
  ids[1] = -1;
  CHECK_THROWS(ArgumentError, "tokens: token id -1 at position 1 of sequence 0 is outside the vocabulary of 10 ids (0 to 9)",
               require_token_ids("tokens", ids, 5, 10, cu_seqlens, 3));
}
